"""A Trainer that trains on all batches of a step together, in parts of bounded size whose gradients add up to the
step's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastalign.models.identity import language_model
from fastalign.models.packing import enable
from fastalign.models.trial import name_of, warn_once
from fastalign.train.finite import not_finite, stop
from fastalign.train.parts import C, parts
from fastalign.train.rows import CPU_TOKENS, add_row_forward
from fastalign.train.sharded import is_sharded

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class TrainsInParts(_Trainer):
    """A base to place before a transformers Trainer, for completions of prompts (`train.parts`) on the fused head.

    A subclass has `_batch(inputs)`, what to keep of a batch until the step, `_train_on(model, batches)`, the step's
    gradient and loss, and `_loss(model, part, scale)`, a part's share of it. It stops at a NaN or infinite loss or
    gradient, before a weight changes.
    """

    _packs: bool  # whether rows run packed
    _window: list[Any]  # since the last step

    def _prepare(self, model: Any, share_prompt: bool) -> bool:
        """Let the model score rows; returns whether it runs packed."""
        packs = share_prompt
        if packs and not (verdict := enable(model)):
            packs = False
            warn_once(model, f"{name_of(model)} is trained on padded rows, not on packed ones: {verdict.why}")
        add_row_forward(language_model(model))
        return packs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._window = []
        return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The gradient of all batches of a step is computed with its last one."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._window.append(self._batch(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.accelerator.device)
        window, self._window = self._window, []
        return self._train_on(model, window)

    def _batch(self, inputs: Any) -> Any:
        raise NotImplementedError

    def _train_on(self, model: Any, window: list[Any]) -> Tensor:
        raise NotImplementedError

    def _loss(self, model: Any, part: list[Any], scale: Any) -> Tensor:
        raise NotImplementedError

    def _backward(self, model: Any, buckets: Sequence[list[C]], scales: Sequence[Any]) -> Tensor:
        """The sum of the losses of all buckets, each with its scale; their gradients are added to the parameters'."""
        jobs = list(self._jobs(buckets, scales))
        total = torch.zeros((), device=self.accelerator.device)
        for i, (part, scale) in enumerate(jobs):
            with nullcontext() if i == len(jobs) - 1 else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self._loss(model, part, scale)
                self.accelerator.backward(loss)
            total += loss.detach()
        if not math.isfinite(value := sum(gather_object([total.item()]))):
            stop(self, "loss", value, [])
        return total

    def _evaluated(self, model: Any, buckets: Sequence[list[C]], scales: Sequence[Any]) -> Tensor:
        """The same without gradients."""
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for part, scale in self._jobs(buckets, scales):
                total += self._loss(model, part, scale)
        return total

    def _jobs(self, buckets: Sequence[list[C]], scales: Sequence[Any]) -> Iterator[tuple[list[C], Any]]:
        for bucket, scale in zip(self._parts(buckets), scales, strict=True):
            for part in bucket:
                yield part, scale

    def _parts(self, buckets: Sequence[list[C]]) -> list[list[list[C]]]:
        """Each bucket in parts; a sharded model must run equally often on every process."""
        limit = getattr(self.args, "max_packed_tokens", None)
        if limit is None and self.accelerator.device.type == "cpu":
            limit = CPU_TOKENS
        elif limit is None:
            longest = max(len(one.prompt) + len(one.completion) for bucket in buckets for one in bucket)
            limit = longest * self._train_batch_size
        least = [1] * len(buckets)
        if is_sharded(self.model):
            own = [len(parts(bucket, limit, share=self._packs)) for bucket in buckets]
            least = [max(counts) for counts in zip(*gather_object([own]), strict=True)]
        return [parts(bucket, limit, share=self._packs, at_least=n) for bucket, n in zip(buckets, least, strict=True)]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not_finite(norm, self.accelerator):
            stop(self, "gradient's norm", float(norm), [])
        return norm

    @property
    def _total_train_tokens(self) -> int:  # TRL's name
        return int(self.state.num_input_tokens_seen)
