"""Models of different tokenizers merged: unions, rows in another tokenizer's order, padded rows, against plain numpy
in float64."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from typer.testing import CliRunner

from fastalign import backend, soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app
from fastalign.soup.outputs import Outputs

CHAT = ["<|im_start|>", "<|im_end|>"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def other_tokenizer():
    """Of other words, so that the same tokens have other numbers; with two added ones of its own, and without <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["a tiger and a zebra walk; the zebra says hello to the red tiger"] * 4, trainer)
    core.add_special_tokens(CHAT)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def folder(path, tokenizer, *, kind="llama", tied=False, more_rows=0, seed=0):
    """A model in float64 with `more_rows` rows that no token has."""
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    cls = {"llama": transformers.LlamaConfig, "phi": transformers.PhiConfig}[kind]
    config = cls(vocab_size=len(tokenizer) + more_rows, tie_word_embeddings=tied, **SIZES, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight.data.normal_()
    model.double().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["tied", "untied", "head with a bias"])
def models(request, tmp_path_factory):
    """A and B of one tokenizer, C and D of another; B and D have more rows than tokens."""
    root = tmp_path_factory.mktemp("models")
    options = {"tied": request.param == "tied", "kind": "phi" if "bias" in request.param else "llama"}
    for i, one in enumerate("ABCD"):
        tokenizer = tiny_tokenizer() if one in "AB" else other_tokenizer()
        folder(root / one, tokenizer, seed=i, more_rows=5 * (one in "BD"), **options)
    return root


def vocab(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path).get_vocab()


def tensors(path):
    return {name: x.numpy() for name, x in load_file(path / "model.safetensors").items()}


def is_rows(name):
    return name.startswith(("model.embed_tokens", "lm_head"))


def in_order(paths, tokens, rows, base=None):
    """Each model's tensors with rows for `tokens`, token by token. base: the place of the one whose rows others take
    first."""
    kept, known = [tensors(path) for path in paths], [vocab(path) for path in paths]
    result = [dict(one) for one in kept]
    for name in filter(is_rows, kept[0]):
        for i, one in enumerate(kept):
            table = np.zeros((rows, *one[name].shape[1:]))
            for token, place in tokens.items():
                have = [j for j in range(len(paths)) if token in known[j]]
                sources = [i] if i in have else [base] if base in have else have
                table[place] = np.mean([kept[j][name][known[j][token]] for j in sources], axis=0)
            table[len(tokens) :] = table[: len(tokens)].mean(axis=0)
            result[i][name] = table
    return result


