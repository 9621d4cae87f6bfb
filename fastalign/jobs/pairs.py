"""Preference pairs (prompt, chosen, rejected) made from scored candidates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base import tables
from fastalign._base.errors import UserError
from fastalign._base.numbers import weights
from fastalign.data import published
from fastalign.data import rows as sources
from fastalign.data.conversations import EXTRAS, Conversation
from fastalign.data.preferences import PreferencePairs

if TYPE_CHECKING:
    from fastalign.decode import Candidates

METHODS = ("best_worst", "sampled")


def preference_pairs(
    scored: str | os.PathLike[str] | Candidates,
    *,
    lam: Sequence[float] | Mapping[str, float],
    how: str = "best_worst",
    pairs_per_prompt: int = 1,
    seed: int,
) -> PreferencePairs:
    """Preference pairs from scored candidates of the same prompt, ordered by p_λ(y|x).

    Args:
        scored: a scored file of `fastalign score`, or its Candidates.
        lam: a weight per reward, by name, or in the order of the file's rewards. With the lam of `fastalign map`, a
            policy trained on the pairs moves towards the palette.
        how: "best_worst": the candidate of the i-th largest λ·R against that of the i-th smallest, i up to
            `pairs_per_prompt` and at most N // 2. "sampled": chosen drawn from p_λ (`ops.resample` on λ·R),
            rejected from p0 (uniformly); draws are not reordered, so chosen may have the lower λ·R.
        pairs_per_prompt: maximum per prompt.
        seed: of the draws.

    Returns:
        PreferencePairs with columns prompt, chosen, rejected, and chosen_score and rejected_score, their λ·R.
        dropped counts "ties" (pairs of equal λ·R or of the same text), "pairs with an empty text" and "prompts with
        one candidate".

    Raises:
        UserError: another kind of file, lam that does not fit it, or no pair left.
    """
    from fastalign.decode import Candidates

    if how not in METHODS:
        raise UserError(f"how must be one of {', '.join(METHODS)}, got {how!r}")
    if not (isinstance(pairs_per_prompt, int) and pairs_per_prompt >= 1):
        raise UserError(f"pairs_per_prompt must be an integer, at least 1, got {pairs_per_prompt!r}")
    whole = scored if isinstance(scored, Candidates) else Candidates.from_parquet(scored, kind="scored")
    names, lam = weights_by_name(lam, list(whole.rewards))
    grid = whole.reward_array(names).astype(np.float64)
    if not np.isfinite(grid).all():
        raise UserError("rewards must be finite to make pairs of, got NaN or infinity")
    scores = grid @ lam  # (P, N)
    chosen, rejected = _pick(scores, how, pairs_per_prompt, seed)
    pairs, ties, empty = [], 0, 0
    spoken, sampling = (
        any(isinstance(prompt, Conversation) for prompt in whole.prompts),
        whole.settings.get("sampling", {}),
    )
    extras = {name: sampling[name] for name in EXTRAS if sampling.get(name)}
    for p, prompt in enumerate(whole.prompts if whole.n > 1 else ()):
        for better, worse in zip(chosen[p], rejected[p], strict=True):
            texts = whole.texts[p][better], whole.texts[p][worse]
            if scores[p, better] == scores[p, worse] or texts[0] == texts[1]:
                ties += 1
                continue
            if not all(map(str.strip, texts)):
                empty += 1
                continue
            sides = (
                _sides(prompt, *texts, extras)
                if spoken
                else {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}
            )
            pairs.append(
                {**extras, **sides, "chosen_score": float(scores[p, better]), "rejected_score": float(scores[p, worse])}
            )
    alone = len(whole.prompts) if whole.n == 1 else 0
    if not pairs:
        why = f"{ties} ties, {empty} of empty texts" if ties or empty else "a prompt needs at least 2 candidates, got 1"
        raise UserError(
            f"no preference pairs: {why} (lam {', '.join(f'{n}={w:g}' for n, w in zip(names, lam, strict=True))})"
        )
    settings = {
        "pairs": {
            "values": names,
            "lambda": lam.tolist(),
            "how": how,
            "pairs_per_prompt": pairs_per_prompt,
            "seed": seed,
        },
        "sampling": sampling,
    }
    return PreferencePairs(
        pairs, {"ties": ties, "pairs with an empty text": empty, "prompts with one candidate": alone}, settings
    )


def pairs_by_value(
    scored: str | os.PathLike[str] | Candidates, values: Sequence[str], **making: Any
) -> PreferencePairs:
    """`preference_pairs` for each value separately, joined; the column "value" has the value's name."""
    from fastalign.decode import Candidates

    whole = scored if isinstance(scored, Candidates) else Candidates.from_parquet(scored, kind="scored")
    unknown = [name for name in values if name not in whole.rewards]
    if unknown or not values:
        raise UserError(
            f"values must be rewards that the file carries ({', '.join(whole.rewards)}), got "
            f"{unknown[0] if unknown else 'none'}"
        )
    made = [preference_pairs(whole, lam={name: 1.0}, **making) for name in values]
    rows = [{**row, "value": name} for name, pairs in zip(values, made, strict=True) for row in pairs]
    dropped = {reason: sum(pairs.dropped[reason] for pairs in made) for reason in made[0].dropped}
    settings = {**made[0].settings["pairs"], "values": list(values)}
    del settings["lambda"]
    return PreferencePairs(rows, dropped, {**made[0].settings, "pairs": settings})


