"""The model that a trainer trains: loading by name, adapters, tokenizer."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from fastalign._base.errors import UserError
from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
from fastalign.models.loading import check_language_model, resolve


def load_options(args: Any) -> dict[str, Any]:
    """args: a config with `model_init_kwargs` and `trust_remote_code`, as TRL's have them; also below."""
    options = dict(args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return options


def load(name: str | os.PathLike[str], tokenizer: Any, args: Any, quantization_config: Any = None) -> tuple[Any, Any]:
    """The named model, in float32 unless model_init_kwargs says otherwise, and its tokenizer."""
    check_language_model(name)
    options = {"dtype": torch.float32, **load_options(args)}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    folder = resolve(name)
    with quiet_unless_terminal(), one_line_errors(name):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, load_tokenizer(folder, args) if tokenizer is None else tokenizer


def load_tokenizer(name: str, args: Any) -> Any:
    revision = (args.model_init_kwargs or {}).get("revision")
    with one_line_errors(name or "processing_class"):
        return transformers.AutoTokenizer.from_pretrained(
            name, revision=revision, padding_side="left", trust_remote_code=args.trust_remote_code
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that it is a tokenizer; one without a padding token gets its end token."""
    if not hasattr(tokenizer, "eos_token_id"):
        raise UserError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def with_adapters(model: Any, peft_config: Any, args: Any, *, reference: bool = False) -> Any:
    """The model with new adapters, if given. reference: adapters that it came with get a frozen copy, "ref"."""
    has = hasattr(model, "peft_config")
    if peft_config is not None:
        if has:
            raise UserError("peft_config must be None for a model with adapters: merge them first")
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    elif has and reference:
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model
