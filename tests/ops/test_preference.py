import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from trl_losses import trl_cpo, trl_dpo, trl_kto, trl_orpo

import fastalign
from fastalign import UserError
from fastalign.losses import (
    LinearDPOLoss,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    sequence_logps,
    simpo_loss,
    wpo_weights,
)
from fastalign.losses.preference import CPO_LOSS_TYPES, LOSS_TYPES
from fastalign.ops import pairwise_loss
from fastalign.ops.pairwise import F_DIVERGENCES, FUSED, TABLE, Margin, Options
from fastalign.ops.preference import forward_op

DIVERGENT = [kind for kind in LOSS_TYPES if kind == "sft" or TABLE[kind].takes_f_divergence]
CASES = [(kind, "reverse_kl") for kind in LOSS_TYPES]
CASES += [(kind, divergence) for kind in DIVERGENT for divergence in F_DIVERGENCES[1:]]
EXTREMES = [1e4, -1e4, 300.0, -300.0, 20.0, -1.0, 0.0]
LOG2 = math.log(2)


def smoothing(kind):
    return {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.2}.get(kind, 0.0)


def dtype_of(divergence):
    """TRL knows no float64 for the alpha-divergence."""
    return torch.float32 if divergence == "alpha_divergence" else torch.float64


def random_pairs(dtype, pairs=5, tokens=7, scale=3.0, seed=0):
    """log_probs (2B, T), mask (2B, T) with a length of 1 and a row without tokens, and the references' sums."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (2 * pairs,), generator=generator)
    lengths[1], lengths[pairs + 2] = 1, 0
    start = torch.randint(0, 3, (2 * pairs, 1), generator=generator)
    place = torch.arange(tokens + 3)
    mask = (place >= start) & (place < start + lengths[:, None])
    log_probs = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * scale
    ref = (log_probs * mask).sum(-1) + scale * torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    return (log_probs * mask).to(dtype), mask, ref.to(dtype).chunk(2)


def ours_on(kind, log_probs, mask, ref, ld_alpha=None, **options):
    chosen, rejected = sequence_logps(log_probs, mask, ld_alpha=ld_alpha).chunk(2)
    chosen_lengths, rejected_lengths = mask.sum(-1).chunk(2)
    sft_logps = sequence_logps(log_probs, mask).chunk(2)[0]
    options |= {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "sft_logps": sft_logps}
    return dpo_loss(chosen, rejected, *ref, loss_type=kind, **options)


def assert_equals_trl(ours, theirs, dtype, name="", atol=1e-12):
    """To 1e-6 relative; where TRL's float arithmetic ends in NaN ours must not."""
    known = ~theirs.isnan()
    assert not ours.isnan().any(), (name, ours)
    rtol, atol = 1e-6, (atol if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(ours[known], theirs[known], rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize(("kind", "divergence"), CASES)
def test_dpo_equals_trls_trainer(kind, divergence, scale):
    dtype = dtype_of(divergence)
    for seed in range(3):
        log_probs, mask, ref = random_pairs(dtype, scale=scale, seed=seed)
        options = {"label_smoothing": smoothing(kind), "f_divergence_type": divergence, "beta": 0.3}
        a, b = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
        theirs, metrics = trl_dpo(kind, a, mask, ref, **options)
        ours = ours_on(kind, b, mask, ref, **options)
        assert_equals_trl(ours.losses.mean(), theirs, dtype)
        if theirs.isfinite():
            theirs.backward()
            ours.losses.mean().backward()
            # TRL takes exo_pair's logarithms of e in float32, and the gradient is a difference of such.
            atol = 1e-7 if kind == "exo_pair" else 1e-12
            assert_equals_trl(b.grad[mask], a.grad[mask], dtype, "gradient", atol)
        rewards = {"rewards/chosen": ours.chosen_rewards, "rewards/rejected": ours.rejected_rewards}
        for name, value in rewards.items():
            assert value.mean().item() == pytest.approx(metrics[name], rel=1e-5)
            assert not value.requires_grad


@pytest.mark.parametrize(("kind", "divergence"), CASES)
def test_dpo_equals_trls_trainer_at_extremes(kind, divergence):
    """Each pair alone, so that each number is seen: log-ratios up to 1e4 either way, lengths 1 and 4."""
    dtype = dtype_of(divergence)
    options = {"label_smoothing": smoothing(kind), "f_divergence_type": divergence, "f_alpha_divergence_coef": 0.3}
    zero = torch.zeros(1, dtype=dtype)
    for c in EXTREMES:
        for r in EXTREMES:
            mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
            log_probs = torch.zeros(2, 4, dtype=dtype)
            log_probs[0, 0], log_probs[1] = c, r / 4
            a, b = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
            theirs, _ = trl_dpo(kind, a, mask, (zero, zero), **options)
            ours = ours_on(kind, b, mask, (zero, zero), **options).losses
            assert_equals_trl(ours.mean(), theirs, dtype, f"{c}, {r}")
            if ours.isfinite().all():
                ours.sum().backward()
                assert not b.grad.isnan().any(), (c, r, b.grad)
                theirs.backward()
                # A gradient that is NaN in TRL (0 · inf) has a finite limit, which ours must be.
                known = mask & a.grad.isfinite()
                atol = 1e-7 if kind == "exo_pair" else 1e-12
                assert_equals_trl(b.grad[known], a.grad[known], dtype, f"gradient {c}, {r}", atol)


def fused_on(kind, log_probs, mask, ref, **options):
    """`pairwise_loss` in the place of `ours_on`."""
    return pairwise_loss(log_probs, None if ref[0] is None else torch.cat(ref), mask, loss_type=kind, **options)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("kind", FUSED)
def test_pairwise_loss_equals_trls_trainer(each_backend, kind, scale):
    log_probs, mask, ref = random_pairs(torch.float64, scale=scale)
    options = {"label_smoothing": smoothing(kind), "beta": 0.3}
    a, b = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
    theirs, metrics = trl_dpo(kind, a, mask, ref, **options)
    ours = fused_on(kind, b, mask, ref, **options)
    assert_equals_trl(ours.losses.mean(), theirs, torch.float64)
    if theirs.isfinite():
        theirs.backward()
        ours.losses.mean().backward()
        assert_equals_trl(b.grad[mask], a.grad[mask], torch.float64, "gradient", 1e-7 if kind == "exo_pair" else 1e-12)
        assert (b.grad[~mask] == 0).all()
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        side, what = name.split("/")[1], "rewards" if "rewards" in name else "logps"
        value = getattr(ours, f"{side}_{what}")
        assert value.mean().item() == pytest.approx(metrics[name], rel=1e-5) and not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "smooth"), [(kind, 0.0) for kind in FUSED] + [(kind, 0.2) for kind in ("sigmoid", "robust")]
)
def test_pairwise_loss_equals_dpo_loss_at_extremes(each_backend, kind, smooth, dtype):
    """The formulas that are generated from the table, and their gradients, against the table under autograd."""
    grid = torch.tensor([1e4, -1e4, -700.0, 20.0, 0.5], dtype=dtype)
    ratios = torch.cat((grid.repeat_interleave(len(grid)), grid.repeat(len(grid))))
    mask = torch.ones(len(ratios), 3).bool()
    mask[: len(grid)] = torch.tensor([True, False, False])
    log_probs = torch.where(mask, (ratios / mask.sum(-1))[:, None], math.nan)
    options = {"label_smoothing": smooth or smoothing(kind), "beta": 0.125, "loss_type": kind}
    x, y = (log_probs.clone().requires_grad_() for _ in range(2))
    chosen, rejected = sequence_logps(x, mask).chunk(2)
    chosen_lengths, rejected_lengths = mask.sum(-1).chunk(2)
    expected = dpo_loss(
        chosen, rejected, None, None, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, **options
    )
    result = pairwise_loss(y, None, mask, **options)
    rtol, atol = (1e-12, 1e-30) if dtype == torch.float64 else (2e-6, 1e-37)
    torch.testing.assert_close(result.losses, expected.losses, rtol=rtol, atol=atol)
    torch.testing.assert_close(result[1:3], expected[1:])
    weights = torch.linspace(0.5, 2, len(chosen), dtype=dtype)
    (a,) = torch.autograd.grad((expected.losses * weights).sum(), x)
    (b,) = torch.autograd.grad((result.losses * weights).sum(), y)
    # Derivatives are differences of terms as large as beta; some of theirs cancel to nothing.
    torch.testing.assert_close(b, a, rtol=10 * rtol, atol=1e-16 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("reference", ["tokens", "sums", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pairwise_loss_reads_every_form(each_backend, monkeypatch, dtype, reference):
    """Rows of several blocks with an odd end, strided, float and integer masks, NaN outside them, a row without
    tokens."""
    monkeypatch.setattr("fastalign.kernels.preference.BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    both = -torch.rand(6, 74, generator=generator).to(dtype)
    mask = torch.rand(6, 37, generator=generator) < 0.6
    mask[4] = False
    log_probs, ref = (x.masked_fill(~mask, math.nan) for x in both.chunk(2, 1))
    both = torch.cat((log_probs, ref), 1)
    log_probs, ref = both[:, :37], both[:, 37:]  # rows further apart than they are long
    sums = sequence_logps(ref, mask)
    given = {"tokens": ref, "sums": sums, "none": None}[reference]
    halves = (None, None) if given is None else sums.chunk(2)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), mask.sum(-1).chunk(2), strict=True))
    for kind, kept in (("ipo", mask.float()), ("sigmoid", mask.long()), ("nca_pair", mask)):
        x, y = (log_probs.detach().clone().requires_grad_() for _ in range(2))
        expected = dpo_loss(*sequence_logps(x, mask).chunk(2), *halves, loss_type=kind, **lengths)
        spaced = torch.cat((y, y), 1)[:, 37:]
        result = pairwise_loss(spaced, given, kept, loss_type=kind)
        assert result.losses.dtype == torch.float32
        torch.testing.assert_close(result[:3], tuple(expected))
        (a,), (b,) = (torch.autograd.grad(out.losses.sum(), z) for out, z in ((expected, x), (result, y)))
        assert b.dtype == dtype and (b[~mask] == 0).all()
        torch.testing.assert_close(b, a)


def test_nan_in_a_pair_stays_there(each_backend):
    log_probs, mask, ref = random_pairs(torch.float32)
    mask[3] = True
    log_probs[3, 0] = math.nan
    x = log_probs.clone().requires_grad_()
    result = fused_on("sigmoid", x, mask, ref)
    result.losses.sum().backward()
    assert result.losses.isnan().tolist() == [False] * 3 + [True, False]
    assert x.grad.isnan().any(-1).tolist() == ([False] * 3 + [True, False]) * 2
    assert pairwise_loss(log_probs[:0], None, mask[:0]).losses.shape == (0,)


def test_pairwise_loss_under_gradcheck_compile_func_grad_and_vmap(each_backend):
    log_probs, mask, ref = random_pairs(torch.float64, pairs=3, tokens=2)
    for kind in ("sigmoid_norm", "apo_down"):

        def f(x, kind=kind):
            return fused_on(kind, x, mask, ref, beta=0.7).losses

        assert torch.autograd.gradcheck(f, log_probs.clone().requires_grad_(), fast_mode=each_backend == "triton")
        assert_compiles(lambda x, f=f: f(x).mean(), log_probs, both=each_backend != "triton")
        many = torch.stack((log_probs, log_probs * 0.5))
        torch.testing.assert_close(torch.func.vmap(f)(many), torch.stack([f(x) for x in many]))


def test_the_op_on_the_cpu_is_the_table():
    """What the dispatcher runs for CPU tensors; `pairwise_loss` itself does without it there."""
    log_probs, mask, ref = random_pairs(torch.float64)
    for kind in ("sigmoid", "ipo", "nca_pair"):
        arguments = (log_probs, torch.cat(ref), mask, kind, 0.2, 0.1, 0.05)
        result = forward_op(*arguments)
        with fastalign.use_backend("triton"):
            torch.testing.assert_close(result, forward_op(*arguments))


def test_linear_dpo_takes_the_fused_loss_where_it_applies(each_backend):
    """The module equals itself in plain torch, metrics too; what is not made pair by pair goes on as before."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((4, 5, 8), (13, 8)))
    labels = torch.randint(0, 13, (4, 5), generator=generator)
    labels[0, :2] = labels[3, 3:] = -100
    logps = (torch.full((2,), -9.0).double(), torch.full((2,), -8.0).double())
    sides = [{}, {"ref_logps": logps}, {"ref_hidden": hidden.roll(1, 0), "ref_weight": weight}]
    settings = [{"loss_type": "ipo", "beta": 0.3}, {"ld_alpha": 0.5}, {"loss_type": "aot"}, {"loss_type": ["sigmoid"]}]
    settings += [{"f_divergence_type": "forward_kl"}, {"use_weighting": True}, {"loss_weights": [2.0]}]
    for side, options in [(side, {"label_smoothing": 0.1}) for side in sides] + [({}, more) for more in settings]:
        x, y = (hidden.clone().requires_grad_() for _ in range(2))
        loss, metrics = LinearDPOLoss(**options)(x, weight, labels, **side)
        with fastalign.use_backend("reference"):
            expected, same = LinearDPOLoss(**options)(y, weight, labels, **side)
        torch.testing.assert_close((loss, metrics), (expected, same), msg=lambda m, o=options: f"{o}: {m}")
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, y))


def test_the_kernels_formulas_are_generated_from_the_table():
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "generate_pairwise.py"))
    assert tool["TARGET"].read_text() == tool["generated"](), "run python tools/generate_pairwise.py"


def test_a_row_without_tokens():
    log_probs, mask, ref = torch.zeros(4, 3), torch.zeros(4, 3).bool(), (torch.zeros(2), torch.zeros(2))
    for kind in LOSS_TYPES:
        theirs, _ = trl_dpo(kind, log_probs, mask, ref, label_smoothing=smoothing(kind))
        ours = ours_on(kind, log_probs, mask, ref, label_smoothing=smoothing(kind)).losses.mean()
        if kind == "sft":
            assert theirs.isnan() and ours == 0  # a mean over no tokens
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [0.05, 1.0, 3.0])
def test_discopop_temperature(tau):
    log_probs, mask, ref = random_pairs(torch.float64, scale=20.0)
    theirs, _ = trl_dpo("discopop", log_probs, mask, ref, discopop_tau=tau)
    assert_equals_trl(ours_on("discopop", log_probs, mask, ref, discopop_tau=tau).losses.mean(), theirs, torch.float64)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 1.0 + 5e-7, 1.7])
def test_alpha_divergence_coefficients(alpha):
    log_probs, mask, ref = random_pairs(torch.float32)
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    theirs, _ = trl_dpo("sigmoid", log_probs, mask, ref, **options)
    assert_equals_trl(ours_on("sigmoid", log_probs, mask, ref, **options).losses.mean(), theirs, torch.float32)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sft", "aot"])
def test_length_desensitising_equals_trls(kind, ld_alpha):
    log_probs, mask, ref = random_pairs(torch.float64)
    theirs, _ = trl_dpo(kind, log_probs, mask, ref, ld_alpha=ld_alpha)
    ours = ours_on(kind, log_probs, mask, ref, ld_alpha=ld_alpha).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", [k for k in LOSS_TYPES if k not in ("aot", "aot_unpaired", "sft")])
def test_wpo_weights_equal_trls(kind):
    log_probs, mask, ref = random_pairs(torch.float64)
    log_sum_sq = -torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    a, b = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
    options = {"label_smoothing": smoothing(kind)}
    theirs, _ = trl_dpo(kind, a, mask, ref, log_sum_sq_probs=log_sum_sq, use_weighting=True, **options)
    weights = wpo_weights(b, log_sum_sq, mask)
    ours = ours_on(kind, b, mask, ref, weights=weights, **options).losses.mean()
    assert_equals_trl(ours, theirs, torch.float64)
    ours.backward()
    if kind != "hinge":  # TRL multiplies in place what relu has saved, and fails
        theirs.backward()
        assert_equals_trl(b.grad[mask], a.grad[mask], torch.float64, "gradient", 1e-7 if kind == "exo_pair" else 1e-12)


def test_mixtures_equal_trls():
    log_probs, mask, ref = random_pairs(torch.float64)
    kinds, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]  # MPO
    theirs, _ = trl_dpo(kinds, log_probs, mask, ref, loss_weights=weights)
    ours = ours_on(kinds, log_probs, mask, ref, loss_weights=weights).losses
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-9, atol=0)
    parts = [w * ours_on(kind, log_probs, mask, ref).losses for kind, w in zip(kinds, weights, strict=True)]
    torch.testing.assert_close(ours, sum(parts), rtol=1e-12, atol=0)
    unweighted, _ = trl_dpo(kinds, log_probs, mask, ref)
    torch.testing.assert_close(ours_on(kinds, log_probs, mask, ref).losses.mean(), unweighted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_of_sigmoid_is_conservative_dpo(kind):
    """The expected loss where a label is flipped with chance e; TRL's trainer ignores e here."""
    log_probs, mask, ref = random_pairs(torch.float64)
    e = 0.2
    plain = ours_on(kind, log_probs, mask, ref).losses
    flipped = ours_on(kind, log_probs.roll(5, 0), mask.roll(5, 0), ref[::-1]).losses
    smoothed = ours_on(kind, log_probs, mask, ref, label_smoothing=e).losses
    torch.testing.assert_close(smoothed, (1 - e) * plain + e * flipped, rtol=1e-12, atol=0)


def test_without_a_reference_its_log_probs_are_zero():
    log_probs, mask, _ = random_pairs(torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    for kind in LOSS_TYPES:
        options = {"label_smoothing": smoothing(kind)}
        expected = ours_on(kind, log_probs, mask, (zero, zero), **options)
        result = ours_on(kind, log_probs, mask, (None, None), **options)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


def test_limits_that_plain_arithmetic_makes_nan():
    """In float32, where exp overflows at 88.7."""

    def loss(c, r, **options):
        x = torch.tensor([c], requires_grad=True)
        y = torch.tensor([r], requires_grad=True)
        result = dpo_loss(x, y, None, None, beta=1.0, **options).losses
        result.sum().backward()
        return result.item(), x.grad.item(), y.grad.item()

    forward = {"f_divergence_type": "forward_kl"}
    # The score of a completion that became impossible is -inf. The other one's does not save it.
    assert loss(1.0, -1e4, **forward) == (0, 0, 0)
    assert loss(-1e4, -2e4, **forward) == (0, 0, 0)
    assert loss(-2e4, -1e4, **forward)[0] == math.inf
    assert loss(-1e4, -1e4, **forward)[0] == pytest.approx(LOG2)
    assert loss(-1e4, -2e4, loss_type="hinge", **forward) == (0, 0, 0)
    exo = {"loss_type": "exo_pair", "label_smoothing": 0.25} | forward
    assert loss(-1e4, -2e4, **exo) == (pytest.approx(-math.log(0.75)), 0, 0)
    assert loss(-2e4, -1e4, **exo) == (pytest.approx(-math.log(0.25)), 0, 0)
    # s · exp(-x) with s = sigmoid(x / tau): below tau = 1 the sigmoid wins.
    assert loss(-1e4, 0.0, loss_type="discopop") == (1e4, -1, 1)
    assert loss(1e4, 0.0, loss_type="discopop") == (0, 0, 0)
    # 1 - sigmoid keeps its digits where the sigmoid is near 1.
    assert loss(30.0, -1e4, loss_type="apo_zero")[0] == pytest.approx(math.exp(-30.0), rel=1e-6)


def textbook(kind, divergence, c, r, beta, e, tau, n, m):
    """The papers' formulas as written, in 60-digit arithmetic whose exponent knows no overflow."""
    from mpmath import exp, log, mp, mpf

    with mp.workdps(60):
        c, r, beta, e, tau = mpf(c), mpf(r), mpf(beta), mpf(e), mpf(tau)

        def sigmoid(x):
            return 1 / (1 + exp(-x)) if x > 0 else 1 - 1 / (1 + exp(x))

        def log_sigmoid(x):
            return x - log(1 + exp(x)) if x < 0 else -log(1 + exp(-x))

        def score(x):
            return {"reverse_kl": x, "forward_kl": 1 - exp(-x), "js_divergence": log(2 * exp(x) / (1 + exp(x)))}[
                divergence
            ]

        x = beta * (score(c) - score(r))
        per_token = score(c) / n - score(r) / m
        if kind in ("sigmoid", "aot", "aot_unpaired"):
            return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)
        if kind == "sigmoid_norm":
            return -log_sigmoid(beta * per_token)
        if kind == "hinge":
            return max(mpf(0), 1 - x)
        if kind == "ipo":
            return (per_token - 1 / (2 * beta)) ** 2
        if kind == "exo_pair":
            p = sigmoid(x)
            return p * (log_sigmoid(x) - log(1 - e)) + sigmoid(-x) * (log_sigmoid(-x) - log(e))
        if kind == "robust":
            return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)
        if kind == "nca_pair":
            return -log_sigmoid(beta * c) - (log_sigmoid(-beta * c) + log_sigmoid(-beta * r)) / 2
        if kind == "bco_pair":
            return -log_sigmoid(beta * c) - log_sigmoid(-beta * r)
        if kind == "sppo_hard":
            return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2
        if kind == "apo_zero":
            return sigmoid(-beta * c) + sigmoid(beta * r)
        if kind == "apo_down":
            return sigmoid(beta * c) + sigmoid(-beta * (c - r))
        if kind == "discopop":
            return sigmoid(-x / tau) * -log_sigmoid(x) + sigmoid(x / tau) * exp(-x)
        raise AssertionError(kind)