def _sides(prompt: str, chosen: str, rejected: str, extras: Mapping[str, Any]) -> dict[str, Any]:
    """A pair of messages. A reply that the prompt already begins belongs to both completions."""
    conversation = prompt if isinstance(prompt, Conversation) else Conversation([{"role": "user", "content": prompt}])
    before = conversation.messages[:-1] if conversation.continues else conversation.messages
    options = {**extras.get("chat_template_kwargs", {}), **conversation.chat_template_kwargs}
    own = {"tools": conversation.tools, "chat_template_kwargs": options}
    return {
        "prompt": before,
        **{name: [conversation.replied(text)[-1]] for name, text in (("chosen", chosen), ("rejected", rejected))},
        **{name: value for name, value in own.items() if value},
    }


def _pick(scores: np.ndarray, how: str, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidate indices (P, k') of chosen and rejected."""
    import torch

    from fastalign import ops

    count, n = scores.shape
    if how == "best_worst":
        order = np.argsort(-scores, axis=1, kind="stable")
        k = min(k, n // 2)
        return order[:, :k], order[:, ::-1][:, :k]
    seeds = np.random.SeedSequence(seed).generate_state(2, np.uint64) >> np.uint64(1)  # two independent streams
    weights = torch.from_numpy(np.ascontiguousarray(scores))
    chosen = ops.resample(weights, k, seed=int(seeds[0])).numpy()
    rejected = ops.resample(torch.zeros(count, n, dtype=torch.float64), k, seed=int(seeds[1])).numpy()
    return chosen, rejected


def weights_by_name(lam: Any, names: list[str]) -> tuple[list[str], np.ndarray]:
    """The rewards that lam weighs, and its weights: by name, or in the order of `names`. Raises UserError."""
    if isinstance(lam, Mapping):
        unknown = [name for name in lam if name not in names]
        if unknown or not lam:
            raise UserError(
                f"lam must weigh rewards that the file carries ({', '.join(names)}), got {unknown or 'none'}"
            )
        names, lam = list(lam), list(lam.values())
    return names, weights(lam, len(names), ", ".join(names))


def scored_of(
    data: str | os.PathLike[str], *, prompt_column: str | None = None, response_column: str | None = None
) -> Candidates | None:
    """The scored candidates of a file, of fastalign's or of another program (`decode.elsewhere`); None for a file of
    pairs or of weighted rows, and for a data set by name. Raises UserError."""
    from fastalign.decode import Candidates, elsewhere

    path, kind = Path(data).expanduser(), noted_kind(data)
    columns = elsewhere.Columns(prompt_column, response_column)
    if kind == "scored":
        return Candidates.from_parquet(path, kind="scored")
    if kind is not None or not path.is_file() or sources.suffix_of(path) not in sources.SUFFIXES:
        return None
    first = sources.stream(path, what="candidates").first()
    others = {"chosen", "rejected", "weights"} & first.keys() or published.form_of(first)
    if columns.named():
        return elsewhere.read(path, kind="scored", columns=columns)
    if others:
        return None
    found = elsewhere.read(path, kind=("candidates", "scored"))
    return found if found.rewards else None


def noted_kind(data: str | os.PathLike[str]) -> str | None:
    """The "kind" that fastalign noted in a Parquet or Arrow file; None for others."""
    path = Path(data).expanduser()
    return tables.note(path).get("kind") if path.is_file() else None
