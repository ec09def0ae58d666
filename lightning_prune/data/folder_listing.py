"""Which image files belong to which part and class: by folders, by lists, or by a share that is held out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_prune.errors import DataError

PARTS = ("train", "val", "test")


class ImageFile(NamedTuple):
    """An image and the number of its class."""

    path: Path
    label: int


Files = list[ImageFile]


def class_folders(root: Path) -> tuple[str, ...]:
    """The folders that stand for classes, in alphabetical order; hidden ones are none."""
    if not root.is_dir():
        raise DataError(f"the folder {root.absolute()} does not exist")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root.absolute()} holds no folders, of which each class needs one with its images")
    return tuple(names)


def class_names(root: Path) -> tuple[str, ...]:
    """The classes of a folder of classes, or of one with such folders as its parts."""
    return class_folders(root / "train" if (root / "train").is_dir() else root)


def listed_parts(root: Path, val_share: float, lists: Mapping[str, str] | None, seed: int) -> dict[str, Files]:
    """The files of "train", "val" and "test"; see `ImageFolderDataModule`."""
    if not 0 <= val_share < 1:
        raise DataError(f"val_share is the share of training images to hold out and must be in [0, 1), got {val_share}")
    if lists is not None:
        found = _by_lists(root, lists)
    elif (root / "train").is_dir():
        found = _by_folders(root)
    else:
        found = {"train": _images(root, class_folders(root))}
    if val_share:
        found.setdefault("test", found.get("val", []))
        files = found["train"]
        rest, held = held_out([file.label for file in files], class_names(root), val_share, seed)
        found["train"], found["val"] = [files[k] for k in rest], [files[k] for k in held]
    evaluated = found.get("val") or found.get("test")
    if not evaluated:
        raise DataError(
            f"{root.absolute()} has no images to validate on: neither val/ nor test/ beside train/. Set val_share: 0.1 "
            "to hold out a tenth of the training images, or name files in lists"
        )
    return {"train": found["train"], "val": evaluated, "test": found.get("test") or evaluated}


def _by_folders(root: Path) -> dict[str, Files]:
    classes = class_folders(root / "train")
    found = {"train": _images(root / "train", classes)}
    for part in PARTS[1:]:
        if (root / part).is_dir():
            others = class_folders(root / part)
            if others != classes:
                missing, unknown = sorted({*classes} - {*others}), sorted({*others} - {*classes})
                said = [f"lacks {', '.join(missing[:5])}"] * bool(missing)
                said += [f"has {', '.join(unknown[:5])} besides"] * bool(unknown)
                raise DataError(
                    f"{(root / part).absolute()} {' and '.join(said)}: its classes ({len(others)}) must be those of "
                    f"train ({len(classes)}), in folders of the same names"
                )
            found[part] = _images(root / part, classes)
    return found


def _images(root: Path, classes: Sequence[str]) -> Files:
    """Every image below the folders of the classes, in alphabetical order."""
    files: Files = []
    for label, name in enumerate(classes):
        images = images_below(root / name)
        if not images:
            raise DataError(
                f"the folder {(root / name).absolute()} stands for a class and holds no image "
                f"({', '.join(IMG_EXTENSIONS)}): add its images, or remove it"
            )
        files += [ImageFile(path, label) for path in images]
    return files


def _by_lists(root: Path, lists: Mapping[str, str]) -> dict[str, Files]:
    if not {"train"} <= {*lists} <= {*PARTS}:
        raise DataError(f"lists needs train, and may have val and test besides, got {', '.join(lists) or 'nothing'}")
    numbers = {name: number for number, name in enumerate(class_folders(root))}
    found: dict[str, Files] = {}
    seen: dict[Path, str] = {}
    for part, name in lists.items():
        source = Path(name)
        if not source.is_file():
            raise DataError(f"lists: the file {source.absolute()} of {part} does not exist")
        found[part] = []
        for number, text in numbered_lines(source):
            path, where = root / text, f"{source}, line {number}"
            folder = Path(text).parts[0]
            if folder not in numbers:
                raise DataError(f"{where}: {text} must begin with the folder of its class, relative to {root}")
            if not path.is_file():
                raise DataError(f"{where}: {path} does not exist; correct the line")
            if seen.setdefault(path, part) != part:
                raise DataError(f"{where}: {text} is in the list of {seen[path]} too")
            found[part].append(ImageFile(path, numbers[folder]))
        if not found[part]:
            raise DataError(f"lists: {source.absolute()} of {part} names no image; write one on each line")
    return found


def held_out(labels: Sequence[int], classes: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The places of what is left, and of a share of each class at random."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    generator = torch.Generator().manual_seed(seed)
    held: set[int] = set()
    for label, indices in sorted(of_class.items()):
        count = round(share * len(indices))
        if not 0 < count < len(indices):
            raise DataError(
                f"val_share={share} of the {len(indices)} images of class {classes[label]!r} is {count}: none would be "
                "left to validate on, or to train on; choose another share, or add images"
            )
        held.update(indices[k] for k in torch.randperm(len(indices), generator=generator)[:count].tolist())
    return [k for k in range(len(labels)) if k not in held], sorted(held)


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images in a folder by their names without ending, in alphabetical order; hidden files are none."""
    if not folder.is_dir():
        raise DataError(f"the folder {folder.absolute()} does not exist")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMG_EXTENSIONS or path.name[0] == ".":
            continue
        if (twin := found.setdefault(path.stem, path)) is not path:
            raise DataError(f"{folder.absolute()} holds {twin.name} and {path.name}: remove the one that is not meant")
    return found


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and those below it, in alphabetical order; hidden files are none."""
    files: list[Path] = []
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        images = sorted(each for each in names if each.lower().endswith(IMG_EXTENSIONS) and each[0] != ".")
        files += [Path(place, each) for each in images]
    return files


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers from 1."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable text file ({error}); write it again") from error
    return [(number, text) for number, line in enumerate(lines, 1) if (text := line.strip())]
