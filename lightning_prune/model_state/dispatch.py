"""Looking at operators as they run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class EagerMode(TorchDispatchMode):
    """A dispatch mode that is entered only where nothing is compiled.

    Torch guards the handlers of others against its compiler at every operator, which takes longer than they do.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
