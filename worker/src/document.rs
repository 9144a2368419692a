//! Where the worker document comes from when nobody pushes it: a file, a mounted ConfigMap, or the YAML of
//! ModelGroups and a ModelPlacement, compiled here exactly as the operator compiles it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use turret_crds::document::{MAX_JSON_BYTES, PROTOCOL, Previous, WorkerDocument, compile};
use turret_crds::hints::Hints;
use turret_crds::placement::PlacedGroup;
use turret_crds::{ModelGroup, ModelPlacement, ModelPlacementSpec, label};

use crate::telemetry::chain;

/// Where a document is read from.
#[derive(Clone, Debug)]
pub enum DocumentInput {
    /// A worker document, or a folder that holds one.
    Document(PathBuf),
    /// YAML of ModelGroups and at most one ModelPlacement.
    Objects(Vec<PathBuf>),
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// A file cannot be read.
    #[error("failed to read `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("`{path}`: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in it.
        what: String,
    },
    /// The objects cannot be served together.
    #[error("{0}")]
    Objects(String),
    /// A document was damaged, or written by hand.
    #[error("the document's digest is {declared}, its content has {computed}")]
    Digest {
        /// What it says.
        declared: String,
        /// What it is.
        computed: String,
    },
    /// A newer operator speaks another protocol.
    #[error(
        "the document is of protocol {0}, this worker speaks {PROTOCOL}; give the placement a newer worker image"
    )]
    Protocol(u32),
    /// A document with groups names one of them as the default.
    #[error("the document's default group `{0}` is not one of its groups")]
    DefaultGroup(String),
}

/// Refuses a document that this worker cannot or must not follow.
pub fn check(document: &WorkerDocument) -> Result<(), DocumentError> {
    if document.protocol != PROTOCOL {
        return Err(DocumentError::Protocol(document.protocol));
    }
    let computed = document.compute_digest();
    if computed != document.digest {
        return Err(DocumentError::Digest { declared: document.digest.clone(), computed });
    }
    if document.default_group().is_none() && !(document.groups.is_empty() && document.default_group.is_none())
    {
        return Err(DocumentError::DefaultGroup(document.default_group.clone().unwrap_or_default()));
    }
    Ok(())
}

/// Identity of the files a document is made of. Another value: read it again.
pub type InputVersion = Vec<Option<(u64, u64, u64, i64, i64)>>;

impl DocumentInput {
    fn paths(&self) -> Vec<PathBuf> {
        match self {
            Self::Document(path) if path.is_dir() => {
                vec![path.join(label::DOCUMENT_KEY), path.join(label::HINTS_KEY)]
            }
            Self::Document(path) => vec![path.clone()],
            Self::Objects(paths) => paths.clone(),
        }
    }

    /// What the files are now. Follows symbolic links, which is how the kubelet replaces a mounted ConfigMap.
    pub fn version(&self) -> InputVersion {
        let identity = |path: &PathBuf| {
            let m = std::fs::metadata(path).ok()?;
            Some((m.dev(), m.ino(), m.len(), m.mtime_nsec() + m.mtime() * 1_000_000_000, m.ctime_nsec()))
        };
        self.paths().iter().map(identity).collect()
    }

    /// Reads the document. `previous` is the sequence and digest of the last one read here, so that a changed YAML
    /// file becomes a newer document.
    pub fn read(&self, previous: Option<(u64, String)>) -> Result<WorkerDocument, DocumentError> {
        let document = match self {
            Self::Document(path) => {
                let mut document = read_document(&self.paths()[0])?;
                if path.is_dir() {
                    document.hints = read_hints(&path.join(label::HINTS_KEY));
                }
                document
            }
            Self::Objects(paths) => compile_objects(paths, previous)?,
        };
        check(&document)?;
        Ok(document)
    }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, DocumentError> {
    use std::io::Read;
    let io = |source| DocumentError::Read { path: path.into(), source };
    let mut bytes = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        let what = format!("it is larger than {MAX_JSON_BYTES} bytes");
        return Err(DocumentError::Malformed { path: path.into(), what });
    }
    Ok(bytes)
}

fn read_document(path: &Path) -> Result<WorkerDocument, DocumentError> {
    let bytes = read_bytes(path)?;
    let malformed = |what: String| DocumentError::Malformed { path: path.into(), what };
    match path.extension().and_then(|e| e.to_str()) {
        Some("gz") => WorkerDocument::from_gzip(&bytes).map_err(|e| malformed(e.to_string())),
        Some("yaml" | "yml") => serde_yaml::from_slice(&bytes).map_err(|e| malformed(e.to_string())),
        _ => serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string())),
    }
}

/// The hints that lie beside a document. They are advice: without them, or with damaged ones, it is served all the same.
fn read_hints(path: &Path) -> Option<Hints> {
    let bytes = path.exists().then(|| read_bytes(path))?;
    let hints =
        bytes.map_err(|error| chain(&error)).and_then(|b| Hints::from_gzip(&b).map_err(|e| chain(&e)));
    hints.inspect_err(|error| tracing::warn!(error, "the hints beside the document cannot be read")).ok()
}

