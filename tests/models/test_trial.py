"""Support is tried: every kind of fault, planted in a tiny model, is seen, and what is given in its place is right."""

import contextlib
import warnings

import pytest
import torch
from causal_models import fill
from model_paths import PROMPTS, ROUNDING, differences, padded, rows_of, sampled, tokens
from tiny import tiny_causal_lm, tiny_tokenizer

import fastalign.decode.shared_prompt as shared_prompt
from fastalign import models, rewards
from fastalign._base.errors import UserError
from fastalign.decode import Sampler, speculative_rejection
from fastalign.decode.rows import CachedRows, RepeatedRows, UncachedRows
from fastalign.decode.shared_prompt import SharedPromptEngine, supports
from fastalign.integrations.transformers import fused_forward
from fastalign.models import compiled_layers as layers
from fastalign.models import packing, trial
from fastalign.models.scoring import fused_head, score
from fastalign.train.rows import add_row_forward, batch_of

SIZES = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No verdict of another test: the planted faults change neither class nor configuration."""
    monkeypatch.setattr(trial, "_kept", {})
    trial._flat.clear()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def llama(scale=True, **more):
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))
    model.generation_config.eos_token_id = None
    return fill(model) if scale else model.eval()


def capped(model, monkeypatch):
    """Logits pressed together under a name that no configuration has."""
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    model.forward = forward


def dense(model, monkeypatch):
    """A layer of its own between the hidden states and the head."""
    between = fill(torch.nn.Linear(32, 32), seed=3)
    model.lm_head.register_forward_pre_hook(lambda module, given: (torch.tanh(between(given[0])),))
    plain = type(model).forward
    assert plain  # the hook runs wherever the module is called, but not where its weight is read


def masked(model, monkeypatch):
    """A mask of the model's own that hides the row's second token."""

    def hide(module, args, kwargs):
        x = kwargs.get("hidden_states", args[0] if args else None)
        n, kept = x.shape[1], kwargs.get("cache")
        past = kept.get_seq_length(module.layer_idx) if kept is not None else 0
        mask = torch.ones(n, past + n, dtype=torch.bool).tril(past)
        mask[:, 1:2] &= torch.arange(past, past + n)[:, None] == 1
        own = kwargs.get("attention_mask")
        mask = mask[None, None].expand(x.shape[0], 1, -1, -1)
        if own is not None and own.ndim == 4 and own.shape[-2:] == mask.shape[-2:]:
            mask = mask & own if own.dtype == torch.bool else mask & (own == 0)
        return args, {**kwargs, "attention_mask": mask}

    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(hide, with_kwargs=True)


def swallowed(model, monkeypatch):
    """Positions are counted by the model, whatever it is told."""

    def drop(module, args, kwargs):
        return args, {**kwargs, "position_ids": None}

    model.model.register_forward_pre_hook(drop, with_kwargs=True)


def misread(model, monkeypatch):
    """The compiled step reads its neighbours' queries, as it did of strided views."""
    attend = shared_prompt._Step.attend
    monkeypatch.setattr(
        shared_prompt._Step, "attend", lambda self, layer, q, *rest: attend(self, layer, q.roll(1, 0), *rest)
    )


def seen_through(model, monkeypatch):
    """A packed segment also sees the first sequence's end."""
    monkeypatch.setattr(packing.Pack, "mask", lambda self, segment, window: None)


def clipped_norm(model, monkeypatch):
    """A norm that clips large inputs, which the compiled one does not: it stays the model's own, and every path is
    right."""
    import transformers

    inner = transformers.models.llama.modeling_llama.LlamaRMSNorm

    class LlamaRMSNorm(inner):
        def forward(self, hidden_states):
            return super().forward(hidden_states.clamp(-1.0, 1.0))

    for module in model.modules():
        if isinstance(module, inner):
            module.__class__ = LlamaRMSNorm


