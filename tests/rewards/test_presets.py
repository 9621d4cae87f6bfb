"""Presets of the literature: each agrees with its authors' formula, on a tiny random model of its architecture."""

import json

import numpy as np
import pytest
import torch
from commands import fastalign
from safetensors.torch import load_file, save_file
from test_reward_models import PROMPTS, RESPONSES, TEMPLATE, bert, llama, tokenizer

from fastalign import UserError, rewards
from fastalign.rewards.presets import ARMORM, PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|> ' + m['role'] + ' <|end_header_id|> ' + m['content'] "
    "+ ' <|eot_id|> ' }}{% endfor %}{% if add_generation_prompt %}<|start_header_id|> assistant <|end_header_id|> "
    "{% endif %}"
)


def save(folder, model, tok):
    model.eval().save_pretrained(folder)
    tok.save_pretrained(folder)
    return model, tok


def distilbert(folder):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=32, initializer_range=0.5)
    tok = tokenizer()
    tok.model_input_names = ["input_ids", "attention_mask"]
    return save(folder, DistilBertForSequenceClassification(config), tok)


def gpt2(folder):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    config.num_labels, config.pad_token_id = 1, None
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = None
    tok.model_input_names = ["input_ids", "attention_mask"]
    return save(folder, GPT2ForSequenceClassification(config), tok)


