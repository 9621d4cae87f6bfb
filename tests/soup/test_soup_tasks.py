"""Merges of sparse task vectors: the native extension against the definition in torch, and that against the papers."""

import pytest
import torch

from fastalign import backend
from fastalign.soup.by_torch import mask, merge_tensor, random_words
from fastalign.soup.checkpoint import of_torch
from fastalign.soup.steps import Choice, Segment, Tasks, stream_of
from fastalign.soup.stream import merge_tasks

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def from_files(folder, inputs, tasks, dtype, *, threads=2, chunk=1 << 14):
    """The same tensor through merge_tasks: inputs in one file, outputs in another."""
    n, k = inputs[0].numel(), len(tasks.weights)
    source, target = folder / "in", folder / "out"
    source.write_bytes(b"".join(bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in inputs))
    offsets = [0]
    for x in inputs:
        offsets.append(offsets[-1] + x.nbytes)
    with open(source, "rb") as read, open(target, "w+b") as written:
        segment = Segment(
            n,
            tuple(of_torch(x.dtype) for x in inputs),
            (read.fileno(),) * len(inputs),
            tuple(offsets[:-1]),
            (written.fileno(),) * k,
            tuple(i * n * dtype.itemsize for i in range(k)),
            [],
        )
        merge_tasks(segment, tasks, of_torch(dtype), chunk=chunk, threads=threads)
    data = torch.frombuffer(bytearray(target.read_bytes()), dtype=dtype)
    return list(data.view(k, *inputs[0].shape))


def models(shape, dtypes, seed=0, step=0.02):
    torch.manual_seed(seed)
    base = torch.randn(shape, dtype=F64)
    return [(base + step * i * torch.randn(shape, dtype=F64)).to(dtype) for i, dtype in enumerate(dtypes)]


def every_choice(n):
    """For two models of n elements: each kind of choice, with ties cut on both sides where types are narrow."""
    return {
        "all": (Choice(), Choice(scale=0.5)),
        "largest": (Choice("band", n - n // 5, n, largest_first=True), Choice("band", n - 1, n, largest_first=True)),
        "middle": (Choice("band", n // 3, n - n // 9), Choice("band", 0, n // 2, match_sum=True)),
        "none": (Choice("band"), Choice("band", 0, n)),
        "random": (
            Choice("random", probability=0.3, scale=1 / 0.3, stream=7),
            Choice("random", probability=0.9, match_sum=True),
        ),
        "ranked": (
            Choice("ranked", probability=0.5, epsilon=0.2, own_scale=True, stream=3),
            Choice("ranked", probability=0.4, epsilon=0.3, match_sum=True, stream=2**62 + 5),
        ),
    }


@pytest.mark.slow_matrix
@pytest.mark.skipif(backend.native is None, reason="the native extension is not built")
@pytest.mark.parametrize("kind", every_choice(9))
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, F32, BF16), (F64, F64, F64), (BF16, torch.float16, F64)])
def test_the_extension_does_what_is_defined(tmp_path, kind, dtypes):
    for shape in ((1,), (63,), (7, 130), (1031, 129)):
        inputs = models(shape, dtypes)
        inputs[1].view(-1)[::3] = inputs[0].view(-1)[::3].to(inputs[1].dtype)  # task vectors of zeros, and of ties
        n = inputs[0].numel()
        for elect, normalize in ((True, True), (False, True), (True, False)):
            tasks = Tasks(every_choice(n)[kind], ((0.7, 0.4), (0.3, -0.3)), 0.8, elect, normalize, 11, shape[-1])
            # A total of nothing has either sign, as the last bit falls: float64 leaves no such elements.
            dtype = F64 if F64 in dtypes else F32
            for result, wanted in zip(
                from_files(tmp_path, inputs, tasks, dtype), merge_tensor(inputs, tasks, dtype), strict=True
            ):
                far = (result.double() - wanted.double()).abs() > 4e-6 * (1 + wanted.double().abs())
                assert far.sum() <= (0 if dtype == F64 else 2 + 1e-4 * n), (shape, elect, normalize)


@pytest.mark.skipif(backend.native is None, reason="the native extension is not built")
def test_threads_and_chunks_do_not_matter_and_outputs_round_once(tmp_path):
    inputs = models((300, 700), (BF16, BF16, BF16))
    for kind, choices in every_choice(300 * 700).items():
        tasks = Tasks(choices, ((0.5, 0.5), (1.0, 0.2)), 1.0, True, True, 5, 700)
        one = from_files(tmp_path, inputs, tasks, BF16, threads=1, chunk=1 << 20)
        many = from_files(tmp_path, inputs, tasks, BF16, threads=3, chunk=1 << 10)
        wide = from_files(tmp_path, inputs, tasks, F32)
        for a, b, c in zip(one, many, wide, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16)), kind
            assert torch.equal(a, c.to(BF16)), kind


