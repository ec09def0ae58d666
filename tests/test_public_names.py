"""What `import lightning_prune as lp` offers: few names, namespaces that work at once, docstrings that teach."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import lightning_prune as lp

NAMES = [name for name in lp.__all__ if not isinstance(getattr(lp, name), ModuleType)]
NAMESPACES = [name for name in lp.__all__ if name not in NAMES]
CONTRACT = """trace score mask_ reconstruct reconstruct_ check_lossless prune measure save load export explain
PruningSession Plan ChannelGraph JRE L1 L2 FPGM Taylor GlobalRatio LayerRatio Budget PruneCallback
ScoringCallback MaskingCallback ReconstructionCallback PruningError""".split()


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", f"import sys\nimport lightning_prune as lp\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_names_at_the_top_are_those_of_the_contract() -> None:
    assert sorted(NAMES) == sorted(CONTRACT)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = "torch pytorch_lightning torchvision matplotlib wandb rich jinja2 networkx jsonargparse numpy".split()
    assert in_a_fresh_process(f"print([name for name in {heavy} if name in sys.modules])") == "[]\n"
    assert in_a_fresh_process("lp.trace, lp.JRE, lp.prune; print('pytorch_lightning' in sys.modules)") == "False\n"


def test_namespaces_need_no_import_of_their_own() -> None:
    low_to_high = """errors.PlanError models.resnet18 measure.count_flops criteria.NextLayerTaylor schedule.Rounds
    compensation.least_squares_ data.DigitsDataModule tasks.ClassificationTask callbacks.DistillationCallback
    experiments.compare_criteria""".split()
    calls = ", ".join(f"lp.{path}.__name__" for path in low_to_high)
    assert in_a_fresh_process(f"print(*[{calls}])").split() == [path.rpartition(".")[2] for path in low_to_high]


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    code = "import lightning_prune.export, lightning_prune.measure, lightning_prune.prune\n"
    kinds = "type(f).__name__ for f in (lp.export, lp.measure, lp.prune)"
    assert in_a_fresh_process(f"{code}print(*({kinds}))") == "function function function\n"
    assert lp.measure.count_params is not lp.measure


@pytest.mark.parametrize("name", [name for name in NAMES if name != "PruningError"])
def test_names_at_the_top_are_explained_by_an_example(name: str) -> None:
    assert "\nExample:\n    >>> " in inspect.getdoc(getattr(lp, name))


def test_every_public_name_is_explained() -> None:
    found = [
        (namespace, name, getattr(getattr(lp, namespace), name))
        for namespace in NAMESPACES
        for name in getattr(getattr(lp, namespace), "__all__", ())
    ]
    assert len(found) > 90
    for namespace, name, value in found:
        if inspect.isclass(value) or inspect.isfunction(value):
            first = (inspect.getdoc(value) or "").partition("\n")[0]
            assert len(first.split()) > 2, f"{namespace}.{name}: {first!r}"
    assert all(name.endswith("Callback") for name in lp.callbacks.__all__)
