//! Who a site is: a long-lived Ed25519 key, and the two names that follow from it.
//!
//! Peers know each other by key and by nothing else: no certificate authority, no host
//! names, no expiry. [`SiteKey`] is the SHA-256 of the key's SubjectPublicKeyInfo, what
//! RFC 7469 section 2.4 calls a pin, so `openssl pkey -pubout -outform der | sha256sum`
//! gives the same bytes. People copy it between machines by hand, so its printed form
//! carries a checksum: a slip is recognised as a slip, not taken for another site.
//!
//! Only the private key is stored. The certificate that TLS wants around the public key is
//! made anew at each start; two files that could disagree would be one too many.
//!
//! Promised: the private key is never readable by others, never printed, and never half
//! written; two processes that start at once on a new site agree on one key.

mod base32;
mod signing;

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ED25519, PublicKeyData};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub(crate) use signing::hex_or_bytes;
pub use signing::{NewKey, PublicKey, Signature};

/// The private key's file inside the directory of keys.
const KEY_FILE: &str = "site.key";
/// An Ed25519 key in PKCS #8 PEM takes about 200 bytes.
const MAX_KEY_FILE: u64 = 16 * 1024;

/// The public half of a site's identity: SHA-256 of its SubjectPublicKeyInfo.
///
/// Printed as eight groups of seven characters of Crockford's base32, the last 24 of its 280
/// bits a checksum. Read back without regard to case, hyphens and white space; `O` counts as
/// 0, `I` and `L` as 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteKey([u8; 32]);

impl SiteKey {
    const CHECKSUM: usize = 3;
    const CHARS: usize = 56;
    const GROUP: usize = 7;

    /// The key whose DER-encoded SubjectPublicKeyInfo this is.
    pub fn of_spki(der: &[u8]) -> Self {
        Self(sha256(&[der]))
    }

    /// The hash itself.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A short name for the site, for logs, leases and manifests.
    pub fn id(&self) -> SiteId {
        let mut id = [0; SiteId::LEN];
        id.copy_from_slice(&self.0[..SiteId::LEN]);
        SiteId(id)
    }

    fn checksum(&self) -> [u8; Self::CHECKSUM] {
        let digest = sha256(&[b"replay-migrate site key", &self.0]);
        [digest[0], digest[1], digest[2]]
    }
}

impl fmt::Display for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.0.to_vec();
        bytes.extend(self.checksum());
        f.write_str(&base32::encode(&bytes, Self::GROUP))
    }
}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteKey({self})")
    }
}

impl FromStr for SiteKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let bytes = base32::decode(text, Self::CHARS)?;
        let (hash, checksum) = bytes.split_at(32);
        let mut key = [0; 32];
        key.copy_from_slice(hash);
        let key = Self(key);
        if key.checksum() == checksum {
            Ok(key)
        } else {
            Err(ParseKeyError::Mistyped)
        }
    }
}

/// The first 80 bits of a site's key: short enough for a log line, and too long to be forged
/// by another key. It names a site; only the whole [`SiteKey`] proves one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId([u8; SiteId::LEN]);

impl SiteId {
    const LEN: usize = 10;
    const CHARS: usize = 16;
    const GROUP: usize = 4;

    /// The bits themselves.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32::encode(&self.0, Self::GROUP))
    }
}

impl fmt::Debug for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteId({self})")
    }
}

impl FromStr for SiteId {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let mut id = [0; Self::LEN];
        id.copy_from_slice(&base32::decode(text, Self::CHARS)?);
        Ok(Self(id))
    }
}

