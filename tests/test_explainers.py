"""The contract on every registered explainer, whatever registers it."""
import numpy as np
import pytest
import timm
import torch
from skimage.filters import threshold_otsu
from torchvision.ops import Permute

from xai_companion.data.photos import photos
from xai_companion.explain import EXPLAINERS, explain
from xai_companion.explain.contract import PROMISES, check_explainer, trap_images, trap_network
from xai_companion.masking import normalize_map, upsample
from xai_companion.metrics import average_drop
from xai_companion.models import Normalized, load_model
from xai_companion.results import correlation

CHEAP = {
    "integrated_gradcam": {"steps": 4}, "integrated_gradients": {"steps": 5}, "smoothgrad": {"samples": 3},
    "shapley": {"samples": 2, "cells": 3}, "occlusion": {"cells": 3}, "rise": {"n_masks": 12}, "extremal": {"steps": 3, "areas": (0.1, 0.3)},
}


@pytest.mark.parametrize("name", sorted(EXPLAINERS))
def test_contract(name):
    assert check_explainer(EXPLAINERS[name], **CHEAP.get(name, {})) == list(PROMISES)


@pytest.mark.parametrize("name", ["gradcam", "gradcampp", "xgradcam", "hirescam", "layercam", "integrated_gradcam"])
def test_half_precision(name):
    "bfloat16 models are explained, and the maps are those of float32 up to the model's own rounding"
    images, options = photos()[:1], CHEAP.get(name, {})
    exact = explain(load_model(), images, name, 281, **options)
    half = explain(load_model().bfloat16(), images.bfloat16(), name, 281, **options)
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("name, options", [
    ("sise", {"as_released": True}), ("sise", {"mu": 0.3, "fill": "blur"}), ("sise", {"score": "logit"}), ("sise", {"score": "sigmoid"}),
    ("ada_sise", {"population": "all"}), ("scorecam", {"variant": "official"}), ("scorecam", {"variant": "grad-cam"}),
    ("scorecam", {"variant": "torchcam"}), ("rise", {"fill": "blur", "n_masks": 12}),
])
def test_contract_with_options(name, options):
    assert check_explainer(EXPLAINERS[name], **options) == list(PROMISES)


def test_sise_in_bfloat16():
    """Scores under autocast, compared on V_b scaled to [0, 1]: at most 0.1 apart. The choice of masks is the same, for it is
    made in float32. The fused map has a hard gate and is compared by correlation."""
    model, images = load_model(), photos()[:2]
    exact, half = (EXPLAINERS["sise"](model, mu=0.3, dtype=dtype).blocks(images, [285, 967]) for dtype in (None, torch.bfloat16))
    for a, b in zip(exact, half, strict=True):
        assert torch.equal(a.kept, b.kept) and b.visual.dtype == torch.float32
        assert (normalize_map(a.visual) - normalize_map(b.visual)).abs().max() < 0.1
        assert correlation(a.visual, b.visual).min() > 0.99
    assert correlation(exact[-1].fused, half[-1].fused).min() > 0.95


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
    assert all((a >= b).all() and (b > 0).all() for a, b in zip(counts, counts[1:], strict=False))
    assert all((b & ~a == 0).all() for more, less in zip(kept, kept[1:], strict=False) for a, b in zip(more.values(), less.values(), strict=True))


def test_the_maps_of_sise_are_those_the_paper_counts():
    for name, count in (("resnet50", 3904), ("vgg16", 1472)):
        kept = EXPLAINERS["sise"](load_model(name, weights=None)).masks_kept(torch.rand(1, 3, 64, 64), 0)
        assert sum(k.shape[1] for k in kept.values()) == count


def test_a_very_unlikely_class_is_explained():
    "The probability underflows float32, its logarithm does not"
    model, images = load_model(), photos(64)[:1]
    sharp = torch.nn.Sequential(model, Times(40)).eval()
    with torch.no_grad():
        worst = model(images).argmin(1)
        assert sharp(images).softmax(1)[0, worst] == 0
    kept = EXPLAINERS["sise"](sharp, layers=["0.network.blocks.2", "0.network.bn2"]).masks_kept(images, worst)
    assert all(k.any() for k in kept.values())


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


def test_options_must_make_sense():
    model, images = load_model(), photos()[:1]
    for name, option in (("occlusion", "cells"), ("smoothgrad", "samples"), ("shapley", "cells"), ("integrated_gradients", "steps"),
                         ("integrated_gradcam", "steps"), ("integrated_gradcam", "chunk"), ("rise", "n_masks"), ("rise", "cells"),
                         ("sise", "chunk"), ("extremal", "steps")):
        with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, got 0"):
            explain(model, images, name, **{option: 0})
    with pytest.raises(TypeError, match="find_class"):
        explain(model, images, target="tabby")


def test_one_logit_has_no_softmax():
    "The softmax of one number is 1, whatever the image: maps of nothing, and a perfect Drop"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for act in (lambda: explain(model, images, "sise"), lambda: average_drop(model, images, torch.rand(2, 1, 16, 16))):
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


class Detached(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("name", ["saliency", "integrated_gradients", "smoothgrad", "fullgrad"])
def test_a_model_that_stops_the_gradient(name):
    model = Detached(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="does not depend on the image in a differentiable way"):
        explain(model, torch.rand(1, 3, 16, 16), name)


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


def test_masked_images_without_a_score():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 3))
    with pytest.raises(ValueError, match="NaN for masked images"):
        explain(model, torch.rand(1, 3, 8, 8), "rise", 1, n_masks=4, fill=float("nan"))


def test_counts_of_numpy():
    model, images = load_model("plain_cnn"), torch.rand(1, 3, 32, 32)
    assert explain(model, images, "rise", n_masks=np.int64(3)).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="n_masks must be a whole number"):
        explain(model, images, "rise", n_masks=True)
