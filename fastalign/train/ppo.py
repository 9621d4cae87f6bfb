"""PPOTrainer: proximal policy optimisation of a language model, with the interface of TRL up to 0.11.

One step: old log-probabilities and values of the rollouts, the reference's log-probabilities, a reward per token
(-kl_coef · KL, the score at the last token), GAE, whitened advantages, then passes of clipped policy and value losses
(arXiv 1707.06347; for language models arXiv 1909.08593). The (tokens, vocabulary) logits are never held, and only
response tokens are projected.

TRL 0.11 averages over a mini batch of one process. Here every mean and every whitening covers all tokens of the
optimiser step or of the global batch, so neither mini_batch_size nor the number of processes changes a gradient.
"""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.losses import ppo_loss, value_loss, whiten
from fastalign.ops import gae
from fastalign.train import ppo_batch, ppo_checkpoint, ppo_checks, ppo_rollout, ppo_stats
from fastalign.train.dropout import disable_dropout
from fastalign.train.finite import not_finite, stopped
from fastalign.train.kl import AdaptiveKLController, FixedKLController, exact_kl, token_penalty
from fastalign.train.ppo_config import PPOConfig
from fastalign.train.ppo_data import PromptLoader, lists, used_columns
from fastalign.train.sharded import inside, is_sharded, whole_head, whole_layers
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead, create_reference_model, upload

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer:
    """Trains a model with a value head on the scores of its own responses.

    >>> for batch in trainer.dataloader:
    ...     responses = trainer.generate(batch["input_ids"], return_prompt=False, do_sample=True, max_new_tokens=24)
    ...     scores = [reward(tokenizer.decode(response)) for response in responses]
    ...     stats = trainer.step(batch["input_ids"], responses, scores)
    """

    config: PPOConfig
    is_encoder_decoder: bool
    is_distributed: bool
    is_peft_model: bool
    model: Any
    optimizer: Any

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Any = None,
        *,
        processing_class: Any = None,
    ):
        """Set up one process of the run.

        Args:
            config: a PPOConfig.
            model: the policy with its value head.
            ref_model: the reference of the KL, with or without a value head; None: the policy without its adapters if
                it has any, else a frozen copy of it.
            tokenizer: the model's (processing_class is the newer name).
            dataset: for `dataloader`: of 🤗 datasets, or anything with a length and indices.
            optimizer: over the policy's parameters; None: Adam with config.learning_rate.
            data_collator: a list of rows -> a batch; None: a dict of lists.
            num_shared_layers: of the frozen copy, see `create_reference_model`.
            lr_scheduler: of `optimizer`, stepped once a step.

        Raises:
            UserError, TypeError: one line, for arguments that do not fit together.
        """
        try:
            from accelerate import Accelerator
            from accelerate.utils import ProjectConfiguration, set_seed
        except ImportError:
            raise UserError("PPOTrainer needs accelerate: pip install accelerate") from None

        self.config = config = PPOConfig() if config is None else config
        self.tokenizer: Any = processing_class if tokenizer is None else tokenizer
        ppo_checks.arguments(config, model, ref_model, self.tokenizer, lr_scheduler, optimizer, training_data_collator)
        assert model is not None  # checked
        # Otherwise accelerate treats processes without a GPU as unrelated.
        settings = {"cpu": not torch.accelerator.is_available(), **config.accelerator_kwargs}
        try:
            project = ProjectConfiguration(**config.project_kwargs)
            self.accelerator: Accelerator = Accelerator(log_with=config.log_with, project_config=project, **settings)
        except (ValueError, TypeError) as error:
            raise UserError(f"log_with or accelerator_kwargs: {str(error).splitlines()[0]}") from None
        processes = self.accelerator.num_processes
        # The first process draws as a single one would; the others must draw differently.
        set_seed(config.seed + self.accelerator.process_index)
        config.world_size, config.is_encoder_decoder = processes, False
        config.global_batch_size = config.batch_size * processes
        config.global_backward_batch_size = config.backward_batch_size * processes
        self.is_encoder_decoder, self.is_distributed = False, processes > 1
        self.is_peft_model = config.is_peft_model = model.is_peft_model

        self.pad: int = ppo_checks.pad_token(self.tokenizer)
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers)
        elif num_shared_layers is not None:
            warnings.warn("num_shared_layers has no effect: the reference is not made here", stacklevel=2)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.is_peft_model and hasattr(model.causal_lm, "enable_input_require_grads"):
                model.causal_lm.enable_input_require_grads()
        if config.disable_dropout:
            disable_dropout(model)
        if optimizer is None:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)
        self.model, self.optimizer = self._prepare(model, optimizer)
        self.policy: AutoModelForCausalLMWithValueHead = self.accelerator.unwrap_model(self.model)
        self.ref_model: Any = None if ref_model is None else self._prepare_reference(ref_model)
        self.lr_scheduler = lr_scheduler  # not prepared: accelerate would step it once per process
        self.data_collator: Callable[[list[Any]], Any] = lists if data_collator is None else data_collator
        self.dataset: Any = None
        self.dataloader: Any = (  # a PromptLoader, where a data set was given
            None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        )
        controller = AdaptiveKLController if config.adap_kl_ctrl else FixedKLController
        options = (config.target, config.horizon) if config.adap_kl_ctrl else ()
        self.kl_ctl: AdaptiveKLController | FixedKLController = controller(config.init_kl_coef, *options)
        self.running: ppo_stats.RunningMoments = ppo_stats.RunningMoments()
        self.current_step: int = 0
        self._checkpoint: str | None = None  # the last one saved or loaded
        if config.log_with is not None:
            settings = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers(
                config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs
            )

    @property
    def current_device(self) -> torch.device:
        return self.accelerator.device

    def prepare_dataloader(self, dataset: Any, data_collator: Callable | None = None) -> PromptLoader:
        """This process's batches of `dataset`, shuffled anew each epoch; see `PromptLoader`."""
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(f"dataset must have a length and indices, got {type(dataset).__name__}")
        if self.config.remove_unused_columns:
            dataset = used_columns(dataset, inspect.signature(self.policy.causal_lm.forward).parameters)
        self.dataset = dataset
        return PromptLoader(
            dataset,
            self.config.batch_size,
            data_collator or lists,
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            device=self.current_device,
        )

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        *,
        remove_padding: bool = True,
        **generation_config: Any,
    ) -> Any:
        """The policy's responses to a list of queries, one tensor each; see `ppo_rollout.generate`.

        A single query (tokens,) gives one tensor (1, tokens). With generate_ref_response: (responses, those of the
        reference).
        """
        single = isinstance(query_tensor, Tensor)
        if isinstance(query_tensor, Tensor) and query_tensor.ndim != 1:
            raise UserError(
                f"query_tensor must be a tensor (tokens,) or a list of such, got {tuple(query_tensor.shape)}"
            )
        options: dict[str, Any] = {
            "length_sampler": length_sampler,
            "batch_size": batch_size,
            "return_prompt": return_prompt,
        }
        options |= {"remove_padding": remove_padding and not single, **generation_config}

        def draw(wrapped: Any, model: Any) -> Any:
            queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
            with whole_layers(wrapped):
                responses = ppo_rollout.generate(model, self.tokenizer, queries, **options)
            return responses[0].unsqueeze(0) if single else responses

        self.policy.eval()
        responses = inside(self.model, self.policy, lambda: draw(self.model, self.policy.causal_lm))
        if not generate_ref_response:
            return responses
        with self._reference() as (wrapped, reference):
            return responses, inside(wrapped, reference, lambda: draw(wrapped, reference.causal_lm))

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: Sequence[Tensor] | Sequence[float],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on batch_size rollouts of this process; returns statistics of the global batch.

        Args:
            queries, responses: tensors (tokens,) of ids, at least one each.
            scores: one number per response, higher is better.
            response_masks: tensors of 0/1 per response token; tokens with 0 do not count in rewards and losses (the
                response continues after them).

        Returns:
            Statistics with TRL's names: floats, and numpy arrays with one entry per sample or token.

        Raises:
            UserError: lists whose length differs from batch_size, empty or out-of-range tokens, scores that are not
                finite scalars; nothing has changed then. A NaN or infinite log-prob, value, loss or gradient, before an
                optimiser step uses it.
        """
        config, times = self.config, ppo_stats.Stopwatch()
        vocabulary = self.policy.config.get_text_config().vocab_size
        scores = ppo_batch.scalars(scores, config.batch_size, self.current_device)
        rollouts = ppo_batch.rollouts(
            queries, responses, response_masks, config.batch_size, vocabulary, self.pad, self.current_device
        )
        self._empty_cache()
        with times("forward_pass"):
            logprobs, values, ref_logprobs, kl = self._look(rollouts)
            rows = {"log-probability": logprobs, "value": values, "reference's log-probability": ref_logprobs}
            self._check_rows(rows, rollouts.labels != -100)
        with times("compute_rewards"):
            # A few numbers per token: every process has those of all, so one definition serves any number of processes.
            every = self._gather(
                logprobs=logprobs,
                values=values,
                ref_logprobs=ref_logprobs,
                kl=kl,
                mask=rollouts.labels != -100,
                scores=scores,
                queries_lengths=rollouts.query_lengths,
                responses_lengths=rollouts.response_lengths,
            )
            every["scores"] = self._scaled(every["scores"])
            rewards = self.compute_rewards(every["scores"], every["kl"], every["mask"])
        with times("compute_advantages"):
            advantages, every["returns"] = self.compute_advantages(every["values"], rewards, every["mask"])
            every["advantages"] = advantages
        mine = self._mine(rollouts, advantages=advantages, returns=every["returns"])
        old = {"logprobs": logprobs, "values": values, **mine}
        with times("optimize_step"):
            means, ratios = self._optimize(rollouts, old)
        with times("calc_stats"):
            stats = ppo_stats.objective(every, self.kl_ctl.value) | ppo_stats.training(every, means, ratios)
        if stats["objective/kl"] < -1:
            warnings.warn(
                f"the KL to the reference is {stats['objective/kl']:.2f}: responses are not drawn from the policy as "
                "it is trained (another temperature, top_k, top_p?)",
                stacklevel=2,
            )
        self.kl_ctl.update(stats["objective/kl"], config.batch_size * self.accelerator.num_processes)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.current_step += 1
        self._empty_cache()
        return stats | times.seconds()

    def compute_rewards(self, scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
        """-kl_coef · kl per token, plus the score (B,) at each row's last token; (B, T), 0 where masked."""
        rewards = (-self.kl_ctl.value * kl).masked_fill(~mask, 0)
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        last = places.masked_fill(~mask, -1).amax(-1, keepdim=True)
        return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened advantages and returns (B, T) by generalised advantage estimation."""
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=self.config.gamma, lam=self.config.lam)
        return whiten(advantages, mask), returns

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Any,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics and the rewards to the trackers named by log_with; every process calls it.

        batch: with a list under each of columns_to_log, which Weights & Biases shows as a table.
        """
        if self.config.log_with is None:
            return
        rewards = ppo_batch.scalars(rewards, len(rewards), self.current_device)
        rewards = self.accelerator.gather(rewards).float()
        logs: dict[str, Any] = {k: v for k, v in stats.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        logs["env/reward_mean"] = float(rewards.mean())
        logs["env/reward_std"] = float(rewards.std()) if len(rewards) > 1 else 0.0
        if self.config.log_with == "wandb":
            logs |= {k: v for k, v in stats.items() if isinstance(v, np.ndarray)}
            logs["env/reward_dist"] = rewards.cpu().numpy()
            columns = list(columns_to_log)
            missing = [name for name in columns if name not in batch]
            if missing:
                raise UserError(f"batch must have the columns {', '.join(columns)}, lacks {', '.join(missing)}")
            if self.accelerator.is_main_process:
                import wandb

                rows = [list(row) for row in zip(*(batch[c] for c in columns), rewards.tolist(), strict=False)]
                logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=rows)
        self.accelerator.log(logs, step=self.current_step)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write model, value head and tokenizer, for `from_pretrained` here and in transformers. Every process calls
        it."""
        weights = None
        if is_sharded(self.policy):
            weights = {name: ppo_checkpoint.whole(p) for name, p in self.policy.state_dict().items()}
        if self.accelerator.is_main_process:
            self.policy.save_pretrained(save_directory, weights=weights, **options)
            self.tokenizer.save_pretrained(save_directory)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Upload what `save_pretrained` writes. UserError, one line, without a hub. Every process calls it."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if self.accelerator.is_main_process:
                upload(folder, repo_id, **options)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Save everything needed to resume the run exactly, see `ppo_checkpoint`. Every process calls it."""
        state = {
            "kl_coef": self.kl_ctl.value,
            "running": vars(self.running),
            "dataloader": None if self.dataloader is None else self.dataloader.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else ppo_checkpoint.plain(self.lr_scheduler.state_dict()),
        }
        kept = ppo_checkpoint.save(
            os.fspath(path), self.current_step, self.policy, self._raw_optimizer, state, self.accelerator
        )
        self._checkpoint = str(kept)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Resume from the newest checkpoint in `path`, in a trainer built like the one that saved it.

        `current_step` is the number of finished steps; `dataloader` first yields the rest of the interrupted epoch.
        """
        state = ppo_checkpoint.load(os.fspath(path), self.policy, self._raw_optimizer, self.accelerator)
        self.current_step, self.kl_ctl.value, self._checkpoint = state["step"], state["kl_coef"], str(path)
        vars(self.running).update(state["running"])
        if self.dataloader is not None and state["dataloader"] is not None:
            self.dataloader.load_state_dict(state["dataloader"])
        if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    @property
    def _raw_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        if is_sharded(model):  # by the user's own fully_shard
            return model, optimizer
        model.short_names = False
        try:
            return self.accelerator.prepare(model, optimizer)
        finally:
            model.short_names = True

    def _prepare_reference(self, reference: Any) -> Any:
        reference = _with_head(reference).requires_grad_(False).eval()
        if is_sharded(reference):
            return reference
        if getattr(self.accelerator, "is_fsdp2", False):
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            reference.short_names = False
            return fsdp2_prepare_model(self.accelerator, reference)
        return reference.to(self.current_device)

    @contextmanager
    def _reference(self):
        """The reference's (callable, model with a value head inside it)."""
        if self.ref_model is not None:
            yield self.ref_model, self.accelerator.unwrap_model(self.ref_model)
            return
        with self.policy.pretrained_model.disable_adapter():
            yield self.model, self.policy

    @torch.no_grad()
    def _look(self, rollouts: ppo_batch.Rollouts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs and values of the policy, log-probs of the reference, KL penalty; each (B, T - 1), no gradient."""
        self.policy.eval()
        exact = self.config.kl_penalty == "full"
        batches = []
        for indices in torch.arange(self.config.batch_size).split(self.config.mini_batch_size):
            ids, labels = rollouts.rows(indices)
            options = {"score_labels": labels, "return_hidden": exact}
            mine = self.model(ids, **options)
            head = whole_head(self.policy) if exact else None
            with self._reference() as (wrapped, reference):
                theirs = wrapped(ids, **options)
                if head is not None:
                    at, per_token = labels != -100, exact_kl(mine.hidden, head, theirs.hidden, whole_head(reference))
                    kl = per_token.new_zeros(at.shape).masked_scatter(at, per_token)
                else:
                    kl = token_penalty(mine.log_probs, theirs.log_probs, self.config.kl_penalty)
            width = rollouts.labels.shape[1] - labels.shape[1]
            parts = (mine.log_probs, mine.values, theirs.log_probs, kl)
            batches.append([torch.nn.functional.pad(x, (0, width)) for x in parts])
        log_probs, values, theirs, kl = (torch.cat(x) for x in zip(*batches, strict=True))
        return log_probs, values, theirs, kl

    def _optimize(self, rollouts: ppo_batch.Rollouts, old: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """ppo_epochs passes of optimiser steps. Returns the means of the statistics, and the ratios of all tokens."""
        config, means, ratios = self.config, [], []
        self.policy.train(config.gradient_checkpointing or not config.disable_dropout)
        self.optimizer.zero_grad()
        for _ in range(config.ppo_epochs):
            for indices in torch.randperm(config.batch_size).split(config.backward_batch_size):
                sums, ratio = self._optimizer_step(rollouts, old, indices)
                means.append(sums)
                ratios.append(ratio)
            if config.early_stopping and means[-1][_POLICY_KL] > 1.5 * config.target_kl:
                break
        self.policy.eval()
        return np.stack(means), np.concatenate(ratios)

    def _optimizer_step(self, rollouts, old, indices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        processes = self.accelerator.num_processes
        tokens = (rollouts.labels[indices] != -100).sum().double()
        every = self.accelerator.reduce(tokens.clone(), "sum") if processes > 1 else tokens
        sums: Any = 0
        apart = []
        parts = indices.split(self.config.mini_batch_size)
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, figures, differences = self.train_minibatch(rollouts, old, part)
                count = (rollouts.labels[part] != -100).sum()
                # A mean over the mini batch's tokens, weighted so that all mini batches of all processes give one mean
                # over all tokens. Gradients are averaged over processes, hence the factor of their number.
                self.accelerator.backward(loss * (count * processes / every).to(loss.dtype))
            sums = sums + figures
            apart.append(differences.flatten())
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        limit = self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(trained, math.inf if limit is None else limit)
        if not_finite(norm, self.accelerator):
            self._stop("gradient's norm", float(norm), indices.tolist())
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums = self.accelerator.reduce(sums, "sum") if processes > 1 else sums
        ratios = torch.cat(apart).exp().cpu().numpy()
        return (sums / every).cpu().numpy(), ratios[~np.isnan(ratios)]

    def train_minibatch(
        self, rollouts: ppo_batch.Rollouts, old: dict[str, Tensor], indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of some rows, the sums of the statistics over their tokens, and log p_new - log p_old (B, T), NaN
        beside their tokens. From a GPU it reads once."""
        config = self.config
        ids, labels = rollouts.rows(indices)
        new = self.model(ids, score_labels=labels)
        mask = labels != -100
        results = {"log-probability": new.log_probs.detach(), "value": new.values.detach()}
        before = {name: x[indices, : labels.shape[1]] for name, x in old.items()}
        policy = ppo_loss(new.log_probs, before["logprobs"], before["advantages"], mask, clip_range=config.cliprange)
        value = value_loss(new.values, before["values"], before["returns"], mask, clip_range=config.cliprange_value)
        loss = policy.loss + config.vf_coef * value.loss
        sums = ppo_stats.minibatch_sums(
            policy, value, loss, new, before["logprobs"], before["advantages"], before["returns"], mask
        )
        finite = [(x.isfinite() | ~mask).all() for x in results.values()]
        ratio, scalar, *fine = torch.stack([x.double() for x in (policy.ratio, loss.detach(), *finite)]).tolist()
        if not all(fine):
            self._check_rows(results, mask, indices)
        if not ratio <= config.ratio_threshold:
            warnings.warn(
                f"a mini batch is skipped: its mean ratio {ratio:.2f} exceeds {config.ratio_threshold:g}", stacklevel=4
            )
            loss = (new.log_probs.sum() + new.values.sum()) * 0
        elif not math.isfinite(scalar):
            self._stop("loss", scalar, indices.tolist())
        return loss, sums, torch.where(mask, results["log-probability"] - before["logprobs"], math.nan)

    def _check_rows(self, tensors: dict[str, Tensor], mask: Tensor, indices: Tensor | None = None) -> None:
        """Raise UserError if values (B, T) are not finite within the mask; indices: the rows' indices, (B,)."""
        for name, x in tensors.items():
            wrong = ~x.isfinite() & mask
            if wrong.any():
                rows = wrong.any(1).nonzero().squeeze(1).cpu()
                self._stop(name, float(x[wrong][0]), (rows if indices is None else indices[rows]).tolist())

    def _stop(self, what: str, value: float, rows: list[int]) -> None:
        raise UserError(stopped(self.current_step + 1, what, value, rows, self._checkpoint))

    def _scaled(self, scores: Tensor) -> Tensor:
        config = self.config
        if config.use_score_scaling:
            self.running.update(scores)
            centre = self.running.mean if config.use_score_norm else 0.0
            scores = (scores - centre) / (self.running.std + torch.finfo(scores.dtype).eps)
        return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)

    def _gather(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Rows of all processes, in rank order; (B, T) padded to a common T."""
        if self.accelerator.num_processes == 1:
            return tensors
        gathered = {}
        for name, x in tensors.items():
            x = x.to(self.current_device)
            kind, x = x.dtype, x.to(torch.uint8) if x.dtype == torch.bool else x
            if x.ndim == 2:
                x = self.accelerator.pad_across_processes(x, dim=1)
            gathered[name] = self.accelerator.gather(x.contiguous()).to(kind)
        return gathered

    def _mine(self, rollouts: ppo_batch.Rollouts, **tensors: Tensor) -> dict[str, Tensor]:
        rows, first = self.config.batch_size, self.accelerator.process_index * self.config.batch_size
        return {name: x[first : first + rows, : rollouts.labels.shape[1]] for name, x in tensors.items()}

    def _empty_cache(self) -> None:
        if self.config.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()


_POLICY_KL = ppo_stats.MEANS.index("policy/policykl")


def _with_head(reference: Any) -> Any:
    """Wraps a causal model with a value head whose values are not used."""
    if isinstance(reference, AutoModelForCausalLMWithValueHead):
        return reference
    return AutoModelForCausalLMWithValueHead(reference)
