"""Batches: the same bytes by either way and with any number of workers, and what cannot be read is named."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import equal, noise, seed
from torchvision.transforms.functional import to_pil_image
from writers import write_voc

from xai_companion.data import loader
from xai_companion.data.augment import augmented
from xai_companion.data.corruptions import CorruptedSet
from xai_companion.data.datasets import load_dataset
from xai_companion.data.items import ImageSet, Item, resized
from xai_companion.data.loader import Resident, Streamed, epoch_order, read_items, subseed
from xai_companion.data.readers import ImageFolder
from xai_companion.data.synthetic import Synthetic, creatures
from xai_companion.explain.contract import generators
from xai_companion.own_data import Located
from xai_companion.train import tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Twelve files of four sizes, two of them not square, in two classes"
    root = tmp_path_factory.mktemp("sizes")
    for i, size in enumerate([32, 40, 64, 50] * 3):
        file = root / f"kind {i % 2}" / f"{i:02}.png"
        file.parent.mkdir(exist_ok=True)
        image = creatures(i, size).image[0]
        to_pil_image(image[:, :30] if size == 50 else image).save(file)
    return root


# ------------------------------------------------------------------ order


def test_seeds_and_order_are_those_of_earlier_runs():
    "Stored records depend on these numbers"
    assert [subseed(0, "order", 0), subseed(1, "step", 7)] == [868375782, 2079007863]
    assert epoch_order(10, 0, 0).tolist() == [4, 5, 3, 9, 1, 6, 7, 2, 0, 8]
    assert sorted(epoch_order(1000, 3, 2).tolist()) == list(range(1000))
    assert len({tuple(epoch_order(50, s, e).tolist()) for s in range(3) for e in range(3)}) == 9


# ------------------------------------------------------------------ batches


def test_resident_by_hand():
    images, labels = noise(6), torch.tensor([3, 1, 2, 0, 1, 1], dtype=torch.int32)
    held = Resident(images, labels)
    [(part, kinds, index), (last, _, _)] = held.batches([torch.tensor([4, 0, 4]), [5]])
    assert len(held) == 6 and held.labels.dtype == torch.int64
    assert torch.equal(part, torch.stack([images[4], images[0], images[4]])) and part.dtype == torch.uint8
    assert kinds.tolist() == [1, 3, 1] and index.tolist() == [4, 0, 4] and torch.equal(last, images[5:])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_gives_what_resident_gives(folder, workers):
    found = ImageFolder(folder)
    items = [resized(found[i], 32) if found[i].image.shape[1:] != (32, 32) else found[i] for i in range(12)]
    images = torch.stack([(item.image * 255).round().byte() for item in items])
    held = Resident(images, torch.tensor([item.label for item in items]))
    streamed = Streamed(found, 32, workers=workers)
    order = [*epoch_order(12, 0, 0).split(5), *epoch_order(12, 0, 1).split(5)]
    got = [*streamed.batches(index for index in order)]
    assert [part[2].tolist() for part in got] == [index.tolist() for index in order]
    assert all(equal(a, b) for a, b in zip(got, held.batches(order), strict=True))
    assert torch.equal(streamed.labels, held.labels) and len(streamed) == 12
    rest = [*streamed.batches(order[2:])]
    assert len(rest) == 4 and all(equal(a, b) for a, b in zip(rest, got[2:], strict=True))


def test_workers_do_not_touch_the_numbers_of_the_run(folder):
    before = generators()
    for workers in (0, 1):
        next(Streamed(ImageFolder(folder), 16, workers=workers).batches(epoch_order(12, 0, 0).split(4)))
    assert generators() == before


def test_drawn_sets_are_drawn_in_batches_and_at_any_size():
    drawn = Synthetic("val", n=30, size=32)
    calls, batch = [], drawn.batch
    drawn.batch = lambda index, *more: calls.append(index) or batch(index, *more)
    images, labels = read_items(drawn, [7, 3], 32)
    assert calls == [[7, 3]]
    assert labels.tolist() == [drawn[7].label, drawn[3].label]
    assert torch.equal(images[1], (drawn[3].image * 255).round().byte())
    assert read_items(drawn, [7], 40)[0].shape == (1, 3, 40, 40)
    assert torch.equal(Streamed(drawn, 32).labels, torch.tensor([item.label for item in drawn]))


class Cards(ImageSet):
    "Grey cards; number 5 is what the test says"
    name, classes = "cards", ["dark", "bright"]

    def __init__(self, odd):
        self.odd = odd

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index != 5:
            return Item(f"{index}.png", torch.full((3, 8, 8), index / 8), (index % 2,))
        if self.odd == "exit":
            os._exit(1)
        if isinstance(self.odd, Exception):
            raise self.odd
        return self.odd


ODD = {
    "NaN": (Item("five.png", torch.full((3, 8, 8), torch.nan), (0,)), ValueError, "five.png.*NaN"),
    "range": (Item("five.png", torch.full((3, 8, 8), 7.0), (0,)), ValueError, r"five.png.*\[0, 1\]"),
    "grey": (Item("five.png", torch.zeros(1, 8, 8), (0,)), ValueError, r"five.png.*\(3, H, W\)"),
    "two classes": (Item("five.png", torch.zeros(3, 8, 8), (0, 1)), ValueError, "five.png.*2 classes"),
    "gone": (FileNotFoundError(2, "No such file", "five.png"), ValueError, "five.png"),
    "a bug": (KeyError("colour"), KeyError, "colour"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ODD)
def test_damaged_images_in_the_middle_are_named(kind, workers):
    odd, error, text = ODD[kind]
    stream = Streamed(Cards(odd), 8, workers=workers).batches(torch.arange(8).split(2))
    assert [next(stream)[2].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(error, match=text) as raised:
        next(stream)
    assert kind == "a bug" or "Traceback" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named(folder, tmp_path, workers):
    for file in sorted(folder.rglob("*.png")):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes()[:60 if file.name == "04.png" else None])
    found = ImageFolder(tmp_path)
    place = [Path(file).name for file in found.files].index("04.png")
    good, bad = [torch.tensor([i for i in range(12) if i != place]), torch.tensor([0, place])]
    stream = Streamed(found, 16, workers=workers).batches([good, bad])
    assert len(next(stream)[0]) == 11
    with pytest.raises(ValueError, match="04.png"):
        next(stream)


def test_a_worker_that_dies_is_an_error_with_a_remedy():
    with pytest.raises(RuntimeError, match="has died.*workers=0"):
        [*Streamed(Cards("exit"), 8, workers=1).batches(torch.arange(8).split(4))]


@pytest.mark.parametrize("index, words", [
    *((index, "a batch is a list of whole numbers") for index in ([], [[1, 2]], [0.5], [True, False])),
    *((index, "a batch asks for the images") for index in ([-1], [8], [-1, 2], [3, 8]))])
def test_lists_of_indices_that_make_no_sense(index, words):
    for source in (Resident(noise(8), torch.zeros(8).long()), Streamed(Cards(None), 8)):
        with pytest.raises(ValueError, match=words):
            [*source.batches([torch.tensor(index)])]


def test_sets_that_make_no_sense():
    images, labels = noise(4), torch.zeros(4).long()
    for wrong in ((images / 255, labels), (images[0], labels), (images[:0], labels[:0])):
        with pytest.raises(ValueError, match="images must be bytes"):
            Resident(*wrong)
    for wrong in (labels[:3], labels.float(), labels[:, None, None]):
        with pytest.raises(ValueError, match="whole numbers as labels"):
            Resident(images, wrong)
    for wrong in (dict(size=0), dict(size=8.0), dict(size=8, workers=-1), dict(size=8, workers=None)):
        with pytest.raises(ValueError, match="whole number of at least"):
            Streamed(Cards(None), **wrong)


def test_nothing_that_a_process_has_sent_is_kept(folder, monkeypatch):
    "Each such tensor keeps a file open, and a set has thousands of batches"
    kept, cat = [], torch.cat
    monkeypatch.setattr(tensors, "MANY", 4)
    monkeypatch.setattr(tensors.torch, "cat", lambda parts: kept.extend(parts) or cat(parts))
    images, labels = tensors.to_tensors(ImageFolder(folder), 400)
    assert len(kept) > 1 and not any(part.is_shared() for part in (*kept, images))
    assert labels.tolist() == [target for (target,) in ImageFolder(folder).targets]


def test_classes_that_a_reader_knows_are_not_read(tmp_path, monkeypatch):
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", count=4)
    source = load_dataset("voc2007", "val", root=tmp_path)
    _, expected = read_items(source, range(4), 8)
    monkeypatch.setattr(type(source), "read", None)
    assert torch.equal(Streamed(source, 8).labels, expected) and expected.sum(1).tolist() == [2, 1, 2, 1]


def test_classes_that_a_wrapped_reader_knows_are_not_read(folder, tmp_path, monkeypatch):
    source = ImageFolder(folder)
    wrapped = Located(source), CorruptedSet(source, "brightness", 1, size=32, root=tmp_path)
    labels = Resident(*tensors.to_tensors(source, 32)).labels
    monkeypatch.setattr(ImageFolder, "read", None)
    monkeypatch.setattr(Synthetic, "batch", None)
    assert all(torch.equal(Streamed(data, 32).labels, labels) for data in wrapped)
    assert torch.equal(Streamed(Synthetic("val", n=40), 64).labels, creatures(range(40), split="val").label)


def test_a_set_that_keeps_no_list_is_read_for_its_classes():
    class Own(ImageSet):
        name, classes, batch, size = "own", ["a", "b"], 8, 32  # whatever it means by a batch

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Item(str(index), torch.zeros(3, 32, 32), index % 2)

    assert Own().targets == [(0,), (1,), (0,)] and Streamed(Own(), 32).labels.tolist() == [0, 1, 0]
    assert read_items(Own(), [1, 2], 32)[1].tolist() == [1, 0]


def test_several_classes_per_image():
    "Rows of 0 and 1, in memory and as a stream, for a set that keeps a list of its classes or does not"
    class Pairs(Cards):
        multi_label, classes = True, ["red", "green", "blue"]

        def __getitem__(self, index):
            return replace(super().__getitem__(index), labels=(index % 3, 2) if index % 3 < 2 else (2,))
    several = Pairs(Item("5.png", torch.full((3, 8, 8), 0.5), 0))
    expected = torch.tensor([[int(k in (i % 3, 2)) for k in range(3)] for i in range(8)])
    stream = Streamed(several, 8)
    images, labels = read_items(several, range(8), 8)
    assert torch.equal(labels, expected) and torch.equal(stream.labels, expected)
    whole = Resident(images, labels)
    assert whole.fingerprint == stream.fingerprint
    for some in (whole, stream):
        assert [part[1].tolist() for part in some.batches(torch.arange(8).split(4))] == [part.tolist() for part in expected.split(4)]


def test_bytes_are_checked():
    assert loader.as_bytes(torch.tensor([0.0, 0.5, 1.00001]), "x").tolist() == [0, 128, 255]
    for value in (torch.nan, -0.1, 1.1, torch.inf):
        with pytest.raises(ValueError, match="cat.png"):
            loader.as_bytes(torch.tensor([0.5, value]), "cat.png")


def test_views_of_a_step_do_not_depend_on_how_the_batch_was_read(folder):
    "Resumed in the middle, with or without workers: batch and views of a step are the same"
    def views(source, first):
        order = epoch_order(12, 4, 1).split(3)[first:]
        return [augmented(part, "simclr", seed(subseed(4, "step", first + i)), views=2)
                for i, (part, _, _) in enumerate(source.batches(order))]
    found = ImageFolder(folder)
    whole = views(Resident(*read_items(found, range(12), 32)), 0)
    for workers in (0, 2):
        assert all(equal(a, b) for a, b in zip(views(Streamed(found, 32, workers=workers), 2), whole[2:], strict=True))
