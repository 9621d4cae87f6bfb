"""Which palettes can be reached at all, and which reachable one lies nearest.

Reweighting moves the levels within conv{R_i}; a palette asks for at least its levels, so what can be reached is
C = conv{R_i} − R^m_+ (with groups: the mean of the groups' hulls in place of conv{R_i}). The projection of the
palette onto C is found by fully corrective Frank-Wolfe: project onto the hull of the points met so far, ask for the
sample that lies farthest along the remaining direction, add it, until none lies farther. It ends after finitely many
points, and the last direction separates the palette from C.
"""

from __future__ import annotations

import numpy as np

MAX_POINTS = 1000
# λ so large that the tilted mean is the mean of the samples with the largest score, to the last digits of a score.
SHARP = 1e13


def nearest_reachable(run, palette: np.ndarray, scale: np.ndarray, direction: np.ndarray | None = None):
    """Projection of `palette` (m,) onto what can be reached, in the metric Σ ((a − b) / scale)².

    run: a MapPass over the rewards. direction: (m,) ≥ 0, a first guess at the separating direction (in λ's units).
    Returns the nearest reachable palette (m,), the separating direction d ≥ 0 (m,) with max_i d·R_i < d·palette
    (None where the palette itself is reachable to rounding), and the distance in units of scale.
    """
    from scipy.optimize import nnls

    m = len(palette)
    offset = run.center - palette

    def farthest(d: np.ndarray):
        """The point of the hull farthest along d and its score, in units of scale and from the palette."""
        sharp = run((d * (SHARP / np.sqrt(d @ d)) / scale)[None])
        point = (sharp.mean[0] + offset) / scale
        return point, float(d @ point)

    d = np.ones(m) if direction is None else np.maximum(direction * scale, 0.0)
    points = [farthest(d)[0]]
    shortest = np.inf
    for _ in range(MAX_POINTS):
        # Least-norm point of conv(points) − cone(e_1..e_m) as one non-negative least-squares problem: the row of ones
        # asks the weights to sum to 1, and dividing by their sum afterwards makes the answer exact for any residual.
        system = np.zeros((m + 1, len(points) + m))
        system[:m, : len(points)] = np.transpose(points)
        system[:m, len(points) :] = -np.eye(m)
        system[m, : len(points)] = 1.0
        target = np.zeros(m + 1)
        target[m] = 1.0
        solution, _ = nnls(system, target)
        weights, slack = solution[: len(points)], solution[len(points) :]
        nearest = (weights @ np.array(points) - slack) / weights.sum()
        distance = float(np.sqrt(nearest @ nearest))
        d = np.maximum(-nearest, 0.0)
        size = float(np.abs(points).max())
        if distance <= 1e-14 * max(1.0, size):
            return palette + nearest * scale, None, distance
        point, score = farthest(d)
        # score + distance² is Frank-Wolfe's gap; where it is rounding, or nothing moved any more, the point is nearest.
        if score + distance**2 <= 1e-15 * (1.0 + size) * distance or distance >= shortest:
            break
        shortest = distance
        points = [p for p, w in zip(points, weights, strict=True) if w > 0.0] + [point]
    return palette + np.minimum(nearest, 0.0) * scale, d / scale / np.abs(d / scale).max(), distance
