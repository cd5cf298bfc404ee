"""The contract on every registered explainer, whatever registers it."""
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from skimage.filters import threshold_otsu
from torch.ao import quantization
from torchvision import transforms
from torchvision.ops import Permute
from torchvision.transforms import v2

from xai_companion.data.photos import photos
from xai_companion.data.synthetic import creatures
from xai_companion.explain import EXPLAINERS, SISE, AdaSISE, FullGrad, GradCAM, Occlusion, explain, extremal
from xai_companion.explain.adapters import as_quantus
from xai_companion.explain.base import activations_and_gradients, get_explainer
from xai_companion.explain.cam import fuse_max
from xai_companion.explain.contract import PROMISES, check_explainer, trap_images, trap_network
from xai_companion.explain.extremal import area_penalty, smoothing_kernel
from xai_companion.explain.sise import after_pooling, gate, score_maps
from xai_companion.hooks import find_layers
from xai_companion.masking import normalize_map, upsample
from xai_companion.metrics import average_drop, infidelity
from xai_companion.metrics.sanity import correlation
from xai_companion.models import Normalized, last_conv, load_model

CHEAP = {
    "integrated_gradcam": {"steps": 4}, "integrated_gradients": {"steps": 5}, "smoothgrad": {"samples": 3},
    "shapley": {"samples": 2, "cells": 3}, "occlusion": {"cells": 3}, "rise": {"n_masks": 12}, "extremal": {"steps": 3, "areas": (0.1, 0.3), "lr": 10, "area_weight": 1},
}


# ------------------------------------------------------------------ the contract


@pytest.mark.parametrize("name", sorted(EXPLAINERS))
def test_contract(name):
    assert check_explainer(EXPLAINERS[name], **CHEAP.get(name, {})) == list(PROMISES)


@pytest.mark.parametrize("name, options", [
    ("sise", {"as_released": True}), ("sise", {"mu": 0.3, "fill": "blur"}), ("sise", {"score": "logit"}), ("sise", {"score": "sigmoid"}),
    ("ada_sise", {"population": "all"}), ("scorecam", {"variant": "official"}), ("scorecam", {"variant": "grad-cam"}),
    ("scorecam", {"variant": "torchcam"}), ("rise", {"fill": "blur", "n_masks": 12}),
])
def test_contract_with_options(name, options):
    assert check_explainer(EXPLAINERS[name], **options) == list(PROMISES)


def edited(after=lambda self, maps, images, target: maps, before=lambda self, images, target: None):
    "Grad-CAM with something done before or after a call"
    class Edited(GradCAM):
        def attribute(self, images, target=None):
            before(self, images, target)
            return after(self, super().attribute(images, target), images, target)
    return Edited


def same_class(self, maps, images, target):
    return GradCAM.attribute(self, images, 1)


def by_list_of_layers(self, maps, images, target):
    return maps.flip(-1) if isinstance(self.layers, list) else maps


def mirrored(self, maps, images, target):
    images.detach().copy_(images.detach().flip(-1))
    return maps


def zero_gradients(self, maps, images, target):
    for p in self.model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return maps


def hooked(self, maps, images, target):
    self.model[0].register_forward_hook(lambda *_: None)
    return maps


def eval_without_finally(self, images, target):
    self.modes = [m.training for m in self.model.modules()]
    self.model.eval()


def modes_again(self, maps, images, target):
    for module, mode in zip(self.model.modules(), self.modes, strict=True):
        module.training = mode
    return maps


class Swallows(GradCAM):
    def attribute(self, images, target=None):
        try:
            return super().attribute(images, target)
        except RuntimeError:
            return images[:, :1]


class Chunked(edited(lambda self, maps, images, target: maps + self.chunk * images[:, :1])):
    chunk = 8


KEPT = []


