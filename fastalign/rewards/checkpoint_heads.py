"""Heads of reward models that transformers does not know, read from their checkpoints' tensors. None of a checkpoint's
own code is run.

- "gated": ArmoRM (arXiv 2406.12845) and QRM (arXiv 2409.10164). r = W h(last token), for QRM the mean of its quantiles;
  g = softmax(MLP(h at the beginning of the answer) / temperature) · scale; score = g · (r T).
- "mlp": GRM (arXiv 2406.10216) with a value head of its own, v(h(last token)).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign._base.errors import UserError
from fastalign._base.progress import doing

_ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"  # where the prompt ends, in Llama 3's template
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (B, T, H), ids (B, T), last (B,) -> (B, outputs)


class WithHead(nn.Module):
    """A transformer's body with such a head, called as a sequence classifier of transformers is."""

    def __init__(self, body: Any, head: Head):
        super().__init__()
        self.body: Any = body
        self.head: Any = head
        self.config: Any = body.config

    @property
    def device(self) -> torch.device:
        return self.body.device

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """`.logits`: (B, outputs) float32. Rows are padded on the right."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        return SequenceClassifierOutput(logits=self.head(hidden.float(), input_ids, last))


class Gated(nn.Module):
    """The outputs are the score and each attribute."""

    layers: nn.ModuleList
    transform: nn.Parameter
    regression: nn.Parameter
    scale: nn.Parameter
    pattern: list[int]
    temperature: float

    def __init__(self, tensors: Mapping[str, Tensor], pattern: Sequence[int], temperature: float):
        super().__init__()
        self.pattern, self.temperature = list(pattern), temperature
        weight = tensors["regression_layer.weight"].float()  # (attributes · quantiles, H)
        self.transform = nn.Parameter(tensors["reward_transform_matrix"].float(), requires_grad=False)
        self.regression = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(tensors["gating.logit_scale"].float(), requires_grad=False)
        self.layers = nn.ModuleList(_layers(tensors, "gating.layers."))

    def forward(self, hidden: Tensor, ids: Tensor, last: Tensor) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)
        rewards = hidden[rows, last] @ self.regression.T
        rewards = rewards.view(len(ids), len(self.transform), -1).mean(dim=2)
        x = hidden[rows, [self._begin(row) for row in ids.tolist()]]
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if isinstance(layer, nn.Linear) and i < len(self.layers) - 1:
                x = x.relu()
        gate = (x / self.temperature).softmax(dim=1) * self.scale
        return torch.cat([(gate * (rewards @ self.transform)).sum(dim=1, keepdim=True), rewards], dim=1)

    def _begin(self, ids: list[int]) -> int:
        """The last place at which an answer begins."""
        size = len(self.pattern)
        for start in range(len(ids) - size, -1, -1):
            if ids[start : start + size] == self.pattern:
                return start
        raise UserError(
            f"a text must hold the beginning of an answer, {_ANSWER.strip()}: it was cut before, or the tokenizer's "
            "chat template is another one"
        )


class Mlp(nn.Module):
    layers: nn.ModuleList

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.layers = nn.ModuleList(_layers(tensors, "v_head.summary."))

    def forward(self, hidden: Tensor, ids: Tensor, last: Tensor) -> Tensor:
        x = hidden[torch.arange(len(ids), device=ids.device), last]
        for i, layer in enumerate(self.layers):
            x = layer(x).relu() if i < len(self.layers) - 1 else layer(x)
        return x


def open_model(model: str, head: str, tokenizer: Any) -> Any:
    """The body of a hub name or folder `WithHead` "gated" or "mlp", on CUDA if there is any. Raises UserError, one
    line."""
    from transformers import AutoConfig, AutoModel

    from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
    from fastalign.models.loading import ONLY_WEIGHTS, chosen_device, resolve

    folder = resolve(model)
    kind = "ArmoRM's or QRM's" if head == "gated" else "GRM's"
    with doing(f"loading {model}"), quiet_unless_terminal(), one_line_errors(model):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        body = AutoModel.from_pretrained(folder, config=config, **ONLY_WEIGHTS)
        tensors = _tensors(folder, ("regression_layer.", "reward_transform_matrix", "gating.", "v_head."))
    try:
        if head == "mlp":
            return WithHead(body, Mlp(tensors)).to(chosen_device()).eval()
        pattern = tokenizer(_ANSWER, add_special_tokens=False)["input_ids"]
        gate = Gated(tensors, pattern, float(getattr(config, "gating_temperature", 10)))
        return WithHead(body, gate).to(chosen_device()).eval()
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"{model}: must be a checkpoint with {kind} head, it lacks or misshapes {error}") from None


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> list[nn.Module]:
    """The linear layers and batch norms whose tensors begin so, in the order of their numbers; "<prefix>weight" is one
    linear layer."""
    found = {name.removeprefix(prefix): x.float() for name, x in tensors.items() if name.startswith(prefix)}
    numbers = sorted({int(name.partition(".")[0]) for name in found if re.match(r"\d+\.", name)})
    layers: list[nn.Module] = []
    for before in [f"{number}." for number in numbers] or [""]:
        weight, bias = found[f"{before}weight"], found.get(f"{before}bias")
        if weight.ndim == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            layer = nn.BatchNorm1d(len(weight))
        own = {name: found[before + name] for name in layer.state_dict() if before + name in found}
        layer.load_state_dict(own, strict=False)
        layers.append(layer)
    return layers


def _tensors(folder: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin so."""
    import json
    from pathlib import Path

    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(folder, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        shards = {"model.safetensors"}
    else:
        placed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = {shard for name, shard in placed.items() if name.startswith(prefixes)}
    found: dict[str, Tensor] = {}
    for shard in sorted(shards):
        file = cached_file(folder, shard)
        assert file is not None  # it raises where there is none
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefixes)}
    return found
