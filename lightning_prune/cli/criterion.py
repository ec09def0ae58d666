"""Which criterion the command line names: one of the package's, or the user's own."""

from __future__ import annotations

from lightning_prune.cli.named_objects import find_object, is_path
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.errors import PruningError, ScoreError, first_line


def criterion_of(word: str) -> Criterion:
    """A criterion by its short name, or a class or an object by its path in Python, as models are named.

    Raises:
        PruningError: nothing has that name, or it is no criterion.
    """
    if not is_path(word):
        return criterion_from(word)
    found = find_object(word, "criterion")
    if isinstance(found, Criterion):
        return found
    if not (isinstance(found, type) and issubclass(found, Criterion)):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ScoreError(f"'{word}' is no criterion but a {kind}: derive from lightning_prune.criteria.Criterion")
    try:
        return found()
    except PruningError:
        raise
    except Exception as error:
        raise ScoreError(
            f"'{word}' cannot be built without arguments: {first_line(error)}. Name an object of it instead, such as "
            f"mine in mine = {found.__name__}(...)"
        ) from error
