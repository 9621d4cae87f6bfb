"""DPOTrainer: TRL's DPOTrainer, with the same constructor and logs, on packed pairs and the fused head.

A pair's prompt is processed once, padding is never processed, and only completion tokens reach the head. A batch larger
than `max_packed_tokens` is split into parts whose gradients add up to the batch's, so the part bounds the memory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import trl
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

import fastalign
from fastalign._base import progress
from fastalign._base.cache import cache_dir
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write
from fastalign._base.numbers import number
from fastalign.data.preferences import NUMBERS
from fastalign.losses import dpo_loss, sequence_logps, wpo_weights
from fastalign.models.identity import described, language_model, reads_tokens
from fastalign.models.loading import check_language_model
from fastalign.models.packing import enable, halves
from fastalign.models.trial import name_of, warn_once
from fastalign.train import checks
from fastalign.train.finite import StopsAtNaN
from fastalign.train.pairs import split, take
from fastalign.train.passes import reference_adapter, unchanged
from fastalign.train.rows import CPU_TOKENS, RowBatch, add_row_forward, batch_of

COUPLED = {"aot", "aot_unpaired", "sft"}  # losses of a batch that are not the mean over its pairs
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's DPOConfig, and:

    precompute_ref_log_probs: None, the default: if the reference is the policy before its first step (no ref_model, no
        PEFT) and every pair will be used, its log-probabilities are computed before training, and no second model is
        kept in memory. Results are the same. True and False as in TRL.
    share_prompt: process each pair's common prefix once, and no padding. Results are the same.
    max_packed_tokens: tokens per forward pass; larger batches are split. None: 1,024 on a CPU, else the whole batch.
    modpo_weight: MODPO (arXiv 2310.03708, eq. 9): the weight w of the value that the pairs express, in (0, 1]. A
        dataset column "margin" has the other values' part, their weighted rewards of chosen minus rejected. The reward
        difference of a pair becomes (beta · difference - margin) / w.
    A missing margin (null) is 0. A dataset column "weight" multiplies each pair's loss: pairs of several values in one
    dataset, scalarised linearly. label_smoothing also applies to loss types sigmoid and sigmoid_norm (cDPO), where TRL
    ignores it.
    """

    precompute_ref_log_probs: bool | None = field(
        default=None, metadata={"help": "Compute reference log-probs before training. Default: if that costs nothing."}
    )
    share_prompt: bool = field(default=True, metadata={"help": "Process each pair's common beginning once."})
    max_packed_tokens: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass. Default 1,024 on a CPU."}
    )
    modpo_weight: float = field(default=1.0, metadata={"help": "MODPO's weight of the pairs' own value, in (0, 1]."})


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator, plus the columns "margin" and "weight" as (B,) tensors."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        extra = {
            name: torch.tensor([number(f"a pair's {name}", example[name], **rules) for example in examples])
            for name, rules in NUMBERS.items()
            if name in examples[0]
        }
        return super().torch_call(examples) | extra


