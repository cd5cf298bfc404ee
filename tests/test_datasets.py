"""Data sets: every format on small files written here by hand, whole and damaged; the real sets where they are."""

import functools
import http.server
import pickle
import re
import shlex
import shutil
import tarfile
import threading
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command
from PIL import Image
from writers import (
    VOC_ONE,
    VOC_XML,
    WNIDS,
    coco_content,
    needs_coco,
    picture,
    steel_names,
    write_cifar,
    write_coco,
    write_elpv,
    write_steel,
    write_svhn,
    write_tiny,
    write_voc,
)

from xai_companion.core import settings
from xai_companion.data.datasets import (
    DATASETS,
    check_dataset,
    check_item,
    check_set,
    dataset_status,
    get_dataset,
    load_dataset,
    splits_here,
)
from xai_companion.data.inspection import cut_patches, decode_runs, stratified
from xai_companion.data.items import ImageSet, Item, box_mask, boxes_fit, resized
from xai_companion.data.photos import load_image
from xai_companion.data.readers import DataError, imagenet_wnids
from xai_companion.viz import as_picture


def cut(file, keep=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


# ---- whole sets --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, folder, key", [("cifar10", "cifar-10-batches-py", "labels"), ("cifar100", "cifar-100-python", "fine_labels")]
)
def test_cifar(tmp_path, name, folder, key):
    written = write_cifar(tmp_path / folder, key)
    train, test = (load_dataset(name, split, tmp_path, verify=False) for split in ("train", "test"))
    assert len(test) == 4 and len(train) == 4 * (len(written) - 1) and test.classes == ["cat", "dog", "eel"]
    assert test[1].image.dtype == torch.float32 and test[1].label == 1 and test[1].name == "1"
    last = [*written][-1]
    assert (test[3].image * 255).round().byte().flatten().tolist() == written[last][3].tolist()
    assert test.pixels.shape == (4, 3, 32, 32) and test.pixels.dtype == torch.uint8
    assert load_dataset(name, "val", tmp_path, verify=False).split == "test"  # the set's own evaluation split
    assert load_dataset(name, root=tmp_path, size=48, verify=False)[0].image.shape == (3, 48, 48)
    with pytest.raises(ValueError, match="splits test, train"):
        load_dataset(name, "extra", tmp_path, verify=False)
    with pytest.raises(DataError, match="MD5"):
        load_dataset(name, "test", tmp_path)
    with pytest.raises(DataError, match="10,000"):
        check_dataset(name, "test", tmp_path, verify=False)
    assert check_dataset(name, "test", tmp_path, counts=False, verify=False)[0]["images"] == 4


def test_cifar_damage(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}

    def refused(match, error=DataError):
        with pytest.raises(error, match=match):
            load_dataset("cifar10", "train", tmp_path, verify=False)
        for name, content in whole.items():
            (folder / name).write_bytes(content)

    cut(folder / "data_batch_2")
    refused("data_batch_2")
    (folder / "data_batch_4").write_bytes(pickle.dumps({"labels": [1]}))
    refused("data_batch_4")
    (folder / "batches.meta").write_bytes(b"no pickle")
    refused("batches.meta")
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}))
    refused("labels from .0,. to .3,., for 3 classes")
    (folder / "data_batch_5").write_bytes(pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0]}))
    refused("20 images and 17 labels")
    (folder / "data_batch_5").unlink()
    refused("data_batch_5 is missing", FileNotFoundError)


def test_svhn(tmp_path):
    pixels = write_svhn(tmp_path / "svhn")
    digits = load_dataset("svhn", "test", tmp_path, verify=False)
    assert [item.label for item in digits] == [1, 0, 9, 5, 0]
    assert ((digits[4].image * 255).round().permute(1, 2, 0).numpy() == pixels[..., 4]).all()
    with pytest.raises(DataError, match="test_32x32.mat.*MD5"):
        load_dataset("svhn", "test", tmp_path)
    cut(tmp_path / "svhn" / "test_32x32.mat", 0.3)
    with pytest.raises(DataError, match="test_32x32.mat cannot be read"):
        load_dataset("svhn", "test", tmp_path, verify=False)


def test_tiny_imagenet(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    train, val = (load_dataset("tiny_imagenet", split, tmp_path) for split in ("train", "val"))
    assert val.wnids == sorted(WNIDS) and val.classes == ["goldfish", "tabby", "espresso"]
    assert val.imagenet_indices.tolist() == [1, 281, 967]
    assert [item.label for item in val] == [2, 0, 1] and [item.name for item in val][1] == "val/images/val_1.JPEG"
    assert val.boxes.tolist() == [[0, 32, 45, 63], [52, 55, 58, 60], [0, 0, 64, 64]]
    assert val[1].mask().sum() == 6 * 5 and val[2].mask().all()
    assert [item.label for item in train] == [0, 0, 1, 1, 2, 2]
    assert train[3].name == "train/n02123045/images/n02123045_1.JPEG" and train[3].boxes.tolist() == [[10, 20, 11, 31]]
    large = load_dataset("tiny_imagenet", "val", tmp_path, size=224)[1]
    assert large.image.shape == (3, 224, 224) and large.boxes.tolist() == [[182, 192.5, 203, 210]]
    assert {r["split"]: r["with boxes"] for r in check_dataset("tiny_imagenet", root=tmp_path, counts=False)} == {
        "train": 6,
        "val": 3,
    }
    with pytest.raises(DataError, match="6 images where its authors state 100,000"):
        check_dataset("tiny_imagenet", root=tmp_path)


def test_wnids_are_those_of_imagenet():
    wnids = imagenet_wnids()
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids) and wnids[0] == "n01440764" and wnids[999] == "n15075141"


@pytest.mark.parametrize(
    "split, file, old, new, match",
    [
        (
            "val",
            "val/val_annotations.txt",
            "n01443537",
            "n99999999",
            "val_annotations.txt: the class n99999999 of val_1.JPEG",
        ),
        ("val", "val/val_annotations.txt", "\t44\t", "\t4o\t", "val_annotations.txt, box of val_0.JPEG"),
        ("val", "val/val_annotations.txt", "\t44\t62", "", "val_annotations.txt, line 1: 6 fields"),
        ("val", "val/val_annotations.txt", "52\t55", "58\t55", "the box of val_1.JPEG"),
        ("val", "val/val_annotations.txt", "0\t32", "-1\t32", "the box of val_0.JPEG"),
        ("val", "val/val_annotations.txt", "val_1.", "val_9.", "has no line for val/images/val_1.JPEG"),
        ("val", "val/val_annotations.txt", "val_1.", "val_0.", "val/images/val_1.JPEG"),
        ("val", "words.txt", "n01443537\tgoldfish", "n01443538\tgoldfish", "words.txt has no name for n01443537"),
        ("val", "words.txt", "\tgoldfish", " goldfish", "words.txt, line 3"),
        ("val", "wnids.txt", "n07920052\n", "", "the class n07920052 of val_0.JPEG is not in wnids.txt"),
        ("val", "val/val_annotations.txt", "val_0", "\udcff", "val_annotations.txt cannot be read"),
        ("train", "wnids.txt", "n07920052\n", "", "the class n07920052 of n07920052_0.JPEG is not in wnids.txt"),
        (
            "train",
            "train/n01443537/n01443537_boxes.txt",
            "_1.JPEG",
            "_5.JPEG",
            "n01443537_boxes.txt has no line for .*n01443537_1.JPEG",
        ),
    ],
)
def test_tiny_imagenet_damage(tmp_path, split, file, old, new, match):
    file = write_tiny(tmp_path / "tiny-imagenet-200") / file
    text = file.read_text()
    assert old in text
    file.write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=match):
        load_dataset("tiny_imagenet", split, tmp_path)