BROKEN = [  # a promise, an explainer that breaks it, and what is said
    ("maps_fit_the_images", edited(lambda self, maps, *_: maps.double()), "float64"),
    ("maps_fit_the_images", edited(lambda self, maps, *_: maps[..., :-1]), r"\(4, 1, 20, 23\)"),
    ("maps_fit_the_images", edited(lambda self, maps, *_: maps / 0), "not finite"),
    ("maps_tell_classes_apart", edited(lambda self, maps, *_: torch.ones_like(maps)), "the same everywhere"),
    ("maps_tell_classes_apart", edited(same_class), "another class"),
    ("batch_mates_do_not_matter", edited(lambda self, maps, *_: maps - maps.mean()), "image 0 has another map"),
    ("chunks_do_not_matter", Chunked, "chunk size"),
    ("modes_do_not_matter", edited(lambda self, maps, *_: maps * (1 + self.model.training)), "training mode"),
    ("modes_do_not_matter", edited(lambda self, maps, *_: maps + torch.rand_like(maps)), "the same call"),
    ("modes_do_not_matter", edited(lambda self, maps, *_: maps * (1 + torch.is_inference_mode_enabled())), "inference_mode"),
    ("modes_do_not_matter", edited(lambda self, maps, *_: maps * (1 + self.model[4].weight.requires_grad)), "frozen"),
    ("targets_have_many_forms", edited(lambda self, maps, images, target: maps.flip(-1) if isinstance(target, list) else maps), "target as list"),
    ("layers_have_many_forms", edited(by_list_of_layers), "the same layer"),
    ("a_call_leaves_no_trace", edited(lambda self, maps, *_: [maps, torch.rand(3)][0]), "a random generator differs"),
    ("a_call_leaves_no_trace", edited(lambda self, maps, *_: [maps, np.random.rand()][0]), "a random generator differs"),
    ("a_call_leaves_no_trace", edited(lambda self, maps, *_: [maps, random.random()][0]), "a random generator differs"),
    ("a_call_leaves_no_trace", edited(mirrored), "the images differs"),
    ("a_call_leaves_no_trace", edited(zero_gradients), "a gradient differs"),
    ("a_call_leaves_no_trace", edited(hooked), "a hook differs"),
    ("a_call_leaves_no_trace", edited(lambda self, maps, *_: [maps, self.model.requires_grad_(True)][0]), "a requires_grad flag differs"),
    ("a_call_leaves_no_trace", edited(lambda self, maps, *_: [maps, setattr(self.model, "seen", 1)][0]), "an attribute of a module differs"),
    ("a_failure_leaves_no_trace", Swallows, "was swallowed"),
    ("a_failure_leaves_no_trace", edited(modes_again, eval_without_finally), "the mode of a module differs"),
    ("memory_stays_flat", edited(lambda self, maps, *_: [maps, KEPT.append(maps)][0]), "tensors stay alive"),
    ("bad_input_is_named", edited(before=lambda self, images, target: torch.as_tensor(images).clamp_(0, 1)), "nothing was raised"),
]


@pytest.mark.parametrize("name, broken, words", BROKEN)
def test_a_broken_promise_is_noticed(name, broken, words):
    with pytest.raises(AssertionError, match=words):
        PROMISES[name](broken)
    KEPT.clear()


def test_every_promise_can_be_broken():
    assert {name for name, *_ in BROKEN} == set(PROMISES)


# ------------------------------------------------------------------ methods against slow versions and by hand


