//! Tokens that the servers of sources ask for: of a Secret, or for a hub, of whoever runs this worker.
//!
//! They are read at each use, so a new one needs no restart, and appear in no message and no log.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use reqwest::header::HeaderValue;
use turret_crds::condition::FailureReason;
use turret_crds::label;
use turret_crds::source::SecretRef;

use super::failure::Failure;
use super::source::Listed;

/// A token is never longer.
const MAX_BYTES: u64 = 64 << 10;

/// Where tokens are.
#[derive(Clone, Default)]
pub struct Tokens {
    /// Folder with one folder per Secret.
    pub secrets_dir: PathBuf,
    /// Files that were given by the name of a Secret.
    pub files: BTreeMap<String, PathBuf>,
    /// For a hub, where a source names no Secret.
    pub own: Own,
}

/// The token of whoever runs this worker.
#[derive(Clone, Default)]
pub struct Own {
    /// From the environment or the command line.
    pub given: Option<String>,
    /// The file in which `hf auth login` keeps it.
    pub file: Option<PathBuf>,
}

/// Whom a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience<'a> {
    /// A hub, which knows the person at this machine.
    Hub,
    /// Any other server, by the host of its URL.
    Server(&'a str),
}

/// What a server is shown, and where it is from.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    value: Option<String>,
    origin: String,
    /// The Secret that it is of.
    secret: Option<String>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("secrets_dir", &self.secrets_dir).finish_non_exhaustive()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Token").field(&self.origin).finish()
    }
}

impl Token {
    /// No token, and why.
    pub fn none(why: &str) -> Self {
        Self { value: None, origin: why.into(), secret: None }
    }

    #[cfg(test)]
    pub(super) fn of_secret(name: &str, value: &str) -> Self {
        Self { value: Some(value.into()), origin: format!("with `{name}`"), secret: Some(name.into()) }
    }

    /// What is shown, if anything is.
    pub fn value(&self) -> Option<&str> {
        self.value.as_deref()
    }

    /// The same as a header, which no log prints.
    pub fn header(&self) -> Option<HeaderValue> {
        let mut header = HeaderValue::from_str(&format!("Bearer {}", self.value()?)).ok()?;
        header.set_sensitive(true);
        Some(header)
    }

    /// The Secret that it is of; none where it is whoever runs this worker's, or there is no token.
    pub fn secret(&self) -> Option<&str> {
        self.secret.as_deref()
    }

    /// For people: which token was used, or why none was.
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

impl Tokens {
    /// The token of a source, of a Secret that the document lists for whom it is for. Otherwise whoever may write a group
    /// could have any token of its placement by naming a server of their own.
    pub fn find(
        &self,
        secret: Option<&SecretRef>,
        listed: &Listed,
        audience: Audience<'_>,
    ) -> Result<Token, Failure> {
        let missing = match secret {
            None => "the source has no secretRef".to_owned(),
            Some(SecretRef { name }) => {
                let path = self.path(name, listed, audience)?;
                match read(&path) {
                    Ok(value) => {
                        let token = checked(value, format!("with the token of the Secret `{name}`"))?;
                        return Ok(Token { secret: Some(name.clone()), ..token });
                    }
                    Err(error) => {
                        format!("`{}` of the Secret `{name}` cannot be read: {error}", path.display())
                    }
                }
            }
        };
        let own = if audience == Audience::Hub { self.own()? } else { None };
        Ok(match own {
            Some(token) => Token { origin: format!("{}, since {missing}", token.origin), ..token },
            None if audience == Audience::Hub => {
                Token::none(&format!("without a token: {missing}, and HF_TOKEN is not set"))
            }
            None => Token::none(&format!("without a token: {missing}")),
        })
    }

    fn path(&self, name: &str, listed: &Listed, audience: Audience<'_>) -> Result<PathBuf, Failure> {
        // Given by whoever runs this worker, for whatever its sources are.
        if let Some(file) = self.files.get(name) {
            return Ok(file.clone());
        }
        if !listed.secrets.iter().any(|l| l == name) {
            let message = format!(
                "the source names the Secret `{name}`, which the placement does not list; add it to \
                 spec.sourceSecrets (without a cluster: --secret {name}=FILE)"
            );
            return Err(Failure::new(FailureReason::SecretNotMounted, message));
        }
        let may_see = |host: &str| {
            let address = host.trim_matches(['[', ']']).parse().ok();
            let hosts = listed.secret_hosts.get(name).into_iter().flatten();
            hosts.into_iter().any(|h| h.names(host) || address.is_some_and(|address| h.holds(address)))
        };
        if let Audience::Server(host) = audience
            && !may_see(host)
        {
            let message = format!(
                "the token of the Secret `{name}` is not for `{host}`; if it is, add `{host}` to `hosts` of `{name}` in \
                 spec.sourceSecrets"
            );
            return Err(Failure::new(FailureReason::NotAllowed, message));
        }
        Ok(self.secrets_dir.join(name).join(label::SECRET_KEY))
    }

