"""A packed row gives the log-probabilities and gradients of its sequences alone, whatever the architecture."""

import pytest
import torch
import transformers
from small_models import MODELS, WINDOWED, build

from fastalign import UserError
from fastalign.models import packed_attention
from fastalign.models.packing import Segment, can_pack, enable, halves, pack_groups, pack_pairs, packed_hidden
from fastalign.train.rows import add_row_forward, batch_of


def pairs():
    """Pairs with a shared prompt, with nothing in common, the same twice, one a beginning of the other, one a token."""
    torch.manual_seed(2)
    prompt, same = new(7), new(5)
    chosen = [torch.cat((prompt, new(3))), new(4), same, torch.cat((same, new(2))), same[:1]]
    rejected = [torch.cat((prompt, new(6))), new(6), same, same, new(9)]
    return chosen + rejected, [(b, b + 5) for b in range(5)]


def completions():
    """Groups of one to five completions of a prompt: in one of them two are equal, in one another is a single token."""
    torch.manual_seed(3)
    rows, groups, same = [], [], new(4)
    for prompt, ends in (
        (new(6), [new(3)]),
        (new(1), [new(5), new(2)]),
        (new(9), [same, new(6), same]),
        (new(5), [new(4), new(1), new(7), new(3)]),
        (new(7), [new(n) for n in (2, 6, 3, 5, 4)]),
    ):
        groups.append(range(len(rows), len(rows) + len(ends)))
        rows += [torch.cat((prompt, end)) for end in ends]
    return rows, groups


def new(n):
    return torch.randint(3, 97, (n,))


def padded(rows, side="right"):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for r, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[r, at], mask[r, at] = row, 1
    return ids, mask


def batch(side="right"):
    return padded(pairs()[0], side)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("rows_of", [pairs, completions])
@pytest.mark.parametrize("name", [*MODELS, *WINDOWED])
def test_log_probs_and_gradients_equal_those_of_each_row_alone(name, rows_of):
    model = build(name)
    assert can_pack(model)
    rows, groups = rows_of()
    expected = torch.cat([log_probs(model, row) for row in rows])
    g = torch.randn_like(expected)
    (expected * g).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    enable(model)
    add_row_forward(model)
    ids, mask = padded(rows)
    labels = ids.masked_fill(mask == 0, -100)
    assert pack_groups(ids, mask, groups).input_ids.shape[1] < int(mask.sum())
    batch = batch_of(ids, mask, labels, groups, ids.device)
    result = model(rows=batch)["log_probs"][labels[:, 1:] != -100]
    error = 1e-4 if model.dtype == torch.float32 else 1e-6  # their norms compute in float32
    torch.testing.assert_close(result, expected, rtol=0, atol=error * float(expected.detach().abs().max()))
    (result * g).sum().backward()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for n, gradient in gradients.items():
        grad = dict(model.named_parameters())[n].grad
        torch.testing.assert_close(grad, gradient, msg=n, rtol=0, atol=error * largest)


def log_probs(model, row, temperature=1.0):
    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gemma2 (softcap)", "mistral (window)"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_as_close_as_those_of_each_row_alone(name, dtype):
    rows, groups = completions()
    ids, mask = padded(rows)
    labels = ids.masked_fill(mask == 0, -100)

    def gradient(dtype, packed):
        model = build(name).to(dtype)
        if packed:
            enable(model)
            add_row_forward(model)
            model(rows=batch_of(ids, mask, labels, groups, ids.device))["log_probs"].sum().backward()
        else:
            torch.cat([log_probs(model, row) for row in rows]).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    truth = gradient(torch.float64, False)
    alone, packed = ((gradient(dtype, way) - truth).norm() / truth.norm() for way in (False, True))
    assert packed < 1.3 * alone + 1e-3, (float(packed), float(alone))


@pytest.mark.parametrize("name", ["llama", "gemma2 (softcap)", "mistral (window)"])
def test_without_a_pack_the_model_is_what_it_was(name):
    model = build(name)
    ids, mask = batch()
    keep = mask.bool()
    expected = model(input_ids=ids, attention_mask=mask).logits
    enable(model)
    result = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(result[keep], expected[keep], rtol=0, atol=1e-6)


def test_left_padding_is_packed_to_the_same_row():
    right, left = (pack_pairs(*batch(side)) for side in ("right", "left"))
    assert right.segments == left.segments
    torch.testing.assert_close(right.input_ids, left.input_ids)
    torch.testing.assert_close(right.position_ids, left.position_ids)
    for pack, side in ((right, "right"), (left, "left")):
        ids, mask = batch(side)
        torch.testing.assert_close(pack.input_ids[0][pack.place][mask.bool()], ids[mask.bool()])


