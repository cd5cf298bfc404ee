"""The contract on every registered explainer, whatever registers it."""
import pytest
import torch

from xai_companion.data.photos import photos
from xai_companion.explain import EXPLAINERS, explain
from xai_companion.explain.contract import PROMISES, check_explainer
from xai_companion.models import load_model

CHEAP = {
    "integrated_gradcam": {"steps": 4}, "integrated_gradients": {"steps": 5}, "smoothgrad": {"samples": 3},
    "shapley": {"samples": 2, "cells": 3}, "occlusion": {"cells": 3},
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


def test_options_must_make_sense():
    model, images = load_model(), photos()[:1]
    for name, option in (("occlusion", "cells"), ("smoothgrad", "samples"), ("shapley", "cells"), ("integrated_gradients", "steps"),
                         ("integrated_gradcam", "steps"), ("integrated_gradcam", "chunk")):
        with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, got 0"):
            explain(model, images, name, **{option: 0})
    with pytest.raises(TypeError, match="find_class"):
        explain(model, images, target="tabby")