    fn own(&self) -> Result<Option<Token>, Failure> {
        if let Some(given) = self.own.given.as_deref().map(str::trim).filter(|g| !g.is_empty()) {
            return checked(given.to_owned(), "with the token in HF_TOKEN".into()).map(Some);
        }
        let Some((file, value)) = self.own.file.as_deref().and_then(|f| Some((f, read(f).ok()?))) else {
            return Ok(None);
        };
        checked(value, format!("with the token in `{}`", file.display())).map(Some)
    }
}

fn checked(value: String, origin: String) -> Result<Token, Failure> {
    let token = Token { value: Some(value), origin, secret: None };
    if token.header().is_none() {
        let message =
            format!("a server cannot be asked {}: it has a character that no header takes", token.origin);
        return Err(Failure::new(FailureReason::Unauthorized, message));
    }
    Ok(token)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
    let text = text.trim();
    if text.is_empty() { Err(io::Error::other("it is empty")) } else { Ok(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str) -> SecretRef {
        SecretRef { name: name.into() }
    }

    /// A document that lists a Secret for these hosts.
    fn listed(name: &str, hosts: &[&str]) -> Listed {
        let hosts = hosts.iter().map(|host| host.parse().unwrap()).collect();
        let secret_hosts = BTreeMap::from([(name.to_owned(), hosts)]);
        Listed { secrets: vec![name.into()], secret_hosts, ..Listed::default() }
    }

    const SERVER: Audience<'_> = Audience::Server("models.example.org");

    #[test]
    fn a_token_is_shown_to_the_servers_it_is_listed_for_and_to_no_other() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::fs::write(folder.path().join("a/token"), "secret").unwrap();
        let tokens = Tokens { secrets_dir: folder.path().into(), ..Tokens::default() };
        let find = |hosts: &[&str], audience| tokens.find(Some(&secret("a")), &listed("a", hosts), audience);
        assert_eq!(find(&[], Audience::Hub).unwrap().value(), Some("secret"));
        let hosts = ["models.example.org", "*.example.com", "10.1.0.0/16", "fd00::/8"];
        for host in ["models.example.org", "MODELS.example.org", "a.example.com", "10.1.2.3", "[fd00::1]"] {
            assert_eq!(find(&hosts, Audience::Server(host)).unwrap().value(), Some("secret"), "{host}");
        }
        for host in ["example.com", "evil.example.org", "10.2.0.1", "", "[fe80::1]"] {
            let refused = find(&hosts, Audience::Server(host)).unwrap_err();
            assert_eq!(refused.reason, FailureReason::NotAllowed, "{host}");
            assert!(refused.message.contains("spec.sourceSecrets") && !refused.message.contains("secret\n"));
        }
        assert!(find(&[], SERVER).is_err());
    }

    #[test]
    fn a_token_is_read_anew_each_time_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens { secrets_dir: folder.path().into(), ..Tokens::default() };
        let listed = listed("hub", &[]);
        let find = || tokens.find(Some(&secret("hub")), &listed, Audience::Hub).unwrap();
        let before = find();
        assert_eq!(before.value(), None);
        assert!(before.origin().contains("hub/token") && before.origin().contains("HF_TOKEN"), "{before:?}");
        std::fs::create_dir(folder.path().join("hub")).unwrap();
        for value in ["first", "second"] {
            std::fs::write(folder.path().join("hub/token"), format!("{value}\n")).unwrap();
            let token = find();
            assert_eq!(token.value(), Some(value));
            assert_eq!(token.origin(), "with the token of the Secret `hub`");
            assert_eq!((before.secret(), token.secret()), (None, Some("hub")));
            assert!(!format!("{token:?} {tokens:?} {:?}", token.header()).contains(value));
        }
        std::fs::write(folder.path().join("hub/token"), "a\nb").unwrap();
        let odd = tokens.find(Some(&secret("hub")), &listed, Audience::Hub).unwrap_err();
        assert_eq!(odd.reason, FailureReason::Unauthorized);
    }

    #[test]
    fn a_secret_that_is_not_listed_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("other")).unwrap();
        std::fs::write(folder.path().join("other/token"), "secret").unwrap();
        let mut tokens = Tokens { secrets_dir: folder.path().into(), ..Tokens::default() };
        let refused = tokens.find(Some(&secret("other")), &listed("hub", &[]), SERVER).unwrap_err();
        assert_eq!(refused.reason, FailureReason::SecretNotMounted);
        assert!(
            refused.message.contains("`other`") && refused.message.contains("spec.sourceSecrets"),
            "{refused}"
        );
        tokens.files.insert("other".into(), folder.path().join("other/token"));
        let given = tokens.find(Some(&secret("other")), &Listed::default(), SERVER).unwrap();
        assert_eq!(given.value(), Some("secret"), "a file that was given need not be listed");
    }

    #[test]
    fn a_token_of_ones_own_goes_to_a_hub_only() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "of the login\n").unwrap();
        let mut tokens =
            Tokens { own: Own { given: Some("given".into()), file: Some(file) }, ..Tokens::default() };
        let value = |tokens: &Tokens, audience| {
            tokens.find(None, &Listed::default(), audience).unwrap().value().map(str::to_owned)
        };
        assert_eq!(value(&tokens, Audience::Hub).as_deref(), Some("given"));
        assert_eq!(value(&tokens, SERVER), None);
        tokens.own.given = Some(String::new());
        assert_eq!(value(&tokens, Audience::Hub).as_deref(), Some("of the login"));
    }
}