def test_padding_anywhere_and_empty_rows():
    ids = torch.tensor([[0, 5, 6, 0, 7], [5, 6, 0, 8, 9], [0, 0, 5, 6, 7], [0] * 5, [3, 0, 4, 0, 0], [0] * 5])
    pack = pack_groups(ids, ids != 0, [(1, 0, 2), (3,), (5, 4)])
    assert pack.input_ids.tolist() == [[5, 6, 8, 9, 7, 7, 3, 4]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 0, 1]]
    assert pack.segments == (Segment(0, 4, 0, 0), Segment(4, 5, 0, 2), Segment(5, 6, 0, 2), Segment(6, 8, 6, 6))
    assert torch.equal(pack.input_ids[0][pack.place][ids != 0], ids[ids != 0])
    assert pack.place[1].tolist() == [0, 1, 1, 2, 3]  # the token before a label, across padding


def test_equal_rows_are_computed_once():
    pack = pack_groups(torch.tensor([[5, 6], [5, 6], [5, 6]]), torch.ones(3, 2), [(0, 1, 2)])
    assert pack.segments == (Segment(0, 2, 0, 0),)
    assert pack.place.tolist() == [[0, 1]] * 3


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_scored_at_a_temperature(packed):
    model = build("llama")
    ids, mask = batch()
    ids[:, 3:6] = mask[:, 3:6] = 0  # padding in the middle
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    expected = [log_probs(model, row[keep], 0.7) for row, keep in zip(ids, mask.bool(), strict=True)]
    enable(model)
    add_row_forward(model)
    rows = batch_of(ids, mask, labels, halves(len(ids)) if packed else None, ids.device)
    result = model(rows=rows, temperature=0.7)["log_probs"]
    torch.testing.assert_close(result[labels[:, 1:] != -100], torch.cat(expected), rtol=0, atol=1e-5)
    assert not result[labels[:, 1:] == -100].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    model = build("llama").train()
    enable(model)
    ids, mask = batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        packed_hidden(model, pack_pairs(ids, mask)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, msg=n)


def test_models_that_cannot_be_packed_are_recognised():
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert not can_pack(mamba)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    assert not can_pack(bloom)
    model = build("llama")  # its attention is not the packed one
    with pytest.raises(UserError, match="cannot run packed"):
        packed_hidden(model, pack_pairs(*batch()))


def plain_varlen(q, k, v, cu_q, cu_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """torch's attention for sequences of many lengths, in float64: a sequence's last query sees its last key."""
    assert most_q == cu_q.diff().max() and most_k == cu_k.diff().max() and window_size[1] == 0
    assert enable_gqa == (q.shape[1] != k.shape[1]) and cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    outputs = []
    for i in range(len(cu_q) - 1):
        own, seen = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        queries, keys, values = (x.double().transpose(0, 1) for x in (q[own], k[seen], v[seen]))
        keys, values = (x.repeat_interleave(len(queries) // len(x), 0) for x in (keys, values))
        at = torch.arange(queries.shape[1])[:, None] + keys.shape[1] - queries.shape[1]
        apart = at - torch.arange(keys.shape[1])
        hidden = (apart < 0) | ((window_size[0] >= 0) & (apart > window_size[0]))
        scores = queries @ keys.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


@pytest.mark.parametrize("rows_of", [pairs, completions])
@pytest.mark.parametrize("name", ["llama", "mistral (window)"])
def test_all_segments_in_one_call(monkeypatch, name, rows_of):
    """What a GPU runs, with a plain stand-in for its kernel: the states and gradients of one call a segment."""
    model = build(name)
    enable(model)
    rows, groups = rows_of()
    results, calls = [], []

    def counted(*args, **options):
        calls.append(len(args[3]) - 1)
        return plain_varlen(*args, **options)

    monkeypatch.setattr(packed_attention, "_varlen", lambda: counted)
    for together in (False, True):
        monkeypatch.setattr(packed_attention, "_fits", lambda query, together=together: together)
        model.zero_grad()
        pack = pack_groups(*padded(rows), groups)
        hidden = packed_hidden(model, pack)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert calls == [len(pack.segments)] * model.config.num_hidden_layers
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4 * float(one.abs().max()))


def test_which_queries_are_attended_to_in_one_call():
    def fits(dtype=torch.bfloat16, d=64, device="meta"):
        return packed_attention._fits(torch.empty(1, 2, 3, d, dtype=dtype, device=device))

    assert fits() and fits(torch.float16, 256)
    assert not fits(torch.float32) and not fits(d=20) and not fits(d=224) and not fits(device="cpu")
