//! Tensor files, and lists of them.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::change::{any_changes, changed, check};
use crate::damage::{any_damage, damaged, joined, split};
use crate::folder::{Folder, bytes_of};
use crate::open::{BASE, base_refused, lens_refused, open_base};

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
