"""LoRA layers merged for a while: the model's own numbers, its weights and layers untouched, whatever cannot be merged
left as it is."""

import copy

import pytest
import torch
from small_models import build

from fastalign.data.sampling import SamplingSettings
from fastalign.decode.shared_prompt import SharedPromptEngine, supports
from fastalign.decode.token_loop import Job, TokenLoop
from fastalign.models import merged_lora
from fastalign.models.merged_lora import MergedLora
from fastalign.ops import products

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
COMMON = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "init_lora_weights": False}
IDS = torch.tensor([[5, 9, 11, 40, 7, 8, 21, 3, 60]])


def adapted(name="llama", dtype=torch.float32, **options):
    torch.manual_seed(0)
    return peft.get_peft_model(build(name).to(dtype), peft.LoraConfig(**{**COMMON, **options})).eval()


def two(model):
    model.add_adapter("other", peft.LoraConfig(**{**COMMON, "target_modules": ["q_proj", "v_proj"]}))
    model.base_model.set_adapter(["default", "other"])
    return model


def linears(model):
    return [m for m in model.modules() if type(m).__module__.startswith("peft.") and hasattr(m, "base_layer")]


MERGED = {
    "plain": lambda: adapted(),
    "rank-stabilised": lambda: adapted(use_rslora=True),
    "two at once": lambda: two(adapted()),
    "on the head too": lambda: adapted(target_modules=[*TARGETS, "lm_head"]),
    "dropout": lambda: adapted(lora_dropout=0.5),
    "adapters in float32": lambda: adapted(dtype=torch.bfloat16),
    "float64": lambda: adapted(dtype=torch.float64),
}


@pytest.mark.parametrize("kind", MERGED)
@torch.no_grad()
def test_the_models_own_logits_and_nothing_stays_behind(kind):
    model = MERGED[kind]()
    inner, expected = model.get_base_model(), model(IDS).logits
    modules, kept = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    merged = MergedLora(inner)
    with merged:
        assert not [m for m in linears(inner) if m is not inner.get_output_embeddings()]
        result = model(IDS).logits
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[inner.dtype]
    assert (result - expected).abs().max() <= tolerance * expected.abs().max() and merged.nbytes > 0
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is modules[name] for name in now)
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("state", ["disabled", "merged by peft"])
@torch.no_grad()
def test_where_nothing_is_added_the_base_layers_run_without_a_copy(state):
    model = adapted()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.merge_adapter()
    expected, merged = model(IDS).logits, MergedLora(model.get_base_model(), spare=0)
    with merged:
        assert merged.nbytes == 0 and not linears(model.get_base_model())
        assert torch.equal(model(IDS).logits, expected)


def hooked():
    model = adapted()
    for layer in linears(model):
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)
    return model


LEFT = {
    "dora": lambda: adapted(use_dora=True),
    "bias": lambda: adapted(lora_bias=True),
    "dropout in training": lambda: adapted(lora_dropout=0.5).train(),
    "a hook": hooked,
    "gpt2's layers": lambda: adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_more_than_a_product_of_two_matrices_stays(kind):
    model = LEFT[kind]()
    before, merged = linears(model), MergedLora(model.get_base_model())
    with merged:
        assert before and linears(model) == before and merged.nbytes == 0


def test_not_beyond_the_memory_there_is(monkeypatch):
    model = adapted().get_base_model()
    size = MergedLora(model).nbytes
    assert size == sum(m.base_layer.weight.nbytes for m in linears(model))
    assert (
        MergedLora(model, spare=size).nbytes == size
        and MergedLora(model, spare=size - 1).nbytes == MergedLora(model, spare=0).nbytes == 0
    )
    monkeypatch.setattr(merged_lora, "free_memory", lambda: 4 * size - 4)
    assert MergedLora(model).nbytes == 0


def test_a_prompts_products_are_the_quickest_here(monkeypatch):
    model, taken, linear = adapted(), set(), products.linear
    monkeypatch.setattr(products, "quicker", lambda dtype: True)
    monkeypatch.setattr(
        products, "linear", lambda x, weight, bias=None: (taken.add(weight), linear(x, weight, bias))[1]
    )
    engine = SharedPromptEngine(model, 6)
    engine.prefill({0: IDS[0].tolist()})
    assert {m.weight for m in engine._merged.linears} <= taken and linears(model)
    assert not [m for m in engine._merged.linears if "forward" in vars(m)]


@torch.no_grad()
def test_the_engine_draws_as_from_a_model_that_was_merged_for_good():
    model = adapted()
    assert supports(model)

    def drawn(model):
        loop = TokenLoop(SharedPromptEngine(model, 6), SamplingSettings(6, 9, seed=1), [], lambda job, ids: False)
        loop.decoder.prefill({0: IDS[0].tolist()})
        new = [Job(0, j) for j in range(6)]
        while new or loop.decoder.jobs:
            loop.step(new)
            new = []
        return loop.ids

    before = drawn(model)
    with torch.no_grad():
        for layer in linears(model):
            layer.lora_B["default"].weight.mul_(-1)  # a step of an optimiser
    after = drawn(model)
    assert before != after == drawn(model.merge_and_unload())
