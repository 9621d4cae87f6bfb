"""What README says: its code blocks run, and hold what the words beside them claim."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import chisquare
from turns import on_its_day

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", README.partition("## Before and after")[2], re.S)[:2]


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


@on_its_day("readme")
def test_every_block_runs_in_an_empty_folder():
    """On tiny models; `python tools/walk_readme.py` walks through it with the real one."""
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "walk_readme.py", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count("\nok") > 20
