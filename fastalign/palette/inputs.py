"""Converts a user's arguments to the arrays that the solver reads; each mistake is one clear line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fastalign._base.errors import UserError
from fastalign.ops import checks

if TYPE_CHECKING:
    from torch import Tensor

    from fastalign.palette.sources import ParquetRewards

Array: TypeAlias = "ArrayLike | Tensor"  # anything that numpy accepts, including a DataFrame; or a tensor on any device
Rewards: TypeAlias = "Array | ParquetRewards"
Sense: TypeAlias = "str | Sequence[str]"


def to_numpy(x: Any) -> np.ndarray:
    """A numpy array of a tensor on any device, or of anything that numpy accepts; copies only if needed."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if x.is_floating_point() and x.element_size() < 4:
            x = x.float()
        return x.numpy()
    if np.ma.is_masked(x):
        raise UserError("an array must have no masked values: leave their rows out")
    return np.asarray(x)


def as_rewards(rewards: Array) -> np.ndarray:
    """rewards as (n, m) float32 or float64, with contiguous rows and a row stride of whole elements; n and m at least
    1."""
    checks.arrays(rewards=rewards)
    rewards = to_numpy(rewards)
    if rewards.ndim != 2:
        raise UserError(f"rewards must have shape (n, m), got {rewards.shape}")
    if 0 in rewards.shape:
        raise UserError(f"rewards must hold at least one sample and one reward, got shape {rewards.shape}")
    if rewards.dtype.kind not in "fiub":
        raise checks.WrongType(f"rewards must be real numbers, got {rewards.dtype}")
    if rewards.dtype == np.float32 or rewards.dtype == np.float64:
        apart, within = rewards.strides
        # A field of a record array, for example, may have any row stride and any address.
        in_place = rewards.flags.aligned and within == rewards.itemsize and apart >= 0 and apart % rewards.itemsize == 0
        return rewards if in_place else np.array(rewards, order="C")
    return rewards.astype(np.float32 if rewards.dtype == np.float16 else np.float64)


def as_palettes(palette: Array, m: int) -> np.ndarray:
    """palette as (K, m) float64, K = 1 if it was (m,)."""
    checks.arrays(palette=palette)
    palettes = np.require(to_numpy(palette), np.float64, ["C", "ALIGNED"])
    if palettes.ndim not in (1, 2) or palettes.shape[-1] != m or palettes.size == 0:
        got = f"{palettes.shape[-1]}" if palettes.ndim in (1, 2) else f"shape {palettes.shape}"
        raise UserError(f"palette must have one level for each of the {m} rewards, got {got}")
    if not np.isfinite(palettes).all():
        raise UserError(f"palette must be finite, got {palettes[~np.isfinite(palettes)][0]}")
    return palettes.reshape(-1, m)


def as_sign(sense: Sense, m: int) -> np.ndarray:
    """(m,): 1 for ">=", -1 for "<=", 0 for "=="; sense is one of them, or one for each reward."""
    signs = {">=": 1.0, "<=": -1.0, "==": 0.0}
    if isinstance(sense, str) and sense in signs:
        return np.full(m, signs[sense])
    check_sense(sense)
    senses = [sense] if isinstance(sense, str) else list(sense)
    for each in senses:
        if not isinstance(each, str) or each not in signs:
            raise UserError(f"sense must be '>=', '<=' or '==', got {checks.shown(each)}")
    if len(senses) != m:
        raise UserError(f"sense must be one of '>=', '<=', '==' or one for each of the {m} rewards, got {len(senses)}")
    return np.array([signs[each] for each in senses])


def check_sense(sense: Any) -> None:
    """That it is one word or several; which, and how many, is for `as_sign` to check."""
    if not isinstance(sense, str | Sequence | np.ndarray):
        raise UserError(f"sense must be '>=', '<=' or '==', got {checks.shown(sense)}")


def as_groups(groups: Array, n: int) -> np.ndarray:
    try:
        groups = np.asarray(to_numpy(groups))
    except ValueError:  # rows of several lengths
        raise UserError(f"groups must have shape ({n},), one prompt id for each row of rewards, got a list") from None
    if groups.shape != (n,):
        raise UserError(f"groups must have shape ({n},), one prompt id for each row of rewards, got {groups.shape}")
    if groups.dtype.kind not in "iu":
        raise checks.WrongType(f"groups must be integers, got {groups.dtype}")
    return groups


def as_weights(weights: Array, n: int) -> np.ndarray:
    checks.arrays(weights=weights)
    weights = np.asarray(to_numpy(weights), dtype=np.float64)
    if weights.shape != (n,):
        raise UserError(f"weights must have shape ({n},), one for each row of rewards, got {weights.shape}")
    bad = ~((weights >= 0) & (weights < np.inf))
    if bad.any():
        i = int(bad.argmax())
        raise UserError(f"weights must be finite and not negative, got {weights[i]} in row {i}")
    return weights


def log_of(weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(weights)


def check_options(tol: float, lam_max: float | None) -> None:
    checks.numbers(tol=tol, **({} if lam_max is None else {"lam_max": lam_max}))
    if not 0 < tol < 1:
        raise UserError(f"tol must lie between 0 and 1, got {tol}")
    if lam_max is not None and not lam_max > 0:
        raise UserError(f"lam_max must be positive, got {lam_max}")


def reject_nonfinite(rewards: np.ndarray) -> None:
    """Raises an error that names the first NaN or infinite reward. It reads all rewards: call it only if the moments
    show one."""
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        i, j = bad[0]
        raise UserError(f"rewards must be finite, got {rewards[i, j]} in row {i}, column {j}")
    raise UserError(f"rewards must have finite squares in float64, got up to {np.abs(rewards).max():.3g}")
