"""Gradients that have no gradient of their own: to differentiate them raises, where torch would leave it out of the
result.

torch's once_differentiable does so only where the gradient that comes in has a tape, which that of a plain sum has not,
and its fallback for an op without a derivative warns and goes on with a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(function: Callable, *args: Any) -> Any:
    """function(*args), tensors without a derivative: whatever of `args` asks for one is told, when it is asked for.

    For the backward pass of an autograd.Function in `setup_context` form: under torch.func, too, which always keeps a
    tape.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # what is compiled refuses by itself
        return function(*args)
    return _Once.apply(function, *args)


def once_differentiable(backward: Callable) -> Callable:
    """The same for the backward pass of a Function that torch.func does not take: a decorator under @staticmethod."""

    def guarded(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        # It hangs on what was saved and on what went into that, so it is not looked for which tensors have a tape.
        return _Once.apply(lambda _: backward(ctx, *grads), torch.empty(0, requires_grad=True))

    return guarded


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function, *args):
        return function(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "fastalign's compiled gradients cannot be differentiated again; "
            "with fastalign.use_backend('reference') everything is plain torch, which can"
        )
