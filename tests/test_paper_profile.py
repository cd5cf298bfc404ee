"""The paper and gpu profiles from files to records, at smoke size: the papers' sets written here in their true formats, the published
networks, and the five pages with nothing but the numbers made small."""
import json
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import torchvision
from helpers import NBS
from pretended import AVAILABLE, NAME, pretending
from torchvision.models.resnet import BasicBlock, ResNet
from writers import (
    needs_coco,
    needs_shift,
    write_cifar,
    write_coco,
    write_samples,
    write_six_of_tiny,
    write_steel,
    write_svhn,
    write_voc,
)

from xai_companion import core, experiments
from xai_companion.cli import main
from xai_companion.data.arrays import ArrayReader
from xai_companion.data.readers import TinyImageNet
from xai_companion.experiments import creatures_lab, explanation_scores, real_lab, run_rows, store_rows, trained
from xai_companion.figures import PhotoFigure
from xai_companion.models import load_model
from xai_companion.results import load
from xai_companion.steps import OutOfTime, read_plan
from xai_companion.testbeds import OF_PROFILE, TESTBEDS
from xai_companion.train.published import PUBLISHED
from xai_companion.train.recipes import Config

# ---- the sets of the training papers, with more images than the readers' tests need -------------------------------
CLASSES = [f"class {i}" for i in range(10)]
TRAINING = {"cifar10": lambda root: write_cifar(root / "cifar-10-batches-py", "labels", CLASSES, 10),
            "cifar100": lambda root: write_cifar(root / "cifar-100-python", "fine_labels", CLASSES, 40),
            "svhn": lambda root: write_svhn(root / "svhn", train=[*range(10)] * 4, test=[*range(10)] * 2),
            "tiny_imagenet": lambda root: write_six_of_tiny(root / "tiny-imagenet-200")}


@pytest.fixture
def own_files(monkeypatch):
    "Files of the true format that are not the authors': their MD5 sums are another test's matter"
    monkeypatch.setattr(ArrayReader, "check_sum", lambda self, file, md5: None)


# ---- the published rows: true network, true options, two steps ----------------------------------------------------
@pytest.mark.parametrize("name", [
    "edda_resnet56_cifar10", "random_occlusion_resnet18_svhn", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "ce_resnet18_cifar100", "cutout_resnet56_svhn", "edda_resnet18_cifar100", "exconb_cifar100", "excon_tiny_imagenet",
        "supcon_tiny_imagenet", "supcon_clean_view_cifar100", "ce_tiny_imagenet", "edda_vgg16_bn_cifar10", "cutout_resnet50_cifar10",
        "random_occlusion_resnet18_tiny_imagenet"))])
def test_a_published_row_from_files_to_a_network(paper_profile, own_files, capsys, name):
    published = PUBLISHED[name].config
    TRAINING[published.data](paper_profile / "data")
    size = ["--epochs", "1", "--batch", "8", "--images", "16", "--lr", "0.01", "--set", "start=0.0"]
    size = size if name.startswith(("edda", "random", "excon")) else size[:-2]
    command = PUBLISHED[name].command(name).replace("--device cuda", "--device cpu").split()[1:]
    assert main([*command, *size, "--out", str(paper_profile)]) == 0
    said = capsys.readouterr().out
    [file] = paper_profile.glob("*/model.pt")
    meta = torch.load(file, weights_only=True)["meta"]
    shortened = {"epochs": 1, "batch": 8, "lr": 0.01, "fingerprint": meta["config"]["fingerprint"]}
    wanted = vars(replace(published, **shortened, options=published.options | ({"start": 0.0} if "start=0.0" in size else {})))
    assert meta["config"] == wanted and "16 used" in meta["config"]["fingerprint"]
    model = load_model(published.model, file)
    assert model.classes == real_lab(published.data, published.size).classes and model.input_size == published.size
    assert ("test accuracy" in said) == ("test_accuracy" in meta) == (published.data != "tiny_imagenet")
    log = (file.parent / "log.csv").read_text().splitlines()
    assert len(log) == 1 + (2 if "con" in name else 1) and "nan" not in "".join(log)


