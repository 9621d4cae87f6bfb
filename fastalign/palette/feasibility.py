"""Which palettes can be reached, the nearest reachable one, and how far towards an unreachable one it is possible to
go.

Reweighting moves the levels within conv{R_i}; a palette asks for at least (at most, exactly) its levels. The reachable
palettes are therefore C = conv{R_i} − K, with the cone K of the allowed slack: R_+ for "at least", R_- for "at most",
{0} for "exactly" (with groups, the mean of the groups' hulls replaces conv{R_i}). The projection of the palette onto C
is computed by fully corrective Frank-Wolfe: project onto the hull of the points so far, find the sample that lies
farthest along the remaining direction, add it, until none lies farther. This ends after finitely many points, and the
last direction separates the palette from C.
"""

from __future__ import annotations

import numpy as np

from fastalign.palette.passes import Pass

# For an infeasible palette, λ is solved for the point this share of the way from the mean to the nearest feasible one:
# at the boundary itself λ is infinite, and each prompt keeps a single candidate.
INWARD = 0.9
MAX_POINTS = 1000
# Points of the hull kept from one projection for the next: palettes projected together are close to each other.
KEPT_POINTS = 64
# λ so large that the tilted mean is the mean of the samples with the largest score, to the last digits of a score.
SHARP = 1e13


class Reachable:
    """C, represented by its farthest point in any direction, in units of `scale` (m,).

    run: a pass over the rewards. sign (m,): 1 for at least, -1 for at most, 0 for exactly.
    """

    run: Pass
    scale: np.ndarray
    sign: np.ndarray

    def __init__(self, run: Pass, scale: np.ndarray, sign: np.ndarray):
        self.run, self.scale, self.sign = run, scale, sign
        self._met: dict[bytes, np.ndarray] = {}  # points of the hull, from run.center; the oldest first

    def inward(self, d: np.ndarray) -> np.ndarray:
        """d clipped to the directions in which C is bounded: those of λ."""
        return np.where(self.sign > 0, np.maximum(d, 0.0), np.where(self.sign < 0, np.minimum(d, 0.0), d))

    def farthest(self, d: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, float]:
        """The point of the hull farthest along d, from the palette, and the largest score d · point of any."""
        sharp = d * (SHARP / np.sqrt(d @ d)) / self.scale
        moments = self.run(sharp[None])
        met = moments.mean[0]
        self._met.setdefault(met.tobytes(), met)
        if len(self._met) > KEPT_POINTS:
            del self._met[next(iter(self._met))]
        score = (moments.max_score[0] + sharp @ (self.run.center - palette)) * (np.sqrt(d @ d) / SHARP)
        return self._seen_from(palette, met), float(score)

    def _seen_from(self, palette: np.ndarray, met: np.ndarray) -> np.ndarray:
        return (met + (self.run.center - palette)) / self.scale

    def nearest(
        self, palette: np.ndarray, direction: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, float]:
        """Projection of `palette` (m,) onto C, in the metric Σ ((a − b) / scale)².

        direction: (m,), a first guess at the separating direction (in λ's units), for the first palette.
        Returns the nearest reachable palette (m,), the separating direction d (m,) in λ's units, with
        max_i d·R_i < d·palette, and the distance in units of scale. No direction and distance 0 if the palette itself
        is reachable up to rounding; no direction either if rounding leaves it open whether one separates.
        """
        from scipy.optimize import nnls

        m = len(palette)
        if not self._met:
            guess = self.sign + (self.sign == 0) if direction is None else self.inward(direction * self.scale)
            self.farthest(guess, palette)
        points = [self._seen_from(palette, met) for met in self._met.values()]
        spare = -np.diag(self.sign)[:, self.sign != 0]
        shortest, seen = np.inf, {p.tobytes() for p in points}
        for _ in range(MAX_POINTS):
            # Least-norm point of conv(points) − K as one non-negative least-squares problem: the row of ones asks the
            # weights to sum to 1, and dividing by their sum afterwards makes the answer exact for any residual.
            system = np.zeros((m + 1, len(points) + spare.shape[1]))
            system[:m, : len(points)] = np.transpose(points)
            system[:m, len(points) :] = spare
            system[m, : len(points)] = 1.0
            target = np.zeros(m + 1)
            target[m] = 1.0
            solution, _ = nnls(system, target)
            weights, left = solution[: len(points)], solution[len(points) :]
            nearest = (weights @ np.array(points) + spare @ left) / weights.sum()
            distance = float(np.sqrt(nearest @ nearest))
            d = self.inward(-nearest)
            used = [p for p, w in zip(points, weights, strict=True) if w > 0.0]
            size = float(np.abs(points).max())
            if distance <= 1e-14 * max(1.0, size):
                return palette + nearest * self.scale, None, 0.0
            point, score = self.farthest(d, palette)
            # score + distance² is Frank-Wolfe's gap; if it is only rounding, or nothing moved, the point is nearest.
            met = distance >= shortest and point.tobytes() in seen  # among `points`, or dropped from them before
            if score + distance**2 <= 1e-15 * (1.0 + size) * distance or met:
                break
            shortest = min(shortest, distance)
            points = [*used, point]
            seen.add(point.tobytes())
        for direction in (d, self._across(d, np.array(used), left)):
            if (proof := self._proof(direction, palette)) is not None:
                return palette - d * self.scale, proof, distance
        return palette - d * self.scale, None, distance

    def _across(self, d: np.ndarray, used: np.ndarray, left: np.ndarray) -> np.ndarray:
        """d without its component along the face of C that contains the projection; `used` are the face's corners.

        d is the small difference between that face and the palette, with that difference's rounding error; the face's
        own edges are known to full precision.
        """
        edges = np.vstack([used[1:] - used[0], np.eye(len(d))[self.sign != 0][left > 0.0]])
        for _ in range(2):  # the first pass's rounding error
            d = d - np.linalg.lstsq(edges, edges @ d, rcond=1e-12)[0] if len(edges) else d
        d[(np.abs(d) <= 1e-15 * np.abs(d).max())] = 0.0
        return self.inward(d)

    def _proof(self, d: np.ndarray, palette: np.ndarray) -> np.ndarray | None:
        """d in λ's units, its largest entry 1, if along it every sample falls short by more than rounding."""
        if not np.abs(d).max() > 0.0:
            return None
        point, score = self.farthest(d, palette)
        place = np.abs(self.run.center) + np.abs(palette)
        rounding = 8 * len(d) * np.finfo(np.float64).eps * (np.abs(d) @ (np.abs(point) + place / self.scale))
        return d / self.scale / np.abs(d / self.scale).max() if score < -rounding else None

    def scaling(self, mean: np.ndarray, palette: np.ndarray, direction: np.ndarray) -> float:
        """The largest t for which mean + t (palette − mean) can be reached, for a palette that cannot.

        direction: one that separates the palette from C. Each direction gives an upper bound on t; the direction that
        separates mean + t (palette − mean) gives a lower one, until that palette is reached: Dinkelbach's iteration.
        """
        t, gap = 1.0, (palette - mean) / self.scale
        d = self.inward(direction * self.scale)
        for _ in range(MAX_POINTS):
            d = d / np.sqrt(d @ d)
            room, climb = self.farthest(d, mean)[1], float(d @ gap)
            bound = max(0.0, room / climb) if climb > 0.0 else t
            if not bound < t:
                break
            t = bound
            _, direction, distance = self.nearest(mean + t * (palette - mean), d / self.scale)
            if direction is None or distance <= 1e-12 * (1.0 + np.sqrt(gap @ gap)):
                break
            d = self.inward(direction * self.scale)
        return t
