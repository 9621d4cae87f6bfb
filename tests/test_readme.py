"""What README says: its first code blocks hold what the words beside them claim (test_docs.py runs all)."""

import re
from pathlib import Path

import numpy as np
import torch
from scipy.stats import chisquare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", README.partition("## Before and after")[2], re.S)[:2]


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def run(code, **given):
    exec(code, given)
    return given


def test_what_replaces_the_log_probs_gives_the_same_values_gradients_and_shapes():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 40) * 3, torch.randint(40, (3, 5))
    result = []
    for code in (BEFORE, AFTER):
        own = logits.clone().requires_grad_()
        made = run(code, torch=torch, logits=own, labels=labels, step=0)
        made["log_probs"].sum().backward()
        result.append((made["log_probs"], own.grad, made["next_token"]))
    (theirs, their_grad, their_token), (ours, our_grad, our_token) = result
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grad, their_grad)
    assert our_token.shape == their_token.shape == (3,) and our_token.dtype == their_token.dtype


def test_what_replaces_the_sampling_draws_from_the_same_distribution():
    torch.manual_seed(0)
    logits = (torch.randn(8) * 2).expand(20_000, 1, 8)
    p = np.asarray(torch.softmax(logits[0, 0].double() / 0.8, -1))
    for code in (BEFORE, AFTER):
        tokens = run(code, torch=torch, logits=logits, labels=logits[..., 0].long() * 0, step=0)["next_token"]
        assert chisquare(np.bincount(tokens, minlength=8), p * len(tokens)).pvalue > 1e-4
