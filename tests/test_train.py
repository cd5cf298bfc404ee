"""Training: what the loop promises (the same bits after SIGKILL, whole files, clear errors), and the two packaged networks."""
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import QUIET, ROOT, command, parsed, same
from PIL import Image
from torch import nn
from torch.nn import functional as F

from xai_companion.data.datasets import load_dataset
from xai_companion.data.loader import epoch_order
from xai_companion.data.synthetic import Synthetic
from xai_companion.explain.contract import assert_untouched, footprint, generators
from xai_companion.models import conv_blocks, load_model
from xai_companion.networks import TRAINED
from xai_companion.train import (
    RECIPES,
    Config,
    Recipe,
    checkpoint,
    fit,
    learning_curves,
    loop,
    loss_and_accuracy,
    read_checkpoint,
    tensors,
    to_tensors,
)
from xai_companion.train.checkpoint import save_run, save_weights
from xai_companion.train.files import COLUMNS, alone, write_log, write_whole
from xai_companion.train.loop import make_run
from xai_companion.train.recipes import CrossEntropy, Views


def toy(count=40, classes=3, size=16, seed=0):
    "Noise whose brightest channel is the class"
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 180, (count, 3, size, size), generator=generator)
    labels = torch.arange(count) % classes
    images[torch.arange(count), labels] += 75
    return images.byte(), labels


def small_net(classes=3, seed=0):
    "Convolution, batch norm, dropout, linear"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                             nn.Dropout(0.3), nn.Linear(24, classes))


BASE = Config(model="own", size=16, epochs=4, batch=8, lr=0.05)


def without_seconds(log):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


# ------------------------------------------------------------------ schedule, order


def test_schedule_by_hand():
    rates = [loop.learning_rate(t, 10, 1.0, 0.4) for t in range(10)]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + math.sqrt(3) / 4, 0.75, 0.5, 0.25, 0.5 - math.sqrt(3) / 4]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert [loop.learning_rate(t, 3, 0.3, 0.0) for t in range(3)] == pytest.approx([0.3, 0.225, 0.075])
    assert [loop.learning_rate(t, 2, 0.3, 1.0) for t in range(2)] == pytest.approx([0.15, 0.3])


def test_the_optimizer_gets_the_schedule(tmp_path):
    run = fit(replace(BASE, warmup=0.5), toy(), model=small_net(), folder=tmp_path)
    assert [row["lr"] for row in run.log] == pytest.approx([loop.learning_rate(t, 20, 0.05, 0.5) for t in (4, 9, 14, 19)])
    assert [row["step"] for row in run.log] == [5, 10, 15, 20] and [row["epoch"] for row in run.log] == [1, 2, 3, 4]


def test_every_epoch_shows_every_image_once_in_another_order():
    seen = []

    class Watching(CrossEntropy):
        def views(self, model, batch, moment, generator):
            seen.extend(batch.images[:, 0, 0, 0].tolist())
            assert torch.equal(images[batch.index], batch.images) and torch.equal(labels[batch.index], batch.labels)
            return super().views(model, batch, moment, generator)
    images, labels = toy(24)
    images[:, 0, 0, 0] = torch.arange(24)
    run = loop.make_run(replace(BASE, epochs=2, batch=6), (images, labels), None, small_net(), None, torch.device("cpu"))
    run.recipe = Watching(run.config)
    for _ in range(run.steps):
        run.step()
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24)) and seen[:24] != seen[24:]


def test_length_in_images_seen():
    run = fit(replace(BASE, seen=100), toy(), model=small_net())
    assert run.done == 13 and [row["step"] for row in run.log] == [5, 10, 13]


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("model, optimizer, lr", [("plain_cnn", "sgd", 0.05), ("residual_cnn", "adamw", 0.003)])
def test_overfits_a_tiny_set(model, optimizer, lr):
    "Random labels on noise can only be learned by heart"
    images = torch.randint(256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(16) % 4
    config = Config(model=model, size=16, epochs=60, batch=16, lr=lr, optimizer=optimizer, pad=0, flip=False, weight_decay=0.)
    run = fit(config, (images, labels))
    assert loss_and_accuracy(run.model, images, labels)[1] == 1 and run.log[-1]["loss"] < 0.1 < 1 < run.log[0]["loss"]
    assert not any(module.training for module in run.model.modules())


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(optimizer="adamw", lr=0.01), dict(smoothing=0.1)])
def test_options_train(options):
    run = fit(replace(BASE, epochs=12, **options), toy(), toy(30, seed=1), model=small_net())
    assert run.log[-1]["val_accuracy"] > 0.9
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_evaluation_is_the_plain_one():
    model, (images, labels) = small_net().train(), toy(30)
    before = footprint(model, images)
    loss, accuracy = loss_and_accuracy(model, images, labels, batch=7)
    assert_untouched(before, footprint(model, images), "after an evaluation")
    logits = model.eval()(images.float() / 255)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).sum().item() / 30


