"""DistillTrainer: weighted maximum likelihood of candidates, which moves a model to p_λ without sampling.

Candidates y_j drawn from p0 with the weights w_j ∝ exp(λᵀR(x, y_j)) of their prompt are self-normalised importance
samples of p_λ(y|x) ∝ p0(y|x) exp(λᵀR(x, y)) (MAP, arXiv 2410.19198). The loss, the mean over prompts of
-Σ_j w_j log π(y_j|x), estimates the forward KL(p_λ‖π) up to a constant, so its minimum is p_λ as N grows. A prompt is
run once for its candidates, forward and backward, and only completion tokens reach the fused head.

With the candidates' log-probabilities under p0, the loss is half the variance, over a prompt's candidates, of
log w_j - log π(y_j|x)/p0(y_j|x) (arXiv 2010.10436). It is 0 where π is p_λ, however few the candidates are and however
they were chosen, so that a few telling ones do, and it also learns from those of small weight.
"""

from __future__ import annotations

import copy
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.data.text import embedding_rows
from fastalign.models.identity import reads_tokens
from fastalign.models.spans import context_of
from fastalign.train import checks
from fastalign.train.distill_config import DistillConfig, check_args
from fastalign.train.distill_data import COLUMNS, Encoder, Row
from fastalign.train.in_parts import TrainsInParts
from fastalign.train.parts import row_batch
from fastalign.train.passes import unchanged
from fastalign.train.trained_model import check_tokenizer, load, load_tokenizer, with_adapters

__all__ = ["DistillConfig", "DistillTrainer"]


class Candidate(NamedTuple):
    """One completion. weight: minus the slope of its prompt's loss in its log-probability."""

    prompt: list[int]
    completion: list[int]
    weight: float

    @property
    def counts(self) -> list[int]:
        return [1] * len(self.completion)


