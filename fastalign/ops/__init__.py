"""The ops: one file each, compiled on the CPU, differentiable where that means something."""

from fastalign.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "token_logprobs"]
