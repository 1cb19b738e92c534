"""The rules of the house: what may import what, what is shipped, what is public."""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import pydoc
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import tdfx

PACKAGE = Path(tdfx.__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[1]
in_checkout = pytest.mark.skipif(
    PACKAGE != ROOT / "tdfx" or not (ROOT / "pyproject.toml").exists(),
    reason="tdfx is installed, and this reads the checkout",
)

LAYERS = (
    {"errors", "checks", "text", "progress", "devices", "help_texts"},
    {"ranks", "factors"},
    {"cost"},
    {"plans", "policies", "kinds"},
    {"layers"},
    {"distributed"},
    {"passes"},
    {"wrappers", "optim"},
    {"checkpoint", "onnx_proof"},
    {"api", "planned_rewrite"},
    {"training"},
    {"integrations", "report", "demo", "cli", "public", "__init__", "__main__"},
)
"""The files and folders of tdfx, lowest first; each may import those of its own layer and below, without circles."""

STAGES = {"analysis": {"base", "program"}, "planning": {"analysis"}, "transform": {"analysis", "planning"}}
"""The folders of the compiler -> the folders and files that each may import besides its own; ``pipeline`` imports all."""

PASSES = {
    "analysis": {"trace", "find", "shapes"},
    "planning": {"step_time", "attach_metric", "select"},
    "transform": {"rewrite", "merge"},
}
"""The files that hold the passes; the other files of these folders are what the passes share."""

TOOLS = {
    "click",
    "jinja2",
    "matplotlib",
    "networkx",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "sklearn",
    "tensorly",
    "torchvision",
}
TRAINERS = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
LAZY = TOOLS | TRAINERS
"""What `import tdfx` must leave alone."""


def part_of(module: str) -> str:
    """Return the file or folder of tdfx that a module belongs to.

    >>> part_of("tdfx.passes.analysis.find"), part_of("tdfx")
    ('passes', '__init__')
    """
    return [*module.split("."), "__init__"][1]


def level(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def sources() -> dict[str, str]:
    """Return the text of every module of tdfx by its name."""
    files = [path for pattern in ("*.py", "*/*.py", "*/*/*.py") for path in PACKAGE.glob(pattern)]
    texts = {}
    for path in sorted(files):
        names = ["tdfx", *path.relative_to(PACKAGE).with_suffix("").parts]
        texts[".".join(names)] = path.read_text(encoding="utf-8")
    return texts


def imports(source: str) -> Iterator[str]:
    """Yield every module that is imported when the code runs, wherever the import stands."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def climbs(module: str, source: str) -> list[str]:
    """Return the imports of a module that go up."""
    own = part_of(module)
    parts = {part_of(name) for name in imports(source) if name.split(".")[0] == "tdfx"}
    return [f"{module} imports {part}" for part in sorted(parts) if part != own and level(part) > level(own)]


def edges(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Return for each module the modules of tdfx that it imports, imports for type checkers included."""
    modules = {name.removesuffix(".__init__"): name for name in texts}
    graph: dict[str, set[str]] = {name: set() for name in texts}
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                # `from package import module` imports the module.
                named = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                graph[name] |= {modules[found] for found in named or {node.module} & modules.keys()}
            elif isinstance(node, ast.Import):
                graph[name] |= {modules[alias.name] for alias in node.names if alias.name in modules}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def imports_of_other_passes(stage: str, name: str, source: str) -> list[str]:
    """Return the passes, and the later stages of the compiler, that a module of a stage imports."""
    paths = [imported.split(".") for imported in imports(source)]
    paths = [path[2:] for path in paths if path[:2] == ["tdfx", "passes"] and len(path) > 2]
    wrong = [path for path in paths if path[0] not in {stage, "base", "program", *STAGES[stage]}]
    if name in PASSES[stage]:
        wrong += [path for path in paths if len(path) > 1 and path[1] in PASSES[path[0]] - {name}]
    return sorted(f"{name} imports {'.'.join(path)}" for path in wrong)


def prints(source: str) -> bool:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_every_file_has_its_layer() -> None:
    parts = {part_of(module) for module in sources()}
    assert parts == set().union(*LAYERS)


def test_imports_go_down() -> None:
    assert [wrong for module, source in sources().items() for wrong in climbs(module, source)] == []


def test_imports_that_go_up_are_seen() -> None:
    inside = "def f():\n    from tdfx.api import plan\n"
    assert climbs("tdfx.ranks.energy", inside) == ["tdfx.ranks.energy imports api"]
    assert climbs("tdfx.optim.states", "import tdfx") == ["tdfx.optim.states imports __init__"]
    assert climbs("tdfx.demo.run", inside) == []
    assert climbs("tdfx.plans.table", "if TYPE_CHECKING:\n    from tdfx.api import plan\n") == []
    assert climbs("tdfx.plans.table", "if not TYPE_CHECKING:\n    pass\nelse:\n    from tdfx.api import plan\n") != []


def test_there_are_at_most_a_dozen_layers() -> None:
    assert len(LAYERS) <= 12


def test_no_imports_go_in_a_circle() -> None:
    assert circle(edges(sources())) == []


def test_circles_are_seen() -> None:
    texts = {"tdfx.a": "if TYPE_CHECKING:\n    from tdfx.b import B\n", "tdfx.b": "from tdfx import a\n"}
    assert set(circle(edges(texts))) == {"tdfx.a", "tdfx.b"}


def test_passes_import_neither_one_another_nor_later_stages() -> None:
    texts = {
        tuple(name.split(".")[2:]): source for name, source in sources().items() if name.startswith("tdfx.passes.")
    }
    stages = {path: source for path, source in texts.items() if len(path) == 2}
    assert {path[0] for path in stages} == set(STAGES)
    assert all((stage, name) in stages for stage, names in PASSES.items() for name in names)
    assert [
        wrong for (stage, name), source in stages.items() for wrong in imports_of_other_passes(stage, name, source)
    ] == []


def test_a_pass_that_imports_another_is_seen() -> None:
    wrong = imports_of_other_passes("analysis", "find", "from tdfx.passes.analysis.trace import Trace")
    assert wrong == ["find imports analysis.trace"]
    late = imports_of_other_passes("analysis", "uses", "from tdfx.passes.planning.times import SiteTimes")
    assert late == ["uses imports planning.times"]
    assert imports_of_other_passes("analysis", "find", "from tdfx.passes.base import Pass") == []


def test_no_two_classes_have_one_name() -> None:
    names = [
        node.name
        for source in sources().values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    ]
    # Each trainer's callback has the name that its users expect.
    repeated = {name for name, count in Counter(names).items() if count > 1} - {"SwitchCallback"}
    assert repeated == set()


@in_checkout
def test_nobody_imports_passes_by_its_folder() -> None:
    files = [path for folder in ("tdfx", "passes", "tests", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > len(sources())
    named = {path: {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))} for path in files}
    assert [path for path, names in named.items() if "passes" in names] == []
    assert "passes" in set(imports("import os, passes"))


def test_no_module_prints() -> None:
    assert [module for module, source in sources().items() if prints(source)] == []
    assert prints("def f():\n    print(1)\n")


@in_checkout
def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = sorted(name.removesuffix(".__init__") for name in sources() if name.endswith(".__init__"))
    assert sorted(settings["packages"]) == packages
    folders = [name.split(".")[2:] for name in packages if name.startswith("tdfx.passes")]
    assert settings["package-dir"] == {
        ".".join(["tdfx", "passes", *path]): "/".join(["passes", *path]) for path in folders
    }


@in_checkout
def test_the_top_level_holds_only_what_belongs_there() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("this is not a git checkout")
    found = {Path(line).parts[0] for line in listing.stdout.splitlines()}
    expected = {"pyproject.toml", "tdfx", "passes", "tests", "tools", "README.md", "LICENSE"}
    assert {name for name in found if not name.startswith(".")} <= expected
    assert {"pyproject.toml", "tdfx", "passes", "tests"} <= found


def docstring(name: str) -> str | None:
    """Return the docstring of a public name; that of a type alias is the text under it in the source."""
    found = getattr(tdfx, name)
    if inspect.isfunction(found):
        return found.__doc__
    if inspect.isclass(found):
        text: str | None = found.__doc__ if "__doc__" in vars(found) else None
        # A dataclass without a docstring is given its signature as one.
        return None if text is None or text.startswith(f"{name}(") else text
    return next((text for source in sources().values() for text in texts_under(name, source)), None)


def texts_under(name: str, source: str) -> Iterator[str]:
    """Yield the text that stands as a statement of its own right after an assignment to a name."""
    body = ast.parse(source).body
    for line, after in itertools.pairwise(body):
        match line, after:
            case ast.Assign(targets=[ast.Name(id=found)]), ast.Expr(value=ast.Constant(value=str(text))) if (
                found == name
            ):
                yield text


@pytest.mark.parametrize("name", tdfx.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert docstring(name)


def arguments_in(doc: str) -> set[str]:
    """Return the names that the section ``Args:`` of a docstring explains."""
    section = doc.partition("Args:\n")[2].partition("\n\n")[0]
    return {
        name.strip()
        for names in re.findall(r"^ {4}(\w[\w, ]*): +\S", section, re.MULTILINE)
        for name in names.split(",")
    }


def has_arguments(name: str) -> bool:
    found = getattr(tdfx, name)
    return inspect.isclass(found) and not issubclass(found, BaseException | enum.Enum)


@pytest.mark.parametrize("name", [name for name in tdfx.__all__ if has_arguments(name)])
def test_help_on_a_public_class_explains_every_argument(name: str) -> None:
    found = getattr(tdfx, name)
    arguments = set(inspect.signature(found).parameters)
    assert arguments - arguments_in(inspect.getdoc(found) or "") == set()
    assert not arguments or "\n |  Args:\n" in pydoc.render_doc(found)


def test_no_public_signature_has_a_private_argument() -> None:
    callables = [
        found for name in tdfx.__all__ if inspect.isfunction(found := getattr(tdfx, name)) or has_arguments(name)
    ]
    assert [found for found in callables for name in inspect.signature(found).parameters if name[0] == "_"] == []


def test_fields_are_described_in_their_order_and_before_the_examples() -> None:
    doc = tdfx.Policy.__doc__ or ""
    assert "    include: Patterns of the sites that may be rewritten.\n    exclude: " in doc
    assert "    speedup, seconds, flops, parameters, memory, error: These six settings stand for" in doc
    assert doc.index("Two\npolicies") < doc.index("Args:") < doc.index("Example:")
    assert "other_parameters: " in (tdfx.Plan.__doc__ or "")  # of the class that it derives from
    assert arguments_in("Args:\n    a: b.\n    c, d: e.\n        f: g.\n\nExample:\n    h: i") == {"a", "c", "d"}


def test_a_text_that_belongs_to_another_name_is_no_docstring() -> None:
    assert list(texts_under("A", 'A = 1\n"""What it is."""\n')) == ["What it is."]
    assert list(texts_under("A", 'A = 1\nB = 2\n"""What B is."""\n')) == []


def test_every_public_method_has_a_docstring() -> None:
    public = {name: getattr(tdfx, name) for name in tdfx.__all__}
    bare = [
        f"{name}.{key}"
        for name, found in public.items()
        if inspect.isclass(found)
        for key, value in vars(found).items()
        if not key.startswith("_") and _is_method(value) and not inspect.getdoc(value)
    ]
    assert bare == []


def _is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)


def test_all_lists_every_import_in_the_order_of_ruff() -> None:
    tree = ast.parse((PACKAGE / "public.py").read_text(encoding="utf-8"))
    used_there = {"dataclasses", "tdfx.help_texts"}
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module not in used_there]
    imported = {alias.asname or alias.name for node in nodes for alias in node.names}
    assert set(tdfx.__all__) == imported
    assert tdfx.__all__ == sorted(tdfx.__all__, key=_rank_in_ruff)
    assert sorted(["plan", "Plan", "VBMF"], key=_rank_in_ruff) == ["VBMF", "Plan", "plan"]


def _rank_in_ruff(name: str) -> tuple[bool, bool, str]:
    """Constants come first, then classes, then the rest."""
    return not name.isupper(), not name[0].isupper(), name


def new_modules(statement: str, first: str = "import torch") -> set[str]:
    """Return the top-level modules that a statement loads in a process that has torch already."""
    code = f"import sys; {first}; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_tdfx_is_cheap() -> None:
    found = new_modules("import tdfx; tdfx.Policy")
    assert {"tdfx", "rich"} <= found
    assert found & LAZY == set()


def test_torch_is_imported_when_a_public_name_is_used() -> None:
    assert "tdfx" in new_modules("import tdfx", first="pass")
    assert "torch" not in new_modules("import tdfx", first="pass")
    assert "torch" in new_modules("from tdfx import plan", first="pass")
    assert set(tdfx.__all__) <= set(dir(tdfx))
    with pytest.raises(AttributeError, match="module 'tdfx' has no attribute 'Polizy'"):
        tdfx.Polizy  # type: ignore[attr-defined]  # noqa: B018


def test_an_import_that_is_not_cheap_is_seen() -> None:
    assert {"click", "onnx"} <= new_modules("import tdfx.cli, onnx")