/// Namespace of objects that do not say theirs.
const NAMESPACE: &str = "default";

fn compile_objects(
    paths: &[PathBuf],
    previous: Option<(u64, String)>,
) -> Result<WorkerDocument, DocumentError> {
    let mut groups: Vec<ModelGroup> = Vec::new();
    let mut placements: Vec<ModelPlacement> = Vec::new();
    for path in paths {
        let bytes = read_bytes(path)?;
        read_objects(&bytes, &mut groups, &mut placements)
            .map_err(|what| DocumentError::Malformed { path: path.clone(), what })?;
    }
    if groups.is_empty() {
        return Err(DocumentError::Objects("there is no ModelGroup in the given files".into()));
    }
    let placement = match placements.len() {
        0 => over_all(&groups),
        1 => placements.remove(0),
        n => {
            let what = format!("the given files hold {n} ModelPlacements; one worker serves one of them");
            return Err(DocumentError::Objects(what));
        }
    };
    let mut by_name = BTreeMap::new();
    for group in &groups {
        let namespace = group.metadata.namespace.clone().unwrap_or_default();
        let name = group.metadata.name.clone().unwrap_or_default();
        if by_name.insert((namespace, name.clone()), group).is_some() {
            return Err(DocumentError::Objects(format!("there are two ModelGroups called `{name}`")));
        }
    }
    let reported = previous.as_ref().map_or(0, |p| p.0);
    // Without a cluster nobody has labelled the namespace; its name is the label that each has.
    let namespace = placement.metadata.namespace.clone().unwrap_or_default();
    let labels = BTreeMap::from([(label::NAMESPACE_NAME.to_owned(), namespace)]);
    // Nobody knows here what aliases led to before, so they lead to what is declared.
    let previous = Previous { stored: previous, reported, ..Previous::default() };
    let compiled = compile(&placement, &by_name, &labels, &[], &previous);
    let problems: Vec<String> = compiled.problems.iter().map(|p| p.message.clone()).collect();
    match compiled.document {
        Some(document) if problems.is_empty() => Ok(document),
        _ => Err(DocumentError::Objects(problems.join("; "))),
    }
}

/// A placement over all groups, for a laptop.
fn over_all(groups: &[ModelGroup]) -> ModelPlacement {
    let mut names: Vec<String> = groups.iter().filter_map(|g| g.metadata.name.clone()).collect();
    names.sort();
    let placed =
        names.into_iter().map(|name| PlacedGroup { name, group_ref: None, residency: None }).collect();
    let spec = ModelPlacementSpec { groups: placed, ..minimal_spec() };
    let mut placement = ModelPlacement::new("local", spec);
    placement.metadata.namespace = groups[0].metadata.namespace.clone();
    placement.metadata.uid = Some("local".into());
    placement
}

fn minimal_spec() -> ModelPlacementSpec {
    serde_json::from_value(serde_json::json!({"groups": []})).expect("every other field has a default")
}

fn read_objects(
    bytes: &[u8],
    groups: &mut Vec<ModelGroup>,
    placements: &mut Vec<ModelPlacement>,
) -> Result<(), String> {
    for (index, document) in serde_yaml::Deserializer::from_slice(bytes).enumerate() {
        let mut value = serde_json::Value::deserialize(document).map_err(|e| e.to_string())?;
        if value.is_null() {
            continue;
        }
        let kind = value["kind"].as_str().unwrap_or_default().to_owned();
        let name = value["metadata"]["name"].as_str().unwrap_or("(no name)").to_owned();
        let at = |what: String| format!("document {} ({kind} `{name}`): {what}", index + 1);
        if value["apiVersion"] != "turret.dev/v1alpha1" {
            return Err(at(format!("apiVersion is {}, expected turret.dev/v1alpha1", value["apiVersion"])));
        }
        let metadata = value["metadata"].as_object_mut().ok_or_else(|| at("it has no metadata".into()))?;
        metadata.entry("namespace").or_insert(NAMESPACE.into());
        match kind.as_str() {
            "ModelGroup" => {
                let group: ModelGroup = strict(value).map_err(at)?;
                group.validate_cel().map_err(|e| at(e.to_string()))?;
                groups.push(group);
            }
            "ModelPlacement" => {
                let mut placement: ModelPlacement = strict(value).map_err(at)?;
                placement.validate_cel().map_err(|e| at(e.to_string()))?;
                placement.metadata.uid.get_or_insert_with(|| "local".into());
                placements.push(placement);
            }
            _ => return Err(at("expected a ModelGroup or a ModelPlacement".into())),
        }
    }
    Ok(())
}

