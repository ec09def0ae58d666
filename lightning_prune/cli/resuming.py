"""What `--ckpt_path` names: read and judged before a run begins to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_prune.callbacks import SmallCheckpointCallback
from lightning_prune.callbacks.reconstruction import prunes
from lightning_prune.errors import CheckpointError
from lightning_prune.plan import Plan
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
    pruning, pruned = prunes(vars(trainer)["callbacks"]), is_pruned(content)
    if is_lightning:
        _check_kinds(content, _OPTIONAL, source)
    if training:
        if not is_lightning or any(name not in content for name in _TRAINING):
            raise CheckpointError(
                f"{source} holds weights without the state of a training, which fit needs to go on: name a checkpoint "
                f"that fit wrote, such as last.ckpt, or start from these weights by --weights {source}"
            )
        _check_kinds(content, _TRAINING, source)
        if pruned and SmallCheckpointCallback.__qualname__ in content.get("callbacks", {}):
            _start_from(path, content, model, trainer)
        elif pruned and not pruning:
            raise CheckpointError(
                f"{source} is of a run that pruned: name the same recipes as then, such as --config prune/jre"
            )
    elif not is_lightning or (pruned and not pruning):
        _load(path, content, model)
        return None
    if _names_are_known(model):
        check_fits(model, content, source)
    return content


def start_from(path: str | Path, model: LightningModule, trainer: Trainer) -> None:
    """Give the model dense weights to prune, or weights and shapes of a pruned file to fine-tune.

    Raises:
        CheckpointError: no such file, a damaged one, another model's, or a pruned one where a recipe prunes.
    """
    _start_from(path, read_tensors(path, CheckpointError), model, trainer)


def _start_from(path: str | Path, content: Mapping[str, Any], model: LightningModule, trainer: Trainer) -> None:
    callbacks: list[Any] = vars(trainer)["callbacks"]
    if is_pruned(content) and prunes(callbacks):
        raise CheckpointError(
            f"{path} is pruned already: leave out the recipe that prunes, or prune the dense weights further that it "
            "came from"
        )
    plan = _load(path, content, model)
    if plan is not None:
        callbacks.insert(0, SmallCheckpointCallback(plan))


def _load(path: str | Path, content: Mapping[str, Any], model: LightningModule) -> Plan | None:
    """Dense weights, or a pruned file and its plan: of the model, or of the network in it, for that knows no task."""
    if not is_pruned(content):
        load_dense(path, model)
        return None
    state = content.get("state_dict")
    names = state.keys() if isinstance(state, Mapping) else None
    part = next((part for part in model.children() if part.state_dict().keys() == names), model)
    return load(path, part)


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
