"""Reward models that a server runs: vLLM's /classify, /score and /pooling, and SGLang's /classify.

What is sent for prompt x and response y:
    /classify, /pooling   one chat a request, {"messages": [..., x, y]}, to which the server applies its chat template.
                          With a tokenizer the chat as text, and with text="response" y alone: many a request, as
                          {"input": [...]} to vLLM and {"text": [...]} to SGLang, which applies no template itself
    /score                {"text_1": [x, ...], "text_2": [y, ...]}: x is the text of the last user turn
vLLM is asked for one output as it is (use_activation=false), as `from_pairwise` reads it, and to cut texts that are
longer than the model's context. Of several outputs `label` is the one that is read: as log p(label) from the
probabilities of vLLM's /classify, or from the softmax of SGLang's; as it is from /pooling, and of a model that has a
row for each token from the last.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.http import Http, Refused, check_at_least_1, checked_key, checked_url
from fastalign._base.in_flight import as_done
from fastalign.data.conversations import Conversation, as_text
from fastalign.rewards.base import CachedReward
from fastalign.rewards.encoding import check_count
from fastalign.rewards.kept import Kept, kept, key_of

ENDPOINTS = ("classify", "score", "pooling")
FORMS = ("chat", "response")
BYTES = 1 << 16, 1 << 20  # of an answer, at most: and for each text
PROBE = "What is the capital of France?", "The capital of France is Paris."
SAME = 1e-3  # by which the scores of one model for one text may differ
TINY = float(np.finfo(np.float32).tiny)  # a probability that was rounded to 0

_announced: set[str] = set()


class Dialect(NamedTuple):
    """A path, and what it is sent: "messages", "pair", "input" or "text"."""

    path: str
    form: str


class _Model(NamedTuple):
    """What asking the server has shown."""

    dialect: Dialect
    raw: bool  # it is asked for an output without activation
    label: int  # which of its outputs is read
    outputs: int
    identity: dict[str, Any]  # what its scores are kept under


class ServerReward(CachedReward):
    """A reward model on a server, as the reference "server:URL#MODEL" gives it; the module says what is sent.

    Args:
        url: of the server, with or without /v1. model: its name there; None if the server has only one.
        endpoint: "classify", "score" or "pooling"; None: the first of them that answers, in this order.
        label: of a model with several outputs, the index of one, or, with `tokenizer`, its name in that model's
            configuration.
        text: "chat" (prompt and response) or "response" (that alone), for /classify and /pooling.
        tokenizer: the model's, or its name: it writes the chats, and many go in one request.
        api_key: default $OPENAI_API_KEY. batch_size: texts in a request. in_flight: requests at once. timeout: seconds
            for an answer. tries: attempts, see `_base.http.Http`.

    Scores are kept on disk (`rewards.kept`) under the model's name and its score of a fixed text, so that another model
    behind the same address is not taken for it. Nothing is asked before the first score.
    """

    reads_messages = True

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        name: str = "server",
        endpoint: str | None = None,
        label: int | str | None = None,
        text: str = "chat",
        tokenizer: Any = None,
        api_key: str | None = None,
        batch_size: int = 32,
        in_flight: int = 16,
        timeout: float = 600.0,
        tries: int = 6,
        cache_size: int = 65536,
    ):
        super().__init__(name, cache_size=cache_size)
        if endpoint is not None and endpoint not in ENDPOINTS:
            raise UserError(f"endpoint must be one of {', '.join(ENDPOINTS)}, got {endpoint!r}")
        if text not in FORMS:
            raise UserError(f"text must be one of {', '.join(FORMS)}, got {text!r}")
        if endpoint == "score" and (text == "response" or tokenizer is not None):
            raise UserError("endpoint='score' reads both as a pair: text and tokenizer are for the others")
        if isinstance(label, bool) or not (label is None or isinstance(label, (int, str))):
            raise UserError(f"label must be an index or a name, got {label!r}")
        if isinstance(label, str) and not isinstance(tokenizer, str):
            raise UserError(f"label must be an index: a name needs tokenizer=MODEL, got {label!r}")
        check_at_least_1(in_flight=in_flight, timeout=timeout, tries=tries)
        base = checked_url(url).removesuffix("/v1")
        self._http = Http(base, checked_key(api_key), timeout=timeout, tries=tries)
        self.model: str | None = model
        self.endpoint: str | None = endpoint
        self.label: int | str | None = label
        self.text: str = text
        self.batch_size: int = check_count("batch_size", batch_size)
        self.in_flight: int = check_count("in_flight", in_flight)
        self.uses_prompt: bool = text != "response"
        self.tokenizer: Any = tokenizer
        self._writer: Any = None  # `data.text.Text` of the tokenizer, once it is loaded
        self._found: _Model | None = None

    def reach(self) -> None:
        """Ask for the score of a fixed text. Raises UserError, one line, if there is none."""
        with kept() as store:
            self._found = self._found or self._find(store)

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        with kept() as store:
            self._found = found = self._found or self._find(store)
            items = [self._item(found.dialect, *pair) for pair in zip(prompts, responses, strict=True)]
            keys = [key_of([found.identity, item]) for item in items]
            had = {i: value for i, key in enumerate(keys) if (value := store.get(key)) is not None}
            if had:
                yield list(had), np.array([self._value(row, found) for row in had.values()])
            missing = [i for i in range(len(items)) if i not in had]
            size = 1 if found.dialect.form == "messages" else self.batch_size
            batches = [missing[start : start + size] for start in range(0, len(missing), size)]

            def work(batch: list[int], stop: threading.Event) -> list[list[float]]:
                rows = self._ask(found.dialect, [items[i] for i in batch], found.raw, stop)
                for row in rows:
                    if len(row) != found.outputs:
                        raise UserError(f"{self._where(found.dialect)}: {len(row)} outputs, after {found.outputs}")
                store.put({keys[i]: row for i, row in zip(batch, rows, strict=True)})
                return rows

            for batch, rows in as_done(work, batches, min(self.in_flight, len(batches))):
                yield batch, np.array([self._value(row, found) for row in rows])

    def _find(self, store: Kept) -> _Model:
        """Ask each dialect that may be spoken for the score of a fixed text."""
        model = self.model or self._http.only_model("/v1/models")
        refusals = []
        for dialect in self._dialects():
            item = self._item(dialect, *PROBE)
            try:
                raw, (row,) = True, self._ask(dialect, [item], True)
                if len(row) > 1 and dialect == ("/classify", self._plain_form()):
                    raw, (row,) = False, self._ask(dialect, [item], False)
            except Refused as refused:
                absent = refused.code in (404, 405, 501) or "does not support" in str(refused)
                if not absent and refused.code not in (400, 422):
                    raise
                refusals.append(str(refused).removeprefix(self._http.base))
                if absent or dialect.form == "input":  # SGLang takes the same texts under another name
                    continue
                break  # it is there, and does not take chats: to send it something else is the user's decision
            label = self._label(row, dialect)
            asked = {"url": self._http.base, "model": model, "dialect": dialect, "raw": raw, "text": self.text}
            known = store.get(key_of(asked))
            if known is None or len(known) != len(row) or not np.allclose(known, row, rtol=SAME, atol=SAME):
                store.put({key_of(asked): row})
                known = row
            if self.endpoint is None:
                self._announce(dialect)
            return _Model(dialect, raw, label, len(row), {**asked, "probe": known})
        reasons = "; ".join(refusals)
        if self._plain_form() == "messages":
            reasons += " (tokenizer=MODEL sends chats as text, endpoint=score pairs)"
        raise UserError(f"{self._http.base}: no reward model answers: {reasons}")

    def _plain_form(self) -> str:
        return "messages" if self.text == "chat" and self.tokenizer is None else "input"

    def _dialects(self) -> list[Dialect]:
        form = self._plain_form()
        every = [Dialect("/classify", form), *([Dialect("/classify", "text")] if form == "input" else [])]
        every += [Dialect("/score", "pair")] if form == "messages" else []
        every.append(Dialect("/pooling", form))
        return [one for one in every if self.endpoint in (None, one.path[1:])]

    def _announce(self, dialect: Dialect) -> None:
        what = {"messages": "chats", "pair": "prompt and response as a pair"}.get(dialect.form, "texts")
        line = f"reward {self.name!r}: {self._where(dialect)} answers, and is sent {what}"
        if line not in _announced:
            _announced.add(line)
            outputs.say(line)

    def _where(self, dialect: Dialect) -> str:
        return self._http.base + dialect.path

    def _item(self, dialect: Dialect, prompt: str, response: str) -> Any:
        """What is sent for one pair."""
        if dialect.form == "pair":
            return [as_text(prompt), response]
        if self.text == "response":
            return response
        if self.tokenizer is not None:
            return self._rendered(prompt, response)
        conversation = (
            prompt if isinstance(prompt, Conversation) else Conversation([{"role": "user", "content": prompt}])
        )
        options = conversation.chat_template_kwargs
        return {"messages": conversation.replied(response), **({"chat_template_kwargs": options} if options else {})}

    def _rendered(self, prompt: str, response: str) -> str:
        if self._writer is None:
            from fastalign.data.text import Text
            from fastalign.models.loading import load_tokenizer

            named = isinstance(self.tokenizer, str)
            self._writer = Text(load_tokenizer(self.tokenizer) if named else self.tokenizer)
        return self._writer.render(prompt, f"reward {self.name!r}: a prompt", reply=response)

    def _ask(
        self, dialect: Dialect, items: list[Any], raw: bool, stop: threading.Event | None = None
    ) -> list[list[float]]:
        """The model's outputs for each item, one row each."""
        body: dict[str, Any] = {"model": self.model} if self.model else {}
        if dialect.form == "text":
            body |= {"text": items}
        else:
            body |= {"truncate_prompt_tokens": -1, **({"use_activation": False} if raw else {})}
            if dialect.form == "messages":
                body |= items[0]
            elif dialect.form == "pair":
                body |= {"text_1": [first for first, _ in items], "text_2": [second for _, second in items]}
            else:
                body |= {"input": items, "add_special_tokens": self.text == "response"}
        limit = BYTES[0] + BYTES[1] * len(items)
        answer = self._http.ask(dialect.path, body, limit, stop or threading.Event(), kinds=(dict, list))
        try:
            return _rows(answer, dialect, len(items))
        except _Wrong as wrong:
            raise UserError(f"{self._where(dialect)}: its answer {wrong}") from None

    def _label(self, row: list[float], dialect: Dialect) -> int:
        """The index of the output that is read."""
        label, where = self.label, self._where(dialect)
        if isinstance(label, str):
            names = _labels(self.tokenizer)
            if label not in names:
                raise UserError(f"{where}: has no label {label!r}, it has {', '.join(names)}")
            label = names.index(label)
        if label is None and len(row) > 1:
            raise UserError(
                f"{where}: the model has {len(row)} outputs, choose one with [label=0] to [label={len(row) - 1}]"
            )
        if not 0 <= (label or 0) < len(row):
            raise UserError(f"{where}: label must be an index below {len(row)}, got {label}")
        return label or 0

    def _value(self, row: list[float], found: _Model) -> float:
        if len(row) == 1 or found.dialect.path != "/classify":
            return row[found.label]
        if found.dialect.form == "text":
            scores = np.array(row)
            return row[found.label] - float(np.logaddexp.reduce(scores))
        return float(np.log(max(row[found.label], TINY)))


