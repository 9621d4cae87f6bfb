"""The contracts on imports in pyproject.toml (import-linter), with fastalign.kernels where it is installed.

    python tools/check_imports.py

import-linter looks for modules in the folder of `fastalign` alone, and kernels/ lies beside it: so it reads a copy of
the sources in which both lie where an installation has them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package, sources = Path(folder) / "fastalign", shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "fastalign", package, ignore=sources)
        shutil.copytree(ROOT / "kernels" / "fastalign_kernels", package / "kernels", ignore=sources)
        shutil.copy(ROOT / "pyproject.toml", folder)
        command = Path(sys.executable).with_name("lint-imports")
        return subprocess.run([command], cwd=folder, env={**os.environ, "PYTHONPATH": folder}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
