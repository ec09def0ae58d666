"""Normalisers: by hand, against loops, and what they must never do."""

import pytest
import torch

from lightning_prune.criteria import L1, L2, functional
from tests.criteria.helpers import close, member
from tests.reference import criteria as slow
from tests.reference import taylor as reference

MEMBERS = {"a": torch.tensor([1.0, 4.0, 0.0]).double(), "b": torch.tensor([30.0, 10.0, 20.0]).double()}


@pytest.mark.parametrize(
    ("normalize", "a", "b"),
    [
        ("none", [1, 4, 0], [30, 10, 20]),
        ("max", [0.25, 1, 0], [1, 1 / 3, 2 / 3]),
        ("mean", [0.6, 2.4, 0], [1.5, 0.5, 1]),
        ("l2", [1 / 17**0.5, 4 / 17**0.5, 0], [3 / 14**0.5, 1 / 14**0.5, 2 / 14**0.5]),
        ("minmax", [0.25, 1, 0], [1, 0, 0.5]),
        ("rank", [0.5, 1, 0], [1, 0, 0.5]),
    ],
)
def test_normalisers_by_hand(normalize, a, b) -> None:
    found = functional.normalize_scores(list(MEMBERS.values()), normalize)
    assert [scores.tolist() for scores in found] == [pytest.approx(a), pytest.approx(b)]


@pytest.mark.parametrize("normalize", ["none", "max", "mean", "l2", "minmax", "rank"])
def test_over_the_network_the_order_of_all_channels_stays(normalize) -> None:
    raw = list(MEMBERS.values())
    network = functional.normalize_scores(raw, normalize, "network")
    assert torch.equal(torch.cat(raw).argsort(), torch.cat(network).argsort())
    if normalize != "none":
        assert not torch.equal(network[0], functional.normalize(raw[0], normalize))


@pytest.mark.parametrize("how", ["none", "max", "mean", "l2", "minmax", "rank", "percentile"])
def test_normalisers_keep_the_order_and_leave_no_nan(how) -> None:
    for values in ([-3.0, -1.0, -2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [2.0], []):
        tensor = torch.tensor(values, dtype=torch.float64)
        found = functional.normalize(tensor, how)
        assert found.isfinite().all()
        assert found.argsort(stable=True).tolist() == tensor.argsort(stable=True).tolist()
    broken = torch.tensor([1.0, float("nan")])
    assert functional.normalize(broken, how) is broken


def test_normalizers_match_loops():
    values = [3.0, -1.0, 3.0, 10.0, 0.5]
    tensor = torch.tensor(values, dtype=torch.float64)
    assert functional.normalize(tensor, "minmax").tolist() == pytest.approx(slow.minmax(values))
    assert functional.normalize(tensor, "rank").tolist() == pytest.approx(slow.rank(values))
    for how in ("minmax", "rank", "percentile"):
        assert functional.normalize(torch.full((3,), 2.0), how).tolist() == [0, 0, 0]


def test_percentile_normalizer_is_not_squeezed_by_one_outlier():
    values = torch.arange(100, dtype=torch.float64)
    values[99] = 1e6
    squeezed, robust = functional.normalize(values, "minmax"), functional.normalize(values, "percentile")
    assert squeezed[50] < 1e-4
    assert robust[50] == pytest.approx((50 - 4.95) / (94.05 - 4.95))
    assert torch.equal(robust.argsort(), values.argsort())


@pytest.mark.parametrize(("criterion", "p"), [(L1, 1), (L2, 2)])
def test_lamp_and_l2_normalisers_match_loops(criterion, p):
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    weight[4] = weight[2]  # a tie
    norms = slow.norm(weight, 0, torch.arange(7).unsqueeze(1), p)
    (found,) = criterion(normalize="lamp").scores([member(weight)])
    close(found, reference.lamp(norms))
    assert found.max() == 1
    (found,) = criterion(normalize="l2").scores([member(weight)])
    close(found, [v / sum(w * w for w in norms) ** 0.5 for v in norms])
    for how in ("lamp", "l2", "mean", "max"):
        assert functional.normalize(torch.zeros(3), how).tolist() == [0, 0, 0]
