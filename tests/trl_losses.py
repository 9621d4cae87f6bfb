"""TRL's own preference losses, run for real on log-probabilities of our choosing: what ours are held against."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections import defaultdict
from types import SimpleNamespace

import torch
from tiny import tiny_causal_lm, tiny_tokenizer

ROWS = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "a dog saw", "chosen": " fox", "rejected": " the red big house and hat"},
    {"prompt": "tell me", "chosen": " yes", "rejected": " no thank you"},
]


def dpo_trainer():
    """A real DPOTrainer over two tiny models, with three preference pairs. One a session: set its options per test."""
    from accelerate import Accelerator

    trainer = _dpo_trainer()
    Accelerator(cpu=True)  # every later TrainingArguments clears the state that all Accelerators of a process share
    return trainer


@functools.cache
def _dpo_trainer():
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    tokenizer = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            model=tiny_causal_lm(tokenizer, dtype=torch.float32, seed=0),
            ref_model=tiny_causal_lm(tokenizer, dtype=torch.float32, seed=1),
            args=DPOConfig(
                tempfile.mkdtemp(),
                use_cpu=True,
                bf16=False,
                report_to=[],
                gradient_checkpointing=False,
                use_weighting=True,  # so that its head makes all statistics
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )


def dpo_batch():
    """The trainer's own collated batch: input_ids, attention_mask, completion_mask, each (6, T)."""
    trainer = dpo_trainer()
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])


def trl_dpo(loss_type, log_probs=None, mask=None, ref=None, log_sum_sq_probs=None, batch=None, **options):
    """DPOTrainer._compute_loss -> (loss, metrics).

    Either on fixed numbers: log_probs (2B, T) per token and mask (2B, T), rows [chosen; rejected], and ref = (chosen
    (B,), rejected (B,)) summed reference log-probs; or on `batch` through the trainer's two models.
    """
    trainer = dpo_trainer()
    trainer.loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    trainer.loss_weights = options.pop("loss_weights", None) or [1.0] * len(trainer.loss_types)
    trainer.args.discopop_tau = options.pop("discopop_tau", 0.05)
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    }
    for name, value in (defaults | options).items():
        setattr(trainer, name, value)
    trainer._metrics["eval"].clear()
    trainer._metrics["train"].clear()
    trainer.model.eval()
    trainer.precompute_ref_logps = batch is None
    model = trainer.model
    if batch is None:
        zeros = torch.zeros_like(log_probs)
        fixed = SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=log_sum_sq_probs,
        )
        model = lambda **_: fixed  # noqa: E731
        wide = torch.cat((torch.zeros_like(mask[:, :1]), mask), 1).long()
        batch = {"input_ids": wide, "attention_mask": wide, "completion_mask": wide}
        batch |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    loss = trainer._compute_loss(model, batch, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}


def without_init(cls, **attributes):
    """An instance of a trainer class whose methods run but whose constructor did not."""
    trainer = cls.__new__(cls)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, is_main_process=True
    )
    for name, value in ({"accelerator": accelerator, "aux_loss_enabled": False} | attributes).items():
        setattr(trainer, name, value)
    return trainer


def trl_kto(log_probs, mask, ref, label, kl_logps, *, loss_type="kto", **options):
    """KTOTrainer._compute_loss on fixed numbers -> (loss, metrics).

    log_probs (B, T) per token, mask (B, T), ref (B,) sums, label (B,) bool, kl_logps (policy (B, T), reference sums).
    """
    from trl import KTOTrainer

    trainer = without_init(
        KTOTrainer,
        model=SimpleNamespace(training=False),
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        loss_type=loss_type,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **({"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | options),
    )
    wide = torch.cat((torch.zeros_like(mask[:, :1]), mask), 1).long()
    zeros = torch.zeros_like(log_probs)
    answers = [SimpleNamespace(log_probs=kl_logps[0])] if trainer.calculate_KL else []
    answers += [SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)]
    batch = {"label": label, "ref_logps": ref, "ref_KL_logps": kl_logps[1]}
    for prefix in ("", "KL_"):
        batch |= {prefix + name: wide for name in ("input_ids", "attention_mask", "completion_mask")}
    loss = trainer._compute_loss(lambda **_: answers.pop(0), batch, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}


def trl_cpo(chosen, rejected, **options):
    """CPOTrainer.cpo_loss -> losses, chosen rewards, rejected rewards, each (B,)."""
    return _cpo_trainer(**options).cpo_loss(chosen, rejected)


def trl_cpo_on(model, batch, **options):
    """CPOTrainer.get_batch_loss_metrics -> (loss, metrics)."""
    return _cpo_trainer(**options).get_batch_loss_metrics(model, batch, "train")


def _cpo_trainer(**options):
    from trl.experimental.cpo import CPOTrainer

    defaults = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0}
    more = {"cpo_alpha": 1.0, "is_encoder_decoder": False, "pad_token_id": 0}
    return without_init(CPOTrainer, **(defaults | more | options))


def trl_orpo(chosen, rejected, beta=0.1):
    """ORPOTrainer.odds_ratio_loss -> beta · log sigmoid (to be subtracted), rewards, rewards, two means."""
    return _orpo_trainer(beta).odds_ratio_loss(chosen, rejected)


def trl_orpo_on(model, batch, beta=0.1):
    """ORPOTrainer.get_batch_loss_metrics -> (loss, metrics)."""
    return _orpo_trainer(beta).get_batch_loss_metrics(model, batch, "train")


def _orpo_trainer(beta):
    from trl.experimental.orpo import ORPOTrainer

    return without_init(ORPOTrainer, beta=beta, is_encoder_decoder=False, padding_value=0)


def as_chosen_rejected(batch):
    """DPO's collated batch in the form that CPOTrainer and ORPOTrainer read: labels unshifted, -100 on prompts."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    half = len(labels) // 2
    out = {}
    for name, rows in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
        out[f"{name}_input_ids"] = batch["input_ids"][rows]
        out[f"{name}_attention_mask"] = batch["attention_mask"][rows]
        out[f"{name}_labels"] = labels[rows]
    return out
