"""Measures soups along ρ without writing them: one live model is set to each in turn, sampled and scored.

The files of a walk appear in its folder together, once all are finished; only one walk at a time may write them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastalign._base import outputs, progress
from fastalign._base.errors import UserError
from fastalign._base.files import check_folder
from fastalign._base.former import renamed
from fastalign._base.work_folder import WorkFolder, hold, sha256
from fastalign.decode.candidates import Candidates
from fastalign.soup.architecture import same_model
from fastalign.soup.checkpoint import open_checkpoint
from fastalign.soup.front import SoupFront
from fastalign.soup.lora import apply as lora_merge
from fastalign.soup.lora import open_adapter
from fastalign.soup.memory import interpolate
from fastalign.soup.methods.linear import linear_rows
from fastalign.soup.methods.settings import weight_rows
from fastalign.soup.plan import identity_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastalign.data.sampling import SamplingOptions

RECORD = "soups.json"
FIGURES = ("soups.svg", "soups.png")


class Files:
    """The files of `out`, and of `parts` beside it, where new ones are written; see `making`."""

    def __init__(self, out: Path, parts: WorkFolder, overwrite: bool):
        self._out, self._parts, self._overwrite = out, parts, overwrite
        self._new: list[str] = []
        self._used: set[str] = set()
        self.reused: int = 0  # soups that are already measured

    def measured(self, name: str, wanted: Mapping[str, Any]) -> Candidates | None:
        """A soup's scored candidates, if they exist with the settings `wanted`. Raises UserError if others exist."""
        self._used.add(name)
        for folder in (self._out, self._parts.path):
            if outputs.recorded(folder / name, "soup") == wanted:
                if folder != self._out:
                    self._new.append(name)
                self.reused += 1
                return Candidates.from_parquet(folder / name, kind="scored")
        self._free(name)
        return None

    def check(self, name: str, *, ours: bool) -> None:
        """Raise UserError if a file to be replaced is not `ours`."""
        if not ours:
            self._free(name)

    def _free(self, name: str) -> None:
        if (self._out / name).exists() and not self._overwrite:
            raise UserError(f"{self._out / name}: exists, and is of other soups or settings; --overwrite replaces it")

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Where to write a file of `out`."""
        path = self._parts.making(name)
        yield path
        self._parts.made({name: sha256(path)})
        self._new.append(name)
        self._used.add(name)

    def settle(self) -> None:
        """Move new files to `out`, the record last; remove those of an overwritten walk, its record first."""
        self._out.mkdir(exist_ok=True)
        old = [path for path in self._out.glob("**/*.parquet") if outputs.recorded(path, "soup")]
        if (record := self._out / RECORD).exists() and (RECORD in self._new or self._overwrite):
            old += [self._out / name for name in FIGURES]
            record.unlink()
        for path in old if self._overwrite else ():
            if path.relative_to(self._out).as_posix() not in self._used:
                path.unlink(missing_ok=True)
        for name in sorted(self._new, key=lambda name: name == RECORD):
            (self._out / name).parent.mkdir(exist_ok=True)
            os.replace(self._parts.path / name, self._out / name)
        chosen = self._out / "chosen"
        if chosen.is_dir() and not any(chosen.iterdir()):
            chosen.rmdir()


@contextmanager
def making(
    out: str | os.PathLike[str], inputs: Iterable[Any], job: Mapping[str, Any], *, overwrite: bool
) -> Iterator[Files]:
    """The files of `out`, locked against another walk; those written in the block move to `out` when it succeeds.

    job: the job of `<out>.parts`; files of an interrupted walk for the same job are reused. Raises UserError, one line,
    if another walk has it locked, or left files of another job there and `overwrite` is not set.
    """
    check_folder(out)
    outputs.not_an_input(out, inputs, folder=True)
    out = Path(os.path.realpath(out))
    with hold(out.with_name(f"{out.name}.parts"), writes=out, keeps="soups") as parts:
        if parts.whole() and parts.job != job and not overwrite:
            raise UserError(
                f"{parts.path}: contains an interrupted run with other soups or settings; --overwrite removes it"
            )
        parts.begin(job)
        files = Files(out, parts, overwrite)
        yield files
        files.settle()
        parts.remove()


# ---- the walk ----


@renamed(progress="show_progress")
def walk(
    models: Sequence[str | os.PathLike[str]],
    rho: ArrayLike,
    prompts: Sequence[str],
    rewards: Sequence[Any],
    out: str | os.PathLike[str],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    base: str | os.PathLike[str] | None = None,
    dtype: Any = "auto",
    device: Any = "auto",
    overwrite: bool = False,
    show_progress: bool = True,
    **sampling: Unpack[SamplingOptions],
) -> SoupFront:
    """Measure the soups of `models` at each row of `rho`: one live model is set to each in turn, sampled and scored.

    Args:
        models: m checkpoints of one architecture with their tokenizer; with `base`, m LoRA adapters of it.
        rho: (K, m); rows sum to 1, but for adapters.
        rewards: names or Reward objects, d of them. n, max_new_tokens, seed, sampling: as in `Sampler.sample`; every
            soup gets the same prompts and random numbers, so that differences between soups are less noisy than their
            levels.
        out: folder for 000.parquet, 001.parquet ... (scored candidates) and soups.json. Files of the same soups are
            reused; those of others raise, unless overwrite is set. New ones are written to `<out>.parts`, where an
            interrupted walk leaves the finished ones, and move to `out` together.

    Raises UserError or FileNotFoundError, one line each.
    """
    job = Walk(
        models, rho, prompts, rewards, n=n, max_new_tokens=max_new_tokens, seed=seed, base=base, dtype=dtype,
        device=device, show_progress=show_progress, **sampling,
    )  # fmt: skip
    with making(out, [*models, base], job.job, overwrite=overwrite) as files:
        return job.into(files)


class Walk:
    """The arguments of `walk`, checked before any model is loaded; job: JSON values that identify it."""

    job: dict[str, Any]

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        rho: ArrayLike,
        prompts: Sequence[str],
        rewards: Sequence[Any],
        *,
        n: int,
        max_new_tokens: int,
        seed: int,
        base: str | os.PathLike[str] | None,
        dtype: Any = "auto",
        device: Any = "auto",
        show_progress: bool = True,
        **sampling: Unpack[SamplingOptions],
    ):
        self._models, self._base, self._prompts = models, base, prompts
        self._rows = weight_rows(rho, len(models))
        self._rewards = [rewards] if isinstance(rewards, str) else list(rewards)
        from fastalign.rewards import references

        self._names = references.names(self._rewards)
        if not self._names:
            raise UserError("rewards must be one at least, got none")
        if base is None:
            linear_rows(self._rows, None)
            checkpoints = [open_checkpoint(model) for model in models]
            same_model(checkpoints)
            identities = [identity_of(one) for one in checkpoints]
        else:
            opened = [open_adapter(model) for model in models]
            identities = [one.identity for one in opened]
            identities.append(identity_of(open_checkpoint(base)))
        self._sampling: dict[str, Any] = {"n": n, "max_new_tokens": max_new_tokens, "seed": seed, **sampling}
        self._loading, self._show = {"dtype": dtype, "device": device}, show_progress
        prompts_sha256 = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
        made_with = {
            "models": identities,
            "dtype": str(dtype),
            "rewards": [reward if isinstance(reward, str) else reward.name for reward in self._rewards],
            **({"contents": contents} if (contents := references.contents(self._rewards)) else {}),
            "prompts_sha256": prompts_sha256,
            **self._sampling,
        }
        self._made_with = json.loads(json.dumps(made_with))
        self.job = self._made_with | {"rho": self._rows.tolist()}

    def into(self, files: Files, under: str = "") -> SoupFront:
        """Measure the missing soups; under: prefix of the files' names."""
        from fastalign.decode import Sampler
        from fastalign.models.loading import load_causal_lm
        from fastalign.rewards import score
        from fastalign.rewards.references import load, reach

        live, grids, names = None, [], self._names
        files_wanted = [
            (f"{under}{k:03d}.parquet", self._made_with | {"rho": row.tolist()}) for k, row in enumerate(self._rows)
        ]
        there = [files.measured(name, wanted) for name, wanted in files_wanted]  # check all before measuring any
        with progress.bar("soups", total=len(files_wanted), unit="soups", show=self._show) as advance:
            for row, (name, wanted), scored in zip(self._rows, files_wanted, there, strict=True):
                if scored is None:
                    if live is None:
                        first = self._models[0] if self._base is None else self._base
                        rewards = load(self._rewards)
                        reach(rewards)
                        live, tokenizer = load_causal_lm(first, **self._loading)
                    _set(live, self._models, row, self._base)
                    scored = Sampler(live, tokenizer).sample(self._prompts, **self._sampling)
                    scored = scored.with_rewards(names, score(rewards, *scored.pairs()))
                    scored.settings["soup"] = wanted
                    with files.making(name) as path:
                        scored.to_parquet(path)
                grids.append(scored.reward_array(names).astype(np.float64))
                advance(1)
        grid = np.stack(grids)  # (K, P, n, d)
        labels = [Path(os.fspath(model)).name or os.fspath(model) for model in self._models]
        std = grid.reshape(-1, len(names)).std(axis=0)
        return SoupFront(names, labels, self._rows, grid.mean(axis=2), std, grid.shape[2])


def _set(live, models: Sequence[str | os.PathLike[str]], row: np.ndarray, base: str | os.PathLike[str] | None) -> None:
    """The live model's weights to one soup's, in place."""
    import torch

    if base is None:
        interpolate(live, models, row)
        return
    own = live.state_dict()
    made = lora_merge.plan(base, models, row, "unused")
    steps = {name: made.step_of(name) for shard in made.layout for name in shard.tensors}
    changed = {name: blocks for name, blocks in steps.items() if callable(blocks)}
    lacking = next((name for name in changed if name not in own), None)
    if lacking is not None:
        raise UserError(f"{lacking} is changed by the adapters and is not in the loaded {base}")
    with torch.no_grad():
        for name, blocks in changed.items():
            flat, at = own[name].view(-1), 0
            for (block,) in blocks():
                flat[at : at + block.numel()] = block.reshape(-1).to(flat.device)
                at += block.numel()
