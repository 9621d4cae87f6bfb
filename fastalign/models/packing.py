"""Groups of sequences packed in one row without padding; a group's common prefix is computed once.

`pack_groups` concatenates a batch: of each group its first sequence, then what follows the common prefix in the others.
Every token keeps its position and attends to exactly the same tokens as in its own sequence, so hidden states equal
those of the padded batch. `packed_hidden` runs any transformers causal model on such a row through the attention
function registered here (`packed_attention`): a segment attends to itself, and to the prefix that it continues.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.models.compiled_layers import CompiledLayers
from fastalign.models.head import head_of
from fastalign.models.identity import Verdict, language_model, passable
from fastalign.models.packed_attention import attention
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


class OneCall(NamedTuple):
    """What attention to all segments of a row in one call takes: the keys of one segment after those of another, each
    after those of its prefix. int32, on the row's device."""

    keys: Tensor  # (K,): where in the row
    cu_queries: Tensor  # (S + 1,): where each segment begins
    cu_keys: Tensor  # (S + 1,): where the keys of each begin
    most_queries: int  # of a segment
    most_keys: int


@dataclass
class Pack:
    """A padded batch (R, T) as one row of L tokens."""

    input_ids: Tensor  # (1, L) int64
    position_ids: Tensor  # (1, L) int64, each token's position in its own sequence
    place: Tensor  # (R, T) int64: where in the row each place of the batch is computed; at padding, the token before it
    segments: tuple[Segment, ...]  # in order, without gaps
    lengths: tuple[int, ...]  # (R,) tokens of each sequence
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

    @cached_property
    def one_call(self) -> OneCall:
        spans = [(np.arange(p, q), np.arange(start, end)) for start, end, p, q in self.segments]
        queries, keys = ([len(own) for _, own in spans], [len(prefix) + len(own) for prefix, own in spans])
        cu = [np.cumsum([0, *lengths]) for lengths in (queries, keys)]
        whole = np.concatenate([part for span in spans for part in span])
        at, cu_queries, cu_keys = send(self.input_ids.device, *(x.astype(np.int32) for x in (whole, *cu)))
        return OneCall(at, cu_queries, cu_keys, max(queries), max(keys))


def send(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays of one type as tensors on the device, in one copy that the host does not wait for."""
    together = torch.from_numpy(np.concatenate([x.reshape(-1) for x in arrays])).to(device, non_blocking=True)
    return [x.view(like.shape) for x, like in zip(together.split([x.size for x in arrays]), arrays, strict=True)]


def pack_groups(input_ids: Tensor, attention_mask: Tensor, groups: Iterable[Sequence[int]]) -> Pack:
    """Pack a padded batch, with the longest common prefix of each group of rows only once.

    input_ids, attention_mask: (R, T), padded anywhere. groups: their rows' numbers; each row is in one group.
    """
    return packed(input_ids.cpu().numpy(), attention_mask.cpu().numpy(), groups, input_ids.device)


def packed(
    input_ids: np.ndarray, attention_mask: np.ndarray, groups: Iterable[Sequence[int]], device: torch.device
) -> Pack:
    """The same of arrays, to run on `device`."""
    keep = attention_mask.astype(bool)
    rows = [ids[mask] for ids, mask in zip(input_ids, keep, strict=True)]
    tokens, positions, segments = [], [], []
    place = np.zeros(input_ids.shape, np.int64)
    end = 0
    for group in groups:
        base, common = end, _common([rows[r] for r in group])
        for i, r in enumerate(group):
            shared = common if i else 0
            start, end = end, end + len(rows[r]) - shared
            tokens.append(rows[r][shared:])
            positions.append(np.arange(shared, len(rows[r])))
            place[r, keep[r]] = np.concatenate((np.arange(base, base + shared), np.arange(start, end)))
            if end > start:
                segments.append(Segment(start, end, base, base + shared))
    kept = np.maximum.accumulate(np.where(keep, np.arange(keep.shape[1]), 0), 1)  # the last one up to each place
    place = np.take_along_axis(place, kept, 1)
    row, position, places = send(device, np.concatenate(tokens)[None], np.concatenate(positions)[None], place)
    return Pack(row, position, places, tuple(segments), tuple(map(len, rows)))


def halves(rows: int) -> list[tuple[int, int]]:
    """The groups of a batch of pairs: row b of the first half with row b of the second."""
    return [(b, b + rows // 2) for b in range(rows // 2)]


def pack_pairs(input_ids: Tensor, attention_mask: Tensor) -> Pack:
    """Pack the pairs (b, b + B) of a padded batch of 2B rows: see `pack_groups`."""
    return pack_groups(input_ids, attention_mask, halves(len(input_ids)))


def _common(rows: Sequence[np.ndarray]) -> int:
    """The length of the longest common prefix."""
    n = min(map(len, rows))
    apart = np.flatnonzero((np.stack([row[:n] for row in rows]) != rows[0][:n]).any(0))
    return int(apart[0]) if len(apart) else n


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
