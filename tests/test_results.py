"""Records, intervals and agreement; every file in results/ fits the schema, and the pages show what is in it."""
import ast
import io
import json
import re
from contextlib import redirect_stdout
from threading import Thread

import numpy as np
import pytest
from helpers import NBS, NOTEBOOKS, ROOT
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from scipy import stats

from xai_companion import overview, printed, results, verdicts
from xai_companion.core import PROFILES
from xai_companion.records import mean_interval, record, validate
from xai_companion.results import PAPERS, TIMES, _cell, _labels, agrees, grid_cell, load, newest, save, show, summarize
from xai_companion.testbeds import OF_PROFILE, TESTBEDS

STORED = sorted((ROOT / "results").rglob("*.json"))


@pytest.mark.parametrize("file", STORED, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_stored_file(file):
    paper, name = file.relative_to(ROOT / "results").parts
    table, profile, _ = name.split(".")
    assert paper in PAPERS and re.fullmatch(r"[a-z0-9_]+", table) and profile in set(PROFILES) - {"smoke"}
    text = file.read_text(encoding="utf-8")
    records = validate(json.loads(text))
    assert records and not re.search(r"/(?:home|root|tmp)/", text)
    assert not any("wins" in r for r in records if r["unit"] in TIMES), "a share of time has no win rate"
    computers = {r["provenance"]["hardware"] for r in records if r["unit"] in TIMES}
    assert len(computers) <= 1, "times that stand side by side are from one computer: one that was taken on a faster one is no gain"


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


def test_merge_keeps_what_others_stored(quick, monkeypatch):
    a, b = (record({"row": row}, 1.0, n=3) for row in "ab")
    save("sise", "t", [a, b])
    save("sise", "t", [record({"row": "a"}, 2.0, n=3), record({"row": "a"}, 3.0, n=3, seed=1)])
    stored = load("sise", "t")["quick"]
    found = [(r["config"]["row"], r["seed"], r["value"]) for r in stored]
    assert found == [("a", 0, 2.0), ("b", 0, 1.0), ("a", 1, 3.0)]
    assert not list(quick.rglob("*.part"))
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        save("sise", "t", [record({"row": "c"}, 2.0, n=3)])
    assert load("sise", "t")["quick"] == stored and not list(quick.rglob("*.part"))


def test_two_that_save_at_once_lose_nothing(quick, monkeypatch):
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
    assert [r["config"]["row"] for r in load("sise", "t", quick / "reports")["quick"]] == ["a", "b"]


@pytest.mark.parametrize("profile, record_it", [("smoke", "1"), ("quick", "0"), ("quick", "")])
def test_not_recorded(quick, monkeypatch, profile, record_it):
    monkeypatch.setenv("XAI_COMPANION_PROFILE", profile)
    monkeypatch.setenv("XAI_COMPANION_RECORD", record_it)
    save("sise", "t", [record({"row": "a"}, 1.0, n=3)])
    assert not (quick / "results").exists() and list((quick / "reports").rglob("*.json"))


@pytest.mark.parametrize("paper, table", [("../sise", "t"), ("sise", "../t"), ("sise", "T 1")])
def test_names_are_checked(quick, paper, table):
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


def test_damage_names_the_file(quick):
    file = quick / "results" / "sise" / "t.cpu.json"
    file.parent.mkdir(parents=True)
    for text in ("", "[{", "{}", "[1]", '[{"key": "x"}]'):
        file.write_text(text)
        with pytest.raises(ValueError, match="results/sise/t.cpu.json is damaged"):
            show("sise", "t")


def test_show(quick, monkeypatch):
    save("sise", "t", [record({"row": "A", "version": v}, float(v), "%", n=3) for v in (1, 2)])
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "gpu")
    save("sise", "t", [record({"row": "B"}, 70.0 + s, "%", n=9, seed=s) for s in range(3)])
    table = show("sise", "t")
    assert list(table.columns) == ["quick", "gpu"] and list(table.index) == ["A", "B"]
    assert table.loc["A", "quick"] == "2 %, n=3"   # the higher version
    assert table.loc["B", "gpu"] == "71.0 [68.5, 73.5] %, 3 seeds"
    assert str(show("sise", "t")) == str(table)
    save("sise", "t", [record({"row": "B"}, 70.0, "%", n=9, seed=0, paper={"value": 71, "source": "Table 1"})])
    assert dict(show("sise", "t")["paper"]) == {"A": "not available", "B": "71 (Table 1)"}
    notice = show("sise", "absent")
    assert len(notice) == 1 and "reproduce --record" in notice.iloc[0, 0]


