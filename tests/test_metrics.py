"""The scores: maps whose score is known, slow versions, Quantus, torchcam, grad-cam and torchmetrics, two processes, bad input."""
import math

import numpy as np
import pytest
import torch
from helpers import in_two_processes, rand
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from xai_companion import viz
from xai_companion.explain import GradCAM, IntegratedGradients, explain
from xai_companion.explain.contract import assert_untouched, footprint
from xai_companion.masking import hidden, normalize_map
from xai_companion.metrics import (
    METRICS,
    PerImage,
    average_drop,
    bbox_score,
    brier_score,
    confidence_pair,
    deletion_auc,
    deletion_curve,
    drop,
    ebpg,
    expected_calibration_error,
    increase,
    increase_rate,
    infidelity,
    insertion_auc,
    insertion_curve,
    miou,
    negative_log_likelihood,
    pointing_game,
    sensitivity,
    soft_average_drop,
    soft_increase_rate,
    temperature_scaling,
    top_mask,
    win_rate,
)
from xai_companion.metrics.faithfulness import ranks
from xai_companion.metrics.sanity import correlation, correlations
from xai_companion.models import Normalized

LOCALIZATION = {"ebpg": ebpg, "miou": miou, "bbox": bbox_score, "pointing": pointing_game}
FAITHFULNESS = {"drop": average_drop, "increase": increase_rate, "insertion": insertion_auc, "deletion": deletion_auc,
                "soft_drop": soft_average_drop, "soft_increase": soft_increase_rate}
TARGETS = [0, 4, 2, 2]


def square(n=1, size=20, share=0.2):
    "Masks (n, 1, size, size) of a rectangle with the given share of the pixels"
    masks = torch.zeros(n, 1, size, size, dtype=torch.bool)
    masks[:, :, 4:4 + round(share * size * 2), 5:5 + size // 2] = True
    return masks


@pytest.fixture
def model():
    "A small network without pooling before its last map, with batch norm, dropout and a Normalized around it"
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 5))
    with torch.no_grad():
        network.train()(rand(16, 3, 12, 10))
        network[8].weight *= 30
    return Normalized(network, (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)).eval()


@pytest.fixture
def images():
    return rand(4, 3, 12, 10, seed=1)


@pytest.fixture
def maps():
    "Maps with many equal values"
    return (rand(4, 1, 12, 10, seed=2) * 9).round()


