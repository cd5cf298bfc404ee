"""The losses of training: the formula in three loops, values by hand, gradients, two processes, bad input."""
import math

import pytest
import torch
from helpers import in_two_processes, three_loops
from torch.nn import functional as F

from xai_companion.train.losses import (
    DROP_TARGETS,
    classification_loss,
    collapse_alarm,
    collapsed_value,
    drop_targets,
    edda_loss,
    edda_loss_of_several,
    gathered,
    is_right,
    supcon_loss,
)


def units(*shape, seed=0):
    "Random vectors of length 1, float64"
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


LABELS = torch.tensor([3, 0, 0, 3, 7, 0])
BACKGROUND = units(4, 8, seed=9)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


class TestSupCon:
    @pytest.mark.parametrize("views", [1, 2, 3, 5])
    @pytest.mark.parametrize("options", [
        {}, dict(temperature=0.5), dict(base_temperature=1.0), dict(background=BACKGROUND), dict(background=BACKGROUND[:1]),
        dict(background=BACKGROUND, background_weight=2.0), dict(background=BACKGROUND, background_weight=0.3, temperature=0.2)])
    def test_equals_three_loops(self, views, options):
        z = units(6, views, 8)
        assert supcon_loss(z, LABELS, **options).item() == pytest.approx(three_loops(z, LABELS, **options), rel=1e-12)

    def test_by_hand(self):
        z, labels = torch.tensor([[1., 0], [1, 0], [0, 1]])[:, None], torch.tensor([0, 0, 1])
        plain = 2 / 3 * (math.log(math.e + 1) - 1)
        assert supcon_loss(z, labels, 1.0, 1.0).item() == pytest.approx(plain, rel=1e-6)
        assert supcon_loss(z, labels, 1.0, 0.5).item() == pytest.approx(2 * plain, rel=1e-6)
        one = torch.tensor([[0., -1]])
        assert supcon_loss(z, labels, 1.0, 1.0, one, 3.0).item() == pytest.approx(2 / 3 * (math.log(math.e + 4) - 1), rel=1e-6)

    def test_is_a_cross_entropy(self):
        z = units(6, 2, 8)
        views, names = z.flatten(0, 1), LABELS.repeat_interleave(2)
        others = ~torch.eye(12, dtype=torch.bool)
        logits = (views @ views.T / 0.2)[others].view(12, 11)
        same = (names[:, None] == names)[others].view(12, 11).double()
        wanted = 0.2 / 0.07 * F.cross_entropy(logits, same / same.sum(1, keepdim=True))
        torch.testing.assert_close(supcon_loss(z, LABELS, 0.2), wanted)

    @pytest.mark.parametrize(("images", "value"), [(256, 8.909), (64, 6.920)])
    def test_collapsed(self, images, value):
        z = units(1, 1, 128).float().expand(images, 2, 128)
        labels = torch.arange(images) % 10
        assert supcon_loss(z, labels).item() == pytest.approx(value, abs=5e-4)
        assert collapsed_value(2 * images) == pytest.approx(value, abs=5e-4)
        with_background = supcon_loss(z, labels, background=z[:50, 0], background_weight=2.0)
        assert with_background.item() == pytest.approx(collapsed_value(2 * images, background=100), abs=1e-5)

    def test_nothing_moves_a_collapsed_network(self):
        free = units(1, 1, 8).repeat(6, 2, 1).requires_grad_()
        force, = gradients(supcon_loss(F.normalize(free, dim=-1), LABELS), free)
        assert force.abs().max() < 1e-12

    def test_without_backgrounds_it_is_supcon(self):
        z = units(6, 2, 8).requires_grad_()
        wanted = supcon_loss(z, LABELS)
        force = gradients(wanted, z)
        for options in (dict(background=BACKGROUND[:0]), dict(background=None), dict(background=BACKGROUND, background_weight=0)):
            loss = supcon_loss(z, LABELS, **options)
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
            torch.testing.assert_close(gradients(loss, z), force, rtol=1e-10, atol=1e-12)

    def test_twice_is_weight_two(self):
        z, background = units(6, 2, 8).requires_grad_(), BACKGROUND.clone().requires_grad_()
        twice = supcon_loss(z, LABELS, background=torch.cat([background, background]))
        double = supcon_loss(z, LABELS, background=background, background_weight=2)
        torch.testing.assert_close(twice, double, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients(twice, z, background), gradients(double, z, background))

    def test_order_does_not_matter(self):
        z, background = units(6, 3, 8).requires_grad_(), BACKGROUND.clone().requires_grad_()
        wanted = supcon_loss(z, LABELS, background=background)
        order, turned = torch.tensor([4, 0, 5, 2, 1, 3]), torch.tensor([2, 0, 1])
        mixed = torch.stack([z[i].roll(int(i), 0) for i in order])[:, turned]
        moved = supcon_loss(mixed, LABELS[order], background=background.flip(0))
        torch.testing.assert_close(moved, wanted)
        torch.testing.assert_close(gradients(moved, z, background), gradients(wanted, z, background))

    def test_views_are_batch_mates(self):
        z = units(6, 4, 8)
        wanted = supcon_loss(z, LABELS, background=BACKGROUND)
        torch.testing.assert_close(supcon_loss(z.reshape(24, 1, 8), LABELS.repeat_interleave(4), background=BACKGROUND), wanted)
        torch.testing.assert_close(supcon_loss(z.reshape(12, 2, 8), LABELS.repeat_interleave(2), background=BACKGROUND), wanted)

    def test_names_of_classes_and_directions_do_not_matter(self):
        z = units(6, 2, 8)
        turn = torch.linalg.qr(units(8, 8, seed=3)).Q
        wanted = supcon_loss(z, LABELS, background=BACKGROUND)
        torch.testing.assert_close(supcon_loss(z, LABELS * -1000 + 5, background=BACKGROUND), wanted)
        torch.testing.assert_close(supcon_loss(z, LABELS.int(), background=BACKGROUND), wanted)
        torch.testing.assert_close(supcon_loss(z @ turn, LABELS, background=BACKGROUND @ turn), wanted)

    def test_one_class_and_one_image(self):
        z = units(5, 2, 8)
        assert supcon_loss(z, torch.zeros(5).long()) >= collapsed_value(10) - 1e-12
        assert supcon_loss(z[:1], LABELS[:1]).abs() < 1e-12
        alone = z[:1, :1].clone().requires_grad_()
        loss = supcon_loss(alone, LABELS[:1])
        assert loss == 0 and gradients(loss, alone)[0].eq(0).all()

    @pytest.mark.parametrize("background", [None, BACKGROUND])
    def test_no_positives(self, background):
        z = units(4, 1, 8).float().requires_grad_()
        loss = supcon_loss(z, torch.arange(4), background=background)
        assert loss == 0 and gradients(loss, z)[0].eq(0).all()

    def test_anchors_without_positives_stay_in_the_mean(self):
        z, labels = units(5, 1, 8), torch.tensor([0, 0, 1, 2, 3])
        anchor = z[:, 0] @ z[:, 0].T / 0.1
        terms = [math.log(anchor[i].exp().sum() - anchor[i, i].exp()) - anchor[0, 1].item() for i in (0, 1)]
        loss = supcon_loss(z.requires_grad_(), labels)
        assert loss.item() == pytest.approx(0.1 / 0.07 * sum(terms) / 5, rel=1e-12)
        assert gradients(loss, z)[0].isfinite().all()


