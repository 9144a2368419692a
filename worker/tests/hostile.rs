//! Files that somebody else wrote, and did so badly or on purpose: whatever a folder holds, it is loaded or refused with
//! a short error that says where; nothing panics, hangs, or takes more memory than a stated bound.
//!
//! Folders of the fixtures are taken and changed at random, by seeds that are always the same; what random changes do not
//! find is written out below.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use turret_worker::lens::lora::LoraFolder;
use turret_worker::model::config::ModelConfig;
use turret_worker::model::rope::Frequencies;
use turret_worker::model::single::SingleRow;
use turret_worker::model::tokenizer::Tokenizer;
use turret_worker::model::weights::BaseFolder;

/// Counts what this thread holds. Loading a folder is the work of one thread.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: everything is handed to the system's allocator as it came; counting does not allocate.
#[allow(
    unsafe_code,
    reason = "an allocator is an unsafe trait, and there is no other way to see what is allocated"
)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What opening a folder may hold at once, beside as much as its files: the largest headers and settings that are read
/// need some forty.
const BOUND_BYTES: isize = 64 << 20;
/// A message is for a person, and goes into a status.
const MAX_MESSAGE_BYTES: usize = 2048;

/// Opens something; it must be there or be refused by a sound error, within the memory.
fn sound<T, E: Error>(folder: &Folder, open: impl FnOnce() -> Result<T, E>) -> Option<T> {
    let before = HELD.get();
    MOST.set(before);
    let result = open();
    let peak = MOST.get() - before;
    let bound = BOUND_BYTES + folder.bytes() as isize;
    assert!(peak <= bound, "{peak} bytes were held, {bound} is the bound");
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let message = message(&error);
            assert!(message.len() <= MAX_MESSAGE_BYTES, "{} bytes: {message:.300}", message.len());
            let names =
                ["`", ".json", ".jinja", "tensor", "chat template"].iter().any(|name| message.contains(name));
            assert!(names, "it says nothing of where: {message}");
            None
        }
    }
}

fn message(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    message
}

/// A folder with the files of a fixture, by links: as the caches of model hubs are.
struct Folder(tempfile::TempDir);

