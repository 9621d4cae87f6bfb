"""How much of the public surface carries types: fails under LEAST %. `make lint` runs it.

    python tools/check_types.py [--list]

pyright does not follow the import hooks of an editable install, so the package is linked into a temporary folder on
PYTHONPATH.
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
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fastalign").symlink_to(ROOT / "fastalign", target_is_directory=True)
        # pyright finds what the package imports by the `python` of PATH.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        found = subprocess.run(
            [sys.executable, "-m", "pyright", "--verifytypes", "fastalign", "--ignoreexternal", "--outputjson"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder, "PATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
    report = json.loads(found.stdout)["typeCompleteness"]
    score = 100 * report["completenessScore"]
    if "--list" in sys.argv[1:] or score < LEAST:
        for symbol in report["symbols"]:
            for told in symbol["diagnostics"] if symbol["isExported"] and not symbol["isTypeKnown"] else ():
                print(f"{symbol['name']}: {told['message']}")
    print(
        f"types: {score:.1f} % of {sum(report['exportedSymbolCounts'].values())} public symbols, at least {LEAST:g} "
        "wanted"
    )
    return score < LEAST


if __name__ == "__main__":
    raise SystemExit(main())
