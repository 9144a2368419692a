"""llama.cpp on the same weights, by its own batches: llama_cpp_run.py GGUF ROWS TOKENS CONTEXT PROMPT THREADS"""
import ctypes
import json
import sys
import time

import llama_cpp as ll
import numpy as np

path, rows = sys.argv[1], [int(n) for n in sys.argv[2].split(",")]
steps, context, prompt, threads = map(int, sys.argv[3:7])
quiet = ll.llama_log_callback(lambda level, text, data: None)
ll.llama_log_set(quiet, None)
ll.llama_backend_init()
model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
assert model, f"llama.cpp does not load {path}"
vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
params = ll.llama_context_default_params()
most = max(rows)
params.n_ctx = max((context + steps + 16) * most, prompt + 16)
params.n_batch = params.n_ubatch = 512
params.n_seq_max = most
params.n_threads = params.n_threads_batch = threads
# One cache for all sequences, and attention by its fused kernel where it has one.
params.kv_unified = True
ctx = ll.llama_init_from_model(model, params)
assert ctx, "llama.cpp makes no context"
batch = ll.llama_batch_init(512, 0, 1)


def decode(entries):
    """(token, position, sequence, wants logits)"""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = wanted
    assert ll.llama_decode(ctx, batch) == 0, "llama_decode failed"


def greedy(index):
    logits = np.ctypeslib.as_array(ctypes.cast(ll.llama_get_logits_ith(ctx, index), ctypes.POINTER(ctypes.c_float)), (vocab,))
    return int(logits.argmax())


def token(i, row):
    return (i * 7919 + row * 104729 + 17) % vocab


def clear():
    ll.llama_memory_clear(ll.llama_get_memory(ctx), True)


def prefill():
    clear()
    start = time.perf_counter()
    for first in range(0, prompt, 512):
        last = min(first + 512, prompt)
        decode([(token(i, 0), i, 0, i == prompt - 1) for i in range(first, last)])
    greedy(batch.n_tokens - 1)
    return time.perf_counter() - start


def step_seconds(count):
    clear()
    now = []
    for row in range(count):
        decode([(token(i, row), i, row, i == context - 1) for i in range(context)])
        now.append(greedy(context - 1))
    def step(position):
        decode([(now[row], position, row, 1) for row in range(count)])
        for row in range(count):
            now[row] = greedy(row)
    step(context)
    start = time.perf_counter()
    for i in range(steps):
        step(context + 1 + i)
    return (time.perf_counter() - start) / steps


prefill()
measures = {f"decode {n}": step_seconds(n) for n in rows}
measures["prefill"] = prefill()
print(json.dumps({"info": ll.llama_print_system_info().decode(), "measures": measures}))
