"""The MAP solve against scipy's L-BFGS-B, cvxpy with Clarabel and the 150 Adam steps of the paper's code; one pass
over the rewards against numpy and torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from fastalign.bench.common import Case

from fastalign.ops import map_statistics
from fastalign.palette import quantile_palette, solve


def cases() -> Iterator[Case]:
    rewards = samples(1_000_000, 6)
    palette = quantile_palette(rewards, 0.7, values=[0, 1, 2])
    wide = rewards.astype(np.float64)
    yield Case(
        "solve, n = 1,000,000, m = 6",
        lambda: solve(rewards, palette),
        {"scipy L-BFGS-B": lambda: scipy_lbfgsb(wide, palette)},
        {"scipy L-BFGS-B": 25},
        check=lambda: agree(rewards, palette, scipy_lbfgsb, 1e-3),
        rounds=5,
        note=lambda: residuals(rewards, palette, scipy_lbfgsb),
    )
    lam = torch.from_numpy(solve(rewards, palette).lam)
    tensor, double = torch.from_numpy(rewards), torch.from_numpy(wide)
    yield Case(
        "one pass for Z, mean and covariance, n = 1,000,000, m = 6",
        lambda: map_statistics(tensor, lam),
        {"torch": lambda: torch_pass(double, lam), "numpy": lambda: numpy_pass(wide, lam.numpy())},
        floor_bytes=rewards.nbytes,
        check=lambda: np.testing.assert_allclose(
            map_statistics(tensor, lam).cov, numpy_pass(wide, lam.numpy())[2], atol=1e-8
        ),
    )
    small = samples(20_000, 3)
    level = quantile_palette(small, 0.7)
    yield Case(
        "solve, n = 20,000, m = 3",
        lambda: solve(small, level),
        {
            "cvxpy + Clarabel": lambda: cvxpy_clarabel(small, level),
            "scipy L-BFGS-B": lambda: scipy_lbfgsb(small.astype(np.float64), level),
            "150 Adam steps": lambda: adam(small, level),
        },
        {"cvxpy + Clarabel": 500},
        check=lambda: agree(small, level, cvxpy_clarabel, 1e-4),
        rounds=5,
        note=lambda: residuals(small, level, cvxpy_clarabel, scipy_lbfgsb, adam),
    )
    many = around(small, 1000)
    yield Case(
        "solve 1,000 palettes, n = 20,000, m = 3",
        lambda: solve(small, many),
        {"scipy L-BFGS-B, one by one": lambda: [scipy_lbfgsb(small.astype(np.float64), one) for one in many]},
        {"scipy L-BFGS-B, one by one": 100},
        check=lambda: agree_on_many(small, many),
        rounds=3,
    )
    yield Case(
        "solve, n = 10,000,000, m = 6",
        lambda: solve(*huge()),
        {
            "one sum over the data, numpy": lambda: huge()[0].sum(dtype=np.float64),
            "one sum over the data, torch": lambda: torch.from_numpy(huge()[0]).sum(),
        },
        {"one sum over the data, numpy": 1 / 12},
        rounds=5,
        check=lambda: agree_by_own_account(*huge()),
        note=lambda: residuals(*huge()),
    )
    yield Case(
        "solve, n = 10,000,000, m = 64",
        lambda: solve(*wide_and_huge()),
        {"one sum over the data, torch": lambda: torch.from_numpy(wide_and_huge()[0]).sum()},
        rounds=1,
        check=lambda: agree_by_own_account(*wide_and_huge()),
        note=lambda: of_own(*wide_and_huge()),
    )


@functools.cache
def huge() -> tuple[np.ndarray, np.ndarray]:
    """Ten million samples and a palette, made once they are asked for: 240 MB."""
    rewards = samples(10_000_000, 6)
    return rewards, quantile_palette(rewards, 0.7, values=[0, 1, 2])


@functools.cache
def wide_and_huge() -> tuple[np.ndarray, np.ndarray]:
    """Ten million samples of 64 rewards, 2.6 GB, made a million at a time; a palette that asks for more of eight."""
    huge.cache_clear()
    rng, mix = np.random.default_rng(0), np.eye(64) + 0.05 * np.random.default_rng(1).normal(size=(64, 64))
    rewards = np.empty((10_000_000, 64), dtype=np.float32)
    for part in np.split(rewards, 10):
        np.matmul(rng.standard_normal(part.shape, dtype=np.float32), mix.astype(np.float32), out=part)
        np.tanh(part[:, ::2], out=part[:, ::2])
    ask = 0.3 * rewards[:1_000_000].std(axis=0, dtype=np.float64) * (np.arange(64) < 8)
    return rewards, rewards[:1_000_000].mean(axis=0, dtype=np.float64) + ask


def around(rewards: np.ndarray, count: int) -> np.ndarray:
    """Palettes from a little below the mean to 0.7 standard deviations above it, drawn apart for each value."""
    ask = np.random.default_rng(1).uniform(-0.2, 0.7, (count, rewards.shape[1]))
    return rewards.mean(axis=0, dtype=np.float64) + ask * rewards.std(axis=0, dtype=np.float64)


def agree_on_many(rewards: np.ndarray, palettes: np.ndarray) -> None:
    found = solve(rewards, palettes)
    assert found.feasible.all() and found.kkt_residual.max() <= 1e-9
    for k in range(0, len(palettes), 100):
        theirs = scipy_lbfgsb(rewards.astype(np.float64), palettes[k])
        np.testing.assert_allclose(found.lam[k], theirs, atol=1e-4 * (1 + found.lam[k].max()))


def samples(n: int, m: int) -> np.ndarray:
    """Correlated rewards, half of them bounded as a classifier's are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, m)) @ (np.eye(m) + 0.3 * rng.normal(size=(m, m)))
    x[:, ::2] = np.tanh(x[:, ::2])
    return x.astype(np.float32)


