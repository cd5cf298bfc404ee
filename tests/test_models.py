"""Weights from files and caches, the layer rule on every network by name, and the embedded classifier on real photographs."""
import csv
import math
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from xai_companion.core import settings
from xai_companion.data.photos import load_images
from xai_companion.hooks import black_image, plain_module, unwrapped, watch
from xai_companion.models import (
    SMALL,
    Normalized,
    conv_blocks,
    find_class,
    imagenet_classes,
    last_conv,
    load_model,
    top_classes,
)
from xai_companion.pretrained import fill_weights, read_weights

LAYERS = {
    "resnet18": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet34": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet50": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet101": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "vgg16_bn": ["features.5", "features.12", "features.22", "features.32", "features.42"],
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13", "features"],
    "mobilenet_v3_small": ["features.0", "features.1", "features.3", "features.8", "features"],
    "efficientnet_b0": ["features.1", "features.2", "features.3", "features.5", "features"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features"],
    "densenet121": ["features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3", "features"],
    "efficientnet_lite0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "bn2"],
}
MAPS = {"resnet50": 3904, "vgg16": 1472, "vgg16_bn": 1472, "resnet18": 1024, "efficientnet_lite0": 1472}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache of weights"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_network(name):
    model = load_model(name, weights=None)
    assert conv_blocks(model) == LAYERS[name]
    assert last_conv(model) == LAYERS[name][-1]
    with watch(model) as calls:
        model(torch.zeros(1, 3, 224, 224))
    shapes = {call.name: call.output.shape for call in calls if call.name in LAYERS[name]}
    sides = [shapes[layer][-1] for layer in LAYERS[name]]
    assert sides == sorted(sides, reverse=True) and sides[-1] > 1
    if name in MAPS:
        assert sum(shape[1] for shape in shapes.values()) == MAPS[name]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [32, 64])
def test_small_networks(name, size):
    model = load_model(name, weights=None, num_classes=7, small=True)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 7)
    assert conv_blocks(model, size)[0] == ("features.5" if name == "vgg16_bn" else "layer1") and model.classes is None


@pytest.mark.parametrize("channels, front, first", [(3, nn.PixelUnshuffle(2), 12), (12, nn.Identity(), 12), (1, nn.Identity(), 1), (5, nn.Identity(), 5)])
def test_channels_of_an_image_from_the_side_alone(channels, front, first):
    "A space-to-depth in front makes twelve channels of three; a network of twelve channels takes twelve"
    network = nn.Sequential(front, nn.Conv2d(first, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8, 4))
    assert black_image(network, 32).shape == (1, channels, 32, 32)
    assert conv_blocks(network, 32) == conv_blocks(network, (channels, 32, 32))


@pytest.mark.parametrize("size", [128, 160, 299])
def test_convolutions_without_padding_lose_a_pixel_more(size):
    "8 pixels become 3 in Inception: one step all the same"
    network = torchvision.models.inception_v3(weights=None, init_weights=False)
    assert conv_blocks(network, size) == ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"]


def test_weights_from_the_cache(hub):
    "A file in torchvision's format and place is used; nothing is downloaded"
    trained = load_model("resnet18", weights=None).network
    torch.save(trained.state_dict(), hub / "resnet18-f37072fd.pth")
    loaded = load_model("resnet18")
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in loaded.network.state_dict().items())
    assert loaded.classes[281] == "tabby"
    assert loaded.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_no_network(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(RuntimeError, match="resnet18-f37072fd.pth.*efficientnet_lite0.*weights=None"):
        load_model("resnet18")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}])
def test_checkpoint(tmp_path, wrap):
    network = load_model("resnet18", weights=None, num_classes=4, small=True).network
    torch.save(wrap(network.state_dict()), tmp_path / "net.pt")
    loaded = load_model("resnet18", weights=tmp_path / "net.pt", num_classes=4, small=True, classes=list("abcd"))
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.network.state_dict().items())
    assert loaded.classes == list("abcd")


