"""The page of an audit: it needs nothing else and stays small, names stay names, its parts, and the elements that it is written with."""

import base64
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scripted import CARDS, NAMES, Cards, Corner, Page, Scripted, check_self_contained, facts_of, run

from xai_companion import audit_page as parts
from xai_companion import findings as find
from xai_companion import report
from xai_companion.audit import audit
from xai_companion.audit_page import Shown
from xai_companion.webpage import tag, write_page

# ---------------------------------------------------------------- whole pages


def test_numbers_on_the_page(tmp_path):
    found = run(out=tmp_path / "audit.html")
    page = Page((tmp_path / "audit.html").read_text(encoding="utf-8"))
    words = page.text.replace("\n", " ")
    low, high = (100 * x for x in find.share_interval(4, 7)[1:])
    assert f"57.1 %{low:.1f} to {high:.1f} %4 of 7 images" in words
    assert f"{100 * found.calibration['ece15']:.1f} %" in words and "3 of 7 predictions are wrong, 1 of them" in words
    assert "2 of 4 images of ant are taken for bee" in words
    assert ["ant", "bee", "2", "4"] in page.rows and ["bee", "ant", "1", "2"] in page.rows
    ant = next(row for row in page.rows if row[:3] == ["ant", "4", "2"])
    assert ant[3].replace("\u00a0", " ") == "50.0 %" and ant[6].replace("\u00a0", " ") == "87.5 %"
    assert "right (n = 4)" in words and "wrong (n = 3)" in words and "ratio 1.00" in words
    assert "all 7 images" in words and "checksum" in words and "matched by name" in words


def test_page_is_self_contained_and_small(tmp_path):
    cards = [(i % 3, (i + i % 2) % 3, 0.4 + i / 200, 3) for i in range(100)]
    generator = torch.Generator().manual_seed(0)

    class Noisy(Cards):  # noise is what JPEG compresses worst
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item.image[:, 1:] = torch.rand(3, 223, 224, generator=generator)
            return item

    data, model = Noisy(cards, side=224), Scripted(NAMES)
    file = tmp_path / "new" / "audit.html"
    audit(model, data, Corner(model), out=file)
    text = file.read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert sum(name == "img" for name, _ in page.tags) <= 61 and file.stat().st_size < 3_000_000
    for kind, content in re.findall(r"data:image/(\w+);base64,([\w+/=]+)", text):
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == kind.upper()


