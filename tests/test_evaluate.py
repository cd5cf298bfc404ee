"""The evaluation: equal to a naive loop, to itself after an interruption, and to itself on two processes."""
import importlib.util
import json
import linecache
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import QUIET, command
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image
from writers import write_samples

from xai_companion.compare import by_size, compared, differences, summary
from xai_companion.data.datasets import load_dataset
from xai_companion.data.items import ImageSet, Item, Pairs
from xai_companion.data.synthetic import Synthetic
from xai_companion.evaluate import (
    Ledger,
    _plain,
    _structure,
    default_score,
    describe,
    evaluate,
    is_finished,
    load_units,
    model_fingerprint,
    seeded_order,
)
from xai_companion.explain import EXPLAINERS, RISE, SISE, GradCAM
from xai_companion.explain.base import Explainer
from xai_companion.explain.contract import assert_untouched, footprint, trap_network
from xai_companion.hooks import evaluating
from xai_companion.metrics import (
    METRICS,
    Metric,
    average_drop,
    bbox_score,
    deletion_auc,
    ebpg,
    increase_rate,
    insertion_auc,
    miou,
    pointing_game,
)
from xai_companion.models import load_model
from xai_companion.records import mean_interval


class Street(ImageSet):
    "Six images of 20 x 24 with one to three of six classes; the last class has no box"
    name, split, multi_label, classes, fingerprint = "street", "val", True, list("abcdef"), "street val 6"

    def __len__(self):
        return 6

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        labels = tuple(range(index % 3, index % 3 + 1 + index % 3)) + ((5,) if index == 4 else ())
        boxes = torch.tensor([[2.0 * k, 1, 2 * k + 9, 12] for k in labels if k != 5])
        kinds = tuple(k for k in labels if k != 5)
        return Item(f"{index}.jpg", torch.rand(3, 20, 24, generator=draw), labels, boxes, kinds)


@pytest.fixture(scope="module")
def network():
    return trap_network()


@pytest.fixture(scope="module")
def street(network):
    "Two explainers on the street, with every metric"
    return evaluate({"cam": GradCAM(network), "sise": SISE(network)}, Street(), list(METRICS), batch=2)


def without_time(frame):
    return frame.drop(columns="seconds")


def test_several_classes_are_asked_one_by_one(network, street):
    "The default score is the sigmoid where an image has several classes, the softmax elsewhere"
    explainers = {"cam": GradCAM(network), "sise": SISE(network)}
    asked = evaluate(explainers, Street(), list(METRICS), batch=2, score="sigmoid")
    pd.testing.assert_frame_equal(without_time(street), without_time(asked))
    assert not street.probability.equals(evaluate(explainers, Street(), ["drop"], batch=2, score="softmax").probability)
    assert default_score(Street()) == "sigmoid" and default_score(load_dataset("synthetic")) == "softmax"


def test_compared_with_the_first_by_hand(street):
    "The mean of the differences per image, and what its interval says of it"
    table = compared(street, "cam")
    assert list(table.index) == ["sise"] and len(table.columns) == len(METRICS)
    for name, metric in METRICS.items():
        own, other = (street[street.explainer == e].groupby("position")[name].mean() for e in ("sise", "cam"))
        gap = metric.scale * (own - other).dropna()
        mean, low, high = mean_interval(gap)
        better = "open" if low <= 0 <= high else "better" if (mean > 0) == (metric.better == "high") else "worse"
        cell = table.loc["sise", metric.label + (" (points)" if metric.unit else "")]
        assert cell.endswith(f" {better}") and float(cell.split()[0]) == pytest.approx(mean, abs=0.51 if metric.unit else 0.051)
    third = pd.concat([street, street[street.explainer == "sise"].assign(explainer="again")])
    assert list(compared(third, "sise").loc["again"].str.split().str[-1].unique()) == ["open"]  # the same maps
    assert compared(street[street.explainer == "cam"], "cam").empty


