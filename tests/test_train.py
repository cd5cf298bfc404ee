"""Training: the schedule, what is learned, what is logged and drawn, and bad input."""
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import BASE, same, small_net, toy
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import googlenet

from xai_companion.data.datasets import load_dataset
from xai_companion.data.loader import epoch_order
from xai_companion.data.synthetic import Synthetic
from xai_companion.explain.contract import assert_untouched, footprint, generators
from xai_companion.train import (
    RECIPES,
    Config,
    Recipe,
    fit,
    learning_curves,
    loop,
    loss_and_accuracy,
)
from xai_companion.train.recipes import CrossEntropy, Views

# ------------------------------------------------------------------ schedule, order


def test_schedule_by_hand():
    rates = [loop.learning_rate(t, 10, 1.0, 0.4) for t in range(10)]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + math.sqrt(3) / 4, 0.75, 0.5, 0.25, 0.5 - math.sqrt(3) / 4]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert [loop.learning_rate(t, 3, 0.3, 0.0) for t in range(3)] == pytest.approx([0.3, 0.225, 0.075])
    assert [loop.learning_rate(t, 2, 0.3, 1.0) for t in range(2)] == pytest.approx([0.15, 0.3])


def test_the_schedule_rounds_its_warm_up():
    assert [loop.learning_rate(t, 19, 1.0, 0.1) for t in range(3)] == pytest.approx([0.5, 1.0, 1.0])  # of 1.9 steps


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


def test_curves_from_a_log_and_from_its_file(tmp_path):
    log = fit(BASE, toy(), model=small_net(), folder=tmp_path).log
    for source in (log, pd.read_csv(tmp_path / "log.csv")):
        axes = learning_curves(source).axes
        assert [ax.get_ylabel() for ax in axes] == ["loss", "accuracy (%)"] and [len(ax.lines) for ax in axes] == [1, 1]
    with pytest.raises(ValueError, match="no epoch has ended"):
        learning_curves([])


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


def test_a_stage_that_was_compiled_before_stays_compiled():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(4, 2))
    model[1].compile()
    before = model[1]._compiled_call_impl
    with loop.compiling(model):
        assert all(model[i]._compiled_call_impl not in (None, before) for i in (0, 1))
    assert model[0]._compiled_call_impl is None and model[1]._compiled_call_impl is before


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


@pytest.mark.parametrize("model, kind, words", [
    (small_net().requires_grad_(False), ValueError, "all parameters of the model are frozen"),
    (small_net().bfloat16(), TypeError, r"parameters of torch.bfloat16: train model.float\(\)"),
    (lambda: googlenet(num_classes=3, init_weights=False), ValueError, "aux_logits=False"),
])
def test_models_that_do_not_learn(model, kind, words):
    model = model if isinstance(model, nn.Module) else model()
    with pytest.raises(kind, match=words):
        fit(BASE, toy(), model=model, classes=["a", "b", "c"])


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


def test_validation_images_of_other_classes(tmp_path):
    for split, classes in (("train", "abc"), ("val", "ac")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    train, val = (load_dataset("imagefolder", split, root=tmp_path, size=16) for split in ("train", "val"))
    with pytest.raises(ValueError, match="validation images have other classes than the training images: a, c beside a, b, c"):
        fit(replace(BASE, model="plain_cnn"), train, val)


@pytest.mark.parametrize("make, kind", [
    (lambda x, y: torch.utils.data.TensorDataset(x, y), "TensorDataset"), (lambda x, y: [*zip(x, y, strict=True)], "list"),
    (lambda x, y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)), "DataLoader"),
    (lambda x, y: (x.numpy(), y), "tuple of ndarray and Tensor")])
def test_images_of_another_kind(make, kind):
    "The habits of PyTorch get a sentence that says what is taken"
    images, labels = torch.zeros(12, 3, 16, 16).byte(), torch.arange(12) % 3
    for train, val in ((make(images, labels), None), ((images, labels), make(images, labels))):
        with pytest.raises(TypeError, match=f"not a {kind}: data.items.Pairs.* ImageSet"):
            fit(Config(size=16), train, val)


@pytest.mark.parametrize("recipe", ["ce", "supcon"])
def test_workers_start_once_for_all_passes(recipe, monkeypatch):
    "Processes that read go on from epoch to epoch, and end with the run"
    from torch.utils.data import dataloader
    started = []
    make = dataloader.DataLoader.__iter__
    monkeypatch.setattr(dataloader.DataLoader, "__iter__", lambda self: started.append(self.num_workers) or make(self))
    whole, streamed = (fit(Config(recipe, "plain_cnn", size=32, epochs=2, batch=8), Synthetic("train", n=24, size=32), workers=workers)
                       for workers in (None, 1))
    assert started.count(1) == 1 and streamed.stream is None
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), streamed.model.state_dict().values(), strict=True))


def test_workers_read_sets_and_not_tensors():
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 2
    with pytest.raises(ValueError, match="tensors are in memory already"):
        fit(Config(model="plain_cnn", size=16, epochs=1, batch=4), (images, labels), workers=2)


def test_a_model_with_too_few_outputs():
    for config, outputs in ((BASE, 2), (replace(BASE, recipe="edda", options={"drop_target": "extra"}), 3)):
        with pytest.raises(ValueError, match=f"the model has {outputs} outputs, and the images 3 classes.*give it a classifier"):
            fit(config, toy(), model=small_net(outputs), classes=["a", "b", "c"])


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


def test_a_batch_of_one_without_batch_norm_is_fine():
    run = fit(replace(BASE, epochs=1, batch=1), toy(6), model=nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    assert run.done == 6


@pytest.mark.parametrize("wrong", [dict(recipe="nothing"), dict(epochs=0), dict(epochs=1.5), dict(batch=0), dict(lr=0.0), dict(lr=-1.0),
                                   dict(lr=math.nan), dict(warmup=1.5), dict(smoothing=-0.1), dict(optimizer="adam"),
                                   dict(dtype="half"), dict(pad=17), dict(seen=0), dict(weight_decay=-1.0),
                                   dict(lr="0.1"), dict(pad=1.5), dict(seed=1.5), dict(seed=-1), dict(seed=True), dict(flip="no")])
def test_bad_config(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(BASE, **wrong)