FAULTS = {
    "a soft cap by another name": (capped, {"shared", "packs", "head"}),
    "a dense layer before the head": (dense, {"shared", "packs", "head"}),
    "a mask of its own": (masked, {"shared", "packs"}),
    "positions swallowed": (swallowed, {"shared", "packs"}),
    "a step that reads its neighbours": (misread, {"shared"}),
    "a pack seen through": (seen_through, {"packs"}),
    "a norm of its own": (clipped_norm, set()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_and_no_number_is_wrong(fault, tokenizer, monkeypatch):
    plant, where = FAULTS[fault]
    model = llama()
    assert supports(model) and packing.can_pack(model) and fused_head(model)
    trial._kept.clear()
    layers._known.clear()
    plant(model, monkeypatch)
    verdicts = {"shared": supports(model), "packs": packing.can_pack(model), "head": fused_head(model)}
    assert {name for name, verdict in verdicts.items() if not verdict} == where
    assert all("\n" not in verdict.why and (verdict or verdict.why) for verdict in verdicts.values())

    message = (
        pytest.warns(RuntimeWarning, match="not on the") if where & {"shared", "head"} else contextlib.nullcontext()
    )
    with message:
        assert sampled(model, tokenizer) < ROUNDING
        rows = rows_of()
        ids, mask, labels = padded(rows)
        with torch.no_grad():
            whole = fused_forward(model, ids, input_ids=ids)
            expected = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        torch.testing.assert_close(whole, expected[..., 0], atol=ROUNDING, rtol=0)
    assert packing.enable(model).ok == ("packs" not in where)
    plain = model.forward
    add_row_forward(model)
    with torch.no_grad():
        result = model(rows=batch_of(ids, mask, labels, packing.halves(len(ids)), ids.device))["log_probs"]
    model.forward = plain
    assert differences(model, rows, labels, result) < ROUNDING


def reordering(model, how, monkeypatch):
    from transformers import cache_utils

    monkeypatch.setattr(cache_utils.Cache, "reorder_cache", how)


def refused(self, rows):
    raise NotImplementedError("this cache cannot be copied")


@pytest.mark.parametrize(
    "how, path",
    [(refused, RepeatedRows), (lambda self, rows: None, RepeatedRows), (None, UncachedRows)],
    ids=["refuses", "does nothing", "none"],
)
def test_a_cache_that_cannot_be_copied(how, path, tokenizer, monkeypatch):
    model = llama()
    masked(model, monkeypatch)  # not on the shared-prompt engine
    if how is not None:
        reordering(model, how, monkeypatch)
    else:
        inner = model.forward

        def forward(*args, **kwargs):
            output = inner(*args, **kwargs)
            output.cache = output["cache"] = None
            return output

        forward.__wrapped__ = inner
        model.forward = forward
    sampler = Sampler(model, tokenizer)
    with pytest.warns(RuntimeWarning, match=f"{sampler.name} is sampled .* not on the shared-prompt engine: "):
        assert sampler.path() is path
        assert sampled(model, tokenizer) < ROUNDING


def test_the_path_is_reported_once(tokenizer):
    model = llama()
    masked(model, None)
    sampler = Sampler(model, tokenizer)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            sampler.sample(PROMPTS, n=1, max_new_tokens=2, seed=0)
    assert len([x for x in caught if "shared-prompt engine" in str(x.message)]) == 1


def test_a_model_that_looks_ahead_is_refused_in_one_line(tokenizer):
    model = llama()
    for block in model.model.layers:
        block.self_attn.is_causal = False

    def whole(module, args, kwargs):
        n = kwargs.get("hidden_states", args[0] if args else None).shape[1]
        return args, {**kwargs, "attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool)}

    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(whole, with_kwargs=True)
    with pytest.raises(UserError, match=r"cannot be sampled token by token: .* change with the tokens that follow"):
        Sampler(model, tokenizer).sample(PROMPTS, n=1, max_new_tokens=2, seed=0)


def test_flat_attention_hides_faults_so_that_no_verdict_is_kept():
    flat = llama(scale=False)
    assert supports(flat).ok and not trial._kept  # right as far as could be told
    model = fill(flat)
    masked(model, None)
    assert not supports(model).ok  # tried again, not remembered


def test_what_can_tell_nothing_is_not_kept():
    """Projections that are zero at first (a fresh residual block) hide what attention does: the next model is tried
    anew."""
    model = llama()
    outs = [block.self_attn.o_proj.weight for block in model.model.layers]
    kept = [x.clone() for x in outs]
    masked(model, None)
    with torch.no_grad():
        for x in outs:
            x.zero_()
        assert supports(model) and not trial._kept
        for x, before in zip(outs, kept, strict=True):
            x.copy_(before)
    assert not supports(model)


def test_hooks_are_not_known_by_their_names():
    """Two hooks of one name and other strengths: no verdict of the one holds for the other, nor for the model
    without."""
    strength = [0.0]

    def hook(module, args, output):
        return torch.tanh(output * strength[0]) if strength[0] else output

    model = llama()
    model.lm_head.register_forward_hook(hook)
    assert fused_head(model) and not trial._kept
    strength[0] = 1.0
    assert not fused_head(model)
    assert fused_head(llama())


@pytest.mark.parametrize("kind", ["same name", "patched forward"])
def test_a_class_of_the_same_name_is_another(kind, monkeypatch):
    from transformers.models.llama import modeling_llama

    assert supports(llama()) and trial._kept
    inner = modeling_llama.LlamaMLP

    def doubled(self, x):
        return 2 * inner.forward(self, x)

    model = llama()
    if kind == "same name":
        LlamaMLP = type("LlamaMLP", (inner,), {"forward": doubled, "__qualname__": "LlamaMLP"})
        for block in model.model.layers:
            block.mlp.__class__ = LlamaMLP
    else:
        plain = inner.forward
        monkeypatch.setattr(inner, "forward", lambda self, x: 2 * plain(self, x))
    count = len(trial._kept)
    assert supports(model) and len(trial._kept) == count + 1  # tried, not remembered


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["dora", "bias", "ia3", "loha", "dropout in training", "two"])
def test_adapters_on_the_head_that_are_no_plain_lora(adapter):
    """Fresh, most of them change nothing, so that a trial alone would not see them."""
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "target_modules": ["lm_head", "q_proj"]}
    config = {
        "ia3": lambda: peft.IA3Config(**common, feedforward_modules=[]),
        "loha": lambda: peft.LoHaConfig(**common, r=4),
        "dora": lambda: peft.LoraConfig(**common, r=4, use_dora=True),
        "bias": lambda: peft.LoraConfig(**common, r=4, lora_bias=True),
        "dropout in training": lambda: peft.LoraConfig(**common, r=4, lora_dropout=0.5),
        "two": lambda: peft.LoraConfig(**common, r=4),
    }[adapter]()
    model = peft.get_peft_model(llama(), config).eval()
    if adapter == "two":
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    ids = torch.tensor([tokens(12, 0), tokens(12, 1)])
    with torch.no_grad():
        fused_forward(model, ids, input_ids=ids)  # as it is at first
        for name, p in model.named_parameters():
            if p.requires_grad or "lora" in name or "hada" in name or "ia3" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        if adapter == "dropout in training":
            model.train()
            assert not fused_head(model)
            model.eval()
        result = fused_forward(model, ids, input_ids=ids)
        expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(result, expected, atol=ROUNDING, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_read_the_tokens_run_under_their_wrapper(tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        alora_invocation_tokens=tokenizer(" quick", add_special_tokens=False)["input_ids"],
    )
    model = peft.get_peft_model(llama(), config).eval()
    assert not supports(model) and not packing.can_pack(model) and not fused_head(model)
    assert Sampler(model, tokenizer).path() is not SharedPromptEngine


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_adapter_in_force_is_the_one_that_is_tried():
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**common, target_modules=["q_proj"]), "a").eval()
    model.add_adapter("b", peft.LoraConfig(**common, target_modules=["lm_head"], use_dora=True))
    assert fused_head(model)
    model.set_adapter("b")
    assert not fused_head(model)
    model.set_adapter("a")
    assert fused_head(model)