def test_nothing_outside_is_touched():
    states = generators()
    train, val = toy(), toy(12, seed=1)
    kept = [t.clone() for t in (*train, *val)]
    fit(replace(BASE, epochs=2), train, val, model=small_net())
    assert generators() == states
    assert all(torch.equal(a, b) for a, b in zip((*train, *val), kept, strict=True))


def test_the_seed_decides():
    runs = [fit(replace(BASE, model="plain_cnn", epochs=1, seed=seed), toy()).model for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    torch.rand(7)
    assert same(runs[0], fit(replace(BASE, model="plain_cnn", epochs=1), toy()).model)


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
from test_train import BASE, small_net, toy
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


def test_no_bit_of_a_checkpoint_needs_pickle(tmp_path):
    fit(BASE, toy(), model=small_net(), folder=tmp_path)
    stored = read_checkpoint(tmp_path / "checkpoint.pt")
    assert stored["config"] == asdict(BASE) and stored["done"] == 20 and stored["meta"]["size"] == 16


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


def test_drafts_of_several_writers_do_not_meet(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_whole(tmp_path / "file", bytes([i]) * 10_000), range(200)))
    assert len(set((tmp_path / "file").read_bytes())) == 1 and [f.name for f in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------ a full disk, damaged files, other runs


def test_full_disk(tmp_path, undisturbed):
    "The system refuses to write more than a kilobyte; the checkpoint of before stays, and later the run goes on"
    process = start(tmp_path / "full")
    checkpoint = tmp_path / "full" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    process.kill()
    process.wait(60)
    before = checkpoint.read_bytes()

    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    process = start(tmp_path / "full", preexec_fn=limit)
    message = process.communicate(timeout=120)[1]
    assert process.returncode and "could not be written" in message and "the file of before is intact" in message
    assert checkpoint.read_bytes() == before and read_checkpoint(checkpoint)["done"] >= 1
    assert start(tmp_path / "full").wait(120) == 0
    files = undisturbed / "model.pt", tmp_path / "full" / "model.pt"
    a, b = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a" / "b.txt", b"one")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RuntimeError, match="b.txt could not be written.*No space left.*intact"):
        write_whole(tmp_path / "a" / "b.txt", b"two")
    assert [f.read_bytes() for f in (tmp_path / "a").iterdir()] == [b"one"]


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


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b"PK" + b[40:], lambda b: b"text"])
def test_damaged_checkpoint(tmp_path, damage):
    fit(replace(BASE, epochs=1), toy(), model=small_net(), folder=tmp_path)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="checkpoint.pt is damaged.*--fresh"):
        fit(replace(BASE, epochs=1), toy(), model=small_net(), folder=tmp_path)


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


# ------------------------------------------------------------------ bad input


def nan_image():
    images, labels = toy()
    images = images.float() / 255
    images[7, 1, 2, 3] = torch.nan
    return images, labels


