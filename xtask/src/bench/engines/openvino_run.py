"""openvino-genai on the same weights, one row"""
import time

import numpy as np
import openvino
import openvino_genai

steps, context, prompt = asked["steps"], asked["context"], asked["prompt"]
pipeline = openvino_genai.LLMPipeline(asked["gguf"], "CPU", INFERENCE_NUM_THREADS=asked["threads"])


prompts = 0


def generate(count, new):
    """Seconds in all, and per token after the first; of another prompt every time."""
    global prompts
    prompts += 1
    ids = np.array([[token(i, prompts) for i in range(count)]], dtype=np.int64)
    config = openvino_genai.GenerationConfig(max_new_tokens=new, do_sample=False, ignore_eos=True)
    start = time.perf_counter()
    metrics = pipeline.generate(openvino.Tensor(ids), config).perf_metrics
    seconds = time.perf_counter() - start
    return seconds, metrics.get_tpot().mean / 1e3


generate(16, 2)
serve(
    f"openvino-genai {openvino_genai.__version__}",
    {
        "decode, 1 row": lambda: generate(context, 1 + steps)[1],
        f"prefill, {prompt} tokens": lambda: generate(prompt, 1)[0],
    },
)
