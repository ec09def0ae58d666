"""What may stand on the command lines of the package's own commands, read without torch: help is there at once.

Here: which options there are. Not here: their types (`option_types`), and the options of Lightning's commands
(`training`) and of `experiment`, which follow from the signatures of classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_prune.cli.option_types import budget, count, criterion, least, list_of, rate, seed, setting, share
from lightning_prune.cli.parser import CONFIG_FLAGS, Parser

#: `lightning_prune.plan.Coupling`, `export.Format`, `quantization.Method` and `Cpu`,
#: `experiments.comparison.run.SelectionName`, `experiments.reproduce.recipe.SCALES` and `experiments.runner.Precision`,
#: which import torch.
COUPLINGS = ("joint", "union", "intersection")
FORMATS = ("onnx", "torch_export")
SELECTIONS = ("global", "layer", "flops")
METHODS = ("minmax", "percentile")
SCALES = ("smoke", "hour", "paper")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
CPUS = ("vnni", "x86", "arm")
PICTURES = (".html", ".svg")
#: `lightning_prune.engines.ENGINES`, likewise.
ENGINES = ("eager", "channels_last", "compile", "cuda_graphs", "onnxruntime", "openvino", "tensorrt")
ONNX_ENGINES = ("onnxruntime", "openvino", "tensorrt")
OF_EXPORT = (".onnx", ".pt2")

# No line is longer than 80 characters, as a terminal is wide.
_PRUNE = """lightning-prune prune CHECKPOINT (--model NAME | --config TASK.yaml)
           [--criterion l1] [--out pruned.pt] [--explain]
           [--ratio 0.5 | --layer-ratios RATIOS.json | --plan PLAN.json |
            --budget flops=0.5 | --budget latency_ms=20
            [--engine onnxruntime] [--latency-table TABLE.json]]"""
_MEASURE = """lightning-prune measure MODEL [PRUNED] [--arg KEY=VALUE ...]
           [--input 1 3 224 224] [--layers]
       lightning-prune measure [CHECKPOINT] [PRUNED]
           (--model NAME | --config TASK.yaml) [--layers]"""
_EXPORT = """lightning-prune export CHECKPOINT (--model NAME | --config TASK.yaml)
           --out net.onnx [--dynamic-batch] [--nms] [--engine openvino]"""
_LATENCY_TABLE = """lightning-prune latency-table MODEL [--arg KEY=VALUE ...]
           [--input 1 3 224 224] [--engine onnxruntime] [--threads N]
           [--out table.json | --kit FOLDER]
       lightning-prune latency-table CHECKPOINT
           (--model NAME | --config TASK.yaml) [...]"""
_GRAPH = """lightning-prune graph MODEL [--arg KEY=VALUE ...] [--input 1 3 224 224]
           [--out graph.html]
       lightning-prune graph --config task/resnet18_digits.yaml
           [--model.KEY VALUE ...] [--input 1 3 224 224] [--out graph.html]"""
_QUANTIZE = """lightning-prune quantize CHECKPOINT [PRUNED] --config TASK.yaml
           --out net.int8.onnx [--calibration-batches 8] [--ignore LAYER]"""
_SENSITIVITY = """lightning-prune sensitivity CHECKPOINT --config TASK.yaml
           [--criterion l1] [--ratios 0.1,0.2,...] [--batches N]
           [--metric acc] [--drop 0.01 | --budget flops=0.5] [--out DIR]"""
_CHANNELS = "lightning-prune channels PRUNED [--layer NAME] [--out channels.json]"
_LEAST = "that every group of channels keeps, or a share such as 0.25; default: 1"
_STATISTICS = "let channels under layer norms and the like go, which is NOT lossless"
_CRITERION = "l1, fpgm, jre, ..., or your own, as module:name; default: l1"
_WITH_CONFIG = "With --config, the other options are those of lightning-prune fit"


def prune(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune prune CHECKPOINT --config TASK.yaml --criterion jre --ratio 0.5`."""
    parser = Parser(
        "prune",
        usage=_PRUNE,
        description="Prune a checkpoint. The smaller model is checked against the masked one before it is written.",
        epilog=f"{_WITH_CONFIG}, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of Lightning (--config), or a state dict (--model)")
    add("--criterion", type=criterion, default="l1", metavar="NAME", help=_CRITERION)
    add("--score-batches", type=count, metavar="N", help="of the training data, for criteria that need it")
    amount = parser.add_mutually_exclusive_group().add_argument
    amount("--ratio", type=share, default=0.5, metavar="SHARE", help="of channels removed; default: 0.5")
    costs = "flops=, params= (share that remains); latency_ms= (of a sample)"
    amount("--budget", type=budget, metavar="COST=N", help=costs)
    amount("--layer-ratios", metavar="FILE", help="of every layer its own, see sensitivity --drop")
    amount("--plan", type=Path, metavar="FILE", help="carry out this one (Plan.save), with its coupling")
    add("--engine", choices=ENGINES, default="eager", metavar="NAME", help="that latency_ms is of; default: eager")
    add("--latency-table", metavar="FILE", help="keep the most score in latency_ms, see latency-table")
    add("--force-table", action="store_true", help="it is of the machine that will run the model, not of this one")
    add("--per-layer", action="store_true", help="the same share of every layer, not the network's weakest")
    add("--coupling", choices=COUPLINGS, default="joint", help="default: joint")
    add("--round-to", type=count, default=1, metavar="N", help="channels kept are multiples of it")
    add("--min-channels", type=least, default=1, metavar="N", help=_LEAST)
    add("--ignore", action="append", default=[], metavar="LAYER", help="leave it whole; a pattern; repeat")
    add("--statistics", action="store_true", help=_STATISTICS)
    parser.add_output("", default="pruned.pt")
    add("--explain", action="store_true", help="say what would be done, and do nothing")
    parser.add_model_options()
    parser.refuse_idle(argv, {"--force-table": "--latency-table"})
    options = parser.parse_with_fit_options(argv)
    if options.out.suffix.lower() in OF_EXPORT:
        parser.error(f"--out {options.out}: prune writes weights; of these, lightning-prune export writes such a file")
    if not options.explain:
        parser.refuse_used(options)
    return options