class TestLocalization:
    def test_perfect_map(self):
        masks = square()
        assert masks.float().mean() == 0.2
        for score in LOCALIZATION.values():
            assert score(masks.float(), masks).item() == 1

    @pytest.mark.parametrize("ties", ["exact", "strict"])
    def test_perfect_map_that_is_not_a_fifth(self, ties):
        masks = square(share=0.1)
        assert bbox_score(masks.float(), masks, ties=ties).item() == ebpg(masks.float(), masks).item() == 1
        assert miou(masks.float(), masks, ties=ties).item() == (0.5 if ties == "exact" else 1)  # 40 of 400 pixels, and a tie at 80

    def test_inverted_map(self):
        for share in (0.1, 0.2, 0.4):
            masks = square(share=share)
            assert ebpg(1 - masks.float(), masks).item() == bbox_score(1 - masks.float(), masks).item() == 0
            assert miou(1 - masks.float(), masks).item() == pointing_game(1 - masks.float(), masks, 0).item() == 0

    def test_inverted_map_of_a_large_object(self):
        masks = torch.ones(1, 1, 10, 10, dtype=torch.bool)
        masks[..., :4] = False  # 60 of 100: the top 60 are the other 40 and 20 of the object
        assert bbox_score(1 - masks.float(), masks).item() == pytest.approx(20 / 60)

    @pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e30])
    def test_constant_map(self, value):
        maps, masks = torch.full((1, 1, 20, 20), value), square()
        assert ebpg(maps, masks).item() == 0
        assert bbox_score(maps, masks, ties="strict").item() == miou(maps, masks, ties="strict").item() == 0
        first = torch.arange(400).view(1, 1, 20, 20) < 80  # row-major order
        assert top_mask(maps, 0.2).equal(first)
        assert bbox_score(maps, masks).item() == pytest.approx((first & masks).sum().item() / 80)

    def test_random_maps(self):
        masks = square(4000)
        for score in (ebpg, bbox_score):
            values = score(rand(4000, 1, 20, 20), masks)
            assert abs(values.mean() - 0.2) < 4 * values.std() / math.sqrt(4000) < 0.01

    def test_whole_image(self):
        masks = torch.ones(3, 1, 8, 8, dtype=torch.bool)
        for ties in ("exact", "strict"):
            assert bbox_score(torch.stack([rand(1, 8, 8), torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]), masks, ties).tolist() == [1] * 3

    @pytest.mark.parametrize("ties", ["exact", "strict"])
    def test_loop(self, ties):
        maps, masks = (rand(30, 1, 9, 7, seed=3) * 6).round() - 2, rand(30, 1, 9, 7, seed=4) < 0.3
        masks[:, :, 4, 4] = True
        for i in range(30):
            s, g = maps[i].flatten().tolist(), masks[i].flatten().tolist()
            order = sorted(range(63), key=lambda j: (-s[j], j))
            best = lambda k: {j for j in order[:k] if ties == "exact" or s[j] > s[order[k]]}  # noqa: E731, B023
            truth, low = {j for j in range(63) if g[j]}, min(s)
            energy = sum(s[j] - low for j in truth) / sum(v - low for v in s)
            overlap = len(best(12) & truth) / len(best(12) | truth)
            hits = len(best(len(truth)) & truth) / len(truth)
            near = min(math.dist(divmod(j, 7), divmod(order[0], 7)) for j in truth)
            one = maps[i:i + 1], masks[i:i + 1]
            ours = [ebpg(*one), miou(*one, ties=ties), bbox_score(*one, ties=ties), pointing_game(*one, tolerance=1.5)]
            assert torch.cat(ours).tolist() == pytest.approx([energy, overlap, hits, float(near <= 1.5)], abs=1e-6)

    def test_quantus(self):
        import quantus
        maps, masks = rand(6, 1, 16, 16), square(6, 16)
        maps = maps - maps.amin((1, 2, 3), keepdim=True)
        metric = quantus.RelevanceMassAccuracy(disable_warnings=True, display_progressbar=False)
        theirs = metric(model=None, x_batch=rand(6, 3, 16, 16).numpy(), y_batch=np.zeros(6, int), a_batch=maps.numpy(),
                        s_batch=masks.numpy(), channel_first=True)
        torch.testing.assert_close(ebpg(maps, masks), torch.tensor(theirs).float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(ebpg(maps, masks, normalize=False), ebpg(maps, masks), atol=1e-6, rtol=0)

    def test_offset_and_scale(self):
        maps, masks = rand(5, 1, 20, 20), square(5)
        for score in LOCALIZATION.values():
            torch.testing.assert_close(score(100 * maps - 7, masks), score(maps, masks), atol=1e-4, rtol=0)
        assert ebpg(maps + 1, masks, normalize=False).sub(ebpg(maps, masks)).abs().min() > 1e-4

    def test_small_differences_on_a_large_offset(self):
        "The share is exact to float32 although the map is a small part of its sum"
        maps, masks = 1 + 1e-3 * rand(1, 1, 224, 224), square(1, 224)
        exact = np.float64(maps[masks].double().sum()) / np.float64(maps.double().sum())
        assert ebpg(maps, masks, normalize=False).item() == pytest.approx(exact, abs=6e-8)

    @pytest.mark.parametrize("name", LOCALIZATION)
    def test_kind_of_result(self, name):
        maps = rand(5, 1, 20, 20).requires_grad_()
        for m in (maps, maps.double(), maps.half()):
            values = LOCALIZATION[name](m, square(5))
            assert values.shape == (5,) and values.dtype == torch.float32 and not values.requires_grad
        alone = torch.cat([LOCALIZATION[name](maps[i:i + 1], square()) for i in range(5)])
        assert alone.equal(LOCALIZATION[name](maps, square(5)))

    def test_pointing_game_counts_the_first_of_several_maxima(self):
        maps, masks = torch.zeros(1, 1, 50, 50), torch.zeros(1, 1, 50, 50, dtype=torch.bool)
        maps[0, 0, 10, 40] = maps[0, 0, 11, 0] = 1
        masks[0, 0, 10, 40] = True
        assert pointing_game(maps, masks).item() == 1 and pointing_game(maps, masks.flip(3)).item() == 0

    def test_pointing_game_tolerance_is_a_distance_and_belongs_to_the_hits(self):
        maps, masks = torch.zeros(1, 1, 30, 40), torch.zeros(1, 1, 30, 40, dtype=torch.bool)
        maps[0, 0, 8, 21] = 1
        masks[0, 0, 20, 30] = True  # 12 down and 9 right: 15 away
        assert pointing_game(maps, masks, tolerance=15).item() == 1
        assert pointing_game(maps, masks, tolerance=14.99).item() == 0

    @pytest.mark.parametrize("side, pixels", [(32, 2), (64, 4), (224, 15), (448, 30)])
    def test_pointing_game_tolerance_grows_with_the_image(self, side, pixels):
        maps, masks = torch.zeros(2, 1, side, side // 2), torch.zeros(2, 1, side, side // 2, dtype=torch.bool)
        maps[:, 0, 0, 0] = 1
        masks[0, 0, pixels, 0] = masks[1, 0, pixels + 1, 0] = True
        assert pointing_game(maps, masks).tolist() == [1, 0]

    @pytest.mark.parametrize("top", [0, -0.1, 1.1, 20, 0.001, float("nan")])
    def test_top(self, top):
        with pytest.raises(ValueError, match="share"):
            miou(rand(2, 1, 20, 20), square(2), top=top)

    @pytest.mark.parametrize("name", LOCALIZATION)
    def test_bad_input(self, name):
        score, maps, masks = LOCALIZATION[name], rand(2, 1, 20, 20), square(2)
        empty, holes = masks.clone(), maps.clone()
        empty[1], holes[1, 0, 3, 3] = False, float("nan")
        for bad, error, words in [((maps, empty), ValueError, r"images \[1\]"), ((holes, masks), ValueError, "NaN"),
                                  ((maps, masks.float()), TypeError, "bool"), ((maps[:1], masks), ValueError, "one map per image"),
                                  ((maps[:, 0], masks), ValueError, "one map per image"), ((maps, masks[:, 0]), ValueError, "masks"),
                                  ((maps.expand(-1, 3, -1, -1), masks), ValueError, "one map per image"),
                                  ((maps.long(), masks), TypeError, "float"), ((maps.numpy(), masks), TypeError, "tensor"),
                                  ((maps[:0], masks[:0]), ValueError, "empty"), ((maps / 0, masks), ValueError, "infinite")]:
            with pytest.raises(error, match=words):
                score(*bad)

    def test_bad_options(self):
        maps, masks = rand(2, 1, 20, 20), square(2)
        with pytest.raises(ValueError, match="exact"):
            bbox_score(maps, masks, ties="loose")
        with pytest.raises(ValueError, match="distance"):
            pointing_game(maps, masks, tolerance=-1)
        with pytest.raises(ValueError, match="negative"):
            ebpg(maps - 0.5, masks, normalize=False)

    def test_arrays_are_no_tensors(self):
        maps, masks = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 4, 4), bool)
        with pytest.raises(TypeError, match="got ndarray: torch.from_numpy"):
            ebpg(torch.from_numpy(maps), masks)
        with pytest.raises(TypeError, match="maps must be a float tensor .*, got ndarray"):
            ebpg(maps, torch.from_numpy(masks))

    def test_pointing_game_default_tolerance_is_a_whole_number(self):
        maps, masks = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
        maps[0, 0, 0, 0], masks[0, 0, 4, 1] = 1, True  # sqrt(17) = 4.12 away; 64 * 15 / 224 = 4.29 is rounded to 4
        assert pointing_game(maps, masks).item() == 0

    def test_ebpg_of_a_map_with_a_small_sum(self):
        maps, masks = torch.zeros(1, 1, 20, 20), square()
        maps[masks.nonzero()[0].unbind()] = 1  # one pixel: its sum is 1
        assert ebpg(maps, masks).item() == 1
        assert ebpg(maps / 4, masks, normalize=False).item() == 1


