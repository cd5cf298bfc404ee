"""Attacks: a linear model by hand, the ball, captum and a slow loop; nothing is left behind; bad input."""

import pytest
import torch
from captum import robust
from helpers import rand
from torch import nn
from torch.nn import functional as F

from xai_companion.data.synthetic import Synthetic
from xai_companion.explain.contract import assert_untouched, footprint
from xai_companion.metrics import attacked_logits, fgsm, pgd
from xai_companion.models import Normalized, load_model

EPS = 8 / 255
ATTACKS = pytest.mark.parametrize("attack", [fgsm, pgd])


@pytest.fixture
def model():
    "A small smooth network with batch norm and dropout, in training mode"
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                            nn.Dropout(), nn.Linear(32, 5))
    with torch.no_grad():
        network(rand(16, 3, 9, 8))
        network[6].weight *= 10
    return Normalized(network, (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)).train()


@pytest.fixture
def images():
    return rand(6, 3, 9, 8, seed=1)


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def losses(model, images, labels):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(images), labels, reduction="none")


def linear_model(*weights):
    "Logits (weights . x, 0)"
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weights), 2, bias=False))
    model[1].weight.data = torch.tensor([weights, [0.0] * len(weights)])
    return model


def same(a, b, share=0.005):
    "Equal but for values whose slope is a rounding error"
    assert a.shape == b.shape and ((a - b).abs() > 1e-5).double().mean() < share


class TestByHand:
    x = torch.tensor([0.5, 0.5, 0.0, 1.0, 0.5]).reshape(1, 1, 1, 5)

    def test_fgsm(self):
        model = linear_model(3.0, -0.001, 2.0, -50.0, 0.0)  # at an edge of [0, 1] only the way inside is open
        for label, wanted in ((0, [0.4, 0.6, 0.0, 1.0, 0.5]), (1, [0.6, 0.4, 0.1, 0.9, 0.5])):
            torch.testing.assert_close(fgsm(model, self.x, label, 0.1).flatten(), torch.tensor(wanted))

    def test_pgd_finds_the_corner(self):
        model = linear_model(3.0, -0.001, 2.0, -50.0, 1.0)
        for seed in range(3):
            torch.testing.assert_close(pgd(model, self.x, [0], 0.1, seed=seed).flatten(), torch.tensor([0.4, 0.6, 0.0, 1.0, 0.4]))

    def test_pgd_start_and_step(self):
        model = linear_model(0.0, 0.0, 0.0, 0.0, 1.0)  # looks at one value; the others stay where they started
        start = self.x + 0.2 * (2 * rand(1, 1, 5, seed=7) - 1)
        wanted = start.clamp(0, 1).flatten()
        wanted[4] = max(wanted[4] - 2 * 0.03, 0.3)
        torch.testing.assert_close(pgd(model, self.x, 0, 0.2, steps=2, step_size=0.03, seed=7).flatten(), wanted)

    def test_default_step(self, model, images):
        assert torch.equal(pgd(model, images, LABELS, EPS, steps=5), pgd(model, images, LABELS, EPS, steps=5, step_size=EPS / 2))


@ATTACKS
@pytest.mark.parametrize("eps", [1 / 255, 0.1, 1.0])
def test_stays_in_the_ball_and_in_range(model, images, attack, eps):
    images[0], images[1] = 0, 1
    attacked = attack(model, images, LABELS, eps)
    assert (attacked - images).abs().max() <= eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert (attacked - images).abs().max() > 0.9 * eps


@ATTACKS
def test_zero_changes_nothing(model, images, attack):
    attacked = attack(model, images, LABELS, 0)
    assert torch.equal(attacked, images) and attacked.data_ptr() != images.data_ptr()


@pytest.fixture(scope="module")
def creatures():
    drawn = Synthetic("test", 24, size=48).batch(range(24))
    return load_model("plain_cnn"), drawn.image, drawn.label


