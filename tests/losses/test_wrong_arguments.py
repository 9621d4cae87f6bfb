"""A wrong argument of a loss is one line of UserError that names it, what came and what is wanted."""

import numpy as np
import pytest
import torch
from refusals import assert_one_line

from fastalign import losses, ops

B, T = 2, 3
V = torch.zeros(B)
X = torch.zeros(2 * B, T)
MASK = torch.ones(2 * B, T, dtype=torch.bool)
A = torch.zeros(2 * B)
NP = np.zeros((2 * B, T), dtype=np.float32)
IDS = torch.zeros(2 * B, T, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(2 * B, T, 4), torch.zeros(5, 4)
DESIRABLE = torch.ones(B, dtype=torch.bool)
PAIRS = [("a", "b"), ("b", "a")]
R, INF = torch.zeros(1, 2, 3), float("inf")
TENSOR = "must be a torch.Tensor, got"


def ppo(*given, **options):
    return losses.ppo_loss(*(given or (X, X, A, MASK)), **options)


def grpo(**options):
    return losses.grpo_loss(X, X, A, MASK, **options)


def advantages(rewards, **options):
    return losses.group_advantages(rewards, **options)


def dpo(**options):
    return losses.dpo_loss(V, V, V, V, **options)


def kto(desirable=DESIRABLE, kl=0.0, **options):
    return losses.kto_loss(V, V, desirable, kl, **options)


def head(hidden=HIDDEN, weight=WEIGHT, labels=IDS, **options):
    return ops.linear_token_logprobs(hidden, weight, labels, **options)


CASES = [
    (lambda: losses.shift_labels(NP, MASK), f"input_ids {TENSOR} ndarray"),
    (lambda: losses.shift_labels(IDS, [[1]]), f"completion_mask {TENSOR} list"),
    (lambda: losses.shift_labels(None, None), f"input_ids {TENSOR} NoneType"),
    (lambda: losses.whiten(NP, MASK), f"x {TENSOR} ndarray"),
    (lambda: losses.whiten([1.0], MASK), f"x {TENSOR} list"),
    (lambda: losses.whiten(X, None), f"mask {TENSOR} NoneType"),
    (lambda: losses.kl_penalty(NP, X), f"logprobs {TENSOR} ndarray"),
    (lambda: losses.kl_penalty(X, None), f"ref_logprobs {TENSOR} NoneType"),
    (lambda: losses.kl_penalty(X, X, None), "estimator must be one of k1, k2, k3, got None"),
    (lambda: losses.sequence_logps(X, None), f"mask {TENSOR} NoneType"),
    (lambda: losses.sequence_logps(X, np.ones((2 * B, T), bool)), f"mask {TENSOR} ndarray"),
    (lambda: losses.sequence_logps(NP, MASK), f"log_probs {TENSOR} ndarray"),
    (lambda: losses.sequence_logps(X, MASK, ld_alpha="x"), "ld_alpha must be a number, got 'x'"),
    (lambda: losses.sequence_logps(X, MASK, ld_alpha=0.5, shared_lengths=[1]), f"shared_lengths {TENSOR} list"),
    (lambda: losses.wpo_weights(NP, X, MASK), f"log_probs {TENSOR} ndarray"),
    (lambda: losses.wpo_weights(X, None, MASK), f"log_sum_sq_probs {TENSOR} NoneType"),
    (lambda: losses.wpo_weights(X, X, None), f"mask {TENSOR} NoneType"),
    (lambda: losses.wpo_weights(X, X[:1], MASK), "log_sum_sq_probs.shape must equal log_probs.shape, got (1, 3)"),
    (lambda: losses.wpo_weights(X, X[:, :1], MASK), "log_sum_sq_probs.shape must equal log_probs.shape, got (4, 1)"),
    (lambda: losses.wpo_weights(X[:1], X, MASK), "log_sum_sq_probs.shape must equal log_probs.shape, got (4, 3)"),
    (lambda: losses.dpo_loss(V, None, V, V), f"policy_rejected_logps {TENSOR} NoneType"),
    (lambda: dpo(loss_type=None), "loss_type must be one of sigmoid, "),
    (lambda: dpo(loss_type=["sigmoid", None]), "loss_type must be one of sigmoid, "),
    (lambda: dpo(loss_weights="x"), "loss_weights must be one number per loss type, got 'x'"),
    (lambda: dpo(loss_weights=1.0), "loss_weights must be one number per loss type, got 1.0"),
    (lambda: dpo(loss_weights=[None]), "loss_weights must be a number, got None"),
    (lambda: dpo(weights=[1.0, 1.0]), f"weights {TENSOR} list"),
    (lambda: dpo(sft_logps=np.zeros(B)), f"sft_logps {TENSOR} ndarray"),
    (lambda: dpo(beta=None), "beta must be a positive finite number, got None"),
    (lambda: dpo(beta=NP), "beta must be a positive finite number, got ndarray"),
    (lambda: dpo(label_smoothing=None), "label_smoothing must be a number, got None"),
    (lambda: kto(None), f"desirable {TENSOR} NoneType"),
    (lambda: kto(np.ones(B, bool)), f"desirable {TENSOR} ndarray"),
    (lambda: kto(V), "desirable must be bool, got torch.float32"),
    (lambda: kto(kl=None), "kl must be a number, got None"),
    (lambda: kto(desirable_weight="x"), "desirable_weight must be a number, got 'x'"),
    (lambda: kto(loss_type=None), "loss_type must be one of kto, apo_zero_unpaired, got None"),
    (lambda: losses.kto_kl(np.zeros(B), V), f"policy_logps {TENSOR} ndarray"),
    (lambda: losses.cpo_loss(V, V, alpha=None), "alpha must be a number, got None"),
    (lambda: losses.cpo_loss(V, V, chosen_nll=[0.0]), "chosen_nll must be a number, got list"),
    (lambda: losses.cpo_loss(V, V, chosen_nll=V[:, None]), "chosen_nll must have shape (2,), got (2, 1)"),
    (lambda: losses.orpo_loss(V, V, chosen_nll="x"), "chosen_nll must be a number, got 'x'"),
    (lambda: losses.simpo_loss(V, V, gamma=None), "gamma must be a number, got None"),
    (lambda: ppo(NP, X, A, MASK), "logprobs must be a floating tensor, got ndarray"),
    (lambda: ppo(X, X, [0.0], MASK), f"advantages {TENSOR} list"),
    (lambda: ppo(X, X, A, NP), f"mask {TENSOR} ndarray"),
    (lambda: ppo(clip_range=None), "clip_range must be a number, got None"),
    (lambda: ppo(clip_range_high="x"), "clip_range_high must be a number, got 'x'"),
    (lambda: ppo(dual_clip="x"), "dual_clip must be a number, got 'x'"),
    (lambda: ppo(kl_coef=None), "kl_coef must be a number, got None"),
    (lambda: ppo(entropy_coef=None), "entropy_coef must be a number, got None"),
    (lambda: ppo(normalizer="x"), "normalizer must be a number, got 'x'"),
    (lambda: ppo(aggregation=None), "aggregation must be one of token_mean, "),
    (lambda: grpo(loss_type=None), "loss_type must be one of grpo, "),
    (lambda: grpo(loss_type="sapo", sapo_temperatures=None), "sapo_temperatures must be two numbers, got None"),
    (lambda: grpo(loss_type="vespo", vespo_positive=(1.0, None)), "vespo_positive must be a number, got None"),
    (lambda: grpo(loss_type="cispo", clip_range_high="x"), "clip_range_high must be a number, got 'x'"),
    (lambda: losses.value_loss(X, X, None, MASK), f"returns {TENSOR} NoneType"),
    (lambda: losses.value_loss(X, X, X, MASK, clip_range="x"), "clip_range must be a number, got 'x'"),
    (lambda: advantages(np.zeros((1, 2, 3))), "rewards must be a tensor of shape (B, G, m), got ndarray"),
    (lambda: advantages(V), "rewards must be a tensor of shape (B, G, m), got (2,)"),
    (lambda: advantages(R.masked_fill(R == 0, INF)), "rewards must be finite, or NaN where not scored, got an infini"),
    (lambda: advantages(R + 3e38), "rewards must be small enough for weighted sums and variances to fit"),
    (lambda: advantages(1e25 * torch.rand(1, 2, 3)), "rewards must be small enough for weighted sums and"),
    (lambda: advantages(R, how=None), "how must be one of grpo, batch, dr_grpo, rloo, gdpo, rank, got None"),
    (lambda: advantages(R, how="sum"), "how must be one of grpo, batch, dr_grpo, rloo, gdpo, rank, got 'sum'"),
    (lambda: advantages(R, weights=[1.0]), "weights must have shape (3,), one per value, got (1,)"),
    (lambda: advantages(R, weights=1.0), "weights must have shape (3,), one per value, got ()"),
    (lambda: advantages(R, weights=[1.0, None, 1.0]), "weights must be finite, got an infinite one or NaN"),
    (lambda: advantages(R, weights="abc"), "weights must be an array of numbers, got 'abc'"),
    (lambda: advantages(R, weights=[0.0, 0.0, INF]), "weights must be finite, got an infinite one or NaN"),
    (lambda: losses.bradley_terry_loss(np.zeros(2), V), "chosen_scores must be a floating tensor, got ndarray"),
    (lambda: losses.bradley_terry_loss(V, V, margin="x"), "margin must be a number, got 'x'"),
    (lambda: losses.bradley_terry_loss(V, V, center_coefficient=None), "center_coefficient must be a number, got None"),
    (lambda: losses.plackett_luce_loss(X, IDS.numpy()), "ranking must be an int64 tensor, got ndarray"),
    (lambda: losses.plackett_luce_loss(X, IDS, NP), f"mask {TENSOR} ndarray"),
    (lambda: losses.bradley_terry_scores(None), "comparisons must be (winner, loser) or (winner, loser, count), got N"),
    (
        lambda: losses.bradley_terry_scores([1, 2]),
        "comparisons must be (winner, loser) or (winner, loser, count), got (",
    ),
    (lambda: losses.bradley_terry_scores([("a", "b", None)]), "comparisons must count wins by numbers, got None"),
    (lambda: losses.bradley_terry_scores(PAIRS, tol=None), "tol must be a number, got None"),
    (lambda: losses.bradley_terry_scores(PAIRS, max_iterations="x"), "max_iterations must be an integer, got 'x'"),
    (lambda: losses.LinearDPOLoss()(None, None, None), f"hidden {TENSOR} NoneType"),
    (lambda: losses.LinearCPOLoss()(None, None, None), f"hidden {TENSOR} NoneType"),
    (lambda: losses.LinearSimPOLoss()(None, None, None), f"hidden {TENSOR} NoneType"),
    (lambda: losses.LinearORPOLoss()(None, None, None), f"hidden {TENSOR} NoneType"),
    (lambda: losses.LinearKTOLoss()(HIDDEN, WEIGHT, IDS, None), f"desirable {TENSOR} NoneType"),
    (lambda: losses.LinearPPOLoss()(HIDDEN, None, IDS, A), f"weight {TENSOR} NoneType"),
    (lambda: losses.LinearGRPOLoss()(HIDDEN, WEIGHT, IDS, A, mask=NP), f"mask {TENSOR} ndarray"),
    (lambda: losses.LinearDPOLoss()(HIDDEN, WEIGHT, IDS.numpy()), f"labels {TENSOR} ndarray"),
    (lambda: losses.LinearDPOLoss()(HIDDEN, WEIGHT, IDS, ref_logps=A), "ref_logps must be two tensors, chosen and rej"),
    (lambda: losses.LinearDPOLoss()(HIDDEN, WEIGHT, IDS, ref_hidden=NP, ref_weight=WEIGHT), f"ref_hidden {TENSOR} nda"),
    (lambda: head(None), f"hidden {TENSOR} NoneType"),
    (lambda: head(weight=WEIGHT.numpy()), f"weight {TENSOR} ndarray"),
    (lambda: head(weight=WEIGHT[0, 0]), "weight must have shape (V, H)"),
    (lambda: head(weight=WEIGHT.double()), "weight must be float32, bfloat16 or float16 if hidden is torch.float32"),
    (lambda: head(labels=None), "labels must be a torch.Tensor, got NoneType"),
    (lambda: head(bias=[0.0] * 5), f"bias {TENSOR} list"),
    (lambda: head(adapter=(WEIGHT, WEIGHT)), "adapter must be (A, B, scale) with a number as scale, got tuple"),
    (lambda: head(adapter=(None, WEIGHT, 1.0)), f"adapter's A {TENSOR} NoneType"),
    (lambda: head(outputs=None), "outputs must be some of log_probs, "),
    (lambda: head(outputs="entropy"), "outputs must be some of log_probs, "),
    (lambda: head(ignore_index="x"), "ignore_index must be an integer, got 'x'"),
    (lambda: head(temperature=None), "temperature must be a positive finite number, got None"),
    (lambda: head(grad_filter=NP), "grad_filter must be a number between 0 and 1, or None, got ndarray"),
    (lambda: head(memory_budget="1GB"), "memory_budget must be a number of bytes, at least 0, or None, got '1GB'"),
    (lambda: ops.token_logprobs(X, IDS[:, 0], outputs=[None]), "outputs must be some of log_probs, "),
    (lambda: ops.token_logprobs(X, IDS[:, 0], ignore_index=None), "ignore_index must be an integer, got None"),
    (lambda: ops.token_logratios(X, X, IDS[:, 0], ignore_index=0.5), "ignore_index must be an integer, got 0.5"),
    (lambda: ops.linear_token_logratios(None, WEIGHT, HIDDEN, WEIGHT, IDS), f"hidden {TENSOR} NoneType"),
    (lambda: ops.linear_token_logratios(HIDDEN, WEIGHT[0, 0], HIDDEN, WEIGHT, IDS), "weight must have shape (V, H)"),
    (lambda: ops.linear_token_logratios(HIDDEN, WEIGHT, HIDDEN, WEIGHT, IDS, ref_bias=0), f"ref_bias {TENSOR} int"),
    (lambda: ops.sample_tokens(X, seed=0, rows=[0]), "rows must be an int64 tensor, got list"),
    (lambda: ops.sample_tokens(X, seed=0, top_p=NP), "top_p must be in [0, 1], got ndarray"),
    (lambda: ops.gae(X, X, None), f"mask {TENSOR} NoneType"),
    (lambda: ops.gae(X, X, MASK, gamma="x"), "gamma must be a number in [0, 1], got 'x'"),
    (lambda: ops.gae(X, X, MASK, lam=NP), "lam must be a number in [0, 1], got ndarray"),
    (lambda: ops.pairwise_loss(None, None, MASK), f"log_probs {TENSOR} NoneType"),
    (lambda: ops.pairwise_loss(X, NP, MASK), f"ref_log_probs {TENSOR} ndarray"),
    (lambda: ops.pairwise_loss(X, None, NP), f"mask {TENSOR} ndarray"),
    (lambda: ops.pairwise_loss(X, None, MASK, loss_type=NP), "loss_type must be one of sigmoid, "),
    (lambda: ops.pairwise_loss(X, None, MASK, beta=None), "beta must be a positive finite number, got None"),
    (lambda: ops.pairwise_loss(X, None, MASK, label_smoothing=None), "label_smoothing must be a number, got None"),
    (lambda: ops.map_statistics(None, A), f"rewards {TENSOR} NoneType"),
    (lambda: ops.map_statistics(X, None), f"lam {TENSOR} NoneType"),
    (lambda: ops.map_statistics(X, IDS[0]), "lam must be float32 or float64, got torch.int64"),
    (lambda: ops.map_statistics(X, X[0], center=NP), f"center {TENSOR} ndarray"),
    (lambda: ops.map_statistics(X, X[0], groups=A), "groups must be integers, got torch.float32"),
    (lambda: ops.resample(NP, seed=0), f"log_weights {TENSOR} ndarray"),
    (lambda: ops.resample(X, mask=MASK.numpy(), seed=0), "mask must be a bool tensor, got ndarray"),
    (lambda: ops.resample(X, method=None, seed=0), "method must be one of multinomial, "),
    (lambda: ops.resample(X, seed=None), "seed must be an integer in [0, 2^64), got None"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_a_wrong_argument_is_one_line(call, message):
    assert_one_line(call, message)
