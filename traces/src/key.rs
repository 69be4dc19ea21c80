//! The site's log key: one secret that all its logs are encrypted under.
//!
//! Each log derives its own key from this one and a random salt in its header (BLAKE3's
//! `derive_key` mode, sections 2.3 and 6.2 of the BLAKE3 paper), so no two files share a
//! cipher key. The key file is text, so that an operator can copy it by hand to another host.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroize;

use crate::{Error, files};

const FILE_CONTEXT: &str = "replay-migrate 2026 interaction log file key v1";
const ID_CONTEXT: &str = "replay-migrate 2026 interaction log key id v1";
const PREFIX: &str = "replay-migrate-log-key-1 ";

/// The secret that a site's logs are encrypted under. Wiped from memory when dropped.
#[derive(Clone)]
pub struct LogKey {
    secret: [u8; 32],
}

/// Names a key without giving it away.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; 8]);

impl LogKey {
    /// A new random key.
    pub fn generate() -> Result<Self, Error> {
        Ok(Self { secret: random()? })
    }

    /// A key from its bytes.
    pub fn from_bytes(secret: [u8; 32]) -> Self {
        Self { secret }
    }

    /// Reads the key file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let mut file = File::open(path).map_err(Error::io("open the log key", path))?;
        let meta = file
            .metadata()
            .map_err(Error::io("examine the log key", path))?;
        if meta.mode() & 0o077 != 0 {
            return Err(Error::KeyExposed {
                path: path.to_owned(),
            });
        }
        let bad = |what| Error::KeyFile {
            path: path.to_owned(),
            what,
        };
        if meta.len() > 1024 {
            return Err(bad("it is too long"));
        }
        let mut text = String::new();
        let read = file.read_to_string(&mut text);
        let secret = read
            .map_err(Error::io("read the log key", path))
            .and_then(|_| parse(&text).map_err(bad));
        text.zeroize();
        secret.map(|secret| Self { secret })
    }

    /// Reads the key file, or makes it (mode 0600, on the disk before this returns) if there
    /// is none. When two processes race, both get the same key.
    pub fn load_or_create(path: &Path) -> Result<Self, Error> {
        match fs::symlink_metadata(path) {
            Ok(_) => return Self::load(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("examine the log key", path)(error)),
        }
        let mut text = format!("{PREFIX}{}\n", hex(&Self::generate()?.secret));
        let created = files::create("create the log key", path, text.as_bytes());
        text.zeroize();
        match created {
            // Whoever comes second reads what the first made.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
            created => drop(created?),
        }
        Self::load(path)
    }

    /// Names this key in the headers of the logs it encrypts.
    pub fn id(&self) -> KeyId {
        let mut long = blake3::derive_key(ID_CONTEXT, &self.secret);
        let mut id = [0; 8];
        id.copy_from_slice(&long[..8]);
        long.zeroize();
        KeyId(id)
    }

    /// The key of one file.
    pub(crate) fn for_file(&self, salt: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(FILE_CONTEXT);
        hasher.update(&self.secret).update(salt);
        *hasher.finalize().as_bytes()
    }
}

impl Drop for LogKey {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl fmt::Debug for LogKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogKey(..)")
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

fn parse(text: &str) -> Result<[u8; 32], &'static str> {
    let digits = text
        .trim_end()
        .strip_prefix(PREFIX)
        .ok_or("it does not start as one does")?;
    if digits.len() != 64 || !digits.is_ascii() {
        return Err("it has not 64 hexadecimal digits");
    }
    let mut secret = [0; 32];
    for (byte, pair) in secret.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        let nibble = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .ok_or("it has not 64 hexadecimal digits")
        };
        *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
    }
    Ok(secret)
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a string can't fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Error::Random)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_file_is_private_and_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.key");
        let first = LogKey::load_or_create(&path).unwrap();
        let again = LogKey::load_or_create(&path).unwrap();
        assert_eq!(first.secret, again.secret);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file stays"
        );
        assert_ne!(first.id(), LogKey::generate().unwrap().id());
    }

    #[test]
    fn racing_processes_get_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.key");
        let ids: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| LogKey::load_or_create(&path).unwrap().id()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
    }

    #[test]
    fn an_exposed_or_foreign_key_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.key");
        LogKey::load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(LogKey::load(&path), Err(Error::KeyExposed { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for text in [
            "",
            "hello",
            &format!("{PREFIX}12"),
            &format!("{PREFIX}{}", "zz".repeat(32)),
        ] {
            fs::write(&path, text).unwrap();
            assert!(
                matches!(LogKey::load(&path), Err(Error::KeyFile { .. })),
                "{text:?}"
            );
        }
    }

    #[test]
    fn debug_shows_nothing_of_the_key() {
        assert_eq!(
            format!("{:?}", LogKey::from_bytes([0xab; 32])),
            "LogKey(..)"
        );
    }
}
