"""Draw the figures of docs/mathematics/, by the functions that the pages name: `python tools/draw_math.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fastalign import decode, palette
from fastalign.report.duals import both
from fastalign.report.figures import style

FOLDER = Path(__file__).parents[1] / "docs" / "mathematics"
BLUE, ORANGE, GREY = style.PREDICTED, style.TARGET, style.BEFORE


def tilting() -> None:
    """One value: what λ does to its distribution, and what a level costs."""
    rewards = np.random.default_rng(0).normal(size=(20_000, 1))
    with style.figure(8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for lam, color in ((0.0, GREY), (0.75, BLUE), (1.5, ORANGE)):
            weights = np.exp(lam * rewards[:, 0])
            shape = {"bins": 30, "density": True, "histtype": "step", "lw": 1.8}
            left.hist(rewards[:, 0], weights=weights, color=color, label=f"λ = {lam:g}", **shape)
        left.set(xlabel="reward R", ylabel="density", title="p_λ ∝ p₀ exp(λ·R)")
        left.legend(loc="upper left")
        levels = np.linspace(0.02, 2.4, 25)
        solution = palette.solve(rewards, levels[:, None])
        right.plot(levels, solution.lam[:, 0], color=BLUE, label="λ")
        right.plot(levels, solution.kl, color=ORANGE, label="KL, nats")
        right.set(xlabel="level asked for", title="palette.solve: what a level costs")
        right.legend()
        style.save(figure, FOLDER / "tilting.png")


def weights() -> None:
    """Two values: what weights that sum to one can reach at one β, and what λ can."""
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(4000, 2)) @ np.array([[1.0, -0.3], [0.0, 0.5]])
    region = palette.feasible_region(rewards, 1500, 4.0, seed=0)
    shares = np.linspace(0, 1, 41)
    at_one_beta = np.stack([palette.lambda_of_rlhf(1.0, [w, 1 - w]) for w in shares])
    levels = np.stack([_levels(rewards, lam) for lam in at_one_beta])
    asked = np.array([0.55, 0.3])
    solution = palette.solve(rewards, asked)
    with style.figure(5.6, 4.2) as figure:
        axis = figure.subplots()
        axis.plot(*region.policies.levels.T, ".", ms=2.5, color=GREY, alpha=0.5, label="any λ ≥ 0")
        axis.plot(*levels.T, color=ORANGE, lw=2, label="w from (0, 1) to (1, 0), β = 1")
        axis.plot(*asked, "*", ms=15, color=BLUE, label=f"palette; λ = ({solution.lam[0]:.2f}, {solution.lam[1]:.2f})")
        axis.set(xlabel="level of the first value", ylabel="level of the second value")
        axis.legend(loc="lower left")
        style.save(figure, FOLDER / "weights.png")


def best_of_n() -> None:
    """What best-of-N costs beside p_λ, and how many candidates are left."""
    rewards = np.random.default_rng(2).normal(size=(400, 64, 1))
    lam = np.linspace(0, 3, 31)[:, None]
    tilted = decode.estimate(rewards, lam, warn=False)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    curve = decode.best_of_curve(rewards, np.array([1.0]), sizes)
    with style.figure(8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(tilted.kl, tilted.values[:, 0], color=BLUE, label="p_λ over 64 candidates")
        left.plot(curve.kl, curve.values[:, 0], "o", color=ORANGE, label="best of 1, 2, 4 ... 64")
        left.set(xlabel="KL from the model, nats", ylabel="mean reward", title="best_of_curve, estimate")
        left.legend(loc="lower right")
        right.plot(tilted.kl, tilted.ess, color=BLUE, label="effective samples of 64")
        right.plot(tilted.kl, 64 * np.exp(-tilted.kl), "--", color=GREY, label="64 exp(−KL)")
        right.set(xlabel="KL from the model, nats", yscale="log", title="effective_sample_size and its bound")
        style.plain_logs(right.yaxis)
        right.legend()
        style.save(figure, FOLDER / "best_of_n.png")


def duals() -> None:
    """The example by hand of duals.md."""
    rewards = np.array([[[0.0], [0.0]], [[0.0], [1.0]]])
    levels = np.linspace(0.25, 0.49, 25)
    solved = [both(rewards, np.array([level])) for level in levels]
    with style.figure(8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for form, color in (("per prompt", BLUE), ("joint", ORANGE)):
            mine = [pair[form == "joint"] for pair in solved]
            left.plot(levels, [one.kl for one in mine], color=color, label=form)
            right.plot(levels, [one.decoded[0] for one in mine], color=color, label=f"λ of the {form} dual")
        left.set(xlabel="level asked for", ylabel="KL, nats", title="the joint KL is a lower bound")
        right.set(xlabel="level asked for", ylabel="level decoded", title="only one λ is met by a decoder")
        left.legend()
        right.legend()
        style.save(figure, FOLDER / "duals.png")


def _levels(rewards: np.ndarray, lam: np.ndarray) -> np.ndarray:
    return decode.estimate(rewards[None], lam, warn=False).values[0]


if __name__ == "__main__":
    for draw in (tilting, weights, best_of_n, duals):
        draw()
        sys.stdout.write(f"docs/mathematics/{draw.__name__}.png\n")