@pytest.mark.parametrize("data, options, words", [
    (nan_image, {}, "NaN"),
    (lambda: (toy()[0].float(), toy()[1]), {}, r"must lie in \[0, 1\]"),
    (lambda: (toy()[0], toy()[1] + 1), {}, "label 3 of training image 2 is out of range: there are 3 classes"),
    (lambda: (toy()[0], toy()[1] - 1), {}, "label -1 of training image 0"),
    (lambda: (toy()[0], toy()[1] * 0), {}, "all 40 training images have the class 0"),
    (lambda: (toy()[0], toy()[1].float()), {}, "whole numbers"),
    (lambda: (toy()[0], toy()[1][:5]), {}, "40 training images need"),
    (lambda: (toy()[0][:0], toy()[1][:0]), {}, "N of at least 1"),
    (lambda: toy(size=20), {}, "20x20 pixels, the config says 16"),
    (toy, dict(batch=1), "batch of one"),
])
def test_bad_data(tmp_path, data, options, words):
    with pytest.raises(ValueError, match=words):
        fit(replace(BASE, **options), data(), model=small_net(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels, classes, words", [
    ([0, 2, 0, 2], ["cat", "unicorn", "dog"], "no training image shows unicorn: add images"),
    ([0, 1, 0, 1], [str(k) for k in range(20)], "no training image shows 18 of 20 classes, among them 2, 3, 4, 5, 6: add"),
])
def test_classes_without_images(labels, classes, words):
    with pytest.raises(ValueError, match=words):
        fit(replace(BASE, model="plain_cnn"), (toy(4)[0], torch.tensor(labels)), classes=classes)


def test_bad_validation_data():
    with pytest.raises(ValueError, match="label 3 of validation image 0"):
        fit(BASE, toy(), (toy()[0], toy()[1] + 3), model=small_net())


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


