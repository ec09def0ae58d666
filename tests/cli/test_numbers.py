"""Numbers on the command line that nothing can be done with: each is refused in one line, and nothing is written."""

from __future__ import annotations

import pytest

from lightning_prune.cli import main
from tests.cli.tiny import MODEL, NET, files

HUGE = "9" * 24
SIZE = "--input 2 3 8 8"
#: By the words before them, with bars between.
WRONG = {
    f"measure {NET} {SIZE}": f"--threads 99999 | --threads , | --repeats 0 | --batch-sizes {HUGE} | --batch-sizes nan"
    " | --arg width=-1 | --arg width=99999999999 | --arg width=nan",
    f"measure {NET}": f"--input 1 3 9999999 9999999 | --input {'1 ' * 80} | --input {'9' * 5000}",
    f"prune dense.pt {' '.join(MODEL)}": "--ratio nan | --ratio -1 | --ratio 1e400 | --budget flops=nan"
    " | --budget flops=-1 | --budget params=1e-30 | --budget latency_ms=inf | --round-to 0 | --score-batches -1"
    f" | --round-to {HUGE} | --out {'x' * 400}",
    f"export dense.pt {' '.join(MODEL)} --out a.onnx": f"--opset 0 | --opset 1 | --opset {HUGE} | --repeats -3",
    f"latency-table dense.pt {' '.join(MODEL)}": f"--threads 0 | --threads 99999 | --threads {HUGE}",
    f"graph {NET}": "--input 1 | --input 1 4 8 8 | --input 0 3 8 8",
    "quantize dense.pt --config task.yaml --out a.onnx": "--threads 99999 | --calibration-batches 0",
    "sensitivity dense.pt --config task.yaml": "--ratios nan | --ratios 2 | --drop nan | --batches 0",
    "compare --config task.yaml": f"--seeds -1 | --seeds {HUGE} | --ratios nan | --ratios 1 | --epochs -1 | --lr nan"
    " | --train-seed -1 | --score-batches 0 | --trainer.max_epochs -1",
    "reproduce lr-table7": f"--seeds -1 | --seeds {HUGE} | --seeds ,",
    "experiment --config experiment/resnet18_digits_jre": "--ratio nan | --dense_epochs -1 | --seed -1"
    f" | --seed {HUGE} | --latency_repeats 0 | --finetune_epochs 0 | --finetune_lr nan | --finetune_lr -1",
    "fit --config task.yaml": f"--trainer.max_epochs -5 | --seed_everything -1 | --seed_everything {HUGE}"
    " | --trainer.limit_train_batches -3 | --trainer.limit_train_batches nan | --trainer.devices 99999"
    " | --trainer.devices 0 | --trainer.accumulate_grad_batches 0 | --trainer.precision 3 | --trainer.num_nodes -1"
    " | --trainer.val_check_interval -1 | --model.num_classes -1 | --model.input_size [3,99999999,99999999]"
    " | --model.input_size [3,9999999999,9999999999] | --model.model.width -3",
    "fit --config task/resnet18_digits": "--data.batch_size 0 | --data.batch_size -1 | --data.size 0"
    " | --data.num_workers -1 | --model.optimizer.lr -1",
}
CASES = [f"{words} {wrong.strip()}" for words, all_wrong in WRONG.items() for wrong in all_wrong.split("|")]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("line", CASES, ids=[f"{line.split()[0]} {' '.join(line.split()[-2:])[:40]}" for line in CASES])
def test_is_refused_in_one_line_that_names_it(capsys, line: str) -> None:
    before = files()
    try:
        status = main(line.split())
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    (said,) = [row for row in err.splitlines() if row.startswith("error: ")]
    assert status in (1, 2)
    assert "Traceback" not in err
    assert len(said) < 800
    assert files() - {"runs"} == before  # an optimizer is made when the run has begun
