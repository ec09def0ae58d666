"""What `--ckpt_path` names: read and judged before a run begins to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_prune.callbacks import ReconstructionCallback
from lightning_prune.errors import CheckpointError
from lightning_prune.reconstruction.checkpoint import KEY, PrunedCheckpoints, check_fits, is_pruned, load, load_dense
from lightning_prune.tensor_files import read_tensors

#: What Lightning keeps of a training, of what kind.
_TRAINING = {"epoch": int, "global_step": int, "loops": Mapping, "optimizer_states": list, "lr_schedulers": list}
_OPTIONAL = {"callbacks": Mapping, KEY: Mapping, "hyper_parameters": Mapping}


def judge(path: str | Path, model: LightningModule, trainer: Trainer, *, training: bool) -> Mapping[str, Any] | None:
    """Refuse a file that the Trainer could not go on from; None if the model has its weights now, and it is done.

    Raises:
        CheckpointError: no such file, a damaged one, one that holds code, or another model's.
    """
    content = read_tensors(path, CheckpointError)
    source, state = str(path), content.get("state_dict")
    is_lightning = isinstance(state, Mapping) and "pytorch-lightning_version" in content
    callbacks: list[Any] = vars(trainer)["callbacks"]
    parts = [getattr(callback, "reconstruction", callback) for callback in callbacks]  # PruneCallback holds one
    pruning = any(isinstance(part, ReconstructionCallback) for part in parts)
    pruned = is_pruned(content)
    if is_lightning:
        _check_kinds(content, _OPTIONAL, source)
    if training:
        if not is_lightning or any(name not in content for name in _TRAINING):
            way_out = "" if pruned else f", or start from these weights by --weights {source}"
            raise CheckpointError(
                f"{source} holds weights without the state of a training, which fit needs to go on: name a checkpoint "
                f"that fit wrote, such as last.ckpt{way_out}"
            )
        _check_kinds(content, _TRAINING, source)
        if pruned and not pruning:
            raise CheckpointError(
                f"{source} is of a run that pruned: name the same recipes as then, such as --config prune/jre"
            )
    elif not is_lightning or (pruned and not pruning):
        (load if pruned else load_dense)(path, model)
        return None
    if _names_are_known(model):
        check_fits(model, content, source)
    return content


def check_dense(path: str | Path) -> None:
    """Refuse a pruned file as the weights to start from: what fit saves then could not be told from the dense model's.

    Raises:
        CheckpointError: it is one, or cannot be read.
    """
    if is_pruned(read_tensors(path, CheckpointError)):
        raise CheckpointError(
            f"{path} is pruned. Fine-tune from the dense weights that it came from: --weights DENSE, with a recipe "
            "that prunes, which may carry out the same plan (selection: lightning_prune.selection.FixedPlan)"
        )


def _check_kinds(content: Mapping[str, Any], kinds: Mapping[str, type], source: str) -> None:
    for name, kind in kinds.items():
        value = content.get(name)
        if name in content and not isinstance(value, kind):
            raise CheckpointError(f"{source} is damaged: {name!r} is a {type(value).__name__} in it")


def _names_are_known(model: LightningModule) -> bool:
    """Whether a checkpoint's names and shapes must be those that the model has before it is set up."""
    own = type(model).on_load_checkpoint in (LightningModule.on_load_checkpoint, PrunedCheckpoints.on_load_checkpoint)
    built_later = is_overridden("configure_model", model) or is_overridden("setup", model)
    return own and not built_later and model.strict_loading
