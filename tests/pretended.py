"""A device that is pretended. Its numbers lie on the CPU; what CUDA refuses, it refuses, and it counts how often the CPU waits.

It serves to find, without a GPU, tensors that were made on the wrong device and transfers that nobody needs. It says
nothing about speed, precision or kernels.
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
# torch 2.10 and newer; beside a real GPU it could pass for the accelerator of the process
AVAILABLE = hasattr(registration, "_setup_privateuseone_for_python_backend") and not torch.cuda.is_available()
aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}  # between devices: allowed
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}  # with indices
# on the CPU: allowed
MADE_ON_CPU = {torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.asarray}  # from numbers, whatever the device


class Pretended(torch.Tensor):
    "A tensor of the pretended device; its numbers are in `raw`, on the CPU"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        self = cls._make_wrapper_subclass(cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
                                          dtype=raw.dtype, device=torch.device(NAME, 0))
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        waits["transfers to the CPU"] += 1
        return self.raw.tolist()

    def __reduce_ex__(self, protocol):
        return self.raw.__reduce_ex__(protocol)

    def __repr__(self):
        return f"pretended {self.raw!r}"


waits = Counter()  # how often the CPU has waited for the device, by reason


def is_ours(device):
    return device is not None and torch.device(device).type == NAME


def tensors_in(values):
    "The tensors among some arguments, which may be lists of tensors"
    groups = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
    return [value for group in groups for value in group if isinstance(value, torch.Tensor)]


def changed(value, change):
    "A value, or a list of values, with `change` made to each tensor"
    if isinstance(value, (list, tuple)):
        return type(value)([change(v) if isinstance(v, torch.Tensor) else v for v in value])
    return change(value) if isinstance(value, torch.Tensor) else value


def without_device(tensor):
    return tensor.raw if isinstance(tensor, Pretended) else tensor


def _check_devices(func, args, kwargs, ours):
    "Raise where CUDA would: tensors of the CPU may be single numbers, sources of copies, and indices"
    if func in COPIES:
        return
    strangers = [t for t in tensors_in((*args, *kwargs.values())) if not isinstance(t, Pretended) and t.dim()]
    if func in INDEXING and isinstance(args[0], Pretended):
        values = args[2:3]
        waits["transfers to the device"] += sum(t is not v for t in strangers for v in values or [None])
        strangers = [t for t in strangers if any(t is v for v in values)]
    if ours and strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {NAME}:0 and cpu")


def _count_waits(func, args, kwargs, ours):
    "Note what makes the CPU wait: numbers that it reads, sizes that it must know, copies that block"
    if func is aten._local_scalar_dense.default:
        waits["numbers read"] += 1
    elif func in (aten.nonzero.default, aten.masked_select.default, aten._unique2.default):
        waits["sizes"] += 1
    elif func in INDEXING:
        waits["sizes"] += sum(isinstance(t, Pretended) and t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))
    elif func is aten._to_copy.default and is_ours(kwargs.get("device")) and not ours:
        waits["transfers to the device"] += not kwargs.get("non_blocking")
    elif func is aten._to_copy.default and ours and kwargs.get("device") is not None and not is_ours(kwargs["device"]):
        waits["transfers to the CPU"] += 1
    elif func is aten.copy_.default and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
        waits["transfers to the CPU" if isinstance(args[1], Pretended) else "transfers to the device"] += 1


def run(func, args, kwargs):
    "An operation on the CPU, with its result on the device on which it belongs"
    ours = [t for t in tensors_in((*args, *kwargs.values())) if isinstance(t, Pretended)]
    _check_devices(func, args, kwargs, ours)
    _count_waits(func, args, kwargs, ours)
    device = kwargs.get("device")
    there = isinstance(args[0], Pretended) if func is aten.copy_.default else bool(ours) if device is None else is_ours(device)
    kwargs = {k: changed(v, without_device) for k, v in kwargs.items() if k != "pin_memory"}
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(*(changed(v, without_device) for v in args), **kwargs)
    known = {id(t.raw): t for t in ours}  # what is changed in place comes back as itself
    return changed(out, lambda t: known[id(t)] if id(t) in known else Pretended(t)) if there else out


class _Factories(TorchDispatchMode):
    "Makes tensors on the device, when asked to"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}) if is_ours((kwargs or {}).get("device")) else func(*args, **(kwargs or {}))


def _index(index):
    "An index in which lists of numbers are tensors"
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(torch.tensor(list(part)) if isinstance(part, (list, range)) else part for part in parts)
    return parts if isinstance(index, tuple) else parts[0]


class _FromNumbers(TorchFunctionMode):
    "Makes tensors from numbers on the CPU, and sends them to the device"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretended):
            return func(args[0], _index(args[1]), *args[2:])
        if func in MADE_ON_CPU and is_ours(kwargs.get("device")) and not (args and isinstance(args[0], torch.Tensor)):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretended):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(kwargs.get("device", args[0].device))
        return func(*args, **kwargs)


class _Backend(registration._DummyBackendModule if AVAILABLE else object):
    there = False  # outside `pretending`, nobody must find the device: `DataParallel` takes what it finds

    def is_available(self):
        return self.there

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def _without_gradients(mode=True):
    "In the place of inference mode, which has no place for such tensors"
    return torch.no_grad() if mode else torch.enable_grad()


LIBRARY = torch.library.Library("_", "IMPL", "AutocastPrivateUse1") if AVAILABLE else None


def register():
    "Make the device known to PyTorch: once per process, and before its first gradient, which counts the devices"
    registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    LIBRARY.fallback(torch.library.fallthrough_kernel)


@contextmanager
def pretending():
    "Inside the block there is a device; gives it"
    waits.clear()
    there = mock.patch.object(_Backend, "there", True)
    with there, mock.patch("torch._C._InferenceMode", _without_gradients), _FromNumbers(), _Factories():
        yield torch.device(NAME, 0)
