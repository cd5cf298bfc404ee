"""An audit of models whose answers are known, of folders that are broken, and the page that comes out."""
import base64
import hashlib
import io
import math
import re
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import command
from PIL import Image
from torch import nn

from xai_companion import audit_page as parts
from xai_companion import findings as find
from xai_companion import report
from xai_companion.audit import audit
from xai_companion.audit_page import Shown
from xai_companion.core import seeded
from xai_companion.data.items import ImageSet, Item
from xai_companion.data.readers import ImageFolder
from xai_companion.explain import Explainer
from xai_companion.explain.contract import assert_untouched, footprint, trap_network
from xai_companion.models import load_model
from xai_companion.own_data import Located, match_classes, read_boxes, read_class_map, read_mask
from xai_companion.report import tag

NAMES = ["ant", "bee", "cat"]


class Scripted(nn.Module):
    "Says what the first pixel of an image tells it to say: the class in red, the confidence in green"

    def __init__(self, names=None, outputs=3):
        super().__init__()
        self.outputs, self.anchor = outputs, nn.Parameter(torch.zeros(1))
        if names:
            self.classes = names

    def forward(self, x):
        said, confidence = (x[:, 0, 0, 0] * 10).round().long(), x[:, 1, 0, 0].double().clamp(0.01, 0.999)
        odds = confidence / (1 - confidence) * (self.outputs - 1)
        return (nn.functional.one_hot(said, self.outputs) * odds.log()[:, None]).float()


class Corner(Explainer):
    "A map that is 1 in the left upper quarter"

    def compute(self, images, target):
        maps = torch.zeros_like(images[:, :1])
        maps[..., : images.shape[2] // 2, : images.shape[3] // 2] = 1
        return maps


class Cards(ImageSet):
    "Images that carry their answer: (label, predicted, confidence, columns that the object has)"
    name, split, classes = "cards", "test", NAMES

    def __init__(self, cards, side=8, names=None):
        self.cards, self.side, self.names = cards, side, names
        self.fingerprint, self.alive, self.most, self.read = f"{len(cards)} cards", weakref.WeakSet(), 0, 0

    def __len__(self):
        return len(self.cards)

    def __getitem__(self, index):
        label, predicted, confidence, columns = self.cards[index]
        image = torch.full((3, self.side, self.side), 0.5)
        image[0, 0, 0], image[1, 0, 0] = predicted / 10, confidence
        self.alive.add(image)
        self.most, self.read = max(self.most, len(self.alive)), self.read + 1
        box = None if columns is None else torch.tensor([[0.0, 0, columns, self.side]])
        name = self.names[index] if self.names else f"{index}.png"
        return Item(name, image, (label,), box, () if box is None else (label,))


CARDS = [(0, 0, 0.92, 4), (0, 0, 0.72, 8), (0, 1, 0.97, 2), (0, 1, 0.63, 4), (1, 1, 0.94, 4), (1, 0, 0.83, 8), (2, 2, 0.55, None)]


def run(cards=CARDS, **options):
    model = options.pop("model", None) or Scripted(NAMES)
    return audit(model, Cards(cards), Corner(model), **options)


class Page(HTMLParser):
    "Elements, addresses, cells and text of a page"

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.rows, self.cell, self.text, self.policy = [], [], [], None, "", ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes).get("class")))
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action", "poster")]
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]
        if name == "tr":
            self.rows.append([])
        self.cell = name if name in ("td", "th") else self.cell
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name):
        self.cell = None if name in ("td", "th") else self.cell

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data
        self.text += data.replace("\u00a0", " ")


# ---------------------------------------------------------------- numbers

def test_numbers_are_those_computed_by_hand():
    found = run()
    facts = found.facts.sort_values("name").reset_index(drop=True)
    assert facts.label.tolist() == [c[0] for c in CARDS] and facts.predicted.tolist() == [c[1] for c in CARDS]
    assert np.allclose(facts.confidence, [c[2] for c in CARDS], atol=1e-5)
    assert facts.correct.tolist() == [True, True, False, False, True, False, True]
    # the map has 4 columns; an object of 2 columns gets half of it, one of 4 or 8 gets all of it
    assert np.allclose(facts.ebpg[:6], [1, 1, 0.5, 1, 1, 1]) and np.allclose(facts.area[:6], [0.5, 1, 0.25, 0.5, 0.5, 1])
    assert np.allclose(facts.focus[:6], [2, 1, 2, 2, 2, 1]) and math.isnan(facts.ebpg[6])
    summary = found.summary
    assert summary.value["accuracy"] == 4 / 7 and summary.n["accuracy"] == 7 and summary.n["ebpg"] == 6
    assert np.isclose(summary.value["ebpg"], 5.5 / 6)
    # bins of 1/10: right with 0.55; wrong with 0.63; right with 0.72; wrong with 0.83; right with 0.92 and 0.94 and wrong with 0.97
    gaps = [0.45, 0.63, 0.28, 0.83, 0.97 - 0.08 - 0.06]
    assert np.isclose(summary.value["ECE, 10 bins"], sum(gaps) / 7, atol=1e-4)
    assert found.confusions.values.tolist() == [["ant", "bee", 2, 4], ["bee", "ant", 1, 2]]


