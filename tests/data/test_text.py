"""Text around the model: what new tokens say after their prompt, stop strings, conversations, what cannot be
encoded."""

import json

import pytest
import torch
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError, rewards
from fastalign.data.conversations import Conversation
from fastalign.data.text import Text
from fastalign.decode import Candidates, Sampler
from fastalign.decode.rows import CachedRows
from fastalign.decode.shared_prompt import SharedPromptEngine

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "who sat"}
BEGUN = {"role": "assistant", "content": "the cat"}
BLOCKS = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %};{% endfor %}"
)
THINKS = "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if enable_thinking is false %}<no>{% endif %}"


def sentencepiece():
    """As Llama 2's tokenizer.json: a space before every text, taken off again by decoding."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁hello", "▁world", "▁is", "▁fine", "▁", "lo", "w"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    core = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocab], unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def marked(template=None):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, *pieces):
    """Token ids of pieces, each encoded alone and special tokens by name."""
    return [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


@pytest.fixture(scope="module")
def metaspace():
    return Text(sentencepiece())


@pytest.mark.parametrize(
    "prompt", ["hello", "hello world is fine hello world is fine hello world", "é", "hello é", "w"]
)
@pytest.mark.parametrize("new", [["▁world", "▁is"], ["w", "lo"], ["▁", "▁", "▁fine"], ["<0xC3>", "<0xA9>"]])
def test_prompt_and_text_are_the_whole(metaspace, prompt, new):
    tokenizer = metaspace.tokenizer
    before = tokenizer(prompt)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(new)
    assert prompt + metaspace.continuation(before, ids) == tokenizer.decode(before + ids, skip_special_tokens=True)
    grown = [metaspace.continuation(before, ids[:k]) for k in range(len(ids) + 1)]
    assert all(metaspace.stopped(before, ids[:k], ["▁"]) is False for k in range(len(ids)))
    for k, text in enumerate(grown):
        for stop in (" world", " w", "lo", "  ", "é", "o w"):
            assert metaspace.stopped(before, ids[:k], [stop]) == (stop in text)


def test_a_character_that_the_prompt_begins_is_whole_in_the_text(metaspace):
    first, second = metaspace.tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>"])
    before = [*metaspace.tokenizer("hello")["input_ids"], first]
    assert metaspace.continuation(before, [second]) == "é"


def test_stops_are_found_with_the_token_that_completes_them():
    tokenizer = tiny_tokenizer()
    text, generator = Text(tokenizer), torch.Generator().manual_seed(0)
    prompt = tokenizer("the cat")["input_ids"]
    for _ in range(20):
        ids = torch.randint(len(tokenizer), (40,), generator=generator).tolist()
        whole = text.continuation(prompt, ids)
        stop = whole[len(whole) // 2 :][:3]
        first = next(k for k in range(len(ids) + 1) if stop in text.continuation(prompt, ids[:k]))
        assert [text.stopped(prompt, ids[:k], [stop]) for k in (first - 1, first)] == [False, True]
        assert text.continuation(prompt, ids, [stop]) == whole[: whole.find(stop)]


@pytest.mark.parametrize(
    "stop, text, tokens",
    [
        ("<|im_end|>", " fine", 2),
        ("fine<|im_end|>", " ", 2),
        ("<|im_end|>\n", " fine", 3),
        ("<|im_end|>\n<|im_start|>", " fine", 4),
        ("<|im", " fine", 2),
        ("</s>", " fine\nuser", 6),
        ("user", " fine\n", 5),
        ("<|im_e|>", " fine\nuser", None),
    ],
)
def test_stop_strings_of_special_tokens(stop, text, tokens):
    tokenizer = marked()
    tokenizer.add_tokens([" fine", "user"])
    codec, prompt = Text(tokenizer), ids_of(tokenizer, "how")
    pieces = [" fine", "<|im_end|>", "\n", "<|im_start|>", "user", "</s>"]
    new = ids_of(tokenizer, *pieces)
    assert len(new) == len(pieces)
    assert codec.continuation(prompt, new, [stop]) == text
    result = [k for k in range(len(new) + 1) if codec.stopped(prompt, new[:k], [stop])]
    assert (result or [None])[0] == tokens
    assert codec.continuation(prompt, new) == " fine\nuser"  # shown without them, as ever


@pytest.mark.parametrize("path", [SharedPromptEngine, CachedRows])
def test_the_sampler_stops_at_a_special_token(path):
    tokenizer = marked()
    model = tiny_causal_lm(tokenizer, scale=2.0)
    sampler = Sampler(model, tokenizer)
    sampler.path = lambda: path
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # likely enough to come
        model.lm_head.weight[end] += 3 * model.lm_head.weight.std()
    drawn = sampler.sample(["who", "how is"], n=16, max_new_tokens=64, seed=3, stop="<|im_end|>")
    rows = [ids for row in drawn.token_ids for ids in row]
    assert any(end in ids for ids in rows)
    for ids, text in zip(rows, [text for row in drawn.texts for text in row], strict=True):
        assert end not in ids[:-1]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


# -- conversations


def drawn_like(prompts, text, **options):
    """The candidates of prompts through a template, which must be those of `text` without one."""
    tokenizer = marked(options.pop("template", None) or tiny_tokenizer(chat=True).chat_template)
    model = tiny_causal_lm(tokenizer)
    settings = {"n": 3, "max_new_tokens": 6, "seed": 5}
    drawn = Sampler(model, tokenizer).sample(prompts, **settings, **options)
    plain = Sampler(model, tokenizer).sample([text], chat=False, **settings)
    assert drawn.token_ids == plain.token_ids and drawn.texts == plain.texts
    return drawn


@pytest.mark.parametrize(
    "messages, text",
    [
        ([SYSTEM, USER], "<s>system be brief</s><s>user who sat</s><s>assistant "),
        ([USER, BEGUN, USER], "<s>user who sat</s><s>assistant the cat</s><s>user who sat</s><s>assistant "),
        ([USER, BEGUN], "<s>user who sat</s><s>assistant the cat"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "who"}, {"type": "text", "text": "sat"}],
                    "name": None,
                }
            ],
            "<s>user who\nsat</s><s>assistant ",
        ),
    ],
)
def test_conversations_are_drawn_for(messages, text, tmp_path):
    drawn = drawn_like([messages], text)
    assert isinstance(drawn.prompts[0], Conversation)
    drawn.to_parquet(tmp_path / "c.parquet")
    again = Candidates.from_parquet(tmp_path / "c.parquet")
    assert again.prompts == drawn.prompts and again.prompts[0].messages == drawn.prompts[0].messages


def test_a_text_that_looks_like_a_conversation_stays_a_text(tmp_path):
    text = json.dumps([USER])
    mixed = Candidates([text, [USER]], [["a"], ["b"]], [[[1]], [[2]]], [[[-1.0]], [[-1.0]]])
    mixed.to_parquet(tmp_path / "c.parquet")
    first, second = Candidates.from_parquet(tmp_path / "c.parquet").prompts
    assert type(first) is str and second.messages == [USER]


def test_arguments_of_the_template():
    text = "who sat;<no>"
    for options in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        drawn = drawn_like(["who sat"], text, template=THINKS, **options)
        assert drawn.settings["chat_template_kwargs"] == {"enable_thinking": False}
    own = Conversation([USER], chat_template_kwargs={"enable_thinking": False})
    drawn_like([own], text, template=THINKS)
    drawn_like(["who sat"], "who sat;", template=THINKS, enable_thinking=True)


def test_tools_reach_the_template():
    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: one.
            b: another.
        """

    template = "{% if tools %}{{ tools[0]['function']['name'] }};{% endif %}{{ messages[0]['content'] }}"
    drawn = drawn_like(["who sat"], "add;who sat", template=template, tools=[add])
    drawn_like([Conversation([USER], tools=drawn.settings["tools"])], "add;who sat", template=template)