def test_rows_equal_a_naive_loop(network):
    frame = evaluate({"cam": GradCAM(network)}, Street(), list(METRICS), batch=4, score="sigmoid")
    order, rows = seeded_order(6), []
    for position, index in enumerate(order):
        item = Street()[index]
        for label in item.labels:
            image, place = item.image[None], item.mask(label)
            cam = GradCAM(network).attribute(image, label)
            with torch.no_grad():
                logits = network.eval()(image)
            one = {"position": position, "name": item.name, "label": label, "predicted": logits.argmax().item(),
                   "probability": logits.sigmoid()[0, label].item(), "area": np.nan if place is None else place.float().mean().item(),
                   "drop": average_drop(network, image, cam, label, score="sigmoid").item(),
                   "increase": increase_rate(network, image, cam, label, score="sigmoid").item(),
                   "insertion": insertion_auc(network, image, cam, label, score="sigmoid").item(),
                   "deletion": deletion_auc(network, image, cam, label, score="sigmoid").item()}
            for name, metric in {"ebpg": ebpg, "miou": miou, "bbox": bbox_score, "pointing": pointing_game}.items():
                one[name] = np.nan if place is None else metric(cam, place[None], **({"tolerance": 2} if name == "pointing" else {})).item()
            rows.append(one)
    naive = pd.DataFrame(rows)
    assert len(frame) == len(naive) == 6 * 2 + 1 and naive.ebpg.isna().sum() == 1
    for column in naive:
        if column == "name":
            assert list(frame.name) == list(naive.name)
        else:
            np.testing.assert_allclose(frame[column].astype(float), naive[column].astype(float), rtol=2e-4, atol=2e-5, err_msg=column)


PROGRAM = textwrap.dedent("""
    import sys
    from test_evaluate import Street
    from xai_companion.evaluate import evaluate
    from xai_companion.explain import SISE, GradCAM
    from xai_companion.explain.contract import trap_network
    network = trap_network()
    frame = evaluate({"cam": GradCAM(network), "sise": SISE(network)}, Street(), ("ebpg", "drop"), batch=1, folder=sys.argv[1], score="sigmoid")
    frame.to_json(sys.argv[2] + f"/{__import__('os').environ.get('RANK', 0)}.json", orient="records", double_precision=15)
""")


def test_two_processes_give_the_table_of_one(network, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = os.environ | QUIET | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, tmp_path / "both", tmp_path]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    ranks = [pd.DataFrame(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(2)]
    written = [sum(len(file.read_text().splitlines()) for file in (tmp_path / "both").glob(f"*.{rank}.jsonl")) for rank in range(2)]
    assert written == [6, 6], "each process should have done half of the batches of both explainers"
    one = evaluate({"cam": GradCAM(network), "sise": SISE(network)}, Street(), ("ebpg", "drop"), batch=1, score="sigmoid")
    for frame in ranks:
        pd.testing.assert_frame_equal(without_time(frame)[list(without_time(one))], without_time(one), check_dtype=False)


@pytest.mark.slow
def test_two_processes_with_different_networks_are_told(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("network = trap_network()", "network = trap_network()\n"
                                       "network[0].weight.data += float(__import__('os').environ['RANK'])"))
    env = os.environ | QUIET | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, tmp_path / "both", tmp_path]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode and "the processes have different models" in run.stderr


def test_a_folder_needs_a_set_with_a_fingerprint(network, tmp_path, monkeypatch):
    monkeypatch.setattr(Street, "fingerprint", "")
    with pytest.raises(ValueError, match="street: a set without a fingerprint"):
        evaluate({"cam": GradCAM(network)}, Street(), ("ebpg",), folder=tmp_path)
    assert len(evaluate({"cam": GradCAM(network)}, Street(), ("ebpg",)))


def test_changed_code_of_ones_own_explainer_starts_anew(network, tmp_path):
    def own(body):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        file.write_text(f"from xai_companion.explain import GradCAM\nclass Own(GradCAM):\n    def compute(self, *a):\n        return {body}\n")
        spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # where inspect finds the source
        spec.loader.exec_module(module)
        return evaluate({"own": module.Own(network)}, Street(), ("ebpg",), folder=tmp_path / "kept").ebpg
    first, changed = own("super().compute(*a)"), own("super().compute(*a) ** 3")
    assert not first.equals(changed) and own("super().compute(*a)").equals(first)
    assert "code" not in describe(GradCAM(network))


def test_changed_code_in_a_notebook_starts_anew(network, monkeypatch):
    "There a class has no file, and its functions have the lines of their cell"
    def own(body):
        cell = f"class Own(GradCAM):\n    def compute(self, *a):\n        return {body}\n"
        monkeypatch.setitem(linecache.cache, f"<cell {body}>", (len(cell), None, cell.splitlines(True), f"<cell {body}>"))
        names = {"GradCAM": GradCAM, "__name__": "__main__"}
        exec(compile(cell, f"<cell {body}>", "exec"), names)
        return describe(names["Own"](network))["code"]
    assert own("0") == own("0") != own("1")


def test_summary_counts_what_was_measured(network):
    frame = evaluate({"cam": GradCAM(network)}, Street(), ("ebpg", "drop"), batch=1)
    frame.loc[frame.position < 2, "ebpg"] = float("nan")
    assert summary(frame).n["cam"] == f"{frame[frame.position > 1].position.nunique()} to {frame.position.nunique()}"