def test_numbers_on_the_page(tmp_path):
    found = run(out=tmp_path / "audit.html")
    page = Page((tmp_path / "audit.html").read_text(encoding="utf-8"))
    words = page.text.replace("\n", " ")
    low, high = (100 * x for x in find.share_interval(4, 7)[1:])
    assert f"57.1 %{low:.1f} to {high:.1f} %4 of 7 images" in words
    assert f"{100 * found.calibration['ece15']:.1f} %" in words and "3 of 7 predictions are wrong, 1 of them" in words
    assert "ant is taken for bee 2 times, of 4 images" in words
    assert ["ant", "bee", "2", "4"] in page.rows and ["bee", "ant", "1", "2"] in page.rows
    ant = next(row for row in page.rows if row[:3] == ["ant", "4", "2"])
    assert ant[3].replace("\u00a0", " ") == "50.0 %" and ant[6].replace("\u00a0", " ") == "87.5 %"
    assert "right (n = 4)" in words and "wrong (n = 3)" in words and "ratio 1.00" in words
    assert "all 7 images" in words and "checksum" in words and "matched by name" in words


def test_drop_and_increase_are_those_of_the_metrics():
    from xai_companion.metrics import average_drop, increase_rate
    model = load_model("residual_cnn", weights=None)
    data = Cards([(0, 0, 0.5, None)] * 3, side=32)
    data.__class__ = type("Noise", (Cards,), {
        "classes": NAMES, "__getitem__": lambda self, i: Item(str(i), torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)), (0,))})
    model.classes = [*NAMES, *map(str, range(17))]
    found = audit(model, data, "gradcam", size=32)
    for row in found.facts.to_dict("records"):
        image = data[int(row["name"])].image[None]
        from xai_companion.explain import GradCAM
        heat = GradCAM(model).attribute(image, row["predicted"])
        assert abs(row["drop"] - average_drop(model, image, heat, row["predicted"]).item()) < 1e-4
        assert row["increase"] == increase_rate(model, image, heat, row["predicted"]).item()


def test_temperature_is_judged_on_other_images():
    cards = [(i % 4 == 0, 0, 0.9, None) for i in range(80)]  # says class 0 with 90 %, right three times out of four
    found = run([(int(label), said, c, m) for label, said, c, m in cards])
    assert found.calibration["n_fit"] == found.calibration["n_test"] == 40
    assert found.calibration["temperature"] > 1 and np.isclose(found.calibration["ece15"], 0.15, atol=1e-4)
    assert "why" in run().calibration


def test_sample_and_repeat():
    every, some, other = run(), run(n=4, seed=5), run(n=4, seed=6)
    assert len(every.facts) == 7 and len(some.facts) == 4 and set(some.facts.name) != set(other.facts.name)
    assert run(n=4, seed=5).facts.drop(columns="seconds").equals(some.facts.drop(columns="seconds"))
    assert some.about["images"] == "4 of 7 images, drawn at random (seed 5)"
    batches = run(batch=2).facts
    assert batches.drop(columns="seconds").equals(every.facts.drop(columns="seconds"))


# ---------------------------------------------------------------- streaming and interruption

def test_images_are_not_kept():
    data = Cards([(i % 3, (i + (i % 5 == 0)) % 3, 0.5 + i / 300, 4) for i in range(120)])
    model = Scripted(NAMES)
    found = audit(model, data, Corner(model), batch=4)
    assert len(found.facts) == 120 and data.most <= 5, f"{data.most} images were in memory at once"
    assert len(found.shown) <= 26 and data.read <= 1 + 120 + len(found.shown)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_no_half_written_report(tmp_path, error):
    class Stops(Cards):
        def __getitem__(self, index):
            if self.read > 4:
                raise error("stop")
            return super().__getitem__(index)

    model, file = Scripted(NAMES), tmp_path / "audit.html"
    file.write_text("the old one")
    with pytest.raises(error):
        audit(model, Stops(CARDS), Corner(model), batch=2, out=file)
    assert file.read_text() == "the old one" and list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------- the page

def check_self_contained(text):
    page = Page(text)
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in style and "@import" not in style and "default-src 'none'; img-src data:;" in page.policy
    for kind in ("style", "script"):
        [inside] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in page.policy
    anchors = set(re.findall(r' id="([^"]+)"', text))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= anchors
    return page


def test_page_is_self_contained_and_small(tmp_path):
    cards = [(i % 3, (i + i % 2) % 3, 0.4 + i / 200, 3) for i in range(100)]
    data, model = Cards(cards, side=224), Scripted(NAMES)
    generator = torch.Generator().manual_seed(0)
    read = data.__class__.__getitem__

    class Noisy(Cards):  # noise is what JPEG compresses worst
        def __getitem__(self, index):
            item = read(self, index)
            item.image[:, 1:] = torch.rand(3, 223, 224, generator=generator)
            return item

    data.__class__ = Noisy
    file = tmp_path / "new" / "audit.html"
    audit(model, data, Corner(model), out=file)
    text = file.read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert sum(name == "img" for name, _ in page.tags) <= 61 and file.stat().st_size < 3_000_000
    for kind, content in re.findall(r"data:image/(\w+);base64,([\w+/=]+)", text):
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == kind.upper()


