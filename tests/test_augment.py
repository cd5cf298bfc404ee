"""Augmentations: the same views from the same seed, parity with torchvision, values by hand, bad input."""

import pytest
import torch
from helpers import equal, noise, seed
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from xai_companion.data import augment
from xai_companion.data.augment import (
    AUGMENTATIONS,
    adjusted,
    augmented,
    color_jitter,
    crop_boxes,
    cutout,
    random_crop,
    random_flip,
    random_grayscale,
    random_resized_crop,
    resized_crops,
)
from xai_companion.explain.contract import generators


def earlier_crop(images, pad, flip, generator):
    "As the training loop of the first records cropped"
    count, side = len(images), images.shape[-1]
    corner = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    mirror = (torch.rand(count, 1, generator=generator) < 0.5) & flip
    along = torch.arange(side)
    rows, columns = corner[0] + along, corner[1] + torch.where(mirror, along.flip(0), along)
    wide = F.pad(images, [pad] * 4).permute(0, 2, 3, 1)
    return wide[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@pytest.mark.parametrize("pad, flip", [(3, True), (0, True), (5, False), (0, False)])
def test_crops_are_those_of_earlier_runs(pad, flip):
    images = noise(32)
    got = random_crop(images, pad, flip, seed(7))
    assert torch.equal(got, earlier_crop(images, pad, flip, seed(7))) and got.dtype == torch.uint8
    assert torch.equal(got, random_crop(images.contiguous(memory_format=torch.channels_last), pad, flip, seed(7)))
    same = random_crop(images[:1].expand(32, -1, -1, -1), pad, flip, seed(7))
    different = len({tuple(image.flatten().tolist()) for image in same})
    assert different == 1 if not (pad or flip) else different == 2 if not pad else different > 16


def test_a_map_travels_with_its_image():
    images, maps = noise(8) / 255, torch.rand(8, 1, 16, 16, generator=seed(1))
    both = random_crop(torch.cat([images, maps], 1), 4, True, seed(2))
    assert torch.equal(both[:, :3], random_crop(images, 4, True, seed(2)))
    assert torch.equal(both[:, 3:], random_crop(maps, 4, True, seed(2)))
    crops = random_resized_crop(torch.cat([images, maps], 1), seed(3), flip=True)
    assert torch.equal(crops[:, :3], random_resized_crop(images, seed(3), flip=True))


def test_images_that_are_not_square():
    images = noise(6, height=10, width=20)
    assert random_crop(images, 2, True, seed(0)).shape == random_resized_crop(images, seed(0)).shape == images.shape
    boxes = crop_boxes(500, (10, 20), seed(0))
    assert (boxes[:, 2:] > 0).all() and (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist() == [10, 20]


def test_flips():
    images = noise(200, height=4)
    got = random_flip(images, seed(0))
    turned = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(got, images, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(got, images, strict=True)])
    assert (turned ^ kept).all() and 70 < turned.sum() < 130


def test_boxes_are_distributed_as_torchvision_draws_them():
    from torchvision.transforms import RandomResizedCrop
    ours = crop_boxes(4000, (32, 48), seed(0)).double()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        image = torch.zeros(1, 32, 48)
        draws = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = torch.tensor(draws).double()
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        spread = (a.var() + b.var()).div(4000).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * spread and abs(a.std() / b.std() - 1) < 0.06


def test_boxes_that_never_fit_are_the_largest_in_the_centre():
    from torchvision.transforms import RandomResizedCrop
    for height, width, ratio in ((20, 100, (1, 1)), (100, 20, (0.5, 1)), (30, 31, (4, 5))):
        box = crop_boxes(1, (height, width), seed(0), (1, 1), ratio)[0].tolist()
        with torch.random.fork_rng([]):
            assert box == list(RandomResizedCrop.get_params(torch.zeros(1, height, width), [1, 1], list(ratio)))


@pytest.mark.parametrize("size", [16, 33, (20, 50), 96])
def test_resized_crops_are_torchvisions(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    images = noise(24, 2, height, width)
    boxes = crop_boxes(24, (height, width), seed(1), (0.05, 1))
    boxes[0], boxes[1] = torch.tensor([0, 0, height, width]), torch.tensor([height - 1, width - 1, 1, 1])
    slow = torch.stack([TF.resized_crop(image / 255, *box, [height, width], antialias=False)
                        for image, box in zip(images, boxes.tolist(), strict=True)])
    got = resized_crops(images, boxes)
    torch.testing.assert_close(got, slow, atol=3e-5, rtol=0)
    mirror = torch.arange(24) % 2 == 0
    flipped = resized_crops(images, boxes, mirror)
    torch.testing.assert_close(flipped, torch.where(mirror.view(-1, 1, 1, 1), slow.flip(-1), slow), atol=3e-5, rtol=0)
    assert got.dtype == torch.float32 and 0 <= got.min() and got.max() <= 1 + 1e-6


def test_what_is_beside_the_box_does_not_shine_in():
    images = torch.ones(1, 1, 9, 9)
    images[:, :, 3:6, 3:6] = 0
    assert resized_crops(images, torch.tensor([[3, 3, 3, 3]])).max() < 1e-6


TORCHVISION = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast, "saturation": TF.adjust_saturation,
               "hue": TF.adjust_hue}


def colourful(count=40, side=12):
    "Noise, and every kind of pixel that needs care: grey, black, white, pure and tied colours"
    images = torch.rand(count, 3, side, side, generator=seed(0))
    levels = torch.tensor([0.0, 0.5, 1.0])
    images[0, :, :3, :9] = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 3, 9)
    images[1], images[2], images[3] = 0, 1, 0.3
    return images


