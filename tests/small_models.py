"""Models of several architectures, small, in float64 where their modules allow it, with heads far from uniform."""

import torch
import transformers

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
MODELS = {
    "llama": ("Llama", SMALL),
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2 (softcap)": ("Gemma2", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi (bias)": ("Phi", SMALL),
    "mixtral": ("Mixtral", SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}),
    "gpt-neox": ("GPTNeoX", SMALL),
    "cohere (scale)": ("Cohere", SMALL | {"num_key_value_heads": 2, "logit_scale": 0.3}),
    "granite (scaling)": ("Granite", SMALL | {"logits_scaling": 4.0}),
}


WINDOWED = {
    "mistral (window)": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 4}),
    "gemma3 (some windows)": (
        "Gemma3",
        SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3, "sliding_window_pattern": 2},
    ),
}


def build(name):
    if name in WINDOWED:
        return _windowed(name)
    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)  # far from uniform, so that a missed scale or softcap shows
        if head.bias is not None:
            head.bias.normal_()
    # grouped_mm, which runs the experts, has no float64
    return model.eval() if family == "Mixtral" else model.double().eval()


def _windowed(name):
    family, sizes = WINDOWED[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**sizes, pad_token_id=0)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
