"""GRPOTrainer: group-relative policy optimisation (arXiv 2402.03300), with the arguments, options and logs of TRL's.

Completions come from the shared-prompt engine. A step trains on packed groups: a prompt is run once for its
completions, forward and backward, and only completion tokens reach the fused head. Rewards stay a vector up to the
advantage (`losses.group_advantages`). All batches that a step accumulates are trained on together, in parts of bounded
size whose gradients add up to the step's.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from trl.models.utils import prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback

from fastalign._base.errors import UserError
from fastalign.decode.sampler import Sampler
from fastalign.losses import group_advantages, grpo_loss
from fastalign.models.identity import language_model, reads_tokens
from fastalign.models.trial import one_truth
from fastalign.train import checks, grpo_checkpoint, grpo_checks
from fastalign.train import grpo_rollout as rollout
from fastalign.train.dropout import disable_dropout
from fastalign.train.grpo_checkpoint import Finished
from fastalign.train.grpo_config import GRPOConfig
from fastalign.train.grpo_data import PromptSampler, PromptStream, Repeats, is_stream
from fastalign.train.grpo_logs import Logs
from fastalign.train.grpo_options import advantage_of, check_args, sampling_settings
from fastalign.train.grpo_prompts import Prompts, with_prompts
from fastalign.train.grpo_rewards import RewardFunctions, check_columns
from fastalign.train.grpo_rollout import Batch, Drawn, Rollout
from fastalign.train.in_parts import TrainsInParts
from fastalign.train.parts import row_batch
from fastalign.train.passes import reference_adapter, unchanged
from fastalign.train.sharded import inside, is_sharded, reshard, whole_layers
from fastalign.train.trained_model import check_tokenizer, load, load_options, load_tokenizer, with_adapters

__all__ = ["GRPOConfig", "GRPOTrainer"]

TOKEN_TOTAL = ("dapo", "cispo", "vespo")  # loss types divided by the tokens of the whole batch


class Scale(NamedTuple):
    """How the loss of a part adds to the step's: times its share of the `rows`, or divided by `normalizer` tokens."""

    rows: int
    normalizer: float | None
    entropy_coef: float = 0.0  # per token


