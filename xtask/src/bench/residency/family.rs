//! A synthesised base with numbered lenses over it, no two of the same content, and the documents that declare some of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bench::{output_of, run_through};
use crate::stage;

/// Lenses of one group, at most: what a ModelGroup holds.
const GROUP_LENSES: usize = 256;
/// Most lenses that one document holds: 16 groups, what a ModelPlacement names.
pub(super) const MOST_LENSES: usize = 16 * GROUP_LENSES;
/// Device memory beside the lenses: more than the base, the workspace and a little KV cache need.
const BESIDE_LENSES_BYTES: u64 = 512 << 20;

/// What is synthesised.
#[derive(Debug)]
pub(super) struct Shape {
    /// Of the base, as `turret-worker synth --bytes` takes it.
    pub(super) base_bytes: &'static str,
    /// Of every lens.
    pub(super) rank: u32,
    pub(super) lenses: usize,
}

/// What was synthesised.
#[derive(Debug)]
pub(super) struct Family {
    folder: PathBuf,
    pub(super) lenses: usize,
    /// Bytes that a lens takes in memory.
    pub(super) lens_bytes: u64,
}

impl Family {
    /// Synthesises it below `folder`; once.
    pub(super) fn make(program: &Path, folder: &Path, shape: &Shape) -> Result<Self> {
        let Shape { base_bytes, rank, lenses } = shape;
        let folder = folder.join(format!("residency-{base_bytes}-{lenses}x{rank}"));
        let done = folder.join("complete");
        if !done.exists() {
            stage::run(format!("synthesise {lenses} lenses of rank {rank} over {base_bytes}"), |_| {
                if folder.exists() {
                    std::fs::remove_dir_all(&folder)?;
                }
                let mut synth = Command::new(program);
                synth.arg("synth").arg(&folder).args(["--bytes", *base_bytes]);
                for lens in 0..*lenses {
                    synth.args(["--lens", &format!("{}:{rank}", lens_name(lens))]);
                }
                run_through(&mut synth)?;
                std::fs::write(&done, "")?;
                anyhow::Ok(())
            })?;
        }
        let mut inspect = Command::new(program);
        inspect.arg("inspect").arg(lens_folder(&folder, 0)).arg("--base").arg(folder.join("base"));
        let said = output_of(&mut inspect)?;
        let lens_bytes = bytes_in_memory(&said)
            .with_context(|| format!("`turret-worker inspect` says no bytes in memory: {said}"))?;
        Ok(Self { folder, lenses: *lenses, lens_bytes })
    }

    /// What clients call these lenses.
    pub(super) fn models(lenses: impl IntoIterator<Item = usize>) -> Vec<String> {
        lenses.into_iter().map(|lens| format!("{}:{}", group_name(lens), lens_name(lens))).collect()
    }

    /// YAML that declares these lenses and a budget for them, for `turret-worker serve --file`.
    pub(super) fn document(
        &self,
        lenses: impl IntoIterator<Item = usize>,
        lens_budget_bytes: u64,
    ) -> Result<String> {
        let mut groups: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for lens in lenses {
            let source = json!({"uri": uri(&lens_folder(&self.folder, lens))});
            let declared = json!({"name": lens_name(lens), "source": source});
            groups.entry(group_name(lens)).or_default().push(declared);
        }
        let placed: Vec<Value> = groups.keys().map(|name| json!({"name": name})).collect();
        let base = json!({"source": {"uri": uri(&self.folder.join("base"))}});
        let mut objects: Vec<Value> = groups
            .iter()
            .map(|(name, lenses)| object("ModelGroup", name, &json!({"base": base, "lenses": lenses})))
            .collect();
        let memory = json!({
            "deviceBudget": (lens_budget_bytes + BESIDE_LENSES_BYTES).to_string(),
            "lensBudget": lens_budget_bytes.to_string(),
        });
        let batching = json!({"maxContextTokens": 64, "maxRunningRows": 16});
        let placement = json!({"groups": placed, "memory": memory, "batching": batching});
        objects.push(object("ModelPlacement", "bench", &placement));
        let texts = objects.iter().map(serde_yaml::to_string).collect::<Result<Vec<_>, _>>()?;
        Ok(texts.join("---\n"))
    }
}

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "turret.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn lens_name(lens: usize) -> String {
    format!("l{lens:04}")
}

fn group_name(lens: usize) -> String {
    format!("g{:02}", lens / GROUP_LENSES)
}

fn lens_folder(folder: &Path, lens: usize) -> PathBuf {
    folder.join("lenses").join(lens_name(lens))
}

fn uri(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// What `turret-worker inspect` says of a lens.
fn bytes_in_memory(said: &str) -> Option<u64> {
    said.lines().find_map(|line| line.strip_prefix("bytes in memory: ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_document_has_as_many_groups_and_lenses_as_there_may_be() {
        let family = Family { folder: "/f".into(), lenses: MOST_LENSES, lens_bytes: 100 };
        let text = family.document(0..MOST_LENSES, 1000).unwrap();
        let objects: Vec<Value> = serde_yaml::Deserializer::from_str(&text)
            .map(|object| serde::Deserialize::deserialize(object).unwrap())
            .collect();
        assert_eq!(objects.len(), 17);
        assert!(objects[..16].iter().all(|group| group["kind"] == "ModelGroup"));
        let last = &objects[15]["spec"]["lenses"];
        assert_eq!(last.as_array().map(Vec::len), Some(256));
        assert_eq!(last[255], json!({"name": "l4095", "source": {"uri": "file:///f/lenses/l4095"}}));
        let placement = &objects[16]["spec"];
        assert_eq!(placement["groups"][15]["name"], "g15");
        assert_eq!(placement["memory"]["lensBudget"], "1000");
        assert_eq!(Family::models([0, 4095]), ["g00:l0000", "g15:l4095"]);
    }

    #[test]
    fn a_document_of_few_lenses_has_only_their_groups() {
        let family = Family { folder: "/f".into(), lenses: MOST_LENSES, lens_bytes: 100 };
        let text = family.document([4095, 300], 1).unwrap();
        let kinds = text.lines().filter(|line| *line == "kind: ModelGroup").count();
        assert_eq!(kinds, 2, "{text}");
    }

    #[test]
    fn what_is_inspected_is_read() {
        assert_eq!(bytes_in_memory("kind: lens (LoRA)\nbytes in memory: 20608\nfiles:\n"), Some(20608));
        assert_eq!(bytes_in_memory("bytes in memory: known with --base FOLDER\n"), None);
    }
}
