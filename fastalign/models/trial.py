"""Whether a model may use a path is tested, not read from its name: the path's logits are compared with plain
`model(input_ids)`.

A path is another way to compute the same numbers: the shared-prompt engine, packed rows, the fused head, a cache. At
its first use it runs a few random tokens (two prompts of different lengths with two continuations each, past the
attention window). It is used only if it gives the model's own next-token log-probabilities up to the dtype's rounding.

Verdicts are cached by class and configuration. Freshly initialised weights could hide errors, because their attention
is flat. So a verdict is kept only if hiding a token, swapping two and flattening attention change the logits by far
more than the tolerance; else the path is tested again, at its second use, its third, its fifth, its ninth ...
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.models.identity import Verdict, identity, is_plain, language_model
from fastalign.models.spans import chunk_length, narrowed, rope_change, rope_is_dynamic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR = 64  # tokens: the trial passes any length below this at which the configuration changes something
TELLING = 300  # a changed input must move the logits by this many tolerances for the trial to detect errors


class Probe(NamedTuple):
    """Two prompts, each with two continuations: token ids."""

    prompts: list[list[int]]
    tails: list[list[list[int]]]

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, continuation) of the four."""
        return [(prompt, tail) for prompt, tails in zip(self.prompts, self.tails, strict=True) for tail in tails]


# What a path must give: for each of `probe.rows` the logits (len(tail), V) from which its tokens would be drawn.
Path = Callable[[Any, Probe], Sequence[Tensor]]


@dataclass
class _Truth:
    """A model's own logits for the probe."""

    probe: Probe
    log_probs: list[Tensor]  # float64, (len(tail), V) of each row
    tolerance: float
    causal: float  # how far a token's logits depend on later tokens, in tolerances
    telling: bool


_kept: dict[tuple, Verdict] = {}
# Verdicts, and their numbers of uses.
_flat: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[Verdict | None, int]]] = weakref.WeakKeyDictionary()
_truths: ContextVar[dict[tuple[int, frozenset[str], int], _Truth] | None] = ContextVar("truths", default=None)
_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


@contextmanager
def one_truth() -> Iterator[None]:
    """Within the block, the trials of a model share its plain logits: its weights must not change there."""
    kept = _truths.get()
    token = _truths.set({} if kept is None else kept)
    try:
        yield
    finally:
        _truths.reset(token)


def tried(model: Any, name: str, path: Path, *, attends: bool = False) -> Verdict:
    """Whether `path` gives the model's own logits. Runs the model a dozen times on a dozen tokens, once per class and
    configuration.
    attends: the path computes attention itself, so its handling of the tokens that an indexer omits is tested too.

    Raises UserError if the model itself cannot run on token ids alone.
    """
    key = (name, *identity(model))
    if key in _kept:
        return _kept[key]
    untold = _flat.setdefault(model, {})
    verdict, uses = untold.get(key, (None, 0))
    untold[key] = verdict, uses + 1
    if verdict is None or not uses & (uses - 1):  # at its first, second, third, fifth, ninth ... use
        with _at_rest(model), narrowed(language_model(model), picks=attends) as narrow:
            truth = _known_truth(model, narrow)
            verdict = _compare(path, model, truth)
            if math.isfinite(verdict.error) and not verdict.ok:
                # The largest of so many roundings is now and then beyond the tolerance, mostly in half precision. A
                # fault is so with other tokens too.
                verdict = _compare(path, model, _known_truth(model, narrow, seed=1))
        untold[key] = verdict, uses + 1
        if truth.telling and is_plain(model):
            _kept[key] = verdict
    return verdict


def is_causal(model: Any) -> Verdict:
    """Whether a token's logits do not depend on later tokens, as token-by-token sampling assumes."""
    key = ("causal", *identity(model))
    if key in _kept:
        return _kept[key]
    with _at_rest(model), narrowed(language_model(model)) as narrow:
        truth = _known_truth(model, narrow)
    ok = truth.causal <= 1
    verdict = Verdict(ok, "" if ok else "the logits of a token change with the tokens that follow it")
    if (truth.telling or not ok) and is_plain(model):
        _kept[key] = verdict
    return verdict


def warn_once(model: Any, message: str) -> None:
    """Warn about a path that is not used: one line, once per model."""
    said = _warned.setdefault(model, set())
    if message not in said:
        said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def name_of(model: Any) -> str:
    inner = language_model(model)
    return type(inner).__name__


@contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    """Without gradients or dropout; restores every module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference mode: sharding libraries keep the tensors that they gather.
        with torch.no_grad(), torch.autocast(language_model(model).device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _known_truth(model: Any, narrow: frozenset[str], seed: int = 0) -> _Truth:
    kept, key = _truths.get(), (id(model), narrow, seed)
    if kept is None:
        return _truth(model, seed)
    if key not in kept:
        kept[key] = _truth(model, seed)
    return kept[key]


def _truth(model: Any, seed: int) -> _Truth:
    probe = _probe(language_model(model).config, seed)
    rows = probe.rows
    try:
        logits = [_plain(model, prompt + tail) for prompt, tail in rows]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name_of(model)} cannot be run on token ids alone: {first_line(error)}") from None
    tails = [x[len(prompt) - 1 : -1] for x, (prompt, _) in zip(logits, rows, strict=True)]
    log_probs = [_log_softmax(x) for x in tails]
    prompt, tail = rows[0]
    again = distance(_log_softmax(_plain(model, prompt + tail)), _log_softmax(logits[0]))
    if again > 0.1:
        raise UserError(
            f"{name_of(model)} cannot be used: its log-probabilities of one text differ from run to run, by {again:.2g}"
        )
    # The rounding between running the same tokens alone and with later ones.
    noise = distance(_log_softmax(_plain(model, prompt)), _log_softmax(logits[0][: len(prompt)]))
    # The size of a logit that excludes its token (-1e9) says nothing about the others' rounding.
    scale = max(
        [1.0, *(float(x[p > -30].abs().max()) for x, p in zip(tails, log_probs, strict=True) if (p > -30).any())]
    )
    eps = torch.finfo(language_model(model).dtype).eps
    eps = max(eps, torch.finfo(torch.float32).eps)  # a float64 model's norms, RoPEs and softmaxes run in float32
    allowed = (256 if eps < 1e-4 else 4) * eps * scale
    tolerance = max(allowed, 4 * noise) if noise <= 8 * allowed else allowed
    causal = noise / (8 * allowed)
    whole = not any(p.isnan().any() for p in log_probs)  # NaN weights allow no verdict
    telling = whole and _tells(model, rows[-1], log_probs[-1], TELLING * tolerance)
    return _Truth(probe, log_probs, tolerance, causal if whole else 0.0, telling)


def _tells(model: Any, row: tuple[list[int], list[int]], log_probs: Tensor, least: float) -> bool:
    """Whether these inputs would reveal an error: hiding a token, swapping two, and flat attention must all change the
    logits."""
    prompt, tail = row
    swapped = list(prompt)
    swapped[1], swapped[-2] = swapped[-2], swapped[1]
    other = list(prompt)
    other[1] = prompt[0]
    runs = [lambda: _plain(model, other + tail), lambda: _plain(model, swapped + tail)]
    inner = language_model(model)
    if inner._can_set_attn_implementation():
        runs.append(lambda: _flattened(model, prompt + tail))
    for run in runs:
        try:
            moved = distance(_log_softmax(run()[len(prompt) - 1 : -1]), log_probs)
        except Exception:
            continue  # a model without such attention
        if moved < least:
            return False
    return True


def _flattened(model: Any, ids: list[int]) -> Tensor:
    """The logits if every visible token has the same attention weight."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    calls = []

    def flat(module, query, *args, **kwargs):
        calls.append(module)
        return sdpa_attention_forward(module, torch.zeros_like(query), *args, **kwargs)

    AttentionInterface.register("fastalign_flat", flat)
    AttentionMaskInterface.register("fastalign_flat", sdpa_mask)
    with attention_set(language_model(model), "fastalign_flat"):
        result = _plain(model, ids)
    if not calls:
        raise UserError("it does not use transformers' attention interface")
    return result


@contextmanager
def attention_set(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Within the block, the model's attention is computed by a registered function."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _plain(model: Any, ids: Sequence[int]) -> Tensor:
    """(T, V): the model's own logits of one row."""
    row = torch.tensor([list(ids)], device=language_model(model).device)
    logits = model(input_ids=row, use_cache=False).logits[0]
    return logits[-len(ids) :]  # after the virtual tokens of prompt learning


def _compare(path: Path, model: Any, truth: _Truth) -> Verdict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = path(model, truth.probe)
    except Exception as error:  # any error of an unknown model: the path is not used
        return Verdict(False, first_line(error), math.nan)
    error = max(distance(_log_softmax(a), b) for a, b in zip(result, truth.log_probs, strict=True))
    if error <= truth.tolerance:
        return Verdict(True, "", error)
    return Verdict(False, f"its log-probabilities would be off by {error:.2g}", error)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference in nats; tokens that both exclude agree, and NaN agrees only with NaN."""
    if a.shape != b.shape:
        return math.inf
    apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).nan_to_num(math.inf)
    # For an excluded token only the exclusion counts, not the rounding of its exponent.
    apart = apart / (1 + (-torch.maximum(a, b) - 20).clamp_min(0).nan_to_num(posinf=0))
    return float(apart.max()) if apart.numel() else 0.0


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (
        lines[0] if lines and isinstance(error, UserError) else f"{type(error).__name__}: {lines[0] if lines else ''}"
    )
    return text if len(text) <= 160 else text[:157] + "..."


def _probe(config: Any, seed: int) -> Probe:
    """Random ordinary tokens, of the lengths that the configuration's RoPE requires."""
    text = config.get_text_config(decoder=True)
    values = [value for c in (config, text) for name, value in vars(c).items() if name.endswith("token_id")]
    special = {i for value in values for i in (value if isinstance(value, (list, tuple)) else [value])}
    vocab = text.vocab_size
    allowed = [i for i in range(min(vocab, 4096)) if i not in special] or list(range(vocab))
    draw = torch.Generator().manual_seed(seed)
    change, dynamic = rope_change(text), rope_is_dynamic(text)
    # Past a change of the RoPE or of chunks, if it is near; within a dynamic RoPE's length, beyond which no two lengths
    # agree.
    short = dynamic and change is not None and change < 16
    more = max((n for n in (0 if dynamic else change or 0, 2 * chunk_length(text)) if n <= NEAR), default=0)

    def tokens(n: int) -> list[int]:
        return [allowed[i] for i in torch.randint(len(allowed), (n,), generator=draw).tolist()]

    prompts, tails = ((3, 4), ((3, 2), (2, 3))) if short else ((more + 5, more + 9), ((6, 3), (4, 6)))
    return Probe([tokens(n) for n in prompts], [[tokens(n) for n in both] for both in tails])