class TestBackground:
    def test_is_no_anchor(self):
        z, background = units(6, 2, 8), BACKGROUND.clone().requires_grad_()
        found, = gradients(supcon_loss(z, LABELS, background=background, background_weight=0.7), background)
        views = z.flatten(0, 1)
        seen = (views @ views.T / 0.1).exp().fill_diagonal_(0).sum(1, keepdim=True)
        pushed = 0.7 * (views @ BACKGROUND.T / 0.1).exp()
        share = pushed / (seen + pushed.sum(1, keepdim=True))
        torch.testing.assert_close(found, share.T @ views / (0.07 * len(views)))

    def test_without_an_anchor_nothing_moves_it(self):
        background = units(1, 8).expand(4, 8).clone().requires_grad_()
        loss = supcon_loss(units(3, 1, 8, seed=1), torch.arange(3), background=background)
        assert gradients(loss, background)[0].eq(0).all()

    def test_is_no_positive(self):
        z = units(6, 2, 8)
        assert supcon_loss(z, LABELS * 0, background=z[:, 0]) > supcon_loss(z, LABELS * 0) + 0.1

    def test_pushes_the_closest_view_away(self):
        z = units(6, 2, 8).requires_grad_()
        with_it = supcon_loss(z, LABELS, background=z[0, :1].detach())
        more, = gradients(with_it - supcon_loss(z, LABELS), z)
        along = (more * z).sum(-1)
        assert along[0, 0] > 0 and along.argmax() == 0