def test_pgd_is_stronger_than_fgsm_is_stronger_than_noise(creatures):
    model, images, labels = creatures
    eps = 4 / 255
    noise = (images + eps * (2 * rand(*images.shape) - 1).sign()).clamp(0, 1)
    means = [losses(model, x, labels).mean() for x in (images, noise, fgsm(model, images, labels, eps), pgd(model, images, labels, eps, steps=10))]
    assert means[0] < means[2] and means[1] + 0.5 < means[2] < means[3]


def test_more_steps_climb_higher(model, images):
    few, many = (losses(model, pgd(model, images, LABELS, 0.1, steps=n), LABELS).mean() for n in (2, 20))
    assert losses(model, images, LABELS).mean() < few <= many


class TestParity:
    def test_slow_loop(self, model, images):
        steps, step_size = 4, 0.01
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(3)) * 2 - 1
        fast = pgd(model, images, LABELS, EPS, steps=steps, step_size=step_size, seed=3)
        model.eval()
        for image, label, wanted in zip(images, LABELS, fast, strict=True):
            x = (image + EPS * noise).clamp(0, 1)
            for _ in range(steps):
                x = x.detach().requires_grad_()
                (-model(x[None]).log_softmax(1)[0, label]).backward()
                x = torch.minimum(torch.maximum(x + step_size * x.grad.sign(), image - EPS), image + EPS).clamp(0, 1)
            same(x, wanted)

    def captum(self, attack, model, threshold=0):
        attack = attack(model.eval(), nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
        getattr(attack, "fgsm", attack).zero_thresh = threshold  # by default, slopes below 1e-6 count as none
        return attack

    def test_captum_fgsm(self, model, images):
        theirs = self.captum(robust.FGSM, model).perturb(images.clone().requires_grad_(), EPS, LABELS)
        same(fgsm(model, images, LABELS, EPS), theirs)

    @pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
    def test_captum_pgd(self, model, images):
        theirs = self.captum(robust.PGD, model)
        offset = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
        theirs._random_point = lambda center, *_: (center + EPS * offset).requires_grad_()
        theirs.bound = lambda x: x.clamp(0, 1).detach().requires_grad_()
        wanted = theirs.perturb(images.clone().requires_grad_(), EPS, EPS / 4, 10, LABELS, random_start=True)
        same(pgd(model, images, LABELS, EPS, steps=10), wanted.detach())


@ATTACKS
def test_batch_mates_do_not_matter(model, images, attack):
    together = attack(model, images, LABELS, EPS)
    same(together, torch.cat([attack(model, images[i:i + 1], LABELS[i:i + 1], EPS) for i in range(6)]))
    same(together.flip(0), attack(model, images.flip(0), LABELS.flip(0), EPS))


@ATTACKS
def test_leaves_no_trace(model, images, attack):
    model.network[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.network[0].weight.requires_grad_(False)
    before = footprint(model, images)
    attacked = attack(model, images, LABELS, EPS)
    assert_untouched(before, footprint(model, images), "after an attack")
    assert not attacked.requires_grad


@ATTACKS
def test_surroundings(model, images, attack):
    wanted = attack(model, images, LABELS, EPS)
    model.requires_grad_(False)
    with torch.no_grad():
        same(attack(model, images.requires_grad_(), LABELS, EPS), wanted)
    with torch.inference_mode():
        same(attack(model, images.detach().clone(), LABELS.clone(), EPS), wanted)
    same(attack(model.double(), images.detach().double(), LABELS.tolist(), EPS).float(), wanted)


def test_trained_in_bfloat16(model, images):
    attacked = fgsm(model.to(torch.bfloat16), images.to(torch.bfloat16), LABELS, EPS)
    assert attacked.dtype == torch.bfloat16 and (attacked.float() - images).abs().max() < EPS + 0.01


def test_seed(model, images):
    first = pgd(model, images, LABELS, EPS, steps=2)
    torch.manual_seed(5)
    assert torch.equal(first, pgd(model, images, LABELS, EPS, steps=2))
    assert not torch.equal(first, pgd(model, images, LABELS, EPS, steps=2, seed=1))


class TestAttackedLogits:
    def test_values(self, model, images):
        logits = attacked_logits(model, images, LABELS, eps=EPS)
        assert model.training and not logits.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(logits, model.eval()(fgsm(model, images, LABELS, EPS)))

    def test_chunks_and_options(self, model, images):
        whole = attacked_logits(model, images, LABELS, pgd, EPS, steps=3, seed=2)
        for chunk in (1, 4):
            torch.testing.assert_close(attacked_logits(model, images, LABELS, pgd, EPS, chunk, steps=3, seed=2), whole, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(whole, model.eval()(pgd(model, images, LABELS, EPS, steps=3, seed=2)), atol=1e-5, rtol=1e-5)

    def test_accuracy_falls(self, creatures):
        model, images, labels = creatures
        clean, attacked = ((attacked_logits(model, images, labels, eps=eps).argmax(1) == labels) for eps in (0, EPS))
        assert clean.float().mean() > 0.8 and attacked.float().mean() < 0.5

    def test_labels(self, model, images):
        for labels in (0, LABELS[:5], LABELS[:, None]):
            with pytest.raises(ValueError, match=r"labels must be \(6,\)"):
                attacked_logits(model, images, labels)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().mean((2, 3))


class Nan(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * float("nan")


@ATTACKS
class TestBadInput:
    def bad(self, error, words, attack, *args, **options):
        with pytest.raises(error, match=words):
            attack(*args, **options)

    def test_images(self, model, images, attack):
        self.bad(TypeError, r"uint8: divide by 255", attack, model, (images * 255).byte(), LABELS, EPS)
        self.bad(ValueError, r"\[0, 1\]", attack, model, images * 2, LABELS, EPS)
        self.bad(ValueError, "NaN", attack, model, images * float("nan"), LABELS, EPS)
        self.bad(ValueError, "empty", attack, model, images[:0], LABELS[:0], EPS)
        self.bad(ValueError, "3 channels", attack, model, images[:, :1], LABELS, EPS)
        self.bad(TypeError, "use images.to", attack, model, images.double(), LABELS, EPS)

    def test_labels(self, model, images, attack):
        self.bad(ValueError, "classes 0 to 4", attack, model, images, 5, EPS)
        self.bad(ValueError, "6 images", attack, model, images, LABELS[:2], EPS)
        self.bad(TypeError, "float", attack, model, images, LABELS.float(), EPS)

    @pytest.mark.parametrize("eps", [8, 1.01, -0.1, float("nan"), "4/255", None, torch.tensor(0.1)])
    def test_eps(self, model, images, attack, eps):
        self.bad(ValueError, r"eps must be a number in \[0, 1\].*eps=4/255", attack, model, images, LABELS, eps)

    def test_models(self, model, images, attack):
        self.bad(RuntimeError, "no gradient", attack, Detached(), images, 0, EPS)
        self.bad(ValueError, "NaN or infinite", attack, Nan(), images, 0, EPS)
        self.bad(ValueError, "not logits", attack, nn.Conv2d(3, 2, 3), images, 0, EPS)
        model.train()
        with pytest.raises(ValueError):
            attack(model, images, 5, EPS)
        assert model.training


def test_bad_steps(model, images):
    for options, words in (({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"), ({"step_size": 3}, "step_size"), ({"step_size": -0.1}, "step_size")):
        with pytest.raises(ValueError, match=words):
            pgd(model, images, LABELS, EPS, **options)


@ATTACKS
def test_an_attack_needs_the_true_classes(attack):
    with pytest.raises(ValueError, match="labels are needed, the true class of each image"):
        attack(load_model("plain_cnn"), torch.rand(1, 3, 64, 64), None, 4 / 255)


@ATTACKS
def test_a_model_with_one_output_is_refused(attack):
    "Its cross-entropy is always 0, so it would look as if no attack could do anything"
    with pytest.raises(ValueError, match="one output"):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), rand(2, 3, 2, 2), 0, EPS)
