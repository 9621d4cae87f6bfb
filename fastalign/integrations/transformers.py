"""fastalign in a transformers script: loading a causal language model, the fused head on its hidden states, and faster
products for its linear layers."""

from fastalign.models.head import Head, head_of
from fastalign.models.linear_layers import SpedUp, speed_up
from fastalign.models.loading import load_causal_lm, resolve
from fastalign.models.scoring import fused_forward

__all__ = ["Head", "SpedUp", "fused_forward", "head_of", "load_causal_lm", "resolve", "speed_up"]