@pytest.mark.parametrize("name, options", [("saliency", {}), ("occlusion", {"cells": 1}), ("occlusion", {"cells": 4}), ("shapley", {"cells": 4, "samples": 2})])
def test_pixel_explainers_on_a_linear_model(name, options):
    """The logit is a weighted sum of all colours. Its gradient is the weights; what a hidden square costs is the sum over the square, in
    whatever order squares are hidden; Occlusion's squares overlap, and a pixel gets the mean of those that cover it."""
    generator = torch.Generator().manual_seed(0)
    weights, image = torch.randn(3, 8, 8, generator=generator), torch.rand(1, 3, 8, 8, generator=generator)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    with torch.no_grad():
        model[1].weight[1] = weights.flatten()
    worth, found = (image[0] * weights).sum(0), explain(model, image, name, 1, **options)[0, 0]
    if name == "saliency":
        expected = weights.abs().amax(0)
    elif name == "occlusion":
        side, total, seen = 8 // options["cells"], torch.zeros(8, 8), torch.zeros(8, 8)
        for top in range(0, 9 - side, max(1, side // 2)):
            for left in range(0, 9 - side, max(1, side // 2)):
                total[top:top + side, left:left + side] += worth[top:top + side, left:left + side].sum()
                seen[top:top + side, left:left + side] += 1
        expected = total / seen
    else:
        expected = worth.view(4, 2, 4, 2).sum((1, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_square_of_occlusion():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 12, 2))
    for cells, square, stride in ((4, (3, 2, 3), (3, 1, 1)), (2, (3, 4, 6), (3, 2, 3)), (10, (3, 1, 1), (3, 1, 1))):
        found = Occlusion(model, cells=cells).arguments(torch.rand(1, 3, 8, 12), 0.0)
        assert (found["sliding_window_shapes"], found["strides"]) == (square, stride)


def slow_fused(model, blocks, image, target):
    "The fused map of one image from the maps and the choice of masks in `blocks`, one mask at a time"
    fused = None
    for block in blocks:
        visual = 0
        for a in block.maps[0][block.kept[0]]:
            mask = torch.nn.functional.interpolate(a[None, None], image.shape[2:], mode="bilinear")
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            with torch.no_grad():
                visual = visual + model(image * mask).softmax(1)[0, target] * mask / mask.sum()
        scaled = (visual - visual.min()) / (visual.max() - visual.min())
        open_ = scaled > threshold_otsu(scaled.numpy(), nbins=256).item()
        fused = scaled if fused is None else (fused + scaled) * open_
    return fused


def test_the_released_code_has_one_gate():
    model = load_model("plain_cnn")
    options = {}, {"as_released": True}, {"otsu": "soft", "as_released": True}
    assert [SISE(model, **own).otsu for own in options] == ["hard", "soft", "soft"]
    for cls in (SISE, AdaSISE):
        with pytest.raises(ValueError, match="leave out otsu"):
            cls(model, otsu="hard", as_released=True)


@pytest.mark.parametrize("name, options", [("sise", {}), ("ada_sise", {}), ("ada_sise", {"population": "all"})])
def test_fused_maps_agree_with_a_loop(name, options):
    "By correlation and by pixels, because the gate is hard (the choice of masks is compared in the notebooks)"
    model, images = load_model(), photos(64)[:2]
    explainer = EXPLAINERS[name](model, layers=["blocks.1", "blocks.2", "blocks.4"], **options)
    together = explainer.attribute(images, [285, 967])
    for i, target in enumerate((285, 967)):
        image = images[i:i + 1]
        slow = slow_fused(model, explainer.blocks(image, target), image, target)
        assert correlation(together[i:i + 1], slow) > 0.999
        assert ((together[i:i + 1] - slow).abs() > 1e-4).float().mean() < 0.01


def test_more_mu_fewer_masks():
    model, images = load_model(), photos(64)
    kept = [EXPLAINERS["sise"](model, mu=mu).masks_kept(images) for mu in (0.0, 0.1, 0.3, 0.5, 0.75)]
    counts = [sum(k.sum(1) for k in layers.values()) for layers in kept]
    assert all((a >= b).all() and (b > 0).all() for a, b in zip(counts, counts[1:], strict=False)) and (counts[0] > counts[-1]).all()
    assert all((b & ~a == 0).all() for more, less in zip(kept, kept[1:], strict=False) for a, b in zip(more.values(), less.values(), strict=True))


def test_the_maps_of_sise_are_those_the_paper_counts():
    for name, count in (("resnet50", 3904), ("vgg16", 1472)):
        kept = EXPLAINERS["sise"](load_model(name, weights=None)).masks_kept(torch.rand(1, 3, 64, 64), 0)
        assert sum(k.shape[1] for k in kept.values()) == count


def test_sise_as_released_takes_pooling_layers():
    model = load_model("plain_cnn")
    layers, pooled = (EXPLAINERS["sise"](model, as_released=released).default_layers((3, 32, 32)) for released in (False, True))
    assert (layers, pooled) == (["block1", "block2", "block3"], ["pool1", "pool2", "pool3"])
    assert after_pooling(model, layers[:1], torch.rand(1, 3, 32, 32)) == pooled[:1]


def test_one_mask_has_the_share_of_all():
    "V_b is the mean of score times mask over the masks, also if there is one only"
    model, images, kept = trap_network().eval(), trap_images(1), torch.tensor([[True, False, False]])
    scores, visual = score_maps(EXPLAINERS["sise"](model), images, torch.rand(1, 3, 5, 5), kept, [1])
    assert scores.isnan().tolist() == [[False, True, True]]
    assert visual.sum().item() == pytest.approx(scores[0, 0].item(), rel=1e-4)


def test_soft_gate_by_hand():
    ramp = torch.linspace(0, 1, 101).view(1, 1, 1, -1)
    soft, level = gate(ramp, "soft")
    torch.testing.assert_close(soft, 1 / (1 + (-100 * (ramp - level)).exp()))
    for pixels, factor in ((9, 1.5), (10, 1.0)):  # fewer than a tenth of the pixels are bright: a higher threshold
        bright = (torch.arange(100) < pixels).float().view(1, 1, 10, 10)
        assert gate(bright, "soft")[1].item() == pytest.approx(factor * gate(bright)[1].item())


def test_layercam_of_several_layers_is_the_largest_of_the_scaled_maps():
    a, b = torch.tensor([[[[0., 1], [2, 4]]]]), torch.tensor([[[[30., 0], [0, 0]]]])
    expected = torch.tensor([[[[2, 0.5], [1, 2]]]]).tanh()  # 2 * M / max M
    torch.testing.assert_close(fuse_max([a, b]), expected)
    assert fuse_max([torch.zeros(1, 1, 2, 2), 0 * a]).eq(0).all()
    model, images = trap_network(), trap_images(2)
    single = [explain(model, images, "layercam", 1, layers=layer) for layer in ("2", "6")]
    torch.testing.assert_close(explain(model, images, "layercam", 1, layers=["2", "6"]), fuse_max(single))


def test_integrated_gradcam_as_released():
    "Points 0 to m - 1, no maps of the baseline, and a sum instead of a mean"
    model, images = load_model("plain_cnn"), photos(32)[:2]
    layer = last_conv(model, (3, 32, 32))
    total = 0
    for step in range(4):
        acts, grads, _ = activations_and_gradients(model, layer, step / 4 * images, [1, 1])
        (act,), (grad,) = acts.values(), grads.values()
        total = total + (grad.mean((2, 3), keepdim=True) * act).sum(1, keepdim=True).relu()
    ours = explain(model, images, "integrated_gradcam", [1, 1], steps=4, as_released=True, chunk=3)
    torch.testing.assert_close(ours, upsample(total, (32, 32)), rtol=1e-4, atol=1e-6)


def test_draws_of_rise():
    rise = EXPLAINERS["rise"](trap_network())
    grids, shifts = rise.draw((21, 40))  # cells of 3 and 6 pixels
    assert grids.shape == (8000, 1, 7, 7) and abs(grids.float().mean() - 0.5) < 0.005
    assert shifts[:, 0].bincount().shape == (3,) and shifts[:, 1].bincount().shape == (6,)
    assert shifts[:, 0].bincount().min() > 2400 and shifts[:, 1].bincount().min() > 1150


def test_official_scorecam_leaves_constant_maps_out():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(2, 3))
    images, acts = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 8, 8)
    acts[:, 0] = 1
    weights = EXPLAINERS["scorecam"](model.eval(), "1", variant="official").weights(images, acts, torch.tensor([1]))
    assert weights[0, 0] == 0 < weights[0, 1]


def test_the_smallest_area_is_a_pixel():
    assert area_penalty(torch.zeros(1, 1, 2, 2), torch.tensor([0.05])).item() == 0.25  # 1 of 4 pixels should be 1


def test_extremal_keeps_the_share_that_was_asked_for():
    model, drawn = load_model("plain_cnn"), creatures(range(2), 64)
    for area in (0.05, 0.1, 0.2):
        kept = explain(model, drawn.image, "extremal", drawn.label, areas=area, steps=50, lr=0.16, growth=1.0035**16, mask_step=4).mean((1, 2, 3))
        assert (abs(kept / area - 1) < 0.3).all()


def test_extremal_mirrors_every_second_step():
    seen = []

    class Records(torch.nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return x.mean((2, 3))

    search = EXPLAINERS["extremal"](Records())
    lattice, kernel, pyramid = torch.rand(1, 1, 4, 4), smoothing_kernel((2, 2), 3, (4, 4)), torch.rand(1, 3, 3, 8, 8)
    for step in range(3):
        search.loss(lattice, kernel, pyramid, torch.tensor([0.1]), torch.tensor([1]), step)
    assert torch.equal(seen[1], seen[0].flip(3)) and torch.equal(seen[2], seen[0]) and not torch.equal(seen[1], seen[0])


def test_extremal_blurs_by_the_longer_side(monkeypatch):
    asked = []
    monkeypatch.setattr(extremal, "blur_pyramid", lambda images, levels, sigma: asked.append((levels, sigma)) or images[:, None].expand(-1, levels, -1, -1, -1))
    for size in ((40, 24), (24, 40)):
        explain(trap_network(), trap_images(1, size=size), "extremal", 1, steps=1)
    assert asked == [(8, 21 * 40 / 224)] * 2


class Adding(torch.nn.Module):
    "A network whose bias no module has"

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.head = how, torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Linear(4, 3)
        self.offset = torch.nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(3, 1, 1))

    def forward(self, x):
        if self.how == "mean":
            maps = self.conv(x) - self.mean[:1]
        elif self.how == "functional":
            maps = torch.nn.functional.conv2d(x, self.conv.weight, self.offset)
        else:
            maps = self.conv(x) + self.offset.view(-1, 1, 1)
        return self.head(maps.relu().mean((2, 3)))


@pytest.mark.parametrize("how, name", [("mean", "mean"), ("functional", "offset"), ("sum", "offset")])
def test_fullgrad_refuses_a_bias_that_it_would_leave_out(how, name):
    with pytest.raises(ValueError, match=f"'{name}' is added or subtracted by a function"):
        explain(Adding(how).eval(), trap_images(1), "fullgrad", 1)


class Before(torch.nn.Module):
    "A network that does something to the image before its first layer"

    def __init__(self, steps, network=None):
        super().__init__()
        self.steps, self.network = steps, network or trap_network()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))

    def forward(self, x):
        return self.network(self.steps(self, x))


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
STEPS = {
    "numbers": lambda self, x: x * 2 - 1, "reversed": lambda self, x: 1 - x, "buffers": lambda self, x: (x - self.mean) / 0.2,
    "tensors": lambda self, x: (x - torch.tensor(MEAN).view(3, 1, 1)) / 0.2, "v1": lambda self, x: transforms.Normalize(MEAN, STD)(x),
    "v2": lambda self, x: v2.Normalize(MEAN, STD)(x), "channels": lambda self, x: x[:, [2, 1, 0]] * 255 - 100,
    "resized": lambda self, x: torch.nn.functional.interpolate(x, size=40, mode="bilinear") - 0.5,
    "padded": lambda self, x: torch.nn.functional.pad(x - 0.5, (2, 2, 2, 2)),
    "inside": lambda self, x: Normalized(torch.nn.Identity(), MEAN, STD)(x),
}


