"""The model that a trainer trains: loading by name, adapters, tokenizer."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from fastalign._base.errors import UserError
from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
from fastalign.models.loading import check_language_model, resolve
from fastalign.train.passes import REFERENCE


def load_options(args: Any) -> dict[str, Any]:
    """args: a config with `model_init_kwargs` and `trust_remote_code`, as TRL's have them; also below."""
    options = dict(args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return options


def load(name: str | os.PathLike[str], tokenizer: Any, args: Any, quantization_config: Any = None) -> tuple[Any, Any]:
    """The named model, in float32 and without the hub's kernels unless model_init_kwargs says otherwise, and its
    tokenizer."""
    check_language_model(name)
    options = {"dtype": torch.float32, "use_kernels": False, **load_options(args)}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    folder = resolve(name)
    with quiet_unless_terminal(), one_line_errors(name):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, load_tokenizer(folder, args) if tokenizer is None else tokenizer


def load_tokenizer(name: str, args: Any) -> Any:
    if not name:
        raise UserError("processing_class must be given for a model that was not loaded by name, got None")
    revision = (args.model_init_kwargs or {}).get("revision")
    with one_line_errors(name):
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
        _add_reference(model)
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _add_reference(model: Any) -> None:
    """The adapter "ref": a copy of the active one, in place of an earlier trainer's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapter
    if not isinstance(name, str) or name == REFERENCE:
        rule = f"model must have one active adapter, of another name than {REFERENCE!r}"
        raise UserError(f"{rule}, got {name if isinstance(name, str) else ', '.join(name)}")
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
    model.add_adapter(REFERENCE, model.peft_config[name])
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name=name), adapter_name=REFERENCE)
    model.set_adapter(name)
