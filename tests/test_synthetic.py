"""The procedural set: the same bits whatever is asked beside them, masks that are true, siblings, the shortcut."""
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from xai_companion.data import synthetic
from xai_companion.data.plans import CLASSES, PLANS, portraits
from xai_companion.data.shapes import TEXTURES, Dice, circle, lines, polygon, stroke, turns, wave
from xai_companion.data.synthetic import Creatures, Synthetic, backdrops, classes_of, creatures
from xai_companion.explain.contract import generators


@pytest.fixture(scope="module")
def many():
    "400 scenes of the validation set at 64 pixels"
    return creatures(range(400), 64, split="val")


def same(a: Creatures, b: Creatures):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_types_shapes_and_ranges(many):
    assert many.image.dtype == torch.float32 and many.image.shape == (400, 3, 64, 64)
    assert many.image.min() >= 0 and many.image.max() <= 1 and many.image.isfinite().all()
    assert many.label.dtype == torch.int64 and many.label.shape == (400,)
    for mask in (many.object, many.part, many.distractor):
        assert mask.dtype == torch.bool and mask.shape == (400, 1, 64, 64)
    assert many.box.dtype == torch.float32 and many.box.shape == (400, 4)


def test_same_numbers_for_every_way_to_ask():
    first = creatures([5], 48)
    for index in (5, torch.tensor(5), torch.tensor([5], dtype=torch.int32), range(5, 6), (5,)):
        assert same(creatures(index, 48), first)


@pytest.mark.parametrize("size", [32, 33, 64, 97])
def test_an_image_does_not_depend_on_the_others(size):
    together = creatures(range(100, 123), size, seed=4, split="test")
    for place in (0, 9, 22):
        alone = creatures(100 + place, size, seed=4, split="test")
        assert same(alone, Creatures(*(value[place:place + 1] for value in together)))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert same(creatures(100 + order, size, seed=4, split="test"), Creatures(*(value[order] for value in together)))