@pytest.mark.parametrize("how", STEPS)
def test_fullgrad_finds_what_is_added_before_the_first_layer(how):
    model = Before(STEPS[how]).eval()
    total, logit = EXPLAINERS["fullgrad"](model).completeness(trap_images(3), 1)
    plain, _ = EXPLAINERS["fullgrad"](model.network).completeness(trap_images(3), 1)
    torch.testing.assert_close(total, logit, rtol=1e-4, atol=1e-5)
    assert (plain - logit).abs().min() > 1e-4


@pytest.mark.parametrize("how", ["v1", "v2"])
def test_fullgrad_of_a_torchvision_normalisation_is_that_of_ours(how):
    normalize, network = {"v1": transforms.Normalize, "v2": v2.Normalize}[how](MEAN, STD), trap_network().eval()
    torch.testing.assert_close(explain(torch.nn.Sequential(normalize, network), trap_images(2), "fullgrad", 1),
                               explain(Normalized(network, MEAN, STD), trap_images(2), "fullgrad", 1), rtol=1e-4, atol=1e-4)


class Several(torch.nn.Module):
    "The image enters at several places"

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
        self.wide, self.head = torch.nn.Linear(3 * 32 * 32, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        y = x * 2 - 1
        flat = y.flatten(1)
        if self.how == "twice":
            maps = self.a(y).relu() + self.b(y).relu()
        elif self.how == "members":
            maps = self.a(y).relu() + self.b(x * 3 - 2).relu()
        elif self.how == "pooled":
            maps = self.a(y).relu().mean((2, 3), keepdim=True) + self.b(torch.nn.functional.max_pool2d(y, 2)).relu().mean((2, 3), keepdim=True)
        elif self.how == "wide":
            maps = self.a(y).relu().mean((2, 3), keepdim=True) + self.wide(flat)[:, :, None, None]
        elif self.how == "shortcut":
            maps = torch.cat([self.a(y)[:, :1].relu(), y[:, :, 1:-1, 1:-1]], 1)
        else:
            return self.head(self.wide(flat).relu())
        return self.head(maps.mean((2, 3)))


@pytest.mark.parametrize("how", ["twice", "members", "pooled", "wide", "shortcut", "flat"])
def test_fullgrad_counts_every_way_in_once(how):
    explainer = EXPLAINERS["fullgrad"](Several(how).eval())
    total, logit = explainer.completeness(trap_images(2, size=(32, 32)), 1)
    torch.testing.assert_close(total, logit, rtol=1e-4, atol=1e-5)
    assert explainer.attribute(trap_images(2, size=(32, 32)), 1).shape == (2, 1, 32, 32)


@pytest.mark.parametrize("steps", [lambda self, x: x ** 2.2 - 0.5, lambda self, x: (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-6)])
def test_fullgrad_refuses_steps_that_are_more_than_a_scale_and_a_shift(steps):
    with pytest.raises(ValueError, match="scaling and shifting"):
        explain(Before(steps).eval(), trap_images(2), "fullgrad", 1)


def test_sums_of_two_paths_are_no_bias():
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.scale = torch.nn.Conv2d(3, 3, 1), torch.nn.Linear(3, 3), torch.nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x):
            return self.head((x + self.scale * self.conv(x).relu()).mean((2, 3)))

    total, logit = EXPLAINERS["fullgrad"](Residual().eval()).completeness(trap_images(2), 1)
    torch.testing.assert_close(total, logit)


