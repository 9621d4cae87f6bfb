"""What mkdocs does besides: pages and figures of bench/ become part of the site, and notebooks become pages.

On disk and on a repository's page, docs/guides/x.md links to ../../bench/results/y.png; in the site, docs/ is the root
and bench/ lies in it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("bench/*.md", "bench/results/*.png", "bench/results/*.json")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        content = markdown(path.read_text(encoding="utf-8"), path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Files) -> str:
    """Links from where a page lies in the repository, rewritten for where it lies in the site."""
    place = page.file.src_uri
    here = Path(place if place.startswith("bench/") else f"docs/{place}").parent

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(here / link[1])
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif not target.startswith("bench/"):
            return link[1]
        return os.path.relpath(target, Path(place).parent)

    return LINK.sub(moved, text)


def markdown(code: str, name: str) -> str:
    """A notebook in jupytext's percent format, as a page."""
    result = []
    for cell in re.split(r"^# %%", code, flags=re.M)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            result.append(re.sub(r"^# ?", "", body.strip(), flags=re.M))
        elif body.strip():
            result.append(f"```python\n{body.strip()}\n```")
    made = f"*This page is the notebook `docs/notebooks/{name}`: `jupytext --to notebook` makes an .ipynb of it.*"
    title, *rest = result
    return "\n\n".join([title, made, *rest]) + "\n"