impl Folder {
    fn of(fixture: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixtures().join(fixture)).unwrap() {
            let path = entry.unwrap().path();
            std::os::unix::fs::symlink(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        Self(folder)
    }

    fn with(self, file: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.path().join(file);
        let _ = std::fs::remove_file(&path);
        std::fs::write(path, content).unwrap();
        self
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn bytes(&self) -> u64 {
        let files = std::fs::read_dir(self.path()).unwrap();
        files.filter_map(|file| Some(std::fs::metadata(file.ok()?.path()).ok()?.len())).sum()
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity")
}

fn bytes_of(path: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(path)).unwrap()
}

fn json_of(path: &str) -> Value {
    serde_json::from_slice(&bytes_of(path)).unwrap()
}

/// A base over which lenses are opened.
struct Over {
    row: SingleRow,
    tokenizer: Tokenizer,
}

const BASE: &str = "features-qwen2/model";

thread_local! {
    static OVER: Over = {
        let row = SingleRow::open(&fixtures().join(BASE), None, 16).unwrap();
        let tokenizer = Tokenizer::open(&fixtures().join(BASE), &row.base().layout().config).unwrap();
        Over { row, tokenizer }
    };
}

/// Opens a base and computes with it.
fn open_base(folder: &Folder) -> Option<()> {
    let base = sound(folder, || BaseFolder::open(folder.path(), None))?;
    let config = base.config();
    for rope in std::iter::once(&config.rope).chain(&config.sliding_rope) {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for length in [1, 1 << 24] {
            Frequencies::of(rope).angles(1 << 24, length, &mut cos, &mut sin);
        }
        assert!(cos.iter().chain(&sin).all(|angle| angle.is_finite()), "{rope:?}");
    }
    let mut row = sound(folder, || SingleRow::open(folder.path(), None, 16))?;
    row.compute(&[1, 0, 2], &[]).unwrap();
    Some(())
}

/// Opens a tokenizer and speaks through it.
fn open_tokenizer(folder: &Folder) -> Option<()> {
    let tokenizer = sound(folder, || Tokenizer::open(folder.path(), &config()))?;
    speak(folder, &tokenizer);
    Some(())
}

fn speak(folder: &Folder, tokenizer: &Tokenizer) {
    let text = "The lens turns\u{3000}– “Ünï” 日本語 🙂 <note> a<stop>\n\n  and the base  stays.";
    sound(folder, || tokenizer.encode(text, true).map_err(Named));
    sound(folder, || tokenizer.decode(&[0, 1, 5, 77, 200, 351, 352, u32::MAX], false).map_err(Named));
}

/// An error of a request, which has no file to name.
#[derive(Debug)]
struct Named<E>(E);

impl<E: Error> std::fmt::Display for Named<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`", self.0)
    }
}

impl<E: Error> Error for Named<E> {}

/// Opens a lens and its tokenizer, and computes with it.
fn open_lens(folder: &Folder) -> Option<()> {
    OVER.with(|Over { row, tokenizer }| {
        let lens = sound(folder, || LoraFolder::open(folder.path(), row.base().layout()))?;
        if let Some(tokenizer) = sound(folder, || lens.tokenizer(tokenizer)).flatten() {
            speak(folder, &tokenizer);
        }
        sound(folder, || row.load_lora(folder.path())).map(drop)
    })
}

fn config() -> Arc<ModelConfig> {
    OVER.with(|over| over.row.base().layout().config.clone())
}

/// One change of a JSON file.
#[derive(Debug, Clone)]
enum Change {
    /// The value at some place becomes another one.
    Replace(Index, String),
    /// A key or an item goes away.
    Remove(Index),
    /// A key is there twice.
    Twice(Index, String),
    /// A key is new.
    Add(String, String),
}

/// Values of every kind, as JSON or not quite.
fn any_value() -> impl Strategy<Value = String> {
    let nested = |open: &str, close: &str| format!("{}1{}", open.repeat(300), close.repeat(300));
    let long = format!("\"{}\"", "x".repeat(20_000));
    let zeros = format!("[{}0]", "0,".repeat(20_000));
    let fixed: Vec<String> = [
        "null",
        "true",
        "false",
        "0",
        "-0.0",
        "1",
        "2",
        "3",
        "-1",
        "7",
        "13",
        "65536",
        "16777216",
        "16777217",
        "2147483648",
        "4294967295",
        "4294967296",
        "1000000000",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
        "340282366920938463463374607431768211456",
        "0.5",
        "-0.5",
        "1.0",
        "1e3",
        "1e-7",
        "1e-45",
        "1e-300",
        "1e300",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "",
        "\"\"",
        "\"default\"",
        "\"yarn\"",
        "\"longrope\"",
        "\"dynamic\"",
        "\"sliding_attention\"",
        "\"all-linear\"",
        "\"gelu\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"../../../etc/passwd\"",
        "\"/etc/passwd\"",
        "\"model.safetensors\"",
        "[]",
        "{}",
        "[0]",
        "[[1,2],[3,4]]",
        "[\"q_proj\"]",
        "[\"\"]",
        "[null]",
        "[-1]",
        "[4294967296]",
        "{\"a\":1}",
        "{\"q_proj\":1e9}",
        "{\"\":\"\"}",
        "\"(((((a*)*)*)*)*)*b\"",
        "\"((?=.)(.|.)*)*(?!.)x\"",
        "\"(.*.*.*.*.*.*.*)*x\"",
        "\"(?P<idx>\"",
        "\"\\\\w{1000}{1000}\"",
        "{\"(.|.)*(?=x)y\":4}",
        "{\"type\":\"default\",\"factor\":0}",
        "{\"rope_type\":\"yarn\",\"factor\":1e-300}",
    ]
    .map(str::to_owned)
    .into();
    let made = vec![nested("[", "]"), nested("{\"a\":", "}"), "[".repeat(100_000), long, zeros];
    prop_oneof![
        6 => prop::sample::select(fixed),
        1 => prop::sample::select(made),
        1 => any::<i64>().prop_map(|n| n.to_string()),
        1 => any::<f64>().prop_map(|n| n.to_string()),
    ]
}

fn any_change(keys: &'static [&'static str]) -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (any::<Index>(), any_value()).prop_map(|(at, value)| Change::Replace(at, value)),
        1 => any::<Index>().prop_map(Change::Remove),
        1 => (any::<Index>(), any_value()).prop_map(|(at, value)| Change::Twice(at, value)),
        2 => (prop::sample::select(keys), any_value()).prop_map(|(key, value)| Change::Add(key.into(), value)),
    ]
}

fn any_changes(keys: &'static [&'static str]) -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(any_change(keys), 1..4)
}

/// The text of a JSON file after some changes.
fn changed(mut file: Value, changes: &[Change]) -> Vec<u8> {
    const HERE: &str = "<here>";
    let mut first = String::new();
    let mut texts = Vec::new();
    for change in changes {
        let here = Value::from(format!("{HERE}{}", texts.len()));
        match change {
            Change::Replace(at, text) => {
                let places = places(&file);
                *file.pointer_mut(at.get::<String>(&places)).unwrap() = here;
                texts.push(text);
            }
            Change::Remove(at) => {
                let places = places(&file);
                let Some((parent, last)) = at.get(&places).rsplit_once('/') else { continue };
                match file.pointer_mut(parent).unwrap() {
                    Value::Object(map) => drop(map.remove(&last.replace("~1", "/").replace("~0", "~"))),
                    Value::Array(items) => drop(items.remove(last.parse().unwrap())),
                    _ => unreachable!("it holds something"),
                }
            }
            Change::Twice(at, text) => {
                let keys: Vec<String> =
                    file.as_object().into_iter().flatten().map(|(k, _)| k.clone()).collect();
                if !keys.is_empty() {
                    first += &format!("{}:{text},", Value::from(at.get(&keys).as_str()));
                }
            }
            Change::Add(key, text) => {
                if let Some(map) = file.as_object_mut() {
                    map.insert(key.clone(), here);
                    texts.push(text);
                }
            }
        }
    }
    let mut all = file.to_string();
    for (index, text) in texts.iter().enumerate() {
        all = all.replacen(&format!("\"{HERE}{index}\""), text, 1);
    }
    all.replacen('{', &format!("{{{first}"), 1).into_bytes()
}

/// Pointers to all values.
fn places(value: &Value) -> Vec<String> {
    fn walk(value: &Value, at: &str, places: &mut Vec<String>) {
        places.push(at.to_owned());
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), places);
                }
            }
            Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(index, item)| walk(item, &format!("{at}/{index}"), places));
            }
            _ => {}
        }
    }
    let mut places = Vec::new();
    walk(value, "", &mut places);
    places
}

/// One change of some bytes.
#[derive(Debug, Clone)]
enum Damage {
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    Cut(Index),
}

fn any_damage() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        4 => (any::<Index>(), 1..=255u8).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        2 => (any::<Index>(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        2 => (any::<Index>(), 1usize..40).prop_map(|(at, bytes)| Damage::Delete(at, bytes)),
        1 => any::<Index>().prop_map(Damage::Cut),
    ];
    prop::collection::vec(one, 1..4)
}

/// Damages some part of a file.
fn damaged(mut file: Vec<u8>, part: std::ops::Range<usize>, damage: &[Damage]) -> Vec<u8> {
    for one in damage {
        let part = part.start.min(file.len())..part.end.min(file.len());
        if part.is_empty() {
            break;
        }
        let at = |index: &Index| part.start + index.index(part.len());
        match one {
            Damage::Flip(index, mask) => file[at(index)] ^= mask,
            Damage::Insert(index, bytes) => drop(file.splice(at(index)..at(index), bytes.iter().copied())),
            Damage::Delete(index, bytes) => {
                let end = (at(index) + bytes).min(file.len());
                file.drain(at(index)..end);
            }
            Damage::Cut(index) => file.truncate(at(index)),
        }
    }
    file
}

/// A tensor file as its header and its data.
fn split(file: &[u8]) -> (Value, &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + length]).unwrap(), &file[8 + length..])
}

fn joined(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Runs a property, always with the same cases.
fn check<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let test = |value| {
        test(value);
        Ok(())
    };
    runner.run(&strategy, test).unwrap();
}

const CONFIG_KEYS: &[&str] = &[
    "rope_scaling",
    "rope_theta",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "text_config",
    "sliding_window_pattern",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "num_key_value_heads",
    "quantization_config",
    "hidden_activation",
    "num_hidden_layers",
    "vocab_size",
];

#[test]
fn any_config_is_read_or_refused() {
    const MODELS: &[&str] =
        &["features-llama/model", "features-qwen3/model", "gemma2/model", "gemma3/model", "phi3/model"];
    check(500, (prop::sample::select(MODELS), any_changes(CONFIG_KEYS)), |(model, changes)| {
        let config = changed(json_of(&format!("{model}/config.json")), &changes);
        open_base(&Folder::of(model).with("config.json", config));
    });
}

#[test]
fn any_tensor_header_is_read_or_refused() {
    const KEYS: &[&str] = &["model.norm.weight", "lm_head.weight", "__metadata__", "x", ""];
    let file = bytes_of(&format!("{BASE}/model.safetensors"));
    let (header, data) = split(&file);
    check(400, any_changes(KEYS), |changes| {
        let file = joined(&changed(header.clone(), &changes), data);
        open_base(&Folder::of(BASE).with("model.safetensors", file));
    });
    let header_end = file.len() - data.len();
    check(300, (any_damage(), any::<bool>()), |(damage, length_only)| {
        let part = if length_only { 0..8 } else { 8..header_end };
        open_base(&Folder::of(BASE).with("model.safetensors", damaged(file.clone(), part, &damage)));
    });
}

#[test]
fn any_list_of_shards_is_read_or_refused() {
    let file = bytes_of(&format!("{BASE}/model.safetensors"));
    let (header, _) = split(&file);
    let map: Value = header
        .as_object()
        .unwrap()
        .keys()
        .map(|name| (name.clone(), Value::from("model.safetensors")))
        .collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    check(100, any_changes(&["weight_map", "x"]), |changes| {
        let index = changed(index.clone(), &changes);
        open_base(&Folder::of(BASE).with("model.safetensors.index.json", index));
    });
}

const LENSES: &[&str] = &["dora-bias", "save-norms", "lora-embedding", "fewer-tokens", "save-embedding-tied"];

#[test]
fn any_adapter_config_is_read_or_refused() {
    const KEYS: &[&str] = &[
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "exclude_modules",
        "bias",
        "use_dora",
        "trainable_token_indices",
        "lora_bias",
        "ensure_weight_tying",
        "a_key_of_the_future",
    ];
    check(500, (prop::sample::select(LENSES), any_changes(KEYS)), |(lens, changes)| {
        let lens = format!("features-qwen2/lenses/{lens}");
        let config = changed(json_of(&format!("{lens}/adapter_config.json")), &changes);
        open_lens(&Folder::of(&lens).with("adapter_config.json", config));
    });
}

#[test]
fn any_lens_header_is_read_or_refused() {
    const KEYS: &[&str] =
        &["base_model.model.model.norm.weight", "base_model.model.lm_head.weight", "__metadata__", "x"];
    check(300, (prop::sample::select(LENSES), any_changes(KEYS)), |(lens, changes)| {
        let lens = format!("features-qwen2/lenses/{lens}");
        let file = bytes_of(&format!("{lens}/adapter_model.safetensors"));
        let (header, data) = split(&file);
        let file = joined(&changed(header, &changes), data);
        open_lens(&Folder::of(&lens).with("adapter_model.safetensors", file));
    });
    // Anywhere, numbers included: what is not finite is refused.
    check(300, (prop::sample::select(LENSES), any_damage()), |(lens, damage)| {
        let lens = format!("features-qwen2/lenses/{lens}");
        let file = bytes_of(&format!("{lens}/adapter_model.safetensors"));
        let whole = 0..file.len();
        open_lens(&Folder::of(&lens).with("adapter_model.safetensors", damaged(file, whole, &damage)));
    });
}

#[test]
fn any_tokenizer_is_read_or_refused() {
    const KEYS: &[&str] = &[
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
        "truncation",
        "padding",
        "version",
        "x",
    ];
    let mut file = json_of(&format!("{BASE}/tokenizer.json"));
    // Most changes shall meet what is not vocabulary.
    file["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    file["model"]["vocab"].as_object_mut().unwrap().retain(|token, _| token.chars().count() == 1);
    file["model"]["merges"] = json!([]);
    check(500, any_changes(KEYS), |changes| {
        open_tokenizer(&Folder::of(BASE).with("tokenizer.json", changed(file.clone(), &changes)));
    });
    check(300, any_damage(), |damage| {
        let file = file.to_string().into_bytes();
        let whole = 0..file.len();
        open_tokenizer(&Folder::of(BASE).with("tokenizer.json", damaged(file, whole, &damage)));
    });
}

#[test]
fn any_settings_of_a_tokenizer_are_read_or_refused() {
    const KEYS: &[&str] =
        &["bos_token", "chat_template", "eos_token", "x_token", "eos_token_id", "temperature", "top_k"];
    const FILES: &[&str] = &["tokenizer_config.json", "generation_config.json"];
    check(300, (prop::sample::select(FILES), any_changes(KEYS)), |(name, changes)| {
        let file = changed(json_of(&format!("{BASE}/{name}")), &changes);
        open_tokenizer(&Folder::of(BASE).with(name, file));
    });
}

/// Opens a base that must be refused, and says why.
fn base_refused(folder: &Folder) -> String {
    let mut why = String::new();
    let opened = sound(folder, || BaseFolder::open(folder.path(), None).inspect_err(|e| why = message(e)));
    assert!(opened.is_none(), "it must be refused");
    why
}

fn lens_refused(folder: &Folder) -> String {
    let mut why = String::new();
    let opened = sound(folder, || {
        OVER.with(|over| LoraFolder::open(folder.path(), over.row.base().layout()))
            .inspect_err(|e| why = message(e))
    });
    assert!(opened.is_none(), "it must be refused");
    why
}

fn tokenizer_refused(folder: &Folder) -> String {
    let mut why = String::new();
    let config = &config();
    let opened = sound(folder, || Tokenizer::open(folder.path(), config).inspect_err(|e| why = message(e)));
    assert!(opened.is_none(), "it must be refused");
    why
}

fn with_keys(mut file: Value, keys: Value) -> String {
    file.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    file.to_string()
}

#[test]
fn what_a_config_claims_is_not_laid_out_before_it_is_there() {
    let with =
        |keys| Folder::of(BASE).with("config.json", with_keys(json_of(&format!("{BASE}/config.json")), keys));
    for (keys, why) in [
        (json!({"num_hidden_layers": 65536, "layer_types": null}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 4096, "layer_types": null}), "model.layers.2.input_layernorm.weight"),
        (
            json!({"hidden_size": 1 << 24, "head_dim": 12, "intermediate_size": 1 << 24}),
            "17592186044416 weights",
        ),
        (json!({"vocab_size": 1 << 24}), "embed_tokens"),
        (
            json!({"hidden_size": 4096, "head_dim": 1024, "num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24}),
            "weights",
        ),
        (json!({"rms_norm_eps": 1e-50}), "rms_norm_eps"),
        (
            json!({"rope_parameters": null, "rope_theta": 1e300, "rope_scaling": {"type": "linear", "factor": 1e-40}}),
            "factor",
        ),
        (
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4, "mscale": -3.0, "mscale_all_dim": -7.213475204444817}}),
            "attention_factor",
        ),
    ] {
        let error = base_refused(&with(keys));
        assert!(error.contains(why), "{error}");
    }
    let large = format!("{{\"x\": [{}0]}}", "0,".repeat(5 << 20));
    assert!(base_refused(&Folder::of(BASE).with("config.json", large)).contains("larger than"));
    let full = format!("{{\"x\": [{}0]}}", "0,".repeat(500_000));
    assert!(base_refused(&Folder::of(BASE).with("config.json", full)).contains("architectures"));
}

#[test]
fn tensor_headers_are_not_held_before_they_are_looked_at() {
    let with = |header: &str| {
        let file = joined(header.as_bytes(), &[]);
        (
            Folder::of(BASE).with("model.safetensors", &file),
            Folder::of("features-qwen2/lenses/save-norms").with("adapter_model.safetensors", &file),
        )
    };
    let tensors: Vec<String> = (0..400_000)
        .map(|n| format!("\"{n}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
        .collect();
    let deep = format!("{{\"x\":{}", "[".repeat(1 << 20));
    for (header, why) in [
        (
            format!(
                "{{\"x\":{{\"dtype\":\"F32\",\"shape\":[{}1],\"data_offsets\":[0,4]}}}}",
                "1,".repeat(15 << 20)
            ),
            "at most 8",
        ),
        (format!("{{{}}}", tensors.join(",")), "more than 131072 tensors"),
        (format!("{{\"{}\":1}}", "x".repeat(30 << 20)), "too long"),
        (format!("{{\"x\":{{\"dtype\":\"{}\"}}}}", "x".repeat(30 << 20)), "unknown dtype"),
        (deep, "tensor `x`"),
    ] {
        let (base, lens) = with(&header);
        for error in [base_refused(&base), lens_refused(&lens)] {
            assert!(error.contains(why), "{error}");
        }
    }
    // What nobody reads costs nothing, however deep and much it is.
    let metadata = format!("{{\"__metadata__\":[{}0]}}", "0,".repeat(15 << 20));
    assert!(base_refused(&with(&metadata).0).contains("is missing"));
}

#[test]
fn a_list_of_shards_names_plain_files_that_are_there() {
    let with = |map: Value| {
        Folder::of(BASE).with("model.safetensors.index.json", json!({"weight_map": map}).to_string())
    };
    let many: Value = (0..2000).map(|n| (n.to_string(), Value::from(n.to_string()))).collect();
    for (map, why) in [
        (json!({"x": "../features-llama/model/model.safetensors"}), "plain file name"),
        (json!({"x": "/etc/passwd"}), "plain file name"),
        (json!({"x": ".."}), "plain file name"),
        (json!({"x": "a\u{0}b"}), "plain file name"),
        (json!({"x": "x".repeat(100_000)}), "plain file name"),
        (json!({"x": "absent.safetensors"}), "absent.safetensors"),
        (json!({"x": ["model.safetensors"]}), "invalid type"),
        (json!({}), "empty"),
        (many, "more than 1024 files"),
    ] {
        let error = base_refused(&with(map));
        assert!(error.contains(why), "{error}");
    }
    // A folder of links is how hubs keep their caches; a pipe is not a file, and would be waited for.
    let linked = Folder::of(BASE);
    assert!(linked.path().join("model.safetensors").is_symlink() && open_base(&linked).is_some());
    for file in ["model.safetensors", "config.json", "model.safetensors.index.json"] {
        let folder = Folder::of(BASE).with(file, "");
        std::fs::remove_file(folder.path().join(file)).unwrap();
        let made = std::process::Command::new("mkfifo").arg(folder.path().join(file)).status().unwrap();
        assert!(made.success() && base_refused(&folder).contains("not a regular file"));
    }
    let endless = Folder::of(BASE).with("config.json", "");
    std::fs::remove_file(endless.path().join("config.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", endless.path().join("config.json")).unwrap();
    assert!(base_refused(&endless).contains("not a regular file"));
}

#[test]
fn patterns_of_a_lens_are_somebody_elses_programs() {
    const LENS: &str = "features-qwen2/lenses/bias-lora-only";
    let with = |keys| {
        Folder::of(LENS)
            .with("adapter_config.json", with_keys(json_of(&format!("{LENS}/adapter_config.json")), keys))
    };
    let regexes = |n: usize| -> Value { (0..n).map(|n| (format!("(k_proj|{n})"), Value::from(4))).collect() };
    let names =
        |n: usize| -> Value { (0..n).map(|n| (format!("layers.{n}.k_proj"), Value::from(4))).collect() };
    for (keys, why) in [
        (json!({"target_modules": r"((?=.)(.|.)*)*(?!.)x"}), "cannot be matched"),
        (json!({"target_modules": r"(?=x)\w{1000}{1000}"}), "no regular expression"),
        (json!({"target_modules": "(".repeat(100_000)}), "longer than"),
        (json!({"target_modules": "(".repeat(4000)}), "no regular expression"),
        (json!({"exclude_modules": r"((?=.)(.|.)*)*(?!.)x"}), "cannot be matched"),
        (json!({"modules_to_save": ["((?=.)(.|.)*)*(?!.)x"]}), "cannot be matched"),
        (
            json!({"layers_pattern": [r"((?=.)(.|.)*)*(?!.)x"], "layers_to_transform": [1]}),
            "cannot be matched",
        ),
        (json!({"rank_pattern": {r"((?=.)(.|.)*)*(?!.)x": 4}}), "cannot be matched"),
        (json!({"rank_pattern": regexes(65)}), "regular expression more than 64"),
        (json!({"layers_to_transform": -1}), "adapter_config.json"),
        (json!({"layers_to_transform": [u64::MAX]}), "match no module"),
        (json!({"layers_to_transform": 1e300}), "adapter_config.json"),
        (json!({"r": 0}), "rank"),
        (json!({"r": 1_000_000_000}), "rank"),
        (json!({"r": 2.5}), "rank"),
        (json!({"lora_alpha": 1e300}), "alpha"),
        (json!({"modules_to_save": ["classifier"]}), "classifier"),
        (json!({("x".repeat(100_000)): true}), "is not supported"),
    ] {
        let error = lens_refused(&with(keys));
        assert!(error.contains(why), "{error}");
    }
    assert!(open_lens(&with(json!({"rank_pattern": names(20_000), "alpha_pattern": regexes(40)}))).is_some());
    for number in ["NaN", "Infinity", "1e999"] {
        let text =
            with_keys(json_of(&format!("{LENS}/adapter_config.json")), json!({"lora_alpha": "<here>"}));
        let folder = Folder::of(LENS).with("adapter_config.json", text.replace("\"<here>\"", number));
        assert!(lens_refused(&folder).contains("adapter_config.json"));
    }
    let full = format!("{{\"x\": [{}0]}}", "0,".repeat(500_000));
    lens_refused(&Folder::of(LENS).with("adapter_config.json", full));
    lens_refused(&Folder::of(LENS).with("adapter_config.json", "[".repeat(1 << 20)));
}

#[test]
fn a_tokenizer_neither_grows_nor_panics() {
    let file = || json_of(&format!("{BASE}/tokenizer.json"));
    let with = |text: String| Folder::of(BASE).with("tokenizer.json", text);
    let zeros = |n: usize| format!("[{}0]", "0,".repeat(n));
    let replacing =
        |key: &str, text: &str| with_keys(file(), json!({key: "<here>"})).replace("\"<here>\"", text);
    let doubling = json!({"type": "Sequence", "normalizers":
        vec![json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}); 40]});
    let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    for (text, why) in [
        (replacing("normalizer", &zeros(10 << 20)), "too many values"),
        (replacing("post_processor", &zeros(10 << 20)), "too many values"),
        (replacing("truncation", &zeros(10 << 20)), "too many values"),
        (replacing("normalizer", &"[".repeat(1 << 20)), "recursion limit"),
        (replacing("normalizer", &doubling.to_string()), "normalizer may turn one byte into"),
        // The library panics on this one.
        (replacing("normalizer", &charsmap.to_string()), "library failed"),
        (replacing("version", "\"2.0\""), "version"),
        ("{\"model\": {}, \"model\": {}}".into(), "twice"),
    ] {
        let error = tokenizer_refused(&with(text));
        assert!(error.contains("tokenizer.json") && error.contains(why), "{error}");
    }
    // An expression without an end is stopped by its engine, which is a panic in the library.
    let split = json!({"type": "Split", "pattern": {"Regex": "(a|b|ab)*bc"}, "behavior": "Isolated", "invert": false});
    let folder = with(replacing("pre_tokenizer", &split.to_string()));
    let tokenizer = Tokenizer::open(folder.path(), &config()).unwrap();
    let text = format!("{}acbc", "ab".repeat(40));
    let error = tokenizer.encode(&text, false).unwrap_err();
    assert!(error.to_string().contains("retry-limit"), "{error}");
    assert!(tokenizer.encode("abc", false).is_ok(), "it goes on");
    // Ids of any size are ids.
    let mut huge = file();
    huge["model"]["vocab"]["a"] = json!(u32::MAX);
    huge["added_tokens"][0]["id"] = json!(u32::MAX);
    open_tokenizer(&with(huge.to_string()));
}
