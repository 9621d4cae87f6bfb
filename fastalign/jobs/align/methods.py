"""Models trained to a palette, each from the candidates of the training half, into the folder's `model`.

- distill: the candidates' own weights under p_λ, which the model's log-probabilities of them are to match; λ goes
  further where the model's own levels fall short.
- dpo: pairs with a chosen text drawn from p_λ and a rejected one from p0.
- grpo, ppo: reinforcement learning on λ·R less the KL to the base, whose optimum is p_λ; λ is steered by the levels
  that the policy itself reaches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write
from fastalign.decode.candidates import Candidates
from fastalign.jobs.align.budget import Budget
from fastalign.jobs.settings import ENDLESS
from fastalign.models.loading import width_of

if TYPE_CHECKING:
    from fastalign.jobs.align.job import Job

PROOF_SHARE = 1.5  # of what the proof's draws cost, kept back for it
LEAST_SHARE = 0.1  # of the budget that must be left for training
RANK = 16  # of adapters: they reach the same levels at less KL than all weights do, in shorter steps
ADAPTED = ("distill", "grpo")  # where lora_r is not given
STEPS = 100  # of reinforcement learning, where no budget ends it
WIDTH = 576  # up to which the learning rates below hold; as 1 / width beyond (arXiv 2203.03466, of Adam)


def check(model: str, temperature: float, top_p: float) -> None:
    """Raises UserError unless the model can be trained here, on candidates of its own distribution."""
    if model.startswith(("http://", "https://", "vllm:")):
        raise UserError(f"how must be decode for {model}: only a model that runs here can be trained")
    if temperature != 1 or top_p != 1:
        raise UserError(
            f"how must be decode for truncated sampling: a trained model needs temperature 1 and top_p 1, got "
            f"{temperature} and {top_p}"
        )


def rank(how: Any, lora_r: int | None) -> int | None:
    """Of LoRA's adapters; None: all weights are trained."""
    if lora_r is None:
        return RANK if how in ADAPTED else None
    return lora_r or None


def train(job: Job, out: Path) -> None:
    """Train by the job's method, or by a function of the user's with the same arguments. Raises UserError if the budget
    leaves no time for it."""
    name = "train" if job.part == "train" else f"{job.part}: train"
    left = job.folder.left(job.budget)
    if job.budget.limited:
        proof = [x * PROOF_SHARE for x in job.folder.spent("heldout: sample")]
        rest = left.less(*proof)
        share = min(x / whole for x, whole in zip(rest, job.budget, strict=True) if whole < float("inf"))
        if share < LEAST_SHARE and not job.folder.spent(name)[0]:
            raise UserError(
                f"budget must leave time to train: of {job.budget} sampling took all but {max(share, 0.0):.0%}; give "
                "more, or fewer candidates"
            )
        left = Budget(*(x / job.rounds_left for x in rest))
    job.source.release()
    with job.folder.stage(name) as stage:
        stage["tokens"] = (job.trainer or METHODS[job.how])(job, out, left)


def distill(job: Job, out: Path, left: Budget) -> float:
    from fastalign.jobs.align.distilled import distill as steered

    return steered(job, out, left, _options(job, 1e-4, 1e-3, "distill"))


def dpo(job: Job, out: Path, left: Budget) -> float:
    from fastalign.jobs.pairs import preference_pairs
    from fastalign.jobs.preference import train_dpo

    pairs = preference_pairs(job.scored, lam=job.lam, how="sampled", pairs_per_prompt=8, seed=job.seed)
    result = train_dpo(
        job.source.name, pairs, out, **_options(job, 5e-6, 1e-4), batch_size=8, epochs=1.0, until=left.spent
    )
    return result["tokens"]


def grpo(job: Job, out: Path, left: Budget, *, steered: bool = True) -> float:
    from fastalign.jobs.align.steered import train_grpo

    scored = Candidates.from_parquet(job.scored, kind="scored")
    options = _options(job, 1e-4, 1e-3, "grpo") | _ends(job, left)
    result = train_grpo(job.source.name, scored, job.rewards, job.solution, out, steered=steered, **options)
    job.lam = result["lambda"]
    return result["tokens"]


