"""A model's identity: the models for which a verdict, or cached numbers, are valid."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KNOWN = ("torch.distributed", "accelerate.", "fastalign.")  # libraries whose hooks change no numbers
_LIBRARIES = ("transformers", "fastalign", "liger_kernel")  # libraries whose forwards depend only on their classes
_PASSING = ("training", "gradient_checkpointing", "max_seq_len_cached")  # attributes that do not affect the numbers
_PLAIN = (bool, int, float, str)  # faster for isinstance than a union
_NO_PART = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "_attn_implementation",
    "use_cache",
    "architectures",
)


class Verdict(NamedTuple):
    """ok; why not, in one line; error: the largest difference of a log-probability, in nats."""

    ok: bool
    why: str = ""
    error: float = 0.0

    def __bool__(self) -> bool:
        return self.ok


def language_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def identity(model: Any) -> tuple[Any, ...]:
    """A hashable key: class, configuration, adapters, dtype, device, attention implementation, every module's class
    with its forward and settings, and the hooks of this model."""
    from fastalign import backend

    inner = language_model(model)
    where = (inner.dtype, inner.device.type, backend.forced(), inner.config._attn_implementation)
    return (
        _class_of(inner),
        repr(_config(inner)),
        repr(_adapters(model)),
        *where,
        _parts(model),
        tuple(map(id, _hooks_of(model))),
    )


def is_plain(model: Any) -> bool:
    """Whether the modules have no unknown hooks or replaced forwards. Those of sharding libraries, and our own, are
    known."""
    return not any(_hooks_of(model))


def described(model: Any) -> dict[str, Any] | None:
    """JSON values that identify the model in another process, except for its weights; None if that is impossible."""
    if not is_plain(model):
        return None
    inner = language_model(model)
    parts = [
        (cls.__module__, cls.__qualname__, _code_of(forward), *map(str, rest), count)
        for (cls, forward, *rest), count in _parts(model)
    ]
    return {
        "config": _config(inner),
        "attention": inner.config._attn_implementation,
        "adapters": _adapters(model),
        "parts": parts,
        "weights": [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()],
    }


def weights_state(model: Any) -> tuple[Any, ...]:
    """A value that changes with every change of the weights in this process, and of the active adapters."""
    versions = tuple((p.untyped_storage()._cdata, 0 if p.is_inference() else p._version) for p in model.parameters())
    return versions, tuple(map(_adapter_state, model.modules()))


def passable(model: Any) -> Verdict:
    """Whether a path may bypass the model's own forward. Not if a PEFT wrapper reads or adds tokens (see
    `reads_tokens`), nor if a user's own class may change the logits at some positions only, which a trial on a few
    tokens would not detect."""
    wrapped, inner = reads_tokens(model), language_model(model)
    if not wrapped:
        return wrapped
    for part in (inner, getattr(inner, "base_model", inner)):
        cls = _class_of(part)
        if not cls.forward.__module__.startswith(_LIBRARIES):
            return Verdict(False, f"{cls.__name__} has a forward of its own", math.nan)
    return wrapped


def reads_tokens(model: Any) -> Verdict:
    """Not ok if a PEFT wrapper's forward reads the token ids (aLoRA's invocation) or adds to them (prompt learning), so
    that no path may bypass it."""
    for config in getattr(model, "peft_config", {}).values():
        adds = getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False)
        if adds or getattr(config, "alora_invocation_tokens", None):
            return Verdict(False, f"its adapter ({config.peft_type.value}) reads or adds tokens", math.nan)
    return Verdict(True)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Its class, without the wrapper class of a sharding library."""
    cls: Any = type(module)  # mypy takes no class for Hashable
    return _unsharded(cls)


@functools.lru_cache(maxsize=4096)
def _unsharded(cls: type) -> Any:
    return next(c for c in cls.__mro__ if not c.__name__.startswith("FSDP"))


def _config(inner: Any) -> dict[str, Any]:
    return {name: value for name, value in inner.config.to_dict().items() if name not in _NO_PART}


def _adapters(model: Any) -> dict[str, str]:
    return {name: str(config) for name, config in getattr(model, "peft_config", {}).items()}


def _parts(model: Any) -> tuple:
    """((class, its forward, active adapters, settings), number of such modules) ..."""
    parts: Counter = Counter()
    for module in model.modules():
        cls = _class_of(module)
        parts[cls, cls.forward, _adapter_state(module), _settings(module)] += 1
    return tuple(parts.items())


def _adapter_state(module: nn.Module) -> tuple:
    # hasattr of a module is slow if the attribute is missing, and this runs at every minibatch
    if "base_layer" not in module._modules and not hasattr(type(module), "base_layer"):
        return ()
    return tuple(str(getattr(module, name, None)) for name in ("active_adapters", "disable_adapters", "merged"))


def _settings(module: nn.Module) -> tuple:
    """A module's own attributes that are numbers, strings or functions: its scaling, its epsilon, whether it is
    causal."""
    settings: list[tuple[Any, ...]] = []
    for name, value in vars(module).items():
        if name[:1] == "_" or name in _PASSING or name == "forward":
            continue
        if value is None or isinstance(value, _PLAIN):
            settings.append((name, value))
        elif callable(value) and not isinstance(value, nn.Module):
            settings.append((name, getattr(value, "__module__", ""), getattr(value, "__qualname__", str(type(value)))))
    return tuple(settings)


def _hooks_of(model: Any) -> Iterator[Any]:
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "forward" in vars(module):
            hooks.append(vars(module)["forward"])
        yield from (one for one in hooks if not _module_of(one).startswith(_KNOWN))


def _module_of(hook: Any) -> str:
    function = getattr(hook, "__func__", hook)
    code = getattr(function, "__code__", None)  # under functools.wraps this is the wrapped function's name
    named = getattr(function, "__globals__", {}).get("__name__") if code is not None else type(function).__module__
    return named or ""


def _code_of(forward: Any) -> str:
    """A hash of a function's instructions and constants."""
    code = getattr(forward, "__code__", None)
    if code is None:
        return repr(forward)
    captured = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
    captured = [one if isinstance(one, bool | int | float | str) else type(one).__qualname__ for one in captured]
    content = (
        code.co_code
        + repr((code.co_names, [c for c in code.co_consts if not hasattr(c, "co_code")], captured)).encode()
    )
    return hashlib.sha256(content).hexdigest()[:16]
