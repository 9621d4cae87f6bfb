"""A small causal model on each of fastalign's paths, beside plain `model(input_ids).logits`."""

from __future__ import annotations

import copy
import warnings

import torch
from causal_models import VOCAB, build
from tiny import tiny_tokenizer

from fastalign._base.errors import UserError
from fastalign.decode import Sampler
from fastalign.integrations.transformers import fused_forward
from fastalign.models import scoring
from fastalign.models.packing import enable, halves, is_enabled
from fastalign.train.rows import add_row_forward, batch_of
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead

PROMPTS = ["the quick brown fox sat on", "hello, why"]
CHECKS = ("float32", "float64", "fused_forward", "pairs", "ppo", "log_likelihood")
ROUNDING = 2e-3  # nats; a fault is larger by far with weights of this size


@torch.no_grad()
def truth(model, prompt, new):
    """log p of each new token from one plain forward pass, no cache, no padding, float64 softmax."""
    ids = torch.tensor([[*prompt, *new]])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :].double().log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(new)[:, None])[:, 0]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB - 4, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampled(model, tokenizer) -> float:
    """The largest difference over three candidates of each of two prompts, and once more one by one."""
    sampler = Sampler(model, tokenizer)
    worst = 0.0
    for rows in (None, 1):
        made = sampler.sample(PROMPTS, n=3, max_new_tokens=9, seed=0, batch_size=rows, chat=False)
        for prompt, candidates, log_probs in zip(PROMPTS, made.token_ids, made.logprobs, strict=True):
            for new, result in zip(candidates, log_probs, strict=True):
                expected = truth(model, tokenizer(prompt)["input_ids"], new)
                worst = max(worst, float((torch.tensor(result, dtype=torch.float64) - expected).abs().max()))
    return worst


def rows_of(seed: int = 0):
    """Two prompts with two continuations each, the first pair's and the second's of other lengths."""
    prompts = [tokens(8, seed), tokens(5, seed + 1)]
    return [
        (p, tokens(n, seed + 10 + i)) for i, (p, n) in enumerate(zip([*prompts, *prompts], (7, 4, 3, 9), strict=True))
    ]


def padded(rows):
    width = max(len(p) + len(t) for p, t in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for r, (p, t) in enumerate(rows):
        ids[r, : len(p) + len(t)] = torch.tensor([*p, *t])
        labels[r, len(p) : len(p) + len(t)] = torch.tensor(t)
        mask[r, : len(p) + len(t)] = 1
    return ids, mask, labels


def differences(model, rows, labels, found) -> float:
    at = labels[:, 1:] != -100
    return max(float((found[r][at[r]].double() - truth(model, p, t)).abs().max()) for r, (p, t) in enumerate(rows))


@torch.no_grad()
def fused(model, tokenizer) -> float:
    whole = torch.tensor([tokens(12, 40), tokens(12, 41)])
    result = fused_forward(model, whole, input_ids=whole)
    expected = model(input_ids=whole, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return float((result.double() - expected.gather(-1, whole[:, 1:, None])[..., 0]).abs().max())


@torch.no_grad()
def pairs(model, tokenizer) -> float:
    rows = rows_of(5)
    ids, mask, labels = padded(rows)
    expected_by = copy.deepcopy(model)  # without what the path puts on it
    enable(model)
    add_row_forward(model)
    result = model(rows=batch_of(ids, mask, labels, halves(len(ids)), ids.device))["log_probs"]
    return differences(expected_by, rows, labels, result)


@torch.no_grad()
def ppo(model, tokenizer) -> float:
    rows = rows_of(7)
    ids, _, labels = padded(rows)
    result = AutoModelForCausalLMWithValueHead(model)(ids, score_labels=labels[:, 1:]).log_probs
    return differences(model, rows, labels, result)


def log_likelihood(model, tokenizer) -> float:
    from fastalign.rewards.log_likelihood import LogLikelihood

    responses = [" red house and then some more of it", " you"]
    result = LogLikelihood(model=model, tokenizer=tokenizer, chat=False, batch_size=4)(PROMPTS, responses)
    worst = 0.0
    for prompt, response, score in zip(PROMPTS, responses, result, strict=True):
        new = tokenizer(response, add_special_tokens=False)["input_ids"]
        worst = max(worst, abs(float(score) - float(truth(model, tokenizer(prompt)["input_ids"], new).mean())))
    return worst


def sweep(model_type: str) -> dict[str, str]:
    """check -> "right", "wrong: by how much", "refused: the line", "raises: the error"; or {"not built": why}."""
    tokenizer = tiny_tokenizer()
    tokenizer_vocab = len(tokenizer)
    try:
        model = build(model_type)
        run(model)
    except Exception as error:
        return {"not built": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
    assert tokenizer_vocab >= VOCAB
    result: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result["sampled on"] = answer_of(lambda: Sampler(model, tokenizer).path().__name__)
        result["scored on"] = answer_of(lambda: scoring.describe(model))
        checks = {
            "float32": sampled,
            "float64": sampled,
            "fused_forward": fused,
            "ppo": ppo,
            "log_likelihood": log_likelihood,
            "pairs": pairs,
        }
        for name, check in checks.items():
            double = build(model_type, torch.float64) if name == "float64" else model
            result[name] = (
                judged(check, double, tokenizer) if double is model or runs(double) else "right: not in float64"
            )
        result["pairs on"] = answer_of(lambda: "packed" if is_enabled(model) else "padded")
    return result


@torch.no_grad()
def run(model) -> None:
    model(input_ids=torch.tensor([tokens(14, 0)]), use_cache=False).logits[0, -1, 0].item()


def runs(model) -> bool:
    try:
        run(model)
    except Exception:
        return False
    return True


def answer_of(what) -> str:
    try:
        return what()
    except UserError:
        return "refused"
    except Exception as error:
        return type(error).__name__


def judged(check, model, tokenizer) -> str:
    try:
        error = check(model, tokenizer)
    except UserError as refusal:
        line = str(refusal)
        return f"refused: {line}" if "\n" not in line else f"raises: more than one line: {line[:100]}"
    except Exception as error:
        return f"raises: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}"
    return "right" if error < ROUNDING else f"wrong: by {error:.2g} nats"