def ppo(job: Job, out: Path, left: Budget, *, steered: bool = True) -> float:
    from fastalign.jobs.align.steered import train_ppo

    scored = Candidates.from_parquet(job.scored, kind="scored")
    options = _options(job, 1.41e-5, 2e-4) | _ends(job, left)
    result = train_ppo(job.source.name, scored, job.rewards, job.solution, out, steered=steered, **options)
    job.lam = result["lambda"]
    return result["tokens"]


METHODS: Mapping[str, Callable[[Any, Path, Budget], float]] = {
    "distill": distill, "dpo": dpo, "grpo": grpo, "ppo": ppo,
}  # fmt: skip
TRAINED = tuple(METHODS)


def _options(job: Job, learning_rate: float, adapters: float, how: str = "") -> dict[str, Any]:
    """What every training has in common. learning_rate: of all weights; adapters: of LoRA."""
    r = rank(how, job.settings["lora_r"])
    rate = (learning_rate if r is None else adapters) * min(1.0, WIDTH / width_of(job.model.name))
    return {
        "learning_rate": job.settings["learning_rate"] or rate,
        "lora_r": r,
        "dtype": job.settings["dtype"],
        "seed": job.seed,
        "overwrite": job.overwrite,
        "show_progress": job.show_progress,
    }


def _ends(job: Job, left: Budget) -> dict[str, Any]:
    """Of reinforcement learning: what ends a completion, and what ends the training."""
    return {
        "max_new_tokens": job.settings["max_new_tokens"],
        "until": left.spent,
        "max_steps": ENDLESS if left.limited else STEPS,
    }


def write_card(out: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """The model's README.md: how it was made, the palette, the levels it holds, its KL to the base, and the limits."""
    rows = "\n".join(
        f"| {name} | {_shown(x['base'])} | {_wish(x)} | {_shown(x['realised'])} ± {_shown(x['se'])} | {x['verdict']} |"
        for name, x in content["values"].items()
    )
    lam = ", ".join(f"{name} {x:.4g}" for name, x in content["lam"].items())
    kl = content["kl"]
    local = Path(settings["model"]).expanduser()
    model = local.resolve().name if local.exists() else settings["model"]
    text = f"""---
base_model: {json.dumps(model)}
library_name: transformers
tags: [fastalign, {content["how"]}]
---

# {model}, aligned with a palette

Palette: `{settings["palette"]}`

Trained by `fastalign align --how {content["how"]}` on {content["train_prompts"]} prompts with {content["n"]} candidates
each (λ: {lam}), and measured on {content["heldout_prompts"]} held-out prompts with fresh samples:

| value | base | asked | reached | verdict |
| --- | --- | --- | --- | --- |
{rows}

{content["headline"]} KL to the base: {_shown(kl["measured"])} nats per answer (predicted {_shown(kl["predicted"])}).
{_fell(content)}
Limits: levels are means over such prompts, of answers of up to {settings["max_new_tokens"]} tokens at temperature 1, by
the rewards named above; single answers vary, and other prompts may differ.
"""
    with atomic_write(out / "README.md") as beside:
        beside.write_text(text, encoding="utf-8")


def push(model: Path, repository: str) -> None:
    """Upload a model's folder by transformers' own calls. Raises UserError, one line."""
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        AutoModelForCausalLM.from_pretrained(model).push_to_hub(repository)
        AutoTokenizer.from_pretrained(model).push_to_hub(repository)
        ModelCard.load(model / "README.md").push_to_hub(repository)
    except Exception as error:  # the hub's, requests' and the system's
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repository}: {model} cannot be pushed there: {first}") from None
    outputs.say(f"{model}: pushed to {repository}")


def _fell(content: Mapping[str, Any]) -> str:
    fell = content.get("fell")
    return f"\nNobody asked about {', '.join(fell)}, which fell by more than the error.\n" if fell else ""


def _wish(x: Mapping[str, Any]) -> str:
    return "–" if x["asked"] is None else f"{x['op']} {_shown(x['asked'])}"


def _shown(x: float | None) -> str:
    return "n/a" if x is None else f"{x:.4g}"