class TestPrecision:
    def test_gradcheck(self):
        z, background = units(4, 2, 5).requires_grad_(), units(3, 5, seed=2).requires_grad_()
        labels = torch.tensor([0, 1, 1, 2])
        for views, temperature in ((z, 0.1), (z[:, :1], 0.5)):
            def loss(z, background, temperature=temperature):
                return supcon_loss(z, labels, temperature, background=background, background_weight=1.7)
            assert torch.autograd.gradcheck(loss, (views.detach().requires_grad_(), background))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.1, 0.01])
    def test_half_agrees_with_float32(self, dtype, temperature):
        z, background = units(6, 2, 64).to(dtype).requires_grad_(), units(4, 64, seed=5).to(dtype)
        half = supcon_loss(z, LABELS, temperature, background=background)
        wide = z.detach().float().requires_grad_()
        full = supcon_loss(wide, LABELS, temperature, background=background.float())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full)
        gradient, = gradients(half, z)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, gradients(full, wide)[0].to(dtype))
        exact = supcon_loss(units(6, 2, 64), LABELS, temperature, background=units(4, 64, seed=5))
        assert half.item() == pytest.approx(exact.item(), rel=0.02)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_overflow(self, dtype):
        z = units(1, 1, 64).to(dtype).repeat(8, 2, 1).requires_grad_()
        z.data[4:] *= -1
        for temperature in (0.01, 0.001):
            loss = supcon_loss(z, torch.arange(8) % 2, temperature, background=z[:3, 0].detach())
            assert loss.isfinite() and gradients(loss, z)[0].isfinite().all()

    def test_float32_inside_autocast(self):
        z = units(6, 2, 64).float()
        with torch.autocast("cpu", torch.bfloat16):
            inside = supcon_loss(z, LABELS, 0.01, background=z[:2, 0])
        torch.testing.assert_close(inside, supcon_loss(z, LABELS, 0.01, background=z[:2, 0]), rtol=0, atol=0)

    def test_features_normalised_in_bfloat16_are_accepted(self):
        raw = torch.randn(200, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        z = raw / raw.norm(dim=-1, keepdim=True)
        labels = torch.arange(200) % 10
        exact = supcon_loss(F.normalize(raw.double(), dim=-1), labels)
        assert supcon_loss(z, labels).item() == pytest.approx(exact.item(), rel=0.01)


def share_of(rank):
    "What a process has in each case: raw features, labels, backgrounds"
    raw, labels, background = units(6, 2, 5) * 3, LABELS, units(5, 5, seed=4)
    parts = {
        "several backgrounds each": (slice(0, 3), slice(3, 6), slice(0, 3), slice(3, 5)),
        "backgrounds in one process": (slice(0, 3), slice(3, 6), slice(0, 0), slice(0, 5)),
        "no background": (slice(0, 3), slice(3, 6), None, None),
        "unequal batches": (slice(0, 2), slice(2, 6), slice(0, 1), slice(1, 5)),
    }
    for name, part in parts.items():
        chosen, seen = part[rank], part[2 + rank]
        yield name, raw[chosen].float(), labels[chosen], None if seen is None else background[seen].float()


def whole():
    "The same in one process"
    for (name, raw, labels, seen), (_, more, others, unseen) in zip(share_of(0), share_of(1), strict=True):
        yield name, torch.cat([raw, more]), torch.cat([labels, others]), None if seen is None else torch.cat([seen, unseen])


def one_case(raw, labels, background, gather):
    "Loss, and its gradients for features, backgrounds and the layer that makes both"
    layer = torch.linspace(-1, 1, 40).view(5, 8).sin().requires_grad_()
    raw = raw.clone().requires_grad_()
    seen = None if background is None else background.clone().requires_grad_()
    projected = None if seen is None else F.normalize(seen @ layer, dim=-1)
    loss = supcon_loss(F.normalize(raw @ layer, dim=-1), labels, background=projected, background_weight=1.5, gather=gather)
    loss.backward()
    return {"loss": loss.detach(), "raw": raw.grad, "background": None if seen is None else seen.grad, "layer": layer.grad}


def one_process(rank, folder):
    found = {name: one_case(*data, gather=True) for name, *data in share_of(rank)}
    rows = torch.full((rank, 2), float(rank), requires_grad=True)
    everything = gathered(rows)
    (everything * (rank + 1)).sum().backward()
    found["rows"] = everything.detach(), rows.grad, gathered(torch.arange(3 - rank)), gathered(torch.zeros(0, 4))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_two_processes(one_process, tmp_path_factory.mktemp("gloo"))


class TestTwoProcesses:
    def test_equal_one_process(self, found):
        def check(value, wanted):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)

        for name, *data in whole():
            alone = one_case(*data, gather=False)
            first, second = found[0][name], found[1][name]
            check((first["loss"] + second["loss"]) / 2, alone["loss"])
            check((first["layer"] + second["layer"]) / 2, alone["layer"])
            check(torch.cat([first["raw"], second["raw"]]) / 2, alone["raw"])
            assert alone["raw"].abs().max() > 0.01
            if data[-1] is not None:
                check(torch.cat([first["background"], second["background"]]) / 2, alone["background"])
                assert alone["background"].abs().max() > 0.001

    def test_losses_differ_by_process(self, found):
        name = "several backgrounds each"
        assert (found[0][name]["loss"] - found[1][name]["loss"]).abs() > 0.01

    def test_rows_of_any_kind(self, found):
        for rank in (0, 1):
            everything, gradient, numbers, nothing = found[rank]["rows"]
            assert everything.tolist() == [[1, 1]] and numbers.tolist() == [0, 1, 2, 0, 1] and nothing.shape == (0, 4)
            assert gradient.shape == (rank, 2) and gradient.eq(3).all()


