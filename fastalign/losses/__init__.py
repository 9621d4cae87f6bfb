"""Losses: as functions of log-probabilities, and as modules that take hidden states and an lm_head's weight."""

from fastalign.losses.advantages import group_advantages
from fastalign.losses.linear import (
    LinearCPOLoss,
    LinearDPOLoss,
    LinearKTOLoss,
    LinearORPOLoss,
    LinearSimPOLoss,
    shift_labels,
)
from fastalign.losses.linear_policy import LinearGRPOLoss, LinearPPOLoss
from fastalign.losses.policy import (
    PolicyLoss,
    ValueLoss,
    grpo_loss,
    kl_penalty,
    ppo_loss,
    rloo_loss,
    value_loss,
    whiten,
)
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
from fastalign.losses.reward import (
    BradleyTerryScores,
    bradley_terry_loss,
    bradley_terry_scores,
    plackett_luce_loss,
)

__all__ = [
    "BradleyTerryScores",
    "KTOLoss",
    "LinearCPOLoss",
    "LinearDPOLoss",
    "LinearGRPOLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearPPOLoss",
    "LinearSimPOLoss",
    "OddsRatioLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "ValueLoss",
    "bradley_terry_loss",
    "bradley_terry_scores",
    "cpo_loss",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "kto_kl",
    "kto_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "rloo_loss",
    "sequence_logps",
    "shift_labels",
    "simpo_loss",
    "value_loss",
    "whiten",
    "wpo_weights",
]
