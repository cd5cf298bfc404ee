"""Colours, overlays, figures and the gallery."""
import base64
import hashlib
import io
import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from xai_companion import gallery, viz, webpage
from xai_companion.data.photos import PHOTO_NAMES, photos
from xai_companion.figures import subplots

EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 20, 30, generator=generator)
    return images, {name: torch.randn(3, 1, 20, 30, generator=generator) for name in ("sise", "gradcam")}


class Page(HTMLParser):
    "The tags of a page with their attributes, and the text of each element that has an id"
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.id = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.id = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        self.id = None

    def handle_data(self, text):
        self.text[self.id] = self.text.get(self.id, "") + text


# Methods

def test_every_method_has_its_own_look():
    styles = [tuple(viz.method_style(name).values()) for name in viz.METHODS]
    assert len(set(styles)) == len(styles) >= 25
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in map(viz.method_color, viz.METHODS))


def test_methods_that_meet_in_a_figure_differ_in_colour():
    together = ["gradcam", "gradcampp", "integrated_gradcam", "rise", "scorecam", "sise", "ada_sise", "extremal"]
    assert len({viz.method_color(name) for name in together}) == len(together)
    recipes = ["ce", "cutout", "random_occlusion", "edda", "supcon", "excon", "exconb"]
    assert len({viz.method_color(name) for name in recipes}) == len(recipes)


def test_a_method_is_found_by_any_of_its_names():
    for name in viz.METHODS:
        assert viz.method_label(viz.method_label(name)) == viz.method_label(name)
        assert viz.method_style(viz.method_label(name)) == viz.method_style(name) == viz.method_style(name.upper())
    assert viz.method_label("GradCAMPlusPlus") == "Grad-CAM++"


@pytest.mark.parametrize("name", ["my_explainer", "", "方法", "\udcff", EVIL])
def test_unknown_names_have_a_fixed_look_of_their_own(name):
    style = viz.method_style(name)
    assert style == viz.method_style(name) and viz.method_label(name) == name
    assert tuple(style.values()) not in {row[1:] for row in viz.METHODS.values()}
    assert viz.method_color("my_explainer") == "#009988"       # the same on every computer
    plt.Line2D([], [], **style)


# Maps and overlays

def test_colorize_scales_each_map_by_itself():
    maps = torch.stack([torch.linspace(0, 1, 256), torch.linspace(-9, 40, 256)]).reshape(2, 1, 16, 16)
    colours = viz.colorize(maps)
    assert torch.equal(colours[0], colours[1]) and colours.shape == (2, 3, 16, 16)
    expected = plt.get_cmap("inferno")(np.arange(256))[:, :3]
    assert np.allclose(colours[0].permute(1, 2, 0).reshape(256, 3), expected)


def test_constant_and_extreme_maps():
    dark = viz.colorize(torch.zeros(1, 1, 2, 2))
    assert torch.equal(viz.colorize(torch.full((1, 1, 2, 2), 7.0)), dark)
    assert torch.equal(viz.colorize(torch.ones(1, 1, 2, 2, dtype=torch.bool)), dark)
    mask = torch.tensor([[[[True, False]]]])
    assert torch.equal(viz.colorize(mask), viz.colorize(mask.float() * 1e-20))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            viz.colorize(torch.tensor([[[[0.0, bad]]]]))
    with pytest.raises(ValueError, match=r"maps\[:, None\]"):
        viz.colorize(torch.rand(2, 4, 4))