class _Wrong(Exception):
    pass


def _rows(answer: Any, dialect: Dialect, count: int) -> list[list[float]]:
    """The numbers for each of `count` texts, in order. Raises `_Wrong`."""
    field = {"/classify": "probs", "/score": "score", "/pooling": "data"}[dialect.path]
    if dialect.form == "text":
        field, data = "embedding", answer
    else:
        data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(one, dict) for one in data):
        raise _Wrong("must hold a list of objects")
    if len(data) != count:
        raise _Wrong(f"must hold {count} scores, got {len(data)}")
    order = [one.get("index", i) for i, one in enumerate(data)]
    if dialect.form != "text":
        if sorted(order, key=str) != sorted(range(count), key=str):
            raise _Wrong(f"must number its scores 0 to {count - 1}, once each, got {str(order)[:60]}")
        data = [one for _, one in sorted(zip(order, data, strict=True), key=lambda pair: pair[0])]
    rows = []
    for one in data:
        row = one.get(field)
        if dialect.path == "/pooling" and isinstance(row, list) and row and isinstance(row[-1], list):
            row = row[-1]  # of the last token
        row = row if isinstance(row, list) else [row]
        wrong = [x for x in row if isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) < 1e30]
        if wrong or not row:
            raise _Wrong(f"must hold {field!r} as finite numbers, got {wrong[0] if wrong else row!r:.40}")
        rows.append([float(x) for x in row])
    return rows


def _labels(model: str) -> list[str]:
    """The names of a model's outputs, by its configuration."""
    from transformers import AutoConfig

    from fastalign._base.quiet import one_line_errors
    from fastalign.models.loading import resolve

    with one_line_errors(model):
        return [str(one) for one in AutoConfig.from_pretrained(resolve(model)).id2label.values()]
