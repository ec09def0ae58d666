"""A step that runs the model on batches of several loaders: their samples are samples of one batch."""

import pytest
import torch

import lightning_prune as lp
from tests.graph.helpers import residual_case


@pytest.mark.parametrize("name", ["lre", "gre", "jre", "apoz", "taylor", "taylor_fo", "next_layer_taylor"])
def test_calls_with_other_numbers_of_samples_are_of_other_samples(name):
    case = residual_case()
    images, labels = case.batch
    graph = lp.trace(case.model, images)
    parts = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    assert len(parts[0][0]) != len(parts[1][0])
    apart = lp.score(case.model, graph, name, parts, case.loss)
    found = lp.score(case.model, graph, name, [parts], lambda m, both: sum(case.loss(m, b) for b in both))
    for group, scores in apart.items():
        assert torch.allclose(found[group], scores, rtol=1e-9), group
