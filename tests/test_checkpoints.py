"""What a run keeps and where its images lie: the same bits after SIGKILL, whole files on a full disk, weights, the log, tensors."""
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BASE, QUIET, same, small_net, toy
from PIL import Image
from torch import nn

from xai_companion.data.datasets import load_dataset
from xai_companion.data.synthetic import Synthetic
from xai_companion.models import load_model
from xai_companion.train import (
    RECIPES,
    checkpoint,
    fit,
    loop,
    read_checkpoint,
    tensors,
    to_tensors,
)
from xai_companion.train.checkpoint import save_run, save_weights
from xai_companion.train.files import COLUMNS, alone, write_log, write_whole
from xai_companion.train.loop import make_run
from xai_companion.train.recipes import CrossEntropy


def without_seconds(log):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


# ------------------------------------------------------------------ stopping and resuming


class Stopping(CrossEntropy):
    "Draws from every generator, and stops with an error before a step"
    at, error = None, KeyboardInterrupt

    def loss(self, model, views, moment):
        if Stopping.at is not None:
            Stopping.at -= 1
            if Stopping.at < 0:
                raise Stopping.error
        views.images += 0.1 * (random.random() + np.random.rand() + torch.rand(())) * torch.rand_like(views.images)
        return super().loss(model, views, moment)