def test_a_stopped_run_goes_on(network, tmp_path, monkeypatch):
    explainers = {"cam": GradCAM(network), "sise": SISE(network)}
    whole = evaluate(explainers, Street(), ("ebpg", "drop"), batch=1)
    add, left = Ledger.add, iter([True] * 5)

    def stop(self, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Ledger, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(explainers, Street(), ("ebpg", "drop"), batch=1, folder=tmp_path)
    monkeypatch.setattr(Ledger, "add", add)
    with open(next(tmp_path.glob("gradcam*.jsonl")), "ab") as stream:
        stream.write(b'{"batch": 3, "rows"')
    calls = []
    monkeypatch.setattr(GradCAM, "attribute", lambda self, *a, inner=GradCAM.attribute: calls.append(0) or inner(self, *a))
    resumed = evaluate(explainers, Street(), ("ebpg", "drop"), batch=1, folder=tmp_path)
    pd.testing.assert_frame_equal(without_time(resumed), without_time(whole))
    assert len(calls) == 3, "three of six batches were left for Grad-CAM"
    evaluate({"cam": GradCAM(network, layers="2")}, Street(), ("ebpg", "drop"), batch=1, folder=tmp_path)
    assert len(calls) == 9, "another layer is another explainer, and starts anew"


def test_another_activation_starts_anew(tmp_path):
    "The same weights are another network with another activation, or another forward pass"
    def rows(base, activation, folder=None):
        network = base(conv, activation, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear)
        return without_time(evaluate({"cam": GradCAM(network, layers="1")}, Street(), ("drop",), batch=1, folder=folder))

    plain = type("Net", (torch.nn.Sequential,), {})
    brighter = type("Net", (torch.nn.Sequential,), {"forward": lambda self, x: torch.nn.Sequential.forward(self, 2 * x)})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        conv, linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 6)
    for kind in ((plain, torch.nn.ReLU()), (plain, torch.nn.Tanh()), (brighter, torch.nn.ReLU())):
        assert rows(*kind, tmp_path).equals(rows(*kind))
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_fingerprints_have_eight_digits():
    model = torch.nn.Linear(2, 2)
    assert len(model_fingerprint(model)) == len(_structure(model)) == 8


def test_options_with_several_values_are_lists():
    assert describe(EXPLAINERS["extremal"](torch.nn.Conv2d(3, 1, 1), areas=(0.1, 0.2)))["areas"] == [0.1, 0.2]
    assert _plain((1, torch.zeros(2))) == [1, _plain(torch.zeros(2))] != [1, _plain(torch.ones(2))]


def test_more_images_complete_a_short_last_batch(network, tmp_path):
    explainers = {"cam": GradCAM(network)}
    evaluate(explainers, Street(), ("drop",), n=3, batch=2, folder=tmp_path)
    more = evaluate(explainers, Street(), ("drop",), n=6, batch=2, folder=tmp_path)
    assert sorted(more.position.unique()) == list(range(6))
    fewer = evaluate(explainers, Street(), ("drop",), n=3, batch=2, folder=tmp_path)
    assert sorted(fewer.position.unique()) == list(range(3))


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"x": 1}'])
def test_a_damaged_line_names_the_file(network, tmp_path, line):
    evaluate({"cam": GradCAM(network)}, Street(), ("drop",), n=2, batch=1, folder=tmp_path)
    file = next(tmp_path.glob("*.jsonl"))
    file.write_text(f"{line}\n" + file.read_text())
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        evaluate({"cam": GradCAM(network)}, Street(), ("drop",), n=2, batch=1, folder=tmp_path)


HOLDER = textwrap.dedent("""
    import sys, time
    from test_evaluate import Street
    from xai_companion import evaluate as module
    from xai_companion.explain import GradCAM
    from xai_companion.explain.contract import trap_network
    def wait(*arguments):
        print("computing", flush=True)
        time.sleep(600)
    module._one_batch = wait
    module.evaluate({"cam": GradCAM(trap_network())}, Street(), ("drop",), batch=1, folder=sys.argv[1])
""")


