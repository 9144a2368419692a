//! `turret-worker synth`: bases and lenses of any size with made-up weights.
//!
//! For measuring and for trying budgets out: the files are in the ordinary Hugging Face and PEFT layouts and
//! are served like any other, but the weights are random, so the answers mean nothing. The same arguments
//! always give the same bytes. Tensors are streamed to disk; memory does not grow with the model.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};
use turret_crds::{ByteQuantity, group::Dtype};

/// What to make.
#[derive(clap::Args, Clone, Debug)]
pub struct SynthArgs {
    /// Folder to write: the base into OUT/base, each lens into OUT/lenses/NAME.
    pub out: PathBuf,
    /// Size of the base's weights, about: 64Mi, 1Gi, 18Gi. A Qwen2 architecture of fitting shape is chosen.
    #[arg(long, default_value = "1Gi", value_parser = parse_bytes)]
    pub bytes: u64,
    /// Number format of the weights: BF16, F16 or F32.
    #[arg(long, default_value = "BF16", value_parser = parse_dtype)]
    pub dtype: Dtype,
    /// A LoRA over all linear layers, as NAME:RANK. May be repeated.
    #[arg(long = "lens", value_name = "NAME:RANK", value_parser = parse_lens)]
    pub lenses: Vec<(String, u32)>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Why nothing, or not everything, was written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// No shape is that small.
    #[error("{bytes} bytes are too few for a base; the smallest is about {smallest} bytes, try --bytes 1Mi")]
    TooSmall {
        /// Asked for.
        bytes: u64,
        /// The least.
        smallest: u64,
    },
    /// The folder holds something already.
    #[error("`{0}` exists and is not empty; name another folder or remove it")]
    NotEmpty(PathBuf),
    /// Writing failed.
    #[error("failed to write `{path}`")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A Qwen2 shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    hidden: u64,
    intermediate: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    vocab: u64,
}

const HEAD_DIM: u64 = 64;

/// hidden, intermediate, heads, kv heads, vocabulary: from a toy to Qwen2.5-14B's.
const WIDTHS: [(u64, u64, u64, u64, u64); 7] = [
    (64, 256, 1, 1, 1_024),
    (128, 512, 2, 1, 2_048),
    (256, 1_024, 4, 2, 8_192),
    (512, 2_048, 8, 2, 32_768),
    (896, 4_864, 14, 2, 151_936),
    (2_048, 11_008, 32, 4, 151_936),
    (4_096, 14_336, 64, 8, 151_936),
];

impl Shape {
    /// The widest shape of at least four layers that has about `bytes` of weights of `width` bytes each.
    pub fn for_bytes(bytes: u64, width: u64) -> Result<Self, SynthError> {
        let shapes = WIDTHS.map(|(hidden, intermediate, heads, kv_heads, vocab)| Self {
            hidden,
            intermediate,
            layers: 4,
            heads,
            kv_heads,
            vocab,
        });
        let fits = |s: &&Self| s.parameters() * width <= bytes;
        let Some(shape) = shapes.iter().rev().find(fits) else {
            return Err(SynthError::TooSmall { bytes, smallest: shapes[0].parameters() * width });
        };
        let layers = (bytes - shape.outer_parameters() * width).div_ceil(shape.layer_parameters() * width);
        Ok(Self { layers, ..*shape })
    }

    fn outer_parameters(&self) -> u64 {
        self.vocab * self.hidden + self.hidden
    }

    fn layer_parameters(&self) -> u64 {
        self.layer_tensors().iter().map(|(_, shape)| shape.iter().product::<u64>()).sum()
    }

    /// Weights in all.
    pub fn parameters(&self) -> u64 {
        self.outer_parameters() + self.layers * self.layer_parameters()
    }

    /// The linear maps of a layer: module, [out, in].
    fn linears(&self) -> [(&'static str, [u64; 2]); 7] {
        let (q, kv) = (self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM);
        [
            ("self_attn.q_proj", [q, self.hidden]),
            ("self_attn.k_proj", [kv, self.hidden]),
            ("self_attn.v_proj", [kv, self.hidden]),
            ("self_attn.o_proj", [self.hidden, q]),
            ("mlp.gate_proj", [self.intermediate, self.hidden]),
            ("mlp.up_proj", [self.intermediate, self.hidden]),
            ("mlp.down_proj", [self.hidden, self.intermediate]),
        ]
    }

    fn layer_tensors(&self) -> Vec<(String, Vec<u64>)> {
        let mut tensors = Vec::new();
        for (module, shape) in self.linears() {
            tensors.push((format!("{module}.weight"), shape.to_vec()));
            if ["q_proj", "k_proj", "v_proj"].iter().any(|m| module.ends_with(m)) {
                tensors.push((format!("{module}.bias"), vec![shape[0]]));
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("{norm}.weight"), vec![self.hidden]));
        }
        tensors
    }

