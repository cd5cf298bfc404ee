"""An audit of models whose answers are known, of folders that are broken, and the page that comes out."""
import argparse
import base64
import hashlib
import io
import math
import re
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xai_companion import findings as find
from xai_companion.audit import audit
from xai_companion.commands.audit import add_audit
from xai_companion.core import seeded
from xai_companion.data.items import ImageSet, Item
from xai_companion.data.readers import ImageFolder
from xai_companion.explain import Explainer
from xai_companion.explain.contract import assert_untouched, footprint, trap_network
from xai_companion.models import load_model
from xai_companion.own_data import Located, match_classes, read_boxes, read_class_map

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
    (lambda: Cards(CARDS), {"model": Nan(NAMES)}, "NaN"),
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


def command(*words):
    top = argparse.ArgumentParser()
    add_audit(top.add_subparsers())
    args = top.parse_args(["audit", *map(str, words), "--device", "cpu"])
    return args.run(args)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return squares(tmp_path, sizes=(16, 20))


def test_command_with_a_factory(place, capsys):
    torch.save({"scale": torch.tensor([-5.0])}, place / "wrong.pt")
    options = ("--size", 16, "--method", "occlusion")
    assert command("my_red_model:make", "pictures", *options, "--masks", "masks", "--table", "rows.csv", "--out", "new/a.html") == 0
    said = capsys.readouterr().out
    assert "All 8 predictions are right" in said and "new/a.html" in said and "even map" in said
    check_self_contained((place / "new" / "a.html").read_text(encoding="utf-8"))
    assert len((place / "rows.csv").read_text().splitlines()) == 9
    (place / "excel.csv").write_text((place / "boxes.csv").read_text(), encoding="utf-8-sig")
    assert all(map(torch.equal, read_boxes("excel.csv").values(), read_boxes("boxes.csv").values()))
    assert command("my_red_model:make", "pictures", *options, "--weights", "wrong.pt", "--boxes", "boxes.csv") == 0
    assert "8 of 8 predictions are wrong" in capsys.readouterr().out


def test_command_with_a_torchvision_name(place, capsys):
    network = load_model("resnet18", weights=None, num_classes=2)
    torch.save(network.state_dict(), place / "mine.pt")
    (place / "map.json").write_text('{"red": 1, "blue": 0}')
    words = ("resnet18", "pictures", "--weights", "mine.pt", "--classes", 2, "--size", 64, "--method", "gradcam", "--n", 4, "--class-map", "map.json")
    assert command(*words) == 0
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
def test_command_mistakes(place, words, message):
    (place / "empty").mkdir()
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(message)):
        command(*words[:2], "--method", "occlusion", *words[2:])
    assert not (place / "audit.html").exists()


def test_an_image_that_cannot_be_read_names_its_file(place):
    file = place / "pictures" / "red" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="2.png"):
        command("my_red_model:make", "pictures", "--size", 16, "--method", "occlusion")
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
        assert command(*words, *more, "--out", f"{kind}.html") == 0
        assert f"{kind} to 16 x 16 pixels" in (place / f"{kind}.html").read_text()
    with pytest.raises(ValueError, match="--crop needs --size"):
        command("my_red_model:make", "pictures", "--method", "occlusion", "--crop")
