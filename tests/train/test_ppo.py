"""PPO steps against a plain float64 reference written from the papers, and what must not change a step."""

import math

import numpy as np
import pytest
import torch
from ppo_setup import lora, policy, rollouts, snapshot, trainer

from fastalign.models import Verdict
from fastalign.train import kl
from fastalign.train.kl import AdaptiveKLController, FixedKLController
from fastalign.train.ppo_stats import RunningMoments


def plain_forward(model, query, response):
    """Full logits: log-probs, values and the whole distribution at each response token of one unpadded sequence."""
    ids = torch.cat((query, response))[None]
    out = model.pretrained_model(ids, output_hidden_states=True)
    logp = torch.log_softmax(out.logits[0], -1)
    summary = model.v_head.summary
    values = (out.hidden_states[-1][0] @ summary.weight.T + summary.bias)[:, 0]
    at = torch.arange(len(query) - 1, len(ids[0]) - 1)
    return logp[at, response], values[at], logp[at]


def plain_gae(rewards, values, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t, as it is written (arXiv 1506.02438, eq. 16)."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return torch.stack([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])


def plain_whiten(rows, shift=True):
    flat = torch.cat(rows)
    mean, std = flat.mean(), (flat.var(unbiased=True) + 1e-8).sqrt()
    return [(row - mean) / std + (0 if shift else mean) for row in rows]


def plain_step(model, reference, queries, responses, scores, masks, config):
    """The rollouts' figures, and a function that gives the loss of the model as it is, its parts and ratios."""
    pairs = list(zip(queries, responses, strict=True))
    kept = [torch.ones(len(r), dtype=torch.bool) for r in responses] if masks is None else [m.bool() for m in masks]
    with torch.no_grad():
        old, values, dist = zip(*(plain_forward(model, q, r) for q, r in pairs), strict=True)
        ref, _, ref_dist = zip(*(plain_forward(reference, q, r) for q, r in pairs), strict=True)
    kls, rewards = [], []
    for i, keep in enumerate(kept):
        d = (old[i] - ref[i])[keep]
        full = (dist[i].exp() * (dist[i] - ref_dist[i])).sum(-1)[keep]
        kl = {"kl": d, "abs": d.abs(), "mse": 0.5 * d**2, "full": full}[config.kl_penalty]
        reward = -config.init_kl_coef * kl
        reward[-1] += scores[i].double()
        kls.append(kl)
        rewards.append(reward)
    if config.whiten_rewards:
        rewards = plain_whiten(rewards, shift=False)
    values = [v[keep] for v, keep in zip(values, kept, strict=True)]
    raw = [plain_gae(r, v, config.gamma, config.lam) for r, v in zip(rewards, values, strict=True)]
    returns = [a + v for a, v in zip(raw, values, strict=True)]
    advantages = plain_whiten(raw)
    old = torch.cat([x[k] for x, k in zip(old, kept, strict=True)])
    flat_values, flat_returns, flat_advantages = torch.cat(values), torch.cat(returns), torch.cat(advantages)

    def loss():
        new, vpred, _ = zip(*(plain_forward(model, q, r) for q, r in pairs), strict=True)
        new = torch.cat([x[k] for x, k in zip(new, kept, strict=True)])
        vpred = torch.cat([x[k] for x, k in zip(vpred, kept, strict=True)])
        ratio = (new - old).exp()
        surrogate = torch.min(
            ratio * flat_advantages, ratio.clamp(1 - config.cliprange, 1 + config.cliprange) * flat_advantages
        )
        near = flat_values + (vpred - flat_values).clamp(-config.cliprange_value, config.cliprange_value)
        errors = torch.max((vpred - flat_returns) ** 2, (near - flat_returns) ** 2)
        policy_loss, value_loss = -surrogate.mean(), 0.5 * errors.mean()
        return policy_loss + config.vf_coef * value_loss, policy_loss, value_loss, ratio, new, vpred

    figures = {"kl": kls, "advantages": flat_advantages, "returns": flat_returns, "values": flat_values, "old": old}
    return figures, loss


CASES = {
    "kl": {},
    "abs": {"kl_penalty": "abs", "gamma": 0.9, "lam": 0.7},
    "mse": {"kl_penalty": "mse", "whiten_rewards": True},
    "full": {"kl_penalty": "full", "init_kl_coef": 0.5, "vf_coef": 0.7},
    "masks": {"gamma": 0.95},
    "tight clips": {"ppo_epochs": 3, "cliprange": 0.01, "cliprange_value": 0.005},
    "gpt2": {"ppo_epochs": 2},
    "mistral": {"ppo_epochs": 2, "kl_penalty": "full"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_plain_float64_reference(case):
    kind = case if case in ("gpt2", "mistral") else "llama"
    model, reference = policy(kind), policy(kind)
    with torch.no_grad():  # a reference somewhere else
        for p in reference.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype))
    queries, responses, scores = rollouts()
    masks = None
    if case == "masks":
        masks = [torch.ones(len(r)) for r in responses]
        masks[2][-1] = 0  # the score goes to the last token that counts
        masks[3][1] = 0
    rate = 2e-4 if "ppo_epochs" in CASES[case] else 1.0
    run = trainer(model, reference, rate=rate, **CASES[case])
    twin = policy(kind)
    figures, loss = plain_step(twin, reference, queries, responses, scores, masks, run.config)
    lines, optimizer = [], torch.optim.SGD(twin.parameters(), lr=rate)
    for _ in range(run.config.ppo_epochs):
        total, *parts = loss()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        lines.append([total.detach(), *(x.detach() for x in parts)])
    before = snapshot(model)
    stats = run.step(queries, responses, scores, masks)

    close = dict(rtol=1e-7, atol=1e-9)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **close, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    mean = lambda i: float(torch.stack([t[i] for t in lines]).mean())  # noqa: E731
    apart = lambda t: t[4] - figures["old"]  # noqa: E731
    expected = {
        "objective/kl": float(torch.stack([k.sum() for k in figures["kl"]]).mean()),
        "objective/kl_coef": run.config.init_kl_coef,
        "ppo/mean_non_score_reward": -run.config.init_kl_coef * float(torch.cat(figures["kl"]).mean()),
        "ppo/mean_scores": float(torch.stack(scores).mean()),
        "ppo/std_scores": float(torch.stack(scores).std()),
        "ppo/loss/total": mean(0),
        "ppo/loss/policy": mean(1),
        "ppo/loss/value": mean(2),
        "ppo/policy/approxkl": float(np.mean([0.5 * float((apart(t) ** 2).mean()) for t in lines])),
        "ppo/policy/policykl": float(np.mean([-float(apart(t).mean()) for t in lines])),
        "ppo/policy/advantages_mean": float(figures["advantages"].mean()),
        "ppo/returns/mean": float(figures["returns"].mean()),
        "ppo/returns/var": float(figures["returns"].var()),
        "ppo/val/mean": float(figures["values"].mean()),
        "ppo/val/var": float(figures["values"].var()),
        "ppo/val/vpred": float(np.mean([float(t[5].mean()) for t in lines])),
        "ppo/val/error": float(np.mean([float(((t[5] - figures["returns"]) ** 2).mean()) for t in lines])),
        "ppo/learning_rate": rate,
    }
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-6, abs=1e-8), name
    np.testing.assert_allclose(stats["ppo/policy/advantages"], figures["advantages"].numpy(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(stats["ppo/policy/ratio"].mean(), mean(3), rtol=1e-7)
    assert stats["ppo/val/var_explained"] == pytest.approx(1 - expected["ppo/val/error"] / expected["ppo/returns/var"])
    if case == "tight clips":
        assert stats["ppo/policy/clipfrac"] > 0 and stats["ppo/val/clipfrac"] > 0


def test_accumulation_and_mini_batches_do_not_change_the_gradient():
    result = []
    for mini, accumulation in ((4, 1), (1, 4), (2, 2)):
        model = policy()
        run = trainer(model, mini_batch_size=mini, gradient_accumulation_steps=accumulation)
        stats = run.step(*rollouts())
        result.append((snapshot(model), stats))
    for weights, stats in result[1:]:
        for name, x in weights.items():
            torch.testing.assert_close(x, result[0][0][name], rtol=1e-9, atol=1e-11)
        for name in ("ppo/loss/total", "ppo/policy/entropy", "objective/kl", "ppo/returns/mean"):
            assert stats[name] == pytest.approx(result[0][1][name], rel=1e-9, abs=1e-12)


def test_an_adapted_policy_is_its_own_reference():
    model, twin = policy(peft=lora()), policy(peft=lora())
    with torch.no_grad():
        for m in (model, twin):
            for name, p in m.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) * 0.1)
    bare = policy()
    bare.v_head.load_state_dict(model.v_head.state_dict())
    queries, responses, scores = rollouts()
    for penalty in ("kl", "full"):
        one = trainer(model, None, rate=0.0, kl_penalty=penalty).step(queries, responses, scores)
        two = trainer(twin, bare, rate=0.0, kl_penalty=penalty).step(queries, responses, scores)
        assert abs(one["objective/kl"]) > 1e-3
        assert one["objective/kl"] == pytest.approx(two["objective/kl"], rel=1e-9)
        np.testing.assert_allclose(one["objective/ref_logprobs"], two["objective/ref_logprobs"], rtol=1e-9, atol=1e-12)
    before = snapshot(model)
    trainer(model, None).step(queries, responses, scores)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora" in n or n.startswith("v_head") for n in moved)


