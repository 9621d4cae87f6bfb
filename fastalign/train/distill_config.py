"""DistillConfig: transformers' TrainingArguments with a few additions, and which options the trainer supports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

from fastalign._base.errors import UserError

_UNSUPPORTED = {  # and the value that means without
    "use_liger_kernel": False,
    "deepspeed": None,
    "label_smoothing_factor": 0.0,
}


@dataclass
class DistillConfig(transformers.TrainingArguments):
    """transformers' TrainingArguments, in which per_device_train_batch_size counts prompts, and:

    model_init_kwargs, trust_remote_code: for a model given by name. chat_template_kwargs: for prompts of messages.
    share_prompt: process a prompt once for its candidates, and no padding. Results are the same.
    max_packed_tokens: tokens per forward pass. None: 1,024 on a CPU, else what a padded batch of
        per_device_train_batch_size candidates would have.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, for a model given by name."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run a model's own code."})
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of the chat template."}
    )
    share_prompt: bool = field(default=True, metadata={"help": "Process a prompt once for its candidates."})
    max_packed_tokens: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass. Default 1,024 on a CPU."}
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(error) from None


def check_args(args: DistillConfig) -> None:
    """Raises UserError, one line, for an option that is not supported, and for values that are not valid."""
    for name, off in _UNSUPPORTED.items():
        if (value := getattr(args, name, off)) not in (off, None):
            raise UserError(f"{name}={value!r} is not supported by DistillTrainer, only {off!r}")
    limit = args.max_packed_tokens
    if limit is not None and not (isinstance(limit, int) and limit >= 1):
        raise UserError(f"max_packed_tokens must be an integer, at least 1, or None, got {limit!r}")