def test_validation_images_of_other_classes(tmp_path):
    for split, classes in (("train", "abc"), ("val", "ac")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    train, val = (load_dataset("imagefolder", split, root=tmp_path, size=16) for split in ("train", "val"))
    with pytest.raises(ValueError, match="validation images have other classes than the training images: a, c beside a, b, c"):
        fit(replace(BASE, model="plain_cnn"), train, val)


def test_a_batch_of_one_without_batch_norm_is_fine():
    run = fit(replace(BASE, epochs=1, batch=1), toy(6), model=nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    assert run.done == 6


@pytest.mark.parametrize("wrong", [dict(recipe="nothing"), dict(epochs=0), dict(epochs=1.5), dict(batch=0), dict(lr=0.0), dict(lr=-1.0),
                                   dict(lr=math.nan), dict(warmup=1.5), dict(smoothing=-0.1), dict(optimizer="adam"),
                                   dict(dtype="half"), dict(pad=17), dict(seen=0), dict(weight_decay=-1.0),
                                   dict(lr="0.1"), dict(pad=1.5), dict(seed=1.5), dict(flip="no")])
def test_bad_config(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(BASE, **wrong)


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


def test_memory(monkeypatch, stopping):
    stopping.at, stopping.error = 0, torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="not enough memory on cpu for a batch of 8 images of 16 pixels: take a smaller batch"):
        fit(replace(BASE, recipe="stopping"), toy(), model=small_net())
    stopping.error = KeyboardInterrupt
    monkeypatch.setattr(tensors, "_free_memory", lambda device: 1_000_000)
    with pytest.raises(RuntimeError, match="1000 images of 64 pixels take 0.0 GB, and 0.0 GB are free on cpu: take a smaller"):
        tensors.check_fits(1000, 64, torch.device("cpu"))
    assert tensors.check_fits(10, 64, torch.device("cpu")) is None


# ------------------------------------------------------------------ the command


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


def test_weights_for_a_recipe_with_one_class_more(photos, tmp_path):
    assert run("--data", photos / "plain", *SHORT, "--epochs", 1, "--out", tmp_path) == 0
    [file] = tmp_path.rglob("model.pt")
    assert run("--data", photos / "plain", *SHORT, "--epochs", 1, "--out", tmp_path / "more", "--weights", file, "--recipe", "edda",
               "--set", "drop_target=extra", "--set", "start=0.0") == 0
    [file] = (tmp_path / "more").rglob("model.pt")
    assert load_model("plain_cnn", file).classes == ["bright", "dark", "nothing"]


def test_a_model_with_too_few_outputs():
    for config, outputs in ((BASE, 2), (replace(BASE, recipe="edda", options={"drop_target": "extra"}), 3)):
        with pytest.raises(ValueError, match=f"the model has {outputs} outputs, and the images 3 classes.*give it a classifier"):
            fit(config, toy(), model=small_net(outputs), classes=["a", "b", "c"])


@pytest.mark.parametrize("seed", range(10))
def test_every_class_keeps_images_to_learn_from(seed):
    "Folders of 10, 10 and 1 images, and of 40, 20 and 2: the parts, and the beginnings of a part"
    from xai_companion.commands.train import _mixed, _split_off
    for counts, learned in (((10, 10, 1), {(8, 7, 1), (7, 8, 1)}), ((40, 20, 2), {(32, 16, 2), (31, 16, 2)})):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        images = torch.arange(len(labels))
        (train, of_train), (val, of_val) = _split_off(images, labels, seed)
        assert sorted([*train.tolist(), *val.tolist()]) == images.tolist() and torch.equal(labels[train], of_train)
        assert torch.equal(labels[val], of_val) and tuple(of_train.bincount(minlength=3).tolist()) in learned
        again, other = _split_off(images, labels, seed), _split_off(images, labels, seed + 1)
        assert torch.equal(again[0][0], train) and not torch.equal(other[0][0], train)
        order = labels[_mixed(labels, seed)]
        assert len(order[:3].unique()) == 3 and (order[:len(order) // 2].bincount() - torch.tensor(counts) / 2).abs().max() <= 1
    with pytest.raises(ValueError, match="one image of each class"):
        _split_off(torch.arange(3), torch.arange(3), seed)


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


def test_command_with_a_recipe_and_its_options(photos, tmp_path, capsys):
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


def test_command_reads_batch_by_batch(photos, tmp_path):
    words = ("--data", photos / "parts", *SHORT, "--epochs", 2)
    assert run(*words, "--out", tmp_path / "whole") == 0 and run(*words, "--workers", 0, "--out", tmp_path / "stream") == 0
    models = [load_model("plain_cnn", next((tmp_path / part).rglob("model.pt"))) for part in ("whole", "stream")]
    assert same(*models)
    with pytest.raises(ValueError, match="need a val folder"):
        run("--debug", "--data", photos / "plain", *SHORT, "--workers", 0, "--out", tmp_path / "none")


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


@pytest.mark.parametrize("words, error, says", [
    (["--data", "nowhere"], ValueError, "nowhere"),
    (["--lr", 0], ValueError, "lr must"),
    (["--batch", 1], ValueError, "batch of one"),
    (["--model", "plain_cn"], ValueError, "plain_cnn"),
    (["--device", "cuda:99"], RuntimeError, "cuda:99"),
    (["--size", 0], ValueError, "size must"),
])
def test_mistakes_on_the_command_line(photos, tmp_path, words, error, says):
    with pytest.raises(error, match=says):
        run("--debug", "--data", photos / "plain", *SHORT, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_one_class_and_other_classes(photos, tmp_path):
    from torchvision.utils import save_image
    for part, kind in (("one", "a"), ("two/train", "a"), ("two/train", "b"), ("two/val", "a"), ("two/val", "c")):
        (tmp_path / part / kind).mkdir(parents=True)
        for i in range(4):
            save_image(torch.full((3, 16, 16), 0.1 * i), tmp_path / part / kind / f"{i}.png")
    with pytest.raises(ValueError, match="two classes or more"):
        run("--debug", "--data", tmp_path / "one", *SHORT, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="the classes of the parts differ"):
        run("--debug", "--data", tmp_path / "two", *SHORT, "--out", tmp_path / "out")


def test_several_classes_per_image(monkeypatch, tmp_path):
    from xai_companion.data.items import ImageSet

    class Street(ImageSet):
        name, multi_label, classes = "street", True, ["car", "bus"]
    monkeypatch.setattr("xai_companion.data.datasets.load_dataset", lambda *arguments, **options: Street())
    with pytest.raises(ValueError, match="street has several classes per image"):
        run("--debug", "--data", "voc2012", *SHORT, "--out", tmp_path / "out")


def test_too_many_images_for_the_memory(monkeypatch, photos, tmp_path):
    monkeypatch.setattr(tensors, "_free_memory", lambda device: 1000)
    with pytest.raises(RuntimeError, match="30 images of 16 pixels.*take a smaller size or fewer images"):
        run("--debug", "--data", photos / "plain", *SHORT, "--out", tmp_path / "out")


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


# ------------------------------------------------------------------ the packaged networks


@pytest.mark.parametrize("name", TRAINED)
def test_packaged_network(name):
    from xai_companion.data.synthetic import CLASSES, Synthetic
    model = load_model(name)
    assert model.classes == CLASSES and model.input_size == 64 and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), load_model(name, "pretrained", 20).state_dict().values(),
                                                 strict=True))
    images, labels = to_tensors(Synthetic("test", n=200), 64)
    assert loss_and_accuracy(model, images, labels)[1] >= 0.9
    assert [len(conv_blocks(model, size)) for size in (64, 32)] == [3, 3]


@pytest.mark.parametrize("name", TRAINED)
def test_packaged_file(name):
    import xai_companion
    file = Path(xai_companion.__file__).parent / "weights" / f"{name}.pt"
    stored = torch.load(file, weights_only=True)
    assert file.stat().st_size < 1_000_000 and set(stored) == {"state_dict", "meta"}
    assert all(t.dtype == torch.float32 or t.dtype == torch.int64 for t in stored["state_dict"].values())
    assert 0.9 <= stored["meta"]["test_accuracy"] < 1 and stored["meta"]["model"] == name
    assert "/" not in stored["meta"]["command"] and " train n=10000 size=64 seed=0" in stored["meta"]["config"]["fingerprint"]


def test_the_weights_are_package_data():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "weights/*.pt" in project["tool"]["setuptools"]["package-data"]["xai_companion"]


@pytest.mark.parametrize("options, words", [
    (dict(weights="imagenet"), "no weights called 'imagenet': use 'pretrained'"),
    (dict(num_classes=10), "20 classes, not 10"),
    (dict(weights="IMAGENET1K_V1"), "no weights called"),
])
def test_wishes_that_the_packaged_networks_cannot_fulfil(options, words):
    with pytest.raises(ValueError, match=words):
        load_model("plain_cnn", **options)


def test_random_weights_of_small_networks():
    for name in TRAINED:
        model = load_model(name, weights=None, num_classes=7)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7) and model.classes is None
        assert load_model(name, weights=None).fc.out_features == 20
        assert sum(t.numel() * 4 for t in model.parameters()) < 1_000_000


def test_curves_from_a_log_and_from_its_file(tmp_path):
    log = fit(BASE, toy(), model=small_net(), folder=tmp_path).log
    for source in (log, pd.read_csv(tmp_path / "log.csv")):
        axes = learning_curves(source).axes
        assert [ax.get_ylabel() for ax in axes] == ["loss", "accuracy (%)"] and [len(ax.lines) for ax in axes] == [1, 1]
    with pytest.raises(ValueError, match="no epoch has ended"):
        learning_curves([])


def test_a_recipe_of_ones_own(monkeypatch):
    monkeypatch.setattr("xai_companion.train.recipes.RECIPES", dict(RECIPES))

    class Clean(Recipe, name="clean"):
        "No augmentation, two views, no accuracy"
        def views(self, model, batch, moment, generator):
            assert model.training and batch.images.dtype == torch.uint8
            return Views(torch.cat([batch.images, batch.images]).float() / 255, batch.labels)

        def loss(self, model, views, moment):
            return F.cross_entropy(model(views.images), views.labels.repeat(2)), None
    run = fit(replace(BASE, recipe="clean"), toy(), toy(), model=small_net())
    assert run.log[-1]["accuracy"] == 0 and run.log[-1]["val_accuracy"] > 0.5


class HeadFirst(nn.Module):
    "Its classifier is registered first; the last linear layer is that of a gate"
    def __init__(self):
        super().__init__()
        self.head, self.conv, self.gate = nn.Linear(16, 3), nn.Conv2d(3, 16, 3), nn.Linear(16, 16)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.head(x * self.gate(x).sigmoid())


def test_contrastive_training_needs_the_classifier_last():
    "Taken for the classifier, the gate would be trained in the place of the head"
    config = Config(recipe="supcon", size=16, epochs=1, batch=6)
    with pytest.raises(ValueError, match="'gate', and that layer does not give the model's logits"):
        fit(config, (torch.zeros(12, 3, 16, 16).byte(), torch.arange(12) % 3), model=HeadFirst())


@pytest.mark.parametrize("make, kind", [
    (lambda x, y: torch.utils.data.TensorDataset(x, y), "TensorDataset"), (lambda x, y: [*zip(x, y, strict=True)], "list"),
    (lambda x, y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)), "DataLoader"),
    (lambda x, y: (x.numpy(), y), "tuple of ndarray and Tensor")])
