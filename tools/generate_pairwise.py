"""Writes the Triton form of every pairwise preference loss from the table that the rest of fastalign computes with.

    python tools/generate_pairwise.py

Each formula of fastalign/ops/pairwise.py is traced together with the gradient that autograd computes. Equal terms are
merged, products with 1 and sums of constants evaluated, and the rest is written as Triton expressions. So the CPU's
value, its gradient and the GPU's have one source. A test compares the committed file with this output.
"""

from __future__ import annotations

import operator
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastalign.ops.pairwise import FUSED, TABLE, Margin

TARGET = Path(__file__).parents[1] / "kernels" / "fastalign_kernels" / "_pairwise.py"

HEADER = '''"""Every pairwise preference loss of one pair, and its gradient.

Written by tools/generate_pairwise.py from the table in fastalign/ops/pairwise.py: change that and run it again.

A formula takes the pair's log-ratios, its margin and the options as scalars, and returns the loss and its derivatives
by c, by r and by the margin. SMOOTHS: label_smoothing is not 0.
"""

# ruff: noqa: I001, E501
# fmt: off
import triton
import triton.language as tl

from fastalign.kernels._elementary import exp, log_sigmoid
'''

INPUTS = ("c", "r", "margin")
RESULTS = ("loss", "by_c", "by_r", "by_margin")
SCALARS = ("beta", "label_smoothing", "log_kept", "log_flipped", "discopop_tau")

# A term is a number, the name of an argument, or (template, *terms): hashable, so that equal ones are one.
Term = float | str | tuple


def made_by(x: Term) -> str:
    """The template of a term; of a number or an argument none."""
    return x[0] if isinstance(x, tuple) else ""


def neg(x: Term) -> Term:
    if isinstance(x, float):
        return -x
    if made_by(x) == "{} * {}" and isinstance(x[1], float):
        return mul(-x[1], x[2])
    return x[1] if made_by(x) == "-{}" else ("-{}", x)


def add(x: Term, y: Term, alpha: float = 1.0) -> Term:
    assert alpha == 1
    return ("{} - {}", x, y[1]) if made_by(y) == "-{}" else ("{} + {}", x, y)


def sub(x: Term, y: Term, alpha: float = 1.0) -> Term:
    assert alpha == 1
    return ("{} + {}", x, y[1]) if made_by(y) == "-{}" else ("{} - {}", x, y)


def mul(x: Term, y: Term) -> Term:
    if isinstance(x, float) and isinstance(y, float):
        return x * y
    if isinstance(y, float):
        x, y = y, x
    if isinstance(x, float) and abs(x) == 1:
        return y if x == 1 else neg(y)
    for one, other in ((x, y), (y, x)):
        if made_by(one) == "-{}":
            return neg(mul(one[1], other))
        if made_by(one) == "1 / {}":
            return div(other, one[1])
        if made_by(one) == "{} * {}" and isinstance(one[1], float):
            return mul(one[1], mul(one[2], other))
    return ("{} * {}", x, y)


def div(x: Term, y: Term) -> Term:
    if isinstance(y, float):
        return mul(x, 1 / y)
    return ("1 / {}", y) if x == 1 else ("{} / {}", x, y)


def power(x: Term, exponent: float) -> Term:
    assert exponent in (1, 2)
    return x if exponent == 1 else ("{} * {}", x, x)


def clamp(x: Term, low: float, high: float | None = None) -> Term:
    """Written so that NaN stays NaN."""
    x = x if high is None else ("tl.where({} > {}, {}, {})", x, high, high, x)
    return ("tl.where({} < {}, {}, {})", x, low, low, x)


# How tightly each template binds, and what its operands must bind to go without brackets. Calls are not listed.
BINDING = {
    "{} & {}": (0, (3, 3)),
    "{} >= {}": (0, (1, 1)),
    "{} <= {}": (0, (1, 1)),
    "{} + {}": (1, (1, 2)),
    "{} - {}": (1, (1, 2)),
    "1 - {}": (1, (2,)),
    "{} * {}": (2, (2, 3)),
    "{} / {}": (2, (2, 3)),
    "1 / {}": (2, (3,)),
    "-{}": (2, (2,)),
}