def test_gathered_alone():
    rows = torch.rand(3, 2, requires_grad=True)
    assert gathered(rows) is rows
    z = units(6, 2, 8)
    assert torch.equal(supcon_loss(z, LABELS, background=BACKGROUND, gather=True), supcon_loss(z, LABELS, background=BACKGROUND))


class TestAlarm:
    def test_rings_on_the_plateau_only(self):
        value = collapsed_value(128)
        assert collapse_alarm([value] * 99, 128) is None
        assert "6.920" in collapse_alarm([value] * 100, 128) and "learning rate" in collapse_alarm([value] * 100, 128)
        assert collapse_alarm([9.0] * 50 + [value + 0.03, value - 0.03] * 50, 128)
        assert collapse_alarm([value] * 500 + [value * 0.95] * 100, 128) is None
        assert collapse_alarm([value * 1.05] * 100, 128) is None
        assert collapse_alarm([math.nan] * 100, 128) is None
        assert collapse_alarm([], 128) is None

    def test_settings(self):
        hot = collapsed_value(512, 0.5, 0.1, background=30)
        assert hot == pytest.approx(5 * math.log(541))
        assert collapse_alarm(torch.full((8,), hot), 512, 0.5, 0.1, background=30, window=8)
        assert collapse_alarm([hot] * 8, 512, 0.5, 0.1, window=8, tolerance=0.001) is None
        assert collapse_alarm([0.95 * hot] * 8, 512, 0.5, 0.1, background=30, window=8, tolerance=0.06)

    def test_errors(self):
        for wrong in (dict(views=1), dict(views=128, temperature=0), dict(views=128, background=-1), dict(views=128, window=0)):
            with pytest.raises(ValueError, match="must be"):
                collapse_alarm([1.0], **wrong)