    fn base_tensors(&self) -> Vec<Tensor> {
        let mut tensors = vec![Tensor {
            name: "model.embed_tokens.weight".into(),
            shape: vec![self.vocab, self.hidden],
            fill: Fill::Random(0.02),
        }];
        for layer in 0..self.layers {
            for (name, shape) in self.layer_tensors() {
                let fill = if name.contains("norm") { Fill::Ones } else { Fill::Random(0.02) };
                tensors.push(Tensor { name: format!("model.layers.{layer}.{name}"), shape, fill });
            }
        }
        tensors.push(Tensor { name: "model.norm.weight".into(), shape: vec![self.hidden], fill: Fill::Ones });
        tensors
    }

    fn lens_tensors(&self, rank: u64) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        for layer in 0..self.layers {
            for (module, [out, input]) in self.linears() {
                let name =
                    |half: &str| format!("base_model.model.model.layers.{layer}.{module}.{half}.weight");
                tensors.push(Tensor {
                    name: name("lora_A"),
                    shape: vec![rank, input],
                    fill: Fill::Random(0.02),
                });
                tensors.push(Tensor {
                    name: name("lora_B"),
                    shape: vec![out, rank],
                    fill: Fill::Random(0.02),
                });
            }
        }
        tensors
    }

    fn config(&self, dtype: Dtype) -> Value {
        json!({
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab,
            "eos_token_id": EOS,
            "torch_dtype": torch_name(dtype),
        })
    }
}

#[derive(Clone, Copy)]
enum Fill {
    Ones,
    /// Uniform with this standard deviation.
    Random(f32),
}

struct Tensor {
    name: String,
    shape: Vec<u64>,
    fill: Fill,
}

/// Writes what the arguments ask for and prints what it wrote.
pub fn run(args: &SynthArgs) -> Result<(), SynthError> {
    let shape = Shape::for_bytes(args.bytes, dtype_bytes(args.dtype))?;
    let base = args.out.join("base");
    fresh_folder(&base)?;
    let written =
        write_safetensors(&base.join("model.safetensors"), &shape.base_tensors(), args.dtype, args.seed)?;
    write_json(&base.join("config.json"), &shape.config(args.dtype))?;
    write_json(&base.join("tokenizer.json"), &tokenizer(shape.vocab))?;
    write_json(&base.join("tokenizer_config.json"), &tokenizer_config())?;
    write_json(&base.join("generation_config.json"), &json!({"eos_token_id": EOS, "do_sample": false}))?;
    println!(
        "{}: {} bytes, {} layers of width {}, {} tokens",
        base.display(),
        written,
        shape.layers,
        shape.hidden,
        shape.vocab
    );
    for (index, (name, rank)) in args.lenses.iter().enumerate() {
        let folder = args.out.join("lenses").join(name);
        fresh_folder(&folder)?;
        let seed = args.seed.wrapping_add(1 + index as u64);
        let tensors = shape.lens_tensors(u64::from(*rank));
        let written =
            write_safetensors(&folder.join("adapter_model.safetensors"), &tensors, args.dtype, seed)?;
        write_json(&folder.join("adapter_config.json"), &adapter_config(*rank))?;
        println!("{}: {written} bytes, rank {rank}", folder.display());
    }
    Ok(())
}