def test_images_of_another_kind(make, kind):
    "The habits of PyTorch get a sentence that says what is taken"
    images, labels = torch.zeros(12, 3, 16, 16).byte(), torch.arange(12) % 3
    for train, val in ((make(images, labels), None), ((images, labels), make(images, labels))):
        with pytest.raises(TypeError, match=f"not a {kind}: stack .* ImageSet"):
            fit(Config(size=16), train, val)


def test_workers_read_sets_and_not_tensors():
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 2
    with pytest.raises(ValueError, match="tensors are in memory already"):
        fit(Config(model="plain_cnn", size=16, epochs=1, batch=4), (images, labels), workers=2)


# ------------------------------------------------------------------ the loop by hand


def test_the_schedule_rounds_its_warm_up():
    assert [loop.learning_rate(t, 19, 1.0, 0.1) for t in range(3)] == pytest.approx([0.5, 1.0, 1.0])  # of 1.9 steps


def test_passes_by_hand():
    "Five steps of two parts where an epoch has two: the last epoch has one"
    found = [(p.part, p.epoch, p.first, p.stop) for p in loop.plan_passes(("a", "b"), 5, 2)]
    assert found == [("a", 0, 0, 2), ("b", 0, 2, 4), ("a", 1, 4, 6), ("b", 1, 6, 8), ("a", 2, 8, 9), ("b", 2, 9, 10)]
    staged = [(p.part, p.epoch, p.first, p.stop) for p in loop.plan_passes(("a", "b"), 5, 2, staged=True)]
    assert staged == [("a", 0, 0, 2), ("a", 1, 2, 4), ("a", 2, 4, 5), ("b", 0, 5, 7), ("b", 1, 7, 9), ("b", 2, 9, 10)]