def merged(tmp_path, recipe, out="out"):
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = soup.merge(**soup.read_recipe(tmp_path / "r.yml"), out=tmp_path / out, show_progress=False)
    assert not [path.name for path in made.out.iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")]
    return made.out


def listed(models, which, **parameters):
    return [
        {"model": str(models / one), "parameters": {key: x[i] for key, x in parameters.items()}}
        for i, one in enumerate(which)
    ]


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, wanted[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_a_union_without_a_base(models, tmp_path, native, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not native:
        monkeypatch.setattr(backend, "native_runs", lambda: False)
    recipe = {"merge_method": "linear", "models": listed(models, "ABD", weight=[1, 2, 3]), "tokenizer_source": "union"}
    out = merged(tmp_path, recipe)
    first, other, tokens = vocab(models / "A"), vocab(models / "D"), vocab(out)
    assert set(tokens) == {*first, *other} and all(tokens[token] == i for token, i in first.items())
    assert set(tokens.values()) == set(range(len(tokens)))
    kept = in_order([models / one for one in "ABD"], tokens, len(tokens))
    close(
        tensors(out), {name: sum(w * one[name] for w, one in zip((1, 2, 3), kept, strict=True)) / 6 for name in kept[0]}
    )

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    for token, i in tokens.items():
        assert tokenizer.convert_ids_to_tokens(i) == token and tokenizer.convert_tokens_to_ids(token) == i
        if token not in first:  # an added one is found as it is spelt
            assert tokenizer(token, add_special_tokens=False).input_ids == [i]
    for text in ("hello world the cat", "<|im_start|>a zebra<|im_end|>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert set(CHAT) <= set(tokenizer.added_tokens_encoder)
    assert all(tokenizer.added_tokens_decoder[tokens[one]].special for one in CHAT)
    assert model(torch.tensor([[tokens["<|im_end|>"]]])).logits.shape[-1] == len(tokens)


def test_a_union_over_a_base(models, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "C"),
        "models": listed(models, "ABD", weight=[0.5, 0.25, 0.7]),
        "parameters": {"lambda": 0.6},
        "tokenizer": {"source": "union", "pad_to_multiple_of": 64},
    }
    out = merged(tmp_path, recipe)
    tokens = vocab(out)
    rows = json.loads((out / "config.json").read_text())["vocab_size"]
    assert rows % 64 == 0 and 0 < rows - len(tokens) < 64
    base, *kept = in_order([models / one for one in "CABD"], tokens, rows, base=0)
    moved = {
        name: sum(w * (one[name] - x) for w, one in zip((0.5, 0.25, 0.7), kept, strict=True))
        for name, x in base.items()
    }
    close(tensors(out), {name: x + 0.6 * moved[name] for name, x in base.items()})


METHODS = {
    "ties": ("C", "AB", {"weight": 0.5, "density": 0.4}),
    "dare_linear": ("C", "AB", {"weight": 0.5, "density": 0.4}),
    "slerp": ("A", "AC", {"t": 0.3}),
    "karcher": (None, "AC", {}),
    "model_stock": ("C", "AB", {"filter_wise": True}),
    "nuslerp": (None, "AD", {"weight": 0.5, "nuslerp_row_wise": True}),
    "sce": ("A", "CD", {"select_topk": 0.5}),
    "arcee_fusion": ("A", "D", {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_the_rows_in_their_order(models, tmp_path, method):
    """As if each model had been written with these rows and no tokenizer."""
    base, which, parameters = METHODS[method]
    recipe = {"merge_method": method, "models": listed(models, which), "parameters": parameters}
    recipe |= {"base_model": str(models / base)} if base else {}
    out = merged(tmp_path, recipe | {"tokenizer_source": "union"})
    names = ([base] if base and base not in which else []) + list(which)
    tokens = vocab(out)
    kept = in_order([models / one for one in names], tokens, len(tokens), base=names.index(base) if base else None)
    for name, one in zip(names, kept, strict=True):
        save_file({key: torch.from_numpy(x) for key, x in one.items()}, tmp_path / f"{name}.safetensors")
    text = json.dumps(recipe)
    for name in names:
        text = text.replace(json.dumps(str(models / name)), json.dumps(str(tmp_path / f"{name}.safetensors")))
    wanted = merged(tmp_path, json.loads(text), "wanted")
    close(tensors(out), tensors(wanted))


def test_another_models_tokenizer(models, tmp_path):
    """Its order; special tokens keep their meaning in the configuration."""
    recipe = {
        "merge_method": "linear",
        "base_model": str(models / "A"),
        "models": listed(models, "AC", weight=[0.5, 0.5]),
        "tokenizer": {"source": str(models / "C"), "pad_to_multiple_of": 8.0},
    }
    recipe["models"][0]["parameters"]["weight"] = 0.25
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(
        UserError, match=r"config.json: bos_token_id 1 is '<s>' in .*A, which the tokenizer does not have"
    ):
        merged(tmp_path, recipe)
    recipe["tokenizer"]["source"], recipe["base_model"] = str(models / "A"), str(models / "C")
    config = json.loads((models / "C" / "config.json").read_text())
    out = merged(tmp_path, recipe)
    tokens, before = vocab(out), {i: token for token, i in vocab(models / "C").items()}
    assert tokens == vocab(models / "A")
    made = json.loads((out / "config.json").read_text())
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert made[key] == tokens[before[config[key]]]
    kept = in_order([models / "A", models / "C"], tokens, made["vocab_size"], base=1)
    close(tensors(out), {name: (0.25 * x + 0.5 * kept[1][name]) / 0.75 for name, x in kept[0].items()})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return folder(root / "A", tiny_tokenizer(), seed=0), folder(root / "C", other_tokenizer(), seed=1, more_rows=3)


def retyped(source, target, dtype):
    shutil.copytree(source, target)
    kept = {name: x.to(dtype) for name, x in load_file(source / "model.safetensors").items()}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return soup.merge(*arguments, show_progress=False, **options).out


def test_types_and_blocks(pair, tmp_path, monkeypatch):
    """A wide row is not rounded to a narrow model's type on its way; the output keeps the first model's; small blocks
    change nothing."""
    from fastalign.soup import vocabulary

    narrow = [
        retyped(one, tmp_path / one.name, dtype)
        for one, dtype in zip(pair, (torch.bfloat16, torch.float32), strict=True)
    ]
    out = quietly(narrow, [0.5, 0.5], tmp_path / "out", tokenizer="union", pad_to_multiple_of=64, dtype="float32")
    name, tokens = "lm_head.weight", vocab(out)
    own = {token: load_file(narrow[1] / "model.safetensors")[name][i] for token, i in vocab(narrow[1]).items()}
    made = load_file(out / "model.safetensors")[name]
    assert all(torch.equal(made[tokens[token]], own[token]) for token in own.keys() - vocab(narrow[0]).keys())
    kept = quietly(narrow, [0.5, 0.5], tmp_path / "kept", tokenizer="union", pad_to_multiple_of=64)
    assert {x.dtype for x in load_file(kept / "model.safetensors").values()} == {torch.bfloat16}
    monkeypatch.setattr(vocabulary, "_BLOCK", 8 * 16 * 4 * 7)
    again = quietly(narrow, [0.5, 0.5], tmp_path / "again", tokenizer="union", pad_to_multiple_of=64, dtype="float32")
    for name, x in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(x, load_file(out / "model.safetensors")[name], rtol=1e-6, atol=1e-7)


def test_a_stack_has_two_models_tokenizers(pair, tmp_path):
    a, c = pair
    stack = [(a, 0, 1), (c, 0, 1)]
    out = quietly([stack, [(c, 0, 1), (a, 0, 1)]], [0.25, 0.75], tmp_path / "out", tokenizer="union")
    tokens = vocab(out)
    x, y = in_order(pair, tokens, len(tokens))
    result = tensors(out)
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(result[name], 0.25 * x[name] + 0.75 * y[name], atol=1e-12)
    name = "lm_head.weight"
    np.testing.assert_allclose(result[name], 0.25 * y[name] + 0.75 * x[name], atol=1e-12)


def test_interrupted_and_gone_on_with(pair, tmp_path, monkeypatch):
    def stopped(outputs, shard, *rest):
        if shard is outputs.plan.layout[2]:
            raise KeyboardInterrupt
        return write(outputs, shard, *rest)

    write, options = Outputs.write, {"tokenizer": "union", "max_shard_size": "20kB"}
    wanted = quietly(pair, [0.5, 0.5], tmp_path / "wanted", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            quietly(pair, [0.5, 0.5], tmp_path / "out", **options)
    left = tmp_path / ".out.soup"
    assert sorted(path.name for path in left.glob("rows-*")) == ["rows-0.bin", "rows-1.bin"]
    for path in left.glob("rows-*"):
        path.write_bytes(b"half")
    out = quietly(pair, [0.5, 0.5], tmp_path / "out", **options)
    assert (
        sorted(path.name for path in out.iterdir()) == sorted(path.name for path in wanted.iterdir())
        and not left.exists()
    )
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in wanted.glob("*.safetensors"))
    assert quietly(pair, [0.5, 0.5], tmp_path / "out", **options) == out  # it was there already


def test_by_command(pair, tmp_path):
    (tmp_path / "r.yml").write_text(
        f"models: [{pair[0]}, {pair[1]}]\nweights: [0.5, 0.5]\ntokenizer: union\npad_to_multiple_of: 16\n"
    )
    requested = ["soup", "--recipe", str(tmp_path / "r.yml"), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*requested, "--dry-run"])
    assert run.exit_code == 0 and "time: about" in run.output and not (tmp_path / "out").exists(), run.output
    assert "tokens are added to" in run.output and not list(tmp_path.glob(".out*"))
    assert CliRunner().invoke(app, requested).exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] % 16 == 0


def test_what_cannot_be_joined(pair, tmp_path):
    a, c = pair

    def refused(part, models=pair, **options):
        with pytest.raises(UserError) as caught:
            quietly(models, [0.5, 0.5], tmp_path / "no", **options)
        assert part in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "no").exists()

    refused("pad_to_multiple_of needs a tokenizer", [a, a], pad_to_multiple_of=8)
    refused("pad_to_multiple_of must be a whole number from 1 on, got 0", pad_to_multiple_of=0, tokenizer="union")
    old = tmp_path / "old"
    shutil.copytree(c, old)
    (old / "tokenizer.json").rename(old / "tokenizer.model")
    refused("has tokenizer.model and no tokenizer.json, from which its tokens are read", [a, old], tokenizer="union")
    odd = tmp_path / "odd"
    shutil.copytree(a, odd)
    kept = load_file(a / "model.safetensors")
    save_file(kept | {"model.scale_of_tokens": torch.ones(320)}, odd / "model.safetensors")
    refused("model.scale_of_tokens of ", [odd, odd], tokenizer="union")
    # Gemma 3n's.
    save_file(kept | {"model.embed_tokens_per_layer.weight": torch.ones(256, 8)}, odd / "model.safetensors")
    refused("model.embed_tokens_per_layer.weight of ", [odd, odd], tokenizer="union")
    kept["model.symbols.weight"] = kept.pop("model.embed_tokens.weight")
    save_file(kept, odd / "model.safetensors")
    refused("no tensor has a name of input embeddings", [odd, odd], tokenizer="union")
    small = {name: x[:300] if is_rows(name) else x for name, x in load_file(a / "model.safetensors").items()}
    save_file(small, odd / "model.safetensors")
    refused(f" in {odd}, whose embeddings have 300 rows", [odd, c], tokenizer="union")
    path = tmp_path / "r.yml"
    for block, part in {
        "tokenizer: {source: union, tokens: {x: {source: b}}}": "got 'tokens'",
        "tokenizer: {pad_to_multiple_of: 2.5}": "pad_to_multiple_of must be a whole number",
        "tokenizer: {pad_to_multiple_of: yes}": "pad_to_multiple_of must be a whole number",
        "tokenizer: {source: union}\ntokenizer_source: union": "either tokenizer or tokenizer_source",
        f"tokenizer_source: base\nbase_model: {odd}": "with a tokenizer, the base_model must be one of the models",
    }.items():
        sources = ", ".join(f"{{model: {one}, layer_range: [0, 1]}}" for one in pair)
        path.write_text(f"merge_method: karcher\nslices: [{{sources: [{sources}]}}]\n{block}\n")
        with pytest.raises(UserError, match=part):
            soup.merge(**soup.read_recipe(path), out=tmp_path / "no", show_progress=False)


def test_a_model_without_a_tokenizer_has_the_first_ones(pair, tmp_path):
    a, c = pair
    bare = tmp_path / "bare.safetensors"
    shutil.copy(a / "model.safetensors", bare)
    result = tensors(quietly([a, bare, c], [0.2, 0.3, 0.5], tmp_path / "out", tokenizer="union"))
    wanted = tensors(quietly([a, a, c], [0.2, 0.3, 0.5], tmp_path / "wanted", tokenizer="union"))
    close(result, wanted)
