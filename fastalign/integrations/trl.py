"""Runs TRL's own trainers on fastalign's head: add `fastalign.integrations.trl.install()` to an unchanged script.

TRL computes its losses as before; fastalign only provides the per-token log-probabilities. Two functions are replaced,
for CPU tensors, and the first on NVIDIA GPUs too where fastalign's head takes fewer products than TRL's (other tensors
use TRL's own code):
    trl.trainer.utils._ChunkedLogProbFunction, under `add_fused_lm_head` (DPO, KTO, GRPO, RLOO, SFT), together with the
        test that decides whether prompt and padding positions are left out of the projection: now they are;
    trl.trainer.utils.selective_log_softmax, for the trainers that still build full logits (CPO, ORPO, ...; OnlineDPO
        writes its log-softmax inside a method and runs as it did).
If FSDP2 shards the head on its own, the first function gets it as a DTensor, on every device: TRL gathers it with
`full_tensor()`, whose gradient is not reduced over the processes; here it is averaged, as FSDP's are.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

from fastalign._base.errors import UserError

# What `_ChunkedLogProbFunction.forward` must take after ctx and the hidden states: the seam that is known. TRL 1.13 and
# 1.14 have no `outputs` and always give the entropy.
_SIGNATURE = ("weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
_TESTED = ((1, 13), (1, 16))  # the oldest and the newest TRL that tools/versions.py has tried
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

_originals: dict[str, Any] = {}  # name in trl.trainer.utils -> what stood there
_replacements: dict[str, Any] = {}


def install(*, speed_up: bool = False, memory_budget: int | None = None) -> None:
    """Make TRL's trainers in this process use fastalign's head. Calling it again has no effect.

    memory_budget: bytes that tiles may take on a GPU, None: an eighth of its memory. TRL's own head runs there unless
    all tiles of a call fit (tokens · vocabulary · 2 bytes), hidden states and weight are in one narrow type, the weight
    learns and there is no softcap: then three products do for four.

    speed_up: also compute the linear layers of models that trainers prepare from now on by the fastest products of this
    CPU, as `integrations.transformers.speed_up` does; these models keep it after `uninstall`.

    Raises:
        UserError: TRL is not installed, or is an unknown version; nothing is changed then.
    """
    try:
        from trl.trainer import utils
    except ImportError:
        raise UserError("integrations.trl.install() needs trl: pip install 'fastalign[trl]'") from None
    if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget >= 0):
        raise UserError(f"memory_budget must be a number of bytes, at least 0, or None, got {memory_budget!r}")
    if not _originals:
        has_outputs = _check(utils)
        _put(utils, "_ChunkedLogProbFunction", _head(utils._ChunkedLogProbFunction, has_outputs, memory_budget))
        _tell_of_gpus()
        _put(utils, "selective_log_softmax", _selective_log_softmax(utils.selective_log_softmax))
        if hasattr(utils, "_use_triton"):
            _put(utils, "_use_triton", _compacts(utils._use_triton))
        if hasattr(utils, "DTensor"):
            _put(utils, "DTensor", _NoDTensor)
    if speed_up and "add_fused_lm_head" not in _originals:
        _put(utils, "add_fused_lm_head", _sped_up(utils.add_fused_lm_head))


def uninstall() -> None:
    """Restore everything that `install` replaced."""
    for name, original in _originals.items():
        _replace(name, _replacements[name], original)
    _originals.clear()
    _replacements.clear()


def _put(utils: Any, name: str, replacement: Any) -> None:
    _originals[name], _replacements[name] = getattr(utils, name), replacement
    _replace(name, _originals[name], replacement)


def _replace(name: str, old: Any, new: Any) -> None:
    """Set a function in trl.trainer.utils and, if it is public, in every trl module that imported it by name."""
    everywhere = not name.startswith("_") and name != "DTensor"
    for module_name, module in list(sys.modules.items()):
        ours = module_name == "trl.trainer.utils" or (everywhere and module_name.split(".")[0] == "trl")
        if ours and module is not None and vars(module).get(name) is old:
            setattr(module, name, new)


def _check(utils: Any) -> bool:
    """Whether TRL asks its head for outputs by name. Raises UserError unless both functions are there, the first in a
    form that is known; warns of a TRL that was not tried."""
    version = importlib.metadata.version("trl")
    known = "integrations.trl supports trl 1.13 to 1.16"
    for name in ("_ChunkedLogProbFunction", "selective_log_softmax"):
        if not hasattr(utils, name):
            raise UserError(f"{known}; trl {version} has no trl.trainer.utils.{name}")
    head = utils._ChunkedLogProbFunction
    came = (*_SIGNATURE, "outputs") if head is None else tuple(inspect.signature(head.forward).parameters)[2:]
    if came not in (_SIGNATURE, (*_SIGNATURE, "outputs")):
        raise UserError(f"{known}; in trl {version} _ChunkedLogProbFunction takes ({', '.join(came)})")
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not _TESTED[0] <= number <= _TESTED[1]:
        warnings.warn(f"trl {version} was not tried with this fastalign; {known}", stacklevel=3)
    return len(came) > len(_SIGNATURE)


class _NoDTensor:
    """Replaces the class for which TRL gathers a weight. No weight is of this class: the head below gathers."""


def _tell_of_gpus() -> None:
    import torch

    if torch.cuda.is_available():
        print(
            "fastalign: on a GPU TRL's own head runs, and fastalign's where all its tiles fit memory_budget",
            file=sys.stderr,
        )


def tile_bytes(hidden: Any, weight: Any, targets: Any, softcap: float | None) -> int:
    """Of all tiles of a call on an NVIDIA GPU; 0 where the head would not take three products for four."""
    import torch

    from fastalign import kernels
    from fastalign.ops import head

    dtype = head.autocast_type(hidden.device, hidden.dtype)
    learns = weight.requires_grad and torch.is_grad_enabled()
    if not learns or dtype.itemsize > 2 or dtype != head.autocast_type(hidden.device, weight.dtype):
        return 0
    shapes = (torch.empty(x.shape, dtype=dtype, device="meta") for x in (hidden, weight))
    return 4 * kernels.launcher("linear_token_logprobs.kept_size")(*shapes, targets, softcap or 0.0, 1 << 60)


def _tiles_that_fit(hidden: Any, *call: Any, memory_budget: int | None) -> int:
    """Bytes of all tiles; 0 where TRL's own head is to run."""
    import torch

    from fastalign import backend

    if hidden.device.type != "cuda" or not backend.has_triton():
        return 0
    if memory_budget is None:
        memory_budget = torch.cuda.get_device_properties(hidden.device).total_memory // 8
    size = tile_bytes(hidden, *call)
    return size if size <= memory_budget else 0


