//! Which files are meant, and what is in them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::yaml;

/// Larger files are no manifests.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// How files with objects are called in a folder.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// One document of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The file as it was named, or as it was found below a folder that was; `-` for standard input.
    pub file: String,
    /// The first is 1. Empty ones count.
    pub index: usize,
    /// What it holds.
    pub content: Value,
}

/// A file that could not be read, at least not to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// The file or folder.
    pub file: String,
    /// Why.
    pub message: String,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Files {
    /// All documents, in the order of the inputs and then of the names.
    pub documents: Vec<Document>,
    /// What could not be read.
    pub unreadable: Vec<Unreadable>,
}

/// Reads files, the manifests below folders, and `stdin` where an input is `-`.
pub fn read(inputs: &[PathBuf], mut stdin: impl Read) -> Files {
    let mut files = Files::default();
    for input in inputs {
        if input.as_os_str() == "-" {
            files.add("-", text_of(&mut stdin));
            continue;
        }
        match manifests(input) {
            Ok(paths) if paths.is_empty() => {
                let nothing = format!("there is no file with the ending {}", EXTENSIONS.join(", "));
                files.add(&input.display().to_string(), Err(io::Error::other(nothing)));
            }
            Ok(paths) => {
                for path in paths {
                    files.add(&path.display().to_string(), File::open(&path).and_then(text_of));
                }
            }
            Err(error) => files.add(&input.display().to_string(), Err(error)),
        }
    }
    files
}

impl Files {
    fn add(&mut self, file: &str, text: io::Result<String>) {
        let (contents, error) = match text {
            Ok(text) => yaml::documents(&text),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let document =
            |(index, content): (usize, Value)| Document { file: file.to_owned(), index: index + 1, content };
        self.documents.extend(contents.into_iter().enumerate().map(document));
        self.unreadable.extend(error.map(|message| Unreadable { file: file.to_owned(), message }));
    }
}

fn text_of(input: impl Read) -> io::Result<String> {
    let mut text = String::new();
    let bytes = input.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if bytes as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it has more than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

/// A file itself, or the manifests below a folder.
fn manifests(input: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(input)?.is_dir() {
        return Ok(vec![input.to_owned()]);
    }
    let mut found = Vec::new();
    search(input, &mut found)?;
    Ok(found)
}

/// Finds manifests below a folder, by name. What is hidden, such as `.git`, is not looked at; links to folders are
/// not followed, so that a circle has no way round.
fn search(folder: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        } else if entry.file_type()?.is_dir() {
            search(&path, found)?;
        } else if EXTENSIONS.contains(&extension) {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_folder_is_searched_and_standard_input_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("b.yaml", "x: 1\n---\nx: 2\n");
        write("a/c.yml", "x: 3\n");
        write("a/d.json", "{\"x\": 4}");
        write("a/README.md", "# no manifest");
        write(".git/e.yaml", "x: 5\n");
        let inputs = [folder.path().to_owned(), PathBuf::from("-")];
        let files = read(&inputs, "x: 6\n".as_bytes());
        assert_eq!(files.unreadable, []);
        let name = |document: &Document| document.file.rsplit('/').next().unwrap_or_default().to_owned();
        let read: Vec<_> =
            files.documents.iter().map(|d| (name(d), d.index, d.content["x"].clone())).collect();
        let expected = [
            ("c.yml", 1, json!(3)),
            ("d.json", 1, json!(4)),
            ("b.yaml", 1, json!(1)),
            ("b.yaml", 2, json!(2)),
            ("-", 1, json!(6)),
        ];
        assert_eq!(read, expected.map(|(name, index, x)| (name.to_owned(), index, x)));
    }

    #[test]
    fn what_is_missing_empty_or_no_text_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("binary");
        fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
        let inputs = [folder.path().join("missing"), folder.path().to_owned(), binary];
        let files = read(&inputs, io::empty());
        assert_eq!(files.documents, []);
        let messages: Vec<_> = files.unreadable.iter().map(|u| u.message.as_str()).collect();
        assert_eq!(messages.len(), 3, "{messages:?}");
        assert!(messages[1].contains("yaml, yml, json"), "{messages:?}");
    }
}