def test_names_stay_names(tmp_path):
    evil = ['</td><script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "&amp; <b>"]
    cards, files = CARDS * 2, [f'<i>{i}</i>".png' for i in range(14)]
    pages = []
    for names, names_of_files in ((NAMES, None), (evil, files)):
        model, data = Scripted(names), Cards(cards, names=names_of_files)
        data.classes = names
        file = tmp_path / f"{len(pages)}.html"
        audit(model, data, Corner(model), out=file, model_name=names[0], data_name=names[1])
        pages.append(check_self_contained(file.read_text(encoding="utf-8")))
    assert pages[0].tags == pages[1].tags
    assert all(name in pages[1].text for name in evil) and any(file in pages[1].text for file in files)


def test_page_without_errors_and_without_places(tmp_path):
    run([(i % 3, i % 3, 0.9, None) for i in range(9)], out=tmp_path / "audit.html")
    words = Page((tmp_path / "audit.html").read_text(encoding="utf-8")).text
    for sentence in ("All 9 predictions are right", "place of the objects is not known", "There is no wrong prediction", "No two classes"):
        assert sentence in words


# ---------------------------------------------------------------- bad input

def one_class():
    data = Cards(CARDS)
    data.classes = ["ant"]
    return data


def multi_label():
    data = Cards(CARDS)
    data.multi_label = True
    return data


def renamed():
    data = Cards(CARDS)
    data.classes = ["ant", "be", "cat"]
    return data


class Two(Scripted):
    def forward(self, x):
        return super().forward(x)[:, :1]


class Nan(Scripted):
    def forward(self, x):
        return super().forward(x) / 0 * 0


@pytest.mark.parametrize("data, options, words", [
    (one_class, {}, "one class, ant"),
    (multi_label, {}, "several classes per image"),
    (lambda: Cards([]), {}, "empty"),
    (renamed, {}, "did you mean 'bee'"),
    (renamed, {"class_map": {"ant": "ant", "be": "bee"}}, "nothing about 'cat'"),
    (renamed, {"class_map": {"ant": 0, "be": 1, "cat": 3}}, "outputs 0 to 2"),
    (renamed, {"class_map": {"ant": 0, "be": 1, "cat": 1}}, "same class"),
    (lambda: Cards(CARDS), {"n": 0}, "at least 1"),
    (lambda: Cards(CARDS), {"device": "cuda:7"}, "cuda:7"),
    (lambda: Cards(CARDS), {"explainer": "gradkam"}, "did you mean 'gradcam'"),
    (lambda: Cards(CARDS), {"explainer": Corner(Scripted())}, "another model"),
    (lambda: Cards(CARDS), {"model": Two(NAMES)}, "one output"),
    (lambda: Cards(CARDS), {"model": Nan(NAMES)}, "the model returns NaN or infinite logits"),
    (lambda: Cards(CARDS), {"batch": 0}, "batch must be"), (lambda: Cards(CARDS), {"batch": -1}, "batch must be"),
    (lambda: Cards(CARDS), {"model": Scripted(outputs=4)}, "4 outputs without names"),
    (lambda: Cards(CARDS), {"model": Scripted(NAMES[:2])}, "2 names for 3 outputs"),
])
def test_bad_input(tmp_path, data, options, words):
    model = options.pop("model", None) or Scripted(NAMES)
    explainer = options.pop("explainer", None) or Corner(model)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
        audit(model, data(), explainer, out=tmp_path / "audit.html", **options)
    assert not list(tmp_path.iterdir())


def test_audit_leaves_no_trace(tmp_path):
    network, images = trap_network(), torch.zeros(1)
    network.classes = [*NAMES, "dog", "eel", "fox"]
    before = footprint(network, images)
    audit(network, Cards(CARDS, side=16), "sise", out=tmp_path / "audit.html")
    assert_untouched(before, footprint(network, images), "after an audit")


def test_class_map_and_order():
    data, model = renamed(), Scripted(["cat", "bee", "ant"])
    found = audit(model, data, Corner(model), class_map={"ant": "ant", "be": 1, "cat": "cat"})
    first = found.facts[found.facts.name == "0.png"].iloc[0]
    assert (first.label, first.predicted, found.names[first.label]) == (2, 0, "ant") and "by a class map" in found.about["classes"]
    nameless = audit(Scripted(), data, "occlusion")
    assert nameless.names == ["ant", "be", "cat"] and "by order" in nameless.about["classes"]
    assert match_classes(["n02123045", "n01443537"], 1000)[0] == [281, 1]


# ---------------------------------------------------------------- folders and the command

def squares(folder, sizes=(16,), count=4):
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


def audited(*words):
    return command("audit", *words, "--device", "cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return squares(tmp_path, sizes=(16, 20))


def test_command_with_a_factory(place, capsys):
    torch.save({"scale": torch.tensor([-5.0])}, place / "wrong.pt")
    options = ("--size", 16, "--method", "occlusion")
    assert audited("my_red_model:make", "pictures", *options, "--masks", "masks", "--table", "rows.csv", "--out", "new/a.html") == 0
    said = capsys.readouterr().out
    assert "All 8 predictions are right" in said and "new/a.html" in said and "even map" in said
    check_self_contained((place / "new" / "a.html").read_text(encoding="utf-8"))
    assert len((place / "rows.csv").read_text().splitlines()) == 9
    (place / "excel.csv").write_text((place / "boxes.csv").read_text(), encoding="utf-8-sig")
    assert all(map(torch.equal, read_boxes("excel.csv").values(), read_boxes("boxes.csv").values()))
    assert audited("my_red_model:make", "pictures", *options, "--weights", "wrong.pt", "--boxes", "boxes.csv") == 0
    assert "8 of 8 predictions are wrong" in capsys.readouterr().out


def test_command_with_a_torchvision_name(place, capsys):
    network = load_model("resnet18", weights=None, num_classes=2)
    torch.save(network.state_dict(), place / "mine.pt")
    (place / "map.json").write_text('{"red": 1, "blue": 0}')
    words = ("resnet18", "pictures", "--weights", "mine.pt", "--classes", 2, "--size", 64, "--method", "gradcam", "--n", 4, "--class-map", "map.json")
    assert audited(*words) == 0
    assert "4 of 8 images" in capsys.readouterr().out and (place / "audit.html").is_file()


@pytest.mark.parametrize("words, message", [
    (["my_red_model:make", "nowhere"], "nowhere is neither"),
    (["my_red_model:make", "empty"], "no folder of class folders"),
    (["my_red_model:nothing", "pictures"], "my_red_model:nothing"),
    (["my_red_model:number", "pictures"], "returned a int"),
    (["no_such_module:make", "pictures"], "no_such_module"),
    (["plain_cnnn", "pictures"], "did you mean"),
    (["my_red_model:make", "pictures"], "different sizes"),
    (["my_red_model:make", "pictures", "--size", "16", "--boxes", "none.csv"], "none.csv"),
    (["my_red_model:make", "pictures", "--size", "16", "--masks", "none"], "none"),
    (["my_red_model:make", "pictures", "--size", "16", "--class-map", "none.csv"], "none.csv"),
    (["my_red_model:make", "pictures", "--size", "16", "--method", "sise,rise"], "one method"),
    (["my_red_model:make", "pictures", "--size", "16", "--weights", "none.pt"], "none.pt"),
    (["my_red_model:make", "pictures", "--size", "16", "--out", "pictures"], "is a folder"),
    (["my_red_model:make", "pictures", "--size", "16", "--out", "report"], "one HTML file"),
])
def test_command_mistakes(place, capsys, words, message):
    (place / "empty").mkdir()
    assert audited(*words[:2], "--method", "occlusion", *words[2:]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "audit.html").exists()


def test_an_image_that_cannot_be_read_names_its_file(place):
    file = place / "pictures" / "red" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="2.png"):
        audited("--debug", "my_red_model:make", "pictures", "--size", 16, "--method", "occlusion")
    assert not (place / "audit.html").exists()


def test_a_model_of_half_precision(place):
    with seeded(0):
        network, data = load_model("resnet18", weights=None, num_classes=2), ImageFolder("pictures")
    whole, half = (audit(network.to(dtype), data, "gradcam", size=32) for dtype in (torch.float32, torch.bfloat16))
    assert half.facts.confidence.tolist() == pytest.approx(whole.facts.confidence.tolist(), abs=0.02)


def test_masks_of_other_images(place):
    "A folder of masks of which none belongs to an image is a mistake, not a set without masks"
    (place / "flat").mkdir()
    mask = next((place / "masks").rglob("*.png"))
    (place / "flat" / f"x{mask.name}").write_bytes(mask.read_bytes())
    with pytest.raises(ValueError, match="no mask for any of the images.* such as '[^']+/"):
        Located(ImageFolder("pictures"), masks="flat")


def test_boxes_and_masks_agree(place):
    masked, boxed = Located(ImageFolder("pictures"), masks="masks", size=40), Located(ImageFolder("pictures"), boxes="boxes.csv", size=40)
    for a, b in zip(masked, boxed, strict=True):
        assert a.image.shape == (3, 40, 40) and a.mask().equal(b.mask()) and a.mask().float().mean() == 0.5
    assert masked.classes == ["blue", "red"] and len(masked) == 8


def test_the_fingerprint_says_where_the_objects_are(place):
    def made(**options):
        return Located(ImageFolder("pictures"), **options).fingerprint

    first = [made(), made(boxes="boxes.csv"), made(masks="masks"), made(size=40), made(size=40, crop=True)]
    table, mask = place / "boxes.csv", next((place / "masks").rglob("*.png"))
    table.write_text("\n".join(line.rsplit(",", 1)[0] + ",3" for line in table.read_text().splitlines()))
    with Image.open(mask) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(mask)
    assert len({*first, made(boxes="boxes.csv"), made(masks="masks")}) == 7 and first[0] == made()


@pytest.mark.parametrize("row, words", [
    ("9,9,2,2", "x0 must be below x1"), ("0,0,0,8", "x0 must be below x1"), ("-50,-50,900,900", "is not in the image of"),
    ("300,300,350,350", "is not in the image of"), ("0,0,x,9", "line 1"), ("0,0,9", "line 1")])
def test_boxes_that_are_none(place, row, words):
    (place / "odd.csv").write_text(f"red/0.png,{row}\n")
    with pytest.raises(ValueError, match=words):
        Located(ImageFolder("pictures"), boxes="odd.csv")[ImageFolder("pictures").files.index("red/0.png")]


def test_a_line_of_a_class_map_that_is_none(place):
    (place / "map.csv").write_text("red,0\nblue;1\n")
    with pytest.raises(ValueError, match="map.csv is no class map .'blue;1' stands in a line.*folder,class"):
        read_class_map("map.csv")


def test_a_report_says_how_the_images_were_fitted(place):
    words = ("my_red_model:make", "pictures", "--method", "occlusion", "--size", 16)
    for more, kind in (((), "squashed"), (("--crop",), "cropped")):
        assert audited(*words, *more, "--out", f"{kind}.html") == 0
        assert f"{kind} to 16 x 16 pixels" in (place / f"{kind}.html").read_text()
    with pytest.raises(ValueError, match="--crop needs --size"):
        audited("--debug", "my_red_model:make", "pictures", "--method", "occlusion", "--crop")


# ---------------------------------------------------------------- findings of tables by hand

def facts_of(*rows):
    "A table of (label, predicted, confidence) and, where the place of the object is known, (..., EBPG, area)"
    columns = ["label", "predicted", "confidence", "ebpg", "area"][: len(rows[0])]
    return find.with_focus(pd.DataFrame(rows, columns=columns).assign(position=range(len(rows)), drop=0.25))


@pytest.mark.parametrize("yes, n", [(0, 9), (4, 7), (1, 1), (199, 200), (200, 200)])
def test_the_interval_of_a_share_is_wilsons(yes, n):
    from scipy.stats import binomtest
    known = binomtest(yes, n).proportion_ci(method="wilson")
    assert find.share_interval(yes, n) == pytest.approx((yes / n, known.low, known.high), abs=1e-6)


def test_the_interval_of_a_mean():
    from scipy.stats import t
    values = [0.5, 0.75, 1.0, None]
    half = t.ppf(0.975, 2) * 0.25 / math.sqrt(3)
    assert find.estimate(values) == pytest.approx({"value": 0.75, "low": 0.75 - half, "high": 1.0, "n": 3})  # a share ends at 1
    assert find.estimate([v and v + 1 for v in values])["high"] == pytest.approx(1.75 + half)
    assert find.estimate([0.3]) == {"value": 0.3, "low": None, "high": None, "n": 1} and find.estimate([None])["n"] == 0
    assert find.estimate([True, False, True])["high"] == find.share_interval(2, 3)[2]


def test_the_order_of_the_classes():
    "The lowest accuracy first; of equal ones that with more images"
    facts = facts_of((0, 0, 0.5), (1, 0, 0.6), (2, 2, 0.7), (2, 0, 0.8), (3, 3, 0.9), (3, 3, 0.7), (3, 1, 0.2), (3, 1, 0.6), (4, 1, 0.9), (4, 1, 0.9))
    found = find.per_class(facts)
    assert found.label.tolist() == [4, 1, 3, 2, 0] and found.n.tolist() == [2, 1, 4, 2, 1] and found.right.tolist() == [0, 0, 2, 1, 1]
    assert found.confidence.tolist() == pytest.approx([0.9, 0.6, 0.6, 0.75, 0.5])


def test_the_order_of_the_confusions():
    "The most frequent first; of equal ones that of the smaller class, which is the larger share of it"
    facts = facts_of(*[(0, 1, 0.5)] * 2, *[(0, 0, 0.5)] * 3, *[(1, 0, 0.5)] * 2, (2, 1, 0.5), (2, 0, 0.5), *[(3, 0, 0.4)] * 3)
    assert find.confusions(facts).values.tolist() == [[3, 0, 3, 3], [1, 0, 2, 2], [0, 1, 2, 5], [2, 0, 1, 2], [2, 1, 1, 2]]


def test_confident_errors_are_of_different_confusions_first():
    "With the surest right prediction of the same class, if it has one"
    wrong = [(0, 1, c) for c in (0.99, 0.98, 0.97, 0.96, 0.95)] + [(0, 2, 0.6), (1, 2, 0.5), (2, 0, 0.4)]
    facts = facts_of(*wrong, (0, 0, 0.7), (0, 0, 0.8), (1, 1, 0.9))
    assert find.side_by_side(facts) == [(0, 9), (1, 9), (2, 9), (5, 9), (6, 10), (7, None)]
    assert [(pair["label"], pair["predicted"], some) for pair, some in find.examples(facts, pairs=2)] == [(0, 1, [0, 1]), (2, 0, [7])]
    assert [len(some) for _, some in find.examples(facts_of(*wrong, (3, 1, 0.1), (3, 2, 0.1)))] == [2, 1, 1, 1]


def test_maps_beside_the_object_come_first():
    facts = facts_of((0, 0, 0.5, 0.5, 0.5), (0, 0, 0.5, 0.2, 0.5), (0, 1, 0.5, None, None), (1, 0, 0.5, 0.3, 0.5), (1, 1, 0.5, 0.9, 0.5))
    assert find.outside(facts) == [1, 3, 0, 4] and find.outside(facts, 1) == [1] and find.outside(facts_of((0, 0, 0.5))) == []
    assert "On 2 of 4 images the object gets less" in find.first_look(facts, NAMES)[-2]
    assert "On average 53 % of the explanation lies on the object for right predictions (n = 3), 30 % for wrong ones (n = 1)" in \
        find.first_look(facts, NAMES)[-2]


def test_a_temperature_needs_errors_to_learn_from():
    "In the half of the images that it is fitted on"
    logits = torch.tensor([[2.0, 0.0]]).repeat(41, 1)
    labels = torch.zeros(41).long()
    labels[30:] = 1  # all errors are in the other half
    assert "has no error" in find.calibration(logits, labels)["why"]
    found = find.calibration(logits, labels.flip(0))
    assert (found["n_fit"], found["n_test"]) == (20, 21) and found["before"] < found["after"]
    assert "40 images or more, there are 39" in find.calibration(logits[:39], labels[:39])["why"]
    assert "why" not in find.calibration(logits[:40], labels.flip(0)[:40])


@pytest.mark.parametrize("rows, sentence", [
    ([(0, 1, 0.9), (0, 0, 0.95), (1, 0, 0.89)], "2 of 3 predictions are wrong, 1 of them with a confidence of 90 % or more."),
    ([(0, 1, 0.5), (0, 0, 0.95)], "1 of 2 predictions is wrong, 0 of them"),
    ([(0, 0, 0.5)] * 10, "All 10 predictions are right. Even so, up to 27.8 % of such images"),  # z**2 / (10 + z**2)
    ([(0, 1, 0.9), (0, 1, 0.8)] * 5, "On average the model is 85.0 points more confident than it is right (95 % interval 81.2 to 88.8, n = 10)."),
    ([(0, 0, 0.9), (0, 0, 0.8)] * 5, "On average the model is 15.0 points less confident than it is right (95 % interval 11.2 to 18.8, n = 10)."),
    ([(0, 0, 0.9), (0, 1, 0.3)], "On average, confidence and accuracy differ by 10.0 points, which may be chance (n = 2)."),
    ([(0, 0, 0.9)], "On average, confidence and accuracy differ by 10.0 points, which may be chance (n = 1)."),
    ([(0, 1, 0.9), (0, 1, 0.8), (0, 0, 0.7), (1, 0, 0.6), (1, 1, 0.5)], "The weakest class is ant: 1 of 3 right."),
    ([(0, 1, 0.9), (0, 1, 0.8), (0, 0, 0.7), (1, 0, 0.6), (1, 1, 0.5)], "The most frequent confusion: ant is taken for bee 2 times, of 3 images."),
    ([(0, 0, 0.9)], "25 % of the confidence is lost on average (Drop, n = 1)"),
])
def test_sentences(rows, sentence):
    assert sentence in " ".join(find.first_look(facts_of(*rows), NAMES))


def test_one_error_makes_no_weakest_class():
    said = " ".join(find.first_look(facts_of((0, 1, 0.9), (0, 0, 0.8), (1, 1, 0.7)), NAMES))
    assert "weakest" not in said and "most frequent" not in said
    few = [(0, 1, 0.5)] + [(1, 1, 0.5)] * 8 + [(1, 0, 0.5)] * 12  # one wrong of one may be chance, twelve of twenty are not
    assert "The weakest class is bee: 8 of 20 right." in find.first_look(facts_of(*few), NAMES)


# ---------------------------------------------------------------- what stands on the page, and how it is written

def words_of(markup):
    return " ".join(Page(str(markup)).text.split())


@pytest.fixture(scope="module")
def measured():
    "An audit whose calibration is replaced by numbers that are easy to tell apart"
    found = run([*CARDS, (2, 2, 0.5, 8)])
    found.calibration = {"ece10": 0.111, "ece15": 0.222, "temperature": 1.5, "before": 0.3, "after": 0.25, "n_fit": 30, "n_test": 31}
    return found


def test_headline(measured):
    words = words_of(parts.headline(measured))
    low, high = (f"{100 * x:.1f}" for x in find.share_interval(5, 8)[1:])
    assert f"Accuracy62.5 %{low} to {high} %5 of 8 images" in words
    assert "ECE22.2 %15 bins; with 10: 11.1 %n = 8; low is good" in words
    assert words.count("low is good") == 2 and words.count("high is good") == 2 and "n = 7; high is good" in words  # EBPG where a place is known


def test_calibration_on_the_page(measured):
    rows = {row[0]: row[1:] for row in Page(parts.calibration_part(measured)).rows}
    assert rows["accuracy"][0] == "62.5\u00a0%" and rows["ECE, 10 bins"][0] == "11.1\u00a0%" and rows["ECE, 15 bins"][0] == "22.2\u00a0%"
    assert rows["mean confidence"][0] == f"{100 * measured.facts.confidence.mean():.1f}\u00a0%"
    assert rows["confidence minus accuracy"][0] == f"{100 * (measured.facts.confidence.mean() - 0.625):.1f}\u00a0%"
    said = words_of(parts.calibration_part(measured))
    assert "T = 1.50, fitted on 30 of the images, takes the ECE (15 bins) of the other 31 from 30.0 % to 25.0 %." in said
    worse = replace(measured, calibration=measured.calibration | {"after": 0.31})
    assert "from 30.0 % to 31.0 %: no help here." in words_of(parts.calibration_part(worse))


def test_captions(measured):
    said = [words_of(parts.caption(row, NAMES)) for _, row in measured.facts.sort_values("name").iterrows()]
    assert said[2] == "wrong: said bee, is ant (97 %)50 % of the explanation on the object, which covers 25 %; 2.png"
    assert said[0] == "right: ant (92 %)100 % of the explanation on the object, which covers 50 %; 0.png"
    assert said[6] == "right: cat (55 %)6.png"  # nobody knows where the object is


def test_pictures_of_an_image(measured):
    "The image, then a map per class; the outline of the object on the maps; the colour of the caption"
    place = measured.facts.set_index("name").position
    wrong, right = (str(parts.shown_figure(measured, place[name], classes)) for name, classes in (("2.png", [1, 0]), ("0.png", None)))
    assert re.findall(r'alt="([^"]+)"', wrong) == ["image 2.png", "explanation of bee on 2.png", "explanation of ant on 2.png"]
    assert re.findall(r'alt="([^"]+)"', right) == ["image 0.png", "explanation of ant on 0.png"]
    assert Page(wrong).tags[0] == ("figure", "wrong") and Page(right).tags[0] == ("figure", "right")
    assert ("div", "row of3") in Page(wrong).tags and ("div", "row of2") in Page(right).tags
    assert measured.shown[place["2.png"]].mask.sum() == 2 * 8
    shown = replace(measured.shown[place["2.png"]], mask=None)
    assert str(parts.shown_figure(replace(measured, shown={place["2.png"]: shown}), place["2.png"], [1, 0])) != wrong


def test_confusions_on_the_page(measured):
    text = str(parts.confusions_part(measured))
    assert "ant, taken for bee: 2 of 4 images" in words_of(text) and "most frequent of" not in words_of(text)
    assert re.findall(r'alt="explanation of (\w+)', text)[:2] == ["bee", "ant"]  # the predicted class, then the true one
    many = facts_of(*[(i // 5, i // 5 + 1 + i % 5, 0.5) for i in range(25)])
    shown = Shown(torch.zeros(3, 8, 8), None, dict.fromkeys(range(20), torch.rand(1, 8, 8)))
    rows = Page(parts.confusions_part(replace(measured, facts=many.assign(name="a"), names=list(map(str, range(20))), shown=dict.fromkeys(range(25), shown))))
    assert len(rows.rows) == 21 and "The 20 most frequent of 25 pairs." in rows.text


def test_outside_on_the_page(measured):
    words = words_of(parts.outside_part(measured))
    assert "Below 1: 0 of 7 images. These are the 6 lowest." in words and re.findall(r"ratio (\d\.\d\d)", words) == ["1.00"] * 3 + ["2.00"] * 3
    lower = replace(measured, facts=measured.facts.assign(focus=measured.facts.focus / 4))
    assert "Below 1: 7 of 7 images." in words_of(parts.outside_part(lower)) and "ratio 0.25" in words_of(parts.outside_part(lower))


def test_only_scores_that_are_there_are_explained(measured):
    for facts in (measured.facts, measured.facts.drop(columns=["ebpg", "area"])):
        named = {row[0] for row in Page(parts.about_part(replace(measured, facts=facts))).rows}
        assert named & {label for label, _ in find.LABELS.values()} == {label for key, (label, _) in find.LABELS.items() if key in facts}


def test_elements():
    made = tag("p", "a<b", tag("br"), class_="x", aria_label='"', tabindex=0, id=None)
    assert made == '<p class="x" aria-label="&quot;" tabindex="0">a&lt;b<br></p>'
    assert [report.percent(v) for v in (None, math.nan, 0, 0.12345, 1.0)] == ["–", "–", "0.0\u00a0%", "12.3\u00a0%", "100.0\u00a0%"]
    assert report.percent(0.126, 0) == "13\u00a0%" and words_of(report.tile("a", "b", "", "c")) == "abc" and "small" not in report.tile("a", "b", "")


def test_tables_put_numbers_on_the_right():
    rows = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.25}]
    for sort in (False, True):
        text = str(report.table(rows, {"share": report.percent}, "shares", sort))
        assert Page(text).rows == [["name", "share"], ["a", "50.0\u00a0%"], ["b", "25.0\u00a0%"]]
        assert re.findall(r'<t[hd][^>]*class="number"[^>]*>([^<]+)', text) == ["share", "50.0\u00a0%", "25.0\u00a0%"]
        assert re.findall(r'data-value="([^"]+)"', text) == ["0.5", "0.25"] * sort
    assert Page(str(report.table([]))).rows == [[]]


def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_made_smaller():
    small = torch.rand(3, 4, 8)
    assert torch.equal(report.enlarged(small), small.repeat_interleave(24, 1).repeat_interleave(24, 2))
    odd, below = torch.rand(3, 5, 5), [int((i + 0.5) * 5 / 192) for i in range(192)]  # the pixel below the centre
    assert torch.equal(report.enlarged(odd), odd[:, below][:, :, below])
    lines = (torch.arange(400) % 2).float().view(1, -1, 1).expand(3, -1, 200)
    large = report.enlarged(lines)
    assert large.shape == (3, 192, 96) and (large[:, 8:-8] - 0.5).abs().max() < 0.2  # a mean, not every second line
    assert report.enlarged(torch.zeros(3, 1, 1000)).shape == (3, 1, 192)
    step = report.enlarged((torch.arange(400) >= 200).float().view(1, -1, 1).expand(3, -1, 400))
    assert step.min() == 0 and step.max() == 1


def test_the_outline_is_white_inside_and_black_outside():
    mask, grey = torch.zeros(1, 8, 8, dtype=torch.bool), torch.full((3, 8, 8), 0.5)
    mask[:, 2:6, 2:6] = True
    expected = grey.clone()
    expected[:, 1:7, 1:7], expected[:, 2:6, 2:6], expected[:, 3:5, 3:5] = 0, 1, 0.5
    assert torch.equal(report.outlined(grey, mask), expected) and torch.equal(report.outlined(grey, mask[:, ::2, ::2]), expected)
    left = torch.zeros(1, 5, 5, dtype=torch.bool)
    left[:, :, :2] = True  # up to 3.2 of 8 columns: three centres
    assert report.outlined(grey, left)[0, 4].tolist() == [0.5, 0.5, 1, 0, 0.5, 0.5, 0.5, 0.5]
    assert report.outlined(grey, None) is grey


def test_an_image_element_holds_its_picture():
    image = torch.tensor([0.2, 0.6, 0.998]).view(3, 1, 1).expand(3, 8, 16)
    element = str(report.picture(image, 'a "cat"'))
    assert 'alt="a &quot;cat&quot;"' in element and 'width="192" height="96"' in element
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", element)[1]))) as stored:
        assert stored.size == (192, 96) and np.abs(np.asarray(stored).mean((0, 1)) - [51, 153, 254]).max() <= 1.5


def test_grey_levels_are_rounded():
    element = str(report.picture(torch.full((3, 192, 192), 100.9 / 255), "grey"))
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", element)[1]))) as stored:
        assert (np.asarray(stored) == 101).all()


def test_a_page_is_written_whole_where_it_is_wanted(tmp_path):
    file = report.write_page(tmp_path / "new" / "a.html", "caf\u00e9 \udcff")
    assert file.read_bytes() == b"caf\xc3\xa9 ?" and [*file.parent.iterdir()] == [file]
    with pytest.raises(ValueError, match="is a folder: name the file"):
        report.write_page(tmp_path / "new", "")


# ---------------------------------------------------------------- what an audit takes

def test_the_size_of_the_model_is_that_of_the_audit():
    for own, said, shape in ((16, "squashed to 16 x 16 pixels", (3, 16, 16)), ((16, 16), "as the data set gives them", (3, 8, 8))):
        model = Scripted(NAMES)
        model.input_size = own
        found = run(model=model)
        assert found.about["image size"] == said and all(shown.image.shape == shape for shown in found.shown.values())


def test_a_report_that_cannot_be_written_is_an_error_before_the_first_image(tmp_path):
    data, model = Cards(CARDS), Scripted(NAMES)
    with pytest.raises(ValueError, match="is a folder"):
        audit(model, data, Corner(model), out=tmp_path)
    assert data.read == 0


def test_a_report_names_the_weights_by_their_checksum():
    other = Scripted(NAMES)
    nn.init.ones_(other.anchor)
    made = [run(model=model).about["weights"] for model in (Scripted(NAMES), Scripted(NAMES), other)]
    assert made[0] == made[1] != made[2] and made[0].startswith("checksum ")


# ---------------------------------------------------------------- classes, boxes and masks from other files

def test_how_classes_are_matched():
    assert match_classes(["Great_White shark", "ANT"], 3, ["ant", "bee", "great-white  Shark"]) == ([2, 0], "by name")
    assert match_classes(["2", "0"], 3) == ([2, 0], "by number") and "by order" in match_classes(["b", "a"], 2)[1]
    assert match_classes(["x", "y"], 3, NAMES, {"x": "2", "y": "Bee"}) == ([2, 1], "by a class map")
    assert match_classes(["x", "\u00b2"], 2)[0] == match_classes(["0", "\u00b2"], 2)[0] == [0, 1]  # a raised two is a name
    for classes, names, words in ((["3", "0"], None, "outputs 0 to 2; out of range: '3'"), (["ant", "bee"], ["ant", "Ant", "bee"], "outputs [0, 1]"),
                                  (["a", "b"], None, "3 outputs without names"), (["ant", "ANT"], NAMES, "same class of the model")):
        with pytest.raises(ValueError, match=re.escape(words)):
            match_classes(classes, 3, names)


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


@pytest.mark.parametrize("row, words", [
    ("a.png,0,0,8,0", "line 2.*x0 must be below x1, and y0 below y1"), ("a.png,0,9,8,8", "line 2.*y0 below y1"), ("file,x0,y0,x1,y1", "line 2")])
def test_a_line_that_is_no_box_is_named(tmp_path, row, words):
    (tmp_path / "boxes.csv").write_text(f"b.png,0,0,1,1\n{row}\n")
    with pytest.raises(ValueError, match=words):
        read_boxes(tmp_path / "boxes.csv")


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


def test_a_transparent_palette_is_a_mask(tmp_path):
    picture = stored([[0, 1, 1, 0]], "P")
    picture.putpalette([255, 255, 255] * 256)
    picture.save(tmp_path / "a.png", transparency=0)
    assert read_mask(tmp_path / "a.png").tolist() == [[[False, True, True, False]]]


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


def test_places_of_images_that_are_not_there(place):
    (place / "boxes.csv").write_text("red/0.png,0,0,4,4\ngreen/0.png,0,0,4,4\n")
    with pytest.raises(ValueError, match="boxes.csv has boxes for 'green/0.png', which is not among the images.* such as 'blue/0.png'"):
        Located(ImageFolder("pictures"), boxes="boxes.csv")
    with pytest.raises(FileNotFoundError, match="no folder of masks nowhere"):
        Located(ImageFolder("pictures"), masks="nowhere")


def test_the_fingerprint_of_masks_does_not_depend_on_the_order_of_the_files(place, monkeypatch):
    first, found = Located(ImageFolder("pictures"), masks="masks").fingerprint, Path.rglob
    data = ImageFolder("pictures")
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(found(self, pattern), reverse=True))
    backwards = Located(data, masks="masks").fingerprint
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(found(self, pattern)))
    assert first == backwards == Located(data, masks="masks").fingerprint


def test_what_the_command_passes_on(place, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("xai_companion.audit.audit", lambda *arguments, **options: asked.append(options) or audit(*arguments, **options))
    words = ("my_red_model:make", "./pictures/", "--method", "occlusion", "--size", 16)
    assert audited(*words) == 0 and "my_red_model:make on pictures, all 8 images" in capsys.readouterr().out
    assert audited(*words, "--n", 3, "--seed", 5, "--batch", 2, "--masks", "masks", "--crop", "--table", "rows.csv", "--out", "b.htm") == 0
    assert "3 of 8 images, drawn at random (seed 5)" in capsys.readouterr().out and "cropped to 16 x 16 pixels" in (place / "b.htm").read_text()
    assert [(options["n"], options["seed"], options["batch"]) for options in asked] == [(200, 0, 8), (3, 5, 2)]
    rows = pd.read_csv("rows.csv")
    assert rows.label_name.tolist() == [name.split("/")[0] for name in rows.name] == rows.predicted_name.tolist() and len(rows) == 3
