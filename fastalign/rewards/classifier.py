"""Rewards from transformers sequence classifiers and pairwise reward models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.progress import doing
from fastalign.data.text import Text, embedding_rows
from fastalign.rewards.base import CachedReward
from fastalign.rewards.encoding import check_count, context_length, evaluating, length_batches, pad

if TYPE_CHECKING:
    import torch

TextForm = str | Callable[[str, str], str | tuple[str, str]]
# The entry of a model's configuration where RewardTrainer notes how its texts were made: {"text": a form, "values":
# [...]}.
NOTE = "fastalign_reward"
_FORMS = ("auto", "response", "pair", "chat", "plain")


def from_classifier(
    model: Any,
    label: str | int,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    text: TextForm = "response",
    batch_size: int = 32,
    max_length: int | None = None,
    cache_size: int = 65536,
) -> SequenceReward:
    """r(x, y) = log p(label | x, y) in nats from any transformers sequence classifier (MAP, arXiv 2410.19198).

    model: a sequence classifier, or the hub name or folder of one; `tokenizer` may be left out for a name or folder.
    label: a name in the model's `id2label` (in any case), or the index of an output.
    text: what the model reads: "response"; "pair" (prompt and response as the tokenizer's two segments); "chat" (both
        in the tokenizer's chat template); "plain" (both as one text that the tokenizer's eos token ends); "auto" (what
        `train.RewardTrainer` stored in the model's configuration, else "chat" if there is a template, else "pair"); or
        a function of (prompt, response) that returns the text, or a tuple of two segments. For a prompt that is a
        conversation, "chat" reads all of it, the others only the last user turn.
    name: the reward's name; default "classifier:<label>".
    Uses the softmax over the labels, or the sigmoid of the label's own output if the model's configuration says
    `multi_label_classification`. Texts beyond the context (or `max_length`) are truncated by the tokenizer, on its
    `truncation_side`. A model whose configuration has no pad token runs one row at a time. Raises UserError, in one
    line, for an unknown label and for a model with one output.
    """
    from torch.nn.functional import logsigmoid

    model, tokenizer = open_classifier(model, tokenizer)
    outputs = model.config.num_labels
    if outputs < 2:
        raise UserError(f"model must have at least 2 labels, got {outputs}; a single score is for from_pairwise")
    index = _label_index(model.config.id2label, outputs, label)
    multi_label = model.config.problem_type == "multi_label_classification"

    def read(logits: torch.Tensor) -> torch.Tensor:
        return logsigmoid(logits[:, index]) if multi_label else logits.log_softmax(dim=-1)[:, index]

    name = name or f"classifier:{label}"
    return SequenceReward(name, model, tokenizer, read, text, batch_size, max_length, cache_size)


def from_pairwise(
    model: Any,
    tokenizer: Any = None,
    *,
    name: str = "pairwise",
    text: TextForm = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
    cache_size: int = 65536,
) -> SequenceReward:
    """The raw score of any reward model with one output, such as one trained on preference pairs (Bradley–Terry).

    Arguments as in `from_classifier`; the model reads prompt and response ("auto": as `train.RewardTrainer` stored,
    else through the chat template if its tokenizer has one). Raises UserError, in one line, unless the model has
    exactly one output.
    """
    model, tokenizer = open_classifier(model, tokenizer)
    if (count := model.config.num_labels) != 1:
        other = "for one of several heads there is from_heads, for labels from_classifier"
        raise UserError(f"model must have 1 output, got {count}; {other}")
    return SequenceReward(name, model, tokenizer, lambda logits: logits[:, 0], text, batch_size, max_length, cache_size)


def from_heads(
    model: Any,
    tokenizer: Any = None,
    *,
    names: Sequence[str] | None = None,
    text: TextForm = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
    cache_size: int = 65536,
) -> list[SequenceReward]:
    """One reward per output of a reward model of m heads; `rewards.score(from_heads(model), ...)` gives (n, m).

    names: of the rewards, one per output; by default the values that `train.RewardTrainer` stored in the model's
    configuration (its `id2label`). Other arguments as in `from_pairwise`. The heads share the model and its results: a
    text scored by one head is cached for the others, up to `cache_size`.
    """
    model, tokenizer = open_classifier(model, tokenizer)
    outputs = model.config.num_labels
    names = [str(model.config.id2label[i]) for i in range(outputs)] if names is None else list(names)
    if len(names) != outputs or len(set(names)) != outputs:
        raise UserError(f"names must name each of the model's {outputs} outputs once, got {', '.join(names)}")
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "cache_size": cache_size}
    return [*shared_heads(names, model, tokenizer, lambda logits: logits, text, **options)]


def shared_heads(
    names: Sequence[str],
    model: Any,
    tokenizer: Any,
    read: Callable[[torch.Tensor], torch.Tensor],
    text: TextForm,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    cache_size: int = 65536,
) -> list[HeadReward]:
    """One reward per column of `read(logits)`, which share the model and its results."""
    heads: list[HeadReward] = []
    for column, name in enumerate(names):
        head = HeadReward(name, model, tokenizer, read, text, batch_size, max_length, cache_size)
        head.heads, head.column = heads, column
        heads.append(head)
    return heads


def from_reference(model: str, label: str | None, *, name: str, **options: Any) -> SequenceReward:
    """The reward of a hub name or folder, and a label, as in "hf:MODEL#LABEL".

    A model with one output gives its score, one with several the log-probability of the label, and one that
    `train.RewardTrainer` saved the score of that head. options: those of `from_classifier`. Raises UserError, one line,
    without the label of a model with several.
    """
    opened, tokenizer = open_classifier(model, options.pop("tokenizer", None))
    labels = [str(one) for one in opened.config.id2label.values()]
    if label is None and len(labels) > 1:
        raise UserError(f"hf:{model}: has several labels, name one as hf:{model}#LABEL: {', '.join(labels)}")
    if label is not None and label.lower() not in [one.lower() for one in labels]:
        raise UserError(f"hf:{model}: has no label {label!r}, it has {', '.join(labels)}")
    if len(labels) == 1:
        return from_pairwise(opened, tokenizer, name=name, **options)
    assert label is not None
    if hasattr(opened.config, NOTE):
        names = [name if one.lower() == label.lower() else one for one in labels]
        return from_heads(opened, tokenizer, names=names, **options)[names.index(name)]
    return from_classifier(opened, label, tokenizer, name=name, **options)


class SequenceReward(CachedReward):
    """A sequence classifier as a reward; made by `from_classifier` and `from_pairwise`."""

    model: Any
    tokenizer: Any

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        read: Callable[[torch.Tensor], torch.Tensor],
        text: TextForm,
        batch_size: int,
        max_length: int | None,
        cache_size: int,
    ):
        super().__init__(name, cache_size=cache_size)
        if not callable(text) and text not in _FORMS:
            raise UserError(f"text must be one of {', '.join(map(repr, _FORMS))} or a function, got {text!r}")
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if text == "chat" and not has_template:
            raise UserError("text='chat' needs a chat template, and the tokenizer has none")
        if text == "auto":
            noted = (getattr(model.config, NOTE, None) or {}).get("text")
            text = noted if noted in _FORMS else "chat" if has_template else "pair"
        self.model, self.tokenizer = model, tokenizer
        self._tokens = Text(tokenizer, rows=embedding_rows(model))
        self.reads_messages: bool = text == "chat"
        self.uses_prompt: bool = text != "response"
        self.text = text
        self.batch_size: int = check_count("batch_size", batch_size)
        self.max_length = context_length(model.config, tokenizer)
        if max_length is not None:
            self.max_length = check_count("max_length", max_length)
        self._read = read

    def _segments(self, prompt: str, response: str) -> str | tuple[str, str]:
        if callable(self.text):
            return self.text(prompt, response)
        if self.text == "response":
            return response
        if self.text == "pair":
            return prompt, response
        if self.text == "plain":
            return plain_text(prompt + response, self.tokenizer)
        return self._tokens.render(prompt, f"reward {self.name!r}: a prompt", reply=response)

    def _encode(self, segments: str | tuple[str, str]) -> tuple[list[int], list[int] | None]:
        """Token ids of one text, never empty, and its segment ids if the model takes them."""
        options = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        first, second = (segments, None) if isinstance(segments, str) else segments
        # The template wrote the special tokens already.
        name = f"reward {self.name!r}: a text"
        encoded = self._tokens.one(first, name, second, add_special_tokens=self.text != "chat", **options)
        self._tokens.check_ids(encoded["input_ids"], name)
        fallback = self.tokenizer.eos_token_id or 0
        return list(encoded["input_ids"]) or [fallback], encoded.get("token_type_ids")

    def _live_model(self) -> Any:
        return self.model

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        rows = [self._encode(self._segments(*pair)) for pair in zip(prompts, responses, strict=True)]
        pad_id = self.model.config.get_text_config().pad_token_id
        device = self.model.device
        for indices in length_batches([len(ids) for ids, _ in rows], 1 if pad_id is None else self.batch_size):
            ids = [rows[index][0] for index in indices]
            inputs = {
                "input_ids": pad(ids, pad_id or 0, device),
                "attention_mask": pad([[1] * len(row) for row in ids], 0, device),
            }
            if kinds := [segments for index in indices if (segments := rows[index][1])]:
                inputs["token_type_ids"] = pad(kinds, 0, device)
            with evaluating(self.model):
                yield indices, self._read(self.model(**inputs).logits.float()).cpu().numpy()


class HeadReward(SequenceReward):
    """One output of a model with several; it shares the others' results with them."""

    heads: list[HeadReward]
    column: int

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        for indices, scores in super()._score(prompts, responses):
            for column, head in enumerate(self.heads):
                if column != self.column:
                    for index, value in zip(indices, scores[:, column], strict=True):
                        head.remember((prompts[index], responses[index]), float(value))
            yield indices, scores[:, self.column]


def plain_text(text: str, tokenizer: Any) -> str:
    """A text in the format on which plain-text reward models are trained: with the tokenizer's eos token at its end."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def open_classifier(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded if given by name (safetensors only, without the checkpoint's own code), on
    CUDA if there is any."""
    from transformers import AutoModelForSequenceClassification

    from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
    from fastalign.models.loading import ONLY_WEIGHTS, chosen_device, resolve

    if not isinstance(model, (str, os.PathLike)):
        if tokenizer is None:
            raise UserError("tokenizer must be given with a model object, got None")
        return model, tokenizer
    folder = resolve(model)
    if tokenizer is None:
        tokenizer = open_tokenizer(model)
    with doing(f"loading {model}"), quiet_unless_terminal(), one_line_errors(model):
        options = {**ONLY_WEIGHTS, "output_loading_info": True}
        loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in loaded.named_parameters()})
    if missing:  # transformers would fill it with random numbers
        raise UserError(f"{model}: must be a sequence classifier, there is no {missing[0]} in it")
    return loaded.to(chosen_device()), tokenizer


def open_tokenizer(model: str | os.PathLike[str]) -> Any:
    """The tokenizer of a hub name or folder. Raises UserError, one line."""
    from transformers import AutoTokenizer

    from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
    from fastalign.models.loading import resolve

    with quiet_unless_terminal(), one_line_errors(model):
        return AutoTokenizer.from_pretrained(resolve(model), trust_remote_code=False)


def _label_index(id2label: dict[int, str], outputs: int, label: str | int) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < outputs:
            raise UserError(f"label must be an index in [0, {outputs}), got {label}")
        return label
    matches = [index for index, known in id2label.items() if str(known).lower() == str(label).lower()]
    if len(matches) != 1:
        raise UserError(f"label must be one of {', '.join(map(repr, id2label.values()))} or an index, got {label!r}")
    return matches[0]
