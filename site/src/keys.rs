//! Where a site's secrets lie, and the one that its images are encrypted with at rest.
//!
//! ```text
//! site.key     who the site is                 in the state directory itself
//! log.key      what its logs are sealed with   in keys/ there
//! state.key    what images and VMs are encrypted with
//! ```
//!
//! Keys beside what they lock help little once the disk is stolen. So all three may lie in a folder
//! elsewhere: on a token, on tmpfs, in a credential of the service manager. `site.json` notes which
//! folder that is, so that a command that is not told never makes new keys in the old place.
//!
//! Promised: a key is 0600, whole or not there, never printed, and made but once: a folder that
//! lacks keys which the site is known to have is refused, as what holds them may not be mounted.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom, SystemRandom};
use vm_host::fscrypt::KEY_BYTES;
use zeroize::Zeroize;

use crate::error::{Error, Result};
use crate::files;
use crate::identity::{Identity, Successor};

const SITE: &str = "site.key";
const LOG: &str = "log.key";
const STATE: &str = "state.key";
const PREFIX: &str = "replay-migrate-state-key-1 ";
/// Far longer than a key's file.
const LIMIT: u64 = 1024;

/// The folders of a site's secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    /// Of `site.key`.
    identity: PathBuf,
    /// Of the others.
    dir: PathBuf,
    /// Not in the state directory's own places.
    elsewhere: bool,
    /// Nobody has noted yet that they lie there.
    first: bool,
}

impl Keys {
    /// Where the keys of a state directory are: in the folder that is asked for, or the one noted,
    /// or beside the state. Nothing is made but the folder that is asked for.
    ///
    /// # Errors
    /// When the site has keys, and not there.
    pub(crate) fn find(root: &Path, asked: Option<&Path>, noted: Option<&Path>) -> Result<Self> {
        let beside = Self {
            identity: root.to_owned(),
            dir: root.join("keys"),
            elsewhere: false,
            first: false,
        };
        let Some(dir) = asked.or(noted) else {
            return Ok(beside);
        };
        if noted.is_none() {
            files::make_dir_unless_there(dir)?;
        }
        let lacks = |name: &str| !dir.join(name).exists();
        let left = [
            beside.identity.join(SITE),
            beside.dir.join(LOG),
            beside.dir.join(STATE),
        ];
        let left = left.iter().find(|path| {
            path.exists() && path.file_name().is_none_or(|name| !dir.join(name).exists())
        });
        if let Some(left) = left {
            return Err(Error::Refused(format!(
                "{} is one of this site's keys, and {} has none of that name: move it there, or \
                 leave --keys away",
                left.display(),
                dir.display()
            )));
        }
        if noted.is_some() && lacks(SITE) {
            return Err(Error::Refused(format!(
                "this site's keys are not in {}: is what holds them mounted? If they lie \
                 elsewhere now, say where with --keys",
                dir.display()
            )));
        }
        let dir = fs::canonicalize(dir).map_err(Error::file("open", dir))?;
        Ok(Self {
            identity: dir.clone(),
            dir,
            elsewhere: true,
            first: noted.is_none(),
        })
    }

    /// The folder to note, if the keys lie elsewhere.
    pub(crate) fn noted(&self) -> Option<&Path> {
        self.elsewhere.then_some(self.dir.as_path())
    }

    /// The folder of the keys that lock what is stored.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes them all, where they come to lie elsewhere: from then on one that lacks is noticed.
    pub(crate) fn settle(&self) -> Result<()> {
        if self.first {
            self.identity()?;
            self.log()?;
            self.make_state()?;
        }
        Ok(())
    }

    /// Who the site is; made on first use.
    pub(crate) fn identity(&self) -> Result<Identity> {
        Ok(Identity::load_or_create(&self.identity)?)
    }

    /// A new identity, to be installed in place of the one that there is.
    pub(crate) fn successor(&self) -> Result<Successor> {
        Ok(Identity::successor(&self.identity)?)
    }

    /// What logs are sealed with; made on first use.
    pub(crate) fn log(&self) -> Result<traces::LogKey> {
        files::make_dir_unless_there(&self.dir)?;
        traces::LogKey::load_or_create(&self.dir.join(LOG))
            .map_err(Error::log("cannot use this site's log key"))
    }

