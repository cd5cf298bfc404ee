"""Fixtures of several files: the site, built once for all processes of a run, and runs with folders of their own; and the pretended device."""

import os
import subprocess
import sys

import pytest
from filelock import FileLock
from helpers import ROOT
from pretended import AVAILABLE, register

from xai_companion.core import FLOAT32

os.environ |= FLOAT32
if AVAILABLE:
    register()


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    "A fresh build: its folder, and what Sphinx complained about"
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    out, complaints = place / "site", place / "complaints.txt"
    place.mkdir(exist_ok=True)
    with FileLock(place / "lock"):
        if not complaints.is_file():
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "XAI_COMPANION_QUIET": "1", "XAI_COMPANION_PROFILE": "smoke"}
            command = [sys.executable, str(ROOT / "docs" / "nb2myst.py"), "html", str(out)]
            run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
            said = (run.stdout[-1500:] + run.stderr[-4000:]).replace(str(place), "") if run.returncode else ""
            complaints.write_text(said)
    return out, complaints.read_text()


@pytest.fixture(scope="session")
def site(build):
    if build[1]:
        pytest.skip("the site did not build")
    return build[0]


@pytest.fixture
def own_run(tmp_path, monkeypatch):
    "A run at smoke size that records nothing, with its own data, reports/ and results/; gives the folder in which they are"
    for name in ("DATA", "REPORTS", "RESULTS"):
        monkeypatch.setenv(f"XAI_COMPANION_{name}", str(tmp_path / name.lower()))
    for name, value in (("PROFILE", "smoke"), ("REPORT", "0"), ("RECORD", "0")):
        monkeypatch.setenv(f"XAI_COMPANION_{name}", value)
    return tmp_path


@pytest.fixture
def quick(own_run, monkeypatch):
    "The same in the quick profile, and recording"
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "quick")
    monkeypatch.setenv("XAI_COMPANION_RECORD", "1")
    return own_run


@pytest.fixture
def paper_profile(own_run, monkeypatch):
    "The same in the paper profile"
    monkeypatch.setenv("XAI_COMPANION_PROFILE", "paper")
    return own_run
