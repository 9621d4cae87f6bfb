"""What policies p_λ over given candidates can reach, for the trade-off figure: random λ, and fronts of two values."""

from __future__ import annotations

import numpy as np
import torch

from fastalign.ops import map_statistics

# For drawing, evenly spaced prompts with this many candidates are enough.
MAX_ROWS = 20_000


class Tradeoff:
    """rewards (P, N, m); each prompt's candidates are reweighted separately (the per-prompt policy)."""

    def __init__(self, rewards: np.ndarray):
        prompts, n, m = rewards.shape
        self.rewards: np.ndarray = np.asarray(rewards[:: -(-prompts * n // MAX_ROWS)], dtype=np.float64)
        flat = self.rewards.reshape(-1, m)
        std = flat.std(axis=0)
        self.std: np.ndarray = np.where(std > 0, std, 1.0)
        self.center: np.ndarray = flat.mean(axis=0)
        self._flat = torch.from_numpy(np.ascontiguousarray((flat - self.center) / self.std))
        self._groups = torch.arange(len(self.rewards)).repeat_interleave(n)

    def at(self, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Levels (K, m) and mean KL (K,) at K weights mu = λ · std."""
        stats = map_statistics(self._flat, torch.from_numpy(mu), groups=self._groups)
        mean = stats.mean.numpy()
        return self.center + mean * self.std, np.maximum((mu * mean).sum(axis=1) - stats.log_z.numpy(), 0.0)

    def cloud(self, reach: float, *, count: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Levels and KL of `count` policies with |λ · std| between 0 and `reach` and directions uniform over λ ≥
        0."""
        rng = np.random.default_rng(seed)
        directions = np.abs(rng.standard_normal((count, self._flat.shape[1])))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return self.at(directions * np.linspace(0, reach, count)[:, None])

    def front(self, i: int, j: int, kl: float, *, count: int = 25) -> np.ndarray:
        """(count, 2): the highest levels of values i and j at mean KL `kl`, with λ only on those two, per direction.

        The KL grows with |λ|, so |λ| is found by bisection, all directions in one pass each.
        """
        directions = self._directions(i, j, count)
        low, high = np.zeros(count), np.full(count, 1.0)
        for _ in range(12):
            short = self.at(directions * high[:, None])[1] < kl
            if not short.any():
                break
            high[short] *= 2
        for _ in range(24):
            middle = (low + high) / 2
            over = self.at(directions * middle[:, None])[1] > kl
            high, low = np.where(over, middle, high), np.where(over, low, middle)
        return self.at(directions * low[:, None])[0][:, [i, j]]

    def limit(self, i: int, j: int, *, count: int = 49) -> np.ndarray:
        """(count, 2): the same as |λ| goes to infinity: each prompt's single best candidate, per direction."""
        directions = self._directions(i, j, count)
        scaled = self._flat.numpy().reshape(self.rewards.shape)
        rows = np.arange(len(scaled))
        points = [self.rewards[rows, (scaled @ d).argmax(axis=1)].mean(axis=0)[[i, j]] for d in directions]
        return np.array(points)

    def _directions(self, i: int, j: int, count: int) -> np.ndarray:
        # Not quite to the axes, where ties between candidates would leave the other value undetermined.
        angle = np.linspace(1e-3, np.pi / 2 - 1e-3, count)
        directions = np.zeros((count, self._flat.shape[1]))
        directions[:, i], directions[:, j] = np.cos(angle), np.sin(angle)
        return directions
