"""The masked-forward engine beyond its notebook: memory, interruption, devices, and who may be behind the model."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from xai_companion.data.photos import photos
from xai_companion.explain import RISE, SISE
from xai_companion.explain.contract import LAYER, Bomb, assert_untouched, footprint, trap_images, trap_network
from xai_companion.masking import cover, default_chunk, full_size, hidden, masked_scores
from xai_companion.models import load_model

PEAK = """
import torch
from torch import nn
from xai_companion.explain.rise import RISE

def status(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])

torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
images = torch.rand(1, 3, 224, 224)
RISE(model, n_masks=64).attribute(images)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
RISE(model, n_masks=%d).attribute(images)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
def test_memory_does_not_grow_with_the_number_of_masks():
    peaks = {}
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": ""}  # freed memory goes back to the system at once
    for n in (500, 8000):
        run = subprocess.run([sys.executable, "-c", PEAK % n], env={**os.environ, **at_once}, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        peaks[n] = int(run.stdout)
    assert peaks[8000] < 1.1 * peaks[500], peaks


def test_interrupted_in_the_middle():
    "Ctrl-C in a later chunk: nothing is left behind, and the next call works"
    network, images = trap_network(), trap_images(2)
    bomb = Bomb(fuse=3, error=KeyboardInterrupt)
    network.add_module("11", bomb.train())
    masks, owner = torch.rand(10, 1, 5, 5), torch.arange(10) % 2
    before = footprint(network, images)
    with pytest.raises(KeyboardInterrupt):
        masked_scores(network, images, masks, owner, 0, chunk=2)
    assert_untouched(before, footprint(network, images), "after Ctrl-C in the third chunk")
    bomb.fuse = 10**9
    assert masked_scores(network, images, masks, owner, 0, chunk=2).isfinite().all()


def test_other_errors_are_not_taken_for_memory():
    class Broken(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    broken = Broken()
    with pytest.raises(RuntimeError, match="mat1"):
        masked_scores(broken, torch.rand(1, 3, 8, 8), torch.rand(4, 1, 2, 2), [0] * 4, 0)
    assert broken.calls == 1


def test_out_of_memory_on_a_cpu_and_in_an_explainer():
    "The CPU's allocator says it in other words; SISE survives it too"
    class Small(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            if len(x) > 3:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
            return self.network(x)

    network, images = trap_network().eval(), trap_images(2)
    small = Small(network)
    expected = SISE(network, layers=["2", LAYER]).attribute(images, 1)
    torch.testing.assert_close(SISE(small, layers=["network.2", "network.6"]).attribute(images, 1), expected, rtol=1e-4, atol=1e-5)


def test_into_adds():
    "What is there stays: several calls can add to one sum"
    images, masks, owner = trap_images(2), torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    network = trap_network().eval()
    once, twice = torch.zeros(2, 1, 20, 24), torch.zeros(2, 1, 20, 24)
    masked_scores(network, images, masks, owner, 0, into=once)
    for part in (slice(0, 2), slice(2, 6)):
        masked_scores(network, images, masks[part], owner[part], 0, into=twice)
    torch.testing.assert_close(once, twice)


def test_results_are_ordinary_tensors():
    "Computed under inference mode, and still usable in training"
    network, images = trap_network(), trap_images(1)
    scores = masked_scores(network, images, torch.rand(3, 1, 4, 4), [0, 0, 0], 0)
    assert not scores.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * scores).sum().backward()
    assert weight.grad.isfinite().all()


def test_no_masks():
    assert masked_scores(trap_network(), trap_images(1), torch.rand(0, 1, 4, 4), torch.zeros(0).long(), 0).shape == (0,)


def test_float64_and_bfloat16():
    "float64 stays float64; a bfloat16 model and autocast are near it"
    images, masks = trap_images(1), torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = masked_scores(trap_network().double(), images.double(), masks.double(), [0] * 9, 1)
    single = masked_scores(trap_network(), images, masks, [0] * 9, 1)
    half = masked_scores(trap_network().bfloat16(), images.bfloat16(), masks, [0] * 9, 1)
    auto = masked_scores(trap_network(), images, masks, [0] * 9, 1, dtype=torch.bfloat16)
    assert exact.dtype == torch.float64 and single.dtype == half.dtype == auto.dtype == torch.float32
    assert torch.equal(auto, masked_scores(trap_network(), images, masks, [0] * 9, 1, dtype="bfloat16")) and not torch.equal(auto, single)
    assert torch.equal(single, masked_scores(trap_network(), images, masks, [0] * 9, 1, dtype="float32"))
    for wrong in ("bf16", torch.int8, 16):
        with pytest.raises(ValueError, match="dtype must be torch.bfloat16"):
            masked_scores(trap_network(), images, masks, [0] * 9, 1, dtype=wrong)
    assert (single - exact).abs().max() < 1e-6
    assert (half - exact).abs().max() < 0.02 and (auto - exact).abs().max() < 0.02


def test_a_surrounding_autocast_is_left_on():
    class Sees(nn.Module):
        def forward(self, x):
            self.seen = torch.is_autocast_enabled("cpu")
            return x.mean((2, 3))

    model = Sees()
    with torch.autocast("cpu", torch.bfloat16):
        masked_scores(model, torch.rand(1, 3, 8, 8), torch.rand(2, 1, 2, 2), [0, 0], 0)
    assert model.seen
    masked_scores(model, torch.rand(1, 3, 8, 8), torch.rand(2, 1, 2, 2), [0, 0], 0)
    assert not model.seen


@pytest.mark.parametrize("fill", ["black", "mean", "blur", torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)], ids=["black", "mean", "blur", "tensor"])
def test_every_fill(fill):
    "A mask of ones shows the image, a mask of zeros the fill, one of a half their mean"
    model, images = load_model(), photos(64)[:2]
    backdrop, owner = hidden(images, fill, model), torch.tensor([0, 1, 0, 1])
    masks = torch.tensor([1., 1, 0, 0.5]).view(4, 1, 1, 1).expand(-1, -1, 64, 64)
    seen = cover(images, owner, masks, backdrop)
    expected = torch.stack([images[0], images[1], backdrop[0], (images[1] + backdrop[1]) / 2])
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(cover(images[:1], owner * 0, masks, backdrop[:1])[:1], images[:1])


def test_shifts_for_any_size():
    "A window fits for every size of image and grid, also where a cell is no whole number of pixels"
    for size in ((224, 224), (20, 24), (3, 50), (7, 7), (5, 4)):
        for cells in (1, 2, 7):
            rise = RISE(trap_network(), n_masks=50, cells=cells)
            grids, shifts = rise.draw(size)
            masks = full_size(grids.float(), size, shifts)
            assert masks.shape == (50, 1, *size) and masks.min() >= 0 and masks.max() < 1 + 1e-6
            assert (shifts >= 0).all() and (shifts < torch.tensor([-(-s // cells) for s in size])).all()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
def test_cuda_agrees_with_cpu():
    images, target = photos()[:2], torch.tensor([285, 967])
    here, there = (SISE(load_model(device=device), mu=0.3).blocks(images.to(device), target) for device in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        assert ((a.visual - b.visual.cpu()).abs().max() * a.visual[0].numel()) < 1e-3


@needs_cuda
def test_the_stream_does_not_wait_for_the_device(recwarn):
    "As many synchronisations for 40 chunks as for 2"
    model, images = load_model(device="cuda"), photos(64)[:2].cuda()
    masks, counts = torch.rand(80, 1, 7, 7, device="cuda"), []
    for n in (4, 4, 80):
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            masked_scores(model, images, masks[:n], torch.arange(n, device="cuda") % 2, 0, chunk=2, minmax=True,
                          into=torch.zeros(2, 1, 64, 64, device="cuda"), unit=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len([w for w in recwarn if "synchron" in str(w.message)]))
    assert counts[1] == counts[2], counts


def test_out_of_memory_in_a_later_chunk_and_down_to_single_images():
    class Full(nn.Module):
        most, calls = 1, 0

        def forward(self, x):
            self.calls += 1
            assert self.calls < 100, "it does not end"
            if len(x) > (self.most if self.calls > 1 else 8):
                raise RuntimeError("CUDA out of memory")
            return x.mean((2, 3))

    images, masks = torch.rand(1, 3, 8, 8), torch.rand(16, 1, 2, 2)
    expected = masked_scores(Full(), images, masks, [0] * 16, 0, chunk=1)
    torch.testing.assert_close(masked_scores(Full(), images, masks, [0] * 16, 0, chunk=8), expected)  # 8, then 8, 4, 2, and 8 times 1
    nothing = Full()
    nothing.most = 0
    with pytest.raises(RuntimeError, match="single masked image"):
        masked_scores(nothing, images, masks, [0] * 16, 0, chunk=8)


def test_default_chunk_by_size():
    assert [default_chunk(torch.empty(1, 3, side, side)) for side in (112, 224, 900)] == [32, 8, 1]


def test_shifts_and_scaling_reach_the_engine():
    "As if the masks had been made at full size before; nothing is scaled unless it is asked for"
    network, images, masks = trap_network().eval(), trap_images(1), 0.2 + 0.5 * torch.rand(4, 1, 3, 3)
    shift = torch.tensor([[0, 0], [1, 2], [3, 0], [6, 7]])
    for options in ({}, {"shift": shift}, {"minmax": True}, {"shift": shift, "minmax": True}):
        whole = full_size(masks, (20, 24), options.get("shift"), options.get("minmax", False))
        by_hand = masked_scores(network, images * whole, torch.ones(4, 1, 20, 24), range(4), 1)
        sums, expected = torch.zeros(1, 1, 20, 24), (whole * by_hand.view(-1, 1, 1, 1)).sum(0, keepdim=True)
        torch.testing.assert_close(masked_scores(network, images, masks, [0] * 4, 1, into=sums, **options), by_hand)
        torch.testing.assert_close(sums, expected)


def test_blur_by_hand():
    "Gaussian of 11 pixels and standard deviation 5; less where the image is smaller, mirrored at the border"
    image = torch.zeros(1, 1, 31, 31)
    image[..., 15, 15] = 1
    line = torch.zeros(31)
    line[10:21] = (-0.5 * (torch.arange(-5, 6) / 5) ** 2).exp()
    line = line / line.sum()
    torch.testing.assert_close(hidden(image, "blur")[0, 0], line[:, None] * line)
    assert hidden(torch.full((1, 3, 4, 9), 0.5), "blur").sub(0.5).abs().max() < 1e-6


def test_without_a_target_it_is_the_predicted_class():
    model, images, masks = load_model("plain_cnn"), photos(64), torch.rand(8, 1, 5, 5)
    index = torch.arange(8) % 4
    found = masked_scores(model, images, masks, index, None)
    assert torch.equal(found, masked_scores(model, images, masks, index, model(images).argmax(1)))
