"""The tokens that models know, and those of what is made of them: a tokenizer's, or the union of all tokenizers.

Unions mean what mergekit 0.1.5 makes of them: one tokenizer stays as it is, and what others know beside is added to it. mergekit
numbers the new tokens as they come out of a hash table, here they keep the order that they have in their model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastalign._base.errors import UserError
from fastalign._base.files import read_json
from fastalign.soup.checkpoint import Checkpoint

# What embeddings and heads, which have a row for each token, are called.
_HEADS = ("lm_head", "embed_out")
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
EMBEDDINGS = tuple(f"{name}.weight" for name in (*_HEADS, *_INPUTS))
ROWS = (*EMBEDDINGS, *(f"{name}.bias" for name in _HEADS))
# A tokenizer that has one of these and no tokenizer.json is not read here.
OLD_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "added_tokens.json")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


class Vocabulary(NamedTuple):
    """What the output has rows for. tokens: numbered from 0 on; rows: as many, or more for padding; known: each model's own, by its
    name; base: the model whose row others take for a token that they lack, where it knows it; None for the mean of all that do;
    tokenizer: what tokenizer.json holds, where it is no model's own; note: what the user may not expect of it, or ""."""

    tokens: Mapping[str, int]
    rows: int
    known: Mapping[str, Mapping[str, int]]
    base: str | None
    tokenizer: Mapping[str, Any] | None
    note: str


def tokens_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of a tokenizer.json and their numbers, added ones among them."""
    held = (tokenizer.get("model") or {}).get("vocab") or {}
    found = dict(held.items() if isinstance(held, dict) else ((token, i) for i, (token, *_) in enumerate(held)))
    found.update((token.get("content"), token.get("id")) for token in tokenizer.get("added_tokens") or ())
    return found


def vocabulary_of(
    models: Sequence[Checkpoint], lead: Checkpoint, folder: Any, *, union: bool, multiple: int, base: str | None
) -> Vocabulary:
    """models: all that are merged; lead: whose tokenizer counts for a model that has none, and is extended by a union; folder:
    whose tokenizer the output has; multiple: what rows are padded to a multiple of. Raises UserError."""
    path = folder and folder / "tokenizer.json"
    if path is None or not path.is_file():
        raise UserError(f"tokenizer needs a tokenizer.json to count its tokens, {folder or 'a bare file'} has none")
    own = read_json(path)
    read = {one.name: found for one in models if (found := _read(one)) is not None}
    made = _union(own, lead, [(one, read[one.name]) for one in models if one.name in read]) if union else own
    tokens = tokens_of(made)
    if set(tokens.values()) != set(range(len(tokens))):
        raise UserError(f"{folder}: its tokenizer's {len(tokens):,} tokens are not numbered 0 to {len(tokens) - 1:,}")
    known = {name: tokens_of(found) for name, found in read.items()}
    standing = known.get(lead.name, tokens)
    return Vocabulary(
        tokens,
        -(-len(tokens) // multiple) * multiple,
        {one.name: known.get(one.name, standing) for one in models},
        base,
        None if made is own else made,
        _note(own, made, lead.name),
    )


def embeddings_of(model: Checkpoint) -> list[str]:
    """The names of the tensors that have a row for each token. Raises UserError where they cannot be told."""
    found = [name for name in model if name.endswith(ROWS)]
    inputs = [name for name in found if name.endswith(tuple(f"{one}.weight" for one in _INPUTS)) and model[name].count]
    if not inputs:
        raise UserError(f"{model.name}: no tensor is called as input embeddings are (*.{', *.'.join(_INPUTS)})")
    rows, *width = model[inputs[0]].shape

    def looks_like_one(name: str) -> bool:
        shape = model[name].shape
        return (shape[:1] == (rows,) and [rows] != width) or (len(shape) > 1 and any(one in name for one in _INPUTS))

    other = next((name for name in model if name not in found and looks_like_one(name)), None)
    if other is not None:
        raise UserError(f"{other} of {model.name} may have a row for each token, and is not known for an embedding")
    return found


def _note(own: Mapping[str, Any], made: Mapping[str, Any], lead: str) -> str:
    mine = tokens_of(own)
    plain = [
        one["content"] for one in made.get("added_tokens") or () if one["content"] not in mine and not one["special"]
    ]
    if not plain:
        return ""
    return (
        f"{len(plain):,} tokens are added to {lead}'s tokenizer as mergekit does: each is found wherever its letters stand in a text, "
        f"before its own tokens (first {plain[0]!r})"
    )


def _read(model: Checkpoint) -> dict[str, Any] | None:
    if model.folder is None:
        return None
    path = model.folder / "tokenizer.json"
    if path.is_file():
        return read_json(path)
    old = next((name for name in OLD_FILES if (model.folder / name).is_file()), None)
    if old is not None:
        raise UserError(f"{model.name}: has {old} and no tokenizer.json, by which its tokens are known")
    return None


def _union(
    own: dict[str, Any], lead: Checkpoint, others: Sequence[tuple[Checkpoint, dict[str, Any]]]
) -> dict[str, Any]:
    """`own`, the tokenizer of `lead`, and the tokens that others have beside, as tokens added to it; itself where there is none."""
    mine, added = tokens_of(own), list(own.get("added_tokens") or ())
    beyond = next((token for token, i in mine.items() if i >= _rows(lead)), None)
    if beyond is not None:
        raise UserError(
            f"token {beyond!r} is {mine[beyond]} in {lead.name}, whose embeddings have {_rows(lead):,} rows"
        )
    special = {one["content"]: one for one in added}
    plain: dict[str, None] = {}
    for model, held in others:
        rows = _rows(model)
        for one in held.get("added_tokens") or ():
            if one["id"] < rows:
                special.setdefault(one["content"], one)
        plain |= {token: None for token, i in sorted(tokens_of(held).items(), key=lambda x: x[1]) if i < rows}
    new = [token for token in plain if token not in mine and token not in special]
    new += [token for token in special if token not in mine]
    numbers = {**mine, **{token: len(mine) + i for i, token in enumerate(new)}}
    there = {one["content"] for one in added}
    more = [*(token for token in special if token in mine and token not in there), *new]
    if not more:
        return own
    entries = [{**special.get(token, _PLAIN), "content": token, "id": numbers[token]} for token in more]
    return {**own, "added_tokens": sorted([*added, *entries], key=lambda one: one["id"])}


def _rows(model: Checkpoint) -> int:
    return model[embeddings_of(model)[0]].shape[0]
