"""Converts the arguments of `solve` to the pass over the rewards and the palettes; each mistake is one clear line."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastalign._base.errors import UserError
from fastalign.ops import checks
from fastalign.palette.inputs import (
    Array,
    Rewards,
    Sense,
    as_groups,
    as_palettes,
    as_rewards,
    as_sign,
    as_weights,
    check_options,
    log_of,
)
from fastalign.palette.passes import ArrayPass, ChunkedPass, DevicePass, Pass, ShardedPass, together
from fastalign.palette.sources import ParquetRewards


def set_up(
    rewards: Rewards,
    palette: Array,
    groups: Array | None,
    weights: Array | None,
    sense: Sense,
    tol: float,
    lam_max: float | None,
    process_group: Any,
) -> tuple[Pass, np.ndarray, np.ndarray]:
    """The pass over the rewards, the palettes (K, m) and the constraints' signs (m,)."""
    if process_group is None:
        return _set_up_own(rewards, palette, groups, weights, sense, tol, lam_max)
    failed, own_setup = "", None
    try:
        own_setup = _set_up_own(rewards, palette, groups, weights, sense, tol, lam_max)
    except (UserError, TypeError, FileNotFoundError) as error:
        failed = str(error)
    together(failed, process_group)
    assert own_setup is not None  # otherwise `together` has raised
    own, palettes, sign = own_setup
    grouped = groups is not None or (isinstance(rewards, ParquetRewards) and rewards.grouped)
    return ShardedPass(own, process_group, grouped), palettes, sign


def _set_up_own(
    rewards: Rewards,
    palette: Array,
    groups: Array | None,
    weights: Array | None,
    sense: Sense,
    tol: float,
    lam_max: float | None,
) -> tuple[Pass, np.ndarray, np.ndarray]:
    check_options(tol, lam_max)
    run = pass_over(rewards, groups, weights)
    m = len(run.center)
    return run, as_palettes(palette, m), as_sign(sense, m)


def pass_over(rewards: Rewards, groups: Array | None, weights: Array | None) -> Pass:
    """The pass over this process's rewards: an array, a tensor on any device or a `ParquetRewards`."""
    if isinstance(rewards, ParquetRewards):
        if groups is not None or weights is not None:
            raise UserError("groups and weights must be names of columns given to ParquetRewards, got arrays")
        return ChunkedPass(rewards)
    kind: type[DevicePass | ArrayPass]
    given: Any
    if isinstance(rewards, torch.Tensor) and rewards.is_cuda and rewards.ndim == 2 and rewards.numel() > 0:
        kind, given = DevicePass, _on_device(rewards.detach())
    else:
        kind, given = ArrayPass, as_rewards(rewards)
    n = len(given)
    groups = None if groups is None else as_groups(groups, n)
    log_weights = None if weights is None else log_of(as_weights(weights, n))
    return kind(given, log_weights=log_weights, groups=groups)


def _on_device(rewards: torch.Tensor) -> torch.Tensor:
    if rewards.is_complex():
        raise checks.WrongType(f"rewards must be real numbers, got {rewards.dtype}")
    if rewards.dtype in (torch.float32, torch.float64):
        return rewards
    return rewards.float() if rewards.is_floating_point() else rewards.double()
