"""Adapters against peft: every architecture, on every kind of module, merged, mixed and taken out, by the logits."""

import json
import shutil

import pytest
import torch
import transformers
from tiny import tiny_tokenizer

from fastalign import soup
from fastalign._base.errors import UserError
from fastalign.soup.lora import CONFIG

IDS = torch.arange(4, 20)[None]
SMALL = dict(vocab_size=320, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
MODELS = {
    "gpt2": lambda **more: transformers.GPT2Config(**SMALL | GPT2 | more),
    "gpt2, square mlp": lambda **more: transformers.GPT2Config(**SMALL | GPT2 | {"n_inner": 32} | more),
    "llama": lambda **more: transformers.LlamaConfig(**SMALL | SIZES | more),
    "phi": lambda **more: transformers.PhiConfig(**SMALL | SIZES | more),  # a head with a bias
    "gptj": lambda **more: transformers.GPTJConfig(**SMALL | GPT2 | {"rotary_dim": 4} | more),
}
GPT2_TARGETS = [["c_attn"], ["c_proj"], ["c_attn", "c_proj", "c_fc"], ["c_proj", "lm_head"], ["lm_head"], ["wte"]]
TARGETS = {
    "gpt2": GPT2_TARGETS,
    "gpt2, square mlp": [["c_fc", "c_proj"], ["c_fc", "lm_head"]],
    "llama": [["q_proj", "v_proj"], ["down_proj", "o_proj"], ["q_proj", "lm_head"], ["embed_tokens", "q_proj"]],
    "phi": [["dense", "fc1"], ["fc2", "lm_head"]],
    "gptj": [["q_proj", "fc_in"], ["out_proj", "lm_head"]],
}
CASES = [(kind, targets) for kind, listed in TARGETS.items() for targets in listed]


def filled(config, seed=1):
    """Weights large enough that attention and positions matter."""
    draw = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.6 / p.shape[-1] ** 0.5)
            else:
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("bases"), {}
    for kind, config in MODELS.items():
        filled(config()).save_pretrained(root / kind)
        made[kind] = root / kind
    return made


def adapter(base, path, targets, seed=0, **settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **{"r": 3, "lora_alpha": 6} | settings)
    model = get_peft_model(load(base), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    model.save_pretrained(path)
    return path


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_peft(base, path):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(base), path).merge_and_unload())


@pytest.mark.slow_matrix
@pytest.mark.parametrize(("kind", "targets"), CASES, ids=[f"{kind}: {', '.join(targets)}" for kind, targets in CASES])
def test_merged_mixed_and_taken_out_as_peft_has_it(kind, targets, bases, tmp_path):
    base = bases[kind]
    first, second = (adapter(base, tmp_path / f"a{i}", targets, i) for i in range(2))
    plain, wanted = logits(load(base)), by_peft(base, first)
    assert (wanted - plain).abs().max() > 0.05
    soup.apply_adapters(base, [first], [1.0], tmp_path / "merged", show_progress=False)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-5)

    from peft import PeftModel

    both = PeftModel.from_pretrained(load(base), first, adapter_name="x")
    both.load_adapter(second, adapter_name="y")
    both.merge_adapter(["x", "y"])
    mixed = soup.merge_adapters([first, second], [1.0, 1.0], tmp_path / "mixed", show_progress=False)[0].out
    torch.testing.assert_close(by_peft(base, mixed), logits(both), rtol=1e-4, atol=1e-5)
    soup.apply_adapters(base, [first, second], [1.0, 1.0], tmp_path / "both", show_progress=False)
    torch.testing.assert_close(logits(load(tmp_path / "both")), logits(both), rtol=1e-4, atol=1e-5)
    if targets[0] in ("wte", "embed_tokens"):  # embeddings are not taken out
        return
    soup.extract_adapter(tmp_path / "merged", base, tmp_path / "out", rank=3, targets=targets, show_progress=False)
    torch.testing.assert_close(by_peft(base, tmp_path / "out"), wanted, rtol=1e-3, atol=1e-4)


