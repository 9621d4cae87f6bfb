"""Peers that more than one benchmark uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def python_loop(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """GAE: one step of torch operations on (batch,) per token, from the last to the first; padding holds zeros."""
    length = rewards.shape[1]
    running, result = torch.zeros(len(rewards)), []
    for t in range(length - 1, -1, -1):
        upcoming = values[:, t + 1] if t + 1 < length else 0.0
        running = rewards[:, t] + gamma * upcoming - values[:, t] + gamma * lam * running
        result.append(running)
    advantages = torch.stack(result[::-1], 1)
    return advantages, advantages + values


def torch_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax + gather."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def both_passes(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    """A call of the forward pass and of the backward pass of its sum, into fresh gradients."""

    def run():
        for leaf in leaves:
            leaf.grad = None
        forward().sum().backward()

    return run


def head_products(hidden: Tensor, weight: Tensor, tile: int, kept: int | None) -> Callable[[], None]:
    """The matrix products of a fused head's two passes, tile by tile, by the fastest provider: the logits (again, but
    for `kept` tiles), the gradients of hidden and of weight; the minimum in such tiles. None: for a frozen head, whose
    logits are computed once and whose gradient is not."""
    from fastalign.ops import products  # not when an earlier commit is measured

    logits_of_tile, grad = torch.empty(len(hidden), tile), torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight) if kept is not None else None

    @torch.no_grad()
    def run():
        for step, begin in enumerate(range(0, len(weight), tile)):
            part = weight[begin : begin + tile]
            for _ in range(1 if kept is None or step < kept else 2):
                logits = products.linear_into(logits_of_tile[:, : len(part)], hidden, part, kept=False)
            products.add_grad_input(grad, logits, part)
            if grad_weight is not None:
                products.add_grad_weight(grad_weight[begin : begin + tile], logits, hidden, beta=0)

    return run