def test_every_published_set_and_network_is_tried():
    tried = {mark if isinstance(mark, str) else mark.values[0]
             for mark in test_a_published_row_from_files_to_a_network.pytestmark[0].args[1]}
    assert {(p.config.data, p.config.model) for p in (PUBLISHED[name] for name in tried)} >= {
        *(("cifar10", model) for model in ("resnet50", "resnet56", "vgg16_bn")), *(("cifar100", model) for model in ("resnet18", "resnet50")),
        ("svhn", "resnet18"), *(("tiny_imagenet", model) for model in ("resnet18", "resnet50"))}
    assert {p.config.data for p in PUBLISHED.values()} == set(TRAINING)


def test_a_few_classes_of_a_set_open_no_other_image(tmp_path, monkeypatch):
    "And a box that has no pixel at this size is none"
    write_six_of_tiny(tmp_path / "tiny-imagenet-200")
    boxes = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    lines = boxes.read_text().splitlines()
    boxes.write_text("\n".join([lines[0].replace("10\t12\t50\t40", "10\t12\t10\t12"), *lines[1:]]) + "\n")
    monkeypatch.setenv("XAI_COMPANION_DATA", str(tmp_path))
    opened, read = [], TinyImageNet.read
    monkeypatch.setattr(TinyImageNet, "read", lambda self, index: opened.append((self.split, *self.targets[index])) or read(self, index))
    lab = real_lab("tiny_imagenet", 16, classes=2)
    assert Counter(opened) == {("train", 0): 8, ("train", 1): 8, ("val", 0): 2, ("val", 1): 2}
    assert len(lab.train[1]) == len(lab.train[0]) == 16 and lab.name == "tiny_imagenet_2" and len(lab.classes) == 2
    assert [mask is None for mask in lab.masks].count(True) == 1 and all(mask.any() for mask in lab.masks if mask is not None)

    whole = real_lab("tiny_imagenet", 16)
    few = {image.numpy().tobytes() for image, label in zip(*whole.train, strict=True) if label < 2}
    assert few <= {image.numpy().tobytes() for image in lab.train[0]} and len(whole.classes) == 6
    model = load_model("plain_cnn", None, 2)
    assert all(np.isfinite(value) for value in explanation_scores(model, lab, metrics=("ebpg", "miou", "drop")).values())
    with pytest.raises(ValueError, match="no soft_drop here: `evaluate` measures that"):
        explanation_scores(model, lab, metrics=("soft_drop",))


def test_the_time_of_a_run_is_that_of_all_its_parts(quick):
    lab, config = creatures_lab(60, 20), Config(size=32, epochs=2, batch=20)
    _, log = trained(replace(config, data=lab.name, fingerprint=lab.fingerprint), lab, quick)
    frame = run_rows({"plain": config}, (0,), lab, lambda model, row: {"accuracy": 50.0}, "1", quick)  # finds it trained
    assert frame.seconds.tolist() == [log[-1]["seconds"]] and frame.seconds[0] > 0
    store_rows(frame, "edda", "t", ("accuracy",), lab, {"accuracy": 7})
    assert {row["n"] for row in load("edda", "t", quick / "reports")["quick"]} == {7}


# ---- the pages ----------------------------------------------------------------------------------------------------
def write_eight(root):
    "Of each set with boxes; the strips of steel are of the validation split, each with a defect in one patch"
    write_voc(root / "VOCdevkit" / "VOC2007", 8)
    write_coco(root / "coco", more=7)  # one of them is empty
    names = [name for name in (f"{i:08x}.jpg" for i in range(200)) if zlib.crc32(name.encode()) % 5 == 0][:8]
    write_steel(root / "severstal", [(name, i % 4 + 1, f"{(100 + 5 * i) * 256 + 1} {10 * 256}") for i, name in enumerate(names)], names)


def small(**sizes):
    "Numbers as in the smoke profile, the rest as in the large ones"
    if isinstance(sizes.get("smoke"), (int, str, tuple)):
        return sizes["smoke"]
    return original(**sizes)


original = core.by_profile


