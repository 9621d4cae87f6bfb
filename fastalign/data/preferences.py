"""Preference pairs (prompt, chosen, rejected): read from files and hubs, made from scored candidates, or bundled.

A pair is an object with "prompt", "chosen" and "rejected", all strings or all lists of messages
({"role": ..., "content": ...}), and any other columns of its source ("margin", "value", ...).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastalign._base import outputs, tables
from fastalign._base.errors import UserError
from fastalign._base.numbers import number
from fastalign._base.units import counted
from fastalign.data import published
from fastalign.data import rows as sources
from fastalign.data.conversations import check_messages, text_of
from fastalign.data.dialogues import with_prompt
from fastalign.data.hub import HH_RLHF, hub_name
from fastalign.data.published import Form, NoPair

COLUMNS = ("prompt", "chosen", "rejected")
# Columns of numbers, and the rules of `numbers.number`.
NUMBERS = {"margin": {"missing": 0.0}, "weight": {"least": 0.0}}


@dataclass
class PreferencePairs:
    """Pairs, the number of dropped rows by reason, and how they were made (JSON values)."""

    rows: list[dict[str, Any]]
    dropped: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    @property
    def lost(self) -> str:
        """A description of the dropped rows; "" if there are none."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items() if count)

    def to_dataset(self, *, chat: bool = False) -> Any:
        """A `datasets.Dataset`. chat: plain-text prompts and completions become messages from a user and an
        assistant."""
        from datasets import Dataset

        return Dataset.from_list([as_chat(row) for row in self._even()] if chat else self._even())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the pairs atomically; `load` reads them back."""
        import pyarrow as pa

        note = {**self.settings, "kind": "pairs", "dropped": self.dropped}
        tables.write(path, pa.Table.from_pylist(self._even()), note)

    def _even(self) -> list[dict[str, Any]]:
        """The rows, each with all columns that occur in any of them."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        return [{column: row.get(column) for column in columns} for row in self.rows]

    def split(self, fraction: float, *, seed: int) -> tuple[PreferencePairs, PreferencePairs]:
        """(training, held-out) pairs: a fraction of the prompts, drawn with `seed`, is held out with all their
        pairs."""
        if not 0 < fraction < 1:
            raise UserError(f"fraction must lie between 0 and 1, got {fraction}")
        keys = [json.dumps(row["prompt"], sort_keys=True) for row in self.rows]
        distinct = sorted(set(keys))
        if len(distinct) < 2:
            raise UserError("pairs must have at least 2 different prompts to hold some out, got 1")
        count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
        chosen_prompts = set(random.Random(seed).sample(distinct, count))
        parts = (
            [row for row, key in zip(self.rows, keys, strict=True) if (key in chosen_prompts) == out]
            for out in (False, True)
        )
        train, test = (PreferencePairs(part, settings=self.settings) for part in parts)
        return train, test


