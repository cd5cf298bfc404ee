"""Records, intervals and agreement; and every file in results/ fits the schema."""
import json
import re
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from scipy import stats

from xai_companion import results, verdicts
from xai_companion.core import PROFILES
from xai_companion.records import mean_interval, record, validate
from xai_companion.results import PAPERS, agrees, load, save, show

ROOT = Path(__file__).parents[1]
STORED = sorted((ROOT / "results").rglob("*.json"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "A quick, recording run with its own results/ and reports/"
    for name in ("RESULTS", "REPORTS"):
        monkeypatch.setenv(f"XAI_COMPANION_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "quick")
    monkeypatch.setenv("XAI_COMPANION_RECORD", "1")
    monkeypatch.delenv("XAI_COMPANION_REPORT", raising=False)
    return tmp_path


@pytest.mark.parametrize("file", STORED, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_stored_file(file):
    paper, name = file.relative_to(ROOT / "results").parts
    table, profile, _ = name.split(".")
    assert paper in PAPERS and re.fullmatch(r"[a-z0-9_]+", table) and profile in set(PROFILES) - {"smoke"}
    text = file.read_text(encoding="utf-8")
    assert validate(json.loads(text)) and not re.search(r"/(?:home|root|tmp)/", text)


def test_interval_is_scipys():
    values = np.random.default_rng(0).gamma(2, size=17)
    low, high = stats.t.interval(0.95, 16, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx((values.mean(), low, high), rel=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_prediction_interval_holds_a_new_seed_19_times_out_of_20():
    rng = np.random.default_rng(0)
    blank = record({"row": "x"}, 1.0, n=1)
    draws = rng.normal(100, 5, size=(2000, 6))
    made = [[{**blank, "value": v, "seed": i} for i, v in enumerate(draw)] for draw in draws]
    assert np.mean([agrees(m[0], m[1:]) for m in made]) == pytest.approx(0.95, abs=0.015)


def test_agreement_without_spread():
    one, near, far = (record({"row": "x"}, v, n=1) for v in (1.0, 1.009, 1.02))
    seeds = [{**one, "seed": s} for s in range(5)]
    assert agrees(near, one) and not agrees(far, one)
    assert agrees(near, seeds) and not agrees(far, seeds)
    assert agrees({**near, "seed": 3}, one) is None
    gpu = {**far, "provenance": {**far["provenance"], "hardware": "a GPU"}}
    assert agrees(gpu, one)


def test_merge_keeps_what_others_stored(folders, monkeypatch):
    a, b = (record({"row": row}, 1.0, n=3) for row in "ab")
    save("sise", "t", [a, b])
    save("sise", "t", [record({"row": "a"}, 2.0, n=3), record({"row": "a"}, 3.0, n=3, seed=1)])
    stored = load("sise", "t")["quick"]
    found = [(r["config"]["row"], r["seed"], r["value"]) for r in stored]
    assert found == [("a", 0, 2.0), ("b", 0, 1.0), ("a", 1, 3.0)]
    assert not list(folders.rglob("*.part"))
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        save("sise", "t", [record({"row": "c"}, 2.0, n=3)])
    assert load("sise", "t")["quick"] == stored and not list(folders.rglob("*.part"))


def test_two_that_save_at_once_lose_nothing(folders, monkeypatch):
    "The second one begins when the first has read the file, and has not written yet"
    read, second = results._read, Thread(target=save, args=("sise", "t", [record({"row": "b"}, 1.0, n=3)]))

    def interrupted(file):
        found = read(file)
        if second.ident is None:
            second.start()
            second.join(0.5)
        return found

    monkeypatch.setattr(results, "_read", interrupted)
    save("sise", "t", [record({"row": "a"}, 1.0, n=3)])
    second.join()
    assert [r["config"]["row"] for r in load("sise", "t", folders / "reports")["quick"]] == ["a", "b"]


@pytest.mark.parametrize("profile, record_it", [("smoke", "1"), ("quick", "0"), ("quick", "")])
def test_not_recorded(folders, monkeypatch, profile, record_it):
    monkeypatch.setenv("XAI_COMPANION_PROFILE", profile)
    monkeypatch.setenv("XAI_COMPANION_RECORD", record_it)
    save("sise", "t", [record({"row": "a"}, 1.0, n=3)])
    assert not (folders / "results").exists() and list((folders / "reports").rglob("*.json"))


@pytest.mark.parametrize("paper, table", [("../sise", "t"), ("sise", "../t"), ("sise", "T 1")])
def test_names_are_checked(folders, paper, table):
    with pytest.raises(ValueError):
        save(paper, table, [record({"row": "a"}, 1.0, n=3)])


@pytest.mark.parametrize("change, says", [
    ({"value": float("inf")}, "finite"), ({"value": "1"}, "wrong type"), ({"n": 0}, "below 1"),
    ({"interval": [2, 1]}, "low, high"), ({"interval": [1]}, "low, high"), ({"paper": {"value": 1}}, "source"),
    ({"paper": "n/a"}, "not available"), ({"seed": 1}, "key"), ({"provenance": {}}, "provenance"), ({"x": 1}, "unknown")])
def test_schema(change, says):
    good = record({"row": "a"}, 1.0, n=3, paper={"value": 2, "source": "Table 1"})
    with pytest.raises(ValueError, match=says):
        validate([{**good, **change}])
    with pytest.raises(ValueError, match="twice"):
        validate([good, good])


def test_damage_names_the_file(folders):
    file = folders / "results" / "sise" / "t.cpu.json"
    file.parent.mkdir(parents=True)
    for text in ("", "[{", "{}", "[1]", '[{"key": "x"}]'):
        file.write_text(text)
        with pytest.raises(ValueError, match="results/sise/t.cpu.json is damaged"):
            show("sise", "t")


def test_show(folders, monkeypatch):
    save("sise", "t", [record({"row": "A", "version": v}, float(v), "%", n=3) for v in (1, 2)])
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "gpu")
    save("sise", "t", [record({"row": "B"}, 70.0 + s, "%", n=9, seed=s) for s in range(3)])
    table = show("sise", "t")
    assert list(table.columns) == ["paper", "quick", "gpu"] and list(table.index) == ["A", "B"]
    assert table.loc["A", "quick"] == "2 %, n=3"   # the higher version
    assert table.loc["B", "gpu"] == "71.0 [68.5, 73.5] %, 3 seeds"
    assert str(show("sise", "t")) == str(table)
    notice = show("sise", "absent")
    assert len(notice) == 1 and "reproduce --record" in notice.iloc[0, 0]


TABLES = {"show": show, "grid": results.grid, "provenance": results.provenance, "claims": verdicts.claims,
          "comparisons": verdicts.comparisons}
SHOWN = [(file.relative_to(ROOT).as_posix(), cell["source"], cell["outputs"]) for file in sorted((ROOT / "nbs").rglob("*.ipynb"))
         for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
         if cell["cell_type"] == "code" and "".join(cell["source"]).startswith(tuple(f"{name}(\"" for name in TABLES))]


@pytest.mark.parametrize("name, source, outputs", SHOWN, ids=[f"{n}-{''.join(s)}" for n, s, _ in SHOWN])
def test_stored_tables_show_the_records(name, source, outputs, monkeypatch):
    "Render every table of the notebooks again from results/: what a page shows is what is recorded"
    if name.endswith(("02_results.ipynb", "02a_verdicts.ipynb")):
        pytest.skip("that notebook makes a miniature set of results for itself")
    monkeypatch.chdir(ROOT)
    for variable in ("XAI_COMPANION_REPORT", "XAI_COMPANION_RESULTS"):
        monkeypatch.delenv(variable, raising=False)
    table = eval("".join(source), dict(TABLES))
    assert "".join(outputs[0]["data"]["text/plain"]) == repr(table)
