"""Sweep over models of other libraries: does every one trace, prune by half, reconstruct without loss, and train?

    python -m benchmarks.zoo                              # everything that is not in the results file yet
    python -m benchmarks.zoo --suite detection --peer     # one suite, Torch-Pruning 1.6.1 beside it
    python -m benchmarks.zoo --only timm/resnet --redo    # rows whose key contains a text, again
    python -m benchmarks.zoo --part 1/4 --limit-seconds 3000
    python -m benchmarks.zoo report                       # Markdown from the results file
    python -m benchmarks.zoo report --only torchvision/
    python -m benchmarks.zoo --suite users --workers 2 --write benchmarks/results/users_zoo.md    # the users' zoo
    python -m benchmarks.zoo list --suite users

The models' libraries are no dependencies of the project. In an environment of their own: ``pip install -e . --group zoo
&& pip install --no-deps facenet-pytorch==2.6.0`` (``opencv-python-headless`` in place of ``opencv-python`` on a machine
without a display), and ``pip install torch-pruning==1.6.1`` for ``--peer``. A suite needs its own library only; listing
and reporting need none.

``--suite all`` is torchvision and timm. ``--suite users`` is the users' zoo: a suite for each library in
`benchmarks.zoo.users`, of which audio has models that people write themselves. Several runs, each with its ``--part``,
may share a results file.

Every model gets random weights, and random batch-norm statistics, biases and layer scales (`models.randomise_`).
Then: trace; L1 scores, half of every layer (``--ratio``), joint; reconstruct; copy, pickle, state dict into a second
reconstruction; forward and backward in train mode; masked against reconstructed in eval mode in float64, for
detection on the raw outputs of the heads. The users' zoo is compared at another batch and at another size too, neither
of which was traced, where the dense model takes them; in float32 where it does not run in float64. ``--export`` adds
torch.export of the dense and the reconstructed model (seconds per model), ``--memory`` the peak memory of a forward and
of a trace (it distorts the times), ``--peer`` Torch-Pruning on a copy of the same model, timed in turns with this
library's trace + scores + selection + reconstruct (``--repeats`` rounds).

Images have 96 pixels where the model allows, else its own size; detectors run at 128 to 160 (SSD: its own size). Those
of the users' zoo are smaller (`benchmarks.zoo.users.Model.sizes`).

``outcome`` is ``pruned``, ``refused: reason`` (the library raised one of its errors), ``wrong: relative error`` or
``error: anything else``. The sweep reconstructs without ``example_inputs``, so that a result that the library's own
check in `lightning_prune.prune` would refuse shows here as wrong or error; the row then says under ``prune`` what that
function makes of it.

Rows go to ``benchmarks/results/zoo.jsonl`` (``--results``), one JSON object a line, and what models print to
``zoo.log`` beside it; ``--write`` writes the report of all rows of the suite. Models run in a worker process with time
limits (``--seconds-per-model``, then ``--seconds-for-peer``) and a memory limit (``--memory-gib``); after a crash a new
one goes on with the next model. A model with a row is not run again, unless ``--redo``, or ``--retry`` if it was not
pruned.
"""
