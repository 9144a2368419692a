//! The weights of a base: which tensors its files must have, where each goes in device memory, and how they get
//! there.
//!
//! [`BaseFolder::open`] reads only headers. It maps every tensor to a place in one [`Region`], with q, k and v, and gate and
//! up, laid beside each other so that they are one matrix for the kernels. Matrices keep one dtype and are packed into the
//! kernels' panels while they are read, which takes the same bytes; an embedding that is not also the head is only ever
//! looked up and stays row by row. Vectors (norms and biases) are always f32. A tensor that is missing, that has another shape, or that this
//! architecture does not know is refused by name.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::{ConfigError, ModelConfig};
use super::lora::{Site, modules};
use super::tensor_file::{OnProgress, Progress, TensorFile, TensorFileError};
use super::tensor_names::own_name;
use crate::engine::arena::Region;
use crate::kernels::matmul::{Packed, PackedShape, Weight};
use crate::kernels::ops::Table;

/// How the numbers of a matrix are stored. Arithmetic is in f32 whatever they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        })
    }
}

/// Why a base cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A file that must be there cannot be read.
    #[error("failed to read `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `config.json` is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor file is refused.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// The list of shards is refused.
    #[error("`{path}` is malformed: {what}")]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tensor of this architecture is not in the files.
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    /// A tensor has another shape than `config.json` implies.
    #[error("tensor `{tensor}` has shape {found:?}, config.json implies {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// What it should be.
        expected: Vec<usize>,
    },
    /// A tensor that this architecture does not have, and that would change what it computes.
    #[error("tensor `{0}` is not part of this architecture")]
    UnexpectedTensor(String),
}

