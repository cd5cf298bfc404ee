"""The bench at its smallest: what only a GPU measures, what the command stores, and that a wait for images is seen."""

import json
import math
import time

import pytest
import torch
from pretended import AVAILABLE, NAME, pretending

from xai_companion import bench, timing
from xai_companion.data import loader
from xai_companion.models import load_model

ON_GPU = ("methods that mask, resnet18, bfloat16", "Score-CAM, resnet18, bfloat16",
          "methods that mask, resnet18, bfloat16, compiled")


@pytest.fixture
def seen(monkeypatch):
    "What the networks of the bench compute in"
    def watched(*arguments):
        model = network(*arguments)
        model.register_forward_hook(lambda module, inputs, logits: found.add(logits.dtype))
        return model
    network, found = bench.network, set()
    monkeypatch.setattr(bench, "network", watched)
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("compiled" in name)) for name in ON_GPU])
def test_what_only_a_gpu_measures(own_run, seen, name):
    "On the CPU: each kind runs, in the precision that its records tell"
    planned = bench.measurements("cuda")
    assert set(planned) - set(bench.measurements()) == set(ON_GPU)
    tables, work = planned[name]
    made = work.func(*("cpu" if value == "cuda" else value for value in work.args), **work.keywords)
    made = made if isinstance(made, tuple) else (made,)
    assert len(made) == len(tables) and torch.bfloat16 in seen
    for r in (r for records in made for r in records):
        peer = r["config"]["row"].startswith(("grad-cam", "torchcam"))
        assert r["provenance"]["dtype"] == ("float32" if peer else "bfloat16") and "bfloat16" in r["config"]["row"]
        assert ("compiled" in r["config"]["row"]) == r["config"].get("compiled", False) == ("compiled" in name)


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="this torch cannot pretend a device")
def test_on_another_device(own_run):
    "Everything but what is compiled, on a device that refuses what CUDA refuses"
    with pretending():
        made = {name: work() for name, (_, work) in bench.measurements(NAME).items() if "compiled" not in name}
    for records in made.values():
        for r in (r for part in (records if isinstance(records, tuple) else (records,)) for r in part):
            assert r["config"]["device"] == NAME


def test_every_measurement_fills_its_tables(own_run):
    "All of it, with images of 32 pixels and hardly any masks; what is kept in files is what is stored"
    folder = own_run / "measured"
    steps = bench.bench_steps("cpu", folder)
    assert not any(step.done() for step in steps)
    for step in steps:
        step.run()
    assert all(step.done() for step in steps)
    bench.store_measured("cpu", folder)
    for table in bench.TABLES:
        records = json.loads((own_run / "reports" / "bench" / f"{table}.smoke.json").read_text())
        assert records and all(r["provenance"]["seconds"] > 0 and math.isfinite(r["value"]) for r in records)
        times = [r for r in records if table != "seconds" and r["unit"] != "%"]  # those are differences of times
        assert all(r["value"] > 0 for r in times)


def test_the_command(own_run, monkeypatch, capsys):
    "It measures anew, prints every table, and stores in results/ only when told to"
    planned = {name: bench.measurements()[name] for name in ("methods that mask, resnet18", "Extremal Perturbation")}
    monkeypatch.setattr(bench, "measurements", lambda device: planned)
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "quick")
    left = own_run / "reports" / "bench" / "measured" / "quick" / "00-of-before.json"
    left.parent.mkdir(parents=True)
    left.write_text("what a run of before has left")
    assert bench.store_measured("cpu", left.parent) is None  # of another version: not read
    wanted = {f"{table}.quick.json" for tables, _ in planned.values() for table in tables}
    for record in (False, True):
        assert bench.bench(record=record) == 0
        printed = capsys.readouterr().out
        assert all(f"\n{table}\n" in printed for table in bench.TABLES) and "RISE, 8000 masks: resnet18" in printed
        assert {file.name for file in (own_run / "reports" / "bench").glob("*.json")} == wanted
        assert {file.name for file in (own_run / "results").glob("bench/*.json")} == (wanted if record else set())
    assert len(json.loads((own_run / "results" / "bench" / "seconds.quick.json").read_text())) == 4


def test_a_measurement_that_fails_does_not_end_the_others(own_run, monkeypatch, capsys):
    "A library is not here, or does not compile: what can be measured is, and the exit code says that something could not"
    def missing():
        raise ModuleNotFoundError("No module named 'torchcam'")
    name = "methods that mask, resnet18"
    planned = {"gradient methods": (("cams",), missing), name: bench.measurements()[name]}
    monkeypatch.setattr(bench, "measurements", lambda device: planned)
    assert bench.bench(device="cpu") == 1
    said = capsys.readouterr()
    assert "No module named 'torchcam'" in said.err and "RISE, 8000 masks: resnet18" in said.out


def test_a_slow_reader_is_seen(monkeypatch):
    "Reading takes 0.1 s and a step 0.25 s: two batches are on the shelf when a round begins, and still the step waits"
    def slowly(*arguments):
        time.sleep(0.1)
        return read_items(*arguments)

    def resnet(device):
        model = load_model("plain_cnn", device=device)
        model.register_forward_pre_hook(lambda *_: time.sleep(0.25))
        return model
    read_items = loader.read_items
    monkeypatch.setattr(loader, "read_items", slowly)
    monkeypatch.setattr(timing, "small_resnet", resnet)
    waited, = timing.bench_files(repeats=1, batch=2, size=32, steps=1, workers=1)
    assert waited["value"] > 20
