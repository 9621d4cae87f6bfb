"""Groups of sequences packed in one row without padding; a group's common prefix is computed once.

`pack_groups` concatenates a batch: of each group its first sequence, then what follows the common prefix in the others.
Every token keeps its position and attends to exactly the same tokens as in its own sequence, so hidden states equal
those of the padded batch. `packed_hidden` runs any transformers causal model on such a row through the attention
function registered here: a segment attends to itself, and to the prefix that it continues.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.models.compiled_layers import CompiledLayers
from fastalign.models.head import head_of
from fastalign.models.identity import Verdict, language_model, passable
from fastalign.models.trial import Probe, attention_set, distance, tried

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fastalign_packed"


class Segment(NamedTuple):
    """Tokens [start, end) of the row, which also see [prefix_start, prefix_end); no prefix where these are equal."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass
class Pack:
    """A padded batch (R, T) as one row of L tokens."""

    input_ids: Tensor  # (1, L) int64
    position_ids: Tensor  # (1, L) int64, each token's position in its own sequence
    place: Tensor  # (R, T) int64: where in the row each place of the batch is computed; at padding, the token before it
    segments: tuple[Segment, ...]  # in order, without gaps
    calls: int = 0  # calls of the attention function; without any, the model was not packed
    _masks: dict = field(default_factory=dict)

    def mask(self, segment: Segment, window: int | None) -> Tensor | None:
        """(tokens, prefix + tokens) bool, True where seen; None where the plain causal mask says the same."""
        start, end, prefix_start, prefix_end = segment
        if prefix_start == prefix_end and (window is None or end - start <= window):
            return None
        key = (start, window)
        if key not in self._masks:
            own = self.position_ids[0, start:end]
            seen = torch.cat((self.position_ids[0, prefix_start:prefix_end], own))
            apart = own[:, None] - seen[None, :]
            self._masks[key] = (apart >= 0) if window is None else (apart >= 0) & (apart < window)
        return self._masks[key]


def pack_groups(input_ids: Tensor, attention_mask: Tensor, groups: Iterable[Sequence[int]]) -> Pack:
    """Pack a padded batch, with the longest common prefix of each group of rows only once.

    input_ids, attention_mask: (R, T), padded anywhere. groups: their rows' numbers; each row is in one group.
    """
    device, keep = input_ids.device, attention_mask.bool().cpu()
    rows = [ids[mask] for ids, mask in zip(input_ids.cpu(), keep, strict=True)]
    tokens, positions, segments = [], [], []
    place = torch.zeros(input_ids.shape, dtype=torch.int64)
    end = 0
    for group in groups:
        base, common = end, _common([rows[r] for r in group])
        for i, r in enumerate(group):
            shared = common if i else 0
            start, end = end, end + len(rows[r]) - shared
            tokens.append(rows[r][shared:])
            positions.append(torch.arange(shared, len(rows[r])))
            place[r, keep[r]] = torch.cat((torch.arange(base, base + shared), torch.arange(start, end)))
            if end > start:
                segments.append(Segment(start, end, base, base + shared))
    kept = torch.where(keep, torch.arange(keep.shape[1]), 0).cummax(1).values  # the last one up to each place
    place = place.gather(1, kept)
    row, position = torch.cat(tokens)[None], torch.cat(positions)[None]
    return Pack(row.to(device), position.to(device), place.to(device), tuple(segments))


def pack_pairs(input_ids: Tensor, attention_mask: Tensor) -> Pack:
    """Pack the pairs (b, b + B) of a padded batch of 2B rows: see `pack_groups`."""
    pairs = len(input_ids) // 2
    return pack_groups(input_ids, attention_mask, [(b, b + pairs) for b in range(pairs)])


def _common(rows: Sequence[Tensor]) -> int:
    """The length of the longest common prefix."""
    n = min(map(len, rows))
    apart = (torch.stack([row[:n] for row in rows]) != rows[0][:n]).any(0).nonzero()
    return n if len(apart) == 0 else int(apart[0])


