"""Gradients without a derivative: differentiating them raises, where torch would omit them from the result.

torch's once_differentiable raises only if the incoming gradient requires grad, which that of a plain sum does not; and
torch's fallback for an op without a derivative warns and continues with a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(function: Callable, *args: Any) -> Any:
    """function(*args), as tensors without a derivative: differentiating them with respect to `args` raises.

    For the backward pass of an autograd.Function in `setup_context` form; also under torch.func, which always records.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # compiled code raises by itself
        return function(*args)
    return _Once.apply(function, *args)


def once_differentiable(backward: Callable) -> Callable:
    """The same for the backward pass of a Function that torch.func does not support: a decorator under
    @staticmethod."""

    def guarded(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        # It is attached to the saved tensors and their inputs, without looking which of them require grad.
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
