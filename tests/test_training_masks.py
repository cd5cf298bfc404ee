"""Maps and masks for training: nothing is disturbed, areas are exact, maps travel with their images."""
import copy

import pytest
import torch
from helpers import seed
from torch import nn
from torch.nn import functional as F

from xai_companion.data.augment import cutout, random_crop
from xai_companion.data.synthetic import creatures
from xai_companion.explain import EXPLAINERS
from xai_companion.explain.base import Explainer
from xai_companion.explain.contract import assert_untouched, footprint, generators
from xai_companion.models import load_model
from xai_companion.train.occlusion import (
    CurrentMaps,
    MapCache,
    current_maps,
    occlude,
    random_masks,
    salient,
    square_masks,
    stage_conv,
)

SIZE = 32
METHODS = {"gradcam": {}, "signed": {"signed": True}, "layercam": {}, "sise": {"mu": 0.5}, "fullgrad": {}, "saliency": {},
           "smoothgrad": {"samples": 3}, "integrated_gradients": {"steps": 4}, "rise": {"n_masks": 12}, "deeplift": {}}


def take(model, images, labels, case):
    return current_maps(model, images, labels, "gradcam" if case == "signed" else case, **METHODS[case])


@pytest.fixture(scope="module")
def data():
    return creatures(range(6), SIZE)


@pytest.fixture
def model(data):
    "In the middle of training: mixed modes, a frozen weight, gradients"
    model = load_model("plain_cnn").train()
    model.network.block1[1].eval()
    model.network.block1[0].weight.requires_grad_(False)
    F.cross_entropy(model(data.image), data.label).backward()
    return model


@pytest.mark.parametrize("case", METHODS)
def test_nothing_is_disturbed(model, data, case):
    images = data.image.clone().requires_grad_()
    before = footprint(model, images)
    maps = take(model, images, data.label, case)
    assert_untouched(before, footprint(model, images), f"after maps of {case}")
    assert not maps.requires_grad
    assert maps.shape == (6, 1, SIZE, SIZE) and maps.dtype == torch.float32 and maps.amin() == 0 and maps.amax() <= 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_disturbed_by_an_exception(model, data, error):
    def fail(module, inputs, output):
        raise error("in the middle of the forward pass")
    handle, make = model.network.block3.register_forward_hook(fail), CurrentMaps(model, layers="block2", signed=True)
    before = footprint(model, data.image)
    with pytest.raises(error, match="in the middle"):
        make(data.image, data.label)
    assert_untouched(before, footprint(model, data.image), "after an exception")
    handle.remove()


@pytest.mark.parametrize("case", METHODS)
def test_a_batch_at_a_time_is_one_image_at_a_time(model, data, case):
    together = take(model, data.image, data.label, case)
    alone = torch.cat([take(model, data.image[i:i + 1], data.label[i:i + 1], case) for i in range(6)])
    if case != "sise":
        return torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert ((together - alone).abs() > 1e-4).float().mean() < 0.01


def test_maps_are_those_of_evaluation_mode_and_of_the_current_weights(model, data):
    make = CurrentMaps(model, signed=True)
    first = make(data.image, data.label)
    torch.testing.assert_close(first, current_maps(copy.deepcopy(model).eval(), data.image, data.label, signed=True))
    with torch.no_grad():
        model.network.fc.weight.normal_(generator=seed())
    assert (make(data.image, data.label) - first).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("case", METHODS)
def test_maps_change_with_the_class(model, data, case):
    one, other = (take(model, data.image, (data.label + k) % 20, case) for k in (0, 10))
    assert ((one - other).abs().amax((1, 2, 3)) > 0.05).float().mean() > 0.5
    torch.testing.assert_close(take(model, data.image[:2], data.label[:2].tolist(), case), one[:2], atol=1e-4, rtol=0)


class Fixed(nn.Module):
    "Two feature maps that are the first two channels of the image; logits are weighted means of them"
    def __init__(self, weights):
        super().__init__()
        self.conv, self.weights = nn.Conv2d(3, 2, 1, bias=False), torch.tensor(weights)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(2, 3)[:, :, None, None])

    def forward(self, x):
        return self.conv(x).mean((2, 3)) @ self.weights


