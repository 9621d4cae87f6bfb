"""Methods other than weighted sums of whole tensors: SCE, NearSwap, Arcee Fusion, RAM; in torch, tensor by tensor.

They are mergekit's methods and give the same results, except for Arcee Fusion's quartiles of more than a million
elements, for which mergekit draws a sample; here they are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fastalign.soup.methods.base import ByTensor, Number, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Sce(ByTensor):
    """Select, calculate, erase (arXiv 2408.07990): keeps the share select_topk of the varying elements, those with the
    largest variance among the task vectors; each vector is weighted by its mean square, and counts where it has the
    sign of the sum."""

    name = "sce"
    base = "yes"
    weights = "none"
    parameters: ClassVar[Parameters] = {"select_topk": Number(1.0, 0, 1)}

    def merge(self, base: Tensor, models: list[Tensor], values: Mapping[str, Any]) -> Tensor:
        import torch

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
        return base + (deltas * taken).sum(0) / taken.sum(0).clamp(min=1e-6)


class NearSwap(ByTensor):
    """The model's element if it is within t of the base's; else the base's, moved towards it by the share t /
    distance."""

    name = "nearswap"
    base = "yes"
    most = 1
    weights = "none"
    parameters: ClassVar[Parameters] = {"t": Number(None, 0)}

    def merge(self, base: Tensor, models: list[Tensor], values: Mapping[str, Any]) -> Tensor:
        (model,) = models
        share = (values["t"] / (model - base).abs().clamp(min=1e-6)).clamp(0, 1)
        return share * model + (1 - share) * base


class ArceeFusion(ByTensor):
    """The model's important elements, and the base's elsewhere. Important: the distance from the base's, times the
    divergence of the row's softmaxes, is at least the tensor's median plus 1.5 times its interquartile range."""

    name = "arcee_fusion"
    base = "yes"
    most = 1
    weights = "none"

    def merge(self, base: Tensor, models: list[Tensor], values: Mapping[str, Any]) -> Tensor:
        import torch

        (model,) = models
        rows = [x.reshape(-1, x.shape[-1] if x.ndim else 1).softmax(-1) + 1e-8 for x in (model, base)]
        divergence = (rows[0] * (rows[0] / rows[1]).log()).sum(-1, keepdim=True)
        importance = (model - base).abs().reshape(rows[0].shape) * divergence
        flat = importance.flatten()
        low, middle, high = (flat.kthvalue(int(q * (flat.numel() - 1)) + 1).values for q in (0.25, 0.5, 0.75))
        matters = (importance >= middle + 1.5 * (high - low)).view(base.shape)
        return torch.where(matters, base + (model - base), base)


class Ram(ByTensor):
    """Reinforced agent merging (arXiv 2601.13572): each element moves by the mean of the task vectors above epsilon."""

    name = "ram"
    base = "yes"
    weights = "none"
    parameters: ClassVar[Parameters] = {"epsilon": Number(1e-5, 0)}

    def merge(self, base: Tensor, models: list[Tensor], values: Mapping[str, Any]) -> Tensor:
        import torch

        deltas = torch.stack([model - base for model in models])
        moved = deltas.abs() > values["epsilon"]
        return base + (deltas * moved).sum(0) / moved.sum(0).clamp(min=1)
