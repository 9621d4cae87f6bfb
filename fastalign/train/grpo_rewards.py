"""Reward functions of GRPO in all of TRL's forms, beside fastalign's rewards by name: one matrix of scores.

A function is called with `prompts`, `completions` and `completion_ids`, every other column of the data set, and
`trainer_state`, `log_extra` and `log_metric`; it returns one number per completion, or None where it says nothing.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign._base import references
from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.rewards import registry

ROWS_AT_ONCE = 32  # of a classifier
OWN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")  # what the trainer gives functions


class RewardFunction(NamedTuple):
    """A reward by its name, called with the keyword arguments above; it may return a coroutine."""

    name: str
    call: Callable[..., Any]


class RewardFunctions:
    """All rewards of a trainer: `names`, and their scores by call."""

    names: list[str]

    def __init__(self, given: Any, tokenizers: Any, load_options: dict[str, Any], device: torch.device):
        """given: one reward or several: names, folders or hub names of sequence classifiers, such models, functions of
        TRL's signature, fastalign's rewards. tokenizers: of the classifiers; None: their own."""
        given = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        if not given:
            raise UserError("reward_funcs must name at least one reward, got none")
        tokenizers = tokenizers if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(given)
        if len(tokenizers) != len(given):
            raise UserError(
                f"reward_processing_classes must have one entry per reward, {len(given)}, got {len(tokenizers)}"
            )
        self._functions = [
            function
            for reward, tokenizer in zip(given, tokenizers, strict=True)
            for function in _functions(reward, tokenizer, load_options, device)
        ]
        self.names = [function.name for function in self._functions]
        self._thread: ThreadPoolExecutor | None = None  # runs the event loop of asynchronous functions

    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]], **more: Any) -> Tensor:
        """(n, m) float64; NaN where a reward returned None. Raises UserError for results of another form."""
        results = [
            one.call(prompts=prompts, completions=completions, completion_ids=completion_ids, **more)
            for one in self._functions
        ]
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            for i, result in zip(waiting, self._awaited([results[i] for i in waiting]), strict=True):
                results[i] = result
        columns = [_scores(name, result, len(prompts)) for name, result in zip(self.names, results, strict=True)]
        return torch.stack(columns, 1)

    def _awaited(self, coroutines: list) -> list:
        """All at once, in one event loop that outlives the call: clients stay connected."""
        if self._thread is None:
            self._thread, self._loop = ThreadPoolExecutor(1, "rewards"), asyncio.new_event_loop()

        async def together() -> list:
            return await asyncio.gather(*coroutines)

        return self._thread.submit(self._loop.run_until_complete, together()).result()


def check_columns(name: str, columns: Iterable[str]) -> None:
    """Raises UserError for a column under a name of OWN, which the functions could not be given."""
    for column in columns:
        if column in OWN:
            raise UserError(f"{name} must have no column {column}, reward functions get the trainer's own: rename it")


def _functions(reward: Any, tokenizer: Any, load_options: dict[str, Any], device: torch.device) -> list[RewardFunction]:
    """One per value: a reward model of several values has one for each."""
    from fastalign import rewards
    from fastalign.rewards.base import is_reward
    from fastalign.rewards.references import load

    if isinstance(reward, str):
        if _is_reference(reward):
            return [_of_reward(one) for one in load([reward])]
        folder = Path(reward).expanduser()
        if not folder.is_dir() and reward.count("/") != 1:
            rewards.get(reward)  # raises, and lists the known names
        if (heads := _heads(reward, folder)) is not None:
            named = len(heads) > 1
            return [RewardFunction(head.name if named else folder.name, _of_reward(head).call) for head in heads]
        reward, name = _load(reward, load_options), folder.name
        return [RewardFunction(name, _Classifier(reward, tokenizer, device))]
    if isinstance(reward, torch.nn.Module):
        name = str(getattr(reward.config, "_name_or_path", "") or type(reward).__name__).rstrip("/").rpartition("/")[2]
        return [RewardFunction(name, _Classifier(reward, tokenizer, device))]
    if not callable(reward):
        raise UserError(f"reward_funcs must be names, models or functions, got {type(reward).__name__}")
    if is_reward(reward) and not _takes(reward, "completions"):
        return [_of_reward(reward)]
    return [RewardFunction(_name_of(reward), reward)]


def _is_reference(text: str) -> bool:
    """Whether it names one of fastalign's rewards; a folder or a hub name is a classifier's, as TRL has it."""
    one = references.read(text)
    return one.kind != "name" or one.alias is not None or registry.known(one.place)


def _takes(function: Any, argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _of_reward(reward: Any) -> RewardFunction:
    from fastalign import rewards

    def call(prompts: list, completions: list, **more: Any) -> Any:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return rewards.score([reward], prompts, texts)[:, 0]

    return RewardFunction(reward.name, call)


def _heads(name: str, folder: Path) -> list[Any] | None:
    """The values of a reward model that `train.RewardTrainer` saved; None for any other."""
    from transformers import PretrainedConfig

    from fastalign import rewards
    from fastalign.rewards.classifier import NOTE

    if not (folder / "config.json").is_file() or NOTE not in PretrainedConfig.get_config_dict(str(folder))[0]:
        return None
    return list(rewards.from_heads(name))


def _load(name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForSequenceClassification

    from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
    from fastalign.models.loading import resolve

    folder = resolve(name)
    with quiet_unless_terminal(), one_line_errors(name):
        options = {"num_labels": 1, "use_kernels": False, **options}
        return AutoModelForSequenceClassification.from_pretrained(folder, **options)


class _Classifier:
    """The first output of a sequence classifier for prompt and completion, as TRL reads it."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device):
        if tokenizer is None:
            from transformers import AutoTokenizer

            from fastalign._base.quiet import one_line_errors

            name = model.config._name_or_path
            with one_line_errors(name or "reward_processing_classes"):
                tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The score is read at the last token that is not this one.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer = model.to(device).eval(), tokenizer

    def __call__(self, prompts: list, completions: list, **more: Any) -> list[float]:
        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), ROWS_AT_ONCE):
            inputs = self.tokenizer(
                text=texts[start : start + ROWS_AT_ONCE],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(self.model.device)
            with torch.inference_mode():
                scores += self.model(**inputs).logits[:, 0].double().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)


def _scores(name: str, result: Any, count: int) -> Tensor:
    """A function's result as (count,) float64."""
    if isinstance(result, Tensor):
        result = result.tolist()
    try:
        result = list(result)
    except TypeError:
        rule = f"reward function {name!r} must return one number per completion"
        raise UserError(f"{rule}, {count}, got {type(result).__name__}") from None
    if len(result) != count:
        rule = f"reward function {name!r} must return one number per completion, {count}"
        raise UserError(f"{rule}, got {counted(len(result), 'number')}")
    for i, score in enumerate(result):
        try:
            finite = score is None or math.isfinite(float(score))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            rule = (
                f"reward function {name!r} must return finite numbers, or None for completions that it does not score"
            )
            raise UserError(f"{rule}, got {score!r} for completion {i}")
    return torch.tensor([math.nan if score is None else float(score) for score in result], dtype=torch.float64)
