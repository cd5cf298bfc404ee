"""API entries and the links to them, for the pages that `nb2myst.py` writes.

An entry is a `py:` directive of Sphinx: signature, docstring and the table of parameters with the comments beside them."""

import importlib
import inspect
import re
from dataclasses import is_dataclass
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, NoneType

from fastcore.docments import DocmentTbl, docments

PACKAGE = "xai_companion"
EMPTY = inspect.Parameter.empty
LINKS = {}  # what may stand in backticks -> the full name of an entry; filled by `collect_links`
_modules = r"\b(torch\.nn\.modules\.module|torch|numpy|pathlib|collections\.abc|typing|PIL\.Image)\.(?=[A-Z])"
_backticks = re.compile(r"(?<![`\[{}\w])`([A-Za-z_][\w.]*)((?:\(\))?)`(?![`\]])")


# ---- objects -----------------------------------------------------------------------------------------------------
def find(module, name):
    "The object called `name` in `module`, and the class it belongs to, if any"
    owner, value = None, importlib.import_module(module)
    for part in name.split("."):
        owner, value = value, getattr(value, part)
    return value, owner if inspect.isclass(owner) else None


def methods(cls):
    "Names of the public methods and properties with a docstring that are written in `cls` itself"
    found = []
    for key, value in vars(cls).items():
        function = next((getattr(value, name) for name in ("fget", "func", "__func__") if hasattr(value, name)), value)
        ours = inspect.isfunction(function) and function.__module__.startswith(PACKAGE)
        found += [key] * (ours and key[0] != "_" and bool(value.__doc__))
    return found


def all_names(page):
    "Names of the entries of a page, with the methods inside its classes"
    for name in page.names:
        obj, _ = find(page.module, name)
        yield from [name, *(f"{name}.{key}" for key in methods(obj))] if inspect.isclass(obj) else [name]


# ---- links -------------------------------------------------------------------------------------------------------
def collect_links(pages):
    "Fill `LINKS`: names with and without package and module (the first in import order wins), modules, re-exports"
    pages = [page for page in pages if page.module]
    entries = {f"{page.module}.{name}": name for page in pages for name in all_names(page)}
    keys = [(key, full) for full, name in entries.items() for key in (full, name)]
    keys += [(page.module, page.module) for page in pages]
    for page in pages:
        for name, value in vars(importlib.import_module(page.module)).items():
            full = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            keys += [(f"{page.module}.{name}", full)] * (full in entries)
    for key, full in keys:
        LINKS.setdefault(key, full)
        if key.count(".") > 1:
            LINKS.setdefault(key.removeprefix(f"{PACKAGE}."), full)


def outside_fences(text, change):
    "`text` with `change` applied to every line that is not in a code fence"
    lines, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = None
        elif not fence:
            line = change(line)
        lines.append(line)
    return "\n".join(lines)


def link_names(text, module=None, skip=()):
    "Turn names in backticks into links to their entries, those seen from `module` first; headings stay as they are"

    def link(match):
        name, call = match.groups()
        full = LINKS.get(f"{module}.{name}") or LINKS.get(name)
        return f"{{py:obj}}`{name}{call} <{full}>`" if full and name not in skip else match[0]

    return outside_fences(text, lambda line: line if line.startswith("#") else _backticks.sub(link, line))


# ---- entries -----------------------------------------------------------------------------------------------------
class Verbatim(str):
    "Text that prints as it is where a signature expects a value"

    __repr__ = str.__str__


def annotation_text(annotation):
    "An annotation as people write it: `Tensor`, not `torch.Tensor`"
    return Verbatim(re.sub(_modules, "", inspect.formatannotation(annotation).strip("'")))


def default_text(value):
    "A default as text: functions by name, nothing long and nothing with an address"
    text = getattr(value, "__name__", None) or repr(value)
    return Verbatim("..." if text.startswith("<") or " at 0x" in text or len(text) > 60 else text)


def is_called(obj):
    "Has `obj` a call of its own: not a property, nor a class that inherits its `__init__` from another package"
    module = getattr(getattr(obj, "__init__", None), "__module__", None) or ""
    return is_dataclass(obj) or module.startswith(PACKAGE) if inspect.isclass(obj) else callable(obj)


def signature(obj):
    "The call signature with readable defaults and annotations, without `self`"
    sig = inspect.signature(obj)
    params = []
    for param in sig.parameters.values():
        default = EMPTY if param.default is EMPTY else default_text(param.default)
        annotation = EMPTY if param.annotation is EMPTY else annotation_text(param.annotation)
        params.append(param.replace(default=default, annotation=annotation))
    result = EMPTY if sig.return_annotation is EMPTY or inspect.isclass(obj) else annotation_text(sig.return_annotation)
    return str(sig.replace(parameters=[p for p in params if p.name not in ("self", "cls")], return_annotation=result))


def plain(comment):
    "A comment whose angle brackets, outside of code, open no element"
    return re.sub(r"`[^`]*`|<", lambda match: "&lt;" if match[0] == "<" else match[0], comment)


def parameter_table(obj):
    "Parameters with types, defaults and the comments that stand beside them in the source"
    table = DocmentTbl(obj)
    comments = docments(obj, args_kwargs=True)  # the comment of **options is lost in the table, or is that of what is returned
    for name, item in table.dm.items():
        item["docment"] = plain(comments[name]) if comments.get(name) else EMPTY
        if item["anno"] in (NoneType, FunctionType, BuiltinFunctionType):  # guessed from the default
            item["anno"] = EMPTY
        elif item["anno"] is not EMPTY:
            item["anno"] = "`" + re.sub(rf"{PACKAGE}\.(\w+\.)*", "", annotation_text(item["anno"])) + "`"
        if item["default"] is not EMPTY:
            item["default"] = f"`{default_text(item['default'])}`"
    return table._repr_markdown_().replace("**`", "`").replace("`**", "`")


def api_entry(page, name):
    "The directive of one object; a class holds its methods, except those that have an entry of their own"
    obj, owner = find(page.module, name)
    raw = inspect.getattr_static(owner, name.split(".")[-1]) if owner else obj
    is_property = isinstance(raw, (property, cached_property))
    kind = "class" if inspect.isclass(obj) else "property" if is_property else "method" if owner else "function"
    option = {classmethod: ":classmethod:\n", staticmethod: ":staticmethod:\n"}.get(type(raw), "")
    call, params, table = (signature(obj), docments(obj), parameter_table(obj)) if is_called(obj) else ("", (), "")
    doc = inspect.getdoc(obj) or ""
    parts = [link_names(doc, page.module, skip=params), link_names(table, page.module)]
    if kind == "class":
        parts += [api_entry(page, f"{name}.{key}") for key in methods(obj) if f"{name}.{key}" not in page.names]
    body = "\n\n".join(part for part in parts if part)
    fence = "`" * (8 if kind == "class" else 6)
    return f"{fence}{{py:{kind}}} {name}{call}\n{option}\n{body}\n{fence}"
