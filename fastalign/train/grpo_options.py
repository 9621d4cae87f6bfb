"""TRL's options of GRPO: which of them the trainer supports, the values that they take, and what they mean here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

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
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
_IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # loss types with PPO's clip


class _Rule(NamedTuple):
    says: str
    holds: Callable[[Any], bool]


def _count(least: int) -> _Rule:
    return _Rule(
        f"an integer, at least {least}",
        lambda x: isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= least,
    )


def _number(says: str, holds: Callable[[float], bool]) -> _Rule:
    return _Rule(says, lambda x: isinstance(x, Real) and not isinstance(x, bool) and holds(float(x)))


_COUNT, _FLAG = _count(1), _Rule("True or False", lambda x: isinstance(x, bool))
_FINITE = _number("a finite number", math.isfinite)
_AT_LEAST_0 = _number("a finite number, at least 0", lambda x: 0 <= x < math.inf)
_POSITIVE = _number("a positive finite number", lambda x: 0 < x < math.inf)
_COUNTS = {
    "per_device_train_batch_size": _COUNT, "per_device_eval_batch_size": _COUNT, "gradient_accumulation_steps": _COUNT,
    "num_generations": _count(2), "num_generations_eval": _COUNT, "steps_per_generation": _COUNT,
    "generation_batch_size": _COUNT, "num_iterations": _COUNT, "max_completion_length": _COUNT,
    "ref_model_sync_steps": _COUNT, "max_packed_tokens": _COUNT,
}  # fmt: skip
_VALUES = {
    "beta": _AT_LEAST_0,
    **dict.fromkeys(("temperature", "epsilon", "epsilon_high", "delta"), _POSITIVE),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _POSITIVE),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _FINITE),
    **dict.fromkeys(("entropy_coef", "off_policy_mask_threshold"), _FINITE),
    **dict.fromkeys(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"), _AT_LEAST_0),
    "ref_model_mixup_alpha": _number("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "reward_weights": _Rule(
        "a list of finite numbers", lambda x: isinstance(x, (list, tuple)) and all(map(_FINITE.holds, x))
    ),
    **dict.fromkeys(("shuffle_dataset", "disable_dropout", "mask_truncated_completions", "sync_ref_model"), _FLAG),
    **dict.fromkeys(("importance_correction", "kl_in_reward"), _FLAG),
    **dict.fromkeys(("use_bias_correction_kl", "log_completions", "share_prompt"), _FLAG),
    **dict.fromkeys(
        ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"),
        _Rule("a dictionary", lambda x: isinstance(x, dict)),
    ),
}


def check_args(args: trl.GRPOConfig) -> None:
    """Raises UserError, one line, for an option that is not supported, and for values that are not valid."""
    check_counts(args)
    _check(args, _VALUES)
    _check_supported(args)
    known = [name for name in GRPO_LOSS_TYPES if name != "gspo"]  # TRL's name for it is importance_sampling_level
    checks.among("loss_type", args.loss_type, known)
    checks.among("importance_sampling_level", args.importance_sampling_level, ("token", "sequence"))
    advantage_of(args)
    sampling_settings(args, args.num_generations, 0)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None and args.loss_type in CLIPPED and not args.delta > 1 + high:
        raise UserError(f"delta must be above 1 + epsilon_high = {1 + high:g}, got {args.delta!r}")
    for name in ("sync_ref_model", "kl_in_reward"):
        if getattr(args, name, False) and args.beta == 0:
            raise UserError(f"{name} needs a reference: beta must not be 0")
    if getattr(args, "importance_correction", False):
        checks.among("vllm_importance_sampling_mode", args.vllm_importance_sampling_mode, _IMPORTANCE)
        if args.loss_type == "vespo":
            raise UserError("importance_correction is not supported with loss_type 'vespo'")


def check_counts(args: trl.GRPOConfig) -> None:
    """Those that TRL's config divides by are checked before it does."""
    _check(args, _COUNTS)


def advantage_of(args: trl.GRPOConfig) -> str:
    """`how` of `losses.group_advantages`."""
    if (how := getattr(args, "advantage", None)) is not None:
        checks.among("advantage", how, HOW)
        return how
    aggregation = args.multi_objective_aggregation
    checks.among("multi_objective_aggregation", aggregation, ("sum_then_normalize", "normalize_then_sum"))
    if aggregation == "normalize_then_sum":
        return "gdpo"
    ways = {"group": "grpo", "batch": "batch", "none": "dr_grpo"}
    checks.among("scale_rewards", args.scale_rewards, list(ways))
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


def _check(args: trl.GRPOConfig, rules: dict[str, _Rule]) -> None:
    for one in dataclasses.fields(args):
        value = getattr(args, one.name)
        if one.name in rules and not (value is None and one.default is None) and not rules[one.name].holds(value):
            raise UserError(f"{one.name} must be {rules[one.name].says}, got {checks.shown(value)}")


def _check_supported(args: trl.GRPOConfig) -> None:
    common = {one.name for one in dataclasses.fields(transformers.TrainingArguments)}
    for one in dataclasses.fields(trl.GRPOConfig):
        if one.name in common | _SUPPORTED | _INERT or one.name.startswith(_FOR_VLLM):
            continue
        value = getattr(args, one.name)
        if one.name == "generation_kwargs":
            if unknown := [name for name in value or () if name not in _DRAWING]:
                raise UserError(f"generation_kwargs may have {', '.join(_DRAWING)}, got {unknown[0]}")
        elif value != one.default:
            _refuse(one.name, value, one.default)
    for name in ("use_liger_kernel", "deepspeed"):
        if value := getattr(args, name, None):
            _refuse(name, value, None)


def _refuse(name: str, value: Any, default: Any) -> None:
    hint = ": give completions of another engine by rollout_func" if name == "use_vllm" else ""
    raise UserError(f"{name}={value!r} is not supported by fastalign's GRPOTrainer, only {default!r}{hint}")
