"""Samples of rewards, and the peers: MAP's dual solved by scipy, cvxpy and Adam, and a pass over the rewards in torch
and numpy."""

from __future__ import annotations

import numpy as np
import torch


def samples(n: int, m: int) -> np.ndarray:
    """Correlated rewards, half of them bounded as a classifier's are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, m)) @ (np.eye(m) + 0.3 * rng.normal(size=(m, m)))
    x[:, ::2] = np.tanh(x[:, ::2])
    return x.astype(np.float32)


def candidates(prompts: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompts * n, m) rewards, half of whose variance is between prompts, and their prompts."""
    level = np.random.default_rng(1).normal(size=(prompts, m)).astype(np.float32)
    groups = np.repeat(np.arange(prompts), n)
    return samples(prompts * n, m) + 0.5 * level[groups], groups


def within(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(m,) the standard deviation within prompts."""
    wide = rewards.astype(np.float64)
    mean = np.stack([np.bincount(groups, x) for x in wide.T], axis=1) / np.bincount(groups)[:, None]
    return np.sqrt(((wide - mean[groups]) ** 2).mean(axis=0))


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


def lbfgsb_per_prompt(rewards: np.ndarray, palette: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The same on mean_x log Z(x, λ), with numpy's sums by group; starts: each prompt's first row."""
    from scipy.optimize import minimize

    sizes = np.diff(np.append(starts, len(rewards)))

    def dual(lam):
        s = rewards @ lam
        top = np.maximum.reduceat(s, starts)
        e = np.exp(s - np.repeat(top, sizes))
        total = np.add.reduceat(e, starts)
        weight = e * np.repeat(1 / (total * len(starts)), sizes)
        return (top + np.log(total / sizes)).mean() - lam @ palette, weight @ rewards - palette

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    start = np.zeros(len(palette))
    return minimize(dual, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start), options=options).x


def out_of_reach_by_highs(rewards: np.ndarray, palette: np.ndarray) -> bool:
    from scipy.optimize import linprog

    n = len(rewards)
    return linprog(np.zeros(n), A_ub=-rewards.T, b_ub=-palette, A_eq=np.ones((1, n)), b_eq=[1.0]).status == 2


def cvxpy_clarabel(rewards: np.ndarray, palette: np.ndarray) -> np.ndarray:
    import cvxpy as cp

    lam = cp.Variable(len(palette), nonneg=True)
    objective = cp.log_sum_exp((rewards.astype(np.float64) - palette) @ lam)
    cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL)
    return lam.value


def adam(rewards: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The method of MAP's authors (arXiv 2410.19198): a fixed number of steps on log λ in float32."""
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
