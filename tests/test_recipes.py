"""The recipes in the loop: every one trains, resumes with the same bits, leaves no trace of its explanations, and agrees over processes."""
import math
import os
import shutil
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from helpers import in_two_processes, same, three_loops
from torch import nn

from xai_companion.data.loader import epoch_order
from xai_companion.explain import EXPLAINERS, GradCAM
from xai_companion.explain.contract import assert_untouched, footprint
from xai_companion.hooks import classifier_of
from xai_companion.models import load_model
from xai_companion.train import RECIPES, Batch, Config, Moment, fit, get_recipe
from xai_companion.train.files import COLUMNS
from xai_companion.train.loop import learning_rate, make_run
from xai_companion.train.losses import collapsed_value, supcon_loss
from xai_companion.train.processes import average_gradients
from xai_companion.train.published import PUBLISHED
from xai_companion.train.recipes import Views

NAMES = ("ce cutout random_occlusion edda edda_random_class supcon supcon_clean_view excon exconb excon_random_mask "
         "excon_random_class excon_accept_all").split()
CONTRASTIVE = [name for name in NAMES if name.startswith(("supcon", "excon"))]
EXPLAINING = [name for name in NAMES if name.startswith(("edda", "random", "excon"))]


def toy(count=48, classes=4, size=16, seed=0):
    "A bright square on noise, whose colour is the class"
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, size, size), generator=generator)
    labels = torch.arange(count) % classes
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
    images[:, :, 4:10, 4:10] = colours[labels][:, :, None, None]
    return images.byte(), labels


def net(classes=4, seed=0):
    "Two convolutions with batch norm, and a linear layer"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
                             nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


def config(name, **changes):
    options = {"start": 0.5, "fill": "black"} if name in EXPLAINING else {}
    return Config(**{"recipe": name, "model": "own", "size": 16, "epochs": 2, "batch": 16, "lr": 0.05,
                     "options": options | changes.pop("options", {}), **changes})


def batch_of(count=12):
    images, labels = toy(count)
    return Batch(images, labels, torch.arange(count))


def ready(name, model, **changes):
    recipe = get_recipe(name)(config(name, **changes))
    recipe.setup(model, 12)
    return recipe


def seeded_views(recipe, model, moment):
    return recipe.views(model, batch_of(), moment, torch.Generator().manual_seed(3))


LATE = {name: Moment("encoder" if name in CONTRASTIVE else "all", 3, 0.9) for name in NAMES}


def test_every_recipe_of_the_design_is_there():
    assert set(NAMES) <= set(RECIPES)


# ------------------------------------------------------------------ in the loop


def several(data):
    "The same images with rows of 0 and 1: their own class, and for every second image the next one"
    images, labels = data
    rows = nn.functional.one_hot(labels, 4)
    rows[::2] |= rows[::2].roll(1, 1)
    return images, rows