@pytest.fixture
def page(paper_profile, own_files, monkeypatch):
    "Runs all cells of a page in the paper profile on a CPU; what they defined"
    monkeypatch.setenv("XAI_COMPANION_DEVICE", "cpu")
    monkeypatch.chdir(paper_profile)
    monkeypatch.setenv("XAI_COMPANION_QUIET", "1")
    monkeypatch.setattr(experiments, "SCORES", dict(experiments.SCORES))  # pages add to these two
    monkeypatch.setattr(PhotoFigure, "limit", PhotoFigure.limit)
    for name, module in list(sys.modules.items()):
        if name.startswith("xai_companion") and getattr(module, "by_profile", None) is original:
            monkeypatch.setattr(module, "by_profile", small)

    def run(name):
        found = {"__name__": "page"}
        with torch.random.fork_rng([]):
            cells(name, found)
        return found

    def cells(name, found):
        for cell in nbformat.read(NBS / "papers" / f"{name}.ipynb", 4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name} {cell.id}", "exec"), found)
                plt.close("all")
    run.root = paper_profile
    return run


def stored(root, paper, table):
    return json.loads((root / "reports" / paper / f"{table}.paper.json").read_text())


@pytest.mark.slow
@needs_coco
@pytest.mark.parametrize("paper, name", [("sise", "01_sise"), ("ada_sise", "02_ada_sise"), ("integrated_gradcam", "03_integrated_gradcam")])
def test_page_of_an_explainer(page, monkeypatch, paper, name):
    "On the five testbeds of the paper profile, with a small network in place of VGG and ResNets"
    write_eight(page.root / "data")
    for bed in OF_PROFILE["paper"]:
        model = lambda device, data: load_model("residual_cnn", None, len(data.classes), classes=data.classes)  # noqa: E731
        monkeypatch.setitem(TESTBEDS, bed, replace(TESTBEDS[bed], model=model, size=64))
    found = page(name)
    assert [run.name for run in found["runs"]] == list(OF_PROFILE["paper"])
    for run in found["runs"]:
        rows = stored(page.root, paper, f"quality_{run.name}")
        assert {row["config"]["metric"] for row in rows} >= {"EBPG", "Drop"} and all(np.isfinite(row["value"]) for row in rows)
        assert {row["provenance"]["data"] for row in rows} == {run.data}
    settings = {row["config"]["setting"] for row in stored(page.root, paper, "claims")}
    assert {TESTBEDS[name].title for name in OF_PROFILE["paper"]} <= settings
    drop = {row["config"]["row"]: row["paper"] for row in stored(page.root, paper, "quality_voc2007_vgg16") if row["config"]["metric"] == "Drop"}
    printed = {"sise": {"SISE": 38.4, "Grad-CAM": 49.47}, "ada_sise": {"SISE": 38.4}, "integrated_gradcam": {"Grad-CAM": 49.47}}
    assert all(drop[name]["value"] == value for name, value in printed[paper].items())


@pytest.fixture
def short_schedules(monkeypatch):
    "The published rows with one epoch of a small network, and a layer that it has"
    for name, published in PUBLISHED.items():
        options = published.config.options | ({"layers": "block2.2"} if "layers" in published.config.options else {})
        config = replace(published.config, model="plain_cnn", epochs=1, batch=8, options=options)
        monkeypatch.setitem(PUBLISHED, name, replace(published, config=config))


@pytest.mark.slow
def test_page_of_edda(page, short_schedules):
    TRAINING["cifar100"](page.root / "data")
    TRAINING["svhn"](page.root / "data")
    found = page("04_edda")
    networks = ("resnet18", "resnet50", "resnet56", "vgg16_bn")
    assert list(found["beds"]) == [f"{data}_{network}" for data in ("cifar100", "svhn") for network in networks]
    assert all(set(frame.row) == {"Cross-entropy", "Random occlusion", "EDDA", "Cutout", "EDDA, random class"} for frame in found["frames"].values())
    rows = stored(page.root, "edda", "place")
    assert {row["config"]["on"] for row in rows} == {bed.title for bed in found["beds"].values()}
    assert {row["config"]["on"] for row in rows if row["config"]["metric"] == "Accuracy"} == {bed.title for bed in found["beds"].values()}


