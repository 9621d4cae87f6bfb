"""The fused head equals a model's own logits, whatever the architecture does to them."""

import pytest
import torch
from small_models import MODELS, build

from fastalign import UserError
from fastalign.integrations.transformers import fused_forward, head_of
from fastalign.ops import token_logprobs


def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return ids, mask, labels


@pytest.mark.slow_matrix
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_logits_and_gradients(name):
    model = build(name)
    ids, mask, labels = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = token_logprobs(logits[:, :-1], labels[:, 1:], temperature=0.9)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    result = fused_forward(model, labels, input_ids=ids, attention_mask=mask, temperature=0.9)
    result.sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if result.dtype == torch.float32 else {}
    torch.testing.assert_close(result, expected, **close)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[parameter].grad, gradient, msg=parameter, **close)


def test_a_head_with_more_weights_than_a_linear_one_is_refused():
    """Equal at first, but its scale would not be trained."""
    model = build("llama")
    model.lm_head.logit_scale = torch.nn.Parameter(torch.ones(97))
    with pytest.raises(UserError, match="must have a linear head, LlamaForCausalLM's has a logit_scale too"):
        head_of(model)


def test_unshifted_labels_and_other_outputs():
    model = build("llama")
    ids, mask, labels = batch()
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    requested = ("log_probs", "entropy")
    a = fused_forward(model, labels, input_ids=ids, attention_mask=mask, outputs=requested)
    b = fused_forward(model, shifted, shift_labels=False, input_ids=ids, attention_mask=mask, outputs=requested)
    torch.testing.assert_close(b.entropy[:, :-1], a.entropy)
    torch.testing.assert_close(b.log_probs[:, :-1], a.log_probs)


def test_a_lora_on_the_head():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"]))
    layer = model.get_base_model().get_output_embeddings()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.3)
    model.double().eval()
    ids, mask, labels = batch()
    expected = token_logprobs(model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:])
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head.lora_A" in name for name in gradients)
    model.zero_grad()
    result = fused_forward(model, labels, input_ids=ids, attention_mask=mask)
    result.sum().backward()
    torch.testing.assert_close(result, expected)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    with model.disable_adapter():
        assert head_of(model.get_base_model()).adapter is None
