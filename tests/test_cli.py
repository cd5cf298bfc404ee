"""The command as a user runs it: a process with arguments, files, an exit code and a message."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xai_companion.cli import main, save_png
from xai_companion.data.photos import photos

COMMAND = Path(sys.executable).with_name("xai-companion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with two photographs, a name that is markup, and a file that is no image"
    folder = tmp_path_factory.mktemp("photos")
    cat, coffee = photos(160)[:2]
    save_png(folder / "cat.png", cat)
    save_png(folder / "<b>coffee.png", coffee)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_explain(folder, tmp_path):
    out = tmp_path / "out"
    command = [COMMAND, "explain", folder, "--method", "gradcam,saliency", "--target", "tabby", "--size", "96", "--device", "cpu", "--out", out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "cat.png: tabby," in run.stdout and "Traceback" not in run.stderr
    assert {f.name for f in out.iterdir()} == {
        "cat.gradcam.png", "cat.saliency.png", "<b>coffee.gradcam.png", "<b>coffee.saliency.png", "maps.npz", "index.html"}
    with np.load(out / "maps.npz") as stored:
        assert stored["gradcam"].shape == (2, 1, 96, 96) and (stored["target"] == 281).all()
        assert 0 < stored["probability"].max() < 1
    assert Image.open(out / "cat.gradcam.png").size == (96, 96)
    page = (out / "index.html").read_text()
    assert "<b>coffee" not in page and "coffee" in page


@pytest.mark.parametrize("arguments, words", [
    (["missing.png"], "missing.png"),
    (["notes.txt"], "notes.txt"),
    (["cat.png", "--method", "gradkam"], "did you mean 'gradcam'"),
    (["cat.png", "--target", "tabbby"], "did you mean 'tabby'"),
    (["cat.png", "--target", "1000"], "out of range"),
    (["cat.png", "--layer", "layer4"], "no layer 'layer4'"),
    (["cat.png", "--model", "resnet5"], "did you mean"),
    (["cat.png", "--weights", "nowhere.pt"], "nowhere.pt"),
    (["cat.png", "--device", "cuda:99"], "cuda:99"),
])
def test_mistakes_end_in_one_line(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    assert main(["explain", *arguments, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("xai-companion: error: ") and words in message
    assert not (tmp_path / "out").exists()


def test_wrong_usage_and_version(capsys):
    for arguments, code in ((["explain"], 2), (["explian"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert "xai_companion" in capsys.readouterr().out


def test_ctrl_c(folder, tmp_path):
    command = [COMMAND, "explain", folder / "cat.png", "--method", "shapley", "--out", tmp_path / "out"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it
    time.sleep(8)
    run.send_signal(signal.SIGINT)
    message = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and message.strip().endswith("interrupted") and not (tmp_path / "out").exists()
