//! What a hub says that a file is, and whether what arrived is that.
//!
//! Small files are named by git: SHA-1 over their length and content. Large ones are named by SHA-256, in the answer that
//! redirects to where they are stored (there they may have a tag of another kind, which is not looked at).

use reqwest::header::{CONTENT_LENGTH, ETAG, HeaderName};
use reqwest::{Response, StatusCode};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::fetch::text;

const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");

/// What a hub says of a file. Nothing, where another server answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Linked {
    etag: Option<String>,
    size: Option<u64>,
    commit: Option<String>,
}

/// How a file is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name<'a> {
    Sha256(&'a str),
    GitBlob(&'a str),
    /// In no way that can be computed.
    Other,
}

impl Linked {
    /// Takes what an answer of the hub's own host says, a redirect or the file.
    pub fn read(&mut self, response: &Response) {
        let header = |name: &HeaderName| text(response.headers(), name).map(str::to_owned);
        let plain = |tag: String| tag.trim_start_matches("W/").trim_matches('"').to_owned();
        let own = || header(&ETAG).filter(|_| response.status().is_success());
        self.etag = header(&LINKED_ETAG).or_else(own).map(plain).or(self.etag.take());
        let whole = || header(&CONTENT_LENGTH).filter(|_| response.status() == StatusCode::OK);
        let size = header(&LINKED_SIZE).or_else(whole).and_then(|size| size.parse().ok());
        self.size = size.or(self.size);
        self.commit = header(&COMMIT).or(self.commit.take());
    }

    /// SHA-256 of the content, hex, where that is the name that it gives it.
    pub fn sha256(&self) -> Option<&str> {
        match self.name() {
            Name::Sha256(name) => Some(name),
            Name::GitBlob(_) | Name::Other => None,
        }
    }

    /// The name that it gives the content.
    pub fn etag(&self) -> Option<&str> {
        self.etag.as_deref()
    }

    /// The same, and `before` where this answer has none: then it is taken to be as it was.
    pub fn etag_or(&mut self, before: Option<&str>) -> Option<&str> {
        if self.etag.is_none() {
            self.etag = before.map(str::to_owned);
        }
        self.etag()
    }

    /// Whether it speaks of this commit; otherwise of which one.
    pub fn is_of(&self, commit: &str) -> Result<(), String> {
        match &self.commit {
            Some(other) if other != commit => Err(other.clone()),
            _ => Ok(()),
        }
    }

    /// The length of the file, of which `stored` is told where it is stored; both when they differ.
    pub fn length(&self, stored: Option<u64>) -> Result<Option<u64>, (u64, u64)> {
        match (stored, self.size) {
            (Some(stored), Some(said)) if stored != said => Err((stored, said)),
            (stored, said) => Ok(stored.or(said)),
        }
    }

    fn name(&self) -> Name<'_> {
        let hex = |tag: &str| tag.bytes().all(|b| b.is_ascii_hexdigit());
        match self.etag() {
            Some(tag) if tag.len() == 64 && hex(tag) => Name::Sha256(tag),
            Some(tag) if tag.len() == 40 && hex(tag) => Name::GitBlob(tag),
            _ => Name::Other,
        }
    }
}

/// The digests of a file on its way.
pub struct Hashes {
    sha256: Sha256,
    git: Option<Sha1>,
}

impl Hashes {
    /// Begins a file of this length. `None` when it is named by git, which needs the length, and that is not known.
    pub fn begin(linked: &Linked, length: Option<u64>) -> Option<Self> {
        let git = match linked.name() {
            Name::GitBlob(_) => Some(Sha1::new_with_prefix(format!("blob {}\0", length?))),
            Name::Sha256(_) | Name::Other => None,
        };
        Some(Self { sha256: Sha256::new(), git })
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        if let Some(git) = &mut self.git {
            git.update(bytes);
        }
    }

    /// SHA-256 of the content, hex, if the content is what the hub says; otherwise what it is instead.
    pub fn finish(self, linked: &Linked) -> Result<String, String> {
        let sha256 = hex::encode(self.sha256.finalize());
        let (found, named) = match (linked.name(), self.git) {
            (Name::Sha256(named), _) => (sha256.clone(), named),
            (Name::GitBlob(named), Some(git)) => (hex::encode(git.finalize()), named),
            _ => return Ok(sha256),
        };
        if found.eq_ignore_ascii_case(named) { Ok(sha256) } else { Err(found) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&str, &str)]) -> Response {
        let mut answer = http::Response::builder().status(status);
        for (name, value) in headers {
            answer = answer.header(*name, *value);
        }
        answer.body(Vec::new()).unwrap().into()
    }

    /// What the answers of a hub say together.
    fn linked(answers: &[(u16, &[(&str, &str)])]) -> Linked {
        let mut linked = Linked::default();
        for (status, headers) in answers {
            linked.read(&answer(*status, headers));
        }
        linked
    }

    fn verify(linked: &Linked, content: &[u8]) -> Result<String, String> {
        let mut hashes = Hashes::begin(linked, Some(content.len() as u64)).unwrap();
        content.chunks(3).for_each(|chunk| hashes.update(chunk));
        hashes.finish(linked)
    }

    const SHA256_OF_HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    /// `printf hello | git hash-object --stdin`
    const GIT_OF_HELLO: &str = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0";

    #[test]
    fn a_large_file_is_what_the_redirecting_answer_says() {
        let tag = format!("\"{SHA256_OF_HELLO}\"");
        let xet = [
            ("x-linked-etag", tag.as_str()),
            ("x-linked-size", "5"),
            ("x-xet-hash", "00"),
            ("etag", "\"x\""),
        ];
        let said = linked(&[(302, &xet)]);
        assert_eq!(said.etag(), Some(SHA256_OF_HELLO));
        assert_eq!(verify(&said, b"hello"), Ok(SHA256_OF_HELLO.into()));
        assert!(verify(&said, b"hellp").is_err());
        assert_eq!(said.sha256(), Some(SHA256_OF_HELLO));
        assert_eq!(said.length(None), Ok(Some(5)));
        assert_eq!(said.length(Some(6)), Err((6, 5)));
    }

    #[test]
    fn a_small_file_is_what_git_calls_it() {
        let tag = format!("W/\"{GIT_OF_HELLO}\"");
        let moved = [("x-repo-commit", "c"), ("location", "/api/resolve-cache/a")];
        let said = linked(&[(307, &moved), (200, &[("etag", &tag), ("content-length", "5")])]);
        assert_eq!(verify(&said, b"hello"), Ok(SHA256_OF_HELLO.into()));
        assert!(verify(&said, b"hellp").is_err());
        assert!(Hashes::begin(&said, None).is_none(), "git's name covers the length");
        assert_eq!(said.sha256(), None);
        assert_eq!((said.is_of("c"), said.is_of("d")), (Ok(()), Err("c".into())));
    }

    #[test]
    fn what_is_named_otherwise_is_taken_as_it_comes() {
        for headers in [&[("etag", "\"abc\"")][..], &[]] {
            assert_eq!(verify(&linked(&[(200, headers)]), b"hello"), Ok(SHA256_OF_HELLO.into()));
        }
    }
}