def test_names_stay_names(tmp_path):
    evil = ['</td><script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "&amp; <b>"]
    cards, files = CARDS * 2, [f'<i>{i}</i>".png' for i in range(14)]
    pages = []
    for names, names_of_files in ((NAMES, None), (evil, files)):
        model, data = Scripted(names), Cards(cards, names=names_of_files)
        data.classes = names
        file = tmp_path / f"{len(pages)}.html"
        audit(model, data, Corner(model), out=file, model_name=names[0], data_name=names[1])
        pages.append(check_self_contained(file.read_text(encoding="utf-8")))
    assert pages[0].tags == pages[1].tags
    assert all(name in pages[1].text for name in evil) and any(file in pages[1].text for file in files)


def test_page_without_errors_and_without_places(tmp_path):
    run([(i % 3, i % 3, 0.9, None) for i in range(9)], out=tmp_path / "audit.html")
    words = Page((tmp_path / "audit.html").read_text(encoding="utf-8")).text
    for sentence in ("All 9 predictions are right", "place of the objects is not known", "There is no wrong prediction", "No two classes"):
        assert sentence in words


# ---------------------------------------------------------------- its parts


def words_of(markup):
    return " ".join(Page(str(markup)).text.split())


@pytest.fixture(scope="module")
def measured():
    "An audit whose calibration is replaced by numbers that are easy to tell apart"
    found = run([*CARDS, (2, 2, 0.5, 8)])
    found.calibration = {"ece10": 0.111, "ece15": 0.222, "temperature": 1.5, "before": 0.3, "after": 0.25, "n_fit": 30, "n_test": 31}
    return found


def test_headline(measured):
    words = words_of(parts.headline(measured))
    low, high = (f"{100 * x:.1f}" for x in find.share_interval(5, 8)[1:])
    assert f"Accuracy62.5 %{low} to {high} %5 of 8 images" in words
    assert "ECE22.2 %15 bins; with 10: 11.1 %n = 8; low is good" in words
    assert words.count("low is good") == 2 and words.count("high is good") == 2 and "n = 7; high is good" in words  # EBPG where a place is known


def test_calibration_on_the_page(measured):
    rows = {row[0]: row[1:] for row in Page(parts.calibration_part(measured)).rows}
    assert rows["accuracy"][0] == "62.5\u00a0%" and rows["ECE, 10 bins"][0] == "11.1\u00a0%" and rows["ECE, 15 bins"][0] == "22.2\u00a0%"
    assert rows["mean confidence"][0] == f"{100 * measured.facts.confidence.mean():.1f}\u00a0%"
    assert rows["confidence minus accuracy"][0] == f"{100 * (measured.facts.confidence.mean() - 0.625):.1f}\u00a0%"
    said = words_of(parts.calibration_part(measured))
    assert "T = 1.50, fitted on 30 of the images, takes the ECE (15 bins) of the other 31 from 30.0 % to 25.0 %." in said
    worse = replace(measured, calibration=measured.calibration | {"after": 0.31})
    assert "from 30.0 % to 31.0 %: no help here." in words_of(parts.calibration_part(worse))


def test_captions(measured):
    said = [words_of(parts.caption(row, NAMES)) for _, row in measured.facts.sort_values("name").iterrows()]
    assert said[2] == "wrong: said bee, is ant (97 %)50 % of the explanation on the object, which covers 25 %; 2.png"
    assert said[0] == "right: ant (92 %)100 % of the explanation on the object, which covers 50 %; 0.png"
    assert said[6] == "right: cat (55 %)6.png"  # nobody knows where the object is


def test_pictures_of_an_image(measured):
    "The image, then a map per class; the outline of the object on the maps; the colour of the caption"
    place = measured.facts.set_index("name").position
    wrong, right = (str(parts.shown_figure(measured, place[name], classes)) for name, classes in (("2.png", [1, 0]), ("0.png", None)))
    assert re.findall(r'alt="([^"]+)"', wrong) == ["image 2.png", "explanation of bee on 2.png", "explanation of ant on 2.png"]
    assert re.findall(r'alt="([^"]+)"', right) == ["image 0.png", "explanation of ant on 0.png"]
    assert Page(wrong).tags[0] == ("figure", "wrong") and Page(right).tags[0] == ("figure", "right")
    assert ("div", "row of3") in Page(wrong).tags and ("div", "row of2") in Page(right).tags
    assert measured.shown[place["2.png"]].mask.sum() == 2 * 8
    shown = replace(measured.shown[place["2.png"]], mask=None)
    assert str(parts.shown_figure(replace(measured, shown={place["2.png"]: shown}), place["2.png"], [1, 0])) != wrong


def test_confusions_on_the_page(measured):
    text = str(parts.confusions_part(measured))
    assert "ant, taken for bee: 2 of 4 images" in words_of(text) and "most frequent of" not in words_of(text)
    assert re.findall(r'alt="explanation of (\w+)', text)[:2] == ["bee", "ant"]  # the predicted class, then the true one
    many = facts_of(*[(i // 5, i // 5 + 1 + i % 5, 0.5) for i in range(25)])
    shown = Shown(torch.zeros(3, 8, 8), None, dict.fromkeys(range(20), torch.rand(1, 8, 8)))
    rows = Page(parts.confusions_part(replace(measured, facts=many.assign(name="a"), names=list(map(str, range(20))), shown=dict.fromkeys(range(25), shown))))
    assert len(rows.rows) == 21 and "The 20 most frequent of 25 pairs." in rows.text


def test_outside_on_the_page(measured):
    words = words_of(parts.outside_part(measured))
    assert "Below 1: 0 of 7 images. These are the 6 lowest." in words and re.findall(r"ratio (\d\.\d\d)", words) == ["1.00"] * 3 + ["2.00"] * 3
    lower = replace(measured, facts=measured.facts.assign(focus=measured.facts.focus / 4))
    assert "Below 1: 7 of 7 images." in words_of(parts.outside_part(lower)) and "ratio 0.25" in words_of(parts.outside_part(lower))


def test_only_scores_that_are_there_are_explained(measured):
    for facts in (measured.facts, measured.facts.drop(columns=["ebpg", "area"])):
        named = {row[0] for row in Page(parts.about_part(replace(measured, facts=facts))).rows}
        assert named & {label for label, _ in find.LABELS.values()} == {label for key, (label, _) in find.LABELS.items() if key in facts}


# ---------------------------------------------------------------- elements


def test_elements():
    made = tag("p", "a<b", tag("br"), class_="x", aria_label='"', tabindex=0, id=None)
    assert made == '<p class="x" aria-label="&quot;" tabindex="0">a&lt;b<br></p>'
    assert [report.percent(v) for v in (None, math.nan, 0, 0.12345, 1.0)] == ["–", "–", "0.0\u00a0%", "12.3\u00a0%", "100.0\u00a0%"]
    assert report.percent(0.126, 0) == "13\u00a0%" and words_of(report.tile("a", "b", "", "c")) == "abc" and "small" not in report.tile("a", "b", "")


def test_tables_put_numbers_on_the_right():
    rows = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.25}]
    for sort in (False, True):
        text = str(report.table(rows, {"share": report.percent}, "shares", sort))
        assert Page(text).rows == [["name", "share"], ["a", "50.0\u00a0%"], ["b", "25.0\u00a0%"]]
        assert re.findall(r'<t[hd][^>]*class="number"[^>]*>([^<]+)', text) == ["share", "50.0\u00a0%", "25.0\u00a0%"]
        assert re.findall(r'data-value="([^"]+)"', text) == ["0.5", "0.25"] * sort
    assert Page(str(report.table([]))).rows == [[]]


def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_made_smaller():
    small = torch.rand(3, 4, 8)
    assert torch.equal(report.enlarged(small), small.repeat_interleave(24, 1).repeat_interleave(24, 2))
    odd, below = torch.rand(3, 5, 5), [int((i + 0.5) * 5 / 192) for i in range(192)]  # the pixel below the centre
    assert torch.equal(report.enlarged(odd), odd[:, below][:, :, below])
    lines = (torch.arange(400) % 2).float().view(1, -1, 1).expand(3, -1, 200)
    large = report.enlarged(lines)
    assert large.shape == (3, 192, 96) and (large[:, 8:-8] - 0.5).abs().max() < 0.2  # a mean, not every second line
    assert report.enlarged(torch.zeros(3, 1, 1000)).shape == (3, 1, 192)
    step = report.enlarged((torch.arange(400) >= 200).float().view(1, -1, 1).expand(3, -1, 400))
    assert step.min() == 0 and step.max() == 1


def test_the_outline_is_white_inside_and_black_outside():
    mask, grey = torch.zeros(1, 8, 8, dtype=torch.bool), torch.full((3, 8, 8), 0.5)
    mask[:, 2:6, 2:6] = True
    expected = grey.clone()
    expected[:, 1:7, 1:7], expected[:, 2:6, 2:6], expected[:, 3:5, 3:5] = 0, 1, 0.5
    assert torch.equal(report.outlined(grey, mask), expected) and torch.equal(report.outlined(grey, mask[:, ::2, ::2]), expected)
    left = torch.zeros(1, 5, 5, dtype=torch.bool)
    left[:, :, :2] = True  # up to 3.2 of 8 columns: three centres
    assert report.outlined(grey, left)[0, 4].tolist() == [0.5, 0.5, 1, 0, 0.5, 0.5, 0.5, 0.5]
    assert report.outlined(grey, None) is grey


def test_an_image_element_holds_its_picture():
    image = torch.tensor([0.2, 0.6, 0.998]).view(3, 1, 1).expand(3, 8, 16)
    element = str(report.picture(image, 'a "cat"'))
    assert 'alt="a &quot;cat&quot;"' in element and 'width="192" height="96"' in element
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", element)[1]))) as stored:
        assert stored.size == (192, 96) and np.abs(np.asarray(stored).mean((0, 1)) - [51, 153, 254]).max() <= 1.5


def test_grey_levels_are_rounded():
    element = str(report.picture(torch.full((3, 192, 192), 100.9 / 255), "grey"))
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", element)[1]))) as stored:
        assert (np.asarray(stored) == 101).all()


def test_a_page_is_written_whole_where_it_is_wanted(tmp_path):
    file = write_page(tmp_path / "new" / "a.html", "caf\u00e9 \udcff")
    assert file.read_bytes() == b"caf\xc3\xa9 ?" and [*file.parent.iterdir()] == [file]
    with pytest.raises(ValueError, match="is a folder: name the file"):
        write_page(tmp_path / "new", "")
