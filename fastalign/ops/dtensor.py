"""The fused head with a DTensor weight: the placements determine which products each process computes.

torch.distributed.tensor is imported only if one is passed, because the import takes half a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops import head
from fastalign.ops.token_logprobs import TokenLogprobs
from fastalign.ops.vocab_parallel import vocab_parallel_linear_token_logprobs


def is_dtensor(x: Any) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def among(*inputs: Any) -> bool:
    return any(is_dtensor(x) or (isinstance(x, tuple | list) and among(*x)) for x in inputs)


def gathered(x: Any) -> Any:
    """A DTensor gathered on each process, for its own rows; anything else unchanged."""
    return _Whole.apply(x) if is_dtensor(x) else x


def linear_token_logprobs(
    hidden: Tensor, weight: Any, labels: Tensor, *, bias: Any, adapter: tuple[Any, Any, float] | None, **options: Any
) -> Tensor | TokenLogprobs:
    """See `ops.linear_token_logprobs` on DTensors."""
    a: Any
    b: Any
    a, b, scale = (None, None, 1.0) if adapter is None else adapter
    slices = None
    if is_dtensor(hidden):
        slices = _slices(hidden, weight, {"bias": bias, "adapter's B": b})
        hidden, a = _local(hidden, "hidden"), _local(a, "adapter's A")
    if slices is None:
        weight, bias, a, b = (gathered(x) for x in (weight, bias, a, b))
        function = head.token_logprobs
    else:
        weight = weight.to_local()
        bias, b = (x if x is None else x.to_local() for x in (bias, b))
        function, options = vocab_parallel_linear_token_logprobs, {**options, **slices}
    return function(hidden, weight, _local(labels, "labels"), bias=bias, adapter=adapter and (a, b, scale), **options)


def _local(x: Any, name: str) -> Any:
    """The full tensor, equal on every process, as a plain tensor."""
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        raise UserError(
            f"{name} as a DTensor must be Replicate() on its mesh (or each process's own rows, by to_local()), "
            f"got {x.placements}"
        )
    return x.to_local()


def _slices(hidden: Any, weight: Any, alike: dict[str, Any]) -> dict[str, Any] | None:
    """The group over which the head's rows are split, and the split; None if they are not split over one group."""
    from torch.distributed.tensor import Shard

    if not is_dtensor(weight):
        return None
    along = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(along) != 1 or type(weight.placements[along[0]]) is not Shard or weight.placements[along[0]].dim != 0:
        return None
    mesh = weight.device_mesh
    if hidden.device_mesh != mesh:
        raise UserError(f"hidden and weight must lie on one mesh, got {hidden.device_mesh} and {mesh}")
    for name, x in alike.items():
        if x is not None and not (is_dtensor(x) and x.device_mesh == mesh and x.placements == weight.placements):
            raise UserError(f"{name} must be a DTensor placed as weight is, {weight.placements}")
    vocab, world = weight.shape[0], mesh.size(along[0])
    chunk = -(-vocab // world)  # as torch.chunk and Shard split
    sizes = [min(max(vocab - rank * chunk, 0), chunk) for rank in range(world)]
    return {"group": mesh.get_group(along[0]), "sizes": sizes}


class _Whole(torch.autograd.Function):
    """Averages the gradient over the processes, as FSDP does; if all have the same rows, that is each process's own
    gradient."""

    @staticmethod
    def forward(x):
        return x.full_tensor()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mesh, ctx.placements = inputs[0].device_mesh, inputs[0].placements

    @staticmethod
    def backward(ctx, grad):
        from torch.distributed.tensor import DTensor, Partial

        grad = DTensor.from_local(grad, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return grad.redistribute(placements=ctx.placements) / ctx.mesh.size()
