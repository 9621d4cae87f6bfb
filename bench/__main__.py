"""python -m bench [name ...] in the repository: measure, keep bench/results/<op>.json, write the table in README.md.

Names are groups (losses, sampling, map, training, decode) or parts of the benchmarks' names; all by default. `--table` only rewrites
the table.
"""

import argparse
from pathlib import Path

from fastalign.bench import runner

HERE = Path(__file__).parent

parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks against what people use today.")
parser.add_argument(
    "names", nargs="*", help="groups (losses, sampling, map, training, decode) or parts of names; all by default"
)
parser.add_argument("--table", action="store_true", help="only rewrite the README's table from the results")
arguments = parser.parse_args()
if not arguments.table:
    runner.run(arguments.names, HERE / "results", say=lambda line: print(line, flush=True))
runner.write_into(HERE.parent / "README.md", HERE / "results")
