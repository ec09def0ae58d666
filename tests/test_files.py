"""Files that appear whole or not at all."""

from __future__ import annotations

import errno

import pytest

from lightning_prune.errors import PruningError
from lightning_prune.files import atomic


def _fail_as_torch() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    finally:
        raise RuntimeError("unexpected pos 64 vs 0")  # ends its archive all the same


def test_a_full_disk_is_named_whatever_fails_after_it(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(PruningError, match=r"cannot write .*last\.ckpt: No space left"), atomic(path):
        _fail_as_torch()
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of the writer"), atomic(tmp_path / "new"):
        raise RuntimeError("of the writer")
    assert not [*tmp_path.iterdir()]