/// Text where people read it (JSON), bytes where they don't (the wire).
macro_rules! serde_as_text_or_bytes {
    ($name:ident, $len:expr) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?
                        .parse()
                        .map_err(de::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}
serde_as_text_or_bytes!(SiteKey, 32);
serde_as_text_or_bytes!(SiteId, SiteId::LEN);

/// What is wrong with a key or an id that a person gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseKeyError {
    /// Cut off when copied, or something else altogether.
    #[error(
        "a key of this kind has {expected} letters and digits, this one has {got}: copy it whole"
    )]
    Length {
        /// Characters that make a key.
        expected: usize,
        /// Characters found, separators not counted.
        got: usize,
    },
    /// Not of the alphabet.
    #[error("{0:?} can't be part of a site's key or id")]
    Character(char),
    /// The checksum disagrees.
    #[error(
        "the key is mistyped: its checksum doesn't fit; copy it again from \
         `replay-migrate site id` at that site"
    )]
    Mistyped,
}

/// A site's own key, private half included.
pub struct Identity {
    key: SiteKey,
    certificate: CertificateDer<'static>,
    private: PrivatePkcs8KeyDer<'static>,
    signer: Ed25519KeyPair,
    public: PublicKey,
}

/// A key that is to take the place of a site's present one, kept beside it without a lasting name.
pub(crate) struct Successor {
    file: tempfile::NamedTempFile,
    path: PathBuf,
    key: SiteKey,
}

impl Successor {
    /// What peers will know the site by.
    pub(crate) const fn key(&self) -> SiteKey {
        self.key
    }

    /// Puts it in the place of the present key, which is gone when this returns.
    ///
    /// On failure the key is as it was.
    pub(crate) fn install(self) -> Result<Identity, IdentityError> {
        let path = self.path;
        let write = |source| IdentityError::Write {
            path: path.clone(),
            source,
        };
        self.file
            .persist(&path)
            .map_err(|failed| write(failed.error))?;
        // Always there: a file name was joined to a directory.
        let dir = path.parent().unwrap_or(Path::new("."));
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(write)?;
        Identity::load(&path)
    }
}

