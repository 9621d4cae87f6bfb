"""Every causal language model of transformers, small: two layers or so, weights large enough that attention and
positions matter.

Configurations are the classes' defaults with every size replaced by a small one; EXTRA holds what a class needs
besides.
"""

from __future__ import annotations

import functools

import torch

VOCAB = 320

# Sizes, whatever the class; a name that a configuration lacks is left out.
SIZES = dict(
    vocab_size=VOCAB, unpadded_vocab_size=VOCAB,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    hidden_size=32, d_model=32, n_embd=32, dim=32, embedding_size=32, word_embed_proj_dim=32, embed_dim=32, emb_dim=32,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, decoder_layers=2, encoder_layers=1,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    num_key_value_heads=2, head_dim=8, attention_head_dim=8, global_head_dim=8,
    intermediate_size=48, ffn_dim=48, d_ff=48, n_inner=48, decoder_ffn_dim=48, encoder_ffn_dim=48,
    dim_ff=48, d_inner=48, ffn_hidden_size=48, feed_forward_size=48,
    moe_intermediate_size=24, shared_expert_intermediate_size=24, shared_intermediate_size=24,
    expert_ffn_hidden_size=24, num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_topk=2, moe_k=2,
    n_shared_experts=1, num_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, qk_head_dim=16,
    index_n_heads=2, index_head_dim=16, index_topk=64,
    max_position_embeddings=128, n_positions=128, n_ctx=128,
    max_seq_len=128, max_target_positions=128, max_position=128,
    state_size=8, mamba_d_state=8, mamba_d_head=8, mamba_n_heads=8, mamba_n_groups=1, ssm_state_size=8,
    mamba_num_heads=8, mamba_head_dim=8, n_groups=1, time_step_rank=4, mamba_dt_rank=4, lru_width=32,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    rotary_dim=4, sliding_window=6, attention_window_size=6, attention_window=6, window_size=6,
    attention_chunk_size=6, local_attention=6,
    dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip
LATENT = dict(head_dim=8, num_key_value_heads=4, num_attention_heads=4)  # of latent attention the rope's part
EXTRA: dict[str, dict] = {
    "afmoe": dict(num_dense_layers=1),
    "bamba": dict(attn_layer_indices=[1]),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    ),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_hidden_layers=2),
    "mamba": dict(intermediate_size=64), "falcon_mamba": dict(intermediate_size=64),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "recurrent_gemma": dict(num_key_value_heads=1, block_types=["recurrent", "attention"], logits_soft_cap=3.0,
                            num_hidden_layers=2),
    "reformer": dict(
        is_decoder=True, attn_layers=["local", "lsh"], axial_pos_shape=[8, 16], axial_pos_embds_dim=[16, 16],
        feed_forward_size=48, local_attn_chunk_length=16, lsh_attn_chunk_length=16, num_buckets=2,
        attention_head_size=8,
    ),
    "roc_bert": dict(pronunciation_vocab_size=20, shape_vocab_size=20, pronunciation_embed_dim=8, shape_embed_dim=8),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "gemma3n_text": dict(num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
                         layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2, intermediate_size=48,
                         activation_sparsity_pattern=[0.0, 0.0], laurel_rank=8, altup_num_inputs=2),
    "gemma4_text": dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_kv_shared_layers=0),
    "gemma4_unified_text": dict(vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0),
    "xlstm": dict(num_heads=4, qk_dim_factor=0.5, v_dim_factor=1.0),
    "dory": dict(layer_types=["sliding_attention", "mlp", "full_attention", "mlp"], n_input_layers=2,
                 n_recurrent_layers=2, n_output_layers=0, num_hidden_layers=4),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"], num_hidden_layers=4,
                  attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4, n_mamba_heads=2,
                  mamba_dt_rank=4),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"], num_hidden_layers=2, num_key_value_heads=4,
                   n_mamba_heads=8, mamba_ngroups=1, chunk_size=8),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"],
                                rope_parameters={kind: dict(rope_type="default", rope_theta=1e4)
                                                 for kind in ("sliding_attention", "full_attention")}),
    "dots3_note_text": dict(layer_types=["indexed_attention", "sliding_attention"], mlp_layer_types=["dense", "sparse"],
                            per_layer_config=None, shared_experts_intermediate_size=24),
}  # fmt: skip
DECODERS = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
            "xmod", "cpmant")  # fmt: skip


def small_config(model_type: str):
    import transformers

    return small(type(transformers.AutoConfig.for_model(model_type)), EXTRA.get(model_type, {}), model_type in DECODERS)


def small(cls, extra: dict, decoder: bool = False):
    """A configuration of the class with every size that it has replaced, those of its parts too."""
    import transformers

    config = cls()
    given = config.to_dict()
    names = set(given) | set(getattr(cls, "attribute_map", {}))
    sizes = {k: v for k, v in SIZES.items() if k in names and not isinstance(given.get(k), (list, tuple, dict))}
    if "qk_rope_head_dim" in names:
        sizes |= {k: v for k, v in LATENT.items() if k in names}
    if decoder:
        sizes["is_decoder"] = True
    for name, part in vars(config).items():
        if isinstance(part, transformers.PreTrainedConfig):
            sizes[name] = small(type(part), EXTRA.get(part.model_type, {}))
    kinds = list(dict.fromkeys(given.get("layer_types") or []))
    if kinds:
        sizes["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        for name in ("num_hidden_layers", "n_layer"):
            if name in sizes:
                sizes[name] = len(sizes["layer_types"])
    return cls(**(sizes | extra))


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
    """The model, in eval mode, with no end token; raises whatever a class raises that cannot be built small."""
    import transformers

    config = small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > 8e6:
        raise ValueError(f"{model_type} is not small: {size:,} weights")
    model = fill(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def model_types() -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return tuple(sorted(NAMES))
