"""The merge methods, each one object with its parameters, checks and arithmetic. `merge`, recipes, mergekit's YAML and
the command all use these."""

from __future__ import annotations

from fastalign._base.errors import UserError
from fastalign.soup.methods.base import Method
from fastalign.soup.methods.linear import Linear, MovingAverage, TaskArithmetic
from fastalign.soup.methods.sparse import Breadcrumbs, BreadcrumbsTies, Dare, DareTies, Della, DellaLinear, Ties
from fastalign.soup.methods.spheres import Karcher, ModelStock, MultiSlerp, NuSlerp, Slerp, Warp
from fastalign.soup.methods.whole import ArceeFusion, NearSwap, Ram, Sce

METHODS: dict[str, Method] = {
    one.name: one()
    for one in (
        *(Linear, TaskArithmetic, Slerp, Ties, Dare, DareTies, Della, DellaLinear, Breadcrumbs, BreadcrumbsTies),
        *(MultiSlerp, NuSlerp, Sce, NearSwap, ArceeFusion, Ram, Karcher, ModelStock, Warp, MovingAverage),
    )
}


def method_named(name: str, m: int, *, with_base: bool) -> Method:
    """Raises UserError if there is no such method, or if it does not take this number of models or a base."""
    if name not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    if method.base == "no" and with_base:
        takers = ", ".join(one.name for one in METHODS.values() if one.base != "no")
        raise UserError(f"{name} takes no base; those that do: {takers}")
    method.check_inputs(m, with_base=with_base)
    return method
