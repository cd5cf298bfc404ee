"""What is shipped: sdist and wheel, the import, the version, the lock file, and the set-up in the Makefile."""
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

import xai_companion

SHIPPED = ("xai_companion", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff")
WHERE_PRESENT = {"IPython": {"figures.py", "results.py"}, "pytorch_grad_cam": {"bench.py"}, "torchcam": {"bench.py"},  # where it runs in a notebook; its peers
                 "jupyter_client": {"notebooks.py"}, "nbformat": {"notebooks.py", "reproduce.py"}}  # nbclient brings the two
LAZY = ("captum", "timm", "matplotlib", "torchvision", "pandas", "skimage", "nbclient", "IPython")


def python(code, **options):
    "What `code` prints in a fresh interpreter"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of the repository, with tests and notebooks beside the package"
    tree = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build", "_src*", "reports")
    for name in (*SHIPPED, "tests", "nbs", "docs", "results"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=skip)
        elif source.is_file():
            shutil.copy(source, tree)
    return tree


def build(tree, out, *what):
    "Build without network"
    done = subprocess.run([sys.executable, "-m", "build", *what, "--no-isolation", "--outdir", str(out), str(tree)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    "A wheel built from the tree"
    [file] = build(tree, tmp_path_factory.mktemp("dist"), "--wheel").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def released(tree, tmp_path_factory):
    "What `python -m build` makes: an sdist from the tree, and a wheel from the unpacked sdist"
    out = build(tree, tmp_path_factory.mktemp("release"))
    [sdist], [file] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    folder = ROOT / "xai_companion"
    wanted = {f.relative_to(ROOT).as_posix() for kind in ("*.py", "*.pt") for f in folder.rglob(kind)} | {"xai_companion/py.typed"}
    assert len(wanted) > 5 and "xai_companion/weights/plain_cnn.pt" in wanted
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        meta = next(n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(meta).decode()
    assert wanted <= names, f"missing: {wanted - names}"
    assert {n.split("/")[0] for n in names} == {"xai_companion"}
    assert not [n for n in names if n.endswith((".ipynb", ".pyc")) or Path(n).name.startswith("test_") or "tests" in Path(n).parts]
    assert "License-Expression: Apache-2.0" in metadata and f"Version: {xai_companion.__version__}" in metadata


def test_wheel_imports_away_from_the_clone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        modules = sorted(n.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                         for n in archive.namelist() if n.endswith(".py"))
    code = (f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
            f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
            "import xai_companion; print(xai_companion.__file__)")
    assert Path(python(code, cwd=tmp_path)).is_relative_to(tmp_path / "site")


def shipped_modules():
    "The packages that the package imports, with the files that do so"
    found = {}
    for file in (ROOT / "xai_companion").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(file.name)
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | {"xai_companion"}}


def test_what_is_imported_is_declared():
    "The test environment has all extras and the peers: an undeclared import would show up at the user's only"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"] + extras}
    owners = packages_distributions()
    odd = {name: files for name, files in shipped_modules().items() if files != WHERE_PRESENT.get(name)
           and not declared & {canonicalize_name(owner) for owner in owners.get(name, ())}}
    assert len(declared) > 10 and not odd, f"imported, but in no list of pyproject.toml: {odd}"


def content(archive):
    "The files of a wheel or an sdist, by name"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            return {name: z.read(name) for name in z.namelist()}
    with tarfile.open(archive) as t:
        return {m.name.partition("/")[2]: t.extractfile(m).read() for m in t.getmembers() if m.isfile()}


@pytest.mark.slow
def test_sdist_makes_the_same_wheel(released, wheel):
    sdist, built = released
    files = content(sdist)
    tops = {name.split("/")[0] for name in files}
    assert tops == {*SHIPPED, "PKG-INFO", "setup.cfg", "xai_companion.egg-info"}, "see MANIFEST.in for what is meant to be there"
    assert not [name for name in files if name.endswith((".ipynb", ".json", ".pyc"))]
    assert built.name == wheel.name and content(built) == content(wheel)
    said = next(text for name, text in content(built).items() if name.endswith("METADATA"))
    metadata = Metadata.from_email(said, validate=True)
    assert metadata.description == (ROOT / "README.md").read_text() and metadata.description_content_type == "text/markdown"
    assert str(metadata.version) == xai_companion.__version__ in sdist.name


@pytest.mark.slow
def test_wheel_works_in_an_environment_of_its_own(released, tmp_path):
    "No network, and not 5 GB: the new environment sees the packages of this one, but neither the clone nor its settings"
    place, work = tmp_path / "venv", tmp_path / "work"
    venv.create(place, symlinks=True)
    work.mkdir()
    own = sysconfig.get_paths(vars={"base": str(place), "platbase": str(place)}, scheme="venv")
    bin, packages = Path(own["scripts"]), Path(own["purelib"])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "XAI_COMPANION", "VIRTUAL_ENV"))}
    env |= {"HOME": str(work), "XAI_COMPANION_QUIET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*words, code=0):
        done = subprocess.run(list(map(str, words)), cwd=work, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr
    run(sys.executable, "-m", "pip", "--python", bin / "python", "install", "--no-deps", "--no-index", released[1])
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    said = run(bin / "python", "-c", "import xai_companion as x, importlib.metadata as m\n"
               "print(x.__file__, m.version('xai_companion'), *[s.value for s in m.distribution('xai_companion').entry_points], sep='\\n')")
    file, number, *entries = said.split("\n")
    assert Path(file).is_relative_to(packages) and number == xai_companion.__version__ and "xai_companion.cli:main" in entries
    assert xai_companion.__version__ in run(bin / "xai-companion", "--version")
    assert all(command in run(bin / "xai-companion", "--help") for command in ("explain", "evaluate", "train", "reproduce", "audit"))

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(work / "photo.png")
    run(bin / "xai-companion", "explain", "photo.png", "--method", "gradcam", "--out", "maps")
    assert {f.suffix for f in (work / "maps").iterdir()} >= {".png", ".npz", ".html"}
    [words] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[:1]
    cheap, found = re.subn(r"^methods = .*$", 'methods = ("gradcam", "layercam")', words, flags=re.M)
    assert found == 1
    run(bin / "python", "-c", "import matplotlib\nmatplotlib.use('agg')\n" + cheap)
    assert "clone" in run(bin / "xai-companion", "reproduce", code=2)


def test_import_is_light():
    code = ("import torch, sys, time\nbefore, start = set(sys.modules), time.perf_counter()\nimport xai_companion\n"
            "print(time.perf_counter() - start, *(set(sys.modules) - before))")
    seconds, *new = python(code).split()
    heavy = [name for name in LAZY if any(n.split(".")[0] == name for n in new)]
    assert not heavy, f"import xai_companion loads {heavy}"
    times = [float(seconds)]
    while min(times) > 0.1 and len(times) < 5:
        times.append(float(python(code).split()[0]))
    assert min(times) < 0.1


def test_no_command_waits_for_pandas():
    assert python("import sys; from xai_companion.cli import parser; parser(); print('pandas' in sys.modules)") == "False"


def test_explain_is_not_hidden():
    assert python("import xai_companion.explain as e, types; print(isinstance(e, types.ModuleType))") == "True"


def test_version_and_citation():
    [installed] = distributions(name="xai_companion", path=[sysconfig.get_paths()["purelib"]])  # a build leaves another in the tree
    assert installed.version == xai_companion.__version__, "install again: touch pyproject.toml, then make test"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == Version(xai_companion.__version__).base_version
    assert cited["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    numbers = [r["identifiers"][0]["value"] for r in cited["references"]]
    assert numbers == [f"arXiv:{n}" for n in ("2010.00672", "2102.07799", "2102.07805", "2105.14162", "2111.14271")]
    for entry in (cited, *cited["references"]):
        assert entry["title"] and entry["authors"] and all({"name", "family-names"} & set(a) for a in entry["authors"])


def test_lock_is_plain_pins():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert not odd, f"addresses, options or local versions: {odd}"
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert not [n for n in locked if n.startswith(("nvidia", "cuda", "triton", "xai"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=~! ]", w)[0].lower().replace("_", "-") for w in wanted} - {"xai-companion"}
    assert names <= set(locked), f"run `make lock`: {sorted(names - set(locked))} not locked"
    assert re.fullmatch(r"\d+\.\d+\.\d+", xai_companion.__version__.removesuffix(".dev0"))


FAKE = """#!/bin/sh
# stands for an interpreter: $version_ok and $venv_ok say what it can do; installations are counted
case "$*" in
  *ensurepip*) exit {venv_ok} ;;
  *version_info*) exit {version_ok} ;;
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*) echo once >> installs; exit {pip} ;;
esac
"""


@pytest.mark.skipif(not shutil.which("make") or sys.platform == "win32", reason="needs make")
class TestSetup:
    @pytest.fixture
    def setup(self, tmp_path):
        "Runs the set-up of the Makefile with stand-ins for Python"
        tools = tmp_path / "bin"
        tree = tmp_path / "a tree"
        tools.mkdir()
        tree.mkdir()
        for tool in ("sh", "make", "grep", "sed", "head", "mkdir", "cp", "touch", "rm"):
            tools.joinpath(tool).symlink_to(shutil.which(tool))
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, tree)

        def run(*arguments, pythons=(), **env):
            for name, abilities in dict(pythons).items():
                file = tools / name
                file.write_text(FAKE.format(**{"version_ok": 0, "venv_ok": 0, "pip": 0} | abilities))
                file.chmod(0o755)
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "PYTHON", "MFLAGS"))}
            done = subprocess.run(["make", *arguments], cwd=tree, env=kept | {"PATH": str(tools)} | env,
                                  capture_output=True, text=True, timeout=120)
            return done.returncode, done.stdout
        run.tree = tree
        return run

    def test_help_needs_nothing(self, setup):
        code, said = setup()
        assert code == 0 and {"reproduce", "test", "test-all", "lab", "docs", "serve", "bench", "export", "lint",
                              "readme", "save", "lock"} <= {line.split()[1] for line in said.splitlines()}

    def test_no_python(self, setup):
        code, said = setup("test", pythons={"python3": {"version_ok": 1}})
        assert code and said.startswith("Python 3.11 or newer is needed") and said.count("\n") == 1

    def test_named_python_is_the_only_one_tried(self, setup):
        code, said = setup("test", "PYTHON=python9", pythons={"python3": {}})
        assert code and "not found among: python9." in said

    def test_no_venv_module(self, setup):
        code, said = setup("test", pythons={"python3": {"venv_ok": 1}})
        assert code and "apt install python3-venv" in said and said.count("\n") == 1

    def test_older_python3_is_passed_over(self, setup):
        code, said = setup(".venv/.installed", pythons={"python3": {"version_ok": 1}, "python3.12": {}})
        assert code == 0 and said == "Installing into .venv (5 GB, a few minutes, once)\n"

    def test_installs_once_and_again_after_a_change_or_a_failure(self, setup):
        code, said = setup(".venv/.installed", pythons={"python3": {"pip": 1}})
        assert code and "The installation failed" in said and not (setup.tree / ".venv/.installed").exists()
        shutil.rmtree(setup.tree / ".venv")
        for _ in range(2):
            assert setup(".venv/.installed", pythons={"python3": {}})[0] == 0
        installs = setup.tree / "installs"
        assert installs.read_text().count("once") == 2
        later = (setup.tree / ".venv/.installed").stat().st_mtime + 5
        os.utime(setup.tree / "requirements.lock", (later, later))
        setup(".venv/.installed")
        assert installs.read_text().count("once") == 3

    def test_no_network(self, setup):
        nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
        code, said = setup("test", f"PYTHON={sys.executable}", **nowhere)
        assert code and "The installation failed: Could not find" in said and "No network" in said
        assert said.count("\n") == 3 and not (setup.tree / ".venv/.installed").exists()
