"""One case per notebook, each in a process of its own: `pytest tests/test_notebooks.py -k sise`."""

import os
import sys
from multiprocessing import forkserver, get_context, set_start_method
from pathlib import Path

import pytest
from helpers import NBS, NOTEBOOKS, QUIET, ROOT

ENV = QUIET | {"XAI_COMPANION_PROFILE": "smoke", "MPLBACKEND": "agg"}
IMPORTED = ["torch", "torchvision", "matplotlib.pyplot", "pandas", "nbdev.test"]  # once, for all notebooks

SLOW = {  # half a minute of computing and more, with a quick stand-in
    Path("index.ipynb"): "test_guide runs its lines with cheaper methods",
    Path("66_bench.ipynb"): "test_bench runs what it exports",
}


@pytest.fixture(scope="session")
def processes():
    "New processes that have the large libraries imported already: each is a fork of a server"
    if sys.platform == "darwin":  # forks of what has loaded Apple's frameworks crash
        return get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENV.items():
            patch.setenv(name, value)
        forkserver.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    return get_context("forkserver")


def run_notebook(path, reports, said):
    "Run the notebook `path` as nbdev-test does, with what it prints in the file `said`"
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(ENV, XAI_COMPANION_REPORTS=str(reports))
    os.chdir(ROOT)
    set_start_method(None, force=True)  # a notebook's own processes start as they would in any other
    from nbdev.test import nbdev_test

    nbdev_test(str(path), n_workers=0)


@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in NOTEBOOKS],
                         ids=lambda path: path.with_suffix("").as_posix())
def test_notebook(path, tmp_path, processes):
    said = tmp_path / "said.txt"
    said.touch()
    run = processes.Process(target=run_notebook, args=(NBS / path, tmp_path, said))
    run.start()
    run.join(900)
    late = run.is_alive()
    run.kill()
    run.join()
    if late or run.exitcode:
        why = "not done after 15 minutes" if late else f"exit code {run.exitcode}"
        pytest.fail(f"nbs/{path}: {why}\n{said.read_text()[-5000:]}", pytrace=False)