@pytest.mark.parametrize("order", ["brightness", "contrast", "saturation", "hue", "brightness contrast saturation hue",
                                   "hue saturation contrast brightness", "contrast hue brightness saturation"])
def test_colours_are_torchvisions(order):
    images = colourful()
    draws = torch.rand(4, len(images), generator=seed(1))
    drawn = zip(order.split(), draws, strict=False)
    factors = {name: draw - 0.5 if name == "hue" else 2 * draw for name, draw in drawn}
    slow = []
    for i, image in enumerate(images):
        for name, values in factors.items():
            image = TORCHVISION[name](image, values[i].item())
        slow.append(image)
    before = images.clone()
    got = adjusted(images, factors)
    torch.testing.assert_close(got, torch.stack(slow), atol=1e-5, rtol=0)
    assert torch.equal(images, before) and 0 <= got.min() <= got.max() <= 1


def test_colours_by_hand():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    for sixths, colour in ((0, [1, 0, 0]), (1, [1, 1, 0]), (2, [0, 1, 0]), (3, [0, 1, 1]), (-2, [0, 0, 1])):
        turned = adjusted(red, {"hue": torch.tensor([sixths / 6])})
        torch.testing.assert_close(turned.flatten(), torch.tensor(colour).float())
    assert adjusted(red, {"brightness": torch.tensor([0.5])}).flatten().tolist() == [0.5, 0, 0]
    torch.testing.assert_close(adjusted(red, {"saturation": torch.tensor([0.0])}).flatten(), torch.full((3,), 0.2989))


def test_colours_of_images_larger_than_a_chunk():
    large = torch.full((2, 3, 260, 260), 0.5)  # more than 2**16 pixels
    torch.testing.assert_close(adjusted(large, {"brightness": torch.tensor([0.5, 1.2])})[:, 0, 0, 0], torch.tensor([0.25, 0.6]))


def test_no_image_depends_on_its_mates_or_on_the_chunk():
    images = noise(50, height=40)  # 40 images are a chunk
    names = "hue", "contrast", "saturation", "brightness"
    factors = {name: torch.rand(50, generator=seed(i)) * 0.5 for i, name in enumerate(names)}
    boxes, whole = crop_boxes(50, (40, 40), seed(1)), adjusted(images, factors)
    for part in (slice(0, 7), slice(7, 8), slice(38, 50)):
        some = adjusted(images[part], {name: values[part] for name, values in factors.items()})
        torch.testing.assert_close(some, whole[part], atol=1e-6, rtol=0)
        assert torch.equal(resized_crops(images[part], boxes[part]), resized_crops(images, boxes)[part])


def test_jitter_changes_the_share_that_it_says_each_by_its_own_numbers():
    images = noise(1, height=6).expand(300, -1, -1, -1)
    got = color_jitter(images, seed(0), p=0.8)
    same = (got == images[0] / 255).flatten(1).all(1)
    assert 35 < same.sum() < 85 and len(got[~same].flatten(1).unique(dim=0)) == (~same).sum()
    grey = random_grayscale(images, seed(0), p=0.2)
    is_grey = (grey[:, 0] == grey[:, 1]).flatten(1).all(1)
    assert 35 < is_grey.sum() < 85 and torch.equal(grey[~is_grey], images[~is_grey] / 255)
    torch.testing.assert_close(grey[is_grey][0], TF.rgb_to_grayscale(images[0] / 255, 3))


@pytest.mark.parametrize("name, strength, low, high", [("brightness", 0.4, 0.6, 1.4), ("contrast", 2.0, 0, 3),
                                                       ("hue", 0.1, -0.1, 0.1)])
def test_jitter_draws_from_the_range_that_it_says(name, strength, low, high, monkeypatch):
    seen = []
    monkeypatch.setitem(augment.ADJUSTMENTS, name, lambda part, values: seen.append(values.flatten()))
    none = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    color_jitter(noise(2000, height=2), seed(0), p=1.0, **none | {name: strength})
    values = torch.cat(seen)
    assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high


