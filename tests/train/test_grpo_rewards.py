"""Reward functions of GRPO in every form, and what each mistake says."""

import asyncio
import functools
import math

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_tokenizer

from fastalign import UserError, rewards
from fastalign.train.grpo_rewards import RewardFunctions

PROMPTS = ["tell me a story", "review of the hat", "who sat on the mat"]
TEXTS = [" very good", " bad", ""]
IDS = [[5, 6, 7], [8], [9, 2]]


def messages(role, texts):
    return [[{"role": role, "content": text}] for text in texts]


def scores(given, prompts=PROMPTS, texts=TEXTS, tokenizers=None, **columns):
    functions = RewardFunctions(given, tokenizers, {}, torch.device("cpu"))
    return functions.names, functions(prompts, texts, IDS, trainer_state=None, **columns)


def size(completions, **others):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers") / "judge"
    tokenizer = tiny_tokenizer(chat=True)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    for p in model.parameters():
        p.data *= 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def expected(folder, texts):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = tiny_tokenizer()
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        return [float(model(row).logits[0, 0]) for row in ids]


def test_functions_get_columns_and_may_say_nothing():
    async def slow(prompts, completion_ids, number, **others):
        await asyncio.sleep(0.01)
        return torch.tensor([n * len(ids) for n, ids in zip(number, completion_ids, strict=True)])

    def some(completions, **others):
        return np.array([1.5, 2.5, 3.5]) if len(completions) == 3 else None

    def none(prompts, completions, **others):
        return [None, 2, True]

    given = [size, functools.partial(size), slow, some, none, lambda **kw: [0.0] * 3]
    names, matrix = scores(given, number=[1, 2, 3])
    assert names == ["size", "size", "slow", "some", "none", "<lambda>"]
    assert matrix.dtype == torch.float64 and matrix.shape == (3, 6)
    assert matrix[:, 2].tolist() == [3.0, 2.0, 6.0] and matrix[:, 0].tolist() == [10.0, 4.0, 0.0]
    assert math.isnan(matrix[0, 4]) and matrix[1:, 4].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("chat", [False, True])
def test_rewards_of_fastalign_by_name_and_as_objects(chat):
    own = rewards.from_function(
        lambda prompts, texts: [len(p) + len(t) for p, t in zip(prompts, texts, strict=True)], name="own"
    )
    prompts = messages("user", PROMPTS) if chat else PROMPTS
    texts = messages("assistant", TEXTS) if chat else TEXTS
    names, matrix = scores(["readability", own], prompts, texts)
    assert names == ["readability", own.name]
    want = rewards.score([rewards.get("readability"), own], PROMPTS, TEXTS)
    np.testing.assert_allclose(matrix.numpy(), want)


@pytest.mark.parametrize("form", ["folder", "model"])
@pytest.mark.parametrize("chat", [False, True])
def test_classifiers_read_prompt_and_completion_as_in_trl(classifier, form, chat):
    prompts = messages("user", PROMPTS) if chat else PROMPTS
    texts = messages("assistant", TEXTS) if chat else TEXTS
    given = classifier
    if form == "model":
        given = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    names, matrix = scores(given, prompts, texts)
    whole = [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    if chat:
        tokenizer = tiny_tokenizer(chat=True)
        whole = [tokenizer.apply_chat_template(p + t, tokenize=False) for p, t in zip(prompts, texts, strict=True)]
    assert names == ["judge"]
    np.testing.assert_allclose(matrix[:, 0], expected(classifier, whole), rtol=1e-4, atol=1e-5)


def test_a_reward_model_of_two_values_is_two_rewards(classifier, tmp_path):
    from fastalign.rewards.classifier import NOTE

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        classifier, num_labels=2, ignore_mismatched_sizes=True
    )
    model.config.id2label = {0: "kind", 1: "brief"}
    setattr(model.config, NOTE, {"values": ["kind", "brief"], "text": "plain"})
    model.save_pretrained(tmp_path / "heads")
    tiny_tokenizer().save_pretrained(tmp_path / "heads")
    names, matrix = scores([size, str(tmp_path / "heads")])
    assert names == ["size", "kind", "brief"] and matrix.shape == (3, 3) and matrix.isfinite().all()


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ([1.0, 2.0], "'wrong' must return one number per completion, 3, got 2 numbers"),
        (1.0, "'wrong' must return one number per completion, 3, got float"),
        (
            [1.0, math.nan, 2.0],
            "'wrong' must return finite numbers, or None for completions that it does not score, got nan",
        ),
        ([1.0, 2.0, math.inf], "got inf for completion 2"),
        (["a", 1.0, 2.0], "got 'a' for completion 0"),
        (None, "must return one number per completion, 3, got NoneType"),
    ],
)
def test_wrong_results_name_the_function(result, says):
    def wrong(completions, **others):
        return result

    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        scores([size, wrong])


def test_what_is_no_reward():
    for given, says in (
        ([], "reward_funcs must name at least one reward, got none"),
        (None, "reward_funcs must name at least one reward, got none"),
        (["elephant"], "unknown reward 'elephant'"),
        ([3], "reward_funcs must be names, models or functions, got int"),
    ):
        with pytest.raises(UserError, match=says):
            scores(given)
    with pytest.raises(UserError, match="reward_processing_classes must have one entry per reward, 2, got 1"):
        scores([size, size], tokenizers=[None])
    with pytest.raises((UserError, OSError), match="nobody/nothing"):
        scores(["nobody/nothing"])
