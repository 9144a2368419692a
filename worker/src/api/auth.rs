//! Who may talk to this worker: whoever shows the static token, or a token signed with a key of the document.
//!
//! Signed tokens are Ed25519 JWTs whose audience is the placement's UID (see `turret_crds::token`). The keys come with every
//! document, so a rotation needs no restart.

use http::{HeaderMap, header};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use sha2::{Digest, Sha256};
use turret_crds::WorkerDocument;
use turret_crds::token::{Claims, Scope};

use super::error::ApiError;

/// Clocks of operator, gateway and worker may differ by this much.
const LEEWAY_SECONDS: u64 = 30;

/// Checks the bearer token of a request.
#[derive(Debug)]
pub struct Verifier {
    /// Hashed, so that comparing takes the same time whatever was sent.
    token_sha256: Option<[u8; 32]>,
    open: bool,
}

impl Verifier {
    /// `token` is the static one, which allows everything; `open` lets everybody in while the document has no keys.
    pub fn new(token: Option<String>, open: bool) -> Self {
        Self { token_sha256: token.map(|t| Sha256::digest(t).into()), open }
    }

    /// Lets a request pass that shows a token of at least this scope.
    pub fn check(
        &self,
        headers: &HeaderMap,
        document: Option<&WorkerDocument>,
        needed: Scope,
    ) -> Result<(), ApiError> {
        let has_keys = document.is_some_and(|d| !d.public_keys.is_empty());
        if self.open && !has_keys {
            return Ok(());
        }
        let shown = bearer(headers).ok_or_else(|| {
            ApiError::unauthorized(
                "this worker wants `Authorization: Bearer TOKEN`; in a cluster, talk to the gateway",
            )
        })?;
        if self.token_sha256.is_some_and(|wanted| equal(&wanted, &Sha256::digest(shown).into())) {
            return Ok(());
        }
        match document {
            Some(document) if has_keys => verify(shown, document, needed),
            _ => Err(ApiError::unauthorized("the token is not the one this worker was started with")),
        }
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Compares digests without stopping at the first difference.
fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |different, (a, b)| different | (a ^ b)) == 0
}

fn verify(token: &str, document: &WorkerDocument, needed: Scope) -> Result<(), ApiError> {
    let refused = |why: String| ApiError::unauthorized(format!("the token is not accepted: {why}"));
    let header = jsonwebtoken::decode_header(token).map_err(|e| refused(e.to_string()))?;
    let key = document
        .public_keys
        .iter()
        .find(|key| header.kid.as_ref() == Some(&key.id))
        .ok_or_else(|| refused("this worker knows no key with its `kid`".into()))?;
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.leeway = LEEWAY_SECONDS;
    validation.validate_nbf = true;
    validation.set_audience(&[&document.placement.uid]);
    validation.set_required_spec_claims(&["exp", "nbf", "aud"]);
    let decoding = DecodingKey::from_ed_components(&key.x).map_err(|e| refused(e.to_string()))?;
    let claims = jsonwebtoken::decode::<Claims>(token, &decoding, &validation)
        .map_err(|e| refused(e.to_string()))?
        .claims;
    // A key that may only serve cannot give itself more, whatever its tokens claim.
    let allowed = claims.scope.min(key.scope);
    if allowed < needed {
        return Err(ApiError::forbidden(format!(
            "the token of {} allows `{allowed:?}`, this needs `{needed:?}`",
            claims.iss
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, StatusCode};

    fn headers(token: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")).unwrap());
        headers
    }

    #[test]
    fn the_static_token_opens_both_ports_and_nothing_else_does() {
        let verifier = Verifier::new(Some("secret".into()), false);
        for needed in [Scope::Serve, Scope::Control] {
            assert!(verifier.check(&headers("secret"), None, needed).is_ok());
            let refused = verifier.check(&headers("secre"), None, needed).unwrap_err();
            assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
            assert!(verifier.check(&HeaderMap::new(), None, needed).is_err());
        }
    }

    #[test]
    fn an_open_worker_lets_everybody_in() {
        assert!(Verifier::new(None, true).check(&HeaderMap::new(), None, Scope::Control).is_ok());
        assert!(Verifier::new(None, false).check(&HeaderMap::new(), None, Scope::Serve).is_err());
    }
}
