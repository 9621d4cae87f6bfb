"""The forward pass of a preference trainer: per-token log-probabilities of a batch of pairs, packed if possible."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastalign.models.head import head_of
from fastalign.models.packing import Pack, is_enabled, packed_hidden
from fastalign.models.scoring import score
from fastalign.ops import TokenLogprobs, linear_token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PairBatch(NamedTuple):
    """2B rows, the B chosen first, then the B rejected."""

    input_ids: Tensor  # (2B, T)
    attention_mask: Tensor  # (2B, T)
    labels: Tensor  # (2B, T): the ids of completion tokens, -100 elsewhere
    pack: Pack | None  # the same batch as one row, for a model with `packing.enable`; or None


def add_pair_forward(model: PreTrainedModel) -> None:
    """Make `model(pairs=PairBatch, outputs=...)` score pairs; without `pairs` its forward is unchanged.

    This is part of the model's forward so that its wrappers (DDP, FSDP, autocast) see the call.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, pairs: PairBatch | None = None, outputs: tuple[str, ...] = ("log_probs",), **kwargs):
        if pairs is None:
            return original(*args, **kwargs)
        return _score(self, pairs, outputs)

    model.forward = types.MethodType(forward, model)


def _score(model: PreTrainedModel, pairs: PairBatch, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Each output (2B, T - 1): at t, of token t + 1, 0 outside completions. A dict, because autocast's wrapper can
    traverse it."""
    labels = pairs.labels[:, 1:]
    scored = labels != -100
    if pairs.pack is None or not is_enabled(model):
        fields = score(model, pairs.input_ids, labels, outputs=outputs, attention_mask=pairs.attention_mask).outputs
    else:
        rows = packed_hidden(model, pairs.pack).index_select(0, pairs.pack.place[:, :-1][scored])
        made = linear_token_logprobs(rows, labels=labels[scored], **head_of(model).arguments(), outputs=outputs)
        fields = made._asdict() if isinstance(made, TokenLogprobs) else {"log_probs": made}
    return {name: x.new_zeros(scored.shape).masked_scatter(scored, x) for name, x in fields.items() if x is not None}


def split(pairs: int, tokens: Tensor, limit: int | None) -> list[slice]:
    """Groups of consecutive pairs with at most `limit` tokens (a single pair may have more); tokens (B,): per pair."""
    if limit is None:
        return [slice(0, pairs)]
    groups, begin, total = [], 0, 0
    for b, n in enumerate(tokens.tolist()):
        if b > begin and total + n > limit:
            groups.append(slice(begin, b))
            begin, total = b, 0
        total += n
    return [*groups, slice(begin, pairs)]


def take(inputs: dict[str, Any], pairs: int, group: slice) -> dict[str, Any]:
    """The pairs of `group` from a collated batch: rows (2B, ...) by halves, (B, ...) as they are."""
    result = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and len(x) == 2 * pairs:
            result[name] = torch.cat((x[:pairs][group], x[pairs:][group]))
        else:
            result[name] = x[group] if isinstance(x, Tensor) and len(x) == pairs else x
    return result
