"""What a checkpoint's tensors do not say of themselves and the model's class does: which are stored (in, out), which are tied."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from fastalign._base.errors import UserError
from fastalign.soup import compare
from fastalign.soup.checkpoint import Checkpoint


def is_transposed(model: Checkpoint, module: str) -> bool | None:
    """Whether a module's weight is stored (in, out), as transformers' Conv1D does; None where the class is not known.

    A checkpoint without a config.json is taken to hold nn.Linear's (out, in).
    """
    config = compare.config_of(model)
    if not config:
        return False
    found = _conv1d(json.dumps(config, sort_keys=True))
    if found is None:
        return None
    return any(name == module or name.endswith(f".{module}") or module.endswith(f".{name}") for name in found)


def is_tied(model: Checkpoint) -> bool:
    """Whether the head and the embedding are one; a config.json leaves out what is its class's default."""
    config = compare.config_of(model)
    if "tie_word_embeddings" in config or not config:
        return bool(config.get("tie_word_embeddings"))
    found = _config(config)
    return found is not None and bool(getattr(found.get_text_config(), "tie_word_embeddings", False))


@functools.lru_cache(maxsize=8)
def _conv1d(config: str) -> frozenset[str] | None:
    """Names of the modules that are Conv1D, from the architecture built without memory for its weights."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    held = json.loads(config)
    made = _config(held)
    name = (held.get("architectures") or [""])[0]
    cls = getattr(transformers, name, None) if isinstance(name, str) and name else None
    if made is None:
        return None
    try:
        with torch.device("meta"):
            model = cls(made) if cls is not None else transformers.AutoModelForCausalLM.from_config(made)
    except Exception:  # each class has errors of its own for a configuration that it cannot be built from
        return None
    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def _config(held: Mapping[str, Any]) -> Any | None:
    """transformers' configuration object; None where it does not know the type, as with remote code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = held.get("model_type")
    if "auto_map" in held or kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(held))
    except Exception as error:
        raise UserError(f"config.json: not a configuration of {kind} ({' '.join(str(error).split())[:200]})") from None
