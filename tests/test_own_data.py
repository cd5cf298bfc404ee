"""Classes, boxes and masks that come from other files: how they are matched, what they show, and mistakes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripted import NAMES
from writers import write_squares

from xai_companion.data.photos import photos
from xai_companion.data.readers import ImageFolder
from xai_companion.own_data import Located, match_classes, read_boxes, read_class_map, read_mask


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_squares(tmp_path, sizes=(16, 20))


# ---------------------------------------------------------------- classes and boxes


def test_how_classes_are_matched():
    assert match_classes(["Great_White shark", "ANT"], 3, ["ant", "bee", "great-white  Shark"]) == ([2, 0], "by name")
    assert match_classes(["2", "0"], 3) == ([2, 0], "by number") and "by order" in match_classes(["b", "a"], 2)[1]
    assert match_classes(["x", "y"], 3, NAMES, {"x": "2", "y": "Bee"}) == ([2, 1], "by a class map")
    assert match_classes(["x", "\u00b2"], 2)[0] == match_classes(["0", "\u00b2"], 2)[0] == [0, 1]  # a raised two is a name
    twice = ["crane", "ant", "crane"]  # as ImageNet's
    assert match_classes(twice, 3, twice) == ([0, 1, 2], "by name")
    with pytest.raises(ValueError, match=r"'crane' is the name of the outputs \[0, 2\]"):
        match_classes(twice[:2], 3, twice)
    for classes, names, words in ((["3", "0"], None, "outputs 0 to 2; out of range: '3'"), (["ant", "bee"], ["ant", "Ant", "bee"], "outputs [0, 1]"),
                                  (["a", "b"], None, "3 outputs without names"), (["ant", "ANT"], NAMES, "same class of the model")):
        with pytest.raises(ValueError, match=re.escape(words)):
            match_classes(classes, 3, names)


def test_files_of_boxes_are_for_one_class_per_image(place):
    data = ImageFolder("pictures")
    data.multi_label = True
    with pytest.raises(ValueError, match="several classes per image: boxes and masks from other files do not say"):
        Located(data, masks="masks")


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # Excel begins a file with a mark
def test_class_maps_and_boxes_as_programs_write_them(tmp_path, mark):
    (tmp_path / "map.csv").write_text(mark + "red , 1\r\n\r\nlight blue,0\r\n", encoding="utf-8", newline="")
    assert read_class_map(tmp_path / "map.csv") == {"red": "1", "light blue": "0"}
    (tmp_path / "map.JSON").write_text(mark + '{"red": 1}', encoding="utf-8")
    assert read_class_map(tmp_path / "map.JSON") == {"red": 1}
    lines = "File,x0,y0,x1,y1", "a.png , 1,2,3,4.5", "", "b.png,0,0,1,1", "a.png,5,6,7,8", ""
    (tmp_path / "boxes.csv").write_text(mark + "\r\n".join(lines), encoding="utf-8", newline="")
    assert {file: boxes.tolist() for file, boxes in read_boxes(tmp_path / "boxes.csv").items()} == {
        "a.png": [[1, 2, 3, 4.5], [5, 6, 7, 8]], "b.png": [[0, 0, 1, 1]]}


def test_a_folder_that_stands_twice_in_a_class_map(place):
    (place / "map.csv").write_text("red,0\nblue,1\nred ,2\n")
    with pytest.raises(ValueError, match="'red' stands in two lines"):
        read_class_map("map.csv")


def test_a_line_of_a_class_map_that_is_none(place):
    (place / "map.csv").write_text("red,0\nblue;1\n")
    with pytest.raises(ValueError, match="map.csv is no class map .'blue;1' stands in a line.*folder,class"):
        read_class_map("map.csv")


@pytest.mark.parametrize("row, words", [
    ("a.png,0,0,8,0", "line 2.*x0 must be below x1, and y0 below y1"), ("a.png,0,9,8,8", "line 2.*y0 below y1"), ("file,x0,y0,x1,y1", "line 2")])
def test_a_line_that_is_no_box_is_named(tmp_path, row, words):
    (tmp_path / "boxes.csv").write_text(f"b.png,0,0,1,1\n{row}\n")
    with pytest.raises(ValueError, match=words):
        read_boxes(tmp_path / "boxes.csv")


@pytest.mark.parametrize("row, words", [
    ("9,9,2,2", "x0 must be below x1"), ("0,0,0,8", "x0 must be below x1"), ("-50,-50,900,900", "is not in the image of"),
    ("300,300,350,350", "is not in the image of"), ("0,0,x,9", "line 1"), ("0,0,9", "line 1")])
def test_boxes_that_are_none(place, row, words):
    (place / "odd.csv").write_text(f"red/0.png,{row}\n")
    with pytest.raises(ValueError, match=words):
        Located(ImageFolder("pictures"), boxes="odd.csv")[ImageFolder("pictures").files.index("red/0.png")]


# ---------------------------------------------------------------- masks


def stored(values, mode="L"):
    return Image.fromarray(np.array(values, dtype=np.uint8), mode)


SOFT = [[0, 255] + [i * 8 for i in range(1, 15)] + [240]]  # 17 levels of brightness


@pytest.mark.parametrize("name, picture, object_", [
    ("labels.png", stored([[0, 1, 2, 20]]), [False, True, True, True]),                     # numbers of classes, which look black
    ("many.png", stored([list(range(24))]), [False] + [True] * 23),
    ("soft.png", stored(SOFT), [v > 127 for v in SOFT[0]]),                                  # the edge of a drawing
    ("grey.png", stored([SOFT[0][:16]]), [v > 0 for v in SOFT[0][:16]]),                     # 16 levels at most are no shades
    ("blue.png", stored([[[0, 0, 0], [0, 0, 9], [0, 255, 0]]], "RGB"), [False, True, True]),
    ("alpha.png", stored([[[0, 0, 0, 0], [0, 0, 0, 255], [9, 9, 9, 0]]], "RGBA"), [False, True, False]),
    ("opaque.png", stored([[[0, 0, 0, 255], [9, 9, 9, 255]]], "RGBA"), [False, True]),
])
def test_what_a_mask_shows(tmp_path, name, picture, object_):
    picture.save(tmp_path / name)
    assert read_mask(tmp_path / name).tolist() == [[object_]]


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_a_mask_with_fringes(tmp_path, name):
    "Lossy files have dark traces beside the object, and a dark mask is brightest where the object is"
    for bright in (255, 80):
        values = np.zeros((32, 32), dtype=np.uint8)
        values[:16, :16] = bright
        Image.fromarray(values).convert("RGB").save(tmp_path / name, quality=40)
        assert read_mask(tmp_path / name)[0].nonzero().amax(0).tolist() == [15, 15] and read_mask(tmp_path / name).sum() == 256


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_photograph_is_no_mask(tmp_path, ending):
    "A folder of images in the place of the folder of masks; a grey photograph cannot be told from a soft mask"
    image = Image.fromarray((photos(64)[1] * 255).byte().movedim(0, 2).numpy())
    image.save(tmp_path / f"photo.{ending}")
    with pytest.raises(ValueError, match=f"photo.{ending} is a picture in colours, not a mask"):
        read_mask(tmp_path / f"photo.{ending}")
    image.quantize(4, dither=Image.Dither.NONE).save(tmp_path / "four_colours.png")
    assert read_mask(tmp_path / "four_colours.png").any()


def test_a_transparent_palette_is_a_mask(tmp_path):
    picture = stored([[0, 1, 1, 0]], "P")
    picture.putpalette([255, 255, 255] * 256)
    picture.save(tmp_path / "a.png", transparency=0)
    assert read_mask(tmp_path / "a.png").tolist() == [[[False, True, True, False]]]


# ---------------------------------------------------------------- places of the images of a folder


def test_boxes_and_masks_agree(place):
    masked, boxed = Located(ImageFolder("pictures"), masks="masks", size=40), Located(ImageFolder("pictures"), boxes="boxes.csv", size=40)
    for a, b in zip(masked, boxed, strict=True):
        assert a.image.shape == (3, 40, 40) and a.mask().equal(b.mask()) and a.mask().float().mean() == 0.5
    assert masked.classes == ["blue", "red"] and len(masked) == 8


def test_where_objects_are_in_a_crop(tmp_path):
    "Boxes and masks go with an image that is not square; the class of each box is that of the image"
    for kind in ("a", "b"):
        for place in ("pictures", "masks"):
            (tmp_path / place / kind).mkdir(parents=True)
        Image.new("RGB", (56, 28)).save(tmp_path / "pictures" / kind / "1.png")
        mask = np.zeros((28, 56), dtype=np.uint8)
        mask[8:12, 24:32] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / kind / ("1.tif" if kind == "a" else "1.bmp"))
    (tmp_path / "boxes.csv").write_text("b/1.png,24,8,32,12\nb/1.png,40,0,56,28\n")
    data = ImageFolder(tmp_path / "pictures")
    first, second = Located(data, tmp_path / "boxes.csv", size=12, crop=True)
    assert first.boxes is None and second.boxes.tolist() == [[4, 3, 8, 5]] and second.box_labels == (1,)
    assert Located(data, tmp_path / "boxes.csv")[1].box_labels == (1, 1)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:5, 4:8] = True
    assert all(torch.equal(item.mask()[0], expected) for item in Located(data, masks=tmp_path / "masks", size=12, crop=True))
    (tmp_path / "masks" / "a" / "1.tif").unlink()
    assert [item.masks is None for item in Located(data, masks=tmp_path / "masks")] == [True, False]
    Image.new("L", (28, 56)).save(tmp_path / "masks" / "b" / "1.bmp")
    with pytest.raises(ValueError, match=r"1.bmp has \(56, 28\) pixels, its image has \(28, 56\)"):
        Located(data, masks=tmp_path / "masks")[1]


def test_masks_of_other_images(place):
    "A folder of masks of which none belongs to an image is a mistake, not a set without masks"
    (place / "flat").mkdir()
    mask = next((place / "masks").rglob("*.png"))
    (place / "flat" / f"x{mask.name}").write_bytes(mask.read_bytes())
    with pytest.raises(ValueError, match="no mask for any of the images.* such as '[^']+/"):
        Located(ImageFolder("pictures"), masks="flat")


def test_places_of_images_that_are_not_there(place):
    (place / "boxes.csv").write_text("red/0.png,0,0,4,4\ngreen/0.png,0,0,4,4\n")
    with pytest.raises(ValueError, match="boxes.csv has boxes for 'green/0.png', which is not among the images.* such as 'blue/0.png'"):
        Located(ImageFolder("pictures"), boxes="boxes.csv")
    with pytest.raises(FileNotFoundError, match="no folder of masks nowhere"):
        Located(ImageFolder("pictures"), masks="nowhere")


def test_the_fingerprint_says_where_the_objects_are(place):
    def made(**options):
        return Located(ImageFolder("pictures"), **options).fingerprint

    first = [made(), made(boxes="boxes.csv"), made(masks="masks"), made(size=40), made(size=40, crop=True)]
    table, mask = place / "boxes.csv", next((place / "masks").rglob("*.png"))
    table.write_text("\n".join(line.rsplit(",", 1)[0] + ",3" for line in table.read_text().splitlines()))
    with Image.open(mask) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(mask)
    assert len({*first, made(boxes="boxes.csv"), made(masks="masks")}) == 7 and first[0] == made()


def test_the_fingerprint_of_masks_does_not_depend_on_the_order_of_the_files(place, monkeypatch):
    first, found = Located(ImageFolder("pictures"), masks="masks").fingerprint, Path.rglob
    data = ImageFolder("pictures")
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(found(self, pattern), reverse=True))
    backwards = Located(data, masks="masks").fingerprint
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(found(self, pattern)))
    assert first == backwards == Located(data, masks="masks").fingerprint


def test_a_table_without_boxes(tmp_path):
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\n")
    with pytest.raises(ValueError, match="has no boxes: each line is file,x0,y0,x1,y1"):
        read_boxes(tmp_path / "boxes.csv")
