"""RewardTrainer: TRL's RewardTrainer with the Bradley–Terry loss of `losses.reward`, for any number of values on one
backbone.

Its models work with `rewards.from_pairwise` (one head) and `rewards.from_heads` (several): the model's configuration
records the values and the text format, so that scoring reads the same texts as training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
import trl
from torch import Tensor
from trl.trainer.reward_trainer import DataCollatorForPreference

from fastalign._base.errors import UserError
from fastalign._base.numbers import number
from fastalign.losses import bradley_terry_loss
from fastalign.rewards.classifier import NOTE
from fastalign.train import checks
from fastalign.train.finite import StopsAtNaN

if TYPE_CHECKING:
    from fastalign.report.reward import RewardReport


@dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's RewardConfig, and:

    values: the names of the heads, one output of the model each. None: one head, "pairwise".
    With several values, each row names its value in a column "value", or has one column per value: above 0 if chosen is
    better, below 0 if rejected is, 0 or empty if the pair says nothing about it.
    """

    values: list[str] | None = field(default=None, metadata={"help": "Names of the heads, one output each."})


@dataclass
class RewardCollator(DataCollatorForPreference):
    """TRL's collator, plus the column "preference" as a (B, m) tensor: above 0, below 0 or 0 for each pair and
    value."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "preference" in examples[0]:
            batch["preference"] = torch.tensor([example["preference"] for example in examples], dtype=torch.float32)
        return batch


TOKENIZED = ("chosen_ids", "chosen_input_ids")  # TRL's columns, new and old, for tokenized text


class RewardTrainer(StopsAtNaN, trl.RewardTrainer):
    """TRL 1.16's RewardTrainer, with the same arguments (and `tokenizer=` for `processing_class=`), for one or several
    values.

    model: a sequence classifier with one output per value, or the hub name, folder, GGUF file or alias of any language
        model, which gets a new head.
    Data: columns chosen, rejected, and usually prompt, of text or messages; optionally "margin", the desired difference
    of a pair (arXiv 2307.09288); see RewardConfig.values for several values. The loss is the mean of -log
    sigmoid(better - worse - margin) over all pairs and values in the batch for which there is a preference.

    `evaluate` returns eval_accuracy, eval_margin and eval_calibration_error (see `report.reward.Head`), exact over all
    pairs; with several values each also as "<metric>/<value>". `report` adds a reliability table, and writes pages and
    figures.

    Raises:
        UserError: missing columns, empty completions, values that do not occur in the data, no pair within max_length.
    """

    compute_metrics: Any

    def __init__(
        self,
        model: Any,
        args: trl.RewardConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[transformers.EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: transformers.BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
    ):
        processing_class = checks.one_tokenizer(processing_class, tokenizer)
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = RewardConfig(f"{name.rstrip('/').rpartition('/')[2] or 'model'}-Reward")
        train_dataset = checks.pairs("train_dataset", train_dataset, tokenized=TOKENIZED)
        eval_dataset = checks.pairs("eval_dataset", eval_dataset, tokenized=TOKENIZED)
        self.values: list[str] = _names(getattr(args, "values", None))
        if isinstance(model, str):
            model, processing_class = _load(model, processing_class, args, len(self.values), quantization_config)
            quantization_config = None
        _check_model(model, processing_class, self.values)
        self._text = None
        with _accepted(model, args):
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
                optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, peft_config,
            )  # fmt: skip
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator: Any = RewardCollator(**vars(self.data_collator))
        self.label_names: list[str] = ["preference"]
        self._own_metrics, self.compute_metrics = self.compute_metrics, self._measure
        self._note()

    def _note(self) -> None:
        """Stores what scoring needs in the configuration that is saved with the weights."""
        config = self.accelerator.unwrap_model(self.model).config
        config.id2label = dict(enumerate(self.values))
        config.label2id = {name: i for i, name in enumerate(self.values)}
        setattr(config, NOTE, {"values": self.values, **({"text": self._text} if self._text else {})})

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = getattr(dataset, "column_names", None) or list(next(iter(dataset), {}))
        if not set(TOKENIZED) & set(columns) and self._text is None:
            messages = isinstance(next(iter(dataset))["chosen"], list)
            if messages and processing_class.chat_template is None and args.chat_template_path is None:
                raise UserError(
                    f"{dataset_name}: messages need a tokenizer with a chat template, and this one has none"
                )
            if not messages and processing_class.eos_token is None:
                raise UserError(
                    f"{dataset_name}: plain text needs a tokenizer with an eos token, and this one has none"
                )
            self._text = "chat" if messages else "plain"
        if "preference" not in columns and (len(self.values) > 1 or "value" in columns):
            preferences = _Preferences(self.values, columns, dataset_name)
            dataset = dataset.map(preferences, with_indices=True)
        if "margin" in columns:
            dataset = dataset.map(_Margins(dataset_name), with_indices=True)
        before = getattr(dataset, "num_rows", None)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        after = getattr(prepared, "num_rows", None)
        if after == 0:
            raise UserError(f"{dataset_name}: no pair fits in max_length {args.max_length} tokens, of {before}")
        if after is not None and before != after:
            lost = f"{before - after} of {before} pairs are longer than max_length {args.max_length} tokens"
            warnings.warn(f"{dataset_name}: {lost} and were left out", stacklevel=3)
        return prepared

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "preference" not in self._signature_columns:
            self._signature_columns += ["preference"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        chosen, rejected = outputs.logits.chunk(2)  # (B, m) each
        preference = inputs.get("preference")
        loss = pair_loss(
            chosen, rejected, preference, inputs.get("margin"), self.args.center_rewards_coefficient or 0.0
        )
        preference = torch.ones_like(chosen) if preference is None else preference
        with torch.no_grad():
            self._log_batch(outputs.logits, chosen, rejected, preference, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _log_batch(self, scores, chosen, rejected, preference, mask) -> None:
        """From a GPU it reads once."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        every = self.accelerator.gather(scores.detach().float())
        parts = [torch.stack([every.min(), every.mean(), every.max()])]
        if mode == "train":
            apart = (chosen - rejected).float() * preference.sign()
            said = preference != 0
            sums = torch.stack([((apart > 0) & said).sum(0), apart.sum(0), said.sum(0)])
            parts += [
                self.accelerator.gather_for_metrics(mask.sum()).sum()[None],
                self.accelerator.reduce(sums).ravel(),
            ]
        rewards, tokens, counts = torch.cat([x.double() for x in parts]).cpu().tensor_split((3, 4))
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
            right, apart, said = counts.view(3, -1)  # (m,) each
            metrics["accuracy"].append((right.sum() / said.sum().clamp(min=1)).item())
            metrics["margin"].append((apart.sum() / said.sum().clamp(min=1)).item())
            for j, name in enumerate(self.values if len(self.values) > 1 else ()):
                if said[j]:
                    metrics[f"accuracy/{name}"].append((right[j] / said[j]).item())
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, value in zip(("min", "mean", "max"), rewards.tolist(), strict=True):
            metrics[f"{name}_reward"].append(value)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The scores have shape (B, 2, m), chosen then rejected, so that a batch's first dimension is its pairs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        scores = torch.stack(outputs.logits.detach().float().chunk(2), dim=1)
        preference = inputs.get("preference")
        return loss.detach(), scores, torch.ones_like(scores[:, 0]) if preference is None else preference

    def _measure(self, prediction) -> dict[str, float]:
        heads = self._report_of(prediction.predictions, prediction.label_ids).heads
        count = max(sum(head.pairs for head in heads), 1)
        metrics: dict[str, float] = {}
        for name in ("accuracy", "margin", "calibration_error"):
            metrics[name] = sum(getattr(head, name) * head.pairs for head in heads) / count
            if len(heads) > 1:
                metrics |= {f"{name}/{head.name}": getattr(head, name) for head in heads if head.pairs}
        return {**metrics, **(self._own_metrics(prediction) if self._own_metrics else {})}

    def _report_of(self, scores, preference, settings=None, prompts=None) -> RewardReport:
        from fastalign.report import reward

        return reward.build(
            scores[:, 0], scores[:, 1], self.values, preference=preference, prompts=prompts, settings=settings
        )

    def report(self, dataset: Any = None, *, settings: dict[str, Any] | None = None) -> RewardReport:
        """Evaluates the model on a dataset of pairs (default: eval_dataset): accuracy, calibration, histograms.

        settings: rows for the report's table. `.to_json()` has the numbers, `.write("x.html")` the page.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None or isinstance(dataset, dict):
            raise UserError(f"report needs one dataset of pairs, got {type(dataset).__name__}")
        dataset = checks.pairs("dataset", dataset, tokenized=TOKENIZED)
        predicted = self.predict(self._prepare_dataset(dataset, self.processing_class, self.args, "report"))
        prompts = None
        if "prompt" in dataset.column_names and len(dataset) == len(predicted.predictions):
            prompts = [repr(prompt) for prompt in dataset["prompt"]]
        return self._report_of(predicted.predictions, predicted.label_ids, settings, prompts)


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor | None = None,
    margin: Tensor | None = None,
    center_coefficient: float = 0.0,
) -> Tensor:
    """`bradley_terry_loss` over all preferences of B pairs in m values.

    chosen, rejected: (B, m) scores. preference: (B, m), its sign says which is better; 0: no preference. None: the
    chosen one everywhere. margin: (B,), the same for every value of a pair.
    """
    if margin is not None:
        margin = margin[:, None].expand_as(chosen)
    if preference is not None:
        said, up = preference != 0, preference > 0
        chosen, rejected = torch.where(up, chosen, rejected)[said], torch.where(up, rejected, chosen)[said]
        margin = None if margin is None else margin[said]
    return bradley_terry_loss(chosen, rejected, margin=margin, center_coefficient=center_coefficient)


class _Preferences:
    """A row's "preference" (m floats), from its column "value" or from its columns named like the values."""

    def __init__(self, values: Sequence[str], columns: Sequence[str], dataset_name: str):
        self.values, self.dataset_name = list(values), dataset_name
        self.tagged = "value" in columns
        missing = [name for name in values if name not in columns]
        if not self.tagged and missing:
            rule = f"{dataset_name} must have a column 'value', or one for each of {', '.join(values)}"
            raise UserError(f"{rule}, lacks {', '.join(missing)}: {list(columns)}")

    def __call__(self, row: dict[str, Any], i: int) -> dict[str, list[float]]:
        if self.tagged:
            if row["value"] not in self.values:
                rule = f"value must be one of {', '.join(self.values)}"
                raise UserError(f"{self.dataset_name} row {i}: {rule}, got {row['value']!r}")
            return {"preference": [float(name == row["value"]) for name in self.values]}
        return {"preference": [self._sign(row, i, name) for name in self.values]}

    def _sign(self, row: dict[str, Any], i: int, name: str) -> float:
        said = row[name]
        try:
            sign = 0.0 if said is None or said == "" else float(said)
        except (TypeError, ValueError):
            sign = math.nan
        if not math.isfinite(sign):
            rule = f"{name} must be a number, above 0 where chosen is better and below where rejected is"
            raise UserError(f"{self.dataset_name} row {i}: {rule}, got {said!r}")
        return float((sign > 0) - (sign < 0))


