"""openvino-genai on the same weights, one row: openvino_run.py GGUF TOKENS CONTEXT PROMPT THREADS"""
import json
import sys
import time

import numpy as np
import openvino
import openvino_genai

path, (steps, context, prompt, threads) = sys.argv[1], map(int, sys.argv[2:6])
pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
VOCABULARY = 151936


def generate(count, new):
    ids = np.array([[(i * 7919 + 17) % VOCABULARY for i in range(count)]], dtype=np.int64)
    config = openvino_genai.GenerationConfig(max_new_tokens=new, do_sample=False, ignore_eos=True)
    start = time.perf_counter()
    pipeline.generate(openvino.Tensor(ids), config)
    return time.perf_counter() - start


generate(prompt, 1)
measures = {"prefill": generate(prompt, 1)}
one = generate(context, 2)
measures["decode 1"] = (generate(context, 2 + steps) - one) / steps
print(json.dumps({"info": f"openvino-genai {openvino_genai.__version__}", "measures": measures}))
