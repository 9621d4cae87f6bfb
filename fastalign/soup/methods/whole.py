"""Methods that are no weighted sum of whole tensors: NuSLERP by rows, SCE, NearSwap, Arcee Fusion, RAM. Made by torch, tensor by
tensor; one tensor of every model is held.

They are mergekit's, and mean what mergekit makes of them, but for Arcee Fusion's quartiles of more than a million elements,
which it draws a sample for and which are exact here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign.soup.checkpoint import Checkpoint, in_torch, read_bytes
from fastalign.soup.methods import spheres as geometry
from fastalign.soup.stream import mix_tensors

Merge = Callable[[Tensor | None, list[Tensor], np.ndarray, Mapping[str, Any]], list[Tensor]]


def blocks_of(
    method: str,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    names: Sequence[str],
    settings: Callable[[str], tuple[np.ndarray, Mapping[str, Any]]],
    stored: Mapping[str, str],
) -> dict[str, Callable[[], Iterator[list[Tensor]]]]:
    """For each tensor what makes its one block, K outputs'. settings: a tensor's weights (K, m) and its numbers; stored: the
    types to store in."""
    return {
        name: functools.partial(_block, _MERGES[method], models, base, name, settings, in_torch(stored[name]))
        for name in names
    }


def _block(
    merge: Merge,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    name: str,
    settings: Callable[[str], tuple[np.ndarray, Mapping[str, Any]]],
    dtype: torch.dtype,
) -> Iterator[list[Tensor]]:
    if not models[0][name].count:
        return
    held = [None if one is None else _read(one, name) for one in (base, *models)]
    wide = torch.float64 if torch.float64 in (dtype, *(x.dtype for x in held if x is not None)) else torch.float32
    start, *others = [None if x is None else x.to(wide) for x in held]
    made = merge(start, others, *settings(name))
    yield [x if x.dtype == dtype else mix_tensors([x], [[1.0]], dtype)[0] for x in made]


def _read(model: Checkpoint, name: str) -> Tensor:
    tensor = model[name]
    return torch.frombuffer(bytearray(b"".join(read_bytes(model, name))), dtype=in_torch(tensor.dtype)).view(
        tensor.shape
    )


def nuslerp(base: Tensor | None, models: list[Tensor], weights: np.ndarray, values: Mapping[str, Any]) -> list[Tensor]:
    """Two models, or their task vectors, along great circles: one for each row of the last dimension, or with
    nuslerp_row_wise one for each of the vectors that run along the first."""
    first, second = models if base is None else [model - base for model in models]
    if values["nuslerp_row_wise"] and first.ndim > 1:
        first, second = first.transpose(0, -1), second.transpose(0, -1)
    dot = (first * second).sum(-1)
    gram = torch.stack([(first * first).sum(-1), dot, dot, (second * second).sum(-1)], -1).double().numpy()
    made = []
    for row in weights:
        shares = torch.from_numpy(geometry.nuslerp(gram.reshape(*dot.shape, 2, 2), row)).to(first.dtype)
        one = shares[..., :1] * first + shares[..., 1:] * second
        if values["nuslerp_row_wise"] and first.ndim > 1:
            one = one.transpose(0, -1)
        made.append((one if base is None else base + one).contiguous())
    return made


def sce(base: Tensor, models: list[Tensor], weights: np.ndarray, values: Mapping[str, Any]) -> list[Tensor]:
    """Select, calculate, erase (arXiv 2408.07990): of the task vectors' elements those stay in which they vary most, the
    share select_topk of those that vary; each vector weighs as its mean square, and counts where it has the sign of the sum."""
    deltas = torch.stack([model - base for model in models])
    if values["select_topk"] < 1:
        variance = deltas.var(0, unbiased=False).flatten()
        stay = int(int(variance.count_nonzero()) * values["select_topk"])
        kept = torch.zeros_like(variance)
        kept[variance.sort(descending=True, stable=True).indices[:stay]] = 1
        deltas = deltas * kept.view(base.shape)
    agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    squares = deltas.flatten(1).square().mean(1)
    total = squares.sum()
    shares = squares / total if total >= 1e-6 else torch.full_like(squares, 1 / len(models))
    taken = shares.view(-1, *[1] * base.ndim) * agree
    return [base + (deltas * taken).sum(0) / taken.sum(0).clamp(min=1e-6)]


def nearswap(base: Tensor, models: list[Tensor], weights: np.ndarray, values: Mapping[str, Any]) -> list[Tensor]:
    """The model's element where it is within t of the base's; else the base's, moved towards it by the share t / distance."""
    (model,) = models
    share = (values["t"] / (model - base).abs().clamp(min=1e-6)).clamp(0, 1)
    return [share * model + (1 - share) * base]


def arcee_fusion(base: Tensor, models: list[Tensor], weights: np.ndarray, values: Mapping[str, Any]) -> list[Tensor]:
    """The model's elements that matter, the base's elsewhere: those whose distance from the base's, times the divergence of
    their row's softmaxes, is at least the tensor's median and 1.5 times the distance of its quartiles."""
    (model,) = models
    rows = [x.reshape(-1, x.shape[-1] if x.ndim else 1).softmax(-1) + 1e-8 for x in (model, base)]
    divergence = (rows[0] * (rows[0] / rows[1]).log()).sum(-1, keepdim=True)
    importance = (model - base).abs().reshape(rows[0].shape) * divergence
    flat = importance.flatten()
    low, middle, high = (flat.kthvalue(int(q * (flat.numel() - 1)) + 1).values for q in (0.25, 0.5, 0.75))
    matters = (importance >= middle + 1.5 * (high - low)).view(base.shape)
    return [torch.where(matters, base + (model - base), base)]


def ram(base: Tensor, models: list[Tensor], weights: np.ndarray, values: Mapping[str, Any]) -> list[Tensor]:
    """Reinforced agent merging (arXiv 2601.13572): each element moves by the mean of the task vectors that move it by more
    than epsilon."""
    deltas = torch.stack([model - base for model in models])
    moved = deltas.abs() > values["epsilon"]
    return [base + (deltas * moved).sum(0) / moved.sum(0).clamp(min=1)]


_MERGES: dict[str, Merge] = {
    "nuslerp": nuslerp, "sce": sce, "nearswap": nearswap, "arcee_fusion": arcee_fusion, "ram": ram,
}  # fmt: skip