def _head(original: Any, has_outputs: bool, memory_budget: int | None) -> Any:
    """original: None where TRL's kernels cannot be imported."""

    class ChunkedLogProbFunction:
        """Replaces TRL's autograd function: `apply` with the same arguments and results."""

        @staticmethod
        def apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=("entropy",)
        ):
            from fastalign.ops import dtensor

            weight, bias = dtensor.gathered(weight), dtensor.gathered(bias)
            kept = None
            if hidden.device.type != "cpu":
                kept = _tiles_that_fit(hidden, weight, targets, softcap, memory_budget=memory_budget)
                if not kept:
                    more = (outputs,) if has_outputs else ()
                    return original.apply(
                        hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, *more
                    )
            from fastalign.ops import linear_token_logprobs

            result = linear_token_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                outputs=("log_probs", *outputs) if "log_probs" not in outputs else tuple(outputs),
                memory_budget=kept,
            )
            if not isinstance(result, tuple):  # a single output comes as a tensor
                return result, None, None, None, None
            names = _OPTIONAL if has_outputs else outputs
            return (result.log_probs, *(getattr(result, name) for name in names))

    return ChunkedLogProbFunction


def _sped_up(original: Callable) -> Callable:
    def add_fused_lm_head(model, *args, **kwargs):
        """TRL's trainers call it once with each of their models."""
        from fastalign.models import linear_layers

        original(model, *args, **kwargs)
        linear_layers.speed_up(model)

    return add_fused_lm_head


def _compacts(original: Callable) -> Callable:
    def use_triton(device) -> bool:
        """Whether only positions with a label are projected: TRL asks for Triton, fastalign's CPU head does it too."""
        return device.type == "cpu" or original(device)

    return use_triton


def _selective_log_softmax(original: Callable) -> Callable:
    taken = inspect.signature(original).parameters  # TRL 1.13 has no options

    def selective_log_softmax(logits, index, temperature: float = 1.0, row_mask=None):
        from fastalign._base.dtypes import DTYPES
        from fastalign.ops import token_logprobs

        ours = logits.device.type == "cpu" and logits.dtype in DTYPES and index.shape == logits.shape[:-1]
        if not ours or temperature <= 0:
            more = {"temperature": temperature, "row_mask": row_mask}
            return original(logits, index, **{name: value for name, value in more.items() if name in taken})
        labels = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        return token_logprobs(logits, labels, temperature=temperature).to(logits.dtype)

    return selective_log_softmax
