//! A base's folder: which files it has, whether they hold exactly the tensors of its architecture, and their way into
//! memory. A tensor that is missing, that has another shape, or that this architecture does not know is refused by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::{BaseLayout, Dtype, FilledBase, Move, PackedMatrix, Place, Quantization};
use crate::engine::arena::Region;
use crate::model::config::{ConfigError, ModelConfig};
use crate::model::excerpt::{complaint, excerpt};
use crate::model::file::read_text;
use crate::model::tensor_file::{OnProgress, Progress, TensorFile, TensorFileError};
use crate::model::tensor_header::MAX_TENSORS;
use crate::model::tensor_names::own_name;
use turret_kernels::matmul::Format;
use turret_kernels::matmul::q8_0::LARGEST;

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
    /// A tensor has a number that quantization cannot hold.
    #[error("tensor `{tensor}` has a number beyond ±{LARGEST}, which Q8_0 cannot hold")]
    TooLarge {
        /// The tensor.
        tensor: String,
    },
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
/// Largest list of shards: room for as many tensors as there may be.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Largest `config.json`. Parsed, it may take forty times as much.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Files that the tensors of a base may be in, all of which are open at once.
const MAX_SHARDS: usize = 1024;

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

/// What is read of the list of shards.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The safetensors files of a base folder: one, or those that the index names.
fn shard_names(folder: &Path) -> Result<Vec<String>, BaseError> {
    let path = folder.join(INDEX);
    if !path.exists() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let malformed = |what: String| BaseError::Index { path: path.clone(), what };
    let text = read_json(&path, MAX_INDEX_BYTES)?;
    let Index { weight_map } = serde_json::from_str(&text).map_err(|e| malformed(complaint(&e)))?;
    let mut names = BTreeSet::new();
    for (tensor, name) in weight_map {
        // A name that is too long for the file system is one that does not exist.
        if name.is_empty()
            || name.contains(['/', '\\', '\0'])
            || name == "."
            || name == ".."
            || name.len() > 255
        {
            let (tensor, name) = (excerpt(&tensor, 80), excerpt(&name, 80));
            return Err(malformed(format!("`{tensor}` is in {name:?}, which is not a plain file name")));
        }
        names.insert(name);
        if names.len() > MAX_SHARDS {
            return Err(malformed(format!("it names more than {MAX_SHARDS} files")));
        }
    }
    if names.is_empty() {
        return Err(malformed("its `weight_map` is empty".into()));
    }
    Ok(names.into_iter().collect())
}

/// A JSON file of a model folder as text.
pub(crate) fn read_json(path: &Path, max_bytes: u64) -> Result<String, BaseError> {
    let text = read_text(path, max_bytes).map_err(|source| BaseError::Io { path: path.into(), source })?;
    text.map_err(|what| BaseError::Index { path: path.into(), what })
}

impl BaseFolder {
    /// Reads `config.json` and all safetensors headers. `dtype` absent keeps the numbers as stored (with mixed ones, the
    /// smallest that holds them all).
    pub fn open(folder: &Path, dtype: Option<Dtype>) -> Result<Self, BaseError> {
        let config =
            Arc::new(ModelConfig::parse(&read_json(&folder.join("config.json"), MAX_CONFIG_BYTES)?)?);
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
            if tensors.len() > MAX_TENSORS {
                let what = format!("with it there are more than {MAX_TENSORS} tensors");
                return Err(BaseError::Index { path: file.path().into(), what });
            }
            files.push(file);
        }
        // Before anything is laid out: a config may claim layers that nobody has.
        let first_of = |layer| format!("model.layers.{layer}.input_layernorm.weight");
        if let Some(tensor) = (0..config.layers).map(first_of).find(|tensor| !tensors.contains_key(tensor)) {
            return Err(BaseError::MissingTensor(tensor));
        }
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => stored_dtype(&files, &tensors)?,
        };
        let (layout, moves) = BaseLayout::plan(&config, dtype, Quantization::None);
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

    /// The same folder, to be quantized like this while it is read. The numbers that are quantized are those of the files,
    /// whatever dtype was asked for.
    pub fn quantized(mut self, quantization: Quantization) -> Self {
        (self.layout, self.moves) = BaseLayout::plan(&self.layout.config, self.layout.dtype, quantization);
        self
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
                Place::Panels(matrix, output) => {
                    let to = &mut region.bytes_mut()[matrix.offset..][..matrix.shape.bytes()];
                    fill_panels(file, name, (matrix, output), to, &mut written)?;
                }
            }
        }
        Ok(FilledBase { layout: self.layout.clone(), region })
    }
}

