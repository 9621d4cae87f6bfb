"""Sample from p_λ directly, at a lower cost than n full candidates per prompt; block by block.

Used by `fastalign sample --method`. A prompt's random numbers depend on its index in the full set, so its texts do not
depend on which blocks were finished before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingOptions
from fastalign.decode.adaptive import adaptive
from fastalign.decode.candidates import Candidates
from fastalign.decode.particles import check_memory_limit, particles
from fastalign.decode.rejection import speculative_rejection, usual_checkpoints
from fastalign.decode.sampler import Sampler
from fastalign.decode.samplers.base import ROWS_AT_ONCE

if TYPE_CHECKING:
    from typing_extensions import Unpack

# By method, the kind of file that it makes: the text picked for each prompt, or all particles with their weights.
KINDS = {"rejection": "selected", "particles": "weighted", "adaptive": "selected"}
EACH = 16  # candidates of a prompt in a round of "adaptive"


def check(method: str, *, n: int, ess: float | None, memory_limit: Any) -> None:
    """Raises UserError if the method and the options do not match."""
    if ess is not None and method != "adaptive":
        raise UserError("ess applies only to --method adaptive: leave it out, or give that method")
    if method == "adaptive" and n % EACH:
        raise UserError(f"n must be a multiple of {EACH} for --method adaptive, the number drawn per round; got {n}")
    if method == "particles":
        check_memory_limit(memory_limit)


def blocks(
    method: str,
    sampler: Sampler,
    prompts: Sequence[str],
    values: Sequence[str],
    lam: Sequence[float],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    ess: float | None = None,
    skip: Collection[int] = (),
    show_progress: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[tuple[list[int], Candidates]]:
    """Yield (prompt indices, their part) of `KINDS[method]`. values: names of rewards; lam: (m,). n: maximum per
    prompt.

    settings["spent"] of a part: tokens and candidates drawn; for "adaptive" also how many prompts had too few. skip:
    indices of prompts already finished. The other arguments are those of the method's function.
    """
    from fastalign._base import progress

    options: dict[str, Any] = {"lam": list(lam), "max_new_tokens": max_new_tokens, "seed": seed}
    options |= {name: value for name, value in sampling.items() if value is not None}
    width = max(1, (sampling.get("batch_size") or ROWS_AT_ONCE) // (EACH if method == "adaptive" else n))
    todo = [i for i in range(len(prompts)) if i not in set(skip)]
    with progress.bar("sampling", total=len(todo), unit="prompts", show=show_progress) as advance:
        for first in range(0, len(todo), width):
            block = todo[first : first + width]
            part, spent = _DRAW[method]([prompts[i] for i in block], block, sampler, list(values), n, ess, options)
            selection = {"method": method, "seed": seed, "values": list(values), "lambda": list(lam)}
            yield block, replace(part, settings={**part.settings, "selection": selection, "spent": spent})
            advance(len(block))


def _rejection(prompts, places, sampler, values, n, ess, options):
    result = speculative_rejection(sampler, prompts, values, n=n, prompt_ids=places, **options)
    return result.candidates.take(result.indices[:, None]), {"tokens": result.tokens, "candidates": n * len(prompts)}


def _particles(prompts, places, sampler, values, n, ess, options):
    at = usual_checkpoints(options["max_new_tokens"])
    result = particles(sampler, prompts, values, n=n, prompt_ids=places, checkpoints=at, **options)
    part = replace(result.candidates, log_weights=result.log_weights)
    return part, {"tokens": result.tokens, "candidates": n * len(prompts)}


def _adaptive(prompts, places, sampler, values, n, ess, options):
    target = {} if ess is None else {"ess": ess}
    result = adaptive(sampler, prompts, values, max_n=n, each=min(EACH, n), prompt_ids=places, **target, **options)
    picked = [each.take(np.array([[i]])) for each, i in zip(result.candidates, result.indices, strict=True)]
    tokens = sum(len(ids) for each in result.candidates for ids in each.token_ids[0])
    spent = {"tokens": tokens, "candidates": int(result.counts.sum()), "short": int((~result.enough).sum())}
    return Candidates.concat(picked), spent


_DRAW = {"rejection": _rejection, "particles": _particles, "adaptive": _adaptive}


def joined(parts: Sequence[Candidates]) -> Candidates:
    """The parts joined, with their total cost."""
    whole = Candidates.concat(parts)
    spent = sum((Counter(part.settings["spent"]) for part in parts), Counter())
    names = parts[0].settings["spent"]
    return replace(whole, settings={**whole.settings, "spent": {name: spent[name] for name in names}})
