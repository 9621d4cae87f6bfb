"""A transformers model whose attention is computed by a `plan`, which is handed to its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastalign._base.errors import UserError
from fastalign.models.trial import attention_set

_NAME = "fastalign_shared_prompt"


@contextmanager
def planned(model: Any) -> Iterator[None]:
    """Within the block, attention is `plan.attend`, for the argument `plan` of the model's forward."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    with attention_set(model, _NAME):
        yield


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    plan: Any,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, with the `plan` of `SharedPromptEngine`: -> (rows, tokens, heads, d)."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UserError("attention sinks and position biases cannot run on the shared-prompt engine")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = plan.attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap)
    return out.transpose(1, 2), None
