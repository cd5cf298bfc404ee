"""The findings of an audit, from tables by hand: intervals, orders, calibration, sentences."""

import math

import pytest
import torch
from scripted import NAMES, facts_of

from xai_companion import findings as find


@pytest.mark.parametrize("yes, n", [(0, 9), (4, 7), (1, 1), (199, 200), (200, 200)])
def test_the_interval_of_a_share_is_wilsons(yes, n):
    from scipy.stats import binomtest
    known = binomtest(yes, n).proportion_ci(method="wilson")
    assert find.share_interval(yes, n) == pytest.approx((yes / n, known.low, known.high), abs=1e-6)


def test_the_interval_of_a_mean():
    from scipy.stats import t
    values = [0.5, 0.75, 1.0, None]
    half = t.ppf(0.975, 2) * 0.25 / math.sqrt(3)
    assert find.estimate(values) == pytest.approx({"value": 0.75, "low": 0.75 - half, "high": 1.0, "n": 3})  # a share ends at 1
    assert find.estimate([v and v + 1 for v in values])["high"] == pytest.approx(1.75 + half)
    assert find.estimate([0.3]) == {"value": 0.3, "low": None, "high": None, "n": 1} and find.estimate([None])["n"] == 0
    assert find.estimate([True, False, True])["high"] == find.share_interval(2, 3)[2]


def test_the_order_of_the_classes():
    "The lowest accuracy first; of equal ones that with more images"
    facts = facts_of((0, 0, 0.5), (1, 0, 0.6), (2, 2, 0.7), (2, 0, 0.8), (3, 3, 0.9), (3, 3, 0.7), (3, 1, 0.2), (3, 1, 0.6), (4, 1, 0.9), (4, 1, 0.9))
    found = find.per_class(facts)
    assert found.label.tolist() == [4, 1, 3, 2, 0] and found.n.tolist() == [2, 1, 4, 2, 1] and found.right.tolist() == [0, 0, 2, 1, 1]
    assert found.confidence.tolist() == pytest.approx([0.9, 0.6, 0.6, 0.75, 0.5])


def test_the_order_of_the_confusions():
    "The most frequent first; of equal ones that of the smaller class, which is the larger share of it"
    facts = facts_of(*[(0, 1, 0.5)] * 2, *[(0, 0, 0.5)] * 3, *[(1, 0, 0.5)] * 2, (2, 1, 0.5), (2, 0, 0.5), *[(3, 0, 0.4)] * 3)
    assert find.confusions(facts).values.tolist() == [[3, 0, 3, 3], [1, 0, 2, 2], [0, 1, 2, 5], [2, 0, 1, 2], [2, 1, 1, 2]]


def test_confident_errors_are_of_different_confusions_first():
    "With the surest right prediction of the same class, if it has one"
    wrong = [(0, 1, c) for c in (0.99, 0.98, 0.97, 0.96, 0.95)] + [(0, 2, 0.6), (1, 2, 0.5), (2, 0, 0.4)]
    facts = facts_of(*wrong, (0, 0, 0.7), (0, 0, 0.8), (1, 1, 0.9))
    assert find.side_by_side(facts) == [(0, 9), (1, 9), (2, 9), (5, 9), (6, 10), (7, None)]
    assert [(pair["label"], pair["predicted"], some) for pair, some in find.examples(facts, pairs=2)] == [(0, 1, [0, 1]), (2, 0, [7])]
    assert [len(some) for _, some in find.examples(facts_of(*wrong, (3, 1, 0.1), (3, 2, 0.1)))] == [2, 1, 1, 1]


def test_maps_beside_the_object_come_first():
    facts = facts_of((0, 0, 0.5, 0.5, 0.5), (0, 0, 0.5, 0.2, 0.5), (0, 1, 0.5, None, None), (1, 0, 0.5, 0.3, 0.5), (1, 1, 0.5, 0.9, 0.5))
    assert find.outside(facts) == [1, 3, 0, 4] and find.outside(facts, 1) == [1] and find.outside(facts_of((0, 0, 0.5))) == []
    assert "On 2 of 4 images the object gets less" in find.first_look(facts, NAMES)[-2]
    assert "On average 53 % of the explanation lies on the object for right predictions (n = 3), 30 % for wrong ones (n = 1)" in \
        find.first_look(facts, NAMES)[-2]


def test_a_temperature_needs_errors_to_learn_from():
    "In the half of the images that it is fitted on"
    logits = torch.tensor([[2.0, 0.0]]).repeat(41, 1)
    labels = torch.zeros(41).long()
    labels[30:] = 1  # all errors are in the other half
    assert "has no error" in find.calibration(logits, labels)["why"]
    found = find.calibration(logits, labels.flip(0))
    assert (found["n_fit"], found["n_test"]) == (20, 21) and found["before"] < found["after"]
    assert "40 images or more, there are 39" in find.calibration(logits[:39], labels[:39])["why"]
    assert "why" not in find.calibration(logits[:40], labels.flip(0)[:40])


@pytest.mark.parametrize("rows, sentence", [
    ([(0, 1, 0.9), (0, 0, 0.95), (1, 0, 0.89)], "2 of 3 predictions are wrong, 1 of them with a confidence of 90 % or more."),
    ([(0, 1, 0.5), (0, 0, 0.95)], "1 of 2 predictions is wrong, none of them"),
    ([(0, 0, 0.5)] * 10, "All 10 predictions are right. Even so, up to 27.8 % of such images"),  # z**2 / (10 + z**2)
    ([(0, 1, 0.9), (0, 1, 0.8)] * 5, "On average the model is 85.0 points more confident than it is right (95 % interval 81.2 to 88.8, n = 10)."),
    ([(0, 0, 0.9), (0, 0, 0.8)] * 5, "On average the model is 15.0 points less confident than it is right (95 % interval 11.2 to 18.8, n = 10)."),
    ([(0, 0, 0.9), (0, 1, 0.3)], "On average, confidence and accuracy differ by 10.0 points, which may be chance (n = 2)."),
    ([(0, 0, 0.9)], "On average, confidence and accuracy differ by 10.0 points, which may be chance (n = 1)."),
    ([(0, 1, 0.9), (0, 1, 0.8), (0, 0, 0.7), (1, 0, 0.6), (1, 1, 0.5)], "The weakest class is ant: 1 of 3 right."),
    ([(0, 1, 0.9), (0, 1, 0.8), (0, 0, 0.7), (1, 0, 0.6), (1, 1, 0.5)], "The most frequent confusion: 2 of 3 images of ant are taken for bee."),
    ([(0, 0, 0.9)], "25 % of the confidence is lost on average (Drop, n = 1)"),
])
def test_sentences(rows, sentence):
    assert sentence in " ".join(find.first_look(facts_of(*rows), NAMES))


def test_one_error_makes_no_weakest_class():
    said = " ".join(find.first_look(facts_of((0, 1, 0.9), (0, 0, 0.8), (1, 1, 0.7)), NAMES))
    assert "weakest" not in said and "most frequent" not in said
    few = [(0, 1, 0.5)] + [(1, 1, 0.5)] * 8 + [(1, 0, 0.5)] * 12  # one wrong of one may be chance, twelve of twenty are not
    assert "The weakest class is bee: 8 of 20 right." in find.first_look(facts_of(*few), NAMES)
