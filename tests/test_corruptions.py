"""Corruptions: repeatable and kept on disk; the published sets on small files of their format, whole and damaged."""
import builtins
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from writers import needs_shift, write_cifar_c

from xai_companion.core import seeded
from xai_companion.data.corruptions import (
    CIFAR10_CLASSES,
    CIFAR10C,
    CIFAR100_CLASSES,
    CIFAR100C,
    CORRUPTIONS,
    FURTHER,
    CorruptedSet,
    TinyImageNetC,
    corrupt,
)
from xai_companion.data.datasets import check_set
from xai_companion.data.items import ImageSet, Item
from xai_companion.data.readers import DataError, TinyImageNet, imagenet_wnids
from xai_companion.data.synthetic import Synthetic
from xai_companion.explain.contract import generators

SMOOTH = (torch.arange(40 * 36 * 3).reshape(40, 36, 3) % 211).to(torch.uint8).permute(2, 0, 1)
IMAGES = torch.stack([SMOOTH, SMOOTH.flip(1), SMOOTH.flip(0)])
STILL = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")  # without random numbers
SAME_COLOUR = {"defocus_blur", "glass_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate", "jpeg_compression"}  # stays the same


@needs_shift
class TestCorrupt:
    def test_the_names_are_the_librarys(self):
        from imagecorruptions import get_corruption_names
        assert list(CORRUPTIONS) == get_corruption_names("common")
        assert set(FURTHER) == set(get_corruption_names("validation"))

    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_one_image_at_a_time(self, name):
        together = corrupt(IMAGES, name, 4, seed=3, indices=[5, 0, 9])
        assert together.dtype == torch.uint8 and together.shape == IMAGES.shape and together.is_contiguous()
        assert torch.equal(together[2:], corrupt(IMAGES[2:], name, 4, seed=3, indices=torch.tensor([9])))
        assert torch.equal(corrupt(IMAGES, name), corrupt(IMAGES, name, 3, 0, [0, 1, 2]))

    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_what_the_numbers_change(self, name):
        image, wanted = IMAGES[:1], corrupt(IMAGES[:1], name, 2)
        assert not torch.equal(wanted, image)
        others = (corrupt(image, name, 2, seed=1), corrupt(image, name, 2, indices=[1]))
        assert [torch.equal(wanted, other) for other in others] == [name in STILL] * 2
        assert not torch.equal(wanted, corrupt(image, name, 5))

    def test_global_random_numbers_stay(self):
        states = generators()
        for name in CORRUPTIONS:
            corrupt(IMAGES[:1], name)
        assert generators() == states

    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_equals_the_library(self, name):
        "Told the same numbers: image 7 of a set with seed 5 at severity 3"
        from imagecorruptions import corrupt as theirs
        key = np.random.SeedSequence((5, 7, CORRUPTIONS.index(name), 3)).generate_state(1).item()
        with seeded():
            np.random.seed(key)
            expected = theirs(IMAGES[0].permute(1, 2, 0).numpy(), 3, name, **({"seed": key} if name in ("impulse_noise", "glass_blur") else {}))
        assert (corrupt(IMAGES[:1], name, 3, seed=5, indices=[7])[0].permute(1, 2, 0).numpy() == expected).all()

    def test_noise_has_the_librarys_strength(self):
        grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
        for severity, scale in enumerate((0.08, 0.12, 0.18), 1):
            assert abs(corrupt(grey, "gaussian_noise", severity).float().std() / 255 - scale) < 0.01

    def test_in_another_process(self):
        names = ("impulse_noise", "glass_blur", "frost", "snow")
        code = ("import sys, zlib, torch; from xai_companion.data.corruptions import corrupt\n"
                "assert not {'imagecorruptions', 'cv2', 'numba'} & set(sys.modules)\n"
                "image = torch.arange(32 * 32 * 3).reshape(1, 3, 32, 32).to(torch.uint8)\n"
                f"print([zlib.crc32(corrupt(image, n, 3).numpy()) for n in {names}])")
        theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        image = torch.arange(32 * 32 * 3).reshape(1, 3, 32, 32).to(torch.uint8)
        assert theirs == str([zlib.crc32(corrupt(image, name, 3).numpy()) for name in names])

    @pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 64), (100, 40)])
    def test_sizes(self, size, capsys):
        image = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for name in CORRUPTIONS:
            for severity in (1, 5):
                got = corrupt(image, name, severity)
                assert got.shape == image.shape and not torch.equal(got, image)
        assert not capsys.readouterr().out

    def test_black_and_white(self):
        for value in (0, 255):
            image = torch.full((1, 3, 32, 32), value, dtype=torch.uint8)
            same = {name for name in CORRUPTIONS if torch.equal(corrupt(image, name, 5), image)}
            assert same == SAME_COLOUR | ({"brightness", "snow"} if value else {"shot_noise", "motion_blur", "fog"})

    @pytest.mark.parametrize("change, words", [
        ({"name": "rain"}, "choose one of gaussian_noise"), ({"name": "spatter"}, "no corruption"), ({"severity": 0}, "severity must be"),
        ({"severity": 6}, "severity must be"), ({"seed": -1}, "seed must be"), ({"severity": 2.0}, "severity must be"), ({"indices": [1]}, "3 images, 1 indices"),
        ({"images": IMAGES.float() / 255}, "must be uint8"), ({"images": IMAGES[0]}, "must be uint8"), ({"images": IMAGES[:, :1]}, "uint8"),
        ({"images": IMAGES.numpy()}, "ndarray"), ({"images": IMAGES[..., :31]}, "32 pixels or more")])
    def test_bad_input(self, change, words):
        with pytest.raises(ValueError, match=words):
            corrupt(**{"images": IMAGES, "name": "fog"} | change)


