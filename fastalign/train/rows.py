"""The forward pass of a trainer: per-token log-probabilities of a batch of sequences, packed if possible."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign.models.head import head_of
from fastalign.models.packing import Pack, is_enabled, packed, packed_hidden, send
from fastalign.models.scoring import score
from fastalign.models.spans import same_law
from fastalign.ops import TokenLogprobs, linear_token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CPU_TOKENS = 1024  # in one forward pass: enough rows for the full rate of matrix products


class RowBatch(NamedTuple):
    """R sequences, padded anywhere; made by `batch_of`."""

    input_ids: Tensor  # (R, T)
    attention_mask: Tensor  # (R, T)
    labels: Tensor  # (R, T): the ids of completion tokens, -100 elsewhere
    scored: Tensor  # (n,): the places of (R, T - 1), one row after another, with a label: that of the next token
    pack: Pack | None  # the same batch as one row, for a model with `packing.enable`; or None


def batch_of(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    groups: Iterable[Sequence[int]] | None,
    device: torch.device,
) -> RowBatch:
    """A batch on `device`; its tensors, int64, are there or on the host. groups: of rows packed together, None: padded.

    Where its tokens go is determined on the host: a GPU's batch is read once, before its forward pass, not within.
    """
    given = (input_ids, attention_mask, labels)
    ids, mask, marked = (x.numpy() for x in (given if input_ids.is_cpu else torch.stack(given).cpu().unbind()))
    (scored,) = send(device, np.flatnonzero(marked[:, 1:] != -100))
    pack = None if groups is None else packed(ids, mask, groups, device)
    input_ids, attention_mask, labels = (x.to(device, non_blocking=True) for x in given)
    return RowBatch(input_ids, attention_mask, labels, scored, pack)


def add_row_forward(model: PreTrainedModel) -> None:
    """Make `model(rows=RowBatch, outputs=..., temperature=...)` score rows, and `model(call=f)` call f within its
    forward pass, as `sharded.inside` does; else it is unchanged.

    This is part of the model's forward so that its wrappers (DDP, FSDP, autocast) see the call.
    """
    original = model.forward
    function = getattr(original, "__func__", None)  # unbound: a copy of the model has its own

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self,
        *args,
        rows: RowBatch | None = None,
        outputs: tuple[str, ...] = ("log_probs",),
        temperature: float = 1.0,
        call: Callable[[], Any] | None = None,
        **kwargs,
    ):
        if call is not None:
            return call()
        if rows is None:
            return original(*args, **kwargs) if function is None else function(self, *args, **kwargs)
        return _score(self, rows, outputs, temperature)

    model.forward = types.MethodType(forward, model)


def _score(model: PreTrainedModel, rows: RowBatch, outputs: tuple[str, ...], temperature: float) -> dict[str, Tensor]:
    """Each output (R, T - 1): at t, of token t + 1, 0 outside completions. A dict, because autocast's wrapper can
    traverse it."""
    labels, pack = rows.labels[:, 1:], rows.pack
    options: dict[str, Any] = {"outputs": outputs, "temperature": temperature}
    config = model.config.get_text_config(decoder=True)
    if pack is None or not is_enabled(model) or not same_law(config, pack.lengths):
        fields = score(model, rows.input_ids, labels, attention_mask=rows.attention_mask, **options).outputs
    else:
        hidden = packed_hidden(model, pack).index_select(0, pack.place[:, :-1].take(rows.scored))
        made = linear_token_logprobs(hidden, labels=labels.take(rows.scored), **head_of(model).arguments(), **options)
        fields = made._asdict() if isinstance(made, TokenLogprobs) else {"log_probs": made}
    return {
        name: x.new_zeros(labels.numel()).scatter(0, rows.scored, x).view(labels.shape)
        for name, x in fields.items()
        if x is not None
    }
