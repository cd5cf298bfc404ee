"""One case per notebook, each in a process of its own: `pytest tests/test_notebooks.py -k sise`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NBDEV_TEST = Path(sys.executable).with_name("nbdev-test")
ENV = {
    "XAI_COMPANION_PROFILE": "smoke",
    "XAI_COMPANION_QUIET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
}


SLOW = {  # half a minute of computing and more, with a quick stand-in
    Path("index.ipynb"): "test_guide runs its lines with cheaper methods",
    Path("66_bench.ipynb"): "test_bench runs what it exports",
}


@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in NOTEBOOKS],
                         ids=lambda path: path.with_suffix("").as_posix())
def test_notebook(path, tmp_path):
    env = {**os.environ, **ENV, "XAI_COMPANION_REPORTS": str(tmp_path)}
    command = [str(NBDEV_TEST), str(NBS / path), "--n-workers", "0"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    if run.returncode:
        pytest.fail(f"nbs/{path}\n{run.stdout[-2000:]}{run.stderr[-3000:]}", pytrace=False)
