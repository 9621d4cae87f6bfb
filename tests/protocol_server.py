"""A small local server that speaks OpenAI's completions protocol over a tiny random model, as vLLM's server does.

Candidate j of a request is drawn with the request's seed + j, by plain forwards and torch.Generator. `style`: "vllm"
answers with token ids beside OpenAI's log-probs, "llama.cpp" with rows that carry both, "bare" with texts alone.
"""

from __future__ import annotations

import threading

import torch
from loopback import LoopbackServer
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@torch.inference_mode()
def draw(model, tokenizer, prompt, *, seeds, max_tokens, temperature, top_k, top_p, min_p, stop):
    """[(text, token ids, log-probs as drawn, why it ended)] of one candidate per seed, after the token ids `prompt`."""
    wants = (
        (temperature not in (0, 1), TemperatureLogitsWarper, float(temperature)),
        (top_k > 0, TopKLogitsWarper, top_k),
        (top_p < 1, TopPLogitsWarper, top_p),
        (min_p > 0, MinPLogitsWarper, min_p),
    )
    warpers = [warper(value) for wanted, warper, value in wants if wanted]
    result = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        ids, logprobs, reason = [], [], "length"
        while len(ids) < max_tokens:
            scores = model(torch.tensor([prompt + ids])).logits[:, -1].double()
            for warper in warpers:
                scores = warper(None, scores)
            scores = scores.log_softmax(-1)[0]
            token = int(
                scores.argmax() if temperature == 0 else torch.multinomial(scores.exp(), 1, generator=generator)
            )
            ids.append(token)
            logprobs.append(float(scores[token]))
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if token == tokenizer.eos_token_id or any(end in text for end in stop):
                reason = "stop"
                break
        text = tokenizer.decode(ids, skip_special_tokens=True)
        result.append(
            (text[: min([text.find(end) for end in stop if end in text], default=len(text))], ids, logprobs, reason)
        )
    return result


class ProtocolServer(LoopbackServer):
    """Serves model at `url` inside a with block."""

    def __init__(self, model, tokenizer, *, style="vllm", names=("tiny",)):
        super().__init__(names)
        self.model, self.tokenizer, self.style = model, tokenizer, style
        self._compute = threading.Lock()

    def complete(self, path, body):
        chat = path.endswith("/chat/completions")
        if chat:
            text = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            prompt = body["prompt"] if isinstance(body["prompt"], list) else self.tokenizer(body["prompt"])["input_ids"]
        with self._compute:
            drawn = draw(
                self.model,
                self.tokenizer,
                prompt,
                seeds=range(body["seed"], body["seed"] + body["n"]),
                **{name: body[name] for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p")},
                stop=body.get("stop", []),
            )
        choices = []
        for index, (text, ids, logprobs, reason) in enumerate(drawn):
            words = self.tokenizer.convert_ids_to_tokens(ids)
            rows = [{"id": i, "token": w, "logprob": v} for i, w, v in zip(ids, words, logprobs, strict=True)]
            choice = {"index": index, "finish_reason": reason}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if self.style == "llama.cpp":
                choice["logprobs"] = {"content": rows}
            elif self.style == "vllm":
                plain = {"tokens": words, "token_logprobs": logprobs, "top_logprobs": [{}] * len(ids)}
                content = [{name: row[name] for name in ("token", "logprob")} for row in rows]
                choice |= {"logprobs": {"content": content} if chat else plain, "token_ids": ids}
            choices.append(choice)
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}  # in no order, as legal
