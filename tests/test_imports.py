"""Who may import whom (docs/design, section 2), read from the source."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {p.name: p for p in sorted(ROOT.glob("packages/*/src/declip_*"))}
PIPELINES = ROOT / "pipelines"
MAY_IMPORT = {
    "declip_shards": set(),
    "declip_ingest": {"declip_shards"},
    "declip_filter": {"declip_shards"},
    "declip_pixels": {"declip_shards"},
    "declip_train": {"declip_shards", "declip_pixels"},
    "declip_eval": set(),
    "pipelines": set(PACKAGES),
}
"""Package -> what it may import of ours, itself aside."""
ONE_ROOM = {
    "faiss": "declip_filter",
    "deepspeed": "declip_train",
    "ray": "pipelines",
    "img2dataset": "declip_ingest",
}
"""Heavy dependency -> the only package that imports it."""
SOURCES = [
    (name, path)
    for name, folder in {**PACKAGES, "pipelines": PIPELINES}.items()
    for path in sorted(folder.rglob("*.py"))
]


def imported(source, *, module_level=False):
    """Names of all modules that a source imports, inside functions too unless told otherwise."""
    tree = ast.parse(source)
    nodes = _at_import(tree) if module_level else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return names


def _at_import(tree):
    """Nodes that run when the module is imported: no function bodies, nothing for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import(node)


@functools.cache
def imports_of(path, *, module_level=False):
    return imported(path.read_text(), module_level=module_level)


def roots(names):
    return {name.partition(".")[0] for name in names}


def test_every_package_is_known_here():
    assert set(PACKAGES) | {"pipelines"} == set(MAY_IMPORT)
    assert all(any(owner == name for owner, _ in SOURCES) for name in MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_lies_below_them(package):
    ours = set(MAY_IMPORT)
    for path in (p for owner, p in SOURCES if owner == package):
        found = roots(imports_of(path)) & ours
        wrong = found - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("library", ONE_ROOM)
def test_a_heavy_dependency_has_one_room(library):
    users = {owner for owner, path in SOURCES if library in roots(imports_of(path))}
    assert users == {ONE_ROOM[library]}


def test_sources_import_neither_tests_nor_relatives():
    for _, path in SOURCES:
        names = imports_of(path)
        assert not any(name.startswith((".", "tests")) for name in names), path


def test_what_the_command_line_loads_is_light():
    # What recipes need to be built; torch and its like are imported where the work begins.
    heavy = {"torch", "ray", "faiss", "sklearn", "scipy", "transformers", "deepspeed", "cv2"}
    modules = {f"{owner}.{path.stem}": path for owner, path in SOURCES}
    modules |= {owner: path for owner, path in SOURCES if path.stem == "__init__"}
    seen, waiting = set(), ["pipelines.cli"]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        names = imports_of(modules[name], module_level=True)
        assert not roots(names) & heavy, f"{name} imports {sorted(roots(names) & heavy)}"
        waiting += [*names, *(n.partition(".")[0] for n in names)]
    assert {"pipelines.recipes", "declip_train.settings", "declip_filter.index"} <= seen


def test_the_reader_of_imports_sees_every_form():
    source = """
import a.b, c as d
from e.f import g
from . import h
def later():
    import i
    importlib.import_module("j.k")
if TYPE_CHECKING:
    import l
class C:
    import m
    def n(self):
        import o
"""
    assert roots(imported(source)) == {"a", "c", "e", "", "i", "j", "l", "m", "o"}
    assert roots(imported(source, module_level=True)) == {"a", "c", "e", "", "m"}
