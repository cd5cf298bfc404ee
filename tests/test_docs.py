"""The site builds without a warning, has a page for every notebook and no dead link, and loads nothing from outside."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class Page(HTMLParser):
    "Ids, link targets and loaded files of an HTML page"

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or "" for name, value in attrs}
        self.ids.update(attrs[name] for name in ("id", "name") if name in attrs)
        self.links += [attrs[name] for name in ("href", "src") if attrs.get(name)]
        if attrs.get(LOADING.get(tag)):
            self.loaded.append(attrs[LOADING[tag]])


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    "A fresh build: its folder, and what Sphinx complained about"
    out = tmp_path_factory.mktemp("docs") / "site"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "XAI_COMPANION_QUIET": "1"}
    command = [sys.executable, str(ROOT / "docs" / "nb2myst.py"), "html", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    complaints = (run.stdout[-1500:] + run.stderr[-4000:]).replace(str(out.parent), "") if run.returncode else ""
    return out, complaints


@pytest.fixture(scope="module")
def site(build):
    if build[1]:
        pytest.skip("the site did not build")
    return build[0]


@pytest.fixture(scope="module")
def pages(site):
    "Every page of the site, by path"
    files = [file for file in site.rglob("*.html") if "_static" not in file.parts]
    return {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in files}


def is_outside(link):
    return bool(re.match(r"(https?:)?//", link))


def dead(file, link, pages):
    "Does `link` on the page `file` lead nowhere"
    parts = urlsplit(link)
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return True
    return bool(parts.fragment) and target in pages and unquote(parts.fragment) not in pages[target].ids


def test_builds_without_warnings(build):
    if build[1]:
        pytest.fail(f"the site did not build\n{build[1]}", pytrace=False)


def test_no_dead_links(site, pages):
    skip = ("mailto:", "data:", "javascript:")
    links = [(file, link) for file, page in pages.items() for link in page.links]
    links = [(file, link) for file, link in links if not link.startswith(skip) and not is_outside(link)]
    assert len(links) > 100
    assert [f"{file.relative_to(site)}: {link}" for file, link in links if dead(file, link, pages)] == []


def test_nothing_is_loaded_from_outside(site, pages):
    loaded = [
        f"{file.relative_to(site)}: {link}" for file, page in pages.items() for link in page.loaded if is_outside(link)
    ]
    for file in site.rglob("*.css"):
        found = re.findall(r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')]+)", file.read_text(encoding="utf-8"))
        loaded += [f"{file.relative_to(site)}: {link}" for link in found]
    assert loaded == []
    used = [file for file, page in pages.items() if any("mathjax" in link for link in page.loaded)]
    assert (site / "_static" / "mathjax" / "tex-svg-full.js").is_file() or not used


def test_every_notebook_has_a_page_and_can_be_downloaded(site, pages):
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        page = (site / path.with_suffix(".html")).resolve()
        assert page in pages, f"{path} has no page"
        assert any(unquote(link).endswith(f"_sources/{path.as_posix()}") for link in pages[page].links), path
        assert (site / "_sources" / path).read_bytes() == (NBS / path).read_bytes(), f"{path} differs"


def test_live_examples(site, pages):
    for page, example in (("guide/gallery", "gallery"), ("tutorials/audit_your_classifier", "audit")):
        assert f"../examples/{example}.html" in pages[(site / f"{page}.html").resolve()].links
        assert (site / "examples" / f"{example}.html").stat().st_size > 100_000


def test_search_finds_functions(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    data = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", index, re.S)[1])
    names = {entry[-1] for entry in data["objects"]["xai_companion.core"]}
    assert {"by_profile", "pick_device", "seeded"} <= names
    assert "profil" in data["terms"]


def test_api_entries_and_links(site):
    text = (site / "00_core.html").read_text(encoding="utf-8")
    assert 'id="xai_companion.core.seeded"' in text
    assert 'href="#xai_companion.core.by_profile"' in text, "a name in backticks is not a link"
    assert "the same seed gives the same numbers" in text, "the comment of a parameter is missing"
    assert "_modules/xai_companion/core.html#seeded" in text, "no link to the source"
    assert "AUTOGENERATED" not in text and "#|" not in text


def test_sidebar_is_readable(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    sidebar = re.search(r'<nav class="bd-links.*?</nav>', text, re.S)[0]
    captions = re.findall(r'class="caption-text">([^<]+)<', sidebar)
    assert captions[:2] == ["Start", "Library"] and set(captions) <= {"Start", "Library", "Papers", "Guide", "Tutorials"}
    titles = [title.strip() for title in re.findall(r'<a class="[^"]*" href="[^"]*">\s*([^<]+)<', sidebar)]
    assert [title for title in titles if re.match(r"\d|.*(_|\.ipynb)", title)] == []
