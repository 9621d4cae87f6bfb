"""The job of the other engines' processes: drawing n continuations of every prompt, given as token ids, to their full
length, in float32, at temperature 1 and without truncation."""

import os


def job(engine: str, model: str, prompts: list, n: int, new: int, threads: int):
    os.environ["OMP_NUM_THREADS"] = str(threads)
    draw = {"openvino": openvino, "ctranslate2": ctranslate2}[engine](model, n, threads)
    draw(prompts[:1], 1)  # memory and threads

    def run() -> None:
        texts = draw(prompts, new)
        assert [len(ids) for ids in texts] == [new] * (n * len(prompts)), [len(ids) for ids in texts]

    return run


def openvino(model, n, threads):
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 4  # GB
    scheduler.max_num_seqs = n
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {}, options)
    config = openvino_genai.GenerationConfig()
    config.do_sample, config.temperature, config.top_p = True, 1.0, 1.0
    config.num_return_sequences, config.ignore_eos = n, True

    def draw(prompts, new):
        config.max_new_tokens = new
        inputs = [Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [ids for result in results for ids in result.m_generation_ids]

    return draw


def ctranslate2(model, n, threads):
    import json
    from pathlib import Path

    import ctranslate2

    generator = ctranslate2.Generator(
        model, device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
    )
    tokens = json.loads((Path(model) / "vocabulary.json").read_text())

    def draw(prompts, new):
        results = generator.generate_batch(
            [[tokens[i] for i in ids] for ids in prompts],
            num_hypotheses=n,
            beam_size=1,
            sampling_topk=0,
            sampling_temperature=1.0,
            min_length=new,
            max_length=new,
            include_prompt_in_result=False,
        )
        return [ids for result in results for ids in result.sequences_ids]

    return draw
