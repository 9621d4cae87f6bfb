"""One set of scored candidates, and the solution for any palette. Plain data in, plain data out."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import decimals
from fastalign.palette.feasibility import INWARD
from fastalign.palette.quantile import quantile_palette
from fastalign.palette.solve import solve

QUANTILES = (0.6, 0.7, 0.8, 0.9)
SHOWN, PICKED, LONGEST = 3, 3, 3000  # prompts in an answer, candidates of each under p_λ, characters of a text
_SENSES = (">=", "==", "<=")


class Session:
    """values: m names. rewards: (P, N, m), finite. prompts: P. texts: P rows of N. source: the file, for commands."""

    values: list[str]
    prompts: Sequence[str]
    texts: Sequence[Sequence[str]]
    source: str

    def __init__(
        self,
        values: Sequence[str],
        rewards: np.ndarray,
        prompts: Sequence[str],
        texts: Sequence[Sequence[str]],
        source: str = "scored.parquet",
    ):
        self.values, self.prompts, self.texts, self.source = list(values), prompts, texts, source
        self.rewards: np.ndarray = np.asarray(rewards)
        if self.rewards.ndim != 3 or not self.rewards.size:
            raise UserError(f"rewards must be (prompts, candidates, values), none empty, got {self.rewards.shape}")
        if not np.isfinite(self.rewards).all():
            raise UserError(f"rewards must be finite, got {self.rewards[~np.isfinite(self.rewards)][0]}")
        self.flat: np.ndarray = np.ascontiguousarray(self.rewards.reshape(-1, len(self.values)))
        self.groups: np.ndarray = np.repeat(np.arange(len(self.rewards)), self.rewards.shape[1])
        self.mean: np.ndarray = self.flat.mean(axis=0, dtype=np.float64)
        self.std: np.ndarray = self.flat.std(axis=0, dtype=np.float64)
        self._one = Lock()  # the solver already uses all cores
        solve(np.array([[0.0], [1.0]]), [2.0])  # imports what the first infeasible palette would wait for

    def describe(self) -> dict[str, Any]:
        """What the page draws first: the values, how far each can go alone under either dual, and starting palettes."""
        within = self.rewards.min(axis=1).mean(axis=0), self.rewards.max(axis=1).mean(axis=0)
        over_all = self.flat.min(axis=0), self.flat.max(axis=0)
        starts = {f"q{100 * q:g}": quantile_palette(self.flat, q).tolist() for q in QUANTILES}
        return {
            "source": self.source.rpartition("/")[2],
            "prompts": len(self.prompts),
            "candidates": self.rewards.shape[1],
            "values": [
                {
                    "name": name,
                    "mean": float(self.mean[j]),
                    "decimals": decimals(self.std[j]),
                    "per_prompt": [float(end[j]) for end in within],
                    "joint": [float(end[j]) for end in over_all],
                }
                for j, name in enumerate(self.values)
            ],
            "starts": {"mean": self.mean.tolist(), **starts},
        }

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """question: "palette" (m numbers), and optionally "sense" (m of >=, ==, <=), "joint" (bool), "first" (a
        prompt).

        If the palette is infeasible, "beyond" has the nearest feasible one and the largest feasible scaling towards it,
        each moved inwards by `INWARD`; λ and everything else are those of the nearest one. Raises UserError, in one
        line, on anything else.
        """
        palette, sense, joint, first = self._read(question)
        groups = None if joint else self.groups
        with self._one:
            began = time.perf_counter()
            solution = solve(self.flat, palette, groups=groups, sense=sense)
            beyond = None
            if solution.nearest is not None and solution.scaling is not None:  # infeasible
                scaled = self.mean + INWARD * solution.scaling * (palette - self.mean)
                nearest = self.mean + INWARD * (solution.nearest - self.mean)
                beyond = {
                    "nearest": nearest.tolist(),
                    "scaling": float(solution.scaling),
                    "scaled": scaled.tolist(),
                    "inward": INWARD,
                }
                solution = solve(self.flat, nearest, groups=groups, sense=sense)
            took = time.perf_counter() - began
        solved_for = palette if beyond is None else np.array(beyond["nearest"])
        return _plain(
            {
                "feasible": beyond is None,
                "beyond": beyond,
                "solved_for": solved_for,
                "lambda": solution.lam,
                "levels": solution.levels,
                "kl": solution.kl,
                "ess": solution.ess,
                "ess_of": len(self.flat) if joint else self.rewards.shape[1],
                "thin": bool(solution.nearly_infeasible),
                "unique": bool(solution.unique),
                "kkt_residual": solution.kkt_residual,
                "passes": int(solution.iterations),
                "ms": 1000 * took,
                "command": self._command(palette, sense, joint),
                "first": first,
                "examples": [
                    self._example(i, solution.lam) for i in range(first, min(first + SHOWN, len(self.prompts)))
                ],
            }
        )

    def _read(self, question: Any) -> tuple[np.ndarray, list[str], bool, int]:
        if not isinstance(question, Mapping):
            raise UserError(f"the question must be an object with a palette, got {type(question).__name__}")
        m = len(self.values)
        levels = question.get("palette")
        if not isinstance(levels, list) or len(levels) != m or not all(_is_number(x) for x in levels):
            raise UserError(f"palette must be {m} finite numbers ({', '.join(self.values)}), got {str(levels)[:80]}")
        sense = question.get("sense", [">="] * m)
        if not isinstance(sense, list) or len(sense) != m or not all(x in _SENSES for x in sense):
            raise UserError(f"sense must be {m} of {' '.join(_SENSES)}, got {str(sense)[:80]}")
        first = question.get("first", 0)
        if not isinstance(first, int) or not 0 <= first < len(self.prompts):
            raise UserError(f"first must be a prompt's number from 0 to {len(self.prompts) - 1}, got {str(first)[:80]}")
        return np.array(levels, dtype=np.float64), sense, bool(question.get("joint", False)), first

    def _example(self, i: int, lam: np.ndarray) -> dict[str, Any]:
        """A prompt, its first candidates (plain draws from the model), and those with the largest weights under p_λ."""
        scores = self.rewards[i].astype(np.float64) @ lam
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        order = np.argsort(-weights, kind="stable")[:PICKED]

        def shown(k: int, weight: float) -> dict[str, Any]:
            return {"text": self.texts[i][k][:LONGEST], "weight": weight, "rewards": self.rewards[i, k]}

        return {
            "prompt": self.prompts[i][:LONGEST],
            "base": [shown(k, 1 / len(weights)) for k in range(min(PICKED, len(weights)))],
            "picked": [shown(int(k), weights[k]) for k in order],
        }

    def _command(self, palette: np.ndarray, sense: Sequence[str], joint: bool) -> str:
        """The command that writes this palette's file."""
        signs = ["=" if each == ">=" else each for each in sense]
        terms = [f"{n}{s}{x:.10g}" for n, s, x in zip(self.values, signs, palette, strict=True)]
        words = ["fastalign", "map", self.source, "--values", ",".join(self.values), "--palette", ",".join(terms)]
        return shlex.join([*words, *["--joint"] * joint, "--out", "palette.json"])


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300


def _plain(value: Any) -> Any:
    """Numbers as JSON values: no numpy, null for non-finite numbers."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(x) for x in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