def load(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    on_bad: str | None = None,
    values: Sequence[str] | None = None,
) -> PreferencePairs:
    """Pairs from "bundled", a .jsonl, .json, .csv, .parquet, .arrow or .feather file, or a data set's hub name.

    Rows have columns prompt, chosen and rejected. Completions of messages may begin with a text prompt
    (HuggingFaceH4/ultrafeedback_binarized). Without a prompt column both completions are whole conversations with a
    common beginning: lists of messages, or the text of hh-rlhf ("\\n\\nHuman: ... \\n\\nAssistant: ..."; hub names
    "hh-rlhf" and "Anthropic/hh-rlhf").
    PKU-SafeRLHF, UltraFeedback, HelpSteer, SHP and Nectar are read as they are published (`data.published`), with a
    column "value" where they have several; values: which of them, default all.
    on_bad: "raise" a UserError for the first invalid row, or "drop" such rows, with a warning that counts them; None:
        drop for a hub data set, which the user cannot fix, raise for a file.
    Raises FileNotFoundError or UserError: one line with the row's number (from 0) and what is wrong with it.
    """
    name = os.fspath(name_or_path)
    if on_bad not in (None, "raise", "drop"):
        raise UserError(f"on_bad must be 'raise', 'drop' or None, got {on_bad!r}")
    if name == "bundled":
        return bundled()
    full = hub_name(name)
    source = sources.stream(full, split=split, what="pairs")
    raw, sample = cast(Iterable[Mapping[str, Any]], source), source.first()
    drop = on_bad == "drop" or (on_bad is None and not Path(name).expanduser().is_file())
    dropped, form = Counter[str](), published.form_of(sample)
    if form is not None and {"chosen", "rejected"} <= sample.keys():
        form = None
    wrong, tie, i = list[str](), "", -1
    if form is not None:
        raw, dropped, wrong = _published(name, form, source, values)
        if wrong and not drop:
            raise UserError(f"{name}: {wrong[0]}")
    elif missing := [column for column in ("chosen", "rejected") if column not in sample]:
        have = ", ".join(map(str, sample)) or "none"
        raise UserError(f"{name}: must have columns prompt, chosen and rejected, lacks {missing[0]!r}, got {have}")
    pairs, rows = list[dict[str, Any]](), len(wrong)
    for i, row in enumerate(raw):
        if row.get("chosen") is not None and row["chosen"] == row.get("rejected"):  # hh-rlhf has some
            dropped[published.TIES] += 1
            tie = tie or f"row {i}: chosen and rejected must differ, got the same text twice"
            continue
        try:
            given = {k: v for k, v in row.items() if k != "prompt"} if name in HH_RLHF else row
            pair = check(with_prompt(given))
            if pairs and type(pair["prompt"]) is not type(pairs[0]["prompt"]):
                raise UserError("rows must all be text or all be messages, this one differs from those before it")
            pairs.append(pair)
        except UserError as error:
            if not drop:
                raise UserError(f"{name}: row {i}: {error}") from None
            wrong.append(f"row {i}: {error}")
    if not pairs:
        raise UserError(f"{name}: no row is a preference pair ({[*wrong, tie][0]})")
    if wrong:
        warnings.warn(f"{name}: {len(wrong)} of {rows + i + 1} rows dropped, the first {wrong[0]}", stacklevel=2)
    if (count := _repeats(pairs)) > 0:
        outputs.say(f"{name}: {count:,} of {len(pairs):,} pairs are there more than once; they are kept")
    if ties := dropped[published.TIES]:
        outputs.say(f"{name}: {counted(ties, 'tie')} left out")
    if lone := dropped[published.LONE]:
        outputs.say(f"{name}: {counted(lone, 'prompt')} left out, of one response each, which makes no pair")
    if unrated := dropped[published.UNRATED]:
        outputs.say(f"{name}: {counted(unrated, 'comparison')} left out, of fewer than two ratings")
    dropped["rows that are not pairs"] = len(wrong)
    settings = _settings(Path(name).expanduser())
    if form is not None:
        settings["published"] = {"name": form.name, "values": list(form.values)}
    return PreferencePairs(pairs, {reason: count for reason, count in dropped.items() if count}, settings)


def _repeats(pairs: Sequence[Mapping[str, Any]]) -> int:
    """How many pairs are there already, with the same texts and value."""
    texts = (json.dumps([pair.get(name) for name in (*COLUMNS, "value")], sort_keys=True) for pair in pairs)
    return len(pairs) - len({hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts})


def _published(
    name: str, form: Form, rows: Iterable[Mapping[str, Any]], values: Sequence[str] | None
) -> tuple[list[dict[str, Any]], Counter[str], list[str]]:
    """The pairs of a published form's rows, of these values; what gave none, by reason; what is wrong with invalid
    rows."""
    for value in values or ():
        if value not in form.values:
            raise UserError(f"{name}: the values of {form.name} are {', '.join(form.values)}, it has no {value}")
    try:
        made = list(form.pairs(rows))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: has the columns of {form.name}, but not its form ({error})") from None
    pairs = [pair for pair in made if isinstance(pair, dict) and (values is None or pair["value"] in values)]
    dropped = Counter(
        one.reason for one in made if isinstance(one, NoPair) and (values is None or one.value in (None, *values))
    )
    if len(form.values) == 1:
        pairs = [{column: x for column, x in pair.items() if column != "value"} for pair in pairs]
    wrong = [f"row {one.row}: {one.message}" for one in made if isinstance(one, published.Bad)]
    if not pairs and not wrong:
        raise UserError(f"{name}: no row of it prefers one response to another")
    return pairs, dropped, wrong