class GRPOTrainer(TrainsInParts, transformers.Trainer):  # type: ignore[misc]
    """GRPO with TRL 1.16's constructor, config names and logs (and `tokenizer=` for `processing_class=`), on one
    reward or several.

    model: a causal language model, with or without PEFT adapters, or a hub name, folder, GGUF file or alias. Data: a
        column "prompt", of text or messages; other columns are given to the reward functions.
    reward_funcs: one or several of: a function of TRL's signature (see `train.grpo_rewards`), the name of one of
        fastalign's rewards, a `rewards.Reward`, a sequence classifier, its folder or hub name.
    rollout_func: prompts, trainer -> {"prompt_ids", "completion_ids", "logprobs", ...}, in place of the engine.

    An option that is not supported is refused by name. The loss of one step equals TRL's on the same completions. If a
    reward function raises, the last finished step is saved as a checkpoint first, and resuming gives the losses of an
    uninterrupted run.

    Raises:
        UserError: options, data and rewards that break these rules, prompts that leave no room for a completion, scores
            that are not finite numbers, before an update; a NaN or infinite loss or gradient, before the step.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: transformers.BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[[list, Any], dict[str, Any]] | None = None,
        environment_factory: Any = None,
        *,
        tokenizer: Any = None,
    ):
        processing_class = checks.one_tokenizer(processing_class, tokenizer)
        for name, given in (("tools", tools), ("environment_factory", environment_factory)):
            if given:
                raise UserError(f"{name} is not supported by fastalign's GRPOTrainer; TRL's own takes it")
        grpo_checks.arguments(model, args, callbacks, optimizers, quantization_config, peft_config, rollout_func)
        if args is None:
            name = model if isinstance(model, str | os.PathLike) else getattr(model.config, "_name_or_path", "")
            args = GRPOConfig(f"{Path(name).name or 'model'}-GRPO")
        args = copy.copy(args)  # the caller's config is unchanged
        check_args(args)
        train_dataset = with_prompts("train_dataset", train_dataset, args)
        eval_dataset = None if eval_dataset is None else with_prompts("eval_dataset", eval_dataset, args)

        set_seed(args.seed)  # adapters start at random
        if isinstance(model, str | os.PathLike):
            model, processing_class = load(model, processing_class, args, quantization_config)
        elif processing_class is None:
            processing_class = load_tokenizer(model.config._name_or_path, args)
        check_tokenizer(processing_class)
        checks.vocabularies(model, None, processing_class)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # before the model is sharded
        model = with_adapters(model, peft_config, args, reference=args.beta != 0)
        inner = language_model(model)
        if not (verdict := reads_tokens(model)):
            raise UserError(f"model cannot be trained here: {verdict.why}; TRL's own GRPOTrainer takes it")
        if getattr(inner.config.get_text_config(), "output_router_logits", False) and args.router_aux_loss_coef != 0:
            raise UserError("router_aux_loss_coef must be 0: the auxiliary loss of experts is not supported")

        self.how: str = advantage_of(args)
        self.rewards: RewardFunctions = RewardFunctions(
            reward_funcs, reward_processing_classes, load_options(args), args.device
        )
        self.reward_func_names: list[str] = self.rewards.names
        weights = [1.0] * len(self.rewards.names) if args.reward_weights is None else list(args.reward_weights)
        if len(weights) != len(self.rewards.names):
            rule = f"reward_weights must have one number per reward, {len(self.rewards.names)}"
            raise UserError(f"{rule}, got {len(weights)}")
        self.reward_weights: Tensor = torch.tensor(weights, dtype=torch.float64)
        self.rollout_func = rollout_func
        self.num_generations: int = args.num_generations
        self.num_generations_eval: int = args.num_generations_eval or args.num_generations
        self.max_completion_length: int = args.max_completion_length
        self.temperature: float = args.temperature
        self.beta: float = args.beta

        if args.disable_dropout:
            disable_dropout(model)
        if args.sync_ref_model and hasattr(model, "peft_config"):
            raise UserError("sync_ref_model must be False for a model with adapters: its reference is the model itself")
        own = self.beta != 0 and not hasattr(model, "peft_config")  # else none, or the policy less its adapters
        reference = copy.deepcopy(model) if own else None
        with one_truth():
            self._packs = self._prepare(model, getattr(args, "share_prompt", True))
            if rollout_func is None and inner.device.type == args.device.type:
                Sampler(model, processing_class).path()  # refuses, before training, a model that cannot be drawn from
        if reference is not None:
            self._prepare(reference, self._packs)
        if is_stream(train_dataset) or is_stream(eval_dataset):
            args.accelerator_config = copy.copy(args.accelerator_config)
            args.accelerator_config.dispatch_batches = False  # each process takes its slice of the stream
            args.dataloader_num_workers = 0  # each would read the whole stream
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise UserError("one process must use one GPU: start several by torchrun, or set CUDA_VISIBLE_DEVICES")
        self.ref_model: Any = None if reference is None else self._prepare_reference(reference)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        self.sampler: Sampler = Sampler(model, processing_class)
        self._ends = {*self.sampler.ends, processing_class.pad_token_id}
        self._vocabulary: int = vocabulary
        self._prompts: Prompts = Prompts(
            processing_class,
            args.chat_template_kwargs or {},
            sampling_settings(args, 1, 0).max_new_tokens,
            self.sampler.context,
            drawn=rollout_func is None,
        )
        self._prompts.check("train_dataset", train_dataset)
        self._prompts.check("eval_dataset", eval_dataset)
        self._logs: Logs = Logs(self.rewards.names, self.reward_weights, self.args.log_completions)
        self._step = 0  # batches trained on
        self._generation: Batch | None = None
        self._finished: Finished = Finished()
        self._seconds = 0.0  # of the present step

    def _prepare_reference(self, reference: Any) -> Any:
        reference.requires_grad_(False).eval()
        if getattr(self.accelerator, "is_fsdp2", False):
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            # Layer by layer, with the weights that the main process loaded.
            return fsdp2_prepare_model(self.accelerator, reference)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: list[str] | None = ["prompt"]

    def get_train_dataloader(self) -> Any:
        args, dataset = self.args, self.train_dataset
        if is_stream(dataset):
            dataset = PromptStream(dataset, self._repeats(), args.seed if args.shuffle_dataset else None)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _repeats(self) -> Repeats:
        args = self.args
        prompts = args.generation_batch_size // args.num_generations
        return Repeats(prompts, args.num_generations, args.num_iterations * args.steps_per_generation)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return PromptSampler(
            "train_dataset",
            len(dataset),
            self._repeats(),
            seed=self.args.seed,
            shuffle=self.args.shuffle_dataset,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler:
        repeats = Repeats(1, self.num_generations_eval)
        return PromptSampler("eval_dataset", len(eval_dataset), repeats, seed=self.args.seed, whole=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if is_stream(data):
            self.accelerator.dataloader_config.dispatch_batches = False
            eval_dataset = PromptStream(data, Repeats(1, self.num_generations_eval), self.args.seed)
        # Its own counts prompts, not their completions, and leaves some of the last batch out of the mean loss.
        self.gather_function = self.accelerator.gather
        return super().get_eval_dataloader(eval_dataset)

    # Rollouts

    def _batch(self, rows: list[dict[str, Any]]) -> Batch:
        """The next batch to train on; completions are drawn when the last ones have been used num_iterations times."""
        args, size = self.args, self._train_batch_size
        if self._generation is None or self._step % (args.steps_per_generation * args.num_iterations) == 0:
            self._generation = self._generate(rows)
        k = self._step % args.steps_per_generation
        self._step += 1
        return Batch(self._generation.rollouts[k * size : (k + 1) * size], self._generation.tokens)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """call(), of users' functions; if one raises, on any process, the last finished step is saved first."""
        result = error = None
        try:
            result = call()
        except Exception as raised:
            error = raised
        failed = [i for i, message in enumerate(gather_object([error and str(error)])) if message is not None]
        if not failed:
            return result
        state = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / "trainer_state.json"
        saved = any(gather_object([state.is_file()]))
        if self.is_in_train and self.state.global_step > 0 and not saved:
            self.state.num_input_tokens_seen = self._finished.seen
            self._logs.rewind()
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)
        if error is None:
            raise UserError(f"process {failed[0]} could not draw or score its completions: see its error")
        raise error

    def _generate(self, rows: list[dict[str, Any]]) -> Batch:
        """Completions of these rows, which repeat a prompt for each, with rewards, advantages and log-probabilities."""
        mode, prompts = self._mode, [row.get("prompt") for row in rows]
        drawn, texts, rewards = self._guarded(lambda: self._draw_and_score(rows, prompts))
        everywhere = torch.tensor(gather_object(rewards.tolist()), dtype=torch.float64)  # of all processes
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        if len(everywhere) % generations:
            rule = f"a batch must be a multiple of num_generations_eval = {generations} completions over all processes"
            raise UserError(f"{rule}, got {len(everywhere)}: set per_device_eval_batch_size")
        ended = [ids[-1] in self._ends for ids in drawn.completion_ids]
        counts = drawn.counts
        if self.args.mask_truncated_completions:
            counts = [row if whole else [0] * len(row) for row, whole in zip(counts, ended, strict=True)]
        rollouts = [
            Rollout(*one, drawn=None if drawn.log_probs is None else [_number(x) for x in drawn.log_probs[i]])
            for i, one in enumerate(zip(drawn.prompt_ids, drawn.completion_ids, counts, strict=True))
        ]
        self._look(rollouts, mode)
        log_ratios = None
        if getattr(self.args, "kl_in_reward", False):
            own = [sum(one.old or ()) - sum(one.ref or ()) for one in rollouts]
            log_ratios = torch.tensor(gather_object(own), dtype=torch.float64).view(-1, generations)
        grouped = everywhere.view(-1, generations, len(self.rewards.names))
        advantages = self._advantages(gather_object(prompts)[::generations], grouped, log_ratios)
        first = self.accelerator.process_index * len(rows)
        for one, advantage in zip(rollouts, advantages.flatten()[first : first + len(rows)].tolist(), strict=True):
            one.advantage = advantage
        lengths = [(len(ids), sum(row)) for ids, row in zip(drawn.prompt_ids, drawn.counts, strict=True)]
        seen = self._logs.lengths(mode, lengths, ended, self.state.num_input_tokens_seen)
        self.state.num_input_tokens_seen = seen
        self._logs.rewards(mode, everywhere, advantages)
        if self.args.log_completions:
            self._logs.texts(prompts, texts, everywhere, advantages)
        tokens = sum(gather_object([sum(one.tokens for one in rollouts)]))
        return Batch(rollouts, tokens)

    def _advantages(self, prompts: list[Any], rewards: Tensor, log_ratios: Tensor | None) -> Tensor:
        """(B, G) from B prompts and rewards (B, G, m), of all processes; log_ratios (B, G): of each completion's
        probabilities under the policy and the reference, where the KL is part of the reward."""
        weights = self.reward_weights
        if log_ratios is not None:
            rewards = torch.cat((rewards, log_ratios[..., None]), 2)
            weights = torch.cat((weights, torch.tensor([-self.beta], dtype=weights.dtype)))
        return group_advantages(rewards, weights=weights, how=self.how)

    def _draw(self, prompts: list[Any]) -> Drawn:
        if self.rollout_func is not None:
            return rollout.by_function(self.rollout_func, copy.deepcopy(prompts), self, self._vocabulary)
        groups = [(prompt, len(list(group))) for prompt, group in itertools.groupby(prompts)]
        # Before a sharded model runs, which needs all processes.
        encoded = self._guarded(lambda: self._prompts.encode([prompt for prompt, _ in groups]))
        prompt_ids = [ids for ids, (_, size) in zip(encoded, groups, strict=True) for _ in range(size)]
        self.sampler.model = model = self.accelerator.unwrap_model(self.model)
        training, process = model.training, self.accelerator.process_index
        draws = self._step // (self.args.steps_per_generation * self.args.num_iterations)
        if not training:  # the same whenever these prompts are evaluated
            draws = 2**32 + zlib.crc32(repr(prompt_ids).encode())

        def draw() -> Drawn:
            with whole_layers(model) if is_sharded(model) else nullcontext():
                return rollout.draw(self.sampler, prompt_ids, self.args, draws, process)

        try:
            return inside(self.model, model, draw)
        finally:
            model.train(training)

    def _draw_and_score(self, rows: list[dict[str, Any]], prompts: list[Any]) -> tuple[Drawn, list[Any], Tensor]:
        """Completions, their texts (or messages), and rewards (n, m)."""
        check_columns("the data", rows[0])  # a stream's columns are known only now
        drawn = self._draw(prompts)
        texts = self.processing_class.batch_decode(drawn.completion_ids, skip_special_tokens=True)
        if not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        given = ("prompt", "completion", "completion_ids")
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in given}
        for name, value in drawn.extra.items():
            columns[name] = value if isinstance(value, list) and len(value) == len(rows) else [value] * len(rows)
        logs = {"log_extra": self._logs.log_extra, "log_metric": self._logs.log_metric}
        scores = self.rewards(prompts, texts, drawn.completion_ids, trainer_state=self.state, **logs, **columns)
        return drawn, texts, scores

    def _look(self, rollouts: list[Rollout], mode: str) -> None:
        """Log-probabilities before the step, where the loss needs them: of the policy, of the reference."""
        args = self.args
        corrects = getattr(args, "importance_correction", False) and self.rollout_func is not None
        # A step on completions of its own weights has ratios of 1.
        later = mode == "train" and args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations)
        if later or corrects or getattr(args, "kl_in_reward", False):
            settings = sampling_settings(args, 1, 0)
            if self.rollout_func is None and not settings.truncates and settings.temperature == self.temperature:
                for one in rollouts:
                    one.old = one.drawn
            else:
                self._fill("old", rollouts, self.model)
        if corrects:
            rollout.importance_weights(rollouts, args)
            self._logs.sampling(mode, rollouts, args.vllm_importance_sampling_mode.partition("_")[0])
        if self.beta != 0:
            with reference_adapter(self):
                self._fill("ref", rollouts, self.ref_model or self.model)
            if self.ref_model is not None:
                reshard(self.ref_model)  # as `sync_ref_model` and checkpoints find its weights

    def _fill(self, field: str, rollouts: list[Rollout], model: Any) -> None:
        made = []
        with unchanged(self, model):
            for part in self._parts([rollouts])[0]:
                batch = row_batch(part, self.accelerator.device, pack=self._packs)
                made.append((part, model(rows=batch, temperature=self.temperature)["log_probs"]))
        for part, scored in made:  # when a GPU has all of them to do
            for one, scores in zip(part, rollout.lists_of(scored, part), strict=True):
                setattr(one, field, scores)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        self._step, self._generation, self._finished, self._seconds = 0, None, Finished(), 0.0
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        began = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._seconds += time.perf_counter() - began
        if not self._window:  # the step is done
            self._logs.metrics["train"]["step_time"].append(self._seconds)
            self._logs.mark()
            self._seconds = 0.0
        return loss

    def _train_on(self, model: Any, window: list[Batch]) -> Tensor:
        args = self.args
        loss = self._backward(model, *self._buckets(window, len(window), len(window) / args.steps_per_generation))
        self._logs.step("train", loss, args.entropy_coef)
        cycle = args.steps_per_generation * args.num_iterations
        generation = self._generation if self._step % cycle else None
        self._finished = Finished(self._step, generation, self.state.num_input_tokens_seen)
        return loss

    def _buckets(
        self, window: list[Batch], batches: int, generations: float
    ) -> tuple[list[list[Rollout]], list[Scale]]:
        """The rollouts of a step that have one scale, which parts may mix: all, unless the loss is over each batch's
        own tokens."""
        args, rows = self.args, sum(len(batch) for batch, _ in window)
        if args.loss_type == "bnpo" or args.entropy_coef or len({tokens for _, tokens in window}) > 1:
            merged = window
        else:
            merged = [Batch([one for batch, _ in window for one in batch], window[0].tokens)]
        scales = []
        for batch, tokens in merged:
            own = max(sum(one.tokens for one in batch), 1) * batches
            normalizer = None
            if args.loss_type == "bnpo":
                normalizer = own
            elif args.loss_type in TOKEN_TOTAL:
                normalizer = max(tokens, 1) / self.accelerator.num_processes * generations
            scales.append(Scale(rows, normalizer, args.entropy_coef / own))
        return [batch for batch, _ in merged], scales

    def _loss(self, model: Any, part: list[Rollout], scale: Scale) -> Tensor:
        args, device = self.args, self.accelerator.device
        batch = row_batch(part, device, pack=self._packs)
        scored = model(rows=batch, outputs=("log_probs", "entropy"), temperature=self.temperature)
        log_probs, entropy, mask = scored["log_probs"], scored["entropy"], batch.labels[:, 1:] != -100
        old, ref, weight = (rollout.beside(part, name, device) for name in ("old", "ref", "weight"))
        advantages = torch.tensor([one.advantage for one in part], dtype=log_probs.dtype)
        advantages = advantages.to(device, non_blocking=True)
        if args.off_policy_mask_threshold is not None:
            drawn = None if self.rollout_func is None else rollout.beside(part, "drawn", device)
            before = next((x for x in (drawn, old) if x is not None), log_probs.detach())
            kept = rollout.on_policy(log_probs.detach(), before, mask, args.off_policy_mask_threshold)
            advantages = torch.where((advantages >= 0) | kept, advantages, 0)
        share = len(part) / scale.rows if scale.normalizer is None else 1.0
        coef = scale.entropy_coef * len(batch.scored)
        kind = "dapo" if args.loss_type == "bnpo" else args.loss_type
        loss = grpo_loss(
            log_probs,
            old,
            advantages if weight is None else advantages[:, None] * weight,
            mask,
            loss_type=kind,
            importance=args.importance_sampling_level,
            clip_range=args.epsilon,
            clip_range_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            dual_clip=args.delta,
            ref_logprobs=ref,
            kl_coef=0.0 if getattr(args, "kl_in_reward", False) else self.beta,
            kl_bias_correction=args.use_bias_correction_kl and self.beta != 0,
            entropy=entropy,
            entropy_coef=coef / share,
            normalizer=scale.normalizer,
            max_length=self.max_completion_length if kind == "dr_grpo" else None,
            sapo_temperatures=(args.sapo_temperature_pos, args.sapo_temperature_neg),
            vespo_positive=(args.vespo_k_pos, args.vespo_lambda_pos),
            vespo_negative=(args.vespo_k_neg, args.vespo_lambda_neg),
        )
        level = args.importance_sampling_level
        self._logs.part(loss, args.loss_type, level, len(batch.scored), len(part), coef)
        return loss.loss * share

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of completions drawn for a batch of evaluation prompts; their rewards are logged."""
        generation = self._generate(inputs)
        total = self._evaluated(model, *self._buckets([generation], 1, 1.0))
        self._logs.step("eval", total, self.args.entropy_coef)
        return total, None, None

    # Logs and checkpoints

    @property
    def _metrics(self) -> dict[str, dict[str, list[float]]]:  # TRL's name
        return self._logs.metrics

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update(self._logs.means(self._mode))  # in place: `evaluate` returns them
        super().log(logs, start_time)
        if self.args.log_completions and self.is_world_process_zero():
            self._logs.write(self.args.output_dir, self.state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        process = self.accelerator.process_index
        grpo_checkpoint.save(folder, process, self._finished)
        if self.args.sync_ref_model and (process == 0 or is_sharded(self.ref_model)):
            grpo_checkpoint.save_reference(folder, process, self.accelerator.unwrap_model(self.ref_model))
        super()._save_checkpoint(model, trial)  # trainer_state.json comes last: the checkpoint is complete

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder, process, seen = Path(checkpoint), self.accelerator.process_index, self.state.num_input_tokens_seen
        saved = grpo_checkpoint.load(folder, process, seen)
        rows = self._train_batch_size * self.args.steps_per_generation
        fits = saved is not None and (saved.generation is None or len(saved.generation.rollouts) == rows)
        everywhere = all(gather_object([fits]))
        if saved is None or not everywhere:  # a checkpoint of TRL's trainer, or of another number of processes
            saved = Finished(self.state.global_step * self.args.gradient_accumulation_steps, seen=seen)
        self._finished, self._step, self._generation = saved, saved.step, saved.generation
        if self.args.sync_ref_model:
            part = process if is_sharded(self.ref_model) else 0
            if not grpo_checkpoint.load_reference(folder, part, self.accelerator.unwrap_model(self.ref_model)):
                warnings.warn(f"{folder} has no reference: sync_ref_model starts from the model given", stacklevel=2)


def _number(x: Any) -> float:
    """A sampler's log-probability; None, where a server gives none, is NaN."""
    return math.nan if x is None else float(x)
