"""Data sets in their true formats, small: what the readers, the testbeds, the commands and the pages are tried on."""

import csv
import json
import pickle
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from xai_companion.data.readers import imagenet_wnids

needs_coco = pytest.mark.skipif(find_spec("pycocotools") is None, reason="pycocotools is not installed (extra coco)")
needs_shift = pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="imagecorruptions is not installed (extra shift)")
COLOURS = np.random.default_rng(1).integers(40, 216, (10, 3))


def picture(file, height=64, width=64):
    "Save a picture of noise that is drawn by its name, and return its pixels"
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(file.name.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def coloured(labels, seed):
    "Noise around the colour of each label, (N, 32, 32, 3)"
    noise = np.random.default_rng(seed).integers(-40, 40, (len(labels), 32, 32, 3))
    return (COLOURS[labels][:, None, None] + noise).astype(np.uint8)


def write_cifar(folder, key="labels", classes=("cat", "dog", "eel"), count=4):
    "So many images in each file, of each class equally often; gives their rows"
    folder.mkdir(parents=True)
    batches, meta, names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "batches.meta", "label_names"
    if key == "fine_labels":
        batches, meta, names = ["train", "test"], "meta", "fine_label_names"
    labels, written = np.arange(count) % len(classes), {}
    for number, batch in enumerate(batches):
        written[batch] = coloured(labels, number).transpose(0, 3, 1, 2).reshape(count, -1)
        (folder / batch).write_bytes(pickle.dumps({"data": written[batch], key: labels.tolist()}))
    (folder / meta).write_bytes(pickle.dumps({names: list(classes)}))
    return written


def write_cifar_c(folder, name="fog", n=4, labels=None):
    "Five severities of n images; the first pixel of each tells its row"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(5 * n)
    np.save(folder / f"{name}.npy", pixels)
    np.save(folder / "labels.npy", np.tile(np.arange(n), 5).astype(np.uint8) if labels is None else labels)
    return pixels


def write_svhn(folder, test=(1, 0, 9, 5, 0), **more):
    "An image for each digit of each split, where 0 is stored as 10; gives the pixels of the test split, (32, 32, 3, N)"
    from scipy.io import savemat

    folder.mkdir(parents=True)
    for split, digits in {**more, "test": test}.items():
        digits = np.array(digits)
        pixels = coloured(digits, len(digits)).transpose(1, 2, 3, 0)
        savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
    return pixels


WNIDS = ["n02123045", "n01443537", "n07920052"]  # not sorted, as in the official file
WORDS = {"n02123045": "tabby, tabby cat", "n01443537": "goldfish, Carassius auratus", "n07920052": "espresso"}


def tabbed(rows):
    return "\n".join(rows).replace(" ", "\t") + "\n"


def write_tiny(folder, wnids=WNIDS, train=("0 0 63 63", "10 20 10 30"), val=((2, "0 32 44 62"), (1, "52 55 57 59"), (0, "0 0 63 63"))):
    "For each class a training image with each box, and validation images: class and box; they are called as in the official set"
    for wnid in wnids:
        for i in range(len(train)):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        rows = [f"{wnid}_{i}.JPEG {box}" for i, box in enumerate(train)]
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(tabbed(rows))
    rows = [f"val_{i}.JPEG {wnids[label]} {box}" for i, (label, box) in enumerate(val)]
    for i in range(len(val)):
        picture(folder / "val" / "images" / f"val_{i}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text(tabbed(rows))
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    words = [f"{wnid}\t{WORDS.get(wnid, f'thing {wnid}')}\n" for wnid in wnids]
    (folder / "words.txt").write_text("".join(["n00001740\tentity\n", *words]))
    return folder


def write_six_of_tiny(folder):
    "Six classes, eight training and two validation images each"
    return write_tiny(folder, imagenet_wnids()[:6], [f"8 8 55 {40 + i}" for i in range(8)], [(i % 6, "10 12 50 40") for i in range(12)])


def write_samples(folder):
    "Eight photographs of ImageNet's classes, as far as a reader can tell"
    names = imagenet_wnids()
    lines = ["file,wnid,class_index,name"]
    for i, wnid in enumerate(list(names)[:8]):
        picture(folder / "images" / f"{i}.jpg", 90, 80)
        lines.append(f"images/{i}.jpg,{wnid},{i},thing {i}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


VOC_XML = """<annotation>
  <folder>VOC2007</folder><filename>000001.jpg</filename>
  <source><database>The VOC2007 Database</database></source>
  <size><width>40</width><height>30</height><depth>3</depth></size><segmented>1</segmented>
  <object><name>person</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>30</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></part></object>
  <object><name>dog</name><difficult>1</difficult>
    <bndbox><ymin>5</ymin><xmin>21.5</xmin><ymax>8</ymax><xmax>40</xmax></bndbox></object>
  <object><name>person</name><difficult>0</difficult>
    <bndbox><xmin>39</xmin><ymin>29</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>
</annotation>"""
VOC_ONE = (
    "<annotation><object><name>tvmonitor</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"
)


def write_voc(folder, count=2):
    "Images with the two annotations in turn; the first has a segmentation: a person left, a dog right, void between"
    names = [f"{i:06}" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        picture(folder / "JPEGImages" / f"{name}.jpg", 30, 40)
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text((VOC_XML, VOC_ONE)[i % 2])
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split in ("train", "val", "trainval", "test"):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    numbers = np.zeros((30, 40), dtype=np.uint8)
    numbers[2:, :8], numbers[2:, 8:10], numbers[5:8, 22:] = 15, 255, 12
    (folder / "SegmentationClass").mkdir()
    palette = Image.fromarray(numbers).convert("P")
    palette.putpalette([i // 3 for i in range(768)])
    palette.save(folder / "SegmentationClass" / "000001.png")
    return folder


def coco_content(more=0):
    "Two images, the first with three objects, and so many more like the first"
    images = [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 20, "width": 30},
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg", "height": 20, "width": 30},
    ]
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]
    annotations = [
        {
            "id": 1,
            "image_id": 42,
            "category_id": 13,
            "iscrowd": 0,
            "bbox": [2.5, 3, 10, 5],
            "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]],
        },
        {
            "id": 2,
            "image_id": 42,
            "category_id": 1,
            "iscrowd": 1,
            "bbox": [0, 0, 2, 20],
            "segmentation": {"size": [20, 30], "counts": [0, 40, 560]},
        },
        {
            "id": 3,
            "image_id": 42,
            "category_id": 13,
            "iscrowd": 0,
            "bbox": [20, 10, 5, 5],
            "segmentation": [[20, 10, 25, 10, 25, 15, 20, 15]],
        },
    ]
    for i in range(100, 100 + more):
        images.append(images[0] | {"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"})
        annotations += [one | {"id": 10 * i + k, "image_id": i} for k, one in enumerate(annotations[:3])]
    return {"images": images, "categories": categories, "annotations": annotations}


def write_coco(folder, content=None, more=0):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for one in coco_content(more)["images"]:
        picture(folder / "val2014" / one["file_name"], 20, 30)
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(content or coco_content(more)))
    return folder


def steel_names():
    "A name of the validation split, and one of the training split"
    names = [f"{i:08x}.jpg" for i in range(50)]
    return [next(n for n in names if (zlib.crc32(n.encode()) % 5 == 0) == val) for val in (True, False)]


def write_steel(folder, rows=None, names=None):
    "Columns 100 to 109 have defect 3, the lower half of column 105 to 300 defect 1"
    val, train = steel_names()
    pixels = {name: picture(folder / "train_images" / name, 256, 1600) for name in names or (val, train)}
    lower = " ".join(f"{column * 256 + 129} 128" for column in range(105, 301))
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("ImageId", "ClassId", "EncodedPixels"),
                *(rows or [(val, 3, f"{100 * 256 + 1} {10 * 256}"), (val, 1, lower)]),
            ]
        )
    return pixels


def write_elpv(folder):
    lines, generator = [], np.random.default_rng(0)
    for i in range(32):
        file = folder / "images" / f"cell{i:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (30, 30), dtype=np.uint8)).save(file)
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[i % 4]
        lines.append(f"images/{file.name}   {probability}  {('mono', 'poly')[i // 16]}\n")
    (folder / "labels.csv").write_text("".join(lines))
    return folder


def write_squares(folder, sizes=(16,), count=4):
    "Red and blue pictures, a folder each; masks and boxes of their left halves"
    boxes = []
    for name, channel in (("blue", 2), ("red", 0)):
        for i in range(count):
            side = sizes[i % len(sizes)]
            pixels = np.zeros((side, side, 3), dtype=np.uint8)
            pixels[:, : side // 2, channel] = 200
            for place, content in (("pictures", pixels), ("masks", (pixels > 0).any(2).astype(np.uint8) * 255)):
                (folder / place / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(folder / place / name / f"{i}.png")
            boxes.append(f"{name}/{i}.png,0,0,{side // 2},{side}\n")
    (folder / "boxes.csv").write_text("file,x0,y0,x1,y1\n" + "".join(boxes))
    (folder / "my_red_model.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Red(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.scale = nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n        red = x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2))\n"
        "        return torch.stack([-red, red], 1) * self.scale\n\n"
        "def make():\n    return Red()\n\ndef number():\n    return 7\n")
    return folder
