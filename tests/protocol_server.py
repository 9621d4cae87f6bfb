"""A small local server that speaks OpenAI's completions protocol over a tiny random model, as vLLM's server does.

Candidate j of a request is drawn with the request's seed + j, by plain forwards and torch.Generator. `style`: "vllm"
answers with token ids beside OpenAI's log-probs, "llama.cpp" with rows that carry both, "bare" with texts alone.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
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


class ProtocolServer:
    """Serves model at `url` inside a with block. seen: (path, headers, body) of every POST; most: requests at once.

    faults: what the next requests meet, one each: a status, a (status, headers, bytes) triple or "drop".
    answer: None, or a function of the true answer that gives another (or bytes).
    """

    def __init__(self, model, tokenizer, *, style="vllm", names=("tiny",)):
        self.model, self.tokenizer, self.style, self.names = model, tokenizer, style, names
        self.seen, self.faults, self.answer, self.most, self._now = [], [], None, 0, 0
        self._lock, self._compute = threading.Lock(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.reply(200, {}, {"object": "list", "data": [{"id": name} for name in outer.names]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.seen.append((self.path, dict(self.headers), body))
                    reply = outer.faults.pop(0) if outer.faults else None
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    if reply is None:
                        answer = outer.complete(self.path, body)
                        reply = 200, {}, outer.answer(answer) if outer.answer else answer
                finally:  # before the client has the answer, after which it may ask again
                    with outer._lock:
                        outer._now -= 1
                if reply == "drop":
                    self.connection.close()
                else:
                    self.reply(*(reply if isinstance(reply, tuple) else (reply, {}, {"error": {"message": "busy"}})))

            def reply(self, status, headers, value):
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

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
