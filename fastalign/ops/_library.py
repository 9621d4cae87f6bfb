"""The torch.library namespace that all ops register in, and the door to the engine.

Forward and backward are separate ops without autograd; a `torch.autograd.Function` in `setup_context` form stands
outside them. That form works under func.grad, vmap, gradcheck and fullgraph compile; `register_autograd` does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("fastalign", "DEF")


def define(schema: str, cpu: Callable, fake: Callable) -> Callable:
    """Define `fastalign::<schema>` with its CPU implementation and its shapes; returns the callable op."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"fastalign::{name}", fake, lib=_library)
    return getattr(torch.ops.fastalign, name).default


def threads() -> int:
    return torch.get_num_threads()