/// Packs a tensor from this output on. `written` is told the bytes of the packed matrix.
fn fill_panels(
    file: &TensorFile,
    tensor: &str,
    (matrix, mut output): (PackedMatrix, usize),
    to: &mut [u8],
    written: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), BaseError> {
    let (shape, dtype) = (matrix.shape, matrix.shape.row_dtype());
    let mut too_large = false;
    let result = file.read_rows(tensor, dtype, shape.inputs, &mut |rows| {
        too_large = shape.format == Format::Q8_0 && !fits_q8_0(rows);
        if too_large {
            return ControlFlow::Break(());
        }
        shape.pack(output, rows, to);
        let outputs = rows.len() / (shape.inputs * dtype.bytes());
        output += outputs;
        written((outputs * shape.row_bytes()) as u64)
    });
    if too_large { Err(BaseError::TooLarge { tensor: tensor.into() }) } else { Ok(result?) }
}

fn fits_q8_0(numbers: &[u8]) -> bool {
    numbers.as_chunks().0.iter().fold(true, |fit, b| fit & (f32::from_ne_bytes(*b).abs() <= LARGEST))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::arena::{Arena, Part};
    use crate::model::lora::Site;
    use crate::model::tensor_file::tests::write;
    use crate::model::weights::Embedding;
    use serde_json::{Value, json};

    type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 16})
    }

    fn tensors() -> Tensors {
        let config = Arc::new(ModelConfig::parse(&config().to_string()).unwrap());
        let (_, moves) = BaseLayout::plan(&config, Dtype::BF16, Quantization::None);
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

    #[test]
    fn a_base_is_quantized_while_it_is_read() {
        let numbers = |name: &str, index: usize| (name.len() + 7 * index) as f32 * 0.37 % 2.0 - 1.0;
        let mut stored = tensors();
        for (name, (dtype, shape, bytes)) in &mut stored {
            let count = shape.iter().product::<usize>();
            let (kind, width) = if name.contains("mlp") { (Dtype::F32, 4) } else { (Dtype::BF16, 2) };
            *bytes = (0..count).flat_map(|i| numbers(name, i).to_le_bytes()[4 - width..].to_vec()).collect();
            *dtype = kind;
        }
        let fill = |stored: &Tensors| {
            let base = BaseFolder::open(folder(stored).path(), Some(Dtype::BF16)).unwrap();
            let base = base.quantized(Quantization::Q8_0);
            let arena = Arena::new(1 << 28).unwrap();
            let region = arena.reserve(Part::Base, base.layout().bytes).unwrap();
            let mut done = 0;
            let filled = base.fill(region, &mut |progress| {
                done = progress.done_bytes;
                ControlFlow::Continue(())
            });
            // Beside what was written there is only what fills cache lines and panels.
            assert!(filled.is_err() || (done <= base.layout().bytes && done > base.layout().bytes / 4));
            filled
        };
        let base = fill(&stored).unwrap();
        assert_eq!((base.layout.dtype, base.layout.quantization), (Dtype::BF16, Quantization::Q8_0));
        let mut row = [0.0; 12];
        base.row(0, Site::Down, 3, &mut row);
        for (index, got) in row.iter().enumerate() {
            // Half a step, and the scale's own rounding.
            let want = numbers("model.layers.0.mlp.down_proj.weight", 3 * 12 + index);
            assert!((got - want).abs() <= 0.5 / 127.0 + want.abs() / 2048.0, "{index}: {got} {want}");
        }
        let Embedding::Rows(table) = base.layout.embedding else { panic!("this base has its own embedding") };
        assert_eq!(table.dtype, Dtype::BF16, "what is looked up is not quantized");

        let (_, _, bytes) = stored.get_mut("model.layers.0.mlp.down_proj.weight").unwrap();
        bytes[..4].copy_from_slice(&1e7_f32.to_le_bytes());
        let error = fill(&stored).unwrap_err();
        assert!(
            matches!(&error, BaseError::TooLarge { tensor } if tensor.ends_with("down_proj.weight")),
            "{error}"
        );
    }
}
