"""A checkpoint's architecture: its configuration, properties of its tensors, and whether checkpoints are the same model
with different weights."""

from __future__ import annotations

import filecmp
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import FLOATS, Checkpoint, is_adapter, read_bytes
from fastalign.soup.vocabulary import OLD_FILES, ROWS, tokens_of

# ---- what the class says ----


def is_transposed(model: Checkpoint, module: str) -> bool | None:
    """Whether a module's weight is stored (in, out), as in transformers' Conv1D; None if the class is unknown.

    A checkpoint without a config.json is assumed to have nn.Linear's (out, in).
    """
    config = config_of(model)
    if not config:
        return False
    modules = _conv1d(json.dumps(config, sort_keys=True))
    if modules is None:
        return None
    return any(name == module or name.endswith(f".{module}") or module.endswith(f".{name}") for name in modules)


def is_tied(model: Checkpoint) -> bool:
    """Whether head and embedding are tied; a config.json omits its class's defaults."""
    config = config_of(model)
    if "tie_word_embeddings" in config or not config:
        return bool(config.get("tie_word_embeddings"))
    made = _config(config)
    return made is not None and bool(getattr(made.get_text_config(), "tie_word_embeddings", False))


@functools.lru_cache(maxsize=8)
def _conv1d(config: str) -> frozenset[str] | None:
    """Names of the modules that are Conv1D, from the architecture built without memory for its weights."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    config_dict = json.loads(config)
    made = _config(config_dict)
    name = (config_dict.get("architectures") or [""])[0]
    cls = getattr(transformers, name, None) if isinstance(name, str) and name else None
    if made is None:
        return None
    try:
        with torch.device("meta"):
            model = cls(made) if cls is not None else transformers.AutoModelForCausalLM.from_config(made)
    except Exception:  # each class raises its own errors for an invalid configuration
        return None
    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def _config(config: Mapping[str, Any]) -> Any | None:
    """transformers' configuration object; None if it does not know the type, as with remote code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if "auto_map" in config or kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:
        raise UserError(f"config.json: not a configuration of {kind} ({' '.join(str(error).split())[:200]})") from None


# ---- the same model ----


# Keys that may differ between configurations of the same architecture.
_FREE = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "bos_token_id",
    "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "attention_dropout", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout",
    "initializer_range", "task_specific_params", "gradient_checkpointing", "auto_map", "pretraining_tp",
}  # fmt: skip
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def same_model(checkpoints: Sequence[Checkpoint], *, force: bool | None = None, tokens: bool = True) -> list[str]:
    """The names of the tensors in a soup of these checkpoints, in the order of the first one's bytes.

    force: let configurations and tokenizers differ; tensors never may; None if the caller has no such option. tokens:
    whether vocabularies must be the same; False if embeddings are converted to a common one. Raises UserError that
    names the first difference. Reads only weights that are not floating-point, and those that one checkpoint stores
    twice and another once.
    """
    models = models_of(checkpoints)
    first = models[0]
    for one in models:
        if (one.folder is not None and is_adapter(one.folder)) or any(".lora_A." in name for name in one):
            raise UserError(
                f"{one.name}: a LoRA adapter: averaging A and B separately adds cross terms B1 A2; give adapters "
                "alone, which are mixed exactly (soup.merge_adapters), or merge it into its base first "
                "(soup.apply_adapters)"
            )
    configs = [config_of(one) for one in models]
    for one, config in zip(models, configs, strict=True):
        if "quantization_config" in config:
            raise UserError(
                f"{one.name}: its weights are quantised, which cannot be averaged; take the full-precision ones"
            )
    if not force:
        free = set() if tokens else {"vocab_size"}
        if any(one.pieces for one in checkpoints):  # runs of layers are selected, so entries per layer may differ
            free |= {
                key
                for config in configs
                for key, value in config.items()
                if key in LAYER_COUNTS or ("layer" in key and isinstance(value, list))
            }
        way_out = "" if force is None else " (force=True takes the first model's)"
        for other, config in zip(models[1:], configs[1:], strict=True):
            _same_config(first, configs[0], other, config, free, way_out)
            if tokens:
                _same_vocabulary(first, other, way_out)
    first = checkpoints[0]
    tied = all(config.get("tie_word_embeddings") for config in configs)

    def same(one: Checkpoint, name: str, twin: str) -> bool:
        return tied and one[name][:2] == one[twin][:2] and _equal(one, name, one, twin)

    names = common_names(checkpoints, [one.name for one in checkpoints], same)
    for name in names:
        mine = first[name]
        for other in checkpoints[1:]:
            theirs = other[name]
            first_row = 0 if tokens or not name.endswith(ROWS) else 1
            if theirs.shape[first_row:] != mine.shape[first_row:]:
                raise UserError(
                    f"{name} must have one shape in all models, is {list(mine.shape)} in {first.name} and "
                    f"{list(theirs.shape)} in {other.name}"
                )
            if (mine.dtype in FLOATS) != (theirs.dtype in FLOATS):
                raise UserError(
                    f"{name} is {mine.dtype} in {first.name} and {theirs.dtype} in {other.name}: cannot be mixed"
                )
            if mine.dtype not in FLOATS and (mine.dtype != theirs.dtype or not _equal(first, name, other, name)):
                raise UserError(
                    f"{name} ({mine.dtype}) must be equal in all models, because it cannot be averaged; "
                    f"{other.name}'s differs from {first.name}'s"
                )
    return names


