"""Losses: as functions of log-probabilities, and as modules that take hidden states and an lm_head's weight."""

from fastalign.losses.preference import (
    KTOLoss,
    OddsRatioLoss,
    PreferenceLoss,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    sequence_logps,
    simpo_loss,
    wpo_weights,
)

__all__ = [
    "KTOLoss",
    "OddsRatioLoss",
    "PreferenceLoss",
    "cpo_loss",
    "dpo_loss",
    "kto_kl",
    "kto_loss",
    "orpo_loss",
    "sequence_logps",
    "simpo_loss",
    "wpo_weights",
]