@pytest.mark.parametrize("name", ["sise", "ada_sise"])
@pytest.mark.parametrize("times", [1, 4, 10])
def test_a_network_that_is_sure_is_explained(name, times):
    "Where the probability is 1 in float32, alpha still has its digits: the maps are those of float64, and none is empty"
    model, images = load_model("plain_cnn"), creatures(range(40), split="val").image
    with torch.no_grad():
        first, second = model(images).topk(2, 1).values.T
    images = images[(first - second).topk(2).indices]
    sure = torch.nn.Sequential(model, Times(times)).eval()
    found = EXPLAINERS[name](sure).attribute(images)
    exact = EXPLAINERS[name](sure.double()).attribute(images.double())
    assert correlation(found, exact).min() > 0.999 and (found.amax((1, 2, 3)) > 0).all()


def test_threads_take_turns():
    "The mode of the model is shared: the maps are those of one thread, and the mode is as before"
    model, images = load_model("plain_cnn").train(), creatures(range(4), split="val").image
    next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes, explainers = [m.training for m in model.modules()], [EXPLAINERS[name](model) for name in ("gradcam", "sise", "rise", "smoothgrad")]
    explainers[2].n_masks = 10
    alone = [explainer.attribute(images, 3) for explainer in explainers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(lambda explainer: explainer.attribute(images, 3), explainers))
            assert all(map(torch.equal, together, alone))
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("name", ["sise", "rise", "scorecam"])
def test_a_softmax_at_the_end_is_noticed(name):
    model = torch.nn.Sequential(trap_network(0), torch.nn.Softmax(1)).eval()
    with pytest.warns(UserWarning, match="seems to return probabilities.*put a logarithm behind it"):
        explain(model, trap_images(1), name, **CHEAP.get(name, {}))
    plain = explain(model[0], trap_images(1), name, **CHEAP.get(name, {}))
    class Log(torch.nn.Module):
        def forward(self, p):
            return p.log()
    with_logarithm = explain(torch.nn.Sequential(*model, Log()), trap_images(1), name, **CHEAP.get(name, {}))
    torch.testing.assert_close(with_logarithm, plain, atol=1e-5, rtol=1e-4)


def test_deeplift_under_autocast():
    model, images = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(model, images, "deeplift", 1)
    assert torch.equal(found, explain(model, images, "deeplift", 1))


def test_a_very_unlikely_class_is_explained():
    "The probability underflows float32, its log-odds do not"
    model, images = load_model(), photos(64)[:1]
    sharp = torch.nn.Sequential(model, Times(40)).eval()
    with torch.no_grad():
        worst = model(images).argmin(1)
        assert sharp(images).softmax(1)[0, worst] == 0
    kept = EXPLAINERS["sise"](sharp, layers=["0.network.blocks.2", "0.network.bn2"]).masks_kept(images, worst)
    assert all(k.any() for k in kept.values())


# ------------------------------------------------------------------ models of many kinds