def test_overlay(batch):
    images, maps = batch
    heat = viz.colorize(maps["sise"])
    assert torch.allclose(viz.overlay(images, maps["sise"], 0.3, grey=False), 0.7 * images + 0.3 * heat)
    grey = (images * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(viz.overlay(images, maps["sise"], 0.3), 0.7 * grey + 0.3 * heat, atol=1e-6)
    assert viz.overlay(images[:, :1], maps["sise"]).shape == images.shape
    assert not viz.overlay(images.requires_grad_(), maps["sise"]).requires_grad


@pytest.mark.parametrize("images, message", [
    (torch.rand(3, 20, 30), r"image\[None\]"), (torch.rand(3, 4, 20, 30), "must be a tensor"),
    (np.zeros((3, 3, 20, 30)), "must be a tensor"), (None, "NoneType"), (torch.rand(0, 3, 20, 30), "must be a tensor"),
    (torch.randint(0, 255, (3, 3, 20, 30), dtype=torch.uint8), "Divide bytes by 255"), (torch.rand(3, 3, 20, 30) - 0.5, r"\[0, 1\]"),
    (torch.full((3, 3, 20, 30), float("nan")), "nan")])
def test_bad_images_are_refused(batch, images, message):
    with pytest.raises(ValueError, match=message):
        viz.overlay(images, batch[1]["sise"])


def test_maps_must_fit(batch):
    images, maps = batch
    for bad in (maps["sise"][:2], maps["sise"][..., :9]):
        with pytest.raises(ValueError, match="interpolate"):
            viz.overlay(images, bad)
        with pytest.raises(ValueError, match="'rise'"):
            viz.show_maps(images, {"rise": bad})
    with pytest.raises(ValueError, match="opacity"):
        viz.overlay(images, maps["sise"], opacity=50)
    for bad in ({}, maps["sise"]):
        with pytest.raises(ValueError, match="dict"):
            viz.show_maps(images, bad)
        with pytest.raises(ValueError, match="dict"):
            gallery.gallery("unused.html", images, bad)


# Figures

def test_show_maps(batch):
    images, maps = batch
    fig = viz.show_maps(images, maps, titles=["a", "b", "c"], opacity=1)
    assert isinstance(fig, Figure) and not plt.get_fignums()
    axes = np.array(fig.axes[:9]).reshape(3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["Image", "SISE", "Grad-CAM"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["a", "b", "c"]
    assert np.allclose(axes[1, 0].images[0].get_array(), images[1].permute(1, 2, 0))
    assert np.allclose(axes[2, 1].images[0].get_array(), viz.colorize(maps["sise"])[2].permute(1, 2, 0))
    with pytest.raises(ValueError, match="2 titles for 3 images"):
        viz.show_maps(images, maps, titles=["a", "b"])


def test_show_images_leaves_holes(batch):
    fig = viz.show_images(batch[0], ["x", "y", "z"], columns=2)
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 0]
    assert [ax.get_title() for ax in fig.axes] == ["x", "y", "z", ""]


def test_figures_stay_small():
    images = photos()
    maps = torch.nn.functional.interpolate(torch.rand(4, 1, 7, 7, generator=torch.Generator().manual_seed(0)), 224, mode="bilinear")
    methods = {name: maps for name in ("gradcam", "rise", "sise", "integrated_gradcam")}
    mime, data, (width, height) = viz.show_maps(images, methods, titles=PHOTO_NAMES).small()
    picture = Image.open(io.BytesIO(data))
    assert mime == "image/jpeg" and picture.format == "JPEG" and len(data) < 60_000
    assert 650 < width < 760 and picture.width >= width and picture.height >= height
    assert viz.show_maps(images, methods, titles=PHOTO_NAMES).small()[1] == data
    mime, data, (width, height) = viz.curves(range(50), {m: np.arange(50) * (1 + i) for i, m in enumerate(methods)}, "x", "y").small()
    picture = Image.open(io.BytesIO(data))
    assert mime == "image/png" and len(data) < 60_000 and abs(picture.width - 2 * width) <= 1


def test_methods_keep_their_colours():
    "All of them in one figure, beside a gradient of as many colours as there may be"
    fig, (left, right) = subplots(1, 2, (7, 3))
    for i, colour in enumerate(viz.PALETTE):
        left.plot([0, 1], [i, i + 1], color=colour)
    right.imshow(np.arange(256)[None], aspect="auto", cmap="viridis")
    _, data, _ = fig.small()
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    found = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in stored.getcolors(10**6)}
    assert set(viz.PALETTE) <= found and len(found) <= 48
    fig, ax = subplots()
    ax.bar([0, 1], [1, 2], color=viz.BLUE)
    colours = sorted(Image.open(io.BytesIO(fig.small()[1])).convert("RGB").getcolors(10**6), reverse=True)
    assert [colour for _, colour in colours[:2]] == [(255, 255, 255), (0x1a, 0x85, 0xff)]


def test_notebooks_get_the_small_picture(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", lambda bundle, **options: shown.append((bundle, options)))
    fig, ax = subplots()
    fig._ipython_display_()
    (bundle, options), = shown
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).mode == "P"
    assert options["raw"] and set(options["metadata"]["image/png"]) == {"width", "height"}


def test_curves():
    ys = {"sise": [1, 2, 3], "gradcam": [3, np.nan, np.nan], "own": [2, 2, 2]}
    fig = viz.curves([1, 10, 100], ys, "n", "score", bands={"sise": ([0, 1, 2], [2, 3, 4])}, logx=True, logy=True, title="t")
    ax, = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_xscale(), ax.get_yscale()) == ("n", "score", "t", "log", "log")
    assert ax.lines[0].get_color() == viz.method_color("sise") and len(ax.collections) == 1
    assert {t.get_text() for t in ax.texts} == {"SISE", "Grad-CAM", "own"}
    for bad, message in (({"sise": [1, 2]}, "'sise'"), ({"rise": [np.nan] * 3}, "NaN"), ({}, "no line")):
        with pytest.raises(ValueError, match=message):
            viz.curves([1, 2, 3], bad, "x", "y")