def can_pack(model: PreTrainedModel) -> Verdict:
    """Whether packed rows give the model's own logits, tested by trial: see `fastalign.models`."""
    wrapped = passable(model)
    return tried(model, "packed rows", _packed, attends=True) if wrapped else wrapped


def _packed(model: PreTrainedModel, probe: Probe) -> list[Tensor]:
    """The path in a trial: the probe's prompts as two pairs; unpacked rows must stay correct as well."""
    inner = language_model(model)
    rows = [prompt + tails[side] for side in (0, 1) for prompt, tails in zip(probe.prompts, probe.tails, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [row[0]] * (int(lengths.max()) - len(row)) for row in rows], device=inner.device)
    pack = pack_pairs(ids, torch.arange(ids.shape[1])[None] < lengths[:, None])
    register()
    with attention_set(inner, NAME):
        logits = head_of(inner).logits(packed_hidden(inner, pack))
        alone = inner(input_ids=ids[:1, : len(rows[0])], use_cache=False).logits[0]
    results = []
    for p, (prompt, tails) in enumerate(zip(probe.prompts, probe.tails, strict=True)):
        for side, tail in enumerate(tails):
            first = len(prompt) - 1
            results.append(logits[pack.place[p + 2 * side, first : first + len(tail)]])
    if (
        distance(
            *(x[: len(results[0])].double().log_softmax(-1) for x in (results[0], alone[len(probe.prompts[0]) - 1 :]))
        )
        > 1e-2
    ):
        raise UserError("its attention without packs differs")
    return results


def register() -> None:
    """Register the attention function for packs with transformers, as NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def enable(model: PreTrainedModel) -> Verdict:
    """Set the model's attention function to the one for packs, if that is correct (`can_pack`); without a pack it
    behaves like "sdpa"."""
    verdict = can_pack(model)
    if verdict:
        register()
        language_model(model).set_attn_implementation(NAME)
    return verdict


def is_enabled(model: PreTrainedModel) -> bool:
    return language_model(model).config._attn_implementation == NAME


def packed_hidden(model: PreTrainedModel, pack: Pack, **inputs: Any) -> Tensor:
    """The last hidden states (L, H) of a packed row under an `enable`d causal model (not its PEFT or DDP wrapper).

    Raises UserError if the model did not pass the pack to its attention.
    """
    calls = pack.calls
    # A four-dimensional mask is passed on unchanged; so none is made for the row, and `attention` reads none.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pack.input_ids.device)
    with CompiledLayers.of(model):
        hidden = model.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=unread,
            use_cache=False,
            pack=pack,
            **inputs,
        ).last_hidden_state
    if pack.calls == calls:
        raise UserError(f"{type(model).__name__} cannot run packed: it keeps arguments from its attention")
    return hidden[0]


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    pack: Pack | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, heads, L, d), key, value (1, kv heads, L, d) -> (1, L, heads, d)."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UserError("attention sinks and position biases cannot run packed")
    if pack is None:
        if softcap is not None:
            return _capped(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    pack.calls += 1
    # Split, not sliced: the gradient of a slice would be a whole row, zero outside the segment.
    lengths = [segment.end - segment.start for segment in pack.segments]
    pieces = {
        s.start: qkv for s, *qkv in zip(pack.segments, *(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    }
    outputs = []
    for segment in pack.segments:
        q, k, v = pieces[segment.start]
        shared = segment.prefix_end - segment.prefix_start
        if shared:
            _, *first = pieces[segment.prefix_start]
            k, v = (torch.cat((x[:, :, :shared], own), 2) for x, own in zip(first, (k, v), strict=True))
        mask = pack.mask(segment, sliding_window)
        if softcap is not None:
            if mask is None:
                mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            outputs.append(_capped(q, k, v, mask, dropout, scaling, softcap))
        else:
            options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
            outputs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **options))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _capped(q, k, v, mask, dropout, scaling, softcap) -> Tensor:
    """softmax(softcap · tanh(q kᵀ scaling / softcap)) v, as Gemma 2's eager attention."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1, dtype=torch.float32).to(q.dtype) if q.dtype != torch.float64 else scores.softmax(-1)
    return F.dropout(p, dropout) @ v
