"""Named sets of prompt templates: a class name goes where the braces stand."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

OPENAI_7: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates that CLIP's authors selected for ImageNet (Radford et al. 2021, prompts
notebook), with their spelling kept."""

SIMPLE_TEMPLATES: tuple[str, ...] = (
    "{}",
    "{} emoji",
    "a {} emoji",
    "an emoji of {}",
    "a drawing of {}",
    "a picture of {}",
    "an icon of {}",
)
"""For drawings, icons and emoji, whose captions are names rather than photo descriptions."""

PHOTO: tuple[str, ...] = ("a photo of a {}.",)
"""CLIP's single default prompt (Radford et al. 2021, section 3.1.4)."""

NAME_ONLY: tuple[str, ...] = ("{}",)
"""The class name alone."""

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "openai_7": OPENAI_7,
    "simple": SIMPLE_TEMPLATES,
    "photo": PHOTO,
    "name_only": NAME_ONLY,
}


def get_templates(name: str) -> tuple[str, ...]:
    """Return the template set called `name`.

    Raises:
        ValueError: no such set; the nearest name is offered.
    """
    if name in TEMPLATE_SETS:
        return TEMPLATE_SETS[name]
    near = get_close_matches(name, TEMPLATE_SETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TEMPLATE_SETS)}."
    raise ValueError(f"There is no template set {name!r}: {hint}")


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return `templates` as a tuple, or refuse them.

    Raises:
        ValueError: none given, one string instead of a list, or a template without exactly one
            pair of braces.
    """
    if isinstance(templates, str):
        raise ValueError(
            f"templates is the single string {templates!r}, but a list of templates is needed: "
            "wrap it in a list, or look a named set up with get_templates()."
        )
    if not templates:
        raise ValueError('templates is empty: give at least one, such as "a photo of a {}.".')
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"The template {template!r} has {template.count('{}')} places for the class name, "
                "but needs exactly one {}."
            )
    return tuple(templates)


def fill(template: str, class_name: str) -> str:
    """Put `class_name` where the template's braces stand; braces in the name mean themselves."""
    return template.replace("{}", class_name)
