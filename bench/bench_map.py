"""The MAP solve against scipy's L-BFGS-B, cvxpy with Clarabel and the 150 Adam steps of the paper's code; one pass
over the rewards against numpy and torch."""

from __future__ import annotations

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
        {"scipy L-BFGS-B": 15},
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
        {"cvxpy + Clarabel": 300},
        check=lambda: agree(small, level, cvxpy_clarabel, 1e-4),
        rounds=5,
        note=lambda: residuals(small, level, cvxpy_clarabel, scipy_lbfgsb, adam),
    )


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


def residuals(rewards, palette, *peers) -> str:
    found = solve(rewards, palette)
    parts = [f"ours {residual(rewards, palette, found.lam):.0e} in {found.iterations} passes"]
    parts += [f"{peer.__name__} {residual(rewards, palette, peer(rewards, palette)):.0e}" for peer in peers]
    return "KKT residual " + ", ".join(parts)
