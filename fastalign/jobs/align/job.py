"""`fastalign align`: a palette in; texts, or a model, out that hold it on prompts they have not seen, and the proof.

The prompts are split. On one half candidates are drawn, scored and reweighted: is the palette within reach, at which
KL, with how many candidates? Then texts are drawn by that λ (`decode`), or a model is trained to it (`methods`); the
other half, never used before, shows what came of it. Each stage reads the files of the stages before it and writes its
own, so that an interrupted job goes on.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base import fingerprint, outputs
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, kind_of
from fastalign._base.units import counted
from fastalign.data import palettes
from fastalign.decode.candidates import Candidates
from fastalign.decode.select import effective_sample_size, log_weights_of
from fastalign.jobs import run as runs
from fastalign.jobs.align import divergence, methods, steps
from fastalign.jobs.align.budget import Budget
from fastalign.jobs.align.folder import Folder
from fastalign.jobs.align.split import split
from fastalign.jobs.settings import AlignOptions, AlignSettings
from fastalign.report import proof
from fastalign.rewards import references

if TYPE_CHECKING:
    from typing_extensions import Unpack

HOW = ("auto", "decode", *methods.TRAINED)
PILOT = 4  # candidates of each prompt that show what one costs
MARGIN = 1.0  # standard errors beyond the palette for which λ is solved, so that other prompts reach it too
BASE_DRAWS = 8  # of each held-out prompt from the base model, where a model is trained
DRAWS = 4  # of each held-out prompt from that model
SAMPLING_SHARE = 0.5  # of the budget, where a model is trained
MUCH = 8  # times the candidates asked for: `auto` decodes with as many, before it trains


def align(
    model: str,
    prompts: Sequence[Any],
    rewards: Sequence[str],
    palette: str | Mapping[str, Any],
    out: str | os.PathLike[str],
    **options: Unpack[AlignOptions],
) -> dict[str, Any]:
    """Align a model with a palette, in the folder `out`, and prove it on held-out prompts.

    Args:
        model: as for `steps.sample`. prompts: at least two different ones. rewards: names or references
            (`rewards.parse`).
        palette: in words (`palette.parse_palette`) or a palette file of `fastalign map`, for its targets; a reward
            that it does not name has no target.
        options: see `AlignSettings`.

    Returns:
        The content of <out>/align.json; "feasible" is False if no reweighting of the candidates reaches the palette.
        Beside it: report.html, palette.json, the candidates, texts.jsonl, and model/ with its README.md.

    Raises:
        UserError: one line, as far as possible before anything is drawn.
    """
    from fastalign.palette import parse_palette

    settings = AlignSettings(**options)
    names, every = references.names(rewards), [*rewards, *settings.watch]
    references.check_names(every)
    words = in_words(palette, names)
    if not names:
        raise UserError("rewards must name at least one reward, got none")
    trained = callable(settings.how) or settings.how in methods.TRAINED
    if not trained and settings.how not in HOW:
        raise UserError(f"how must be one of {', '.join(HOW)}, got {settings.how!r}")
    parse_palette(words, names, np.zeros((1, len(names))), rest="free")  # its words; levels come later
    runs.lora(methods.rank(settings.how, settings.lora_r), "CAUSAL_LM")
    budget = Budget.parse(settings.budget)
    train, held = split(prompts, settings.heldout, settings.seed)
    if repeated := len(prompts) - len(train) - len(held):
        outputs.say(f"{repeated:,} of {counted(len(prompts), 'prompt')} repeat others, and are left out")
    if trained:
        methods.check(model, settings.temperature, settings.top_p)
    record = settings.record(
        model=model, prompts=list(prompts), rewards=list(rewards), palette=words,
        model_content=fingerprint.of_model(model),
    )  # fmt: skip
    if contents := references.contents(every):
        record["contents"] = contents
    folder = Folder(out, record, resume=settings.resume, overwrite=settings.overwrite)
    result = folder.result
    if result is None:
        job = Job(folder, budget, steps.Model(model, dtype=settings.dtype, device=settings.device), settings)
        with folder:
            result = job.run(prompts, train, held)
    if settings.push_to_hub is not None and (folder.out / "model").is_dir():
        methods.push(folder.out / "model", settings.push_to_hub)
    return result


def in_words(palette: str | Mapping[str, Any], names: Sequence[str]) -> str:
    """The palette as terms; of a file of `fastalign map`, its targets."""
    from fastalign.palette.words import read_terms

    if isinstance(palette, str) and "=" not in palette:
        palette = os.path.expanduser(palette)
        if palette.lower().endswith(".json") and kind_of(palette) == "palette":
            return palettes.in_words(palettes.read(palette, "palette", "sense"))
    terms = read_terms(palette, names)
    if isinstance(terms, np.ndarray):
        terms = [(name, ">=", str(level)) for name, level in zip(names, terms.tolist(), strict=True)]
    return ", ".join(f"{name}{sense}{what}" for name, sense, what in terms)


class Job:
    """One job in its folder. `run` is all of it."""

    folder: Folder
    budget: Budget
    model: steps.Model
    trainer: Callable[[Job, Path, Budget], float] | None
    overwrite: bool
    show_progress: bool
    rounds_left: int
    train: list[Any]
    held: list[Any]

    def __init__(self, folder: Folder, budget: Budget, model: steps.Model, settings: AlignSettings):
        self.folder, self.budget, self.model = folder, budget, model
        self.trainer = settings.how if callable(settings.how) else None
        self.overwrite, self.show_progress = settings.overwrite, settings.show_progress
        self.settings: dict[str, Any] = folder.settings
        self.rewards: list[str] = self.settings["rewards"]  # references
        self.names: list[str] = references.names(self.rewards)
        self.watch: list[str] = self.settings.get("watch", [])  # references
        self.watched: list[str] = references.names(self.watch)
        self.how: str = self.settings["how"]
        self.n: int = self.settings["candidates"]
        self.seed: int = self.settings["seed"]
        self.source: steps.Model = model  # of the round: what is trained, and draws its candidates
        self.rounds_left = 1
        self.part = "train"  # the folder of the round's candidates
        self.words: str = self.settings["palette"]
        self.solution: dict[str, Any] = {}  # of `steps.solve_palette`
        self.lam: dict[str, float] = {}  # the solution's, or the steered one

    def run(self, prompts: Sequence[Any], train: Sequence[int], held: Sequence[int]) -> dict[str, Any]:
        """train, held: indices of the prompts of both parts."""
        self.train, self.held = [prompts[i] for i in train], [prompts[i] for i in held]
        if not (self.folder.out / "train" / "candidates.parquet").exists():
            references.reach(self.rewards)
            with self.folder.stage("load"):  # refuses a prompt that is too long, before any is drawn from
                self.model.sampler.encode(prompts, "auto", self.settings["max_new_tokens"])
        self.n = self.folder.decided("candidates", self._candidates)
        scored = self._solve(self.n)
        if not self.solution["feasible"] and not self.settings["allow_infeasible"]:
            return self._impossible(scored)
        self.how = self.folder.decided("how", self._cheapest)
        if self.how == "decode":
            self.n = self.folder.decided("decoded candidates", lambda: self.n)
            self._solve(self.n)
            return self._decode()
        return self._train()

    def _solve(self, n: int) -> Candidates:
        scored = self.candidates(self.part, self.train, n)
        self.solution = steps.solve_palette(
            self.folder.part(self.part) / "scored.parquet",
            self.palette,
            palette=self.words,
            values=self.names,
            rest="free",
            margin=MARGIN,
            overwrite=True,
        )
        self.lam = dict(zip(self.names, self.solution["lambda"], strict=True))
        return scored

    @property
    def palette(self) -> Path:
        return (
            self.folder.out / "palette.json" if self.part == "train" else self.folder.part(self.part) / "palette.json"
        )

    @property
    def scored(self) -> Path:
        """The round's candidates."""
        return self.folder.part(self.part) / "scored.parquet"

    # Candidates

    def candidates(self, part: str, prompts: list[Any], n: int) -> Candidates:
        """n scored candidates of each prompt, in the folder's `part`: the held-out ones from the base model."""
        place, model = self.folder.part(part), self.model if part == "heldout" else self.source
        with self.folder.stage(f"{part}: sample") as stage:
            drawn = self.drawn(place / "candidates.parquet", model, prompts, n, self.seed_of(part))
            stage["tokens"] = drawn.tokens
        if (place / "scored.parquet").is_file():
            return Candidates.from_parquet(place / "scored.parquet", kind="scored")
        with self.folder.stage(f"{part}: score"):
            return steps.score(
                place / "candidates.parquet",
                [*self.rewards, *(self.watch if part == "heldout" else [])],
                place / "scored.parquet",
                show_progress=self.show_progress,
            )

    def drawn(self, path: Path, model: steps.Model, prompts: list[Any], n: int, seed: int) -> Candidates:
        """n candidates of each prompt, in the file `path`; only those that it lacks are drawn."""
        had = outputs.recorded(path, "sampling")
        if had is not None and had["n"] >= n:
            return Candidates.from_parquet(path)
        if had is not None:
            path.with_name("scored.parquet").unlink(missing_ok=True)
            return steps.sample_more(path, n - had["n"], show_progress=self.show_progress)
        names = ("max_new_tokens", "temperature", "top_p")
        drawing = {name: self.settings[name] for name in names}
        return steps.sample(model, prompts, path, n=n, seed=seed, show_progress=self.show_progress, **drawing)

    def seed_of(self, part: str) -> int:
        """Apart for each part: prompts of the same number would share their random numbers."""
        return int(np.random.SeedSequence([self.seed, zlib.crc32(part.encode())]).generate_state(1, np.uint64)[0]) >> 1

    def _candidates(self) -> int:
        """As many candidates as asked for, or as the budget allows, by what a few of them cost."""
        if not self.budget.limited:
            return self.n
        pilot = min(PILOT, self.n)
        had = self.candidates("train", self.train, pilot).n
        share = 1.0 if self.how in ("auto", "decode") else SAMPLING_SHARE
        prompts = len(self.train) + (len(self.held) if self.how in ("auto", "decode") else 0)
        spent = [
            sum(x) for x in zip(*(self.folder.spent(f"train: {what}") for what in ("sample", "score")), strict=True)
        ]
        each = [x / (had * len(self.train)) * prompts for x in spent]
        left = self.budget.less(*self.folder.spent("load"))
        affordable = min(share * total / cost if cost else math.inf for total, cost in zip(left, each, strict=True))
        if affordable < pilot:
            raise UserError(
                f"budget must allow at least {counted(pilot, 'candidate')} of each of {prompts} prompts: "
                f"{self.budget} are too few, "
                f"each costs about {each[0]:.1f} s and {each[1]:,.0f} tokens"
            )
        if affordable < self.n:
            outputs.say(f"{int(affordable)} candidates per prompt, not {self.n}: the budget is {self.budget}")
        return min(self.n, int(affordable))

    def _cheapest(self) -> str:
        """`how`; for "auto" what the candidates say can hold: decoding, with up to `MUCH` times as many, or grpo."""
        if self.how != "auto":
            return self.how
        worth = steps.worth_of(self.solution)
        assert worth is not None  # of a solution just made
        fewest, most = worth.needed()
        need = most or fewest
        if need <= self.n:
            return "decode"
        seconds, tokens = self.folder.spent()
        double = (len(self.train) + len(self.held)) / len(self.train)
        fits = all(
            spent / self.n * need * double <= total for spent, total in zip((seconds, tokens), self.budget, strict=True)
        )
        if need <= MUCH * self.n and fits:
            self.folder.decided("decoded candidates", lambda: need)
            return "decode"
        try:
            methods.check(self.model.name, self.settings["temperature"], self.settings["top_p"])
        except UserError as refused:
            outputs.say(f"decoding, though {need:,} candidates per prompt would be needed: {refused}")
            return "decode"
        outputs.say(f"training by grpo: decoding would need {need:,} candidates per prompt")
        return "grpo"

    # Results

    def _decode(self) -> dict[str, Any]:
        k = self.settings["texts_per_prompt"] or 1
        chosen = {}
        for part, prompts in (("train", self.train), ("heldout", self.held)):
            self.candidates(part, prompts, self.n)
            place = self.folder.part(part)
            chosen[part] = steps.select(
                place / "scored.parquet",
                self.palette,
                place / "selected.parquet",
                k=k,
                seed=self.seed_of(part),
                overwrite=True,
            )
        whole = Candidates.from_parquet(self.folder.part("heldout") / "scored.parquet")
        grid = whole.reward_array(self.names)
        lam = np.array(self.solution["lambda"])
        measured, error = divergence.of_weights(log_weights_of(grid, lam))
        ess = effective_sample_size(grid, lam).mean()
        picked = chosen["heldout"]
        self._texts(chosen)
        kl = {"predicted": self.solution["kl"], "measured": measured, "se": error}
        base, after = (
            divergence.perplexity(float(divergence.drawn(part).sum()), part.tokens) for part in (whole, picked)
        )
        content, rows = self._measured(whole, picked, kl, float(ess), {"base": base, "result": after})
        return self._finish(content, whole, picked, rows)

    def _train(self) -> dict[str, Any]:
        base = self.candidates("heldout", self.held, min(self.n, max(BASE_DRAWS, self._draws)))
        rounds, gains = self.settings["rounds"], []
        for r in range(1, rounds + 1):
            made = self.folder.out / ("model" if r == rounds else f"round-{r}/model")
            self.rounds_left = rounds - r + 1
            if r > 1:
                self._next(r)
            methods.train(self, made)
            content, rows, result = self.prove(made, base, "result" if r == rounds else f"round-{r}")
            gains.append({"round": r, "values": content["values"], "lam": self.lam, "kl": content["kl"]})
            self.source = self.model.at(made)
        if rounds > 1:
            content["rounds"] = gains
        return self._finish(content, base, result, rows)

    def _next(self, r: int) -> None:
        """Round r: candidates of the model of the round before, for the same levels."""
        if r == 2:  # levels relative to the base stay where they are
            self.words = palettes.in_words({**self.solution, "values": self.names})
        self.part = f"round-{r}"
        self._solve(self.n)

    @property
    def _draws(self) -> int:
        return self.settings["texts_per_prompt"] or DRAWS

    def prove(
        self, made: Path, base: Candidates, name: str = "result"
    ) -> tuple[dict[str, Any], list[proof.Level], Candidates]:
        """Measure the model in the folder `made` on held-out prompts: the content of align.json, its rows, the texts.

        base: their candidates from the base model. name: of the files.
        """
        place = self.folder.part("heldout")
        tuned = self.model.at(made)
        with self.folder.stage("proof: sample") as stage:
            drawn = self.drawn(place / f"{name}.parquet", tuned, self.held, self._draws, self.seed_of("result"))
            stage["tokens"] = drawn.tokens
        with self.folder.stage("proof: score"):
            result = steps.score(
                place / f"{name}.parquet",
                [*self.rewards, *self.watch],
                place / f"{name}_scored.parquet",
                show_progress=self.show_progress,
            )
            sampler = self.model.sampler
            prompts = sampler.text.encode(self.held)
            before = divergence.log_likelihoods(sampler.model, prompts, result.token_ids)
            after, plain = divergence.drawn(result), divergence.drawn(base)
        measured, error = divergence.mean_and_error((after - before).mean(axis=1))
        self._texts({"heldout": result})
        perplexities = {
            "base": divergence.perplexity(float(plain.sum()), base.tokens),
            "result": divergence.perplexity(float(before.sum()), result.tokens),
        }
        kl = {"predicted": self.solution["kl"], "measured": measured, "se": error}
        content, rows = self._measured(base, result, kl, self.solution["ess"], perplexities)
        return content, rows, result

    def _texts(self, parts: dict[str, Candidates]) -> None:
        with atomic_write(self.folder.out / "texts.jsonl") as beside, open(beside, "w", encoding="utf-8") as file:
            for part, picked in parts.items():
                for i, prompt in enumerate(picked.prompts):
                    for j, text in enumerate(picked.texts[i]):
                        scores = {name: float(picked.rewards[name][i, j]) for name in self.names}
                        said = getattr(prompt, "messages", prompt)
                        row = {"prompt": said, "completion": text, "rewards": scores, "split": part}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def asked(self, rewards: np.ndarray) -> tuple[list[float | None], list[str], list[float]]:
        """The levels asked for (None: free), their senses, and the levels predicted, for prompts whose candidates from
        the base model have these rewards (P, N, m): what is relative to the base is so to that of these prompts."""
        from fastalign.palette import parse_palette
        from fastalign.palette.words import absolute, free

        flat = rewards.reshape(-1, rewards.shape[-1])
        levels, senses = parse_palette(self.settings["palette"], self.names, flat, rest="free")
        fixed, nothing = (group(self.settings["palette"], self.names) for group in (absolute, free))
        gain = np.subtract(self.solution["levels"], self.solution["before"]).tolist()
        rows = zip(self.names, flat.mean(axis=0, dtype=np.float64).tolist(), gain, self.solution["levels"], strict=True)
        predicted = [level if name in fixed else base + more for name, base, more, level in rows]
        asked = [None if name in nothing else float(x) for name, x in zip(self.names, levels, strict=True)]
        return asked, senses, predicted

    def _measured(
        self, base: Candidates, result: Candidates, kl: dict[str, Any], ess: float, perplexity: dict[str, Any]
    ) -> tuple[dict[str, Any], list[proof.Level]]:
        names, more = [*self.names, *self.watched], len(self.watched)
        before, after = base.reward_array(names), result.reward_array(names)
        asked, senses, predicted = self.asked(before[..., : len(self.names)])
        rows = proof.levels(
            names, [*asked, *[None] * more], [*senses, *[">="] * more], base=before, realised=after,
            predicted=[*predicted, *[None] * more], watched=self.watched,
        )  # fmt: skip
        fell = [row.name for row in rows if row.fell]
        measured = {"lam": self.lam, "kl": kl, "ess": ess, "perplexity": perplexity, "fell": fell}
        return self._content(rows) | measured, rows

    def _finish(
        self, content: dict[str, Any], base: Candidates, result: Candidates | None, rows: list[proof.Level]
    ) -> dict[str, Any]:
        from fastalign.report import proof_page

        if (model := self.folder.out / "model").is_dir():
            methods.write_card(model, content, self.settings)
        whole = self.folder.with_cost(content)
        page = proof_page.page(whole, base=base, result=result, rows=rows, settings=self.settings)
        with atomic_write(self.folder.out / "report.html") as beside:
            beside.write_text(page, encoding="utf-8")
        return self.folder.finish(whole)

    def _impossible(self, base: Candidates) -> dict[str, Any]:
        grid = base.reward_array(self.names)
        asked, senses, _ = self.asked(grid)
        rows = proof.impossible(self.names, asked, senses, grid)
        wanted = [row.name for row in rows if row.asked is not None]
        conflicts = self.solution.get("conflicts") or [wanted]  # older files have none
        nearest, certificate = self.solution["nearest"], self.solution["certificate"]
        if certificate is not None:
            certificate = {
                "weights": dict(zip(self.names, certificate["weights"], strict=True)),
                "bound": certificate["bound"],
                "text": _certificate(self.names, certificate, asked),
            }
        content = self._content(rows) | {
            "headline": proof.headline(rows, conflicts),
            "nearest": dict(zip(self.names, nearest, strict=True)),
            "certificate": certificate,
        }
        return self._finish(content, base, None, rows)

    def _content(self, rows: Sequence[proof.Level]) -> dict[str, Any]:
        return {
            "how": self.how,
            "feasible": bool(self.solution["feasible"]),
            "headline": proof.headline(rows),
            "values": {row.name: row.to_json() for row in rows},
            "lam": None,
            "kl": {"predicted": None, "measured": None, "se": None},
            "ess": None,
            "n": self.n,
            "train_prompts": len(self.train),
            "heldout_prompts": len(self.held),
            "nearest": None,
            "certificate": None,
        }


def _certificate(names: Sequence[str], certificate: dict[str, Any], asked: Sequence[float | None]) -> str:
    least = 1e-9 * max(map(abs, certificate["weights"]))  # smaller ones are rounding
    rows = zip(certificate["weights"], names, asked, strict=True)
    terms = [(w, name, x) for w, name, x in rows if abs(w) > least and x is not None]
    left = " + ".join(f"{w:.4g}·{name}" for w, name, _ in terms).replace("+ -", "- ")
    wanted = sum(w * x for w, _, x in terms)
    return f"{left} is at most {certificate['bound']:.6g} for every choice among the candidates; asked: {wanted:.6g}"
