"""What comes along with the weights, so that transformers loads them: configuration, tokenizer, chat template."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.data.files import atomic_write, read_json, sync, write_json
from fastalign.errors import UserError
from fastalign.soup.checkpoint import Checkpoint
from fastalign.soup.compare import models_of, tokens_of
from fastalign.soup.dtypes import SIZES, WORDS
from fastalign.soup.stacks import config_changes

_SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken",
    "*.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATE = "chat_template.jinja"
# What embeddings and heads, which have a row for each token, are called.
_HEADS = ("lm_head", "embed_out")
EMBEDDINGS = tuple(f"{name}.weight" for name in (*_HEADS, "embed_tokens", "wte", "word_embeddings", "embed_in"))
_BIASES = tuple(f"{name}.bias" for name in _HEADS)


class Companions(NamedTuple):
    """folder: whose configuration it is; tokenizer: the folder of the tokenizer; config: what config.json says otherwise;
    template: the chat template, None for the tokenizer's own."""

    folder: Path | None
    tokenizer: Path | None
    config: Mapping[str, Any]
    template: str | None = None

    def sources(self) -> list[Path]:
        """The files that are copied; with remote code, every *.py, for one may import another."""
        held = [(self.folder, _SETTINGS), (self.tokenizer, TOKENIZER)]
        held += [(folder, ("*.py",)) for folder in (self.folder, self.tokenizer) if folder and _has_code(folder)]
        found = {
            path.name: path for folder, patterns in held if folder for one in patterns for path in folder.glob(one)
        }
        paths = sorted(path for path in found.values() if path.is_file())
        for path in paths:
            stays_within(path)
        return paths

    def files(self) -> set[str]:
        """The names of the files that `copy` makes."""
        return {path.name for path in self.sources()} | ({_TEMPLATE} if self.template is not None else set())

    def copy(self, target: Path, out_type: str | None) -> None:
        """Into an output's folder. out_type: what floating-point tensors are stored in, None as they are."""
        for path in self.sources():
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)
        if (target / "config.json").is_file():
            _change(target / "config.json", {**_stored_in(target / "config.json", out_type), **self.config})
        if self.template is not None:
            with atomic_write(target / _TEMPLATE) as beside:
                beside.write_text(self.template, encoding="utf-8")
            (target / "chat_template.json").unlink(missing_ok=True)
            if (target / "tokenizer_config.json").is_file():
                _change(target / "tokenizer_config.json", {"chat_template": None})


def companions(
    models: Sequence[Checkpoint], base: Checkpoint | None, *, companion: str, tokenizer: str | None, chat_template: str | None
) -> Companions:  # fmt: skip
    """Whose files come along (see `merge`). Raises UserError: no such model, another vocabulary, no template."""
    held = [*models_of(models), *(models_of([base]) if base is not None else ())]
    if companion == "base" and base is not None:
        chosen = base
    elif companion == "first":
        chosen = models[0]
    else:
        chosen = next((one for one in held if one.name == companion), None)
        if chosen is None:
            raise UserError(
                f"companion must be first, one of the models, or base where there is one, got {companion!r}"
            )
    changes = dict(config_changes(chosen if chosen.pieces else models[0]))
    folder = chosen.folder
    if tokenizer not in (None, "companion", "union"):
        folder = Path(tokenizer).expanduser()
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise UserError(f"tokenizer must be companion, union or a folder with a tokenizer, got {tokenizer!r}")
    if tokenizer is not None:
        changes |= _vocabulary(held, folder, whole=tokenizer == "union")
    return Companions(chosen.folder, folder, changes, _template(chat_template, held))