def test_tiny_imagenet_missing_files(tmp_path):
    folder = write_tiny(tmp_path / "tiny-imagenet-200")
    (folder / "train" / "n01443537" / "n01443537_boxes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="n01443537_boxes.txt"):
        load_dataset("tiny_imagenet", "train", tmp_path)
    (folder / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(DataError, match="has a box for the missing val/images/val_2.JPEG"):
        load_dataset("tiny_imagenet", "val", tmp_path)
    shutil.rmtree(folder / "val" / "images")
    with pytest.raises(FileNotFoundError, match="val/images is missing"):
        load_dataset("tiny_imagenet", "val", tmp_path)


def test_check_names_every_damaged_image(tmp_path):
    folder = write_tiny(tmp_path / "tiny-imagenet-200")
    for i in (0, 2):
        cut(folder / "val" / "images" / f"val_{i}.JPEG")
    with pytest.raises(DataError, match=r"(?s)2 of 3 images.*val_0.JPEG cannot.*val_2.JPEG cannot"):
        check_dataset("tiny_imagenet", "val", tmp_path, counts=False)
    with pytest.raises(ValueError, match="val_2.JPEG"):
        load_dataset("tiny_imagenet", "val", tmp_path)[2]
    (folder / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn07920052\t0\t0\t63\t63\nval_1.JPEG\tn01443537\t52\t55\t65\t59\n"
        "val_2.JPEG\tn02123045\t0\t0\t63\t63\n"
    )
    with pytest.raises(DataError, match="val_1.JPEG: a box"):
        check_dataset("tiny_imagenet", "val", tmp_path, counts=False)


@pytest.mark.parametrize("year, default", [("2007", "test"), ("2012", "val")])
def test_voc(tmp_path, year, default):
    write_voc(tmp_path / "VOCdevkit" / f"VOC{year}")
    scenes = load_dataset(f"voc{year}", root=tmp_path, masks=True)
    assert scenes.split == default and scenes.multi_label and len(scenes) == 2
    first, second = scenes[0], scenes[1]
    assert [scenes.classes[label] for label in first.labels] == ["dog", "person"] and first.box_labels == (14, 11, 14)
    assert first.boxes.tolist() == [[0, 1, 10, 30], [20.5, 4, 40, 8], [38, 28, 40, 30]]
    person, dog = torch.zeros(1, 30, 40, dtype=torch.bool), torch.zeros(1, 30, 40, dtype=torch.bool)
    person[:, 2:, :8], dog[:, 5:8, 22:] = True, True
    assert torch.equal(first.mask(14), person) and torch.equal(first.mask(11), dog)
    assert second.labels == (19,) and second.masks is None and second.mask().all()
    plain = load_dataset(f"voc{year}", default, tmp_path)[0]
    assert plain.masks is None and plain.mask(14).sum() == 10 * 29 + 4
    assert load_dataset(f"voc{year}", default, tmp_path, difficult=False)[0].labels == (14,)
    squashed = load_dataset(f"voc{year}", default, tmp_path, size=224)[0]
    assert squashed.image.shape == (3, 224, 224)
    assert torch.allclose(squashed.boxes[0], torch.tensor([0, 224 / 30, 56, 224]))
    found = check_dataset(f"voc{year}", root=tmp_path, counts=False, masks=True)
    assert {r["split"] for r in found} == set(DATASETS[f"voc{year}"].splits) and found[0]["with masks"] == 1


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("<name>dog</name>", "<name>unicorn</name>", "000001.xml: 'unicorn' is not one of"),
        ("</annotation>", "", "000001.xml cannot be read"),
        ("<xmax>10</xmax>", "", "000001.xml cannot be read.*xmax"),
        ("<xmax>10</xmax>", "<xmax>ten</xmax>", "000001.xml cannot be read.*ten"),
        ("<xmax>10</xmax>", "<xmax>0</xmax>", "000001.xml: the box 1 2 0 30 is empty"),
    ],
)
def test_voc_damage(tmp_path, old, new, match):
    file = write_voc(tmp_path / "VOCdevkit" / "VOC2007") / "Annotations" / "000001.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(DataError, match=match):
        load_dataset("voc2007", "test", tmp_path)


