"""Merges of task vectors of which only some elements stay: their definition in plain torch.

A task vector is a model's tensor less the base's. Each loses elements (a Choice says which), is scaled and weighted;
then the vectors are added up, or, with `elect`, only those elements that have the sign of the weighted sum (TIES, arXiv
2306.01708: elect and disjoint merge); with `normalize` the sum is divided by the weights that took part in it.

csrc/soup_tasks.cpp does the same from file to file; where the engine is not built, this does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign import reference
from fastalign.soup.tasks import Choice, Tasks

_BLOCK = 64  # random numbers that one block of counters gives


def merge_tensor(inputs: Sequence[Tensor], tasks: Tasks, dtype: torch.dtype) -> list[Tensor]:
    """The outputs for one tensor. inputs: the base, then the models; in float32, in float64 where one of them is."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    base, *models = [x.detach().reshape(-1).to(wide) for x in inputs]
    deltas = [
        sparse(model - base, choice, tasks.seed, tasks.row) for model, choice in zip(models, tasks.choices, strict=True)
    ]
    found = []
    for row in tasks.weights:
        weighted = torch.stack([x * (w * c.scale) for x, w, c in zip(deltas, row, tasks.choices, strict=True)])
        weights = torch.tensor(row, dtype=wide)[:, None]
        total = weighted.sum(0)
        if tasks.elect:
            taken = torch.where(total >= 0, weighted > 0, weighted < 0)
            merged = torch.where(total.isnan(), total, (weighted * taken).sum(0))
            divisor = (weights * taken).sum(0)
            divisor[divisor == 0] = 1
        else:
            merged, divisor = total, weights.sum()
            divisor = divisor if divisor.abs() >= 1e-8 else torch.ones((), dtype=wide)
        if tasks.normalize:
            merged = merged / divisor
        found.append(reference.weighted_sums([base + tasks.factor * merged], [[1.0]], dtype)[0].view(inputs[0].shape))
    return found


def sparse(delta: Tensor, choice: Choice, seed: int, row: int) -> Tensor:
    """A flat task vector with zeros for what is dropped; scaled by its probabilities or its sum, not yet by `scale`."""
    kept = delta * mask(delta, choice, seed, row)
    if choice.own_scale:
        kept = (kept.double() / _chances(delta, choice, row)).to(delta.dtype)
    if choice.match_sum:
        before, after = delta.double().abs().sum(), kept.double().abs().sum()
        if before >= 1e-7 and after >= 1e-7:
            kept = kept * (before / after)
    return kept.to(delta.dtype)


def mask(delta: Tensor, choice: Choice, seed: int, row: int) -> Tensor:
    """Which elements of a flat task vector stay, (n,) bool."""
    n = len(delta)
    if choice.keep == "all":
        return torch.ones(n, dtype=torch.bool)
    if choice.keep == "band":
        order = delta.abs().argsort(descending=choice.largest_first, stable=True)
        first, last = (n - choice.last, n - choice.first) if choice.largest_first else (choice.first, choice.last)
        stays = torch.zeros(n, dtype=torch.bool)
        stays[order[first:last]] = True
        return stays
    chances = (
        torch.tensor(choice.probability, dtype=torch.float64)
        if choice.keep == "random"
        else _chances(delta, choice, row)
    )
    return random_words(n, seed, choice.stream).double() < chances * 2.0**32


def _chances(delta: Tensor, choice: Choice, row: int) -> Tensor:
    """Of staying, by the rank of the size within the row, (n,) float64."""
    if row <= 1:
        return torch.full((len(delta),), choice.probability, dtype=torch.float64)
    order = delta.view(-1, row).abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(row).expand_as(order))
    step = 2 * choice.spread / (row - 1)
    return ((choice.probability - choice.spread) + ranks.double() * step).view(-1)


def random_words(n: int, seed: int, stream: int) -> Tensor:
    """Elements' 32-bit random numbers, (n,) int64: j's is word (j % 64) // 16 of Philox4x32-10 with key `seed` and the counter
    (stream, j // 64 * 16 + j % 16)."""
    blocks = -(-n // _BLOCK)
    words = reference.philox(seed, torch.tensor(stream), torch.arange(blocks * _BLOCK // 4))
    return words.view(blocks, _BLOCK // 4, 4).transpose(1, 2).reshape(-1)[:n]
