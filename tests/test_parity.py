"""Our maps against those of captum, grad-cam and torchcam, on three networks with random weights and one with trained ones."""
import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from xai_companion.data.photos import photos
from xai_companion.explain import EXPLAINERS, explain
from xai_companion.explain.base import activations_and_gradients
from xai_companion.masking import normalize_map, upsample
from xai_companion.models import last_conv, load_model

NETWORKS = ("efficientnet_lite0", "resnet18", "vgg16_bn", "densenet121")
TARGETS = [281, 652]
GRAD_CAM = {"gradcam": "GradCAM", "xgradcam": "XGradCAM", "hirescam": "HiResCAM", "layercam": "LayerCAM"}
TORCHCAM = {"gradcam": "GradCAM", "xgradcam": "XGradCAM", "layercam": "LayerCAM"}


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module", params=[*NETWORKS[:3], pytest.param(NETWORKS[3], marks=pytest.mark.slow)])
def setting(request):
    "A network, the layer to compare at, two photographs"
    if request.param == "efficientnet_lite0":
        model = load_model()
        return model, last_conv(model), photos()[[0, 3]]
    images = photos(112 if request.param == "vgg16_bn" else 224)[[0, 3]]
    torch.manual_seed(0)
    model = load_model(request.param, weights=None)
    with torch.no_grad():
        model.train()(images)  # batch norm statistics of the photographs, for those of a new network are trivial
        [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].weight *= 1000  # the libraries add 1e-8 to small maps
    model.eval()
    if request.param == "densenet121":
        # torchvision overwrites the last map in place, and with it what the libraries hooked: compare one layer earlier.
        # The maps there have both signs, so Grad-CAM++ divides by sums near zero: compare in float64.
        return model.double(), "features.denseblock4", images.double()
    return model, last_conv(model), images


def torchcam_map(cls, model, layer, images):
    "torchcam's maps at the size of the layer, scaled to [0, 1]"
    with getattr(torchcam.methods, cls)(model, target_layer=model.get_submodule(layer)) as cam:
        return cam(TARGETS, model(images.clone().requires_grad_()))[0]


def test_captum(setting):
    model, layer, images = setting
    theirs = LayerGradCam(model, model.get_submodule(layer)).attribute(images, torch.tensor(TARGETS), relu_attributions=True)
    assert theirs.max() > 0
    assert relative(explain(model, images, "gradcam", TARGETS, layers=layer), upsample(theirs.detach(), images.shape[2:])) < 1e-5


def grad_cam_map(cls, model, layer, images):
    "grad-cam scales a map to [0, 1] and up-samples it with OpenCV: taken before the up-sampling"
    cam = getattr(pytorch_grad_cam, cls)(model=model, target_layers=[model.get_submodule(layer)])
    cam.get_target_width_height = lambda images: None  # keeps the size of the layer
    with cam:
        return torch.from_numpy(np.asarray(cam(input_tensor=images, targets=[ClassifierOutputTarget(t) for t in TARGETS])))


@pytest.mark.parametrize("name", GRAD_CAM)
def test_grad_cam(setting, name):
    model, layer, images = setting
    ours = EXPLAINERS[name](model, layer).compute(images, TARGETS).detach()
    assert relative(normalize_map(ours)[:, 0], grad_cam_map(GRAD_CAM[name], model, layer, images)) < 1e-5


def test_grad_cam_adds_to_the_denominator_of_gradcampp(setting):
    "1e-6, which is no small number where gradients are small. That is the only difference: the notebook says so"
    model, layer, images = setting
    acts, grads, _ = activations_and_gradients(model, layer, images, TARGETS)
    (act,), (grad,) = acts.values(), grads.values()

    def as_written(epsilon):
        alpha = grad**2 / (2 * grad**2 + act.sum((2, 3), keepdim=True) * grad**3 + epsilon)
        weights = (alpha.nan_to_num() * grad.relu()).sum((2, 3), keepdim=True)
        return normalize_map((weights * act).sum(1, keepdim=True).relu())[:, 0]

    assert relative(as_written(1e-6), grad_cam_map("GradCAMPlusPlus", model, layer, images)) < 1e-5
    assert relative(normalize_map(EXPLAINERS["gradcampp"](model, layer).compute(images, TARGETS))[:, 0], as_written(0)) < 1e-5


@pytest.mark.parametrize("name", TORCHCAM)
def test_torchcam(setting, name):
    model, layer, images = setting
    ours = EXPLAINERS[name](model, layer).compute(images, TARGETS).detach()
    assert relative(normalize_map(ours)[:, 0], torchcam_map(TORCHCAM[name], model, layer, images)) < 1e-5


def test_torchcam_gradcampp_does_not_divide(setting):
    "torchcam 0.5.0 divides a copy of alpha, so its weights are the sum of g^2 ReLU(g): the notebook says so"
    model, layer, images = setting
    acts, grads, _ = activations_and_gradients(model, layer, images, TARGETS)
    (act,), (grad,) = acts.values(), grads.values()
    weights = (grad**2 * grad.relu()).sum((2, 3), keepdim=True)
    theirs = torchcam_map("GradCAMpp", model, layer, images)
    assert relative(normalize_map((weights * act).sum(1, keepdim=True).relu())[:, 0], theirs) < 1e-3


def test_several_layers():
    "Grad-CAM of two layers is the mean of the two maps, each scaled to [0, 1], as in grad-cam"
    model, images = load_model(), photos()[[0, 3]]
    both = explain(model, images, "gradcam", TARGETS, layers=["blocks.4", "bn2"])
    single = [explain(model, images, "gradcam", TARGETS, layers=layer) for layer in ("blocks.4", "bn2")]
    assert relative(both, sum(normalize_map(m) for m in single) / 2) < 1e-5


@pytest.mark.parametrize("library", ["grad-cam", "torchcam"])
@pytest.mark.parametrize("name, layer", [("efficientnet_lite0", "blocks.1"), ("resnet18", "layer1")])
def test_scorecam(name, layer, library):
    "The libraries' Score-CAM, by the variant that has their name; blocks.1 has values of both signs"
    torch.manual_seed(0)
    model, images = load_model(name, weights="imagenet" if name == "efficientnet_lite0" else None), photos(64)[[0, 3]]
    if library == "torchcam":
        theirs = torchcam_map("ScoreCAM", model, layer, images)
    else:
        cam = pytorch_grad_cam.ScoreCAM(model=model, target_layers=[model.get_submodule(layer)])
        cam.get_target_width_height = lambda images: None
        with cam, torch.no_grad():
            theirs = torch.from_numpy(cam(input_tensor=images, targets=[ClassifierOutputTarget(t) for t in TARGETS]))
    ours = EXPLAINERS["scorecam"](model, layer, variant=library).compute(images, TARGETS)
    assert relative(normalize_map(ours)[:, 0], theirs) < 1e-5