def _vocabulary(held: Sequence[Checkpoint], folder: Path | None, *, whole: bool) -> dict[str, int]:
    """{"vocab_size": tokens} of the tokenizer, each of which must have the same number in all models. whole: no model may
    have others. A model without a tokenizer.json says nothing."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer needs a tokenizer.json to count its tokens, {folder or 'a bare file'} has none")
    tokens = tokens_of(read_json(folder / "tokenizer.json"))
    if set(tokens.values()) != set(range(len(tokens))):
        raise UserError(f"{folder}: its tokenizer's {len(tokens):,} tokens are not numbered 0 to {len(tokens) - 1:,}")
    for one in held:
        if one.folder is None or not (one.folder / "tokenizer.json").is_file():
            continue
        other = tokens_of(read_json(one.folder / "tokenizer.json"))
        wrong = next(
            (token for token in (*tokens, *(other if whole else ())) if tokens.get(token) != other.get(token)), None
        )
        if wrong is not None:
            raise UserError(
                f"token {wrong!r} is {tokens.get(wrong, 'absent')} in {folder} and {other.get(wrong, 'absent')} in {one.name}: "
                "embeddings are cut to a tokenizer's tokens, and neither joined nor rearranged"
            )
    return {"vocab_size": len(tokens)}


def cut_vocabulary(model: Checkpoint, rows: int) -> Checkpoint:
    """The model with only the first `rows` rows of its embeddings and head. Raises UserError where they have fewer."""
    files = []
    for file in model.files:
        tensors = dict(file.tensors)
        for name, tensor in file.tensors.items():
            if name.endswith((*EMBEDDINGS, *_BIASES)):
                if not tensor.shape or tensor.shape[0] < rows:
                    raise UserError(
                        f"{name} is {list(tensor.shape)} in {model.name}, the tokenizer has {rows:,} tokens"
                    )
                shape = (rows, *tensor.shape[1:])
                tensors[name] = tensor._replace(shape=shape, nbytes=math.prod(shape) * SIZES[tensor.dtype])
        files.append(replace(file, tensors=tensors))
    return replace(model, files=tuple(files))


def _template(asked: str | None, held: Iterable[Checkpoint]) -> str | None:
    """The text of the chat template; "auto": that which most models have, the first of equals."""
    if asked is None:
        return None
    if asked == "auto":
        found = Counter(filter(None, (_own_template(one.folder) for one in held)))
        return found.most_common(1)[0][0] if found else None
    if "{{" not in asked and "{%" not in asked:
        raise UserError(f"chat_template must be auto or a template's text, with {{{{ or {{%, got {asked[:80]!r}")
    return asked


def stays_within(path: Path) -> None:
    """Raises UserError where a file that is copied is a link out of its folder; a snapshot of the hub's cache links to its blobs."""
    folder = path.parent.resolve()
    home = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not any(path.resolve().is_relative_to(one) for one in (folder, home)):
        raise UserError(
            f"{path}: links to {path.resolve()}, out of its folder: what lies there is not copied; put the file itself there"
        )


def _has_code(folder: Path) -> bool:
    """Whether classes of the model or its tokenizer are defined in files beside it."""
    for name in ("config.json", "tokenizer_config.json"):
        found = read_json(folder / name) if (folder / name).is_file() else {}
        if isinstance(found, dict) and "auto_map" in found:
            return True
    return False


def _own_template(folder: Path | None) -> str | None:
    if folder is None:
        return None
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8").strip()
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder / name) if (folder / name).is_file() else {}
        text = found.get("chat_template") if isinstance(found, dict) else None
        if isinstance(text, list):  # several by name
            text = next((one.get("template") for one in text if one.get("name") == "default"), None)
        if isinstance(text, str) and text.strip():
            return text.strip()
    return None


def _stored_in(config: Path, out_type: str | None) -> dict[str, str]:
    """The configuration's own word for the weights' type; transformers knows none for eight bits."""
    if out_type is None or SIZES[out_type] == 1:
        return {}
    return {"torch_dtype" if "torch_dtype" in read_json(config) else "dtype": WORDS[out_type]}


def _change(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON object, None taking one away."""
    if changes:
        found = read_json(path) | changes
        write_json(path, {key: value for key, value in found.items() if value is not None or key not in changes})