def check(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, if its prompt, chosen and rejected form a pair; else UserError with the rule and the value received."""
    for column in COLUMNS:
        if column not in row:
            raise UserError(f"must have a {column!r}, got {', '.join(map(str, row)) or 'none'}")
    kinds = {column: _kind(column, row[column]) for column in COLUMNS}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{column} {kind}" for column, kind in kinds.items())
        raise UserError(f"prompt, chosen and rejected must be of one kind, got {listed}")
    if row["chosen"] == row["rejected"]:
        raise UserError("chosen and rejected must differ, got the same text twice")
    row = dict(row)
    for name, rules in NUMBERS.items():
        if name in row:
            row[name] = number(name, row[name], **rules)
    return row


def check_lengths(pairs: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int, source: str = "pairs") -> None:
    """Raise UserError for the first pair whose prompt alone, tokenized, fills `max_length` tokens."""
    if max_length < 2:
        raise UserError(f"max_length must be at least 2, one token of prompt and one of completion, got {max_length}")
    known: dict[str, int] = {}
    for i, row in enumerate(pairs):
        prompt = row["prompt"]
        key = prompt if isinstance(prompt, str) else json.dumps(prompt)
        if key not in known:
            known[key] = len(_prompt_ids(prompt, tokenizer))
        if known[key] >= max_length:
            rule = f"a prompt must be shorter than max_length, {max_length} tokens"
            raise UserError(f"{source}: row {i}: {rule}, got {known[key]} tokens")


def as_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair of plain texts as messages: the prompt from the user, both completions from the assistant."""
    if not isinstance(row["prompt"], str):
        return dict(row)
    message = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {**row, **{column: [{"role": role, "content": row[column]}] for column, role in message.items()}}


def bundled(n: int = 512, *, rule: str = "positive", seed: int = 0) -> PreferencePairs:
    """n pairs of the bundled prompts with generated replies, of which a known rule says which is better.

    rule: a reward by name ("positive" is VADER's sentiment), or "length", the longer reply. Replies are two or three
    plain sentences of opinion. The same n, rule and seed give the same pairs; no pair is a tie.
    """
    from fastalign import rewards
    from fastalign.data import prompts

    if not (isinstance(n, int) and n >= 1):
        raise UserError(f"n must be an integer, at least 1, got {n!r}")
    rng = random.Random(seed)
    questions = prompts.bundled()
    pairs: list[dict[str, Any]] = []
    while len(pairs) < n:
        count = 2 * (n - len(pairs)) + 8
        batch = [questions[(len(pairs) + i) % len(questions)] for i in range(count)]
        first, second = [_reply(rng) for _ in batch], [_reply(rng) for _ in batch]
        if rule == "length":
            scores = np.array([[len(text) for text in side] for side in (first, second)], dtype=np.float64)
        else:
            scores = np.stack([rewards.score(rule, batch, side)[:, 0] for side in (first, second)])
        if (scores[0] == scores[1]).all():
            raise UserError(f"rule must tell replies apart, {rule!r} scores all alike")
        for i, prompt in enumerate(batch):
            if scores[0, i] != scores[1, i]:
                better, worse = (first, second) if scores[0, i] > scores[1, i] else (second, first)
                pairs.append({"prompt": prompt, "chosen": better[i], "rejected": worse[i]})
    return PreferencePairs(pairs[:n], settings={"bundled": {"rule": rule, "seed": seed}})


_THINGS = (
    "the food,the room,the story,my visit,the staff,the price,the music,the view,the plan,the answer,this idea,"
    "the weather"
).split(",")


_GOOD = "good,great,lovely,excellent,wonderful,pleasant,kind,happy,beautiful,perfect,fun,helpful".split(",")


_BAD = "bad,awful,terrible,horrible,sad,ugly,rude,boring,painful,poor,nasty,dirty".split(",")


_PLAIN = "small,red,long,early,round,new,wooden,quiet,local,usual,short,wide".split(",")


def _reply(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randint(2, 3)):
        thing, word = rng.choice(_THINGS), rng.choice(rng.choice((_GOOD, _BAD, _PLAIN)))
        form = rng.choice(("{} was {}", "I found {} {}", "everyone said {} was {}", "in the end {} was {}"))
        sentence = form.format(thing, word)
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)


def _kind(column: str, value: Any) -> str:
    """ "text" or "messages"; UserError for anything else, and for blank text."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{column} must not be empty, got {value!r}")
        return "text"
    if not isinstance(value, list):
        raise UserError(
            f"{column} must be a string or a list of messages, got "
            f"{'nothing' if value is None else type(value).__name__}"
        )
    if not value:
        raise UserError(f"{column} must not be empty, got no messages")
    for j, message in enumerate(value):
        try:
            (message,) = check_messages([message])
        except UserError:
            raise UserError(f"{column}[{j}] must be a message with role and content, got {message!r}") from None
        if column == "prompt":
            continue
        if not text_of(message.get("content")).strip() and not message.get("tool_calls"):
            raise UserError(f"{column} must not be empty, got {message.get('content')!r} in message {j}")
    return "messages"


def _prompt_ids(prompt: str | list[dict[str, str]], tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise UserError("messages need a tokenizer with a chat template, and this one has none")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def _settings(path: Path) -> dict[str, Any]:
    """The settings noted in a file of pairs that fastalign wrote."""
    settings = tables.note(path) if path.is_file() else {}
    return {key: value for key, value in settings.items() if key not in ("kind", "dropped")}