ATEN = torch.ops.aten
MEANING = {
    ATEN.neg.default: neg,
    ATEN.add.Tensor: add,
    ATEN.sub.Tensor: sub,
    ATEN.rsub.Scalar: lambda x, y: sub(y, x),
    ATEN.mul.Tensor: mul,
    ATEN.mul.Scalar: mul,
    ATEN.div.Tensor: div,
    ATEN.reciprocal.default: lambda x: div(1.0, x),
    ATEN.pow.Tensor_Scalar: power,
    ATEN.exp.default: lambda x: ("exp({})", x),
    ATEN.sigmoid.default: lambda x: ("tl.sigmoid({})", x),
    ATEN.sigmoid_backward.default: lambda g, s: mul(g, mul(s, ("1 - {}", s))),
    ATEN.log_sigmoid_forward.default: lambda x: (("log_sigmoid({})", x), None),
    ATEN.log_sigmoid_backward.default: lambda g, x, _: mul(g, ("tl.sigmoid({})", neg(x))),
    ATEN.relu.default: lambda x: clamp(x, 0.0),
    ATEN.threshold_backward.default: lambda g, x, low: ("tl.where({} <= {}, {}, {})", x, low, 0.0, g),
    ATEN.clamp.default: clamp,
    ATEN.ge.Scalar: lambda x, y: ("{} >= {}", x, y),
    ATEN.le.Scalar: lambda x, y: ("{} <= {}", x, y),
    ATEN.logical_and_.default: lambda x, y: ("{} & {}", x, y),
    ATEN.where.self: lambda condition, x, y: ("tl.where({}, {}, {})", condition, x, y),
    ATEN.ones_like.default: lambda x, **_: 1.0,
    ATEN.zeros_like.default: lambda x, **_: 0.0,
    ATEN.scalar_tensor.default: lambda x, **_: x,
    operator.getitem: lambda x, i: x[i],
}


def traced(formula, smooths: bool) -> tuple[Term, ...]:
    """The loss and its derivatives by c, r and margin."""

    def value_and_gradient(c, r, margin, *scalars):
        options = SimpleNamespace(**dict(zip(SCALARS, scalars, strict=True)), smooths=smooths)
        gradient, value = torch.func.grad_and_value(lambda *x: formula(*x, options), (0, 1, 2))(c, r, margin)
        return value, *gradient

    names = (*INPUTS, *SCALARS)
    graph = make_fx(value_and_gradient)(*(torch.tensor(0.3, dtype=torch.float64) for _ in names)).graph
    terms: dict[torch.fx.Node, Term] = {}

    def term(x) -> Term:
        if isinstance(x, torch.fx.Node):
            return terms[x]
        return float(x) if isinstance(x, int | float) else x

    names = iter(names)
    for node in graph.nodes:
        if node.op == "placeholder":
            terms[node] = next(names)
        elif node.target is operator.getitem:
            terms[node] = terms[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            terms[node] = MEANING[node.target](*(term(x) for x in node.args), **node.kwargs)
        else:
            return tuple(term(x) for x in node.args[0])
    raise AssertionError("a graph ends with its output")


def written(results: tuple[Term, ...], indent: str) -> list[str]:
    """Lines that compute the terms and return them; what is used more than once gets a name."""
    uses: Counter[Term] = Counter()

    def count(x: Term) -> None:
        uses[x] += 1
        if isinstance(x, tuple) and uses[x] == 1:
            for y in x[1:]:
                count(y)

    for x in results:
        count(x)
    lines: list[str] = []
    known: dict[Term, str] = {}

    def show(x: Term, binding: int = 0) -> str:
        """The term as an operand of something that binds so tightly."""
        if x in known:
            return known[x]
        if not isinstance(x, tuple):
            return x if isinstance(x, str) else repr(x) if x >= 0 or not binding else f"({x!r})"
        template, *parts = x
        own, operands = BINDING.get(template, (3, (0,) * len(parts)))
        text = template.format(*(show(y, least) for y, least in zip(parts, operands, strict=True)))
        if uses[x] > 1:
            known[x] = f"x{len(known) + 1}"
            lines.append(f"{indent}{known[x]} = {text}")
            return known[x]
        return text if own >= binding else f"({text})"

    shown = []
    for x, label in zip(results, RESULTS, strict=True):
        shown.append(show(x) if isinstance(x, float) else label)
        if not isinstance(x, float):
            lines.append(f"{indent}{label} = {show(x)}")
    return [*lines, f"{indent}return {', '.join(shown)}"]


def function(name: str, formula) -> str:
    arguments = ", ".join((*INPUTS, *SCALARS))
    lines = ["@triton.jit", f"def {name}({arguments}, SMOOTHS: tl.constexpr):"]
    plain, smoothed = traced(formula, False), traced(formula, True)
    if plain == smoothed:
        lines += written(plain, "    ")
    else:
        lines += ["    if SMOOTHS:", *written(smoothed, " " * 8), "    else:", *written(plain, " " * 8)]
    return "\n".join(lines)


def generated() -> str:
    """The file's text."""
    formulas = {kind: TABLE[kind].formula for kind in FUSED}
    names = {formula: formula.__name__.removeprefix("_") for formula in formulas.values()}
    parts = [HEADER, *(f"\n\n{function(name, formula)}\n" for formula, name in names.items())]
    entries = "".join(f'    "{kind}": {names[formula]},\n' for kind, formula in formulas.items())
    per_token = ", ".join(f'"{kind}"' for kind in FUSED if TABLE[kind].margin is Margin.PER_TOKEN)
    return f"{''.join(parts)}\n\nFORMULAS = {{\n{entries}}}\nPER_TOKEN = ({per_token})\n"


if __name__ == "__main__":
    TARGET.write_text(generated())
