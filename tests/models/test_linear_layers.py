"""`speed_up`: any model's linear layers by the fastest products, with the model's own numbers, and undone again."""

import copy

import pytest
import torch
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import nn

from fastalign.integrations.transformers import speed_up
from fastalign.models.linear_layers import PackedLayers, is_plain
from fastalign.ops import products

pytestmark = pytest.mark.skipif(not products.available(), reason="torch without oneDNN")
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """oneDNN for products of every size, as on a processor on which it is faster."""
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "onednn")
    monkeypatch.setattr(products, "SMALL", 0)


@pytest.fixture
def called(monkeypatch):
    calls, run = [], products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: calls.append(args[0].shape) or run(*args))
    return calls


def model_of(**options):
    return tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32, **options).train()


def step(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    return loss.item(), torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_a_step_is_the_models_own_and_it_is_undone(called):
    model = model_of()
    expected = step(model)
    assert not called
    handle = speed_up(model)
    assert handle.count == sum(type(m) is nn.Linear for m in model.modules()) > 7
    assert_same(step(model), expected)
    assert len(called) >= 3 * (handle.count - 1)
    assert speed_up(model).count == 0  # it is already
    handle.remove()
    called.clear()
    assert step(model)[0] == expected[0] and not called
    with speed_up(model):
        step(model)
    assert called and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(called, dtype):
    model = model_of().to(dtype)
    expected = model(IDS).logits
    with speed_up(model) as handle:
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    assert bool(handle.count) == bool(called) == (dtype in products.DTYPES and products.available(dtype))


def test_autocast_and_compile_take_torchs_products(called):
    model = model_of()
    expected = step(model)
    with speed_up(model):
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS)
        assert not called
        assert_same(step(torch.compile(model, backend="eager")), expected)


def test_hooks_are_called_and_forwards_of_ones_own_stay(called):
    model = model_of()
    layer, other = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    other.forward = lambda x: nn.functional.linear(x, other.weight) * 0
    with speed_up(model):
        model(IDS)
        assert "forward" in vars(other)
    assert len(seen) == 1 and "forward" in vars(other)


def test_a_copy_has_its_own_weights():
    model = model_of()
    with speed_up(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
            torch.testing.assert_close(twin(IDS).logits, 2 * model(IDS).logits)


def test_adapters_put_on_it_afterwards(called):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = model_of()
        handle = speed_up(model) if fast else None
        results.append(step(peft.get_peft_model(model, peft.LoraConfig(**settings)).train()))
        assert bool(called) == fast and (handle is None or handle.count > 7)
    assert_same(*results)


def test_where_torch_is_faster_nothing_changes(monkeypatch):
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "torch")
    model = model_of()
    assert speed_up(model).count == 0 and not any("forward" in vars(m) for m in model.modules())


def test_packed_layers_give_the_same(called):
    model = model_of().eval()
    with torch.inference_mode():
        expected = model(IDS).logits
        with PackedLayers(filter(is_plain, model.modules()), 64):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert called and not any("forward" in vars(m) for m in model.modules())
