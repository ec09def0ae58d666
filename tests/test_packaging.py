"""What pyproject.toml promises to who installs the package: every import is declared, every file is in the wheel."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from lightning_prune.engines.base import install_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_prune"
if not PACKAGE.exists():
    pytest.skip("the source is not here: .ci/versions tests what is installed", allow_module_level=True)

README = (ROOT / "README.md").read_text("utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
# A module that is called otherwise than its distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "pytorch_lightning": "pytorch-lightning",
    "lightning_fabric": "pytorch-lightning",
    "lazy_loader": "lazy-loader",
    "typing_extensions": "typing-extensions",
}
UNIMPORTED = {"pycocotools"}  # torchmetrics' mean average precision imports it


def named(requirements: list[str]) -> dict[str, str]:
    """The bounds by distribution."""
    return {
        match[1].lower(): match[2] for match in (re.match(r"([\w.-]+)(?:\[.*?\])?(.*)", each) for each in requirements)
    }


REQUIRED = named(PROJECT["dependencies"])
EXTRAS = {name: named(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


def imports_of(nodes: list[ast.AST]) -> set[str]:
    """Distributions, of imports at these nodes, that are neither Python's nor this package's."""
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"lightning_prune", "_typeshed"}
    return {DISTRIBUTIONS.get(name, name) for name in tops}


TREES = {path: ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyi")}
IMPORTED = {path: imports_of(list(ast.walk(tree))) for path, tree in TREES.items()}
OPTIONAL = set().union(*IMPORTED.values()) - set(REQUIRED)


def test_what_is_imported_is_required_or_in_an_extra_and_the_other_way_round() -> None:
    imported = set().union(*IMPORTED.values())
    assert imported - set(REQUIRED) - {name for extra in EXTRAS.values() for name in extra} == set()
    assert set(REQUIRED) - imported == UNIMPORTED
    assert {"torch", "onnx", "onnxruntime", "pillow"} <= imported


def test_what_is_in_an_extra_is_imported_only_when_it_is_used() -> None:
    at_import = {path.name: imports_of(tree.body) & OPTIONAL for path, tree in TREES.items()}
    assert {name: found for name, found in at_import.items() if found} == {}
    assert {"onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt"} == OPTIONAL


def test_a_refusal_names_an_extra_that_has_what_is_missing() -> None:
    refused = {}
    for tree in TREES.values():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            if call.func.id == "need":
                refused[ast.literal_eval(call.args[2])] = set(ast.literal_eval(call.args[1]))
    assert set(refused) == {"export", "openvino", "tensorrt"}
    assert [extra for extra, missing in refused.items() if missing - set(EXTRAS[extra])] == []
    assert set().union(*refused.values()) == OPTIONAL
    assert install_line("export") == 'pip install "lightning-prune[export]"'


def test_extras_in_texts_exist() -> None:
    texts = [*TREES, ROOT / "README.md", *ROOT.glob("docs/*.md")]
    found = {name for path in texts for name in re.findall(r"lightning-prune\[([\w,]+)\]", path.read_text("utf-8"))}
    assert {"export", "openvino", "tensorrt"} <= set(",".join(found).split(",")) <= set(EXTRAS)
    assert set(re.findall(r"\[(\w+)\][`\"]", README)) == set(EXTRAS)


def test_one_distribution_has_one_bound() -> None:
    groups = [
        named([each for each in group if isinstance(each, str)]) for group in PYPROJECT["dependency-groups"].values()
    ]
    bounds: dict[str, set[str]] = {}
    for requirements in (REQUIRED, *EXTRAS.values(), *groups):
        for name, bound in requirements.items():
            bounds.setdefault(name, set()).add(bound)
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_the_range_is_the_same_wherever_it_is_stated() -> None:
    low, high = "3.10", "3.13"
    assert PROJECT["requires-python"] == f">={low}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{low.replace('.', '')}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == low
    stated = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert stated == ["3.10", "3.11", "3.12", "3.13"]
    assert f'CASES = ("lowest-{low}", "newest-{high}")' in (ROOT / ".ci" / "versions").read_text("utf-8")
    torch = REQUIRED["torch"].removeprefix(">=")
    for page in ("README.md", "docs/index.md"):
        assert f"Python {low} to {high} and PyTorch {torch} or newer" in " ".join(
            (ROOT / page).read_text("utf-8").split()
        ), page


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="the group test is not installed")
    packed = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"lightning_prune/py.typed", "lightning_prune/__init__.pyi", "lightning_prune/conf/prune/jre.yaml"} <= packed