def test_signed_gradcam_by_hand():
    "M = (A_1 - 2 A_2) / 4: with ReLU the negative part is cut off before the map is scaled"
    a1, a2 = torch.tensor([[0.8, 0.4], [0.0, 0.2]]), torch.tensor([[0.0, 0.1], [0.5, 0.1]])
    image, model = torch.stack([a1, a2, torch.zeros(2, 2)])[None], Fixed([[1.0, 0.0], [-2.0, 0.0]])
    raw = a1 - 2 * a2                     # 0.8, 0.2, -1, 0
    signed = current_maps(model, image, [0], signed=True, layers="conv")
    torch.testing.assert_close(signed[0, 0], (raw + 1) / 1.8)
    torch.testing.assert_close(current_maps(model, image, [0], layers="conv")[0, 0], raw.relu() / 0.8)
    assert not current_maps(model, image, [1], signed=True, layers="conv").any()
    assert salient(signed).flatten().tolist() == [True, True, False, True]


def test_maps_are_enlarged_before_they_are_scaled(model, data):
    low = EXPLAINERS["gradcam"](model, "pool3", relu=False)
    acts = {}
    with low.at_work(data.image) as images:
        acts["map"] = low.compute(images, data.label)
    full = F.interpolate(acts["map"], (SIZE, SIZE), mode="bilinear")
    span = full.amax((2, 3), keepdim=True) - full.amin((2, 3), keepdim=True)
    expected = (full - full.amin((2, 3), keepdim=True)) / span
    torch.testing.assert_close(current_maps(model, data.image, data.label, signed=True, layers="pool3"), expected)


@pytest.mark.parametrize("options", [{"layers": "block2"}, {}])
def test_one_forward_pass_per_call(model, data, options):
    "After one image, once, that tells the layer or its layout"
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    make = CurrentMaps(model, **options)
    for _ in range(3):
        make(data.image, data.label)
    assert seen == [1, 6, 6, 6]


def test_under_autocast_the_weights_still_get_their_gradients(model, data):
    with torch.autocast("cpu", torch.bfloat16):
        maps = current_maps(model, data.image, data.label)
        model.zero_grad()
        F.cross_entropy(model(data.image).float(), data.label).backward()
    assert maps.dtype == torch.float32 and (maps - current_maps(model, data.image, data.label)).abs().mean() < 0.1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad and p.dim() > 1)


