"""An audit of models whose answers are known: the numbers, streaming, interruption, bad input, and the command on folders."""
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import command, rand
from scripted import CARDS, NAMES, Cards, Corner, Scripted, check_self_contained, run
from torch import nn
from writers import write_squares

from xai_companion.audit import audit
from xai_companion.core import seeded
from xai_companion.data.items import Item
from xai_companion.data.readers import ImageFolder
from xai_companion.explain.contract import assert_untouched, footprint, trap_network
from xai_companion.models import load_model
from xai_companion.own_data import match_classes, read_boxes

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


def test_drop_and_increase_are_those_of_the_metrics():
    from xai_companion.metrics import average_drop, increase_rate
    model = load_model("residual_cnn", weights=None)

    class Noise(Cards):
        def __getitem__(self, index):
            return Item(str(index), rand(3, 32, 32, seed=index), (0,))

    data = Noise([(0, 0, 0.5, None)] * 3, side=32)
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


def test_a_model_of_half_precision(place):
    with seeded(0):
        network, data = load_model("resnet18", weights=None, num_classes=2), ImageFolder("pictures")
    whole, half = (audit(network.to(dtype), data, "gradcam", size=32) for dtype in (torch.float32, torch.bfloat16))
    assert half.facts.confidence.tolist() == pytest.approx(whole.facts.confidence.tolist(), abs=0.02)


def test_class_map_and_order():
    data, model = renamed(), Scripted(["cat", "bee", "ant"])
    found = audit(model, data, Corner(model), class_map={"ant": "ant", "be": 1, "cat": "cat"})
    first = found.facts[found.facts.name == "0.png"].iloc[0]
    assert (first.label, first.predicted, found.names[first.label]) == (2, 0, "ant") and "by a class map" in found.about["classes"]
    nameless = audit(Scripted(), data, "occlusion")
    assert nameless.names == ["ant", "be", "cat"] and "by order" in nameless.about["classes"]
    assert match_classes(["n02123045", "n01443537"], 1000)[0] == [281, 1]


def test_the_size_of_the_model_is_that_of_the_audit():
    for own, said, shape in ((16, "squashed to 16 x 16 pixels", (3, 16, 16)), ((16, 16), "as the data set gives them", (3, 8, 8))):
        model = Scripted(NAMES)
        model.input_size = own
        found = run(model=model)
        assert found.about["image size"] == said and all(shown.image.shape == shape for shown in found.shown.values())


def test_a_report_names_the_weights_by_their_checksum():
    other = Scripted(NAMES)
    nn.init.ones_(other.anchor)
    made = [run(model=model).about["weights"] for model in (Scripted(NAMES), Scripted(NAMES), other)]
    assert made[0] == made[1] != made[2] and made[0].startswith("checksum ")


# ---------------------------------------------------------------- streaming and interruption

def test_what_is_printed_of_an_audit():
    made = run()
    assert repr(made).splitlines() == [f"Audit of {len(made.facts)} images", *made.first_look]


def test_a_softmax_at_the_end_is_noticed():
    model = Scripted(NAMES)
    soft = torch.nn.Sequential(model, torch.nn.Softmax(1))
    soft.classes = NAMES
    with pytest.warns(UserWarning, match="take out the softmax"):
        audit(soft, Cards(CARDS), Corner(soft))


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
    (lambda: Cards(CARDS), {"model": Two(NAMES)}, "torch.cat([torch.zeros_like(x), x], 1), whose softmax is the sigmoid"),
    (lambda: Cards(CARDS), {"model": Nan(NAMES)}, "the model returns NaN or infinite logits"),
    (lambda: Cards(CARDS), {"batch": 0}, "batch must be"), (lambda: Cards(CARDS), {"batch": -1}, "batch must be"),
    (lambda: Cards(CARDS), {"model": Scripted(outputs=4)}, "4 outputs without names"),
    (lambda: Cards(CARDS), {"model": Scripted(NAMES[:2])}, "2 names for 3 outputs"),
])
def test_bad_input(tmp_path, data, options, words):
    model = options.pop("model", None) or Scripted(NAMES)
    explainer = options.pop("explainer", None) or Corner(model)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
        audit(model, data(), explainer, out=tmp_path / "new" / "audit.html", **options)
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_is_an_error_before_the_first_image(tmp_path):
    data, model = Cards(CARDS), Scripted(NAMES)
    with pytest.raises(ValueError, match="is a folder"):
        audit(model, data, Corner(model), out=tmp_path)
    (tmp_path / "note.txt").touch()
    with pytest.raises(NotADirectoryError, match="note.txt is a file, so there can be no folder .*note.txt/new: name another one"):
        audit(model, data, Corner(model), out=tmp_path / "note.txt" / "new" / "audit.html")
    assert data.read == 0


def test_audit_leaves_no_trace(tmp_path):
    network, images = trap_network(), torch.zeros(1)
    network.classes = [*NAMES, "dog", "eel", "fox"]
    before = footprint(network, images)
    audit(network, Cards(CARDS, side=16), "sise", out=tmp_path / "audit.html")
    assert_untouched(before, footprint(network, images), "after an audit")


# ---------------------------------------------------------------- folders and the command

def audited(*words):
    return command("audit", *words, "--device", "cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_squares(tmp_path, sizes=(16, 20))


def test_command_with_a_factory(place, capsys):
    torch.save({"scale": torch.tensor([-5.0])}, place / "wrong.pt")
    options = ("--size", 16, "--method", "occlusion")
    assert audited("my_red_model:make", "pictures", *options, "--masks", "masks", "--table", "rows/rows.csv", "--out", "new/a.html") == 0
    said = capsys.readouterr().out
    assert "All 8 predictions are right" in said and "new/a.html" in said and "even map" in said
    check_self_contained((place / "new" / "a.html").read_text(encoding="utf-8"))
    assert len((place / "rows" / "rows.csv").read_text().splitlines()) == 9
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


def test_a_report_says_how_the_images_were_fitted(place):
    words = ("my_red_model:make", "pictures", "--method", "occlusion", "--size", 16)
    for more, kind in (((), "squashed"), (("--crop",), "cropped")):
        assert audited(*words, *more, "--out", f"{kind}.html") == 0
        assert f"{kind} to 16 x 16 pixels" in (place / f"{kind}.html").read_text()
    with pytest.raises(ValueError, match="--crop needs --size"):
        audited("--debug", "my_red_model:make", "pictures", "--method", "occlusion", "--crop")


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


