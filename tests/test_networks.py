"""The two packaged networks: what they know, what is in their files, and wishes that they cannot fulfil."""
import tomllib
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from xai_companion.models import conv_blocks, load_model
from xai_companion.networks import TRAINED
from xai_companion.train import (
    loss_and_accuracy,
    to_tensors,
)


@pytest.mark.parametrize("name", TRAINED)
def test_packaged_network(name):
    from xai_companion.data.synthetic import CLASSES, Synthetic
    model = load_model(name)
    assert model.classes == CLASSES and model.input_size == 64 and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), load_model(name, "pretrained", 20).state_dict().values(),
                                                 strict=True))
    images, labels = to_tensors(Synthetic("test", n=200), 64)
    assert loss_and_accuracy(model, images, labels)[1] >= 0.9
    assert [len(conv_blocks(model, size)) for size in (64, 32)] == [3, 3]


@pytest.mark.parametrize("name", TRAINED)
def test_packaged_file(name):
    import xai_companion
    file = Path(xai_companion.__file__).parent / "weights" / f"{name}.pt"
    stored = torch.load(file, weights_only=True)
    assert file.stat().st_size < 1_000_000 and set(stored) == {"state_dict", "meta"}
    assert all(t.dtype == torch.float32 or t.dtype == torch.int64 for t in stored["state_dict"].values())
    assert 0.9 <= stored["meta"]["test_accuracy"] < 1 and stored["meta"]["model"] == name
    assert "/" not in stored["meta"]["command"] and " train n=10000 size=64 seed=0" in stored["meta"]["config"]["fingerprint"]


def test_the_weights_are_package_data():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "weights/*.pt" in project["tool"]["setuptools"]["package-data"]["xai_companion"]


@pytest.mark.parametrize("options, words", [
    (dict(weights="imagenet"), "no weights called 'imagenet': use 'pretrained'"),
    (dict(num_classes=10), "20 classes, not 10"),
    (dict(weights="IMAGENET1K_V1"), "no weights called"),
])
def test_wishes_that_the_packaged_networks_cannot_fulfil(options, words):
    with pytest.raises(ValueError, match=words):
        load_model("plain_cnn", **options)


def test_random_weights_of_small_networks():
    for name in TRAINED:
        model = load_model(name, weights=None, num_classes=7)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7) and model.classes is None
        assert load_model(name, weights=None).fc.out_features == 20
        assert sum(t.numel() * 4 for t in model.parameters()) < 1_000_000
