//! TLS 1.3 between two sites, each proving that it holds the key the other expects.
//!
//! There is no authority and no name in it. Each side presents a certificate made of its key
//! alone; the other hashes the SubjectPublicKeyInfo and compares ([`SiteKey`], the pin of
//! RFC 7469). Everything else a certificate could say (subject, dates, extensions) is
//! ignored, for it is signed by the very key in question. That the peer holds the private
//! half is proven by its CertificateVerify signature (RFC 8446 section 4.4.3), which rustls
//! and webpki check against the presented key before any data of the application moves.
//!
//! Resumption is off on both sides: a resumed session would skip the question whether the
//! peer is trusted *now*. A stranger learns the server's public key, as TLS 1.3 has it, and
//! nothing else.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme, version,
};

use crate::identity::{Identity, SiteKey};
use crate::peers::PeerStore;

/// The server showed another key than the pinned one.
#[derive(Debug, thiserror::Error)]
#[error("expected the key {expected}, got {got}")]
pub(crate) struct WrongKey {
    pub(crate) expected: SiteKey,
    pub(crate) got: SiteKey,
}

/// A client showed a key that isn't in the store.
#[derive(Debug, thiserror::Error)]
#[error("the key {got} is not trusted")]
pub(crate) struct Untrusted {
    pub(crate) got: SiteKey,
}

/// The TLS side of a client that talks to exactly one key.
pub(crate) fn client_config(
    identity: &Identity,
    expected: SiteKey,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(OneKey {
        expected,
        provider: provider.clone(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous() // "custom", in rustls' words
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.certificate()], identity.private_key())?;
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// The TLS side of a server that talks to whom the store trusts at that moment.
pub(crate) fn server_config(
    identity: &Identity,
    peers: PeerStore,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(TrustedKeys {
        peers,
        provider: provider.clone(),
    });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate()], identity.private_key())?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The key a certificate is made of.
pub(crate) fn key_of(certificate: &CertificateDer<'_>) -> Result<SiteKey, Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(SiteKey::of_spki(&parsed.subject_public_key_info()))
}

fn refuse(why: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

/// Checks that the peer signed this handshake with the key it showed.
fn verify_signature(
    provider: &CryptoProvider,
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    if signed.scheme != SignatureScheme::ED25519 {
        return Err(Error::General("a site signs with Ed25519 only".to_owned()));
    }
    verify_tls13_signature(
        message,
        certificate,
        signed,
        &provider.signature_verification_algorithms,
    )
}

/// Never asked for: both sides offer TLS 1.3 alone.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("sites speak TLS 1.3 only".to_owned()))
}

#[derive(Debug)]
struct OneKey {
    expected: SiteKey,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for OneKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let got = key_of(end_entity)?;
        if got == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(refuse(WrongKey {
                expected: self.expected,
                got,
            }))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

#[derive(Debug)]
struct TrustedKeys {
    peers: PeerStore,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for TrustedKeys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let got = key_of(end_entity)?;
        match self.peers.by_key(&got) {
            Ok(Some(_)) => Ok(ClientCertVerified::assertion()),
            Ok(None) => Err(refuse(Untrusted { got })),
            // Our fault, not the peer's: it is told "handshake failure", our log says why.
            Err(error) => Err(Error::Other(OtherError(Arc::new(error)))),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}
