"""Write the table of presets in docs/rewards.md, from fastalign/rewards/presets.py.

`python tools/write_presets.py` rewrites it; a test compares the file with its output.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "rewards.md"
TABLE = re.compile(r"(<!-- presets: begin [^\n]*-->\n).*?(<!-- presets: end -->)", re.S)


def page() -> str:
    """The page with the table as it has to be."""
    from fastalign.rewards.presets import PRESETS

    lines = [
        "| preset | model | output | reads | score | licence | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in PRESETS.values():
        model = f"[{one.model}](https://huggingface.co/{one.model})"
        model = {"reward": f"`{one.model}`", "service": one.model}.get(one.head, model)
        reads = f"pair, `{one.text!r}`" if "{" in one.text else one.text
        score = f"{'-' if one.direction < 0 else ''}{one.head}"
        lines.append(f"| `{one.name}` | {model} | {one.output} | {reads} | {score} | {one.licence} | {one.source} |")
    table = "\n".join(["", *lines, "", ""])
    return TABLE.sub(lambda found: found[1] + table + found[2], PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
