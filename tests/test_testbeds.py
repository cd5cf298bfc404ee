"""The testbeds of the papers, on tiny sets of the true format with random weights; and what a page does with a run."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from writers import coco_content, needs_coco, write_coco, write_elpv, write_steel, write_voc

from xai_companion import testbeds
from xai_companion.cli import main
from xai_companion.compare import differences
from xai_companion.explain import RISE, GradCAM, HiResCAM, LayerCAM
from xai_companion.models import load_model
from xai_companion.testbeds import (
    CURVES,
    MASKED,
    OF_PROFILE,
    TESTBEDS,
    TRAIN_ELPV,
    Evaluated,
    Restricted,
    methods,
    run_testbeds,
)
from xai_companion.testbeds import testbeds as present
from xai_companion.verdicts import ABOVE


def write_labelled_coco(folder):
    "Both images have an object"
    content = coco_content()
    content["annotations"].append(content["annotations"][0] | {"id": 4, "image_id": 7, "category_id": 90})
    write_coco(folder, content)


WRITERS = {"voc2007": ("VOCdevkit/VOC2007", write_voc, 20), "coco2014": ("coco", write_labelled_coco, 3), "severstal": ("severstal", write_steel, 5)}


def prepare(root, name):
    "A tiny set of the true format, and a checkpoint with random weights"
    kind, network = name.split("_")
    folder, write, classes = WRITERS[kind]
    if not (root / "data" / folder).exists():
        write(root / "data" / folder)
    (root / "data" / "checkpoints").mkdir(exist_ok=True)
    torch.save(load_model(network, weights=None, num_classes=classes).network.state_dict(), root / "data" / "checkpoints" / f"{name}.pt")


@pytest.mark.parametrize("name", [
    "voc2007_resnet50", pytest.param("coco2014_resnet50", marks=[pytest.mark.slow, needs_coco]),
    pytest.param("severstal_resnet101", marks=pytest.mark.slow), pytest.param("voc2007_vgg16", marks=pytest.mark.slow)])
def test_the_papers_testbeds(paper_profile, monkeypatch, name):
    prepare(paper_profile, name)
    monkeypatch.setitem(OF_PROFILE, "paper", (name,))
    run, = run_testbeds(lambda network, bed: {"Grad-CAM": GradCAM(network), "HiRes-CAM": HiResCAM(network)}, n=2)
    assert run.frame.explainer.value_counts().nunique() == 1 and len(run.frame) >= 4
    assert run.frame[list(TESTBEDS[name].metrics)].notna().all().all()
    run.store("sise", "quality", ["Grad-CAM"], ("drop",), published={("Grad-CAM", "drop"): {"value": 35.8, "source": "here"}})
    stored, = json.loads((paper_profile / "reports" / "sise" / f"quality_{name}.paper.json").read_text())
    own = run.frame[run.frame.explainer == "Grad-CAM"].groupby("position")["drop"].mean()
    assert stored["n"] == 2 and stored["value"] == pytest.approx(100 * own.mean(), rel=1e-5) and stored["paper"]["value"] == 35.8
    assert stored["provenance"]["data"].startswith(name.split("_")[0])


@pytest.mark.slow
@needs_coco
def test_both_networks_on_coco(paper_profile, monkeypatch):
    "Beside those above: the fifth testbed"
    prepare(paper_profile, "coco2014_vgg16")
    monkeypatch.setitem(OF_PROFILE, "paper", ("coco2014_vgg16",))
    run, = run_testbeds(lambda network, bed: {"Grad-CAM": GradCAM(network)}, n=2)
    assert run.frame[list(run.metrics)].notna().all().all() and run.data.startswith("coco2014 val 2 ")


def test_solar_cells(paper_profile, monkeypatch, capsys):
    "The checkpoint that `train` writes is the one that the testbed wants"
    monkeypatch.setitem(OF_PROFILE, "cpu", ("elpv_resnet18",))
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    write_elpv(paper_profile / "data" / "elpv")
    assert present() == {}
    said = capsys.readouterr().out
    assert "not run: resnet18, ELPV solar cells. no checkpoint elpv_resnet18.pt" in said and f"`{TRAIN_ELPV}` trains one" in said
    small = {"224": "32", "60": "1"}
    assert main([small.get(word, word) for word in TRAIN_ELPV.split()[1:]] + ["--batch", "8", "--out", str(paper_profile / "runs")]) == 0
    trained, = (paper_profile / "runs").glob("*/model.pt")
    (paper_profile / "data" / "checkpoints").mkdir()
    shutil.copy(trained, paper_profile / "data" / "checkpoints" / "elpv_resnet18.pt")
    run, = run_testbeds(lambda network, bed: {"Grad-CAM": GradCAM(network)}, n=2, metrics=("drop",))
    assert len(run.frame) == 2 and run.frame["drop"].notna().all() and TESTBEDS["elpv_resnet18"].metrics == MASKED + CURVES and set(run.frame.label) <= {0, 1}
    assert run.data.startswith("elpv val 8 ")


def test_limits_of_photographs(monkeypatch):
    beds = {name: TESTBEDS[name] for name in ("plain", "imagenet", "tiny", "elpv_resnet18")}
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    assert {name: bed.limits(1000, 250) for name, bed in beds.items()} == {
        "plain": (1000, 250), "imagenet": (200, 1800), "tiny": (250, 1800), "elpv_resnet18": (200, 1800)}
    assert TESTBEDS["tiny"].limits(8, 250) == (8, 1800)
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "gpu")
    assert {name: bed.limits(1000, 60) for name, bed in beds.items()} == {
        "plain": (500, 8), "imagenet": (1000, 60), "tiny": (1000, 60), "elpv_resnet18": (1000, 60)}


def test_limits_reach_the_evaluation(own_run, monkeypatch):
    asked = {}

    def evaluate(explainers, data, metrics, **options):
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(testbeds, "evaluate", evaluate)
    monkeypatch.setitem(TESTBEDS, "plain", replace(TESTBEDS["plain"], own={"cpu": (7, 1800)}))
    monkeypatch.setitem(OF_PROFILE, "cpu", ("plain",))
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    with pytest.raises(KeyboardInterrupt):
        run_testbeds(lambda network, bed: {}, n=1000, budget=250)
    assert (asked["n"], asked["budget"], asked["batch"]) == (7, 1800, 1)


def test_a_time_box_that_ends_early_leaves_the_explainers_that_are_done(own_run, monkeypatch):
    monkeypatch.setitem(TESTBEDS, "plain", replace(TESTBEDS["plain"], own={"cpu": (4, 60)}))
    monkeypatch.setitem(OF_PROFILE, "cpu", ("plain",))
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    both = {"Grad-CAM": GradCAM, "LayerCAM": LayerCAM}
    assert run_testbeds(lambda network, bed: {k: v(network) for k, v in both.items()}, n=4, finished=True) == []
    run_testbeds(lambda network, bed: {"LayerCAM": LayerCAM(network)}, n=4)
    monkeypatch.setattr(LayerCAM, "compute", None)  # nothing is computed again
    [run] = run_testbeds(lambda network, bed: {k: v(network) for k, v in both.items()}, n=4, finished=True)
    assert set(run.frame.explainer) == {"LayerCAM"} and run.frame.position.nunique() == 4


def test_extremal_perturbation_has_the_areas_of_its_paper(monkeypatch):
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "paper")
    network = load_model("plain_cnn")
    areas = {name: testbeds.methods(network, TESTBEDS[name])["Extremal Perturbation"].areas for name in ("voc2007_vgg16", "coco2014_vgg16")}
    assert areas == {"voc2007_vgg16": (0.025, 0.05, 0.1, 0.2), "coco2014_vgg16": (0.018, 0.025, 0.05, 0.1)}


def test_what_is_missing_is_named(paper_profile, capsys):
    assert present() == {}
    said = capsys.readouterr().out
    assert said.count("not run: ") == len(OF_PROFILE["paper"]) and "xai-companion data get voc2007" in said
    write_voc(paper_profile / "data" / "VOCdevkit" / "VOC2007")
    present()
    said = capsys.readouterr().out
    assert "no checkpoint voc2007_resnet50.pt" in said and "20 outputs" in said


def test_every_profile_names_testbeds():
    assert {name for names in OF_PROFILE.values() for name in names} == set(TESTBEDS)


def test_reduced_methods_say_so(monkeypatch):
    network, bed = load_model("plain_cnn"), TESTBEDS["plain"]
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "quick")
    assert {"RISE (200 masks)", "Extremal Perturbation (50 steps, 2 areas)"} < set(methods(network, bed))
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "gpu")
    full = methods(network, bed)
    assert full["RISE"].n_masks == 8000 and full["Extremal Perturbation"].steps == 800 and full["Extremal Perturbation"].lr == 0.01


def test_rise_is_the_mean_of_three_runs_in_the_paper_profile(own_run, monkeypatch):
    network, bed = load_model("plain_cnn"), TESTBEDS["plain"]
    three = {name: RISE(network, n_masks=4, seed=k) for k, name in enumerate(("RISE", "RISE, run 2", "RISE, run 3"))}

    def measured(explainers):
        [run] = run_testbeds(lambda network, bed: explainers, n=4, metrics=("ebpg",))
        return run
    run, each = measured(three | {"Grad-CAM": GradCAM(network)}), [measured({"one": one}) for one in three.values()]
    expected = np.mean([one.values("one", "ebpg", one.frame).to_numpy() for one in each], 0)
    assert list(run.frame.explainer.unique()) == ["RISE", "Grad-CAM"]
    np.testing.assert_allclose(run.values("RISE", "ebpg", run.frame).to_numpy(), expected)
    gap = differences(run.frame, "RISE", ["Grad-CAM"], "ebpg")["Grad-CAM"].to_numpy()
    np.testing.assert_allclose(gap, expected - run.values("Grad-CAM", "ebpg", run.frame).to_numpy())
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "paper")
    runs = {name: one for name, one in methods(network, bed).items() if name.startswith("RISE")}
    assert list(runs) == ["RISE", "RISE, run 2", "RISE, run 3"] and [one.seed for one in runs.values()] == [0, 1, 2]


def test_comparisons_are_paired(own_run):
    run, = run_testbeds(lambda network, bed: {"a": GradCAM(network), "b": HiResCAM(network, "block2")}, n=4, metrics=("ebpg", "drop"))
    wide = run.frame.pivot(index="position", columns="explainer", values="ebpg")
    np.testing.assert_allclose(differences(run.frame, "b", ["a"], "ebpg")["a"].to_numpy(), 100 * (wide.b - wide.a).to_numpy())
    run.claim("sise", 1, "EBPG", differences(run.frame, "b", ["a"], "ebpg"), ABOVE)
    stored, = json.loads((own_run / "reports" / "sise" / "claims.smoke.json").read_text())
    assert stored["value"] == pytest.approx(100 * (wide.b - wide.a).mean(), rel=1e-5) and stored["n"] == 4


def test_rows_of_an_explainer_that_has_changed_carry_its_version(own_run, monkeypatch):
    monkeypatch.setattr(LayerCAM, "version", 3)
    run, = run_testbeds(lambda network, bed: {"a": GradCAM(network), "b": LayerCAM(network)}, n=2, metrics=("ebpg",))
    run.store("sise", "quality", ["a", "b"])
    stored = json.loads((own_run / "reports" / "sise" / "quality_plain.smoke.json").read_text())
    assert {(r["config"]["row"], r["config"].get("version")) for r in stored} == {("a", None), ("b", 3)}


def test_time_counts_batches_without_the_warm_up():
    frame = pd.DataFrame({"position": range(12), "label": 0, "explainer": "a", "seconds": [9.0] * 4 + [1.0] * 4 + [2.0] * 4})
    run = Evaluated("x", TESTBEDS["plain"], frame, ("drop",), 4, "some", "cpu")
    assert run.times()["a"].tolist() == [1, 2]


def test_restricted_network_keeps_its_layers():
    network = load_model("plain_cnn")
    some = Restricted(network, torch.tensor([3, 0]), ["d", "a"])
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(some(images), network(images)[:, [3, 0]])
    assert torch.allclose(GradCAM(some, "block2").attribute(images, 0), GradCAM(network, "block2").attribute(images, 3), atol=1e-6)


def test_steps_do_the_work_of_a_run(own_run, monkeypatch):
    "In a time box; what they did is then read, and without a box there are none"
    from xai_companion import evaluate as module
    from xai_companion.steps import TIME_BOX, take_steps

    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")
    monkeypatch.setitem(OF_PROFILE, "cpu", ("plain",))
    sizes = {"n": 6, "metrics": ("ebpg",)}
    explainers = lambda network, bed: {"Grad-CAM": GradCAM(network), "HiRes-CAM": HiResCAM(network)}  # noqa: E731
    assert testbeds.testbed_steps(explainers, **sizes) == []
    monkeypatch.setenv(TIME_BOX, "inf")
    steps = testbeds.testbed_steps(explainers, **sizes)
    assert [step.title for step in steps] == ["plain CNN, creatures: Grad-CAM", "plain CNN, creatures: HiRes-CAM"]
    take_steps(steps)
    monkeypatch.setattr(module, "_one_batch", lambda *arguments: pytest.fail("computed again"))
    [run] = testbeds.run_testbeds(explainers, **sizes)
    assert len(run.frame) == 12
