"""From prompts to text, or a model, that holds a palette: the steps from file to file (`steps`), and the whole job
(`job`)."""

from fastalign.jobs.align.steps import (
    Model,
    evaluate,
    evaluate_grid,
    expected,
    pilot,
    predicted_need,
    read_grid,
    sample,
    sample_more,
    score,
    select,
    solve_palette,
    worth_of,
)

__all__ = [
    "Model", "evaluate", "evaluate_grid", "expected", "pilot", "predicted_need", "read_grid", "sample", "sample_more",
    "score", "select", "solve_palette", "worth_of",
]  # fmt: skip