class DPOTrainer(StopsAtNaN, trl.DPOTrainer):  # type: ignore[misc]
    """TRL 1.16's DPOTrainer, with the same arguments (and `tokenizer=` for `processing_class=`), losses and logs, but
    faster.

    Also logs "tokens_per_second" (tokens in the padded batch's attention mask, as TRL counts them). Models that do not
    support packed rows (`models.packing.can_pack`) run padded, on the fused head. Image data and mixture-of-experts
    models with an auxiliary loss run on TRL's own path.

    Reference log-probabilities are computed without dropout. With precompute_ref_log_probs they are cached on disk,
    keyed by the reference's weights, configuration and precision, the tokens and the summed quantity; a second run
    reads them.

    Raises:
        UserError: missing columns, empty completions, margins and weights that are not finite, negative weights,
            prompts that leave no room, different vocabularies; in training, a NaN or infinite loss or gradient, before
            the step.
    """

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: trl.DPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[transformers.EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: transformers.BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
    ):
        processing_class = checks.one_tokenizer(processing_class, tokenizer)
        if train_dataset is not None:
            train_dataset = checks.pairs("train_dataset", train_dataset)
        if eval_dataset is not None:
            eval_dataset = checks.pairs("eval_dataset", eval_dataset)
        for name in (model, ref_model):
            if isinstance(name, str | os.PathLike):
                check_language_model(name)
        checks.vocabularies(model, ref_model, processing_class)
        if not 0 < (weight := getattr(args, "modpo_weight", 1.0)) <= 1:
            raise UserError(f"modpo_weight must be in (0, 1], got {weight!r}")
        self._ready = self._lazy_reference = False
        if args is not None and getattr(args, "precompute_ref_log_probs", False) is None:
            peft = peft_config is not None or hasattr(model, "peft_config")
            self._lazy_reference = ref_model is None and not peft and _whole(args, train_dataset, eval_dataset)
            args = copy.copy(args)  # the caller's config is unchanged
            args.precompute_ref_log_probs = self._lazy_reference
        super().__init__(
            model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
            callbacks, optimizers, quantization_config, peft_config,
        )  # fmt: skip
        self._prepare()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        given = eval_dataset is not None and not isinstance(eval_dataset, str)
        if given and self._lazy_reference and self.ref_model is None and self.state.global_step > 0:
            # The policy is no longer the reference, and these pairs' reference log-probabilities were not computed.
            reference = trl.trainer.utils.create_model_from_path(
                trl.trainer.utils.get_config_model_id(self.model.config),
                **{"dtype": self.model.dtype, **(self.args.model_init_kwargs or {})},
            )
            if trl.trainer.utils.hash_module(reference) != self._reference_hash:
                rule = "eval_dataset must be given to the trainer, or ref_model: the policy has changed"
                raise UserError(f"{rule}, and {self.model.config._name_or_path!r} has other weights than at the start")
            if self._packs:
                enable(reference)
            add_row_forward(language_model(reference))
            self.ref_model: Any = self.accelerator.prepare_model(reference, evaluation_mode=True)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Called after the models exist and before their first pass."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        checks.room(dataset_name, dataset, prepared, args.max_length)
        return prepared

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "margin" not in self._signature_columns:
            self._signature_columns += ["margin", "weight"]

    def _prepare(self) -> None:
        """Setup that needs the models made by TRL's constructor; runs once, before the first pass."""
        if self._ready:
            return
        self._ready = True
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator: Any = PairCollator(**vars(self.data_collator))
        self._elsewhere = self._is_vision_dataset or self.aux_loss_enabled  # on TRL's own path
        models = [self.accelerator.unwrap_model(m) for m in (self.model, self.ref_model) if m is not None]
        for m in models:
            if self._elsewhere and (inner := language_model(m)).base_model is inner:
                raise UserError(
                    f"model {name_of(m)} has no base model that TRL's own path, for images and auxiliary losses, "
                    "could run: set router_aux_loss_coef=0"
                )
            if not self._elsewhere and not (verdict := reads_tokens(m)):
                raise UserError(f"model cannot be trained on pairs here: {verdict.why}; TRL's own DPOTrainer takes it")
        self._packs = getattr(self.args, "share_prompt", True) and not self._elsewhere
        for m in models if self._packs else ():
            if not (verdict := enable(m)):
                self._packs = False
                warn_once(m, f"{name_of(m)} is trained on padded pairs, not on packed ones: {verdict.why}")
        self._limit = getattr(self.args, "max_packed_tokens", None)
        if self._limit is None and self.accelerator.device.type == "cpu":
            self._limit = CPU_TOKENS
        if COUPLED & set(self.loss_types) or self.is_deepspeed_enabled:
            self._limit = None
        for m in models:
            add_row_forward(language_model(m))
        self._outputs = (*OUTPUTS, "log_sum_sq_probs") if self.use_weighting else OUTPUTS
        self._share, self._began = 1.0, time.perf_counter()
        self._sums: Tensor | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._prepare()
        if self._elsewhere:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        pairs = len(inputs["input_ids"]) // 2
        tokens = inputs["attention_mask"].sum(-1).view(2, -1).sum(0)
        if self._packs:  # the prompt once
            tokens -= (inputs["attention_mask"] - inputs["completion_mask"])[:pairs].sum(-1)
        groups = split(pairs, tokens, self._limit)
        total: Any = 0.0
        for group in groups:
            self._share = (group.stop - group.start) / pairs
            last = group is groups[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                total = total + super().training_step(model, take(inputs, pairs, group), num_items_in_batch)
        self._share = 1.0
        self._flush("train")
        return total

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        self._prepare()
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not self._elsewhere:
            self._flush("eval")
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self._prepare()
        if self._elsewhere or return_outputs:  # logits are requested
            return super()._compute_loss(model, inputs, return_outputs)
        batch = self._batch(inputs)
        scored = model(rows=batch, outputs=self._outputs)
        mask = inputs["completion_mask"][:, 1:].bool()
        chosen, rejected = sequence_logps(scored["log_probs"], mask, ld_alpha=self.ld_alpha).chunk(2)
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self._reference(self.ref_model or self.model, batch, mask)
        loss = self._loss(scored, mask, chosen, rejected, ref_chosen, ref_rejected, inputs)
        with torch.no_grad():
            self._add(inputs, scored, mask, chosen, rejected, chosen - ref_chosen, rejected - ref_rejected)
        return loss * self._share

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference's sequence log-probabilities (chosen (B,), rejected (B,)) of one collated batch."""
        self._prepare()
        if self._elsewhere:
            return super().compute_ref_log_probs(model, inputs)
        return self._reference(model, self._batch(inputs), inputs["completion_mask"][:, 1:].bool())

    def _batch(self, inputs) -> RowBatch:
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        return batch_of(ids, attention, labels, halves(len(ids)) if self._packs else None, ids.device)

    def _reference(self, model, batch: RowBatch, mask: Tensor) -> tuple[Tensor, Tensor]:
        with reference_adapter(self), unchanged(self, model):
            log_probs = model(rows=batch)["log_probs"]
        chosen, rejected = sequence_logps(log_probs, mask, ld_alpha=self.ld_alpha).chunk(2)
        return chosen, rejected

    def _loss(self, scored, mask, chosen, rejected, ref_chosen, ref_rejected, inputs) -> Tensor:
        half = len(mask) // 2
        # Lengths as TRL counts them: a completion's first token counts even if nothing precedes it.
        chosen_lengths, rejected_lengths = inputs["completion_mask"].sum(-1).chunk(2)
        weight, margin = getattr(self.args, "modpo_weight", 1.0), inputs.get("margin")
        if weight != 1 or margin is not None:
            chosen, rejected, ref_chosen, ref_rejected = (
                x / weight for x in (chosen, rejected, ref_chosen, ref_rejected)
            )
            ref_chosen = ref_chosen if margin is None else ref_chosen + margin / (self.beta * weight)
        factors = inputs.get("weight")
        if self.use_weighting:
            wpo = wpo_weights(scored["log_probs"], scored["log_sum_sq_probs"], mask)
            factors = wpo if factors is None else factors * wpo
        losses = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=self.beta,
            loss_type=self.loss_types,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=getattr(self.args, "discopop_tau", 0.05),
            chosen_lengths=mask[:half].sum(-1) if "sft" in self.loss_types else chosen_lengths,
            rejected_lengths=rejected_lengths,
            sft_logps=sequence_logps(scored["log_probs"][:half], mask[:half]) if "sft" in self.loss_types else None,
            weights=factors,
        ).losses
        return losses.mean()

    def _add(self, inputs, scored, mask, chosen, rejected, chosen_ratios, rejected_ratios) -> None:
        """Add this part's sums to those of the step; TRL's metrics are their ratios."""
        half = len(mask) // 2
        is_chosen, is_rejected = mask[:half], mask[half:]
        rewards, other = self.beta * chosen_ratios, self.beta * rejected_ratios
        sums = [
            mask.sum(), is_chosen.sum(), is_rejected.sum(), rewards.new_full((), half), inputs["attention_mask"].sum(),
            (scored["entropy"] * mask).sum(), (scored["is_top1"][:half] & is_chosen).sum(),
            (scored["mean_logits"][:half] * is_chosen).sum(), (scored["mean_logits"][half:] * is_rejected).sum(),
            rewards.sum(), other.sum(), (rewards > other).sum(), (rewards - other).sum(), chosen.sum(), rejected.sum(),
        ]  # fmt: skip
        sums = torch.stack([x.double() for x in sums])
        self._sums = sums if self._sums is None else self._sums + sums

    def _flush(self, mode: str) -> None:
        """The step's sums over all processes, as TRL's metrics."""
        if self._sums is None:
            return
        sums = self.accelerator.reduce(self._sums.float() if self.accelerator.device.type == "mps" else self._sums)
        self._sums = None
        tokens, chosen, rejected, pairs, attended, *rest = sums.tolist()
        of = [tokens, chosen, chosen, rejected, *[pairs] * 6]
        names = (
            "entropy",
            "mean_token_accuracy",
            "logits/chosen",
            "logits/rejected",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
        )
        for name, total, count in zip(names, rest, of, strict=True):
            self._metrics[mode][name].append(total / count if count else 0.0)
        if mode == "train":
            self._total_train_tokens += int(attended) // self._tp_size
            seconds = time.perf_counter() - self._began
            self._metrics[mode]["tokens_per_second"] = [self._total_train_tokens / seconds]
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.is_deepspeed_enabled or not hasattr(dataset, "num_rows"):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        content = self._content(dataset)
        path = cache_dir() / "ref_logps" / f"{content}.safetensors"
        there = all(gather_object([content is not None and path.is_file()]))  # on the disk of every process
        columns = load_file(str(path)) if there else self._all_ref_logps(dataset, name, batch_size)
        if content is not None and not there and self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as beside:
                save_file(columns, str(beside))
        self.accelerator.wait_for_everyone()
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset

    def _all_ref_logps(self, dataset, name: str, batch_size: int) -> dict[str, Tensor]:
        """The reference's log-probabilities of every pair, on every process; TRL's version passes them through a file
        of one process."""
        options: dict[str, Any] = {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory and self.accelerator.device.type != "cpu",
        }
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, **options)
        model, batches = self.ref_model or self.model, []
        title, show = f"reference log-probabilities, {name}", self.accelerator.is_main_process
        with progress.bar(title, total=dataset.num_rows, unit="pairs", show=show) as advance:
            for batch in self.accelerator.prepare(loader):
                both = torch.stack(self.compute_ref_log_probs(model, batch), 1)
                batches.append(self.accelerator.gather_for_metrics(both).float().cpu())
                advance(len(batches[-1]))
        chosen, rejected = torch.cat(batches).unbind(1)
        return {"ref_chosen_logps": chosen.contiguous(), "ref_rejected_logps": rejected.contiguous()}

    @property
    def _reference_hash(self) -> str:
        """Of the reference's weights when training began; TRL before 1.14 does not keep it."""
        if not hasattr(self, "_precompute_model_hash"):
            self._precompute_model_hash: Any = trl.trainer.utils.hash_module(self.ref_model or self.model)
        return self._precompute_model_hash

    def _content(self, dataset) -> str | None:
        """A hash of everything that the reference's log-probabilities depend on; None if a hook may change them."""
        self._prepare()
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        model_record = described(model)
        if model_record is None:
            return None
        content = [
            fastalign.__version__,
            transformers.__version__,
            self._reference_hash,
            model_record,
            self.accelerator.mixed_precision,
            self.ref_model is None,
            self.ld_alpha,
            self.args.max_length,
            self.args.truncation_mode,
            self._packs,
        ]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        for name, buffer in model.named_buffers():  # including those that no checkpoint contains
            digest.update(name.encode() + buffer.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            for ids in dataset.with_format("numpy")[column]:
                digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        return digest.hexdigest()[:32]


def _whole(args: DPOConfig, train: Any, evaluated: Any) -> bool:
    """Whether training uses every pair at least once (for finite datasets) and keeps one reference."""
    datasets = [train, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]
    if not all(d is None or hasattr(d, "num_rows") for d in datasets) or train is None:
        return False
    elsewhere = args.sync_ref_model or args.fsdp or args.deepspeed or {"image", "images"} & set(train.column_names)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else float("inf")
    epochs = float("inf") if args.max_steps > 0 else args.num_train_epochs
    return not elsewhere and steps * per_step >= train.num_rows and epochs >= 1
