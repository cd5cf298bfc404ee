"""The command `train`: from a folder to weights, options and schedules, mistakes, and what it asks for and writes down."""
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from helpers import QUIET, command, parsed, same
from writers import write_voc

from xai_companion.commands.train import OPTIONS, _config
from xai_companion.data.datasets import load_dataset
from xai_companion.data.items import ImageSet, Item
from xai_companion.data.scenes import VOC_CLASSES
from xai_companion.models import load_model
from xai_companion.train import (
    loop,
    read_checkpoint,
    tensors,
)


def run(*words):
    return command("train", *words)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Dark and bright pictures of several sizes, one folder per class, with and without train and val"
    from torchvision.utils import save_image
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(30):
        kind = ("bright", "dark")[i % 2]
        image = torch.rand(3, 20 + i, 40 - i, generator=generator) * 0.5 + (0.5 if kind == "bright" else 0)
        for place in (root / "plain" / kind, root / "parts" / ("val" if i < 8 else "train") / kind):
            place.mkdir(parents=True, exist_ok=True)
            save_image(image, place / f"{i}.png")
    return root


SHORT = ("--size", 16, "--epochs", 6, "--batch", 8, "--lr", 0.05, "--device", "cpu")


# ------------------------------------------------------------------ from images to weights


def test_command_on_a_folder(photos, tmp_path, capsys):
    assert run("--data", photos / "plain", *SHORT, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "24 training and 6 validation images, 2 classes" in said and "validation accuracy 100.0%" in said
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("ce-plain_cnn-imagefolder-")
    assert {f.name for f in folder.iterdir()} == {"checkpoint.pt", "log.csv", "curves.png", "model.pt", ".lock"}
    model = load_model("plain_cnn", weights=folder / "model.pt")
    assert model.classes == ["bright", "dark"] and model.input_size == 16
    again = load_model("plain_cnn", weights=folder / "checkpoint.pt", num_classes=2, classes=["a", "b"])
    assert same(model, again) and again.classes == ["a", "b"]
    meta = torch.load(folder / "model.pt", weights_only=True)["meta"]
    assert meta["command"] == ("xai-companion train --recipe ce --data imagefolder --model plain_cnn --size 16 --epochs 6 "
                               "--batch 8 --lr 0.05")
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    assert run("--data", photos / "plain", *SHORT, "--out", tmp_path) == 0
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before
    assert run("--data", photos / "plain", *SHORT, "--out", tmp_path, "--fresh") == 0
    assert (folder / "checkpoint.pt").stat().st_mtime_ns > before and len(list(tmp_path.iterdir())) == 1


def test_command_with_train_and_val(photos, tmp_path, capsys):
    assert run("--data", photos / "parts", *SHORT, "--out", tmp_path, "--images", 12, "--model", "resnet18", "--epochs", 1) == 0
    assert "12 training and 8 validation images" in capsys.readouterr().out
    [file] = tmp_path.rglob("model.pt")
    model = load_model("resnet18", weights=file)
    assert model.conv1.kernel_size == (3, 3) and model.classes == ["bright", "dark"]
    with pytest.raises(ValueError, match="weights of resnet18, not of plain_cnn"):
        load_model("plain_cnn", weights=file)
    with pytest.raises(ValueError, match="does not fit"):
        load_model("resnet18", weights=file, num_classes=3)


@pytest.mark.parametrize("parts", [("train",), ("train", "test")])
def test_command_with_train_and_no_val(photos, tmp_path, capsys, parts):
    "A part of the training images is for validation; a folder `train` of pictures is a class"
    for part in parts:
        shutil.copytree(photos / "plain", tmp_path / "data" / part)
    assert run("--data", tmp_path / "data", *SHORT, "--out", tmp_path / "out", "--epochs", 1) == 0
    assert "24 training and 6 validation images, 2 classes" in capsys.readouterr().out
    assert load_dataset("imagefolder", root=tmp_path / "data").classes == ["bright", "dark"]
    shutil.copytree(photos / "plain" / "dark", tmp_path / "vehicles" / "train")
    shutil.copytree(photos / "plain" / "bright", tmp_path / "vehicles" / "bus")
    assert run("--data", tmp_path / "vehicles", *SHORT, "--out", tmp_path / "out", "--epochs", 1) == 0
    assert load_dataset("imagefolder", root=tmp_path / "vehicles").classes == ["bus", "train"]


def test_command_on_classes_of_any_size(tmp_path, capsys):
    "A class with one image is trained; fewer images than classes are an error"
    from torchvision.utils import save_image
    for kind, count in (("a", 10), ("b", 10), ("c", 1)):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for i in range(count):
            save_image(torch.full((3, 16, 16), 0.09 * i), tmp_path / "own" / kind / f"{i}.png")
    words = ("--data", tmp_path / "own", *SHORT, "--epochs", 1, "--seed", 9, "--out", tmp_path / "out")
    assert run(*words) == 0 and "16 training and 5 validation images, 3 classes" in capsys.readouterr().out
    assert run(*words, "--images", 8) == 0 and "8 training and 5 validation images, 3 classes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no training image shows [abc]: add images"):
        run("--debug", *words, "--images", 2)


