"""A pipeline: named steps, each a stage and the steps it reads."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from declip_shards import DeclipError, Stage
from declip_shards.errors import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage in its place."""

    name: str
    """What the command line calls it, and its settings' prefix (``--filter.min-words``)."""
    stage: Stage
    """The stage; its fields are its settings."""
    reads: Sequence[str] = ()
    """Steps whose manifests enter this one's fingerprint."""
    watches: Sequence[str] = ()
    """Folders of the user's own whose content enters this one's fingerprint."""
    on_ray: bool = False
    """Whether its tasks may run on a cluster (they touch nothing but the dataset)."""
    service: Callable[[], AbstractContextManager[object]] | None = None
    """Something that must run while the step does: the demo's HTTP server."""
    summary: str = ""
    """One line for the terminal: what the step is for."""
    settings_of: str = ""
    """Name of the step that has this one's settings: it prepares or finishes that one's work."""
    data_root: str = ""
    """Dataset whose steps ``reads`` names, a folder or URL; empty: the pipeline's own."""

    @property
    def code_version(self) -> str:
        """Versions of the packages that make the stage's bytes: part of the fingerprint."""
        own = type(self.stage).__module__.partition(".")[0]
        rooms = ["declip_shards", own]
        if own == "pipelines":
            rooms[1:] = ["declip_filter", "declip_train", "declip_eval", own]
        versions = (getattr(importlib.import_module(room), "__version__", "0") for room in rooms)
        return ", ".join(f"{r} {v}" for r, v in zip(rooms, versions, strict=True))


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a recipe returns."""

    recipe: str
    """Name of the recipe."""
    root: str
    """Folder (any fsspec URL) of the dataset."""
    steps: Sequence[Step] = field(default_factory=tuple)
    """In order; a step reads only earlier ones."""
    derive: Callable[["Pipeline"], "Pipeline"] | None = None
    """Carries a setting to other steps that must agree with it, after overrides are applied."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for step in self.steps:
            unknown = [] if step.data_root else sorted(set(step.reads) - seen)
            if unknown:
                raise ValueError(f"step {step.name!r} reads {unknown[0]!r}, which is not before it")
            if step.name in seen:
                raise ValueError(f"two steps are called {step.name!r}")
            seen.add(step.name)
        for step in self.steps:
            if step.settings_of and step.settings_of not in seen:
                raise ValueError(
                    f"step {step.name!r} has the settings of {step.settings_of!r}, which is no step"
                )

    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    def with_followers(self) -> "Pipeline":
        """The same, each step of another's settings (``settings_of``) brought into line with it."""
        stages: dict[str, Any] = {step.name: step.stage for step in self.steps}
        steps = []
        for step in self.steps:
            if step.settings_of:
                owner, follower = stages[step.settings_of], stages[step.name]
                shared = {
                    f.name: getattr(owner, f.name) for f in dataclasses.fields(owner) if f.init
                }
                step = dataclasses.replace(step, stage=dataclasses.replace(follower, **shared))
            steps.append(step)
        return dataclasses.replace(self, steps=steps)

    def step(self, name: str) -> Step:
        """The step of that name, dashes for underscores; the nearest is offered for another."""
        for step in self.steps:
            if step.name == name.replace("-", "_"):
                return step
        raise DeclipError(
            f"recipe {self.recipe!r} has no stage {name!r}.{did_you_mean(name, self.names())}"
        )

    def choose(
        self, *, only: str | None = None, first: str | None = None, until: str | None = None
    ) -> list[Step]:
        """Steps named by ``--only``, ``--from`` and ``--until`` (both ends included)."""
        if only is not None:
            if first is not None or until is not None:
                raise DeclipError("--only names one stage; leave out --from and --until.")
            return [self.step(only)]
        names = self.names()
        start = names.index(self.step(first).name) if first is not None else 0
        end = names.index(self.step(until).name) if until is not None else len(names) - 1
        if start > end:
            raise DeclipError(f"--from {first} comes after --until {until}; swap them.")
        return list(self.steps[start : end + 1])