def test_nor_on_the_chunks_nor_on_the_threads_nor_on_the_random_state():
    size, count = 224, 8                                  # 5 images are one chunk at 224 pixels
    torch.manual_seed(1)
    states = generators()
    together = creatures(range(count), size)
    assert generators() == states
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.manual_seed(2)
        assert same(creatures(range(count), size), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(creatures(count - 1, size).image, together.image[-1:])


def test_seed_split_and_index_change_everything():
    base = creatures(range(20), 32)
    others = [creatures(range(20, 40), 32), creatures(torch.arange(20) + 2**33, 32)]
    for option in (dict(seed=1), dict(seed=2**40), dict(split="val"), dict(split="test")):
        others.append(creatures(range(20), 32, **option))
    for other in others:
        assert (other.image - base.image).abs().mean((1, 2, 3)).min() > 0.02


def test_pixels_stay_as_they_were():
    "Raise `VERSION` and renew these numbers when the pictures change on purpose"
    batch = creatures(range(40), 64, split="test")
    assert synthetic.VERSION == 1
    assert batch.label[:8].tolist() == [0, 11, 2, 13, 4, 15, 6, 17]
    assert torch.allclose(batch.image.mean((0, 2, 3)), torch.tensor([0.508577, 0.50425, 0.496034]), atol=1e-5)
    pixels = [int(mask.sum()) for mask in (batch.object, batch.part, batch.distractor)]
    assert pixels == pytest.approx([32864, 12141, 6095], abs=3)


@pytest.mark.parametrize("size, tolerance", [(64, 0.02), (32, 0.03)])
def test_the_scene_is_the_same_at_every_size(size, tolerance):
    large, small = creatures(range(30), 192), creatures(range(30), size)
    factor = 192 // size
    assert (F.avg_pool2d(large.image, factor) - small.image).abs().mean() < tolerance
    for name in ("object", "part", "distractor"):
        share = F.avg_pool2d(getattr(large, name).float(), factor)
        assert ((share >= 0.5) != getattr(small, name)).float().mean() < tolerance
        sure = (share == 0) | (share == 1)
        assert ((share >= 0.5) != getattr(small, name))[sure].float().mean() < 0.002
    assert (large.box / factor - small.box).abs().max() <= 1.5


def test_masks_are_nested_and_never_empty(many):
    assert not (many.part & ~many.object).any() and not (many.object & many.distractor).any()
    assert many.part.sum((1, 2, 3)).min() >= 8 and (many.part.sum((1, 2, 3)) < many.object.sum((1, 2, 3))).all()
    small = creatures(range(400), 32, split="val")
    assert small.part.sum((1, 2, 3)).min() >= 1


def test_box_is_the_bounding_box(many):
    for mask, box in zip(many.object[:100, 0], many.box[:100].tolist(), strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_sizes_and_places(many):
    area = many.object.float().mean((1, 2, 3))
    assert area.min() > 0.03 and area.max() < 0.6
    low, high = area.quantile(torch.tensor([1 / 3, 2 / 3]))
    assert low < 0.13 and high > 0.2
    centre = (many.box[:, :2] + many.box[:, 2:]) / 128
    assert ((centre - 0.5).norm(dim=1) > 0.15).float().mean() > 0.4
    assert ((many.box[:, 0] == 0) | (many.box[:, 2] == 64)).float().mean() < 0.6


def test_distractors(many):
    seen = many.distractor.any(3).any(2)[:, 0]
    assert 0.8 < seen.float().mean() < 1
    index = torch.arange(2000)
    loose = Dice(index, 0, "train").pick("loose class", 20)
    own = classes_of(index)
    assert abs(((loose // 2) == (own // 2)).float().mean() - 0.1) < 0.025      # they tell nothing about the class


def test_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 20 and len(PLANS) == 10
    for seed in (0, 1):
        for split in ("train", "val", "test"):
            blocks = classes_of(torch.arange(400), seed, split).view(20, 20)
            assert (blocks.sort(1).values == torch.arange(20)).all()
            assert len({tuple(block) for block in blocks.tolist()}) > 10
    assert torch.equal(creatures(range(30), 32).label, classes_of(torch.arange(30)))


@pytest.mark.parametrize("size", [32, 64])
def test_siblings_differ_only_in_the_part(size):
    index = torch.arange(200)
    own = classes_of(index)

    def canvas(label):
        return [c for _, c in synthetic._scene(index, label, backdrops(index, own), size, 0, "train", "cpu")][-1]

    one, two = canvas(own), canvas(own ^ 1)
    untouched = (one[:, 4] == 0) & (two[:, 4] == 0)
    changed = (one != two).any(1)
    assert not (changed & untouched).any()
    images, siblings = creatures(index, size), creatures(index, size, label=own ^ 1)
    assert torch.equal(images.image, one[:, :3].clamp(0, 1)) and torch.equal(siblings.image, two[:, :3].clamp(0, 1))
    change = (images.image - siblings.image).abs().amax(1, keepdim=True)
    near = F.max_pool2d((images.part | siblings.part).float(), 3, 1, 1) > 0
    assert change[near].square().sum() > 0.99 * change.square().sum()
    assert change.amax((1, 2, 3)).min() > 0.1 and (siblings.label == own ^ 1).all()


def test_the_part_of_every_class_is_drawn_and_the_table_is_right():
    zoo = portraits(96)
    fill = zoo[:, 3].mean((1, 2)).view(10, 2).mean(1) / 0.9**2
    assert torch.allclose(fill, torch.tensor([plan.area for plan in PLANS]), atol=0.04)
    assert (zoo[:, 4] <= zoo[:, 3]).all() and (zoo[:, 4].sum((1, 2)) > 0.05 * zoo[:, 3].sum((1, 2))).all()
    assert zoo[:, 3, [0, -1]].max() == 0 and zoo[:, 5].max() == 0   # nothing touches the upper and lower edge


@pytest.mark.parametrize("shortcut", [0.0, 0.3, 0.8, 1.0])
def test_the_shortcut_is_in_the_training_split_only(shortcut):
    index = torch.arange(8000)
    for split in ("train", "val", "test"):
        label = classes_of(index, 0, split)
        tied = (backdrops(index, label, 0, split, shortcut) == label).double().mean()
        chance = shortcut + (1 - shortcut) / 20 if split == "train" else 0.05
        assert abs(tied - chance) < 4 * math.sqrt(0.25 / 8000)
    for split in ("val", "test"):
        assert same(creatures(range(20), 32, shortcut=shortcut, split=split), creatures(range(20), 32, split=split))


def test_the_shortcut_changes_the_background_and_nothing_else():
    free, tied = creatures(range(60), 64), creatures(range(60), 64, shortcut=1.0)
    assert same(free._replace(image=free.image[:, :0]), tied._replace(image=tied.image[:, :0]))
    calm = 1 - F.max_pool2d((free.object | free.distractor).float(), 5, 1, 2)
    inside = -F.max_pool2d(-free.object.float(), 5, 1, 2) > 0
    change = (free.image - tied.image).abs().amax(1, keepdim=True)
    assert change[calm > 0].mean() > 0.03 and change[inside].mean() < 0.002
    same_class = creatures(torch.arange(400)[classes_of(torch.arange(400)) == 4], 32, shortcut=1.0)
    hue = (same_class.image * (~same_class.object & ~same_class.distractor)).sum((2, 3))
    assert (hue[:, 0] > hue[:, 2]).all()                                        # backgrounds of even numbers are warm


@pytest.mark.parametrize("wrong, words", [
    (dict(size=31), "32 to 224"), (dict(size=225), "32 to 224"), (dict(size=64.0), "size"), (dict(size=None), "size"),
    (dict(index=-1), "index"), (dict(index=[3, -2]), "index"), (dict(index=[]), "index"), (dict(index=1.5), "index"),
    (dict(index=[True]), "index"), (dict(split="dev"), "train, val, test"), (dict(shortcut=-0.1), "shortcut"),
    (dict(shortcut=1.01), "shortcut"), (dict(shortcut=math.nan), "shortcut"), (dict(seed=0.5), "seed"),
    (dict(label=20), "label"), (dict(label=-1), "label"), (dict(label=[0, 1]), "label"),
])
def test_bad_input_of_creatures(wrong, words):
    with pytest.raises(ValueError, match=words):
        creatures(**{"index": 0} | wrong)


def test_items():
    images = Synthetic("test", n=40, size=48, seed=3)
    batch = images.batch(range(40))
    assert len(images) == 40 and images.name == "synthetic" and images.classes == CLASSES and not images.multi_label
    assert batch.label.bincount(minlength=20).tolist() == [2] * 20
    for i in (0, 17, 39):
        item = images[i]
        assert item.name == str(i) and item.label == batch.label[i] and item.box_labels == item.labels
        assert torch.equal(item.image, batch.image[i]) and torch.equal(item.boxes, batch.box[i:i + 1])
        assert item.masks.shape == (1, 1, 48, 48) and torch.equal(item.mask(), batch.object[i])
        assert torch.equal(item.extra["part"], batch.part[i])
        assert torch.equal(item.extra["distractor"], batch.distractor[i])
    assert len(list(images)) == 40
    assert torch.equal(pickle.loads(pickle.dumps(images))[5].image, images[5].image)


def test_items_in_a_loader():
    images = Synthetic("val", n=6, size=32)
    def stack(items):
        return torch.stack([item.image for item in items])

    loader = torch.utils.data.DataLoader(images, batch_size=3, collate_fn=stack)
    assert torch.equal(torch.cat(list(loader)), images.batch(range(6)).image)


def test_fingerprint_names_what_decides():
    base = Synthetic("train", n=100)
    assert base.fingerprint == "synthetic v1 train n=100 size=64 seed=0 shortcut=0"
    others = [Synthetic("val", n=100), Synthetic("train", n=101), Synthetic("train", n=100, size=65),
              Synthetic("train", n=100, seed=1), Synthetic("train", n=100, shortcut=0.5)]
    assert len({s.fingerprint for s in (base, *others)}) == 6
    assert [len(Synthetic(split)) for split in ("train", "val", "test")] == [10_000, 2_000, 2_000]


def test_bad_input_of_the_set():
    images = Synthetic("val", n=5)
    assert torch.equal(images[-1].image, images[4].image) and images[-1].name == images[4].name
    for index in (5, -6, 1000):
        with pytest.raises(IndexError, match="0 to 4"):
            images[index]
    with pytest.raises(ValueError, match="0 to 4"):
        images.batch([0, 5])
    for wrong in (dict(n=0), dict(n=2.5), dict(split="dev"), dict(size=300), dict(shortcut=7), dict(seed=None)):
        with pytest.raises(ValueError):
            Synthetic(**wrong)


def test_dice():
    index = torch.arange(50_000)
    dice = Dice(index, seed=-1, split="val")
    values = dice("height", -2, 3)
    assert values.dtype == torch.float64 and values.min() >= -2 and values.max() < 3 and abs(values.mean() - 0.5) < 0.03
    assert abs(values.var() - 25 / 12) < 0.05 and values.unique().numel() > 49_990
    bits = dice.bits("height")
    for bit in range(32):
        assert abs((bits >> bit & 1).double().mean() - 0.5) < 0.012, bit
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.02
    assert torch.equal(dice[index[::7]]("height", -2, 3), values[::7])
    assert dice.pick("six", 6).bincount().tolist() == pytest.approx([50_000 / 6] * 6, rel=0.04)


def test_distances_by_hand():
    p = torch.tensor([[[0.0, 3.0, 1.0]]]), torch.tensor([[[0.0, 4.0, 0.0]]])
    assert circle(p, 0, 0, 2).flatten().tolist() == [-2, 3, -1]
    far = math.hypot(2, 4)
    assert stroke(p, [(0, 0), (1, 0)], 0.5).flatten().tolist() == pytest.approx([-0.5, far - 0.5, -0.5])
    assert stroke(p, [(0, 0), (1, 0)], 0.5, 0.1).flatten().tolist() == pytest.approx([-0.5, far - 0.1, -0.1])
    square = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    assert polygon(p, square).flatten().tolist() == pytest.approx([-1, math.hypot(2, 3), 0], abs=1e-6)
    across = torch.tensor([0.0, 0.5, 0.9, -1.1])
    assert lines(across, 1.0, 0.2).tolist() == pytest.approx([-0.2, 0.3, -0.1, -0.1], abs=1e-6)


def test_wave_and_turns():
    assert wave(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.25, -0.25])).tolist() == [0, 1, 0, -1, 1, -1]
    x, y = torch.tensor([1.0, 0, -1, 0, 1, -1, 0]), torch.tensor([0.0, 1, 0, -1, 1, -1, 0])
    assert turns(x, y).tolist() == pytest.approx([0, 0.25, 0.5, -0.25, 0.125, -0.375, 0], abs=1e-6)


@pytest.mark.parametrize("name", TEXTURES)
def test_textures(name):
    axis = torch.linspace(-4, 4, 321)
    values = TEXTURES[name](axis.view(1, -1), axis.view(-1, 1)).expand(321, 321)
    assert 0 <= values.min() and values.max() <= 1 and values.std() > 0.15
    assert 0.15 < values.mean() < 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same():
    here, there = creatures(range(100), 64), creatures(range(100), 64, device="cuda")
    assert (here.image - there.image.cpu()).abs().max() < 1e-5
    for name in ("object", "part", "distractor"):
        assert (getattr(here, name) != getattr(there, name).cpu()).float().mean() < 1e-4


def test_neighbours_are_no_siblings():
    "In a block of twenty the classes follow each other in steps that no sibling takes and that visit all of them"
    blocks = classes_of(torch.arange(20 * 500)).view(500, 20)
    steps = (blocks[:, 1:] - blocks[:, :-1]) % 20
    assert (steps == steps[:, :1]).all() and set(steps[:, 0].tolist()) == {3, 7, 9, 11, 13, 17}


def test_portraits_of_siblings_have_the_same_colours():
    pairs = portraits(64).view(10, 2, 6, 64, 64)
    elsewhere = (pairs[:, :, 4] == 0).all(1)[:, None].expand(-1, 6, -1, -1)
    assert torch.equal(pairs[:, 0][elsewhere], pairs[:, 1][elsewhere])


def test_other_classes_in_the_scenes_leave_the_backgrounds():
    "Also where the background belongs to the class: to the one of the scene, not to the one that is drawn into it"
    index = torch.arange(20)
    own = classes_of(index)
    one, two = (creatures(index, 32, shortcut=1.0, label=label) for label in (own, own ^ 1))
    near = F.max_pool2d((one.part | two.part).float(), 3, 1, 1) > 0
    change = (one.image - two.image).abs().amax(1, keepdim=True)
    assert same(one, creatures(index, 32, shortcut=1.0)) and change[near].square().sum() > 0.99 * change.square().sum()


def test_the_set_is_drawn_with_its_shortcut():
    tied, free = Synthetic("train", n=20, size=32, shortcut=1.0), Synthetic("train", n=20, size=32)
    assert same(tied.batch(range(20)), creatures(range(20), 32, shortcut=1.0)) and not same(tied.batch(range(20)), free.batch(range(20)))
