"""Bradley–Terry and Plackett–Luce losses, and the scores of many items, against TRL, scipy and Hunter's MM."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from fastalign import UserError
from fastalign.losses import BradleyTerryScores, bradley_terry_loss, bradley_terry_scores, plackett_luce_loss

# Games between eight players of a club: wins[i][j] = games in which i beat j.
GAMES = [
    [0, 3, 2, 4, 5, 3, 6, 4],
    [2, 0, 3, 2, 4, 5, 3, 6],
    [1, 2, 0, 3, 2, 4, 4, 3],
    [1, 3, 2, 0, 3, 2, 4, 5],
    [0, 1, 2, 2, 0, 3, 3, 2],
    [2, 0, 1, 2, 2, 0, 2, 4],
    [1, 1, 1, 0, 2, 3, 0, 2],
    [0, 1, 2, 1, 2, 1, 3, 0],
]


def trl_loss(chosen, rejected, margin, coefficient):
    """TRL's RewardTrainer.compute_loss on given scores."""
    from trl import RewardTrainer

    same = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=same,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": margin}
    scores = torch.cat((chosen, rejected)).unsqueeze(-1)

    def model(margin=None, use_cache=None):
        return SimpleNamespace(logits=scores)

    return RewardTrainer.compute_loss(trainer, model, inputs)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bradley_terry_loss_equals_trls_trainer(dtype, with_margin, coefficient, scale):
    generator = torch.Generator().manual_seed(0)
    pair = [(torch.randn(13, generator=generator) * scale).to(dtype).requires_grad_() for _ in range(2)]
    margin = torch.rand(13, generator=generator).to(dtype) if with_margin else None
    theirs = trl_loss(*pair, margin, coefficient)
    ours = bradley_terry_loss(*pair, margin=margin, center_coefficient=coefficient or 0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, pair), torch.autograd.grad(theirs, pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_bradley_terry_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    terms = [math.log1p(math.exp(-(0.5 - 0.1))), math.log1p(math.exp(2.1))]
    result = bradley_terry_loss(chosen, rejected, margin=0.1, center_coefficient=0.5)
    assert result.item() == pytest.approx(sum(terms) / 2 + 0.5 * (1.5**2 + 2.0**2) / 2, rel=1e-12)
    assert bradley_terry_loss(torch.zeros(0), torch.zeros(0)) == 0
    assert bradley_terry_loss(chosen.bfloat16(), rejected.bfloat16()).dtype == torch.float32


def test_plackett_luce_is_the_product_of_choices():
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orders = list(itertools.permutations(range(4)))
    for row in scores:
        chances = []
        for order in orders:
            left, chance = [math.exp(row[i]) for i in order], 1.0
            for k in range(4):
                chance *= left[k] / sum(left[k:])
            result = plackett_luce_loss(row, torch.tensor(order))
            assert result.item() == pytest.approx(-math.log(chance), rel=1e-12)
            chances.append(math.exp(-result))
        assert sum(chances) == pytest.approx(1)
    two = torch.tensor([[0, 1]] * 5)
    torch.testing.assert_close(plackett_luce_loss(scores, two), bradley_terry_loss(scores[:, 0], scores[:, 1]))


def test_plackett_luce_padding():
    scores = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ranking = torch.tensor([[3, 1, 5, 0], [2, 4, -1, -1], [5, 99, 99, 99], [7, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    parts = [plackett_luce_loss(scores[0], ranking[0]), plackett_luce_loss(scores[1], ranking[1, :2])]
    result = plackett_luce_loss(scores, ranking, mask)
    torch.testing.assert_close(result, sum(parts) / 4)
    (grad,) = torch.autograd.grad(result, scores)
    assert (grad[2:] == 0).all() and (grad[0, [2, 4]] == 0).all() and grad.isfinite().all()
    assert plackett_luce_loss(scores[:0], ranking[:0]) == 0


@given(st.lists(st.sampled_from([-1e4, -50.0, -1.0, 0.0, 1e-3, 30.0, 1e4]), min_size=1, max_size=7), st.integers(0, 99))
def test_plackett_luce_at_extremes(numbers, seed):
    scores = torch.tensor(numbers).requires_grad_()
    ranking = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    result = plackett_luce_loss(scores, ranking)
    placed = scores.detach().double()[ranking]
    truth = sum((placed[k:].logsumexp(0) - placed[k] for k in range(len(numbers))), torch.tensor(0.0))
    assert result.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-5)
    (grad,) = torch.autograd.grad(result, scores)
    expected = torch.zeros(len(numbers), dtype=torch.float64)
    for k in range(len(numbers)):
        expected[ranking[k:]] += placed[k:].softmax(0)
        expected[ranking[k]] -= 1
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-3)


LOSSES = {
    "bradley_terry": lambda a, b: bradley_terry_loss(a, b, margin=0.3, center_coefficient=0.1),
    "plackett_luce": lambda a, b: plackett_luce_loss(
        torch.stack((a, b, a * b), -1),
        torch.tensor([[2, 0, 1], [0, 2, 9], [1, 0, 2]]),
        torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_compile_and_func_grad(name):
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    loss = LOSSES[name]
    assert torch.autograd.gradcheck(loss, leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    plain = [x.detach() for x in leaves]
    for a, b in zip(torch.func.grad(loss, (0, 1))(*plain), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()
    out = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    for a, b in zip(torch.autograd.grad(out, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def negative_log_likelihood(s, wins, prior=0.0):
    ahead = s[:, None] - s[None, :]
    return (wins * np.logaddexp(0, -ahead)).sum() + prior * (np.logaddexp(0, -s) + np.logaddexp(0, s)).sum()


def hunters_mm(wins, steps=4000):
    """Hunter 2004, eq. 3: γ_i <- W_i / Σ_j N_ij / (γ_i + γ_j)."""
    gamma, games = np.ones(len(wins)), wins + wins.T
    for _ in range(steps):
        gamma = wins.sum(1) / (games / (gamma[:, None] + gamma[None, :])).sum(1)
        gamma /= np.exp(np.log(gamma).mean())
    return np.log(gamma)


def random_table(n, seed, games=6):
    rng = np.random.default_rng(seed)
    strength = rng.normal(size=n) * 1.5
    wins = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        wins[i, j] = rng.binomial(games, 1 / (1 + np.exp(strength[j] - strength[i])))
        wins[j, i] = games - wins[i, j]
    wins[np.arange(n), (np.arange(n) + 1) % n] += 0.5  # a ring of draws connects all
    wins[(np.arange(n) + 1) % n, np.arange(n)] += 0.5
    return wins


@pytest.mark.parametrize("wins", [np.array(GAMES, float), random_table(3, 0), random_table(20, 1)], ids=len)
def test_scores_equal_hunters_mm_and_scipys(wins):
    result = bradley_terry_scores(wins)
    assert isinstance(result, BradleyTerryScores) and result.items == tuple(range(len(wins)))
    assert result.scores.sum() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(result.scores, hunters_mm(wins), atol=1e-9)
    best = minimize(negative_log_likelihood, np.zeros(len(wins)), (wins,), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(result.scores, best - best.mean(), atol=1e-5)
    assert result.log_likelihood == pytest.approx(-negative_log_likelihood(best, wins), rel=1e-10)
    # At the optimum each item's expected wins are its wins.
    chance = 1 / (1 + np.exp(result.scores[None, :] - result.scores[:, None]))
    np.testing.assert_allclose(((wins + wins.T) * chance).sum(1), wins.sum(1), rtol=1e-10)


def test_standard_errors_by_the_constrained_likelihood():
    """Scores of all but the last free, the last minus their sum: the inverse of that Hessian, by differences."""
    wins = np.array(GAMES, float)
    result = bradley_terry_scores(wins)
    basis = np.vstack([np.eye(7), -np.ones(7)])
    free, h = result.scores[:7], 1e-4
    f = lambda x: negative_log_likelihood(basis @ x, wins)  # noqa: E731
    e = np.eye(7) * h
    hessian = [
        [(f(free + a + b) - f(free + a - b) - f(free - a + b) + f(free - a - b)) / (4 * h * h) for b in e] for a in e
    ]
    covariance = basis @ np.linalg.inv(hessian) @ basis.T
    np.testing.assert_allclose(result.covariance, covariance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.standard_errors, np.sqrt(np.diag(covariance)), rtol=1e-4)


def test_standard_errors_cover_the_truth():
    """Tables drawn from known scores: the errors' size is that of the estimates' spread."""
    rng = np.random.default_rng(0)
    truth = np.array([1.0, 0.3, -0.2, -1.1])
    chance = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    z = []
    for _ in range(300):
        wins = np.zeros((4, 4))
        for i, j in itertools.combinations(range(4), 2):
            wins[i, j] = rng.binomial(60, chance[i, j])
            wins[j, i] = 60 - wins[i, j]
        result = bradley_terry_scores(wins)
        z.append((result.scores - truth) / result.standard_errors)
    assert np.abs(np.mean(z, 0)).max() < 0.25 and np.abs(np.std(z, 0) - 1).max() < 0.15


def test_two_players_by_hand():
    result = bradley_terry_scores(np.array([[0, 30], [10, 0]]))
    assert result.scores[0] - result.scores[1] == pytest.approx(math.log(3))
    c = result.covariance
    assert c[0, 0] + c[1, 1] - 2 * c[0, 1] == pytest.approx(1 / 30 + 1 / 10)  # of a log odds


def test_lists_of_games_names_and_draws():
    wins = np.zeros((3, 3))
    games = [
        ("Anand", "Carlsen"),
        ("Carlsen", "Anand", 3),
        ("Carlsen", "Polgar", 2),
        ("Polgar", "Anand", 1.5),
        ("Anand", "Polgar", 0.5),
        ("Polgar", "Carlsen", 0.5),
    ]
    names = ("Anand", "Carlsen", "Polgar")
    for winner, loser, *count in games:
        wins[names.index(winner), names.index(loser)] += count[0] if count else 1
    result, table = bradley_terry_scores(games), bradley_terry_scores(torch.tensor(wins))
    assert result.items == names
    np.testing.assert_allclose(result.scores, table.scores)
    np.testing.assert_allclose(result.standard_errors, table.standard_errors)
    numbered = bradley_terry_scores([(names.index(a), names.index(b), *c) for a, b, *c in games[::-1]])
    assert numbered.items == (0, 1, 2)
    np.testing.assert_allclose(numbered.scores, table.scores, atol=1e-12)


def test_lopsided_tables_converge():
    """A ladder in which each beats the next 10^6 times and loses once."""
    n = 12
    wins = np.diag(np.full(n - 1, 1e6), 1) + np.diag(np.ones(n - 1), -1)
    result = bradley_terry_scores(wins)
    np.testing.assert_allclose(-np.diff(result.scores), np.log(1e6), rtol=1e-8)


def test_disconnected_tables_are_reported_and_a_prior_helps():
    never_lost = np.array([[0, 2, 3], [0, 0, 1], [0, 1, 0]])
    with pytest.raises(UserError, match=r"no other item beat 0 \(give prior=0.1"):
        bradley_terry_scores(never_lost)
    apart = [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]
    with pytest.raises(UserError, match=r"no other item beat 'a', 'b' \(give"):
        bradley_terry_scores(apart)
    for comparisons, prior in ((never_lost, 0.1), (apart, 0.5), (np.array([[0, 9], [0, 0]]), 1e-3)):
        result = bradley_terry_scores(comparisons, prior=prior)
        wins = comparisons if isinstance(comparisons, np.ndarray) else np.kron(np.eye(2), np.array([[0, 1], [1, 0]]))
        best = minimize(
            negative_log_likelihood, np.zeros(len(wins)), (wins, prior), method="BFGS", options={"gtol": 1e-9}
        ).x
        np.testing.assert_allclose(result.scores, best, atol=1e-4)
        assert np.isfinite(result.standard_errors).all() and (result.standard_errors > 0).all()
    # A prior is so many games against an item of score 0, which may as well stand in the table.
    wins = np.array(GAMES, float)
    widened = np.zeros((9, 9))
    widened[:8, :8], widened[8, :8], widened[:8, 8] = wins, 2.0, 2.0
    plain, with_prior = bradley_terry_scores(widened), bradley_terry_scores(wins, prior=2.0)
    np.testing.assert_allclose(with_prior.scores, plain.scores[:8] - plain.scores[8], atol=1e-9)
    c = plain.covariance
    expected = c[:8, :8] - c[:8, 8:] - c[8:, :8] + c[8, 8]
    np.testing.assert_allclose(with_prior.covariance, expected, rtol=1e-8)


@given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 1.0]))
def test_any_connected_table(n, seed, prior):
    wins = random_table(n, seed, games=3)
    result = bradley_terry_scores(wins, prior=prior)
    gradient = wins.sum(1) - ((wins + wins.T) / (1 + np.exp(result.scores[None, :] - result.scores[:, None]))).sum(1)
    gradient += prior * (1 - 2 / (1 + np.exp(-result.scores)))
    assert np.abs(gradient).max() < 1e-8 and result.iterations < 30


@pytest.mark.parametrize(
    ("comparisons", "says"),
    [
        (np.zeros((2, 3)), "comparisons must be a square table (n, n) with n >= 2, or a list, got shape (2, 3)"),
        ([], "comparisons must be (winner, loser) or (winner, loser, count), got an empty list"),
        ([(1, 2, 3, 4)], "got (1, 2, 3, 4)"),
        (np.array([[0.0, -1], [1, 0]]), "comparisons must count wins by finite numbers, at least 0"),
        ([("a", "b"), ("c", "c")], "comparisons must be between two items, got 'c' with itself"),
    ],
)
def test_bad_comparisons_are_reported_in_one_line(comparisons, says):
    with pytest.raises(UserError) as raised:
        bradley_terry_scores(comparisons)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_other_mistakes():
    x = torch.zeros(3)
    with pytest.raises(UserError, match=r"rejected_scores.shape must equal chosen_scores.shape, got \(2,\) and \(3,\)"):
        bradley_terry_loss(x, x[:2])
    with pytest.raises(UserError, match=r"margin must have shape \(3,\), got \(2,\)"):
        bradley_terry_loss(x, x, margin=x[:2])
    with pytest.raises(TypeError, match=r"chosen_scores must be a floating tensor, got list"):
        bradley_terry_loss([1.0], x)
    with pytest.raises(UserError, match=r"k <= n, got \(4,\) and \(3,\)"):
        plackett_luce_loss(x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"ranking must be an int64 tensor, got torch.float32"):
        plackett_luce_loss(x, x)
    with pytest.raises(UserError, match=r"mask.shape must equal ranking.shape, got \(2,\) and \(3,\)"):
        plackett_luce_loss(x, torch.zeros(3, dtype=torch.int64), x[:2])
    with pytest.raises(UserError, match="prior must be a finite number, at least 0, got -1"):
        bradley_terry_scores(np.ones((2, 2)) - np.eye(2), prior=-1)
    with pytest.raises(UserError, match="no convergence to tol 1e-10 in 1 iterations"):
        bradley_terry_scores(np.array(GAMES), max_iterations=1)
