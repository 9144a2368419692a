//! Signing keys and the tokens made with them.
//!
//! Operator and gateway each have an Ed25519 key in a Secret of the operator's namespace. Workers
//! learn the public halves from their document, so no worker reads a Secret. A key is replaced by
//! emptying its Secret: the operator makes a new one, and the next documents carry its public half.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{
    SigningKey as Ed25519Key,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, spki::der::pem::LineEnding},
};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use turret_crds::token::{Claims, LIFETIME_SECONDS, PublicKey, Scope};

/// Field of the Secret that holds the private key: PKCS#8 in PEM.
pub const SECRET_FIELD: &str = "key.pem";

/// `iss` of the operator's tokens.
pub const OPERATOR_ISSUER: &str = "turret-operator";
/// `iss` of the gateway's tokens.
pub const GATEWAY_ISSUER: &str = "turret-gateway";

/// Clocks of two machines may differ this much, seconds.
const CLOCK_SKEW_SECONDS: u64 = 30;
/// Tokens of this many placements are kept; beyond it the cache starts afresh.
const CACHED_TOKENS: usize = 4096;

/// A key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The text is not a private Ed25519 key.
    #[error(
        "`{SECRET_FIELD}` is not an Ed25519 private key in PKCS#8 PEM form ({0}); empty the Secret to have a new one made"
    )]
    Malformed(String),
    /// The token library refused the key.
    #[error("failed to sign a token")]
    Sign(#[source] jsonwebtoken::errors::Error),
}

/// An Ed25519 key pair. Its `Debug` shows the key id only.
#[derive(Clone)]
pub struct SigningKey {
    id: String,
    pair: Ed25519Key,
    encoding: EncodingKey,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SigningKey").field(&self.id).finish()
    }
}

impl PartialEq for SigningKey {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl SigningKey {
    /// Makes a new key from the operating system's randomness.
    pub fn generate() -> Self {
        Self::from_pair(Ed25519Key::from_bytes(&rand::random()))
            .expect("a key made here can be written as PKCS#8")
    }

    /// Reads a key as PKCS#8 PEM, as `openssl genpkey -algorithm ed25519` writes it.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        Self::from_pair(
            Ed25519Key::from_pkcs8_pem(pem.trim()).map_err(|e| KeyError::Malformed(e.to_string()))?,
        )
    }

    fn from_pair(pair: Ed25519Key) -> Result<Self, KeyError> {
        let der = pair.to_pkcs8_der().map_err(|e| KeyError::Malformed(e.to_string()))?;
        let id = hex::encode(&Sha256::digest(pair.verifying_key().as_bytes())[..8]);
        Ok(Self { id, encoding: EncodingKey::from_ed_der(der.as_bytes()), pair })
    }

    /// Writes the key as PKCS#8 PEM.
    pub fn to_pem(&self) -> String {
        self.pair.to_pkcs8_pem(LineEnding::LF).expect("a key in memory can be written as PKCS#8").to_string()
    }

    /// Key id: the first 8 bytes of the public half's SHA-256, hex.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The public half, as the worker document carries it.
    pub fn public(&self, scope: Scope) -> PublicKey {
        PublicKey {
            id: self.id.clone(),
            scope,
            x: URL_SAFE_NO_PAD.encode(self.pair.verifying_key().as_bytes()),
        }
    }

    fn sign(&self, claims: &Claims) -> Result<String, KeyError> {
        let header = Header { kid: Some(self.id.clone()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, claims, &self.encoding).map_err(KeyError::Sign)
    }
}

/// Signs tokens with one key, and keeps each until half of its life is over.
#[derive(Debug)]
pub struct Signer {
    issuer: &'static str,
    scope: Scope,
    state: Mutex<SignerState>,
}

#[derive(Debug)]
struct SignerState {
    key: SigningKey,
    /// The key before a replacement: workers that were not yet told of the new one still accept it.
    previous: Option<SigningKey>,
    tokens: HashMap<String, (Arc<str>, u64)>,
}

