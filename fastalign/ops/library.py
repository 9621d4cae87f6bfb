"""The torch.library namespace in which all ops register, and the access to the native extension.

Forward and backward are separate ops without autograd, wrapped by a `torch.autograd.Function` in `setup_context` form.
That form works under func.grad, vmap, gradcheck and fullgraph compile; `register_autograd` does not. Its backward pass
calls the second op through `once`, because autograd may be recording there (func.grad does, for a second derivative).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastalign import backend
from fastalign._base.errors import UserError

Op = Callable[..., Any]

_library = torch.library.Library("fastalign", "DEF")


def define(
    schema: str,
    cpu: Op | None,
    fake: Op,
    *,
    triton: str,
    check: Op | None = None,
    leading_dims: bool = False,
    vmap_in_turn: bool = False,
) -> Op:
    """Define `fastalign::<schema>` with its CPU implementation (None: it has none) and its shapes; returns the callable
    op.

    `triton`: "file.function" in fastalign.kernels, the launcher that takes the same arguments on GPU tensors.
    `check`: called first where the tensors are on the CPU and their values may be read. `leading_dims`: its tensors may
    have any leading dimensions, so vmap adds one. `vmap_in_turn`: they may not, and vmap calls the op (which returns
    several tensors) once per example.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)

    def launch(*args):
        from fastalign import kernels

        with on_the_device_of(*args):
            return kernels.launcher(triton)(*args)

    def on_cpu(*args):
        if check is not None:
            check(*args)
        return launch(*args) if cpu is None or backend.forced() == "triton" else cpu(*args)

    def without_tape(*args):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"fastalign::{name} was reached without its gradient, as torch.compile(torch.func.grad(f)) does: "
                "compile f itself, or call torch.func.grad(f) uncompiled"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, without_tape, "Autograd")
    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, launch, "CUDA")
    torch.library.register_fake(f"fastalign::{name}", fake, lib=_library)
    op = getattr(torch.ops.fastalign, name).default
    if leading_dims:
        torch.library.register_vmap(f"fastalign::{name}", _one_more_dimension(op), lib=_library)
    if vmap_in_turn:
        torch.library.register_vmap(f"fastalign::{name}", _each_in_turn(op), lib=_library)
    return op


def on_the_device_of(*args: Any) -> AbstractContextManager[Any]:
    """Makes the first tensor's GPU the current one: Triton launches on that, whatever the tensors'.

    Raises UserError if they lie on several devices.
    """
    devices = list(dict.fromkeys(x.device for x in args if isinstance(x, torch.Tensor)))
    if len(devices) > 1:
        raise UserError(f"tensors must be on one device, got {' and '.join(map(str, devices))}")
    return torch.cuda.device(devices[0]) if devices and devices[0].type == "cuda" else nullcontext()


def _one_more_dimension(op: Op) -> Op:
    def batched(info, in_dims, *args):
        def leading(x, dim):
            if not isinstance(x, torch.Tensor):
                return x
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        out = op(*(leading(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return out, (0,) * len(out) if isinstance(out, tuple) else 0

    return batched


def _each_in_turn(op: Op) -> Op:
    def batched(info, in_dims, *args):
        def example(x, dim, i):
            return x.select(dim, i) if isinstance(x, torch.Tensor) and dim is not None else x

        results = [
            op(*(example(x, dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)
        ]
        out = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return out, (0,) * len(out)

    return batched