@pytest.mark.parametrize("prefix", ["", "module.", "network.", "module.network."])
@pytest.mark.parametrize("own", ["network", "module", "body"])
def test_checkpoint_of_a_network_with_such_names_itself(tmp_path, own, prefix):
    "Only the prefixes of wrappers are taken off, not those that belong to the network"
    network, other = (nn.Sequential(OrderedDict({own: nn.Linear(2, 2)})) for _ in range(2))
    torch.save({prefix + k: v for k, v in network.state_dict().items()}, tmp_path / "net.pt")
    fill_weights(other, read_weights(tmp_path / "net.pt")[0], "net.pt")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in other.state_dict().items())


def test_checkpoints_that_do_not_fit(tmp_path):
    torch.save(load_model("resnet18", weights=None, num_classes=4).network.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="does not fit.*fc.weight.*num_classes"):
        load_model("resnet18", weights=tmp_path / "net.pt", num_classes=5)
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="bad.ckpt is damaged or holds no state dict"):
            load_model("resnet18", weights=tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="no weights called 'imagnet'"):
        load_model(weights="imagnet")
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        load_model("resnet18", weights="missing.pt")
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        load_model("resnet50", weights="IMAGENET1K_V9")
    with pytest.raises(ValueError, match="weights=None"):
        load_model("resnet18", num_classes=10)
    with pytest.raises(ValueError, match="resnet18, resnet50, resnet56"):
        load_model("vgg16", weights=None, small=True)


@pytest.mark.parametrize("classes", [2, 5])
def test_top_classes_of_few(classes):
    model = load_model("plain_cnn", None, classes)
    assert [len(top) for top in top_classes(model, torch.rand(2, 3, 32, 32))] == [min(classes, 3)] * 2


def test_a_network_with_auxiliary_classifiers_returns_logits_in_training():
    model = load_model("googlenet", None, 3)
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_normalized_survives_saving(tmp_path):
    model = Normalized(nn.Sequential(nn.Conv2d(3, 4, 3)), mean=(0.5,) * 3, std=(0.2,) * 3, classes=list("abcd"))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(again(images), model(images)) and again.classes == model.classes
    assert unwrapped(nn.DataParallel(again)) is again.network
    with pytest.raises(AttributeError, match="no_such"):
        model.no_such  # noqa: B018
    with pytest.raises(ValueError, match="3 channels"):
        model(images[:, :1])


def test_normalisation_around_a_compiled_network_stays():
    "Who trains with maps of the plain module would otherwise explain the network without its normalisation"
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    model = Normalized(torch.compile(network, backend="eager"), (0.5,) * 3, (0.2,) * 3)
    assert plain_module(model) is plain_module(nn.DataParallel(model)) is model
    assert unwrapped(model) is unwrapped(nn.DataParallel(model)) is network


@pytest.mark.slow
def test_embedded_classifier_on_imagenet_photographs():
    folder = settings().data / "imagenet-samples"
    if not folder.is_dir():
        pytest.skip(f"the data set imagenet_samples is not in {folder}")
    model, right = load_model(), 0
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    for start in range(0, len(rows), 50):
        part = rows[start:start + 50]
        with torch.inference_mode():
            predicted = model(load_images([folder / row["file"] for row in part])).argmax(1)
        right += sum(p == int(row["class_index"]) for p, row in zip(predicted.tolist(), part, strict=True))
    assert right >= 0.85 * len(rows)


