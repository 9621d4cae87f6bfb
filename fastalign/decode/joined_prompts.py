"""The prompts of a decoding step one behind another, as the Triton kernels read them: nothing is padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastalign.decode.shared_prompt import Prefix


class Joined:
    """Keys and values of several prompts, per layer: (kv heads, tokens, d) and (kv heads, tokens, dv). The prompts' own
    become views of them."""

    def __init__(self, prefixes: Mapping[int, Prefix]):
        self._prefixes = list(prefixes.values())
        self.index: dict[int, int] = {prompt: i for i, prompt in enumerate(prefixes)}
        self.lengths: list[int] = [prefix.length for prefix in self._prefixes]
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            keys = self._join(layer, [prefix.keys for prefix in self._prefixes])
            self._layers[layer] = keys, self._join(layer, [prefix.values for prefix in self._prefixes])
        return self._layers[layer]

    def _join(self, layer: int, kept: list[dict[int, Tensor]]) -> Tensor:
        joined = torch.cat([of_prompt[layer] for of_prompt in kept], 1)
        for of_prompt, part in zip(kept, joined.split(self.lengths, 1), strict=True):
            of_prompt[layer] = part
        return joined