@pytest.mark.parametrize(("kind", "divergence"), [case for case in CASES if case[0] != "sft" and case[1][0] != "a"])
def test_dpo_equals_the_papers_in_wide_arithmetic(kind, divergence):
    """Also where TRL's arithmetic ends in NaN; float32 too, by its own precision."""
    e, n, m = smoothing(kind), 2, 5
    lengths = {"chosen_lengths": torch.tensor([n]), "rejected_lengths": torch.tensor([m])}
    options = {"label_smoothing": e, "f_divergence_type": divergence, "beta": 0.125} | lengths
    for c in EXTREMES:
        for r in EXTREMES:
            truth = float(textbook(kind, divergence, c, r, 0.125, e, 0.05, n, m))
            for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
                x, y = (torch.tensor([v], dtype=dtype) for v in (c, r))
                result = dpo_loss(x, y, None, None, loss_type=kind, **options).losses
                expected = torch.tensor([truth], dtype=torch.float64).to(dtype)
                message = f"{kind} {divergence} {c} {r}: {result.item()} {truth}"
                torch.testing.assert_close(result, expected, rtol=rtol, atol=1e-37, msg=message)


def test_forward_kl_margin_against_wide_arithmetic():
    """Per token, where both scores overflow the lengths decide which is the larger."""
    c, r = torch.tensor([-1e4, -1e4]), torch.tensor([-1e4, -1e4])
    lengths = {"chosen_lengths": torch.tensor([2, 8]), "rejected_lengths": torch.tensor([4, 4])}
    result = dpo_loss(c, r, None, None, loss_type="sigmoid_norm", f_divergence_type="forward_kl", **lengths).losses
    assert result.tolist() == [math.inf, 0]


