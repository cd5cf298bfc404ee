"""The site and the README from the notebooks: no Quarto, no network, and no cell is run again.

    python docs/nb2myst.py html [FOLDER]   the site, by default in docs/_build/html
    python docs/nb2myst.py readme          README.md and docs/images, from nbs/index.ipynb

A notebook becomes a page in MyST, the Markdown that Sphinx reads: an exported cell becomes the API entries of what it
defines, with its source folded below; directives (`#| echo: false`) become tags of myst-nb; names in backticks become
links. The entries are made from the package, so the site documents what is shipped."""

import ast
import base64
import os
import posixpath
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from fastcore.nbio import mk_cell, nb2str, read_nb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # document this tree, whatever is installed

from apidoc import PACKAGE, api_entry, collect_links, link_names, outside_fences  # noqa: E402
from examples import examples  # noqa: E402

NBS = ROOT / "nbs"
IMAGES = ROOT / "docs" / "images"
GROUPS = {  # sections of the library: first characters of the notebooks' names, and a line about them
    "Foundations": ("0", "Settings, figures, records, models, hooks and masked forward passes: what the rest uses."),
    "Explainers": ("1", "Attribution methods that share one interface."),
    "Data": ("2", "Data sets by name, loaders and corruptions."),
    "Metrics": ("3", "Scores of attribution maps, of classifiers and of their confidence."),
    "Training": ("4", "Training with explanations: augmentations, losses, recipes and the loop."),
    "Tools": ("56789", "Evaluation of explainers over a data set, reports and the command line."),
}
FOLDERS = {"tutorials": "Tutorials", "guide": "Guide", "papers": "Papers"}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


# ---- notebooks ---------------------------------------------------------------------------------------------------
@dataclass
class Page:
    "A notebook on its way to the site"

    path: Path  # relative to nbs/
    title: str
    about: str  # the line after `>` below the title
    module: str | None  # dotted name of what it exports to
    cells: list
    names: list  # of its API entries, relative to the module

    @property
    def ref(self):
        return self.path.with_suffix("").as_posix()


# spaces around ± and : and to between numbers, inside an interval, and before a number of wins
TOGETHER = re.compile(
    r"(?<=\d) (?=(?:±|:|to) \d)|(?<=\d [±:]) (?=\d)|(?<=\d to) (?=\d)|(?<=[\d.],) (?=-?[\d.]+\])|(?<=wins) (?=\d)"
)


def notebooks():
    "Paths of all notebooks, relative to nbs/, in import order"
    paths = sorted(path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    return [path for path in paths if not any(part[0] in "._" for part in path.parts)]


def read_page(path):
    "The notebook at `path` with its title, description and module taken out"
    cells = [cell for cell in read_nb(NBS / path).cells if cell.cell_type != "raw"]
    head = re.match(r"#\s+(.+)\n*(?:>\s*(.+)\n*)?", cells[0].source)
    if not head:
        raise ValueError(f"nbs/{path}: the first cell must start with '# Title'")
    cells[0].set_source(cells[0].source[head.end() :])
    exports = [cell.directive("default_exp") for cell in cells if cell.has_directive("default_exp")]
    module = f"{PACKAGE}.{exports[0]}".removesuffix(".__init__") if exports else None
    names = [name for cell in cells if module for name in documented(cell)]
    return Page(path, head[1].strip(), (head[2] or "").strip(), module, cells, names)


def is_hidden(cell):
    imports_only = is_exported(cell) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.parsed_())
    hidden = {"hide", "default_exp"} & cell.directives.keys() or cell.directive("include") == "false"
    return imports_only or bool(hidden)


def is_exported(cell):
    return cell.cell_type == "code" and bool({"export", "exports", "exporti"} & cell.directives.keys())


def documented(cell):
    "What gets an entry at this cell: public functions and classes that it exports, or the X.y of `show_doc(X.y)`"
    if cell.cell_type != "code":
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = cell.parsed_() if is_exported(cell) else []
    names = [node.name for node in nodes if isinstance(node, kinds) and node.name[0] != "_"]
    return names + re.findall(r"^show_doc\(([\w.]+)", cell.source, re.M)


