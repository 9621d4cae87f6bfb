"""Run by torchrun in test_ppo_processes.py: PPO in two processes, replicated and sharded; rank 0 writes what came
out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from ppo_setup import policy, rollouts, snapshot, trainer
from torch.distributed.fsdp import fully_shard

warnings.simplefilter("ignore")
torch.set_num_threads(1)
OPTIONS = {"ppo_epochs": 2, "rate": 3e-4, "max_grad_norm": 0.5, "whiten_rewards": True, "use_score_scaling": True}
ROWS = [{"query": str(i), "input_ids": torch.arange(3, 5 + i % 4)} for i in range(11)]
NAMES = ("objective/kl", "objective/entropy", "ppo/loss/total", "ppo/loss/policy", "ppo/loss/value",
         "ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/returns/var", "ppo/val/error", "ppo/mean_scores",
         "tokens/responses_len_std")  # fmt: skip


def steps(run, rows, count=2):
    """`count` steps on this process's rows of the same rollouts."""
    result = []
    for seed in range(count):
        parts = [part[rows] for part in rollouts(seed=seed)]
        stats = run.step(*parts)
        result.append([stats[name] for name in NAMES])
    return result


def sharded(optimizer="sgd"):
    model, reference = policy(), policy(seed=1)
    for each in (model, reference):
        for layer in each.causal_lm.base_model.layers:
            fully_shard(layer)
        fully_shard(each)
    return trainer(
        model, reference, batch_size=2, mini_batch_size=1, gradient_accumulation_steps=2, optimizer=optimizer, **OPTIONS
    )


def whole(model):
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()
    }


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    result = {}

    run = trainer(
        policy(),
        policy(seed=1),
        batch_size=2,
        mini_batch_size=1,
        gradient_accumulation_steps=2,
        dataset=ROWS,
        **OPTIONS,
    )
    assert (run.accelerator.num_processes, run.config.global_batch_size) == (2, 4), run.config
    assert type(run.model).__name__ == "DistributedDataParallel"
    result["replicated"] = (steps(run, mine), snapshot(run.policy))
    result["replicated coefficient"] = run.kl_ctl.value
    every = [None, None]
    dist.all_gather_object(every, [batch["query"] for batch in run.dataloader])
    result["rows"] = every
    run.save_checkpoint(out / "replicated")

    run = sharded()
    result["sharded"] = (steps(run, mine), whole(run.policy))
    exact = sharded()
    exact.config.kl_penalty = "full"
    result["sharded exact"] = steps(exact, mine, 1)

    # Responses of unequal lengths, on one process twice as many as on the other.
    queries = [torch.arange(5, 6 + i) for i in range(2 + 2 * rank)]
    options = {"return_prompt": False, "max_new_tokens": 4 + 6 * rank, "temperature": 1e-4, "do_sample": True}
    drawn = run.generate(queries, **options)
    plain = policy()
    with torch.no_grad():
        for (_, p), x in zip(plain.named_parameters(), whole(run.policy).values(), strict=True):
            p.copy_(x)
    alone = trainer_free_generate(plain, queries, options)
    assert [x.tolist() for x in drawn] == [x.tolist() for x in alone]
    run.step(*[part[mine] for part in rollouts(seed=2)])  # and training goes on

    run.save_pretrained(out / "model")
    result["saved"] = whole(run.policy)

    one = sharded("adam")
    steps(one, mine)
    one.save_checkpoint(out / "sharded")
    two = sharded("adam")
    two.load_checkpoint(out / "sharded")
    lines = []
    for each in (one, two):
        torch.manual_seed(rank)
        lines.append((each.step(*[part[mine] for part in rollouts(seed=5)])["ppo/loss/total"], whole(each.policy)))
    assert lines[0][0] == lines[1][0] and all(torch.equal(lines[0][1][n], lines[1][1][n]) for n in lines[0][1])

    shard_by_accelerate()
    run = trainer(policy(), policy(seed=1), batch_size=2, mini_batch_size=1, gradient_accumulation_steps=2, **OPTIONS)
    assert all(hasattr(p, "full_tensor") for m in (run.policy, run.ref_model) for p in m.parameters())
    result["sharded by accelerate"] = (steps(run, mine), whole(run.policy))
    if rank == 0:
        torch.save(result, out / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def shard_by_accelerate(**options):
    """Have `Accelerator.prepare` shard with FSDP2. It offers that on GPUs alone, so its state is told after the
    fact."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True, **options
    )


def trainer_free_generate(model, queries, options):
    from tiny import tiny_tokenizer

    from fastalign.train.ppo_rollout import generate

    return generate(model.causal_lm, tiny_tokenizer(), queries, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
