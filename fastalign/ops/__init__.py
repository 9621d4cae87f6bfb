"""The ops: one file each, compiled on the CPU, differentiable where that means something."""

from fastalign.ops.token_logprobs import TokenLogprobs, token_logprobs
from fastalign.ops.token_logratios import token_logratios

__all__ = ["TokenLogprobs", "token_logprobs", "token_logratios"]