def test_wrapped_for_several_processes(tmp_path, data):
    "Taking maps does not announce a backward pass to DistributedDataParallel"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = load_model("plain_cnn")
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(network).train())
        make = CurrentMaps(wrapped, signed=True, layers="block2")
        for _ in range(2):
            maps = make(data.image, data.label)
            F.cross_entropy(wrapped(data.image), data.label).backward()
        assert maps.shape == (6, 1, SIZE, SIZE) and wrapped.training and wrapped.module.training
        expected = current_maps(network, data.image, data.label, signed=True, layers="block2")
        torch.testing.assert_close(CurrentMaps(nn.DataParallel(network), signed=True, layers="block2")(data.image, data.label), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_network(data):
    network = load_model("plain_cnn")
    expected = current_maps(network, data.image, data.label)
    torch.testing.assert_close(current_maps(torch.compile(network, backend="eager"), data.image, data.label), expected)


def test_training_that_diverged_is_named(model, data):
    with torch.no_grad():
        model.network.fc.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        current_maps(model, data.image, data.label)


def test_maps_of_an_explainer_of_ones_own(model, data):
    class Mine(Explainer, name="mine_in_training"):
        def compute(self, images, target):
            return images.sum(1, keepdim=True) * self.pick_target(images, target).view(-1, 1, 1, 1)
    try:
        maps = current_maps(model, data.image, [1] * 6, "mine_in_training")
        total = data.image.sum(1).flatten(1)
        assert torch.equal(maps.flatten(1).argmax(1), total.argmax(1)) and not current_maps(model, data.image, 0, "mine_in_training").any()
    finally:
        del EXPLAINERS["mine_in_training"]


@pytest.mark.parametrize("call, kind, message", [
    (lambda m, d: current_maps(m, d.image, d.label, "gradcan"), ValueError, "did you mean 'gradcam'"),
    (lambda m, d: current_maps(m, d.image, d.label, "saliency", layers="block2"), ValueError, "takes no layers"),
    (lambda m, d: current_maps(m, d.image, d.label, "saliency", signed=True), ValueError, "no ReLU to leave out"),
    (lambda m, d: current_maps(m, d.image, d.label, layers="layer2"), ValueError, "no layer 'layer2'"),
    (lambda m, d: current_maps(m, d.image, d.label, smoothness=3), ValueError, "gradcam cannot be made with smoothness=3.*its options are layers, relu"),
    (lambda m, d: current_maps(m, d.image, d.label[:4]), ValueError, "6 images, target of shape"),
    (lambda m, d: current_maps(m, d.image, d.label + 1.0), TypeError, "class indices"),
    (lambda m, d: current_maps(m, d.image, 20), ValueError, "out of range"),
    (lambda m, d: current_maps(m, d.image * float("nan"), d.label), ValueError, "NaN"),
    (lambda m, d: current_maps(m, (d.image * 255).byte(), d.label), TypeError, "divide by 255"),
    (lambda m, d: current_maps(m, d.image[0], d.label[:1]), ValueError, r"\(N, C, H, W\)"),
    (lambda m, d: stage_conv(m, "fc"), ValueError, "no convolution in 'fc'"),
    (lambda m, d: stage_conv(m, "layer9"), ValueError, "no layer 'layer9'"),
])
def test_bad_requests(model, data, call, kind, message):
    before = footprint(model, data.image)
    with pytest.raises(kind, match=message):
        call(model, data)
    assert_untouched(before, footprint(model, data.image), "after a bad request")


def test_the_last_convolution_of_a_stage():
    for name, stage, expected in (("resnet18", "layer2", "layer2.1.conv2"), ("resnet18", "layer4", "layer4.1.conv2"),
                                  ("resnet50", "layer2", "layer2.3.conv3"), ("resnet56", "layer2", "layer2.8.conv2")):
        network = load_model(name, None, 10, small=True)
        assert stage_conv(network, stage) == expected == stage_conv(nn.DataParallel(network), stage)
    assert stage_conv(load_model("plain_cnn"), "block2.0") == "block2.0"
    assert stage_conv(load_model("residual_cnn"), "layer2") == "layer2.0.conv2"  # not the convolution of its shortcut


# salient

def test_threshold_by_hand():
    maps = torch.tensor([[2.0, 4.0, 6.0, 10.0], [-1.0, 1.0, 0.0, -0.5]]).view(2, 1, 2, 2)
    assert salient(maps).flatten(1).tolist() == [[False, False, False, True], [False, True, False, False]]  # 0, 1/4, 1/2, 1: above
    assert salient(maps, 0.49).flatten(1).int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert salient(maps, 0.0).sum((1, 2, 3)).tolist() == [3, 3] and not salient(maps, 1.0).any()
    assert torch.equal(salient(maps), salient(7 * maps - 3))


@pytest.mark.parametrize("share", [0.01, 0.15, 0.5, 1.0])
def test_share_is_exact(share):
    maps = torch.rand(5, 1, 24, 32, generator=seed())
    maps[1] = (maps[1] * 3).round()           # many equal values
    masks = salient(maps, share=share)
    assert masks.sum((1, 2, 3)).tolist() == [int(share * 24 * 32)] * 5
    for values, mask in zip(maps.flatten(1), masks.flatten(1), strict=True):
        order = sorted(range(len(values)), key=lambda i, values=values: -values[i].item())
        assert set(mask.nonzero()[:, 0].tolist()) == set(order[:int(share * 24 * 32)])


def test_nothing_is_salient_in_a_constant_map():
    maps = torch.stack([torch.full((1, 4, 4), 0.7), torch.zeros(1, 4, 4), torch.arange(16.0).view(1, 4, 4)])
    for options in ({}, {"tau": 0.0}, {"share": 0.25}, {"share": 1.0}):
        assert salient(maps, **options).flatten(1).any(1).tolist() == [False, False, True]


def test_crops_of_maps_keep_their_scale():
    weak = torch.tensor([0.0, 0.1, 0.2, 0.3]).view(1, 1, 2, 2)
    assert not salient(weak, minmax=False).any() and salient(weak).sum() == 2
    assert not salient(torch.full((1, 1, 2, 2), 0.4), minmax=False).any()
    assert salient(torch.full((1, 1, 2, 2), 0.9), minmax=False).all()


@pytest.mark.parametrize("maps, options, kind, message", [
    (torch.rand(2, 1, 4, 4), {"tau": 1.5}, ValueError, "tau is a threshold"),
    (torch.rand(2, 1, 4, 4), {"tau": -0.1}, ValueError, "tau is a threshold"),
    (torch.rand(2, 1, 4, 4), {"tau": float("nan")}, ValueError, "tau is a threshold"),
    (torch.rand(2, 1, 4, 4), {"share": 0.0}, ValueError, "share is a share of the 16 pixels"),
    (torch.rand(2, 1, 4, 4), {"share": 1.01}, ValueError, "share is a share of the 16 pixels"),
    (torch.rand(2, 1, 4, 4), {"share": 0.01}, ValueError, "at least one pixel"),
    (torch.rand(2, 1, 4, 4), {"share": float("nan")}, ValueError, "share is a share of the 16 pixels"),
    (torch.rand(2, 1, 4, 4) / 0, {}, ValueError, "NaN or infinite"),
    (torch.rand(2, 4, 4), {}, ValueError, "one map per image"),
    (torch.rand(2, 3, 4, 4), {}, ValueError, "one map per image"),
    (torch.zeros(2, 1, 4, 4).byte(), {}, TypeError, "float tensor"),
    (torch.rand(2, 1, 4, 4) * 3, {"minmax": False}, ValueError, r"not \[0, 1\]"),
])
def test_bad_maps(maps, options, kind, message):
    with pytest.raises(kind, match=message):
        salient(maps, **options)


# occlude

@pytest.mark.parametrize("fill", ["mean", "black", "blur", torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)])
def test_hidden_pixels_and_only_they_change(data, fill):
    from xai_companion.masking import hidden
    model, masks = load_model("plain_cnn"), torch.rand(6, 1, SIZE, SIZE, generator=seed()) < 0.3
    seen, backdrop = occlude(data.image, masks, fill, model), hidden(data.image, fill, model)
    where = masks.expand_as(seen)
    assert torch.equal(seen[~where], data.image[~where]) and torch.equal(seen[where], backdrop[where])
    assert not torch.equal(seen, data.image)


