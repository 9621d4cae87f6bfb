"""Run by torchrun in test_grpo_processes.py: GRPO in two processes, replicated and sharded; rank 0 writes the
results."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from grpo_setup import completions_of, length, logs, prompts, trainer
from ppo_processes import shard_by_accelerate, whole
from torch.distributed.fsdp import FSDPModule

from fastalign.train import GRPOTrainer

CASES = {
    "dapo, whole groups": {"loss_type": "dapo", "per_device_train_batch_size": 8},
    "grpo, whole groups": {"loss_type": "grpo", "per_device_train_batch_size": 8},
    "dapo, spanning groups": {
        "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    },
    "grpo, spanning groups": {"loss_type": "grpo", "per_device_train_batch_size": 4, "scale_rewards": "batch"},
}  # fmt: skip
SHARDED = ("dapo, spanning groups", "grpo, whole groups")
DRAWN = {"per_device_train_batch_size": 4, "max_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 1}
SAVED = 2  # the step of the checkpoint


def made(folder, out, processes, options, rollout_func=completions_of, **more):
    """A trainer whose batches are those of one process."""
    options = {"beta": 0.1, "max_packed_tokens": 24, "per_device_eval_batch_size": 4} | options
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        options[name] //= processes
    if processes > 1:
        options |= {"ddp_backend": "gloo", "ddp_timeout": 120}
    return trainer(GRPOTrainer, folder, out, more={"rollout_func": rollout_func}, **more, **options)


def trained(run, **options):
    """All numbers of each step and of an evaluation that do not measure time; the weights; on each process, into how
    many parts each batch was split."""
    counts, parts = [], run._parts

    def counted(buckets):
        result = parts(buckets)
        counts.append([len(bucket) for bucket in result])
        return result

    run._parts = counted
    run.train(**options)
    rows = [*logs(run), run.evaluate(Dataset.from_list(prompts(3)))]
    rows = [
        {k: v for k, v in row.items() if isinstance(v, float) and "time" not in k and "second" not in k} for row in rows
    ]
    return rows, whole(run.model), gather_object([counts])


def drawn(folder, out, **options):
    """A run on completions of the engine, and the prompts and completions of each step in the global order."""
    run = made(folder, out, 2, DRAWN | options, rollout_func=None)
    draws, draw = [], run._draw

    def recorded(prompts):
        result = draw(prompts)
        pairs = zip(result.prompt_ids, result.completion_ids, strict=True)
        draws.append(gather_object([list(pair) for pair in pairs]))
        return result

    run._draw = recorded
    return (*trained(run), draws), run


def errors(call):
    """What each process raises."""
    try:
        call()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return gather_object([said])


def raises(folder, out):
    """The errors when a reward fails on the second process in the fourth step, and the files of the checkpoint."""

    def fails(completions, trainer_state, **others):
        if trainer_state.global_step == 3 and run.accelerator.process_index == 1:
            raise ZeroDivisionError("the reward's own")
        return length(completions)

    run = made(folder, out, 2, DRAWN, rewards=[fails], rollout_func=None)
    return errors(run.train), sorted(file.name for file in (out / "checkpoint-3").iterdir())


def main(folder: str, out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: dict = {}
    for name, options in CASES.items():
        run = made(folder, out, 2, options)
        result[name] = trained(run)
        assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    for name in ("drawn", "drawn again"):
        result[name], _ = drawn(folder, out)
    result["raises"] = raises(folder, out / "raises")

    prepare = transformers.Trainer.create_accelerator_and_postprocess

    def sharding(self):
        prepare(self)
        shard_by_accelerate(state_dict_type="FULL_STATE_DICT")  # as transformers does
        self.is_fsdp_enabled = True

    transformers.Trainer.create_accelerator_and_postprocess = sharding
    for name in SHARDED:
        result[f"{name}, sharded"] = trained(made(folder, out, 2, CASES[name]))
    saves = {"save_strategy": "steps", "save_steps": SAVED}
    result["drawn, sharded"], run = drawn(folder, out / "sharded", **saves)
    assert all(isinstance(model, FSDPModule) for model in (run.model, run.ref_model))
    run.save_model(str(out / "model"))
    resumed = made(folder, out / "sharded", 2, DRAWN | saves, rollout_func=None)
    result["resumed"] = trained(resumed, resume_from_checkpoint=str(out / "sharded" / f"checkpoint-{SAVED}"))
    result["raises, sharded"] = raises(folder, out / "raises sharded")
    resumed.num_generations_eval = 2  # of each process's own prompt
    data = Dataset.from_list([{"prompt": "", "number": 0}, *prompts(1)])
    result["no prompt"] = errors(lambda: resumed.evaluate(data))
    if run.is_world_process_zero():
        torch.save(result, out / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