def slow_scores(model, images, masks, target, start):
    "Probability of the class for each image with a mask, one at a time"
    with torch.no_grad():
        mixed = [torch.where(k, x, s)[None] for x, k, s in zip(images, masks, start, strict=True)]
        return torch.stack([model(x).softmax(1)[0, t] for x, t in zip(mixed, target, strict=True)])


def first_pixels(maps, count):
    "The top pixels by Python's stable sort, bool (N, 1, H, W)"
    masks = torch.zeros(maps.shape, dtype=torch.bool)
    for m, k in zip(maps, masks, strict=True):
        values = m.flatten().tolist()
        k.view(-1)[sorted(range(len(values)), key=lambda i: -values[i])[:count]] = True  # noqa: B023
    return masks


class TestFaithfulness:
    def test_ranks(self, maps):
        for count in (1, 18, 119, 120):
            assert (ranks(maps) < count).equal(first_pixels(maps, count))
        assert top_mask(maps, 0.15).equal(first_pixels(maps, 18))

    @pytest.mark.parametrize("fill", ["black", "mean", "blur"])
    def test_pair(self, model, images, maps, fill):
        before, after = confidence_pair(model, images, maps, TARGETS, fill=fill)
        black = torch.zeros_like(images)
        torch.testing.assert_close(before, slow_scores(model, images, maps > -1, TARGETS, black), atol=1e-6, rtol=0)
        slow = slow_scores(model, images, first_pixels(maps, 18), TARGETS, hidden(images, fill, model))
        torch.testing.assert_close(after, slow, atol=1e-6, rtol=0)
        options = dict(fill=fill)
        assert average_drop(model, images, maps, TARGETS, **options).equal(((before - after) / before).clamp_min(0))
        assert increase_rate(model, images, maps, TARGETS, **options).tolist() == (after > before).float().tolist()

    @pytest.mark.parametrize("steps", [1, 7, 120])
    def test_curves(self, model, images, maps, steps):
        there, back = (f(model, images, maps, TARGETS, steps=steps) for f in (insertion_curve, deletion_curve))
        assert there.shape == back.shape == (4, steps + 1)
        blur, black = hidden(images, "blur"), torch.zeros_like(images)
        for j in range(steps + 1):
            seen = first_pixels(maps, j * 120 // steps)
            torch.testing.assert_close(there[:, j], slow_scores(model, images, seen, TARGETS, blur), atol=1e-6, rtol=0)
            torch.testing.assert_close(back[:, j], slow_scores(model, images, ~seen, TARGETS, black), atol=1e-6, rtol=0)
        whole = confidence_pair(model, images, maps, TARGETS)[0]
        assert there[:, -1].equal(whole) and back[:, 0].equal(whole)
        share = np.array([j * 120 // steps / 120 for j in range(steps + 1)])
        for score, curve in ((insertion_auc, there), (deletion_auc, back)):
            np.testing.assert_allclose(score(model, images, maps, TARGETS, steps=steps),
                                       np.trapezoid(curve.double().numpy(), share, axis=1), atol=1e-6)

    def test_opposite_map(self, model, images):
        distinct = rand(4, 1, 12, 10, seed=5)
        torch.testing.assert_close(deletion_curve(model, images, distinct, steps=12),
                                   insertion_curve(model, images, -distinct, steps=12, fill="black").flip(1), atol=1e-6, rtol=0)

    def test_a_network_that_answers_the_same_to_everything(self, images, maps):
        class Deaf(nn.Module):
            def forward(self, x):
                return torch.tensor([[1.0, 2.0, 0.0]]).repeat(len(x), 1)

        assert average_drop(Deaf(), images, maps).tolist() == increase_rate(Deaf(), images, maps).tolist() == [0] * 4
        p = torch.tensor([1.0, 2.0, 0.0]).softmax(0)[1].expand(4)
        torch.testing.assert_close(insertion_auc(Deaf(), images, maps), p)
        torch.testing.assert_close(deletion_auc(Deaf(), images, maps), p)

    def test_drop_by_hand(self):
        before, after = torch.tensor([0.8, 0.5, 0.5, 0.0, 0.0]), torch.tensor([0.2, 0.6, 0.5, 0.0, 0.1])
        assert drop(before, after).tolist() == pytest.approx([0.75, 0, 0, 0, 0])
        assert increase(before, after).tolist() == [0, 1, 0, 0, 1]
        assert win_rate(drop(before, after), torch.tensor([0.8, 0.1, 0, 0, 0])).item() == pytest.approx(2 / 5)

    def test_target(self, model, images, maps):
        predicted = model(images).argmax(1)
        for score in FAITHFULNESS.values():
            assert score(model, images, maps).equal(score(model, images, maps, predicted))
            torch.testing.assert_close(score(model, images, maps, 3), score(model, images, maps, [3] * 4))

    def test_torchcam(self, model, images):
        "torchcam scales maps before it resizes them, and its metrics explain the probability: compared on its own full-size maps"
        target = model(images).argmax(1).tolist()  # likely classes, for torchcam adds 1e-7 to the probability it divides by
        import torchcam.methods
        from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
        softmax = lambda logits: logits.softmax(1)  # noqa: E731
        with torchcam.methods.GradCAM(model, target_layer=model.network[4]) as cam:
            theirs = ClassificationMetric(cam, softmax)
            theirs.update(images.clone().requires_grad_(), target)
            faith = DeletionInsertionMetric(cam, softmax, steps=20)
            faith.update(images.clone().requires_grad_(), target)
            maps = cam(target, softmax(model(images.clone().requires_grad_())))[0][:, None].detach()
        assert maps.amax((1, 2, 3)).min() > 0
        ours = soft_average_drop(model, images, maps, target).mean(), soft_increase_rate(model, images, maps, target).mean()
        assert [v.item() for v in ours] == pytest.approx(list(theirs.summary().values()), abs=2e-6)
        areas = [f(model, images, maps, target, steps=20, fill="black").mean().item() for f in (deletion_auc, insertion_auc)]
        assert areas == pytest.approx([faith.summary()["deletion_auc"], faith.summary()["insertion_auc"]], abs=1e-4)

    def test_grad_cam(self, model, images, maps):
        "grad-cam's DropInConfidence does not divide by the probability"
        from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
        scaled, targets = normalize_map(maps)[:, 0].numpy(), [ClassifierOutputSoftmaxTarget(t) for t in TARGETS]
        before = confidence_pair(model, images, maps, TARGETS)[0].numpy()
        theirs = [metric()(images, scaled, targets, model) for metric in (DropInConfidence, IncreaseInConfidence)]
        np.testing.assert_allclose(soft_average_drop(model, images, maps, TARGETS).numpy() * before, theirs[0], atol=1e-6)
        np.testing.assert_array_equal(soft_increase_rate(model, images, maps, TARGETS), theirs[1])

    @pytest.mark.parametrize("name", FAITHFULNESS)
    def test_batch_chunk_and_traces(self, model, images, maps, name):
        score = FAITHFULNESS[name]
        model.train()
        model.network[1].eval()
        before, copy = footprint(model, images), maps.clone()
        values = score(model, images, maps, TARGETS)
        assert values.shape == (4,) and values.dtype == torch.float32 and not values.requires_grad
        alone = [score(model, images[i:i + 1], maps[i:i + 1], TARGETS[i], chunk=3) for i in range(4)]
        torch.testing.assert_close(torch.cat(alone), values, atol=1e-5, rtol=0)
        assert_untouched(before, footprint(model, images), f"after {name}")
        assert copy.equal(maps)
        with torch.inference_mode():
            torch.testing.assert_close(score(model, images, maps, TARGETS), values, atol=1e-6, rtol=0)

    def test_no_more_than_a_chunk(self, model, images, maps):
        seen = []
        handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        insertion_auc(model, images, maps, TARGETS, steps=9, chunk=5)
        handle.remove()
        assert max(seen) == 5 and sum(seen) == 4 * (9 + 1)  # the whole image once, for its class and its score

    def test_autocast(self, model, images, maps):
        for score in (average_drop, insertion_auc):
            rough = score(model, images, maps, TARGETS, dtype=torch.bfloat16)
            assert rough.dtype == torch.float32
            torch.testing.assert_close(rough, score(model, images, maps, TARGETS), atol=0.05, rtol=0)

    @pytest.mark.parametrize("name", FAITHFULNESS)
    def test_bad_input(self, model, images, maps, name):
        score, holes = FAITHFULNESS[name], maps.clone()
        holes[2] = float("nan")
        for bad, error, words in [((images, holes), ValueError, "NaN"), ((images, maps[:, :, :6]), ValueError, "one map per image"),
                                  ((images, maps[:3]), ValueError, "one map per image"), ((images * 2, maps), ValueError, "normalisation"),
                                  ((images[0], maps), ValueError, "batch dimension"), ((images, maps, 5), ValueError, "out of range"),
                                  ((images, maps, [1, 2]), ValueError, "one per image"), ((images[:0], maps[:0]), ValueError, "empty"),
                                  ((images, maps > 4), TypeError, "float")]:
            with pytest.raises(error, match=words):
                score(model, *bad)
        for options, words in [(dict(fill="grey"), "fill"), (dict(score="odds"), "odds"), (dict(chunk=0), "chunk")]:
            with pytest.raises(ValueError, match=words):
                score(model, images, maps, **options)

    def test_a_network_that_gives_nan(self, model, images, maps):
        class Broken(nn.Module):
            def forward(self, x):
                return torch.where((x == 0).any(), torch.nan, model(x))

        for score in (average_drop, increase_rate, deletion_auc):
            with pytest.raises(ValueError, match="NaN"):
                score(Broken(), images, maps)

    def test_bad_options(self, model, images, maps):
        for steps in (0, -3, 2.5, 121):
            with pytest.raises(ValueError, match="steps"):
                deletion_auc(model, images, maps, steps=steps)
        for score in (average_drop, soft_average_drop):
            with pytest.raises(ValueError, match="share of a probability"):
                score(model, images, maps, score="logit")
        with pytest.raises(ValueError, match="probabilities"):
            drop(torch.tensor([3.0]), torch.tensor([1.0]))
        with pytest.raises(ValueError, match="top"):
            increase_rate(model, images, maps, top=15)

    def test_curves_have_28_steps(self, model, images, maps):
        there, back = insertion_curve(model, images, maps), deletion_curve(model, images, maps)
        assert there.shape == back.shape == (4, 29)
        for score, curve in ((insertion_auc, there), (deletion_auc, back)):
            share = torch.tensor([j * 120 // 28 / 120 for j in range(29)])
            torch.testing.assert_close(score(model, images, maps), torch.trapezoid(curve, share))

    def test_drop_and_increase_take_one_score_per_image(self):
        for of in (drop, increase):
            for before, after in ((torch.rand(2, 3), torch.rand(2, 3)), (torch.rand(0), torch.rand(0)), (torch.rand(3), torch.rand(4))):
                with pytest.raises(ValueError, match="same images"):
                    of(before, after)

    def test_win_rate_needs_drops_of_the_same_images(self):
        for a, b in ((torch.rand(3), torch.rand(4)), (torch.rand(0), torch.rand(0)), (torch.rand(2, 2), torch.rand(2, 2))):
            with pytest.raises(ValueError, match="same images"):
                win_rate(a, b)
        with pytest.raises(ValueError, match="a drop is NaN"):
            win_rate(torch.tensor([0.1, float("nan")]), torch.rand(2))


def _ece_of_the_diagram(confidence, correct):
    figure = viz.reliability_diagram(confidence, correct, 10)
    return float(figure.axes[0].get_title(loc="right").removeprefix("ECE ").removesuffix(" %"))


class TestCalibration:
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    labels = torch.zeros(4).long()

    def test_by_hand(self):
        assert expected_calibration_error(self.probs, self.labels, 5).item() == pytest.approx(1.7 / 4)
        assert negative_log_likelihood(self.probs, self.labels).item() == pytest.approx(-math.log(0.9 * 0.1 * 0.7 * 0.4) / 4)
        assert brier_score(self.probs, self.labels).item() == pytest.approx(2 * (0.01 + 0.81 + 0.09 + 0.36) / 4)

    def test_edges_belong_to_the_lower_bin(self):
        probs = torch.tensor([[0.6, 0.4], [0.61, 0.39]], dtype=torch.float64)  # 0.6 in (0.4, 0.6], 0.61 in (0.6, 0.8]
        assert expected_calibration_error(probs, torch.tensor([0, 1]), 5).item() == pytest.approx((0.4 + 0.61) / 2)
        sure = torch.tensor([[1.0, 0.0], [0.95, 0.05]], dtype=torch.float64)  # 1 shares its bin with 0.95
        assert expected_calibration_error(sure, torch.tensor([1, 0]), 10).item() == pytest.approx(abs(1 - 1.95) / 2)

    @pytest.mark.parametrize("bins", [1, 10, 15])
    def test_torchmetrics_away_from_the_edges(self, bins):
        probs = (4 * rand(300, 6)).softmax(1).double()
        labels = torch.randint(6, (300,), generator=torch.Generator().manual_seed(1))
        theirs = multiclass_calibration_error(probs, labels, num_classes=6, n_bins=bins).item()
        assert expected_calibration_error(probs, labels, bins).item() == pytest.approx(theirs, abs=1e-6)

    def test_nll_is_cross_entropy(self):
        logits, labels = 5 * rand(50, 4), torch.arange(50) % 4
        assert negative_log_likelihood(logits.softmax(1), labels).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)

    def test_temperature_by_hand(self):
        logits, labels = torch.tensor([[2 * math.log(3), 0.0]] * 4), torch.tensor([0, 0, 0, 1])
        for factor in (0.25, 1, 3):
            assert temperature_scaling(factor * logits, labels) == pytest.approx(2 * factor, rel=1e-5)

    def test_temperature_of_a_network_that_knows_nothing(self):
        assert temperature_scaling(torch.zeros(4, 3), self.labels) == 1

    def test_temperature_never_harms(self):
        for seed in range(20):
            logits = 6 * rand(15, 3, seed=seed) - 3
            labels = torch.randint(3, (15,), generator=torch.Generator().manual_seed(seed))
            best = temperature_scaling(logits, labels)
            nll = [F.cross_entropy(logits.double() / t, labels).item() for t in (best, 1, *np.geomspace(0.05, 20, 200))]
            assert nll[0] <= min(nll[1:]) + 1e-7

    def test_bad_input(self):
        for score in (expected_calibration_error, negative_log_likelihood, brier_score):
            for probs, labels, words in [(5 * self.probs, self.labels, "softmax"), (self.probs - 0.5, self.labels, "softmax"),
                                         (self.probs, self.labels + 2, "out of range"), (self.probs, self.labels[:3], "one class per row"),
                                         (self.probs[0], self.labels, "row per image"), (self.probs[:0], self.labels[:0], "row per image"),
                                         (self.probs / 0 * 0, self.labels, "NaN"), (self.probs, 0, "one class per row")]:
                with pytest.raises(ValueError, match=words):
                    score(probs, labels)
            with pytest.raises(TypeError, match="class indices"):
                score(self.probs, self.labels.float())
        with pytest.raises(ValueError, match="bins"):
            expected_calibration_error(self.probs, self.labels, bins=0)
        with pytest.raises(ValueError, match="bounds"):
            temperature_scaling(self.probs, self.labels, bounds=(2, 3))

    def test_probabilities_below_0_are_refused_though_they_sum_to_1(self):
        for score in (expected_calibration_error, negative_log_likelihood, brier_score):
            with pytest.raises(ValueError, match="softmax"):
                score(torch.tensor([[1.2, -0.2]]), torch.tensor([0]))

    def test_temperature_stays_within_the_bounds(self):
        logits, labels = torch.tensor([[2 * math.log(3), 0.0]] * 4), torch.tensor([0, 0, 0, 1])  # best at 2, times the factor
        assert temperature_scaling(3 * logits, labels, bounds=(0.05, 3)) == pytest.approx(3, rel=1e-5)
        assert temperature_scaling(0.25 * logits, labels, bounds=(0.8, 20)) == pytest.approx(0.8, rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_a_confidence_on_an_edge_belongs_to_the_bin_below(self, dtype):
        """0.1 to 0.9 as decimal fractions are edges of ten bins, in every precision: two neighbours never share a bin. The rest of the
        probability is spread over ten other classes. The diagram says what the metric says."""
        for tenth in range(1, 9):
            confident = torch.tensor([tenth / 10, (tenth + 1) / 10], dtype=dtype)
            probs = torch.cat([confident[:, None], ((1 - confident) / 10)[:, None].expand(-1, 10)], 1)
            expected = (confident.double()[0] / 2 + (1 - confident.double()[1]) / 2).item()  # the first is wrong, the second right
            assert expected_calibration_error(probs, torch.tensor([1, 0]), 10).item() == pytest.approx(expected, abs=1e-6)
            assert _ece_of_the_diagram(confident, torch.tensor([False, True])) == pytest.approx(100 * expected, abs=0.051)


def batches(rank=None):
    "Seven maps and masks in batches of two; every other batch if a rank is given"
    maps, masks = rand(7, 1, 20, 20), square(7)
    return list(zip(maps.split(2), masks.split(2), strict=True))[slice(rank, None, None if rank is None else 2)]


def one_process(rank, folder):
    metric = PerImage(ebpg, normalize=False)
    for maps, masks in batches(rank):
        metric.update(maps, masks)
    return metric.compute().item(), metric.n.item()


class TestPerImage:
    def test_stream(self):
        metric = PerImage(ebpg, normalize=False)
        for maps, masks in batches():
            metric.update(maps, masks)
        values = ebpg(rand(7, 1, 20, 20), square(7), normalize=False)
        assert metric.compute().item() == pytest.approx(values.mean().item(), abs=1e-7) and metric.n == 7

    def test_two_processes(self, tmp_path):
        results = in_two_processes(one_process, tmp_path)
        wanted = ebpg(rand(7, 1, 20, 20), square(7), normalize=False).mean().item()
        assert [mean for mean, _ in results] == pytest.approx([wanted] * 2, abs=1e-7)

    def test_errors(self):
        with pytest.raises(RuntimeError, match="no image"), pytest.warns(UserWarning):
            PerImage(ebpg).compute()
        with pytest.raises(ValueError, match="per image"):
            PerImage(win_rate).update(torch.rand(3), torch.rand(3))


class TestSanity:
    def test_infidelity_of_an_exact_map(self):
        class Linear(nn.Module):
            def forward(self, x):
                total = (x * rand(3, 8, 8)).sum((1, 2, 3))
                return torch.stack([total, -total], 1)

        images = rand(3, 3, 8, 8, seed=1)
        exact = (images * rand(3, 8, 8)).sum(1, keepdim=True)
        assert infidelity(Linear(), images, exact, 0, scale=False).max() < 1e-8
        wrong = infidelity(Linear(), images, rand(3, 1, 8, 8, seed=2), 0)
        assert wrong.min() > 0.01
        torch.testing.assert_close(infidelity(Linear(), images[1:2], rand(3, 1, 8, 8, seed=2)[1:2], 0), wrong[1:2])

    def test_sensitivity(self, model, images):
        ours = sensitivity(IntegratedGradients(model, steps=8), images, TARGETS, samples=4, seed=3)
        for i, (image, target) in enumerate(zip(images.split(1), TARGETS, strict=True)):
            torch.manual_seed(3)
            noisy = (image + 0.02 * (2 * torch.rand(4, 3, 12, 10) - 1)).clamp(0, 1)
            still, moved = (explain(model, x, "integrated_gradients", target, steps=8) for x in (image, noisy))
            by_hand = ((moved - still).flatten(1).norm(dim=1) / still.norm()).max().item()
            assert ours[i].item() == pytest.approx(by_hand, rel=1e-3)

    def test_nothing_is_left_behind(self, model, images, maps):
        before = footprint(model.train(), images)
        infidelity(model, images, maps, samples=5)
        sensitivity(GradCAM(model, "3"), images, samples=2)
        assert_untouched(before, footprint(model, images), "after infidelity and sensitivity")

    def test_correlations_of_all_with_all(self):
        "Those of `correlation` and of NumPy, pair by pair; 0 for a constant map"
        maps = torch.cat([rand(5, 1, 6, 7), torch.ones(1, 1, 6, 7)])
        found, flat = correlations(maps), maps.flatten(1).double().numpy()
        for i in range(6):
            assert torch.allclose(found[i], correlation(maps[i].expand_as(maps), maps), atol=1e-12)
        assert np.allclose(found[:5, :5], np.corrcoef(flat[:5])) and (found[5] == 0).all()

    def test_sanity_needs_samples(self, model, images, maps):
        with pytest.raises(ValueError, match="samples must be a whole number"):
            sensitivity(GradCAM(model, "3"), images, samples=0)
        with pytest.raises(ValueError, match="samples must be a whole number"):
            infidelity(model, images, maps, samples=0)
        for radius in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="radius"):
                sensitivity(GradCAM(model, "3"), images, radius=radius)
        with pytest.raises(ValueError, match="side must be a whole number"):
            infidelity(model, images, torch.rand(len(images), 1, *images.shape[2:]), side=2.5)

    def test_infidelity_hides_a_quarter_of_the_shorter_side(self, model, images, maps):
        images, maps = images[..., :9], maps[..., :9]
        assert infidelity(model, images, maps, samples=20).equal(infidelity(model, images, maps, side=2, samples=20))  # 9 // 4
        images, maps = images[..., :3], maps[..., :3]
        assert infidelity(model, images, maps, samples=20).equal(infidelity(model, images, maps, side=1, samples=20))  # at least a pixel


def test_registry():
    assert set(METRICS) == {*LOCALIZATION, *FAITHFULNESS}
    assert {n for n, m in METRICS.items() if m.needs == "mask"} == set(LOCALIZATION)
    assert {n for n, m in METRICS.items() if m.better == "low"} == {"drop", "deletion", "soft_drop"}
    assert len({m.label for m in METRICS.values()}) == len(METRICS)
    assert METRICS["drop"].scale == 100 and METRICS["insertion"].scale == 1
