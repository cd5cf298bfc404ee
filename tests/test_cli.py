"""The command as a user runs it: a process with arguments, files, an exit code and a message."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUIET, parsed
from PIL import Image
from writers import write_tiny

from xai_companion.cli import main
from xai_companion.commands.explain import explain_files, labels_of, names_of, read_images, write_summary
from xai_companion.commands.options import check_takes, model_from, names_in, parse_methods, parse_option, source_named
from xai_companion.commands.train import _config, _pair, _written
from xai_companion.core import rank_and_world
from xai_companion.data.photos import load_image, load_images, photos
from xai_companion.explain import GradCAM, get_explainer
from xai_companion.explain.contract import assert_untouched, footprint
from xai_companion.gallery import gallery
from xai_companion.models import load_model
from xai_companion.viz import as_picture, overlay

COMMAND = Path(sys.executable).with_name("xai-companion")
OWN = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

class Pair(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), None

def wrong():
    return {}["layers"]

def needs(layers):
    return None

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))

def single():
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

number = 3
ready = make()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with two photographs, a name that is markup, and a file that is no image"
    folder = tmp_path_factory.mktemp("photos")
    cat, coffee = photos(160)[:2]
    as_picture(cat).save(folder / "cat.png")
    as_picture(coffee).save(folder / "<b>coffee.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_explain(folder, tmp_path):
    out = tmp_path / "out"
    command = [COMMAND, "explain", folder, "--method", "gradcam,saliency", "--target", "tabby", "--size", "96", "--device", "cpu", "--out", out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "cat.png: tabby," in run.stdout and "Traceback" not in run.stderr
    assert {f.name for f in out.iterdir()} == {
        "cat.gradcam.png", "cat.saliency.png", "<b>coffee.gradcam.png", "<b>coffee.saliency.png", "maps.npz", "index.html"}
    with np.load(out / "maps.npz") as stored:
        assert stored["gradcam"].shape == (2, 1, 96, 96) and (stored["target"] == 281).all()
        assert 0 < stored["probability"].max() < 1
    assert Image.open(out / "cat.gradcam.png").size == (96, 96)
    page = (out / "index.html").read_text()
    assert "<b>coffee" not in page and "coffee" in page


@pytest.mark.parametrize("arguments, words", [
    (["missing.png"], "missing.png"),
    (["notes.txt"], "notes.txt"),
    (["cat.png", "--method", "gradkam"], "did you mean 'gradcam'"),
    (["cat.png", "--target", "tabbby"], "did you mean 'tabby'"),
    (["cat.png", "--target", "1000"], "out of range"),
    (["cat.png", "--layer", "layer4"], "no layer 'layer4'"),
    (["cat.png", "--model", "resnet5"], "did you mean"),
    (["cat.png", "--weights", "nowhere.pt"], "nowhere.pt"),
    (["cat.png", "--device", "cuda:99"], "cuda:99"),
])
def test_mistakes_end_in_one_line(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    assert main(["explain", *arguments, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("xai-companion: error: ") and words in message
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder to work in: pictures in two classes, a text file, a module of one's own, one with a mistake, a small Tiny ImageNet"
    place = tmp_path_factory.mktemp("place")
    generator = torch.Generator().manual_seed(0)
    for kind in ("dark", "light"):
        (place / "pictures" / kind).mkdir(parents=True)
        for i in range(10):
            as_picture(torch.rand(3, 24, 24, generator=generator) / 2 + (kind == "light") / 2).save(place / "pictures" / kind / f"{i}.png")
    as_picture(photos(64)[0]).save(place / "cat.png")
    (place / "notes.txt").write_text("not weights, not a folder")
    (place / "mine.py").write_text(OWN)
    (place / "broken.py").write_text("def make(:\n")
    write_tiny(place / "sets" / "tiny-imagenet-200")
    return place


def files(place):
    return {file for file in place.rglob("*") if "__pycache__" not in file.parts}


MISTAKES = {
    "train --data pictures": [
        ("--set tau", "an option is NAME=VALUE, such as mu=0.3, got 'tau'"),
        ("--set =3", "an option is NAME=VALUE, such as mu=0.3, got '=3'"),
        ("--set tau=", "an option is NAME=VALUE"),
        ("--set tau=3", "the recipe ce has no option 'tau': it has no options"),
        ("--recipe edda --set xyz=3", "the recipe edda has no option 'xyz': it has drop_target, drop_weight,"),
        ("--recipe edda --set taus=3", "did you mean 'tau'"),
        ("--recipe edda --set tau=0,5", "tau must be a number, got (0, 5)"),
        ("--recipe supcon --set staged=maybe", "staged must be true or false, got 'maybe'"),
        ("--smoke", "--smoke shortens the schedule of a paper and needs its name: --config NAME"),
        ("--size 4", "the model cannot take images of 4 x 4 pixels"),
        ("--size 4", "choose another --size; it was made for 64"),
        ("--size 16 --model vit_b_16", "cannot take images of 16 x 16 pixels (Wrong image height! Expected 224"),
        ("--size 0", "size must be a whole number of at least 1, got 0"),
        ("--size -3", "size must be a whole number of at least 1, got -3"),
        ("--batch 0", "batch must be a whole number of at least 1, got 0"),
        ("--lr 0", "lr must"),
        ("--data nowhere", "nowhere"),
        ("--data pictures/dark", "It has images in it: if they are one class, give the folder above"),
        ("--model plain_cn", "plain_cnn"),
        ("--device cuda:99", "cuda:99"),
        ("--epochs -2", "epochs must be a whole number of at least 1, got -2"),
        ("--images 0", "images must be a whole number of at least 1, got 0"),
        ("--images -2", "images must be a whole number of at least 1, got -2"),
        ("--workers -1", "workers must be a number of processes, or 0 for this one; got -1"),
        ("--test", "--test needs the folder pictures/test, with a folder of images per class"),
        ("--test --data tiny_imagenet --root sets", "tiny_imagenet has no test images with public labels, only train and val: leave --test out"),
        ("--model mine:make", "train takes a network by name, not 'mine:make'"),
        ("--weights pictures", "the weights pictures are a folder: give the file in it, such as pictures/model.pt"),
        ("--out notes.txt", "notes.txt is a file, so there can be no folder notes.txt: name another one with --out"),
    ],
    "explain cat.png": [
        ("--size 0", "size must be a whole number of at least 1, got 0"),
        ("--classes 0", "classes must be a whole number of at least 1, got 0"),
        ("--model plain_cnn --size 4", "the model cannot take images of 4 x 4 pixels"),
        ("--method gradcam,", "several names stand with one comma between each two, such as gradcam,sise; got 'gradcam,'"),
        ("--layer conv_head,,bn2", "several names stand with one comma between each two"),
        ("--method rise --option n_mask=9", "its options are cells, chunk, dtype, fill, layers, n_masks, p, score, seed"),
        ("--method gradcam,rise --option n_mask=9", "none of gradcam, rise has an option 'n_mask': did you mean 'n_masks'"),
        ("--method gradcam,rise --option zoom=9", "none of gradcam, rise has an option 'zoom': they have cells, chunk,"),
        ("--method gradcam,rise:n_mask=9", "rise cannot be made with n_mask=9"),
        ("--method sise --option mu=abc", "at least 0 and below 1; got 'abc'"),
        ("--method sise --option mu=", "an option is NAME=VALUE"),
        ("--out notes.txt/maps", "notes.txt is a file, so there can be no folder notes.txt/maps"),
        ("--weights notes.txt", "notes.txt is damaged or holds no state dict"),
        ("--model mine:make", "mine:make does not say for which images it was made: give their side with --size"),
        ("--model mine:make --classes 2 --size 32", "--classes goes with a model by name"),
        ("--model mine:Pair --size 32", "the model returns a tuple, not logits (N, K)"),
        ("--model mine:wrong", "mine:wrong failed (KeyError: 'layers'): it is called without arguments"),
        ("--model mine:needs", "mine:needs failed (TypeError: needs() missing 1 required"),
        ("--model mine:number", "mine:number failed (TypeError: 'int' object is not callable)"),
        ("--model broken:make", "'broken:make' names no function or model (SyntaxError: "),
        ("--model :make", "':make' names no function"),
        ("--model mine.py:make", "'mine.py:make' names a file, and a module is written without .py, with dots for folders: mine:make"),
        ("--model ./own/nets.py:make", "with dots for folders: own.nets:make"),
    ],
    "evaluate --model plain_cnn": [
        ("--n 0", "n must be a whole number of at least 1, got 0"),
        ("--budget nan", "budget must be above 0 seconds, got nan"),
        ("--classes 0", "classes must be a whole number of at least 1, got 0"),
        ("--size 0", "size must be"),
        ("--size 4", "the model cannot take images of 4 x 4 pixels"),
        ("--data cifar1", "did you mean 'cifar10' or 'cifar100'"),
        ("--metrics ebpg,", "several names stand with one comma between each two"),
        ("--methods gradcam,,sise", "several names stand with one comma between each two"),
        ("--model mine:Pair", "the model returns a tuple, not logits (N, K)"),
        ("--out notes.txt", "notes.txt is a file, so there can be no folder notes.txt"),
    ],
    "evaluate --data pictures": [
        ("--model mine:single", "the model returns one logit x, and imagefolder has two classes: wrap the model so that it returns "
                                "torch.cat([torch.zeros_like(x), x], 1)"),
        ("--model mine:single --score sigmoid", "which then speaks for the second class, light"),
    ],
    "audit mine:dense pictures --method occlusion --out new/audit.html --table new/rows.csv": [
        ("", "the model cannot take images of 24 x 24 pixels"),
        ("--size 16", "the model cannot take images of 16 x 16 pixels"),
        ("--size 32 --n 0", "n must be"),
        ("--size 32 --method gradkam", "did you mean 'gradcam'"),
        ("--size 32 --boxes nowhere.csv", "nowhere.csv"),
        ("--size 32 --class-map nowhere.csv", "nowhere.csv"),
        ("--size 32 --batch 0", "batch must be"),
    ],
    "audit plain_cnn synthetic": [
        ("--size 0", "size must be a whole number of at least 1, got 0"),
        ("--n 0", "n must be a whole number of at least 1, got 0"),
        ("--batch 0", "batch must be a whole number of at least 1, got 0"),
        ("--size 4", "the model cannot take images of 4 x 4 pixels"),
        ("--out notes.txt/audit.html", "notes.txt is a file, so there can be no folder notes.txt: name another one with --out"),
        ("--table notes.txt/rows.csv", "notes.txt is a file, so there can be no folder notes.txt: name another one with --table"),
        ("--table pictures", "pictures is a folder: name the file"),
    ],
    "data": [
        ("get coco2014 --split test", "coco2014 has the splits val, train, not 'test'"),
        ("get cifar10 --root notes.txt", "notes.txt is a file, so there can be no folder notes.txt: name another one with --root"),
    ],
    "reproduce": [("sise --minutes -3", "minutes must be 0 (print the plan only) or more, got -3")],
}


@pytest.mark.parametrize("start, arguments, words", [(start, *pair) for start, pairs in MISTAKES.items() for pair in pairs])
def test_mistakes_say_what_to_do(place, monkeypatch, capsys, start, arguments, words):
    monkeypatch.chdir(place)
    before = files(place)
    device = ["--device", "cpu"] if start.split()[0] not in ("data", "reproduce") else []
    assert main([*start.split(), *device, *arguments.split()]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("xai-companion: error: ") and said.err.count("xai-companion: error") == 1
    assert not said.out and files(place) == before, "something was printed or written before the mistake was noticed"


@pytest.mark.parametrize("words, name", [
    (["explain", ""], "images"), (["explain", "cat.png", "--out", ""], "out"), (["evaluate", "--data", ""], "data"),
    (["audit", "", "pictures"], "model"), (["train", "--weights", ""], "weights"), (["train", "--set", ""], "set"),
])
def test_an_empty_argument(place, monkeypatch, capsys, words, name):
    monkeypatch.chdir(place)
    assert main(words) == 2
    assert f"{name} is empty, perhaps a variable of the shell that is not set" in capsys.readouterr().err


def test_a_folder_that_nobody_can_write_to(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["explain", "cat.png", "--out", "/proc/maps-of-a-cat"]) == 2
    assert "nothing can be written to /proc (" in capsys.readouterr().err


def test_debug_shows_where_it_went_wrong(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(RuntimeError, match="mine:wrong failed") as error:
        main(["--debug", "explain", "cat.png", "--model", "mine:wrong"])
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(RuntimeError, match="mine:wrong failed"):
        main(["explain", "cat.png", "--model", "mine:wrong", "--debug"])


@pytest.mark.parametrize("name", ["mine:make", "mine:ready"])
def test_explain_takes_a_model_of_ones_own_and_spaces(place, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(place)
    assert main(["explain", "cat.png", "--model", name, "--size", "48", "--method", "gradcam, saliency", "--device", "cpu",
                 "--out", str(tmp_path / "out")]) == 0
    assert "cat.png: class " in capsys.readouterr().out
    with np.load(tmp_path / "out" / "maps.npz") as stored:
        assert stored["gradcam"].shape == stored["saliency"].shape == (1, 1, 48, 48)


def test_explain_methods_with_options_of_their_own(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    methods = ["gradcam", "rise:n_masks=10", "rise:n_masks=10:fill='blur'"]
    assert main(["explain", "cat.png", "--model", "plain_cnn", "--method", ",".join(methods), "--option", "p=0.3", "--device", "cpu",
                 "--out", str(tmp_path / "out")]) == 0
    assert "Grad-CAM, rise:n_masks=10, rise:n_masks=10:fill='blur': 5 files" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {
        "cat.gradcam.png", "cat.rise-n_masks=10.png", "cat.rise-n_masks=10-fill='blur'.png"}
    model, image = load_model("plain_cnn"), load_image("cat.png", 64)[None]
    with np.load(tmp_path / "out" / "maps.npz") as stored:
        assert set(methods) < set(stored.files)
        wanted = get_explainer("rise")(model, n_masks=10, p=0.3).attribute(image)
        assert np.allclose(stored["rise:n_masks=10"], wanted.numpy(), atol=1e-5)
        assert not np.allclose(stored["rise:n_masks=10:fill='blur'"], wanted.numpy(), atol=1e-3)


def test_explanations_name_their_files(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    wanted = ["pictures/dark/0.png", "pictures/light/0.png", "cat.png"]
    assert main(["explain", *wanted, "--model", "mine:make", "--size", "24", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert [line.split(": class ")[0] for line in capsys.readouterr().out.splitlines()[:-1]] == wanted
    with np.load(tmp_path / "out" / "maps.npz") as stored:
        assert stored["files"].tolist() == wanted and stored["names"].tolist() == ["0", "0-2", "cat"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f'"name": "{file}"' in page for file in wanted)


def test_options_and_names():
    assert parse_option(" mu = (0.1, 2) ") == ("mu", (0.1, 2)) and parse_option("a=b=c") == ("a", "b=c")
    assert names_in(" a ,b:areas=(0.1, 0.2):mu=3") == ["a", "b:areas=(0.1, 0.2):mu=3"]
    assert names_in("a:layers=['x','y'],b:areas=((1,2),(3,4)),c") == ["a:layers=['x','y']", "b:areas=((1,2),(3,4))", "c"]
    assert [_pair(text) for text in ("a=true", "a=True", "a=.5", "a=1e-3", "a=null", 'a={"mu": 0.3}', "a=sise", "a=[1, 2]")] == [
        ("a", True), ("a", True), ("a", 0.5), ("a", 0.001), ("a", None), ("a", {"mu": 0.3}), ("a", "sise"), ("a", [1, 2])]


def test_a_variant_keeps_its_score():
    model = load_model("plain_cnn")
    for score, wanted in ((None, ("logit", "softmax", "sigmoid")), ("softmax", ("softmax", "softmax", "sigmoid"))):
        found = parse_methods("scorecam:variant=torchcam,rise,sise:score=sigmoid,gradcam:layers=block3", model, score)
        assert tuple(e.score for e in found.values() if hasattr(e, "score")) == wanted


def test_the_size_check_leaves_no_trace():
    model = load_model("plain_cnn").train()
    before = footprint(model, torch.zeros(1))
    assert check_takes(model, (64, 48)) == 20
    assert_untouched(before, footprint(model, torch.zeros(1)), "after the size check")


def test_shared_options_go_to_the_methods_that_have_them():
    found = parse_methods("gradcam,rise,sise:mu=0.3", load_model("plain_cnn"), shared={"mu": 0.1, "n_masks": 10, "layers": ["block3"]})
    assert (found["rise"].n_masks, found["sise:mu=0.3"].mu) == (10, 0.3) and not hasattr(found["gradcam"], "mu")


# ------------------------------------------------------------------ train


@pytest.mark.parametrize("words, name", [
    (["--size", 32], "ce-plain_cnn-synthetic-e2e9b3e4edb0"),
    (["--recipe", "exconb", "--set", "tau=0.25", "--set", "method=sise"], "exconb-plain_cnn-synthetic-0c9744c27e7a"),
])
def test_a_command_has_the_folder_that_it_had(words, name):
    assert _config(parsed("train", *words)).name == name


@pytest.mark.parametrize("word", ["--images", "--n"])
def test_the_command_is_written_down(word):
    args = parsed("train", word, 40, "--no-flip", "--epochs", 2)
    assert _written(args, _config(args)).endswith("--model plain_cnn --epochs 2 --images 40 --no-flip")


SHORT = ("--data", "pictures", "--size", "16", "--epochs", "1", "--batch", "8", "--device", "cpu")


def test_only_the_first_process_speaks(place, tmp_path, monkeypatch, capsys):
    "A process with another number trains, and leaves printing and `model.pt` with the accuracy to the first one"
    monkeypatch.chdir(place)
    asked = []
    monkeypatch.setattr("xai_companion.commands.train.rank_and_world", lambda device: asked.append(device) or (1, 2))
    assert main(["train", *SHORT, "--out", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out == "" and asked == [torch.device("cpu")] and not list(tmp_path.rglob("curves.png"))
    monkeypatch.setattr("xai_companion.commands.train.rank_and_world", rank_and_world)
    assert main(["train", *SHORT, "--out", str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out.startswith("16 training and 4 validation images, 2 classes; ") and list(tmp_path.rglob("curves.png"))


@pytest.mark.slow
def test_train_under_torchrun(place, tmp_path):
    words = [COMMAND.with_name("torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", "--", COMMAND, "train", *SHORT,
             "--out", tmp_path]
    done = subprocess.run(list(map(str, words)), cwd=place, env=os.environ | QUIET, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("16 training and 4 validation images") == done.stdout.count("trained in") == 1


def test_evaluate_meets_on_the_device_that_was_chosen(place, monkeypatch):
    "Under torchrun the device decides how the processes talk, and `auto` is no device"
    class Met(Exception):
        pass

    def meet(device):
        raise Met(device)
    monkeypatch.chdir(place)
    monkeypatch.setattr("xai_companion.commands.evaluate.rank_and_world", meet)
    monkeypatch.setattr("xai_companion.commands.evaluate.pick_device", lambda name: torch.device("cuda", 1) if name == "mine" else None)
    with pytest.raises(Met) as met:
        main(["evaluate", "--model", "plain_cnn", "--device", "mine"])
    assert met.value.args == (torch.device("cuda", 1),)


# ------------------------------------------------------------------ the program


def test_wrong_usage_and_version(capsys):
    for arguments, code in ((["explain"], 2), (["explian"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert "xai_companion" in capsys.readouterr().out


@pytest.mark.parametrize("words, answer", [
    ("train --sen 64", "xai-companion train: error: unknown argument --sen: did you mean '--seen' or '--set'"),
    ("train --no 64", "unknown argument --no: did you mean '--no-flip'?"), ("explain a --methods=sise", "did you mean '--method' or '--model'"),
    ("data list --rot x", "xai-companion data list: error: unknown argument --rot: did you mean '--root'?"),
    ("bench now", "unknown argument now: xai-companion bench --help lists all"), ("data list one two", "unknown argument one: ")])
def test_options_are_written_in_full(capsys, words, answer):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2 and answer in capsys.readouterr().err


WORKING = """
import sys, time
from pathlib import Path
from xai_companion.cli import main
from xai_companion.explain import GradCAM

