"""The ops: one file each, compiled on the CPU, with gradients where they are defined."""

from fastalign.ops.gae import gae
from fastalign.ops.linear_sample_tokens import linear_sample_tokens
from fastalign.ops.linear_token_logprobs import linear_token_logprobs
from fastalign.ops.linear_token_logratios import linear_token_logratios
from fastalign.ops.map_statistics import MapStatistics, map_statistics
from fastalign.ops.preference import PairLosses, pairwise_loss
from fastalign.ops.resample import resample
from fastalign.ops.sample_tokens import SampledTokens, sample_tokens
from fastalign.ops.token_logprobs import TokenLogprobs, token_logprobs
from fastalign.ops.token_logratios import token_logratios
from fastalign.ops.vocab_parallel import vocab_parallel_linear_token_logprobs, vocab_parallel_token_logprobs

__all__ = [
    "MapStatistics",
    "PairLosses",
    "SampledTokens",
    "TokenLogprobs",
    "gae",
    "linear_sample_tokens",
    "linear_token_logprobs",
    "linear_token_logratios",
    "map_statistics",
    "pairwise_loss",
    "resample",
    "sample_tokens",
    "token_logprobs",
    "token_logratios",
    "vocab_parallel_linear_token_logprobs",
    "vocab_parallel_token_logprobs",
]
