"""Sample, score and select on many machines: a Ray Data pipeline of prompts, with Parquet parts as results.

Workers are Ray actors with the model and the rewards. A task takes a block of prompts from sampling to selection, so
candidates cross the network once, as the Parquet file that the driver writes. If a worker dies, Ray restarts it and its
block is drawn again, a few times at most; a block that kills every worker is reported once all others are done. Only
the driver writes parts, each completely or not at all, so each prompt occurs once, and an interrupted run resumes with
the missing ones.

Random numbers are a function of (seed, prompt index, candidate, step), so the result does not depend on the workers,
except through the rounding of the model's arithmetic: other numbers of threads or of candidates in a batch change
log-probs by about 1e-5, and with them, rarely, a token of a large vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import socket
import tempfile
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base import fingerprint, outputs
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write
from fastalign._base.work_folder import WorkFolder, hold, sha256
from fastalign.data.conversations import Conversation
from fastalign.data.sampling import KNOBS, SamplingOptions, check, check_ray
from fastalign.data.text import check_prompts
from fastalign.decode.candidates import Candidates
from fastalign.decode.samplers.base import ROWS_AT_ONCE
from fastalign.decode.samplers.external import request_seed
from fastalign.decode.select import select
from fastalign.rewards import references

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class RayOptions(SamplingOptions, total=False):
        dtype: str
        device: str
        backend: str


LOADING = ("dtype", "device", "backend")  # arguments of `Sampler.from_pretrained`
RETRIES = 3  # for a block whose worker died
TASKS_PER_WORKER = 8  # at least, if there are enough prompts: workers then finish at about the same time


def run(
    model: str,
    prompts: Sequence[str],
    out: str | Path,
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    rewards: Any = (),
    lam: Sequence[float] | None = None,
    k: int = 1,
    method: str = "resample",
    ray: str = "auto",
    workers: int | None = None,
    worker_cpus: float | None = None,
    worker_gpus: float | None = None,
    show_progress: bool = False,
    **sampling: Unpack[RayOptions],
) -> list[Path]:
    """Sample n candidates per prompt, score them with `rewards` if given, select k if lam is given; writes parts to
    folder `out`.

    model: any name that `Sampler.from_pretrained` takes. rewards: names or Reward objects. lam: one weight per reward.
    k, method: as in `decode.select`, each prompt with a random stream of its own. sampling: dtype, device, backend
    and what `Sampler.iter_batches` takes. ray, workers, worker_cpus, worker_gpus: see `draw`. `Candidates.concat` of
    `Candidates.from_parquet` of the parts is the whole.
    With the same settings, another call draws for the prompts missing in `out`. Returns the parts, in order. Raises
    UserError, one line, on bad arguments, and if `out` contains another job's parts.
    """
    out = Path(out)
    rewards = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    names = [reward if isinstance(reward, str) else reward.name for reward in rewards]
    if lam is not None and (not rewards or len(lam) != len(rewards)):
        raise UserError(f"lam must have one weight per reward, {len(rewards)}, got {len(lam)}")
    job = {"model": model, "n": n, "max_new_tokens": max_new_tokens, "seed": seed, **sampling}
    selection = None if lam is None else {"lam": [float(x) for x in lam], "k": k, "method": method, "seed": seed}
    settings = {name: value for name, value in job.items() if name not in (*KNOBS, "device")}
    settings |= {"rewards": names, "selection": selection}
    settings["prompts_sha256"] = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    settings["model_content"] = fingerprint.of_model(model)
    if found := references.contents(rewards):
        settings["contents"] = found
    settings = json.loads(json.dumps(settings, default=str))
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out, writes=out) as parts:
        if kept := parts.whole():
            outputs.check_same(out, parts.job, settings, knobs=(*KNOBS, "device"), otherwise="or another folder")
        parts.begin(parts.job if kept and parts.job else settings)
        done = {int(i) for path in kept for i in Candidates.from_parquet(path).prompt_ids}
        draw(
            job,
            prompts,
            parts,
            skip=done,
            rewards=rewards,
            selection=selection,
            ray=ray,
            workers=workers,
            worker_cpus=worker_cpus,
            worker_gpus=worker_gpus,
            show_progress=show_progress,
        )
        return parts.whole()


def draw(
    job: dict[str, Any],
    prompts: Sequence[str],
    parts: WorkFolder,
    *,
    skip: Collection[int] = (),
    rewards: Sequence[Any] = (),
    selection: dict[str, Any] | None = None,
    ray: str = "auto",
    workers: int | None = None,
    worker_cpus: float | None = None,
    worker_gpus: float | None = None,
    show_progress: bool = False,
) -> None:
    """Write part-<first prompt>.parquet to `parts` as blocks finish, for every prompt whose index is not in `skip`.

    job: model, dtype, device, backend, and the arguments of `Sampler.iter_batches`. ray: a cluster's address; "local"
    is this machine; "auto" is the cluster that this machine belongs to, else this machine. Workers: by default one per
    GPU, or one per machine with all of its cores. fastalign and the model must be available on every machine. If a
    block's worker died on every try, raises UserError once all others are done.
    """
    check_ray(ray, workers, worker_cpus, worker_gpus)
    prompts = _check(prompts, job)
    wanted = sorted(set(range(len(prompts))) - set(skip))
    if not wanted:
        return
    from fastalign._base import progress

    with (
        _cluster(ray) as cluster,
        progress.bar("prompts", total=len(wanted), unit="prompts", show=show_progress) as step,
    ):
        workers, cpus, gpus = _shape(cluster, workers, worker_cpus, worker_gpus)
        size = max(1, min(ROWS_AT_ONCE // job["n"], len(wanted) // (workers * TASKS_PER_WORKER)))
        blocks = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        rows = [
            {
                "places": block,
                "prompts": [str(prompts[i]) for i in block],
                "spoken": [isinstance(prompts[i], Conversation) for i in block],
            }
            for block in blocks
        ]
        workers = min(workers, len(rows))
        data = cluster.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(job, list(rewards), selection),
            compute=cluster.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=RETRIES,
        )
        lost = {block[0]: block for block in blocks}
        for row in data.iter_rows():
            if row["wrong"]:
                raise UserError(row["wrong"])
            if row["bug"]:
                raise RuntimeError(row["bug"])
            del lost[int(row["first"])]
            path = parts.making(f"part-{row['first']:08d}.parquet")
            with atomic_write(path) as beside:
                beside.write_bytes(row["part"])
            parts.made({path.name: sha256(path)})
            step(int(row["count"]))
    if lost:
        first, *others = [f"{block[0]} to {block[-1]}" for block in lost.values()]
        more = f" (and {len(others)} more blocks)" if others else ""
        raise UserError(
            f"prompts {first}{more}: their worker died {1 + RETRIES} times, possibly out of memory; all "
            "others are kept, and the same job resumes with the missing ones"
        )


def _check(prompts: Sequence[Any], job: dict[str, Any]) -> list[str]:
    """The checked prompts; also checks everything else that needs no model, before a worker starts. Raises
    UserError."""
    prompts = check_prompts(prompts, job.get("chat", "auto"))
    check(job)
    return prompts


class _Worker:
    """An actor: block of prompts in, their Parquet part out. The model is loaded with the first block.

    A user's mistake (no such model) is returned as one line, "wrong": raised in the constructor it would kill the
    actor, and elsewhere Ray would wrap it in a page of text. Any other exception is returned as its traceback, "bug".
    Ray skips failed blocks, so a block fails only if its worker dies.
    """

    def __init__(self, job: dict[str, Any], rewards: list[Any], selection: dict[str, Any] | None):
        self.job, self.rewards, self.selection = dict(job), rewards, selection
        self.sampler: Any = None  # loaded by the first block
        self.loading = {name: self.job.pop(name) for name in LOADING if name in self.job}
        self.model = self.job.pop("model")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from fastalign.decode import Sampler

        places = [int(i) for i in row["places"]]
        texts = zip(map(str, row["prompts"]), row["spoken"], strict=True)
        prompts = [Conversation.parse(text) if spoken else text for text, spoken in texts]
        result = {"first": places[0], "count": len(places), "part": b"", "wrong": "", "bug": ""}
        try:
            self.sampler = self.sampler or Sampler.from_pretrained(self.model, **self.loading)
            part = self._part(places, prompts)
        except (UserError, OSError) as error:
            return {
                **result,
                "wrong": f"{' '.join(str(error).split())} (in the block of prompts {places[0]} to {places[-1]})",
            }
        except Exception:
            return {**result, "bug": f"in the block of prompts {places[0]} to {places[-1]}: {traceback.format_exc()}"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.parquet"
            part.to_parquet(path)
            return {**result, "part": path.read_bytes()}

    def _part(self, places: list[int], prompts: list[str]) -> Candidates:
        from fastalign.rewards import score
        from fastalign.rewards.references import load

        part = self.sampler.sample(prompts, prompt_ids=places, **self.job)
        if not self.rewards:
            return part
        self.rewards = load(self.rewards)  # once: they are rewards from then on
        names = [reward.name for reward in self.rewards]
        part = part.with_rewards(names, score(self.rewards, *part.pairs()))
        if self.selection is None:
            return part
        grid, wants = part.reward_array(names), self.selection
        seeds = [request_seed(wants["seed"], int(i), 0) for i in part.prompt_ids]
        picks = [
            select(grid[j : j + 1], wants["lam"], k=wants["k"], method=wants["method"], seed=seed)
            for j, seed in enumerate(seeds)
        ]
        part = part.take(np.concatenate(picks))
        part.settings = {**part.settings, "selection": {**wants, "values": names}}
        return part


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """The ray module, connected; disconnected afterwards if it was not connected before."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"Ray cannot be imported ({error}): pip install 'fastalign[ray]'") from None
    import logging

    mine = not ray.is_initialized()
    if mine:
        where: dict[str, Any] = {} if address == "auto" else {"address": address}
        try:
            _knock(address)
            ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"ray={address!r}: no cluster that can be reached ({reason})") from None
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    borne, context.max_errored_blocks = context.max_errored_blocks, -1  # the others go on: see `draw`
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # Ray raises the errors that it logs
    try:
        yield ray
    finally:
        context.enable_progress_bars = shown
        context.max_errored_blocks = borne
        logger.setLevel(level)
        if mine:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _shape(ray, workers: int | None, cpus: float | None, gpus: float | None) -> tuple[int, float, float]:
    """How many workers, and the CPUs and GPUs of each. Raises UserError if they do not fit, because Ray would wait
    forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    if gpus is None:
        gpus = 1 if have["GPU"] else 0
    if workers is None:
        workers = max(1, int(have["GPU"] // gpus)) if gpus else len(nodes)
    if cpus is None:
        on_each = -(-workers // len(nodes))
        cpus = max(1, min(int(node.get("CPU", 0)) for node in nodes) // on_each)
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        room = sum(int(node.get(kind, 0) // each) for node in nodes) if each else workers
        if room < workers:
            raise UserError(f"{workers} workers with {each:g} {kind} each: the cluster has room for {room}")
    return workers, cpus, gpus