@pytest.mark.parametrize("name", ["gradcam", "gradcampp", "xgradcam", "hirescam", "layercam", "integrated_gradcam"])
def test_half_precision(name):
    "bfloat16 models are explained, and the maps are those of float32 up to the model's own rounding"
    images, options = photos()[:1], CHEAP.get(name, {})
    exact = explain(load_model(), images, name, 281, **options)
    half = explain(load_model().bfloat16(), images.bfloat16(), name, 281, **options)
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.999


def test_sise_in_bfloat16():
    """Scores under autocast, compared on V_b scaled to [0, 1]: at most 0.1 apart. The choice of masks is the same, for it is
    made in float32. The fused map has a hard gate and is compared by correlation."""
    model, images = load_model(), photos(224)[:2]
    exact, half = (EXPLAINERS["sise"](model, mu=0.3, dtype=dtype).blocks(images, [285, 967]) for dtype in (None, torch.bfloat16))
    for a, b in zip(exact, half, strict=True):
        assert torch.equal(a.kept, b.kept) and b.visual.dtype == torch.float32
        assert (normalize_map(a.visual) - normalize_map(b.visual)).abs().max() < 0.1
        assert correlation(a.visual, b.visual).min() > 0.99
    assert correlation(exact[-1].fused, half[-1].fused).min() > 0.95


class Times(torch.nn.Module):
    "Multiplies by a number"
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize("name", ["gradcam", "integrated_gradcam", "fullgrad", "sise", "scorecam", "rise"])
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models(name, in_place):
    "Hooks see the layers of a compiled model, and the maps are those of the model as written"
    network, images, options = trap_network().eval(), trap_images(2), CHEAP.get(name, {})
    expected = explain(network, images, name, 1, **options)
    if in_place:
        network.compile(backend="eager")
    else:
        network = torch.compile(network, backend="eager")
    torch.testing.assert_close(explain(network, images, name, 1, **options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, trap_images(1))])
@pytest.mark.filterwarnings("ignore")
def test_models_of_torch_jit(compiled):
    "Methods that need layers say what to do; the others work"
    eager, images = trap_network().eval(), trap_images(1)
    model = compiled(eager)
    for name in ("gradcam", "sise", "fullgrad", "scorecam", "integrated_gradcam"):
        with pytest.raises(ValueError, match="compiled by torch.jit"):
            explain(model, images, name, 1)
    torch.testing.assert_close(explain(model, images, "rise", 1, n_masks=20), explain(eager, images, "rise", 1, n_masks=20))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.Sequential])
def test_models_of_torch_export(wrap):
    "They have one mode only; the others of the model come back"
    model = wrap(torch.export.export(trap_network().eval(), (trap_images(1),)).module())
    modes = [module.training for module in model.modules()]
    for name in ("gradcam", "sise", "fullgrad", "rise"):
        with pytest.raises(ValueError, match="give the module that it was exported"):
            explain(model, trap_images(1), name, 1)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.filterwarnings("ignore")
def test_quantised_models():
    "Methods that need a layer's numbers say what to do; those that only ask the model work"
    network = torch.nn.Sequential(quantization.QuantStub(), torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                  torch.nn.Flatten(), torch.nn.Linear(4, 3), quantization.DeQuantStub()).eval()
    network.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(network, inplace=True)(trap_images(2))
    quantization.convert(network, inplace=True)
    for name in ("gradcam", "sise", "scorecam", "integrated_gradcam"):
        with pytest.raises(ValueError, match="layer '2' is quantised.*rise or occlusion"):
            explain(network, trap_images(2), name, 1)
    assert explain(network, trap_images(2), "rise", 1, n_masks=20).std() > 0


def test_channels_last():
    "Swin's maps are (N, h, w, K): refused, by default and by name; right once a module puts the channels first"
    torch.manual_seed(0)
    swin = timm.models.SwinTransformer(img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=6).eval()
    images = trap_images(2, size=(32, 32))
    for name, options in (("gradcam", {}), ("sise", {}), ("scorecam", {"layers": "layers.0"}), ("gradcam", {"layers": swin.norm})):
        with pytest.raises(ValueError, match=r"channels last.*torchvision.ops.Permute"):
            explain(swin, images, name, 1, **options)
    swin.norm = torch.nn.Sequential(swin.norm, Permute([0, 3, 1, 2]), Permute([0, 2, 3, 1]))
    with torch.no_grad():
        features = swin.forward_features(images)
    features.requires_grad_()
    grads, = torch.autograd.grad(swin.forward_head(features)[:, 1].sum(), features)
    by_hand = (grads.mean((1, 2), keepdim=True) * features).sum(3)[:, None].detach()
    assert by_hand.std() > 0
    torch.testing.assert_close(explain(swin, images, "gradcam", 1, layers="norm.1", relu=False), upsample(by_hand, (32, 32)))


def test_one_logit_has_no_softmax():
    "The softmax of one number is 1, whatever the image: maps of nothing, and a perfect Drop"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = torch.rand(2, 1, 16, 16)
    for act in (lambda: explain(model, images, "sise"), lambda: average_drop(model, images, maps),
                lambda: infidelity(model, images, maps, samples=2, score="softmax")):
        with pytest.raises(ValueError, match="score='sigmoid'"):
            act()
    assert explain(model, images, "sise", score="sigmoid").shape == explain(model, images, "gradcam").shape == (2, 1, 16, 16)


