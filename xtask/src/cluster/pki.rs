//! Certificates and keys of a cluster: one authority, and one identity for each component,
//! so that the audit log tells who did what.

use std::net::{IpAddr, Ipv4Addr};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};

/// A certificate with its key, both as PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// Whom a certificate names and what it is good for.
pub struct Subject<'a> {
    /// The user, or the server's name.
    pub name: &'a str,
    /// The user's group; empty for none.
    pub group: &'a str,
    /// The addresses and names at which a server is reached; none for clients.
    pub addresses: &'a [Ipv4Addr],
    /// Names beside the addresses.
    pub names: &'a [&'a str],
}

impl<'a> Subject<'a> {
    /// A user who is only a client.
    pub fn client(name: &'a str, group: &'a str) -> Subject<'a> {
        Subject { name, group, addresses: &[], names: &[] }
    }
}

/// What signs a cluster's certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    /// Makes a new authority.
    pub fn new(name: &str) -> Result<Authority, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = parameters(name, "");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?.pem();
        Ok(Authority { issuer: Issuer::new(params, key), certificate })
    }

    /// The authority's own certificate, which clients trust.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Issues a certificate; with addresses or names it is also good for a server.
    pub fn issue(&self, subject: &Subject<'_>) -> Result<Identity, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = parameters(subject.name, subject.group);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        for address in subject.addresses {
            params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(*address)));
        }
        for name in subject.names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        if !params.subject_alt_names.is_empty() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

/// A key pair that signs service accounts' tokens: the private and the public half as PEM.
pub fn signing_key() -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    Ok((key.serialize_pem(), key.public_key_pem()))
}

fn parameters(name: &str, group: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if !group.is_empty() {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    // A local cluster outlives no certificate: each start makes new ones.
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2120, 1, 1);
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_identity_has_its_own_key_and_comes_as_pem() {
        let authority = Authority::new("test").unwrap();
        let one = authority.issue(&Subject::client("one", "system:masters")).unwrap();
        let two = authority.issue(&Subject::client("two", "")).unwrap();
        assert_ne!(one.key, two.key);
        assert!(one.certificate.starts_with("-----BEGIN CERTIFICATE-----"));
        assert!(one.key.starts_with("-----BEGIN PRIVATE KEY-----"));
        assert!(signing_key().unwrap().1.starts_with("-----BEGIN PUBLIC KEY-----"));
    }
}
