"""The torch.library namespace that all ops register in, and the door to the engine.

Forward and backward are separate ops without autograd; a `torch.autograd.Function` in `setup_context` form stands
outside them. That form works under func.grad, vmap, gradcheck and fullgraph compile; `register_autograd` does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("fastalign", "DEF")


def define(schema: str, cpu: Callable, fake: Callable, *, leading_dims: bool = False) -> Callable:
    """Define `fastalign::<schema>` with its CPU implementation and its shapes; returns the callable op.

    `leading_dims`: its tensors take any leading dimensions, so that vmap is one more of them.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"fastalign::{name}", fake, lib=_library)
    op = getattr(torch.ops.fastalign, name).default
    if leading_dims:
        torch.library.register_vmap(f"fastalign::{name}", _one_more_dimension(op), lib=_library)
    return op


def _one_more_dimension(op: Callable) -> Callable:
    def batched(info, in_dims, *args):
        def leading(x, dim):
            if not isinstance(x, torch.Tensor):
                return x
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        out = op(*(leading(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return out, (0,) * len(out) if isinstance(out, tuple) else 0

    return batched


def threads() -> int:
    return torch.get_num_threads()
