"""Attention of one new token a row over all prompts at once, with the same number of operations whatever the number of
prompts: on a GPU each of them is a launch, which costs more than what it computes.

The prompts' keys lie side by side, padded to the longest; so do each prompt's rows. Scores over the prompt and over a
row's own tokens meet in one softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastalign.decode.shared_prompt import Prefix


class Stack:
    """Keys and values of several prompts, per layer: (P, kv heads, d, S) and (P, kv heads, S, dv), 0 after each one's
    length. The prompts' own become views of them."""

    def __init__(self, prefixes: Mapping[int, Prefix]):
        self._prefixes = list(prefixes.values())
        self.index: dict[int, int] = {prompt: i for i, prompt in enumerate(prefixes)}
        self.length: int = max(prefix.length for prefix in self._prefixes)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            keys, values = self._prefixes[0].keys[layer], self._prefixes[0].values[layer]
            heads, count = len(keys), len(self._prefixes)
            both = (
                keys.new_zeros(count, heads, keys.shape[-1], self.length),
                values.new_zeros(count, heads, self.length, values.shape[-1]),
            )
            for prefix, some_keys, some_values in zip(self._prefixes, *both, strict=True):
                some_keys, some_values = some_keys[..., : prefix.length], some_values[:, : prefix.length]
                prefix.keys[layer] = some_keys.copy_(prefix.keys[layer].transpose(1, 2)).transpose(1, 2)
                prefix.values[layer] = some_values.copy_(prefix.values[layer])
            self._layers[layer] = both
        return self._layers[layer]


class Rows:
    """Where each prompt's rows lie, for one step.

    prompts: of each row, its index in the stack. starts: the length of each row's prompt; own: tokens of each row's
    own, but for the new one; longest: of them, with it. Tensors are (rows,).
    """

    def __init__(self, prompts: Sequence[int], starts: Tensor, own: Tensor, longest: int, stack: Stack):
        members: list[list[int]] = [[] for _ in stack.index]
        for row, prompt in enumerate(prompts):
            members[prompt].append(row)
        self.most = max(map(len, members))
        padded = [row for some in members for row in some + [0] * (self.most - len(some))]
        places = [0] * len(prompts)
        for prompt, some in enumerate(members):
            for i, row in enumerate(some):
                places[row] = prompt * self.most + i
        places += [0] * (len(padded) - len(places))
        self.of, at = torch.tensor([padded, places]).to(own.device).unbind(0)  # in one copy
        self.at = at[: len(prompts)]
        self.starts, self.own, self.longest, self.shared = starts, own, longest, stack.length
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """(rows, 1, S + longest) float32, -inf where a row does not look."""
        if window not in self._masks:
            prompt = torch.arange(self.shared, device=self.own.device)[None]
            mine = torch.arange(self.longest, device=self.own.device)[None]
            seen = [prompt < self.starts[:, None], mine <= self.own[:, None]]
            if window is not None:
                last = (self.starts + self.own)[:, None] - window
                seen = [seen[0] & (prompt > last), seen[1] & (mine + self.starts[:, None] > last)]
            seen_both = torch.cat([x.expand(len(self.own), -1) for x in seen], 1)
            self._masks[window] = torch.zeros(seen_both.shape, device=prompt.device).masked_fill_(
                ~seen_both, -torch.inf
            )
        return self._masks[window].unsqueeze(1)


def attend(
    q: Tensor,
    shared: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    rows: Rows,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(rows, heads, dv) from q (rows, heads, d), the stack's keys and values, and own ones (rows, kv heads, longest,
    d)."""
    (keys, values), (own_keys, own_values) = shared, own
    kv = keys.shape[1]
    mine = torch.matmul(q.unflatten(1, (kv, -1)), own_keys.transpose(-1, -2)).flatten(1, 2)
    theirs = _by_row(torch.matmul(_by_prompt(q, kv, rows), keys), rows)
    scores = torch.cat([theirs, mine], -1).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.softmax(scores + rows.mask(window), -1).to(values.dtype)
    theirs, mine = p.split([rows.shared, rows.longest], -1)
    result = _by_row(torch.matmul(_by_prompt(theirs, kv, rows), values), rows)
    return result + torch.matmul(mine.unflatten(1, (kv, -1)), own_values).flatten(1, 2)


def _by_prompt(x: Tensor, kv: int, rows: Rows) -> Tensor:
    """(P, kv heads, rows · group, n) from (rows, heads, n)."""
    grouped = x.index_select(0, rows.of).view(-1, rows.most, kv, x.shape[1] // kv, x.shape[2])
    return grouped.transpose(1, 2).flatten(2, 3)


def _by_row(x: Tensor, rows: Rows) -> Tensor:
    """(rows, heads, n) from (P, kv heads, rows · group, n)."""
    grouped = x.unflatten(2, (rows.most, -1)).transpose(1, 2)  # (P, rows, kv heads, group, n)
    return grouped.flatten(2, 3).flatten(0, 1).index_select(0, rows.at)