def test_names_of_lines_keep_their_distance():
    generator = np.random.default_rng(0)
    for _ in range(50):
        wanted = generator.random(generator.integers(1, 9))
        got = viz._spread(wanted, 0.1)
        order = np.argsort(wanted)
        assert (np.diff(got[order]) > 0.1 - 1e-9).all()
        if np.diff(np.sort(wanted)).min(initial=1) > 0.1:
            assert np.allclose(got, wanted)
        else:
            assert np.isclose(got.mean(), wanted.mean())           # moved apart evenly


def test_reliability():
    confidence, correct = [0.05, 0.1, 0.95, 1.0], [0, 1, 1, 1]              # 0.1 closes the first bin
    share, accuracy, mean = viz._reliability(confidence, correct, 10)
    assert share[[0, 9]].tolist() == [0.5, 0.5] and accuracy[[0, 9]].tolist() == [0.5, 1] and np.isclose(mean[0], 0.075)
    fig = viz.reliability_diagram(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct).bool(), bins=10)
    ece = 100 * (0.5 * (0.5 - 0.075) + 0.5 * 0.025)
    assert fig.axes[0].get_title(loc="right") == f"ECE {ece:.1f} %"
    assert fig.axes[0].get_legend() is None and len(fig.legends) == 1, "a legend inside would cover bars"
    for bad in (([0.5], [1, 0]), ([], []), ([1.5], [1]), ([float("nan")], [1])):
        with pytest.raises(ValueError, match="confidence"):
            viz.reliability_diagram(*bad)
    with pytest.raises(ValueError, match="whether it is right"):
        viz.reliability_diagram([0.5, 0.6], [5, 7])
    for call in (lambda: viz.reliability_diagram([0.5], [1], bins=0), lambda: viz.show_images(torch.rand(2, 3, 8, 8), columns=0)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1, got 0"):
            call()


# The gallery

def decode(uri):
    kind, _, data = uri.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_gallery_holds_everything_once(tmp_path, batch):
    images, maps = batch
    file = gallery.gallery(tmp_path / "new" / "g.html", images, maps, names=["a", "b", "c"], captions=["", "x", "<b>"], title="T")
    assert file == tmp_path / "new" / "g.html"
    page = Page(file.read_text(encoding="utf-8"))
    data = json.loads(page.text["data"])
    assert [i["name"] for i in data["images"]] == ["a", "b", "c"] and data["images"][2]["caption"] == "<b>"
    assert [m["label"] for m in data["methods"]] == ["SISE", "Grad-CAM"]
    for image, stored in zip(images, data["images"], strict=True):
        kind, picture = decode(stored["src"])
        assert kind == "data:image/png" and np.abs(np.asarray(picture) / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.51 / 255
    expected = viz.colorize(maps["sise"])
    for colours, stored in zip(expected, data["methods"][0]["maps"], strict=True):
        kind, picture = decode(stored)
        assert picture.mode == "P" and np.abs(np.asarray(picture.convert("RGB")) / 255 - colours.permute(1, 2, 0).numpy()).max() < 0.02


def test_large_photos_are_jpeg():
    smooth = torch.linspace(0, 1, 100).expand(3, 100, 100)
    kind, picture = decode(gallery._photo_uri(smooth))
    assert kind == "data:image/jpeg" and np.abs(np.asarray(picture) / 255 - smooth.permute(1, 2, 0).numpy()).max() < 0.03


def test_gallery_escapes(tmp_path, batch):
    images, maps = batch
    plain = Page(gallery.gallery(tmp_path / "a.html", images, {"sise": maps["sise"]}).read_text())
    text = gallery.gallery(tmp_path / "b.html", images, {EVIL: maps["sise"]}, [EVIL, "\u2028<!--", "\udcff"], [EVIL] * 3, EVIL).read_text()
    hostile = Page(text)
    assert hostile.tags == plain.tags                        # no element and no attribute that the template does not have
    data = json.loads(hostile.text["data"])
    assert data["images"][0]["name"] == data["images"][0]["caption"] == data["methods"][0]["label"] == EVIL
    assert data["images"][1]["name"] == "\u2028<!--"
    assert hostile.text["title"].strip() == EVIL and "<img src=x" not in text


def test_gallery_needs_nothing_else(tmp_path, batch):
    images, maps = batch
    text = gallery.gallery(tmp_path / "a.html", images, maps).read_text()
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace(page.text["data"], ""))
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a == "style"]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    style, script = re.search("<style>(.*?)</style>", text, re.S)[1], re.search("<script>(.*?)</script>", text, re.S)[1]
    for part in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "innerHTML" not in script
    labelled = [attrs for tag, attrs in page.tags if tag == "button"]
    assert all(attrs.get("aria-label") for attrs in labelled)


