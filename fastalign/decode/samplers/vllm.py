"""Candidates from vLLM, in this process: `vllm.LLM.generate`.

Read against vLLM's sources of 2026 (0.26: `SamplingParams`, `RequestOutput`, `CompletionOutput`, `Logprob`,
`ParentRequest`, `VLLM_MAX_N_SEQUENCES`). What matters there: a request of n candidates is n requests with seed, seed
+ 1, ..., which share the prompt through the prefix cache; log-probs are the model's before temperature and truncation
unless logprobs_mode is "processed_logprobs", and ours are those of the distribution that was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.quiet import one_line_errors
from fastalign.data.text import cut
from fastalign.decode.samplers.base import Request
from fastalign.decode.samplers.external import Answer, External, request_seed, split

PER_REQUEST = 256  # larger n has hung (vLLM issue 6646); a cached prompt costs a second request little


class VLLMSampler(External):
    """A vllm.LLM as a Sampler; batch_size: candidates handed to vLLM at once, the most that an interrupt can lose.

    Your own LLM should have enable_prefix_caching=True and logprobs_mode="processed_logprobs".
    """

    rows_at_once = 8192

    def __init__(self, llm: Any, *, name: str = "vllm"):
        super().__init__(name, llm.get_tokenizer(), llm.llm_engine.model_config.max_model_len)
        self.llm = llm

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, dtype: Any = "auto", device: Any = "auto", backend: str = "vllm", **engine: Any
    ) -> VLLMSampler:
        """Start vLLM with a hub name or folder; engine: further arguments of vllm.LLM (tensor_parallel_size ...)."""
        if device != "auto":
            raise UserError(f"device must be 'auto' with vLLM, which takes the devices that it sees, got {device!r}")
        try:
            import vllm
        except ImportError as error:
            raise UserError(f"vLLM cannot be imported ({error}): pip install 'fastalign[vllm]'") from None
        from fastalign.models.loading import resolve

        options = {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs", **engine}
        with one_line_errors(name_or_path):
            llm = vllm.LLM(model=resolve(name_or_path), dtype=str(dtype).removeprefix("torch."), **options)
        return cls(llm, name=f"vllm:{name_or_path}")

    def answers(
        self, request: Request, wanted: Sequence[int], count: int, done: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        width = max(1, request.rows // count)
        for start in range(0, len(wanted), width):
            batch = wanted[start : start + width]
            prompts = [(request.places[i], request.encoded[i]) for i in batch]
            for i, drawn in zip(batch, self._generate(prompts, count, request.settings), strict=True):
                done(count)
                yield i, drawn

    def _generate(self, batch, count, settings):
        """(text, token ids, log-probs) [prompt][candidate] for pairs (index, prompt's token ids)."""
        import vllm

        limit = min(PER_REQUEST, getattr(vllm.envs, "VLLM_MAX_N_SEQUENCES", PER_REQUEST))
        requests, params = [], []
        for place, tokens in batch:
            for first, some in split(count, limit):
                requests.append({"prompt_token_ids": tokens})
                params.append(
                    vllm.SamplingParams(
                        n=some,
                        max_tokens=settings.max_new_tokens,
                        temperature=settings.temperature,
                        top_k=settings.top_k or -1,
                        top_p=settings.top_p,
                        min_p=settings.min_p,
                        stop=settings.stop or None,
                        seed=request_seed(settings.seed, place, settings.first + first),
                        logprobs=0,  # the drawn token's alone
                        **({"skip_special_tokens": False} if self.text.sees_special(settings.stop) else {}),
                    )
                )
        try:
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        except ValueError as error:
            raise UserError(f"{self.name}: {' '.join(str(error).split())}") from None
        flat = [
            self._read(request["prompt_token_ids"], one, settings)
            for request, output in zip(requests, outputs, strict=False)  # their number is checked below
            for one in sorted(output.outputs, key=lambda o: o.index)
        ]
        if len(flat) != count * len(batch):
            raise UserError(f"{self.name}: vLLM gave {len(flat)} candidates, {count * len(batch)} were requested")
        return [flat[i : i + count] for i in range(0, len(flat), count)]

    def _read(self, prompt, output, settings):
        tokens = [int(token) for token in output.token_ids]
        logprobs = [float(step[token].logprob) for step, token in zip(output.logprobs, tokens, strict=True)]
        if any(math.isnan(value) for value in logprobs):
            raise UserError(f"{self.name}: vLLM gave a log-prob that is NaN")
        if self.text.sees_special(settings.stop):
            return self.text.continuation(prompt, tokens, settings.stop), tokens, logprobs
        return cut(output.text, settings.stop), tokens, logprobs
