"""Paired tests, Holm's levels and verdicts against their definitions; the table of claims from files."""
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from helpers import NBS, ROOT
from scipy import stats

from xai_companion.overview import (
    HEADLINES,
    PLACES,
    LinkedTable,
    claim_details,
    claims_figure,
    claims_overview,
    clarity,
    headlines,
    not_run,
    place,
    plain_answer,
    settings_overview,
    unit_of,
)
from xai_companion.records import canonical, hardware, mean_interval, record
from xai_companion.results import load, save
from xai_companion.verdicts import (
    ABOVE,
    BELOW,
    CLAIMS,
    _nearest_bound,
    claims,
    comparisons,
    difference_text,
    forest,
    holm_levels,
    over_settings,
    paired_p,
    save_comparisons,
    stored_comparisons,
    verdict,
    within,
)


def test_p_is_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 25))
    assert paired_p(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_holm_rejects_what_the_definition_rejects():
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = rng.uniform(0, 0.05, rng.integers(1, 7)).tolist()
        ordered = sorted(p)
        stop = next((i for i, value in enumerate(ordered) if value >= 0.05 / (len(p) - i)), len(p))
        assert [value < 1 - level for value, level in zip(p, holm_levels(p), strict=True)] == [value in ordered[:stop] for value in p]


def test_family_wise_error_stays_below_alpha():
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(1000):
        p = [paired_p(sample) for sample in rng.normal(size=(5, 10))]
        alarms += any(value < 1 - level for value, level in zip(p, holm_levels(p), strict=True))
    assert alarms / 1000 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_error_rate_at_a_margin(quick, monkeypatch):
    "Rivals that are exactly at the margin are called supported in at most a fortieth of the families"
    from xai_companion import verdicts
    rng, alarms, kept = np.random.default_rng(4), 0, []
    monkeypatch.setattr(verdicts, "save", lambda paper, table, records, same: kept.extend(records))
    for _ in range(400):
        kept.clear()
        save_comparisons("ada_sise", 2, "here", "EBPG", {name: rng.normal(-2, 5, 60) for name in "abcde"}, (-2, None))
        alarms += any(verdict(r["interval"], r["config"]["claimed"]) == "supported" for r in kept)
    assert alarms / 400 < 0.025 + 3 * np.sqrt(0.025 * 0.975 / 400)


@pytest.mark.parametrize("interval, claimed, expected", [
    ((0.1, 2), ABOVE, "supported"), ((0.1, 2), BELOW, "contradicted"), ((-1, 1), ABOVE, "inconclusive"), ((-1, 1), within(1.5), "supported"),
    ((2, 3), within(1.5), "contradicted"), ((1, 3), within(1.5), "inconclusive"), ((0, 0), ABOVE, "inconclusive"), ((5, 9), (0, 30), "supported"),
    ((40, 60), (0, 30), "contradicted"), ((-5, -1), (0, 30), "contradicted")])
def test_verdict(interval, claimed, expected):
    assert verdict(interval, claimed) == expected


def test_overall():
    assert over_settings(["supported", "supported"]) == "supported"
    assert over_settings(["supported", "contradicted"]) == over_settings(["supported", "inconclusive"]) == "mixed"
    assert over_settings([]) == "not tested"


def test_table_of_claims(quick, monkeypatch):
    rng = np.random.default_rng(3)
    near, far = rng.normal(0.1, 1, 20), rng.normal(3, 1, 20)
    save_comparisons("sise", 1, "here", "EBPG", {"a": near, "b": far}, ABOVE)
    save_comparisons("sise", 3, "here", "Drop", {"mu": near}, within(2), data="a set", device="cpu")
    table = claims("sise")
    assert table.index.name == "claim" and len(table) == len(CLAIMS["sise"]) + 2
    assert list(table.verdict)[:2] == ["mixed", "mixed"] and table.comparisons.iloc[1] == "1 inconclusive, 1 supported"
    assert table.verdict[[name for name in table.index if name.startswith("3")][0]] == "supported"
    level = holm_levels([paired_p(near), paired_p(far)])[1]
    _, low, high = mean_interval(far, level)
    shown = f"{far.mean():.1f} [{low:.1f}, {high:.1f}] (+), wins {100 * (far > 0).mean():.0f} : {100 * (far < 0).mean():.0f}"
    assert comparisons("sise", 1).loc[("here (quick)", "b"), "EBPG"] == shown
    assert forest("sise", 1) is not None and forest("sise", 2) is None

    save_comparisons("sise", 1, "here", "EBPG", {"c": far}, ABOVE)  # another family of rivals takes the place of the first
    assert list(comparisons("sise", 1).index) == [("here (quick)", "c")]

    monkeypatch.setenv("XAI_COMPANION_PROFILE", "cpu")  # a larger profile of the same setting replaces the smaller one
    save_comparisons("sise", 1, "here", "EBPG", {"a": far}, ABOVE)
    assert "here (cpu)" in set(claims("sise").setting) and "here (quick)" not in set(claims("sise").setting[:2])
    assert claims("sise").verdict.iloc[0] == "supported"


def test_win_rate_counts_images(quick):
    gaps = np.array([3.0, -1, 0, 2, 0, 5, -2, 4, 0, 1])
    save_comparisons("sise", 1, "here", "EBPG", {"a": gaps}, (-2, None))   # as good as: wins are above 0, not above -2
    save_comparisons("sise", 1, "here", "Drop", {"a": gaps}, (None, 2))    # lower is better
    save_comparisons("sise", 3, "here", "EBPG", {"a": gaps}, within(2))    # no side is the better one
    save_comparisons("sise", 2, "here", "time", {"a": 50 + gaps}, (None, 100), "% of the time")  # no difference: always above 0
    stored = {(r["config"]["claim"], r["config"]["metric"]): r for r in load("sise", "claims")["quick"]}
    assert stored[1, "EBPG"]["wins"] == [0.5, 0.2] and stored[1, "Drop"]["wins"] == [0.2, 0.5] and "wins" not in stored[3, "EBPG"]
    table = comparisons("sise", 1)
    assert table.iloc[0].EBPG.endswith(", wins 50 : 20") and table.iloc[0].Drop.endswith(", wins 20 : 50")
    assert list(comparisons("sise", 1, ["Drop"])) == ["Drop"] and "wins" not in comparisons("sise", 3).iloc[0].EBPG
    assert "wins" not in stored[2, "time"] and comparisons("sise", 2).iloc[0].time == "51.2 [49.6, 52.8] (+)"


def test_records_without_a_win_rate_are_shown(quick):
    file = save_comparisons("sise", 1, "here", "EBPG", {"a": [1.0, 2, 3]}, ABOVE)[1]
    records = json.loads(file.read_text())
    file.write_text(json.dumps([{k: v for k, v in r.items() if k != "wins"} for r in records]))
    assert comparisons("sise", 1).iloc[0, 0].endswith("] (0)") and claims("sise").verdict.iloc[0] == "inconclusive"


@pytest.mark.parametrize("call, words", [
    (("sise", 9, "here", "EBPG", {"a": [1, 2]}, ABOVE), "no claim 9"), (("excon", 7, "here", "EBPG", {"a": [1, 2]}, ABOVE), "no claim 7"),
    (("sise", 1, "here", "EBPG", {"a": [1]}, ABOVE), "two or more"), (("sise", 1, "here", "EBPG", {"a": [1, np.nan]}, ABOVE), "a has none"),
    (("sise", 1, "here", "EBPG", {}, ABOVE), "every rival")])
def test_bad_comparisons(quick, call, words):
    with pytest.raises(ValueError, match=words):
        save_comparisons(*call)


# ---- the overview of all claims ------------------------------------------------------------------------------------
PAPERS = NBS / "papers"


@pytest.mark.parametrize("paper", CLAIMS)
def test_every_claim_has_a_section_on_its_page(paper):
    page, sections = PLACES[paper]
    cells = json.loads((PAPERS / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()]
    anchors = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line.startswith("#")}
    assert sections.keys() == CLAIMS[paper].keys() and set(sections.values()) <= anchors
    assert place(paper, 1) == f"../papers/{page}.ipynb#{sections[1]}"


@pytest.fixture
def three_settings(quick):
    "Claim 1 of SISE in two settings and claim 1 of ExCon in one: every interval is at its level by hand"
    spread = np.array([-1.0, 1.0] * 8)  # mean 0; the half-width of a 95 % interval over 16 is 2.131 * 1.033 / 4 = 0.550
    save_comparisons("sise", 1, "A", "EBPG", {"far": 5 + spread}, ABOVE, data="set a")
    save_comparisons("sise", 1, "A", "Drop", {"near": 0.1 + spread}, BELOW, data="set a")
    save_comparisons("sise", 1, "A", "Bbox", {"against": -2 + spread}, (-1, None), data="set a")
    save_comparisons("sise", 1, "B", "EBPG", {"far": 4 + spread[:4]}, ABOVE, data="set b")
    save_comparisons("sise", 2, "B", "time, % of RISE", {"RISE": 50 + spread}, (0, 100), "% of the time", data="set b")
    save_comparisons("excon", 1, "C", "Accuracy", {"SupCon": [1.0, 1.1, 0.9]}, ABOVE, data="set c")
    return quick


def test_overview(three_settings):
    table = claims_overview()
    assert list(table.index[:2]) == ["SISE 1", "SISE 2"] and len(table) == sum(map(len, CLAIMS.values()))
    assert list(table.loc["SISE 1"])[1:] == ["mixed", "1 supported, 1 mixed", "2 for, 1 open, 1 against"]
    assert list(table.loc["ExCon 1"]) == [CLAIMS["excon"][1], "supported", "1 supported", "1 for"]
    assert list(table.loc["EDDA 2"])[1:] == ["not tested", "-", "-"]
    assert claims_overview("../papers").index[0] == "[SISE 1](../papers/01_sise.ipynb#quality-claim-1)"
    assert claims_overview(root=three_settings / "reports").equals(table)
    assert set(claims_overview(root=three_settings / "nowhere").verdict) == {"not tested"}
    assert str(table).splitlines()[1].startswith("SISE 1  ") and CLAIMS["edda"][2] in str(table)


def test_details(three_settings):
    table = claim_details("sise")
    line = table[table.setting == "A (quick)"].iloc[0]
    assert line.verdict == "mixed: 1 for, 1 open, 1 against" and line.n == "16 images"
    assert line["most for"] == "EBPG against far: 5.0 [4.4, 5.6] (+)"
    assert line["most against"] == "Bbox against against: -2.0 [-2.6, -1.4] (-)"
    assert table[table.setting == "B (quick)"].n.tolist() == ["4 images", "16 batches"]
    assert table.iloc[2]["most for"] == "time, % of RISE: 50.0 [49.4, 50.6] (+)" and table.iloc[2]["most against"] == "-"
    assert list(table.loc["SISE 3"]) == ["-", "not tested", "-", "-", "-"]
    assert claim_details("excon").n.iloc[0] == "3 seeds"


def test_clarity_is_the_distance_from_the_bound():
    def of(value, half, claimed):
        return clarity({"value": value, "interval": [value - half, value + half], "config": {"claimed": claimed}})
    assert of(3, 1, [0, None]) == 3 and of(3, 1, [None, 0]) == -3 and of(-1, 2, [-2, None]) == 0.5 and of(1, 1, [-2, 2]) == 1
    assert of(0, 0, [0, None]) == 0 and of(1, 0, [0, None]) == math.inf and of(1, 0, [None, 0]) == -math.inf


def test_clarity_above_one_is_decided(three_settings):
    for r in (r for paper in CLAIMS for r, _ in stored_comparisons(paper)):
        expected = {True: "supported", False: "contradicted"}[clarity(r) > 0] if abs(clarity(r)) > 1 else "inconclusive"
        assert verdict(r["interval"], r["config"]["claimed"]) == expected


def test_units():
    quality, pairs = ({"unit": "points", "config": {"metric": metric}} for metric in ("EBPG", "EBPG, large minus small"))
    assert unit_of("edda", quality) == unit_of("excon", quality) == "seeds"
    assert unit_of("sise", quality) == "images" and unit_of("sise", pairs) == "pairs"
    assert unit_of("ada_sise", {"unit": "% of the time"}) == "batches"


def test_settings(three_settings):
    table = settings_overview()
    assert list(table.index) == ["A (quick)", "B (quick)", "C (quick)"] and list(table["data"]) == ["set a", "set b", "set c"]
    assert list(table["n at most"]) == ["16 images", "4 images", "3 seeds"] and table.papers.iloc[2] == "ExCon"
    assert settings_overview(three_settings / "nowhere").empty


def test_plain_answer(three_settings):
    own = [r for r, _ in stored_comparisons("sise") if r["config"]["setting"] == "A"]
    table = plain_answer("sise", own)
    assert table.answer.tolist() == ["1 better, 1 worse, 1 cannot be told", "better", "cannot be told", "worse"]
    assert table.difference.tolist()[1] == "5.0 [4.4, 5.6]" and table.n.iloc[0] == "16 images"
    gap = record({"metric": "ECE", "setting": "C", "claimed": [None, 0]}, value=-2, n=5, interval=(-3, -1))
    assert plain_answer("excon", [gap]).answer.tolist() == ["1 better", "better"]
    empty = plain_answer("edda", [])
    assert list(empty.index) == ["EDDA"] and "no stored records yet" in empty.answer.iloc[0]


def test_a_difference_of_nothing_has_no_sign():
    assert difference_text({"value": -0.01, "interval": [-4.2, 4.1]}) == "0.0 [-4.2, 4.1]"


def test_figure(three_settings):
    ax = claims_figure().axes[0]
    assert [round(bar.get_width()) for bar in ax.patches[:3]] == [50, 25, 25]
    texts = [text.get_text() for text in ax.texts]
    assert texts[:4] == ["2", "1", "1", "1"] and texts.count("not tested") == sum(map(len, CLAIMS.values())) - 3
    assert all("not tested" == text.get_text() for text in claims_figure(three_settings / "nowhere").axes[0].texts)


def test_headlines_come_with_their_records(quick, monkeypatch):
    assert all(headlines(paper).empty for paper in HEADLINES) and list(not_run().index) == ["quick", "cpu", "gpu", "paper"]
    row = {"row": "ExCon", "metric": "Accuracy"}
    for profile in ("quick", "gpu"):
        monkeypatch.setenv("XAI_COMPANION_PROFILE", profile)
        save("excon", "accuracy", [record(row | {"data": "synthetic"}, 60.0, "%", n=500)])
    tiny = row | {"data": "tiny_imagenet", "model": "resnet18"}
    save("excon", "accuracy", [record(tiny, 50.0, "%", n=2000), record(tiny | {"data": "tiny_imagenet_50"}, 70.0, "%", n=1000)])
    made = record({"row": "SISE", "metric": "time", "testbed": "A"}, values=[0.1, 0.3], unit="s")
    save("ada_sise", "quality_plain", [made])
    table = headlines("excon")
    assert list(table.index) == ["Accuracy (%), plain CNN, creatures"] * 2 + ["Accuracy (%), ResNet-18, Tiny ImageNet at 64 pixels"]
    assert table[["ExCon", "n", "profile"]].to_numpy().tolist() == [
        ["60", "n=500", "quick"], ["60", "n=500", "gpu"], ["50", "n=2000", "gpu"]]
    for text in (str(table), table._repr_markdown_()):
        assert text.splitlines()[-1] == "; ".join(f"{p}: `xai-companion reproduce excon --profile {p} --record`" for p in ("quick", "gpu"))
    assert set(table.SupCon) == {"-"}
    assert headlines("ada_sise").loc["time (s), A", "n"] == f"n=2, {hardware()}"
    assert not_run().command.to_dict() == {profile: f"`xai-companion reproduce --profile {profile} --record`" for profile in ("cpu", "paper")}


def test_a_headline_shows_the_newest_version(quick):
    row = {"row": "SISE", "metric": "Drop", "testbed": "A"}
    save("sise", "quality_imagenet", [record(row | version, value, "%", n=8) for version, value in (({}, 1.0), ({"version": 2}, 5.0))])
    assert headlines("sise").SISE.tolist() == ["5"]


def test_a_headline_is_over_the_images_that_all_have(quick):
    rows = {"Grad-CAM": [1.0, 3.0, 8.0, 9.0], "SISE": [2.0, 6.0]}
    save("sise", "quality_tiny", [record({"row": row, "metric": "EBPG", "testbed": "A"}, values=values, unit="%") for row, values in rows.items()])
    line = headlines("sise").iloc[0]
    assert (line["Grad-CAM"].split(" ± ")[0], line.SISE.split(" ± ")[0], line.n) == ("2", "4", "n=2")


def test_methods_of_a_headline_have_their_own_n(quick):
    rows = [record({"row": row, "metric": "Drop", "testbed": "A"}, 1.0, "%", n=n) for row, n in (("SISE", 8), ("Grad-CAM", 9))]
    save("sise", "quality_imagenet", rows)
    assert headlines("sise").n.tolist() == ["n=9, n=8"], "in the order of the columns"


def test_a_method_of_a_headline_is_one_row_of_its_table():
    found = Counter()
    for paper, lines in HEADLINES.items():
        for table, metric, methods, fixed, *_ in lines:
            for profile, records in load(paper, table, ROOT / "results").items():
                configs = [{k: v for k, v in r["config"].items() if k != "version"} for r in records
                           if {"metric": metric}.items() | fixed.items() <= r["config"].items()]
                for method in methods:
                    own = {canonical(config) for config in configs if config["row"] == method}
                    assert len(own) < 2, (paper, table, profile, method)
                    found[profile] += len(own)
    assert found["quick"] >= 20 and found["cpu"] >= 26


def test_linked_table():
    import pandas as pd

    table = LinkedTable({"a": ["x", "long text"]}, index=pd.Index(["first", "2"], name="name"))
    assert table._repr_markdown_() == "| name | a |\n| --- | --- |\n| first | x |\n| 2 | long text |"
    assert str(table) == "name   a\nfirst  x\n2      long text" and table._repr_html_ is None
    assert isinstance(table.iloc[:1], LinkedTable)


def test_the_bound_that_a_mean_is_tested_against():
    assert [_nearest_bound(mean, within(3)) for mean in (-5, -2, 2, 5)] == [-3, -3, 3, 3]
    assert _nearest_bound(-4, ABOVE) == _nearest_bound(4, BELOW) == 0


def test_filled_markers_are_supported(quick):
    far = np.linspace(4, 6, 30)
    save_comparisons("sise", 1, "here", "EBPG", {"b": far, "d": -far}, ABOVE)
    filled = {line.get_ydata()[0]: line.get_markerfacecolor() for line in forest("sise", 1).axes[0].lines if line.get_marker() == "o"}
    assert filled == {0: "#0072B2", 1: "white"}  # b is supported, d is contradicted
