"""Explainers, metrics and training on a device that is not the CPU: a pretended one, see `pretended`. With XAI_COMPANION_DEVICE=cuda
in the environment it is that one, and what only the pretended one can show is skipped."""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pretended import AVAILABLE, pretending, waits

from xai_companion.audit import audit
from xai_companion.core import pick_device
from xai_companion.data.augment import AUGMENTATIONS, augmented
from xai_companion.data.loader import Streamed
from xai_companion.data.synthetic import Synthetic
from xai_companion.evaluate import evaluate
from xai_companion.experiments import (
    calibration_scores,
    creatures_lab,
    explanation_scores,
    neighbour_scores,
    robustness_scores,
)
from xai_companion.explain import EXPLAINERS, RISE, GradCAM, explain, get_explainer
from xai_companion.explain.contract import same, trap_images, trap_network
from xai_companion.metrics import METRICS
from xai_companion.models import load_model
from xai_companion.train.checkpoint import save_run
from xai_companion.train.loop import fit, make_run
from xai_companion.train.recipes import RECIPES, Config

REAL = os.environ.get("XAI_COMPANION_DEVICE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums in one order; read when CUDA starts
SHORT = {"rise": {"n_masks": 20}, "integrated_gradcam": {"steps": 4}, "shapley": {"samples": 1, "cells": 3}, "extremal": {"steps": 3},
         "smoothgrad": {"samples": 2}, "integrated_gradients": {"steps": 4}, "occlusion": {"cells": 3}}


@pytest.fixture
def pretended():
    if REAL or not AVAILABLE:
        pytest.skip("a real device was named" if REAL else "this torch cannot pretend a device")
    with pretending() as device:
        yield device


@pytest.fixture
def device(request):
    return pick_device(REAL) if REAL else request.getfixturevalue("pretended")


@pytest.fixture(scope="module")
def images():
    return Synthetic("test", n=4, size=32).batch(range(4)).image


@pytest.fixture(scope="module")
def training():
    labels = torch.arange(16) % 4
    return torch.randint(256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte(), labels


def config(recipe, **changes):
    "Two epochs of two steps, with explanations from the first step"
    options = {"start": 0.0} if "start" in RECIPES[recipe].options else {}
    return Config(recipe=recipe, model="plain_cnn", size=32, batch=8, epochs=2, dtype="float32", options=options | changes)


def test_each_process_has_its_own_gpu(monkeypatch):
    "Under torchrun `cuda` is the GPU of the process; a GPU that is named is that one"
    monkeypatch.setattr(torch, "empty", lambda *size, device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    assert pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == pick_device() == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0) and pick_device("cpu") == torch.device("cpu")
    assert [str(device) for device in asked] == ["cuda", "cuda:1", "cuda:1", "cuda:0", "cpu"]


# ---- the device itself --------------------------------------------------------------------------------------------
def test_it_refuses_what_cuda_refuses(pretended):
    here, there = torch.ones(3), torch.ones(3, device=pretended)
    for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: torch.where(there > 0, here, 0.0), lambda: here[there > 0],
                lambda: torch.nn.functional.cross_entropy(there[None], torch.tensor([1])), lambda: there.index_select(0, torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="same device|different"):
            mix()
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2] and there[torch.tensor([0, 2])].device == pretended


def test_it_counts_what_waits(pretended):
    there = torch.rand(8, device=pretended)
    def waited(act):
        waits.clear()
        act()
        return +waits
    assert waited(lambda: there.sum() * 2) == Counter()
    assert waited(lambda: there.sum().item()) == waited(lambda: bool(there.sum() > 0)) == Counter({"numbers read": 1})
    assert waited(lambda: there.tolist()) == waited(lambda: there.cpu()) == Counter({"transfers to the CPU": 1})
    assert waited(lambda: there[there > 0.5]) == waited(lambda: there.nonzero()) == Counter({"sizes": 1})
    assert waited(lambda: torch.rand(8).to(pretended)) == waited(lambda: torch.tensor([1.0], device=pretended)) == Counter({"transfers to the device": 1})
    assert waited(lambda: torch.rand(8).to(pretended, non_blocking=True)) == Counter()


# ---- explainers and metrics ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(EXPLAINERS))
def test_explainer(device, images, name):
    "The maps of the CPU, with the classes on the device, on the CPU, or chosen by the network"
    model, options, target = load_model("plain_cnn"), SHORT.get(name, {}), [1, 5, 2, 0]
    wanted = explain(model, images, name, target, **options)
    explainer, there = get_explainer(name)(model.to(device), **options), images.to(device)
    for given in (torch.tensor(target, device=device), torch.tensor(target)):
        maps = explainer.attribute(there, given)
        assert maps.device == device
        if REAL:  # other kernels, other rounding: a pixel at a threshold may change sides
            assert same(maps.cpu(), wanted)
        else:
            torch.testing.assert_close(maps.cpu(), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)
    assert explainer.attribute(there).device == device


def test_no_explainer_fetches_numbers_in_its_loop(pretended, images):
    "Twice the masks, steps or images: the CPU waits as often as before, up to the chunks"
    model, there = load_model("plain_cnn").to(pretended), images.to(pretended)
    for name, option in (("rise", "n_masks"), ("integrated_gradcam", "steps"), ("extremal", "steps")):
        counts = []
        for size in (4, 8):
            explainer = get_explainer(name)(model, **{option: size})
            explainer.attribute(there[:1], 0)
            waits.clear()
            explainer.attribute(there[:1], 0)
            counts.append(sum(waits.values()))
        assert counts[0] == counts[1], (name, counts)


def test_evaluate(device):
    data, metrics = Synthetic("test", n=4, size=32), tuple(METRICS)
    model = load_model("plain_cnn")
    wanted = evaluate({"cam": GradCAM(model), "rise": RISE(model, n_masks=20)}, data, metrics, batch=2)
    model = model.to(device)
    found = evaluate({"cam": GradCAM(model), "rise": RISE(model, n_masks=20)}, data, metrics, batch=2, device=str(device))
    differs = (found[list(metrics)] - wanted[list(metrics)]).abs()  # a pixel may change its rank where maps differ by rounding
    assert differs.max(axis=None) < 1e-2 and differs.median(axis=None) < 1e-5


def test_scores_of_trained_networks(device):
    lab = creatures_lab(20, 12)
    model, found = load_model("plain_cnn"), []
    for place in ("cpu", device):
        model, lab = model.to(place), replace(lab, images=lab.images.to(place), labels=lab.labels.to(place),
                                              train=tuple(t.to(place) for t in lab.train), val=tuple(t.to(place) for t in lab.val))
        found.append({**explanation_scores(model, lab), **calibration_scores(model, lab), **robustness_scores(model, lab),
                      **neighbour_scores(model, lab)})
    assert found[1] == pytest.approx(found[0], abs=1e-3, nan_ok=True)


def test_audit(device, tmp_path):
    audit(load_model("plain_cnn"), Synthetic("test", n=5, size=32), explainer="gradcam", device=str(device)).report(tmp_path / "audit.html")
    assert "Grad-CAM" in (tmp_path / "audit.html").read_text(encoding="utf-8")


# ---- training -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_views(device, training, name):
    views = [augmented(training[0].to(place), name, torch.Generator().manual_seed(3), views=2) for place in ("cpu", device)]
    for here, there in zip(*views, strict=True):
        assert there.device == device
        torch.testing.assert_close(there.cpu(), here)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipe(device, training, recipe):
    "The weights and the log of the CPU; a real device rounds otherwise, and a mask that is accepted by one of them changes the weights"
    runs = [fit(config(recipe), training, tuple(t[:8] for t in training), device=place) for place in ("cpu", str(device))]
    for (name, here), there in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):
        assert there.device == device, name
        torch.testing.assert_close(there.cpu(), here, atol=0.1 if REAL else 1e-4, rtol=1e-3, msg=name)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.log] for run in runs]
    assert len(logs[0]) == len(logs[1])
    assert all(there == pytest.approx(here, abs=0.2 if REAL else 1e-3) for here, there in zip(*logs, strict=True))


