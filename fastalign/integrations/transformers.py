"""fastalign in a transformers script: loading a causal language model, and the fused head on its hidden states."""

from fastalign.models.head import Head, head_of
from fastalign.models.loading import load_causal_lm, resolve
from fastalign.models.scoring import fused_forward

__all__ = ["Head", "fused_forward", "head_of", "load_causal_lm", "resolve"]
