"""What a model has to be before it is traced, counted, scored or cut; else it is refused with the way out."""

from __future__ import annotations

from torch import fx, jit, nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import PlanError, PruningError, ScoreError, TraceError


def check_traceable(model: nn.Module) -> None:
    """Refuse what cannot be traced as it stands: compiled, partly on the meta device, or lazy and never run."""
    check_eager(model, TraceError)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise TraceError(
            f"{lazy[0]!r} has no size yet, for its module is lazy: run the model on one batch first (in a "
            "LightningModule before its optimizers are made, say at the end of __init__)"
        )
    on_meta = [name for name, tensor in tensors if tensor.is_meta]
    others = [(name, tensor.device) for name, tensor in tensors if not tensor.is_meta]
    if on_meta and others:
        raise TraceError(
            f"{len(on_meta)} of {len(tensors)} tensors, such as {on_meta[0]!r}, are on the meta device, and others, "
            f"such as {others[0][0]!r}, on {others[0][1]}: load the weights first, or move the whole model to meta"
        )


def check_eager(model: nn.Module, error: type[PruningError] = PlanError) -> None:
    """Refuse modules whose weights and code are no longer Python's: scripted, traced, or exported ones."""
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "this model"
        scripted = isinstance(module, jit.ScriptModule)
        if scripted and (not path or any(True for _ in (*module.parameters(), *module.buffers()))):
            raise error(
                f"{where} is TorchScript ({type(module).__name__}), whose code fixes the number of channels: prune the "
                "eager model, and script or trace the result (lightning_prune.export writes ONNX and torch.export)"
            )
        if isinstance(module, fx.GraphModule) and not _switches(module):
            raise error(
                f"{where} is an exported program, whose code fixes the number of channels: prune the eager model, and "
                "export the result (lightning_prune.export)"
            )


def _switches(module: nn.Module) -> bool:
    """Whether a module can be put in the mode that it is in; exported programs refuse."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.train(module.training)
    except NotImplementedError:
        return False
    finally:
        for part, training in modes:
            part.training = training
    return True


def check_trainable(model: nn.Module) -> None:
    """Refuse to differentiate by tensors that were made in inference mode: autograd does."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ScoreError(
                f"{name!r} was made under torch.inference_mode, so no gradient can be taken through it: build the "
                "model outside, or score a copy.deepcopy of it (which lightning_prune.prune makes by itself)"
            )


def without_values(model: nn.Module) -> str | None:
    """The name of a tensor on the meta device, which has a shape but no values."""
    return next((name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta), None)
