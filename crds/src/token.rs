//! Claims of the short-lived tokens that operator and gateway show to workers.
//!
//! An Ed25519 JWT ([RFC 8037](https://www.rfc-editor.org/rfc/rfc8037)). The signer keeps the
//! private half; the worker document carries the public halves, so no worker, and nobody in a
//! tenant's namespace, needs to read a Secret.

use serde::{Deserialize, Serialize};

/// How long a token is valid, in seconds. Short, because it cannot be revoked.
pub const LIFETIME_SECONDS: u64 = 300;

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// The data port, and reading the state on the control port: the gateway's.
    Serve,
    /// Everything: the operator's.
    Control,
}

/// The claims of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who signed: `turret-operator` or `turret-gateway`.
    pub iss: String,
    /// UID of the placement whose workers may accept it.
    pub aud: String,
    /// Not valid before, seconds since the epoch.
    pub nbf: u64,
    /// Not valid from then on, seconds since the epoch.
    pub exp: u64,
    /// What it allows.
    pub scope: Scope,
}

/// The public half of a signing key, as the worker document carries it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublicKey {
    /// Key id: the `kid` of the tokens it verifies.
    pub id: String,
    /// Greatest scope that tokens of this key may claim.
    pub scope: Scope,
    /// The raw 32 bytes of the Ed25519 public key, base64url without padding (`x` of RFC 8037).
    pub x: String,
}
