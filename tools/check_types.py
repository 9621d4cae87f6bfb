"""Checks types: at least LEAST % of the public symbols have them (basedpyright), and mypy reports no error. Run by
`make types`.

    python tools/check_types.py [--list]

basedpyright does not follow the import hooks of an editable install, so the package is linked into a temporary folder
on PYTHONPATH. --list: print every public symbol without a type, even if there are not too many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST = 98.0
ROOT = Path(__file__).parent.parent


def main() -> int:
    mypy = subprocess.Popen([sys.executable, "-m", "mypy"], cwd=ROOT)  # in parallel with the other: each takes one core
    few = surface(every="--list" in sys.argv[1:])
    return mypy.wait() or few


def surface(every: bool) -> int:
    """1 if too few public symbols have a type, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fastalign").symlink_to(ROOT / "fastalign", target_is_directory=True)
        # What the package imports is found by the `python` of PATH.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        result = subprocess.run(
            [sys.executable, "-m", "basedpyright", "--verifytypes", "fastalign", "--ignoreexternal", "--outputjson"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder, "PATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
    report = json.loads(result.stdout)["typeCompleteness"]
    score = 100 * report["completenessScore"]
    if every or score < LEAST:
        for symbol in report["symbols"]:
            for message in symbol["diagnostics"] if symbol["isExported"] and not symbol["isTypeKnown"] else ():
                print(f"{symbol['name']}: {message['message']}")
    count = sum(report["exportedSymbolCounts"].values())
    print(f"types: {score:.1f} % of {count} public symbols, at least {LEAST:g} wanted")
    return score < LEAST


if __name__ == "__main__":
    raise SystemExit(main())
