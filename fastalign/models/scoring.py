"""Per-token scores of padded batches under a causal model: with the fused head if that is correct, else from full
logits, else row by row, which is always correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.models.compiled_layers import CompiledLayers
from fastalign.models.head import head_of
from fastalign.models.identity import Verdict, language_model, passable
from fastalign.models.spans import same_law
from fastalign.models.trial import Probe, name_of, tried, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastalign.ops.token_logprobs import LogProbs, More, TokenLogprobs


class Scores(NamedTuple):
    """The requested outputs at each of the n labelled positions, in the batch's order."""

    outputs: dict[str, Tensor]  # name -> (n,)
    hidden: Tensor | None  # (n, H), if requested


class Layout(NamedTuple):
    """A batch as the model runs it, and its scored positions."""

    input_ids: Tensor  # (R, T), padded on the right
    lengths: list[int]  # of the rows, up to the last scored position
    row: Tensor  # (n,)
    column: Tensor  # (n,): the hidden state there gives the label's probability


def fused_head(model: Any) -> Verdict:
    """Whether the head on the base model's hidden states gives the model's logits, in a padded batch too."""
    wrapped = passable(model)
    if not wrapped:
        return wrapped
    try:
        head_of(language_model(model))  # active on the head now: dropout, or another adapter
    except UserError as refusal:
        return Verdict(False, str(refusal), math.nan)
    return tried(model, "fused head", _fused_head)


def score(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    outputs: tuple[str, ...] = ("log_probs",),
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    return_hidden: bool = False,
) -> Scores:
    """Scores of `labels` under a causal model (PEFT-wrapped or not), with its current dropout and gradient settings.

    input_ids, attention_mask: (R, T), padded anywhere; no mask: on the right. labels: (R, T - 1): position t
    scores labels[:, t] as the token after t; -100: not scored. outputs, temperature: of `ops.linear_token_logprobs`.
    """
    from fastalign.ops import TokenLogprobs, linear_token_logprobs, token_logprobs

    at = labels != -100
    layout, targets = _layout(input_ids, at, attention_mask), labels[at]
    run, fused = _way(model, layout.lengths)
    logits_or_hidden, hidden = run(model, layout, return_hidden)
    if fused:
        head = head_of(language_model(model)).arguments()
        scored = linear_token_logprobs(
            logits_or_hidden, labels=targets, **head, temperature=temperature, outputs=outputs
        )
    else:
        scored = token_logprobs(logits_or_hidden, targets, temperature=temperature, outputs=outputs)
    scored = scored._asdict() if isinstance(scored, TokenLogprobs) else {"log_probs": scored}
    return Scores({name: scored[name] for name in outputs}, hidden)


def describe(model: Any) -> str:
    """How the model is scored: for `fastalign info`."""
    run, _ = _way(model, [1], quiet=True)
    names: dict[Run, str] = {_hidden: "fused head", _logits: "full logits", _alone: "full logits, row by row"}
    return names[run]


# Runs a layout: -> (hidden states or logits (n, ...) of the scored positions, hidden states (n, H) if requested)
Run = Callable[[Any, Layout, bool], tuple[Tensor, Tensor | None]]


def _way(model: Any, lengths: list[int], *, quiet: bool = False) -> tuple[Run, bool]:
    """The correct path for rows of these lengths, and whether it gives hidden states."""
    head = fused_head(model)
    together = same_law(language_model(model).config.get_text_config(decoder=True), lengths)
    if head.ok and together:
        return _hidden, True
    padded = head if head.ok else tried(model, "padded logits", _path(_logits))
    run = _logits if padded.ok and together else _alone
    if not quiet and not head.ok:
        how = "full logits" if run is _logits else "full logits, row by row"
        warn_once(model, f"{name_of(model)} is scored from its {how}, not on the fused head: {head.why}")
    return run, False


def _hidden(model: Any, layout: Layout, return_hidden: bool) -> tuple[Tensor, Tensor]:
    inner = language_model(model)
    with CompiledLayers.of(inner):
        hidden = inner.base_model(input_ids=layout.input_ids, use_cache=False).last_hidden_state
    hidden = hidden[layout.row, layout.column]
    return hidden, hidden


def _logits(model: Any, layout: Layout, return_hidden: bool) -> tuple[Tensor, Tensor | None]:
    more = {"output_hidden_states": True} if return_hidden else {}
    output = model(input_ids=layout.input_ids, use_cache=False, **more)
    width = layout.input_ids.shape[1]
    last = output.hidden_states[-1][:, -width:][layout.row, layout.column] if return_hidden else None
    return output.logits[:, -width:][layout.row, layout.column], last


