"""What can go wrong, said so that the reader knows the cause and the way out."""

import difflib
from collections.abc import Iterable
from textwrap import shorten
from typing import Any, get_args


class PruningError(Exception):
    """Root of every error that lightning-prune raises for its user."""


class TraceError(PruningError):
    """The model could not be run or understood on the example inputs."""


class ScoreError(PruningError, ValueError):
    """Scores could not be computed, or are not usable (NaN, infinite, wrong length)."""


class PlanError(PruningError, ValueError):
    """A plan, ratio or constraint that cannot be carried out on this model."""


class ReconstructionError(PruningError):
    """The smaller model could not be built, or is not equal to the masked one."""


class SensitivityError(PruningError, ValueError):
    """A sensitivity that cannot be measured, or a file of points that is damaged or of other settings."""


class CompensationError(PruningError, ValueError):
    """Remaining weights could not be repaired; the model is as it was."""


class CallbackError(PruningError, ValueError):
    """Callbacks in an order or a Trainer in which they cannot work."""


class OptimizerError(PruningError, TypeError):
    """An optimizer whose state cannot follow the channels."""


class DataError(PruningError):
    """Data that are missing, damaged, or not what they should be."""


class CheckpointError(PruningError):
    """A file that is not a pruned checkpoint, or belongs to another model."""


class ExportError(PruningError):
    """A model that cannot be exported, or whose file computes something else."""


class EngineError(PruningError):
    """An engine that is unknown, not installed, or cannot run the model."""


class QuantizationError(PruningError, ValueError):
    """A model that cannot be computed in 8 bits, or batches that it cannot be calibrated on."""


class WeightsError(PruningError):
    """Weights that do not belong to the model."""


class ConfigurationError(PruningError, ValueError):
    """A configuration that parses, but holds a value that a class refuses."""


class UnknownRecipeError(PruningError, ValueError):
    """A configuration that is neither a file here nor a shipped recipe."""


class ModelError(PruningError, ValueError):
    """A model that cannot be found or built from what the command line says."""


class DistillationError(PruningError, ValueError):
    """A student that cannot be compared with its teacher, or settings without meaning."""


class TableError(PruningError, ValueError):
    """A latency table that is damaged, is of another machine or engine, or does not know a layer."""


class NotReconstructedWarning(UserWarning):
    """A group of channels kept its width although a plan removes some: the model's code needs them all."""


class EvalModeWarning(UserWarning):
    """Fine-tuning starts with batch norms or dropouts in eval mode, as they were before fitting."""


class NoEffectWarning(UserWarning):
    """A step that was asked for changed nothing."""


class UnreachedWarning(UserWarning):
    """Channels go although no trace has reached some modules or code that may read or make channels."""


def check_choice(name: str, value: object, literal: Any, error: type[PruningError]) -> None:
    """Refuse a value of a setting that its Literal type does not list."""
    if value not in get_args(literal):
        raise error(f"{name} must be one of {', '.join(map(str, get_args(literal)))}, got {value!r}")


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """A question after the closest of the names, or nothing.

    Example:
        >>> did_you_mean("jiont", ("joint", "union")), did_you_mean("x", ("joint", "union"))
        (" Did you mean 'joint'?", '')
    """
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


_OUT_OF_MEMORY = "not enough memory", "out of memory", "can't allocate", "bad allocation", "size calculation overflowed"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch, which has no class for it on the CPU, ran out of memory."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(words in said for words in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    r"""What kind of error it is, and the first line of what it says: for quoting it in one of ours.

    Example:
        >>> first_line(ValueError("no such shape\nat layer 3")), first_line(KeyError())
        ('ValueError: no such shape', 'KeyError')
    """
    said = shorten(str(error).strip().partition("\n")[0], 160, placeholder=" ...")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
