//! The weights of a base: which tensors it has, and where each is in device memory.
//!
//! [`BaseFolder::open`] reads only headers. It maps every tensor to a place in one [`Region`], with q, k and v, and gate and
//! up, laid beside each other so that they are one matrix for the kernels. Matrices keep one dtype, or are quantized, and are
//! packed into the kernels' panels while they are read; an embedding that is not also the head is only ever looked up and
//! stays row by row, in the dtype. Vectors (norms and biases) are always f32.
//!
//! This file is what lies in memory; `folder` is how it gets there.

mod folder;

use std::sync::Arc;

pub(crate) use folder::read_json;
pub use folder::{BASE_SIDE_FILES, BaseError, BaseFolder, base_files};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use turret_kernels::number::Dtype;

use super::config::ModelConfig;
use super::lora::{Site, modules};
use crate::engine::arena::Region;
use turret_kernels::matmul::{Format, Packed, PackedShape, Weight};
use turret_kernels::ops::Table;

/// How a base's matrices are quantized, and so read faster and held in fewer bytes. Embeddings that are only looked up,
/// norms and biases are not; nor is anything that a lens brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quantization {
    /// Not at all.
    #[default]
    None,
    /// Eight bits and a scale for every thirty-two numbers; see [`turret_kernels::matmul::q8_0`].
    Q8_0,
}

/// A matrix in device memory, row-major `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// Bytes from the start of the region.
    pub offset: usize,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Kind of numbers.
    pub dtype: Dtype,
}

/// A matrix in device memory, packed for [`turret_kernels::matmul`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedMatrix {
    /// Bytes from the start of the region.
    pub offset: usize,
    /// Outputs, inputs and how numbers are kept.
    pub shape: PackedShape,
}

/// An embedding in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Embedding {
    /// A table of its own.
    Rows(Matrix),
    /// The head.
    Tied(PackedMatrix),
}

/// An f32 vector in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vector {
    /// Bytes from the start of the region.
    pub offset: usize,
    /// Numbers.
    pub len: usize,
}

/// Where the tensors of one decoder block are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Norm before attention.
    pub attention_norm: Vector,
    /// q, k and v below each other.
    pub qkv: PackedMatrix,
    /// Their biases.
    pub qkv_bias: Option<Vector>,
    /// Norm on every head of q and of k.
    pub qk_norm: Option<(Vector, Vector)>,
    /// Output of attention.
    pub o: PackedMatrix,
    /// Its bias.
    pub o_bias: Option<Vector>,
    /// Norm on what attention adds to the residual stream.
    pub post_attention_norm: Option<Vector>,
    /// Norm before the feed-forward block.
    pub mlp_norm: Vector,
    /// gate and up below each other.
    pub gate_up: PackedMatrix,
    /// Their biases.
    pub gate_up_bias: Option<Vector>,
    /// Output of the feed-forward block.
    pub down: PackedMatrix,
    /// Its bias.
    pub down_bias: Option<Vector>,
    /// Norm on what the feed-forward block adds to the residual stream.
    pub post_mlp_norm: Option<Vector>,
}

/// Where everything of a base is, and how many bytes that takes.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseLayout {
    /// The architecture.
    pub config: Arc<ModelConfig>,
    /// Bytes of the region.
    pub bytes: u64,
    /// Dtype of what is not quantized, and of the KV cache.
    pub dtype: Dtype,
    /// What is done to the matrices that are multiplied.
    pub quantization: Quantization,
    /// Embedding.
    pub embedding: Embedding,
    /// Decoder blocks.
    pub layers: Vec<Layer>,
    /// Norm before the head.
    pub final_norm: Vector,
    /// Head; the embedding when they are tied.
    pub head: PackedMatrix,
}

impl BaseLayout {
    /// Equal for equal layouts.
    pub fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(format!("{self:?}")))
    }
}

/// A tensor file's content on its way to a place in the region.
struct Move {
    tensor: String,
    shape: Vec<usize>,
    dtype: Dtype,
    /// One is added to every number.
    plus_one: bool,
    place: Place,
}

/// Where a tensor goes.
enum Place {
    /// Number by number, from this offset.
    Plain(usize),
    /// Into a packed matrix, from this output on.
    Panels(PackedMatrix, usize),
}