def test_what_cancels_out_has_the_sign_of_nothing(tmp_path, each_backend):
    """0.5 x - 0.4 (1.25 x) is 0 in every precision, whose sign counts as +: of the two the positive one is taken."""
    base, a = torch.zeros(70), torch.linspace(-1, 1, 70).bfloat16()
    b = -1.25 * a.float()
    tasks = Tasks((Choice(), Choice()), ((0.5, 0.4),), 1.0, True, True, 0, 70)
    (result,) = from_files(tmp_path, [base, a, b], tasks, F32)
    torch.testing.assert_close(result, torch.maximum(a.float(), b))


def test_what_is_no_number_stays_none(tmp_path, each_backend):
    base, a, b = torch.zeros(70), torch.linspace(-1, 1, 70), torch.linspace(1, -1, 70)
    a[3] = float("nan")
    for choices in ((Choice(), Choice()), (Choice("band", 60, 70, largest_first=True), Choice())):
        (result,) = from_files(tmp_path, [base, a, b], Tasks(choices, ((0.5, 0.5),), 1.0, True, True, 0, 70), F32)
        assert result.isnan().nonzero().tolist() == [[3]]


def test_a_band_cuts_ties_by_place():
    delta = torch.tensor([1.0, -1, 2, 1, -2, 0, 1, 2])
    largest = mask(delta, Choice("band", 3, 8, largest_first=True), 0, 8)  # 2, -2, 2, then the first two of size 1
    assert largest.tolist() == [True, True, True, False, True, False, False, True]
    middle = mask(delta, Choice("band", 2, 6), 0, 8)  # ranks 0: the zero, 1: the first of size 1; 6, 7: the last two 2s
    assert middle.tolist() == [False, True, True, True, False, False, True, False]


def test_ties_by_hand():
    """Elect and disjoint merge (arXiv 2306.01708, figure 1): of +3, -1, +1 the sign is +, the mean of 3 and 1 is 2."""
    base = torch.zeros(3)
    deltas = [torch.tensor([3.0, -4.0, 0.1]), torch.tensor([-1.0, -2.0, 1.0]), torch.tensor([1.0, 5.0, -1.0])]
    keep_two = Choice("band", 1, 3, largest_first=True)
    tasks = Tasks((keep_two, keep_two, keep_two), ((1.0, 1.0, 1.0),), 1.0, True, True, 0, 3)
    (result,) = merge_tensor([base, *deltas], tasks, F32)
    # second: -4, -2, +5 are -1 in all: the mean of -4 and -2. third: 0.1 and 1 are dropped as the least of their
    # vectors, but of the second vector -1 comes first among equals, so that 1 goes; of the third 1 stays and -1 goes.
    assert result.tolist() == [2.0, -3.0, 0.0]


def test_what_stays_by_chance_is_as_likely_as_asked_and_keeps_the_mean():
    n, row = 1 << 16, 1 << 10
    delta = torch.randn(n, dtype=F64)
    kept = mask(delta, Choice("random", probability=0.3, stream=4), 1, row)
    assert abs(kept.double().mean() - 0.3) < 4 * (0.21 / n) ** 0.5
    ranked = Choice("ranked", probability=0.5, epsilon=0.4, stream=4)
    kept = mask(delta, ranked, 1, row).view(-1, row)
    least = delta.view(-1, row).abs().argsort(1)
    by_rank = kept.double().gather(1, least).mean(0)  # over 64 rows
    ends = by_rank[:64].mean().item(), by_rank[-64:].mean().item()
    assert ends == pytest.approx((0.1 + 0.8 * 31.5 / 1023, 0.9 - 0.8 * 31.5 / 1023), abs=0.03)
    words = [random_words(n, seed, stream) for seed, stream in ((1, 4), (2, 4), (1, 5))]
    assert len({tuple(x[:8].tolist()) for x in words}) == 3
    assert torch.equal(random_words(100, 1, 4), words[0][:100])
    assert stream_of("a", 0) != stream_of("a", 1) != stream_of("b", 1)
    assert abs((words[0].double() / 2**32).mean() - 0.5) < 0.01
