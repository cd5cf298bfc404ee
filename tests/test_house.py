"""What is stored in the notebooks stays small, and tells nothing about the computer it came from."""

import base64
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from helpers import NBS, NOTEBOOKS

import xai_companion

KB = 1000
PACKAGE = Path(xai_companion.__file__).parent
MODULES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for file in PACKAGE.rglob("*.py")}
DOTTED = re.compile(r"`(?:xai_companion\.)?([a-z_0-9]+(?:\.\w+)+)(?:\([^`]*\))?`")  # such as `core.seeded(0)`
PERSONAL = re.compile(r"/(?:home|root|Users|tmp|work)/\w|[A-Z]:\\\\?Users|site-packages|dist-packages")
PROGRESS = re.compile(r"\d%\||\bit/s\b|application/vnd\.jupyter\.widget")


def outputs(notebook):
    "Every stored output of a notebook: cell number, kind and content as text"
    cells = json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            parts = {**output.get("data", {}), "text": output.get("text", ""), "error": output.get("traceback", "")}
            for kind, value in parts.items():
                yield number, kind, "".join(value) if isinstance(value, (list, str)) else json.dumps(value)


def per_notebook(test):
    return pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.as_posix())(test)


@per_notebook
def test_outputs_tell_nothing_personal(notebook):
    for number, kind, text in outputs(notebook):
        if kind.startswith("image/") and not kind.endswith("svg+xml"):
            continue
        text = re.sub(r"base64,[\w+/=]+", "", text)
        assert not PERSONAL.search(text), f"cell {number} stores a path: {PERSONAL.search(text)[0]!r} in {kind}"
        assert not PROGRESS.search(kind + text), f"cell {number} stores a progress bar or a widget"
        assert kind != "error" or not text, f"cell {number} stores a traceback"


@per_notebook
def test_figures_are_small(notebook):
    for number, kind, text in outputs(notebook):
        if kind.startswith("image/"):
            size = len(text) if kind.endswith("svg+xml") else len(base64.b64decode(text))
            assert size <= 60 * KB, f"cell {number}: a figure of {size / KB:.0f} kB; 60 kB is the limit"


@per_notebook
def test_notebook_is_small(notebook):
    size = (NBS / notebook).stat().st_size
    assert size <= 300 * KB, f"{size / KB:.0f} kB; 300 kB is the limit: smaller or fewer figures"


@per_notebook
def test_cells_and_notebooks_are_short(notebook):
    "An exported cell has 50 lines at most, a notebook 300 of them and 120 cells"
    cells = json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]
    lengths = {cell["id"]: sum(bool(line.strip()) and not line.startswith("#|") for line in cell["source"])
               for cell in cells if "#| export" in "".join(cell["source"])}
    long = {id: count for id, count in lengths.items() if count > 50}
    assert not long, f"split these cells: {long}"
    assert sum(lengths.values()) <= 300 and len(cells) <= 120, f"{sum(lengths.values())} exported lines in {len(cells)} cells"


@per_notebook
def test_names_in_the_text_exist(notebook):
    "What the prose calls `module.name` can be had under this name"
    cells = json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for name in DOTTED.findall(text):
        parts = name.split(".")
        known = next((k for k in range(len(parts), 0, -1) if ".".join(parts[:k]) in MODULES), 0)
        if known and parts[-1] not in ("csv", "html"):  # files may be called like modules
            found = import_module(".".join(["xai_companion", *parts[:known]]))
            for part in parts[known:]:
                assert hasattr(found, part), f"the text says `{name}`, and there is no {part} in {found.__name__}"
                found = getattr(found, part)


def test_all_notebooks_together_are_small():
    assert sum((NBS / file).stat().st_size for file in NOTEBOOKS) <= 10_000 * KB