def own_head(folder, tensors, template=LLAMA3, **config):
    """A Llama's body with tensors of a head beside it, as those who publish them save it."""
    tok = tokenizer(template)
    tok.model_input_names = ["input_ids", "attention_mask"]
    tok.backend_tokenizer.post_processor = None
    tok.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]})
    model = llama(num_labels=1)
    model.resize_token_embeddings(len(tok))
    save(folder, model, tok)
    weights = {name: x for name, x in load_file(folder / "model.safetensors").items() if name != "score.weight"}
    save_file({**weights, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return model.model, tok


def alone(model, encoded):
    with torch.no_grad():
        return model(**{name: torch.tensor([ids]) for name, ids in encoded.items()})


def agree(name, folder, expected, **options):
    reward = rewards.get(name, model=str(folder), **options)
    assert reward.name == PRESETS[name].column
    np.testing.assert_allclose(reward(PROMPTS, RESPONSES), expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize("name", ["map/humor", "map/positive"])
def test_map_classifiers(tmp_path, name):
    model, tok = distilbert(tmp_path)
    agree(name, tmp_path, [alone(model, tok(response)).logits[0, 1].item() for response in RESPONSES])


@pytest.mark.parametrize("name", ["map/helpful", "map/harmless"])
def test_map_reward_models(tmp_path, name):
    model, tok = gpt2(tmp_path)
    pairs = [(f"\n\nHuman: {prompt} \n\nAssistant:", text) for prompt, text in zip(PROMPTS, RESPONSES, strict=True)]
    agree(name, tmp_path, [alone(model, tok(question, answer)).logits[0, 0].item() for question, answer in pairs])


def test_map_coherence_and_diversity(tmp_path):
    from transformers import BertModel

    tok = tokenizer()
    model, _ = save(tmp_path, BertModel(bert().config), tok)
    full = [(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True) if p and r]
    vectors = [[alone(model, tok(text)).pooler_output[0] for text in pair] for pair in full]
    expected = [torch.cosine_similarity(a, b, dim=0).item() for a, b in vectors]
    reward = rewards.get("map/coherence", model=str(tmp_path))
    np.testing.assert_allclose(reward(*zip(*full, strict=True)), expected, atol=1e-5)
    words = "a cat and a cat and a dog".split()
    share = 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        share *= len(set(grams)) / (len(grams) + 1)
    assert rewards.get("map/diversity")(["p"], [" ".join(words)])[0] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("group", ["toxic-bert", "detoxify"])
def test_toxicity(tmp_path, group):
    model, tok = save(tmp_path, bert(id2label=dict(enumerate(TOXIC)), problem_type="multi_label_classification"),
                      tokenizer())  # fmt: skip
    names = [name for name in PRESETS if name.startswith(f"{group}/")]
    assert len(names) == 6
    for place, name in enumerate(names):
        agree(name, tmp_path, [-alone(model, tok(text)).logits[0].sigmoid()[place].item() for text in RESPONSES])


def test_chat_reward_models(tmp_path):
    model, tok = save(tmp_path, llama(num_labels=1), tokenizer(TEMPLATE))
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tok.apply_chat_template(talk, tokenize=False)
        expected.append(alone(model, tok(text, add_special_tokens=False, return_token_type_ids=False)).logits.item())
    for name in ("rm/skywork-v2-llama-8b", "rm/grm-llama3-8b"):
        agree(name, tmp_path, expected, batch_size=4)


def gating(hidden, objectives, quantiles=1, norm=False):
    torch.manual_seed(1)
    tensors = {
        "regression_layer.weight": 0.3 * torch.randn(objectives * quantiles, 16),
        "reward_transform_matrix": torch.eye(objectives) + 0.3 * torch.randn(objectives, objectives),
        "gating.logit_scale": torch.tensor([1.7]),
    }
    width, place = 16, 0
    for _ in range(3):
        tensors[f"gating.layers.{place}.weight"] = 0.3 * torch.randn(hidden, width)
        if norm:
            tensors |= {f"gating.layers.{place + 2}.{x}": torch.rand(hidden) + 0.5
                        for x in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
        else:
            tensors[f"gating.layers.{place}.bias"] = torch.randn(hidden)
        width, place = hidden, place + (3 if norm else 1)
    tensors[f"gating.layers.{place}.weight"] = torch.randn(objectives, hidden)
    tensors[f"gating.layers.{place}.bias"] = torch.randn(objectives)
    return tensors


def gated(body, tok, tensors, prompt, response, *, quantiles, norm):
    """Score and attributes by the published formula, in plain torch."""
    talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = tok(tok.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = body(torch.tensor([ids])).last_hidden_state[0]
    begin = ids.index(tok.convert_tokens_to_ids("<|eot_id|>"))  # the user's turn ends
    attributes = (hidden[-1] @ tensors["regression_layer.weight"].T).view(-1, quantiles).mean(1)
    x, place = hidden[begin], 0
    for _ in range(3):
        x = tensors[f"gating.layers.{place}.weight"] @ x + tensors.get(f"gating.layers.{place}.bias", 0)
        x = x.relu()
        if norm:
            mean, var, weight, bias = (tensors[f"gating.layers.{place + 2}.{name}"]
                                       for name in ("running_mean", "running_var", "weight", "bias"))  # fmt: skip
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        place += 3 if norm else 1
    x = tensors[f"gating.layers.{place}.weight"] @ x + tensors[f"gating.layers.{place}.bias"]
    gate = (x / 10).softmax(0) * tensors["gating.logit_scale"]
    return (gate * (attributes @ tensors["reward_transform_matrix"])).sum().item(), attributes.tolist()


@pytest.mark.parametrize(("name", "quantiles", "norm"), [("rm/armorm", 1, False), ("rm/qrm-llama3.1-8b", 4, True)])
def test_gated_mixtures(tmp_path, name, quantiles, norm):
    tensors = gating(8, len(ARMORM), quantiles, norm)
    body, tok = own_head(tmp_path, tensors, num_objectives=len(ARMORM), architectures=["LlamaForRewardModelWithGating"])
    both = [gated(body, tok, tensors, *pair, quantiles=quantiles, norm=norm)
            for pair in zip(PROMPTS, RESPONSES, strict=True)]  # fmt: skip
    agree(name, tmp_path, [score for score, _ in both], batch_size=3)
    if name == "rm/armorm":
        for place in (0, 18):
            agree(f"armorm/{ARMORM[place]}", tmp_path, [attributes[place] for _, attributes in both], batch_size=3)
        with pytest.raises(UserError, match="a text must hold the beginning of an answer"):
            rewards.get(name, model=str(tmp_path), max_length=3)(PROMPTS, RESPONSES)


def test_value_head(tmp_path):
    torch.manual_seed(2)
    shapes = {"0.weight": (8, 16), "0.bias": (8,), "2.weight": (1, 8), "2.bias": (1,)}
    head = {name: torch.randn(shape) for name, shape in shapes.items()}
    body, tok = own_head(tmp_path, {f"v_head.summary.{name}": x for name, x in head.items()})
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = tok(tok.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            last = body(torch.tensor([ids])).last_hidden_state[0, -1]
        hidden = (head["0.weight"] @ last + head["0.bias"]).relu()
        expected.append((head["2.weight"] @ hidden + head["2.bias"]).item())
    agree("rm/grm-llama3-8b-sftreg", tmp_path, expected, batch_size=3)
    with pytest.raises(UserError, match=r"must be a checkpoint with ArmoRM's or QRM's head, it lacks"):
        rewards.get("rm/armorm", model=str(tmp_path))


def test_rewards_of_one_model_read_and_run_it_once(tmp_path, monkeypatch):
    from fastalign.rewards import published

    save(tmp_path, bert(id2label=dict(enumerate(TOXIC))), tokenizer())
    opened = []
    monkeypatch.setattr(published, "open_classifier", lambda *given: opened.append(given) or real(*given))
    references = [f"toxic-bert/{label}[model={tmp_path}]" for label in TOXIC]
    matrix = rewards.score([*references, f"again=toxic-bert/toxic[model={tmp_path}]"], PROMPTS, RESPONSES)
    assert len(opened) == 1
    np.testing.assert_array_equal(matrix[:, 0], matrix[:, 6])


def real(*given):
    from fastalign.rewards.classifier import open_classifier

    return open_classifier(*given)


def test_names():
    known = rewards.available()
    assert all(name.count("/") == 1 for name in PRESETS) and set(PRESETS) < set(known)
    assert known["map/humor"].model == PRESETS["map/humor"].model  # which the first use downloads
    assert known["map/diversity"].model is None and known["perspective/toxicity"].model is None
    assert len({preset.column for preset in PRESETS.values()}) >= len(PRESETS) - 9  # labels that several groups have
    rewards.check_names(["map/humor", "funny=map/humor", "rm/armorm"])
    with pytest.raises(UserError, match="already a registered reward"):
        rewards.register("map/humor", lambda prompts, responses: [0.0])
    with pytest.raises(UserError, match="must have the output 'toxic' of toxic-bert/toxic"):
        rewards.get("toxic-bert/toxic", model=_other())
    code, out, _ = fastalign("rewards", "toxic", "insult")
    assert code == 0 and "detoxify/insult" in out and "skywork" not in out
    code, out, _ = fastalign("rewards", "--json", "armorm")
    assert json.loads(out)["rm/armorm"]["preset"]["licence"] == "Llama 3"


def _other():
    import tempfile

    folder = tempfile.mkdtemp()
    save(folder, bert(id2label={0: "a", 1: "b"}), tokenizer())
    return folder
