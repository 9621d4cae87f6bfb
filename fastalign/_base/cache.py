"""The folder that keeps slow results for later runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$FASTALIGN_CACHE, else ~/.cache/fastalign."""
    return Path(os.environ.get("FASTALIGN_CACHE") or Path.home() / ".cache" / "fastalign").expanduser()
