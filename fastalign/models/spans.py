"""Lengths at which a model's computation changes: its context, attention windows, and RoPE scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

CONTEXT = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # what configurations call it
NARROW = 6  # tokens: less than the rows of a trial have


def context_of(config: Any) -> int:
    """The maximum number of tokens of a text; 0: not limited."""
    lengths = (getattr(config, name, None) or 0 for name in CONTEXT)  # some write "none" as -1
    return next((length for length in lengths if length > 0), 0)


def rope_change(config: Any) -> int | None:
    """How many tokens a text may have before its RoPE frequencies change (LongRoPE, arXiv 2402.13753; dynamic NTK)."""
    for kind, parameters in _ropes(config):
        if "dynamic" in kind:
            return config.max_position_embeddings
        if kind == "longrope":
            length = parameters.get("original_max_position_embeddings")
            return length or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return None


def chunk_length(config: Any) -> int:
    """Tokens per attention chunk (Reformer, arXiv 2001.04451), which cannot be made smaller; 0 for none."""
    return max(
        (v for k, v in vars(config).items() if k.endswith("attn_chunk_length") and isinstance(v, int)), default=0
    )


def rope_is_dynamic(config: Any) -> bool:
    """Whether those frequencies differ for every length."""
    return any("dynamic" in kind for kind, _ in _ropes(config))


def _ropes(config: Any) -> list[tuple[str, dict]]:
    """(type, parameters) of each RoPE; some configurations have one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [parameters, *(x for x in parameters.values() if isinstance(x, dict))]
    return [(x.get("rope_type") or x.get("type") or "default", x) for x in each]


def same_law(config: Any, lengths: Sequence[int]) -> bool:
    """Whether texts of these lengths may share a batch without changing each other's results; empty ones always may."""
    change = rope_change(config)
    if change is None or max(lengths, default=0) <= change:
        return True
    return not rope_is_dynamic(config) and min(filter(None, lengths)) > change


def rope_group(config: Any, prompt: int, new: int) -> str:
    """The group of a prompt to be continued: "short" and "long" texts may each be drawn together; "crossing" ones,
    whose earlier tokens change during decoding, need to run without a cache."""
    change = rope_change(config)
    if change is None or prompt + new <= change:
        return "short"
    return "long" if prompt > change and not rope_is_dynamic(config) else "crossing"


def _is_window(name: str, picks: bool) -> bool:
    spans = "window" in name or name in ("attention_chunk_size", "local_attention") or (picks and name == "index_topk")
    return spans and not any(word in name for word in ("pattern", "layers", "stage"))


@contextmanager
def narrowed(model: Any, *, picks: bool = False) -> Iterator[frozenset[str]]:
    """Within the block, narrows the model's attention windows (picks: and the number of tokens its indexer picks) so
    that a few tokens exceed them; yields what is narrowed."""
    undo = []

    def put(owner: Any, name: str, value: int) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    configs = {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values()
    try:
        for owner in (*configs, *model.modules()):
            for name, value in list(vars(owner).items()):
                if type(value) is int and value > NARROW and _is_window(name, picks):
                    put(owner, name, NARROW)
        yield frozenset(name for _, name, _ in undo)
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