def test_the_logits_are_never_asked_for(monkeypatch):
    model = policy()
    run = trainer(model)

    def refuse(*args, **kwargs):
        raise AssertionError("the head ran on hidden states")

    monkeypatch.setattr("fastalign.models.scoring.fused_head", lambda model: Verdict(True))  # its trial asks for them
    monkeypatch.setattr(model.causal_lm.lm_head, "forward", refuse)
    run.step(*rollouts())


def test_a_first_step_has_ratio_one_with_dropout_in_the_model():
    model = policy("gpt2")
    assert any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    stats = trainer(model, rate=0.0).step(*rollouts())
    np.testing.assert_allclose(stats["ppo/policy/ratio"], 1, atol=1e-12)
    noisy = trainer(policy("gpt2"), rate=0.0, disable_dropout=False).step(*rollouts())
    assert abs(noisy["ppo/policy/ratio"] - 1).max() > 1e-3


def test_gradient_checkpointing_gives_the_same_step():
    result = []
    for checkpointing in (False, True):
        model = policy("gpt2")
        trainer(model, gradient_checkpointing=checkpointing).step(*rollouts())
        result.append(snapshot(model))
    for name, x in result[0].items():
        torch.testing.assert_close(x, result[1][name], rtol=1e-9, atol=1e-11)


