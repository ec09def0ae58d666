"""What files are compared on."""

from __future__ import annotations

import torch

from lightning_prune.export.inputs import compared_inputs, drawn_like


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_drawn_inputs_are_of_the_examples_kind():
    example = {
        "images": torch.rand(4, 3, 16, 16) * 0.2 + 0.4,
        "tokens": torch.randint(3, 90, (4, 50)),
        "mask": torch.rand(4, 50) > 0.5,
        "half": torch.rand(4, 9).half(),
        "scale": 0.5,
    }
    drawn = drawn_like(example, generator())
    assert drawn["scale"] == 0.5
    for name in ("images", "tokens", "mask", "half"):
        one, other = example[name], drawn[name]
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert not torch.equal(one, other)
        assert one.min() <= other.min()
        assert other.max() <= one.max()
    assert abs(float(drawn["images"].mean()) - 0.5) < 0.02
    assert drawn_like(torch.zeros(1, 99), generator()).std() > 0.5  # zeros stand for anything


def test_there_are_as_many_samples_as_asked_for_all_of_them_different():
    passes = compared_inputs(torch.rand(3, 5), None, 32, dynamic_batch=False, dynamic_size=False)
    rows = torch.cat(passes)
    assert len(rows.unique(dim=0)) == len(rows) == 33
    assert {len(batch) for batch in passes} == {3}


def test_open_dimensions_are_met_at_other_sizes():
    example = torch.rand(2, 3, 32, 32)
    passes = compared_inputs(example, None, 12, dynamic_batch=True, dynamic_size=True)
    assert {tuple(x.shape[-2:]) for x in passes} == {(32, 32), (64, 96)}
    assert {len(x) for x in passes} == {1, 2, 3}
    given = compared_inputs(example, [example + 1], 12, dynamic_batch=True, dynamic_size=False)
    assert torch.equal(given[0], example + 1)
    assert {len(x) for x in given} == {1, 2, 3}
