"""ThiNet (Luo, Wu and Lin 2017): channels whose sum the next layer hardly notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion, Member, Tap
from lightning_prune.criteria.number_checks import check_integer, check_seed


@dataclass(frozen=True)
class GramTerm(Tap):
    """Products of what each two channels add to the sampled outputs: X^T X of the rows X."""

    rows: int | None
    seed: int
    name = "gram"
    site = "reader_rows"
    joint = True

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        value = value.to(torch.float64)
        return value.T @ value

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        return partial, positions


@final
@dataclass(frozen=True, kw_only=True)
class ThiNet(Criterion):
    r"""Order in which channels go when each next one adds least to what the next layer loses with all of them.

    Luo, Wu and Lin, ThiNet: A Filter Level Pruning Method (ICCV 2017), eq. 6. A row is one output of the next layer
    at one place of one sample; :math:`x_{rc}` is what channel c adds to it (bias left out). The removed set T grows by
    the channel that keeps :math:`\sum_r (\sum_{c \in T} x_{rc})^2` smallest. That sum is :math:`1_T^T G 1_T` with
    :math:`G = X^T X` (channels, channels): only G is kept, it is summed over batches in float64, and a step of the
    greedy search is one vector operation. Needs forward only. The score is the place in the order over C - 1, in
    [0, 1]; the set for n channels begins the one for n + 1, so one pass serves every ratio. Scores say nothing about
    one layer against another: every layer loses the same share, the published scope.

    Rows do not depend on how samples are split into batches, nor on the global random state. Pruned channels
    go first. All convolutions and linear layers that read a group count, their rows together (branches,
    concatenations, residual sums: the readers of the sum; the paper prunes only inside blocks), so that layers of one
    group score alike.
    Deviations: all layers are scored in one pass on the same model, not one after the other with fine-tuning in
    between (rescore in rounds for that); samples are those of the batches (the paper: 10 images per class). The
    least-squares scaling of what stays is a step of its own, `lightning_prune.compensation.rescale_`.

    Args:
        rows: outputs drawn per sample and next layer, with replacement (published: 10); None: all of them.
        seed: of the draw, from 0 to 2**31 - 1.

    Raises:
        ScoreError: unusable setting; while scoring, no next layer, or one whose output cannot be computed from its
            weight.

    Example:
        >>> import lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 1))
        >>> _ = model[0].weight.data.fill_(1.0)
        >>> _ = model[1].weight.data.copy_(torch.tensor([[3.0, -2.0, 2.5]]))
        >>> inputs = torch.ones(4, 1)
        >>> lp.score(model, lp.trace(model, inputs), "thinet", [inputs])["0"].tolist()  # -2 goes, then 2.5 makes up
        [1.0, 0.0, 0.5]
    """

    combine = "first"  # they are alike

    rows: int | None = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows(self.rows)
        check_seed(self.seed)

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (GramTerm(self.rows, self.seed),)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        dead: dict[str, Tensor] = {}
        for member in members:
            zero = (member.rows() == 0).all(1)
            dead[member.group] = dead.get(member.group, zero) & zero
        grams = {member.group: member.means["gram"] for member in members}
        found = {group: removal_places(gram, dead[group]) for group, gram in grams.items()}
        return [found[member.group] for member in members]


def removal_places(gram: Tensor, dead: Tensor | None = None) -> Tensor:
    """Place of every channel in the greedy order of removal over C - 1; ties go by number.

    Those that are pruned already (``dead``) go first, before others that happen to add nothing.
    """
    gram = gram.detach().to("cpu", torch.float64)
    places = torch.full((len(gram),), torch.nan, dtype=torch.float64)
    if not torch.isfinite(gram).all():
        return places
    cost = gram.diagonal().clone()  # by how much the sum grows with each
    if dead is not None:
        cost[dead.to(cost.device)] = -torch.inf
    for place in range(len(gram)):
        channel = int(cost.argmin())
        places[channel] = place
        cost += 2 * gram[channel]
        cost[channel] = torch.inf
    return places / max(len(gram) - 1, 1)


def check_rows(rows: int | None) -> None:
    """Refuse what is no number of rows."""
    if rows is not None:
        check_integer("rows", rows, "an integer >= 1, or None for all outputs", 1)