def test_kl_controllers():
    fixed, adaptive = FixedKLController(0.3), AdaptiveKLController(0.2, target=6.0, horizon=1000.0)
    fixed.update(50.0, 100)
    assert fixed.value == 0.3
    value = 0.2
    for current, steps in ((9.0, 128), (6.3, 64), (1.0, 32), (6.0, 256)):  # clipped up, inside, clipped down, at target
        adaptive.update(current, steps)
        value *= 1 + max(-0.2, min(0.2, (current - 6.0) / 6.0)) * steps / 1000
        assert adaptive.value == pytest.approx(value, rel=1e-12)


def test_the_controller_follows_the_steps():
    run = trainer(policy(), policy(seed=1), rate=0.0, target=1.0, horizon=100.0)
    stats = run.step(*rollouts())
    wanted = 0.2 * (1 + float(np.clip(stats["objective/kl"] - 1, -0.2, 0.2)) * 4 / 100)
    assert run.kl_ctl.value == pytest.approx(wanted) and stats["objective/kl_coef"] == 0.2
    assert run.step(*rollouts())["objective/kl_coef"] == pytest.approx(wanted)
    fixed = trainer(policy(), policy(seed=1), rate=0.0, adap_kl_ctrl=False)
    fixed.step(*rollouts())
    assert fixed.kl_ctl.value == 0.2


