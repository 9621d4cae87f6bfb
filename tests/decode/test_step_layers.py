"""Steps of whole decoder layers against the model's own logits, and which layers are taken."""

import pytest
import torch
import transformers
from small_models import SMALL

from fastalign import backend
from fastalign.decode import step_layers
from fastalign.decode.shared_prompt import SharedPromptEngine
from fastalign.decode.step_layers import StepLayers
from fastalign.decode.token_loop import Job
from fastalign.ops import products

pytestmark = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
BIASES = GROUPED | {"attention_bias": True, "mlp_bias": True}
TAKEN = {"Llama": GROUPED, "Llama with biases": BIASES, "Qwen2": GROUPED, "Mistral": GROUPED | {"sliding_window": 4}}
LEFT = {
    "Qwen3": GROUPED,  # norms its heads; taken on a GPU
    "Granite": GROUPED | {"residual_multiplier": 0.5},
    "Gemma": GROUPED,  # its norms' weights are deviations from 1; taken on a GPU, as the next two
    "Gemma2": GROUPED | {"sliding_window": 4},
    "Gemma3 text": GROUPED | {"sliding_window": 4},
    "Phi3": GROUPED | {"pad_token_id": 0},
    "GPTNeoX": SMALL,
}


def build(family, sizes, dtype=torch.float32):
    torch.manual_seed(0)
    family, _, form = family.partition(" ")
    config = getattr(transformers, f"{family}{'Text' if form == 'text' else ''}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():  # so large that attention is far from flat
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.6 if p.ndim == 1 else p.shape[-1] ** -0.5)
    return model.to(dtype)


@pytest.fixture(params=["torch", "onednn"])
def provider(request, monkeypatch):
    if request.param == "onednn" and not products.available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setenv("FASTALIGN_PRODUCTS", request.param)


def taken(model, rows=64):
    return len(StepLayers(model, model.get_output_embeddings().weight, rows)._layers)


@torch.inference_mode()
def step_by_step(model, prompt, tails):
    """(tails, T, V): the engine's logits behind the prompt, with 64 places for rows."""
    engine = SharedPromptEngine(model, 64)
    engine.prefill({0: prompt})
    logits = [engine.logits(engine.admit([Job(0, c) for c in range(len(tails))]))]
    for ids in torch.tensor(tails).t():
        engine.place(0, ids)
        logits.append(engine.logits(engine.step()))
    return torch.stack(logits, 1)


@pytest.mark.parametrize("family", [*TAKEN, *LEFT])
def test_the_models_own_logits(family, provider):
    model = build(family, (TAKEN | LEFT)[family])
    assert taken(model) == (model.config.num_hidden_layers if family in TAKEN else 0)
    prompt, tails = [5, 9, 11, 40, 7], [[3, 70, 8, 9, 50, 1], [60, 2, 90, 90, 4, 33]]
    result = step_by_step(model, prompt, tails)
    with torch.no_grad():
        for row, tail in zip(result, tails, strict=True):
            expected = model(input_ids=torch.tensor([prompt + tail])).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not any("forward" in vars(m) for m in model.modules())


def hooked(model):
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, out: 2 * out)


def replaced(model):
    module = model.model.layers[0].mlp.act_fn
    module.forward = lambda x: x


def without_attention(model):
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)


def mixed(model):
    model.model.layers[0].mlp.half()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", TAKEN)
def test_half_precision_is_no_further_from_the_truth_than_the_model(family, dtype, provider):
    model = build(family, TAKEN[family], dtype)
    assert taken(model) == model.config.num_hidden_layers
    prompt, tails = [5, 9, 11, 40, 7], [[3, 70, 8, 9, 50, 1], [60, 2, 90, 90, 4, 33]]
    ours, ids = step_by_step(model, prompt, tails), torch.tensor([prompt + tail for tail in tails])
    with torch.no_grad():
        theirs = model(input_ids=ids).logits[:, len(prompt) - 1 :]
        truth = model.double()(input_ids=ids).logits[:, len(prompt) - 1 :]
    assert (ours - truth).norm() <= 1.25 * (theirs - truth).norm()


@pytest.mark.parametrize("change", [hooked, replaced, without_attention, mixed])
def test_a_layer_that_somebody_changed_is_left(change):
    model = build("Llama", GROUPED)
    change(model)
    assert taken(model) == model.config.num_hidden_layers - 1


@pytest.mark.parametrize(("free", "spare"), [(1 << 40, None), (1 << 40, 1 << 30), (1000, None), (1 << 40, 1000)])
def test_weights_are_packed_where_memory_is_free(free, spare, monkeypatch):
    if not products.available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "onednn")
    monkeypatch.setattr(step_layers, "free_memory", lambda: free)
    packed, pack = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(products, "_reorder", lambda *args: packed.append(args[0].shape) or pack(*args))
    model = build("Llama", GROUPED)
    layers = StepLayers(model, model.get_output_embeddings().weight, 64, spare)
    assert len(layers._layers) == 2
    assert len(packed) == (0 if 1000 in (free, spare) else 2 * 4 + 1)  # four products a layer, and the head


def test_the_engines_own_trial_takes_these_layers():
    assert taken(build("Llama", GROUPED), rows=4) == 2  # though it packs nothing for so few rows


@pytest.mark.skipif(not backend.interpreted(), reason="TRITON_INTERPRET=0")
@pytest.mark.parametrize(
    ("family", "count"),
    [("Llama with biases", 2), ("Qwen3", 2), ("Gemma", 2), ("Gemma2", 2), ("Gemma3 text", 2), ("Granite", 0)],
)
def test_on_a_gpu_layers_are_taken_that_give_the_models_logits(family, count):
    model = build(family, (TAKEN | LEFT)[family])
    prompt, tails = [5, 9, 11, 40, 7], [[3, 70], [60, 2]]
    ids = torch.tensor([prompt + tail for tail in tails])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, len(prompt) - 1 :]
    with backend.use_backend("triton"):
        assert taken(model) == count
        result = step_by_step(model, prompt, tails)
        assert taken(model.to("meta")) == count
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
