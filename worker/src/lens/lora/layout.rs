//! Where every tensor of a LoRA goes. The file must hold exactly the tensors that follow from the config, but for an
//! embedding and a head, which PEFT also saves on its own when the vocabulary was resized or they are adapted.

use std::collections::{HashMap, HashSet};

use super::adapter_config::{AdapterConfig, Biases, CONFIG};
use super::targets::{Adapted, EMBEDDING, HEAD, Site as Place, Whole, replaceable, sites};
use super::tokens::Trained;
use crate::lens::{LensError, LensLayout};
use crate::model::config::ModelConfig;
use crate::model::lora::{
    Delta, DeltaLayout, DeltaPart, EmbeddingDelta, GainVectors, Module, NormSite, Site, TokenRows, modules,
};
use crate::model::replaced::Replaced;
use crate::model::tensor_file::{TensorFile, TensorFileError};
use crate::model::weights::{BaseLayout, Dtype, Matrix, PackedMatrix, Vector};
use turret_kernels::matmul::{Format, PackedShape};

const ALIGNMENT: usize = 64;
/// Largest vocabulary, as for a base.
const MAX_TOKENS: usize = 1 << 24;
/// What PEFT's names start with.
pub(super) const PREFIX: &str = "base_model.model.";

/// A tensor on its way into the region.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) tensor: String,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Kind of numbers in the region.
    pub(super) dtype: Dtype,
    pub(super) to: To,
}

/// Where a tensor goes.
#[derive(Debug)]
pub(super) enum To {
    /// Number by number, from this offset.
    Plain(usize),
    /// Numbers in f32 that one is added to.
    PlusOne(usize),
    /// Columns as rows, from this offset.
    Transposed(usize),
    /// Into a packed matrix.
    Panels(PackedMatrix),
}

/// What a config is about.
#[derive(Clone, Copy)]
pub(super) struct Modules<'a> {
    pub(super) adapted: &'a [Adapted],
    pub(super) saved: &'a [(String, Whole)],
    pub(super) trained: &'a Trained,
}

/// What PEFT calls a module's rows of single tokens.
const TRAINED: &str = "token_adapter.trainable_tokens_delta";
/// What PEFT also saves of an embedding or a head that is brought whole, when the vocabulary was resized: the same
/// again, and what it was before.
const COPIES: [&str; 2] = ["modules_to_save.weight", "original_module.weight"];

/// Names the first tensor that no LoRA over this base has, or that is not computed, and why it cannot be used.
pub(super) fn refuse_foreign_tensors(file: &TensorFile, base: &ModelConfig) -> Result<(), LensError> {
    const LORA: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
    const EMBEDDED: [&str; 2] = ["lora_embedding_A", "lora_embedding_B"];
    let sites: HashMap<String, Place> = sites(base).collect();
    let replaceable: HashMap<String, Whole> = replaceable(base).collect();
    for tensor in file.names() {
        let refused = |why| Err(LensError::UnsupportedTensor { tensor: tensor.clone(), why });
        let Some(name) = tensor.strip_prefix(PREFIX) else {
            return refused("names of a PEFT LoRA start with `base_model.model.`");
        };
        if let Some(layer) = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next())
            && layer.parse().is_ok_and(|n: usize| n >= base.layers)
        {
            let what = format!("tensor `{tensor}` is for layer {layer}, the base has {}", base.layers);
            return Err(LensError::BaseMismatch { what });
        }
        let leaves = ["base_layer.weight", "base_layer.bias", "weight", "bias", "lora_magnitude_vector"];
        let leaf = LORA
            .iter()
            .chain(&EMBEDDED)
            .chain(&COPIES)
            .chain(&[TRAINED, "lora_B.bias"])
            .chain(&leaves)
            .find_map(|leaf| Some((*leaf, name.strip_suffix(leaf)?.strip_suffix('.')?)));
        let Some((leaf, module)) = leaf else {
            return refused("it is not part of a LoRA that is computed");
        };
        let site = sites.get(module);
        let known = match leaf {
            "base_layer.weight" | "weight" if matches!(site, Some(Place::Block(..))) => {
                return refused(
                    "norms, the embedding and the head can be replaced whole, this module cannot",
                );
            }
            "base_layer.weight" if module.ends_with("token_adapter") => {
                return refused(
                    "trained tokens of a resized vocabulary are not computed, save the whole embedding",
                );
            }
            "base_layer.weight" | "weight" => replaceable.contains_key(module),
            leaf if leaf == TRAINED || COPIES.contains(&leaf) => {
                matches!(site, Some(Place::Embedding | Place::Head))
            }
            "lora_B.bias" => matches!(site, Some(Place::Block(..))),
            "base_layer.bias" | "bias" => match site {
                Some(Place::Block(_, module)) if has_bias(base, module) => true,
                Some(_) => return refused("this base has no bias there"),
                None => false,
            },
            "lora_magnitude_vector" => match site {
                Some(Place::Block(..)) | None => site.is_some(),
                Some(_) => return refused("DoRA of the embedding and of the head is not computed"),
            },
            leaf if EMBEDDED.contains(&leaf) => matches!(site, Some(Place::Embedding)),
            _ => matches!(site, Some(Place::Block(..) | Place::Head)),
        };
        if !known {
            return refused("this base has no such module");
        }
    }
    Ok(())
}