@pytest.mark.parametrize("weights", [None, "none", "None"])
def test_random_weights_by_name(weights):
    "What a message recommends can be typed in a terminal, too"
    torch.manual_seed(0)
    first = load_model("plain_cnn", weights)
    assert not torch.equal(first(torch.ones(1, 3, 32, 32)), load_model("plain_cnn")(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("key, prefix", [("model_state_dict", ""), ("net", "module."), ("state_dict", "model."), (None, "_orig_mod."), (None, "net.")])
def test_checkpoints_as_training_programs_write_them(tmp_path, key, prefix):
    "Also of another number of classes, which the weights tell"
    network = load_model("resnet18", weights=None, num_classes=4, small=True).network
    stored = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save({key: stored, "epoch": 3} if key else stored, tmp_path / "net.pt")
    loaded = load_model("resnet18", weights=tmp_path / "net.pt", small=True)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.network.state_dict().items())
    assert loaded.network.fc.out_features == 4 and loaded.classes is None


def test_checkpoints_that_are_not_read_say_why(tmp_path):
    stored = load_model("resnet18", weights=None, num_classes=4).network.state_dict()
    torch.save({"state_dict": stored, "args": Namespace(lr=0.1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="argparse.Namespace.*could run code"):
        load_model("resnet18", weights=tmp_path / "more.pt")
    (tmp_path / "net.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="safetensors.torch.load_file"):
        load_model("resnet18", weights=tmp_path / "net.safetensors")
    torch.save(stored, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="names are like 'conv1.weight', those of the network like 'features.0.weight'") as error:
        load_model("vgg11", weights=tmp_path / "net.pt")
    assert len(str(error.value)) < 700


def test_top_classes_of_a_single_logit():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    images = torch.rand(2, 3, 2, 2)
    for [(name, probability)], logit in zip(top_classes(model, images), model(images).tolist(), strict=True):
        assert name == "0" and probability == pytest.approx(1 / (1 + math.exp(-logit[0])), rel=1e-5)


@pytest.mark.parametrize("mean, std, words", [
    ((123, 117, 104), (58, 57, 57), "divide grey levels by 255"), ((0.5, 0.5, 0.5), (0, 1, 1), "std is above 0"), ((math.nan,) * 3, (1, 1, 1), "mean lies in")])
def test_normalisations_that_make_no_sense(mean, std, words):
    with pytest.raises(ValueError, match=words):
        Normalized(nn.Conv2d(3, 1, 1), mean, std)


def test_images_are_not_normalised_twice():
    with pytest.raises(ValueError, match="normalises its images already"):
        Normalized(load_model("plain_cnn"), (0.5,) * 3, (0.5,) * 3)


def test_a_class_with_a_namesake_in_capitals():
    names = imagenet_classes()
    assert [find_class(name, names) for name in ("Cardigan", "cardigan")] == [264, 474]
    for name, some in (("CARDIGAN", names), ("crane", ["crane", "cat", "crane"])):
        with pytest.raises(ValueError, match=f"2 classes are called '{name}': give the index of one, such as"):
            find_class(name, some)
    assert find_class(1, ["2", "1", "0"]) == 1 and find_class("1", ["1", "0"]) == 0
    assert [find_class(number, names) for number in (7, "7", "-1")] == [7, 7, -1]
    for nonsense in ("--5", "\u00b2"):
        with pytest.raises(ValueError, match="no class is called"):
            find_class(nonsense, names)


class Joins(nn.Module):
    "A network that joins maps in `forward`"

    def __init__(self, how):
        super().__init__()
        self.how, self.relu, self.joined = how, nn.ReLU(), nn.Identity()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.squeeze, self.head = nn.Conv2d(8, 8, 1), nn.LazyLinear(5)

    def forward(self, x):
        x = self.relu(self.stem(x))
        if self.how in ("residual", "named"):
            for conv in (self.a, self.b):
                x = self.relu(x + conv(x))
            x = self.joined(x) if self.how == "named" else x
        elif self.how == "branches":
            x = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        elif self.how == "pooled branches":
            x = self.a(x).relu().amax((2, 3), keepdim=True) + self.b(x).relu().amax((2, 3), keepdim=True)
        else:
            x = self.b(self.relu(self.a(x)))
            x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid() if self.how == "gate" else x * x.sigmoid()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("how, layer", [("named", "joined"), ("gate", "b"), ("swish", "b")])
def test_the_last_map_where_forward_joins(how, layer, recwarn):
    assert last_conv(Joins(how), 64) == layer and not [w for w in recwarn if "beside" in str(w.message)]


@pytest.mark.parametrize("network", [Joins("residual"), Joins("branches"), torch.fx.symbolic_trace(load_model("resnet18", weights=None).network)])
def test_a_layer_that_is_only_a_part_is_refused(network):
    with pytest.raises(ValueError, match=r"beside or behind it.*layers=\.\.\..*nn.Identity\(\)"):
        conv_blocks(network, 64)


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(load_model("resnet18", weights=None).network for _ in range(2))

    def forward(self, x):
        return 1000 * self.members[0](x) + self.members[1](x)


@pytest.mark.parametrize("network, size", [(Joins("pooled branches"), 64), (Ensemble(), 64), (load_model("resnet50", weights=None), 32)])
def test_a_layer_that_is_only_a_part_is_named_in_a_warning(network, size):
    with pytest.warns(UserWarning, match=r"beside or behind it.*layers=\.\.\."):
        conv_blocks(network, size)