class DistillTrainer(TrainsInParts, transformers.Trainer):  # type: ignore[misc]
    """Trains a causal language model on weighted candidates, with the arguments of transformers' Trainer (and
    `tokenizer=` for `processing_class=`).

    model: a causal language model, with or without PEFT adapters, or a hub name, folder, GGUF file or alias.
    train_dataset, eval_dataset: a list of rows or a data set of known length, with the columns
        prompt (text as it is, or messages for the chat template), or prompt_ids, its token ids;
        completions, texts, which get the end token as in TRL's DPO, or completion_ids, token ids as drawn, to which
            nothing is appended;
        weights, at least 0, normalised over a prompt's candidates. Without them, all are equal;
        optionally ref_logprobs, each candidate's log-probability under the model that drew it: then the loss compares
            a prompt's candidates, two at least, whose weights must be above 0.

    Logs the loss; "ess", the mean over prompts of the effective sample size 1 / Σ w²; "completions/mean_length" of the
    candidates trained on; "num_tokens" and "tokens_per_second", in which a prompt counts once.

    Raises:
        UserError: rows and options that break these rules, prompt and completion beyond the model's context, before
            training; a NaN or infinite loss or gradient, before the step.
    """

    def __init__(
        self,
        model: Any,
        args: DistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
    ):
        processing_class = checks.one_tokenizer(processing_class, tokenizer)
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = DistillConfig(f"{name.rstrip('/').rpartition('/')[2] or 'model'}-Distill")
        if not isinstance(args, DistillConfig):
            raise UserError(f"args must be a DistillConfig, got {type(args).__name__}")
        args = copy.copy(args)  # the caller's config is unchanged
        check_args(args)
        set_seed(args.seed)  # adapters start at random
        if isinstance(model, str | os.PathLike):
            model, processing_class = load(model, processing_class, args)
        elif processing_class is None:
            processing_class = load_tokenizer(model.config._name_or_path, args)
        check_tokenizer(processing_class)
        model = with_adapters(model, peft_config, args)
        if not (verdict := reads_tokens(model)):
            raise UserError(f"model cannot be trained here: {verdict.why}")
        context = context_of(model.config.get_text_config(decoder=True))
        encoder = Encoder(processing_class, args.chat_template_kwargs or {}, embedding_rows(model), context)
        encoder.check("train_dataset", train_dataset)
        if eval_dataset is not None:
            encoder.check("eval_dataset", eval_dataset)
        self._packs = self._prepare(model, args.share_prompt)
        super().__init__(
            model=model,
            args=args,
            data_collator=encoder.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}  # since the last log
        self._began, self._tokens = time.perf_counter(), 0  # since the last log

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: list[str] | None = list(COLUMNS)

    def _batch(self, inputs: list[Row]) -> list[Row]:
        return inputs

    def _train_on(self, model: Any, window: list[list[Row]]) -> Tensor:
        rows = [row for batch in window for row in batch]
        # Gradients, and the loss, become means over the processes.
        scale = self.accelerator.num_processes / self._log_rows(rows)
        candidates, beyond = self._candidates(rows)
        return self._backward(model, [candidates], [scale]) + scale * beyond

    def _loss(self, model: Any, part: Sequence[Candidate], scale: float) -> Tensor:
        batch = row_batch(part, self.accelerator.device, pack=self._packs)
        log_probs = model(rows=batch)["log_probs"].sum(1)
        weights = torch.tensor([one.weight for one in part], dtype=log_probs.dtype)
        weights = weights.to(log_probs.device, non_blocking=True)
        return -scale * (weights * log_probs).sum()  # not weights @ log_probs, which autocast would round

    def prediction_step(
        self, model: Any, inputs: list[Row], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of a batch of evaluation prompts."""
        candidates, beyond = self._candidates(inputs)
        return self._evaluated(model, [candidates], [1 / len(inputs)]) + beyond / len(inputs), None, None

    def _candidates(self, rows: list[Row]) -> tuple[list[Candidate], float]:
        """The rows' candidates, and by how much the rows' losses exceed the sum of -weight * log_prob.

        The slopes of rows with `refs` need all of their log-probabilities, before any gradient.
        """
        result = [
            Candidate(row.prompt, ids, weight)
            for row in rows
            for ids, weight in zip(row.completions, row.weights, strict=True)
        ]
        if not any(gather_object([row.refs is not None for row in rows])):  # a sharded model runs on all processes
            return result, 0.0
        log_probs = self._log_probs(result)
        beyond, first = 0.0, 0
        for row in rows:
            last = first + len(row.weights)
            if row.refs is not None:
                weights, loss = variance(row.weights, log_probs[first:last] - np.array(row.refs))
                for j, weight in enumerate(weights.tolist(), first):
                    result[j] = result[j]._replace(weight=weight)
                beyond += loss + float(weights @ log_probs[first:last])
            first = last
        return result, beyond

    def _log_probs(self, candidates: list[Candidate]) -> np.ndarray:
        """(len(candidates),) float64, under the model as it is."""
        made = []
        with unchanged(self, self.model):
            for part in self._parts([candidates])[0]:
                batch = row_batch(part, self.accelerator.device, pack=self._packs)
                made.append(self.model(rows=batch)["log_probs"].double().sum(1))
        return torch.cat(made).cpu().numpy()

    def _log_rows(self, rows: list[Row]) -> int:
        """Adds the figures of a step's rows on all processes to the logs; returns the number of their prompts."""
        lengths = [len(ids) for row in rows for ids in row.completions]
        own = [len(rows), len(lengths), sum(lengths), sum(len(row.prompt) for row in rows), sum(r.ess for r in rows)]
        prompts, candidates, completed, before, ess = map(sum, zip(*gather_object([own]), strict=True))
        metrics = self._metrics["train"]
        metrics["ess"].append(ess / prompts)
        metrics["completions/mean_length"].append(completed / candidates)
        self._tokens += completed + before
        self.state.num_input_tokens_seen += completed + before
        return prompts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training
            metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
            logs.update({name: sum(values) / len(values) for name, values in metrics.items()})
            now = time.perf_counter()
            logs["num_tokens"] = float(self._total_train_tokens)
            logs["tokens_per_second"] = self._tokens / (now - self._began)
            self._began, self._tokens = now, 0
        super().log(logs, start_time)


def variance(weights: Sequence[float], log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """((N,), loss): half the variance of log w - log π/p0 over a prompt's candidates, and minus its slopes in log π."""
    lack = np.log(weights) - log_ratios
    lack -= lack.mean()
    return lack / len(lack), float(lack @ lack) / (2 * len(lack))
