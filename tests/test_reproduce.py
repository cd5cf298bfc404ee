"""`reproduce` on a clone in miniature, with real kernels."""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from helpers import NBS, ROOT

from xai_companion import notebooks as module
from xai_companion.cli import main
from xai_companion.notebooks import KEEP_MEMORY, choose, find_papers, paper_name, run_notebook
from xai_companion.records import record
from xai_companion.reproduce import MATHJAX, Outcome, _claims, _mathjax, _page, _run_all, reproduce
from xai_companion.steps import TIME_BOX

RECORD = """from xai_companion.results import record, save, show
save("sise", "demo", [record({"row": "SISE"}, values=[0.5, 0.7, 0.6])])
show("sise", "demo")"""


def write(root, name, *cells):
    file = root / "nbs" / "papers" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), file)
    return file


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "An empty clone as working directory, and no settings in the environment"
    for name in [n for n in os.environ if n.startswith("XAI_COMPANION_")]:
        monkeypatch.delenv(name)
    (tmp_path / "settings.ini").write_text("[xai_companion]\nprofile = quick\n")
    (tmp_path / "nbs" / "papers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_passes_fails_and_goes_on(clone, capfd):
    write(clone, "01_sise.ipynb", "print('started')", "undefined_name", "print('not reached')")
    write(clone, "02_ada_sise.ipynb", "import os\nos._exit(3)")
    write(clone, "03_integrated_gradcam.ipynb", RECORD.replace("sise", "integrated_gradcam"),
          "#| eval: false\n1 / 0", "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    assert reproduce() == 1
    said = capfd.readouterr()
    assert re.search(r"01_sise ... FAILED after .* cell \[2\] `undefined_name`: NameError", said.out)
    assert re.search(r"02_ada_sise ... FAILED after .* the kernel died", said.out)
    assert re.search(r"03_integrated_gradcam ... \d+\.\d s\n", said.out)
    assert "1 of 3 notebooks ran to the end" in said.out and "0.60 [0.35, 0.85], n=3" in said.out
    assert f"Report: {Path('reports/index.html')}" in said.out
    assert "Traceback" not in said.err

    index = (clone / "reports" / "index.html").read_text()
    assert "FAILED" in index and "0.60 [0.35, 0.85]" in index
    for name in re.findall(r"href='([^']+)'", index):
        assert (clone / "reports" / name).is_file()
    executed = nbformat.read(clone / "reports" / "01_sise.ipynb", 4)
    assert executed.cells[0].outputs[0].text == "started\n" and executed.cells[2].outputs == []
    page = (clone / "reports" / "03_integrated_gradcam.html").read_text()
    assert "this run" in page and "data:image/png" in page
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', page)
    assert not (clone / "results").exists()


def test_record_and_compare(clone, capsys, monkeypatch):
    write(clone, "01_sise.ipynb", RECORD)
    assert reproduce(["sise"], record=True) == 0
    stored = clone / "results" / "sise" / "demo.quick.json"
    origin = json.loads(stored.read_text())[0]["provenance"]
    assert origin["command"] == "xai-companion reproduce sise --record"

    before = stored.read_bytes()
    write(clone, "01_sise.ipynb", RECORD.replace("0.5", "0.9"))
    capsys.readouterr()
    assert reproduce() == 0
    said = capsys.readouterr().out
    assert re.search(r"SISE  0.73 .*  0.60 .*  NO", re.sub(r" {2,}", "  ", said)) and "1 do not" in said
    assert stored.read_bytes() == before

    write(clone, "01_sise.ipynb", "pass")   # what the last run left must not pass for this run's
    assert reproduce() == 0
    assert "Rows: 0 agree" in capsys.readouterr().out
    assert reproduce(check=True, papers=["sise"]) == 1 and "No row could be compared" in capsys.readouterr().out

    monkeypatch.setenv("XAI_COMPANION_PROFILE", "smoke")
    with pytest.raises(ValueError, match="never recorded"):
        reproduce(record=True)


def test_errors_name_the_remedy(clone, monkeypatch):
    with pytest.raises(ValueError, match="no notebook about any paper"):
        reproduce()
    write(clone, "01_sise.ipynb", "pass")
    with pytest.raises(ValueError, match="no notebook about nonsense in nbs/papers; there is sise"):
        reproduce(["nonsense"])
    with pytest.raises(FileNotFoundError, match="clone"):
        find_papers("/")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'xai_companion\[reproduce\]'"):
        reproduce()


def alive(pid):
    "Is this process there, and not just waiting to be collected?"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX systems")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(clone, times):
    pid = clone / "pid"
    write(clone, "01_sise.ipynb", "import os, pathlib, time\nfile = pathlib.Path('../../pid')\n"
          "part = file.with_suffix('.part')\npart.write_text(str(os.getpid()))\npart.rename(file)\ntime.sleep(60)")
    write(clone, "02_ada_sise.ipynb", "pass")
    run = subprocess.Popen([sys.executable, "-c", "import sys; from xai_companion.reproduce import reproduce\n"
                            "sys.exit(reproduce())"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it
    try:
        wait_for(pid.exists)
        for _ in range(times):
            run.send_signal(signal.SIGINT)
            time.sleep(0.02)
        out, err = run.communicate(timeout=30)
    finally:
        run.kill()
    wait_for(lambda: not alive(int(pid.read_text())), 10)
    if times == 1:
        assert run.returncode == 130, err
        assert "01_sise ... stopped by Ctrl-C" in out and "02_ada_sise" not in out
        assert "Traceback" not in err and "never retrieved" not in err, err


def test_make_keeps_memory_like_the_kernels():
    assert [f"KEEP_MEMORY := {name}={value}  #" in (ROOT / "Makefile").read_text() for name, value in KEEP_MEMORY.items()] == [True]


def test_core_notebook_in_a_real_kernel(clone):
    executed, error = run_notebook(NBS / "00_core.ipynb", dict(os.environ))
    assert error == ""
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))


# ---- long profiles: plans, time boxes, interruptions --------------------------------------------------------------
def test_the_order_on_a_gpu():
    folder = find_papers(ROOT)
    names = [paper_name(file) for file in choose(folder, profile="gpu")]
    assert names == ["excon", "edda", "sise", "ada_sise", "integrated_gradcam", "bench"]  # the network of the first is explained
    assert choose(folder, ["bench"], "gpu") == [NBS / "66_bench.ipynb"]
    with pytest.raises(ValueError, match="no notebook about bench"):
        choose(folder, ["bench"])


STEPS = "from xai_companion.steps import Step, take_steps\ntake_steps([Step(f'{name} {i}', SECONDS, lambda: print('ran')) for i in range(COUNT)])"


def test_the_plan_of_all_notebooks(clone, capsys, monkeypatch):
    "Nothing is run or written, a GPU is not needed, and what comes after the hour is named with its command"
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "gpu")
    page = "name = '{}'\nfrom xai_companion.core import pick_device, settings\npick_device(settings().device)\nprint('not run: a set. It is missing')"
    for name, seconds, count in (("04_edda", 600, 3), ("05_excon", 900, 3), ("01_sise", 30, 4)):
        write(clone, f"{name}.ipynb", page.format(name), STEPS.replace("SECONDS", str(seconds)).replace("COUNT", str(count)), "1 / 0")
    assert reproduce(minutes=0) == 0
    said = capsys.readouterr().out
    assert said.index("05_excon 2") < said.index("04_edda 0") < said.index("01_sise 3") and "ran" not in said.split()
    assert said.count("not run: a set. It is missing") == 3 and "In all about 77:00 min" in said
    assert said.endswith("Not in the first hour:\n  xai-companion reproduce edda --profile gpu  # 2 steps, 20:00 min\n"
                         "  xai-companion reproduce sise --profile gpu  # 4 steps, 2:00 min\n")
    assert not (clone / "reports").exists()
    write(clone, "05_excon.ipynb", "1 / 0")
    assert reproduce(["excon"], minutes=0) == 1 and "FAILED in cell [1]" in capsys.readouterr().out


def test_the_plan_of_all_notebooks_comes_before_the_first(clone, capsys, monkeypatch):
    "Also when a page cannot plan; not for a single page, which has its own, nor again and again in a time box"
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "gpu")
    monkeypatch.setattr("xai_companion.reproduce.pick_device", lambda name: "cpu")
    for name in ("05_excon", "01_sise"):
        write(clone, f"{name}.ipynb", STEPS.replace("SECONDS", "30").replace("COUNT", "2").replace("{name}", name))
    write(clone, "04_edda.ipynb", "1 / 0")
    for words, whole in (({}, 1), ({"minutes": 9}, 0), ({"papers": ["sise"]}, 0)):
        reproduce(**words)
        said = capsys.readouterr().out
        assert said.count("In all about 2:00 min") == whole and "step: 2 of 2, 01_sise 1" in said
    reproduce()
    said = capsys.readouterr().out
    plans, run = said.split("Running 3 notebooks in the gpu profile")
    assert "01_sise 1" in plans and "step:" not in plans and "FAILED" in plans and run.count("plan: 2 of 2 steps left") == 2


