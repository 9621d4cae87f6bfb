"""The candidates of a set of prompts, N each, with tokens, log-probabilities and rewards; and their files, Parquet or
Arrow.

One row per candidate. Kinds of file, each of the first three a superset of the one before:
    candidates  prompt_id, candidate_id, prompt, text, token_ids, logprobs
    scored      + one float32 column "reward:<name>" per reward
    selected    only the selected rows; candidate_id is the selected one, + draw (0..k-1)
    weighted    scored + log_weight (float64): particles, which are not plain draws; exp of it, averaged over a prompt's
                particles with any f(y), estimates Z E_λ f
If prompts are conversations, a column is_conversation (bool) says in which rows "prompt" is their JSON.
The schema's metadata carries b"fastalign" = JSON {"kind": ..., settings...}. CSV and JSON Lines hold what
`Candidates.to_pandas` gives, and are read back as anybody's (`decode.elsewhere`).
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastalign._base import tables
from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign._base.lazy import pandas
from fastalign._base.units import counted
from fastalign.data.conversations import Conversation, as_prompt

KINDS = ("candidates", "scored", "selected", "weighted")
_REWARD = "reward:"
_CONVERSATION = "is_conversation"


@dataclass(repr=False)
class Candidates:
    """P prompts with N candidates each.

    prompts: P strings, or conversations (lists of messages, kept as `data.conversations.Conversation`). texts,
    token_ids, logprobs: [P][N] strings, lists of int, lists of float (per token, natural log, under the distribution
    the token was drawn from). rewards: name -> (P, N) float32.
    settings: how they were made (JSON values). prompt_ids: (P,) int64, the prompts' indices in the full set, 0..P-1
    unless this is a part. picked: None, or (P, N) int64 candidate indices if this contains N draws from a larger set
    (see `take`). log_weights: None, or (P, N) float64 for weighted candidates (`decode.particles`).
    """

    prompts: list[str]
    texts: list[list[str]]
    token_ids: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_ids: np.ndarray = field(default=cast(Any, None))  # None becomes 0..P-1
    picked: np.ndarray | None = None
    log_weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.prompts = [prompt if isinstance(prompt, str) else as_prompt(prompt, "prompts") for prompt in self.prompts]
        count = len(self.prompts)
        for name in ("texts", "token_ids", "logprobs"):
            came = [len(row) for row in getattr(self, name)]
            if len(came) != count or len(set(came)) > 1 or (came and came[0] != self.n):
                rule = f"{name} must hold {counted(count, 'row')} of {counted(self.n, 'candidate')}"
                raise UserError(f"{rule}, got {counted(len(came), 'row')} of {sorted(set(came))}")
        self.prompt_ids = np.arange(count) if self.prompt_ids is None else np.asarray(self.prompt_ids)
        self.prompt_ids = _as_numbers("prompt_ids", self.prompt_ids, (count,), np.int64)
        if self.picked is not None:
            self.picked = _as_numbers("picked", self.picked, (count, self.n), np.int64)
        if self.log_weights is not None:
            self.log_weights = _as_numbers("log_weights", self.log_weights, (count, self.n), np.float64)
        self.rewards = {name: _as_float32(name, values) for name, values in self.rewards.items()}
        for name, values in self.rewards.items():
            if not name.isprintable():
                raise UserError(f"rewards must have names that can be printed, got {name!r}")
            if values.shape != (count, self.n):
                raise UserError(f"rewards[{name!r}] must have shape {(count, self.n)}, got {values.shape}")

    def __repr__(self) -> str:
        rewards = f", {counted(len(self.rewards), 'reward')}" if self.rewards else ""
        return f"Candidates: {counted(len(self.prompts), 'prompt')} × {self.n}{rewards}"

    def _repr_html_(self) -> str:
        """For notebooks: the first texts of the first prompts."""
        shown = self.to_pandas(prompts=5, candidates=3)
        return f"<p>{html.escape(repr(self))}</p>{shown.to_html(index=False, max_cols=20)}"

    def to_pandas(self, *, prompts: int | None = None, candidates: int | None = None) -> Any:
        """A pandas DataFrame with one row per candidate (of the first `prompts` prompts and `candidates` candidates):
        prompt_id, candidate_id, prompt, text, tokens, logprob (of the text, in nats) and a column for each reward, by
        its name; and is_conversation, if some prompts are conversations.

        Raises UserError if pandas is not installed.
        """
        return pandas().DataFrame(self._table(prompts, candidates))

    def to_dataset(self) -> Any:
        """A `datasets.Dataset` with the rows and columns of `to_pandas`. Raises UserError if datasets is not
        installed."""
        try:
            from datasets import Dataset
        except ImportError:
            raise UserError("to_dataset needs the package datasets: pip install datasets") from None
        return Dataset.from_dict(self._table())

    def _table(self, prompts: int | None = None, candidates: int | None = None) -> dict[str, list[Any]]:
        rows, columns = range(len(self.prompts))[:prompts], range(self.n)[:candidates]
        places = [(i, j) for i in rows for j in columns]
        table: dict[str, list[Any]] = {
            "prompt_id": [int(self.prompt_ids[i]) for i, _ in places],
            "candidate_id": [j if self.picked is None else int(self.picked[i, j]) for i, j in places],
            "prompt": [str(self.prompts[i]) for i, _ in places],
            "text": [self.texts[i][j] for i, j in places],
            "tokens": [len(self.token_ids[i][j]) for i, j in places],
            "logprob": [float(np.sum(self.logprobs[i][j])) for i, j in places],
        }
        if spoken := self._spoken():
            table[_CONVERSATION] = [spoken[i] for i, _ in places]
        if self.log_weights is not None:
            table["log_weight"] = [float(self.log_weights[i, j]) for i, j in places]
        for name, values in self.rewards.items():
            table[name if name not in table else _REWARD + name] = [float(values[i, j]) for i, j in places]
        return table

    @property
    def n(self) -> int:
        """Candidates per prompt."""
        return len(self.texts[0]) if self.texts else 0

    @property
    def tokens(self) -> int:
        """Of all candidates, end tokens included."""
        return sum(len(ids) for row in self.token_ids for ids in row)

    @property
    def kind(self) -> str:
        if self.picked is not None:
            return "selected"
        return "weighted" if self.log_weights is not None else "scored" if self.rewards else "candidates"

    def joined(self, more: Candidates) -> Candidates:
        """Each prompt's candidates followed by those in `more`; without rewards and settings."""
        if self.prompts != more.prompts:
            raise UserError("more must have the same prompts in the same order")
        grids = ("texts", "token_ids", "logprobs")
        both: dict[str, Any] = {
            name: [[*a, *b] for a, b in zip(getattr(self, name), getattr(more, name), strict=True)] for name in grids
        }
        return Candidates(self.prompts, **both, prompt_ids=self.prompt_ids)

    def pairs(self) -> tuple[list[str], list[str]]:
        """(prompts, responses), P * N strings each, prompt by prompt: the arguments of `rewards.score`."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        return prompts, [text for row in self.texts for text in row]

    def with_rewards(self, names: Sequence[str], values: np.ndarray) -> Candidates:
        """A copy with these rewards added; values (P * N, m), in the order of `pairs()`."""
        values = np.asarray(values)
        if values.shape != (len(self.prompts) * self.n, len(names)):
            rule = f"({len(self.prompts) * self.n}, {len(names)})"
            raise UserError(f"values must have shape {rule}: candidates by rewards, got {values.shape}")
        columns = {name: values[:, j].reshape(-1, self.n) for j, name in enumerate(names)}
        return replace(self, rewards={**self.rewards, **columns})

    def reward_array(self, names: Sequence[str] | None = None) -> np.ndarray:
        """(P, N, m) float32 of the named rewards (default: all, in the file's order)."""
        names = list(self.rewards) if names is None else list(names)
        missing = [name for name in names if name not in self.rewards]
        if missing or not names:
            have = ", ".join(self.rewards) or "none; run `fastalign score` first"
            rule = f"values must be rewards of the candidates ({have}), one at least"
            raise UserError(f"{rule}, got {', '.join(missing) or 'none'}")
        if len(set(names)) < len(names):
            raise UserError(f"values must be different, got {', '.join(names)}")
        return np.stack([self.rewards[name] for name in names], axis=-1)

    def take(self, indices: np.ndarray) -> Candidates:
        """The candidates at indices (P, k) int, k draws per prompt, as returned by `select`."""
        indices = np.asarray(indices)
        if indices.ndim != 2 or len(indices) != len(self.prompts):
            raise UserError(f"indices must have shape ({len(self.prompts)}, k), got {indices.shape}")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n:
            raise UserError(f"indices must lie in 0..{self.n - 1}, got {indices.min()}..{indices.max()}")

        def pick(rows: list) -> list:
            return [[row[i] for i in chosen] for row, chosen in zip(rows, indices.tolist(), strict=True)]

        return replace(
            self,
            texts=pick(self.texts),
            token_ids=pick(self.token_ids),
            logprobs=pick(self.logprobs),
            rewards={name: np.take_along_axis(grid, indices, axis=1) for name, grid in self.rewards.items()},
            picked=indices if self.picked is None else np.take_along_axis(self.picked, indices, axis=1),
            log_weights=None,
        )

    @staticmethod
    def concat(parts: Iterable[Candidates]) -> Candidates:
        """One set from parts (batches of prompts), in the order of their prompt_ids."""
        parts = list(parts)
        if not parts:
            raise UserError("parts must hold at least one batch of candidates, got none")
        ids = np.concatenate([part.prompt_ids for part in parts])
        order = np.argsort(ids, kind="stable")
        if len(np.unique(ids)) != len(ids):
            raise UserError("parts must hold each prompt once, got a prompt_id twice")

        def merged(name: str) -> list:
            rows = [row for part in parts for row in getattr(part, name)]
            return [rows[i] for i in order]

        def stacked(name: str) -> np.ndarray | None:
            grids = [getattr(part, name) for part in parts]
            return None if grids[0] is None else np.concatenate(grids)[order]

        names = list(parts[0].rewards)
        return Candidates(
            merged("prompts"),
            merged("texts"),
            merged("token_ids"),
            merged("logprobs"),
            rewards={name: np.concatenate([part.rewards[name] for part in parts])[order] for name in names},
            settings=parts[0].settings,
            prompt_ids=ids[order],
            picked=stacked("picked"),
            log_weights=stacked("log_weights"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file in the format that its name's ending says (`_base.tables`), completely or not at all.

        Raises UserError for another ending, and for weighted candidates in a format that would lose what they are.
        """
        tables.check_ending(path, noted=self.kind == "weighted")
        if tables.keeps_note(path):
            self.to_parquet(path)
        else:
            tables.write_plain(path, self._table())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write a file of this `kind`, completely or not at all: Parquet, or Arrow if its name ends so."""
        import pyarrow as pa

        count, n = len(self.prompts), self.n
        numbers = np.tile(np.arange(n, dtype=np.int32), count)
        origin = numbers if self.picked is None else self.picked.reshape(-1).astype(np.int32)
        columns = {
            "prompt_id": pa.array(np.repeat(self.prompt_ids, n)),
            "candidate_id": pa.array(origin),
            "prompt": pa.array(self.pairs()[0], pa.string()),
            "text": pa.array(self.pairs()[1], pa.string()),
            "token_ids": pa.array([ids for row in self.token_ids for ids in row], pa.list_(pa.int32())),
            "logprobs": pa.array([values for row in self.logprobs for values in row], pa.list_(pa.float32())),
        }
        if spoken := self._spoken():
            columns[_CONVERSATION] = pa.array(np.repeat(spoken, n))
        if self.picked is not None:
            columns["draw"] = pa.array(numbers)
        elif self.log_weights is not None:
            columns["log_weight"] = pa.array(self.log_weights.reshape(-1), pa.float64())
        for name, values in self.rewards.items():
            columns[_REWARD + name] = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float32())
        tables.write(path, pa.table(columns), {**self.settings, "kind": self.kind})

    def _spoken(self) -> list[bool]:
        """Which prompts are conversations; empty if none is."""
        spoken = [isinstance(prompt, Conversation) for prompt in self.prompts]
        return spoken if any(spoken) else []

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str], *, kind: str | Sequence[str] | None = None) -> Candidates:
        """Read a Parquet or Arrow file of any kind; with `kind`, it must be of that kind (or one of them).

        Raises FileNotFoundError or UserError: one line that names the file and what is wrong with it.
        """
        import pyarrow.compute as pc

        table, settings = _read_table(Path(path))
        came = settings.pop("kind", None)
        wanted = KINDS if kind is None else (kind,) if isinstance(kind, str) else tuple(kind)
        if came not in wanted:
            raise UserError(f"{path}: must be a fastalign {' or '.join(wanted)} file, got kind {came!r}")
        names = [name for name in table.column_names if name.startswith(_REWARD)]
        needed = ["prompt_id", "candidate_id", "prompt", "text", "token_ids", "logprobs"]
        needed += ["draw"] * (came == "selected") + ["log_weight"] * (came == "weighted")
        missing = [name for name in needed if name not in table.column_names]
        missing += [_REWARD + "<name>"] * (came in ("scored", "weighted") and not names)
        if missing:
            raise UserError(f"{path}: lacks the column {missing[0]!r} of a {came} file")
        for name in (*needed, *names):
            if table[name].null_count:
                row = table[name].is_null().to_pylist().index(True)
                raise UserError(f"{path}: has empty cells (nulls) in its columns, the first in row {row}, {name!r}")
            if (rule := _odd_type(name, table.schema.field(name).type)) is not None:
                raise UserError(f"{path}: column {name!r} must hold {rule}, got {table.schema.field(name).type}")
        for name in ("token_ids", "logprobs"):
            if pc.list_flatten(table[name]).null_count:
                raise UserError(f"{path}: has nulls in the lists of its column {name!r}")
        for name in names:
            values = table[name].to_numpy()
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values))[0])
                raise UserError(f"{path}: rewards must be finite, got {values[row]} in row {row}, column {name!r}")

        if not len(table):
            raise UserError(f"{path}: contains no candidates")
        prompt_id = table["prompt_id"].to_numpy()
        ids, inverse, counts = np.unique(prompt_id, return_inverse=True, return_counts=True)
        if len(set(counts.tolist())) > 1:
            came = f"{counts.min()} to {counts.max()}"
            raise UserError(f"{path}: must hold as many candidates for every prompt, got {came}")
        candidate_id = table["candidate_id"].to_numpy()
        within = table["draw"].to_numpy() if came == "selected" else candidate_id
        order = np.lexsort((within, inverse))
        shape = (len(ids), int(counts[0]) if len(ids) else 0)
        if not np.array_equal(within[order].reshape(shape), np.tile(np.arange(shape[1]), (shape[0], 1))):
            raise UserError(f"{path}: must number every prompt's candidates 0..{shape[1] - 1}, once each")
        table = table.take(order)

        def grid(name: str) -> list[list]:
            flat = table[name].to_pylist()
            return [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]

        prompts: list[Any] = grid("prompt")
        mixed = [int(i) for i, row in zip(ids, prompts, strict=True) if len(set(row)) > 1]
        if mixed:
            raise UserError(f"{path}: prompt_id {mixed[0]} has more than one prompt")
        prompts = [row[0] for row in prompts]
        if _CONVERSATION in table.column_names:
            spoken = [row[0] for row in grid(_CONVERSATION)]
            prompts = [Conversation.parse(one) if is_ else one for one, is_ in zip(prompts, spoken, strict=True)]
        return cls(
            prompts,
            grid("text"),
            grid("token_ids"),
            grid("logprobs"),
            rewards={name[len(_REWARD) :]: table[name].to_numpy().reshape(shape) for name in names},
            settings=settings,
            prompt_ids=ids.astype(np.int64),
            picked=candidate_id[order].reshape(shape).astype(np.int64) if came == "selected" else None,
            log_weights=table["log_weight"].to_numpy().reshape(shape) if came == "weighted" else None,
        )