@pytest.mark.parametrize("name, kind, momentum, nesterov", [
    ("sgd", "SGD", 0.9, True), ("sgd_classical", "SGD", 0.9, False), ("adamw", "AdamW", None, None)])
def test_the_optimizers(name, kind, momentum, nesterov):
    made = loop.make_optimizer([nn.Parameter(torch.zeros(1))], replace(BASE, optimizer=name, lr=0.3, weight_decay=0.02))
    [group] = made.param_groups
    assert type(made).__name__ == kind and (group["lr"], group["weight_decay"]) == (0.3, 0.02)
    assert (group.get("momentum"), group.get("nesterov")) == (momentum, nesterov)


def test_the_log_of_a_network_that_stands_still(monkeypatch):
    "Means over the images of an epoch; of 43 images five batches of 8 are taken, and of the third epoch three"
    monkeypatch.setattr("xai_companion.train.recipes.RECIPES", dict(RECIPES))

    class Still(Recipe, name="still"):
        "No augmentation, and the mean of the labels as a note"
        notes = ("mean label",)

        def views(self, model, batch, moment, generator):
            return Views(batch.images.float() / 255, batch.labels, notes=(batch.labels.float().mean(),))

        def loss(self, model, views, moment):
            logits = model(views.images)
            return F.cross_entropy(logits, views.labels), logits
    (images, labels), model = toy(43), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    run = fit(replace(BASE, recipe="still", seen=100, lr=1e-12, weight_decay=0.0), (images, labels), model=model)
    assert run.per_epoch == 5 and [row["step"] for row in run.log] == [5, 10, 13]
    for epoch, (row, count) in enumerate(zip(run.log, (40, 40, 24), strict=True)):
        some = epoch_order(43, BASE.seed, epoch)[:count]
        logits = model(images[some].float() / 255)
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, labels[some]).item(), rel=1e-4) and row["epoch"] == epoch + 1
        assert row["accuracy"] == pytest.approx((logits.argmax(1) == labels[some]).float().mean().item(), abs=1e-6)
        assert row["mean label"] == pytest.approx(labels[some].float().mean().item(), abs=1e-6)


# ------------------------------------------------------------------ what is written, by hand


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


