import pytest
import torch
from tiny import tiny_causal_lm, tiny_tokenizer
from trl_losses import as_chosen_rejected, dpo_batch, dpo_trainer, trl_cpo_on, trl_dpo, trl_orpo_on

from fastalign import UserError
from fastalign.losses import (
    LinearCPOLoss,
    LinearDPOLoss,
    LinearKTOLoss,
    LinearORPOLoss,
    LinearSimPOLoss,
    dpo_loss,
    kto_kl,
    kto_loss,
    sequence_logps,
    shift_labels,
)

B, T, H, V = 3, 7, 8, 29


def problem(dtype=torch.float64, seed=0):
    """hidden (2B, T, H), weight (V, H), labels (2B, T) with prompts, padding, a length of 1 and a row without
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * B, T, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, (2 * B, T), generator=generator)
    for row, (start, stop) in enumerate([(2, 7), (3, 4), (0, 5), (2, 6), (3, 3), (1, 7)]):
        labels[row, :start] = labels[row, stop:] = -100
    return hidden, weight, labels


def plain_log_probs(hidden, weight, labels, bias=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def head_of(model, batch):
    """What the modules take from a transformers model: its last hidden states, its head and the aligned labels."""
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden, model.lm_head.weight, shift_labels(batch["input_ids"], batch["completion_mask"])


def gradient(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def assert_metrics(ours, theirs, names):
    for name in names:
        assert ours[name].item() == pytest.approx(theirs[name], rel=2e-5, abs=2e-6), name
        assert ours[name].ndim == 0 and not ours[name].requires_grad


PAIR_METRICS = [f"rewards/{x}" for x in ("chosen", "rejected", "accuracies", "margins")]
PAIR_METRICS += ["logps/chosen", "logps/rejected"]
TOKEN_METRICS = ["entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"]
SETTINGS = [
    {},
    {"loss_type": "ipo"},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "sigmoid_norm", "f_divergence_type": "forward_kl", "beta": 0.02},
    {"ld_alpha": 0.3},
    {"loss_type": ["hinge", "sft"], "ld_alpha": 0.3},
    {"loss_type": "robust", "label_smoothing": 0.1, "use_weighting": True},
    {"loss_type": "aot"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_dpo_equals_trls_trainer_on_a_model(options):
    """The whole of DPOTrainer._compute_loss, both models run: loss, gradients of head and body, and metrics."""
    trainer, batch = dpo_trainer(), dpo_batch()
    if "hinge" in options.get("loss_type", ()):
        options = options | {"beta": 0.01}  # inside the margin
    hidden, weight, labels = head_of(trainer.model, batch)
    ref_hidden, ref_weight, _ = head_of(trainer.ref_model, batch)
    ours, metrics = LinearDPOLoss(**options, token_metrics=True)(
        hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight
    )
    theirs, their_metrics = trl_dpo(**({"loss_type": "sigmoid"} | options), batch=batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_metrics(metrics, their_metrics, PAIR_METRICS + TOKEN_METRICS)
    parameters = weight, trainer.model.model.embed_tokens.weight
    for x, y in zip(gradient(ours, *parameters), gradient(theirs, *parameters), strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * y.abs().max().item() + 1e-9)


def test_the_reference_as_log_probs_as_hidden_states_and_none():
    hidden, weight, labels = problem()
    ref_hidden, ref_weight, _ = problem(seed=1)
    ref_hidden.requires_grad_()
    hidden.requires_grad_()
    mask = labels != -100
    policy = sequence_logps(plain_log_probs(hidden, weight, labels), mask).chunk(2)
    ref = sequence_logps(plain_log_probs(ref_hidden, ref_weight, labels), mask).chunk(2)
    module = LinearDPOLoss(beta=0.3)
    expected = dpo_loss(*policy, *ref, beta=0.3).losses.mean()
    by_hidden, metrics = module(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
    by_logps, same = module(hidden, weight, labels, ref_logps=ref)
    torch.testing.assert_close(by_hidden, expected)
    torch.testing.assert_close(by_logps, expected)
    assert metrics.keys() == same.keys() == set(PAIR_METRICS)
    none, _ = module(hidden, weight, labels)
    torch.testing.assert_close(none, dpo_loss(*policy, None, None, beta=0.3).losses.mean())
    by_hidden.backward()
    assert ref_hidden.grad is None  # the reference takes no gradient
    assert hidden.grad[mask].abs().sum() > 0 and (hidden.grad[~mask] == 0).all()


def test_head_options_bias_and_adapter():
    hidden, weight, labels = problem()
    bias = torch.randn(V, dtype=torch.float64)
    a, b = torch.randn(2, H, dtype=torch.float64), torch.randn(V, 2, dtype=torch.float64, requires_grad=True)
    mask = labels != -100
    policy = sequence_logps(plain_log_probs(hidden / 0.5, weight + 0.7 * b @ a, labels, bias / 0.5), mask).chunk(2)
    module = LinearDPOLoss(temperature=0.5, ignore_index=-1)
    result, _ = module(hidden, weight, labels.masked_fill(~mask, -1), bias=bias, adapter=(a, b, 0.7))
    expected = dpo_loss(*policy, None, None).losses.mean()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*(gradient(x, b)[0] for x in (result, expected)))
    capped, _ = LinearDPOLoss(softcap=3.0, logit_scale=0.5)(hidden, weight, labels)
    logits = 3 * torch.tanh(0.5 * hidden @ weight.T / 3)
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(capped, dpo_loss(*sequence_logps(log_probs, mask).chunk(2), None, None).losses.mean())


def test_a_frozen_head_and_kept_tiles_change_nothing(each_backend):
    hidden, weight, labels = problem()
    hidden.requires_grad_()
    learned = weight.clone().requires_grad_()
    result = [
        LinearDPOLoss(loss_type=["sigmoid", "sft"], **options)(hidden, w, labels)[0]
        for options, w in (({}, learned), ({}, weight), ({"memory_budget": 1 << 20}, learned))
    ]
    grads = [gradient(loss, hidden)[0] for loss in result]
    for loss, grad in zip(result[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, result[0])
        torch.testing.assert_close(grad, grads[0])
    torch.testing.assert_close(*(gradient(result[i], learned)[0] for i in (0, 2)))


def test_gradcheck_in_float64():
    hidden, weight, labels = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    ref_logps = (torch.full((B,), -9.0).double(), torch.full((B,), -8.0).double())
    options = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "label_smoothing": 0.1}
    module = LinearDPOLoss(**options)
    assert torch.autograd.gradcheck(lambda h, w: module(h, w, labels, ref_logps=ref_logps)[0], (hidden, weight))
    for module in (LinearCPOLoss(), LinearSimPOLoss(alpha=0.1)):
        assert torch.autograd.gradcheck(lambda h, w, m=module: m(h, w, labels)[0], (hidden, weight))


@pytest.fixture(scope="module")
def lm():
    return tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "hinge", "cpo_alpha": 0.5, "beta": 0.02},
        {"loss_type": "ipo", "cpo_alpha": 0.0},
        {"loss_type": "simpo", "simpo_gamma": 0.8, "label_smoothing": 0.1, "beta": 2.0},
        {"loss_type": "simpo", "alpha": 0.2, "cpo_alpha": 0.3},
    ],
    ids=str,
)
def test_cpo_equals_trls_trainer_on_a_model(lm, options):
    batch = dpo_batch()
    hidden, weight, labels = head_of(lm, batch)
    ours, metrics = LinearCPOLoss(**options)(hidden, weight, labels)
    theirs, their_metrics = trl_cpo_on(lm, as_chosen_rejected(batch), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    nll = [] if options.get("cpo_alpha") == 0 else ["nll_loss"]
    assert_metrics(metrics, their_metrics, PAIR_METRICS + nll)
    x, y = gradient(ours, weight)[0], gradient(theirs, weight)[0]
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * y.abs().max().item())


def test_simpo_is_cpo_without_the_likelihood_term(lm):
    batch = dpo_batch()
    arguments = head_of(lm, batch)
    ours, metrics = LinearSimPOLoss(beta=2.0, gamma=0.8, alpha=0.1)(*arguments)
    alphapo, _ = LinearCPOLoss(loss_type="alphapo", beta=2.0, simpo_gamma=0.8, alpha=0.1)(*arguments)
    theirs, _ = trl_cpo_on(
        lm, as_chosen_rejected(batch), loss_type="simpo", beta=2.0, simpo_gamma=0.8, alpha=0.1, cpo_alpha=0.0
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(alphapo, ours) and "nll_loss" not in metrics


def test_orpo_equals_trls_trainer_on_a_model(lm):
    batch = dpo_batch()
    hidden, weight, labels = head_of(lm, batch)
    whole = shift_labels(batch["input_ids"], batch["attention_mask"])[: len(labels) // 2]
    ours, metrics = LinearORPOLoss(beta=0.4)(hidden, weight, labels, nll_labels=whole)
    theirs, their_metrics = trl_orpo_on(lm, as_chosen_rejected(batch), beta=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_metrics(metrics, their_metrics, [*PAIR_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen"])
    x, y = gradient(ours, weight)[0], gradient(theirs, weight)[0]
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * y.abs().max().item())
    on_completions, metrics = LinearORPOLoss(beta=0.4)(hidden, weight, labels)
    half, mask = len(labels) // 2, labels != -100
    log_probs = plain_log_probs(hidden, weight, labels)[:half]
    torch.testing.assert_close(metrics["nll_loss"], -log_probs[mask[:half]].mean())
    assert on_completions != ours


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_is_kto_loss_on_the_heads_log_probs(kind):
    hidden, weight, labels = problem()
    ref_hidden, ref_weight, _ = problem(seed=1)
    kl_hidden, ref_kl_hidden = problem(seed=2)[0], problem(seed=3)[0]
    hidden.requires_grad_()
    kl_hidden.requires_grad_()
    desirable = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    mask = labels != -100
    sums = [
        sequence_logps(plain_log_probs(h, w, labels), mask)
        for h, w in ((hidden, weight), (ref_hidden, ref_weight), (kl_hidden, weight), (ref_kl_hidden, ref_weight))
    ]
    options = {"beta": 0.2, "desirable_weight": 1.5, "loss_type": kind}
    kl = kto_kl(*sums[2:])
    assert kl > 0
    expected = kto_loss(sums[0], sums[1], desirable, kl, **options)
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    for more in (
        {"kl": kl, **reference},
        {"kl_hidden": kl_hidden, "kl_labels": labels, "ref_kl_hidden": ref_kl_hidden, **reference},
        {"kl": kl, "ref_logps": sums[1]},
    ):
        result, metrics = LinearKTOLoss(**options, token_metrics=True)(hidden, weight, labels, desirable, **more)
        torch.testing.assert_close(result, expected.losses.mean())
        torch.testing.assert_close(metrics["rewards/chosen"], expected.rewards[desirable].mean())
        torch.testing.assert_close(metrics["rewards/rejected"], expected.rewards[~desirable].mean())
        torch.testing.assert_close(metrics["logps/chosen"], sums[0].detach()[desirable].mean())
        torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
        torch.testing.assert_close(metrics["kl"], kl if kind == "kto" else torch.zeros_like(kl))
        logits = (hidden @ weight.T).detach()
        torch.testing.assert_close(metrics["logits/rejected"], logits[mask & ~desirable[:, None]].mean())
        torch.testing.assert_close(*(gradient(x, hidden)[0] for x in (result, expected.losses.mean())))
        result.backward()
        assert kl_hidden.grad is None


MODULES = {
    "dpo": LinearDPOLoss(token_metrics=True),
    "mixture": LinearDPOLoss(loss_type=["aot_unpaired", "sft"], loss_weights=[1.0, 0.1]),
    "divergence": LinearDPOLoss(loss_type="sigmoid_norm", f_divergence_type="forward_kl"),
    "wpo": LinearDPOLoss(use_weighting=True, ld_alpha=0.5),
    "cpo": LinearCPOLoss(),
    "simpo": LinearSimPOLoss(alpha=0.2),
    "orpo": LinearORPOLoss(),
    "kto": LinearKTOLoss(),
}


@pytest.mark.slow_matrix
@pytest.mark.parametrize("name", MODULES)
def test_compiles_whole_and_under_func_grad(name):
    hidden, weight, labels = problem(torch.float32)
    labels[4, 3] = 5
    torch._dynamo.reset()
    module = MODULES[name]
    more = (torch.arange(2 * B) % 2 == 0,) if name == "kto" else ()
    keywords = {"kl": 0.5, "ref_logps": torch.full((2 * B,), -9.0)} if name == "kto" else {}

    def f(h, w):
        return module(h, w, labels, *more, **keywords)

    def plain(h, w):
        return f(h, w)[0]

    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected, metrics = f(*inputs)
    expected_grads = gradient(expected, *inputs)
    result, compiled_metrics = torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(compiled_metrics, metrics)
    for grads in (gradient(result, *inputs), torch.func.grad(plain, argnums=(0, 1))(hidden, weight)):
        for x, y in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(x, y)


def test_checkpointing_autocast_and_bfloat16():
    hidden, weight, labels = problem(torch.float32)
    x = hidden.clone().requires_grad_()
    module = LinearDPOLoss()
    expected = module(x, weight, labels)[0]
    again = torch.utils.checkpoint.checkpoint(lambda h: module(h, weight, labels)[0], x, use_reentrant=False)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(*(gradient(loss, x)[0] for loss in (again, expected)))
    narrow, metrics = module(hidden.bfloat16(), weight.bfloat16(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        auto, _ = module(hidden, weight, labels)
    assert narrow.dtype == auto.dtype == metrics["logps/chosen"].dtype == torch.float32
    torch.testing.assert_close(narrow, expected.detach(), rtol=0.05, atol=0.02)
    torch.testing.assert_close(auto, expected.detach(), rtol=0.05, atol=0.02)


def test_shift_labels():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    assert shift_labels(ids, mask).tolist() == [[6, 7, -100, -100], [-100, -100, 4, -100]]
    assert shift_labels(ids, mask, ignore_index=-1)[0].tolist() == [6, 7, -1, -1]
    with pytest.raises(UserError, match="input_ids and completion_mask must have one shape"):
        shift_labels(ids, mask[:, 1:])


def test_modules_say_what_they_are():
    assert "beta" in repr(LinearDPOLoss(beta=0.25)) and "0.25" in repr(LinearDPOLoss(beta=0.25))


def test_mistakes_are_reported():
    hidden, weight, labels = problem()
    logps = (torch.zeros(B), torch.zeros(B))
    dpo = LinearDPOLoss()
    with pytest.raises(UserError, match="hidden must have an even number of rows, chosen then rejected, got 5"):
        dpo(hidden[:5], weight, labels[:5])
    with pytest.raises(UserError, match=r"hidden must be \(rows, tokens, H\) and labels \(rows, tokens\), got"):
        dpo(hidden, weight, labels[:, 1:])
    with pytest.raises(UserError, match="ref_hidden and ref_logps must not both be given"):
        dpo(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight, ref_logps=logps)
    with pytest.raises(UserError, match="ref_weight must be given with ref_hidden"):
        dpo(hidden, weight, labels, ref_hidden=hidden)
    with pytest.raises(UserError, match=r"nll_labels must have shape \(3, 7\), got \(6, 7\)"):
        LinearORPOLoss()(hidden, weight, labels, nll_labels=labels)
    with pytest.raises(UserError, match="kl, or kl_hidden with kl_labels and ref_kl_hidden, must be given"):
        LinearKTOLoss()(hidden, weight, labels, torch.ones(2 * B).bool(), ref_logps=torch.zeros(2 * B))
    with pytest.raises(TypeError, match="temperatur"):
        LinearDPOLoss(temperatur=2.0)