@pytest.fixture
def stopping(monkeypatch):
    monkeypatch.setitem(RECIPES, "stopping", Stopping)
    monkeypatch.setattr(Stopping, "at", None)
    return Stopping


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stops", [[0], [1, 1], [5], [3, 4, 6], [19]])
def test_stopped_runs_end_with_the_same_bits(tmp_path, stopping, optimizer, stops):
    config = replace(BASE, recipe="stopping", optimizer=optimizer)
    whole = fit(config, toy(), toy(12, seed=1), model=small_net(), folder=tmp_path / "whole")
    for stop in stops:
        stopping.at = stop
        with pytest.raises(KeyboardInterrupt, match="stopped after step"):
            fit(config, toy(), toy(12, seed=1), model=small_net(), folder=tmp_path / "parts", every=0.0)
    stopping.at = None
    started = any(stops)  # then the weights come from the checkpoint, whatever the network has now
    again = fit(config, toy(), toy(12, seed=1), model=small_net(seed=5 if started else 0), folder=tmp_path / "parts")
    assert same(whole.model, again.model) and without_seconds(whole.log) == without_seconds(again.log)
    a, b = (pd.read_csv(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    assert b.step.tolist() == a.step.tolist() == [5, 10, 15, 20] and list(b.columns) == list(COLUMNS)
    assert b.seconds.is_monotonic_increasing


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers import BASE, small_net, toy
from dataclasses import replace
from xai_companion.train import fit
settings = replace(BASE, recipe=sys.argv[2], model="plain_cnn", epochs=6, options={options!r})
fit(settings, toy(83), toy(16, seed=1), folder=sys.argv[1], every=0.0)
"""


OPTIONS = {"edda": {"start": 0.0, "refresh": 2}, "exconb": {"start": 0.0}}  # one keeps maps, one a head and a second optimiser


def start(folder, recipe="edda", **options):
    code = SCRIPT.format(tests=str(Path(__file__).parent), options=OPTIONS[recipe])
    return subprocess.Popen([sys.executable, "-c", code, str(folder), recipe], env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def left_alone(folder, recipe="edda"):
    process = start(folder, recipe)
    assert process.wait(120) == 0, process.communicate()[1]
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The folder of a run that was left alone"
    return left_alone(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("recipe", ["edda", pytest.param("exconb", marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, undisturbed, recipe):
    "SIGKILL at several moments, some of them inside the writing of a file; then the bits of a run that was left alone"
    whole = undisturbed if recipe == "edda" else left_alone(tmp_path / "whole", recipe)
    checkpoint, kills, seen = tmp_path / "killed" / "checkpoint.pt", 0, [0]
    for delay in (0.0, 0.013, 0.031):
        process = start(tmp_path / "killed", recipe)
        first = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != first:
                break
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        kills += process.wait(60) == -signal.SIGKILL
        seen.append(read_checkpoint(checkpoint)["done"])
    assert kills >= 2 and seen == sorted(seen) and seen[1] < 60
    left_alone(tmp_path / "killed", recipe)
    a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (whole, tmp_path / "killed"))
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    a, b = (pd.read_csv(folder / "log.csv").drop(columns="seconds") for folder in (whole, tmp_path / "killed"))
    assert a.equals(b) and len(a) == (6 if recipe == "edda" else 12)
    assert {f.name for f in (tmp_path / "killed").iterdir()} == {"checkpoint.pt", "log.csv", "model.pt", ".lock"}


def test_a_finished_run_stays_finished(tmp_path):
    one = fit(BASE, toy(), model=small_net(), folder=tmp_path)
    two = fit(BASE, toy(), model=small_net(seed=9), folder=tmp_path)
    assert same(one.model, two.model) and two.done == 20
    three = fit(BASE, toy(), model=small_net(seed=9), folder=tmp_path, resume=False)
    assert not same(one.model, three.model)


def test_a_fresh_run_that_is_stopped_is_the_one_that_continues(tmp_path, stopping):
    config = replace(BASE, recipe="stopping")
    old = fit(config, toy(), model=small_net(), folder=tmp_path)
    for stop, kept in ((0, "nothing was saved"), (7, "the same command continues from it without --fresh")):
        stopping.at = stop
        with pytest.raises(KeyboardInterrupt, match=kept):
            fit(config, toy(), model=small_net(seed=9), folder=tmp_path, resume=False, every=0.0)
    stopping.at = None
    new = fit(config, toy(), model=small_net(seed=3), folder=tmp_path)
    assert same(new.model, fit(config, toy(), model=small_net(seed=9)).model) and not same(new.model, old.model)


@pytest.mark.parametrize("other", [toy(seed=1), toy(39), (toy()[0], toy()[1].flip(0)), Synthetic("train", n=40, size=32, seed=7)])
def test_a_run_goes_on_with_its_own_images_only(tmp_path, other):
    images = Synthetic("train", n=40, size=32) if isinstance(other, Synthetic) else toy()
    net = partial(small_net, 20 if isinstance(other, Synthetic) else 3)
    fit(BASE, images, model=net(), folder=tmp_path)
    with pytest.raises(ValueError, match="of another run .other training images"):
        fit(BASE, other, model=net(), folder=tmp_path)
    assert fit(BASE, images, model=net(seed=9), folder=tmp_path).done == 20
    if not isinstance(other, Synthetic):
        return
    assert fit(BASE, images, model=net(seed=9), folder=tmp_path, workers=0).done == 20  # however they are read
    assert same(fit(BASE, other, model=net(), folder=tmp_path, resume=False).model, fit(BASE, other, model=net()).model)


def test_the_second_process_in_a_folder_waits(tmp_path, undisturbed):
    with alone(tmp_path / "shared"):
        process = start(tmp_path / "shared")
        assert any("waiting for its end" in line for line in process.stderr)
        time.sleep(0.5)
        assert process.poll() is None and [f.name for f in (tmp_path / "shared").iterdir()] == [".lock"]
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    a, b = (torch.load(folder / "model.pt", weights_only=True)["state_dict"] for folder in (undisturbed, tmp_path / "shared"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_diverging_run_keeps_the_last_good_checkpoint(tmp_path, stopping):
    config = replace(BASE, recipe="stopping")
    stopping.at = 7
    with pytest.raises(KeyboardInterrupt, match="stopped after step 7 of 20: .*checkpoint.pt is intact"):
        fit(config, toy(), model=small_net(), folder=tmp_path, every=0.0)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    bad = small_net()
    run = loop.make_run(config, toy(), None, bad, None, torch.device("cpu"))
    stopping.at = None
    checkpoint.restore_run(run, tmp_path)
    run.step()
    with torch.no_grad():
        bad[6].bias[0] = torch.inf
    with pytest.raises(RuntimeError, match="no longer finite after step 8.*lower lr"):
        checkpoint.save_run(run, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    hot = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, 3))
    with pytest.raises(RuntimeError, match="lower lr or a longer warm-up"):
        fit(replace(BASE, lr=100.0, warmup=0.0), toy(), model=hot, folder=tmp_path / "hot")
    assert not (tmp_path / "hot" / "checkpoint.pt").exists()


def test_checkpoints_cost_little_of_a_run_with_short_epochs(monkeypatch, tmp_path):
    "Writing takes as long as many epochs: only the first end of an epoch and that of the run are kept"
    kept = []

    def slow(run, folder):
        kept.append(run.done)
        time.sleep(0.5)
        save_run(run, folder)

    monkeypatch.setattr("xai_companion.train.loop.save_run", slow)
    run = fit(replace(BASE, epochs=12), toy(), model=small_net(), folder=tmp_path)
    assert kept == [run.per_epoch, run.steps] and len(pd.read_csv(tmp_path / "log.csv")) == 12


# ------------------------------------------------------------------ a full disk, damaged files, other runs


def test_full_disk(tmp_path, undisturbed):
    "The system refuses to write more than ten kilobytes; the checkpoint of before stays, and later the run goes on"
    process = start(tmp_path / "full")
    checkpoint = tmp_path / "full" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    process.kill()
    process.wait(60)
    before = checkpoint.read_bytes()

    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    process = start(tmp_path / "full", preexec_fn=limit)
    message = process.communicate(timeout=120)[1]
    assert process.returncode and "could not be written" in message and "the file of before is intact" in message
    assert len(before) > 10_000 and checkpoint.read_bytes() == before and read_checkpoint(checkpoint)["done"] >= 1
    assert start(tmp_path / "full").wait(120) == 0
    files = undisturbed / "model.pt", tmp_path / "full" / "model.pt"
    a, b = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a" / "b.txt", b"one")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for kept in (False, True):
        with pytest.raises(RuntimeError, match="b.txt could not be written.*No space left.*intact") as full:
            write_whole(tmp_path / "a" / "b.txt", b"two")
        assert ("the run continues" in str(full.value)) == kept
        (tmp_path / "a" / "checkpoint.pt").write_bytes(b"one")
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {"b.txt": b"one", "checkpoint.pt": b"one"}


def test_drafts_of_several_writers_do_not_meet(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_whole(tmp_path / "file", bytes([i]) * 10_000), range(200)))
    assert len(set((tmp_path / "file").read_bytes())) == 1 and [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b"PK" + b[40:], lambda b: b"text"])
def test_damaged_checkpoint(tmp_path, damage):
    fit(replace(BASE, epochs=1), toy(), model=small_net(), folder=tmp_path)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="checkpoint.pt is damaged.*--fresh"):
        fit(replace(BASE, epochs=1), toy(), model=small_net(), folder=tmp_path)


def test_a_checkpoint_of_another_version(tmp_path):
    torch.save({"format": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged, or no checkpoint of a run"):
        read_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("change, model, words", [
    (dict(lr=0.1), small_net(), "of another run .lr 0.05 there, 0.1 here"),
    (dict(fingerprint="other"), small_net(), "fingerprint '' there, 'other' here"),
    ({}, nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), "of another network"),
    ({}, nn.Sequential(*small_net()[:2], nn.GELU(), *small_net()[3:]), "of another network .the weights fit, the layers differ"),
    (dict(model="plain_cnn"), None, "model 'own' there, 'plain_cnn' here"),
])
def test_checkpoint_of_another_run(tmp_path, change, model, words):
    fit(BASE, toy(), model=small_net(), folder=tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=words):
        fit(replace(BASE, **change), toy(), model=model, folder=tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_no_bit_of_a_checkpoint_needs_pickle(tmp_path):
    fit(BASE, toy(), model=small_net(), folder=tmp_path)
    stored = read_checkpoint(tmp_path / "checkpoint.pt")
    assert stored["config"] == asdict(BASE) and stored["done"] == 20 and stored["meta"]["size"] == 16


class Evil:
    "Writes a file when it is unpickled"
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"format": 2, "done": Evil(tmp_path / "touched")}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged, or no checkpoint of a run"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "touched").exists()


# ------------------------------------------------------------------ weights and the log


def test_what_is_stored_beside_the_weights(tmp_path):
    model = small_net()
    model.mean, model.std, model.classes = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1), torch.ones(3), ["a", "b", "c"]
    run = fit(replace(BASE, epochs=2), toy(), toy(30, seed=1), model=model, folder=tmp_path)
    meta = torch.load(tmp_path / "model.pt", weights_only=True)["meta"]
    assert meta == {"mean": [0.5, 0.25, 0.125], "std": [1, 1, 1], "model": "own", "small": False, "size": 16, "classes": ["a", "b", "c"],
                    "config": asdict(run.config), "accuracy": run.log[1]["val_accuracy"]}
    assert run.log[1]["val_accuracy"] != run.log[1]["accuracy"]
    save_weights(run, tmp_path / "other.pt", accuracy=0.5, command="x")
    more = torch.load(tmp_path / "other.pt", weights_only=True)["meta"]
    assert more == meta | {"accuracy": 0.5, "command": "x"}


def test_weights_are_stored_as_float32_and_numbers_of_numpy_as_plain_ones(tmp_path):
    run = make_run(BASE, toy(), None, small_net(), None, torch.device("cpu"))
    run.model.double()
    save_weights(run, tmp_path / "model.pt", scores=np.array([1.5, 2.5]), pair=(np.float32(0.5), [np.int64(3)]))
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {v.dtype for v in stored["state_dict"].values()} == {torch.float32, torch.int64}
    assert stored["meta"]["scores"] == [1.5, 2.5] and stored["meta"]["pair"] == (0.5, [3])


def test_numbers_and_names_of_numpy(tmp_path):
    "As a grid of learning rates and a table of names bring them"
    settings = replace(BASE, model="plain_cnn", epochs=1, lr=np.logspace(-3, -2, 2)[0])
    for _ in range(2):  # the second goes on from the first one's checkpoint
        run = fit(settings, toy(), classes=np.unique(["a", "b", "c"]), folder=tmp_path)
    save_weights(run, tmp_path / "model.pt")
    assert load_model("plain_cnn", tmp_path / "model.pt").classes == ["a", "b", "c"]


def test_a_large_stem_for_small_images(tmp_path):
    "What the file says of the network is what it is, not what another one of this size would be"
    for small in (True, False):
        model = load_model("resnet18", None, 3, small=small)
        run = make_run(replace(BASE, model="resnet18", size=16), toy(), None, model, None, torch.device("cpu"))
        save_weights(run, tmp_path / "model.pt")
        assert load_model("resnet18", tmp_path / "model.pt", 3).network.conv1.kernel_size == ((3, 3) if small else (7, 7))


@pytest.mark.parametrize("damage", [lambda run: run.sums.fill_(math.nan), lambda run: run.model[0].weight.data.fill_(math.inf)])
def test_what_is_not_finite_is_not_stored(tmp_path, damage):
    run = make_run(BASE, toy(), None, small_net(), None, torch.device("cpu"))
    damage(run)
    with pytest.raises(RuntimeError, match="no longer finite after step 0"):
        save_run(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_log_as_text(tmp_path):
    row = dict(zip(COLUMNS, (1, "all", 5, 1 / 7, 0.5, None, None, 1e-9, 12.0), strict=True))
    for log, text in (([], ""), ([row | {"own": 0.25}], "1,all,5,0.142857,0.5,,,1e-09,12,0.25\n")):
        write_log(tmp_path / "log.csv", log)
        assert (tmp_path / "log.csv").read_bytes().decode() == ",".join([*COLUMNS, *["own"] * len(log)]) + "\n" + text


# ------------------------------------------------------------------ tensors


def test_memory(monkeypatch, stopping):
    stopping.at, stopping.error = 0, torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="not enough memory on cpu for a batch of 8 images of 16 pixels: take a smaller batch"):
        fit(replace(BASE, recipe="stopping"), toy(), model=small_net())
    stopping.error = KeyboardInterrupt
    monkeypatch.setattr(tensors, "_free_memory", lambda device: 1_000_000)
    with pytest.raises(RuntimeError, match="1000 images of 64 pixels take 0.0 GB, and 0.0 GB are free on cpu: take a smaller"):
        tensors.check_fits(1000, 64, torch.device("cpu"))
    assert tensors.check_fits(10, 64, torch.device("cpu")) is None


def test_four_fifths_of_the_free_memory(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemFree:           1 kB\nMemAvailable:     1000 kB\nSwapTotal: 0 kB\n")
    monkeypatch.setattr(tensors, "Path", lambda name: tmp_path / Path(name).name)
    assert tensors.check_fits(66, 64, torch.device("cpu")) is None  # 811,008 of 819,200 bytes
    with pytest.raises(RuntimeError, match="67 images of 64 pixels"):
        tensors.check_fits(67, 64, torch.device("cpu"))


def test_chosen_images_of_a_set():
    source = Synthetic("train", n=9, size=32)
    images, labels = to_tensors(source, 32)
    some, their = to_tensors(source, 32, torch.tensor([7, 2]))
    assert torch.equal(some, images[[7, 2]]) and torch.equal(their, labels[[7, 2]]) and labels.dtype == torch.int64
    assert torch.equal(images, (source.batch(range(9)).image * 255).round().byte()) and labels.tolist() == [item.label for item in source]
    large, _ = to_tensors(source, 820, torch.tensor([0, 1]))  # one image is more than is read at a time
    assert large.shape == (2, 3, 820, 820) and (large.float().mean((1, 2, 3)) - images[:2].float().mean((1, 2, 3))).abs().max() < 1


def test_many_images_are_read_by_several_processes(tmp_path, monkeypatch):
    "To the same bytes in the same order; a damaged file is still named"
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 12), (40 * i, 0, 9)).save(tmp_path / "train" / name / f"{i}.png")
    source = load_dataset("imagefolder", "train", root=tmp_path, size=16)
    alone = tensors.to_tensors(source, 16)
    monkeypatch.setattr(tensors, "MANY", 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    asked, streamed = [], tensors.Streamed
    monkeypatch.setattr(tensors, "Streamed", lambda *a, workers: asked.append(workers) or streamed(*a, workers=workers))
    assert all(torch.equal(a, b) for a, b in zip(tensors.to_tensors(source, 16), alone, strict=True))
    assert asked == [2]
    (tmp_path / "train" / "b" / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="3.png"):
        tensors.to_tensors(source, 16)


def test_an_image_to_try_a_model_with():
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 36, 7)).train()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert tensors.black_image(grey, 8).shape == (1, 1, 8, 8) and tensors.black_image(plain, 8).shape == (1, 3, 8, 8)
    assert tensors.outputs_of(grey, 8) == 7 and grey.training and grey[1].num_batches_tracked == 0


def test_data_is_checked_and_made_uniform():
    images, labels = toy(6)
    found = tensors.check_data(images.float() / 255, labels.int(), 16, 3)
    assert found[0].dtype == torch.uint8 and found[1].dtype == torch.int64 and torch.equal(found[0], images) and torch.equal(found[1], labels)
    for wrong, words in (((images[..., :12], labels), "16x12 pixels"), ((images[0], labels), "must be .N, C, H, W."),
                         ((images, labels[:, None]), r"give labels\[:, 0\]"), ((images, labels[:5]), "as many whole numbers"),
                         ((images, torch.tensor([0, 1, 2, 0, 3, 1])), "label 3 of training image 4 is out of range: there are 3 classes, 0 to 2")):
        with pytest.raises(ValueError, match=words):
            tensors.check_data(*wrong, 16, 3)


def test_five_missing_classes_are_all_named():
    with pytest.raises(ValueError, match="no training image shows b, c, d, e, f: add images"):
        tensors.check_classes(torch.tensor([0, 6]), list("abcdefg"))
    with pytest.raises(ValueError, match="no training image shows 6 of 7 classes, among them b, c, d, e, f: add images"):
        tensors.check_classes(torch.tensor([0]), list("abcdefg"))