def test_the_curves_of_two_parts():
    "The loss of the first part, and the accuracy of the last one in percent; what was not measured is not drawn"
    log = [{"epoch": epoch, "part": part, "loss": loss, "accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val}
           for epoch in (1, 2) for part, loss, accuracy, val_loss, val in (
               ("encoder", 3.0 / epoch, 0.1, None, None), ("classifier", 9.0, 0.3 * epoch, 8.0, 0.25 * epoch))]
    loss, accuracy = learning_curves(log).axes
    assert [(line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in loss.lines] == [("training", [1, 2], [3.0, 1.5])]
    assert [line.get_label() for line in accuracy.lines] == ["training", "validation"]
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [pytest.approx([30, 60]), pytest.approx([25, 50])]
    assert loss.get_legend() is not None and all(float(tick).is_integer() for tick in loss.get_xticks())


def test_a_checkpoint_of_another_version(tmp_path):
    torch.save({"format": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged, or no checkpoint of a run"):
        read_checkpoint(tmp_path / "checkpoint.pt")


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


def test_weights_are_stored_as_float32_and_numbers_of_numpy_as_plain_ones(tmp_path):
    run = make_run(BASE, toy(), None, small_net(), None, torch.device("cpu"))
    run.model.double()
    save_weights(run, tmp_path / "model.pt", scores=np.array([1.5, 2.5]), pair=(np.float32(0.5), [np.int64(3)]))
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {v.dtype for v in stored["state_dict"].values()} == {torch.float32, torch.int64}
    assert stored["meta"]["scores"] == [1.5, 2.5] and stored["meta"]["pair"] == (0.5, [3])


# ------------------------------------------------------------------ tensors, by hand


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
                         ((images, labels[:, None]), "as many whole numbers"),
                         ((images, torch.tensor([0, 1, 2, 0, 3, 1])), "label 3 of training image 4 is out of range: there are 3 classes, 0 to 2")):
        with pytest.raises(ValueError, match=words):
            tensors.check_data(*wrong, 16, 3)


def test_five_missing_classes_are_all_named():
    with pytest.raises(ValueError, match="no training image shows b, c, d, e, f: add images"):
        tensors.check_classes(torch.tensor([0, 6]), list("abcdefg"))
    with pytest.raises(ValueError, match="no training image shows 6 of 7 classes, among them b, c, d, e, f: add images"):
        tensors.check_classes(torch.tensor([0]), list("abcdefg"))


# ------------------------------------------------------------------ the command, without training


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


def test_which_images_the_command_asks_for(photos, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(*arguments):
        raise Asked(*arguments)
    monkeypatch.setattr("xai_companion.commands.train.read_data", asked)
    for words, wanted in (((), ("synthetic", None, 64, None, 0, False, False)),
                          (("--data", "cifar10", "--root", "r", "--size", 32, "--n", 9, "--seed", 3, "--test", "--workers", 0),
                           ("cifar10", "r", 32, 9, 3, True, True)),
                          (("--config", "ce_cifar100", "--smoke"), ("cifar100", None, 32, 256, 0, False, False))):
        with pytest.raises(Asked) as found:
            run(*words, "--device", "cpu", "--out", tmp_path)
        assert found.value.args == wanted


def test_the_seed_chooses_the_images(photos):
    from xai_companion.commands.train import read_data
    first, again, other, whole = (read_data(str(photos / "plain"), None, 16, count, seed) for count, seed in ((8, 0), (8, 0), (8, 1), (24, 0)))
    assert torch.equal(first["train"][0], again["train"][0]) and not torch.equal(first["val"][0], other["val"][0])
    assert not torch.equal(first["train"][0], other["train"][0]) and first["train"][1].bincount().tolist() == [4, 4]
    assert first["fingerprint"].endswith(", 8 used, by class")
    assert len(whole["train"][1]) == 24 and whole["fingerprint"].endswith(", 24 used, by class")
    with_val = [read_data(str(photos / "parts"), None, 16, 8, seed) for seed in (0, 1)]  # nothing is split off
    assert torch.equal(with_val[0]["val"][0], with_val[1]["val"][0]) and not torch.equal(with_val[0]["train"][0], with_val[1]["train"][0])
