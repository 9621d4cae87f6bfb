"""Group advantages in plain loops, number by number: what every test of them is compared to."""

import math
import statistics

NAN = float("nan")
FLOOR = 1e-4


def mean(x):
    return sum(x) / len(x)


def deviation(x):
    return statistics.stdev(x) if len(x) > 1 and len(set(x)) > 1 else 0.0


def normalised(group):
    """Of each completion's reward for one value, NaN kept."""
    scored = [x for x in group if not math.isnan(x)]
    if len(set(scored)) < 2:
        return [0 * x for x in group]
    return [(x - mean(scored)) / (deviation(scored) + FLOOR) for x in group]


def ranked(group):
    scored = sorted(x for x in group if not math.isnan(x))
    if len(set(scored)) < 2:
        return [0 * x for x in group]
    ranks = {x: mean([i for i, y in enumerate(scored) if y == x]) for x in scored}
    return [2 * ranks[x] / (len(scored) - 1) - 1 if x in ranks else NAN for x in group]


def plain_advantages(rewards, weights, how):
    """(B, G, m) nested lists -> (B, G), number by number."""

    def summed(rows):
        return [
            NAN
            if all(map(math.isnan, row))
            else sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r))
            for row in rows
        ]

    if how in ("gdpo", "rank"):
        of_value = normalised if how == "gdpo" else ranked
        rewards = [
            [list(row) for row in zip(*(of_value(list(column)) for column in zip(*group, strict=True)), strict=True)]
            for group in rewards
        ]
    groups = [summed(group) for group in rewards]
    every = [x for group in groups for x in group if not math.isnan(x)]
    result = []
    for group in groups:
        scored = [x for x in group if not math.isnan(x)]
        row = []
        for i, x in enumerate(group):
            if math.isnan(x):
                row.append(0.0)
            elif how == "rank":
                row.append(x)
            elif how == "gdpo":
                row.append((x - mean(every)) / (deviation(every) + FLOOR))
            elif how == "rloo":
                others = [y for j, y in enumerate(group) if j != i and not math.isnan(y)]
                row.append(x - mean(others) if others else 0.0)
            else:
                over = {"grpo": deviation(scored) + FLOOR, "batch": deviation(every) + FLOOR, "dr_grpo": 1.0}[how]
                row.append((x - mean(scored)) / over)
        result.append(row)
    return result