def test_a_second_writer_is_refused(network, tmp_path, monkeypatch):
    env = os.environ | QUIET | {"PYTHONPATH": os.path.dirname(__file__)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "computing\n"
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(RuntimeError, match=r"another process is writing .*gradcam-\w+\.0\.jsonl.*another folder"):
            evaluate({"cam": GradCAM(network)}, Street(), ("drop",), batch=1, folder=tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert len(evaluate({"sise": SISE(network)}, Street(), ("drop",), batch=1, folder=tmp_path)) > 0  # another file
        monkeypatch.setenv("RANK", "1")
        assert len(evaluate({"cam": GradCAM(network)}, Street(), ("drop",), batch=1, folder=tmp_path)) > 0  # another rank
        monkeypatch.delenv("RANK")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert len(evaluate({"cam": GradCAM(network)}, Street(), ("drop",), batch=1, folder=tmp_path)) > 0


def test_the_lock_ends_with_the_evaluation(network, tmp_path, monkeypatch):
    again = {"a": GradCAM(network), "b": GradCAM(network)}  # two names of one explainer share a file
    frame = evaluate(again, Street(), ("drop",), batch=1, folder=tmp_path)
    assert frame.groupby("explainer").size().nunique() == 1
    monkeypatch.setattr(GradCAM, "attribute", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate({"cam": GradCAM(network, layers="2")}, Street(), ("drop",), batch=1, folder=tmp_path)
    program = ("import sys\nfrom pathlib import Path\nfrom filelock import FileLock\n"
               "for file in Path(sys.argv[1]).glob('*.lock'):\n    FileLock(file).acquire(timeout=0)\n    print(file.name)")
    free = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert free.returncode == 0 and len(free.stdout.split()) == 2, free.stderr


class Broken(Explainer):
    "A map with NaN for one image of a batch; not registered, since other tests run on every registered explainer"
    name = "broken_for_a_test"

    def compute(self, images, target):
        maps = images.mean(1, keepdim=True)
        maps[-1, 0, 0, 0] = float("nan")
        return maps


def test_a_map_with_nan_names_the_explainer(network):
    with pytest.raises(ValueError, match=r"broken_for_a_test \(version=1.*makes of \d\.jpg, class \d, has NaN"):
        evaluate({"cam": GradCAM(network), "mine": Broken(network)}, Street(), ("drop",), score="sigmoid")


def test_more_images_than_there_are(network):
    with pytest.warns(UserWarning, match="n=50, but street val has 6 images") as said:
        frame = evaluate({"cam": GradCAM(network)}, Street(), ("drop",), n=50, batch=1)
    assert frame.position.nunique() == 6 and len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate({"cam": GradCAM(network)}, Street(), ("drop",), n=6)


def test_budget_stops_the_slow_and_keeps_pairs(network, tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "seconds", property(lambda self: len(self.done) * self.own.name.startswith("sise")))
    explainers = {"cam": GradCAM(network), "sise": SISE(network)}
    done = evaluate(explainers, Street(), ("drop",), batch=1, budget=3, folder=tmp_path).groupby("explainer").position.unique()
    assert done["sise"].tolist() == [0, 1, 2] and done["cam"].tolist() == list(range(6))


def test_an_explainer_that_saw_no_mask_keeps_its_column(network, tmp_path, monkeypatch):
    class Late(Street):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item if index != seeded_order(6)[0] else Item(item.name, item.image, item.labels)

    monkeypatch.setattr(Ledger, "seconds", property(lambda self: len(self.done) * self.own.name.startswith("sise")))
    explainers = {"cam": GradCAM(network), "sise": SISE(network)}
    frame = evaluate(explainers, Late(), ("ebpg",), batch=1, budget=1, folder=tmp_path)
    assert summary(frame).loc["sise", "EBPG (%)"] == "-" and "±" in summary(frame).loc["cam", "EBPG (%)"]
    assert len(differences(frame, "cam", ["sise"], "ebpg")["sise"]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision(dtype):
    whole, half = (evaluate({"cam": GradCAM(trap_network().to(d))}, Street(), ("ebpg", "drop"), n=2) for d in (torch.float32, dtype))
    for name in ("probability", "ebpg", "drop"):
        np.testing.assert_allclose(half[name], whole[name], atol=0.02, err_msg=name)


def test_one_order_for_all():
    assert seeded_order(50, 7) == seeded_order(50)[:7] and sorted(seeded_order(50)) == list(range(50))
    units = load_units(Street(), seeded_order(6), range(6), 32)
    assert units.images.shape == (13, 3, 32, 32) and [m is None for m in units.masks].count(True) == 1
    assert units.target.tolist() == [fact["label"] for fact in units.facts]


def test_one_image_is_enough():
    assert len(seeded_order(5, 1)) == 1 and sorted(seeded_order(5)) == list(range(5))
    for count, n in ((5, 0), (0, None)):
        with pytest.raises(ValueError):
            seeded_order(count, n)


def test_thirds_by_area():
    frame = pd.DataFrame({"position": range(9), "label": 0, "area": np.linspace(0.1, 0.9, 9), "explainer": "a", "ebpg": 0.5})
    assert list(by_size(frame).third) == ["small"] * 3 + ["medium"] * 3 + ["large"] * 3
    with pytest.raises(ValueError, match="where its object is"):
        by_size(frame.assign(area=np.nan))


def test_summary_has_the_interval_of_scipy():
    from scipy import stats
    values = np.random.default_rng(0).random(30)
    frame = pd.DataFrame({"explainer": "a", "position": range(30), "ebpg": values, "seconds": 0.25})
    half = stats.t.ppf(0.975, 29) * stats.sem(100 * values)
    assert summary(frame).loc["a", "EBPG (%)"] == f"{100 * values.mean():.1f} ± {half:.1f}"


def test_summary_of_rows_without_a_metric():
    frame = pd.DataFrame({"explainer": "a", "position": [0, 1, 2], "seconds": [1.0, 2.0, 3.0]})
    assert summary(frame).loc["a"].to_dict() == {"seconds": "2", "n": "3"}


@pytest.mark.parametrize("change, words", [
    ({"metrics": ("ebgp",)}, "unknown metric ebgp"), ({"metrics": ()}, "none given"), ({"n": 0}, "at least 1"),
    ({"explainers": {}}, "got 0 models"), ({"score": "probability"}, "unknown score"), ({"batch": 0}, "batch must be"),
    *(({"budget": budget}, "budget must be above 0") for budget in (0, -1, float("nan")))])
def test_bad_input(network, change, words):
    call = {"explainers": {"cam": GradCAM(network)}, "data": Street(), "metrics": ("drop",)} | change
    with pytest.raises(ValueError, match=words):
        evaluate(**call)


def test_evaluate_leaves_no_trace():
    network, images = trap_network(), torch.zeros(1)
    before = footprint(network, images)
    evaluate({"cam": GradCAM(network), "rise": RISE(network, n_masks=8)}, Street(), list(METRICS), n=3)
    assert_untouched(before, footprint(network, images), "after an evaluation")


def test_labels_that_the_model_does_not_have(network):
    class Named(Street):
        def __init__(self, *names):
            self.classes = list(names)

    with pytest.raises(ValueError, match="the model has 6 outputs, synthetic 20 classes: set model.classes"):
        evaluate({"cam": GradCAM(network)}, Synthetic("test", n=12, size=32), ("ebpg",))
    named = trap_network()
    named.classes = list("abcdef")
    assert len(evaluate({"cam": GradCAM(named)}, Named(*"ABCDEF"), ("ebpg",), n=2)) > 1  # capitals say nothing
    with pytest.raises(ValueError, match=r"by name they are \[1, 0, 2, 3, 4\].*Restricted"):
        evaluate({"cam": GradCAM(named)}, Named(*"bacdef"), ("ebpg",), n=2)
    with pytest.raises(ValueError, match="'x' is not one of them"):
        evaluate({"cam": GradCAM(named)}, Named(*"abcdex"), ("ebpg",), n=2)


@pytest.mark.parametrize("wrong, kind, message", [
    ({"explainers": GradCAM}, TypeError, "must be a dict of names and explainers"), ({"explainers": {"a": "gradcam"}}, TypeError, "must be a dict"),
    ({"metrics": "drop"}, TypeError, r"a list of names, such as \['drop'\]"), ({"metrics": [ebpg]}, TypeError, "a list of names"),
    ({"data": [1, 2]}, TypeError, "an ImageSet, not a list: data.items.Pairs"),
    ({"top": 0.3, "metrics": ["insertion"]}, ValueError, "has an option 'top': it belongs to drop and increase"),
    ({"foo": 3}, ValueError, "has an option 'foo': there are score, fill"), ({"fill": (124, 116, 104)}, ValueError, r"a fill lies in \[0, 1\]"),
])
def test_wrong_arguments(network, wrong, kind, message):
    usual = {"explainers": {"cam": GradCAM(network)}, "data": Street(), "metrics": ["drop", "ebpg"]}
    with pytest.raises(kind, match=message):
        evaluate(**usual | wrong)


def test_each_metric_takes_its_own_options(network):
    "`top` changes Drop, `steps` the curves, `fill` both"
    cam, both = {"cam": GradCAM(network)}, ["drop", "insertion"]
    usual, top, steps, fill = (evaluate(cam, Street(), both, **own) for own in ({}, {"top": 0.5}, {"steps": 3}, {"fill": "blur"}))
    assert not top["drop"].equals(usual["drop"]) and top["insertion"].equals(usual["insertion"])
    assert steps["drop"].equals(usual["drop"]) and not steps["insertion"].equals(usual["insertion"])
    assert not fill["drop"].equals(usual["drop"])


def test_a_score_of_your_own(network, tmp_path, monkeypatch):
    "From maps and masks, or from the model with options; a change of its code starts anew; what is not a value per image is refused"
    cam, asked = {"cam": GradCAM(network)}, []

    def rate(factor, places=lambda maps, masks: (maps * masks).flatten(1).amax(1)):
        def logits(model, images, maps, target, *, power=1):
            asked.append(power)
            return model(images)[range(len(target)), target] ** power
        monkeypatch.setitem(METRICS, "peak", Metric("Peak", "high", "mask", of=places))
        monkeypatch.setitem(METRICS, "logit", Metric("Logit", "high", "model", "", of=logits))
        options = {} if factor == 1 else {"power": factor}
        return evaluate(cam, Street(), ("peak", "logit", "ebpg"), folder=tmp_path, **options)

    first, squared = rate(1), rate(2)
    assert set(asked) == {1, 2}
    torch.testing.assert_close(torch.tensor(squared.logit), torch.tensor(first.logit) ** 2)
    for row in first.itertuples():
        item = Street()[int(row.name[0])]
        with torch.no_grad(), evaluating(network):
            assert network(item.image[None])[0, row.label] == pytest.approx(row.logit, abs=1e-4)
        mask = item.mask(row.label)
        if mask is None:
            assert np.isnan(row.peak) and np.isnan(row.ebpg)
        else:
            own = GradCAM(network).attribute(item.image[None], row.label)
            assert row.peak == pytest.approx((own[0] * mask).max().item(), abs=1e-5)
    assert "Peak (%)" in summary(first) and "Logit" in summary(first)
    changed = rate(1, lambda maps, masks: (maps * masks).flatten(1).amax(1) / 2)
    torch.testing.assert_close(torch.tensor(changed.peak) * 2, torch.tensor(first.peak), equal_nan=True)
    with pytest.raises(ValueError, match=r"the metric 'peak' must give one value per image, a tensor \(\d+,\), got \(\)"):
        rate(1, lambda maps, masks: maps.mean())
    with pytest.raises(ValueError, match="no.* option 'power': it belongs to logit"):
        evaluate(cam, Street(), ("drop",), power=2)


def test_the_command_names_every_metric(capsys):
    with pytest.raises(SystemExit):
        command("evaluate", "--help")
    assert set(METRICS) <= set(capsys.readouterr().out.replace(",", " ").split())


def test_probabilities_in_the_place_of_logits():
    model = torch.nn.Sequential(load_model("plain_cnn"), torch.nn.Softmax(1))
    with pytest.warns(UserWarning, match="take out the softmax"):
        evaluate({"saliency": EXPLAINERS["saliency"](model)}, Synthetic("test", n=4, size=32), ("drop",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate({"saliency": EXPLAINERS["saliency"](model[0])}, Synthetic("test", n=4, size=32), ("drop",))


def test_pairs_of_images_and_labels(network, tmp_path):
    "A torchvision data set, a list of tensors and bytes: the same rows as an ImageSet of the same images"
    model, data = load_model("plain_cnn"), Synthetic("test", n=4, size=32)
    pixels = [((item.image * 255).round().byte(), item.label) for item in data]
    rows = []
    for pairs in (pixels, [(image.float() / 255, torch.tensor(label)) for image, label in pixels]):
        rows.append(evaluate({"cam": GradCAM(model)}, Pairs(pairs, data.classes), ("drop",)))
    pd.testing.assert_frame_equal(*map(without_time, rows))
    assert sorted(rows[0]["label"]) == sorted(label for _, label in pixels)
    for image, label in pixels:
        place = tmp_path / data.classes[label]
        place.mkdir(exist_ok=True)
        save_image(image / 255, place / f"{label}.png")
    found = Pairs(ImageFolder(tmp_path))
    assert found.classes == sorted({data.classes[label] for _, label in pixels})
    torch.testing.assert_close(found[0].image, dict(zip((data.classes[k] for _, k in pixels), pixels, strict=True))[found.classes[0]][0] / 255)
    with pytest.raises(ValueError, match="give classes"):
        Pairs(pixels)
    from PIL import Image
    palette = Image.new("RGB", (4, 4), (200, 100, 50)).quantize(8)
    assert torch.allclose(Pairs([(palette, 0)], ["a"])[0].image[:, 0, 0] * 255, torch.tensor([200.0, 100, 50]), atol=2)
    for pair, words in (((torch.rand(4, 8, 8), 0), "1 or 3 channels"), ((torch.rand(3, 8, 8), "cat"), "one class, a whole number; got 'cat'"),
                        ((torch.rand(3, 8, 8), torch.eye(3)[1]), "one class, a whole number")):
        with pytest.raises(ValueError, match=words):
            Pairs([pair], ["a"])[0]
    with pytest.raises(TypeError, match="TensorDataset"):
        Pairs((torch.rand(2, 3, 8, 8), torch.zeros(2)), ["a"])
    with pytest.raises(TypeError, match="of a DataLoader give its dataset"):
        Pairs(torch.utils.data.DataLoader(pixels), data.classes)
    assert Item("a", torch.rand(3, 4, 4), torch.tensor(2), torch.tensor([[0, 0, 1, 1]])).box_labels == (2,)
    with pytest.raises(ValueError, match="2 boxes and 1 box_labels"):
        Item("a", torch.rand(3, 4, 4), (1, 2), torch.zeros(2, 4), (1,))


def test_images_of_different_sizes_need_a_size(network):
    class Album(Street):
        def __getitem__(self, index):
            return Item(str(index), torch.rand(3, 20 + index, 24), (0,))

    with pytest.raises(ValueError, match="different sizes.*give size"):
        evaluate({"cam": GradCAM(network)}, Album(), ("drop",))
    assert len(evaluate({"cam": GradCAM(network)}, Album(), ("drop",), size=16)) == 6


def test_two_models_are_not_compared(network):
    with pytest.raises(ValueError, match="2 models"):
        evaluate({"a": GradCAM(network), "b": GradCAM(trap_network(1))}, Street(), ("drop",))


def test_the_device_is_where_the_model_goes(network):
    "As `audit` has it; without one the model stays where it is"
    for device in (None, "cpu", "auto"):
        assert len(evaluate({"cam": GradCAM(network)}, Street(), ("drop",), n=1, device=device))
    with pytest.raises(RuntimeError, match="'cuda:99' cannot be used here"):
        evaluate({"cam": GradCAM(network)}, Street(), ("drop",), device="cuda:99")


def test_nothing_is_finished_without_a_folder(network):
    assert not is_finished({"cam": GradCAM(network)}, Street(), ("drop",))


def test_several_processes_need_a_folder(network, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="folder"):
        evaluate({"cam": GradCAM(network)}, Street(), ("drop",))


# ------------------------------------------------------------------ from a terminal


def evaluated(*words):
    return command("evaluate", "--model", "plain_cnn", "--methods", "gradcam", "--device", "cpu", *words)


def test_ctrl_c_says_where_it_goes_on(tmp_path, monkeypatch, capsys):
    add, left = Ledger.add, iter([True] * 2)

    def stop(self, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Ledger, "add", stop)
    assert evaluated("--n", 12, "--batch", 4, "--out", tmp_path) == 130
    assert f"stopped: the finished batches are in {tmp_path / 'batches'}" in capsys.readouterr().err
    monkeypatch.setattr(Ledger, "add", add)
    calls = []
    monkeypatch.setattr(GradCAM, "attribute", lambda self, *a, inner=GradCAM.attribute: calls.append(0) or inner(self, *a))
    assert evaluated("--n", 12, "--batch", 4, "--out", tmp_path) == 0 and len(calls) == 1


def test_a_folder_of_images(tmp_path, capsys):
    "Some classes of the model, in the order of the alphabet, found by their names"
    data, network = Synthetic("test", n=20, size=32), load_model("plain_cnn")
    chosen = sorted({data[i].label for i in range(20)}, key=lambda label: data.classes[label])[::3]
    assert chosen != sorted(chosen)
    for i in range(20):
        item = data[i]
        if item.label in chosen:
            place = tmp_path / "photos" / data.classes[item.label]
            place.mkdir(parents=True, exist_ok=True)
            save_image(item.image, place / f"{i}.png")
    assert evaluated("--data", tmp_path / "photos", "--metrics", "drop", "--out", tmp_path / "out") == 0
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    for row in rows.to_dict("records"):
        image = data[int(row["name"].split("/")[-1].removesuffix(".png"))]
        with torch.no_grad():
            said = network(image.image[None])[0, chosen].softmax(0)
        assert chosen[row["label"]] == image.label and row["probability"] == pytest.approx(said[row["label"]].item(), abs=0.02)  # the files have bytes
    assert len(rows) >= len(chosen) > 2 and rows["drop"].notna().all() and "imagefolder" in capsys.readouterr().out
    assert evaluated("--data", "imagefolder", "--root", tmp_path / "photos", "--metrics", "drop", "--out", tmp_path / "out") == 0
    assert rows.equals(pd.read_csv(tmp_path / "out" / "rows.csv"))  # the same batches, found again
    assert evaluated("--data", "imagefolder", "--out", tmp_path / "out") == 2 and "neither a folder" in capsys.readouterr().err
    (tmp_path / "photos" / data.classes[chosen[0]]).rename(tmp_path / "photos" / "dragon")
    words = ("--data", tmp_path / "photos", "--metrics", "drop,ebpg", "--out", tmp_path / "out")
    assert evaluated(*words) == 2 and "'dragon' is not one of them. Rename the folders" in capsys.readouterr().err
    [first, *others] = sorted((tmp_path / "photos").rglob("*.png"))
    (tmp_path / "map.json").write_text(json.dumps({"dragon": chosen[0]} | {data.classes[k]: k for k in chosen[1:]}))
    (tmp_path / "boxes.csv").write_text(f"{first.relative_to(tmp_path / 'photos').as_posix()},4,4,20,30\n")
    assert evaluated(*words, "--class-map", tmp_path / "map.json", "--boxes", tmp_path / "boxes.csv") == 0
    assert "classes matched by a class map" in capsys.readouterr().out
    found = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert sorted(found["drop"]) == pytest.approx(sorted(rows["drop"]), abs=1e-4)  # the same images and classes
    assert set(found[found.ebpg.notna()].name) == {first.relative_to(tmp_path / "photos").as_posix()} and others


def test_an_imagenet_model_on_imagenet_files(tmp_path):
    "All thousand classes, of which some have the same name"
    write_samples(tmp_path)
    assert evaluated("--model", "efficientnet_lite0", "--data", "imagenet_samples", "--root", tmp_path, "--size", "64", "--metrics", "drop",
                     "--methods", "saliency", "--n", "2", "--out", tmp_path / "out") == 0
    assert len(pd.read_csv(tmp_path / "out" / "rows.csv")) == 2


def test_classes_are_counted_at_the_size_that_is_evaluated(tmp_path, capsys, monkeypatch):
    "A network for one size of images, asked to squash others to it"
    (tmp_path / "flat.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 20))\n")
    monkeypatch.chdir(tmp_path)
    words = ("--model", "flat:make", "--methods", "saliency", "--metrics", "drop", "--n", "2", "--size", "16", "--device", "cpu", "--out", tmp_path / "out")
    assert command("evaluate", *words) == 0 and (tmp_path / "out" / "summary.csv").is_file(), capsys.readouterr().err


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    "Two processes share the batches; `--` keeps torchrun from reading --n"
    bin = os.path.dirname(sys.executable)
    words = [f"{bin}/torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "--", f"{bin}/xai-companion", "evaluate",
             "--model", "plain_cnn", "--methods", "gradcam", "--n", "16", "--batch", "4", "--device", "cpu", "--out", tmp_path]
    done = subprocess.run(list(map(str, words)), env=os.environ | QUIET, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("16 rows in") == 1, done.stdout + done.stderr[-2000:]
    written = [len(file.read_text().splitlines()) for file in (tmp_path / "batches").glob("*.jsonl")]
    assert written == [2, 2]


def test_no_table_of_another_run_stays(tmp_path, capsys):
    "Two methods, then one; then two on a single image, of which nothing can be compared"
    words = ("evaluate", "--model", "plain_cnn", "--device", "cpu", "--metrics", "ebpg", "--out", tmp_path)
    for methods, n, wanted in (("gradcam,layercam", 6, {"summary", "compared", "by_size"}), ("gradcam", 2, {"summary"}),
                               ("gradcam,layercam", 1, {"summary"})):
        assert command(*words, "--methods", methods, "--n", n) == 0
        assert {file.stem for file in tmp_path.glob("*.csv")} == wanted | {"rows"}
        assert "Empty" not in capsys.readouterr().out


def test_what_the_command_passes_on(tmp_path, monkeypatch, capsys):
    class Asked(Exception):
        pass

    def asked(explainers, data, metrics, **options):
        raise Asked(list(explainers), data.split, metrics, options | {"kept": (tmp_path / "batches" / "old").exists()})
    monkeypatch.setattr("xai_companion.evaluate.evaluate", asked)
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "old").touch()
    words, usual = ("evaluate", "--model", "plain_cnn", "--device", "cpu", "--out", tmp_path), {"folder": tmp_path / "batches", "device": "cpu"}
    for more, wanted in (
            ((), (["gradcam", "sise"], "val", ["ebpg", "miou", "bbox", "drop", "increase"],
                  usual | dict(n=None, seed=0, size=None, batch=8, budget=None, score="softmax", kept=True))),
            (("--split", "test", "--methods", "rise:n_masks=9", "--metrics", "drop", "--n", 3, "--seed", 4, "--size", 48, "--batch", 5,
              "--budget", 2.5, "--score", "logit", "--fresh"),
             (["rise:n_masks=9"], "test", ["drop"], usual | dict(n=3, seed=4, size=48, batch=5, budget=2.5, score="logit", kept=False)))):
        with pytest.raises(Asked) as found:
            command(*words, *more)
        assert found.value.args == wanted
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(*words, "--fresh") == 2 and "--fresh deletes what other processes may be writing" in capsys.readouterr().err


def test_a_plan_is_made_where_the_device_is_missing(network, tmp_path):
    "On the computer of a plan there may be no GPU; what the run on one has kept is another thing than what a CPU has"
    usual = {"explainers": {"cam": GradCAM(network)}, "data": Street(), "metrics": ("drop",), "folder": tmp_path}
    evaluate(**usual)
    assert is_finished(**usual, device="cpu") and not is_finished(**usual, device="cuda")