def test_voc_missing_files(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2007")
    Image.new("P", (4, 4)).save(folder / "SegmentationClass" / "000001.png")
    with pytest.raises(DataError, match=r"000001.png has \(4, 4\)"):
        load_dataset("voc2007", "test", tmp_path, masks=True)[0]
    cut(folder / "SegmentationClass" / "000001.png")
    with pytest.raises(DataError, match="000001.png cannot be read"):
        load_dataset("voc2007", "test", tmp_path, masks=True)[0]
    file = folder / "Annotations" / "000002.xml"
    file.write_text(VOC_ONE.replace("40", "48"))
    with pytest.raises(DataError, match="000002.jpg: a box"):
        check_dataset("voc2007", "test", tmp_path, counts=False)
    file.unlink()
    with pytest.raises(DataError, match="000002.xml is missing"):
        load_dataset("voc2007", "test", tmp_path)
    file.write_text(VOC_ONE)
    (folder / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(DataError, match="test.txt names JPEGImages/000002.jpg"):
        load_dataset("voc2007", "test", tmp_path)
    (folder / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test.txt"):
        load_dataset("voc2007", "test", tmp_path)


def test_voc_boxes_of_one_pixel_and_objects_without_a_mark(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2007")
    first, second = (folder / "Annotations" / f"00000{i}.xml" for i in (1, 2))
    first.write_text(VOC_XML.replace("<xmax>10</xmax>", "<xmax>1</xmax>").replace("dog", "chair").replace("person", "bicycle"))
    second.write_text(VOC_ONE.replace("<difficult>0</difficult>", ""))
    easy = load_dataset("voc2007", "test", tmp_path, difficult=False)
    assert easy[0].boxes[0].tolist() == [0, 1, 1, 30] and easy[0].labels == (1,) and easy[1].labels == (19,)
    assert load_dataset("voc2007", "test", tmp_path)[0].labels == (1, 8)


def test_voc_segmentation_without_an_object_that_is_kept(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2007")
    (folder / "Annotations" / "000001.xml").write_text(VOC_XML.replace("<difficult>0", "<difficult>1"))
    item = load_dataset("voc2007", "test", tmp_path, masks=True, difficult=False)[0]
    assert item.labels == item.box_labels == () and item.masks is None and item.boxes.shape == (0, 4)


@needs_coco
def test_coco(tmp_path, capsys):
    write_coco(tmp_path / "coco")
    scenes = load_dataset("coco2014", root=tmp_path)
    assert capsys.readouterr().out == ""  # pycocotools talks; we do not
    assert scenes.classes == ["person", "stop sign", "toothbrush"] and scenes.files[0].endswith("07.jpg")
    empty, full = scenes[0], scenes[1]
    assert empty.labels == () and empty.masks is None and len(empty.boxes) == 0
    assert full.labels == (0, 1) and full.box_labels == (1, 0, 1)
    assert full.boxes.tolist() == [[2.5, 3, 12.5, 8], [0, 0, 2, 20], [20, 10, 25, 15]]
    sign, people = torch.zeros(1, 20, 30, dtype=torch.bool), torch.zeros(1, 20, 30, dtype=torch.bool)
    sign[:, 3:8, 2:12], sign[:, 10:15, 20:25], people[:, :, :2] = True, True, True
    assert torch.equal(full.mask(1), sign) and torch.equal(full.mask(0), people)
    assert load_dataset("coco2014", "val", tmp_path, crowd=False)[1].labels == (1,)
    assert load_dataset("coco2014", "val", tmp_path, size=64)[1].masks.shape == (2, 1, 64, 64)
    assert check_dataset("coco2014", root=tmp_path, counts=False)[0]["with masks"] == 1


def change(key, index, **values):
    content = coco_content()
    content[key][index].update(values)
    return content


@needs_coco
@pytest.mark.parametrize(
    "content, match",
    [
        (change("annotations", 1, category_id=2), "annotation 2 has the category_id 2, which is not in the file"),
        (change("annotations", 0, image_id=43), "annotation 1 has the image_id 43"),
        (change("annotations", 2, bbox=None), "annotation 3 has no segmentation or no box"),
        (change("annotations", 2, bbox=[1, 2]), "annotation 3 has no segmentation or no box"),
        (
            change("images", 0, file_name="COCO_val2014_000000000043.jpg"),
            "names val2014/COCO_val2014_000000000043.jpg, which is missing",
        ),
        (
            {k: v for k, v in coco_content().items() if k != "categories"},
            "instances_val2014.json has no list of categories",
        ),
        ({"info": {}}, "instances_val2014.json"),
    ],
)
def test_coco_damage(tmp_path, content, match):
    write_coco(tmp_path / "coco", content)
    with pytest.raises(DataError, match=match):
        load_dataset("coco2014", root=tmp_path)


@needs_coco
def test_coco_broken_files(tmp_path):
    folder = write_coco(
        tmp_path / "coco", change("annotations", 1, segmentation={"size": [9, 9], "counts": [0, 40, 41]})
    )
    with pytest.raises(DataError, match="instances_val2014.json, annotation 2"):
        load_dataset("coco2014", root=tmp_path)[1]
    cut(folder / "annotations" / "instances_val2014.json")
    with pytest.raises(DataError, match="instances_val2014.json cannot be read"):
        load_dataset("coco2014", root=tmp_path)


def test_run_lengths_against_pixels():
    mask = np.random.default_rng(0).random((256, 1600)) > 0.99
    words, flat = [], np.append(mask.T.flatten(), False)
    for place in np.flatnonzero(flat & ~np.insert(flat[:-1], 0, False)):
        words += [place + 1, int(np.argmin(flat[place:]))]
    assert (decode_runs(" ".join(map(str, words))) == mask).all()


def test_severstal(tmp_path):
    val, train = steel_names()
    pixels = write_steel(tmp_path / "severstal")
    patches = load_dataset("severstal", "val", tmp_path)
    defect3, defect1 = np.zeros((256, 1600), bool), np.zeros((256, 1600), bool)
    defect3[:, 100:110], defect1[128:, 105:301] = True, True
    by_left = {int(item.name.split("@")[1]): item for item in patches}
    assert {left: item.label for left, item in by_left.items() if item.label} == {0: 1, 224: 1}
    assert sum(item.label == 0 for item in patches) == 1
    first = by_left[0]
    assert first.image.shape == (3, 256, 256)
    assert (first.masks[0, 0].numpy() == defect1[:, :256]).all() and (
        first.extra["defect 3"][0].numpy() == defect3[:, :256]
    ).all()
    assert by_left[224].extra == {} and by_left[224].mask().sum() == 128 * (301 - 224)
    stored = np.asarray(Image.open(tmp_path / "severstal" / "train_images" / val))
    assert ((by_left[224].image * 255).round().permute(1, 2, 0).numpy() == stored[:, 224:480]).all() and pixels[
        val
    ].shape == stored.shape
    assert len(load_dataset("severstal", "val", tmp_path, clean="all")) == 7
    defects = load_dataset("severstal", "val", tmp_path, clean="none")
    assert [item.name for item in defects] == [item.name for item in patches if item.label]
    assert len(defects) == 2 and len(patches) == 3 and defects.fingerprint != patches.fingerprint
    with pytest.raises(ValueError, match="'none', 'one' or 'all', got 'some'"):
        load_dataset("severstal", "val", tmp_path, clean="some")
    other = load_dataset("severstal", "train", tmp_path)
    assert [item.name.split("@")[0] for item in other] == [f"train_images/{train}"] and other[0].masks is None
    assert other.files == load_dataset("severstal", "train", tmp_path).files
    with pytest.raises(DataError, match="2 images where its authors state 12,568"):
        check_dataset("severstal", root=tmp_path)
    assert [r["images"] for r in check_dataset("severstal", root=tmp_path, counts=False)] == [1, 3]


@pytest.mark.parametrize(
    "row, match",
    [
        ((5, "1 3"), "line 2: '5' is no kind"),
        (("", "1 3"), "line 2: '' is no kind"),
        ((1, "1 3 4"), "no run lengths"),
        ((1, "0 3"), "no run lengths"),
        ((1, "3 0"), "no run lengths"),
        ((1, f"{256 * 1600} 2"), "no run lengths"),
        ((1, "one 2"), "line 2 cannot be read.*one"),
        ((1, ""), "no run lengths"),
    ],
)
def test_severstal_damage(tmp_path, row, match):
    write_steel(tmp_path / "severstal", [(steel_names()[0], *row)])
    with pytest.raises(DataError, match=f"train.csv.*{match}"):
        load_dataset("severstal", root=tmp_path)


def test_severstal_missing(tmp_path):
    write_steel(tmp_path / "severstal", [("gone.jpg", 1, "1 3")])
    with pytest.raises(DataError, match="gone.jpg is missing"):
        load_dataset("severstal", root=tmp_path)
    write_steel(tmp_path / "severstal", [(steel_names()[0], 1, "1 3")] * 2)
    with pytest.raises(DataError, match="line 3.*twice"):
        load_dataset("severstal", root=tmp_path)
    (tmp_path / "severstal" / "train.csv").write_text("ImageId_ClassId,EncodedPixels\na_1,1 3\n")
    with pytest.raises(DataError, match="train.csv has no column ImageId, ClassId"):
        load_dataset("severstal", root=tmp_path)
    (tmp_path / "severstal" / "train.csv").write_text("ImageId,ClassId,EncodedPixels\na.jpg,1\n")
    with pytest.raises(DataError, match="train.csv has too few fields in line 2"):
        load_dataset("severstal", root=tmp_path)
    write_steel(tmp_path / "severstal")
    picture(tmp_path / "severstal" / "train_images" / steel_names()[0], 100, 100)
    with pytest.raises(DataError, match=r"\(100, 100\) pixels, not \(256, 1600\)"):
        load_dataset("severstal", root=tmp_path)[0]


def test_patches_of_a_strip():
    "A patch of every 224 columns is 256 wide, so a defect where two of them overlap is in both"
    columns = " ".join(f"{column * 256 + 1} 256" for column in range(230, 250))
    assert cut_patches("a.jpg", {2: columns}, "none") == [(0, 2), (224, 2)]
    assert cut_patches("a.jpg", {2: columns}, "all") == [(0, 2), (224, 2), *((left, 0) for left in range(448, 1345, 224))]
    last = f"{1599 * 256 + 1} 256"
    assert cut_patches("a.jpg", {4: last, 1: f"{1500 * 256 + 1} 255"}, "none") == [(1344, 4)]


def test_the_clean_patch_is_any_of_those_that_are_free():
    columns = " ".join(f"{column * 256 + 1} 256" for column in range(230, 250))
    names = [name for name in map("{}.jpg".format, range(400)) if zlib.crc32(name.encode()) % 5 == 0]  # as in the validation split
    kept = [left for name in names for left, label in cut_patches(name, {2: columns}) if not label]
    assert len(kept) == len(names) and set(kept) == {448, 672, 896, 1120, 1344}


def test_the_order_of_the_strips_is_that_of_their_names(tmp_path, monkeypatch):
    write_steel(tmp_path / "severstal")
    names = sorted([steel_names()[0], *(n for n in (f"{i:08x}.jpg" for i in range(50)) if zlib.crc32(n.encode()) % 5 == 0)][:4])
    for name in names:
        picture(tmp_path / "severstal" / "train_images" / name, 256, 1600)
    found = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: sorted(found(self, pattern), reverse=True))
    files = [file.split("/")[1].split("@")[0] for file in load_dataset("severstal", "val", tmp_path).files]
    assert files == sorted(files) and set(files) == set(names)


def test_elpv(tmp_path):
    write_elpv(tmp_path / "elpv")
    train, val = (load_dataset("elpv", split, tmp_path) for split in ("train", "val"))
    assert len(train) == 24 and len(val) == 8 and not set(train.files) & set(val.files)
    for part, each in ((train, 3), (val, 1)):
        strata = list(zip(part.probability, part.kinds, strict=True))
        assert {strata.count(s) for s in strata} == {each}
        assert [item.label for item in part] == [int(p > 0.5) for p in part.probability]
    item = val[0]
    assert item.image.shape == (3, 30, 30) and torch.equal(item.image[0], item.image[2]) and item.boxes is None
    strict = load_dataset("elpv", "val", tmp_path, threshold=1.0)
    assert strict.files == val.files and [t[0] for t in strict.targets] == [int(p == 1) for p in val.probability]
    assert strict.fingerprint != val.fingerprint


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("images/cell0003.png", "images/cell9.png", "line 4: images/cell9.png is missing"),
        ("1.0  mono", "1.5  mono", "line 4: 1.5 mono"),
        ("1.0  mono", "1.0  glass", "line 4: 1.0 glass"),
        ("1.0  mono", "1.0", "line 4 cannot be read"),
        ("1.0  mono", "one  mono", "line 4 cannot be read.*one"),
    ],
)
def test_elpv_damage(tmp_path, old, new, match):
    table = write_elpv(tmp_path / "elpv") / "labels.csv"
    lines = table.read_text().splitlines(True)
    table.write_text("".join([*lines[:3], lines[3].replace(old, new), *lines[4:]]))
    with pytest.raises(DataError, match=f"labels.csv, {match}"):
        load_dataset("elpv", root=tmp_path)


def test_elpv_package():
    "The real package: the counts, and the labels of its own reader"
    utils = pytest.importorskip("elpv_dataset.utils", reason="elpv-dataset is not installed (extra elpv)")
    parts = [load_dataset("elpv", split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [1970, 654]
    found = {
        file: (p, kind)
        for part in parts
        for file, p, kind in zip(part.files, part.probability, part.kinds, strict=True)
    }
    pixels, probability, kinds = utils.load_dataset()
    assert len(found) == len(pixels) == 2624
    assert [found[file][0] for file in sorted(found)] == pytest.approx(list(probability), abs=1e-6)
    assert [found[file][1] for file in sorted(found)] == [str(kind) for kind in kinds]
    item = parts[1][5]
    assert ((item.image[0] * 255).round().numpy() == pixels[sorted(found).index(item.name)]).all()


def test_too_few_cells_for_a_part(tmp_path):
    table = write_elpv(tmp_path / "elpv") / "labels.csv"
    table.write_text(table.read_text().splitlines(True)[0])
    with pytest.raises(DataError, match=r"labels.csv has too few rows \(1\) for the split 'val'"):
        load_dataset("elpv", "val", tmp_path)


def test_imagefolder(tmp_path):
    for name in ("b/2.png", "a/1.jpg", "a/deep/3.PNG", ".cache/4.png", "a/._1.jpg"):
        picture(tmp_path / name, 10, 12)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    data = load_dataset("imagefolder", root=tmp_path)
    assert data.classes == ["a", "b"] and data.split == "all" and data.targets == [(0,), (0,), (1,)]
    assert data.files == ["a/1.jpg", "a/deep/3.PNG", "b/2.png"] and [p.name for p in data.ignored] == ["notes.txt"]
    from torchvision.datasets import ImageFolder

    shutil.rmtree(tmp_path / ".cache")
    (tmp_path / "a" / "._1.jpg").unlink()
    assert [(str(tmp_path / f), t) for f, (t,) in zip(data.files, data.targets, strict=True)] == ImageFolder(
        tmp_path
    ).samples
    for part in ("train", "val"):
        shutil.copytree(tmp_path / "a", tmp_path / "both" / part / "cat")
    assert load_dataset("imagefolder", root=tmp_path / "both").split == "val"
    assert load_dataset("imagefolder", "val", tmp_path).split == "all"
    assert load_dataset("imagefolder", "train", tmp_path / "both").files[0] == "train/cat/1.jpg"
    assert [found["split"] for found in check_dataset("imagefolder", root=tmp_path / "both")] == ["val", "train"]
    assert [found["split"] for found in check_dataset("imagefolder", "train", tmp_path / "both")] == ["train"]
    assert check_dataset("imagefolder", root=tmp_path / "both")[0]["images"] == 2


def test_imagefolder_damage(tmp_path, capsys):
    with pytest.raises(ValueError, match="give your folder as root"):
        load_dataset("imagefolder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset("imagefolder", root=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder of class folders"):
        load_dataset("imagefolder", root=tmp_path)
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="classes b.*these are none: notes.txt"):
        load_dataset("imagefolder", root=tmp_path)
    (tmp_path / "b" / "fake.jpg").write_text("no image")
    data = load_dataset("imagefolder", root=tmp_path)
    with pytest.raises(DataError, match="fake.jpg.*`xai-companion data check imagefolder --root .*` names all such files") as error:
        data[1]
    words = shlex.split(re.search("`xai-companion (.*)`", str(error.value))[1])
    for i in range(7):
        shutil.copy(tmp_path / "b" / "fake.jpg", tmp_path / "b" / f"fake-{i}.jpg")
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "8 of 9 images are wrong:" in said and said.count("cannot be read as an image") == 8 and "xai-companion data" not in said
    shutil.copytree(tmp_path / "b", tmp_path / "parts" / "train" / "b")
    with pytest.raises(DataError, match="parts` names all such files"):
        load_dataset("imagefolder", "train", root=tmp_path / "parts")[0]
    with pytest.raises(FileNotFoundError, match="train"):
        load_dataset("imagefolder", "train", root=tmp_path)


def test_imagenet_samples(tmp_path):
    folder, head = tmp_path / "imagenet-samples", "file,wnid,class_index,name\n"
    picture(folder / "x.jpg")
    picture(folder / "y.jpg")
    (folder / "labels.csv").write_text(head + 'x.jpg,n01440764,0,"tench"\ny.jpg,n02123045,281,tabby\n')
    for root in (tmp_path, folder):
        data = load_dataset("imagenet_samples", root=root)
        assert data.targets == [(0,), (281,)] and data.classes[281] == "tabby" and len(data.classes) == 1000
    assert load_dataset("imagenet_samples", "val", tmp_path).split == "all"
    assert check_dataset("imagenet_samples", root=tmp_path)[0]["opened"] == 2
    for rows, match in (
        ("x.jpg,n01440764,1,tench\n", "line 2: class 1 of ImageNet is not n01440764"),
        ("x.jpg,n01440764,1000,tench\n", "line 2: class 1000"),
        ("x.jpg,n01440764,zero,tench\n", "line 2 cannot be read"),
        ("x.jpg,n01440764\n", "too few fields in line 2"),
        ("z.jpg,n01440764,0,tench\n", "line 2: z.jpg is missing"),
        ("x.jpg,n01440764,0,tench\n" * 2, "line 3: x.jpg is there twice"),
        ("", "has no rows"),
        ('"x.jpg,n01440764,0,tench\n', "cannot be read"),
    ):
        (folder / "labels.csv").write_text(head + rows)
        with pytest.raises(DataError, match=f"labels.csv.*{match}"):
            load_dataset("imagenet_samples", root=tmp_path)
    (folder / "labels.csv").write_text("file,wnid\nx.jpg,n01440764\n")
    with pytest.raises(DataError, match="no column class_index, name"):
        load_dataset("imagenet_samples", root=tmp_path)
    (folder / "labels.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="labels.csv cannot be read"):
        load_dataset("imagenet_samples", root=tmp_path)


def test_synthetic():
    assert len(load_dataset("synthetic")) > 0 and load_dataset("synthetic", "test", n=3, size=32)[2].image.shape == (
        3,
        32,
        32,
    )
    assert check_dataset("synthetic", "val", n=5)[0]["with boxes"] == 5


def test_drawn_images_have_nothing_to_crop():
    assert splits_here("synthetic") == ["train", "val", "test"]
    with pytest.raises(ValueError, match="nothing to crop"):
        load_dataset("synthetic", size=32, crop=True)


def test_the_part_that_is_for_evaluation():
    assert load_dataset("synthetic").fingerprint == load_dataset("synthetic", "val").fingerprint != load_dataset("synthetic", "train").fingerprint


# ---- what all share ----------------------------------------------------------------------------------------------
def test_index_and_fingerprint(tmp_path):
    folder = write_tiny(tmp_path / "tiny-imagenet-200")
    data = load_dataset("tiny_imagenet", root=tmp_path)
    assert data[-1].name == data[2].name == data[torch.tensor(2)].name and len(list(data)) == 3
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"no item {wrong}"):
            data[wrong]
    with pytest.raises(TypeError):
        data[1.0]
    elsewhere = tmp_path / "moved"
    shutil.copytree(folder, elsewhere / folder.name)
    same = load_dataset("tiny_imagenet", root=elsewhere)
    assert data.fingerprint == same.fingerprint and data.fingerprint.startswith("tiny_imagenet val 3 ")
    picture(elsewhere / folder.name / "val" / "images" / "val_0.JPEG", 60, 64)
    assert load_dataset("tiny_imagenet", root=elsewhere).fingerprint != data.fingerprint
    file = folder / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace("n07920052", "n01443537"))
    assert load_dataset("tiny_imagenet", root=tmp_path).fingerprint != data.fingerprint


def test_the_fingerprint_says_the_size(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    plain = load_dataset("tiny_imagenet", root=tmp_path).fingerprint
    assert len(plain.split()) == 4  # name, split, number, checksum
    assert load_dataset("tiny_imagenet", root=tmp_path, size=32).fingerprint == plain + " squashed to 32"
    assert load_dataset("tiny_imagenet", root=tmp_path, size=32, crop=True).fingerprint == plain + " cropped to 32"


def test_the_fingerprint_covers_the_labels(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    before = load_dataset("cifar10", root=tmp_path, verify=False)
    stored = pickle.loads((folder / "test_batch").read_bytes())
    (folder / "test_batch").write_bytes(pickle.dumps(stored | {"labels": [1, 1, 2, 2]}))
    after = load_dataset("cifar10", root=tmp_path, verify=False)
    assert torch.equal(before.pixels, after.pixels) and before.targets != after.targets and before.fingerprint != after.fingerprint


def repainted(file, box):
    "Paint a box of a stored picture black"
    with Image.open(file) as image:
        image.paste(0, box)
        image.save(file)


def test_voc_fingerprint_covers_masks(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2007")
    boxes, masks = (load_dataset("voc2007", root=tmp_path, masks=m).fingerprint for m in (False, True))
    repainted(folder / "SegmentationClass" / "000001.png", (0, 0, 2, 30))
    again = [load_dataset("voc2007", root=tmp_path, masks=m).fingerprint for m in (False, True)]
    assert again[0] == boxes and len({boxes, masks, again[1]}) == 3


@needs_coco
def test_coco_fingerprint_covers_boxes_outlines_and_crowds(tmp_path):
    made = []
    for values, crowd in (({}, True), ({}, False), ({"bbox": [1, 1, 2, 2]}, True), ({"segmentation": [[0, 0, 9, 0, 9, 9]]}, True)):
        content = change("annotations", 1, category_id=13)  # no class is a crowd only
        content["annotations"][0].update(values)
        write_coco(tmp_path / "coco", content)
        made.append(load_dataset("coco2014", root=tmp_path, crowd=crowd))
    assert all(one.targets == made[0].targets for one in made) and len({one.fingerprint for one in made}) == 4


def test_severstal_fingerprint_covers_runs(tmp_path):
    rows = [(steel_names()[0], 3, f"{100 * 256 + 1} {length}") for length in (2560, 2561)]
    made = []
    for row in rows:
        write_steel(tmp_path / "severstal", [row])
        made.append(load_dataset("severstal", root=tmp_path))
    assert made[0].targets == made[1].targets and made[0].fingerprint != made[1].fingerprint


def test_loader_workers(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    data = load_dataset("tiny_imagenet", root=tmp_path, size=32)
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, collate_fn=list)
    assert [item.name for batch in loader for item in batch] == data.files


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match="no data set 'imagenet': did you mean 'tiny_imagenet' or 'imagenet_samples'"):
        load_dataset("imagenet")
    with pytest.raises(TypeError, match="cifar10 has no option masks; it has verify"):
        load_dataset("cifar10", root=tmp_path, masks=True)
    for name in ("cifar10", "severstal", "coco2014"):
        with pytest.raises(FileNotFoundError, match=f"{name} is not here.*To get it"):
            load_dataset(name, root=tmp_path)
        with pytest.raises(FileNotFoundError, match=f"{name} is not here"):
            check_dataset(name, root=tmp_path)


def test_missing_package(tmp_path, monkeypatch):
    from xai_companion.data import inspection, readers

    for module in (inspection, readers):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    write_coco(tmp_path / "coco")
    with pytest.raises(ImportError, match=r"pip install .xai_companion\[coco\]"):
        load_dataset("coco2014", root=tmp_path)
    with pytest.raises(ImportError, match=r"pip install .xai_companion\[elpv\]"):
        load_dataset("elpv", root=tmp_path)
    with pytest.raises(ImportError, match="pycocotools"):  # before gigabytes are fetched
        get_dataset("coco2014", root=tmp_path / "new")
    status = dataset_status(tmp_path).status
    assert status["coco2014"] == status["elpv"] == "needs package"


class One(ImageSet):
    name, split, classes = "one", "val", ["a", "b"]

    def __init__(self, **values):
        self.item = Item(**dict(name="x.png", image=torch.zeros(3, 8, 8), labels=(1,)) | values)


@pytest.mark.parametrize(
    "values, match",
    [
        (dict(labels=(2,)), "not different ones of 2"),
        (dict(labels=(1, 1)), "not different ones of 2"),
        (dict(labels=(0, 1)), "one label is expected"),
        (dict(labels=()), "one label is expected"),
        (dict(image=torch.zeros(1, 8, 8)), r"this one is \(1, 8, 8\)"),
        (dict(image=torch.full((3, 8, 8), 2.0)), "an image is"),
        (dict(image=torch.full((3, 8, 8), torch.nan)), "an image is"),
        (dict(boxes=torch.tensor([[0.0, 0, 10, 8]]), box_labels=(1,)), "is not in the image of 8 x 8"),
        (dict(boxes=torch.tensor([[4.0, 0, 3, 8]]), box_labels=(1,)), "is not in the image"),
        (dict(boxes=torch.tensor([[4.0, 0, 6, 8]]), box_labels=(0,)), "1 boxes of the classes"),
        (dict(masks=torch.zeros(1, 1, 4, 4, dtype=torch.bool)), "a mask is"),
        (dict(masks=torch.zeros(2, 1, 8, 8, dtype=torch.bool)), "2 masks for 1 labels"),
        (dict(extra={"part": torch.zeros(1, 8, 8)}), "a mask is torch.float32"),
    ],
)
def test_check_item(values, match):
    check_item(One().item, One())
    data = One(**values)
    with pytest.raises(DataError, match=f"one val, x.png: .*{match}"):
        check_item(data.item, data)


class Numbered(ImageSet):
    "So many black images without objects, and which of them were opened"
    name, split, classes = "numbered", "all", ["a"]

    def __init__(self, count):
        self.count, self.opened = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.opened.append(index)
        return Item(str(index), torch.zeros(3, 2, 2), (0,), torch.zeros(0, 4))


@pytest.mark.parametrize("count, step", [(200, 1), (201, 2), (999, 5)])
def test_a_fast_check_opens_at_most_200_images(monkeypatch, count, step):
    data = Numbered(count)
    monkeypatch.setattr("xai_companion.data.datasets.load_dataset", lambda *arguments, **options: data)
    [found] = check_dataset("synthetic", fast=True)
    assert data.opened == list(range(0, count, step)) and found["opened"] == len(data.opened) <= 200
    assert found["images"] == count and found["with boxes"] == found["with masks"] == 0
    assert check_set(data)["opened"] == count


def test_a_box_with_swapped_corners_is_refused():
    "A box x, y, width, height would silently be no pixel, or another place"
    assert box_mask(torch.tensor([[1.0, 1, 3, 2]]), (4, 4)).sum() == 2 and not box_mask(torch.tensor([[2.0, 2, 2, 2]]), (4, 4)).any()
    for box in ([5.0, 1, 3, 2], [1.0, 5, 3, 2]):
        with pytest.raises(ValueError, match=r"box 1 is .*of x, y, width, height give"):
            box_mask(torch.tensor([[0.0, 0, 1, 1], box]), (8, 8))


@pytest.mark.parametrize("box, fits", [
    ([-1, -1, 13, 9], True), ([-1.1, 0, 5, 5], False), ([0, -1.1, 5, 5], False), ([0, 0, 13.1, 5], False), ([0, 0, 5, 9.1], False),
    ([2, 3, 2, 5], True), ([3, 3, 2, 5], False), ([2, 5, 3, 3], False)])
def test_a_box_may_stand_out_by_a_pixel(box, fits):
    assert boxes_fit(torch.tensor([[1.0, 1, 2, 2], box]), 8, 12) is fits


def test_a_pixel_belongs_to_the_box_that_has_its_centre():
    mask = box_mask([[1.5, 0, 3.5, 1.5], [4.4, 2.5, 4.6, 2.6]], (3, 6))  # centres lie at 0.5, 1.5, ...
    assert mask.shape == (1, 3, 6) and mask[0].nonzero().tolist() == [[0, 1], [0, 2], [2, 4]]


def test_a_mask_is_asked_for_a_class_that_is_there():
    item = Item("a.png", torch.zeros(3, 4, 4), (0, 2), torch.tensor([[0.0, 0, 2, 2]]), (2,))
    assert item.mask(2).sum() == 4 and item.mask(0) is None
    with pytest.raises(ValueError, match=r"a.png has the classes \[0, 2\], not 1"):
        item.mask(1)


def test_boxes_and_masks_of_a_crop():
    "56 x 28 pixels at 12: 8/7 of it is 14, so half the size, without 1 row above and 8 columns on the left"
    boxes = [[24, 8, 32, 12], [0, 0, 16, 28], [24, 0, 32, 2], [10, 8, 20, 12]]  # inside; just cut off, twice; cut in two
    mask = torch.zeros(1, 28, 56, dtype=torch.bool)
    mask[:, 8:12, 24:32] = True
    item = Item("a", mask.float().expand(3, -1, -1), (3, 4), torch.tensor(boxes).float(), (3, 4, 4, 4), mask[None].repeat(2, 1, 1, 1), {"part": mask})
    small, expected = resized(item, 12, crop=True), torch.zeros(1, 12, 12, dtype=torch.bool)
    expected[:, 3:5, 4:8] = True
    assert small.boxes.tolist() == [[4, 3, 8, 5], [0, 3, 2, 5]] and small.box_labels == (3, 4)
    assert torch.equal(small.masks, expected[None].repeat(2, 1, 1, 1)) and torch.equal(small.extra["part"], expected)
    assert small.image.shape == (3, 12, 12) and torch.equal(small.image[:1] > 0.5, expected)


def test_a_pixel_of_a_small_mask_is_the_one_below_its_centre():
    mask = torch.zeros(1, 12, 9, dtype=torch.bool)
    mask[:, 1::4, 1::3] = mask[:, 2::4, 1::3] = True
    assert resized(Item("a", torch.zeros(3, 12, 9), (0,), masks=mask[None]), 3).masks.all()


@pytest.mark.parametrize("height, width", [(427, 640), (640, 427), (375, 500), (300, 300), (256, 341)])
def test_a_photograph_and_an_item_are_cropped_alike(tmp_path, height, width):
    "As torchvision does it: the short side to 256, the long one in proportion and cut down to whole pixels, then the centre"
    as_picture(torch.rand(3, height, width)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", size=None)
    assert torch.equal(load_image(tmp_path / "a.png", 224), resized(Item("a", image, ()), 224, crop=True).image)


def test_stratified():
    strata = [(i % 4, i % 3) for i in range(2400)]
    part = stratified(strata, 0.25)
    assert len(part) == 600 and {sum(strata[i] == s for i in part) for s in set(strata)} == {50}
    assert part == stratified(strata, 0.25) and part != stratified(strata, 0.25, seed=1)


WRITERS = {
    "tiny_imagenet": write_tiny,
    "voc2007": write_voc,
    "severstal": write_steel,
    "elpv": write_elpv,
    "coco2014": write_coco,
}  # not the binary ones: a checksum guards those, and scipy crashes on a damaged file


@pytest.mark.parametrize("name", [*list(WRITERS)[:-1], pytest.param("coco2014", marks=needs_coco)])
def test_random_damage_is_an_error_or_a_set(tmp_path, name):
    "Bytes of the annotations are changed or cut off: what comes out is a whole set, or an error that names a file"
    folder = tmp_path / (DATASETS[name].folder or name)
    WRITERS[name](folder)
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in (".txt", ".xml", ".json", ".csv")]
    generator, refused = np.random.default_rng(1), 0
    for _ in range(40):
        file = files[generator.integers(len(files))]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        file.write_bytes(damaged[: generator.integers(1, len(whole) + 1)] if generator.random() < 0.3 else damaged)
        try:
            check_dataset(name, root=tmp_path, counts=False)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(tmp_path) in str(error) or name in str(error)
        file.write_bytes(whole)
    assert refused > 3
    assert check_dataset(name, root=tmp_path, counts=False)


# ---- status, download, command -----------------------------------------------------------------------------------
def test_status(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    write_svhn(tmp_path / "svhn")
    (tmp_path / "cifar-10-batches-py").mkdir()
    status = dataset_status(tmp_path)
    assert list(status.index) == list(DATASETS)
    assert status.status["tiny_imagenet"] == "present" and status.splits["tiny_imagenet"] == "train, val"
    assert (
        status.splits["svhn"] == "test"
        and status.status["cifar10"] == "damaged"
        and status.status["voc2007"] == "missing"
    )
    assert status.status["synthetic"] == "present" and "Kaggle" in status["how to get it"]["severstal"]
    assert splits_here("svhn", tmp_path) == ["test"]


def pack(folder, archive, root):
    "A tar.gz or zip of a folder, with paths below `root`"
    if archive.suffix == ".zip":
        shutil.make_archive(archive.with_suffix(""), "zip", root, folder)
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
            tar.add(root / folder, folder)


@pytest.fixture
def server(tmp_path):
    "Tiny archives of the true format, served on this computer"
    site, made = tmp_path / "site", tmp_path / "made"
    site.mkdir()
    write_cifar(made / "cifar-10-batches-py")
    pack("cifar-10-batches-py", site / "cifar-10-python.tar.gz", made)
    write_tiny(made / "tiny-imagenet-200")
    pack("tiny-imagenet-200", site / "tiny-imagenet-200.zip", made)
    write_svhn(site / "svhn")
    shutil.move(site / "svhn" / "test_32x32.mat", site)
    write_voc(made / "VOCdevkit" / "VOC2007")
    for archive in ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"):
        pack("VOCdevkit", site / archive, made)
    write_coco(made / "coco")
    pack("val2014", site / "val2014.zip", made / "coco")
    pack("annotations", site / "annotations_trainval2014.zip", made / "coco")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site)))
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield site, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(
    "name, count",
    [("cifar10", 4), ("tiny_imagenet", 3), ("svhn", 5), ("voc2007", 2), pytest.param("coco2014", 2, marks=needs_coco)],
)
def test_get(server, tmp_path, name, count):
    root, (_, address) = tmp_path / "root", server
    folder = get_dataset(name, root=root, mirror=address, verify=False)
    assert folder == root / DATASETS[name].folder
    options = {"verify": False} if name in ("cifar10", "svhn") else {}
    data = load_dataset(name, root=root, **options)
    assert len(data) == count and not [p for p in root.iterdir() if p.name.startswith(".")]
    before = sorted(root.rglob("*"))
    assert (
        get_dataset(name, root=root, mirror="http://127.0.0.1:9/nothing") == folder
    )  # it is there: nothing is fetched
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "name, match",
    [
        ("cifar10", "cifar-10-python.tar.gz.*MD5"),
        ("tiny_imagenet", "authors state 100,000|authors state 10,000"),
        ("voc2007", "VOCtrainval_06-Nov-2007.tar.*MD5"),
    ],
)
def test_get_verifies(server, tmp_path, name, match):
    with pytest.raises(DataError, match=match):
        get_dataset(name, root=tmp_path / "root", mirror=server[1])
    assert list((tmp_path / "root").iterdir()) == []


def test_get_leaves_nothing_half_done(server, tmp_path):
    site, address = server
    root = tmp_path / "root"

    def refused(error, match, name="tiny_imagenet"):
        with pytest.raises(error, match=match):
            get_dataset(name, root=root, mirror=address, verify=False)
        assert not root.exists() or list(root.iterdir()) == []

    cut(site / "tiny-imagenet-200.zip")
    refused(DataError, "tiny-imagenet-200.zip cannot be read")
    (site / "tiny-imagenet-200.zip").unlink()
    refused(RuntimeError, "tiny-imagenet-200.zip could not be fetched.*404")
    folder = write_tiny(tmp_path / "again" / "tiny-imagenet-200")
    cut(folder / "val" / "images" / "val_1.JPEG")
    pack("tiny-imagenet-200", site / "tiny-imagenet-200.zip", tmp_path / "again")
    refused(DataError, "val_1.JPEG")
    pack("val2014", site / "tiny-imagenet-200.zip", tmp_path / "made" / "coco")  # another archive under that name
    refused(FileNotFoundError, "missing")
    if find_spec("pycocotools"):
        (site / "val2014.zip").unlink()
        refused(RuntimeError, "val2014.zip could not be fetched", "coco2014")
    (root / "tiny-imagenet-200").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="tiny-imagenet-200 is there, but .* not complete: remove or rename"):
        get_dataset("tiny_imagenet", root=root, mirror=address)