def test_templates_of_blocks_and_named_ones():
    drawn_like(["who sat"], "user:who sat;", template=BLOCKS)
    drawn_like([[SYSTEM, USER]], "system:be brief;user:who sat;", template=BLOCKS)
    named = {"rag": "rag {{ messages[0]['content'] }}", "tool_use": "x"}
    drawn_like(["who sat"], "rag who sat", template=named, chat_template="rag")
    drawn_like(["who sat"], "rag who sat", template=named, chat_template_kwargs={"chat_template": "rag"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ["why", "half \ud83d"]}, r"prompts\[1\] must be text that UTF-8 can hold.* character 5"),
        ({"prompts": ["why", "hi <new8>"]}, r"prompt 1 has a token beyond the model's embedding of 320 .*<new8>"),
        (
            {"template": "{{ raise_exception('only\n system') }}"},
            r"prompt 0: the chat template refuses it: only system",
        ),
        ({"template": "{% for"}, r"prompt 0: the chat template refuses it"),
        ({"template": {"rag": "x", "tool_use": "y"}}, "chat templates rag, tool_use and none that is called default"),
        ({"tempreature": 0.5}, "tempreature is no argument of sample"),
        ({"prompts": [[USER]], "chat": False}, r"prompt 0 is a conversation.*chat=False"),
        ({"prompts": [[USER]], "template": None}, r"prompt 0 is a conversation.*has none"),
        ({"prompts": [USER]}, "put them in a list"),
        ({"prompts": ["why", [{"content": "x"}]]}, r"prompts\[1\]: message 0 must have a role"),
        ({"prompts": [[{"role": "user", "content": 3}]]}, r"prompts\[0\]: message 0 must have a content"),
        ({"prompts": [[{"role": "user", "content": [{"type": "image"}]}]]}, "blocks of text alone, got one of 'image'"),
        ({"prompts": [[]]}, r"prompts\[0\]: must be a list of at least one message"),
        ({"tools": [3]}, r"tools\[0\] must be a JSON schema or a function"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs must be a dict"),
    ],
)
def test_what_cannot_be_encoded_is_reported_in_one_line(change, message):
    given = {"prompts": ["why"], "template": tiny_tokenizer(chat=True).chat_template, **change}
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer)
    tokenizer.add_tokens([f"<new{i}>" for i in range(320, 330)] + [f"<new{i}>" for i in range(9)])
    tokenizer.chat_template = given.pop("template")
    with pytest.raises(UserError, match=message) as caught:
        Sampler(model, tokenizer).sample(given.pop("prompts"), n=1, max_new_tokens=2, seed=0, **given)
    assert "\n" not in str(caught.value)