def measure(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune measure MODEL [PRUNED] [--layers]`."""
    parser = Parser(
        "measure",
        usage=_MEASURE,
        description="Measure what a model costs on this machine, before and after pruning.",
        epilog=f"{_WITH_CONFIG}, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="a model's name or a checkpoint; then a pruned one")
    add("--batch-sizes", type=list_of(count), metavar="1,8", help="default: that of --input, or 1")
    add("--threads", type=list_of(count), metavar="1,2", help="default: as torch is set")
    add("--engine", choices=ENGINES, default="eager", metavar="NAME", help=f"{', '.join(ENGINES)}; default: eager")
    add("--repeats", type=count, default=20, metavar="N", help="passes timed per model; default: 20")
    add("--layers", action="store_true", help="layer by layer, and what sets the pace")
    add("--top", type=count, default=20, metavar="N", help="layers shown; default: 20")
    parser.add_model_options()
    parser.refuse_idle(argv, {"--top": "--layers"})
    return parser.parse_with_fit_options(argv)


def export(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune export CHECKPOINT --format onnx --out net.onnx`."""
    parser = Parser(
        "export",
        usage=_EXPORT,
        description="Write what is deployed of a model to a file that runs without this package, and check the file.",
        epilog=f"{_WITH_CONFIG}, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="pruned or dense weights; or a model's name, as it is built")
    add("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_output("ending in .onnx or .pt2", required=True)
    add("--dynamic-batch", action="store_true", help="leave the number of samples open")
    add("--dynamic-size", action="store_true", help="leave height and width of images open")
    add("--nms", action="store_true", help="of YOLO: suppress overlapping boxes in the file")
    add("--outputs", type=list_of(str), metavar="A,B", help="write these outputs alone; default: all that is deployed")
    add("--input-names", type=list_of(str), metavar="A,B", help="in the file; default: as the model's code says")
    add("--output-names", type=list_of(str), metavar="A,B", help="in the file; default: as the model's code says")
    add("--opset", type=count, metavar="N", help="of ONNX; default: the exporter's")
    kept = "keep it in the file; repeat"
    add("--metadata", type=setting, action="append", default=[], metavar="KEY=VALUE", help=kept)
    add("--engine", choices=ONNX_ENGINES, metavar="NAME", help=f"check it on {', '.join(ONNX_ENGINES)}; the first")
    add("--repeats", type=count, default=20, metavar="N", help="passes timed; default: 20")
    parser.add_model_options()
    options = parser.parse_with_fit_options(argv)
    parser.refuse_used(options)
    return options


def latency_table(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune latency-table MODEL --engine onnxruntime --threads 2 --out table.json`."""
    parser = Parser(
        "latency-table",
        usage=_LATENCY_TABLE,
        description="Time every layer of a dense model over its channels in and out, on the engine that will run it, "
        "for the batch and image size of --input. The machine should do nothing else meanwhile: a minute or two where "
        "a layer is prepared in milliseconds, as in ONNX Runtime.",
        epilog=f"{_WITH_CONFIG}, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="MODEL", help="a model's name, or a checkpoint")
    engine = f"{', '.join(ENGINES)}; default: onnxruntime"
    add("--engine", choices=ENGINES, default="onnxruntime", metavar="NAME", help=engine)
    add("--threads", type=count, metavar="N", help="of the CPU; default: as torch is set")
    add("--coarse", action="store_true", help="fewer points; by itself where preparing a layer is slow")
    parser.add_output("", default="table.json")
    kit = "time nothing, but write a script that does on a machine without torch, in ONNX Runtime"
    add("--kit", type=Path, metavar="FOLDER", help=kit)
    parser.add_model_options()
    options = parser.parse_with_fit_options(argv)
    idle = [word for word in argv if options.kit and word.partition("=")[0] in ("--out", "--coarse")]
    if idle or (options.kit and options.engine != "onnxruntime"):
        parser.error(f"{idle[0] if idle else '--engine'} does nothing with --kit, whose script times in ONNX Runtime")
    parser.refuse_used(options, "--kit" if options.kit else "--out")
    return options


def quantize(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune quantize CHECKPOINT [PRUNED] --config TASK.yaml --out net.int8.onnx`."""
    parser = Parser(
        "quantize",
        usage=_QUANTIZE,
        description="Write a model in 8 bits, calibrated on training data, and compare it with float32 and, given both "
        "checkpoints, with the dense model.",
        epilog=f"{_WITH_CONFIG}, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="dense or pruned weights of the task")
    add("pruned", metavar="PRUNED", nargs="?", help="pruned weights, when CHECKPOINT is dense; --out is of these")
    add(*CONFIG_FLAGS, action="append", required=True, metavar="TASK", help="YAML file or recipe, with its data")
    parser.add_output("ending in .onnx", required=True)
    add("--calibration-batches", type=count, default=8, metavar="N", help="of the training data; default: 8")
    add("--method", choices=METHODS, default="minmax", help="how ranges are chosen; default: minmax")
    add("--ignore", action="append", default=[], metavar="LAYER", help="stays in float; a pattern; repeat")
    add("--cpu", choices=CPUS, help="where the file will run; default: a machine like this")
    add("--metric", metavar="NAME", help="logged name without stage; default: miou, map or acc")
    add("--threads", type=count, metavar="N", help="default: as torch is set")
    add("--repeats", type=count, default=30, metavar="N", help="passes timed per file; default: 30")
    parser.set_defaults(model=None, arg=[], input=None)
    options = parser.parse_with_fit_options(argv)
    parser.refuse_used(options)
    return options


def sensitivity(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune sensitivity CHECKPOINT --config TASK.yaml --criterion l1 --out DIR`."""
    parser = Parser(
        "sensitivity",
        usage=_SENSITIVITY,
        description="Mask the weakest channels of one layer alone (with those that share its channels), evaluate on "
        "validation data, undo: for every layer and ratio. Values that an earlier run into the same folder has kept, "
        "in whatever way it ended, are not measured again.",
        epilog=f"{_WITH_CONFIG}, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="dense weights of the task")
    add(*CONFIG_FLAGS, action="append", required=True, metavar="TASK", help="YAML file or recipe, with its data")
    add("--criterion", type=criterion, default="l1", metavar="NAME", help=_CRITERION)
    add("--score-batches", type=count, metavar="N", help="of the training data, for criteria that need it")
    ratios = [round(0.1 * tenth, 1) for tenth in range(1, 10)]
    add("--ratios", type=list_of(share), default=ratios, metavar="A,B", help="shares masked; default: 0.1,0.2,...,0.9")
    add("--batches", type=count, metavar="N", help="of the validation data; default: all")
    add("--metric", metavar="NAME", help="logged name without stage, such as loss; default: miou, map or acc")
    add("--mode", choices=("max", "min"), help="whether a high metric is good; default: max, of a loss min")
    amount = parser.add_mutually_exclusive_group().add_argument
    amount("--drop", type=float, metavar="N", help="choose ratios: tolerated per layer, 0.01 is 1 %% of accuracy")
    amount("--budget", type=budget, metavar="COST=N", help="choose ratios: flops=, params= (share that remains)")
    add("--round-to", type=count, default=1, metavar="N", help="channels kept are multiples of it")
    add("--min-channels", type=least, default=1, metavar="N", help=_LEAST)
    add("--ignore", action="append", default=[], metavar="LAYER", help="leave it whole; a pattern; repeat")
    add("--statistics", action="store_true", help=_STATISTICS)
    default = "runs/sensitivity"
    add("--out", dest="output", type=Path, default=Path(default), metavar="DIR", help=f"default: {default}")
    parser.set_defaults(model=None, arg=[], input=None)
    options = parser.parse_with_fit_options(argv)
    if options.budget is not None and "latency_ms" in options.budget:
        parser.error("--budget of sensitivities is flops= or params=; for latency_ms= see lightning-prune prune")
    return options


def graph(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune graph MODEL` or `lightning-prune graph --config TASK`."""
    parser = Parser(
        "graph",
        usage=_GRAPH,
        description="Show which channels of a model go together, and which cannot be pruned and why.",
        epilog=f"{_WITH_CONFIG}.",
    )
    from_config = any(word.partition("=")[0] in CONFIG_FLAGS for word in argv)
    parser.add_model_options("--model" if from_config else "model")
    parser.add_argument("--statistics", action="store_true", help=_STATISTICS)
    parser.add_output("also write a picture: .html (with a table) or .svg")
    options = parser.parse_with_fit_options(argv)
    if options.out and options.out.suffix not in PICTURES:
        parser.error(f"--out must end in .html or .svg, got '{options.out}'")
    parser.refuse_used(options)
    return options


def channels(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune channels PRUNED [--layer NAME]`."""
    parser = Parser(
        "channels",
        usage=_CHANNELS,
        description="Show which channels of the dense model a pruned one still has, and their new numbers. The file "
        "alone is read: no model is built.",
    )
    add = parser.add_argument
    add("pruned", metavar="PRUNED", help="file of lightning-prune prune or lightning_prune.save, or a checkpoint")
    add("--layer", metavar="NAME", help="every channel of these layers; a name, a module around some, or a pattern")
    parser.add_output("write the whole map as JSON, too")
    options = parser.parse_args(argv)
    parser.refuse_used(options)
    return options


def compare(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune compare --criteria l1,jre --ratios 0.5,0.7 --seeds 0,1,2 --out DIR [--config TASK]`."""
    parser = Parser(
        "compare",
        description="Prune one trained model by several criteria, fine-tune in the same way, compare.",
        epilog="Everything else is an option of lightning-prune fit, such as --trainer.max_epochs (of dense training); "
        "its Trainer's other options do not apply. Cells that an earlier run of the same settings has computed are not "
        "computed again.",
    )
    add = parser.add_argument
    task = "YAML file or recipe, with its data; default: task/resnet18_digits.yaml"
    add(*CONFIG_FLAGS, action="append", default=[], metavar="TASK", help=task)
    names = ["l1", "l2", "fpgm", "taylor", "jre"]
    add("--criteria", type=list_of(criterion), default=names, metavar="A,B", help=f"names; default: {','.join(names)}")
    shares = "shares removed; default: 0.3,0.5,0.7"
    add("--ratios", type=list_of(float), default=[0.3, 0.5, 0.7], metavar="A,B", help=shares)
    seeds = "of scoring batches and fine-tuning; default: 0,1,2"
    add("--seeds", type=list_of(seed), default=[0, 1, 2], metavar="A,B", help=seeds)
    add("--out", dest="output", type=Path, default=Path("runs/compare"), metavar="DIR", help="default: runs/compare")
    add("--checkpoint", metavar="CKPT", help="trained weights; without it the task is trained once and kept in --out")
    add("--epochs", type=int, default=5, metavar="N", help="of fine-tuning; default: 5")
    add("--lr", type=rate, metavar="N", help="first learning rate of fine-tuning; default: the task's own")
    of = "what a ratio is of: the network's channels, every layer's, or the network's FLOPs; default: global"
    add("--selection", choices=SELECTIONS, default="global", help=of)
    add("--coupling", choices=COUPLINGS, default="joint", help="default: joint")
    add("--score-batches", type=count, metavar="N", help="default: one pass over the training data")
    add("--metric", default="acc", metavar="NAME", help="logged name without stage; default: acc")
    add("--train-seed", type=seed, default=0, metavar="N", help="of the dense training; default: 0")
    options, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("--trainer") and word.partition("=")[0] != "--trainer.max_epochs":
            parser.error(f"{word} would be ignored: of a Trainer only --trainer.max_epochs, of dense training, counts")
        if word.startswith("--trainer") and options.checkpoint:
            parser.error(f"{word} would be ignored: --checkpoint is trained already")
    settings = vars(options)
    configs = [word for name in settings.pop("config") for word in ("--config", name)]
    return argparse.Namespace(**settings, fit_options=[*configs, *rest], prog=parser.prog)


def reproduce(argv: Sequence[str]) -> argparse.Namespace:
    """`lightning-prune reproduce [NAME] --scale smoke --out DIR`."""
    parser = Parser(
        "reproduce",
        description="Run a published table or figure, and show ours beside the published numbers. Without a name: list "
        "what can be reproduced.",
        epilog="Rows that an earlier run of the same settings has computed are not computed again, in whatever way it "
        "ended. Scales: smoke takes minutes and needs no data, hour about an hour on two cores, paper is as published.",
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="such as lr-table2, or a YAML file")
    add("--scale", choices=SCALES, default="smoke", help="default: smoke")
    add("--out", dest="output", type=Path, metavar="DIR", help="default: runs/reproduce/NAME-SCALE")
    add("--data", metavar="FOLDER", help="where the data sets lie that the scale names")
    add("--seeds", type=list_of(seed), metavar="0,1,2", help="default: the scale's")
    add("--precision", choices=PRECISIONS, help="of training; default: the scale's, which is 32-true")
    add("--only", type=list_of(str), default=[], metavar="A,B", help="rows with this in their label, or such patterns")
    return parser.parse_args(argv)


#: By command: what parses its words, before anything of it is imported.
PARSERS: dict[str, Callable[[Sequence[str]], argparse.Namespace]] = {
    parse.__name__.replace("_", "-"): parse
    for parse in (prune, channels, measure, latency_table, export, quantize, sensitivity, graph, compare, reproduce)
}