@given(
    kind=st.sampled_from(CASES),
    c=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=4),
    r=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=4),
    beta=st.sampled_from([1e-3, 0.1, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_nan_anywhere(kind, c, r, beta, dtype):
    n = min(len(c), len(r))
    x, y = (torch.tensor(v[:n], dtype=dtype, requires_grad=True) for v in (c, r))
    zero, lengths = torch.zeros(n, dtype=dtype), torch.arange(n)
    options = {"label_smoothing": smoothing(kind[0]), "f_divergence_type": kind[1], "beta": beta}
    options |= {"chosen_lengths": lengths, "rejected_lengths": lengths + 2}
    result = dpo_loss(x, y, zero, zero, loss_type=kind[0], **options).losses
    assert not result.isnan().any()
    result[result.isfinite()].sum().backward()
    for z in (x, y):
        assert z.grad is None or not z.grad.isnan().any()


@given(
    shift=st.floats(-1e3, 1e3, width=32),
    margin=st.floats(-1e3, 1e3, width=32),
    kind=st.sampled_from(["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "aot"]),
)
def test_losses_of_the_difference_ignore_a_common_shift(shift, margin, kind):
    length = torch.ones(1)
    options = {"loss_type": kind, "label_smoothing": smoothing(kind)}
    options |= {"chosen_lengths": length, "rejected_lengths": length}
    c, r = torch.tensor([shift + margin]).double(), torch.tensor([shift]).double()
    here = dpo_loss(c, r, None, None, **options).losses
    there = dpo_loss(c - r, r - r, None, None, **options).losses
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "divergence"), CASES)
def test_gradcheck(kind, divergence):
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    lengths = {"chosen_lengths": torch.tensor([1, 3, 2, 5]), "rejected_lengths": torch.tensor([2, 2, 1, 9])}
    options = {"label_smoothing": smoothing(kind), "f_divergence_type": divergence, "f_alpha_divergence_coef": 0.4}

    def f(*x):
        return dpo_loss(*x, beta=0.7, loss_type=kind, weights=None, **options, **lengths).losses

    assert torch.autograd.gradcheck(f, values)


def test_gradcheck_of_the_others():
    generator = torch.Generator().manual_seed(4)
    a, b = (-torch.rand(4, dtype=torch.float64, generator=generator) - 0.2 for _ in range(2))
    a.requires_grad_()
    b.requires_grad_()
    wanted = torch.tensor([True, False, True, False])
    for kind in CPO_LOSS_TYPES:
        for alpha in (0.0, 0.3, -0.3):
            assert torch.autograd.gradcheck(
                lambda x, y, kind=kind, alpha=alpha: cpo_loss(x, y, loss_type=kind, alpha=alpha).losses, (a, b)
            )
    assert torch.autograd.gradcheck(lambda x, y: orpo_loss(x, y).losses, (a, b))
    assert torch.autograd.gradcheck(lambda x, y: kto_loss(x, y, wanted, 0.1, undesirable_weight=0.7).losses, (a, b))


def test_the_table_names_a_source_for_each_and_formulas_are_elementwise():
    c, r, margin = torch.randn(3, 6).double().unbind()
    for kind, row in TABLE.items():
        assert "arXiv" in row.source, kind
        assert isinstance(row.margin, Margin)
        options = Options(beta=0.4, label_smoothing=0.1)
        whole = row.formula(c, r, margin, options)
        one_by_one = torch.stack([row.formula(c[i], r[i], margin[i], options) for i in range(6)])
        assert torch.equal(whole, one_by_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened(dtype):
    a, b = torch.tensor([-300.0], dtype=dtype), torch.tensor([-290.0], dtype=dtype)
    result = dpo_loss(a, b, b, a)
    assert result.losses.dtype == torch.float32
    torch.testing.assert_close(result.losses, -F.logsigmoid(torch.tensor([-2.0])))


def test_sequence_logps():
    log_probs = torch.tensor([[-1.0, math.nan, -2.0, -3.0], [-math.inf, -4.0, -5.0, math.nan]])
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])
    assert sequence_logps(log_probs, mask).tolist() == [-6, -9]
    assert sequence_logps(log_probs, mask, average=True).tolist() == [-2, -4.5]
    # The pair shares 2 tokens; the third of the chosen counts half.
    assert sequence_logps(log_probs, mask, ld_alpha=0.5).tolist() == [-4.5, -9]
    assert sequence_logps(log_probs, mask, ld_alpha=0.5, shared_lengths=torch.tensor([1, 1])).tolist() == [-3.5, -6.5]
    assert sequence_logps(log_probs, mask * 0, average=True).tolist() == [0, 0]
    x = log_probs.clone().requires_grad_()
    sequence_logps(x, mask, average=True).sum().backward()
    assert x.grad.isfinite().all() and x.grad[mask == 0].eq(0).all()


@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.25])
@pytest.mark.parametrize("kind", CPO_LOSS_TYPES)
def test_cpo_and_simpo_equal_trls(kind, alpha, smooth):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -torch.rand(2, 9, dtype=torch.float64, generator=generator) * 20
    chosen[:2], rejected[1:3] = -300.0, -300.0
    options = {"loss_type": kind, "alpha": alpha, "label_smoothing": smooth, "simpo_gamma": 0.7, "beta": 0.2}
    theirs = trl_cpo(chosen, rejected, **options)
    ours = cpo_loss(chosen, rejected, **options)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-12)
    if kind == "simpo":
        again = simpo_loss(chosen, rejected, beta=0.2, gamma=0.7, alpha=alpha, label_smoothing=smooth)
        assert torch.equal(again.losses, ours.losses)
    nll = torch.tensor(2.0).double()
    with_nll = cpo_loss(chosen, rejected, chosen_nll=nll, cpo_alpha=0.5, **options).losses
    torch.testing.assert_close(with_nll, ours.losses + 1.0, rtol=1e-12, atol=0)


