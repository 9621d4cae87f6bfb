"""Small versions of every causal language model of transformers, on every path, compared with plain `model(input_ids)`:
the table of docs/models.md.

python tools/model_sweep.py             # all of them, and the table
python tools/model_sweep.py llama gpt2  # these
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TABLE = ROOT / "docs" / "models.md"
HEAD = """# Models

`python tools/model_sweep.py` wrote this page with transformers {version}. It covers every causal language model that
can be built small, with weights large enough that attention matters, on a CPU in float32 and float64. "right" means
equal to plain `model(input_ids).logits` up to rounding, on whichever path was taken. A path that a model cannot take
is refused with one line. fastalign does not read this table: it tests each path when a model is first used
(`fastalign info --model NAME` shows the result for any model).

{summary}

| model | sampled on | scored on | pairs | sampling, float32 | sampling, float64 | fused_forward \
| training | PPO | log_likelihood |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main(names: list[str]) -> int:
    import torch
    import transformers
    from causal_models import model_types
    from model_paths import CHECKS, sweep

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines, counts = [], {"right": 0, "refused": 0, "wrong": 0, "raises": 0, "not built": 0}
    for name in names or model_types():
        began = time.perf_counter()
        result = sweep(name)
        verdicts = [result[check].split(":")[0] for check in CHECKS] if "not built" not in result else ["not built"]
        worst = next(v for v in ("not built", "raises", "wrong", "refused", "right") if v in verdicts)
        counts[worst] += 1
        if worst != "right":
            message = [f"{k}: {v}" for k, v in result.items() if not v.startswith("right")]
            print(f"{name}: {'; '.join(message)} ({time.perf_counter() - began:.1f} s)", flush=True)
        cells = [result.get(k, "") for k in ("sampled on", "scored on", "pairs on")]
        shown = verdicts if worst != "not built" else ["not built", *[""] * (len(CHECKS) - 1)]
        lines.append("| " + " | ".join([name, *cells, *shown]) + " |")
    print(counts)
    if not names:
        summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + "."
        TABLE.write_text(HEAD.format(version=transformers.__version__, summary=summary) + "\n".join(lines) + "\n")
    return 1 if counts["wrong"] or counts["raises"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