def test_dropout_of_a_training_that_went_on_is_off(tokenizer):
    import transformers

    model = fill(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
    )
    model.generation_config.eos_token_id = None
    sampler, job = Sampler(model, tokenizer), dict(n=2, max_new_tokens=6, seed=0)
    before = sampler.sample(PROMPTS, **job)
    model.train()
    assert sampler.sample(PROMPTS, **job).token_ids == before.token_ids


def test_an_indexer_that_picks_fewer_tokens_than_a_text_has():
    """Sparse attention: the trial narrows what it picks, so that a path that attends to all is seen."""
    import transformers
    from causal_models import small_config

    config = small_config("deepseek_v32")
    assert config.index_topk == 64
    model = fill(transformers.AutoModelForCausalLM.from_config(config))
    assert not packing.can_pack(model) and not supports(model)
    assert model.config.index_topk == 64


def test_verdicts_are_kept_by_class_and_configuration(monkeypatch):
    ran = []
    run = shared_prompt._forced
    monkeypatch.setattr(shared_prompt, "_forced", lambda *args: ran.append(1) or run(*args))
    assert supports(llama()) and supports(llama()) and len(ran) == 1
    assert supports(llama(rope_parameters={"rope_type": "default", "rope_theta": 50.0})) and len(ran) == 2
    assert supports(llama().double()) and len(ran) == 3