def test_cpo_at_extremes():
    chosen, rejected = torch.tensor([EXTREMES] * 7).T.flatten().double(), torch.tensor(EXTREMES * 7).double()
    for kind in CPO_LOSS_TYPES:
        theirs, *_ = trl_cpo(chosen, rejected, loss_type=kind)
        torch.testing.assert_close(cpo_loss(chosen, rejected, loss_type=kind).losses, theirs, rtol=1e-6, atol=1e-12)
    x = torch.tensor([-1e4, -2e4, -1e4, -1.0], requires_grad=True)
    y = torch.tensor([-2e4, -1e4, -1e4, -1e4], requires_grad=True)
    losses = cpo_loss(x, y, loss_type="simpo", alpha=0.25, simpo_gamma=0.0).losses
    assert losses.tolist() == [0, math.inf, pytest.approx(LOG2), 0]
    losses[[0, 3]].sum().backward()
    assert x.grad.eq(0).all() and y.grad.eq(0).all()


def test_orpo_equals_trls():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((-torch.rand(9, generator=generator) * 8, -torch.tensor([1e-6, 1e-3, 50.0, 1e4])))
    chosen, rejected = values.repeat_interleave(13), values.repeat(13)
    theirs, chosen_rewards, _, ratio, log_odds = trl_orpo(chosen, rejected, beta=0.3)
    ours = orpo_loss(chosen, rejected, beta=0.3)
    torch.testing.assert_close(ours.losses, -theirs, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(ours.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(ours.log_odds.mean(), log_odds)
    torch.testing.assert_close(F.logsigmoid(ours.log_odds).mean(), ratio)
    # From the paper: odds = p / (1 - p), in float64.
    p, q = values[:9].double().exp(), values[:9].double().roll(1).exp()
    expected = -0.3 * F.logsigmoid((p / (1 - p)).log() - (q / (1 - q)).log())
    result = orpo_loss(values[:9].double(), values[:9].double().roll(1), beta=0.3).losses
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def test_orpo_of_certain_and_of_nearly_certain_completions():
    x = torch.tensor([0.0, -1.0, 0.0, -1e-30, -1e4], requires_grad=True)
    y = torch.tensor([-1.0, 0.0, 0.0, -1e-30, -1e4], requires_grad=True)
    losses = orpo_loss(x, y, beta=1.0).losses
    losses.sum().backward()
    assert losses[0] < 1e-30 and losses[1] > 80 and losses[2:].tolist() == pytest.approx([LOG2] * 3)
    assert x.grad.isfinite().all() and y.grad.isfinite().all()
    assert x.grad[3] == pytest.approx(-0.5 / 1e-30, rel=1e-5)  # d log odds / d log p = 1 / (1 - p)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("label", [[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_kto_equals_trls(kind, label, scale):
    generator = torch.Generator().manual_seed(1)
    log_probs = -torch.rand(5, 4, dtype=torch.float64, generator=generator) * scale
    mask = torch.ones(5, 4).bool()
    ref = log_probs.sum(-1) + torch.randn(5, dtype=torch.float64, generator=generator) * scale
    kl_policy = log_probs.roll(1, 0)
    kl_ref = kl_policy.sum(-1) - 0.1 - torch.randn(5, dtype=torch.float64, generator=generator).abs()
    label = torch.tensor(label).bool()
    options = {"loss_type": kind, "beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    a, b = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
    theirs, metrics = trl_kto(a, mask, ref, label, (kl_policy, kl_ref), **options)
    kl = kto_kl(kl_policy.sum(-1), kl_ref)
    assert kl > 0
    ours = kto_loss(sequence_logps(b, mask), ref, label, kl, **options)
    torch.testing.assert_close(ours.losses.mean(), theirs, rtol=1e-9, atol=1e-15)
    theirs.backward()
    ours.losses.mean().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-15)
    for name, rows in (("rewards/chosen", label), ("rewards/rejected", ~label)):
        if rows.any():
            assert ours.rewards[rows].mean().item() == pytest.approx(metrics[name], rel=1e-9)
    assert kto_kl(kl_ref, kl_policy.sum(-1)) == 0


COMPILED = [(kind, "reverse_kl") for kind in LOSS_TYPES] + [("sigmoid_norm", d) for d in F_DIVERGENCES[1:]]


@pytest.mark.slow_matrix
@pytest.mark.parametrize(("kind", "divergence"), COMPILED)
def test_compiles_whole_and_under_func_grad(kind, divergence):
    log_probs, mask, ref = random_pairs(torch.float32)
    options = {"label_smoothing": smoothing(kind), "f_divergence_type": divergence}

    def f(x):
        return ours_on(kind, x, mask, ref, **options).losses.mean()

    assert_compiles(f, log_probs)


def assert_compiles(f, x, both=True):
    """One graph under compile, and the same gradient by backward, func.grad, and `both` compiled: torch 2.13 cannot
    trace an autograd.Function under func.grad."""
    torch._dynamo.reset()
    y = x.clone().requires_grad_()
    expected = f(y)
    expected.backward()
    z = x.clone().requires_grad_()
    result = torch.compile(f, fullgraph=True, backend="aot_eager")(z)
    result.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(z.grad, y.grad)
    torch.testing.assert_close(torch.func.grad(f)(x), y.grad)
    if both:
        torch.testing.assert_close(torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(x), y.grad)


def test_a_mistake_is_named_under_compile():
    loss = torch.compile(lambda *x: dpo_loss(*x, loss_type="ipo").losses, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="chosen_lengths must be given for loss_type 'ipo'"):
        loss(*torch.zeros(4, 2))


@pytest.mark.slow_matrix
@pytest.mark.parametrize("name", ["cpo", "alphapo", "simpo", "orpo", "kto", "wpo"])
def test_the_others_compile_whole_and_under_func_grad(name):
    log_probs, mask, ref = random_pairs(torch.float32)
    sums = torch.cat(ref)
    desirable = torch.arange(10) % 3 == 0
    squares = torch.full_like(log_probs, -0.5)

    def f(x):
        logps = sequence_logps(x - 0.1, mask)
        halves = (sequence_logps(x, mask, average=True) - 0.1).chunk(2)
        if name == "kto":
            return kto_loss(logps, sums, desirable, kto_kl(logps, sums)).losses.mean()
        if name == "wpo":
            return ours_on("sigmoid", x, mask, ref, weights=wpo_weights(x, squares, mask), ld_alpha=0.5).losses.mean()
        if name == "alphapo":
            return cpo_loss(*halves, loss_type="simpo", alpha=0.25).losses.mean()
        loss = {"cpo": cpo_loss, "simpo": simpo_loss, "orpo": orpo_loss}[name]
        return loss(*halves).losses.mean()

    assert_compiles(f, log_probs)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"beta": 0}, UserError, "beta must be a positive finite number, got 0"),
        ({"loss_type": "dpo"}, UserError, "loss_type must be one of sigmoid, hinge, ipo"),
        ({"loss_type": []}, UserError, "loss_type must name at least one loss, got none"),
        (
            {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]},
            UserError,
            "loss_weights must have one weight per loss type, 2, got 1",
        ),
        ({"loss_type": "exo_pair"}, UserError, "label_smoothing must be above 0 for loss_type 'exo_pair'"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            UserError,
            "label_smoothing must be below 0.5 for loss_type 'robust', got 0.5",
        ),
        ({"label_smoothing": 1.0}, UserError, "label_smoothing must be in [0, 1), got 1.0"),
        ({"f_divergence_type": "kl"}, UserError, "f_divergence_type must be one of reverse_kl, forward_kl"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
            UserError,
            "f_divergence_type must be 'reverse_kl' for loss_type 'nca_pair'",
        ),
        (
            {"loss_type": "aot", "f_divergence_type": "forward_kl"},
            UserError,
            "f_divergence_type must be 'reverse_kl' for loss_type 'aot'",
        ),
        ({"loss_type": "ipo"}, UserError, "chosen_lengths must be given for loss_type 'ipo'"),
        ({"loss_type": "sft"}, UserError, "chosen_lengths must be given for loss_type 'sft'"),
        ({"loss_type": "aot", "weights": torch.ones(2)}, UserError, "weights must be None for aot"),
        ({"weights": torch.ones(3)}, UserError, "weights must have shape (2,), got (3,)"),
        ({"discopop_tau": -1.0}, UserError, "discopop_tau must be a positive finite number, got -1.0"),
        ({"policy_rejected_logps": torch.zeros(3)}, UserError, "must have one shape (B,), got (3,)"),
        ({"policy_chosen_logps": torch.zeros(2, dtype=torch.int64)}, TypeError, "policy_chosen_logps must be floating"),
        ({"policy_chosen_logps": [0.0, 0.0]}, TypeError, "policy_chosen_logps must be a torch.Tensor, got list"),
        ({"ref_chosen_logps": None}, UserError, "must both be tensors or both None"),
    ],
)
def test_mistakes_are_reported_in_one_line(change, error, says):
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(error) as raised:
        dpo_loss(**(dict.fromkeys(names, torch.zeros(2)) | change))
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loss_type": "aot"}, UserError, "loss_type must be one of sigmoid, hinge, ipo"),
        ({"beta": -1}, UserError, "beta must be a positive finite number, got -1"),
        ({"loss_type": "exo_pair"}, UserError, "label_smoothing must be above 0 for loss_type 'exo_pair'"),
        (
            {"log_probs": torch.zeros(3, 2)},
            UserError,
            "log_probs must have shape (2B, T), chosen then rejected, got (3, 2)",
        ),
        ({"log_probs": torch.zeros(2, 2).long()}, TypeError, "log_probs must be float32, float64, bfloat16 or float16"),
        ({"mask": torch.ones(2, 3)}, UserError, "mask.shape must equal log_probs.shape, got (2, 3) and (2, 2)"),
        ({"ref_log_probs": torch.ones(1)}, UserError, "ref_log_probs must have shape (2, 2) or (2,), got (1,)"),
        ({"ref_log_probs": torch.ones(2, device="meta")}, UserError, "ref_log_probs must be on log_probs' device"),
    ],
)
def test_mistakes_with_pairwise_loss_are_reported(change, error, says):
    good = {"log_probs": torch.zeros(2, 2), "ref_log_probs": None, "mask": torch.ones(2, 2)}
    with pytest.raises(error) as raised:
        pairwise_loss(**good | change)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_mistakes_with_the_others_are_reported():
    x = torch.zeros(3)
    with pytest.raises(UserError, match=r"ld_alpha must be in \[0, 1\], got 2"):
        sequence_logps(torch.zeros(2, 3), torch.ones(2, 3), ld_alpha=2)
    with pytest.raises(UserError, match="average must be False if ld_alpha is given"):
        sequence_logps(torch.zeros(2, 3), torch.ones(2, 3), ld_alpha=0.5, average=True)
    with pytest.raises(UserError, match="mask must have an even number of rows, chosen then rejected, got 3"):
        sequence_logps(torch.zeros(3, 3), torch.ones(3, 3), ld_alpha=0.5)
    with pytest.raises(UserError, match=r"log_probs and mask must have one shape \(rows, tokens\), got"):
        sequence_logps(torch.zeros(3, 3), torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"desirable must be bool, got torch.float32"):
        kto_loss(x, x, x)
    with pytest.raises(UserError, match="loss_type must be one of kto, apo_zero_unpaired, got 'bco'"):
        kto_loss(x, x, x > 0, loss_type="bco")
    with pytest.raises(UserError, match="loss_type must be one of sigmoid, hinge, ipo, simpo, got 'sft'"):
        cpo_loss(x, x, loss_type="sft")
    with pytest.raises(UserError, match="beta must be a positive finite number, got nan"):
        orpo_loss(x, x, beta=math.nan)