impl Identity {
    /// The identity kept in `dir` (a site's `keys/`), created when there is none yet.
    ///
    /// On failure nothing has been left behind but, perhaps, the empty directory.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(KEY_FILE);
        match Self::load(&path) {
            Err(IdentityError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            }
            done => return done,
        }
        let write = |source| IdentityError::Write {
            path: path.clone(),
            source,
        };
        let (file, _) = Self::fresh(dir, &path)?;
        match file.persist_noclobber(&path) {
            Ok(_) => File::open(dir)
                .and_then(|dir| dir.sync_all())
                .map_err(write)?,
            // Another process was first: its key is the site's.
            Err(lost) if lost.error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(failed) => return Err(write(failed.error)),
        }
        Self::load(&path)
    }

    /// A new key for the site whose key is kept in `dir`. Peers know the site again once they trust
    /// the new one under the name they have for it.
    ///
    /// Nothing has changed until it is installed.
    pub(crate) fn successor(dir: &Path) -> Result<Successor, IdentityError> {
        let path = dir.join(KEY_FILE);
        let (file, pair) = Self::fresh(dir, &path)?;
        Ok(Successor {
            file,
            path,
            key: SiteKey::of_spki(&pair.subject_public_key_info()),
        })
    }

    /// A new key, durable, in a file beside `path` that has no lasting name yet.
    fn fresh(dir: &Path, path: &Path) -> Result<(tempfile::NamedTempFile, KeyPair), IdentityError> {
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(IdentityError::Generate)?;
        let write = |source| IdentityError::Write {
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(write)?;
        // The temporary file is 0600 from its first byte.
        let mut file = tempfile::Builder::new()
            .prefix(".site.key.")
            .tempfile_in(dir)
            .map_err(write)?;
        file.write_all(pair.serialize_pem().as_bytes())
            .map_err(write)?;
        file.as_file().sync_all().map_err(write)?;
        Ok((file, pair))
    }

    fn load(path: &Path) -> Result<Self, IdentityError> {
        let read = |source| IdentityError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        // Asked of the open file, so that it can't be swapped between the question and the use.
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() || metadata.len() > MAX_KEY_FILE {
            return Err(IdentityError::Unusable {
                path: path.to_owned(),
            });
        }
        refuse_access(path, metadata.mode(), 0o077, "600")?;
        if let Some(dir) = path.parent() {
            let mode = fs::metadata(dir).map_err(read)?.mode();
            refuse_access(dir, mode, 0o022, "700")?;
        }
        let mut pem = String::new();
        file.take(MAX_KEY_FILE)
            .read_to_string(&mut pem)
            .map_err(read)?;
        let unusable = || IdentityError::Unusable {
            path: path.to_owned(),
        };
        // rcgen's error could quote what it was given.
        let pair = KeyPair::from_pem(&pem).map_err(|_| unusable())?;
        if pair.algorithm() != &PKCS_ED25519 {
            return Err(unusable());
        }
        Self::from_pair(&pair)?.ok_or_else(unusable)
    }

    /// An identity that is kept nowhere, for tests.
    pub fn ephemeral() -> Result<Self, IdentityError> {
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(IdentityError::Generate)?;
        Self::from_pair(&pair)?.ok_or(IdentityError::Generate(rcgen::Error::CouldNotParseKeyPair))
    }

    /// Nothing, if it is no key to sign with.
    fn from_pair(pair: &KeyPair) -> Result<Option<Self>, IdentityError> {
        // TLS 1.3 shows the certificate to whoever connects: it says nothing but the key.
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let certificate = params.self_signed(pair).map_err(IdentityError::Generate)?;
        let private = PrivatePkcs8KeyDer::from(pair.serialize_der());
        // Written by this program or by another one: the older form has no public key in it.
        let signer = Ed25519KeyPair::from_pkcs8_maybe_unchecked(private.secret_pkcs8_der());
        let Ok(signer) = signer else {
            return Ok(None);
        };
        let Ok(public) = signer.public_key().as_ref().try_into() else {
            return Ok(None);
        };
        Ok(Some(Self {
            key: SiteKey::of_spki(&pair.subject_public_key_info()),
            certificate: certificate.der().clone(),
            private,
            public: PublicKey(public),
            signer,
        }))
    }

    /// What peers know this site by.
    pub const fn key(&self) -> SiteKey {
        self.key
    }

    /// The short name that follows from the key.
    pub fn id(&self) -> SiteId {
        self.key.id()
    }

    /// The self-signed certificate around the public key.
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.private.clone_key())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// Why a site's own key can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file is there and can't be read, or isn't there.
    #[error("can't read this site's key {}", .path.display())]
    Read {
        /// The key's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A new key couldn't be stored.
    #[error("can't store a new key for this site as {}", .path.display())]
    Write {
        /// The key's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else could have read or replaced it.
    #[error(
        "{} can be reached by other users (mode {mode:o}): run `chmod {wanted} {}`, and if \
         somebody may have read the key, delete it so that a new one is made",
        .path.display(), .path.display()
    )]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What they should be.
        wanted: &'static str,
    },
    /// Not a key that was written here.
    #[error(
        "{} doesn't hold an Ed25519 key: put the right file back, or delete it so that a new \
         key is made (peers must then trust this site again)",
        .path.display()
    )]
    Unusable {
        /// The key's file.
        path: PathBuf,
    },
    /// The system gave no randomness, or the certificate couldn't be made.
    #[error("can't make a key")]
    Generate(#[source] rcgen::Error),
}

/// Refuses `path` when its mode grants any of `forbidden`.
fn refuse_access(
    path: &Path,
    mode: u32,
    forbidden: u32,
    wanted: &'static str,
) -> Result<(), IdentityError> {
    if mode & forbidden == 0 {
        return Ok(());
    }
    Err(IdentityError::Exposed {
        path: path.to_owned(),
        mode: mode & 0o7777,
        wanted,
    })
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    for part in parts {
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

#[cfg(test)]
mod tests;