class TestEdda:
    odds = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    labels = torch.tensor([0, 2])

    def test_targets(self):
        def check(found, wanted):
            torch.testing.assert_close(found, torch.tensor(wanted))

        check(drop_targets(self.labels, 4), [[0.25] * 4] * 2)
        check(drop_targets(self.labels, 3, "share"), [[0, 0.5, 0.5], [0.5, 0.5, 0]])
        check(drop_targets(self.labels, 3, "share", 0.8), [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
        check(drop_targets(self.labels, 3, "share", 1), [[1., 0, 0], [0, 0, 1]])
        check(drop_targets(self.labels, 3, "extra"), [[0., 0, 0, 1]] * 2)
        for kind in DROP_TARGETS:
            torch.testing.assert_close(drop_targets(torch.arange(7), 7, kind).sum(1), torch.ones(7))

    @pytest.mark.parametrize(("options", "hidden"), [
        ({}, -(math.log(0.5 * 0.3 * 0.2) / 3 + math.log(0.1 * 0.6 * 0.3) / 3) / 2),
        (dict(drop_target="share"), -(math.log(0.3 * 0.2) / 2 + math.log(0.1 * 0.6) / 2) / 2),
        (dict(drop_target="share", p=0.4),
         -(0.4 * math.log(0.5) + 0.3 * math.log(0.3 * 0.2) + 0.4 * math.log(0.3) + 0.3 * math.log(0.1 * 0.6)) / 2)])
    def test_by_hand(self, options, hidden):
        even, shown = torch.zeros(2, 3), -math.log(0.5 * 0.3) / 2
        loss = edda_loss(even, self.odds, self.odds, self.labels, 0.5, 2.0, **options)
        assert loss.item() == pytest.approx(math.log(3) + 0.5 * shown + 2 * hidden, rel=1e-6)
        assert edda_loss(self.odds, None, None, self.labels, **options).item() == pytest.approx(shown, rel=1e-6)
        assert edda_loss(self.odds, None, self.odds, self.labels, **options).item() == pytest.approx(shown + hidden, rel=1e-6)

    def test_extra_class(self):
        labels = torch.tensor([0, 1])
        whole, keep = -math.log(0.5 * 0.6) / 2, math.log(3)
        loss = edda_loss(self.odds, torch.zeros(2, 3), self.odds, labels, drop_target="extra")
        assert loss.item() == pytest.approx(whole + keep - math.log(0.2 * 0.3) / 2, rel=1e-6)
        smooth = edda_loss(self.odds, None, None, labels, drop_target="extra", smoothing=0.5)
        wanted = -(0.75 * math.log(0.5 * 0.6) + 0.25 * math.log(0.3 * 0.1)) / 2
        assert smooth.item() == pytest.approx(wanted, rel=1e-6)

    def test_smoothing_is_pytorchs_and_spares_the_dropped(self):
        logits = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0, 4, 2, 2, 1, 3])
        found = edda_loss(*logits, labels, 0.7, 1.3, smoothing=0.2)
        wanted = (F.cross_entropy(logits[0], labels, label_smoothing=0.2) + 0.7 * F.cross_entropy(logits[1], labels, label_smoothing=0.2)
                  - 1.3 * logits[2].log_softmax(1).mean())
        torch.testing.assert_close(found, wanted)

    def test_the_dropped_image_settles_at_its_target(self):
        for kind, p in (("uniform", 0.0), ("share", 0.4), ("extra", 0.0)):
            drop = drop_targets(self.labels, 3, kind, p).clamp_min(1e-30).log().requires_grad_()
            loss = edda_loss(torch.zeros_like(drop), None, drop, self.labels, drop_target=kind, p=p)
            torch.testing.assert_close(gradients(loss, drop)[0], torch.zeros_like(drop), rtol=0, atol=1e-6)

    def test_weights_of_zero_leave_the_whole_image(self):
        alone = edda_loss(self.odds, self.odds + 1, self.odds * 2, self.labels, keep_weight=0, drop_weight=0)
        torch.testing.assert_close(alone, F.cross_entropy(self.odds, self.labels))

    def test_gradcheck_and_half(self):
        logits = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64).requires_grad_() for i in range(3)]
        labels = torch.tensor([0, 1, 1])
        assert torch.autograd.gradcheck(lambda *parts: edda_loss(*parts, labels, 0.5, 2.0, "share", 0.2, 0.1), logits)
        assert torch.autograd.gradcheck(lambda *parts: edda_loss(*parts, labels, drop_target="extra"), logits)
        half = [part.detach().bfloat16() for part in logits]
        loss = edda_loss(*half, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, edda_loss(*[part.float() for part in half], labels))
        assert edda_loss(*[part * 1e4 for part in half], labels).isfinite()


Z = units(6, 2, 8)
NAN = Z.clone()
NAN[2, 1, 3] = math.nan


