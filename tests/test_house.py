"""The rules of the house: what may import what, what is shipped, what is public."""

from __future__ import annotations

import ast
import inspect
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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
    {"errors", "numbers", "progress", "shards"},
    {"ranks"},
    {"factors"},
    {"cost", "solver"},
    {"policy"},
    {"policy_file"},
    {"plan_totals"},
    {"plan_table"},
    {"plan"},
    {"scalars"},
    {"structure"},
    {"kinds"},
    {"layers"},
    {"parameters"},
    {"passes"},
    {"optim"},
    {"distributed"},
    {"compiled"},
    {"part"},
    {"wrappers"},
    {"averaging"},
    {"checkpoint"},
    {"onnx_proof"},
    {"verify"},
    {"export"},
    {"along"},
    {"api"},
    {"training", "check"},
    {"__init__"},
    {"integrations"},
    {"demo"},
    {"references", "demo_table", "report"},
    {"cli"},
    {"__main__"},
)
"""The files and folders of tdfx, lowest first; each may import those below it, and a folder its own files."""

PASSES = {"trace", "find", "shapes", "select", "rewrite", "merge"}
"""The passes of the compiler; the other files of the folder are what they share."""

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


_FACADE = "from tdfx.check import check_step\n"
"""The one import that goes up, when it is called: a method of the plan that users call with the model at hand."""


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
    found = {}
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]):
        names = ["tdfx", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(names)] = path.read_text(encoding="utf-8")
    return found


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
    """Return the imports of a module that do not go down."""
    own = part_of(module)
    source = source.replace(_FACADE, "") if module == "tdfx.plan" else source
    parts = {part_of(name) for name in imports(source) if name.split(".")[0] == "tdfx"}
    return [f"{module} imports {part}" for part in sorted(parts) if part != own and level(part) >= level(own)]


def imports_of_other_passes(name: str, source: str) -> list[str]:
    paths = (imported.split(".") for imported in imports(source))
    others = {path[2] for path in paths if path[:2] == ["tdfx", "passes"] and len(path) > 2}
    return sorted(f"{name} imports {other}" for other in (others & PASSES) - {name})


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
    assert climbs("tdfx.cli.references", "import tdfx.demo.table") == ["tdfx.references imports demo_table"]
    assert climbs("tdfx.optim", "import tdfx") == ["tdfx.optim imports __init__"]
    assert climbs("tdfx.demo.run", inside) == []
    assert climbs("tdfx.plans.table", "if TYPE_CHECKING:\n    from tdfx.plan import Plan\n") == []
    assert climbs("tdfx.plans.table", "if not TYPE_CHECKING:\n    pass\nelse:\n    from tdfx.plan import Plan\n") != []


def test_passes_do_not_import_one_another() -> None:
    files = {name.split(".")[2]: source for name, source in sources().items() if name.startswith("tdfx.passes.")}
    assert set(files) >= PASSES
    assert [wrong for name in sorted(PASSES) for wrong in imports_of_other_passes(name, files[name])] == []


def test_a_pass_that_imports_another_is_seen() -> None:
    assert imports_of_other_passes("find", "from tdfx.passes.trace import Trace") == ["find imports trace"]
    assert imports_of_other_passes("find", "from tdfx.passes.base import Pass") == []


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
    folders = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    folders += [PACKAGE / "passes"] if PACKAGE / "passes" not in folders else []
    packages = sorted(".".join(["tdfx", *folder.relative_to(PACKAGE).parts]) for folder in folders)
    assert sorted(settings["packages"]) == packages
    assert settings["package-dir"] == {"tdfx.passes": "passes"}


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
        text: str | None = vars(found).get("__doc__")
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
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(tdfx.__all__) == imported
    assert tdfx.__all__ == sorted(tdfx.__all__, key=_rank_in_ruff)
    assert sorted(["plan", "Plan", "VBMF"], key=_rank_in_ruff) == ["VBMF", "Plan", "plan"]


def _rank_in_ruff(name: str) -> tuple[bool, bool, str]:
    """Constants come first, then classes, then the rest."""
    return not name.isupper(), not name[0].isupper(), name


def new_modules(statement: str) -> set[str]:
    """Return the top-level modules that a statement loads in a process that has torch already."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_tdfx_is_cheap() -> None:
    found = new_modules("import tdfx")
    assert "tdfx" in found
    assert found & LAZY == set()


def test_an_import_that_is_not_cheap_is_seen() -> None:
    assert {"click", "onnx"} <= new_modules("import tdfx.cli, onnx")
