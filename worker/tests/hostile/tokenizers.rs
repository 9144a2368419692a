//! Tokenizers and their settings.

use proptest::prelude::*;
use serde_json::json;
use turret_worker::model::tokenizer::Tokenizer;

use crate::change::{any_changes, changed, check, with_keys};
use crate::damage::{any_damage, damaged};
use crate::folder::{Folder, json_of};
use crate::open::{BASE, config, open_tokenizer, tokenizer_refused};

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