def _as_numbers(name: str, values: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """int64: indices of prompts or candidates; float64: log weights, -inf for weight 0."""
    array = np.asarray(values)
    if array.shape != shape:
        raise UserError(f"{name} must have shape {shape}, got {array.shape}")
    kinds, rule = ("iu", "integers, at least 0") if dtype is np.int64 else ("iuf", "numbers below inf")
    if array.size and array.dtype.kind not in kinds:
        raise UserError(f"{name} must be {rule}, got {array.dtype}")
    array = array.astype(dtype, copy=False)
    wrong = array[(array < 0) if dtype is np.int64 else ~(array < np.inf)]
    if wrong.size:
        raise UserError(f"{name} must be {rule}, got {wrong[0]}")
    return array


def _as_float32(name: str, values: Any) -> np.ndarray:
    wide = np.asarray(values)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if (np.isinf(narrow) & np.isfinite(wide)).any():
        raise UserError(f"rewards[{name!r}] must fit float32, got {wide[np.isinf(narrow) & np.isfinite(wide)][0]:g}")
    return narrow


def _read_table(path: Path):
    check_input(path)
    table = tables.read(path)
    try:
        settings = json.loads((table.schema.metadata or {}).get(b"fastalign", b"null"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: was not written by fastalign (its schema has no 'fastalign' metadata)")
    for name in ("sampling", "selection", "made"):
        if not isinstance(settings.get(name, {}), dict):
            raise UserError(f"{path}: {name!r} in its metadata must be an object, got {settings[name]!r:.60}")
    return table, settings


def _odd_type(name: str, kind: Any) -> str | None:
    """What the column must hold, where it is not of that type."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if name in ("prompt_id", "candidate_id", "draw"):
        return None if types.is_integer(kind) else "integers"
    if name in ("prompt", "text"):
        return None if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) else "texts"
    if name in ("token_ids", "logprobs"):
        listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        inner = kind.value_type if listed else kind
        fits = types.is_integer(inner) or (types.is_floating(inner) and name == "logprobs") or types.is_null(inner)
        return None if listed and fits else f"lists of {'integers' if name == 'token_ids' else 'numbers'}"
    return None if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) else "numbers"
