//! Pure: an OCI image of one layer, as one tar. The same contents give the same bytes, and
//! so the same digest: entries are sorted, times are zero, owners are root.
//!
//! The image format is three small JSON documents around tar files, written here as they
//! are; `tar` does the rest.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What a path in an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A folder with its permissions.
    Folder {
        /// Its permissions.
        mode: u32,
    },
    /// A file.
    File {
        /// What is in it.
        content: Vec<u8>,
        /// Its permissions.
        mode: u32,
    },
}

/// The files of an image, by absolute path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files(BTreeMap<String, Entry>);

/// How an image's process starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// `NAME=value` pairs.
    pub environment: Vec<String>,
    /// The user and group, as numbers.
    pub user: String,
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Archive {
    /// The digest of its manifest, as in `sha256:…`.
    pub digest: String,
    manifest: Vec<u8>,
    config: Vec<u8>,
    layer: Vec<u8>,
}

impl Files {
    /// Adds a path, and the folders above it that are not there yet.
    pub fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/').to_owned();
        for (end, _) in path.match_indices('/') {
            let folder = path[..end].to_owned();
            self.0.entry(folder).or_insert(Entry::Folder { mode: 0o755 });
        }
        self.0.insert(path, entry);
    }

    /// Adds a text file that everyone can read.
    pub fn add_text(&mut self, path: &str, text: &str) {
        self.add(path, Entry::File { content: text.into(), mode: 0o644 });
    }

    fn layer(&self) -> io::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            let mut header = header();
            match entry {
                Entry::Folder { mode } => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    tar.append_data(&mut header, format!("{path}/"), io::empty())?;
                }
                Entry::File { content, mode } => {
                    header.set_size(content.len() as u64);
                    header.set_mode(*mode);
                    tar.append_data(&mut header, path, content.as_slice())?;
                }
            }
        }
        tar.into_inner()
    }
}

impl Archive {
    /// Makes the image of `files` that starts like `start`.
    pub fn new(files: &Files, start: &Start) -> io::Result<Archive> {
        let layer = files.layer()?;
        let config = to_bytes(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": start.entrypoint,
                "Env": start.environment,
                "User": start.user,
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        }));
        let descriptor = |kind: &str, blob: &[u8]| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(blob), "size": blob.len()});
        let manifest = to_bytes(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", &config),
            "layers": [descriptor("layer.v1.tar", &layer)],
        }));
        Ok(Archive { digest: digest(&manifest), manifest, config, layer })
    }

    /// Twelve hexadecimal digits of the digest: a tag that changes with the contents.
    pub fn content_tag(&self) -> &str {
        &self.digest["sha256:".len()..][..12]
    }

    /// Writes the image under each of `names`, which are `name:tag`.
    pub fn write(&self, names: &[&str], output: impl Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(output);
        let mut add = |path: &str, content: &[u8]| {
            let mut header = header();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, content)
        };
        add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        add("index.json", &to_bytes(&self.index(names)))?;
        for blob in [&self.manifest, &self.config, &self.layer] {
            add(&format!("blobs/{}", digest(blob).replace(':', "/")), blob)?;
        }
        tar.finish()
    }

    fn index(&self, names: &[&str]) -> Value {
        let manifests: Vec<_> = names
            .iter()
            .map(|name| {
                json!({
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "digest": self.digest,
                    "size": self.manifest.len(),
                    "annotations": {
                        "io.containerd.image.name": name,
                        "org.opencontainers.image.ref.name": name.rsplit(':').next(),
                    },
                })
            })
            .collect();
        json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests})
    }
}

fn header() -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// This machine's architecture, as images call it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn to_bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(content)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Files, Start) {
        let mut files = Files::default();
        files.add_text("/etc/passwd", "turret:x:65532:65532::/:/none\n");
        files.add("/bin/program", Entry::File { content: b"ELF".to_vec(), mode: 0o755 });
        files.add("/tmp", Entry::Folder { mode: 0o1777 });
        let start = Start {
            entrypoint: vec!["/bin/program".into()],
            environment: vec![],
            user: "65532:65532".into(),
        };
        (files, start)
    }

    fn written(archive: &Archive) -> BTreeMap<String, Vec<u8>> {
        let mut bytes = Vec::new();
        archive.write(&["a.b/c:dev", "a.b/c:123"], &mut bytes).unwrap();
        let mut tar = tar::Archive::new(bytes.as_slice());
        tar.entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                let mut content = Vec::new();
                io::copy(&mut entry, &mut content).unwrap();
                (path, content)
            })
            .collect()
    }

    #[test]
    fn the_same_contents_give_the_same_digest_and_others_another() {
        let (mut files, start) = sample();
        let first = Archive::new(&files, &start).unwrap();
        assert_eq!(first.digest, Archive::new(&files.clone(), &start).unwrap().digest);
        files.add_text("/etc/passwd", "other");
        assert_ne!(first.digest, Archive::new(&files, &start).unwrap().digest);
        assert_eq!(first.content_tag().len(), 12);
    }

    #[test]
    fn every_blob_lies_under_its_own_digest_and_is_as_long_as_described() {
        let (files, start) = sample();
        let archive = Archive::new(&files, &start).unwrap();
        let written = written(&archive);
        let parse = |path: &str| serde_json::from_slice::<Value>(&written[path]).unwrap();
        let blob = |digest: &Value| format!("blobs/{}", digest.as_str().unwrap().replace(':', "/"));
        let index = parse("index.json");
        assert_eq!(index["manifests"].as_array().unwrap().len(), 2);
        let manifest = parse(&blob(&index["manifests"][0]["digest"]));
        for descriptor in [&manifest["config"], &manifest["layers"][0], &index["manifests"][1]] {
            let content = &written[&blob(&descriptor["digest"])];
            assert_eq!(descriptor["size"], content.len());
            assert_eq!(descriptor["digest"], digest(content));
        }
        let config = parse(&blob(&manifest["config"]["digest"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(config["config"]["User"], "65532:65532");
    }

    #[test]
    fn the_layer_holds_folders_before_what_is_in_them_with_fixed_times() {
        let (files, _) = sample();
        let layer = files.layer().unwrap();
        let mut tar = tar::Archive::new(layer.as_slice());
        let seen: Vec<_> = tar
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                assert_eq!(entry.header().mtime().unwrap(), 0);
                assert_eq!(entry.header().uid().unwrap(), 0);
                (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap())
            })
            .collect();
        let expected = [
            ("bin/", 0o755),
            ("bin/program", 0o755),
            ("etc/", 0o755),
            ("etc/passwd", 0o644),
            ("tmp/", 0o1777),
        ];
        assert_eq!(seen, expected.map(|(path, mode)| (path.to_owned(), mode)));
    }
}
