"""One pruning of one model, step by step, in any training loop."""

from lightning_prune.session.pruning_session import PruningSession

__all__ = ["PruningSession"]
