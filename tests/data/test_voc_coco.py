"""Pascal VOC and COCO on tiny trees in their real formats: round trips of scenes, and every damage by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from lightning_prune.data import COCODetection, Scenes, VOCDetection, VOCSegmentation, write_voc
from lightning_prune.data.samples import plain
from lightning_prune.data.voc import VOC_CLASSES
from lightning_prune.data.voc_files import read_annotation
from lightning_prune.errors import DataError
from tests.data.helpers import write_coco

DIGITS = tuple("0123456789")
SIZE = 48
PARTS = {"train": Scenes("train", 5, size=SIZE), "val": Scenes("val", 3, size=SIZE)}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    for part, scenes in PARTS.items():
        write_voc(scenes, root, part)
        write_coco(scenes, root / "coco", f"{part}2017")
    return root


@pytest.fixture
def tree(trees, tmp_path):
    shutil.copytree(trees, tmp_path, dirs_exist_ok=True)
    return tmp_path


def voc_boxes(root, **options):
    settings = {"batch_size": 2, "classes": DIGITS, "size": None, "num_workers": 0, **options}
    module = VOCDetection(str(root), **settings)
    module.setup()
    return module


def voc_masks(root, **options):
    options = {"classes": DIGITS, "base": SIZE, "crop": 32, "num_workers": 0, **options}
    module = VOCSegmentation(str(root), 2, **options)
    module.setup()
    return module


def coco(root, **options):
    module = COCODetection(str(root / "coco"), 2, **{"size": None, "num_workers": 0, **options})
    module.setup()
    return module


@pytest.mark.parametrize("read", [voc_boxes, coco])
def test_boxes_survive_the_round_trip(tree, read):
    module = read(tree, augment="none")
    assert module.class_names == DIGITS
    assert module.num_classes == 10
    for part, scenes in PARTS.items():
        for index in range(len(scenes)):
            scene, (image, target) = scenes[index], module.parts[part][index]
            assert target["boxes"].tolist() == scene.boxes.tolist()
            assert target["labels"].tolist() == scene.labels.tolist()
            assert target["image_id"] == index + (read is coco)
            assert np.abs(image.permute(1, 2, 0).numpy() * 255 - scene.image).mean() < 8  # JPEG
            if read is coco:
                assert target["area"].tolist() == pytest.approx(scene.pixels.tolist())
    assert [len(t) for _, t in module.val_dataloader()] == [2, 1]


def test_masks_survive_the_round_trip(tree):
    module = voc_masks(tree)
    assert module.class_names == ("background", *DIGITS)
    assert module.num_classes == 11
    for index in range(3):
        image, mask = module.parts["val"][index]
        assert np.array_equal(mask.numpy(), PARTS["val"][index].mask)
        assert image.shape == (3, SIZE, SIZE)
    images, masks = next(iter(module.train_dataloader()))
    assert images.shape == (2, 3, 32, 32)
    assert masks.dtype == torch.int64


def test_the_palette_is_vocs(tree):
    with Image.open(tree / "VOCdevkit/VOC2012/SegmentationClass/val_000000.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[3 * 15 : 3 * 16] == [192, 128, 128]  # person
        assert image.getpalette()[3 * 255 :] == [224, 224, 192]


ANNOTATION = """<annotation>
  <filename>a.jpg</filename>
  <size><width>100</width><height>50</height><depth>3</depth></size>
  <object><name>dog</name><difficult>0</difficult>
    <bndbox><xmin>11</xmin><ymin>6.0</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>
  <object><name>person</name><difficult>1</difficult>
    <bndbox><xmax>100</xmax><ymax>50</ymax><xmin>1</xmin><ymin>1</ymin></bndbox></object>
