"""The pages for readers stay true: the quoted messages exist, the sums of the figures stay small, the examples are made."""

import base64
import json
import re
import sys
from pathlib import Path

import pytest
from helpers import NBS, ROOT

GUIDE = NBS / "guide"
sys.path.insert(0, str(ROOT / "docs"))


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def printed(cell):
    "What a stored cell printed, as one line"
    text = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
    return " ".join(text.split())


def headings(cells):
    "(message, what the cells below it printed) of every heading in backticks"
    found = []
    for cell in cells:
        if cell["cell_type"] == "code":
            if found:
                found[-1][1] += printed(cell) + " "
            continue
        for line in "".join(cell["source"]).splitlines():
            if match := re.fullmatch(r"### `(.+)`", line):
                found.append([match[1], ""])
            elif line.startswith("#"):
                found.append(["", ""])
    return [(message, text) for message, text in found if message]


def pattern(message):
    "A message with ... for what differs, as a regular expression"
    return ".*".join(re.escape(part) for part in message.split("..."))


def strings_of_the_code():
    "Every message in the package and the Makefile: quotes and line ends between its parts taken out"
    files = [*sorted((ROOT / "xai_companion").rglob("*.py")), ROOT / "Makefile"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)
    return re.sub(r"\{[^{}\n]*\}", "...", text)


MESSAGES = headings(cells_of(GUIDE / "troubleshooting.ipynb"))


def test_there_are_messages_of_every_kind():
    assert len(MESSAGES) >= 30 and len({message for message, _ in MESSAGES}) == len(MESSAGES)
    assert sum(bool(text) for _, text in MESSAGES) >= 25, "most of them are shown by a cell"


@pytest.mark.parametrize("message, text", MESSAGES, ids=[message for message, _ in MESSAGES])
def test_message_is_printed_below_or_stands_in_the_code(message, text):
    if not re.search(pattern(message), text):
        assert not text, f"the cells below print something else: {text[:200]}"
        assert re.search(pattern(message), strings_of_the_code()), "nothing in the code says this"


def test_a_made_up_message_is_found_out():
    for message in ("images must lie in [0, 255]", "the model ... is tired"):
        assert not re.search(pattern(message), strings_of_the_code())
        assert not any(re.search(pattern(message), text) for _, text in MESSAGES)


def test_gallery_is_small_and_shows_every_explainer():
    cells = cells_of(GUIDE / "gallery.ipynb")
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    sizes = [len(base64.b64decode("".join(d[kind]))) for d in data for kind in d if kind.startswith("image/")]
    assert len(sizes) >= 12 and max(sizes) <= 60_000 and sum(sizes) <= 300_000
    assert any(printed(cell).endswith("explainers") for cell in cells)


def test_prose_about_the_results_has_no_decimals():
    prose = [
        "".join(c["source"])
        for c in cells_of(NBS / "tutorials" / "read_the_results.ipynb")
        if c["cell_type"] == "markdown"
    ]
    assert not re.search(r"\d\.\d", "\n".join(prose)), "a number of a record belongs into a cell"


def test_examples_are_made_once(tmp_path, monkeypatch):
    import examples

    calls = []

    def run(arguments, folder):
        calls.append(arguments)
        made = Path(folder) / arguments.split()[-1]
        made = made if made.suffix else made / "index.html"
        made.parent.mkdir(exist_ok=True)
        made.write_text(f"<body>made by {arguments.split()[0]}")

    monkeypatch.setattr(examples, "run", run)
    monkeypatch.setattr(examples, "write_images", lambda folder: None)
    for _ in range(2):
        place = examples.examples(tmp_path / "kept")
    assert [call.split()[0] for call in calls] == ["explain", "audit"]
    found = {file.name: re.sub("<p.*</p>", "", file.read_text(encoding="utf-8")) for file in place.iterdir()}
    assert found == {"gallery.html": "<body>made by explain", "audit.html": "<body>made by audit"}
    monkeypatch.setattr(examples, "fingerprint", lambda: "other code")
    examples.examples(tmp_path / "kept")
    assert len(calls) == 4


def test_a_failing_example_is_named(tmp_path):
    import examples

    with pytest.raises(RuntimeError, match="audit plain_cnn nowhere(.|\n)*nowhere is neither a folder"):
        examples.run("audit plain_cnn nowhere --out audit.html", tmp_path)


def test_images_of_the_examples(tmp_path):
    import examples

    examples.write_images(tmp_path)
    images, masks = (sorted((tmp_path / "creatures" / kind).rglob("*.png")) for kind in ("images", "masks"))
    assert len(images) == len(masks) == 20 * examples.PER_CLASS
    assert [file.relative_to(tmp_path / "creatures" / "images") for file in images] == [
        file.relative_to(tmp_path / "creatures" / "masks") for file in masks
    ]
    assert len(list((tmp_path / "photos").glob("*.png"))) == 4


def test_the_lines_of_the_readme():
    "With cheaper methods; the front page itself is run by `make test-all`"
    [words] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[:1]
    cheap, found = re.subn(r"^methods = .*$", 'methods = ("gradcam", "layercam")', words, flags=re.M)
    assert found == 1
    *lines, last = cheap.strip().split("\n")
    space = {}
    exec("\n".join(lines), space)
    assert len(eval(last, space).axes) == 4 * 3 + 1  # photographs, and the colour bar