@pytest.mark.parametrize("name", sorted(EXPLAINERS))
def test_a_model_that_moves_between_two_calls(device, name):
    "What an explainer keeps of the first call must not lie on the old device"
    model, images = trap_network(1), trap_images(1)
    explainer = EXPLAINERS[name](model)
    explainer.attribute(images, 1)
    model.to(device)
    assert explainer.attribute(images.to(device), 1).device == device


def test_maps_that_are_kept(device, training):
    runs = [fit(config("edda", refresh=2), training, device=place) for place in ("cpu", str(device))]
    assert runs[1].recipe.cache.maps.device == device
    assert runs[1].log[-1]["loss"] == pytest.approx(runs[0].log[-1]["loss"], abs=1e-3)


def test_a_run_goes_on_from_its_checkpoint(device, training, tmp_path, monkeypatch):
    "With the same bits, where the kernels add up in one order"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole = fit(config("excon"), training, device=str(device))
    half = make_run(config("excon"), training, None, None, None, device)
    half.step()
    save_run(half, tmp_path)
    resumed = fit(config("excon"), training, folder=tmp_path, device=str(device))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True))


def test_images_that_are_read_as_they_are_needed(device):
    batch, = Streamed(Synthetic("train", n=8, size=32), 32, device).batches([torch.tensor([3, 1])])
    assert all(part.device == device for part in batch)


WAITS = {"ce": 0, "cutout": 0, "supcon": 0, "supcon_clean_view": 0, "excon": 4, "excon_accept_all": 4, "excon_random_class": 4,
         "excon_random_mask": 4, "exconb": 5, "edda": 4, "edda_random_class": 4, "random_occlusion": 4}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_how_often_a_step_waits(pretended, training, recipe):
    "A wait empties the queue of the GPU; each of them is a check of what the step has computed, or a size"
    run = make_run(config(recipe), training, None, None, None, pretended)
    run.step()
    waits.clear()
    run.step()
    assert sum(waits.values()) == WAITS[recipe], waits
