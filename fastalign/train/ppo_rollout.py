"""Rollouts: responses drawn from the policy for token prompts of any lengths."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from fastalign._base.errors import UserError

ROWS_AT_ONCE = 128
# Options that `decode.Sampler` supports; with any other, transformers generates.
_SAMPLED = {"do_sample", "max_new_tokens", "max_length", "temperature", "top_k", "top_p", "min_p"}
_NEUTRAL = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "transformers_version",
    "use_cache",
    "_from_model_config",
    "output_attentions",
    "output_hidden_states",
}


class LengthSampler:
    """Draws a length in [min_value, max_value) at each call, from Python's random numbers.

    The `trl.core.LengthSampler` of TRL 0.11, for its scripts: they draw the length of each prompt with it, and pass one
    to `PPOTrainer.generate` as `length_sampler`.
    """

    min_value: int
    max_value: int

    def __init__(self, min_value: int, max_value: int):
        if not min_value < max_value:
            raise UserError(f"max_value must be above min_value, got {max_value} and {min_value}")
        self.min_value, self.max_value = min_value, max_value

    def __call__(self) -> int:
        return random.randrange(self.min_value, self.max_value)


def generate(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    *,
    length_sampler: Callable[[], int] | None = None,
    batch_size: int | None = None,
    return_prompt: bool = True,
    remove_padding: bool = True,
    **options: Any,
) -> list[Tensor]:
    """One response per query, each 1-dimensional, preceded by the query with return_prompt.

    Args:
        model: the transformers model, its adapters inside it.
        queries: tensors (tokens,); those of one batch are padded on the left.
        length_sampler: gives max_new_tokens for each batch.
        batch_size: queries at once; None: up to 128.
        remove_padding: cut a response after its first end token, which stays. False: all of a batch have one length.
        options: those of transformers' generate. Sampling with only temperature, top_k, top_p and min_p runs in
        `decode.Sampler`, seeded from torch's generator; everything else runs in transformers.
    """
    for i, query in enumerate(queries):
        if not isinstance(query, Tensor) or query.ndim != 1 or len(query) == 0 or query.is_floating_point():
            came = f"{tuple(query.shape)} {query.dtype}" if isinstance(query, Tensor) else type(query).__name__
            raise UserError(f"query_tensor[{i}] must be a tensor (tokens,) of at least one id, got {came}")
    if options.get("num_return_sequences", 1) != 1:
        raise UserError(f"num_return_sequences must be 1, got {options['num_return_sequences']!r}: repeat the queries")
    size = batch_size or ROWS_AT_ONCE
    responses = []
    for start in range(0, len(queries), size):
        batch = [query.to(model.device) for query in queries[start : start + size]]
        if length_sampler is not None:
            options["max_new_tokens"] = int(length_sampler())
        config = copy.deepcopy(model.generation_config)
        unknown = config.update(**options)
        own_end = options.get("eos_token_id") is not None  # then the tokenizer's end token does not end a response
        ends = _ends(config.eos_token_id) | (set() if own_end else _ends(tokenizer.eos_token_id))
        pad = next(x for x in (config.pad_token_id, tokenizer.pad_token_id, *ends, 0) if x is not None)
        settings = None if unknown or own_end else _plain(config)
        if settings is not None:
            drawn = _by_sampler(model, tokenizer, batch, settings)
        else:
            drawn = _by_transformers(model, batch, pad, options)
        if remove_padding:
            drawn = [_until(response, ends) for response in drawn]
        longest = 0 if remove_padding else max(map(len, drawn))
        drawn = [padded(response, (0, max(0, longest - len(response))), value=pad) for response in drawn]
        responses += [torch.cat(pair) for pair in zip(batch, drawn, strict=True)] if return_prompt else drawn
    return responses


def _ends(token: Any) -> set[int]:
    return set() if token is None else set(token) if isinstance(token, (list, tuple)) else {int(token)}


def _until(response: Tensor, ends: set[int]) -> Tensor:
    """Up to the first end token, which is kept."""
    at = torch.isin(response, torch.tensor(sorted(ends), device=response.device, dtype=response.dtype)).nonzero()
    return response[: int(at[0]) + 1] if len(at) else response


def _plain(config: Any) -> dict[str, Any] | None:
    """The sampler's settings, if it supports everything in the configuration."""
    options = {k: v for k, v in config.to_diff_dict().items() if v is not None}
    if (options.get("min_length") or 0) <= 0:
        options.pop("min_length", None)
    if not (options.get("do_sample") and options.get("max_new_tokens")) or set(options) - _SAMPLED - _NEUTRAL:
        return None
    top_k = options.get("top_k", 50)  # transformers' default
    return {
        "n": 1,
        "max_new_tokens": int(options["max_new_tokens"]),
        "temperature": float(options.get("temperature", 1.0)),
        "top_k": int(top_k),
        "top_p": float(options.get("top_p", 1.0)),
        "min_p": float(options.get("min_p", 0.0)),
        "stop": [],
    }


def _by_sampler(model: Any, tokenizer: Any, queries: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
    from fastalign.data.sampling import SamplingSettings
    from fastalign.decode.sampler import Sampler

    seed = int(torch.randint(2**63 - 1, ()))
    ids, _ = Sampler(model, tokenizer).draw(
        [query.tolist() for query in queries], SamplingSettings(**settings, seed=seed)
    )
    return [torch.tensor(row, device=model.device) for (row,) in ids]


@torch.no_grad()
def _by_transformers(model: Any, queries: list[Tensor], pad: int, options: dict) -> list[Tensor]:
    longest = max(map(len, queries))
    ids = torch.stack([padded(query, (longest - len(query), 0), value=pad) for query in queries])
    mask = torch.stack([padded(torch.ones_like(query), (longest - len(query), 0)) for query in queries])
    return list(model.generate(input_ids=ids, attention_mask=mask, **{"pad_token_id": pad, **options})[:, longest:])
