"""Means on spheres: weights of models, per tensor, that depend only on the tensors' dot products.

Every method here gives a point in the span of its inputs, so one read for the dot products and one for the weighted sum
suffice, and no tensor is kept in memory; except for row-wise NuSLERP and Model Stock, which run in torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import SIZES, read_bytes
from fastalign.soup.methods.base import (
    Job,
    Number,
    Parameters,
    Step,
    WeightedSum,
    flag,
    inputs_as,
    whole_number,
    whole_tensor,
)
from fastalign.soup.stream import mix_tensors

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 0.9995  # for larger cosines, a straight line replaces the great circle
_BLOCK = 32_000_000  # bytes of rows at once, within the memory limit


class OnSphere(WeightedSum):
    def rows(self, job: Job, name: str) -> np.ndarray:
        gram, values = job.gram(name), job.values_of(name)
        return np.stack([self.mean(gram, row, values) for row in job.weights_of(name)])

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        """The coefficients (m,) with which the mean of m vectors is their sum. gram: (m, m) dot products; weights:
        (m,)."""
        raise NotImplementedError


class Slerp(OnSphere):
    """Two models along the great circle of each tensor, by the second's share of the weights."""

    name = "slerp"
    least = most = 2

    def check(self, job: Job) -> None:
        for name in job.names:
            for row in job.weights_of(name):
                self.share(row)

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        return slerp(gram, self.share(weights))

    def share(self, weights: np.ndarray) -> float:
        """t."""
        if (weights < 0).any() or weights.sum() <= 0:
            raise UserError("slerp's weights must be 0 or more, and not all 0")
        return float(weights[1] / weights.sum())


def slerp(gram: np.ndarray, t: float) -> np.ndarray:
    """Weights (2,) of the point t along the great circle between two vectors; gram (2, 2) their dot products.

    (sin((1 - t) θ), sin(t θ)) / sin θ with θ the angle between them (Shoemake 1985); vectors that are nearly parallel,
    or zero, are mixed along the line.
    """
    if gram[0, 0] == 0 or gram[1, 1] == 0:
        return np.array([1 - t, t])
    cosine = float(gram[0, 1] / math.sqrt(gram[0, 0]) / math.sqrt(gram[1, 1]))
    if not abs(cosine) < _PARALLEL:
        return np.array([1 - t, t])
    theta = math.acos(cosine)
    return np.array([math.sin((1 - t) * theta), math.sin(t * theta)]) / math.sin(theta)


class NuSlerp(OnSphere):
    """SLERP of two models, or of their task vectors: of each tensor as a whole, or, without nuslerp_flatten, of each
    row along the last dimension or, with nuslerp_row_wise, of each vector along the first.

    As in mergekit: halves if the weights' sum is nearly 0, a straight line if the vectors are.
    """

    name = "nuslerp"
    base = "may"
    least = most = 2
    parameters: ClassVar[Parameters] = {"nuslerp_row_wise": flag(False), "nuslerp_flatten": flag(True)}

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        """Also for many pairs: gram (..., 2, 2) gives (..., 2)."""
        total = weights.sum()
        t = 0.5 if abs(total) < 1e-6 else float(weights[1] / total)
        lengths = np.maximum(np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)), 1e-7)
        angle = np.arccos(np.clip(gram[..., 0, 1] / lengths.prod(axis=-1), -1, 1))
        sine = np.sin(angle)
        flat = np.abs(sine) < 1e-8
        divisor = np.where(flat, 1.0, sine)
        first = np.where(flat, 1 - t, np.sin((1 - t) * angle) / divisor)
        return np.stack([first, np.where(flat, t, np.sin(t * angle) / divisor)], -1)

    def step(self, job: Job, name: str) -> Step:
        if job.values["nuslerp_flatten"]:
            return super().step(job, name)
        weights, values = job.weights_of(name), job.values_of(name)
        return whole_tensor(job, name, lambda base, models: self.by_rows(base, models, weights, values))

    def by_rows(
        self, base: Tensor | None, models: list[Tensor], weights: np.ndarray, values: Mapping[str, Any]
    ) -> list[Tensor]:
        import torch

        first, second = models if base is None else [model - base for model in models]
        turned = values["nuslerp_row_wise"] and first.ndim > 1
        if turned:
            first, second = first.transpose(0, -1), second.transpose(0, -1)
        dot = (first * second).sum(-1)
        gram = torch.stack([(first * first).sum(-1), dot, dot, (second * second).sum(-1)], -1).double().numpy()
        made = []
        for row in weights:
            shares = torch.from_numpy(self.mean(gram.reshape(*dot.shape, 2, 2), row, values)).to(first.dtype)
            one = shares[..., :1] * first + shares[..., 1:] * second
            one = one.transpose(0, -1) if turned else one
            made.append((one if base is None else base + one).contiguous())
        return made


