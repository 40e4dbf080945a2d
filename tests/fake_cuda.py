"""CUDA without a GPU: a device "cuda" whose tensors compute on the CPU.

A tensor on it is one of torch's fake tensors, which knows its shape, type and device, and beside it
has its numbers, which lie on the CPU. Every operation runs twice: with the fake tensors, where
torch itself refuses tensors of different devices or types, and with the numbers, so that code that
reads some goes on as it would on a GPU. What torch cannot fake, because the shape of the result
depends on numbers, runs with the numbers alone. Custom kernels (Triton) do not run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
aten, prim = torch.ops.aten, torch.ops.prim


def on_cuda(value: Any) -> bool:
    "Whether a value is a tensor on the device, or the device itself."
    if isinstance(value, FakeTensor):
        return value.fake_device.type == "cuda"
    return isinstance(value, torch.device) and value.type in ("cuda", "lazy")


def numbers(x: Tensor) -> Tensor:
    "The numbers of a tensor on the device, on the CPU; they are its own, not a copy."
    return x.numbers if isinstance(x, FakeTensor) else x


class FakeCuda(TorchDispatchMode):
    "Inside, `cuda` is a device. `waits` counts the reads for which a GPU would have to finish."

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.operations, self.waits = FakeTensorMode(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is prim.device.default:
            return torch.device(
                "lazy"
            )  # autograd would send what is on CUDA to a thread of its own
        given = [*flat(args), *flat(kwargs)]
        if not any(map(on_cuda, given)):
            return function(*args, **kwargs)
        if kwargs.get("device") is not None and on_cuda(kwargs["device"]):
            kwargs["device"] = CUDA
        self.operations += 1
        shape = self.shape_of(function, args, kwargs)
        real = self.number_of(function, args, kwargs)
        if function._schema.is_mutable and isinstance(real, Tensor):
            return next(x for x in [kwargs.get("out"), *given] if isinstance(x, Tensor))
        goes_back = kwargs.get("device") is not None and not on_cuda(kwargs["device"])
        if goes_back or function is aten._local_scalar_dense.default:
            self.waits += not kwargs.get("non_blocking", False)
        return self.joined(shape, real, to_cpu=goes_back)

    def blank(self, x: Tensor) -> FakeTensor:
        "A fake tensor like one on the CPU; torch's own conversion keeps a reference to that."
        if isinstance(x, FakeTensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    def shape_of(self, function, args, kwargs) -> Any:
        "The result with fake tensors; None where it depends on numbers."
        kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self.blank, (args, kwargs))
            try:
                return function(*args, **kwargs)
            except UNKNOWN:
                return None

    def number_of(self, function, args, kwargs) -> Any:
        there = {"device": CPU} if kwargs.get("device") is not None else {}
        args, kwargs = tree_map_only(Tensor, numbers, (args, kwargs | there))
        try:
            return function(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            if "norm" not in function._opname:
                raise
            # a CPU has not all norms in 16 bits, with means in 32
            wide = lambda x: x.float() if x.dtype == torch.float16 else x
            return function(*tree_map_only(Tensor, wide, args), **kwargs)

    def joined(self, shape: Any, real: Any, to_cpu: bool) -> Any:
        "Tensors on the device from shapes and numbers."
        if isinstance(real, (tuple, list)):
            shapes = shape if shape is not None else [None] * len(real)
            return type(real)(self.joined(*pair, to_cpu) for pair in zip(shapes, real))
        if not isinstance(real, Tensor) or to_cpu:
            return real
        if shape is None:  # the number of a masked selection, say
            with self.fake:
                shape = torch.empty_strided(
                    real.shape, real.stride(), dtype=real.dtype, device=CUDA
                )
        if shape.fake_device.type == "cpu":
            return real
        if shape.numel() and not real.numel():  # statistics that only CUDA returns
            real = torch.full(shape.shape, torch.nan)
        assert shape.shape == real.shape, (shape, real)
        shape.numbers = real.to(shape.dtype)  # a CPU keeps some means of 16 bits in 16 bits, too
        return shape


def flat(values: Any) -> list:
    "The arguments of an operation, also those in lists."
    values = values.values() if isinstance(values, dict) else values
    return [y for x in values for y in (flat(x) if isinstance(x, (list, tuple)) else [x])]


def replace_parameter(old: Tensor, new: Tensor) -> None:
    "What `Module.to` does to a parameter on the device; torch itself refuses one that others know."
    if old.dtype != new.dtype:
        old.data = new.data
    old.numbers = new.numbers


def copied(old: Tensor, memo: dict[int, Any]) -> Tensor:
    "A deep copy; torch would copy the storage of a buffer, which is elsewhere."
    new = old.detach().clone()
    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return memo.setdefault(id(old), new)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    "A machine with one CUDA device, as far as torch says; plain torch is its only code."
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    patches = [
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.cuda.device_count", lambda: 1),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
        mock.patch("torch.cuda.mem_get_info", lambda device=None: (1 << 36, 1 << 37)),  # free, all
        mock.patch("torch.cuda.memory_reserved", lambda device=None: 0),
        mock.patch("torch.cuda.memory_allocated", lambda device=None: 0),
        mock.patch("torch.utils.swap_tensors", replace_parameter),
        mock.patch.object(FakeTensor, "is_cuda", property(on_cuda), create=True),
        mock.patch.object(FakeTensor, "data_ptr", lambda x: numbers(x).data_ptr(), create=True),
        mock.patch.object(FakeTensor, "__deepcopy__", copied, create=True),
        mock.patch.object(Tensor, "pin_memory", lambda self, device=None: self),
    ]
    for patch in patches:
        patch.start()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with FakeTensorMode():
            pass  # puts a guard that does nothing in the place of that of CUDA's driver
        with FakeCuda() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for patch in patches:
            patch.stop()
