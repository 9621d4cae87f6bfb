"""Stacks of other models' layers, and what comes along with them: configuration, tokenizer, chat template."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from fastalign import soup
from fastalign._base.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [tiny_folder(root / f"m{i}", seed=i, chat=i < 2) for i in range(3)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def layer(name, number):
    """The name with another layer's number."""
    parts = name.split(".")
    return ".".join([*parts[:2], str(number), *parts[3:]])


def test_a_stack_has_the_layers_asked_for_and_loads(models, tmp_path):
    from transformers import AutoModelForCausalLM

    a, b = tmp_path / "a", tmp_path / "b"
    for source, target, kinds in ((models[0], a, ["x", "y"]), (models[1], b, ["x", "z"])):
        shutil.copytree(source, target)
        config = json.loads((target / "config.json").read_text()) | {"some_layer_kinds": kinds, "rows": [1, 2]}
        (target / "config.json").write_text(json.dumps(config))
    made = soup.merge(
        [[(a, 0, 2), (b, 1, 2), (a, 1, 2)]], [1.0], tmp_path / "out", max_shard_size="30kB", show_progress=False
    )
    result = {}
    for path in made.out.glob("*.safetensors"):
        result |= load_file(path)
    kept, other = weights(a), weights(b)
    sources = [(kept, 0), (kept, 1), (other, 1), (kept, 1)]
    assert len(result) == 3 + 4 * 9
    for name, tensor in result.items():
        source, number = sources[int(name.split(".")[2])] if ".layers." in name else (kept, None)
        assert torch.equal(tensor, source[name if number is None else layer(name, number)]), name
    config = json.loads((made.out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["rows"] == [1, 2]
    assert config["some_layer_kinds"] == ["x", "y", "z", "y"]
    model = AutoModelForCausalLM.from_pretrained(made.out)
    assert model.config.num_hidden_layers == 4 and torch.equal(
        model.state_dict()["model.layers.2.mlp.up_proj.weight"], other["model.layers.1.mlp.up_proj.weight"]
    )
    recorded = json.loads(soup.open_checkpoint(made.out).files[0].metadata["fastalign"])
    assert [(one["name"], one["first"], one["last"]) for one in recorded["models"][0]["layers"]] == [
        ("a", 0, 2),
        ("b", 1, 2),
        ("a", 1, 2),
    ]
    assert str(tmp_path) not in json.dumps(recorded)


def test_the_ends_come_from_the_lowest_and_the_highest_model(models, tmp_path):
    made = soup.merge([[(models[0], 0, 1), (models[1], 0, 2)]], [1.0], tmp_path / "out", show_progress=False)
    result, a, b = weights(made.out), weights(models[0]), weights(models[1])
    assert torch.equal(result["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(result["model.norm.weight"], b["model.norm.weight"])
    assert torch.equal(result["lm_head.weight"], b["lm_head.weight"])


def test_stacks_are_mixed_as_models_are(models, tmp_path):
    a, b, c = models
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"""
models:
  - {{model: [{{model: {a}, layers: [0, 2]}}, {{model: {b}, layers: [0, 1]}}], weight: 0.25}}
  - {{model: [{{model: {c}, layers: [1, 2]}}, {{model: {c}, layers: [0, 2]}}], weight: 0.75}}
""")
    result = weights(soup.merge(**soup.read_recipe(recipe), out=tmp_path / "out", show_progress=False).out)
    x, y, z = map(weights, models)
    name = "model.layers.2.self_attn.q_proj.weight"
    torch.testing.assert_close(result[name], 0.25 * y[layer(name, 0)] + 0.75 * z[layer(name, 1)])
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(result[name], 0.25 * x[name] + 0.75 * z[layer(name, 1)])
    plain = soup.merge([a, c], [0.5, 0.5], tmp_path / "plain", show_progress=False)
    whole = soup.merge([[(a, 0, 2)], c], [0.5, 0.5], tmp_path / "whole", show_progress=False)
    assert (plain.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_what_cannot_be_stacked(models, tmp_path):
    a, b, _ = models

    def refused(stack, part, **more):
        with pytest.raises(UserError) as caught:
            soup.merge([stack], [1.0], tmp_path / "no", show_progress=False, **more)
        assert part in str(caught.value) and "\n" not in str(caught.value)

    refused([(a, 0, 3)], "layers 0 to 3 requested, but it has 0 to 2")
    refused([(a, 1, 1)], "layers 1 to 1 requested")
    refused([a, b], "a stack must be a list of (model, first layer, last layer + 1)")
    refused([], "a stack must be a list")
    for number, (names, part) in enumerate(
        (
            (["w"], "its tensors have none"),
            (["h.0.w", "h.2.w"], "its tensors have none"),
            (["h.0.w", "v.0.w"], "its tensors have 1 named h.*, 1 named v.*"),
        )
    ):
        save_file({name: torch.ones(2) for name in names}, tmp_path / f"{number}.safetensors")
        refused([(tmp_path / f"{number}.safetensors", 0, 1)], part)
    odd, other = tmp_path / "odd.safetensors", tmp_path / "other.safetensors"
    save_file({"h.0.w": torch.ones(2), "thing": torch.ones(2)}, odd)
    save_file({"g.0.w": torch.ones(2)}, other)
    refused([(odd, 0, 1), (other, 0, 1)], "layers must have the same prefix, h.* in")
    shutil.copy(odd, tmp_path / "copy.safetensors")
    refused(
        [(odd, 0, 1), (tmp_path / "copy.safetensors", 0, 1)], "thing: cannot tell whether it comes before the layers"
    )
    assert soup.merge([[(odd, 0, 1), (odd, 0, 1)]], [1.0], tmp_path / "twice", show_progress=False).models == 1
    wider = tmp_path / "wider"
    shutil.copytree(b, wider)
    config = json.loads((wider / "config.json").read_text()) | {"num_attention_heads": 8}
    (wider / "config.json").write_text(json.dumps(config))
    refused([(a, 0, 1), (wider, 0, 1)], "num_attention_heads must be the same in all models")


# ---- what comes along ----


def padded(source, target, rows):
    """A copy whose embeddings have more rows than the tokenizer has tokens."""
    shutil.copytree(source, target)
    kept = weights(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept[name] = torch.cat([kept[name], torch.ones(rows, kept[name].shape[1])])
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + rows}))
    return target


def test_embeddings_are_cut_to_the_tokenizers_tokens(models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = [padded(model, tmp_path / model.name, 7) for model in models[:2]]
    plain = soup.merge(models[:2], [0.5, 0.5], tmp_path / "plain", show_progress=False).out
    out = soup.merge(pair, [0.5, 0.5], tmp_path / "out", tokenizer="sidecar", show_progress=False).out
    assert all(torch.equal(x, weights(plain)[name]) for name, x in weights(out).items())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)
    kept = soup.merge(pair, [0.5, 0.5], tmp_path / "kept", show_progress=False).out
    assert weights(kept)["lm_head.weight"].shape[0] == len(tokenizer) + 7
    other = soup.merge(pair, [0.5, 0.5], tmp_path / "other", tokenizer=str(models[2]), show_progress=False).out
    assert AutoTokenizer.from_pretrained(other).chat_template is None  # model 2 has none
    assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_chat_templates(models, tmp_path):
    from transformers import AutoTokenizer

    def template(out, which, asked):
        made = soup.merge([models[i] for i in which], None, tmp_path / out, chat_template=asked, show_progress=False)
        return AutoTokenizer.from_pretrained(made.out).chat_template

    own = AutoTokenizer.from_pretrained(models[0]).chat_template
    assert template("auto", [2, 0, 1], "auto") == own  # two have it, the first has none
    assert template("none", [2], "auto") is None
    assert template("text", [0, 1], "<{{ messages[0]['content'] }}>") == "<{{ messages[0]['content'] }}>"
    with pytest.raises(UserError, match="got 'chatml'"):
        template("no", [0], "chatml")


def test_sidecars_that_are_refused(models, tmp_path):
    def refused(part, **more):
        with pytest.raises(UserError) as caught:
            soup.merge(models[:2], [0.5, 0.5], tmp_path / "no", show_progress=False, **more)
        assert part in str(caught.value) and "\n" not in str(caught.value)

    rule = "sidecar_from must be first, one of the models, or base where there is one"
    refused(f"{rule}, got 'base'", sidecar_from="base")
    refused("got 'elsewhere'", sidecar_from="elsewhere")
    refused("tokenizer must be sidecar, union or a folder with a tokenizer, got 'base'", tokenizer="base")
    other = tmp_path / "other"
    shutil.copytree(models[0], other)
    kept = json.loads((other / "tokenizer.json").read_text())
    kept["added_tokens"].append({**kept["added_tokens"][-1], "content": "<new>", "id": len(kept["model"]["vocab"])})
    (other / "tokenizer.json").write_text(json.dumps(kept))
    refused("token '<new>' is 320 in the tokenizer and absent in all models", tokenizer=str(other))
    weights_of = weights(models[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # now with a row for the new token
        weights_of[name] = torch.cat([weights_of[name], torch.ones(1, 32)])
    save_file(weights_of, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    cut = soup.merge([models[0], other], [0.5, 0.5], tmp_path / "cut", tokenizer="sidecar", show_progress=False).out
    same = soup.merge(models[:2], [0.5, 0.5], tmp_path / "same", show_progress=False).out
    assert all(torch.equal(x, weights(same)[name]) for name, x in weights(cut).items())
    joined = soup.merge([models[0], other], [0.5, 0.5], tmp_path / "joined", tokenizer="union", show_progress=False).out
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = torch.cat([weights(same)[name], torch.ones(1, 32)])
        assert torch.equal(weights(joined)[name], wanted)
    second = soup.merge(models[:2], [0.5, 0.5], tmp_path / "second", sidecar_from=str(models[1]), show_progress=False)
    assert (second.out / "config.json").is_file()


def test_model_stock_row_by_row(tmp_path):
    torch.manual_seed(0)
    shapes = {"w": (30, 20), "v": (17,), "c": (4, 3, 5), "s": ()}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    kept = [base] + [{name: x + 0.3 * torch.randn_like(x) for name, x in base.items()} for _ in range(3)]
    for i, one in enumerate(kept):
        save_file(one, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    options = {"method": "model_stock", "base": paths[0], "parameters": {"filter_wise": True}, "show_progress": False}
    result = weights(soup.merge(paths[1:], None, tmp_path / "out", **options).out)
    cut = weights(soup.merge(paths[1:], None, tmp_path / "cut", memory_limit="9kB", **options).out)
    for name, x in base.items():
        rows = x.reshape(-1, x.shape[-1] if x.ndim else 1)
        deltas = [one[name].reshape(rows.shape) - rows for one in kept[1:]]
        wanted = rows.clone()
        for i in range(len(rows)):
            cosines = [
                torch.cosine_similarity(deltas[j][i], deltas[k][i], dim=0, eps=0) for j, k in ((0, 1), (0, 2), (1, 2))
            ]
            cosine = sum(cosines) / 3
            wanted[i] += 3 * cosine / (1 + 2 * cosine) * sum(delta[i] for delta in deltas) / 3
        torch.testing.assert_close(result[name], wanted.reshape(x.shape), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cut[name], result[name], rtol=1e-12, atol=1e-12)