def test_a_notebook_stores_a_table_once(monkeypatch):
    "In a terminal the text, in a notebook the HTML and a line"
    table, display = results.Table({"score": [1.5, 2.5]}, index=["A", "B"]), DisplayFormatter()
    for shell, text in ((None, repr(table)), (TerminalInteractiveShell.__new__(TerminalInteractiveShell), repr(table)),
                        (InteractiveShell.__new__(InteractiveShell), "Table of 2 rows")):
        monkeypatch.setattr("IPython.get_ipython", lambda shell=shell: shell)
        assert display.format(table)[0] == {"text/plain": text, "text/html": table._repr_html_()}


TABLES = {function.__name__: function for function in (
    show, results.grid, results.provenance, verdicts.claims, verdicts.comparisons, overview.claims_overview, overview.claim_details,
    overview.settings_overview, overview.headlines, overview.not_run, printed.printed, printed.grids)}
FORMS = {"text/plain": lambda shown: shown._in_short() if isinstance(shown, results.Table) else repr(shown),
         "text/html": lambda table: table._repr_html_(), "text/markdown": lambda table: table._repr_markdown_()}
MINIATURES = {"02_results", "02a_verdicts", "02b_overview"}  # these notebooks make results for themselves
WHOLE = ("guide/claims", "guide/which_explainer")           # these do nothing but read records


def code_cells(name):
    "Source and stored outputs of the code cells of a notebook"
    cells = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]


def shown_by(source):
    "The last expression of a cell, if it is a call of one of `TABLES`, or of methods of what it gives, with nothing but constants"
    match ast.parse(source).body:
        case [*_, ast.Expr(ast.Call() as call)]:
            names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            return ast.unparse(call) if len(names) == 1 and names <= set(TABLES) else None


SHOWN = [(name, call, outputs) for name in (file.with_suffix("").as_posix() for file in NOTEBOOKS) if name not in MINIATURES
         for source, outputs in code_cells(name) if (call := shown_by(source))]


@pytest.fixture
def records_only(monkeypatch):
    "What pages show outside `reproduce`"
    monkeypatch.chdir(ROOT)
    for variable in ("XAI_COMPANION_REPORT", "XAI_COMPANION_RESULTS"):
        monkeypatch.delenv(variable, raising=False)


def assert_shown(value, outputs):
    "What a cell shows, in all its forms as text, is what it would show now"
    found = {kind: "".join(text) for kind, text in outputs[0]["data"].items() if kind in FORMS}
    assert found == {kind: FORMS[kind](value) for kind in found} and found


@pytest.mark.parametrize("name, call, outputs", SHOWN, ids=[f"{name}-{call}" for name, call, _ in SHOWN])
def test_stored_tables_show_the_records(name, call, outputs, records_only):
    "Render every table of the notebooks again from results/: what a page shows is what is recorded"
    assert_shown(eval(call, dict(TABLES)), outputs)


@pytest.mark.parametrize("name", WHOLE)
def test_pages_of_records_show_the_records(name, records_only):
    "The same for pages with functions of their own: run them"
    names, compared = {}, 0
    for source, outputs in code_cells(name):
        *before, last = ast.parse(source).body
        before = before if outputs else [*before, last]
        exec(compile(ast.Module(before, []), name, "exec"), names)
        if outputs:
            assert_shown(eval(ast.unparse(last), names), outputs)
            compared += 1
    assert compared >= 5