/// Reads a value and refuses every field that the type does not have, with its path.
fn strict<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, String> {
    let mut unknown = Vec::new();
    let read = serde_ignored::deserialize(value, |path| unknown.push(path.to_string()))
        .map_err(|e| e.to_string())?;
    // The types read these two without having them as fields.
    unknown.retain(|path| path != "apiVersion" && path != "kind");
    if unknown.is_empty() { Ok(read) } else { Err(format!("unknown field {}", unknown.join(", "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: &str = r#"
apiVersion: turret.dev/v1alpha1
kind: ModelGroup
metadata: {name: NAME}
spec:
  base: {source: {uri: "file:///models/a"}}
  lenses: [{name: terse, source: {uri: "file:///models/terse"}}]
"#;

    fn read(yaml: &str, previous: Option<(u64, String)>) -> Result<WorkerDocument, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("objects.yaml");
        std::fs::write(&path, yaml).unwrap();
        let input = DocumentInput::Objects(vec![path]);
        input.read(previous).map_err(|e| e.to_string())
    }

    #[test]
    fn groups_alone_are_all_served() {
        let yaml = format!("{}---\n{}", GROUP.replace("NAME", "b"), GROUP.replace("NAME", "a"));
        let document = read(&yaml, None).unwrap();
        assert_eq!(document.groups.iter().map(|g| g.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((document.default_group.as_deref(), document.sequence), (Some("a"), 1));
        let again = read(&yaml, Some((1, document.digest.clone()))).unwrap();
        assert_eq!(again, document, "the same files are the same document");
        let changed = yaml.replace("terse", "pirate");
        assert_eq!(read(&changed, Some((1, document.digest))).unwrap().sequence, 2);
    }

    #[test]
    fn aliases_lead_to_what_is_declared() {
        let other = "{name: pirate, source: {uri: \"file:///models/pirate\"}}";
        let alias = |lens: &str| {
            let group = GROUP.replace("NAME", "a").replace("lenses: [", &format!("lenses: [{other}, "));
            group + &format!("  aliases: [{{name: default, targets: [{{lensName: {lens}}}]}}]\n")
        };
        let document = read(&alias("terse"), None).unwrap();
        let changed = read(&alias("pirate"), Some((1, document.digest.clone()))).unwrap();
        let targets = |document: &WorkerDocument| {
            let targets = &document.groups[0].alias("default").unwrap().targets;
            targets.iter().map(|target| (target.lens.clone(), target.weight)).collect::<Vec<_>>()
        };
        assert_eq!(targets(&document), [("terse".to_owned(), 1)]);
        assert_eq!((targets(&changed), changed.sequence), (vec![("pirate".to_owned(), 1)], 2));
        let refused = read(&alias("missing"), None).unwrap_err();
        assert!(refused.contains("every target of an alias must be"), "{refused}");
    }

    #[test]
    fn what_a_cluster_would_refuse_is_refused_here_with_its_place() {
        let yaml = GROUP.replace("NAME", "a");
        for (from, to, expected) in [
            ("lenses:", "lensess:", "lensess"),
            ("uri: \"file:///models/terse\"", "uri: \"s3://models/terse\"", "uri must begin with"),
            ("kind: ModelGroup", "kind: Deployment", "expected a ModelGroup"),
            ("turret.dev/v1alpha1", "turret.dev/v9", "expected turret.dev/v1alpha1"),
        ] {
            let refused = read(&yaml.replace(from, to), None).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
        let placement = "\n---\napiVersion: turret.dev/v1alpha1\nkind: ModelPlacement\nmetadata: {name: p}\nspec: {groups: [{name: missing}]}\n";
        assert!(read(&(yaml + placement), None).unwrap_err().contains("`missing`"));
    }

    #[test]
    fn a_damaged_document_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut document = read(&GROUP.replace("NAME", "a"), None).unwrap();
        let input = DocumentInput::Document(folder.path().into());
        let path = folder.path().join(label::DOCUMENT_KEY);
        std::fs::write(&path, document.to_gzip()).unwrap();
        assert_eq!(input.read(None).unwrap(), document);
        document.groups[0].name = "other".into();
        std::fs::write(&path, document.to_gzip()).unwrap();
        assert!(matches!(input.read(None), Err(DocumentError::Digest { .. })));
    }

    #[test]
    fn hints_are_read_beside_a_document_and_damaged_ones_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let document = read(&GROUP.replace("NAME", "a"), None).unwrap();
        let input = DocumentInput::Document(folder.path().into());
        std::fs::write(folder.path().join(label::DOCUMENT_KEY), document.to_gzip()).unwrap();
        let alone = input.version();
        let hints = Hints { version: 3, ..Hints::default() };
        std::fs::write(folder.path().join(label::HINTS_KEY), hints.to_gzip()).unwrap();
        assert_ne!(input.version(), alone, "they are looked for again and again");
        let advised = input.read(None).unwrap();
        assert_eq!((advised.hints.clone(), &advised.digest), (Some(hints), &document.digest));
        assert_eq!(advised.compute_digest(), document.digest, "they are not part of what is declared");
        std::fs::write(folder.path().join(label::HINTS_KEY), b"other").unwrap();
        assert_eq!(input.read(None).unwrap(), document);
    }
}