def _alone(model: Any, layout: Layout, return_hidden: bool) -> tuple[Tensor, Tensor | None]:
    if not len(layout.row):  # nothing is scored
        return _logits(model, layout, return_hidden)
    rows, hidden = [], []
    for r, length in enumerate(layout.lengths):
        mine = layout.row == r
        if not mine.any():
            continue
        one = Layout(layout.input_ids[r : r + 1, :length], [length], layout.row[mine] * 0, layout.column[mine])
        logits, last = _logits(model, one, return_hidden)
        rows.append(logits)
        if last is not None:
            hidden.append(last)
    return torch.cat(rows), torch.cat(hidden) if return_hidden else None


def _layout(input_ids: Tensor, at: Tensor, attention_mask: Tensor | None) -> Layout:
    row, column = at.nonzero(as_tuple=True)
    lengths = (at * torch.arange(2, at.shape[1] + 2, device=at.device)).amax(1)  # includes the last label's token
    if attention_mask is not None:
        keep = attention_mask.bool()
        input_ids = input_ids.gather(1, (~keep).long().argsort(dim=1, stable=True))
        place = keep.cumsum(1) - 1
        column, lengths = place[row, column], keep.sum(1)
    return Layout(input_ids, lengths.tolist(), row, column)


def _path(run: Run, logits: Callable[[Any, Tensor], Tensor] = lambda model, x: x):
    """The path in a trial: the probe's rows as one padded batch."""

    def path(model: Any, probe: Probe) -> list[Tensor]:
        rows, device = [prompt + tail for prompt, tail in probe.rows], language_model(model).device
        width = max(map(len, rows))
        ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows], device=device)
        at = torch.zeros(len(rows), width - 1, dtype=torch.bool, device=device)
        for r, (prompt, tail) in enumerate(probe.rows):
            at[r, len(prompt) - 1 : len(prompt) + len(tail) - 1] = True
        states, _ = run(model, _layout(ids, at, None), False)
        return list(logits(model, states).split([len(tail) for _, tail in probe.rows]))

    return path


def _fused_head(model: Any, probe: Probe) -> list[Tensor]:
    return _path(_hidden, lambda model, x: head_of(language_model(model)).logits(x))(model, probe)


@overload
def fused_forward(
    model: PreTrainedModel,
    labels: Tensor,
    *,
    shift_labels: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: LogProbs = ("log_probs",),
    **inputs: Any,
) -> Tensor | TokenLogprobs: ...
@overload
def fused_forward(
    model: PreTrainedModel,
    labels: Tensor,
    *,
    shift_labels: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: More,
    **inputs: Any,
) -> Tensor | TokenLogprobs: ...
@overload
def fused_forward(
    model: PreTrainedModel,
    labels: Tensor,
    *,
    shift_labels: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...],
    **inputs: Any,
) -> Tensor | TokenLogprobs: ...
def fused_forward(
    model: PreTrainedModel,
    labels: Tensor,
    *,
    shift_labels: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
    **inputs: Any,
) -> Tensor | TokenLogprobs:
    """Per-token log-probabilities of `labels` under a causal model, without holding its (batch, time, vocab) logits.

    Equals `ops.token_logprobs(model(**inputs).logits[:, :-1], labels[:, 1:])`; positions whose label is ignored are
    not projected.

    Args:
        model: any transformers causal model, PEFT-wrapped or not, tied head or not. Its transform from hidden states to
            logits is tested at first use; if the fused head does not support it, the full logits are computed.
        labels: (batch, time) int64, usually the input ids with the prompt and the padding set to `ignore_index`.
        shift_labels: position t predicts labels[:, t + 1] and the result is (batch, time - 1); False: labels[:, t].
        temperature, ignore_index, outputs: as in `ops.linear_token_logprobs`.
        inputs: arguments of the model's forward: input_ids, attention_mask, position_ids ...

    Returns:
        The result of `ops.linear_token_logprobs`.
    """
    from fastalign.ops import linear_token_logprobs, token_logprobs

    inputs = {**inputs, "use_cache": False, "return_dict": True}
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index, "outputs": outputs}
    verdict = fused_head(model)
    if not verdict.ok:
        warn_once(model, f"{name_of(model)} is scored from its full logits, not on the fused head: {verdict.why}")
        logits = model(**inputs).logits[:, -labels.shape[1] :]  # after virtual tokens
        if shift_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return token_logprobs(logits, labels, **options)
    inner = language_model(model)
    hidden = inner.base_model(**inputs).last_hidden_state
    if shift_labels:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    return linear_token_logprobs(hidden, labels=labels, **head_of(inner).arguments(), **options)