class MultiSlerp(OnSphere):
    """The barycentre of the models, or of their task vectors, on their sphere (Goddard's Multi-SLERP, mergekit).

    Directions are mapped to the tangent space at their weighted mean's direction, averaged there, mapped back, and
    given the weighted mean length. As in mergekit, a single model is unchanged, whatever its weight. Raises UserError
    if more than two directions cancel out.
    """

    name = "multislerp"
    base = "may"
    weights = "equal"
    parameters: ClassVar[Parameters] = {"normalize_weights": flag(True), "eps": Number(1e-8, 0, 1)}

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        m, eps = len(weights), values["eps"]
        if m == 1:
            return np.ones(1)
        if values["normalize_weights"]:
            if abs(weights.sum()) < 1e-12:
                raise UserError("multislerp: weights that sum to 0 cannot be normalised")
            weights = weights / weights.sum()
        lengths = np.sqrt(np.diag(gram))
        inverse = np.where(lengths > 0, 1 / (lengths + max(eps, 1e-300)), 0)
        cosines = gram * inverse[:, None] * inverse[None, :]
        length = _length(cosines, weights)
        if length < eps:
            if m == 2:
                return weights
            raise UserError("multislerp: the models' directions cancel out under these weights; take other weights")
        mean = weights / length
        dots = cosines @ mean
        tangent = weights - (weights @ dots) * mean
        angle = _length(cosines, tangent) + eps
        return (mean * math.cos(angle) + tangent * (math.sin(angle) / angle)) * (lengths @ weights) * inverse


class Karcher(OnSphere):
    """The Karcher mean: the direction with the least weighted sum of squared angles to the models' (arXiv 2603.04972),
    at their weighted mean length; weights are divided by their sum.

    Each step goes along the mean of the logarithms. As in mergekit, vectors of length up to `tol` have no direction,
    and the iteration ends when a step is shorter than `tol`.
    """

    name = "karcher"
    weights = "equal"
    parameters: ClassVar[Parameters] = {"max_iter": whole_number(10, 0, 10_000), "tol": Number(1e-5, 0, 1)}

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        m, tol = len(weights), values["tol"]
        if m == 1:
            return np.ones(1)
        lengths = np.sqrt(np.diag(gram))
        valid = lengths > tol
        if not valid.any():
            return np.zeros(m)
        if weights.min() < 0 or weights[valid].sum() <= 0:
            raise UserError("karcher's weights must be 0 or more, and not all 0")
        weights = weights / weights.sum()
        inverse = np.where(valid, 1 / np.where(valid, lengths, 1), 0)
        cosines = np.clip(gram * inverse[:, None] * inverse[None, :], -1, 1)
        shares = np.where(valid, weights, 0) / weights[valid].sum()
        length = _length(cosines, shares)
        mean = shares / length if length >= tol else np.eye(m)[valid.argmax()]
        for _ in range(values["max_iter"]):
            dots = np.clip(cosines @ mean, -1, 1)
            angles = np.where(valid, np.arccos(dots), 0)
            far = angles >= tol
            sines = np.where(far, np.maximum(np.sin(angles), 1e-300), 1)
            pull = np.where(far, shares * np.where(far, angles, 0) / sines, 0)
            tangent = pull - (pull @ dots) * mean
            angle = _length(cosines, tangent)
            if angle < tol:
                break
            mean = math.cos(angle) * mean + math.sin(angle) * tangent / angle
            mean = mean / max(_length(cosines, mean), tol)
        return float(weights @ lengths) * mean * inverse