# -- rewards


def test_rewards_of_conversations():
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_causal_lm(tokenizer)
    prompts = [[SYSTEM, USER], [USER], [USER, BEGUN], "who sat"]
    own = rewards.LogLikelihood(model=model, tokenizer=tokenizer)
    scores = rewards.score([own], prompts, [" a dog"] * 4)[:, 0]
    texts = ["system be brief</s><s>user who sat</s><s>assistant ", "user who sat</s><s>assistant "]
    texts += ["user who sat</s><s>assistant the cat", texts[1]]
    plain = rewards.LogLikelihood(model=model, tokenizer=tokenizer, chat=False)
    assert scores == pytest.approx(plain([f"<s>{text}" for text in texts], [" a dog"] * 4), abs=1e-6)
    assert len(set(scores[:3])) == 3
    seen = []
    rewards.score(rewards.from_function(lambda p, r: seen.extend(p) or [0.0] * len(p), "f"), prompts, [""] * 4)
    assert seen == ["who sat"] * 4 and all(type(text) is str for text in seen)
    assert rewards.score(rewards.Diversity(), prompts, ["a b c d"] * 4).shape == (4, 1)


def test_classifiers_read_the_whole_conversation():
    import transformers

    tokenizer = tiny_tokenizer(chat=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **sizes)
    model = transformers.LlamaForSequenceClassification(config).eval()
    reward = rewards.from_pairwise(model, tokenizer)
    whole = rewards.from_pairwise(model, tokenizer, text=lambda prompt, reply: reply)
    texts = [
        "<s>system be brief</s><s>user who sat</s><s>assistant a dog</s>",
        "<s>user who sat</s><s>assistant the cat a dog</s>",
    ]
    result = reward([[SYSTEM, USER], [USER, BEGUN]], ["a dog", " a dog"])
    assert result == pytest.approx(whole(["", ""], texts), abs=1e-6)


@pytest.mark.parametrize(
    "prompt, reply, message",
    [
        ("why", "half \ud83d", "response 0 must be text that UTF-8 can hold"),
        ("why", "hi <new8>", "response 0 has a token beyond the model's embedding"),
        ("hi <new8>", "x", "has a token beyond the model's embedding"),
    ],
)
def test_rewards_tell_what_cannot_be_encoded(prompt, reply, message):
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer)
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])
    with pytest.raises(UserError, match=message):
        rewards.LogLikelihood(model=model, tokenizer=tokenizer)([prompt], [reply])


def test_a_text_that_is_read_back_is_scored_on_its_own_tokens(metaspace):
    ids = metaspace.tokenizer.convert_tokens_to_ids(["▁world", "▁is"])
    text = metaspace.continuation(metaspace.tokenizer("hello")["input_ids"], ids)
    assert text == " world is" and metaspace.continuations([text], "texts") == [ids]
