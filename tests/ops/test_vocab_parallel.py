"""Heads in slices over several processes give what one process with the whole head gives; so do DTensor heads."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from numerics import HAIR, assert_as_good_as_torch
from ranks import Ranks
from tiny import tiny_causal_lm

import fastalign
from fastalign import UserError, kernels, reference
from fastalign.ops import (
    linear_token_logprobs,
    token_logprobs,
    vocab_parallel_linear_token_logprobs,
    vocab_parallel_token_logprobs,
)
from fastalign.ops.token_logprobs import OUTPUTS

NEG_INF, NAN = float("-inf"), float("nan")
VOCAB = 37
SIZES = [(21, 16), (0, 37), (9, 0, 28), (13, 12, 12)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
INTERPRETED = {"linear_token_logprobs", "token_logprobs"} <= set(kernels.names())
BACKENDS = ["cpu", "reference", *["triton"] * INTERPRETED]
CASES = [(backend, sizes, dtype) for backend in ("cpu", "reference") for sizes in SIZES for dtype in DTYPES]
CASES += [("triton", (21, 16), torch.bfloat16), ("triton", (9, 0, 28), torch.float32)] * INTERPRETED  # it is slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(count) -> that many processes, started once."""
    started = {}

    def of(count):
        if count not in started:
            started[count] = Ranks(count, tmp_path_factory.mktemp("ranks") / "store")
        return started[count]

    yield of
    for each in started.values():
        each.close()


def problem(dtype=torch.float64, rows=(2, 5), width=8, ignore_index=-100):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    labels = torch.randint(1, VOCAB, rows, generator=generator)
    labels.view(-1)[:4] = torch.tensor([VOCAB - 1, ignore_index, 0 if ignore_index else 1, 1])
    return draw(*rows, width), draw(VOCAB, width), draw(VOCAB), draw(3, width), draw(VOCAB, 3), labels


def mine(x, sizes, dim=0):
    return x.split(list(sizes), dim)[dist.get_rank()]


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def backpropagate(*outputs):
    for result in outputs:
        weights = torch.randn(result["log_probs"].shape, generator=torch.Generator().manual_seed(1))
        (result["log_probs"] * weights + 0.3 * result["entropy"]).nan_to_num(0, 0, 0).sum().backward()


def agree(found, one, truth, dtype):
    """No further from the truth than the single process is."""
    hair = HAIR[torch.float64] if dtype == torch.float64 else HAIR[torch.float32]
    for name in OUTPUTS[:4]:
        assert found[name].dtype == one[name].dtype
        assert_as_good_as_torch(found[name].detach(), one[name].detach(), truth[name].detach(), hair, name)
    assert torch.equal(found["is_top1"], truth["is_top1"])


def gradients_agree(names, ours, ones, truths, dtype):
    for name, x, one, truth in zip(names, ours, ones, truths, strict=True):
        assert x.grad.dtype == dtype and x.grad.shape == truth.shape
        if x.numel():  # each slice rounds what it adds
            assert_as_good_as_torch(x.grad, one, truth, HAIR[dtype] * dist.get_world_size(), name)


def check_head(sizes, dtype, backend, options, masked=()):
    hidden, weight, bias, a, b, labels = problem(dtype, ignore_index=options.get("ignore_index", -100))
    bias[list(masked)] = NEG_INF
    tensors = (hidden, weight, bias, a, b)
    ones, truths = leaves(*tensors), leaves(*(x.double() for x in tensors))
    ours = leaves(hidden, mine(weight, sizes), mine(bias, sizes), a, mine(b, sizes))
    call = {"outputs": OUTPUTS, **options}
    truth = reference.linear_token_logprobs(*truths[:2], labels, truths[2], adapter=(*truths[3:], 0.5), **options)
    with fastalign.use_backend(backend):
        one = linear_token_logprobs(*ones[:2], labels, bias=ones[2], adapter=(*ones[3:], 0.5), **call)._asdict()
        result = vocab_parallel_linear_token_logprobs(
            *ours[:2], labels, bias=ours[2], adapter=(*ours[3:], 0.5), **call
        )._asdict()
        backpropagate(one, result)
    backpropagate(truth)
    agree(result, one, truth, dtype)
    split = lambda i, g: mine(g, sizes) if i in (1, 2, 4) else g  # noqa: E731
    expected = [[split(i, x.grad) for i, x in enumerate(xs)] for xs in (ones, truths)]
    gradients_agree("hidden weight bias A B".split(), ours, *expected, dtype)


OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 0.3, "ignore_index": 0},  # an entry of the vocabulary, and every slice's first
    {"softcap": 5.0, "temperature": 1.3, "ignore_index": 1},
]


