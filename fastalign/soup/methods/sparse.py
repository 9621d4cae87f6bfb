"""Which elements of a task vector each sparse method keeps."""

from __future__ import annotations

from fastalign._base.errors import UserError
from fastalign.soup.steps import Choice, stream_of


def choice(
    method: str,
    n: int,
    name: str,
    model: int,
    *,
    density: float,
    rescale: str,
    epsilon: float = 0.0,
    gamma: float = 0.0,
) -> Choice:
    """The choice for a tensor of n elements and a model.

    TIES (arXiv 2306.01708) keeps the share `density` of largest size; DARE (2311.03099) each with that probability; DELLA
    (2406.11617) with a probability from density - epsilon to density + epsilon by its rank in its row; breadcrumbs
    (2312.06795) drop the share `gamma` of the largest and of the smallest as many as leave `density`.

    rescale: "expected" divides what stays by its probability (DARE's and DELLA's papers), "l1" keeps the sum of sizes
    (mergekit), "none" does neither.
    """
    if method in ("ties", "breadcrumbs", "breadcrumbs_ties") and rescale == "expected":
        raise UserError(f"rescale must be l1 or none for {method}, which drops nothing by chance")
    if density >= 1:
        return Choice()
    if density <= 0 or n == 0:
        return Choice("band")  # nothing
    match_sum, expected = rescale == "l1", rescale == "expected"
    if method == "ties":
        kept = max(1, int(density * n))
        return Choice("band", n - kept, n, largest_first=True, match_sum=match_sum)
    if method.startswith("breadcrumbs"):
        kept = int(density * n)
        dropped = max(0, n - kept - int(gamma * n))  # of the smallest; fewer large ones go where density says so
        return Choice("band", dropped, dropped + kept, match_sum=match_sum)
    stream = stream_of(name, model)
    if method.startswith("dare"):
        scale = 1 / density if expected else 1.0
        return Choice("random", probability=density, match_sum=match_sum, scale=scale, stream=stream)
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise UserError(f"della needs density ± epsilon within (0, 1), got {density:g} ± {epsilon:g} for {name}")
    return Choice("ranked", probability=density, spread=epsilon, own_scale=expected, match_sum=match_sum, stream=stream)
