//! Lenses: what they say of themselves, and their tensors.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::change::{any_changes, changed, check, with_keys};
use crate::damage::{any_damage, damaged, joined, split};
use crate::folder::{Folder, bytes_of, json_of};
use crate::open::{lens_refused, open_lens};

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
