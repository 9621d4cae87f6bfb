"""GRPOConfig: TRL's GRPOConfig with a few additions, and which of TRL's options the trainer supports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import transformers
import trl

from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingSettings
from fastalign.losses.advantages import HOW
from fastalign.losses.policy import GRPO_LOSS_TYPES
from fastalign.ops import checks

_SUPPORTED = {
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "num_generations", "num_generations_eval",
    "max_completion_length", "shuffle_dataset", "generation_batch_size", "steps_per_generation", "temperature", "top_p",
    "top_k", "min_p", "chat_template_kwargs", "beta", "num_iterations", "epsilon", "delta", "epsilon_high",
    "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
    "vespo_lambda_neg", "importance_sampling_level", "reward_weights", "multi_objective_aggregation", "scale_rewards",
    "loss_type", "mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "entropy_coef", "off_policy_mask_threshold", "use_bias_correction_kl", "log_completions",
}  # fmt: skip
# Without effect here: how other engines generate, and details of options that are refused.
_INERT = {
    "pad_to_multiple_of", "ds3_gather_for_generation", "log_multimodal", "router_aux_loss_coef",
    "transformers_continuous_batching_config", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
    "entropy_target",
}  # fmt: skip
_FOR_VLLM = "vllm_"
_DRAWING = {"temperature", "top_k", "top_p", "min_p", "max_new_tokens"}


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig, and:

    advantage: how rewards become advantages, as `how` of `losses.group_advantages`: "grpo", "batch", "dr_grpo", "rloo",
        "gdpo" or "rank". None: what multi_objective_aggregation and scale_rewards say.
    importance_correction: weigh tokens by the ratio of their probabilities under the model and under the sampler, for
        completions of a `rollout_func`; how is set by TRL's vllm_importance_sampling_mode, _clip_min and _clip_max.
    kl_in_reward: subtract beta times a completion's log-ratio to the reference from its weighted rewards, as RLOO does
        (arXiv 2402.14740), in place of a penalty per token in the loss. With advantage "rloo" the optimum is then the
        model times exp(λ·R / beta).
    share_prompt: process the prompt of a group once, and no padding. Results are the same.
    max_packed_tokens: tokens per forward pass. None: 1,024 on a CPU, else what a padded batch of
        per_device_train_batch_size completions would have.
    """

    advantage: str | None = field(default=None, metadata={"help": "How rewards become advantages."})
    importance_correction: bool = field(
        default=False, metadata={"help": "Correct for a rollout_func's sampler by importance weights."}
    )
    kl_in_reward: bool = field(
        default=False, metadata={"help": "Subtract beta times the log-ratio to the reference from the rewards."}
    )
    share_prompt: bool = field(default=True, metadata={"help": "Process the prompt of a group once."})
    max_packed_tokens: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass. Default 1,024 on a CPU."}
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(error) from None


def advantage_of(args: trl.GRPOConfig) -> str:
    """`how` of `losses.group_advantages`."""
    if (how := getattr(args, "advantage", None)) is not None:
        return how
    if args.multi_objective_aggregation == "normalize_then_sum":
        return "gdpo"
    if args.multi_objective_aggregation != "sum_then_normalize":
        rule = "multi_objective_aggregation must be sum_then_normalize or normalize_then_sum"
        raise UserError(f"{rule}, got {args.multi_objective_aggregation!r}")
    ways = {"group": "grpo", "batch": "batch", "none": "dr_grpo"}
    if args.scale_rewards not in ways:
        raise UserError(f"scale_rewards must be group, batch or none, got {args.scale_rewards!r}")
    return ways[args.scale_rewards]


def sampling_settings(args: trl.GRPOConfig, n: int, seed: int) -> SamplingSettings:
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p or 0.0,
        "max_new_tokens": args.max_completion_length,
        **(args.generation_kwargs or {}),
    }
    return SamplingSettings(n=n, seed=seed, **options)


def check_args(args: trl.GRPOConfig) -> None:
    """Raises UserError, one line, for an option that is not supported, and for values that are not valid."""
    _check_supported(args)
    known = [name for name in GRPO_LOSS_TYPES if name != "gspo"]  # TRL's name for it is importance_sampling_level
    checks.among("loss_type", args.loss_type, known)
    checks.among("importance_sampling_level", args.importance_sampling_level, ("token", "sequence"))
    if getattr(args, "advantage", None) is not None:
        checks.among("advantage", args.advantage, HOW)
    length = args.max_completion_length
    if not isinstance(length, int) or length < 1:
        raise UserError(f"max_completion_length must be a positive integer, got {length!r}")
    sampling_settings(args, args.num_generations, 0)
    if args.sync_ref_model and args.beta == 0:
        raise UserError("sync_ref_model needs a reference: beta must not be 0")
    if getattr(args, "kl_in_reward", False) and args.beta == 0:
        raise UserError("kl_in_reward needs a reference: beta must not be 0")
    if args.loss_type == "vespo" and getattr(args, "importance_correction", False):
        raise UserError("importance_correction is not supported with loss_type 'vespo'")


def _check_supported(args: trl.GRPOConfig) -> None:
    common = {one.name for one in dataclasses.fields(transformers.TrainingArguments)}
    for one in dataclasses.fields(trl.GRPOConfig):
        if one.name in common | _SUPPORTED | _INERT or one.name.startswith(_FOR_VLLM):
            continue
        value = getattr(args, one.name)
        if one.name == "generation_kwargs" and set(value or {}) <= _DRAWING:
            continue
        if value != one.default:
            _refuse(one.name, value, one.default)
    for name in ("use_liger_kernel", "deepspeed"):
        if value := getattr(args, name, None):
            _refuse(name, value, None)


def _refuse(name: str, value: Any, default: Any) -> None:
    hint = ": give completions of another engine by rollout_func" if name == "use_vllm" else ""
    raise UserError(f"{name}={value!r} is not supported by fastalign's GRPOTrainer, only {default!r}{hint}")
