"""Somebody else's trained CNN, made smaller for a device: prune to a budget, fine-tune, check, export, report.

python examples/deployer.py --weights best.pt  # a state dict of what `network` builds; without: made-up weights
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torch.nn.functional import cross_entropy

import lightning_prune as lp
from lightning_prune.report import KeptChannels, PruneReport, StageResult, print_report
from lightning_prune.report.graph_picture import graph_html
from lightning_prune.report.html import write_report


def network() -> torch.nn.Module:
    """The network as its author builds it: put yours here (`timm.create_model(...)` works as well)."""
    return torchvision.models.resnet18(num_classes=10)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels to fine-tune with: put your data loader here."""
    return [(torch.randn(16, 3, 64, 64), torch.arange(16) % 10)] * count


def finetune(model: torch.nn.Module) -> None:
    """An ordinary training loop; the small model is an ordinary module."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for images, labels in batches(4):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()


def stage(name: str, cost: lp.measure.Measurement) -> StageResult:
    """A row of the report."""
    time, counts = cost.latency, {"params": cost.params, "flops": cost.flops, "size_bytes": cost.size_bytes}
    return StageResult(name, latency_ms=time.median, latency_iqr_ms=time.iqr, **counts)


def main() -> None:
    """Everything, in the order in which one does it."""
    parser = argparse.ArgumentParser(description="Prune a trained network for a device.")
    parser.add_argument("--weights", help="state dict of the trained network")
    parser.add_argument("--out", type=Path, default=Path("runs/deployer"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, images = network().eval(), torch.randn(1, 3, 64, 64)
    if options.weights:
        model.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))

    # Another budget: flops=0.5, or latency_ms=20 with engine="onnxruntime" on the machine that will run it.
    budget = lp.Budget(params=0.4, round_to=8)
    result = lp.prune(model, images, criterion="fpgm", selection=budget)
    (options.out / "graph.html").write_text(graph_html(result.graph, title="The channels of the network"), "utf-8")
    finetune(result.model)

    lp.save(options.out / "pruned.pt", result.model, result.plan)
    exported = lp.export(result.model, images, options.out / "pruned.onnx", dynamic_batch=True)
    print(f"ONNX: largest relative error {exported.max_rel_error:.0e} in {exported.inputs} images")

    sides = [(name, layer.outputs) for name, layer in result.channels.layers.items()]
    report = PruneReport(
        "Two fifths of the parameters",
        {"criterion": "FPGM", "budget": str(budget)},
        (stage("dense", result.before), stage("reconstructed", result.after)),
        layers=tuple(KeptChannels(name, side.size, len(side.keep), keep=side.keep) for name, side in sides),
        losslessness=result.lossless,
    )
    print_report(report)
    print(f"Open {write_report(report, options.out)['html']}")


if __name__ == "__main__":
    main()