/// Places of a region start at multiples of this, a cache line.
const ALIGNMENT: usize = 64;

/// Lays tensors out one after the other.
struct Planner {
    dtype: Dtype,
    format: Format,
    norm_plus_one: bool,
    end: usize,
    moves: Vec<Move>,
}

impl Planner {
    fn start(&mut self) -> usize {
        self.end = self.end.next_multiple_of(ALIGNMENT);
        self.end
    }

    fn push(&mut self, tensor: String, shape: Vec<usize>, dtype: Dtype) {
        let bytes = shape.iter().product::<usize>() * dtype.bytes();
        self.moves.push(Move { tensor, shape, dtype, place: Place::Plain(self.end), plus_one: false });
        self.end += bytes;
    }

    fn rows(&mut self, prefix: String, outputs: usize, inputs: usize) -> Matrix {
        let (offset, dtype) = (self.start(), self.dtype);
        self.push(format!("{prefix}.weight"), vec![outputs, inputs], dtype);
        Matrix { offset, outputs, inputs, dtype }
    }

    fn matrix(&mut self, parts: &[(String, usize)], inputs: usize) -> PackedMatrix {
        let outputs = parts.iter().map(|p| p.1).sum();
        let shape = PackedShape { outputs, inputs, format: self.format };
        let matrix = PackedMatrix { offset: self.start(), shape };
        let mut first_output = 0;
        for (prefix, outputs) in parts {
            self.moves.push(Move {
                tensor: format!("{prefix}.weight"),
                shape: vec![*outputs, inputs],
                dtype: shape.row_dtype(),
                place: Place::Panels(matrix, first_output),
                plus_one: false,
            });
            first_output += outputs;
        }
        self.end += shape.bytes();
        matrix
    }

    fn bias(&mut self, has: bool, parts: &[(String, usize)]) -> Option<Vector> {
        let offset = self.start();
        has.then(|| {
            for (prefix, outputs) in parts {
                self.push(format!("{prefix}.bias"), vec![*outputs], Dtype::F32);
            }
            Vector { offset, len: parts.iter().map(|p| p.1).sum() }
        })
    }

    fn norm(&mut self, prefix: String, len: usize) -> Vector {
        let offset = self.start();
        self.push(format!("{prefix}.weight"), vec![len], Dtype::F32);
        self.moves.last_mut().expect("pushed above").plus_one = self.norm_plus_one;
        Vector { offset, len }
    }

    fn layer(&mut self, c: &ModelConfig, index: usize) -> Layer {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let parts = |site| -> Vec<(String, usize)> {
            modules(c).iter().filter(|m| m.site == site).map(|m| (at(m.name), m.outputs)).collect()
        };
        let [qkv, o, gate_up, down] = Site::ALL.map(parts);
        let sandwich = c.sandwich_norms;
        // Architectures without the outer norms call the inner one by where it comes after.
        let mlp_norm = if sandwich { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        Layer {
            attention_norm: self.norm(at("input_layernorm"), c.hidden_size),
            qkv: self.matrix(&qkv, c.hidden_size),
            qkv_bias: self.bias(c.qkv_bias, &qkv),
            qk_norm: c.qk_norm.then(|| {
                (self.norm(at("self_attn.q_norm"), c.head_dim), self.norm(at("self_attn.k_norm"), c.head_dim))
            }),
            o: self.matrix(&o, c.q_size()),
            o_bias: self.bias(c.o_bias, &o),
            post_attention_norm: sandwich.then(|| self.norm(at("post_attention_layernorm"), c.hidden_size)),
            mlp_norm: self.norm(at(mlp_norm), c.hidden_size),
            gate_up: self.matrix(&gate_up, c.hidden_size),
            gate_up_bias: self.bias(c.mlp_bias, &gate_up),
            down: self.matrix(&down, c.intermediate_size),
            down_bias: self.bias(c.mlp_bias, &down),
            post_mlp_norm: sandwich.then(|| self.norm(at("post_feedforward_layernorm"), c.hidden_size)),
        }
    }
}

impl BaseLayout {
    /// Where everything of a base of this architecture goes, with matrices of this dtype.
    pub fn of(config: &Arc<ModelConfig>, dtype: Dtype) -> Self {
        Self::plan(config, dtype, Quantization::None).0
    }