def test_the_mean_is_zero_after_normalisation(data):
    "ExCon's fill"
    model = load_model("plain_cnn")
    seen = occlude(data.image, torch.ones(6, 1, SIZE, SIZE, dtype=torch.bool), model=model)
    assert ((seen - model.mean.view(1, 3, 1, 1)) / model.std.view(1, 3, 1, 1)).abs().max() == 0


@pytest.mark.parametrize("masks, options, kind, message", [
    (torch.rand(6, 1, SIZE, SIZE), {}, TypeError, "bool"),
    (torch.ones(6, 3, SIZE, SIZE) > 0, {}, ValueError, r"masks must be \(N, 1, H, W\)"),
    (torch.ones(5, 1, SIZE, SIZE) > 0, {}, ValueError, r"masks must be \(N, 1, H, W\)"),
    (torch.ones(6, 1, 8, 8) > 0, {}, ValueError, r"masks must be \(N, 1, H, W\)"),
    (torch.ones(6, 1, SIZE, SIZE) > 0, {}, ValueError, "model that knows its mean"),
    (torch.ones(6, 1, SIZE, SIZE) > 0, {"fill": "grey"}, ValueError, "unknown fill"),
])
def test_bad_masks(data, masks, options, kind, message):
    with pytest.raises(kind, match=message):
        occlude(data.image, masks, **options)
    with pytest.raises(TypeError, match="divide by 255"):
        occlude((data.image * 255).byte(), torch.ones(6, 1, SIZE, SIZE) > 0, "black")


# random masks