def test_the_scale_of_the_gallery_is_the_colour_map():
    stops = re.search(r"linear-gradient\(90deg, (.*?)\)", webpage.CSS)[1].split(", ")
    expected = plt.get_cmap(viz.CMAP)(np.linspace(0, 1, len(stops)))[:, :3]
    got = np.array([[int(s[i:i + 2], 16) / 255 for i in (1, 3, 5)] for s in stops])
    assert np.abs(got - expected).max() < 0.02


def test_gallery_refuses_what_does_not_fit(tmp_path, batch):
    images, maps = batch
    for options, message in (({"names": ["a"]}, "1 names for 3 images"), ({"captions": ["a"] * 4}, "4 captions for 3 images")):
        with pytest.raises(ValueError, match=message):
            gallery.gallery(tmp_path / "a.html", images, maps, **options)
    with pytest.raises(ValueError, match="'rise'"):
        gallery.gallery(tmp_path / "a.html", images, {"rise": maps["sise"][:1]})
    with pytest.raises(ValueError, match="is a folder"):
        gallery.gallery(tmp_path, images, maps)
    assert not list(tmp_path.iterdir())


def test_the_palette_stands_out_on_white():
    linear = np.array([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in viz.PALETTE])
    luminance = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05) > 2).all()              # each stands out on white
    assert all(a != b for a, b in itertools.combinations(viz.PALETTE, 2))