def test_the_model_is_left_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = model.config.to_dict()
    state = torch.random.get_rng_state()
    supports(model), packing.can_pack(model), fused_head(model), trial.is_causal(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def windowed(width):
    import transformers

    model = fill(transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=width)))
    model.generation_config.eos_token_id = None
    return model


def test_a_wide_window_is_tried_narrow(monkeypatch):
    """A path that knows nothing of windows is seen though the trial's rows are shorter than this one."""
    assert supports(windowed(100))
    trial._kept.clear()
    attend = shared_prompt._Step.attend
    monkeypatch.setattr(
        shared_prompt._Step,
        "attend",
        lambda self, layer, q, k, v, s, window, cap: attend(self, layer, q, k, v, s, None, cap),
    )
    model = windowed(100)
    assert not supports(model).ok and model.config.sliding_window == 100


def stretched(kind, original):
    more = {"short_factor": [1.0, 1.3, 2.0, 3.0], "long_factor": [1.5, 4.0, 9.0, 16.0]} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": original, **more}
    return llama(max_position_embeddings=original if kind == "dynamic" else 128, rope_parameters=rope)


LONG = "tell me a story of the big red dog and the small blue fox, please, and then tell me why"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_text_s_law_does_not_depend_on_its_neighbours(tokenizer):
    """LongRoPE: short prompts, long ones and one that crosses over, drawn together, are each what they are alone."""
    model = stretched("longrope", 16)
    job = dict(n=3, max_new_tokens=6, seed=0, chat=False)
    prompts = ["why", LONG, "the cat sat on the big red"]
    lengths = [len(tokenizer(p)["input_ids"]) for p in prompts]
    assert lengths[0] + 6 <= 16 < lengths[1] and lengths[2] <= 16 < lengths[2] + 6
    made = Sampler(model, tokenizer).sample(prompts, **job)
    for prompt, length, ids, log_probs in zip(prompts, lengths, made.token_ids, made.logprobs, strict=True):
        for new, result in zip(ids, log_probs, strict=True):
            for step, (token, log_prob) in enumerate(zip(new, result, strict=True)):
                row = torch.tensor([[*tokenizer(prompt)["input_ids"], *new[:step]]])
                with torch.no_grad():
                    expected = model(input_ids=row, use_cache=False).logits[0, -1].double().log_softmax(-1)[token]
                assert abs(float(expected) - log_prob) < 1e-4, (length, step)


