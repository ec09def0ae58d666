"""Every criterion at ratio 0.7 on the handwritten digits, five seeds, after the same fine-tuning.

Run from the repository's root: ``python -m benchmarks.all_criteria [--out DIR] [other options of compare]``. It goes
on where an earlier run was stopped; the table, CSV and picture lie in ``--out``. ResNet-18 on 16x16 images, trained
once for 15 epochs; about 20 minutes on two idle cores.
"""

from __future__ import annotations

import inspect
import sys

from lightning_prune import criteria
from lightning_prune.cli import main

NAMES = [
    name
    for name in criteria.__all__
    if inspect.isclass(kind := getattr(criteria, name))
    and issubclass(kind, criteria.Criterion)
    and not inspect.isabstract(kind)
]
SETTINGS = {
    "--criteria": ",".join(NAMES),
    "--ratios": "0.7",
    "--seeds": "0,1,2,3,4",
    "--epochs": "5",
    "--lr": "0.02",
    "--out": "runs/all-criteria",
    "--data.init_args.size": "16",
    "--model.init_args.input_size": "[3,16,16]",
    "--trainer.max_epochs": "15",
}

if __name__ == "__main__":
    given = sys.argv[1:]
    defaults = [word for option, value in SETTINGS.items() if option not in given for word in (option, value)]
    sys.exit(main(["compare", *defaults, *given]))
