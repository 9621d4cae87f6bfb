"""A GPU where there is none: tensors whose device is cuda:0 and whose memory the host cannot touch. What is computed
with them is computed by the CPU, Triton's kernels by its interpreter; an operator that is given tensors of two devices
is refused as CUDA refuses it.

For a process of its own: torch forgets nothing of what is registered here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fastalign
from fastalign import use_backend

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UNDERNEATH = torch.device("privateuseone", 0)  # autograd asks the device for its guard: cuda has none here
ACROSS = {aten.copy_.default, aten._to_copy.default}  # from one device to another
OURS, THEIRS = f"{Path(fastalign.__file__).parent}{os.sep}", ("transformers", "accelerate", "trl")
waits: list[str] = []  # file:line of this package's code wherever the host waited for the GPU
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class GPUTensor(torch.Tensor):
    """`on_host`, which nothing outside this file may read, has its numbers."""

    on_host: torch.Tensor
    device, is_cuda = GPU, True

    @staticmethod
    def __new__(cls, on_host: torch.Tensor) -> GPUTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, on_host.shape, strides=on_host.stride(), storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype, device=UNDERNEATH, requires_grad=False,
        )  # fmt: skip
        made.on_host = on_host
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})

    def tolist(self) -> Any:  # torch refuses it to subclasses
        note_a_wait()
        return self.on_host.tolist()

    def data_ptr(self) -> int:
        return self.on_host.data_ptr() | 1 << 62  # to be compared; whoever reads there gets a segmentation fault

    def untyped_storage(self) -> torch.UntypedStorage:  # for its identity and size
        return self.on_host.untyped_storage()

    def storage(self) -> torch.TypedStorage:
        return self.on_host.storage()

    def __repr__(self) -> str:
        return f"GPUTensor({self.on_host!r})"


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if op.namespace == "aten" and op._can_decompose():  # inference mode hands over what others see in its parts
        return op.decompose(*args, **kwargs)
    refuse_two_devices(op, args, kwargs)
    place = kwargs.get("device")
    if place is not None:
        kwargs = {**kwargs, "device": CPU}
    host_args, host_kwargs = pytree.tree_map_only(GPUTensor, lambda x: x.on_host, (args, kwargs))
    with use_backend("triton") if op.namespace == "fastalign" else contextlib.nullcontext():
        result = op(*host_args, **host_kwargs)
    leaves = op is aten._local_scalar_dense.default or (place is not None and torch.device(place).type == "cpu")
    if leaves or asks_for_numbers(op, args) or (op is aten.copy_.default and host_args[0] is args[0]):
        note_a_wait()
    if leaves:
        return result
    given = {id(x.on_host): x for x in tensors(args, kwargs) if isinstance(x, GPUTensor)}  # of operators in place
    of_inference = torch.is_inference_mode_enabled() and not (op.is_view and not args[0].is_inference())
    with torch.inference_mode(of_inference):  # a view is of the kind that it views
        return pytree.tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else GPUTensor(x), result)


def asks_for_numbers(op: Any, args: Any) -> bool:
    """Whether the host must know some to go on: how many places a mask has; or sends some, as an index."""
    if op in INDEXED:
        return any(x is not None and (x.dtype == torch.bool or not isinstance(x, GPUTensor)) for x in args[1])
    return torch.Tag.dynamic_output_shape in op.tags


def note_a_wait() -> None:
    """Unless another library, called by this package or not, waits."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] not in THEIRS:
        if frame.f_code.co_filename.startswith(OURS):
            waits.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            return
        frame = frame.f_back


def tensors(*arguments: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]


def refuse_two_devices(op: Any, args: Any, kwargs: Any) -> None:
    """As CUDA does: numbers (tensors of no dimension) and indices may be the host's."""
    if op in ACROSS:
        return
    given = tensors(args[:1] if op in INDEXED else args, kwargs)
    strangers = [x for x in given if not isinstance(x, GPUTensor) and x.dim()]
    if strangers and any(isinstance(x, GPUTensor) for x in tensors(args, kwargs)):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, got cuda:0 and cpu")


def register() -> list[torch.library.Library]:
    """Constructors that name the device come here, and what torch calls with __torch_dispatch__ switched off."""
    _setup_privateuseone_for_python_backend("emulated")
    # Others ask for a device by it; before the GPU is there, that is the CPU. Memory is asked of a C++ allocator.
    for name, answer in {"is_available": False, "current_accelerator": None, "empty_cache": None}.items():
        setattr(torch.accelerator, name, lambda *_, _answer=answer, **__: _answer)
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    for key in ("CUDA", "PrivateUse1"):
        everything.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), key)
        for op in (aten.copy_.default, aten._to_copy.default, aten.detach.default):
            some.impl(op, lambda *args, _op=op, **kwargs: run(_op, args, kwargs), key)
    return [everything, some]


class Names(TorchFunctionMode):
    """`cuda` is `cuda:0`: torch would ask CUDA's library which device is the current one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def with_index(x: Any) -> Any:
            return GPU if isinstance(x, (str, torch.device)) and x in ("cuda", torch.device("cuda")) else x

        args, kwargs = pytree.tree_map(with_index, (args, kwargs or {}))
        return function(*args, **kwargs)


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    """Until it ends torch has a GPU. For good: what is registered of torch.library."""
    properties = SimpleNamespace(name="emulated", total_memory=2**34, major=9, minor=0, multi_processor_count=1)
    answers: dict[str, Any] = {
        "is_available": True, "_lazy_init": None, "device_count": 1, "current_device": 0, "set_device": None,
        "synchronize": None, "is_bf16_supported": False, "get_device_name": "emulated", "empty_cache": None,
        "get_device_properties": properties, "get_device_capability": (9, 0), "manual_seed_all": None,
        "mem_get_info": (2**33, 2**34), "memory_allocated": 0, "max_memory_allocated": 0,
        "device": contextlib.nullcontext(), "is_current_stream_capturing": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, Names():
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # or parameters keep their class
        yield


_registered = register()  # before autograd's first pass: it counts devices once
