"""gae: generalised advantage estimates and value targets from rewards and values per token."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.dtypes import compute_dtype
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.ops import checks
from fastalign.ops.buffers import buffer, rows
from fastalign.ops.library import Op, define


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} - V_t, and returns A + V (arXiv 1506.02438, eq. 16).

    Masked tokens are skipped: t + 1 is the next valid token, so left padding, right padding and holes (tool output
    between a model's turns) give the same result as the valid tokens alone. V is 0 past the last one, where the episode
    ends. Values at masked tokens, including NaN, are never used.

    Args:
        rewards: (..., T) float32, float64, bfloat16 or float16, T >= 1.
        values: the same shape and device, of any of these dtypes; slices such as `values[:, :-1]` are read in place.
        mask: the same shape, bool or 0/1 numbers; 1 = valid.
        gamma: discount, in [0, 1].
        lam: λ in [0, 1]: 0 gives the one-step residual δ, 1 the discounted reward-to-go minus V.

    Returns:
        advantages, returns: (..., T) float32, float64 where rewards or values are; 0 where masked. They are targets: no
        gradient flows through them. A NaN at a valid token affects that token and those before it in its row.

    Raises:
        UserError, TypeError: a shape, dtype, device or option that breaks these rules.

    >>> import torch
    >>> from fastalign import ops
    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
    >>> advantages, returns = ops.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), lam=0.5)
    >>> advantages
    tensor([[0.2500, 0.5000, 1.0000]])
    """
    checks.logits("rewards", rewards)
    checks.logits("values", values)
    for name, x in (("values", values), ("mask", mask)):
        checks.tensor(name, x)
        if x.shape != rewards.shape:
            raise UserError(f"{name}.shape must equal rewards.shape, got {tuple(x.shape)} and {tuple(rewards.shape)}")
        if x.device != rewards.device:
            raise UserError(f"{name} must be on rewards' device, got {x.device} and {rewards.device}")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise UserError(f"{name} must be a number in [0, 1], got {checks.shown(value)}")
    dtype = compute_dtype(torch.promote_types(rewards.dtype, values.dtype))
    rewards, values, mask = rewards.detach().to(dtype), values.detach().to(dtype), mask.detach().bool()
    if backend.choose(rewards.device) == "reference":
        return reference.gae(rewards, values, mask, gamma, lam)
    return gae_op(rewards, values, mask, float(gamma), float(lam))


def _gae_cpu(rewards, values, mask, gamma, lam):
    out = empty.gae(rewards)
    reward_rows, rewards_kept = rows(rewards)
    value_rows, values_kept = rows(values)
    mask = mask.contiguous()
    backend.native.gae(*map(buffer, out), reward_rows, value_rows, buffer(mask), gamma, lam, threads())
    del rewards_kept, values_kept
    return out


gae_op: Op = define(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)",
    _gae_cpu,
    lambda rewards, *_: empty.gae(rewards),
    triton="gae.gae",
    leading_dims=True,
)