@pytest.mark.parametrize("file", choose(find_papers(ROOT), profile="gpu"), ids=paper_name)
def test_a_page_plans_before_it_computes(file):
    "What is shown or stored comes after the steps, so a plan takes seconds, and a GPU's time goes into them"
    cells = [cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
    before = cells[:next(i for i, source in enumerate(cells) if re.search("^take_steps", source, re.MULTILINE))]
    outside = [node for source in before for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    called = {ast.unparse(node.func) for part in outside for node in ast.walk(part) if isinstance(node, ast.Call)}
    assert before and not called & {"show", "grid", "show_maps", "save", "save_row", "measured", "explain", "run_testbeds", "run_rows"}


def test_a_time_box_that_is_too_small(clone, capsys):
    "Where a step was taken the same command goes on; where none fits, it would for ever"
    taken = "from pathlib import Path\nfrom xai_companion.steps import Step, take_steps\nfile = Path('../../done')\n"
    write(clone, "04_edda.ipynb", taken + "take_steps([Step('short', 1, file.touch, file.exists), Step('long', 700, print)])")
    assert reproduce(minutes=9) == 75 and "step: 1 of 2, short" in capsys.readouterr().out
    assert reproduce(minutes=9) == 1 and "No step fits: give more than --minutes 9" in capsys.readouterr().out


ROWS = """import os, time
from pathlib import Path
from xai_companion.core import settings
from xai_companion.experiments import creatures_lab, row_steps, run_rows
from xai_companion.steps import take_steps
from xai_companion.train.recipes import Config
root = settings().reports.parent
lab = creatures_lab(40, 8)
rows = {name: Config(size=32, epochs=1, batch=16, weight_decay=i / 1000) for i, name in enumerate("abc")}

def scores(model, row):
    if row == "b" and not (root / "go").exists():
        (root / "kernel").write_text(str(os.getpid()))
        (root / "kernel").rename(root / "waiting")
        time.sleep(60)
    return {"accuracy": 1.0}
work = rows, range(1), lab, scores, "1", settings().reports / "train"
take_steps(row_steps(*work, title="net", seconds=1))
frame = run_rows(*work)
assert list(frame.row) == ["a", "b", "c"]"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX systems")
def test_killed_in_a_step_and_started_again(clone):
    "A step that was finished is not done again, and of the killed one not even the training"
    write(clone, "04_edda.ipynb", ROWS)
    command = [sys.executable, "-c", "import sys; from xai_companion.cli import main\nsys.exit(main(['reproduce', 'edda', '--minutes', '9']))"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for((clone / "waiting").exists, 60)
        os.kill(int((clone / "waiting").read_text()), signal.SIGKILL)
    finally:
        run.kill()
    first = run.communicate(timeout=30)[0]
    assert "3 of 3 steps left" in first and "step: 2 of 3, net: b, seed 0" in first and "step: 3 of 3" not in first
    logs = {file: file.read_text() for file in (clone / "reports" / "train").glob("*/log.csv")}  # with the seconds of each epoch
    [scores] = (clone / "reports" / "train").glob("*/scores-*.json")
    written = scores.stat().st_mtime_ns
    (clone / "go").touch()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 of 3 steps left" in again.stdout and "step: 1 of 3" not in again.stdout and "step: 3 of 3 took" in again.stdout
    assert scores.stat().st_mtime_ns == written and len(logs) == 2 and all(file.read_text() == log for file, log in logs.items())


def test_records_of_another_computer(clone, capsys):
    write(clone, "01_sise.ipynb", RECORD)
    assert reproduce(record=True) == 0
    for folder, row in (("theirs", "RISE"), ("results", "SISE")):
        target = clone / folder / "sise" / "more.gpu.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps([record({"row": row}, values=[0.5, 0.7])]))
    assert main(["reproduce", "--merge", "theirs"]) == 0
    assert "results/sise/more.gpu.json" in capsys.readouterr().out
    assert [r["config"]["row"] for r in json.loads((clone / "results/sise/more.gpu.json").read_text())] == ["SISE", "RISE"]
    assert main(["reproduce", "--merge", "nowhere"]) == 2 and "no records in nowhere" in capsys.readouterr().err
    (clone / "theirs/sise/more.gpu.json").write_text("[{}]")
    assert main(["reproduce", "--merge", "theirs"]) == 2 and "sise/more.gpu.json is damaged" in capsys.readouterr().err


@pytest.fixture
def pretend(clone, monkeypatch):
    "Notebooks that are not run: how they went, given as (error, answers, steps), and what was to be run with which environment"
    for name in ("01_sise", "02_ada_sise", "04_edda"):
        write(clone, f"{name}.ipynb", "pass")
    asked = []

    def run(*ended, **options):
        outcomes = [Outcome("sise", Path("01_sise.ipynb"), 1.0, error, {"demo": pd.DataFrame({"agrees": answers})} if answers else {}, steps)
                    for error, answers, steps in ended or [("", [], 0)]]
        monkeypatch.setattr("xai_companion.reproduce._run_all",
                            lambda notebooks, now, env: asked.append(([*map(paper_name, notebooks)], env)) or outcomes)
        return reproduce(**options)
    return run, asked


@pytest.mark.parametrize("ended, options, status, words", [
    ([("", ["yes", "-"], 0)], {"check": True}, 0, "1 agree with the stored records, 0 do not, 1 have nothing"),
    ([("", ["yes", "NO"], 0)], {"check": True}, 1, "Does not agree: sise / demo: 1\n"),
    ([("", ["yes", "NO"], 0)], {}, 0, "1 of 1 notebooks ran to the end\n"),
    ([("", [], 0), ("cell [2]: <NameError>", [], 0)], {}, 1, "1 of 2 notebooks ran to the end; failed: 01_sise\n"),
    ([("", [], 3), ("cell [2]: OutOfTime: the next step", [], 0)], {"minutes": 9}, 75, "1 of 2 notebooks ran to the end\n"),
    ([("", [], 0), ("cell [2]: OutOfTime: the next step", [], 0)], {"minutes": 9}, 1, "No step fits: give more than --minutes 9\n"),
])
def test_how_a_run_ends(pretend, clone, capsys, ended, options, status, words):
    run, _ = pretend
    assert run(*ended, **options) == status and words in capsys.readouterr().out
    index = (clone / "reports" / "index.html").read_text()
    assert index.count("class='bad'") == sum(bool(error) for error, _, _ in ended) and "<NameError>" not in index


def test_what_is_run_and_with_which_environment(pretend, monkeypatch):
    run, asked = pretend
    monkeypatch.setenv("XAI_COMPANION_RECORD", "1")  # left over in the shell: only --record stores
    monkeypatch.setenv(TIME_BOX, "0")
    monkeypatch.setattr("xai_companion.reproduce.time.time", lambda: 1000.0)
    monkeypatch.setattr("xai_companion.reproduce.pick_device", lambda name: "cpu")
    for options in ({}, {"check": True}, {"check": True, "papers": ["sise"]}, {"record": True, "papers": ["edda"], "minutes": 2}):
        run(**options)
    for profile in ("gpu", "paper", "cpu"):
        monkeypatch.setenv("XAI_COMPANION_PROFILE", profile)
        run(papers=["sise"])
    names, environments = zip(*asked, strict=True)
    assert [sorted(some) for some in names] == [["ada_sise", "edda", "sise"], ["ada_sise", "edda"], ["sise"], ["edda"], *[["sise"]] * 3]
    assert [env.get(TIME_BOX) for env in environments] == [None, None, None, "1120.0", "inf", "inf", None]
    assert [env.get("XAI_COMPANION_RECORD") for env in environments] == [None, None, None, "1", None, None, None]
    commands = [env["XAI_COMPANION_COMMAND"].removeprefix("xai-companion reproduce") for env in environments]
    assert commands == ["", "", " sise", " edda --record", " sise --profile gpu", " sise --profile paper", " sise --profile cpu"]


def test_links_of_a_page(clone):
    "To another page that is run too, and to a notebook elsewhere as seen from the report; formulas in text need MathJax"
    file, reports = write(clone, "01_sise.ipynb", "price = '$'"), clone / "reports"
    reports.mkdir()
    executed = nbformat.read(file, 4)
    executed.cells.append(nbformat.v4.new_markdown_cell("[a](02_ada_sise.ipynb#Methods) [b](../00_core.ipynb) [c](https://x.org/d.ipynb)"))
    page = _page(executed, file, reports)
    assert 'href="02_ada_sise.html#Methods"' in page and 'href="../nbs/00_core.ipynb"' in page and 'href="https://x.org/d.ipynb"' in page
    assert "window.MathJax" not in page and "<script" not in page.partition("</head>")[0]
    executed.cells[1].source = "$x$"
    assert "window.MathJax" in _page(executed, file, reports).partition("</head>")[0]


def test_where_formulas_come_from(tmp_path, monkeypatch):
    "From the package that carries MathJax, as a copy beside the report; without it from the network"
    file = tmp_path / "package" / "static" / "mathjax" / "tex-svg-full.js"
    file.parent.mkdir(parents=True)
    file.write_text("formulas")
    for spec, address in ((None, MATHJAX), (SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py")), "mathjax.js")):
        monkeypatch.setattr("xai_companion.reproduce.importlib.util.find_spec", lambda name, spec=spec: spec)
        assert _mathjax(tmp_path) == address and (tmp_path / "mathjax.js").exists() == (spec is not None)
    assert (tmp_path / "mathjax.js").read_text() == "formulas"


def test_claims_are_shown_when_one_was_tested(tmp_path, monkeypatch):
    for now, stored, shown in (("not tested", "not tested", False), ("agrees", "not tested", True), ("not tested", "agrees", True)):
        def overview(root=None, now=now, stored=stored):
            return pd.DataFrame({"verdict": [stored if root is None else now], "what the paper claims": ["text"]}, index=["a"])
        monkeypatch.setattr("xai_companion.reproduce.claims_overview", overview)
        found = _claims(tmp_path)
        assert (found is not None) == shown and (not shown or found.loc["a"].tolist() == [now, stored, "text"])


def test_no_page_is_begun_when_the_time_is_over_or_without_the_device(pretend, clone, monkeypatch):
    ended = iter(["cell [1]: ValueError", "", "cell [2]: OutOfTime: the next step", ""])
    with monkeypatch.context() as changed:
        changed.setattr("xai_companion.reproduce._run_one", lambda notebook, now, env: Outcome("sise", notebook, error=next(ended)))
        assert len(_run_all([Path(f"{name}.ipynb") for name in "abcd"], None, {})) == 3
    run, asked = pretend
    monkeypatch.setenv("XAI_COMPANION_DEVICE", "cuda:99")
    with pytest.raises(RuntimeError, match="cuda:99"):
        run()
    assert not asked and not (clone / "reports").exists()