def models_of(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models, with stacks replaced by their components, each once."""
    models = (one for stack in checkpoints for one in ([piece.model for piece in stack.pieces] or [stack]))
    return list({one.name: one for one in models}.values())


def _equal(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    if a[name].nbytes != b[other].nbytes:
        return False
    return all(x == y for x, y in zip(read_bytes(a, name), read_bytes(b, other), strict=True))


def common_names(
    models: Sequence[Checkpoint | Collection[str]], labels: Sequence[str], same: Callable[[Any, str, str], bool]
) -> list[str]:
    """Tensors of all models, in the first one's order. One model may store a tensor under two names (tied embeddings),
    another under one; same: whether a model's two names refer to one tensor. Raises UserError if any other tensor is
    missing."""
    common = set.intersection(*(set(one) for one in models))
    for one, label in zip(models, labels, strict=True):
        for name in one:
            if name not in common and not any(same(one, name, twin) for twin in common):
                lacks = next(other for other, names in zip(labels, models, strict=True) if name not in names)
                raise UserError(f"{name} is in {label} and not in {lacks}: the models' tensors must be the same")
    return [name for name in models[0] if name in common]


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder and checkpoint.folder / "config.json"
    return _json(path) if path and path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    from fastalign._base.files import read_json

    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def _same_config(first: Checkpoint, mine: dict, other: Checkpoint, theirs: dict, free: set[str], way_out: str) -> None:
    """free: keys that may differ, besides those that always may."""
    if not mine or not theirs:  # a file without a configuration
        return
    for key in sorted(
        (mine.keys() | theirs.keys()) - _FREE - free, key=lambda key: (key not in ("model_type", "architectures"), key)
    ):
        # Another version of transformers may have omitted default values.
        if key in mine and key in theirs and mine[key] != theirs[key]:
            raise UserError(
                f"config.json: {key} must be the same in all models, is {json.dumps(mine[key])} in {first.name} and "
                f"{json.dumps(theirs[key])} in {other.name}{way_out}"
            )


def _same_vocabulary(first: Checkpoint, other: Checkpoint, way_out: str) -> None:
    if first.folder is None or other.folder is None:
        return
    for file in ("tokenizer.json", *OLD_FILES):
        mine, theirs = first.folder / file, other.folder / file
        if not (mine.is_file() and theirs.is_file()):
            continue
        if os.path.samefile(mine, theirs) or _same_bytes(mine, theirs):
            if file == "tokenizer.json":
                return
        elif file != "tokenizer.json" or (what := _tokens_differ(_json(mine), _json(theirs))):
            detail = f": {what}" if file == "tokenizer.json" else ""
            raise UserError(
                f"{file} must hold the same vocabulary in all models, differs between {first.name} and {other.name}"
                f"{detail}{way_out}"
            )


def _same_bytes(a: Path, b: Path) -> bool:
    filecmp.clear_cache()  # it compares file times, which may be too coarse to show a change
    return filecmp.cmp(a, b, shallow=False)


def _tokens_differ(mine: dict, theirs: dict) -> str:
    """The difference between the tokens of two tokenizer.json; "" for none. Padding and truncation are settings, not
    tokens."""
    a, b = tokens_of(mine), tokens_of(theirs)
    if a != b:
        token = next(token for token in (*a, *b) if a.get(token) != b.get(token))
        return f"token {token!r} is {a.get(token, 'absent')} and {b.get(token, 'absent')}"
    return "" if _merges(mine) == _merges(theirs) else "their merges"


def _merges(tokenizer: dict) -> list[tuple[str, ...]]:
    merges = (tokenizer.get("model") or {}).get("merges") or ()
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
