"""The contract on every registered explainer, whatever registers it."""
import pytest

import xai_companion.explain  # noqa: F401  (registers the explainers)
from xai_companion.explain.base import EXPLAINERS
from xai_companion.explain.contract import PROMISES, check_explainer

CHEAP = {
    "integrated_gradcam": {"steps": 4}, "integrated_gradients": {"steps": 5}, "smoothgrad": {"samples": 3},
    "shapley": {"samples": 2, "cells": 3}, "occlusion": {"cells": 3},
}


@pytest.mark.parametrize("name", sorted(EXPLAINERS))
def test_contract(name):
    assert check_explainer(EXPLAINERS[name], **CHEAP.get(name, {})) == list(PROMISES)
