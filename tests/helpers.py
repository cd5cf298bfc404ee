"""What several files of tests use: where things are, numbers from a seed, a command in this process, two processes that talk."""

import math
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from xai_companion.cli import main, parser
from xai_companion.train import Config

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(file.relative_to(NBS) for file in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts)
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "XAI_COMPANION_QUIET": "1"}  # for the environment of a process


def seed(number=0):
    return torch.Generator().manual_seed(number)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noise(count=12, channels=3, height=16, width=None, number=0):
    "Images of bytes"
    return torch.randint(256, (count, channels, height, width or height), generator=seed(number)).byte()


def equal(one, two):
    "Two lists of tensors have the same values"
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def same(a, b):
    "Two networks have the same bits"
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def toy(count=40, classes=3, size=16, seed=0):
    "Noise whose brightest channel is the class"
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 180, (count, 3, size, size), generator=generator)
    labels = torch.arange(count) % classes
    images[torch.arange(count), labels] += 75
    return images.byte(), labels


def small_net(classes=3, seed=0):
    "Convolution, batch norm, dropout, linear"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                             nn.Dropout(0.3), nn.Linear(24, classes))


BASE = Config(model="own", size=16, epochs=4, batch=8, lr=0.05)


def parsed(*words):
    "The arguments of a command, parsed"
    return parser().parse_args(list(map(str, words)))


def command(*words):
    "The exit code of a command, run in this process; errors come through with --debug only"
    return main(list(map(str, words)))


def one_of_two(rank, work, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_two_processes(work, folder):
    "What `work(rank, folder)` gives in each of two processes that talk by gloo"
    mp.spawn(one_of_two, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def three_loops(z, labels, temperature=0.1, base_temperature=0.07, background=(), background_weight=1.0):
    "The formula of the paper, with nothing but Python's numbers"
    def similarity(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / temperature

    views = [(vector, int(label)) for vectors, label in zip(z.tolist(), labels, strict=True) for vector in vectors]
    background = background.tolist() if len(background) else []
    total = 0.0
    for i, (anchor, label) in enumerate(views):
        normaliser = sum(background_weight * math.exp(similarity(anchor, b)) for b in background)
        positives = []
        for a, (other, its_label) in enumerate(views):
            if a != i:
                normaliser += math.exp(similarity(anchor, other))
                positives += [other] if its_label == label else []
        for positive in positives:
            total -= (similarity(anchor, positive) - math.log(normaliser)) / len(positives)
    return temperature / base_temperature * total / len(views)