@pytest.mark.parametrize("name, rows", [(name, False) for name in NAMES] + [(name, True) for name in ("cutout", "edda", "edda_random_class")])
def test_stopped_and_continued_ends_with_the_same_bits(tmp_path, name, rows, monkeypatch):
    given = [several(data) if rows else data for data in (toy(), toy(12, seed=1))]
    whole = fit(config(name), *given, model=net(), folder=tmp_path / "whole")
    kind, left = RECIPES[name], [2]
    original = kind.loss

    def impatient(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self, *arguments)
    monkeypatch.setattr(kind, "loss", impatient)
    for steps in (2, 1, 2):
        left[0] = steps
        with pytest.raises(KeyboardInterrupt, match="stopped after step"):
            fit(config(name), *given, model=net(), folder=tmp_path / "parts", every=0.0)
    monkeypatch.setattr(kind, "loss", original)
    again = fit(config(name), *given, model=net(seed=7), folder=tmp_path / "parts")
    assert same(whole.model, again.model)
    if whole.recipe.head is not None:
        assert same(whole.recipe.head, again.recipe.head)
    a, b = (pd.read_csv(tmp_path / part / "log.csv").drop(columns="seconds") for part in ("whole", "parts"))
    assert a.equals(b) and list(a.columns) == [c for c in COLUMNS if c != "seconds"] + list(whole.recipe.notes)
    assert len(a) == 2 * len(whole.recipe.parts) and a.part.tolist() == list(whole.recipe.parts) * 2
    assert a.val_accuracy.notna().tolist() == [part == whole.recipe.parts[-1] for part in a.part]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name):
    run = fit(replace(config(name), epochs=30), toy(), toy(24, seed=1), model=net())
    assert run.log[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize("name", EXPLAINING)
def test_explanations_begin_at_start(name):
    run = fit(replace(config(name), epochs=4), toy(), model=net())
    column = [row[run.recipe.notes[0]] for row in run.log if row["part"] == run.recipe.parts[0]]
    assert column[:2] == [0, 0] and max(column[2:]) > 0


def test_kept_maps_resume(tmp_path):
    refreshed = config("edda", options={"start": 0.0, "refresh": 2}, dtype="float32")
    whole = fit(replace(refreshed, epochs=3), toy(50), model=net(), folder=tmp_path / "whole")
    for stop in (1, 4, 7):
        part = fit_until(replace(refreshed, epochs=3), stop, tmp_path / "parts")
        assert part.done == stop
    again = fit(replace(refreshed, epochs=3), toy(50), model=net(seed=3), folder=tmp_path / "parts")
    assert same(whole.model, again.model)


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_no_map_is_older_than_allowed(shares, refresh):
    "Each map says when it was taken. Of 50 images, an epoch leaves two out; and two processes have another share of them in each epoch"
    images, labels = toy(50)
    recipes = [ready("edda", net(), options={"start": 0.0, "refresh": refresh}, pad=0, flip=False) for _ in range(shares)]
    ages = []
    for recipe in recipes:
        recipe.setup(net(), 50)
    for epoch in range(20):
        for recipe in recipes:
            recipe.maps = lambda images, labels, now=epoch: torch.full((len(images), 1, 16, 16), now / 255)
        for part in epoch_order(50, 0, epoch)[:48].split(16):
            for rank, recipe in enumerate(recipes):
                mine = part[rank::shares]
                maps = recipe.explained(None, Batch(images[mine], labels[mine], mine), labels[mine], Moment(epoch=epoch), None)[1]
                ages += (epoch - maps[:, 0, 0, 0] * 255).round().tolist()
    assert max(ages) == refresh - 1 and min(ages) == 0 and len(ages) == 20 * 48


def fit_until(settings, stop, folder):
    "Train up to a step and save"
    from xai_companion.train import checkpoint, loop
    run = loop.make_run(settings, toy(50), None, net(), None, torch.device("cpu"))
    checkpoint.restore_run(run, folder)
    while run.done < stop:
        run.step()
        if run.ends_pass:
            run.close()
    checkpoint.save_run(run, folder)
    return run


# ------------------------------------------------------------------ explanations leave no trace


@pytest.mark.parametrize("name", EXPLAINING)
def test_views_leave_no_trace(name):
    model = net().train()
    recipe = ready(name, model)
    batch = batch_of()
    before = footprint(model, batch.images)
    views = recipe.views(model, batch, LATE[name], torch.Generator().manual_seed(3))
    assert_untouched(before, footprint(model, batch.images), f"after views of {name}")
    assert not views.images.requires_grad


@pytest.mark.parametrize("method", ["gradcam", "gradcampp", "saliency", "integrated_gradients", "deeplift", "sise"])
def test_any_explainer_will_do(method):
    assert method in EXPLAINERS
    model = load_model("plain_cnn", None, 4).train()
    recipe = get_recipe("edda")(Config(recipe="edda", size=16, options={"method": method, "start": 0.0}))
    recipe.setup(model, 12)
    views = recipe.views(model, batch_of(4), Moment(), torch.Generator().manual_seed(0))
    assert views.images.shape == (12, 3, 16, 16) and 0 < views.notes[0] < 1
    assert recipe.loss(model, views, Moment())[0].isfinite()


# ------------------------------------------------------------------ what the recipes say


def test_random_occlusion_hides_as_much_as_the_explanation():
    model = net().eval()
    shares = [seeded_views(ready(name, model), model, LATE[name]).notes[0] for name in ("edda", "random_occlusion")]
    assert torch.equal(*shares) and 0 < shares[0] < 1
    masks = [(seeded_views(ready(name, model), model, LATE[name]).images[24:] == 0).all(1) for name in ("edda", "random_occlusion")]
    assert not torch.equal(*masks)


@pytest.mark.parametrize("options, progress, share", [
    ({}, 0.5, 0.0), ({}, 0.6, 0.4), ({}, 0.75, 1.0), ({}, 0.9, 1.0), ({"ramp": 0.5}, 0.75, 0.5), ({"ramp": 0}, 0.5, 1.0)])
def test_the_weights_rise_after_the_start(options, progress, share):
    "Cross-entropy on the images as they are, and so much of the two further terms"
    model = net().train()
    recipe = ready("edda", model, options={"start": 0.5, "keep_weight": 0.5, "drop_weight": 2.0} | options)
    views = seeded_views(recipe, model, Moment(progress=progress))
    logits, keep, drop = model(views.images).chunk(3)
    whole = nn.functional.cross_entropy(logits, views.labels)
    kept = (nn.functional.cross_entropy(keep, views.labels, reduction="none") * views.counted).mean()
    dropped = -(drop.log_softmax(1).mean(1) * views.counted).mean()
    assert 0 < views.counted.sum() <= 12
    loss, _ = recipe.loss(model, views, Moment(progress=progress))
    torch.testing.assert_close(loss, whole + share * (0.5 * kept + 2.0 * dropped))


@pytest.mark.parametrize("name", ["edda", "random_occlusion", "edda_random_class"])
def test_an_image_whose_map_says_nothing_has_cross_entropy_only(name, monkeypatch):
    "Without a salient pixel the rest is the image itself: it must not be asked for no class and for its own"
    model = net().eval()
    recipe = ready(name, model)
    maps = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[:6] = 0
    monkeypatch.setattr(recipe, "maps", lambda images, targets: maps)
    views = seeded_views(recipe, model, LATE["edda"])
    assert views.counted.tolist() == [False] * 6 + [True] * 6
    assert torch.equal(views.images[24:30], views.images[:6]) and (views.images[12:18] == 0).all()
    whole, keep, drop = model(views.images).chunk(3)
    entropy = nn.functional.cross_entropy
    option = recipe.option
    expected = (entropy(whole, views.labels) + option["keep_weight"] * entropy(keep[6:], views.labels[6:]) / 2
                - option["drop_weight"] * drop[6:].log_softmax(1).mean() / 2)
    torch.testing.assert_close(recipe.loss(model, views, LATE["edda"])[0], expected)


def test_other_class_is_another_one():
    from xai_companion.train.edda import other_classes
    labels = torch.arange(4).repeat(100)
    others = other_classes(labels, 4, torch.Generator().manual_seed(0))
    assert (others != labels).all() and others.min() == 0 and others.max() == 3
    assert all(set(others[labels == k].tolist()) == set(range(4)) - {k} for k in range(4))


def test_the_random_class_is_none_that_the_image_shows():
    images, rows = several(toy())
    recipe, dice = ready("edda_random_class", net()), torch.Generator().manual_seed(0)
    found = torch.stack([recipe.targets(None, rows, dice) for _ in range(60)])
    assert (rows.gather(1, found.T) == 0).all() and [len(own.unique()) for own in found.T] == (4 - rows.sum(1)).tolist()


@pytest.mark.parametrize("change, message", [
    (dict(model=net(5)), "the model has 5 outputs, and the images 4 classes"), (dict(val=toy(12)), "show one class each, the validation images several"),
    (dict(train=(toy()[0], several(toy())[1].float())), "rows of 0 and 1"), (dict(train=(toy()[0], toy()[1][:, None])), r"labels\[:, 0\]")])
def test_labels_of_several_classes_that_do_not_fit(change, message):
    given = dict(train=several(toy()), model=net()) | change
    with pytest.raises(ValueError, match=message):
        fit(config("ce"), **given)


def test_of_several_classes_each_is_explained_in_its_turn():
    "In the loss it is the one whose map makes the masks, and never one that the image does not show"
    model, recipe = net(), ready("edda", net(), options={"start": 0.0})
    images, rows = several(toy())
    batch, asked = Batch(images, rows, torch.arange(len(rows))), []
    recipe.maps = lambda view, labels: asked.append(labels) or torch.rand(len(view), 1, *view.shape[2:])
    found = torch.stack([recipe.views(model, batch, Moment(progress=0.9), torch.Generator().manual_seed(i)).explained for i in range(40)])
    assert torch.equal(found, torch.stack(asked)) and (rows.gather(1, found.T) == 1).all()
    assert [len(own.unique()) for own in found.T] == rows.sum(1).tolist()


def test_the_further_class_is_never_explained():
    "With drop_target='extra' the last output is no class of the data: here the last of four"
    model = net()
    recipe = ready("edda_random_class", model, options={"drop_target": "extra"})
    targets = recipe.targets(model, torch.arange(3).repeat(100), torch.Generator().manual_seed(0))
    assert set(targets.tolist()) == {0, 1, 2}


def test_accepted_is_what_the_network_recognises():
    "Image by image: mask, ask, take the masked image or the second random view"
    model = fit(replace(config("ce"), epochs=10), toy(), model=net()).model.train()
    recipe = ready("excon", model)
    views = seeded_views(recipe, model, LATE["excon"])
    pair = recipe.augmented(batch_of().images, torch.Generator().manual_seed(3), "simclr", 2)
    masked = recipe.masked(model, batch_of(), None)
    model.eval()
    for i in range(12):
        right = model(masked[i:i + 1]).argmax() == batch_of().labels[i]
        torch.testing.assert_close(views.images[12 + i], masked[i] if right else pair[1][i])
    assert torch.equal(views.images[:12], pair[0])
    share = (model(masked).argmax(1) == batch_of().labels).float().mean()
    assert views.notes[0] == share


@pytest.mark.parametrize("released, weight", [(False, 1.0), (True, 2.0)])
def test_backgrounds_enter_the_denominator_only(released, weight):
    model = net().eval()
    recipe = ready("exconb", model, options={"as_released": released})
    views = seeded_views(recipe, model, LATE["exconb"])
    assert len(views.images) > 24
    loss, logits = recipe.loss(model, views, LATE["exconb"])
    features = model[:9](views.images)
    z = nn.functional.normalize(recipe.head(features), dim=1)
    expected = supcon_loss(torch.stack([z[:12], z[12:24]], 1), views.labels, background=z[24:], background_weight=weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, model(views.images)[:12])


def test_the_released_code_has_one_weight():
    for weight in (0.5, 1.0):
        with pytest.raises(ValueError, match="leave it out, or as_released"):
            Config(recipe="exconb", options={"as_released": True, "background_weight": weight})
    assert Config(recipe="exconb", options={"as_released": True, "background_weight": 2.0}).options["as_released"]


def test_edda_loss_of_a_step_by_hand():
    model = net().eval()
    recipe = ready("edda", model, options={"keep_weight": 0.5, "drop_weight": 2.0})
    views = seeded_views(recipe, model, LATE["edda"])
    whole, keep, drop = model(views.images).log_softmax(1).chunk(3)
    expected = 0
    for i, label in enumerate(views.labels):
        expected -= whole[i, label] / 12
        if (views.images[12 + i] != 0).any():  # something is salient
            expected -= (0.5 * keep[i, label] + 2 * drop[i].mean()) / 12
    torch.testing.assert_close(recipe.loss(model, views, LATE["edda"])[0], expected)


def test_a_further_class_for_what_shows_nothing():
    settings = Config(recipe="edda", size=16, epochs=2, batch=16, options={"drop_target": "extra", "start": 0.0})
    run = fit(settings, toy(), toy(12, seed=1), classes=list("abcd"))
    assert classifier_of(run.model)[1].out_features == 5 and run.model.classes == ["a", "b", "c", "d", "nothing"]
    with pytest.raises(ValueError, match="extra|K \\+ 1|logit"):
        fit(replace(settings, model="own"), toy(), model=net())


def test_smoothing_leaves_the_further_class_out_before_the_start_as_after_it():
    options, logits, labels = {"drop_target": "extra", "start": 0.5}, torch.tensor([[5.0, 0, 0, -20]]), torch.tensor([0])
    recipe = get_recipe("edda")(Config(recipe="edda", size=16, smoothing=0.1, options=options))
    early, late = (Moment("all", 0, progress) for progress in (0.2, 0.5))  # at 0.5 the other terms weigh nothing yet
    losses = [recipe.loss(lambda images: logits.repeat(len(images), 1), Views(torch.zeros(count, 3, 16, 16), labels), moment)[0]
              for count, moment in ((1, early), (3, late))]
    target = torch.tensor([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3, 0])
    assert losses[0].item() == pytest.approx(-(target * logits.log_softmax(1)).sum().item()) == pytest.approx(losses[1].item())


def test_excon_with_a_method_that_has_no_signed_maps():
    "Its own default asks for signed maps where there are some"
    model = net()
    for method, options in (("gradcam", {"signed": True}), ("sise", {}), ("rise", {})):
        recipe = get_recipe("excon")(Config(recipe="excon", size=16, options={"method": method, "fill": "black"}))
        assert recipe.option["explainer"] == options
        recipe.setup(model, 8)
    with pytest.raises(ValueError, match="'sise' has no ReLU to leave out"):
        Config(recipe="excon", options={"method": "sise", "explainer": {"signed": True}})


@pytest.mark.parametrize("staged", [False, True])
def test_parts_learn_apart(staged):
    run = fit(replace(config("supcon", options={"staged": staged}), epochs=2), toy(), toy(12, seed=1), model=net())
    parts = [row["part"] for row in run.log]
    assert parts == (["encoder"] * 2 + ["classifier"] * 2 if staged else ["encoder", "classifier"] * 2)
    from xai_companion.train import loop
    run = loop.make_run(config("supcon"), toy(), None, net(), None, torch.device("cpu"))
    weights = {"encoder": [*run.model[:9].parameters(), *run.recipe.head.parameters()], "classifier": list(run.model[9].parameters())}
    for _ in range(6):
        before = {part: [p.detach().clone() for p in ps] for part, ps in weights.items()}
        statistics, part = run.model[1].running_mean.clone(), run.now.part
        run.step()
        for own, ps in weights.items():
            assert all(torch.equal(a, b) for a, b in zip(before[own], ps, strict=True)) == (own != part)
        assert torch.equal(statistics, run.model[1].running_mean) == (part == "classifier")


@pytest.mark.parametrize("count", [1000, 40])  # images: a batch holds no more
@pytest.mark.parametrize("name, shares", [("supcon", {}), ("excon", {"accepted": 0.3, "backgrounds": 0.0}),
                                          ("exconb", {"accepted": 0.0, "backgrounds": 0.0}), ("exconb", {"accepted": 0.5, "backgrounds": 0.5})])
def test_collapse_is_measured_with_the_images_and_backgrounds_that_were_there(name, shares, count):
    "Before its start ExConB has none, and then the plateau is that of SupCon"
    recipe = get_recipe(name)(Config(recipe=name, size=16, batch=64, options={"fill": "black"} if name != "supcon" else {}))
    recipe.setup(net(), count)
    images = min(count, 64)
    value = collapsed_value(2 * images, background=images * shares.get("backgrounds", 0))
    with pytest.warns(UserWarning, match="collapsed network"):
        recipe.watch([{"part": "encoder", "epoch": epoch, "loss": value} | shares for epoch in (2, 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in the first of ten epochs the learning rate rises: the loss of a young network is near that value
        recipe.watch([{"part": "encoder", "epoch": epoch, "loss": value} | shares for epoch in (1, 2)])
        recipe.watch([{"part": "encoder", "epoch": epoch, "loss": 0.95 * value} | shares for epoch in (2, 3)])
        recipe.watch([{"part": "encoder", "epoch": epoch, "loss": value} | shares for epoch in (2, 3)] + [{"part": "classifier", "epoch": 3}])  # said before


@pytest.mark.parametrize("name", ["supcon", "exconb"])
def test_a_frozen_classifier_is_said_before_the_first_epoch(name, tmp_path):
    model = net()
    classifier_of(model)[1].requires_grad_(False)
    with pytest.raises(ValueError, match="classifier .* is frozen"):
        fit(config(name), toy(), model=model, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_images_too_small_for_the_network_are_said():
    images, labels = toy()
    with pytest.raises(ValueError, match="cannot take images of 2 x 2 pixels"):
        fit(Config(size=2, batch=8, epochs=1), (images[..., :2, :2].contiguous(), labels))


def test_collapse_is_named():
    "At a learning rate that destroys the network all views look alike"
    settings = replace(config("supcon"), epochs=6, lr=0.0001, batch=16)
    with pytest.warns(UserWarning, match="collapse"):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale, self.fc = nn.Parameter(torch.zeros(1)), nn.Linear(8, 4)

            def forward(self, x):
                return self.fc(self.scale * 1e-6 * x.mean((1, 2, 3))[:, None] + torch.ones(8))
        fit(settings, toy(), model=Flat())


@pytest.mark.parametrize("name, options, words", [
    ("ce", {"tau": 0.5}, "no option 'tau'"), ("edda", {"taus": 0.5}, "did you mean 'tau'"), ("edda", {"tau": 1.5}, "tau must"),
    ("edda", {"share": -1}, "share must"), ("edda", {"share": 0}, "share must be above 0"), ("edda", {"fill": "white"}, "fill must"), ("edda", {"refresh": 0.5}, "refresh"),
    ("edda", {"drop_target": "zero"}, "drop_target must"), ("edda", {"drop_weight": -1}, "drop_weight must be at least 0 and finite"),
    ("edda", {"keep_weight": float("nan")}, "keep_weight must"), ("edda", {"drop_weight": float("inf")}, "drop_weight must"), ("edda", {"tau": float("nan")}, "tau must"),
    ("excon", {"method": "gradcan"}, "gradcam"), ("excon", {"tau": -0.1}, "tau must"), ("supcon", {"temperature": 0}, "temperature must"),
    ("supcon", {"views": "crops"}, "views must"), ("exconb", {"background_weight": -1}, "background_weight must be at least 0 and finite"),
    ("ce", {"tau": 0.5}, "no option 'tau': it has no options"), ("supcon", {"xyz": 1}, "no option 'xyz': it has base_temperature, "),
    ("edda", {"tau": "half"}, "tau must be a number, got 'half'"), ("edda", {"tau": [0.5]}, r"tau must be a number, got \[0.5\]"),
    ("supcon", {"staged": "False"}, "staged must be true or false, got 'False'"), ("supcon", {"staged": 1}, "staged must be true or false"),
    ("edda", {"explainer": "sise"}, "explainer must be a dictionary, got 'sise'"), ("edda", {"share": "x"}, "share must be a number"),
    ("edda", {"method": "Grad-CAN++"}, "did you mean 'gradcampp'"), ("edda", {"method": 5}, "unknown method 5"),
])
def test_bad_options(name, options, words):
    with pytest.raises(ValueError, match=words):
        Config(recipe=name, options=options)


@pytest.mark.parametrize("name", EXPLAINING)
@pytest.mark.parametrize("layer, words", [("layer4", "no layer 'layer4'"), ("8", "not maps")])
def test_a_layer_that_gives_no_maps_is_an_error_before_the_first_step(name, layer, words):
    with pytest.raises(ValueError, match=words):
        make_run(config(name, options={"layers": layer}), toy(), None, net(), list("abcd"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["edda", "excon"])
def test_a_mean_that_nobody_knows_is_an_error_before_the_first_step(name):
    "The network has no `Normalized`, and the recipe asks for the mean colour a quarter of the training later"
    with pytest.raises(ValueError, match="fill='mean' needs a model"):
        make_run(config(name, options={"fill": "mean", "start": 0.5}), toy(), None, net(), list("abcd"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["edda", "excon"])
def test_an_option_that_the_explainer_has_not(name):
    with pytest.raises(ValueError, match="gradcam cannot be made with foo=1.* its options are layers, "):
        make_run(config(name, options={"explainer": {"foo": 1}}), toy(), None, net(), list("abcd"), torch.device("cpu"))


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="no recipe is called 'excom': did you mean 'excon' or 'exconb'"):
        get_recipe("excom")
    with pytest.raises(ValueError, match="no recipe is called 'mixup': there are ce, cutout, edda, .*, supcon_clean_view$"):
        get_recipe("mixup")


def test_no_classifier_at_the_end():
    with pytest.raises(ValueError, match="no linear layer"):
        fit(replace(config("supcon"), seed=1), toy(), model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), classes=list("abcd"))


def test_a_class_with_one_image():
    "Its two views have nothing but each other; the loss is that of three loops, and training goes on"
    images, labels = toy()
    labels[5] = 4
    model = net(5).eval()
    recipe = ready("supcon", model)
    views = recipe.views(model, Batch(images, labels, torch.arange(48)), LATE["supcon"], torch.Generator().manual_seed(3))
    z = nn.functional.normalize(recipe.head(model[:9](views.images)), dim=1)
    by_hand = three_loops(torch.stack([z[:48], z[48:]], 1), labels)
    assert recipe.loss(model, views, LATE["supcon"])[0].item() == pytest.approx(by_hand, rel=1e-5)
    run = fit(config("supcon"), (images, labels), model=model, classes=list("abcde"))
    assert all(math.isfinite(row["loss"]) for row in run.log) and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------ several processes


PLAIN = {"views": "none", "classifier_views": "none"}
ALIKE = {"ce": {}, "supcon": PLAIN, "exconb": PLAIN | {"start": 0.25}, "edda": {"start": 0.25, "refresh": 2}}  # nothing is drawn


def trained_run(name, seed=0, **where):
    "Four epochs of three steps. Batch norm stands still here, because its statistics are those of a process"
    model = net(seed=seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    settings = config(name, options=ALIKE[name], pad=0, flip=False, epochs=4)
    return fit(settings, toy(50), toy(12, seed=1), model=model, **where)


def trained(*words, **where):
    "The weights after that"
    return trained_run(*words, **where).model.state_dict()


def logged(name):
    "What the log says after that"
    return [{k: v for k, v in row.items() if k != "seconds"} for row in trained_run(name).log]


def unequal_gradients(rank):
    "Four weights, averaged: one with a gradient in both processes, one in the second only, one in none, one that is frozen"
    weights = [nn.Parameter(torch.zeros(2), requires_grad=i < 3) for i in range(4)]
    weights[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    weights[1].grad = torch.tensor([4.0, 6.0]) if rank else None
    average_gradients(iter(weights))
    return [None if w.grad is None else w.grad.tolist() for w in weights]


def one_of_two(rank, folder):
    "Train each recipe; then stop one with kept maps in the middle of its third epoch, and continue"
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    found, loss, steps = {name: trained(name) for name in ALIKE}, RECIPES["edda"].loss, iter(range(8))

    def impatient(self, *arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return loss(self, *arguments)
    RECIPES["edda"].loss = impatient
    with pytest.raises(KeyboardInterrupt, match="stopped after step 8 of 12"):
        trained("edda", folder=folder / "run", every=0.0)
    RECIPES["edda"].loss = loss
    dist.barrier()
    found["continued"] = trained("edda", seed=7, folder=folder / "run")
    found["unlike"] = trained("ce", seed=rank)
    found["gradients"] = unequal_gradients(rank)
    found["logs"] = {name: logged(name) for name in ("ce", "edda")}
    trained("ce", folder=folder / "seen")
    with pytest.raises(RuntimeError, match="the number of finished steps is 0 to"):
        trained("ce", folder=folder / ("seen" if rank == 0 else "not seen"))
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    "What each of two processes has trained"
    return in_two_processes(one_of_two, tmp_path_factory.mktemp("gloo"))


@pytest.mark.filterwarnings("ignore:the contrastive loss stands")
@pytest.mark.parametrize("name", list(ALIKE))
def test_two_processes_take_the_steps_of_one(two_processes, name):
    one = trained(name)
    for key, value in one.items():
        torch.testing.assert_close(value, two_processes[0][name][key], atol=2e-5, rtol=1e-4)
        assert torch.equal(two_processes[0][name][key], two_processes[1][name][key])
    assert any(not torch.equal(v, net().state_dict()[k]) for k, v in one.items())


@pytest.mark.parametrize("name", ["ce", "edda"])
def test_the_log_of_two_processes_is_that_of_one(two_processes, name):
    "Loss, accuracy and notes are over the images of both"
    rows = logged(name)
    for found in two_processes:
        assert len(found["logs"][name]) == len(rows)
        assert all(row == pytest.approx(own, abs=1e-4) for row, own in zip(found["logs"][name], rows, strict=True))


def test_two_processes_begin_with_the_network_of_the_first(two_processes):
    assert all(torch.equal(value, two_processes[1]["unlike"][key]) for key, value in two_processes[0]["unlike"].items())
    assert all(torch.equal(value, two_processes[0]["ce"][key]) for key, value in two_processes[0]["unlike"].items())


def test_a_gradient_that_only_one_process_has(two_processes):
    "As in one process with all images: the other's share of the mean is 0; without a gradient anywhere the optimiser has nothing to do"
    for found in two_processes:
        assert found["gradients"] == [[1.5, 3.0], [2.0, 3.0], None, None]


def test_two_processes_continue_with_the_same_bits(two_processes):
    "The checkpoint of the first process holds the maps of both"
    assert all(torch.equal(found["continued"][key], value) for found in two_processes for key, value in found["edda"].items())


@pytest.mark.parametrize("recipe", ["supcon", "exconb", "cutout"])
def test_an_augmentation_that_means_nothing_is_refused(recipe):
    with pytest.raises(ValueError, match=f"the recipe {recipe} makes no use of augmentation='none': it"):
        config(recipe, augmentation="none")


@pytest.mark.parametrize("options, words", [({"share": 0.0}, "share must be above 0"), ({"share": 0.0005}, "at least one pixel"),
                                            ({"p": 0.2}, "p must lie in .0, 1. for 'share'")])
def test_impossible_options_of_edda_are_told_before_the_training(options, words):
    with pytest.raises(ValueError, match=words):
        fit(config("edda", options={"start": 1.0} | options), toy(), model=net())


def test_a_new_version_of_the_explainer_is_another_run(monkeypatch):
    before = {name: config(name).key for name in ("ce", "edda", "excon")}
    monkeypatch.setattr(GradCAM, "version", GradCAM.version + 1)
    assert {name for name, key in before.items() if config(name).key != key} == {"edda", "excon"}


def test_a_method_is_one_run_however_it_is_written(tmp_path):
    first, other = (replace(config("edda"), options={"method": name}) for name in ("gradcampp", "Grad-CAM++"))
    assert first == other and first.key == other.key != replace(config("edda"), options={"method": "gradcam"}).key
    steps = [fit(one, toy(), model=net(), folder=tmp_path).done for one in (first, other)]
    assert steps == [6, 6]  # the second one finds the run finished


# ------------------------------------------------------------------ the papers' schedules


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["ce", "edda", "exconb"])
def test_compiled_takes_the_same_steps(name):
    images, labels = toy()
    settings = config(name, model="plain_cnn", seen=16)  # later steps would blow up the rounding
    plain = fit(settings, (images, labels))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = fit(settings, (images, labels), compiled=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not any(module._compiled_call_impl for module in run.model.modules())
    for a, b in zip(plain.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["exconb_cifar100", "supcon_tiny_imagenet", "edda_resnet18_svhn"])
def test_published_schedules_run_at_smoke_size(name, tmp_path):
    settings = replace(PUBLISHED[name].smoke, size=32)
    images, labels = toy(16, size=32)
    run = fit(settings, (images, labels), (images, labels), classes=list("abcd"), folder=tmp_path)
    assert all(math.isfinite(row["loss"]) for row in run.log) and 0 <= run.log[-1]["val_accuracy"] <= 1
    assert run.log[-1]["step"] == run.steps == len(run.recipe.parts) * settings.epochs * (16 // settings.batch)


def test_controls_explain_another_class():
    model, labels = net(), torch.arange(100) % 4
    for name in ("edda_random_class", "excon_random_class"):
        targets = ready(name, model).targets(model, labels, torch.Generator().manual_seed(0))
        assert (targets != labels).all() and set(targets.tolist()) == {0, 1, 2, 3}
    for name in ("edda", "random_occlusion", "excon", "exconb"):
        assert torch.equal(ready(name, model).targets(model, labels, torch.Generator().manual_seed(0)), labels)


def test_maps_are_not_scaled_again():
    "A crop may show the weak part of a map only: nothing in it is salient"
    maps, generator = torch.linspace(0, 0.4, 256).view(1, 1, 16, 16), torch.Generator().manual_seed(0)
    assert not ready("edda", net()).masks(maps, generator).any()
    assert not ready("excon", net()).kept(maps, generator).any()


def test_what_is_kept_is_the_image(monkeypatch):
    model, recipe = net().eval(), ready("excon", net().eval())
    monkeypatch.setattr(recipe, "kept", lambda maps, generator: torch.ones_like(maps, dtype=torch.bool))
    assert torch.equal(recipe.masked(model, batch_of(), torch.Generator()), batch_of().images.float() / 255)


def test_excon_hides_with_the_mean_as_the_paper_does():
    assert all(RECIPES[name].options["fill"] == "mean" for name in ("excon", "exconb", "excon_random_mask"))
    assert RECIPES["edda"].options["fill"] == "black"


def test_warm_up_in_epochs():
    assert ready("supcon", net(), warmup=0.5).warm == 0.5 * 2
    assert ready("supcon", net(), warmup=0.5, seen=36).warm == 0.5 * 36 / 12


def test_options_of_supcon():
    assert RECIPES["supcon"].options == {"temperature": 0.1, "base_temperature": 0.07, "dim": 128, "views": "simclr",
                                         "classifier_views": "resized_crop", "classifier_lr": 0.1, "staged": False}


def test_projection_has_a_dimension():
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="dim must be a whole number of at least 1"):
            get_recipe("supcon")(config("supcon", options={"dim": wrong}))


def test_each_part_of_an_epoch_has_its_own_order_rate_and_progress():
    settings = config("supcon", options={"classifier_lr": 0.007})
    run = make_run(settings, toy(), toy(12, seed=1), net(), None, torch.device("cpu"))
    views, seen = run.recipe.views, {"encoder": [], "classifier": []}

    def watched(model, batch, moment, generator):
        seen[moment.part].append((moment.epoch, moment.progress, batch.index.tolist(), run.optimizers[moment.part].param_groups[0]["lr"]))
        return views(model, batch, moment, generator)
    run.recipe.views = watched
    for _ in range(run.steps):
        run.step()
        if run.ends_pass:
            run.close()
    for part, peak in (("encoder", settings.lr), ("classifier", 0.007)):
        epochs, progress, indices, rates = zip(*seen[part], strict=True)
        assert epochs == (0, 0, 0, 1, 1, 1) and progress == pytest.approx([i / 6 for i in range(6)])
        assert rates == pytest.approx([learning_rate(i, 6, peak, settings.warmup) for i in range(6)])
        assert all(sorted(sum(indices[i:i + 3], [])) == list(range(48)) for i in (0, 3))
    encoder, classifier = (sum((index for _, _, index, _ in seen[part][:3]), []) for part in seen)
    assert encoder == epoch_order(48, settings.seed, 0).tolist() != classifier
    assert [row["val_accuracy"] is None for row in run.log] == [True, False] * 2


def test_the_head_is_drawn_by_the_seed_alone():
    heads = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        heads.append(make_run(config("supcon", seed=seed), toy(), None, net(), None, torch.device("cpu")).recipe.head)
    assert same(heads[0], heads[1]) and not same(heads[0], heads[2])


CONTRAST = dict(model="resnet50", epochs=200, optimizer="sgd_classical", lr=0.5, weight_decay=1e-4, warmup=0.05, dtype="bfloat16", flip=True)
OCCLUSION = dict(epochs=200, batch=128, optimizer="sgd", weight_decay=5e-4, warmup=0.05, dtype="bfloat16")


@pytest.mark.parametrize("name, wanted, hours", [
    ("excon_cifar100", CONTRAST | dict(size=32, batch=256, options={"layers": "layer2.3.conv3", "start": 0.25}), 7),
    ("supcon_cifar100", CONTRAST | dict(size=32, batch=256, options={}), 4), ("ce_cifar100", CONTRAST | dict(options={}), 2),
    ("exconb_tiny_imagenet", CONTRAST | dict(size=64, batch=128, options={"classifier_views": "none", "layers": "layer4.2.conv3", "start": 0.0}), 40),
    ("supcon_tiny_imagenet", CONTRAST | dict(options={"classifier_views": "none"}), 24),
    ("ce_tiny_imagenet", CONTRAST | dict(size=64, options={}), 12),
    ("edda_vgg16_bn_cifar10", OCCLUSION | dict(model="vgg16_bn", size=32, lr=0.05, flip=True, options={"layers": "features.32"}), 2),
    ("ce_vgg16_bn_svhn", OCCLUSION | dict(size=32, lr=0.05, flip=False, options={}), 0.5),
    ("random_occlusion_resnet50_cifar100", OCCLUSION | dict(size=32, lr=0.1, flip=True, options={}), 6),
    ("cutout_resnet18_tiny_imagenet", OCCLUSION | dict(size=64, lr=0.1, flip=True, options={}), 4),
])
def test_schedules_of_the_papers(name, wanted, hours):
    entry = PUBLISHED[name]
    assert {key: getattr(entry.config, key) for key in wanted} == wanted and entry.gpu_hours == hours
    assert entry.smoke.options == {key: value for key, value in entry.config.options.items() if key != "layers"}
    assert (entry.smoke.model, entry.smoke.epochs, entry.smoke.batch) == ("residual_cnn", 1, 8)
    test = "" if "tiny_imagenet" in name else " --test"  # the test images of Tiny ImageNet have no public labels
    assert entry.command(name) == f"xai-companion train --config {name} --device cuda{test}"
    assert entry.command(name, 2) == f"torchrun --standalone --nproc-per-node 2 --no-python -- {entry.command(name)}"
