"""Every causal language model of transformers, small: two layers or so, weights large enough that attention and positions matter.

Configurations are the classes' defaults with every size replaced by a small one; EXTRA holds what a class needs besides.
"""

from __future__ import annotations

import functools

import torch

VOCAB = 304

# Sizes, whatever the class; a name that a configuration lacks is left out.
SIZES = dict(
    vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    hidden_size=32, d_model=32, n_embd=32, dim=32, embedding_size=32, word_embed_proj_dim=32, embed_dim=32, emb_dim=32,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, decoder_layers=2, encoder_layers=1,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    num_key_value_heads=2, head_dim=8, attention_head_dim=8, global_head_dim=8,
    intermediate_size=48, ffn_dim=48, d_ff=48, n_inner=48, decoder_ffn_dim=48, encoder_ffn_dim=48, dim_ff=48, d_inner=48,
    ffn_hidden_size=48, feed_forward_size=48,
    moe_intermediate_size=24, shared_expert_intermediate_size=24, shared_intermediate_size=24, expert_ffn_hidden_size=24,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2,
    n_shared_experts=1, num_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, qk_head_dim=16,
    index_n_heads=2, index_head_dim=16, index_topk=64,
    max_position_embeddings=128, n_positions=128, n_ctx=128, max_seq_len=128, max_target_positions=128, max_position=128,
    state_size=8, mamba_d_state=8, mamba_d_head=8, mamba_n_heads=8, mamba_n_groups=1, ssm_state_size=8, mamba_num_heads=8,
    mamba_head_dim=8, n_groups=1, time_step_rank=4, mamba_dt_rank=4, lru_width=32,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    rotary_dim=4, sliding_window=6, attention_window_size=6, attention_window=6, window_size=6, attention_chunk_size=6, local_attention=6,
    dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip
EXTRA: dict[str, dict] = {}


def text_config(config):
    """The part of a configuration that the language model reads."""
    return config.get_text_config(decoder=True)


def small_config(model_type: str):
    import transformers

    cls = type(transformers.AutoConfig.for_model(model_type))
    config = cls()
    names = set(vars(config)) | set(getattr(cls, "attribute_map", {}))
    sizes = {k: v for k, v in SIZES.items() if k in names} | EXTRA.get(model_type, {})
    layers = getattr(config, "layer_types", None)
    if layers:
        kinds = list(dict.fromkeys(layers))
        sizes["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        for name in ("num_hidden_layers", "n_layer"):
            if name in sizes:
                sizes[name] = len(sizes["layer_types"])
    return cls(**sizes)


def fill(model, seed: int = 1):
    """Weights large enough that attention and positions matter (at their first 0.02 attention is flat)."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=draw) * (0.7 if "emb" in name else 0.6 / p.shape[-1] ** 0.5))
            elif "norm" in name and "weight" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return model.eval()


def build(model_type: str, dtype=torch.float32):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    cls, config = getattr(transformers, NAMES[model_type]), small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    assert size < 3e6, f"{model_type} is not small: {size:,} weights"
    model = fill(cls(config)).to(dtype)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def model_types() -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return tuple(sorted(NAMES))
