"""Sphinx configuration. The pages are staged by `nb2myst.py`; nothing here reaches for the network."""

import shutil
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).parent

project = "xai_companion"
author = "The xai_companion contributors"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "index"
smartquotes = False
highlight_language = "text"  # of blocks that name no language: mostly commands

nb_execution_mode = "off"  # stored outputs only
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]

add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
nitpick_ignore_regex = [  # types of other packages, private types of ours; every public name of ours must resolve
    ("py:class", r"(?!xai_companion\.).*"),
    ("py:class", r"xai_companion\.(.*\.)?_.*"),
]

mathjax_path = "mathjax/tex-svg-full.js"  # copied from a wheel, see `finish`
html_theme = "sphinx_book_theme"
html_title = "xai_companion"
html_logo = "static/logo.svg"
html_favicon = "static/logo.svg"
html_static_path = ["static"]
html_extra_path = ["_build/examples"]  # pages that `examples.py` makes
html_css_files = ["custom.css"]
html_js_files = ["offline.js"]
html_search_scorer = str(DOCS / "scorer.js")
html_sourcelink_suffix = ""
html_context = {"default_mode": "auto"}  # light or dark as the system has it
html_theme_options = {
    "logo": {"text": "xai_companion"},
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_fullscreen_button": False,
    "footer_content_items": [],
    "pygments_light_style": "github-light",
    "pygments_dark_style": "github-dark",
}


def finish(app, exception):
    "MathJax from its wheel, notebooks as they were written for the download button, and search excerpts of the article"
    if exception or app.builder.name != "html":
        return
    out = Path(app.outdir)
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / mathjax_path
    (out / "_static" / "mathjax").mkdir(exist_ok=True)
    shutil.copyfile(mathjax, out / "_static" / mathjax_path)
    for template in (out / "_static").glob("*webpack-macros.html"):  # of the themes; they are no pages
        template.unlink()
    for copy in (out / "_sources").rglob("*.ipynb"):
        shutil.copyfile(DOCS.parent / "nbs" / copy.relative_to(out / "_sources"), copy)
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        moved = text.replace('class="bd-main" role="main"', 'class="bd-main"')
        moved = moved.replace('<article class="bd-article">', '<article class="bd-article" role="main">')
        if moved != text:
            page.write_text(moved, encoding="utf-8")


def no_download(app, pagename, template, context, doctree):
    "The pages of the library's sections are not made from a notebook: no download button"
    if pagename.startswith("library/"):
        context.pop("page_source_suffix", None)


def setup(app):
    app.connect("html-page-context", no_download, priority=100)
    app.connect("build-finished", finish)