def test_what_a_page_prints_of_records_is_in_them(records_only, monkeypatch):
    "The cells of a tutorial that print records, run again"
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "quick")
    cells = json.loads((NBS / "tutorials/read_the_results.ipynb").read_text(encoding="utf-8"))["cells"]
    names, compared = {}, 0
    for cell in cells:
        if cell["id"] in ("64f35c2d", "be1d087f", "e9ec55fb", "71631425", "c4de19e6", "ca5f28fc", "d09e7f86"):
            said = io.StringIO()
            with redirect_stdout(said):
                exec("".join(cell["source"]), names)
            stored = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
            assert said.getvalue() == stored, cell["id"]
            compared += bool(stored)
    assert compared == 5


def tables_of(call):
    "The tables of results/ whose rows a call shows, as (paper, table)"
    call = next(node for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    arguments, beds = ([ast.literal_eval(part) for part in parts] for parts in (call.args, [k.value for k in call.keywords]))
    match call.func.id:
        case "show" | "grid":
            return {tuple(arguments[:2])}
        case "grids":
            return {(arguments[0], f"{kind}_{bed}") for kind in arguments[1] for bed in sum(beds, [])}
        case "comparisons":
            return {(arguments[0], "claims")}
    return set()


def test_every_table_is_shown():
    "What is stored has a page, and so has what another profile will store"
    large = {bed for bed in TESTBEDS if bed in OF_PROFILE["gpu"] + OF_PROFILE["paper"]}
    coming = {(paper, f"quality_{bed}") for paper in ("sise", "ada_sise", "integrated_gradcam") for bed in TESTBEDS}
    coming |= {("sise", f"mu_{bed}") for bed in TESTBEDS} | {("sise", f"fusion_{bed}") for bed in large}
    coming |= {("sise", f"size_{bed}") for bed in TESTBEDS if "ebpg" in TESTBEDS[bed].metrics}
    stored = {(file.parent.name, file.name.split(".")[0]) for file in STORED}
    missing = (stored | coming).difference(*(tables_of(call) for _, call, _ in SHOWN))
    assert not missing, f"no page shows {sorted(missing)}"


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("XAI_COMPANION_COMMIT", "0123456789ab")
    assert record({"row": "A"}, 1.0, "%", n=3)["provenance"]["commit"] == "0123456789ab"


def test_a_table_without_records_says_its_name(quick):
    assert list(show("edda", "nothing").index) == ["edda/nothing"]


def test_wide_intervals_have_no_decimals():
    r = {"value": 1234.5, "interval": [984.5, 1484.5], "n": 7, "unit": "s"}
    assert grid_cell([r]) == "1234 ± 250" and _cell([r]) == "1234 [984, 1484] s, n=7"


def test_labels_of_configs_that_lack_an_entry():
    assert _labels([{"row": "a", "mu": 0.3}, {"row": "a"}, {"row": "b"}]) == ["a, mu=0.3", "a", "b"]


def test_a_record_without_a_version_is_older_than_the_first():
    old, new = {"config": {"row": "a"}}, {"config": {"row": "a", "version": 1}}
    assert list(newest([old, new]).values()) == [[new]]


def test_two_values_per_seed_are_averaged_over_seeds():
    seeds = [{"value": 2.0, "values": [1.0, 3.0], "n": 2}, {"value": 4.0, "values": [3.0, 5.0], "n": 2}]
    mean, interval, counted = summarize(seeds)
    assert (mean, counted) == (3.0, "n=2, 2 seeds")  # the images have the means 2 and 4
    assert interval == pytest.approx((3 - 12.7062, 3 + 12.7062), abs=1e-3)  # t of 1 degree times 1
    ones = [s | {"values": s["values"][:1], "n": 1} for s in seeds]
    assert summarize(ones)[2] == "2 seeds"