def test_a_network_without_a_layer_of_its_own():
    conv = torch.nn.Conv2d(3, 3, 3)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="from '0', which runs several times: name a layer that runs once"):
        explain(model, torch.rand(1, 3, 16, 16), "gradcam")


def test_a_last_feature_map_without_a_layer_is_not_replaced_by_an_early_one():
    stem, shared = torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.Conv2d(4, 4, 3)
    model = torch.nn.Sequential(stem, shared, shared, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5))
    with pytest.raises(ValueError, match="from '1', which runs several times"):
        explain(model, torch.rand(1, 3, 32, 32), "gradcam")
    assert explain(model, torch.rand(1, 3, 32, 32), "gradcam", layers="0").shape == (1, 1, 32, 32)


def test_layers_with_two_names():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
            self.last, self.head = self.features[0], torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)))

    model, images = Named().eval(), trap_images(1)
    assert list(find_layers(model, ["last", model.last])) == ["features.0"]
    torch.testing.assert_close(*(explain(model, images, "gradcam", 1, layers=layer) for layer in ("last", "features.0")))
    with pytest.raises(ValueError, match="no layer '': its last ones are 'features.1', 'last', 'head';"):
        explain(model, images, "gradcam", 1, layers="")


class Detached(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("name", ["saliency", "integrated_gradients", "smoothgrad", "fullgrad"])
def test_a_model_that_stops_the_gradient(name):
    model = Detached(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="does not depend on the image in a differentiable way"):
        explain(model, torch.rand(1, 3, 16, 16), name)


def test_what_is_no_model():
    for wrong in ("resnet18", lambda x: x):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
            explain(wrong, trap_images(1))


# ------------------------------------------------------------------ options and images


def test_options_must_make_sense():
    model, images = load_model(), photos()[:1]
    for name, option in (("occlusion", "cells"), ("smoothgrad", "samples"), ("shapley", "cells"), ("integrated_gradients", "steps"),
                         ("integrated_gradcam", "steps"), ("integrated_gradcam", "chunk"), ("rise", "n_masks"), ("rise", "cells"),
                         ("sise", "chunk"), ("extremal", "steps"), ("fullgrad", "chunk"), ("integrated_gradients", "chunk"), ("smoothgrad", "chunk"),
                         ("occlusion", "chunk"), ("shapley", "samples"), ("shapley", "chunk"), ("extremal", "levels"), ("extremal", "mask_step"),
                         ("extremal", "chunk")):
        with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, got 0"):
            explain(model, images, name, **{option: 0})
    for noise in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise must be at least 0 and finite"):
            explain(model, images, "smoothgrad", noise=noise)
    with pytest.raises(TypeError, match="find_class"):
        explain(model, images, target="tabby")


def test_counts_of_numpy():
    model, images = load_model("plain_cnn"), torch.rand(1, 3, 32, 32)
    assert explain(model, images, "rise", n_masks=np.int64(3)).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="n_masks must be a whole number"):
        explain(model, images, "rise", n_masks=True)


def test_methods_of_one_layer():
    for name in ("integrated_gradcam", "scorecam"):
        with pytest.raises(ValueError, match="explains one layer, got 2"):
            EXPLAINERS[name](trap_network(), layers=["2", "6"])


def test_a_baseline_may_be_a_number_or_a_colour():
    model, images = load_model("plain_cnn"), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, option in (("integrated_gradcam", "baseline"), ("integrated_gradients", "baseline"), ("occlusion", "fill")):
        same = [explain(model, images, name, 1, **{option: value}) for value in (0.5, (0.5, 0.5, 0.5), np.full(3, 0.5), torch.full((3, 1, 1), 0.5))]
        assert all(torch.equal(same[0], other) for other in same[1:]) and not torch.equal(same[0], explain(model, images, name, 1))
    for wrong in (None, (0.1, 0.2), torch.zeros(2, 7, 7), "white", {}):
        with pytest.raises(ValueError, match="unknown fill .*a value per channel"):
            explain(model, images, "rise", 1, n_masks=4, fill=wrong)


def test_targets_of_gradcam():
    class ClassifierOutputTarget:
        category = 3
    model, images = load_model("plain_cnn"), torch.rand(1, 3, 32, 32)
    for wrong in (ClassifierOutputTarget(), [ClassifierOutputTarget()], ["cat"], [[1], [2, 3]], {"a": 1}):
        with pytest.raises(TypeError, match="class indices"):
            explain(model, images, target=wrong)


@pytest.mark.parametrize("name, method", [("Grad-CAM", "gradcam"), ("GradCAM++", "gradcampp"), ("Ada-SISE", "ada_sise"),
                                          ("Integrated Grad-CAM", "integrated_gradcam"), ("score-cam", "scorecam")])
def test_methods_as_papers_write_them(name, method):
    assert get_explainer(name) is EXPLAINERS[method]