@pytest.mark.parametrize("cell", [1, 2, 8, 50])
def test_random_masks_have_exactly_the_wanted_pixels(cell):
    counts = torch.tensor([0, 1, 17, 300, 24 * 40 - 1, 24 * 40])
    masks = random_masks(counts, (24, 40), seed(), cell)
    assert masks.shape == (6, 1, 24, 40) and masks.dtype == torch.bool
    assert torch.equal(masks.sum((1, 2, 3)), counts)


def test_random_masks_follow_their_generator_alone():
    counts = torch.full((4,), 200)
    first = random_masks(counts, (SIZE, SIZE), seed(1))
    torch.manual_seed(99)
    states = generators()
    assert torch.equal(first, random_masks(counts, (SIZE, SIZE), seed(1)))
    assert generators() == states
    assert not torch.equal(first, random_masks(counts, (SIZE, SIZE), seed(2)))
    assert len({tuple(mask.flatten().tolist()) for mask in first}) == 4
    generator = seed(1)
    random_masks(counts, (SIZE, SIZE), generator)
    assert not torch.equal(first, random_masks(counts, (SIZE, SIZE), generator))


def test_random_masks_are_blobs_and_everywhere():
    "Wider cells, fewer edges; and no pixel of the image is preferred"
    counts = torch.full((600,), 256)
    edges = [(m[..., 1:] != m[..., :-1]).sum().item() for m in (random_masks(counts, (SIZE, SIZE), seed(), c) for c in (1, 4, 8, 16))]
    assert edges == sorted(edges, reverse=True) and edges[0] > 3 * edges[2]
    often = random_masks(torch.full((4000,), 256), (SIZE, SIZE), seed(3)).float().mean(0)
    assert (often - 0.25).abs().max() < 0.06  # the standard error is 0.007; with an unshifted grid some pixels are 0.1 off


@pytest.mark.parametrize("counts, cell, message", [
    (torch.tensor([0.5]), 8, "whole numbers"), (torch.tensor([[3]]), 8, "whole numbers"), (torch.tensor(3), 8, "whole numbers"),
    (torch.tensor([True]), 8, "whole numbers"), (torch.tensor([65]), 8, "between 0 and 64"), (torch.tensor([-1]), 8, "between 0 and 64"),
    (torch.tensor([3]), 0, "cell must be"), (torch.zeros(0).long(), 8, "whole numbers"),
])
def test_bad_counts(counts, cell, message):
    with pytest.raises(ValueError, match=message):
        random_masks(counts, (8, 8), seed(), cell)


# squares

def test_squares_have_their_centre_anywhere():
    masks = square_masks(3000, (10, 14), 5, seed())
    assert masks.shape == (3000, 1, 10, 14) and masks.dtype == torch.bool
    rows, columns = masks.any(3)[:, 0], masks.any(2)[:, 0]
    assert torch.equal(masks[:, 0], rows[:, :, None] & columns[:, None, :])
    assert rows.sum(1).unique().tolist() == [3, 4, 5] and columns.sum(1).unique().tolist() == [3, 4, 5]
    assert masks.any(0).all()
    share = (rows.sum(1) == 3).float().mean()  # the centre is the first or the last of ten rows
    assert abs(share - 0.2) < 0.04
    assert torch.equal(masks, square_masks(3000, (10, 14), 5, seed())) and not torch.equal(masks, square_masks(3000, (10, 14), 5, seed(1)))
    assert square_masks(3, (10, 14), 40, seed()).all()


def test_squares_are_those_of_cutout(data):
    holes = square_masks(6, (SIZE, SIZE), 9, seed(4))
    assert torch.equal(occlude(data.image, holes, "black"), cutout(data.image, 9, seed(4)))


@pytest.mark.parametrize("n, side", [(0, 4), (4, 0), (4, 2.5)])
def test_bad_squares(n, side):
    with pytest.raises(ValueError, match="whole number"):
        square_masks(n, (8, 8), side, seed())


# the cache

