"""An LLM as judge: it rates texts by a rubric, over an OpenAI-compatible /chat/completions."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastalign._base import spending
from fastalign._base.errors import UserError
from fastalign._base.http import MODELS_BYTES, Http, Refused, checked_key, checked_url
from fastalign._base.spending import Spending
from fastalign.rewards import ratings
from fastalign.rewards import rubric as rubrics
from fastalign.rewards.base import CachedReward, Reward
from fastalign.rewards.kept import answers, key_of
from fastalign.rewards.rubric import Rubric

BYTES = 1 << 24  # of an answer, at most
ASKS = 3  # for one rating, if the answers cannot be read
TOP = 20  # likeliest tokens: the most that OpenAI and vLLM give
WARM = 0.7  # temperature, at least, of a second ask


class Judge:
    """An LLM that rates by a rubric; `rewards` has one reward for each of its values, which share their calls.

    rubric: a YAML file, as `rewards.rubric` describes it, or a mapping with its fields. options: fields in place of
    the file's.

    A rating is the expectation over the probabilities of the marks, where the server gives log-probabilities, averaged
    over the draws; with `compare` the probability that the response is better than the other, averaged over both
    orders. Each call's ratings are kept on disk (`rewards.kept`) under all that was asked, so none is paid for twice.
    Nothing is asked before the first score. Raises UserError, one line, for a rubric that cannot be used.
    """

    def __init__(self, rubric: str | os.PathLike[str] | Mapping[str, Any], /, **options: Any):
        if isinstance(rubric, Mapping):
            checked = rubrics.check("judge", {**rubric, **options}, where="the rubric", folder=Path())
        else:
            checked = rubrics.read(rubric, options)
        self.rubric: Rubric = checked
        key = checked_key(os.environ.get(checked.api_key_env, ""))
        self._http = Http(
            checked_url(checked.url),
            key,
            timeout=checked.timeout,
            tries=checked.tries,
            per_minute=checked.requests_per_minute,
        )
        self._model = checked.model
        self._logprobs = checked.logprobs
        price = checked.price
        self.spent: Spending = spending.of(
            f"judge {checked.name}", None if price is None else (price["input"], price["output"])
        )
        self.rewards: list[Reward] = [JudgeReward(self, name) for name in checked.values]

    @property
    def names(self) -> list[str]:
        """The values' names."""
        return list(self.rubric.values)

    def reach(self) -> None:
        """Ask which models there are. Raises UserError, one line, if the server does not answer, or refuses the key."""
        try:
            if self._model is None:
                self._model = self._http.only_model()
            else:
                self._http.ask("/models", None, MODELS_BYTES, threading.Event())
        except Refused as refused:
            if self._model is None or refused.code in (401, 403):  # not every service lists its models
                raise

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
        """Each pair's index and its number for each value, in the order in which they are known."""
        if self.rubric.compare:
            lacking = next((prompt for prompt in prompts if prompt not in self.rubric.references), None)
            if lacking is not None:
                raise UserError(f"{self.rubric.compare}: has no response to the prompt {lacking!r:.80}")
        if self._model is None:
            self.reach()
        draws = list(itertools.product(range(2 if self.rubric.compare else 1), range(self.rubric.draws)))
        calls = {
            (i, order, draw): key_of([self._http.base, self._body(*pair, order, draw), self.rubric.marks(order), draw])
            for i, pair in enumerate(zip(prompts, responses, strict=True))
            for order, draw in draws
        }

        def ask(call: tuple[int, int, int], stop: threading.Event) -> dict[str, float]:
            i, order, draw = call
            return self._ask(prompts[i], responses[i], order, draw, stop)

        given: list[dict[tuple[int, int], dict[str, float]]] = [{} for _ in prompts]
        for (i, order, draw), rated in answers(calls, ask, self.rubric.in_flight):
            given[i][order, draw] = rated
            if len(given[i]) == len(draws):  # averaged in one order, whichever came first
                yield i, {name: float(np.mean([given[i][which][name] for which in draws])) for name in self.names}

    def _body(self, prompt: str, response: str, order: int, draw: int) -> dict[str, Any]:
        temperature = self.rubric.temperature
        body = {
            "model": self._model,
            "messages": self.rubric.messages(prompt, response, order),
            "temperature": temperature if temperature is not None else float(self.rubric.draws > 1),
            "max_tokens": self.rubric.max_tokens,
            "seed": draw,
            **({"logprobs": True, "top_logprobs": TOP} if self.rubric.logprobs else {}),
            **self.rubric.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _ask(self, prompt: str, response: str, order: int, draw: int, stop: threading.Event) -> dict[str, float]:
        """One draw's number for each value."""
        body = self._body(prompt, response, order, draw)
        for again in range(ASKS):
            if again:
                other = {"temperature": max(body.get("temperature", 0.0), WARM), "seed": draw + again * 1_000_003}
                body |= {name: value for name, value in other.items() if name in body}
            answer = self._answer(body, stop)
            choices = answer.get("choices")
            choice = choices[0] if isinstance(choices, list) and choices else None
            try:
                return ratings.read(choice, self.rubric.marks(order))
            except ratings.Unreadable as reason:
                message = f"judge {self.rubric.name}: its answer to the response {response!r:.60} {reason}"
                if isinstance(choice, dict) and choice.get("finish_reason") == "length":
                    message += "; it was cut off, max_tokens is too small"
        raise UserError(f"{message} (asked {ASKS} times)")

    def _answer(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        if not self._logprobs:
            body = {name: value for name, value in body.items() if "logprobs" not in name}
        try:
            answer = self._http.ask("/chat/completions", body, BYTES, stop)
        except Refused as refused:
            if not (refused.code in (400, 422) and "logprobs" in body and "logprob" in str(refused).lower()):
                raise
            self._logprobs = False  # it gives none: the marks that it writes are what there is
            return self._answer(body, stop)
        usage = answer.get("usage")
        counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        self.spent.add(*(count if isinstance(count, int) and count > 0 else 0 for count in counts))
        return answer


class JudgeReward(CachedReward):
    """One value of a judge, as a reward."""

    reads_messages = True

    def __init__(self, judge: Judge, value: str):
        super().__init__(value)
        self.judge: Judge = judge
        self.value: str = value

    def reach(self) -> None:
        """See `Judge.reach`."""
        self.judge.reach()

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        for i, rated in self.judge.rate(prompts, responses):
            yield [i], np.array([rated[self.value]])