def test_classes_and_their_names_are_methods():
    model, images = trap_network(0), trap_images(1)
    for cls in EXPLAINERS.values():
        assert get_explainer(cls.__name__) is get_explainer(cls) is cls
    assert get_explainer("Extremal Perturbation") is EXPLAINERS["extremal"] and get_explainer("Shapley sampling") is EXPLAINERS["shapley"]
    assert torch.equal(explain(model, images, GradCAM, 1), explain(model, images, "gradcam", 1))


@pytest.mark.parametrize("value, words", [(torch.inf, "NaN or infinite"), (torch.nan, "NaN or infinite"), (1.0005, r"\[.*, 1.0005\]: divide by 255")])
def test_images_out_of_range_are_told_how_far(value, words):
    images = trap_images(1)
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=words):
        explain(trap_network(0), images, "gradcam", 1)


def test_an_exact_name_goes_first():
    class One(GradCAM, name="my_cam"):
        pass

    class Other(GradCAM, name="mycam"):
        pass
    try:
        assert get_explainer("my_cam") is One and get_explainer("mycam") is Other
    finally:
        del EXPLAINERS["my_cam"], EXPLAINERS["mycam"]


@pytest.mark.parametrize("kind", ["unused", "detached", "pooled", "two"])
def test_fullgrad_is_complete_with_two_first_layers(kind):
    model, images = TwoWays(kind).eval(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(*FullGrad(model).completeness(images, 1))
    with pytest.raises(ValueError, match="cannot split what 'd' gets"):
        explain(TwoWays("shifted").eval(), images, "fullgrad", 1)


class TwoWays(torch.nn.Module):
    "Two convolutions that get the image, each with a normalisation of its own or of both"
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.c, self.d = kind, *(torch.nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.head = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))

    def forward(self, x):
        z = (x - 0.4) / 0.2
        second = {"unused": lambda: 0 * self.d((x - 0.2) * 2).detach(), "detached": lambda: self.d((x.detach() - 0.2) * 2).detach() * 0,
                  "pooled": lambda: torch.nn.functional.interpolate(self.d(torch.nn.functional.avg_pool2d(z, 2)), scale_factor=2),
                  "two": lambda: self.d((x - 0.1) * 3), "shifted": lambda: self.d(z + 0.3)}[self.kind]()
        return self.head(self.c(z) + second)


def test_an_unknown_option_names_those_that_there_are():
    model = load_model("plain_cnn")
    with pytest.raises(ValueError, match="gradcam cannot be made with layer='block1'.*its options are layers, relu"):
        explain(model, trap_images(), "gradcam", layer="block1")
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        explain("plain_cnn", trap_images())


@pytest.mark.parametrize("name, options", [("rise", {"n_masks": 20}), ("smoothgrad", {"samples": 3}), ("shapley", {"samples": 1, "cells": 3})])
def test_random_methods_have_a_seed(name, options):
    model, image = trap_network(), trap_images()[:1]
    first, again, other = (explain(model, image, name, 1, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, explain(model, image, name, 1, **options))
    assert torch.equal(other, explain(model, image, name, 1, seed=np.int64(1), **options))
    for wrong in (None, 1.5, -1, True):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            explain(model, image, name, 1, seed=wrong, **options)


def test_models_of_two_dtypes_take_images_of_either():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Conv2d(3, 4, 3).bfloat16()
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x.bfloat16()).relu().mean((2, 3)).float())
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert explain(Mixed(), images, "rise", 1, n_masks=4).dtype == torch.float32
    with pytest.raises(TypeError, match=r"use images.to\(torch.bfloat16\)"):
        explain(Mixed(), images.double(), "rise", 1, n_masks=4)


def test_quantus_may_leave_out_the_targets():
    model, images = trap_network(), trap_images()
    as_function = as_quantus("gradcam")
    torch.testing.assert_close(torch.from_numpy(as_function(model, images.numpy(), None)), explain(model, images))
    other = trap_network(1)  # the explainer of the first model is not kept for another one
    torch.testing.assert_close(torch.from_numpy(as_function(other, images.numpy(), [1] * len(images))), explain(other, images, target=1))


def test_masked_images_without_a_score():
    class Logarithm(torch.nn.Module):
        def forward(self, x):
            return x.log().mean((2, 3)) * 0
    with pytest.raises(ValueError, match="NaN for masked images"):
        explain(Logarithm(), torch.rand(1, 3, 8, 8) + 1e-3, "rise", 1, n_masks=4)


@pytest.mark.parametrize("weight, shape, remedy", [
    (3, (2, 16, 16, 3), r"put the channels first with .permute\(0, 3, 1, 2\)"), (3, (2, 1, 16, 16), r"expand\(-1, 3, -1, -1\)"),
    (3, (2, 4, 16, 16), "drop the alpha channel"), (1, (2, 3, 16, 16), "1 channel, got .*make them grey"), (3, (2, 7, 16, 16), "images that have them"),
])
@pytest.mark.parametrize("inside", [False, True])
def test_the_remedy_fits_the_channels(weight, shape, remedy, inside):
    model = torch.nn.Sequential(torch.nn.Conv2d(weight, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    model = Normalized(model, [0.5] * weight, [0.25] * weight) if inside else model
    with pytest.raises(ValueError, match=remedy):
        explain(model, torch.rand(shape), "rise", n_masks=4)
