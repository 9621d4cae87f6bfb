"""`fastalign bench`: the package's benchmarks under pytest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, check_folder, check_target


def run(names: Sequence[str], out: Path, *, overwrite: bool = False) -> Path:
    """Run the benchmarks that match one of the names (pytest's -k), by default all; pytest prints the output.

    Writes out/bench.json (pytest-benchmark's) and out/table.md, which is returned.

    Raises:
        UserError: pytest or pytest-benchmark is missing, a name matches nothing, results exist, or a benchmark failed.
    """
    if missing := [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} must be installed for benchmarks: pip install 'fastalign[bench]'")
    from pytest import ExitCode

    import fastalign.bench
    from fastalign.bench.commits import alone
    from fastalign.bench.tables import GROUPS, table

    check_folder(out)
    results, lines = out / "bench.json", out / "table.md"
    for path in (results, lines):
        check_target(path)
        if path.exists() and not overwrite:
            raise UserError(f"{path}: already exists; --overwrite measures again and replaces it")
    pytest = [sys.executable, "-m", "pytest", fastalign.bench.__path__[0], "-q", "-p", "pytest_benchmark.plugin"]
    pytest += ["-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "-o", "addopts="]
    for name in names:
        collected = subprocess.run([*pytest, "--collect-only", "-k", name], env=alone(), capture_output=True)
        if collected.returncode in (ExitCode.NO_TESTS_COLLECTED, ExitCode.USAGE_ERROR):
            raise UserError(f"names must be {', '.join(GROUPS)} or match a benchmark (pytest's -k), got {name!r}")
    chosen = ["-k", " or ".join(f"({name})" for name in names)] if names else []
    with atomic_write(results) as beside:
        measured = ["--benchmark-only", "--benchmark-quiet", "-rs", f"--benchmark-json={beside}", *chosen]
        failed = subprocess.run([*pytest, *measured], env=alone()).returncode
        if not beside.is_file():
            raise UserError("the benchmarks wrote no results: see above")
    if failed:
        raise UserError(f"a benchmark failed: see above; {results} has the others")
    with atomic_write(lines) as beside:
        text = "\n".join(table(json.loads(results.read_text())["benchmarks"]))
        beside.write_text(text + "\n", encoding="utf-8")
    return lines