fn has_bias(base: &ModelConfig, module: &Module) -> bool {
    match module.site {
        Site::Qkv => base.qkv_bias,
        Site::O => base.o_bias,
        Site::GateUp | Site::Down => base.mlp_bias,
    }
}

/// Lays out everything that the config implies.
pub(super) fn plan(
    config: &AdapterConfig,
    base: &BaseLayout,
    file: &TensorFile,
    Modules { adapted, saved, trained }: Modules<'_>,
) -> Result<(LensLayout, Vec<Move>), LensError> {
    let table_dtype = base.dtype;
    let base = &*base.config;
    let mut planner = Planner { config, base, table_dtype, file, end: 0, moves: Vec::new() };
    let replaced = planner.replaced(saved)?;
    let mut deltas = DeltaLayout::default();
    let mut layers = HashMap::<usize, Vec<(&Adapted, &Module)>>::new();
    for one in adapted {
        match &one.site {
            Place::Block(layer, module) => layers.entry(*layer).or_default().push((one, module)),
            Place::Embedding => deltas.embedding = Some(planner.embedding(one, &replaced)?),
            Place::Head => {
                let outputs = replaced.vocab_size().unwrap_or(base.vocab_size);
                let module =
                    Module { name: HEAD, site: Site::O, output_start: 0, outputs, inputs: base.hidden_size };
                deltas.head = planner.delta(&[(&one.key, &module, Some(one), false)])?;
            }
        }
    }
    for layer in 0..base.layers {
        let adapted = layers.remove(&layer).unwrap_or_default();
        let mut delta = |site| planner.site(layer, site, &adapted);
        deltas.layers.push([delta(Site::Qkv)?, delta(Site::O)?, delta(Site::GateUp)?, delta(Site::Down)?]);
    }
    planner.trained_tokens(trained, &mut deltas)?;
    let known: HashSet<&str> = planner.moves.iter().map(|m| m.tensor.as_str()).collect();
    let copies = planner.copies(&known)?;
    let is_known = |tensor: &str| known.contains(tensor) || copies.contains(tensor);
    if let Some(tensor) = file.names().iter().find(|tensor| !is_known(tensor)) {
        return Err(planner.malformed(format!("{CONFIG} does not imply tensor `{tensor}`")));
    }
    let bytes = planner.end.next_multiple_of(ALIGNMENT) as u64;
    Ok((LensLayout { bytes, deltas, replaced }, planner.moves))
}

struct Planner<'a> {
    config: &'a AdapterConfig,
    base: &'a ModelConfig,
    /// An embedding or a head is held as the base's own are before they are quantized, which is also what PEFT does with them.
    table_dtype: Dtype,
    file: &'a TensorFile,
    end: usize,
    moves: Vec<Move>,
}