def scipy_lbfgsb(rewards: np.ndarray, palette: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    def dual(lam):
        s = rewards @ lam
        top = s.max()
        e = np.exp(s - top)
        total = e.sum()
        return top + np.log(total / len(s)) - lam @ palette, e @ rewards / total - palette

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    start = np.zeros(len(palette))
    return minimize(dual, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start), options=options).x


def cvxpy_clarabel(rewards: np.ndarray, palette: np.ndarray) -> np.ndarray:
    import cvxpy as cp

    lam = cp.Variable(len(palette), nonneg=True)
    objective = cp.log_sum_exp((rewards.astype(np.float64) - palette) @ lam)
    cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL)
    return lam.value


def adam(rewards: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """What MAP's authors run (arXiv 2410.19198): a fixed number of steps on log λ in float32."""
    x, c = torch.from_numpy(rewards), torch.from_numpy(palette).float()
    log_lam = torch.zeros(len(c), requires_grad=True)
    optimizer = torch.optim.Adam([log_lam], lr=0.1)
    for _ in range(150):
        lam = log_lam.exp()
        loss = torch.log(torch.exp(x @ lam).mean()) - lam @ c
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return log_lam.detach().exp().double().numpy()


def torch_pass(x: torch.Tensor, lam: torch.Tensor):
    s = x @ lam
    p = torch.softmax(s, 0)
    mean = p @ x
    return torch.logsumexp(s, 0), mean, (x * p.unsqueeze(1)).T @ x - torch.outer(mean, mean)


def numpy_pass(x: np.ndarray, lam: np.ndarray):
    s = x @ lam
    top = s.max()
    e = np.exp(s - top)
    total = e.sum()
    mean = e @ x / total
    return top + np.log(total), mean, (x * (e / total)[:, None]).T @ x - np.outer(mean, mean)


def residual(rewards: np.ndarray, palette: np.ndarray, lam: np.ndarray) -> float:
    """The KKT residual of `PaletteSolution`, from the definition in float64."""
    x = rewards.astype(np.float64)
    deviation = x.std(axis=0)
    gradient, mu = (numpy_pass(x, lam)[1] - palette) / deviation, lam * deviation
    return float(np.abs(np.minimum(mu, gradient)).max())


def agree(rewards, palette, peer, tolerance: float) -> None:
    ours, theirs = solve(rewards, palette), peer(rewards, palette)
    np.testing.assert_allclose(ours.lam, theirs, atol=tolerance * (1 + ours.lam.max()))
    assert residual(rewards, palette, ours.lam) <= min(2e-9, residual(rewards, palette, theirs))


def agree_by_own_account(rewards, palette) -> None:
    assert solve(rewards, palette).kkt_residual <= 1e-9


def of_own(rewards, palette) -> str:
    """What the solver says of itself, where the definition in float64 would take too much memory."""
    found = solve(rewards, palette)
    return f"KKT residual {found.kkt_residual:.0e} by its own account, in {found.iterations} passes"


def residuals(rewards, palette, *peers) -> str:
    found = solve(rewards, palette)
    parts = [f"ours {residual(rewards, palette, found.lam):.0e} in {found.iterations} passes"]
    parts += [f"{peer.__name__} {residual(rewards, palette, peer(rewards, palette)):.0e}" for peer in peers]
    return "KKT residual " + ", ".join(parts)