def test_cutout_by_hand():
    images, generator = noise(100, 2, 9) // 2 + 1, seed(3)
    got = cutout(images, 4, seed(3), fill=1.0)
    rows, columns = (torch.randint(9, (100, 1), generator=generator)[:, 0].tolist() for _ in range(2))
    for i in range(100):
        slow = images[i].clone()
        slow[:, max(0, rows[i] - 2):rows[i] + 2, max(0, columns[i] - 2):columns[i] + 2] = 255
        assert torch.equal(got[i], slow)
    floats = cutout(images / 255, 4, seed(3), fill=0.25)
    hole = got == 255
    assert (floats[hole] == 0.25).all() and torch.equal(floats[~hole], (images / 255)[~hole])


def test_cutout_of_one_pixel():
    g = seed()
    assert (cutout(torch.ones(5, 3, 8, 8), 1, g, fill=0.0) == 0).sum((1, 2, 3)).tolist() == [3] * 5
    assert (cutout(torch.zeros(5, 3, 8, 8), 1, g, fill=1) == 1).sum((1, 2, 3)).tolist() == [3] * 5


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views(name):
    images = noise(20, height=24)
    before, states = images.clone(), generators()
    one, two = augmented(images, name, seed(5), views=2)
    assert one.shape == images.shape and one.dtype == torch.float32 and 0 <= one.min() <= one.max() <= 1
    assert equal([one, two], augmented(images, name, seed(5), views=2))
    assert torch.equal(images, before) and generators() == states
    if name != "none":
        assert not torch.equal(one, two) and not torch.equal(one, augmented(images, name, seed(6), views=2)[0])
        alike = augmented(images[:1].expand(20, -1, -1, -1), name, seed(5))[0]
        assert len(alike.flatten(1).unique(dim=0)) > 12, "images of a batch share their numbers"


def test_names_mean_what_they_say():
    images = noise(20, height=24)
    assert torch.equal(augmented(images, "none", seed(0))[0], images / 255)
    assert torch.equal(augmented(images, "crop", seed(0))[0], random_crop(images, 3, True, seed(0)) / 255)
    assert torch.equal(augmented(images, "crop", seed(0), pad=0, flip=False)[0], images / 255)
    assert torch.equal(augmented(images, "resized_crop", seed(0))[0], random_resized_crop(images, seed(0), flip=True))
    generator = seed(0)
    chain = random_resized_crop(images, generator, flip=True)
    chain = random_grayscale(color_jitter(chain, generator), generator)
    assert torch.equal(augmented(images, "simclr", seed(0))[0], chain)
    generator = seed(0)
    crops = random_crop(images, 3, True, generator) / 255
    assert torch.equal(augmented(images, "cutout", seed(0))[0], cutout(crops, 12, generator))


@pytest.mark.parametrize("call, text", [
    (lambda: augmented(noise(), "simcrl", seed(0)), "did you mean 'simclr'"),
    (lambda: augmented(noise(), "crop", seed(0), views=0), "views must be"),
    (lambda: augmented(noise()[0], "none", seed(0)), r"images must be \(N, C, H, W\)"),
    (lambda: augmented(noise().long(), "none", seed(0)), "images must be"),
    (lambda: augmented(noise(0), "crop", seed(0)), "images must be"),
    (lambda: augmented(noise()[0], "crop", seed(0)), "images must be"),
    (lambda: augmented(noise().long(), "crop", seed(0)), "images must be"),
    (lambda: augmented(noise(channels=1), "simclr", seed(0)), r"colours need images \(N, 3"),
    (lambda: random_crop(noise(), -1, True, seed(0)), "pad is a margin"),
    (lambda: random_crop(noise(), 1.5, True, seed(0)), "pad is a margin"),
    (lambda: random_resized_crop(noise(), seed(0), scale=(0, 1)), "scale must be"),
    (lambda: random_resized_crop(noise(), seed(0), scale=(0.5, 0.2)), "scale must be"),
    (lambda: random_resized_crop(noise(), seed(0), ratio=(2, 1)), "ratio must be"),
    (lambda: random_flip(noise(), seed(0), p=2), "p is a probability"),
    (lambda: random_grayscale(noise(), seed(0), p=-0.1), "p is a probability"),
    (lambda: color_jitter(noise(), seed(0), hue=0.6), "strengths"),
    (lambda: color_jitter(noise(), seed(0), contrast=-1), "strengths"),
    (lambda: adjusted(noise(), {"hue": torch.zeros(3)}), "one per image"),
    (lambda: adjusted(noise(), {"gamma": torch.zeros(12)}), "factors are one of"),
    *((lambda side=side: cutout(noise(), side, seed(0)), "side must be at least one pixel") for side in (0, 2.5)),
    *((lambda fill=fill: cutout(noise(), 4, seed(0), fill), r"side must be at least one pixel.*fill must lie in \[0, 1\]")
      for fill in (255, 1.01, -0.1, float("nan"))),
])
def test_bad_input_names_the_cause(call, text):
    with pytest.raises(ValueError, match=text):
        call()