</annotation>"""


def annotation(tmp_path, old="", new=""):
    path = tmp_path / "a.xml"
    path.write_text(ANNOTATION.replace(old, new, 1))
    return path


def test_an_annotation_by_hand(tmp_path):
    found = read_annotation(annotation(tmp_path), VOC_CLASSES)
    assert found["orig_size"] == (50, 100)
    assert found["boxes"].tolist() == [[10, 5, 20, 15], [0, 0, 100, 50]]
    assert [VOC_CLASSES[label] for label in found["labels"]] == ["dog", "person"]
    assert found["difficult"].tolist() == [False, True]
    assert found["area"].tolist() == [100, 5000]
    assert plain(found)["labels"].tolist() == [VOC_CLASSES.index("dog")]
    assert len(VOC_CLASSES) == 20


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", r"a\.xml, line 9, column \d+: no valid XML"),
        ("</name><difficult>0", "<difficult>0", r"a\.xml, line 6, column \d+: no valid XML \(mismatched tag"),
        (">dog<", ">wolf<", r"a\.xml, object 1: unknown class 'wolf'; the classes are aeroplane, .*set classes"),
        (">100</xmax", ">110</xmax", r"a\.xml: box 2, \[0\.0, 0\.0, 110\.0, 50\.0\].*100 x 50 leaves it by 10 pixels"),
        ("<xmin>11</xmin>", "", r"a\.xml, object 1: bndbox/xmin is missing"),
        (">6.0<", ">six<", r"a\.xml, object 1: bndbox/ymin is 'six', not a number"),
        ("<width>100</width>", "", r"a\.xml: size/width is missing"),
        ("<width>100</width>", "<width>nan</width>", r"a\.xml: size/width is 'nan', not a number"),
        (">6.0<", ">inf<", r"a\.xml, object 1: bndbox/ymin is 'inf', not a number"),
        ("<annotation>", "<?xml version='1.0' encoding='klingon'?><annotation>", "line 1: no valid XML .*klingon"),
        (">11<", ">21<", r"a\.xml: box 1, .* has no area"),
    ],
)
def test_damaged_annotations_are_named(tmp_path, old, new, message):
    with pytest.raises(DataError, match=message):
        read_annotation(annotation(tmp_path, old, new), VOC_CLASSES)


def test_an_image_without_objects_is_a_negative(tree):
    path = tree / "VOCdevkit/VOC2012/Annotations/train_000001.xml"
    head, _, rest = path.read_text().partition("<object>")
    path.write_text(head + rest[rest.rindex("</object>") + len("</object>") :])
    module = voc_boxes(tree)
    assert len(module.parts["train"]) == 5
    assert module.parts["train"][1][1]["boxes"].shape == (0, 4)
    file = tree / "coco/annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 2]
    file.write_text(json.dumps(content))
    assert coco(tree).parts["train"][1][1]["labels"].shape == (0,)


def test_difficult_objects_and_crowds_are_only_evaluated(tree):
    for part in ("train", "val"):
        path = tree / f"VOCdevkit/VOC2012/Annotations/{part}_000000.xml"
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
        file = tree / f"coco/annotations/instances_{part}2017.json"
        content = json.loads(file.read_text())
        content["annotations"][0]["iscrowd"] = 1
        file.write_text(json.dumps(content))
    for module, flag in ((voc_boxes(tree, augment="none"), "difficult"), (coco(tree, augment="none"), "iscrowd")):
        evaluated = module.parts["val"][0][1]
        assert evaluated[flag].tolist() == [True] + [False] * (len(PARTS["val"][0].labels) - 1)
        assert module.parts["train"][0][1]["labels"].tolist() == PARTS["train"][0].labels[1:].tolist()


def test_several_image_sets_are_joined(tree):
    module = voc_boxes(tree, train_on=("2012/train", "2012/val"))
    assert len(module.parts["train"]) == 8
    assert [target["image_id"] for _, target in module.parts["train"].items] == list(range(8))
    assert len(voc_masks(tree, train_on=("2012/train", "2012/val")).parts["train"]) == 8


@pytest.mark.parametrize("read", [voc_boxes, voc_masks])
def test_missing_voc_is_named_with_the_way_out(tree, read):
    with pytest.raises(DataError, match=r"VOCdevkit/VOC2012 does not exist.*download: true.*VOCtrainval_11-May-2012"):
        read(tree / "nowhere")
    with pytest.raises(DataError, match=r"VOC2007 does not exist.*VOCtest_06-Nov-2007\.tar"):
        read(tree, evaluate_on=("2007/test",))
    with pytest.raises(DataError, match=r"VOC2012 has no usable image set 'trainval'"):
        read(tree, train_on=("2012/trainval",))
    for name in ("2012/test", "1999/train"):
        with pytest.raises(DataError, match=r"YEAR/SET, such as 2012/train, got"):
            read(tree, train_on=(name,))


def test_missing_and_damaged_files_of_voc_are_named(tree):
    folder = tree / "VOCdevkit/VOC2012"
    (folder / "JPEGImages/train_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"train_000002\.jpg does not exist \(1 of 10 files"):
        voc_boxes(tree)
    path = folder / "JPEGImages/val_000000.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"val_000000\.jpg is not a readable image"):
        voc_boxes(tree, train_on=("2012/val",)).parts["val"][0]
    (folder / "SegmentationClass/val_000001.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"val_000001\.png is not a readable mask"):
        voc_masks(tree, train_on=("2012/val",)).parts["val"][1]


def test_an_image_of_another_size_than_annotated_is_refused(tree):
    path = tree / "VOCdevkit/VOC2012/JPEGImages/val_000000.jpg"
    Image.new("RGB", (SIZE, SIZE + 1)).save(path)
    with pytest.raises(DataError, match=r"val_000000\.jpg is 48 x 49, but its annotation says 48 x 48"):
        voc_boxes(tree).parts["val"][0]
    with pytest.raises(DataError, match=r"val_000000\.png is \(48, 48\), but its image is \(48, 49\)"):
        voc_masks(tree).parts["val"][0]


def test_masks_of_unknown_classes_or_colours_are_refused(tree):
    path = tree / "VOCdevkit/VOC2012/SegmentationClass/val_000000.png"
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[:3] = 255
    Image.fromarray(mask).save(path)
    assert (voc_masks(tree).parts["val"][0][1] == 255).sum() == 3 * SIZE
    mask[5] = 11
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match=r"val_000000\.png: 11 is none of 11 classes"):
        voc_masks(tree).parts["val"][0]
    Image.fromarray(mask).convert("RGB").save(path)
    with pytest.raises(DataError, match=r"holds colours or wide numbers \(mode RGB\)"):
        voc_masks(tree).parts["val"][0]


def test_less_than_one_batch_to_train_on_is_refused(tree):
    """Lightning would train on nothing, and say so in a warning only."""
    with pytest.raises(DataError, match=r"5 training images are less than one batch of 16, .* drop_last: false"):
        voc_boxes(tree, batch_size=16).train_dataloader()
    assert len(voc_boxes(tree, batch_size=16, drop_last=False).train_dataloader()) == 1


def test_an_empty_image_set_is_refused(tree):
    (tree / "VOCdevkit/VOC2012/ImageSets/Main/train.txt").write_text("")
    with pytest.raises(DataError, match="train part holds no image"):
        voc_boxes(tree)


def test_sbd_adds_training_images(tree):
    sbd = tree / "sbd"
    (sbd / "img").mkdir(parents=True)
    (sbd / "cls").mkdir()
    Image.new("RGB", (30, 20), (255, 0, 0)).save(sbd / "img/one.jpg")
    classes = np.full((20, 30), 7, dtype=np.uint8)
    savemat(sbd / "cls/one.mat", {"GTcls": np.array([(classes,)], dtype=[("Segmentation", object)])})
    (sbd / "train_noval.txt").write_text("one\n")
    part = voc_masks(tree, classes=VOC_CLASSES, sbd_root=str(sbd)).parts["train"]
    assert len(part) == 6
    assert set(part[5][1].unique().tolist()) <= {7, 255}
    (sbd / "train_noval.txt").unlink()
    with pytest.raises(DataError, match=r"SBD: .* does not hold img, cls and train_noval\.txt"):
        voc_masks(tree, sbd_root=str(sbd))


def test_voc_downloads_only_when_asked_and_not_there(tree, tmp_path_factory, monkeypatch):
    asked, empty = [], str(tmp_path_factory.mktemp("empty"))

    def download(url, root, **_):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", download)
    for kind in (VOCDetection, VOCSegmentation):
        kind(empty).prepare_data()
        with pytest.raises(DataError, match="no route to host"):
            kind(empty, download=True).prepare_data()
    assert len(asked) == 2
    for kind in (VOCDetection, VOCSegmentation):
        kind(str(tree), download=True).prepare_data()  # all there
    assert len(asked) == 2
    assert "VOCtrainval_11-May-2012" in asked[0]


def test_cocos_classes_can_be_chosen(tree):
    module = coco(tree, classes=("7", "3"), augment="none")
    for index in range(3):
        labels = PARTS["val"][index].labels
        expected = [("7", "3").index(str(label)) for label in labels if str(label) in ("7", "3")]
        assert module.parts["val"][index][1]["labels"].tolist() == expected
    with pytest.raises(DataError, match="unknown class 'dog'; the file's are 0, 1"):
        coco(tree, classes=("7", "dog"))


def test_category_numbers_with_gaps_become_labels_without(tree):
    for part in PARTS:
        file = tree / f"coco/annotations/instances_{part}2017.json"
        content = json.loads(file.read_text())
        for row in (*content["categories"], *content["annotations"]):
            key = "category_id" if "category_id" in row else "id"
            row[key] = 100 - 7 * row[key]
        file.write_text(json.dumps(content))
    module = coco(tree, augment="none")
    assert module.class_names == tuple(reversed(DIGITS))
    assert module.parts["val"][0][1]["labels"].tolist() == (9 - PARTS["val"][0].labels).tolist()


def test_classes_are_unknown_before_the_file_is_read(tree):
    with pytest.raises(DataError, match=r"call setup\(\) first"):
        _ = COCODetection(str(tree)).num_classes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("categories"), "no instances file of COCO: it has no categories"),
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 1 has the unknown category 99"),
        (lambda c: c["annotations"][1].pop("bbox"), "number 2 of its annotations has no bbox"),
        (lambda c: c["annotations"][1].update(bbox=None), "number 2 of its annotations has no bbox, or of the wrong"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 2: bbox is \[1, 2, 3\], not \[x, y, width"),
        (lambda c: c["annotations"][0].update(bbox=["1"] * 4), r"annotation 1: bbox is \['1', "),
        (lambda c: c["annotations"].append(3), "of its annotations has no id, image_id, "),
        (lambda c: c.update(annotations=None), "it has no annotations"),
        (lambda c: c["images"][0].update(height="64"), "number 1 of its images has no height, or of the wrong type"),
        (lambda c: c["images"].append(c["images"][0]), "its images are 6 with 5 different ids"),
        (lambda c: c["categories"][3].update(name="0"), "two categories are called '0'"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 is of image 99, which the file does not"),
        (lambda c: c["images"][0].update(file_name="x.jpg"), r"x\.jpg does not exist \(1 of 5 files"),
    ],
)
def test_damaged_instances_are_named(tree, damage, message):
    file = tree / "coco/annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        coco(tree)


def test_cocos_bad_boxes_are_repaired_or_refused(tree):
    file = tree / "coco/annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    count = sum(row["image_id"] == 1 for row in content["annotations"])
    content["annotations"][0]["bbox"] = [5, 5, 0, 10]
    file.write_text(json.dumps(content))
    assert len(coco(tree, augment="none").parts["train"][0][1]["labels"]) == count - 1
    with pytest.raises(DataError, match=r"instances_train2017\.json, image 000000000001\.jpg: box 1, .* has no area"):
        coco(tree, bad_boxes="refuse")


def test_broken_json_is_named_with_its_line(tree):
    file = tree / "coco/annotations/instances_train2017.json"
    content = json.dumps(json.loads(file.read_text()), indent=1).splitlines()
    content[6] = content[6].replace(":", "")
    file.write_text("\n".join(content))
    with pytest.raises(DataError, match=r"instances_train2017\.json, line 7, column \d+: no valid JSON"):
        coco(tree)
    file.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="byte 12: no valid text"):
        coco(tree)
    file.unlink()
    with pytest.raises(DataError, match=r"instances_train2017\.json cannot be read.*annotations_trainval2017\.zip"):
        coco(tree)