class _Margins:
    """A missing margin is 0."""

    def __init__(self, dataset_name: str):
        self.dataset_name = dataset_name

    def __call__(self, row: dict[str, Any], i: int) -> dict[str, float]:
        return {"margin": number(f"{self.dataset_name} row {i}: margin", row["margin"], missing=0.0)}


def _names(values: Sequence[str] | None) -> list[str]:
    names = ["pairwise"] if values is None else list(values)
    if isinstance(values, str) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise UserError(f"values must be a list of names, one at least, got {values!r}")
    if len(set(names)) < len(names):
        raise UserError(f"values must be different names, got {', '.join(names)}")
    return names


def _load(name: str, tokenizer, args, outputs: int, quantization_config):
    """A sequence classifier with `outputs` outputs on the named language model, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl.trainer.reward_trainer import suppress_seqcls_warning
    from trl.trainer.utils import create_model_from_path

    from fastalign._base.quiet import one_line_errors, quiet_unless_terminal
    from fastalign.models.loading import resolve

    folder = resolve(name)
    options = {"use_safetensors": True, "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    options["num_labels"] = outputs
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    set_seed(args.seed)  # the new head is random
    with quiet_unless_terminal(), one_line_errors(name):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, revision=options.get("revision"), trust_remote_code=args.trust_remote_code
            )
        with suppress_seqcls_warning():
            return create_model_from_path(folder, AutoModelForSequenceClassification, **options), tokenizer


def _check_model(model, tokenizer, values: Sequence[str]) -> None:
    outputs = getattr(model.config, "num_labels", None)
    if outputs != len(values):
        raise UserError(f"model must have one output per value, {len(values)} ({', '.join(values)}), got {outputs}")
    checks.vocabularies(model, None, tokenizer)
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError("tokenizer must have a pad token or an eos token, got neither")


@contextmanager
def _accepted(model, args):
    """TRL's constructor takes one output only, and warns of settings for a model that it did not load itself."""
    labels, settings = model.config.id2label, args.model_init_kwargs
    model.config.num_labels, args.model_init_kwargs = 1, None
    try:
        yield
    finally:
        model.config.id2label, args.model_init_kwargs = labels, settings
        model.config.label2id = {name: i for i, name in labels.items()}
