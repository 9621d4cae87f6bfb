"""linear_sample_tokens against writing the logits, then softmax + multinomial (argmax at temperature 0) or our
sample_tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import linear_sample_tokens, sample_tokens

pytestmark = pytest.mark.sampling
WIDTH, VOCAB = 576, 49_152

CASES = [
    pytest.param(rows, temperature, id=f"{rows} x {WIDTH} x {VOCAB:,} float32, {'drawn' if temperature else 'greedy'}")
    for rows in (1, 64, 256)
    for temperature in (1.0, 0.0)
]


@pytest.mark.parametrize(("rows", "temperature"), CASES)
def test_tokens(compare, rows, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH) * 3 * WIDTH**-0.5

    def ours():
        return linear_sample_tokens(hidden, weight, temperature=temperature, seed=0)

    def torchs():
        logits = F.linear(hidden, weight)
        return logits.argmax(-1) if temperature == 0 else torch.multinomial(logits.softmax(-1), 1)

    def in_two():
        return sample_tokens(F.linear(hidden, weight), temperature=temperature, seed=0)

    def check():
        result, drawn = ours(), in_two()
        same = result.ids == drawn.ids  # except where rounding decides
        assert same.float().mean() > 0.97
        torch.testing.assert_close(result.log_probs[same], drawn.log_probs[same], rtol=0, atol=1e-4)

    compare(
        ours,
        {
            "F.linear + softmax + multinomial" if temperature else "F.linear + argmax": torchs,
            "F.linear + our sample_tokens": in_two,
        },
        floor=lambda: hidden @ weight.T,
        check=check,
        rounds=5,
    )
