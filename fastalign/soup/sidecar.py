"""Sidecar files, without which transformers cannot load the weights: configuration, tokenizer, chat template."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, read_json, sync, write_json
from fastalign.soup.architecture import models_of
from fastalign.soup.checkpoint import SIZES, WORDS, Checkpoint
from fastalign.soup.stacks import config_changes
from fastalign.soup.vocabulary import OLD_FILES, Vocabulary, vocabulary_of

_SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
)
_TEMPLATE = "chat_template.jinja"


class Sidecar(NamedTuple):
    """folder: with the configuration; tokenizer: the folder of the tokenizer; changes: changed entries of JSON files,
    by file name; template: the chat template, None for the tokenizer's own; tokens: the content of tokenizer.json, None
    for the folder's."""

    folder: Path | None
    tokenizer: Path | None
    changes: Mapping[str, Mapping[str, Any]]
    template: str | None = None
    tokens: Mapping[str, Any] | None = None

    def sources(self) -> list[Path]:
        """The files to copy; with remote code every *.py, because they may import each other."""
        chosen = [(self.folder, _SETTINGS), (self.tokenizer, TOKENIZER)]
        chosen += [(folder, ("*.py",)) for folder in (self.folder, self.tokenizer) if folder and _has_code(folder)]
        by_name = {
            path.name: path for folder, patterns in chosen if folder for one in patterns for path in folder.glob(one)
        }
        stale = OLD_FILES if self.tokens is not None else ()
        paths = sorted(path for path in by_name.values() if path.is_file() and path.name not in stale)
        for path in paths:
            stays_within(path)
        return paths

    def files(self) -> set[str]:
        """The names of the files that `copy` writes."""
        return {path.name for path in self.sources()} | ({_TEMPLATE} if self.template is not None else set())

    def copy(self, target: Path, out_type: str | None) -> None:
        """Copy to an output's folder. out_type: the stored type of floating-point tensors, None if unchanged."""
        for path in self.sources():
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)
        for name in _SETTINGS[:2]:
            if (target / name).is_file():
                stored = _stored_in(target / name, out_type) if name == "config.json" else {}
                _change(target / name, {**stored, **self.changes.get(name, {})})
        if self.tokens is not None:
            write_json(target / "tokenizer.json", self.tokens)
        if self.template is not None:
            with atomic_write(target / _TEMPLATE) as beside:
                beside.write_text(self.template, encoding="utf-8")
            (target / "chat_template.json").unlink(missing_ok=True)
            if (target / "tokenizer_config.json").is_file():
                _change(target / "tokenizer_config.json", {"chat_template": None})


def sidecar_of(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    *,
    sidecar_from: str,
    tokenizer: str | None,
    multiple: int | None,
    chat_template: str | None,
) -> tuple[Sidecar, Vocabulary | None]:
    """Which files are copied (see `merge`), and, if a tokenizer is requested, for which tokens the embeddings have
    rows.

    multiple: of the number of rows. Raises UserError: no such model, no usable tokenizer, or no template."""
    every = [*models_of(models), *(models_of([base]) if base is not None else ())]
    if sidecar_from == "base" and base is not None:
        chosen = base
    elif sidecar_from == "first":
        chosen = models[0]
    else:
        chosen = next((one for one in every if one.name == sidecar_from), None)
        if chosen is None:
            raise UserError(
                f"sidecar_from must be first, one of the models, or base where there is one, got {sidecar_from!r}"
            )
    folder = chosen.folder
    if tokenizer not in (None, "sidecar", "union"):
        folder = Path(tokenizer).expanduser()
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise UserError(f"tokenizer must be sidecar, union or a folder with a tokenizer, got {tokenizer!r}")
    changes: dict[str, dict[str, Any]] = {"config.json": dict(config_changes(chosen if chosen.pieces else models[0]))}
    vocabulary = None
    if tokenizer is not None:
        lead = models_of([chosen])[0]
        preferred = base if base is not None else chosen if sidecar_from != "first" else None
        vocabulary = vocabulary_of(
            every,
            lead,
            folder,
            union=tokenizer == "union",
            multiple=multiple or 1,
            base=None if preferred is None else models_of([preferred])[0].name,
        )
        for name, change in _changes(chosen, lead, vocabulary).items():
            changes[name] = changes.get(name, {}) | change
    elif multiple is not None:
        raise UserError("pad_to_multiple_of needs a tokenizer, to whose tokens rows are added")
    template = _template(chat_template, every)
    return Sidecar(chosen.folder, folder, changes, template, vocabulary and vocabulary.tokenizer), vocabulary


