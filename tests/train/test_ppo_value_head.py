"""The value head's model: what it computes, saves, loads and shares."""

import json
import os

import pytest
import torch
from ppo_setup import lora, policy
from safetensors.torch import load_file, save_file
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer

from fastalign import UserError
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead as Model
from fastalign.train.value_head import create_reference_model

IDS = torch.arange(3, 15).view(2, 6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_the_fused_scores_are_those_of_the_logits(kind):
    model = policy(kind)
    logits, loss, values = model(IDS, labels=IDS)
    assert logits.shape == (2, 6, 320) and values.shape == (2, 6)
    torch.testing.assert_close(loss, model.pretrained_model(IDS, labels=IDS).loss)
    labels = IDS[:, 1:].clone()
    labels[0, :3] = -100
    labels[1, 4] = -100
    padded = torch.cat((IDS, torch.zeros(2, 3, dtype=torch.int64)), 1)  # padding behind changes nothing
    wide = torch.cat((labels, labels.new_full((2, 3), -100)), 1)
    result = model(padded, score_labels=wide)
    at = labels != -100
    logp = logits[:, :-1].log_softmax(-1)
    picked = logp.gather(-1, IDS[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    for mine, theirs in ((result.log_probs, picked), (result.entropy, entropy), (result.values, values[:, :-1])):
        torch.testing.assert_close(mine[:, :5], theirs * at, rtol=1e-9, atol=1e-10)
        assert not mine[:, 5:].any()
    assert len(model(padded, score_labels=wide, return_hidden=True).hidden) == at.sum()
    *_, cache = model(IDS, return_past_key_values=True, use_cache=True)
    assert cache.get_seq_length() == 6


def test_narrow_models_have_wide_logits_and_values():
    model = Model(tiny_causal_lm(tiny_tokenizer(), dtype=torch.bfloat16))
    logits, _, values = model(IDS)
    assert logits.dtype == values.dtype == torch.float32
    assert model(IDS, score_labels=IDS[:, 1:]).values.dtype == torch.float32


def test_the_state_has_the_models_names_and_loads_again(tmp_path):
    model = policy(seed=1)
    state = model.state_dict()
    assert set(state) == {*model.pretrained_model.state_dict(), "v_head.summary.weight", "v_head.summary.bias"}
    twin = policy(seed=2)
    twin.load_state_dict(state)
    torch.testing.assert_close(twin(IDS)[2], model(IDS)[2], rtol=0, atol=0)


def test_saved_and_loaded_again_here_and_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = Model.from_pretrained(tiny_folder(tmp_path / "base"), v_head_init_strategy="normal")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("stays")
    for _ in range(2):  # over itself too
        model.save_pretrained(tmp_path / "out")
    again = Model.from_pretrained(tmp_path / "out")
    assert again.pretrained_model.dtype == torch.float32
    for mine, theirs in zip(again(IDS)[::2], model(IDS)[::2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    torch.testing.assert_close(plain(IDS).logits, model(IDS)[0], rtol=0, atol=0)
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files >= {"mine.txt", "config.json", "model.safetensors", "value_head/model.safetensors"}
    assert not [f for f in files if f.startswith(".") or f.endswith(".bin")]


def test_reads_a_value_head_from_among_the_weights_where_trl_wrote_it(tmp_path):
    torch.manual_seed(0)
    model = Model.from_pretrained(tiny_folder(tmp_path), v_head_init_strategy="normal")
    save_file(
        load_file(tmp_path / "model.safetensors") | {k: v for k, v in model.state_dict().items() if "v_head" in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    torch.testing.assert_close(Model.from_pretrained(tmp_path)(IDS)[2], model(IDS)[2], rtol=0, atol=0)


def test_adapters_round_trip(tmp_path):
    torch.manual_seed(0)
    model = Model.from_pretrained(tiny_folder(tmp_path / "base"), peft_config=lora(), v_head_init_strategy="normal")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    again = Model.from_pretrained(tmp_path / "out")
    assert again.is_peft_model and any(p.requires_grad for n, p in again.named_parameters() if "lora" in n)
    for mine, theirs in zip(again(IDS)[::2], model(IDS)[::2], strict=True):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(UserError, match="peft_config must be None for a model that has adapters already"):
        Model.from_pretrained(tmp_path / "out", peft_config=lora())


def test_value_head_options():
    base = tiny_causal_lm(tiny_tokenizer())
    head = Model(base, v_head_init_strategy="normal", v_head_initializer_range=5.0, summary_dropout_prob=0.5).v_head
    assert float(head.summary.weight.detach().std()) > 2 and not head.summary.bias.any()
    x = torch.randn(64, 32, dtype=torch.float64)
    assert not torch.equal(head.train()(x), head(x)) and torch.equal(head.eval()(x), head(x))
    assert isinstance(Model(base, summary_dropout_prob=0.0).v_head.dropout, torch.nn.Identity)
    with pytest.raises(UserError, match="v_head_init_strategy must be None, 'random' or 'normal', got 'zeros'"):
        Model(base, v_head_init_strategy="zeros")


def test_from_config_and_generate():
    torch.manual_seed(0)
    model = Model.from_config(tiny_causal_lm(tiny_tokenizer()).config)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 9)
    assert model.config.vocab_size == 320 and model.is_encoder_decoder is False


def test_the_reference_is_a_frozen_copy():
    model = policy()
    reference = create_reference_model(model)
    assert not any(p.requires_grad for p in reference.parameters()) and all(p.requires_grad for p in model.parameters())
    before = reference(IDS)[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    torch.testing.assert_close(reference(IDS)[0], before, rtol=0, atol=0)
    assert set(reference.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("pattern", [None, "model.layers"])
def test_the_reference_shares_layers(pattern):
    model = policy()
    reference = create_reference_model(model, num_shared_layers=1, pattern=pattern)
    shared = {n for n, p in model.named_parameters() if p is dict(reference.named_parameters())[n]}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert shared == frozen == {n for n in shared if "embed_tokens" in n or "layers.0." in n} != set()
    for count in (0, 3):
        with pytest.raises(UserError, match=rf"num_shared_layers must lie in 1..2, got {count}"):
            create_reference_model(model, num_shared_layers=count)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda tmp: Model.from_pretrained(tmp / "none"), "no such model folder"),
        (lambda tmp: Model.from_pretrained(3), "must be a name, a folder or a causal model, got int"),
        (lambda tmp: Model.from_pretrained(tiny_folder(tmp), reward_adapter="x"), "reward_adapter is not supported"),
        (lambda tmp: _t5(), "model must be a causal language model"),
    ],
)
def test_bad_models_are_one_line(make, rule, tmp_path):
    with pytest.raises((UserError, FileNotFoundError), match=rule) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return Model(
        T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=9))
    )


def test_pushing_is_refused_without_a_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="push_to_hub needs the hub, and HF_HUB_OFFLINE is set"):
        policy().push_to_hub("me/mine")


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = policy()
    model.save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with torch.no_grad():
        model.v_head.summary.bias.add_(1)
    monkeypatch.setattr("fastalign.train.value_head.save_value_head", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        model.save_pretrained(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert json.loads((tmp_path / "config.json").read_text()) and not [n for n in os.listdir(tmp_path) if n[0] == "."]
