"""Perspective's attributes of a text, by its API: the presets "perspective/toxicity" and so on. Lower is better there,
so scores are negative. The service was announced to end in 2026.

One call asks for all attributes of a text, and its answer is kept on disk (`rewards.kept`): several attributes, and a
command that was interrupted, cost no call twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.http import Http, check_at_least_1, checked_key, checked_url
from fastalign.rewards.base import CachedReward
from fastalign.rewards.kept import answers, key_of
from fastalign.rewards.presets import PERSPECTIVE

KEY = "PERSPECTIVE_API_KEY"
URL = "https://commentanalyzer.googleapis.com"
_PATH = "/v1alpha1/comments:analyze"
_LONGEST = 20_480  # bytes of a text, which the service refuses beyond
_ANSWER = 1 << 20  # bytes of an answer, at most
_PROBE = "Good morning!"


class Perspective(CachedReward):
    """The negative probability of an attribute, in [-1, 0]; 0 for a blank response. The key is $PERSPECTIVE_API_KEY.

    name: of the reward. attribute: one of `presets.PERSPECTIVE`. per_minute: calls, at most; a key has 60 unless more
    were granted. language: of the texts; None: the service finds it. url: another address. timeout, tries: see
    `_base.http.Http`. The end of a longer response than 20,480 bytes is not read.
    Raises UserError, one line, without a key, and for what the service refuses.
    """

    uses_prompt = False

    def __init__(
        self,
        name: str,
        attribute: str,
        *,
        per_minute: float = 60.0,
        in_flight: int = 4,
        language: str | None = "en",
        url: str = URL,
        timeout: float = 60.0,
        tries: int = 6,
        cache_size: int = 65536,
    ):
        super().__init__(name, cache_size=cache_size)
        check_at_least_1(per_minute=per_minute, in_flight=in_flight, timeout=timeout, tries=tries)
        if (key := checked_key(os.environ.get(KEY, ""))) is None:
            raise UserError(f"reward {name!r} asks Perspective's API, which needs a key: set ${KEY}")
        self.attribute: str = attribute
        self.language: str | None = language
        self.in_flight: int = int(in_flight)
        self._http = Http(
            checked_url(url), key, header="X-Goog-Api-Key", timeout=timeout, tries=tries, per_minute=per_minute
        )

    def reach(self) -> None:
        """Ask about a fixed text. Raises UserError, one line, if there is no answer."""
        list(self._score([""], [_PROBE]))

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        if blank := [i for i, text in enumerate(responses) if not text.strip()]:
            yield blank, np.zeros(len(blank))
        bodies = {i: self._body(text) for i, text in enumerate(responses) if text.strip()}
        calls = {i: key_of([self._http.base, body]) for i, body in bodies.items()}

        def ask(i: int, stop: threading.Event) -> dict[str, float]:
            return self._read(self._http.ask(_PATH, bodies[i], _ANSWER, stop))

        for i, found in answers(calls, ask, self.in_flight):
            yield [i], np.array([-found[self.attribute]])

    def _body(self, text: str) -> dict[str, Any]:
        cut = text.encode()[:_LONGEST].decode(errors="ignore")
        return {
            "comment": {"text": cut},
            "requestedAttributes": {name: {} for name in PERSPECTIVE},
            "doNotStore": True,
            **({"languages": [self.language]} if self.language else {}),
        }

    def _read(self, answer: dict[str, Any]) -> dict[str, float]:
        """Each attribute's probability."""
        found = {}
        for name in PERSPECTIVE:
            try:
                x = answer["attributeScores"][name]["summaryScore"]["value"]
            except (KeyError, TypeError):
                x = None
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x <= 1:
                raise UserError(f"{self._http.base}: its answer must hold a probability of {name}, got {x!r:.40}")
            found[name] = float(x)
        return found