    /// The same base, quantized like this.
    pub fn quantized(&self, quantization: Quantization) -> Self {
        Self::plan(&self.config, self.dtype, quantization).0
    }

    fn plan(config: &Arc<ModelConfig>, dtype: Dtype, quantization: Quantization) -> (Self, Vec<Move>) {
        let format = match quantization {
            Quantization::None => Format::Plain(dtype),
            Quantization::Q8_0 => Format::Q8_0,
        };
        let norm_plus_one = config.norm_plus_one;
        let mut planner = Planner { dtype, format, norm_plus_one, end: 0, moves: Vec::new() };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = match config.tie_word_embeddings {
            true => Embedding::Tied(planner.matrix(&[("model.embed_tokens".into(), vocab)], hidden)),
            false => Embedding::Rows(planner.rows("model.embed_tokens".into(), vocab, hidden)),
        };
        let layers = (0..config.layers).map(|index| planner.layer(config, index)).collect();
        let final_norm = planner.norm("model.norm".into(), config.hidden_size);
        let head = match embedding {
            Embedding::Tied(head) => head,
            Embedding::Rows(_) => planner.matrix(&[("lm_head".into(), vocab)], hidden),
        };
        let bytes = planner.start() as u64;
        let config = config.clone();
        (Self { config, bytes, dtype, quantization, embedding, layers, final_norm, head }, planner.moves)
    }
}

/// A base whose weights are all in place.
#[derive(Debug)]
pub struct FilledBase {
    pub(crate) layout: BaseLayout,
    pub(crate) region: Region,
}

impl FilledBase {
    /// Takes a region that was filled by other means than a folder, laid out as `layout`.
    pub fn new(layout: BaseLayout, region: Region) -> Self {
        assert_eq!(region.len() as u64, layout.bytes, "the region was reserved for this layout");
        Self { layout, region }
    }

    /// Where everything is.
    pub fn layout(&self) -> &BaseLayout {
        &self.layout
    }

    /// Its region.
    pub fn bytes(&self) -> &[u8] {
        self.region.bytes()
    }

    /// A matrix as the kernels take it. [`Packed::row`] reads it row by row.
    pub(crate) fn matrix(&self, matrix: &PackedMatrix) -> Packed<'_> {
        matrix.of(self.region.bytes())
    }

    /// The embedding as the kernels take it.
    pub(crate) fn embedding(&self) -> Table<'_> {
        match &self.layout.embedding {
            Embedding::Rows(matrix) => Table::Rows(matrix.of(self.region.bytes())),
            Embedding::Tied(matrix) => Table::Packed(self.matrix(matrix)),
        }
    }

    /// One row of a block's matrix, in f32: the weights that an output is computed with.
    pub(crate) fn row(&self, layer: usize, site: Site, output: usize, row: &mut [f32]) {
        let layer = &self.layout.layers[layer];
        let matrix = match site {
            Site::Qkv => &layer.qkv,
            Site::O => &layer.o,
            Site::GateUp => &layer.gate_up,
            Site::Down => &layer.down,
        };
        self.matrix(matrix).row(output, row);
    }

    /// A vector as the kernels take it.
    pub(crate) fn vector(&self, vector: &Vector) -> &[f32] {
        vector.of(self.region.bytes())
    }
}

impl PackedMatrix {
    /// This matrix in the bytes of its region.
    pub(crate) fn of(self, region: &[u8]) -> Packed<'_> {
        Packed::new(self.shape, &region[self.offset..][..self.shape.bytes()])
    }
}

impl Vector {
    /// This vector in the bytes of its region.
    pub(crate) fn of(self, region: &[u8]) -> &[f32] {
        bytemuck::cast_slice(&region[self.offset..][..self.len * 4])
    }
}

impl Matrix {
    /// This matrix in the bytes of its region.
    pub(crate) fn of<'a>(&self, bytes: &'a [u8]) -> Weight<'a> {
        let bytes = &bytes[self.offset..][..self.outputs * self.inputs * self.dtype.bytes()];
        match self.dtype {
            Dtype::F32 => Weight::F32(bytemuck::cast_slice(bytes)),
            Dtype::BF16 => Weight::BF16(bytemuck::cast_slice(bytes)),
            Dtype::F16 => Weight::F16(bytemuck::cast_slice(bytes)),
        }
    }
}
