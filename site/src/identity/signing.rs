//! What a site signs beside its handshakes, and how others check it.
//!
//! TLS 1.3 signs what begins with 64 spaces (RFC 8446, section 4.4.3); whatever is signed here
//! begins with words of its own, so that neither is ever taken for the other.

use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use super::{Identity, SiteKey};

/// What comes before an Ed25519 key in its SubjectPublicKeyInfo (RFC 8410, section 4).
const SPKI: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// What a site signs to name its next key.
const SUCCESSION: &[u8] = b"replay-migrate next key 1";

/// Bytes that are hexadecimal text where people read them (JSON), and bytes on the wire.
macro_rules! hex_or_bytes {
    ($name:ident, $len:expr, $what:literal) => {
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() {
                    to.collect_str(self)
                } else {
                    serde_bytes::ByteArray::new(self.0).serialize(to)
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    let text = String::deserialize(from)?;
                    let bytes = $crate::vm::decode_hex(&text);
                    bytes
                        .map(Self)
                        .ok_or_else(|| serde::de::Error::custom($what))
                } else {
                    serde_bytes::ByteArray::<{ $len }>::deserialize(from)
                        .map(|bytes| Self(bytes.into_array()))
                }
            }
        }
    };
}
pub(crate) use hex_or_bytes;

/// A site's public key itself, of which its [`SiteKey`] is the hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub(super) [u8; 32]);
hex_or_bytes!(PublicKey, 32, "a public key is 64 hexadecimal digits");

impl PublicKey {
    /// What the site is known by.
    pub fn key(&self) -> SiteKey {
        let mut spki = [0; 44];
        spki[..12].copy_from_slice(&SPKI);
        spki[12..].copy_from_slice(&self.0);
        SiteKey::of_spki(&spki)
    }

    /// Whether this key has signed this.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        let key = UnparsedPublicKey::new(&ED25519, &self.0);
        key.verify(message, &signature.0).is_ok()
    }
}

/// An Ed25519 signature (RFC 8032).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; 64]);
hex_or_bytes!(Signature, 64, "a signature is 128 hexadecimal digits");

impl Signature {
    /// In place of one that is yet to be made.
    pub const NONE: Self = Self([0; 64]);

    /// The signature itself.
    pub(crate) const fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }
}

impl Identity {
    /// The public key itself.
    pub const fn public(&self) -> PublicKey {
        self.public
    }

    /// Signs. What is signed says by its first bytes what it is.
    pub(crate) fn sign(&self, message: &[u8]) -> Signature {
        let mut signature = Signature::NONE;
        // An Ed25519 signature has this length.
        signature
            .0
            .copy_from_slice(self.signer.sign(message).as_ref());
        signature
    }
}

/// A site's word that it goes by another key from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKey {
    /// The key that it had.
    pub by: PublicKey,
    /// The one that it has.
    pub to: SiteKey,
    /// By the former.
    pub signature: Signature,
}

impl NewKey {
    pub(crate) fn sign(old: &Identity, to: SiteKey) -> Self {
        let mut new = Self {
            by: old.public(),
            to,
            signature: Signature::NONE,
        };
        new.signature = old.sign(&new.signed());
        new
    }

    fn signed(&self) -> Vec<u8> {
        [SUCCESSION, self.by.key().as_bytes(), self.to.as_bytes()].concat()
    }

    /// Whether the former key has signed it.
    pub(crate) fn holds(&self) -> bool {
        self.by.verify(&self.signed(), &self.signature)
    }
}