@pytest.mark.parametrize(
    "name, match",
    [
        ("severstal", "Kaggle account"),
        ("elpv", "pip install"),
        ("imagefolder", "your folder"),
        ("imagenet_samples", "labels.csv"),
        ("synthetic", "nothing to get"),
    ],
)
def test_what_cannot_be_downloaded(tmp_path, name, match):
    with pytest.raises(RuntimeError, match=match):
        get_dataset(name, root=tmp_path)


def test_every_address_has_a_checksum_where_torchvision_knows_one():
    for name in ("cifar10", "cifar100", "svhn", "voc2007", "voc2012"):
        for url, md5 in DATASETS[name].urls(DATASETS[name].reader.default):
            assert url.startswith("http") and len(md5) == 32


def test_the_authors_counts():
    "As they state them"
    stated = {"cifar10": {"train": 50_000, "test": 10_000}, "cifar100": {"train": 50_000, "test": 10_000},
              "svhn": {"train": 73_257, "test": 26_032, "extra": 531_131}, "tiny_imagenet": {"train": 100_000, "val": 10_000},
              "voc2007": {"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952},
              "voc2012": {"train": 5_717, "val": 5_823, "trainval": 11_540}, "coco2014": {"train": 82_783, "val": 40_504}}
    assert {name: DATASETS[name].splits for name in stated} == stated


def test_command(server, tmp_path, capsys):
    root = str(tmp_path / "root")
    assert command("data", "get", "tiny_imagenet", "--root", root, "--mirror", server[1], "--subset") == 0
    assert "tiny_imagenet is in" in capsys.readouterr().out
    assert command("data", "list", "--root", root) == 0
    listed = capsys.readouterr().out
    assert "tiny_imagenet    present        train, val" in listed and "Kaggle" in listed and root in listed
    assert command("data", "check", "tiny_imagenet", "--root", root, "--subset", "--fast") == 0
    assert "tiny_imagenet val: 3 images, 3 opened, 3 classes, 3 with boxes" in capsys.readouterr().out
    with pytest.raises(DataError):
        command("--debug", "data", "check", "tiny_imagenet", "--root", root)


def test_what_the_command_passes_on(monkeypatch, tmp_path):
    asked = []
    for name in ("check_dataset", "get_dataset"):
        monkeypatch.setattr(f"xai_companion.data.datasets.{name}", lambda *arguments, **options: asked.append((*arguments, options)) or [])
    command("data", "check", "cifar10", "--root", str(tmp_path), "--split", "test", "--fast")
    command("data", "check", "cifar10", "--subset")
    command("data", "get", "svhn", "--root", str(tmp_path), "--split", "extra", "--mirror", "file:///a")
    command("data", "get", "svhn", "--subset")
    assert asked == [("cifar10", "test", str(tmp_path), {"counts": True, "fast": True}), ("cifar10", None, None, {"counts": False, "fast": False}),
                     ("svhn", "extra", str(tmp_path), {"mirror": "file:///a", "verify": True}),
                     ("svhn", None, None, {"mirror": None, "verify": False})]


# ---- the real sets -----------------------------------------------------------------------------------------------
REAL = settings().data


def real(name, split):
    folder = REAL / DATASETS[name].folder
    if not folder.is_dir():
        pytest.skip(f"{name} is not in the data root ({REAL}); the tests do not need it")
    return load_dataset(name, split)


def test_real_tiny_imagenet():
    for split, count in (("train", 100_000), ("val", 10_000)):
        data = real("tiny_imagenet", split)
        assert len(data) == len(data.boxes) == count and len(data.classes) == 200
        assert (
            (data.boxes[:, :2] >= 0).all()
            and (data.boxes[:, 2:] <= 64).all()
            and (data.boxes[:, :2] < data.boxes[:, 2:]).all()
        )
        assert torch.bincount(torch.tensor(data.targets).flatten()).tolist() == [count // 200] * 200
    assert data.imagenet_indices.unique().numel() == 200
    check_set(data, fast=True)


def test_real_imagenet_samples():
    data = real("imagenet_samples", "all")
    assert len(data) == 700 and len({label for (label,) in data.targets}) == 700
    check_set(data, fast=True)