@pytest.mark.parametrize(("error", "match", "call"), [
    (ValueError, "N, V, D", lambda: supcon_loss(Z[:, 0], LABELS)),
    (ValueError, "empty", lambda: supcon_loss(Z[:0], LABELS[:0])),
    (TypeError, "floats", lambda: supcon_loss(Z.long(), LABELS)),
    (TypeError, "floats", lambda: supcon_loss(Z.tolist(), LABELS)),
    (ValueError, "one per image", lambda: supcon_loss(Z, LABELS[:5])),
    (ValueError, "one per image", lambda: supcon_loss(Z, LABELS[:, None])),
    (TypeError, "whole numbers", lambda: supcon_loss(Z, LABELS.float())),
    (TypeError, "whole numbers", lambda: supcon_loss(Z, LABELS.tolist())),
    (ValueError, "z holds NaN", lambda: supcon_loss(NAN, LABELS)),
    (ValueError, "z holds NaN", lambda: supcon_loss(Z * math.inf, LABELS)),
    (ValueError, "z must hold vectors of length 1.*normalize", lambda: supcon_loss(Z * 1.05, LABELS)),
    (ValueError, "length 1, these are 0 to 1", lambda: supcon_loss(Z * (LABELS > 0).view(6, 1, 1), LABELS)),
    (ValueError, "temperature must be above 0", lambda: supcon_loss(Z, LABELS, temperature=0)),
    (ValueError, "temperature must be above 0", lambda: supcon_loss(Z, LABELS, temperature=math.nan)),
    (ValueError, "base_temperature must be above 0", lambda: supcon_loss(Z, LABELS, base_temperature=-0.1)),
    (ValueError, "D of z, 8", lambda: supcon_loss(Z, LABELS, background=BACKGROUND[:, :7])),
    (ValueError, "background must be", lambda: supcon_loss(Z, LABELS, background=BACKGROUND[0])),
    (ValueError, "background holds NaN", lambda: supcon_loss(Z, LABELS, background=NAN[2])),
    (ValueError, "background must hold vectors of length 1", lambda: supcon_loss(Z, LABELS, background=2 * BACKGROUND)),
    (ValueError, "background_weight must be at least 0", lambda: supcon_loss(Z, LABELS, background_weight=-1)),
    (ValueError, "background_weight must be at least 0", lambda: supcon_loss(Z, LABELS, background_weight=math.inf)),
    (ValueError, "at least 2", lambda: collapsed_value(1)),
    (ValueError, "p must lie", lambda: drop_targets(LABELS, 8, "share", 1.1)),
    (ValueError, "p must lie", lambda: drop_targets(LABELS, 8, "share", -0.1)),
    (ValueError, "be 0 for the others", lambda: drop_targets(LABELS, 8, "uniform", 0.5)),
    (ValueError, "uniform, share, extra", lambda: drop_targets(LABELS, 8, "even")),
    (ValueError, "0 to 6", lambda: drop_targets(LABELS, 7)),
    (ValueError, "go from -1", lambda: drop_targets(LABELS - 1, 8)),
    (ValueError, "at least 2 classes", lambda: drop_targets(LABELS * 0, 1)),
    (ValueError, r"K \+ 1", lambda: edda_loss(torch.zeros(6, 8), None, None, LABELS, drop_target="extra")),
    (ValueError, r"K \+ 1", lambda: edda_loss(torch.zeros(6, 2), None, None, LABELS * 0, drop_target="extra")),
    (ValueError, "0 to 6", lambda: edda_loss(torch.zeros(6, 7), None, None, LABELS)),
    (ValueError, "keep must have the shape", lambda: edda_loss(torch.zeros(6, 8), torch.zeros(6, 9), None, LABELS)),
    (ValueError, "drop must have the shape", lambda: edda_loss(torch.zeros(6, 8), None, torch.zeros(5, 8), LABELS)),
    (ValueError, "N, K", lambda: edda_loss(torch.zeros(6), None, None, LABELS)),
    (ValueError, "empty", lambda: edda_loss(torch.zeros(0, 8), None, None, LABELS[:0])),
    (ValueError, "one per image", lambda: edda_loss(torch.zeros(6, 8), None, None, LABELS[:3])),
    (ValueError, "keep_weight", lambda: edda_loss(torch.zeros(6, 8), None, None, LABELS, keep_weight=-1)),
    (ValueError, "drop_weight", lambda: edda_loss(torch.zeros(6, 8), None, None, LABELS, drop_weight=math.nan)),
    (ValueError, "smoothing", lambda: edda_loss(torch.zeros(6, 8), None, None, LABELS, smoothing=1.5)),
    (TypeError, "floats", lambda: edda_loss(None, None, None, LABELS)),
])
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_collapsed_value_needs_positive_temperatures():
    for options in ({"base_temperature": -0.07}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            collapsed_value(8, **options)


def test_how_near_is_collapsed():
    value = collapsed_value(128)
    assert collapse_alarm([0.991 * value] * 100, 128) and collapse_alarm([1.009 * value] * 100, 128)
    assert collapse_alarm([0.988 * value] * 100, 128) is None is collapse_alarm([1.012 * value] * 100, 128)
    assert collapse_alarm([value] * 99, 128) is None


class TestSeveralClasses:
    "EDDA where an image shows several classes: loops, gradients, precision, and what makes no sense"
    SHOWN = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    EXPLAINED = torch.tensor([2, 1, 3])

    @staticmethod
    def answers(seed):
        return 2 * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @staticmethod
    def in_loops(logits, keep, drop, shown, explained, keep_weight=1.0, drop_weight=1.0, smoothing=0.0):
        def pays(logit, target, s=0.0):
            target, p = target * (1 - s) + s / 2, 1 / (1 + math.exp(-logit))
            return -target * math.log(p) - (1 - target) * math.log(1 - p)
        total = 0
        for i, row in enumerate(shown.tolist()):
            c = explained[i].item()
            total += sum(pays(logits[i, k].item(), y, smoothing) for k, y in enumerate(row)) / len(row)
            counted = [k for k, y in enumerate(row) if k == c or not y]
            total += keep_weight * sum(pays(keep[i, k].item(), k == c, smoothing) for k in counted) / len(counted)
            total += drop_weight * sum(pays(drop[i, k].item(), y and k != c) for k, y in enumerate(row)) / len(row)
        return total / len(shown)

    @pytest.mark.parametrize("options", [{}, dict(keep_weight=0.3, drop_weight=2.0), dict(smoothing=0.2)])
    def test_equals_loops(self, options):
        parts = [self.answers(seed) for seed in range(3)]
        found = edda_loss_of_several(*parts, self.SHOWN, self.EXPLAINED, **options)
        assert found.item() == pytest.approx(self.in_loops(*parts, self.SHOWN, self.EXPLAINED, **options), rel=1e-12)
        alone = edda_loss_of_several(parts[0], None, None, self.SHOWN, self.EXPLAINED, **options)
        assert torch.equal(alone, classification_loss(parts[0], self.SHOWN, options.get("smoothing", 0.0)))

    def test_other_classes_of_the_image_do_not_count_in_what_is_kept(self):
        keep = self.answers(1).requires_grad_()
        loss = edda_loss_of_several(self.answers(0), keep, None, self.SHOWN, self.EXPLAINED)
        [slope] = gradients(loss, keep)
        assert (slope == 0).tolist() == [[True, False, False, False], [False] * 4, [True, True, True, False]]

    def test_gradcheck_and_half(self):
        parts = [self.answers(seed).requires_grad_() for seed in range(3)]
        assert torch.autograd.gradcheck(lambda *given: edda_loss_of_several(*given, self.SHOWN, self.EXPLAINED), parts)
        half = [part.detach().bfloat16() for part in parts]
        whole = edda_loss_of_several(*(part.float() for part in half), self.SHOWN, self.EXPLAINED)
        assert torch.equal(edda_loss_of_several(*half, self.SHOWN, self.EXPLAINED), whole)

    def test_the_highest_class_is_one_of_those_shown(self):
        logits = torch.tensor([[0., 3, 1, 2], [0, 3, 1, 2], [0, 3, 1, 2]])
        assert is_right(logits, self.SHOWN).tolist() == [False, True, True]
        assert is_right(logits, torch.tensor([1, 3, 1])).tolist() == [True, False, True]

    @pytest.mark.parametrize("change, message", [
        (dict(labels=torch.tensor([2, 1, 3])), "0 and 1 in the shape of logits"), (dict(labels=2 * SHOWN), "0 and 1"),
        (dict(explained=torch.tensor([1, 1, 3])), "none of those that its image shows"), (dict(explained=torch.tensor([1, 1])), "one per image"),
        (dict(keep_weight=-1.0), "keep_weight"), (dict(smoothing=2), "smoothing"), (dict(drop=torch.zeros(3, 5)), "drop must have the shape")])
    def test_bad_input(self, change, message):
        given = dict(logits=torch.zeros(3, 4), keep=None, drop=None, labels=self.SHOWN, explained=self.EXPLAINED) | change
        with pytest.raises(ValueError, match=message):
            edda_loss_of_several(**given)
