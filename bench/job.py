"""python job.py SCRIPT ARGUMENTS: the process of a `Worker`, possibly without fastalign.

Calls SCRIPT's `job(*ARGUMENTS)`, a JSON list; says "ready"; waits for a line; calls what `job` returned and prints
its answer as JSON.
"""

import json
import runpy
import sys

ANSWER = "answer: "


def main(script: str, arguments: str) -> None:
    work = runpy.run_path(script)["job"](*json.loads(arguments))
    print("ready", flush=True)
    sys.stdin.readline()
    print(ANSWER + json.dumps(work() or {}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