def test_refresh():
    "Image 1 comes in odd epochs only, image 2 in epoch 9 for the first time"
    cache, taken = MapCache(3, 8), {0: [], 1: [], 2: []}
    for epoch in range(2, 13):
        here = torch.tensor([0] + [1] * (epoch % 2) + [2] * (epoch >= 9))
        due = here[cache.stale(here, epoch, 3)]
        cache.put(due, torch.rand(len(due), 1, 8, 8), epoch)
        assert not cache.stale(here, epoch, 3).any()
        for image in due.tolist():
            taken[image].append(epoch)
    assert taken == {0: [2, 5, 8, 11], 1: [3, 7, 11], 2: [9, 12]}
    assert cache.stale([0, 1, 2], 12, 1).tolist() == [True, True, False] and cache.stale([0, 1, 2], 13, 1).all()


def test_cache_keeps_maps_by_number():
    cache, maps = MapCache(10, SIZE), torch.rand(6, 1, SIZE, SIZE, generator=seed())
    index = torch.tensor([7, 0, 3, 9, 2, 5])
    cache.put(index, maps, 0)
    assert cache.get(index).dtype == torch.uint8
    torch.testing.assert_close(cache.get(index.flip(0)).float() / 255, maps.flip(0), atol=0.5 / 255 + 1e-6, rtol=0)
    with pytest.raises(RuntimeError, match=r"images \[1, 4\] have no map yet"):
        cache.get([0, 1, 4])
    cache.get(index).fill_(0)
    assert cache.get(index).any()
    cache.put([7], torch.zeros(1, 1, SIZE, SIZE), 0)
    assert not cache.get([7]).any() and cache.get([0]).any()
    assert cache.maps.numel() * cache.maps.element_size() == 10 * SIZE * SIZE


def test_cache_resumes(tmp_path):
    cache, maps = MapCache(5, 8), torch.rand(5, 1, 8, 8, generator=seed())
    cache.put(range(3), maps[:3], 4)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    other = MapCache(5, 8)
    other.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    assert torch.equal(other.get([0, 1, 2]), cache.get([0, 1, 2]))
    assert [other.stale([2, 3], e, 3).tolist() for e in (4, 6, 7)] == [[False, True], [False, True], [True, True]]
    with pytest.raises(ValueError, match="other images"):
        MapCache(6, 8).load_state_dict(cache.state_dict())


@pytest.mark.parametrize("call, kind, message", [
    (lambda c: c.put([0], torch.rand(1, 1, 8, 9), 0), ValueError, "one map per image"),
    (lambda c: c.put([0, 1], torch.rand(1, 1, 8, 8), 0), ValueError, "one map per image"),
    (lambda c: c.put([0], torch.rand(1, 1, 8, 8) * 300, 0), ValueError, r"not \[0, 1\]"),
    (lambda c: c.put([0], torch.rand(1, 1, 8, 8) / 0, 0), ValueError, "NaN"),
    (lambda c: c.put([4], torch.rand(1, 1, 8, 8), 0), ValueError, "images 0 to 3"),
    (lambda c: c.get([-1]), ValueError, "images 0 to 3"), (lambda c: c.get([0.5]), ValueError, "whole numbers"),
    (lambda c: c.get(torch.ones(4, dtype=torch.bool)), ValueError, "whole numbers"),
    (lambda c: c.stale([0], 1, 0), ValueError, "refresh must be"), (lambda c: MapCache(0, 8), ValueError, "count must be"),
    (lambda c: MapCache(4, 8.0), ValueError, "size must be"),
])
def test_bad_cache(call, kind, message):
    cache = MapCache(4, 8)
    with pytest.raises(kind, match=message):
        call(cache)
    assert cache.made.tolist() == [-1] * 4


def test_a_map_stays_on_its_object(data):
    "Through a crop and a flip, as a fourth channel: image and mask go the same way"
    cache = MapCache(6, SIZE)
    cache.put(range(6), data.object.float(), 0)
    images = (data.image * data.object).mul(255).ceil().byte()
    marked = torch.where(data.object, images.clamp_min(1), images)   # no black pixel on the object
    moved = random_crop(torch.cat([marked, cache.get(range(6))], 1), SIZE // 4, True, seed(5))
    there = salient(moved[:, 3:] / 255, minmax=False)
    assert torch.equal(there, moved[:, :3].bool().any(1, keepdim=True))
    assert there.any() and not torch.equal(there, data.object)
    assert torch.equal(moved[:, :3], random_crop(marked, SIZE // 4, True, seed(5)))