@pytest.mark.slow_matrix
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend, sizes, dtype", CASES, ids=str)
def test_a_head_in_slices(ranks, backend, sizes, dtype, options):
    ranks(len(sizes))(check_head, sizes, dtype, backend, options)


@pytest.mark.parametrize("masked", [range(21), range(21, VOCAB), [0, 3, 36], range(VOCAB)], ids=len)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_entries_slices_and_rows(ranks, backend, masked):
    """-inf entries: a whole slice of them, a label's own, all."""
    ranks(2)(check_head, (21, 16), torch.float32, backend, {}, tuple(masked))


def check_rows(sizes, dtype, backend, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, VOCAB, generator=generator, dtype=torch.float64).to(dtype) * 3
    labels = torch.randint(0, VOCAB, (3, 6), generator=generator)
    labels[0, :2] = options.get("ignore_index", -100)
    logits[1, 0, 2:30] = NEG_INF
    logits[1, 1] = NEG_INF
    logits[1, 2, labels[1, 2]] = NEG_INF
    logits[2, 0, [4, 15, 36]] = 99.0  # ties: the label is the first largest, or another
    logits[2, 1, [4, 15, 36]] = 99.0
    logits[2, 2, [15, 36]] = 99.0
    labels[2, :3] = torch.tensor([4, 15, 36])
    logits[2, 3, 7] = NAN
    (one,), (truth,), (ours,) = leaves(logits), leaves(logits.double()), leaves(mine(logits, sizes, -1))
    expected = reference.token_logprobs(truth, labels, **options)
    with fastalign.use_backend(backend):
        single = token_logprobs(one, labels, outputs=OUTPUTS, **options)._asdict()
        result = vocab_parallel_token_logprobs(ours, labels, outputs=OUTPUTS, **options)._asdict()
        backpropagate(single, result)
    backpropagate(expected)
    assert result["is_top1"][2, :4].tolist() == [True, False, False, False]
    agree(result, single, expected, dtype)
    assert not result["log_probs"][2, 3].isfinite() and result["log_probs"][2, 4:].isfinite().all()
    kept = torch.ones(3, 6, dtype=torch.bool)
    kept[2, 3] = False  # the NaN's row
    slices = [mine(x.grad, sizes, -1)[kept] for x in (one, truth)]
    if ours.numel():
        assert_as_good_as_torch(ours.grad[kept], *slices, HAIR[dtype], "logits")


@pytest.mark.slow_matrix
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 30.0, "ignore_index": 0}], ids=str)
@pytest.mark.parametrize("backend, sizes, dtype", CASES, ids=str)
def test_logits_in_slices(ranks, backend, sizes, dtype, options):
    ranks(len(sizes))(check_rows, sizes, dtype, backend, options)