@pytest.mark.slow
def test_page_of_excon(page, short_schedules):
    TRAINING["cifar100"](page.root / "data")
    TRAINING["tiny_imagenet"](page.root / "data")
    found = page("05_excon")
    assert list(found["beds"]) == ["plain CNN, creatures", "ResNet-50, CIFAR-100", "ResNet-50, Tiny ImageNet"]
    rows = stored(page.root, "excon", "accuracy")
    assert {row["config"]["data"] for row in rows} == {"synthetic", "cifar100", "tiny_imagenet"}
    assert {"Cross-entropy", "SupCon", "ExCon", "ExConB"} <= {row["config"]["row"] for row in rows}


# ---- the gpu profile, on a CPU ------------------------------------------------------------------------------------
class Thin(ResNet):
    "ResNet-18 with an eighth of the channels"

    def __init__(self, num_classes):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes)
        self.fc = torch.nn.Linear(64, num_classes)

    def _make_layer(self, block, planes, *arguments, **options):
        return super()._make_layer(block, planes // 8, *arguments, **options)


@pytest.fixture
def gpu_page(page, monkeypatch):
    "The pages with short schedules and a thin ResNet-18, in a time box"
    whole_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model",
                        lambda name, **options: Thin(options["num_classes"]) if name == "resnet18" else whole_model(name, **options))
    write_six_of_tiny(page.root / "data" / "tiny-imagenet-200")
    write_samples(page.root / "data" / "imagenet-samples")
    for name, value in (("PROFILE", "gpu"), ("UNTIL", "inf")):
        monkeypatch.setenv(f"XAI_COMPANION_{name}", value)
    fitted = []

    def fit(config, *arguments, **options):
        fitted.append(config.recipe)
        return whole_fit(replace(config, epochs=1, seen=None, batch=8), *arguments, **options)
    whole_fit = experiments.fit
    monkeypatch.setattr(experiments, "fit", fit)
    page.fitted = fitted
    return page


