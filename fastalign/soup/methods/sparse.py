"""Merges of sparse task vectors: TIES, DARE, DELLA, breadcrumbs. Which elements a method keeps, and how the vectors are
summed; steps.py describes the terms, by_torch.py defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from fastalign._base.errors import UserError
from fastalign.soup.methods.base import Fixed, Job, Method, Number, Parameters, flag, whole_number, word
from fastalign.soup.steps import Choice, Tasks, stream_of


def _parameters(
    *, density: float | None = None, normalize: bool = False, rescale: str = "none", **more: Number | Fixed
) -> Parameters:
    return {
        "density": Number(density, 0, 1, each=True),
        "lambda": Number(1.0),
        "normalize": flag(normalize),
        "rescale": word(rescale, "expected", "l1", "none"),
        **more,
    }


_EPSILON, _GAMMA, _SEED = Number(0.15, 0, 1, each=True), Number(0.01, 0, 1, each=True), whole_number(0)


class Sparse(Method):
    """base + λ of the weighted task vectors' sum; normalize divides it by their weights.

    elect: only elements with the sign of the weighted sum count (TIES, arXiv 2306.01708: elect and disjoint merge).
    rescale: "expected" divides kept elements by their probability (DARE's and DELLA's papers), "l1" keeps the sum of
    magnitudes (mergekit), "none" does neither.
    """

    base = "yes"
    elect = False

    def read(self, given: Mapping[str, Any] | None, m: int) -> dict[str, Any]:
        values = super().read(given, m)
        if values["rescale"] == "expected" and "seed" not in self.parameters:
            raise UserError(f"rescale must be l1 or none for {self.name}, which drops nothing at random")
        return values

    def check(self, job: Job) -> None:
        for name in job.names:
            self.step(job, name)

    def step(self, job: Job, name: str) -> Tasks:
        tensor, values = job.models[0][name], job.values_of(name)
        choices = []
        for i in range(len(job.models)):
            own = {key: value[i] for key, value in values.items() if isinstance(value, list)}
            if own["density"] >= 1:
                choices.append(Choice())
            elif own["density"] <= 0 or tensor.numel == 0:
                choices.append(Choice("band"))  # nothing
            else:
                choices.append(self.choice(name, tensor.numel, stream_of(name, i), rescale=values["rescale"], **own))
        weights = tuple(tuple(row) for row in job.weights_of(name).tolist())
        row = tensor.shape[-1] if tensor.shape else 1
        seed = values.get("seed", 0)
        return Tasks(tuple(choices), weights, values["lambda"], self.elect, values["normalize"], seed, row)

    # (name, n, stream, **options): which of a task vector's n elements are kept, for a density within (0, 1)
    choice: Callable[..., Choice]


class Ties(Sparse):
    """Keeps the share `density` of largest magnitude (arXiv 2306.01708)."""

    name = "ties"
    elect = True
    parameters: ClassVar[Parameters] = _parameters(density=0.2, normalize=True)

    def choice(self, name: str, n: int, stream: int, *, density: float, rescale: str) -> Choice:
        return Choice("band", n - max(1, int(density * n)), n, largest_first=True, match_sum=rescale == "l1")


class Dare(Sparse):
    """Keeps each element with probability `density` (arXiv 2311.03099)."""

    name = "dare_linear"
    parameters: ClassVar[Parameters] = _parameters(rescale="expected", seed=_SEED)

    def choice(self, name: str, n: int, stream: int, *, density: float, rescale: str) -> Choice:
        scale = 1 / density if rescale == "expected" else 1.0
        return Choice("random", probability=density, match_sum=rescale == "l1", scale=scale, stream=stream)


class DareTies(Dare):
    name = "dare_ties"
    elect = True


class Della(Sparse):
    """Keeps each element with a probability from density - epsilon to density + epsilon, by the rank of its magnitude
    in its row (arXiv 2406.11617)."""

    name = "della"
    elect = True
    parameters: ClassVar[Parameters] = _parameters(normalize=True, rescale="expected", epsilon=_EPSILON, seed=_SEED)

    def choice(self, name: str, n: int, stream: int, *, density: float, epsilon: float, rescale: str) -> Choice:
        if not (density - epsilon > 0 and density + epsilon < 1):
            raise UserError(f"della needs density ± epsilon within (0, 1), got {density:g} ± {epsilon:g} for {name}")
        return Choice(
            "ranked",
            probability=density,
            epsilon=epsilon,
            own_scale=rescale == "expected",
            match_sum=rescale == "l1",
            stream=stream,
        )


class DellaLinear(Della):
    name = "della_linear"
    elect = False
    parameters: ClassVar[Parameters] = _parameters(rescale="expected", epsilon=_EPSILON, seed=_SEED)


class Breadcrumbs(Sparse):
    """Drops the share `gamma` of the largest, and as many of the smallest as leave `density` (arXiv 2312.06795)."""

    name = "breadcrumbs"
    parameters: ClassVar[Parameters] = _parameters(density=0.9, gamma=_GAMMA)

    def choice(self, name: str, n: int, stream: int, *, density: float, gamma: float, rescale: str) -> Choice:
        kept = int(density * n)
        dropped = max(0, n - kept - int(gamma * n))  # of the smallest; fewer large ones are dropped if density says so
        return Choice("band", dropped, dropped + kept, match_sum=rescale == "l1")


class BreadcrumbsTies(Breadcrumbs):
    name = "breadcrumbs_ties"
    elect = True
