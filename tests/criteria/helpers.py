"""What the tests of scoring share: the state of a model, and comparing it."""

import random

import numpy as np
import torch


class Interrupt(Exception):
    pass


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "grad_ids": [id(parameter.grad) for parameter in model.parameters()],
        "grads": [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hooks(model),
        "random": (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "tensors":
            assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
        elif key == "grads":
            assert len(before[key]) == len(after[key])
            assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
        else:
            assert before[key] == after[key], key