def check_one_output(frozen):
    """Only log-probs; sizes given, which asks nothing of the others; a head that learns, or not."""
    hidden, weight, *_, labels = problem(torch.float32)
    sizes = (21, 16)
    (one, w), (ours, shard) = leaves(hidden, weight), leaves(hidden, mine(weight, sizes))
    if frozen:
        w, shard = w.detach(), shard.detach()
    result = vocab_parallel_linear_token_logprobs(ours, shard, labels, sizes=sizes)
    expected = linear_token_logprobs(one, w, labels)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    (result.sum() + expected.sum()).backward()
    torch.testing.assert_close(ours.grad, one.grad, rtol=1e-5, atol=1e-5)
    if not frozen:
        torch.testing.assert_close(shard.grad, mine(w.grad, sizes), rtol=1e-5, atol=1e-5)
    logits = (hidden @ weight.T)[..., :VOCAB]
    rows = vocab_parallel_token_logprobs(mine(logits, sizes, -1), labels, sizes=sizes)
    torch.testing.assert_close(rows, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_alone(ranks, frozen):
    ranks(2)(check_one_output, frozen)


def check_within_a_group():
    """The head is split over ranks 0 and 2 alone; 1 has no part in it."""
    group = dist.new_group([0, 2])
    hidden, weight, *_, labels = problem()
    expected = linear_token_logprobs(hidden, weight, labels)
    if dist.get_rank() == 1:
        with pytest.raises(UserError, match="must belong to group"):
            vocab_parallel_linear_token_logprobs(hidden, weight, labels, group=group)
    else:
        shard = weight[:30] if dist.get_rank() == 0 else weight[30:]
        result = vocab_parallel_linear_token_logprobs(hidden, shard, labels, group=group)
        torch.testing.assert_close(result, expected)


def test_a_group_of_some_of_the_processes(ranks):
    ranks(3)(check_within_a_group)


def check_refused():
    rank = dist.get_rank()
    hidden, weight, *_, labels = problem()
    shard = mine(weight, (21, 16))
    call = vocab_parallel_linear_token_logprobs

    def raises(pattern, *args, error=UserError, **options):
        begin = time.perf_counter()
        with pytest.raises(error, match=pattern):
            call(*args, **options)
        assert time.perf_counter() - begin < 20  # no process waited for another that had gone

    for wrong in (VOCAB, -1):
        bad = labels.clone()
        bad[1, 2] = wrong
        raises(rf"labels must be in \[0, 37\) or ignore_index -100, got {wrong} at position 7", hidden, shard, bad)
    narrow = hidden[..., :5]
    mixed = (narrow, shard[:, :5]) if rank else (hidden, shard)
    raises(r"hidden.shape\[-1\] must be the same on every rank, got \[8, 5\]", *mixed, labels)
    if rank:  # its own hidden does not fit its slice; the others learn of it
        raises(r"hidden.shape\[-1\] must equal weight.shape\[1\], got 8 and 5", hidden, shard[:, :5], labels)
    else:
        raises("the arguments on rank 1 are invalid", hidden, shard, labels)
    some = (hidden[: 2 - rank], shard, labels[: 2 - rank])
    raises(r"labels.numel\(\) must be the same on every rank, got \[10, 5\]", *some)
    raises(r"sizes must hold the slice of each of 2 ranks", hidden, shard, labels, sizes=(16, 21))
    raises("bias must have weight_shard's rows, got 1 and 0", hidden, shard[:0], labels, bias=shard[:1, 0])
    raises("temperature must be a positive", hidden, shard, labels, temperature=0.0)
    raises("labels must be int64", hidden, shard, labels.int(), error=TypeError)
    call = vocab_parallel_token_logprobs
    raises("outputs must be some of", hidden, labels, outputs=("logits",))
    raises("must be a torch.Tensor", [1.0], labels, error=TypeError)


def test_what_is_refused_is_refused_everywhere(ranks):
    ranks(2)(check_refused)


def test_needs_a_process_group():
    hidden, weight, *_, labels = problem()
    with pytest.raises(UserError, match="init_process_group"):
        vocab_parallel_linear_token_logprobs(hidden, weight, labels)


# DTensors


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def check_tensor_parallel(bias):
    """hidden says by its placement that all processes have it: the head stays in its slices."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    world = dist.get_world_size()
    mesh = mesh_of(world)
    hidden, weight, c, a, b, labels = problem()
    ones = leaves(hidden, weight, c, a, b)
    ours = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, c, b)]
    rows = leaves(hidden, a)
    whole, low = (DTensor.from_local(x, mesh, [Replicate()]) for x in rows)
    more = {"bias": ours[1], "adapter": (low, ours[2], 0.5)} if bias else {}
    with CommDebugMode() as comm:
        result = linear_token_logprobs(whole, ours[0], labels, **more)
        result.sum().backward()
    assert not any("gather" in str(op) for op in comm.get_comm_counts())
    more = {"bias": ones[2], "adapter": (*ones[3:], 0.5)} if bias else {}
    expected = linear_token_logprobs(*ones[:2], labels, **more)
    expected.sum().backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(rows[0].grad, ones[0].grad)
    torch.testing.assert_close(ours[0].grad.full_tensor(), ones[1].grad)
    if bias:
        torch.testing.assert_close(rows[1].grad, ones[3].grad)
        torch.testing.assert_close(ours[1].grad.full_tensor(), ones[2].grad)
        torch.testing.assert_close(ours[2].grad.full_tensor(), ones[4].grad)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias and adapter"])
@pytest.mark.parametrize("world", [2, 3])
def test_a_replicated_hidden_leaves_a_dtensor_head_in_slices(ranks, world, bias):
    ranks(world)(check_tensor_parallel, bias)


def check_data_parallel(same_rows):
    """A plain hidden is this process's own: the head is gathered and its gradient is the mean, as FSDP's."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden, weight, bias, a, b, labels = problem()
    parts = [0, 1] if not same_rows else [0, 0]  # of the two rows of each
    ones = leaves(hidden, weight, bias, a, b)
    each = [
        linear_token_logprobs(ones[0][p], ones[1], labels[p], bias=ones[2], adapter=(*ones[3:], 0.5)) for p in parts
    ]
    (sum(x.sum() for x in each) / 2).backward()
    for mesh, *placements in [
        (mesh_of(2), Shard(0)),
        (mesh_of(2), Shard(1)),
        (mesh_of(2), Replicate()),
        (mesh_of(2, 1), Replicate(), Shard(0)),  # HSDP
        (mesh_of(1, 2), Shard(0), Shard(0)),
    ]:
        spread = lambda x, at=None: distribute_tensor(x, mesh, at or placements).requires_grad_()  # noqa: B023, E731
        ours = [spread(weight), spread(bias, [Replicate()] * mesh.ndim), spread(a), spread(b)]
        part = parts[dist.get_rank()]
        (row,) = leaves(hidden[part])
        result = linear_token_logprobs(row, ours[0], labels[part], bias=ours[1], adapter=(*ours[2:], 0.5))
        torch.testing.assert_close(result, each[dist.get_rank()])
        result.sum().backward()
        for x, one in zip(ours, ones[1:], strict=True):
            assert x.grad.placements == x.placements
            torch.testing.assert_close(x.grad.full_tensor(), one.grad)
        if not same_rows:
            torch.testing.assert_close(row.grad, 2 * ones[0].grad[part])


@pytest.mark.parametrize("same_rows", [False, True])
def test_a_plain_hidden_gathers_a_dtensor_head(ranks, same_rows):
    ranks(2)(check_data_parallel, same_rows)


def check_dtensors_refused():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(2)
    hidden, weight, bias, *_, labels = problem()
    head = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(UserError, match=r"hidden as a DTensor must be Replicate\(\)"):
        linear_token_logprobs(distribute_tensor(hidden, mesh, [Shard(0)]), head, labels)
    whole = distribute_tensor(hidden, mesh, [Replicate()])
    with pytest.raises(UserError, match="bias must be a DTensor placed as weight is"):
        linear_token_logprobs(whole, head, labels, bias=bias)
    with pytest.raises(UserError, match="must lie on one mesh"):
        linear_token_logprobs(whole, distribute_tensor(weight, mesh_of(1, 2), [Replicate(), Shard(0)]), labels)
    expected = linear_token_logprobs(hidden, weight, labels)
    for other in (weight, *(distribute_tensor(weight, mesh, [at]) for at in (Replicate(), Shard(1)))):
        torch.testing.assert_close(linear_token_logprobs(whole, other, labels), expected)


def test_dtensors_that_do_not_fit(ranks):
    ranks(2)(check_dtensors_refused)


def check_fsdp2(units, tied):
    """A model under FSDP2, a part of the batch on each process, against the whole batch on one."""
    from torch.distributed.fsdp import fully_shard

    mesh, rank = mesh_of(2), dist.get_rank()
    ids = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    one = tiny_causal_lm(scale=1.0)
    if tied:
        one.lm_head.weight = one.model.embed_tokens.weight
    two = copy.deepcopy(one)

    def loss(model, ids):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        return -linear_token_logprobs(hidden, model.lm_head.weight, ids[:, 1:]).mean()

    for layer in two.model.layers:
        fully_shard(layer, mesh=mesh)
    if "TRL" in units:
        from trl.trainer import utils

        fastalign.integrations.trl.install()
        for model in (one, two):
            utils.add_fused_lm_head(model)
        tail = two.lm_head if "own" in units else [two.model.norm, two.lm_head]  # accelerate's way
        fully_shard(tail, mesh=mesh, reshard_after_forward=False)
        fully_shard(two, mesh=mesh)
        loss = run = lambda model, ids: model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    elif units == "outside the head's forward pass":
        fully_shard(two.model, mesh=mesh)
        fully_shard(two.lm_head, mesh=mesh)
        run = loss
    else:
        if units == "a head of its own":
            fully_shard(two.lm_head, mesh=mesh)
        fully_shard(two, mesh=mesh)
        inner = two.forward
        two.forward = lambda ids, fused=False: loss(two, ids) if fused else inner(ids)
        run = lambda model, ids: model(ids, fused=True)  # noqa: E731
    expected = loss(one, ids)
    expected.backward()
    for _ in range(2):
        two.zero_grad()
        result = run(two, ids[2 * rank : 2 * rank + 2])
        result.backward()
    torch.testing.assert_close(result, loss(one, ids[2 * rank : 2 * rank + 2]))
    names = dict(one.named_parameters())
    for name, parameter in two.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), names[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    fastalign.integrations.trl.uninstall()


@pytest.mark.parametrize(
    "units, tied",
    [
        ("the root's head", False),
        ("the root's head", True),
        ("a head of its own", False),
        ("outside the head's forward pass", False),
        ("TRL's head, in a unit with the norm", False),
        ("TRL's head, in a unit of its own", False),
    ],
)
def test_fsdp2(ranks, units, tied):
    if "TRL" in units:
        pytest.importorskip("trl")
    ranks(2)(check_fsdp2, units, tied)
