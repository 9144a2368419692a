"""transformers and PEFT on torch, bf16: torch_run.py BASE LENS,LENS… ROWS TOKENS CONTEXT PROMPT THREADS"""
import json
import sys
import time

import peft
import torch
import transformers

base, lenses = sys.argv[1], [lens for lens in sys.argv[2].split(",") if lens]
rows, (steps, context, prompt, threads) = [int(n) for n in sys.argv[3].split(",")], map(int, sys.argv[4:8])
torch.set_num_threads(threads)
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
vocab = model.config.vocab_size


def tokens(row, count):
    return [(i * 7919 + row * 104729 + 17) % vocab for i in range(count)]


@torch.inference_mode()
def prefill():
    start = time.perf_counter()
    out = model(torch.tensor([tokens(0, prompt)]), use_cache=True, logits_to_keep=1)
    out.logits.argmax(-1)
    return time.perf_counter() - start


@torch.inference_mode()
def step_seconds(count):
    out = model(torch.tensor([tokens(row, context) for row in range(count)]), use_cache=True, logits_to_keep=1)
    def step(out):
        now = out.logits[:, -1].argmax(-1, keepdim=True)
        return model(now, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    out = step(out)
    start = time.perf_counter()
    for _ in range(steps):
        out = step(out)
    return (time.perf_counter() - start) / steps


prefill()
measures = {f"decode {n}": step_seconds(n) for n in rows}
measures["prefill"] = prefill()
if len(lenses) > 1:
    model = peft.PeftModel.from_pretrained(model, lenses[0], adapter_name="a")
    start = time.perf_counter()
    model.load_adapter(lenses[1], adapter_name="b")
    measures["load_adapter"] = time.perf_counter() - start
    times = []
    for name in ["a", "b"] * 5:
        start = time.perf_counter()
        model.set_adapter(name)
        times.append(time.perf_counter() - start)
    measures["set_adapter"] = sorted(times)[len(times) // 2]
    measures["decode 1 with a lens"] = step_seconds(1)
    measures["prefill with a lens"] = prefill()
cpu = torch.backends.cpu.get_cpu_capability()
info = f"torch {torch.__version__} {cpu}, transformers {transformers.__version__}, peft {peft.__version__}"
print(json.dumps({"info": info, "measures": measures}))
