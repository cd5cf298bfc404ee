"""Live examples for the site, made while it is built: a gallery of explanations and an audit report.

Both are what the commands write, on images that come with the packages: the photographs, and drawn creatures. They lie
in docs/_build/examples, which Sphinx copies into the site (`html_extra_path`), and are made again only when the code has
changed."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "_build" / "examples"
SMOKE = os.environ.get("XAI_COMPANION_PROFILE") == "smoke"  # small examples, for tests of the site
PER_CLASS = 2 if SMOKE else 4  # creatures of each kind in the audit
COMMANDS = {  # file -> arguments of `xai-companion`, run in a folder with the images; it writes what stands last
    "gallery.html": "explain photos/cat.png photos/coffee.png photos/rocket.png photos/astronaut.png"
    " --method gradcam,layercam,integrated_gradcam,fullgrad,ada_sise --device cpu" + " --size 112" * SMOKE + " --out gallery",
    "audit.html": "audit plain_cnn creatures/images --masks creatures/masks --device cpu --out audit.html",
}
BACK = {  # file -> the page that speaks of it
    "gallery.html": '<a href="../guide/gallery.html">← xai_companion: gallery</a>',
    "audit.html": '<a href="../tutorials/audit_your_classifier.html">← xai_companion: audit your classifier</a>',
}
RUN = "import sys; from xai_companion.cli import main; sys.exit(main())"


def fingerprint():
    "A hash of everything that the examples depend on"
    code = [Path(__file__), *sorted((ROOT / "xai_companion").rglob("*.py")), ROOT / "requirements.lock"]
    return hashlib.sha256(b"\0".join([*(file.read_bytes() for file in code), str(SMOKE).encode()])).hexdigest()


def save(image, file):
    "Write an image (3, H, W) in [0, 1]"
    from xai_companion.viz import as_picture

    file.parent.mkdir(parents=True, exist_ok=True)
    as_picture(image).save(file)


def write_images(folder):
    "The photographs; creatures in a folder per class, and their masks"
    import torch

    from xai_companion.data.photos import PHOTO_NAMES, photos
    from xai_companion.data.synthetic import CLASSES, classes_of, creatures

    for name, photo in zip(PHOTO_NAMES, photos(), strict=True):
        save(photo, folder / "photos" / f"{name}.png")
    numbers = torch.arange(60 * PER_CLASS)
    kinds = classes_of(numbers, 0, "test")
    chosen = torch.cat([numbers[kinds == kind][:PER_CLASS] for kind in range(len(CLASSES))])
    drawn = creatures(chosen, split="test")
    for i, (image, mask, label) in enumerate(zip(drawn.image, drawn.object, drawn.label.tolist(), strict=True)):
        save(image, folder / "creatures" / "images" / CLASSES[label] / f"{i:03}.png")
        save(mask.float().expand(3, -1, -1), folder / "creatures" / "masks" / CLASSES[label] / f"{i:03}.png")


def run(arguments, folder):
    "Run `xai-companion` in `folder`, from this tree"
    settings = {
        "PYTHONPATH": str(ROOT),
        "XAI_COMPANION_QUIET": "1",
        "XAI_COMPANION_COMMAND": f"xai-companion {arguments}",
    }
    command = [sys.executable, "-c", RUN, *arguments.split()]
    done = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"xai-companion {arguments}\n{done.stdout}{done.stderr}")


def examples(kept=KEPT):
    "The folder of the pages, which are made now if there are none of this code"
    place = kept / "examples"
    marked, stamp = kept.with_name(f".{kept.name}-made-from"), fingerprint()
    if marked.is_file() and marked.read_text() == stamp and all((place / name).is_file() for name in COMMANDS):
        return place
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        for name, arguments in COMMANDS.items():
            run(arguments, folder)
            made = Path(folder) / arguments.split()[-1]
            draft = place / f".{name}.{os.getpid()}"
            text = (made / "index.html" if made.is_dir() else made).read_text(encoding="utf-8")
            before, body, after = text.partition("<body>")
            draft.write_text(f"{before}{body}<p>{BACK[name]}</p>{after}", encoding="utf-8")
            draft.replace(place / name)
    marked.write_text(stamp)
    return place


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(*sorted(examples().iterdir()), sep="\n")