def long(self, images, target):
    Path({sign!r}).touch()
    time.sleep(60)

GradCAM.compute = long
sys.exit(main({words!r}))
"""


def test_ctrl_c(folder, tmp_path):
    code = WORKING.format(sign=str(tmp_path / "sign"), words=["explain", str(folder / "cat.png"), "--out", str(tmp_path / "out")])
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it
    while not (tmp_path / "sign").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    message = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and message.strip().endswith("interrupted") and not (tmp_path / "out").exists()


INTERRUPTED = """
import sys

class Finder:
    "Ctrl-C comes while PyTorch is imported"
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from xai_companion.cli import main
sys.exit(main(["data", "list"]))
"""


def test_ctrl_c_while_pytorch_is_imported():
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, "interrupted\n")


def test_explain_leaves_out_what_cannot_be_read(folder, tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(folder, pictures)
    (pictures / "broken.png").write_bytes((folder / "cat.png").read_bytes()[:80])
    words = ["explain", str(pictures), "--size", "64", "--device", "cpu", "--out", str(out)]
    assert main(words) == 1 and "left out: " in (said := capsys.readouterr()).err and "broken.png" in said.err
    assert {file.name for file in out.glob("*.png")} == {"cat.gradcam.png", "<b>coffee.gradcam.png"}
    for file in ("cat.png", "<b>coffee.png"):
        (pictures / file).unlink()
    assert main(words) == 2 and "broken.png" in capsys.readouterr().err


def test_explain_a_model_of_one_logit(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("single.py").write_text("from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n")
    assert main(["explain", str(folder / "cat.png"), "--model", "single:make", "--size", "32", "--device", "cpu"]) == 0
    share = float(re.search(r"class 0, ([\d.]+)%", capsys.readouterr().out)[1])
    assert 50 <= share < 100  # the sigmoid of what a ReLU leaves


def test_a_full_disk_names_the_file(folder, tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert main(["explain", str(folder / "cat.png"), "--size", "32", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device" in (said := capsys.readouterr().err) and "maps.npz" in said
    assert not (tmp_path / "out" / "maps.npz").exists() and not (tmp_path / "out" / "index.html").exists()


# ------------------------------------------------------------------ what explain computes and writes


def test_names_of_files_of_several_folders():
    files = map(Path, ("a/cat.png", "b/cat.jpg", "c/cat-2.png", "d/cat.gif", "dog.png"))
    assert names_of(files) == ["cat", "cat-2", "cat-2-2", "cat-3", "dog"]


@pytest.mark.parametrize("target", [None, 4])
def test_maps_classes_and_probabilities(place, tmp_path, target):
    "By batches as all at once; what is written is what was computed"
    model, images = load_model("plain_cnn"), photos(64)
    for name, image in zip("abcd", images, strict=True):
        as_picture(image).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    images = load_images(paths, 64)
    explainers = {name: get_explainer(name)(model) for name in ("gradcam", "saliency")}
    out = tmp_path / "new"
    found, unread = explain_files([paths[0], place / "notes.txt", *paths[1:]], explainers, target, 64, torch.device("cpu"), out, batch=3)
    assert [len(part.files) for part in found] == [2, 2] and len(unread) == 1 and "notes.txt" in str(unread[0])
    classes, scores = (torch.cat([getattr(part, name) for part in found]) for name in ("classes", "scores"))
    maps = {name: torch.cat([part.maps[name] for part in found]) for name in explainers}
    probabilities = model(images).softmax(1)
    assert classes.tolist() == (probabilities.argmax(1).tolist() if target is None else [4] * 4)
    assert torch.allclose(scores, probabilities[range(4), classes], atol=1e-5)
    for name, explainer in explainers.items():
        assert torch.allclose(maps[name], explainer.attribute(images, classes), atol=1e-4)
    assert sorted(file.name for file in out.iterdir()) == sorted(f"{x}.{name}.png" for name in explainers for x in "abcd")
    picture = np.asarray(Image.open(out / "c.saliency.png"))
    assert np.abs(picture - overlay(images, maps["saliency"])[2].permute(1, 2, 0).numpy() * 255).max() <= 0.51
    assert write_summary(out, found, None)[0].startswith(f"class {classes[0]}, ")
    assert write_summary(out, found, model.classes) == [f"{model.classes[c]}, {p:.1%}" for c, p in zip(classes, scores.tolist(), strict=True)]
    with np.load(out / "maps.npz") as stored:
        assert stored["names"].tolist() == [*"abcd"] and stored["files"].tolist() == list(map(str, paths))
        assert stored["target"].tolist() == classes.tolist() and stored["probability"].tolist() == scores.tolist()
        assert all((stored[name] == maps[name].numpy()).all() for name in explainers)
    gallery(tmp_path / "whole.html", images, maps, [*"abcd"], write_summary(out, found, model.classes), "Explanations")
    assert (tmp_path / "whole.html").read_text() == (out / "index.html").read_text()


def test_what_was_explained_before_ctrl_c_is_kept(folder, tmp_path, monkeypatch, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(10):
        shutil.copy(folder / "cat.png", pictures / f"{i}.png")
    compute = GradCAM.compute
    def second(self, images, target):
        if len(images) < 8:
            raise KeyboardInterrupt
        return compute(self, images, target)
    monkeypatch.setattr(GradCAM, "compute", second)
    words = ["explain", str(pictures), "--model", "plain_cnn", "--device", "cpu", "--out", str(out)]
    assert main(words) == 130 and capsys.readouterr().err == "interrupted: 8 of 10 images are explained\n"
    assert {file.name for file in out.iterdir()} == {*(f"{i}.gradcam.png" for i in range(8)), "maps.npz", "index.html"}
    with np.load(out / "maps.npz") as stored:
        assert stored["gradcam"].shape == (8, 1, 64, 64)


def test_the_centre_of_an_image_is_explained(place):
    paths = [place / "cat.png", place / "notes.txt", place / "pictures" / "dark" / "0.png"]
    images, errors = read_images(paths, 32)
    assert list(images) == [0, 2] and len(errors) == 1 and "notes.txt" in str(errors[0])
    assert all(torch.equal(image, load_image(paths[i], 32, crop=True)) for i, image in images.items())


def test_a_name_is_a_data_set_and_a_path_a_folder(place, monkeypatch):
    "A folder in the working directory does not hide the set of its name"
    monkeypatch.chdir(place)
    (place / "synthetic").mkdir(exist_ok=True)
    for data, root, wanted in (("synthetic", None, ("synthetic", None)), ("./synthetic", None, ("imagefolder", "./synthetic")),
                               ("pictures", "x", ("imagefolder", "pictures")), ("imagefolder", "pictures", ("imagefolder", "pictures"))):
        assert source_named(data, root) == wanted
    (place / "synthetic").rmdir()
    with pytest.raises(FileNotFoundError, match="synthetik is neither a folder .* did you mean 'synthetic'"):
        source_named("synthetik", None)


def test_a_model_of_ones_own_leaves_the_path_of_modules(place, monkeypatch):
    monkeypatch.chdir(place)
    before = list(sys.path)
    assert not model_from("mine:make").training and sys.path == before
    with pytest.raises(ValueError, match="names no function"):
        model_from("mine:nothing")
    assert sys.path == before


def test_models_that_cannot_be_asked():
    with pytest.raises(TypeError, match=r"computes in torch.float64.*give it back with .float\(\)"):
        check_takes(load_model("plain_cnn").double(), (64, 64))
    grey = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
    with pytest.raises(ValueError, match="takes images with 1 channels, and the commands read images with 3: put a module in front"):
        check_takes(grey, (8, 8))


def test_what_reproduce_and_bench_are_told(monkeypatch, capsys):
    asked = []
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    monkeypatch.setattr("xai_companion.reproduce.reproduce", lambda *told: asked.append((os.environ["XAI_COMPANION_PROFILE"], *told)) or 75)
    monkeypatch.setattr("xai_companion.bench.bench", lambda *told: asked.append(told) or 1)
    assert main(["reproduce"]) == main(["reproduce", "sise", "edda", "--profile", "smoke", "--record", "--minutes", "0", "--check"]) == 75
    assert main(["bench"]) == main(["bench", "--record", "--device", "cuda"]) == 1
    assert asked == [("cpu", None, False, None, False), ("smoke", ["sise", "edda"], True, 0.0, True), (False, None), (True, "cuda")]

    def interrupted(*told):
        raise KeyboardInterrupt
    monkeypatch.setattr("xai_companion.reproduce.reproduce", interrupted)
    assert main(["reproduce"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_what_the_gallery_calls_images(tmp_path):
    "Names where they tell images apart, else paths below the folder that all are in; never the path to that folder"
    assert labels_of([tmp_path / "a" / "x.png", tmp_path / "b" / "y.png"]) == ["x", "y"]
    assert labels_of([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "b" / "c" / "y.png"]) == ["a/x.png", "b/x.png", "b/c/y.png"]
    assert labels_of([Path("x.png"), Path("x.jpg")]) == ["x.png", "x.jpg"]


def test_nobody_reads_what_is_printed(tmp_path):
    "As behind `| head -1`"
    run = subprocess.Popen([COMMAND, "data", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    run.stdout.close()
    assert b"" == run.stderr.read() and run.wait(60) == 0


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"cat.png may not be read \(Permission denied\): change its permissions"):
        load_image(folder / "cat.png")


def test_layers_one_after_the_other(folder, tmp_path):
    words = ["explain", str(folder / "cat.png"), "--model", "plain_cnn", "--device", "cpu", "--method", "layercam"]
    names = [name for name, module in load_model("plain_cnn").network.named_modules() if isinstance(module, torch.nn.Conv2d)][-2:]
    found = []
    for number, layers in enumerate((["--layer", names[0], "--layer", names[1]], ["--layer", ",".join(names)], ["--layer", names[1]])):
        assert main([*words, *layers, "--out", str(tmp_path / str(number))]) == 0
        with np.load(tmp_path / str(number) / "maps.npz") as stored:
            found.append(stored["layercam"])
    assert (found[0] == found[1]).all() and not np.allclose(found[0], found[2])


def test_a_seed_that_nothing_can_take(capsys):
    assert main(["train", "--images", "64", "--size", "32", "--epochs", "1", "--seed", str(2**63)]) == 2
    assert "below 2**63" in capsys.readouterr().err