class ModelStock(OnSphere):
    """Model Stock: t mean + (1 - t) base, with t from the models' agreement, for each tensor, or with filter_wise, as
    in the paper, for each of its rows (along its last dimension), which torch computes some rows at a time."""

    name = "model_stock"
    base = "yes"
    least = 2
    weights = "none"
    parameters: ClassVar[Parameters] = {"floor": Number(0.0, 0, 1), "filter_wise": flag(False)}

    def share(self, gram: np.ndarray, floor: float) -> np.ndarray:
        """t (...,) (arXiv 2403.19522, equation 7): m cos / (1 + (m - 1) cos) with cos the mean cosine between task
        vectors; gram (..., m, m) their dot products.

        floor: the minimum product of two lengths that a dot product is divided by. The paper has none; mergekit's is
        1e-6, which makes vectors shorter than 0.001 look less similar than they are.
        """
        m = gram.shape[-1]
        lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
        products = np.maximum(lengths[..., :, None] * lengths[..., None, :], floor)
        cosines = np.clip(np.divide(gram, products, out=np.zeros_like(gram), where=products > 0), -1, 1)
        first, second = np.triu_indices(m, 1)
        cosine = cosines[..., first, second].mean(axis=-1)
        divisor = 1 + (m - 1) * cosine
        flat = np.abs(divisor) < 1e-6
        return np.where(flat, 0.0, m * cosine / np.where(flat, 1.0, divisor))

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        return np.full(len(gram), self.share(gram, values["floor"]) / len(gram))

    def step(self, job: Job, name: str) -> Step:
        if not job.values["filter_wise"]:
            return super().step(job, name)
        return lambda: self.blocks(job, name, job.values_of(name)["floor"])

    def blocks(self, job: Job, name: str, floor: float) -> Iterator[list[Tensor]]:
        shape, room = job.models[0][name].shape, min(_BLOCK, job.memory // 2)
        row = shape[-1] if shape else 1
        widest = 8 if "F64" in (job.stored[name], *(one[name].dtype for one in job.inputs)) else 4
        rows = max(1, room // (row * widest * (2 * len(job.inputs) + 2)))
        readers = [read_bytes(one, name, rows * row * SIZES[one[name].dtype]) for one in job.inputs]
        for data in itertools.zip_longest(*readers):
            base, models, dtype = inputs_as(job, name, data)
            assert base is not None  # the method needs one
            made = self.by_rows(base.view(-1, row), [model.view(-1, row) for model in models], floor)
            yield mix_tensors([made], [[1.0]], dtype)

    def by_rows(self, base: Tensor, models: Sequence[Tensor], floor: float) -> Tensor:
        """Tensors (rows, n)."""
        import torch

        deltas = torch.stack([model - base for model in models], 1)  # (rows, m, n)
        with np.errstate(invalid="ignore", over="ignore"):  # rows with NaN or infinities give NaN
            t = self.share((deltas @ deltas.mT).double().numpy(), floor)
        return base + torch.from_numpy(t).to(base.dtype)[:, None] * deltas.mean(1)


class Warp(OnSphere):
    """WARP's spherical merge of task vectors (arXiv 2406.16768, section 3.2 and appendix B.3), then a share `eta` of
    the way from the base.

    Two task vectors are interpolated along their great circle; each further one with the previous result, by its share
    of the weights so far.
    """

    name = "warp"
    base = "yes"
    least = 2
    weights = "equal"
    parameters: ClassVar[Parameters] = {"eta": Number(1.0)}

    def mean(self, gram: np.ndarray, weights: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        made, used = np.eye(len(weights))[0], weights[0]
        for i in range(1, len(weights)):
            used = used + weights[i]
            if used == 0:
                continue
            other = np.eye(len(weights))[i]
            pair = np.stack([made, other])
            mine, theirs = slerp(pair @ gram @ pair.T, float(weights[i] / used))
            made = mine * made + theirs * other
        return values["eta"] * made


def _length(gram: np.ndarray, coefficients: np.ndarray) -> float:
    return math.sqrt(max(float(coefficients @ gram @ coefficients), 0.0))
