"""How long the library itself takes: beside Torch-Pruning, beside its own steps, by operators, from the command line.

    python -m benchmarks.library_speed                            # beside Torch-Pruning 1.6.1, then the command line
    python -m benchmarks.library_speed --only torchvision/resnet --redo
    python -m benchmarks.library_speed --operators --suite all    # seconds of a trace against operators of a forward
    python -m benchmarks.library_speed --operators --suite users --part 1/4
    python -m benchmarks.library_speed --commands                 # the command line alone
    python -m benchmarks.library_speed report                     # Markdown and pictures from the rows

Beside the peer: every torchvision model, built and randomised as `benchmarks.zoo` does it (96 pixels, detectors 128,
two images, float32, one thread). In one process and in turns, ``--repeats`` times each: trace, L1 scores, half of
every layer, reconstruct, against the peer's build and step; then `lightning_prune.prune` against its own steps, which
are trace, score, select, mask and reconstruct with the comparison in float64. Medians, in seconds of the processor.

By operators: the median of up to three traces against the ATen operators that one forward in eval mode runs, over the
zoos (``--suite``: torchvision, timm, the users' libraries, as far as they are installed; what is not has no row).

Command line: seconds on the clock with as many threads as there are cores, the median of ``--repeats`` fresh processes.

A row per model goes to ``benchmarks/results/library_speed.jsonl`` or ``library_speed_operators.jsonl`` as soon as it is
there (``--results``); a model with a row is not run again but with ``--redo``. After a run, ``--write`` has the report
written to ``benchmarks/results/library_speed.md`` and the pictures beside it. Needs ``pip install
torch-pruning==1.6.1``, for ``--operators`` the group zoo instead.
"""