def test_command_on_the_creatures(tmp_path, capsys):
    from xai_companion.data.synthetic import CLASSES
    assert run("--data", "synthetic", "--images", 40, "--size", 32, "--epochs", 1, "--test", "--device", "cpu", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "40 training and" in said and "test accuracy" in said
    [file] = tmp_path.rglob("model.pt")
    assert load_model("plain_cnn", weights=file).classes == CLASSES
    stored = torch.load(file, weights_only=True)["meta"]
    assert stored["command"].endswith("--size 32 --epochs 1 --images 40 --test") and 0 <= stored["test_accuracy"] <= 1
    assert "synthetic" in stored["config"]["fingerprint"] and "n=40" in stored["config"]["fingerprint"]


def test_command_reads_batch_by_batch(photos, tmp_path):
    words = ("--data", photos / "parts", *SHORT, "--epochs", 2)
    assert run(*words, "--out", tmp_path / "whole") == 0 and run(*words, "--workers", 0, "--out", tmp_path / "stream") == 0
    models = [load_model("plain_cnn", next((tmp_path / part).rglob("model.pt"))) for part in ("whole", "stream")]
    assert same(*models)
    with pytest.raises(ValueError, match="need a val folder"):
        run("--debug", "--data", photos / "plain", *SHORT, "--workers", 0, "--out", tmp_path / "none")


def test_command_with_a_recipe_and_its_options(photos, tmp_path):
    assert run("--data", photos / "plain", *SHORT, "--epochs", 2, "--recipe", "exconb", "--set", "tau=0.25", "--set", "method=hirescam",
               "--set", "start=0", "--out", tmp_path) == 0
    [file] = tmp_path.rglob("model.pt")
    meta = torch.load(file, weights_only=True)["meta"]
    assert meta["config"]["options"] == {"tau": 0.25, "method": "hirescam", "start": 0}
    assert meta["command"].endswith('--set tau=0.25 --set method=hirescam --set start=0')
    table = pd.read_csv(file.parent / "log.csv")
    assert table.part.tolist() == ["encoder", "classifier"] * 2 and table.accepted.notna().tolist() == [True, False] * 2
    with pytest.raises(ValueError, match="no option 'taus'.*did you mean 'tau'"):
        run("--debug", "--recipe", "excon", "--set", "taus=1", "--out", tmp_path)


def test_command_with_a_schedule_of_a_paper(photos, tmp_path):
    assert run("--config", "exconb_cifar100", "--smoke", "--data", photos / "plain", "--device", "cpu", "--out", tmp_path) == 0
    [file] = tmp_path.rglob("model.pt")
    config = torch.load(file, weights_only=True)["meta"]["config"]
    assert (config["recipe"], config["model"], config["lr"], config["dtype"]) == ("exconb", "residual_cnn", 0.5, "bfloat16")
    assert config["options"] == {"start": 0.25}


@pytest.mark.parametrize("recipe, options", [
    ("excon_random_mask", {"layers": "layer4.2.conv3", "start": 0.0, "classifier_views": "none"}), ("supcon", {"classifier_views": "none"}),
    ("edda", {"layers": "layer4.2.conv3", "start": 0.0}), ("ce", {})])
def test_another_recipe_keeps_the_options_that_it_has(recipe, options):
    from xai_companion.commands.train import _config
    config = _config(parsed("train", "--config", "excon_tiny_imagenet", "--recipe", recipe))
    assert (config.options, config.lr, config.model) == (options, 0.5, "resnet50")


def test_options_that_are_left_out_are_said(photos, tmp_path, capsys):
    words = "--config", "excon_tiny_imagenet", "--smoke", "--data", photos / "plain", "--device", "cpu", "--out", tmp_path
    assert run(*words, "--recipe", "supcon") == 0
    assert "left out, since supcon has no such option: start of excon_tiny_imagenet\n" in capsys.readouterr().out
    assert run(*words) == 0 and "left out" not in capsys.readouterr().out


def test_command_goes_on_from_weights(photos, tmp_path):
    assert run("--data", photos / "plain", *SHORT, "--out", tmp_path / "a") == 0
    [file] = (tmp_path / "a").rglob("model.pt")
    assert run("--data", photos / "plain", *SHORT, "--epochs", 1, "--lr", 1e-9, "--weights", file, "--out", tmp_path / "b") == 0
    [again] = (tmp_path / "b").rglob("model.pt")
    old, new = (load_model("plain_cnn", f) for f in (file, again))
    torch.testing.assert_close(old.fc.weight, new.fc.weight, atol=1e-6, rtol=0)
    meta = torch.load(again, weights_only=True)["meta"]
    assert meta["config"]["start"].startswith("model.pt ") and meta["command"].endswith(" --weights model.pt")
    assert run("--data", photos / "plain", *SHORT, "--epochs", 1, "--lr", 1e-9, "--weights", "pretrained", "--out", tmp_path / "c") == 0
    [other] = (tmp_path / "c").rglob("model.pt")
    model, twenty = load_model("plain_cnn", other), load_model("plain_cnn")
    assert model.fc.out_features == 2 and model.classes == ["bright", "dark"]
    torch.testing.assert_close(model.block1[0].weight, twenty.block1[0].weight, atol=1e-6, rtol=0)
    for word in ("none", "None"):  # random ones, as if nothing had been said: the run that is there
        assert run("--data", photos / "plain", *SHORT, "--weights", word, "--out", tmp_path / "a") == 0
    assert [*(tmp_path / "a").rglob("model.pt")] == [file]
    with pytest.raises(ValueError, match="weights of plain_cnn, not of residual_cnn"):
        run("--debug", "--data", photos / "plain", *SHORT, "--weights", file, "--model", "residual_cnn", "--out", tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        run("--debug", "--data", photos / "plain", *SHORT, "--weights", tmp_path / "missing.pt", "--out", tmp_path / "d")


def test_weights_for_a_recipe_with_one_class_more(photos, tmp_path):
    assert run("--data", photos / "plain", *SHORT, "--epochs", 1, "--out", tmp_path) == 0
    [file] = tmp_path.rglob("model.pt")
    assert run("--data", photos / "plain", *SHORT, "--epochs", 1, "--out", tmp_path / "more", "--weights", file, "--recipe", "edda",
               "--set", "drop_target=extra", "--set", "start=0.0") == 0
    [file] = (tmp_path / "more").rglob("model.pt")
    assert load_model("plain_cnn", file).classes == ["bright", "dark", "nothing"]


def test_the_command_in_the_file_is_the_one_that_ran(photos, tmp_path):
    "Also with a schedule whose images are not mirrored, and with an option that a shell would take apart"
    words = ("--data", photos / "plain", *SHORT, "--epochs", 1, "--out", tmp_path)
    assert run(*words, "--config", "edda_resnet18_svhn", "--model", "plain_cnn", "--set", 'explainer={"signed": true}') == 0
    [file] = tmp_path.rglob("model.pt")
    meta = torch.load(file, weights_only=True)["meta"]
    again = shlex.split(meta["command"])[2:]
    again[again.index("--data") + 1] = str(photos / "plain")
    assert "--no-flip" in again and run(*again, "--device", "cpu", "--out", tmp_path / "again") == 0
    [file] = (tmp_path / "again").rglob("model.pt")
    assert torch.load(file, weights_only=True)["meta"]["config"] == meta["config"]


def test_ctrl_c(photos, tmp_path):
    words = ("train", "--data", photos / "plain", *SHORT, "--epochs", 10000, "--out", tmp_path)
    code = "import sys; from xai_companion.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=os.environ | QUIET, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not list(tmp_path.rglob("log.csv")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped after step" in message and "the same command continues" in message
    [file] = tmp_path.rglob("checkpoint.pt")
    assert read_checkpoint(file)["done"] >= 3


# ------------------------------------------------------------------ mistakes


def test_a_batch_of_one(photos, tmp_path):
    "Noticed after the images have been counted aloud; `test_cli.MISTAKES` has those that are noticed before"
    with pytest.raises(ValueError, match="batch of one"):
        run("--debug", "--data", photos / "plain", *SHORT, "--out", tmp_path / "out", "--batch", 1)
    assert not (tmp_path / "out").exists()


def test_one_class_and_other_classes(tmp_path):
    from torchvision.utils import save_image
    for part, kind in (("one", "a"), ("two/train", "a"), ("two/train", "b"), ("two/val", "a"), ("two/val", "c")):
        (tmp_path / part / kind).mkdir(parents=True)
        for i in range(4):
            save_image(torch.full((3, 16, 16), 0.1 * i), tmp_path / part / kind / f"{i}.png")
    with pytest.raises(ValueError, match="there is one class, a: .* two classes or more. --data wants .*perhaps it is the one above"):
        run("--debug", "--data", tmp_path / "one", *SHORT, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="the classes of the parts differ"):
        run("--debug", "--data", tmp_path / "two", *SHORT, "--out", tmp_path / "out")


class Street(ImageSet):
    "Red is a car, green a bus, both of them in every third image"
    name, multi_label, classes, fingerprint = "street", True, ["car", "bus"], "street of 24"
    kinds = ((0,), (1,), (0, 1))

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 24

    def __getitem__(self, index):
        labels = self.kinds[index % len(self.kinds)]
        image = 0.2 * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        for label in labels:
            image[label, 2 + 8 * label:6 + 8 * label, 4:12] = 1
        return Item(f"{index}.png", image, labels)


@pytest.mark.parametrize("workers", [(), ("--workers", "0")])
@pytest.mark.parametrize("recipe", ["ce", "edda", "edda_random_class"])
def test_several_classes_per_image(monkeypatch, tmp_path, capsys, recipe, workers):
    monkeypatch.setattr("xai_companion.data.datasets.load_dataset", lambda name, split, **options: Street(split))
    words = ("--data", "voc2012", "--recipe", recipe, "--size", "16", "--epochs", "12", "--batch", "8", "--device", "cpu", *workers)
    assert run(*words, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "24 training and 24 validation images, 2 classes" in said and "validation accuracy 100.0%" in said
    [model] = tmp_path.rglob("model.pt")
    network = load_model("plain_cnn", model)
    with torch.no_grad():
        answers = network(torch.stack([Street("val")[i].image for i in range(3)])).sigmoid() > 0.5
    assert recipe != "ce" or answers.tolist() == [[True, False], [False, True], [True, True]]


@pytest.mark.parametrize("workers", [(), ("--workers", "0")])
def test_images_that_show_nothing_and_a_choice_of_images(monkeypatch, tmp_path, capsys, workers):
    "Every fourth image is an empty street; then so few images that both classes are there only by intent"
    monkeypatch.setattr(Street, "kinds", ((0,), (), (0,), (0, 1)))
    monkeypatch.setattr("xai_companion.data.datasets.load_dataset", lambda name, split, **options: Street(split))
    words = ("--data", "coco2014", "--recipe", "edda", "--size", "16", "--epochs", "6", "--batch", "8", "--device", "cpu")
    assert run(*words, *workers, "--out", tmp_path) == 0 and "validation accuracy 75.0%" in capsys.readouterr().out  # of the empty none is right
    for seed in range(5 if not workers else 0):
        assert run(*words, "--images", 2, "--seed", seed, "--epochs", 1, "--batch", 2, "--out", tmp_path) == 0, capsys.readouterr().err


def test_recipes_are_refused_before_images_are_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("xai_companion.data.datasets.load_dataset", lambda name, split, **options: Street(split))
    monkeypatch.setattr(Street, "__getitem__", None)
    assert run("--data", "voc2012", "--recipe", "excon", "--size", "16", "--device", "cpu", "--out", tmp_path) == 2
    assert "excon is for images of one class each" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (("--recipe", "supcon"), "supcon is for images of one class each, and these show several: ce, cutout, edda"),
    (("--recipe", "edda", "--set", "drop_target=extra"), "drop_target is for images of one class each"),
    (("--recipe", "edda", "--set", "refresh=2"), "a kept map is about one class"),
])
def test_recipes_for_one_class_per_image(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr("xai_companion.data.datasets.load_dataset", lambda name, split, **options: Street(split))
    assert run("--data", "voc2012", *words, "--size", "16", "--epochs", "1", "--device", "cpu", "--out", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_edda_on_files_of_voc(tmp_path, capsys):
    "Two classes on each of twenty photographs; each is the only one on none"
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2007", count=20)
    box = "<bndbox><xmin>{0}</xmin><ymin>2</ymin><xmax>{1}</xmax><ymax>30</ymax></bndbox>"
    for i, file in enumerate(sorted((folder / "Annotations").glob("*.xml"))):
        objects = "".join(f"<object><name>{VOC_CLASSES[(i + k) % 20]}</name><difficult>0</difficult>{box.format(1 + 20 * k, 20 + 20 * k)}</object>"
                          for k in range(2))
        file.write_text(f"<annotation><filename>{file.stem}.jpg</filename>{objects}</annotation>")
    words = ("--data", "voc2007", "--root", tmp_path, "--recipe", "edda", "--size", "32", "--epochs", "2", "--batch", "5", "--device", "cpu")
    assert run(*words, "--test", "--out", tmp_path / "out") == 0
    assert "20 training and 20 validation images, 20 classes" in capsys.readouterr().out
    log = pd.read_csv(next((tmp_path / "out").rglob("log.csv")))
    assert log.salient.iloc[-1] > 0 and log[["loss", "val_loss", "val_accuracy"]].notna().all().all()


def test_too_many_images_for_the_memory(monkeypatch, photos, tmp_path):
    monkeypatch.setattr(tensors, "_free_memory", lambda device: 1000)
    with pytest.raises(RuntimeError, match="24 images of 16 pixels.*take a smaller size or fewer images"):
        run("--debug", "--data", photos / "plain", *SHORT, "--out", tmp_path / "out")


# ------------------------------------------------------------------ without training


@pytest.mark.parametrize("seed", range(10))
def test_every_class_keeps_images_to_learn_from(seed):
    "Folders of 10, 10 and 1 images, and of 40, 20 and 2: the parts, and the beginnings of a part"
    from xai_companion.commands.train import _mixed, _split_off
    for counts, learned in (((10, 10, 1), {(8, 7, 1), (7, 8, 1)}), ((40, 20, 2), {(32, 16, 2), (31, 16, 2)})):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        train, val = _split_off(labels, seed)
        assert sorted([*train.tolist(), *val.tolist()]) == [*range(len(labels))]
        assert tuple(labels[train].bincount(minlength=3).tolist()) in learned
        again, other = _split_off(labels, seed), _split_off(labels, seed + 1)
        assert torch.equal(again[0], train) and not torch.equal(other[0], train)
        order = labels[_mixed(labels, seed)]
        assert len(order[:3].unique()) == 3 and (order[:len(order) // 2].bincount() - torch.tensor(counts) / 2).abs().max() <= 1
    with pytest.raises(ValueError, match="one image of each class"):
        _split_off(torch.arange(3), seed)


def test_the_seed_chooses_the_images(photos):
    from xai_companion.commands.train import read_data
    first, again, other, whole = (read_data(str(photos / "plain"), None, 16, count, seed) for count, seed in ((8, 0), (8, 0), (8, 1), (24, 0)))
    assert torch.equal(first["train"][0], again["train"][0]) and not torch.equal(first["val"][0], other["val"][0])
    assert not torch.equal(first["train"][0], other["train"][0]) and first["train"][1].bincount().tolist() == [4, 4]
    assert first["fingerprint"].endswith(", 8 used, by class")
    assert len(whole["train"][1]) == 24 and whole["fingerprint"].endswith(", 24 used, by class")
    with_val = [read_data(str(photos / "parts"), None, 16, 8, seed) for seed in (0, 1)]  # nothing is split off
    assert torch.equal(with_val[0]["val"][0], with_val[1]["val"][0]) and not torch.equal(with_val[0]["train"][0], with_val[1]["train"][0])


def test_folders_beside_train_are_named(photos, tmp_path, capsys):
    "Somebody whose classes are vehicles has a folder train beside the others"
    shutil.copytree(photos / "parts", tmp_path / "parts")
    shutil.copytree(photos / "plain" / "dark", tmp_path / "parts" / "tram")
    (tmp_path / "parts" / "notes").mkdir()
    assert run("--data", tmp_path / "parts", *SHORT, "--epochs", 1, "--out", tmp_path / "out") == 0
    assert "not used, since there is a folder train beside: tram\n" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["plain", "parts"])
def test_only_the_chosen_images_are_read(photos, part, monkeypatch):
    "Which ones follows from the classes; a smoke run of a large set must not open all of it"
    from xai_companion.commands.train import read_data
    from xai_companion.data.readers import ImageFolder
    opened, whole = [], ImageFolder.__getitem__
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, index: opened.append((self.split, index)) or whole(self, index))
    found = read_data(str(photos / part), None, 16, 4, 0, held=3)
    counts = [len(found[name][1]) for name in ("train", "val")]
    assert len(opened) == sum(counts) == len(set(opened)) and counts[0] == 4
    assert counts[1] == 3 if part == "parts" else counts[1] > 3  # what is split off is a fifth of all


def test_which_images_the_command_asks_for(photos, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(*arguments):
        raise Asked(*arguments)
    monkeypatch.setattr("xai_companion.commands.train.read_data", asked)
    for words, wanted in (((), ("synthetic", None, 64, None, 0, False, False, None)),
                          (("--data", "cifar10", "--root", "r", "--size", 32, "--n", 9, "--seed", 3, "--test", "--workers", 0),
                           ("cifar10", "r", 32, 9, 3, True, True, None)),
                          (("--config", "ce_cifar100", "--smoke"), ("cifar100", None, 32, 256, 0, False, False, 256))):
        with pytest.raises(Asked) as found:
            run(*words, "--device", "cpu", "--out", tmp_path)
        *first, recipe, held = found.value.args
        assert (*first, held) == wanted and recipe.name == "ce"


def test_a_new_classifier_is_drawn_by_the_seed_alone():
    from xai_companion.commands.train import start_model
    made = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        made.append(start_model("plain_cnn", "pretrained", ["a", "b"], seed))
    assert same(made[0], made[1]) and not torch.equal(made[0].fc.weight, made[2].fc.weight) and made[0].classes == ["a", "b"]
    whole = load_model("plain_cnn")
    assert same(start_model("plain_cnn", "pretrained", list(whole.classes), 3), whole)  # those classes are known


@pytest.mark.parametrize("words, written", [
    ((), "--recipe ce --data synthetic --model plain_cnn"),
    (("--model", "resnet18", "--size", 64, "--batch", 7), "--recipe ce --data synthetic --model resnet18 --batch 7"),
    (("--weights", "a/b/model.pt", "--test", "--no-flip"), "--recipe ce --data synthetic --model plain_cnn --no-flip --test --weights model.pt"),
    (("--recipe", "edda", "--set", 'layers="8"'), "--recipe edda --data synthetic --model plain_cnn --set 'layers=\"8\"'"),
    (("--recipe", "edda", "--set", "layers=block3"), "--recipe edda --data synthetic --model plain_cnn --set layers=block3")])
def test_a_command_is_written_so_that_it_reads_the_same(words, written):
    from xai_companion.commands.train import _config, _written
    args = parsed("train", *words)
    assert _written(args, _config(args)) == f"xai-companion train {written}"
    assert _config(parsed("train", *shlex.split(_written(args, _config(args)))[2:])) == _config(args)


def test_every_option_takes_what_its_field_takes():
    values = {"model": "plain_cnn", "pad": 3, "seen": 100, "smoothing": 0.1, "warmup": 0.25, "weight_decay": 1e-4, "lr": 0.3, "size": 32,
              "epochs": 2, "batch": 8, "seed": 4, "recipe": "edda", "optimizer": "adamw", "dtype": "bfloat16", "augmentation": "crop"}
    assert set(values) == set(OPTIONS)
    config = _config(parsed("train", *(word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value))))
    assert {name: getattr(config, name) for name in values} == values


def test_a_validation_loss_that_is_not_finite_stops_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loop, "loss_and_accuracy", lambda *arguments, **options: (float("nan"), 0.5))
    assert run("--images", 64, "--size", 32, "--epochs", 1, "--out", tmp_path) == 2
    assert "the validation loss is not finite after step" in capsys.readouterr().err
