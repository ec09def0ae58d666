"""What reconstruction inside a fit costs.

Run from the repository's root on an idle machine: ``python -m benchmarks.reconstruction_step``; under a minute.
ResNet-50 with AdamW's state at ratio 0.5, joint; the loss of the next batch on the masked and the reconstructed model.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
import torchvision

import lightning_prune as lp


def main() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    images, labels = torch.randn(8, 3, 96, 96), torch.randint(1000, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    graph = lp.trace(model, images[:2])
    plan = lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    handle = lp.mask_(model, graph, plan, optimizers=[optimizer])
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    handle.apply_()
    before = F.cross_entropy(copy.deepcopy(model)(images), labels).item()
    handle.remove()
    started = time.perf_counter()
    report = lp.reconstruct_(model, graph, plan, optimizers=[optimizer], example_inputs=images[:2])
    took = time.perf_counter() - started
    after = F.cross_entropy(model(images), labels).item()
    print(
        f"ResNet-50 with AdamW, ratio 0.5: reconstructed in {took:.2f} s with the float64 comparison (under 2 s), "
        f"relative error {report.max_rel_error:.1e}\nnext loss in train mode: masked {before:.8f}, reconstructed "
        f"{after:.8f}, relative difference {abs(after - before) / before:.1e} (at most 1e-5)"
    )


if __name__ == "__main__":
    main()