    /// Where the key is that images and VMs are encrypted with.
    pub(crate) fn state_path(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// What images and VMs are encrypted with, if it is there.
    pub(crate) fn state(&self) -> Result<Option<StateKey>> {
        StateKey::load(&self.state_path())
    }

    /// The same, made on first use.
    pub(crate) fn make_state(&self) -> Result<StateKey> {
        files::make_dir_unless_there(&self.dir)?;
        StateKey::load_or_create(&self.state_path())
    }
}

/// The secret that images and VMs are encrypted with at rest. Wiped from memory when dropped.
pub(crate) struct StateKey(Box<[u8; KEY_BYTES]>);

impl StateKey {
    fn load(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::file("open", path)(error)),
        };
        // Asked of the open file, so that it can't be swapped between the question and the use.
        let metadata = file.metadata().map_err(Error::file("examine", path))?;
        if metadata.mode() & 0o077 != 0 {
            return Err(Error::Refused(format!(
                "{} can be read by other users: run `chmod 600` on it, and if somebody may have \
                 read it, encrypt the state anew with another key",
                path.display()
            )));
        }
        let mut text = Vec::with_capacity(LIMIT as usize);
        let read = file.take(LIMIT).read_to_end(&mut text);
        let key = read.map_err(Error::file("read", path)).and_then(|_| {
            parse(&text).ok_or_else(|| Error::Damaged {
                path: path.to_owned(),
                reason: "it does not hold a key of this kind; put the right file back".into(),
            })
        });
        text.zeroize();
        key.map(Some)
    }

    fn load_or_create(path: &Path) -> Result<Self> {
        if let Some(key) = Self::load(path)? {
            return Ok(key);
        }
        Self::create(path)?;
        Self::load(path)?.ok_or_else(|| Error::Damaged {
            path: path.to_owned(),
            reason: "it has just been made, and is gone".into(),
        })
    }

    /// Makes the file, durable, unless there is one.
    fn create(path: &Path) -> Result<()> {
        let mut key = Self(Box::new([0; KEY_BYTES]));
        SystemRandom::new()
            .fill(&mut key.0[..])
            .map_err(|_| Error::Refused("the system gives no random numbers".into()))?;
        let mut text = Vec::with_capacity(LIMIT as usize);
        text.extend_from_slice(PREFIX.as_bytes());
        for byte in key.0.iter() {
            text.extend(
                [byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]),
            );
        }
        text.push(b'\n');
        let dir = path.parent().unwrap_or(Path::new("."));
        let made = (|| {
            // 0600 from its first byte.
            let mut file = tempfile::Builder::new()
                .prefix(".state.key.")
                .tempfile_in(dir)?;
            file.write_all(&text)?;
            file.as_file().sync_all()?;
            match file.persist_noclobber(path) {
                // Another process was first: its key is the site's.
                Err(lost) if lost.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                Err(failed) => Err(failed.error),
                Ok(_) => files::sync_dir(dir),
            }
        })();
        text.zeroize();
        made.map_err(Error::file("make the key", path))
    }

    /// The bytes, to be given away and wiped.
    pub(crate) fn bytes(&mut self) -> &mut [u8; KEY_BYTES] {
        &mut self.0
    }
}

fn parse(text: &[u8]) -> Option<StateKey> {
    let digits = text.trim_ascii_end().strip_prefix(PREFIX.as_bytes())?;
    if digits.len() != 2 * KEY_BYTES {
        return None;
    }
    let mut key = StateKey(Box::new([0; KEY_BYTES]));
    for (byte, pair) in key.0.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |text: u8| char::from(text).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(key)
}

impl Drop for StateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for StateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StateKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_state_key_is_private_made_once_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(STATE);
        assert!(StateKey::load(&path).unwrap().is_none());
        let keys: Vec<_> = std::thread::scope(|scope| {
            let racing: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| StateKey::load_or_create(&path).unwrap()))
                .collect();
            racing.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| key.0 == keys[0].0));
        assert!(keys[0].0.iter().any(|byte| *byte != keys[0].0[0]), "random");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(format!("{:?}", keys[0]), "StateKey(..)");
    }

    #[test]
    fn an_exposed_or_foreign_state_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(STATE);
        StateKey::load_or_create(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(StateKey::load(&path), Err(Error::Refused(_))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(StateKey::load(&path).unwrap().is_some());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for text in [&whole[..40], b"", &[b'x'; 5000][..]] {
            fs::write(&path, text).unwrap();
            let error = StateKey::load(&path).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }));
            // None of what it holds.
            assert!(!format!("{error:?}").contains("xxxx"));
        }
    }

    #[test]
    fn keys_are_found_where_they_are_noted_and_never_made_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (root, token) = (dir.path().join("site"), dir.path().join("token"));
        fs::create_dir(&root).unwrap();
        let beside = Keys::find(&root, None, None).unwrap();
        assert_eq!(beside.noted(), None);
        assert_eq!(beside.dir(), root.join("keys"));

        // A new site with its keys elsewhere has them all there at once.
        let keys = Keys::find(&root, Some(&token), None).unwrap();
        assert_eq!(keys.noted(), Some(token.as_path()));
        keys.settle().unwrap();
        let key = keys.identity().unwrap().key();
        for name in [SITE, LOG, STATE] {
            assert!(token.join(name).exists(), "{name}");
        }
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        // Who does not say where they are is led there.
        let again = Keys::find(&root, None, Some(&token)).unwrap();
        assert_eq!(again.identity().unwrap().key(), key);

        // Not mounted: nothing is made in its place, whether it is asked for or noted.
        let moved = dir.path().join("moved");
        fs::rename(&token, &moved).unwrap();
        for asked in [None, Some(token.as_path())] {
            fs::create_dir_all(&token).unwrap();
            let error = Keys::find(&root, asked, Some(&token)).unwrap_err();
            assert!(matches!(error, Error::Refused(_)), "{error}");
            assert_eq!(fs::read_dir(&token).unwrap().count(), 0);
            fs::remove_dir(&token).unwrap();
        }
        let there = Keys::find(&root, Some(&moved), Some(&token)).unwrap();
        assert_eq!(there.identity().unwrap().key(), key);
    }

    #[test]
    fn keys_of_a_site_that_has_some_are_to_be_moved_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let (root, token) = (dir.path().join("site"), dir.path().join("token"));
        fs::create_dir(&root).unwrap();
        let beside = Keys::find(&root, None, None).unwrap();
        let key = beside.identity().unwrap().key();
        beside.log().unwrap();
        for left in [root.join(SITE), root.join("keys").join(LOG)] {
            let error = Keys::find(&root, Some(&token), None).unwrap_err();
            assert!(error.to_string().contains(&left.display().to_string()));
            let name = left.file_name().unwrap();
            fs::rename(&left, token.join(name)).unwrap();
        }
        let keys = Keys::find(&root, Some(&token), None).unwrap();
        assert_eq!(keys.identity().unwrap().key(), key);
    }
}
