"""llama.cpp on the same weights, by its own batches"""
import ctypes
import time

import llama_cpp as ll
import numpy as np

# A callback that the garbage collector takes is a crash.
quiet = ll.llama_log_callback(lambda level, text, data: None)
ll.llama_log_set(quiet, None)
ll.llama_backend_init()
model = ll.llama_model_load_from_file(asked["gguf"].encode(), ll.llama_model_default_params())
assert model, f"llama.cpp does not load {asked['gguf']}"
vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
assert vocabulary == asked["vocabulary"], f"llama.cpp sees {vocabulary} tokens"
rows, steps, context, prompt = asked["rows"], asked["steps"], asked["context"], asked["prompt"]


def context_of(sequences, tokens):
    params = ll.llama_context_default_params()
    params.n_ctx = sequences * tokens
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = asked["threads"]
    # A cache for each sequence, so that none looks through the others' tokens.
    params.kv_unified = False
    ctx = ll.llama_init_from_model(model, params)
    assert ctx, "llama.cpp makes no context"
    return ctx


batch = ll.llama_batch_init(512, 0, 1)


def decode(ctx, entries):
    """(token, position, sequence, wants logits)"""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = wanted
    code = ll.llama_decode(ctx, batch)
    assert code == 0, f"llama_decode answers {code}"


def greedy(ctx, index):
    logits = ctypes.cast(ll.llama_get_logits_ith(ctx, index), ctypes.POINTER(ctypes.c_float))
    return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())


# A whole number of 256, as the cache is padded to.
contexts = {count: context_of(count, -(-(context + steps + 1) // 256) * 256) for count in rows}
long = context_of(1, -(-prompt // 256) * 256)


def prefill(count):
    ll.llama_memory_clear(ll.llama_get_memory(long), True)
    start = time.perf_counter()
    for first in range(0, count, 512):
        last = min(first + 512, count)
        decode(long, [(token(i), i, 0, i == count - 1) for i in range(first, last)])
    greedy(long, batch.n_tokens - 1)
    return time.perf_counter() - start


def step_seconds(count):
    ctx = contexts[count]
    memory = ll.llama_get_memory(ctx)
    ll.llama_memory_clear(memory, True)
    decode(ctx, [(token(i), i, 0, i == context - 1) for i in range(context)])
    now = [greedy(ctx, context - 1)] * count
    # The others have the same prompt; its keys and values are copied.
    for row in range(1, count):
        ll.llama_memory_seq_cp(memory, 0, row, -1, -1)

    def step(position):
        decode(ctx, [(now[row], position, row, 1) for row in range(count)])
        for row in range(count):
            now[row] = greedy(ctx, row)

    step(context)
    start = time.perf_counter()
    for i in range(steps):
        step(context + 1 + i)
    return (time.perf_counter() - start) / steps


prefill(16)
takes = {f"decode, {rows_text(n)}": (lambda n=n: step_seconds(n)) for n in rows}
takes[f"prefill, {prompt} tokens"] = lambda: prefill(prompt)
serve(f"llama-cpp-python {ll.__version__}: {ll.llama_print_system_info().decode()}", takes)