def test_an_adapter_with_whole_modules_scales_and_patterns(bases, tmp_path):
    options = {
        "modules_to_save": ["lm_head"],
        "use_rslora": True,
        "rank_pattern": {"1.attn.c_proj": 5},
        "alpha_pattern": {"c_fc": 2},
    }
    made = adapter(bases["gpt2"], tmp_path / "a", ["c_proj", "c_fc"], **options)
    soup.apply_adapters(bases["gpt2"], [made], [1.0], tmp_path / "merged", show_progress=False)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), by_peft(bases["gpt2"], made), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("message", [True, False], ids=["in config.json", "by its class"])
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["c_proj", "wte"]])
def test_tied_embeddings_are_refused(message, targets, tmp_path):
    """config.json leaves out what is its class's default, and GPT-2's default is tied."""
    filled(MODELS["gpt2"](tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | ({"tie_word_embeddings": True} if message else {}))
    )
    made = adapter(tmp_path / "base", tmp_path / "a", targets)
    with pytest.raises(UserError, match="ties to its other embedding") as caught:
        soup.apply_adapters(tmp_path / "base", [made], [1.0], tmp_path / "out", show_progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_square_weight_of_a_class_that_is_not_known(bases, tmp_path):
    """Remote code: refused where it could be either way, and where the adapter's flag leaves no doubt merged."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    made = adapter(base, tmp_path / "a", ["c_proj"])
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "ours",
        "auto_map": {"AutoModel": "ours.Ours"},
    }
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"transformers does not know: whether .* or its transpose cannot be determined"
    ):
        soup.apply_adapters(base, [made], [1.0], tmp_path / "out", show_progress=False)
    mixed = adapter(bases["gpt2"], tmp_path / "mixed", ["c_attn", "c_proj", "lm_head"])
    # The head's; c_attn's shape shows the others'.
    assert not json.loads((mixed / CONFIG).read_text())["fan_in_fan_out"]
    with pytest.raises(UserError, match="cannot be determined"):
        soup.apply_adapters(base, [mixed], [1.0], tmp_path / "out", show_progress=False)


def test_adapters_whose_flags_differ_are_mixed_module_by_module(bases, tmp_path):
    """peft's flag is of the module that it came to last: it differs between adapters of one module and of one more."""
    base = bases["gpt2"]
    made = [adapter(base, tmp_path / "a", ["c_proj"]), adapter(base, tmp_path / "b", ["c_proj", "lm_head"], 1)]
    assert [json.loads((one / CONFIG).read_text())["fan_in_fan_out"] for one in made] == [True, False]
    mixed = soup.merge_adapters(made, [1.0, 1.0], tmp_path / "mixed", show_progress=False)[0].out
    soup.apply_adapters(base, made, [1.0, 1.0], tmp_path / "both", show_progress=False)
    torch.testing.assert_close(logits(load(tmp_path / "both")), by_peft(base, mixed), rtol=1e-4, atol=1e-5)


def test_a_vocabulary_cut_with_the_heads_bias(bases, tmp_path):
    tokenizer = tiny_tokenizer()
    for i in range(2):
        filled(MODELS["phi"](vocab_size=len(tokenizer) + 8), seed=i).save_pretrained(tmp_path / f"m{i}")
        tokenizer.save_pretrained(tmp_path / f"m{i}")
    models = [tmp_path / "m0", tmp_path / "m1"]
    soup.merge(models, [0.0, 1.0], tmp_path / "out", tokenizer="sidecar", show_progress=False)
    cut, whole = load(tmp_path / "out"), load(models[1])
    assert cut.lm_head.bias.shape == (len(tokenizer),)
    torch.testing.assert_close(logits(cut), logits(whole)[..., : len(tokenizer)])


def test_remote_code_and_templates_come_along(bases, tmp_path):
    models = [shutil.copytree(bases["llama"], tmp_path / f"m{i}") for i in range(2)]
    for one in models:
        config = json.loads((one / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_ours.Ours"}}
        (one / "config.json").write_text(json.dumps(config))
        (one / "modeling_ours.py").write_text("from .parts_ours import *\n")
        (one / "parts_ours.py").write_text("")
        (one / "chat_template.jinja").write_text("{{ messages }}")
    soup.merge(models, [0.5, 0.5], tmp_path / "out", show_progress=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"modeling_ours.py", "parts_ours.py", "chat_template.jinja", "config.json"}


def test_an_adapters_own_template_is_not_lost_in_silence(bases, tmp_path):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    made = adapter(base, tmp_path / "a", ["q_proj"])
    for folder, template in ((base, "{{ messages }}"), (made, "{{ messages }} ")):
        (folder / "chat_template.jinja").write_text(template)
    with pytest.warns(UserWarning, match=r"its chat_template.jinja differs from .*'s, and the output gets the base's"):
        soup.apply_adapters(base, [made], [1.0], tmp_path / "out", show_progress=False)
    (made / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("warned"))
        soup.apply_adapters(base, [made], [1.0], tmp_path / "again", show_progress=False)
