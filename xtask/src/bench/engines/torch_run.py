"""transformers and PEFT on torch"""
import copy
import time

import peft
import torch
import transformers

torch.set_num_threads(asked["threads"])
transformers.logging.set_verbosity_error()
rows, steps, context, prompt = asked["rows"], asked["steps"], asked["context"], asked["prompt"]
dtype = getattr(torch, asked["dtype"])


def load():
    return transformers.AutoModelForCausalLM.from_pretrained(asked["base"], dtype=dtype).eval()


model = load()
assert model.config.vocab_size == asked["vocabulary"]


@torch.inference_mode()
def prefill(model, count):
    start = time.perf_counter()
    out = model(torch.tensor([[token(i) for i in range(count)]]), use_cache=True, logits_to_keep=1)
    out.logits.argmax(-1)
    return time.perf_counter() - start


@torch.inference_mode()
def prompt_of(model):
    return model(torch.tensor([[token(i) for i in range(context)]]), use_cache=True, logits_to_keep=1)


prompts = {}


@torch.inference_mode()
def step_seconds(model, count):
    if model not in prompts:
        prompts[model] = prompt_of(model)
    prefix = prompts[model]
    # All rows have the same prompt; its keys and values are copied.
    cache = copy.deepcopy(prefix.past_key_values)
    cache.batch_repeat_interleave(count)
    now = prefix.logits[:, -1].argmax(-1, keepdim=True).repeat(count, 1)

    def step(now):
        out = model(now, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    now = step(now)
    start, taken = time.perf_counter(), 0
    # Where a step is slow, few of them say as much.
    while taken < steps and (taken < 2 or time.perf_counter() - start < 3):
        now = step(now)
        taken += 1
    return (time.perf_counter() - start) / taken


# Without bf16 in the processor a step takes seconds; then only what is compared is worth them.
native = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
rows = rows if native else rows[:1]
takes = {f"decode, {rows_text(n)}": (lambda n=n: step_seconds(model, n)) for n in rows}
takes[f"prefill, {prompt} tokens"] = lambda: prefill(model, prompt)
if asked["lenses"]:
    # PEFT puts its layers into the model it is given, so the base's own takes have another one.
    adapted = peft.PeftModel.from_pretrained(load(), asked["lenses"][0], adapter_name="a")
    adapted.load_adapter(asked["lenses"][1], adapter_name="b")

    def load_adapter():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            adapted.load_adapter(asked["lenses"][-1], adapter_name="c")
            times.append(time.perf_counter() - start)
            adapted.delete_adapter("c")
        return sorted(times)[1]

    def set_adapter():
        times = []
        for name in ["a", "b"] * 5:
            start = time.perf_counter()
            adapted.set_adapter(name)
            times.append(time.perf_counter() - start)
        return sorted(times)[5]

    if native:
        takes["decode, 1 row with a lens"] = lambda: step_seconds(adapted, 1)
    takes["load_adapter"] = load_adapter
    takes["set_adapter"] = set_adapter
prefill(model, 2)
versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
beside = "" if native else ", without bf16 instructions here"
serve(f"{versions}; {asked['dtype']}, {torch.backends.cpu.get_cpu_capability()}{beside}", takes)
