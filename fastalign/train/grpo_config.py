"""GRPOConfig: TRL's GRPOConfig with a few additions."""

from __future__ import annotations

from dataclasses import dataclass, field

import trl

from fastalign._base.errors import UserError
from fastalign.train.grpo_options import check_counts


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
        check_counts(self)
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise UserError(str(error).partition("\n")[0]) from None
