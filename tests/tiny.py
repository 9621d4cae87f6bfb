"""Tiny models with random weights and a tiny tokenizer, built in milliseconds, for tests of anything that needs one."""

from __future__ import annotations

import torch

WORDS = (
    "the a cat dog fox sat ran saw on under mat hat house red blue big small and but then was is very good bad "
    "hello world yes no please thank you why how what who tell me story write review of"
).split()
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def tiny_tokenizer(*, chat: bool = False):
    """Byte-level BPE over a few words: 256 bytes + merges + <pad> 0, <s> 1, </s> 2; every string can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def tiny_causal_lm(tokenizer=None, *, kind: str = "llama", dtype=torch.float64, seed: int = 0, scale: float = 20.0):
    """A two-layer "llama" (rotary, grouped heads), "gpt2" (learned positions) or "mistral" (window of 8) in eval mode.

    Weights are eight times as large as at initialisation, so that what is attended to and where matters; the head's
    `scale` times, so that the next-token distributions are far from uniform.
    """
    import transformers

    vocab = len(tokenizer) if tokenizer is not None else 320
    common = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        more = {"sliding_window": 8} if kind == "mistral" else {}
        cls = transformers.MistralConfig if kind == "mistral" else transformers.LlamaConfig
        config = cls(**common, **sizes, **more, num_key_value_heads=2, max_position_embeddings=256)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= scale if weight is model.lm_head.weight else 8
    return model.to(dtype).eval()


def tiny_folder(path, *, chat: bool = False, **model_options):
    """Save a tiny causal model (float32 unless told) and its tokenizer as a folder that from_pretrained reads."""
    tokenizer = tiny_tokenizer(chat=chat)
    model = tiny_causal_lm(tokenizer, **{"dtype": torch.float32, **model_options})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
