"""Results as a prompt or a notebook shows them: short, however many texts and numbers they hold."""

import numpy as np
import pytest
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import decode, palette, soup
from fastalign.decode import Sampler
from fastalign.report.study import study

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:at λ")]

R = np.random.default_rng(0).normal(size=(6, 8, 2))
FLAT = R.reshape(-1, 2)


@pytest.fixture(scope="module")
def sampler():
    tokenizer = tiny_tokenizer()
    return Sampler(tiny_causal_lm(tokenizer, scale=2.0), tokenizer)


@pytest.mark.parametrize(
    ("draw", "more", "shown"),
    [
        (decode.best_of, {"n": 4}, "BestOf: 2 texts, effective sample size "),
        (decode.speculative_rejection, {"n": 4}, "Rejection: 2 texts of 4 candidates each, "),
        (decode.particles, {"n": 4, "checkpoints": [1]}, "Particles: 2 texts, effective sample size "),
        (decode.adaptive, {"max_n": 16}, "Adaptive: 2 texts of 16 to 16 candidates each, enough of "),
    ],
)
def test_what_is_drawn(sampler, draw, more, shown):
    values = ["diversity", "readability"]
    result = draw(sampler, ["the cat", "a dog"], values, lam=[1.0, 1.0], max_new_tokens=3, seed=0, **more)
    assert repr(result).startswith(shown) and len(repr(result)) < 120


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (lambda: decode.estimate(R, [[0, 0], [1, 1]]), "Estimate: 2 λ of 2 values over 6 prompts, "),
        (lambda: decode.worth(R, [1, 1]), "Worth: 8 candidates a prompt are worth "),
        (lambda: decode.best_of_curve(R, [1, 1], [1, 4]), "BestOfCurve: 2 values at k = 1, 4"),
        (lambda: palette.kl_front(FLAT, kl=0.1), "Policies: "),
        (lambda: palette.feasible_region(FLAT, 20, 3.0, 0), "Region: 20 λ, "),
        (lambda: palette.palette_path(FLAT, [0.1, 0.1]), "Way: 41 steps to a palette of 2 values, "),
        (lambda: study(["a", "b"], R, n_lam=10), "Study: a, b of 6 prompts × 8, 0 palettes, 0 soups"),
        (
            lambda: soup.SoupFront(["a", "b"], ["x", "y"], np.eye(2), R[:2], np.ones(2), 4),
            "SoupFront: 2 soups of x, y by a, b, 8 prompts × 4",
        ),
    ],
)  # fmt: skip
def test_reprs(made, shown):
    assert repr(made()).startswith(shown) and len(repr(made())) < 160


def test_a_solution_as_a_data_frame():
    result = palette.solve(FLAT, [0.1, 0.1], values=["kind", "short"])
    table = result.to_pandas()
    assert table.index.tolist() == ["kind", "short"] and table["reached"].tolist() == result.levels.tolist()
    many = palette.solve(FLAT, np.full((3, 2), 0.1), values=["kind", "short"]).to_pandas()
    assert len(many) == 3 and many.columns.tolist() == ["λ kind", "λ short", "KL", "feasible"]


def test_the_command_that_adds_candidates():
    few = decode.worth(R, [1, 1])
    fewest, most = few.needed()
    assert few.more(8) == f"fastalign sample --more {(most or fewest) - 8} --out CANDIDATES"
    assert decode.worth(R, [0, 0]).more(10) is None