def tags_of(cell):
    "The tags of myst-nb that say what the directives of a code cell say"
    off = {"echo": "remove-input", "output": "remove-output", "warning": "remove-stderr"}
    tags = [tag for key, tag in off.items() if cell.directive(key) == "false"]
    folded = is_exported(cell) or cell.directive("code-fold") in ("", "true", "show")
    return tags + ["hide-input"] * folded


def link_files(text, change):
    "Apply `change` to the relative targets of links and images"
    target = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|[#/])([^)\s\"#]+)")
    return outside_fences(text, lambda line: target.sub(lambda match: match[1] + change(match[2]), line))


def figure_alt(cell, said):
    "Text in place of a figure: its `fig-alt`, or the heading and the paragraph above it; `said` is the text so far"
    heading, _, section = re.split(r"^#+ ", said, flags=re.M)[-1].partition("\n")
    paragraphs = [part for part in section.split("\n\n") if re.match(r"\s*[\w*`\[\"(]", part)]
    text = cell.directive("fig-alt") or ": ".join([heading, *paragraphs[-1:]])
    plain = re.sub(r"[*`$]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    return textwrap.shorten(plain, 300, placeholder=" ...")


# ---- site --------------------------------------------------------------------------------------------------------
def to_myst(text, page, folder):
    "Markdown of a notebook as MyST; links to files outside nbs/ are made relative to the staged page"

    def change(target):
        file = (NBS / page.path.parent / target).resolve()
        is_outside = file.is_file() and NBS not in file.parents
        return Path(os.path.relpath(file, (folder / page.path).parent)).as_posix() if is_outside else target

    return link_names(link_files(text, change), page.module)


def code_cell(cell, page, folder, alt):
    "A code cell for myst-nb: tags, no directive lines, figures with `alt` and in the size they were drawn for"
    metadata = {"tags": tags_of(cell)}
    for output in cell.outputs:
        for kind, size in output.get("metadata", {}).items():
            if kind.startswith("image/") and "width" in size:
                metadata["mystnb"] = {"image": {"width": f"{size['width']}px", "alt": alt}}
        data = output.get("data", {})
        for kind in data.keys() & {"text/markdown", "text/html"}:  # a number and its interval stay on one line
            data[kind] = TOGETHER.sub("\N{NO-BREAK SPACE}", "".join(data[kind]))
        if "text/markdown" in data:
            data["text/markdown"] = to_myst(data["text/markdown"], page, folder)
    cell.remove_directives()
    source = re.sub(r"^.*#\|\s*hide_line\s*$\n?", "", cell.source, flags=re.M)
    return mk_cell(source, outputs=cell.outputs, metadata=metadata)


def page_cells(page, folder):
    "The cells of the page that shows a notebook"
    about = f"*{link_names(page.about, page.module)}*" if page.about else ""
    module = f"```{{py:module}} {page.module}\n```" if page.module else ""
    yield mk_cell(f"# {page.title}\n\n{about}\n\n{module}", "markdown")
    said = f"# {page.title}\n"
    for cell in page.cells:
        if is_hidden(cell):
            continue
        names = documented(cell) if page.module else []
        yield from (mk_cell(api_entry(page, name), "markdown") for name in names)
        if cell.cell_type == "markdown":
            cell.remove_directives()
            said += f"\n\n{cell.source}"
            yield mk_cell(to_myst(cell.source, page, folder), "markdown")
        elif is_exported(cell) or not names:
            yield code_cell(cell, page, folder, figure_alt(cell, said))


def toctree(refs, caption=""):
    "A part of the sidebar"
    options = [":hidden:"] + [f":caption: {caption}"] * bool(caption)
    return "\n".join(["```{toctree}", *options, "", *refs, "```"])


def library(pages):
    "The pages of the library's sections: path -> text"
    texts = {}
    for title, (digits, about) in GROUPS.items():
        group = [page for page in pages if page.path.parent == Path() and page.ref[0] in digits]
        rows = [f"| [{page.title}](../{page.path.name}) | {link_names(page.about)} |" for page in group]
        tree = toctree([f"/{page.ref}" for page in group])
        if group:
            lines = [f"# {title}", "", about, "", "| Page | What it holds |", "|---|---|", *rows, "", tree, ""]
            texts[f"library/{title.lower()}.md"] = "\n".join(lines)
    return texts


def sidebar(pages, sections):
    "The sidebar, for the end of the front page; papers and tutorials in the order in which the front page links them"
    front = "".join(cell.source for page in pages if page.ref == "index" for cell in page.cells)
    trees = [toctree(["Overview <self>", "All names <genindex>"], "Start")]
    for folder, caption in FOLDERS.items():
        found = [page for page in pages if page.path.parent == Path(folder)]
        found.sort(key=lambda page: (front.find(page.path.as_posix()) % (len(front) + 1), page.ref))
        trees += [toctree([page.ref for page in found], caption)] * bool(found)
    trees.append(toctree([path.removesuffix(".md") for path in sections], "Library"))
    return mk_cell("\n\n".join(trees), "markdown")


def stage(folder, out):
    "Write all pages below `folder`, what did not change not again: Sphinx keeps it. True if the sidebar, which is on all pages, changed"
    pages = [read_page(path) for path in notebooks()]
    collect_links(pages)
    sections = library(pages)
    last = sidebar(pages, sections)
    files = {folder / path: text.encode() for path, text in sections.items()}
    images = [path for path in NBS.rglob("*") if path.suffix in (".png", ".svg", ".jpg", ".gif")]
    files.update({folder / path.relative_to(NBS): path.read_bytes() for path in images})
    for page in pages:
        cells = [*page_cells(page, folder), *([last] if page.ref == "index" else [])]
        for number, cell in enumerate(cells):
            cell["id"] = f"cell-{number}"
        notebook = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
        files[folder / page.path] = nb2str(notebook).encode()
    if any(path.is_file() and path not in files for path in folder.rglob("*")):  # a notebook is gone: start afresh
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    changed = {path for path, content in files.items() if not path.is_file() or path.read_bytes() != content}
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
    return not changed.isdisjoint({folder / "index.ipynb", *(folder / path for path in sections)})


def site(out=ROOT / "docs" / "_build" / "html"):
    "Build the site in `out`; warnings are errors. Pages are staged beside it, so builds in several folders do not meet"
    from sphinx.cmd.build import main

    out = Path(out).resolve()
    work = out.with_name(f".{out.name}.work")
    again = ["-a"] * stage(work / "pages", out)
    examples()
    options = ["-b", "html", "-n", "-W", "--keep-going", "-q", "-c", ROOT / "docs", "-d", work / "doctrees", *again]
    return main([str(option) for option in (*options, work / "pages", out)])


# ---- README ------------------------------------------------------------------------------------------------------
def from_root(text):
    "Markdown of the front page with links that start at the root of the repository"
    return link_files(text, lambda target: posixpath.normpath(f"nbs/{target}"))


def readme_outputs(cell, alt):
    "The outputs of a code cell as Markdown for GitHub; writes the figures"
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        rich = "".join(data.get("text/markdown") or data.get("text/html") or "")
        text = "".join(output.get("text") or data.get("text/plain") or "").strip()
        figure = next((kind for kind in ("image/png", "image/jpeg") if kind in data), None)
        if figure:
            file = IMAGES / f"index-{cell.id}-{number}.{figure[6:]}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(base64.b64decode("".join(data[figure])))
            yield f"![{alt}]({file.relative_to(ROOT).as_posix()})"
        elif rich:
            yield from_root(re.sub(r"<style.*?</style>\s*", "", rich, flags=re.S).strip())
        elif text:
            yield f"```text\n{text}\n```"


def readme():
    "Write README.md and its figures from the front page"
    page = read_page(Path("index.ipynb"))
    shutil.rmtree(IMAGES, ignore_errors=True)
    blocks = ["<!-- Written by docs/nb2myst.py from nbs/index.ipynb: edit that. -->", f"# {page.title}"]
    blocks.append(f"> {page.about}" if page.about else "")
    for cell in page.cells:
        hidden, tags, alt = is_hidden(cell), tags_of(cell), cell.directive("fig-alt") or ""
        cell.remove_directives()
        if hidden:
            continue
        if cell.cell_type == "markdown":
            blocks.append(from_root(cell.source.strip()))
            continue
        if "remove-input" not in tags:
            blocks.append(f"```python\n{cell.source.strip()}\n```")
        if "remove-output" not in tags:
            blocks += readme_outputs(cell, alt)
    (ROOT / "README.md").write_text("\n\n".join(filter(None, blocks)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command = {"html": site, "readme": readme}.get("".join(sys.argv[1:2]))
    sys.exit(command(*sys.argv[2:]) if command else __doc__)
