"""Writes a Qwen2 folder's weights as GGUF, as they are or as other numbers: gguf_of.py FOLDER FILE BF16|F16|Q8_0"""
import json
import sys
from pathlib import Path

import gguf
import numpy as np

folder, to, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = json.loads((folder / "config.json").read_text())
vocab = json.loads((folder / "tokenizer.json").read_text())
with open(folder / "model.safetensors", "rb") as file:
    header_bytes = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_bytes))
data = np.memmap(folder / "model.safetensors", dtype=np.uint8, mode="r", offset=8 + header_bytes)

writer = gguf.GGUFWriter(to, "qwen2")
writer.add_name("synth")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_rope_freq_base(config["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
if kind == "Q8_0":
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

tokens = [None] * config["vocab_size"]
for text, index in vocab["model"]["vocab"].items():
    tokens[index] = text
kinds = [gguf.TokenType.NORMAL] * len(tokens)
for added in vocab["added_tokens"]:
    kinds[added["id"]] = gguf.TokenType.CONTROL
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types(kinds)
# The reader wants at least one merge; the synthetic tokenizer has none, and no text is tokenized here.
writer.add_token_merges(["a b"])
writer.add_eos_token_id(config["eos_token_id"])

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
for name, tensor in header.items():
    if name == "__metadata__":
        continue
    module, end = name.rsplit(".", 1)
    if module == "model.embed_tokens":
        new = "token_embd"
    elif module == "model.norm":
        new = "output_norm"
    else:
        _, _, layer, module = module.split(".", 3)
        new = f"blk.{layer}.{NAMES[module]}"
    first, last = tensor["data_offsets"]
    assert tensor["dtype"] == "BF16", f"{name} is {tensor['dtype']}"
    numbers = data[first:last].view(np.uint16).reshape(tensor["shape"])
    wide = lambda: (numbers.astype(np.uint32) << 16).view(np.float32)
    new = f"{new}.{end}"
    if len(tensor["shape"]) == 1:
        writer.add_tensor(new, wide())
    elif kind == "BF16":
        bytes_of = numbers.view(np.uint8).reshape(tensor["shape"][0], -1)
        writer.add_tensor(new, bytes_of, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        # llama.cpp quantizes an embedding that is the head too, like everything else.
        quantization = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(new, gguf.quantize(wide(), quantization), raw_dtype=quantization)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