/// A matrix in device memory, row-major `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// A matrix in device memory, packed for [`crate::kernels::matmul`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedMatrix {
    /// Bytes from the start of the region.
    pub offset: usize,
    /// Outputs, inputs and kind of numbers.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Dtype of all matrices.
    pub dtype: Dtype,
    /// Embedding.
    pub embedding: Embedding,
    /// Decoder blocks.
    pub layers: Vec<Layer>,
    /// Norm before the head.
    pub final_norm: Vector,
    /// Head; the embedding when they are tied.
    pub head: PackedMatrix,
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
        let shape = PackedShape { outputs, inputs, dtype: self.dtype };
        let matrix = PackedMatrix { offset: self.start(), shape };
        let mut first_output = 0;
        for (prefix, outputs) in parts {
            self.moves.push(Move {
                tensor: format!("{prefix}.weight"),
                shape: vec![*outputs, inputs],
                dtype: self.dtype,
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
        Self::plan(config, dtype).0
    }

    fn plan(config: &Arc<ModelConfig>, dtype: Dtype) -> (Self, Vec<Move>) {
        let mut planner = Planner { dtype, norm_plus_one: config.norm_plus_one, end: 0, moves: Vec::new() };
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
        (Self { config, bytes, dtype, embedding, layers, final_norm, head }, planner.moves)
    }
}

/// A folder in the Hugging Face layout whose headers have been read and checked.
pub struct BaseFolder {
    layout: BaseLayout,
    files: Vec<TensorFile>,
    /// Tensor name, as this architecture calls it, to its file and its name there.
    tensors: HashMap<String, (usize, String)>,
    moves: Vec<Move>,
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Largest JSON file that is read from a model folder.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Files of a base folder that a worker reads beside its tensors, where they exist.
pub const BASE_SIDE_FILES: &[&str] = &[
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Names of all files that a worker reads from a base folder, sorted: what a digest of the base covers.
pub fn base_files(folder: &Path) -> Result<Vec<String>, BaseError> {
    let mut files: Vec<String> =
        BASE_SIDE_FILES.iter().filter(|f| folder.join(f).exists()).map(|&f| f.to_owned()).collect();
    let shards = shard_names(folder)?;
    if folder.join(INDEX).exists() {
        files.push(INDEX.to_owned());
    }
    files.extend(shards);
    files.sort();
    files.dedup();
    Ok(files)
}

/// The safetensors files of a base folder: one, or those that the index names.
fn shard_names(folder: &Path) -> Result<Vec<String>, BaseError> {
    let path = folder.join(INDEX);
    if !path.exists() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let malformed = |what: String| BaseError::Index { path: path.clone(), what };
    let text = read_json(&path)?;
    let index: serde_json::Value = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
    let map =
        index["weight_map"].as_object().ok_or_else(|| malformed("it has no `weight_map` object".into()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().unwrap_or("");
        if name.is_empty() || name.contains(['/', '\\', '\0']) || name == "." || name == ".." {
            return Err(malformed(format!("`{tensor}` is in {file}, which is not a plain file name")));
        }
        names.push(name.to_owned());
    }
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(malformed("its `weight_map` is empty".into()));
    }
    Ok(names)
}

/// A JSON file of a model folder as text; size-capped.
pub(crate) fn read_json(path: &Path) -> Result<String, BaseError> {
    use std::io::Read;
    let io = |source| BaseError::Io { path: path.into(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut text = String::new();
    file.take(MAX_JSON_BYTES + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(BaseError::Index {
            path: path.into(),
            what: format!("it is larger than {MAX_JSON_BYTES} bytes"),
        });
    }
    Ok(text)
}

impl BaseFolder {
    /// Reads `config.json` and all safetensors headers. `dtype` absent keeps the numbers as stored (with mixed ones, the
    /// smallest that holds them all).
    pub fn open(folder: &Path, dtype: Option<Dtype>) -> Result<Self, BaseError> {
        let config = Arc::new(ModelConfig::parse(&read_json(&folder.join("config.json"))?)?);
        let mut files = Vec::new();
        let mut tensors = HashMap::new();
        for name in shard_names(folder)? {
            let file = TensorFile::open(&folder.join(name))?;
            for tensor in file.names() {
                let Some(name) = own_name(config.architecture, &tensor) else { continue };
                if let Some((other, _)) = tensors.insert(name, (files.len(), tensor.clone())) {
                    let other: &TensorFile = files.get(other).unwrap_or(&file);
                    let what = format!("tensor `{tensor}` is also in `{}`", other.path().display());
                    return Err(BaseError::Index { path: file.path().into(), what });
                }
            }
            files.push(file);
        }
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => stored_dtype(&files, &tensors)?,
        };
        let (layout, moves) = BaseLayout::plan(&config, dtype);
        let mut known = BTreeMap::new();
        for wanted in &moves {
            let (file, name) =
                tensors.get(&wanted.tensor).ok_or_else(|| BaseError::MissingTensor(wanted.tensor.clone()))?;
            let file = &files[*file];
            let found = file.shape(name).expect("the map was made from this file's names");
            if found != wanted.shape {
                return Err(BaseError::Shape {
                    tensor: name.clone(),
                    found: found.to_vec(),
                    expected: wanted.shape.clone(),
                });
            }
            file.dtype(name)?;
            known.insert(wanted.tensor.as_str(), ());
        }
        let mut extra: Vec<_> =
            tensors.keys().filter(|t| !known.contains_key(t.as_str()) && !is_ignorable(t)).collect();
        extra.sort();
        if let Some(tensor) = extra.first() {
            return Err(BaseError::UnexpectedTensor((*tensor).clone()));
        }
        Ok(Self { layout, files, tensors, moves })
    }

    /// The architecture.
    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.layout.config
    }

    /// Where everything will be, and how many bytes that takes.
    pub fn layout(&self) -> &BaseLayout {
        &self.layout
    }

    /// Reads all weights into a region of `layout().bytes`.
    pub fn fill(&self, mut region: Region, on_progress: OnProgress<'_>) -> Result<FilledBase, BaseError> {
        assert_eq!(region.len() as u64, self.layout.bytes, "the region was reserved for this layout");
        let total_bytes = self.layout.bytes;
        let mut done_bytes = 0;
        for wanted in &self.moves {
            let (file, name) = &self.tensors[&wanted.tensor];
            let file = &self.files[*file];
            let mut written = |bytes| {
                done_bytes += bytes;
                on_progress(Progress { done_bytes, total_bytes })
            };
            match wanted.place {
                Place::Plain(offset) => {
                    let bytes = wanted.shape.iter().product::<usize>() * wanted.dtype.bytes();
                    let to = &mut region.bytes_mut()[offset..offset + bytes];
                    file.read(name, wanted.dtype, to, &mut written)?;
                    if wanted.plus_one {
                        let weights: &mut [f32] = bytemuck::cast_slice_mut(to);
                        weights.iter_mut().for_each(|weight| *weight += 1.0);
                    }
                }
                Place::Panels(matrix, mut output) => {
                    let to = &mut region.bytes_mut()[matrix.offset..][..matrix.shape.bytes()];
                    let row_bytes = matrix.shape.inputs * wanted.dtype.bytes();
                    file.read_rows(name, wanted.dtype, matrix.shape.inputs, &mut |rows| {
                        matrix.shape.pack(output, rows, to);
                        output += rows.len() / row_bytes;
                        written(rows.len() as u64)
                    })?;
                }
            }
        }
        Ok(FilledBase { layout: self.layout.clone(), region })
    }
}

/// Tensors that may be there and mean nothing: a head beside a tied embedding, and frequencies that follow from the
/// config.
fn is_ignorable(tensor: &str) -> bool {
    tensor == "lm_head.weight" || tensor.ends_with(".rotary_emb.inv_freq")
}

fn stored_dtype(
    files: &[TensorFile],
    tensors: &HashMap<String, (usize, String)>,
) -> Result<Dtype, BaseError> {
    let mut all = None;
    for (file, tensor) in tensors.values() {
        let file = &files[*file];
        if file.shape(tensor).is_none_or(|shape| shape.len() < 2) {
            continue;
        }
        let dtype = file.dtype(tensor)?;
        all = match all {
            None => Some(dtype),
            Some(other) if other == dtype => all,
            // Neither half kind holds the other.
            Some(_) => Some(Dtype::F32),
        };
    }
    Ok(all.unwrap_or(Dtype::F32))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tensor_file::tests::write;
    use serde_json::{Value, json};

    type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 16})
    }

    fn tensors() -> Tensors {
        let config = Arc::new(ModelConfig::parse(&config().to_string()).unwrap());
        let (_, moves) = BaseLayout::plan(&config, Dtype::BF16);
        let zeros = |m: Move| {
            let bytes = vec![0; m.shape.iter().product::<usize>() * 2];
            (m.tensor, (Dtype::BF16, m.shape, bytes))
        };
        moves.into_iter().map(zeros).collect()
    }

    fn folder(tensors: &Tensors) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
        write(&dir.path().join(SINGLE), tensors);
        dir
    }

    fn refused(dir: &Path) -> BaseError {
        BaseFolder::open(dir, None).err().expect("it must be refused")
    }

    #[test]
    fn a_base_has_exactly_the_tensors_of_its_architecture() {
        assert!(BaseFolder::open(folder(&tensors()).path(), None).is_ok());

        let mut missing = tensors();
        missing.remove("model.layers.0.mlp.up_proj.weight");
        let error = refused(folder(&missing).path());
        assert!(
            matches!(&error, BaseError::MissingTensor(t) if t == "model.layers.0.mlp.up_proj.weight"),
            "{error}"
        );

        let mut other = tensors();
        other.insert("lm_head.weight".into(), (Dtype::BF16, vec![5, 4], vec![0; 40]));
        let error = refused(folder(&other).path());
        assert!(matches!(&error, BaseError::Shape { tensor, .. } if tensor == "lm_head.weight"), "{error}");

        let mut more = tensors();
        more.insert("model.layers.0.self_attn.q_proj.bias".into(), (Dtype::BF16, vec![8], vec![0; 16]));
        let error = refused(folder(&more).path());
        assert!(matches!(&error, BaseError::UnexpectedTensor(t) if t.ends_with("q_proj.bias")), "{error}");
        more.remove("model.layers.0.self_attn.q_proj.bias");
        more.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![2], vec![0; 8]));
        assert!(BaseFolder::open(folder(&more).path(), None).is_ok(), "frequencies follow from the config");
    }

    #[test]
    fn stored_numbers_are_kept_and_mixed_ones_widened() {
        let dtype =
            |tensors: &Tensors, asked| BaseFolder::open(folder(tensors).path(), asked).unwrap().layout.dtype;
        assert_eq!(dtype(&tensors(), None), Dtype::BF16);
        assert_eq!(dtype(&tensors(), Some(Dtype::F16)), Dtype::F16);
        let mut mixed = tensors();
        mixed.insert("lm_head.weight".into(), (Dtype::F16, vec![5, 8], vec![0; 80]));
        assert_eq!(dtype(&mixed, None), Dtype::F32);
    }

    #[test]
    fn shards_are_found_by_their_index_and_cannot_leave_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
        let (mut first, all) = (tensors(), tensors());
        let second = first.split_off("model.layers.0.mlp.down_proj.weight");
        write(&dir.path().join("a.safetensors"), &first);
        write(&dir.path().join("b.safetensors"), &second);
        let index = |name_of: &dyn Fn(&str) -> String| {
            let map: BTreeMap<_, _> = all.keys().map(|t| (t.clone(), name_of(t))).collect();
            std::fs::write(dir.path().join(INDEX), json!({"weight_map": map}).to_string()).unwrap();
        };
        let shard =
            |t: &str| if first.contains_key(t) { "a.safetensors" } else { "b.safetensors" }.to_owned();
        index(&shard);
        assert!(BaseFolder::open(dir.path(), None).is_ok());
        let files = base_files(dir.path()).unwrap();
        assert_eq!(files, ["a.safetensors", "b.safetensors", "config.json", INDEX]);

        for outside in ["../a.safetensors", "/etc/passwd", "..", ""] {
            index(&|_| outside.to_owned());
            let error = refused(dir.path());
            assert!(matches!(error, BaseError::Index { .. }), "{outside}: {error}");
        }
        index(&|_| "absent.safetensors".to_owned());
        assert!(matches!(refused(dir.path()), BaseError::File(TensorFileError::Io { .. })));
        write(&dir.path().join("b.safetensors"), &all);
        index(&shard);
        assert!(matches!(refused(dir.path()), BaseError::Index { .. }), "a tensor in two shards");
    }
}