@pytest.mark.slow
@needs_shift
def test_gpu_profile_of_excon_and_then_the_explainers(gpu_page, monkeypatch, capsys):
    "The headline is trained first, what a box has brought is stored, its network is explained, and nothing is planned twice"
    monkeypatch.setenv("XAI_COMPANION_UNTIL", str(time.time() + 230))  # for cross-entropy, not for the row after it
    with pytest.raises(OutOfTime, match="SupCon, seed 0, takes about 4:00 min"):
        gpu_page("05_excon")
    said = capsys.readouterr().out
    assert re.search(r"step: 1 of \d+, ResNet-18, Tiny ImageNet: Cross-entropy, seed 0", said)
    assert max(seconds for seconds, _ in read_plan(said)) <= 9 * 60
    file = gpu_page.root / "reports" / "excon" / "accuracy.gpu.json"
    assert {row["config"]["row"] for row in json.loads(file.read_text())} == {"Cross-entropy"}

    monkeypatch.setenv("XAI_COMPANION_UNTIL", "inf")
    found = gpu_page("05_excon")
    beds = list(found["beds"])
    assert beds[1:] == ["ResNet-18, Tiny ImageNet", *(f"{name}, 50 classes of Tiny ImageNet" for name in ("ResNet-18", "VGG-16"))]
    rows = json.loads(file.read_text())
    assert {row["config"]["data"] for row in rows} == {"synthetic", "tiny_imagenet", "tiny_imagenet_50"} and all(np.isfinite(row["value"]) for row in rows)
    fifty = [row for row in rows if row["config"]["data"] == "tiny_imagenet_50" and row["seed"] == 1]
    for model, count in (("resnet18", found["COUNT"]), ("vgg16_bn", 5)):
        assert {row["config"]["row"] for row in fifty if row["config"]["model"] == model} == set(list(found["ROWS"])[:count])

    gpu_page.fitted.clear()
    monkeypatch.setenv("XAI_COMPANION_UNTIL", "0")
    with pytest.raises(OutOfTime):
        gpu_page("05_excon")
    assert re.search(r"plan: 0 of \d+ steps left", capsys.readouterr().out) and not gpu_page.fitted

    monkeypatch.setenv("XAI_COMPANION_UNTIL", str(time.time() + 40))  # for some steps of half a minute as planned, not for 16
    with pytest.raises(OutOfTime, match="takes about 0:30 min"):
        gpu_page("02_ada_sise")
    kept = json.loads((gpu_page.root / "reports" / "ada_sise" / "quality_tiny_resnet18.gpu.json").read_text())
    assert "SISE" in {row["config"]["row"] for row in kept}
    assert "step: 1 of 16, ResNet-18, Tiny ImageNet at 64 pixels: SISE ..." in capsys.readouterr().out

    monkeypatch.setenv("XAI_COMPANION_UNTIL", "inf")
    found = gpu_page("02_ada_sise")
    said = capsys.readouterr().out
    assert [run.name for run in found["runs"]] == list(OF_PROFILE["gpu"]) and "not run" not in said
    assert "of 16, " in said and "step: 1 of 16" not in said  # done in the time box
    for run in found["runs"]:
        assert run.frame[list(run.metrics)].notna().all().all()
    monkeypatch.setenv("XAI_COMPANION_UNTIL", "0")
    with pytest.raises(OutOfTime):
        gpu_page("02_ada_sise")
    assert "plan: 0 of 16 steps left" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_profile_of_edda(gpu_page, capsys):
    found = gpu_page("04_edda")
    assert max(seconds for seconds, _ in read_plan(capsys.readouterr().out)) <= 9 * 60
    assert list(found["beds"]) == ["resnet18", "vgg16", "resnet18_saliency"]
    rows = json.loads((gpu_page.root / "reports" / "edda" / "place.gpu.json").read_text())
    assert {row["config"]["on"] for row in rows} == {bed.title for bed in found["beds"].values()}
    assert {row["config"]["row"] for row in rows if row["config"]["on"] == "ResNet-18"} == set(found["RECIPES"] | found["CONTROLS"])


@pytest.mark.slow
@needs_shift
@pytest.mark.parametrize("name, table, entry, creatures, photographs", [
    ("04_edda", "place", "on", "plain CNN", "plain CNN, photographs"), ("05_excon", "accuracy", "data", "synthetic", "tiny_imagenet_20")])
def test_cpu_profile_trains_on_photographs_where_they_are(gpu_page, monkeypatch, capsys, name, table, entry, creatures, photographs):
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    beds = list(gpu_page(name)["beds"])
    said, paper = capsys.readouterr().out, name[3:]
    first_step = read_plan(said)[0][1]
    assert "not run" not in said and re.search("photographs|Tiny ImageNet", first_step)  # what needs data comes first
    rows = json.loads((gpu_page.root / "reports" / paper / f"{table}.cpu.json").read_text())
    recipes = {data: {row["config"]["row"] for row in rows if row["config"][entry] == data} for data in (creatures, photographs)}
    assert {"Cross-entropy", *(("EDDA",) if paper == "edda" else ("SupCon", "ExCon", "ExConB"))} <= recipes[photographs] <= recipes[creatures]
    own = [row for row in rows if row["config"][entry] == photographs]
    assert all(row["provenance"]["data"].startswith("tiny_imagenet train") and np.isfinite(row["value"]) for row in own)

    shutil.rmtree(gpu_page.root / "data")
    without = list(gpu_page(name)["beds"])
    assert len(without) == len(beds) - 1 and "not run: " in capsys.readouterr().out


# ---- the pages on a device that is not the CPU ----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="this torch cannot pretend a device")
@pytest.mark.parametrize("name", [file.stem for file in sorted((NBS / "papers").glob("0*.ipynb"))])
def test_page_on_a_device_that_is_pretended(page, monkeypatch, name):
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "smoke")
    monkeypatch.setenv("XAI_COMPANION_DEVICE", NAME)
    with pretending():
        assert page(name)["device"].type == NAME