impl Planner<'_> {
    fn malformed(&self, what: String) -> LensError {
        LensError::File(TensorFileError::Malformed { path: self.file.path().into(), what })
    }

    fn place(&mut self, bytes: usize) -> usize {
        let offset = self.end.next_multiple_of(ALIGNMENT);
        self.end = offset + bytes;
        offset
    }

    /// The tensor is in the file and has this shape.
    fn expect(&self, tensor: &str, shape: &[usize]) -> Result<(), LensError> {
        let found = self.file.shape(tensor).ok_or_else(|| {
            self.malformed(format!("tensor `{tensor}`, which {CONFIG} implies, is missing"))
        })?;
        if found != shape {
            let what = format!("tensor `{tensor}` has shape {found:?}, expected {shape:?}");
            return Err(LensError::BaseMismatch { what });
        }
        Ok(())
    }

    fn vector(&mut self, tensor: String, len: usize) -> Result<Vector, LensError> {
        self.expect(&tensor, &[len])?;
        let vector = self.numbers(len);
        let (to, dtype) = (To::Plain(vector.offset), Dtype::F32);
        self.moves.push(Move { tensor, rows: 1, columns: len, dtype, to });
        Ok(vector)
    }

    fn norm(&mut self, tensor: String, len: usize) -> Result<Vector, LensError> {
        let vector = self.vector(tensor, len)?;
        if self.base.norm_plus_one {
            self.moves.last_mut().expect("pushed above").to = To::PlusOne(vector.offset);
        }
        Ok(vector)
    }

    /// Room for numbers that are not in the file.
    fn numbers(&mut self, len: usize) -> Vector {
        Vector { offset: self.place(len * Dtype::F32.bytes()), len }
    }

    /// A whole tensor, its columns as rows.
    fn transposed(&mut self, tensor: String, shape: [usize; 2]) -> Result<Matrix, LensError> {
        self.expect(&tensor, &shape)?;
        let dtype = self.file.dtype(&tensor)?;
        let [rows, columns] = shape;
        let offset = self.place(rows * columns * dtype.bytes());
        self.moves.push(Move { tensor, rows, columns, dtype, to: To::Transposed(offset) });
        Ok(Matrix { offset, outputs: columns, inputs: rows, dtype })
    }

    /// What is brought whole.
    fn replaced(&mut self, saved: &[(String, Whole)]) -> Result<Replaced, LensError> {
        let mut replaced = Replaced::default();
        for (key, whole) in saved {
            let tensor = format!("{PREFIX}{key}.weight");
            match whole {
                Whole::Norm(layer, norm) => {
                    if replaced.norms.is_empty() {
                        replaced.norms = vec![[None; NormSite::COUNT]; self.base.layers];
                    }
                    replaced.norms[*layer][norm.site as usize] = Some(self.norm(tensor, norm.len)?);
                }
                Whole::FinalNorm => replaced.final_norm = Some(self.norm(tensor, self.base.hidden_size)?),
                Whole::Embedding => replaced.embedding = Some(self.embedding_table(tensor)?),
                Whole::Head => replaced.head = Some(self.head(tensor)?),
            }
        }
        // Saved because the vocabulary was resized, or beside a delta of theirs.
        for leaf in ["weight", "base_layer.weight"] {
            let [embedding, head] = [EMBEDDING, HEAD].map(|key| format!("{PREFIX}{key}.{leaf}"));
            if replaced.embedding.is_none() && self.file.shape(&embedding).is_some() {
                replaced.embedding = Some(self.embedding_table(embedding)?);
            }
            if replaced.head.is_none() && self.file.shape(&head).is_some() {
                replaced.head = Some(self.head(head)?);
            }
        }
        let vocab = self.base.vocab_size;
        let rows = [
            replaced.embedding.map_or(vocab, |table| table.outputs),
            replaced.head.map_or(vocab, |head| head.shape.outputs),
        ];
        if rows[0] != rows[1] {
            let of = |own: bool| if own { "the lens's" } else { "the base's" };
            let what = format!(
                "{} embedding has {} tokens, {} head {}",
                of(replaced.embedding.is_some()),
                rows[0],
                of(replaced.head.is_some()),
                rows[1]
            );
            return Err(LensError::BaseMismatch { what });
        }
        Ok(replaced)
    }

    /// Rows of an embedding or a head: as many tokens as it has.
    fn tokens(&self, tensor: &str) -> Result<usize, LensError> {
        let tokens = match self.file.shape(tensor) {
            Some([tokens, _]) if (1..=MAX_TOKENS).contains(tokens) => *tokens,
            _ => self.base.vocab_size,
        };
        self.expect(tensor, &[tokens, self.base.hidden_size])?;
        Ok(tokens)
    }

    fn embedding_table(&mut self, tensor: String) -> Result<Matrix, LensError> {
        let (rows, columns, dtype) = (self.tokens(&tensor)?, self.base.hidden_size, self.table_dtype);
        let offset = self.place(rows * columns * dtype.bytes());
        self.moves.push(Move { tensor, rows, columns, dtype, to: To::Plain(offset) });
        Ok(Matrix { offset, outputs: rows, inputs: columns, dtype })
    }

    fn head(&mut self, tensor: String) -> Result<PackedMatrix, LensError> {
        let (rows, columns, dtype) = (self.tokens(&tensor)?, self.base.hidden_size, self.table_dtype);
        let shape = PackedShape { outputs: rows, inputs: columns, format: Format::Plain(dtype) };
        let matrix = PackedMatrix { offset: self.place(shape.bytes()), shape };
        self.moves.push(Move { tensor, rows, columns, dtype, to: To::Panels(matrix) });
        Ok(matrix)
    }

    fn embedding(&mut self, one: &Adapted, replaced: &Replaced) -> Result<EmbeddingDelta, LensError> {
        let vocab = replaced.vocab_size().unwrap_or(self.base.vocab_size);
        let tensor = |matrix| format!("{PREFIX}{}.lora_embedding_{matrix}", one.key);
        Ok(EmbeddingDelta {
            a: self.transposed(tensor('A'), [one.rank, vocab])?,
            b: self.transposed(tensor('B'), [self.base.hidden_size, one.rank])?,
            scale: one.scale,
        })
    }

    /// Rows of single tokens, each of which the head takes as a delta of one rank and one output.
    fn trained_tokens(&mut self, trained: &Trained, deltas: &mut DeltaLayout) -> Result<(), LensError> {
        for (key, tokens) in [(EMBEDDING, &trained.embedding), (HEAD, &trained.head)] {
            if tokens.is_empty() {
                continue;
            }
            let rows = match (key == HEAD && trained.is_tied, &deltas.tokens) {
                (true, Some(embedding)) => embedding.clone(),
                _ => self.token_rows(key, tokens)?,
            };
            if key == EMBEDDING {
                if deltas.embedding.is_some() {
                    return Err(self.beside_a_delta(key));
                }
                deltas.tokens = Some(rows);
                continue;
            }
            if deltas.head.is_some() {
                return Err(self.beside_a_delta(key));
            }
            let b = Matrix { offset: self.numbers(1).offset, outputs: 1, inputs: 1, dtype: Dtype::F32 };
            let part = |(token, row): &(u32, u32)| DeltaPart {
                rank_start: *row as usize,
                output_start: *token as usize,
                b,
                scale: 1.0,
                gain: None,
                bias: None,
                shift: None,
            };
            deltas.head = Some(Delta { a: rows.rows, parts: rows.tokens.iter().map(part).collect() });
            deltas.head_tokens = Some(rows);
        }
        Ok(())
    }

    fn beside_a_delta(&self, key: &str) -> LensError {
        let tensor = format!("{PREFIX}{key}.{TRAINED}");
        LensError::UnsupportedTensor {
            tensor,
            why: "the module has a delta too; adapt it or train its tokens",
        }
    }

    fn token_rows(&mut self, key: &str, tokens: &[u32]) -> Result<TokenRows, LensError> {
        let (count, hidden, dtype) = (tokens.len(), self.base.hidden_size, Dtype::F32);
        let tensor = format!("{PREFIX}{key}.{TRAINED}");
        self.expect(&tensor, &[count, hidden])?;
        let offset = self.numbers(count * hidden).offset;
        self.moves.push(Move { tensor, rows: count, columns: hidden, dtype, to: To::Plain(offset) });
        let mut tokens: Vec<(u32, u32)> = tokens.iter().copied().zip(0..).collect();
        tokens.sort_unstable();
        Ok(TokenRows { tokens, rows: Matrix { offset, outputs: count, inputs: hidden, dtype } })
    }

    /// Names of what the file holds beside whole modules and is not read.
    fn copies(&self, known: &HashSet<&str>) -> Result<HashSet<String>, LensError> {
        let mut copies = HashSet::new();
        for key in [EMBEDDING, HEAD] {
            let whole = format!("{PREFIX}{key}.weight");
            for leaf in COPIES {
                let copy = format!("{PREFIX}{key}.{leaf}");
                if let Some(shape) = self.file.shape(&whole).filter(|_| known.contains(whole.as_str()))
                    && self.file.shape(&copy).is_some()
                {
                    self.expect(&copy, shape)?;
                    copies.insert(copy);
                }
            }
        }
        Ok(copies)
    }

    /// The delta of a fused matrix: its adapted modules, and those of which only a bias is brought.
    fn site(
        &mut self,
        layer: usize,
        site: Site,
        adapted: &[(&Adapted, &Module)],
    ) -> Result<Option<Delta>, LensError> {
        let biases = self.config.biases();
        let modules: Vec<_> = modules(self.base)
            .into_iter()
            .filter(|module| module.site == site)
            .map(|module| {
                let one = adapted.iter().find(|(_, m)| **m == module).map(|(one, _)| *one);
                let saved = biases == Biases::All || (biases == Biases::LoraOnly && one.is_some());
                let bias = saved && has_bias(self.base, &module);
                (format!("model.layers.{layer}.{}", module.name), module, one, bias)
            })
            .collect();
        let parts: Vec<_> = modules
            .iter()
            .filter(|(_, _, one, bias)| one.is_some() || *bias)
            .map(|(key, module, one, bias)| (key.as_str(), module, *one, *bias))
            .collect();
        self.delta(&parts)
    }

    /// Parts of one matrix: name, module, its delta if it has one, and whether a bias is brought.
    fn delta(
        &mut self,
        parts: &[(&str, &Module, Option<&Adapted>, bool)],
    ) -> Result<Option<Delta>, LensError> {
        let Some((_, first, ..)) = parts.first() else { return Ok(None) };
        let inputs = first.inputs;
        let tensor = |key: &str, matrix| format!("{PREFIX}{key}.lora_{matrix}.weight");
        // All A of a matrix lie below each other, in a dtype that holds every one of them exactly.
        let (mut ranks, mut dtype) = (0, None);
        for (key, _, one, _) in parts {
            let Some(one) = one else { continue };
            self.expect(&tensor(key, 'A'), &[one.rank, inputs])?;
            let own = self.file.dtype(&tensor(key, 'A'))?;
            dtype = if dtype.is_none_or(|dtype| dtype == own) { Some(own) } else { Some(Dtype::F32) };
            ranks += one.rank;
        }
        let dtype = dtype.unwrap_or(Dtype::F32);
        let a = Matrix { offset: self.place(ranks * inputs * dtype.bytes()), outputs: ranks, inputs, dtype };
        let mut rank_start = 0;
        let mut delta = Delta { a, parts: Vec::with_capacity(parts.len()) };
        for (key, module, one, has_bias) in parts {
            let outputs = module.outputs;
            let (mut b, mut scale, mut gain, mut shift) =
                (Matrix { offset: 0, outputs: 0, inputs: outputs, dtype: Dtype::F32 }, 0.0, None, None);
            let part_start = rank_start;
            if let Some(one) = one {
                self.moves.push(Move {
                    tensor: tensor(key, 'A'),
                    rows: one.rank,
                    columns: inputs,
                    dtype,
                    to: To::Plain(a.offset + rank_start * inputs * dtype.bytes()),
                });
                rank_start += one.rank;
                b = self.transposed(tensor(key, 'B'), [outputs, one.rank])?;
                scale = one.scale;
                if self.config.lora_bias == Some(true) {
                    shift = Some(self.vector(format!("{PREFIX}{key}.lora_B.bias"), outputs)?);
                }
                if self.config.use_dora == Some(true) {
                    gain = Some(GainVectors {
                        magnitude: self.vector(magnitude_tensor(key), outputs)?,
                        base: self.numbers(outputs),
                        cross: self.numbers(outputs),
                        delta: self.numbers(outputs),
                    });
                }
            }
            let bias = match has_bias {
                true => Some(self.vector(self.bias_tensor(key), outputs)?),
                false => None,
            };
            let (output_start, rank_start) = (module.output_start, part_start);
            delta.parts.push(DeltaPart { rank_start, output_start, b, scale, gain, bias, shift });
        }
        Ok(Some(delta))
    }

    /// Where the bias of an adapted module is called by what it is wrapped in.
    fn bias_tensor(&self, key: &str) -> String {
        let [plain, wrapped] = ["bias", "base_layer.bias"].map(|leaf| format!("{PREFIX}{key}.{leaf}"));
        if self.file.shape(&wrapped).is_some() { wrapped } else { plain }
    }
}

/// Name of a module's magnitudes.
pub(super) fn magnitude_tensor(key: &str) -> String {
    format!("{PREFIX}{key}.lora_magnitude_vector")
}