def test_the_exact_kl_in_parts(monkeypatch):
    monkeypatch.setattr(kl, "TOKENS_AT_ONCE", 2)
    stats = trainer(policy(), policy(seed=1), kl_penalty="full", rate=0.0).step(*rollouts())
    monkeypatch.undo()
    whole = trainer(policy(), policy(seed=1), kl_penalty="full", rate=0.0).step(*rollouts())
    np.testing.assert_allclose(stats["objective/kl_dist"], whole["objective/kl_dist"], rtol=1e-12)
    assert (whole["objective/kl_dist"] > 0).all()


def test_running_moments_are_those_of_all_scores():
    generator, moments, seen = torch.Generator().manual_seed(0), RunningMoments(), []
    for count in (1, 5, 3, 40):
        seen.append(torch.randn(count, generator=generator) * 3 + 100)
        moments.update(seen[-1])
    every = torch.cat(seen).double()
    assert moments.mean == pytest.approx(float(every.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(every.std()), rel=1e-9)
    assert RunningMoments().std == 1.0


def test_scores_are_scaled_normalised_and_clipped():
    queries, responses, _ = rollouts()
    scores = [1.0, 2.0, torch.tensor([30.0]), torch.tensor(-5.0)]  # numbers and one-element tensors alike
    x = torch.tensor([1.0, 2.0, 30.0, -5.0])
    scaled = trainer(rate=0.0, use_score_scaling=True).step(queries, responses, scores)
    assert scaled["ppo/mean_scores"] == pytest.approx(float((x / x.std()).mean()), rel=1e-5)
    normed = trainer(rate=0.0, use_score_scaling=True, use_score_norm=True).step(queries, responses, scores)
    assert normed["ppo/mean_scores"] == pytest.approx(0, abs=1e-6)
    assert normed["ppo/std_scores"] == pytest.approx(1, rel=1e-5)
    clipped = trainer(rate=0.0, score_clip=2.5).step(queries, responses, scores)
    assert clipped["ppo/mean_scores"] == pytest.approx(float(x.clamp(-2.5, 2.5).mean()))


def test_early_stopping_ends_the_passes():
    def passes(**options):
        stats = trainer(rate=2.0, ppo_epochs=5, **options).step(*rollouts())
        return len(stats["ppo/policy/ratio"]) // sum(len(r) for r in rollouts()[1])

    assert passes() == 5
    assert passes(early_stopping=True, target_kl=1e3) == 5
    assert passes(early_stopping=True, target_kl=1e-9) < 5


def test_a_runaway_mini_batch_is_skipped():
    model = policy()
    run = trainer(model, ratio_threshold=1e-6)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="skipped: its mean ratio 1.00 exceeds 1e-06"):
        stats = run.step(*rollouts())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert math.isfinite(stats["ppo/loss/total"])


def test_gradients_are_clipped():
    model = policy()
    before = snapshot(model)
    trainer(model, max_grad_norm=1e-3).step(*rollouts())
    norm = math.sqrt(sum(float((p - before[n]).square().sum()) for n, p in model.named_parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_batch_of_one_response_of_one_token():
    queries, responses, scores = rollouts(1, lengths=[(1, 1)])
    stats = trainer(batch_size=1, mini_batch_size=1).step(queries, responses, scores)
    assert all(math.isfinite(stats[n]) for n in ("ppo/loss/total", "objective/kl", "ppo/std_scores", "ppo/returns/var"))
    assert stats["ppo/returns/mean"] == pytest.approx(float(scores[0]))  # V = 0 past the end


def test_a_negative_kl_is_said():
    model, reference = policy(), policy(seed=1)
    queries, _, scores = rollouts()
    # tokens that the reference prefers
    responses = [
        reference.generate(q[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(q) :] for q in queries
    ]
    with pytest.warns(UserWarning, match="responses are not drawn from the policy"):
        trainer(model, reference, rate=0.0).step(queries, responses, scores)


def test_the_learning_rate_schedule_steps_once_a_step():
    model = policy()
    from fastalign.train.ppo import PPOConfig, PPOTrainer

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2)
    from tiny import tiny_tokenizer

    run = PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=schedule)
    assert [run.step(*rollouts())["ppo/learning_rate"] for _ in range(3)] == [1e-4, 5e-5, 2.5e-5]
