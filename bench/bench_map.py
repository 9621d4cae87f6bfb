"""The MAP solve, per prompt and joint, against scipy's L-BFGS-B, cvxpy with Clarabel and the 150 Adam steps of the paper's
code; one pass over the rewards against numpy and torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from fastalign.bench.common import Case

from fastalign.ops import map_statistics
from fastalign.palette import quantile_palette, solve


def cases() -> Iterator[Case]:
    yield from per_prompt_cases()
    yield from joint_cases()


def per_prompt_cases() -> Iterator[Case]:
    for prompts, bar in ((10_000, 20), (2_000, 14)):
        yield one_per_prompt(prompts, 100, 6, bar, rounds=5)
    yield one_per_prompt(16, 32, 3, None, rounds=50)  # what `fastalign demo` solves
    rewards, groups = candidates(200, 100, 3)
    starts, wide = np.arange(0, len(rewards), 100), rewards.astype(np.float64)
    many = around(rewards, 1000, within(rewards, groups))
    yield Case(
        "solve per prompt, 200 prompts x 100, m = 3, 1,000 palettes",
        lambda: solve(rewards, many, groups=groups),
        {"scipy L-BFGS-B, one by one": lambda: [lbfgsb_per_prompt(wide, one, starts) for one in many]},
        {"scipy L-BFGS-B, one by one": 60},
        check=lambda: agree_on_many(rewards, many, lambda x, c: lbfgsb_per_prompt(x, c, starts), groups=groups),
        rounds=3,
    )


def one_per_prompt(prompts: int, n: int, m: int, bar: float | None, rounds: int) -> Case:
    rewards, groups = candidates(prompts, n, m)
    starts, wide = np.arange(0, len(rewards), n), rewards.astype(np.float64)
    palette = rewards.mean(axis=0, dtype=np.float64) + 0.5 * within(rewards, groups) * (np.arange(m) < 3)

    def check() -> None:
        ours, theirs = solve(rewards, palette, groups=groups), lbfgsb_per_prompt(wide, palette, starts)
        assert ours.kkt_residual <= 1e-9
        np.testing.assert_allclose(ours.lam, theirs, atol=1e-5 * (1 + ours.lam.max()))

    return Case(
        f"solve per prompt, {prompts:,} prompts x {n}, m = {m}",
        lambda: solve(rewards, palette, groups=groups),
        {"scipy L-BFGS-B": lambda: lbfgsb_per_prompt(wide, palette, starts)},
        {} if bar is None else {"scipy L-BFGS-B": bar},
        check=check,
        rounds=rounds,
    )


def joint_cases() -> Iterator[Case]:
    rewards = samples(1_000_000, 6)
    palette = quantile_palette(rewards, 0.7, values=[0, 1, 2])
    wide = rewards.astype(np.float64)
    yield Case(
        "solve, joint, n = 1,000,000, m = 6",
        lambda: solve(rewards, palette),
        {"scipy L-BFGS-B": lambda: scipy_lbfgsb(wide, palette)},
        {"scipy L-BFGS-B": 25},
        check=lambda: agree(rewards, palette, scipy_lbfgsb, 1e-3),
        rounds=5,
        note=lambda: residuals(rewards, palette, scipy_lbfgsb),
    )
    paper = samples(2312, 6)  # as many as MAP's authors publish
    asked, few = quantile_palette(paper, 0.6, values=[0, 1, 2]), paper.astype(np.float64)
    yield Case(
        "solve, joint, n = 2,312, m = 6",
        lambda: solve(paper, asked),
        {"scipy L-BFGS-B": lambda: scipy_lbfgsb(few, asked), "150 Adam steps": lambda: adam(paper, asked)},
        {"scipy L-BFGS-B": 6},
        check=lambda: agree(paper, asked, scipy_lbfgsb, 1e-4),
        rounds=50,
    )
    beyond = 0.9 * paper.max(axis=0)
    yield Case(
        "a palette out of reach, joint, n = 2,312, m = 6: verdict, proof, nearest",
        lambda: solve(paper, beyond),
        {"scipy linprog (HiGHS), the verdict alone": lambda: out_of_reach_by_highs(few, beyond)},
        check=lambda: np.testing.assert_equal(
            bool(solve(paper, beyond).feasible), not out_of_reach_by_highs(few, beyond)
        ),
        rounds=20,
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
        "solve, joint, n = 20,000, m = 3",
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
        "solve, joint, n = 20,000, m = 3, 1,000 palettes",
        lambda: solve(small, many),
        {"scipy L-BFGS-B, one by one": lambda: [scipy_lbfgsb(small.astype(np.float64), one) for one in many]},
        check=lambda: agree_on_many(small, many, scipy_lbfgsb),
        rounds=3,
    )
    yield Case(
        "solve, joint, n = 10,000,000, m = 6",
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
        "solve, joint, n = 10,000,000, m = 64",
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


def around(rewards: np.ndarray, count: int, deviation: np.ndarray | None = None) -> np.ndarray:
    """Palettes from a little below the mean to 0.7 standard deviations above it, drawn apart for each value."""
    ask = np.random.default_rng(1).uniform(-0.2, 0.7, (count, rewards.shape[1]))
    deviation = rewards.std(axis=0, dtype=np.float64) if deviation is None else deviation
    return rewards.mean(axis=0, dtype=np.float64) + ask * deviation


def agree_on_many(rewards: np.ndarray, palettes: np.ndarray, peer, groups=None) -> None:
    found = solve(rewards, palettes, groups=groups)
    assert found.feasible.all() and found.kkt_residual.max() <= 1e-9
    for k in range(0, len(palettes), 100):
        theirs = peer(rewards.astype(np.float64), palettes[k])
        np.testing.assert_allclose(found.lam[k], theirs, atol=1e-4 * (1 + found.lam[k].max()))


def candidates(prompts: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompts * n, m) rewards, half of whose spread lies between prompts, and their prompts."""
    level = np.random.default_rng(1).normal(size=(prompts, m)).astype(np.float32)
    groups = np.repeat(np.arange(prompts), n)
    return samples(prompts * n, m) + 0.5 * level[groups], groups


def within(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(m,) the standard deviation within prompts."""
    wide = rewards.astype(np.float64)
    mean = np.stack([np.bincount(groups, x) for x in wide.T], axis=1) / np.bincount(groups)[:, None]
    return np.sqrt(((wide - mean[groups]) ** 2).mean(axis=0))


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
