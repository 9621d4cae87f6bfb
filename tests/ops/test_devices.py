"""What surrounds a launch on a GPU, as far as it shows without one: the device, autocast, the library's switches."""

import pytest
import torch

from fastalign import UserError
from fastalign.ops import head, library


def test_tensors_on_several_devices_are_refused_before_a_launch():
    with pytest.raises(UserError, match="must be on one device, got cpu and meta"):
        library.on_the_device_of(torch.zeros(2), 1.0, torch.zeros(2, device="meta"), None)


def test_a_launch_is_on_its_tensors_device(monkeypatch):
    class Placed(torch.Tensor):
        device = torch.device("cuda:1")

    used = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: used.append(device) or library.nullcontext())
    with library.on_the_device_of(None, torch.zeros(2).as_subclass(Placed), 3):
        assert used == [torch.device("cuda:1")]
    with library.on_the_device_of(torch.zeros(2)), library.on_the_device_of(3):
        assert len(used) == 1


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_on_a_gpu_narrows_float32_alone(monkeypatch, narrow):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: {"cuda": narrow}[kind])
    hidden = torch.randn(3, 4, requires_grad=True)
    given = (hidden, torch.randn(5, 4), None, torch.randn(2, 4).double(), torch.randn(2, 4).half())
    on_gpu = head.as_autocast(torch.device("cuda"), *given)
    assert [None if x is None else x.dtype for x in on_gpu] == [narrow, narrow, None, torch.float64, torch.float16]
    on_gpu[0].float().sum().backward()
    assert hidden.grad.dtype == torch.float32
    assert all(a is b for a, b in zip(head.as_autocast(torch.device("cpu"), *given), given, strict=True))


def test_the_librarys_products_are_summed_whole_whatever_the_user_allows():
    from fastalign._base.whole_sums import WHOLE_SUMS, whole_sums

    switches, seen = torch.backends.cuda.matmul, []
    before = {name: getattr(switches, name) for name in WHOLE_SUMS}
    try:
        switches.fp32_precision = "tf32"
        switches.allow_bf16_reduced_precision_reduction = True
        with whole_sums():
            seen = [getattr(switches, name) for name in WHOLE_SUMS]
        assert seen == ["ieee", False, False]
        assert switches.fp32_precision == "tf32" and switches.allow_bf16_reduced_precision_reduction
    finally:
        for name, value in before.items():
            setattr(switches, name, value)
