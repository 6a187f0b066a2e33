"""Tensors that say they are on a GPU and hold their numbers on the CPU: device mistakes show without a GPU.

Inside of `pretend`, ``x.to("cuda")`` and ``torch.zeros(3, device="cuda")`` give such a tensor. As on a GPU it is an
error to mix it with tensors of the CPU (but for single numbers), to draw with a generator of the other device, to
index a tensor of the CPU with it, or to ask for its ``numpy()``. What needs a real GPU (kernels, speed, memory) does
not show.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_Generator = torch.Generator


class Mismatch(RuntimeError):
    """Two devices met that must not."""


class Generator(_Generator):
    """A generator of the CPU that may say it is one of the GPU."""

    def __new__(cls, device="cpu"):
        self = _Generator.__new__(cls, "cpu")
        self.says = torch.device(device)
        return self

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: self.says)

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


class OnGPU(torch.Tensor):
    """The wrapper of a tensor `inner` of the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="meta", requires_grad=False)  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda, is_cpu, is_meta = property(lambda self: True), property(lambda self: False), property(lambda self: False)

    def __repr__(self):
        return f"OnGPU({self.inner})"

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self):
        return self.inner.tolist()

    def cpu(self):
        return _Down.apply(self)

    def __deepcopy__(self, memo):
        copy = OnGPU(self.inner.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copy, self.requires_grad) if getattr(self, "_is_param", False) else copy

    def __reduce_ex__(self, protocol):  # saved as what ``map_location="cpu"`` would read
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.inner


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return OnGPU(grad)


_GPU = ("cuda", "meta")  # wrappers say "meta" to what asks below Python


def _kind(device) -> str:
    return "" if device is None else torch.device(device).type


def _run(func, args, kwargs):
    """One operation of ATen on the inner tensors; its results are on the GPU if anything was."""
    flat, _ = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, OnGPU)]
    theirs = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) and x.dim()]
    name, asked = str(func), _kind(kwargs.get("device"))
    copies = name.startswith(("aten.copy_", "aten._to_copy", "aten.copy."))
    indexed = name.startswith(("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index"))
    if ours and theirs and not copies and not (indexed and isinstance(args[0], OnGPU)):
        raise Mismatch(f"{name} mixes {[tuple(x.shape) for x in theirs]} on the CPU with tensors on the GPU")
    down = copies and (asked == "cpu" or not isinstance(args[0], OnGPU) and ours)
    kwargs = dict(kwargs, device=torch.device("cpu")) if asked else kwargs
    known = {id(x.inner): x for x in ours}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
    made = func(*inner_args, **inner_kwargs)
    up = (ours or asked in _GPU) and not down

    def wrapped(x):
        if id(x) in known:
            return known[id(x)]
        return OnGPU(x) if up and isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x

    return tree_map(wrapped, made)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, _ = tree_flatten((args, kwargs or {}))
        asked = _kind((kwargs or {}).get("device"))
        if asked in _GPU or any(isinstance(x, OnGPU) for x in flat):
            return _run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "to" and isinstance(args[0], torch.Tensor):
            return _to(func, *args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        ours, asked = any(isinstance(x, OnGPU) for x in flat), kwargs.get("device")
        gpu = _kind(asked) == "cuda" if asked is not None else ours
        for generator in (x for x in flat if isinstance(x, _Generator)):
            if (generator.device.type == "cuda") != gpu:
                raise Mismatch(f"{name} on the {'GPU' if gpu else 'CPU'} with a generator on {generator.device}")
        if gpu:
            kwargs.pop("device", None)
        if gpu and (name == "new_tensor" or not ours):  # a factory
            args = (args[0].inner, *args[1:]) if name == "new_tensor" else args
            with torch._C.DisableTorchFunction():
                made = func(*args, **kwargs)
            return OnGPU(made.detach()).requires_grad_(made.requires_grad)
        return func(*args, **kwargs)


def _to(func, x, *rest, device=None, non_blocking=False, **kwargs):
    """``Tensor.to`` in its three forms."""
    for each in rest:
        if isinstance(each, torch.Tensor):
            device, kwargs["dtype"] = each.device, each.dtype
        elif isinstance(each, (str, torch.device)):
            device = each
        elif isinstance(each, torch.dtype):
            kwargs["dtype"] = each
    if device is not None and (_kind(device) == "cuda") != isinstance(x, OnGPU):
        x = x.cpu() if isinstance(x, OnGPU) else _Up.apply(x)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    return func(x, **kwargs) if kwargs else x


@contextmanager
def pretend():
    """A place where "cuda" is a device."""
    with mock.patch.object(torch, "Generator", Generator), _Dispatch(), _Functions(), \
            mock.patch.object(torch.cuda, "get_device_name", lambda device=None: "pretended"):  # fmt: skip
        yield