impl Signer {
    /// Signs as `issuer` ([`OPERATOR_ISSUER`] or [`GATEWAY_ISSUER`]) with `scope`.
    pub fn new(issuer: &'static str, scope: Scope, key: SigningKey) -> Self {
        Self { issuer, scope, state: Mutex::new(SignerState { key, previous: None, tokens: HashMap::new() }) }
    }

    /// Signs with another key from now on.
    pub fn replace(&self, key: SigningKey) {
        let mut state = self.state.lock();
        if state.key != key {
            let previous = Some(std::mem::replace(&mut state.key, key));
            (state.previous, state.tokens) = (previous, HashMap::new());
        }
    }

    /// The public half of the key in use.
    pub fn public(&self) -> PublicKey {
        self.state.lock().key.public(self.scope)
    }

    /// A token for the workers of the placement with this UID, valid for at least half of
    /// [`LIFETIME_SECONDS`].
    pub fn token(&self, placement_uid: &str) -> Result<Arc<str>, KeyError> {
        self.token_at(placement_uid, seconds_since_epoch())
    }

    fn token_at(&self, placement_uid: &str, now: u64) -> Result<Arc<str>, KeyError> {
        let mut state = self.state.lock();
        if let Some((token, expires)) = state.tokens.get(placement_uid)
            && *expires > now + LIFETIME_SECONDS / 2
        {
            return Ok(token.clone());
        }
        let claims = self.claims(placement_uid, now);
        let expires = claims.exp;
        let token: Arc<str> = state.key.sign(&claims)?.into();
        if state.tokens.len() >= CACHED_TOKENS {
            state.tokens.clear();
        }
        state.tokens.insert(placement_uid.into(), (token.clone(), expires));
        Ok(token)
    }

    fn claims(&self, placement_uid: &str, now: u64) -> Claims {
        Claims {
            iss: self.issuer.into(),
            aud: placement_uid.into(),
            nbf: now.saturating_sub(CLOCK_SKEW_SECONDS),
            exp: now + LIFETIME_SECONDS,
            scope: self.scope,
        }
    }

    /// Whether a token was made by `issuer` for `audience` with the key in use: by somebody who holds the same
    /// private half.
    pub fn admits(&self, token: &str, issuer: &str, audience: &str) -> bool {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_audience(&[audience]);
        validation.set_issuer(&[issuer]);
        validation.validate_nbf = true;
        let key = DecodingKey::from_ed_components(&self.public().x);
        key.is_ok_and(|key| jsonwebtoken::decode::<Claims>(token, &key, &validation).is_ok())
    }

    /// A token of the key before the last replacement, if there was one.
    fn previous_token(&self, placement_uid: &str) -> Result<Option<Arc<str>>, KeyError> {
        let claims = self.claims(placement_uid, seconds_since_epoch());
        let state = self.state.lock();
        state.previous.as_ref().map(|key| key.sign(&claims).map(Into::into)).transpose()
    }
}

fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs()
}

/// Where the token for a worker comes from.
#[derive(Clone, Debug)]
pub enum TokenSource {
    /// The worker asks for none.
    Open,
    /// A fixed one, shared by hand: without a cluster.
    Static(Arc<str>),
    /// Signed for a placement.
    Signed {
        /// Who signs.
        signer: Arc<Signer>,
        /// UID of the placement.
        placement_uid: Arc<str>,
    },
}

impl TokenSource {
    /// The token to show now; `None` when none is asked for.
    pub fn bearer(&self) -> Result<Option<Arc<str>>, KeyError> {
        match self {
            Self::Open => Ok(None),
            Self::Static(token) => Ok(Some(token.clone())),
            Self::Signed { signer, placement_uid } => signer.token(placement_uid).map(Some),
        }
    }