def _changes(chosen: Checkpoint, lead: Checkpoint, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """The changed entries with these tokens: their number, and the ids of special ones."""
    changes: dict[str, dict[str, Any]] = {}
    before = {number: token for token, number in vocabulary.known[lead.name].items()}

    def renumbered(number: Any, what: str) -> Any:
        if isinstance(number, list):
            return [renumbered(one, what) for one in number]
        token = before.get(number) if type(number) is int else None
        if token is None:
            return number
        if token not in vocabulary.tokens:
            raise UserError(f"{what} {number} is {token!r} in {lead.name}, which the tokenizer does not have")
        return vocabulary.tokens[token]

    for name in _SETTINGS[:2]:
        path = chosen.folder and chosen.folder / name
        config = read_json(path) if path and path.is_file() else {}
        special = {key: value for key, value in config.items() if key.endswith("_token_id")}
        changes[name] = {
            key: new for key, value in special.items() if (new := renumbered(value, f"{name}: {key}")) != value
        }
        if name == "config.json":
            text = config.get("text_config")
            size: dict[str, Any] = {"vocab_size": vocabulary.rows}
            if "vocab_size" not in config and isinstance(text, dict) and "vocab_size" in text:
                size = {"text_config": text | size}
            changes[name] |= size
    return changes


def _template(template: str | None, models: Iterable[Checkpoint]) -> str | None:
    """The text of the chat template; "auto": the most common one among the models, the first on a tie."""
    if template is None:
        return None
    if template == "auto":
        counts = Counter(filter(None, (_own_template(one.folder) for one in models)))
        return counts.most_common(1)[0][0] if counts else None
    if "{{" not in template and "{%" not in template:
        raise UserError(f"chat_template must be auto or a template's text, with {{{{ or {{%, got {template[:80]!r}")
    return template


def stays_within(path: Path) -> None:
    """Raises UserError if a copied file is a link out of its folder; snapshots in the hub's cache may link to its
    blobs."""
    folder = path.parent.resolve()
    home = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not any(path.resolve().is_relative_to(one) for one in (folder, home)):
        raise UserError(
            f"{path}: links to {path.resolve()}, outside its folder, and is not copied; put the file itself there"
        )


def _has_code(folder: Path) -> bool:
    """Whether classes of the model or its tokenizer are defined in files beside it."""
    for name in ("config.json", "tokenizer_config.json"):
        config = read_json(folder / name) if (folder / name).is_file() else {}
        if isinstance(config, dict) and "auto_map" in config:
            return True
    return False


def _own_template(folder: Path | None) -> str | None:
    if folder is None:
        return None
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8").strip()
    for name in ("tokenizer_config.json", "chat_template.json"):
        config = read_json(folder / name) if (folder / name).is_file() else {}
        text = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(text, list):  # several, by name
            text = next((one.get("template") for one in text if one.get("name") == "default"), None)
        if isinstance(text, str) and text.strip():
            return text.strip()
    return None


def _stored_in(config: Path, out_type: str | None) -> dict[str, str]:
    """The configuration's name for the weights' type; transformers has none for eight bits."""
    if out_type is None or SIZES[out_type] == 1:
        return {}
    return {"torch_dtype" if "torch_dtype" in read_json(config) else "dtype": WORDS[out_type]}


def _change(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON object; None removes a key."""
    if changes:
        config = read_json(path) | changes
        write_json(path, {key: value for key, value in config.items() if value is not None or key not in changes})