def test_missing_package(monkeypatch):
    monkeypatch.setattr("xai_companion.data.readers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "xai_companion\[shift\]"'):
        corrupt(IMAGES, "fog")


class Pictures(ImageSet):
    "Five images of two sizes, and how often one was opened"
    name, split, classes, fingerprint = "pictures", "all", ["a", "b"], "pictures all 5 abc"
    opened = 0

    def __init__(self, other=(36, 40)):
        self.sizes = [(36, 40)] * 4 + [other]

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.opened += 1
        image = torch.rand(3, *self.sizes[index], generator=torch.Generator().manual_seed(index))
        return Item(str(index), image, (index % 2,), torch.tensor([[2.0, 3, 20, 30]]), (index % 2,))


@needs_shift
class TestCorruptedSet:
    def test_items(self, tmp_path):
        data = Pictures()
        noisy = CorruptedSet(data, "gaussian_noise", 2, root=tmp_path)
        assert len(noisy) == 5 and noisy.classes == data.classes and not noisy.multi_label
        clean = (torch.stack([item.image for item in data]) * 255).round().byte()
        assert torch.equal(noisy.pixels, corrupt(clean, "gaussian_noise", 2))
        assert torch.equal(noisy[3].image, noisy.pixels[3].float() / 255)
        assert noisy[3].label == 1 and torch.equal(noisy[3].boxes, data[3].boxes)
        assert [item.label for item in noisy] == [0, 1, 0, 1, 0]
        assert check_set(noisy)["images"] == 5

    def test_size(self, tmp_path):
        with pytest.raises(ValueError, match="give a size"):
            CorruptedSet(Pictures(other=(50, 60)), "fog", root=tmp_path)
        small = CorruptedSet(Pictures(other=(50, 60)), "contrast", size=32, root=tmp_path)
        assert small.pixels.shape == (5, 3, 32, 32) and small[4].image.shape == (3, 32, 32)
        assert small[0].boxes.max() < 32 and "at 32" in small.fingerprint
        with pytest.raises(ValueError, match="32 pixels or more"):
            CorruptedSet(Pictures(), "contrast", size=16, root=tmp_path)

    def test_drawn_set(self, tmp_path):
        data = Synthetic("val", 6, size=32)
        pale, smaller = (CorruptedSet(d, "contrast", 1, size, root=tmp_path) for d, size in ((data, None), (Synthetic("val", 6, size=48), 32)))
        clean = (data.batch(range(6)).image * 255).round().byte()
        assert torch.equal(pale.pixels, corrupt(clean, "contrast", 1)) and torch.equal(pale[1].masks, data[1].masks)
        assert smaller.pixels.shape == pale.pixels.shape and not torch.equal(smaller.pixels, pale.pixels)

    def test_kept(self, tmp_path, monkeypatch):
        data = Pictures()
        first = CorruptedSet(data, "snow", 3, root=tmp_path)
        files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
        assert files == {"clean.npz", "snow-3-0.npz"} and data.opened == 5
        CorruptedSet(data, "fog", 1, root=tmp_path)
        assert data.opened == 5  # the clean images were kept, too
        monkeypatch.setattr("xai_companion.data.corruptions.corrupt", None)
        again = CorruptedSet(data, "snow", 3, root=tmp_path)
        assert torch.equal(again.pixels, first.pixels) and again.fingerprint == first.fingerprint

    def test_default_place(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XAI_COMPANION_DATA", str(tmp_path))
        CorruptedSet(Pictures(), "contrast", 1)
        assert (tmp_path / "corrupted" / "pictures-all-5-abc" / "contrast-1-0.npz").is_file()

    def test_fingerprints_differ(self, tmp_path):
        made = [CorruptedSet(Pictures(), name, severity, seed=seed, root=tmp_path).fingerprint
                for name, severity, seed in (("snow", 1, 0), ("snow", 2, 0), ("snow", 1, 1), ("fog", 1, 0))]
        assert len(set(made)) == 4 and made[0].startswith("pictures all 5 abc snow-1 seed=0 ")

    @pytest.mark.parametrize("damage", ["cut", "flip", "other set", "text", "empty"])
    def test_damage(self, tmp_path, damage):
        data = Pictures()
        CorruptedSet(data, "contrast", 1, root=tmp_path)
        [file] = tmp_path.rglob("contrast*.npz")
        content = bytearray(file.read_bytes())
        if damage == "cut":
            file.write_bytes(content[:len(content) // 2])
        elif damage == "flip":
            content[len(content) // 3] ^= 64
            file.write_bytes(content)
        elif damage == "other set":
            np.savez(file, pixels=np.zeros((5, 3, 36, 40), np.uint8), about="somebody else")
        else:
            file.write_bytes(b"not an archive" if damage == "text" else b"")
        with pytest.raises(DataError, match="contrast-1-0.npz"):
            CorruptedSet(data, "contrast", 1, root=tmp_path)

    def test_interrupted(self, tmp_path, monkeypatch):
        def full(file, **arrays):
            file.write(b"half")
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            CorruptedSet(Pictures(), "contrast", 1, root=tmp_path)
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]

    def test_bad_sets(self, tmp_path):
        nameless = Pictures()
        nameless.fingerprint = ""
        with pytest.raises(ValueError, match="no fingerprint"):
            CorruptedSet(nameless, "fog", root=tmp_path)
        with pytest.raises(ValueError, match="choose one of"):
            CorruptedSet(Pictures(), "spatter", root=tmp_path)
        with pytest.raises(IndexError):
            CorruptedSet(Synthetic("val", 2, size=32), "contrast", root=tmp_path)[2]


# ---- published sets ----------------------------------------------------------------------------------------------
class TestCifarC:
    @pytest.mark.parametrize("reader, classes", [(CIFAR10C, CIFAR10_CLASSES), (CIFAR100C, CIFAR100_CLASSES)])
    def test_rows(self, tmp_path, reader, classes):
        pixels = write_cifar_c(tmp_path)
        for severity in range(1, 6):
            data = reader(tmp_path, "fog", severity)
            assert len(data) == 4 and data.classes == classes and data.split == f"fog-{severity}"
            assert data.pixels[:, 0, 0, 0].tolist() == list(range(4 * severity - 4, 4 * severity))
            assert torch.equal(data.pixels, torch.from_numpy(pixels[4 * severity - 4:4 * severity]).permute(0, 3, 1, 2))
            assert [item.label for item in data] == [0, 1, 2, 3]
        assert check_set(data, counts=False)["classes"] == len(classes)
        with pytest.raises(DataError, match="4 images where its authors state 10,000"):
            check_set(data)

    def test_class_names(self):
        assert len(CIFAR10_CLASSES) == 10 and len(set(CIFAR100_CLASSES)) == len(CIFAR100_CLASSES) == 100
        assert sorted(CIFAR10_CLASSES) == CIFAR10_CLASSES and sorted(CIFAR100_CLASSES) == CIFAR100_CLASSES

    def test_size_and_fingerprint(self, tmp_path):
        write_cifar_c(tmp_path)
        write_cifar_c(tmp_path, "spatter")
        made = [CIFAR10C(tmp_path, name, severity, size=size).fingerprint for name in ("fog", "spatter") for severity in (1, 2) for size in (None, 48)]
        assert len(set(made)) == 8
        assert CIFAR10C(tmp_path, "fog", size=48)[0].image.shape == (3, 48, 48)

    def test_default_place(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XAI_COMPANION_DATA", str(tmp_path))
        write_cifar_c(tmp_path / "CIFAR-100-C")
        assert len(CIFAR100C(corruption="fog")) == 4
        with pytest.raises(FileNotFoundError, match="zenodo.org/records/2535967"):
            CIFAR10C(corruption="fog")

    def test_missing(self, tmp_path):
        write_cifar_c(tmp_path)
        with pytest.raises(FileNotFoundError, match="snow.npy is missing.*zenodo.org/records/3555552"):
            CIFAR100C(tmp_path, "snow")
        (tmp_path / "labels.npy").unlink()
        with pytest.raises(FileNotFoundError, match="labels.npy"):
            CIFAR10C(tmp_path, "fog")

    def test_wrong_choice(self, tmp_path):
        with pytest.raises(ValueError, match="saturate"):
            CIFAR10C(tmp_path, "rain")
        with pytest.raises(ValueError, match="severity must be"):
            CIFAR10C(tmp_path, "fog", 0)

    @pytest.mark.parametrize("file", ["fog.npy", "labels.npy"])
    @pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"x" * len(b), lambda b: b[:-1]])
    def test_damaged(self, tmp_path, file, damage):
        write_cifar_c(tmp_path)
        path = tmp_path / file
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(DataError, match=file):
            CIFAR10C(tmp_path, "fog")

    @pytest.mark.parametrize("labels, words", [(np.arange(20) % 5, "repeat"), (np.tile([0, 1, 2, 10], 5), r"from .0.* to .10"),
                                               (np.tile([0, 1, 2, -1], 5), r"from .-1.* to .2"),
                                               (np.tile([0, 1, 2], 5), r"labels \(15,\)"), (np.zeros((20, 2), int), r"labels \(20, 2\)"), (np.array(3), r"labels \(1,\)")])
    def test_wrong_labels(self, tmp_path, labels, words):
        write_cifar_c(tmp_path, labels=labels)
        with pytest.raises(DataError, match=words):
            CIFAR10C(tmp_path, "fog")

    @pytest.mark.parametrize("pixels", [np.zeros((20, 3072), np.uint8), np.zeros((20, 32, 32, 3), np.float32), np.zeros((20, 32, 32), np.uint8),
                                        np.zeros((20, 3, 32, 32), np.uint8)])
    def test_wrong_arrays(self, tmp_path, pixels):
        write_cifar_c(tmp_path)
        np.save(tmp_path / "fog.npy", pixels)
        with pytest.raises(DataError, match="fog.npy holds"):
            CIFAR10C(tmp_path, "fog")

    def test_no_pickle_is_run(self, tmp_path):
        write_cifar_c(tmp_path)
        np.save(tmp_path / "fog.npy", np.array([{"a": builtins.print}], dtype=object), allow_pickle=True)
        with pytest.raises(DataError, match="fog.npy"):
            CIFAR10C(tmp_path, "fog")


@pytest.fixture(scope="module")
def tiny_c(tmp_path_factory):
    "One JPEG in each of 200 classes: the grey level tells the class"
    folder, wnids = tmp_path_factory.mktemp("data") / "Tiny-ImageNet-C", sorted(imagenet_wnids()[300:500])
    for label, wnid in enumerate(wnids):
        place = folder / "frost" / "2" / wnid
        place.mkdir(parents=True)
        Image.new("RGB", (64, 64), (label, label, label)).save(place / f"test_{label}.JPEG")
    return folder, wnids


class TestTinyImageNetC:
    def test_items(self, tiny_c):
        folder, wnids = tiny_c
        data = TinyImageNetC(folder, "frost", 2)
        assert len(data) == 200 and data.wnids == wnids and len(data.classes) == 200
        for index in (0, 77, 199):
            item = data[index]
            assert item.label == index and item.name == f"frost/2/{wnids[index]}/test_{index}.JPEG"
            assert (item.image * 255 - index).abs().max() <= 1 and item.image.shape == (3, 64, 64)
        assert check_set(data, counts=False)["images"] == 200 and "tiny-imagenet-c frost-2 200" in data.fingerprint

    def test_classes_are_those_of_the_clean_set(self, tiny_c, tmp_path):
        folder, wnids = tiny_c
        from xai_companion.models import imagenet_classes
        names = dict(zip(imagenet_wnids(), imagenet_classes(), strict=True))
        (tmp_path / "wnids.txt").write_text("\n".join(reversed(wnids)))
        (tmp_path / "words.txt").write_text("\n".join(f"{w}\t{names[w]}, another name" for w in wnids))
        (tmp_path / "val" / "images").mkdir(parents=True)
        (tmp_path / "val" / "val_annotations.txt").write_text("")
        clean, data = TinyImageNet(tmp_path), TinyImageNetC(folder, "frost", 2)
        assert clean.classes == data.classes and clean.wnids == data.wnids

    def test_missing(self, tiny_c, tmp_path):
        for place in (tiny_c[0], tmp_path / "nothing"):
            with pytest.raises(FileNotFoundError, match="frost.3 is missing.*zenodo.org/records/2536630"):
                TinyImageNetC(place, "frost", 3)

    def test_damaged(self, tiny_c, tmp_path):
        wnids, place = tiny_c[1], tmp_path / "fog" / "1"
        for wnid in wnids[1:]:
            (place / wnid).mkdir(parents=True)
            (place / wnid / "test_0.JPEG").write_bytes(b"no picture")
        with pytest.raises(DataError, match="199 folders of classes"):
            TinyImageNetC(tmp_path, "fog", 1)
        odd = place / "n99999999"
        odd.mkdir()
        (odd / "test_0.JPEG").write_bytes(b"no picture")
        with pytest.raises(DataError, match="n99999999 is none"):
            TinyImageNetC(tmp_path, "fog", 1)
        odd.rename(place / wnids[0])
        with pytest.raises(ValueError, match="test_0.JPEG"):
            TinyImageNetC(tmp_path, "fog", 1)[5]
        (place / wnids[3] / "test_0.JPEG").unlink()
        with pytest.raises(FileNotFoundError, match=wnids[3]):
            TinyImageNetC(tmp_path, "fog", 1)


# ---- by hand -----------------------------------------------------------------------------------------------------
@needs_shift
def test_the_noise_of_an_image_by_hand():
    "Its numbers come from the seed, the number of the image, the corruption and the severity"
    images = torch.randint(256, (2, 3, 32, 33), generator=torch.Generator().manual_seed(0)).byte()
    made = corrupt(images, "gaussian_noise", 2, seed=5, indices=[7, 3])
    for image, noisy, index in zip(images, made, (7, 3), strict=True):
        random_ = np.random.RandomState(np.random.SeedSequence((5, index, 0, 2)).generate_state(1).item())
        pixels = image.permute(1, 2, 0).numpy() / 255
        expected = np.clip(pixels + random_.normal(size=pixels.shape, scale=0.12), 0, 1) * 255
        assert np.abs(noisy.permute(1, 2, 0).numpy() - expected).max() <= 1


@needs_shift
def test_a_corrupted_set_has_its_seed_and_moves_the_boxes(tmp_path):
    clean = (torch.stack([item.image for item in Pictures()]) * 255).round().byte()
    for seed in (0, 3):
        assert torch.equal(CorruptedSet(Pictures(), "gaussian_noise", 2, seed=seed, root=tmp_path).pixels, corrupt(clean, "gaussian_noise", 2, seed))
    small = CorruptedSet(Pictures(), "contrast", size=32, root=tmp_path)
    assert torch.allclose(small[4].boxes, torch.tensor([[2 * 32 / 40, 3 * 32 / 36, 20 * 32 / 40, 30 * 32 / 36]]))
    empty = Pictures()
    empty.sizes = []
    empty.__class__ = type("Empty", (Pictures,), {"__len__": lambda self: 0})
    with pytest.raises(ValueError, match="has no images, so nothing can be kept"):
        CorruptedSet(empty, "fog", root=tmp_path)