    /// The token for a worker that was not yet told of a replaced key.
    pub fn previous_bearer(&self) -> Result<Option<Arc<str>>, KeyError> {
        match self {
            Self::Open | Self::Static(_) => Ok(None),
            Self::Signed { signer, placement_uid } => signer.previous_token(placement_uid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Verifies a token as a worker does: by the public half alone.
    fn verify(
        token: &str,
        public: &PublicKey,
        audience: &str,
    ) -> Result<Claims, jsonwebtoken::errors::Error> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_audience(&[audience]);
        validation.validate_nbf = true;
        let key = DecodingKey::from_ed_components(&public.x)?;
        assert_eq!(jsonwebtoken::decode_header(token)?.kid.as_deref(), Some(public.id.as_str()));
        Ok(jsonwebtoken::decode::<Claims>(token, &key, &validation)?.claims)
    }

    fn signer() -> Signer {
        Signer::new(OPERATOR_ISSUER, Scope::Control, SigningKey::generate())
    }

    #[test]
    fn the_public_half_verifies_what_the_private_half_signed_for_one_placement_only() {
        let signer = signer();
        let token = signer.token("uid-1").unwrap();
        let claims = verify(&token, &signer.public(), "uid-1").unwrap();
        assert_eq!((claims.iss.as_str(), claims.scope), (OPERATOR_ISSUER, Scope::Control));
        assert!(verify(&token, &signer.public(), "uid-2").is_err());
    }

    #[test]
    fn only_a_token_of_the_same_key_and_issuer_for_the_same_audience_is_admitted() {
        let key = SigningKey::generate();
        let operator = Signer::new(OPERATOR_ISSUER, Scope::Serve, key.clone());
        let gateway = Signer::new(GATEWAY_ISSUER, Scope::Serve, key);
        let token = operator.token("a").unwrap();
        assert!(gateway.admits(&token, OPERATOR_ISSUER, "a"));
        assert!(!gateway.admits(&token, OPERATOR_ISSUER, "b"));
        assert!(!gateway.admits(&token, GATEWAY_ISSUER, "a"));
        assert!(!signer().admits(&token, OPERATOR_ISSUER, "a"));
        assert!(!gateway.admits("", OPERATOR_ISSUER, "a"));
    }

    #[test]
    fn tokens_are_kept_until_half_of_their_life_is_over() {
        let signer = signer();
        let first = signer.token_at("uid", 1000).unwrap();
        assert_eq!(first, signer.token_at("uid", 1000 + LIFETIME_SECONDS / 2 - 1).unwrap());
        assert_ne!(first, signer.token_at("uid", 1000 + LIFETIME_SECONDS / 2).unwrap());
    }

    #[test]
    fn a_replaced_key_signs_at_once_and_the_old_tokens_are_forgotten() {
        let signer = signer();
        let (old_public, old) = (signer.public(), signer.token("uid").unwrap());
        signer.replace(SigningKey::generate());
        let new = signer.token("uid").unwrap();
        assert_ne!(old, new);
        assert!(verify(&new, &signer.public(), "uid").is_ok());
        assert_ne!(signer.public().id, old_public.id);
        let previous = signer.previous_token("uid").unwrap().unwrap();
        assert!(
            verify(&previous, &old_public, "uid").is_ok(),
            "workers with the old document still accept it"
        );
    }

    #[test]
    fn keys_survive_being_written_and_openssl_keys_are_read() {
        let key = SigningKey::generate();
        assert_eq!(SigningKey::from_pem(&key.to_pem()).unwrap(), key);
        // RFC 8410, section 10.3: an Ed25519 key without its public half.
        let rfc = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let key = SigningKey::from_pem(rfc).unwrap();
        assert_eq!(key.public(Scope::Serve).x, "Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE");
        let signer = Signer::new(GATEWAY_ISSUER, Scope::Serve, key);
        assert!(verify(&signer.token("uid").unwrap(), &signer.public(), "uid").is_ok());
        assert!(matches!(SigningKey::from_pem("nonsense"), Err(KeyError::Malformed(_))));
    }
}