def test_half_drawn_candidates_of_short_and_long_prompts_are_those_of_each_alone(tokenizer):
    """The same with candidates in lockstep; a text that crosses over is refused."""
    sampler = Sampler(stretched("longrope", 16), tokenizer)
    size = rewards.from_function(lambda prompts, texts: [len(text) for text in texts], "size")
    job = dict(n=3, max_new_tokens=6, seed=0, chat=False)
    made = sampler.sample(["why", LONG], **job).logprobs
    both = speculative_rejection(sampler, ["why", LONG], [size], lam=[1.0], checkpoints=[2], keep=1.0, **job)
    for ours, alone in zip(both.candidates.logprobs, made, strict=True):
        for a, b in zip(ours, alone, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    with pytest.raises(UserError, match="prompt 1: the model's RoPE changes during its continuation"):
        speculative_rejection(sampler, ["why", "the cat sat on the big red"], [size], lam=[1.0], **job)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_of_rows_on_both_sides_of_a_rope_s_change(kind, packed):
    model = stretched(kind, 12)
    rows = [(tokens(3, 1), tokens(4, 2)), (tokens(12, 3), tokens(6, 4))]
    ids, mask, labels = padded(rows)
    with torch.no_grad():
        if packed:
            assert packing.enable(model)
            add_row_forward(model)
            result = model(rows=batch_of(ids, mask, labels, packing.halves(len(ids)), ids.device))["log_probs"]
            result = result[labels[:, 1:] != -100]
        else:
            result = score(model, ids, labels[:, 1:], attention_mask=mask).outputs["log_probs"]
    result = result.split([4, 6])
    for (prompt, tail), ours in zip(rows, result, strict=True):
        model = stretched(kind, 12)  # a dynamic rope remembers what it ran
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *tail]]), use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tail)[:, None])[:, 0]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_dynamic_rope_is_not_sampled_past_its_length(tokenizer):
    """No cache is right there, and no two lengths agree."""
    sampler = Sampler(stretched("dynamic", 20), tokenizer)
    assert sampler.sample(["why"], n=1, max_new_tokens=4, seed=0, chat=False).n == 1
    with pytest.raises(UserError, match=r"prompt 1 is too long.* context of 20"):
        sampler.sample(["why", "the cat sat on the big red"], n=1, max_new_tokens=13, seed=0, chat=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_peft_model_is_sampled(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    from fastalign.models.loading import load_causal_lm

    model = llama()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    assert Sampler(tuned, tokenizer).path() is SharedPromptEngine and sampled(tuned, tokenizer) < ROUNDING
    again, _ = load_causal_lm(tmp_path / "adapter")
    ids = torch.tensor([tokens(10, 0)])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
    prompted = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Sampler(prompted, tokenizer).path() is not SharedPromptEngine and sampled(prompted, tokenizer) < ROUNDING


@pytest.mark.parametrize(
    "content, match",
    [
        ("{}", "base_model_name_or_path must name"),
        ("[", "not a JSON object"),
        ('{"base_model_name_or_path": "b"}', "adapter_model.safetensors"),
    ],
)
def test_an_adapter_folder_that_cannot_be_loaded(tmp_path, content, match):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=match):
        Sampler.from_pretrained(str(tmp_path))


def test_what_is_public():
    assert {"Probe", "Verdict", "tried", "language_model"} <= set(models.__all__)
    assert issubclass(RepeatedRows, CachedRows)


def late(kind, model):
    """What a user does to a model after another of its class was seen."""
    if kind == "head hook":
        model.lm_head.register_forward_hook(lambda module, given, logits: logits.flip(-1))
    elif kind == "model hook":
        model.register_forward_hook(lambda module, given, out: setattr(out, "logits", out.logits.flip(-1)))
    elif kind == "head's forward":
        plain = model.lm_head.forward
        model.lm_head.forward = lambda x: plain(x).flip(-1)
    elif kind == "scaling":
        model.model.layers[0].self_attn.scaling *= 3
    elif kind == "activation":
        model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    elif kind == "head without a weight":
        model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    elif kind == "epsilon":
        model.model.norm.variance_epsilon = 3.0


LATE = ["head hook", "model hook", "head's forward", "scaling", "activation", "head without a weight", "epsilon"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("same_model", [True, False])
@pytest.mark.parametrize("kind", LATE)
def test_a_verdict_is_not_for_a_model_that_something_was_done_to(kind, same_model):
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 12, 31, 7, 40]])

    @torch.no_grad()
    def off(model):
        wanted = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        result = fused_forward(model, ids, input_ids=ids).double()
        drawn = Sampler(model, tokenizer).sample(["hello"], n=2, max_new_tokens=4, seed=0, chat=False)
        new, prompt = drawn.token_ids[0][0], tokenizer("hello")["input_ids"]
        whole = model(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0].double().log_softmax(-1)
        own = whole[len(prompt) - 1 : -1].gather(1, torch.tensor(new)[:, None])[:, 0]
        return max(
            float((result - wanted.gather(-1, ids[:, 1:, None])[..., 0]).abs().max()),
            float((own - torch.tensor(drawn.logprobs[0][0], dtype=torch.float64)).abs().max()),
        )

    assert off(model) < 1e-4
    changed = model if same_model else tiny_causal_lm(tokenizer, dtype=torch.float32)
    before = changed(input_ids=ids).logits.detach().clone()
    late(kind, changed)
    assert float((changed(input_ids=ids).logits - before).detach().abs().max()) > 1e-2
    assert off(changed) < 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_class_of_the_users_own_runs_by_its_own_forward():
    """What it does only at some places a trial of a few tokens cannot see."""
    from transformers import LlamaForCausalLM

    class Bans(LlamaForCausalLM):
        def forward(self, input_ids=None, **rest):
            out = super().forward(input_ids=input_ids, **rest)
            out.logits = out.logits + (input_ids[..., None] == 77) * torch.linspace(-2, 2, out.logits.shape[-1])
            return out

    tokenizer = tiny_tokenizer()
    model = Bans(tiny_causal_lm(tokenizer, dtype=torch.float32).config).eval()
    ids = torch.tensor([[5, 77, 12, 77, 7, 40]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(fused_forward(model, ids, input_ids=ids).double(), wanted, atol=1e-5, rtol=0)
    assert Sampler(model, tokenizer).path() is not SharedPromptEngine


def test_trials_within_one_truth_run_the_plain_model_once(monkeypatch):
    """And give the verdicts that they give alone."""
    model = tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32)
    monkeypatch.setattr(trial, "_kept", {})
    alone = [Sampler(model, tiny_tokenizer()).path(), bool(packing.can_pack(model))]
    runs = []
    truth = trial._truth
    monkeypatch.setattr(trial, "_truth", lambda model, seed: runs.append(model) or truth(model, seed))
    monkeypatch.setattr(trial, "_kept", {})
    with trial.one_truth():
        together = [Sampler(model, tiny_tokenizer()).path(), bool(packing.can_pack(model))]
    assert together == alone and len(runs) == 1
    monkeypatch.setattr(trial, "_kept", {})
    packing.can_pack(model)
    assert len(runs) == 2


@pytest.mark.parametrize("both", [False, True])
def test_an_unlucky_rounding_is_no_fault_but_the_same_fault_twice_is(both):
    """One large rounding among the probe's logits, as half precision has now and then, costs a model no path."""
    model, probes = llama(), []

    def path(model, probe):
        probes.append(probe)
        rows = [trial._plain(model, prompt + tail)[len(prompt) - 1 : -1] for prompt, tail in probe.rows]
        if both or len(probes) == 1:
            rows[0][0, 0] += 5
        return rows

    with torch.no_grad():
        assert trial.tried(model, "path", path).ok is not both
    assert len(probes) == 2
    assert probes[0].prompts != probes[1].prompts