fn fresh_folder(path: &Path) -> Result<(), SynthError> {
    let failed = |source| SynthError::Write { path: path.into(), source };
    fs::create_dir_all(path).map_err(failed)?;
    match fs::read_dir(path).map_err(failed)?.next() {
        None => Ok(()),
        Some(_) => Err(SynthError::NotEmpty(path.into())),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<(), SynthError> {
    let text = serde_json::to_vec_pretty(value).expect("made of strings and numbers");
    fs::write(path, text).map_err(|source| SynthError::Write { path: path.into(), source })
}

/// Writes a safetensors file tensor by tensor: eight bytes of header length, the header, the data
/// (<https://github.com/huggingface/safetensors#format>). Answers the bytes of data.
fn write_safetensors(path: &Path, tensors: &[Tensor], dtype: Dtype, seed: u64) -> Result<u64, SynthError> {
    let failed = |source| SynthError::Write { path: path.into(), source };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.shape.iter().product::<u64>() * dtype_bytes(dtype);
        header.insert(
            tensor.name.clone(),
            json!({"dtype": format!("{dtype:?}"), "shape": tensor.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = serde_json::to_vec(&Value::Object(header)).expect("made of strings and numbers");
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(&header).map_err(failed)?;
    for (index, tensor) in tensors.iter().enumerate() {
        write_values(&mut file, tensor, dtype, seed ^ ((index as u64) << 40)).map_err(failed)?;
    }
    file.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)?;
    Ok(offset)
}

fn write_values(out: &mut impl Write, tensor: &Tensor, dtype: Dtype, seed: u64) -> io::Result<()> {
    let count = tensor.shape.iter().product::<u64>();
    let mut buffer = Vec::with_capacity(1 << 16);
    for index in 0..count {
        let value = match tensor.fill {
            Fill::Ones => 1.0,
            Fill::Random(deviation) => uniform(seed.wrapping_add(index)) * deviation * 12f32.sqrt(),
        };
        match dtype {
            Dtype::F32 => buffer.extend_from_slice(&value.to_le_bytes()),
            Dtype::F16 => buffer.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => buffer.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
        if buffer.len() >= (1 << 16) - 8 {
            out.write_all(&buffer)?;
            buffer.clear();
        }
    }
    out.write_all(&buffer)
}

/// A number in [-0.5, 0.5), a function of `index` alone (SplitMix64).
fn uniform(index: u64) -> f32 {
    let mut z = index.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 40) as f32 / (1 << 24) as f32 - 0.5
}

const EOS: u64 = 258;
const SPECIAL: [(&str, u64); 3] = [("<|endoftext|>", 256), ("<|im_start|>", 257), ("<|im_end|>", EOS)];

/// A byte-level tokenizer without merges: the 256 bytes, three special tokens, and made-up words that
/// only appear in answers.
fn tokenizer(vocab: u64) -> Value {
    let mut entries = Map::new();
    for (id, symbol) in byte_symbols().into_iter().enumerate() {
        entries.insert(symbol.to_string(), json!(id));
    }
    for (text, id) in SPECIAL {
        entries.insert(text.into(), json!(id));
    }
    for id in EOS + 1..vocab {
        entries.insert(format!("\u{120}w{id}"), json!(id));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .map(|(text, id)| {
            json!({"id": id, "content": text, "special": true, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": entries, "merges": []},
    })
}

/// The printable stand-ins that byte-level BPE uses for the 256 bytes, in the order of the bytes
/// (`bytes_to_unicode` of GPT-2's encoder).
fn byte_symbols() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("below the surrogates")
        })
        .collect()
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32_768,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    })
}

fn adapter_config(rank: u32) -> Value {
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": false,
        "use_dora": false,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    })
}

fn dtype_bytes(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
    }
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    ByteQuantity(text.into()).bytes().map_err(|e| e.to_string())
}

fn parse_dtype(text: &str) -> Result<Dtype, String> {
    match text.to_ascii_uppercase().as_str() {
        "BF16" => Ok(Dtype::BF16),
        "F16" => Ok(Dtype::F16),
        "F32" => Ok(Dtype::F32),
        _ => Err(format!("`{text}` is none of BF16, F16, F32")),
    }
}

fn parse_lens(text: &str) -> Result<(String, u32), String> {
    let (name, rank) =
        text.split_once(':').ok_or_else(|| format!("`{text}` is not NAME:RANK, such as a:16"))?;
    let plain =
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !plain {
        return Err(format!("`{name}` is no lens name: lower-case letters, digits and `-` only"));
    }
    match rank.parse() {
        Ok(rank @ 1..=512) => Ok((name.into(), rank)),
        _ => Err(format!("`{rank}` is no rank from 1 to 512")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_about_as_large_as_asked() {
        for bytes in [1 << 20, 64 << 20, 1 << 30, 18 << 30] {
            let shape = Shape::for_bytes(bytes, 2).unwrap();
            let got = shape.parameters() * 2;
            assert!(got >= bytes && got < bytes + shape.layer_parameters() * 2, "{bytes}: {shape:?}");
        }
        assert!(matches!(Shape::for_bytes(1000, 2), Err(SynthError::TooSmall { .. })));
    }

    #[test]
    fn what_is_written_reads_as_safetensors_and_never_changes() {
        let folder = tempfile::tempdir().unwrap();
        let args = |name: &str| SynthArgs {
            out: folder.path().join(name),
            bytes: 1 << 20,
            dtype: Dtype::BF16,
            lenses: vec![("a".into(), 4)],
            seed: 7,
        };
        run(&args("one")).unwrap();
        run(&args("two")).unwrap();
        for file in ["base/model.safetensors", "lenses/a/adapter_model.safetensors"] {
            let one = fs::read(folder.path().join("one").join(file)).unwrap();
            assert_eq!(one, fs::read(folder.path().join("two").join(file)).unwrap(), "{file}");
            assert!(!safetensors::SafeTensors::deserialize(&one).unwrap().is_empty());
        }
        assert!(matches!(run(&args("one")), Err(SynthError::NotEmpty(_))), "nothing is overwritten");
    }

    #[test]
    fn lens_arguments_are_checked() {
        assert_eq!(parse_lens("a-1:16"), Ok(("a-1".into(), 16)));
        for bad in ["a", "a:", "a:0", "a:9999", ":4", "A:4", "../x:4"] {
            assert!(parse_lens(bad).is_err(), "{bad}");
        }
    }
}
