"""Criteria: how much each channel matters. Adding one takes one class and no registration.

Here: what a criterion is (`base`), one file per paper, scoring a model and its result; `observe/` has every hook on the
user's model. Not here: which channels go then (selection), when to score in a Trainer (callbacks), repairs of what
remains (compensation).
"""

from lightning_prune.criteria.apoz import APoZ
from lightning_prune.criteria.base import Criterion, Member, Tap, WeightCriterion, criterion_from
from lightning_prune.criteria.bn_scale import BNScale, add_bn_sparsity_
from lightning_prune.criteria.dcp import DCP
from lightning_prune.criteria.group_sparsity import GroupSparsity, condemned_strengths, importance_strengths
from lightning_prune.criteria.next_layer import NextLayerTaylor
from lightning_prune.criteria.random import Random
from lightning_prune.criteria.reconstruction_error import GRE, JRE, LRE
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scores import Scores
from lightning_prune.criteria.scoring import score
from lightning_prune.criteria.taylor import Taylor, TaylorFO
from lightning_prune.criteria.thinet import ThiNet
from lightning_prune.criteria.weights import FPGM, L1, L2

__all__ = [
    "DCP",
    "FPGM",
    "GRE",
    "JRE",
    "L1",
    "L2",
    "LRE",
    "APoZ",
    "BNScale",
    "Criterion",
    "GroupSparsity",
    "Member",
    "NextLayerTaylor",
    "Random",
    "Scorer",
    "Scores",
    "Tap",
    "Taylor",
    "TaylorFO",
    "ThiNet",
    "WeightCriterion",
    "add_bn_sparsity_",
    "condemned_strengths",
    "criterion_from",
    "importance_strengths",
    "score",
]
