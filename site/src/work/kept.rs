//! What is noted of a working copy into which images come, so that an agent that was killed goes
//! on with it when it is started again.
//!
//! It lies beside what it speaks of, and goes with it. Nothing of it outlives the host: the guest's
//! RAM lies in memory. So it is written whole, but not waited for until it is on the disk.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::identity::SiteKey;
use crate::protocol::{Hello, Plan};

/// The version of the note's form.
const VERSION: u32 = 1;

/// A working copy that is kept for an attempt to go on with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KeptNote {
    version: u32,
    /// Whose VM it is.
    pub peer: SiteKey,
    /// What the conversation began with.
    pub hello: Hello,
    /// How the VM is moved.
    pub plan: Plan,
    /// Whether the disks are whole: not while pages are written to them.
    pub disks_whole: bool,
    /// Until when it is kept, in seconds since 1970.
    until: u64,
}

impl KeptNote {
    pub(crate) fn new(peer: SiteKey, hello: Hello, plan: Plan, patience: Duration) -> Self {
        Self {
            version: VERSION,
            peer,
            hello,
            plan,
            disks_whole: true,
            until: now().saturating_add(patience.as_secs()),
        }
    }

    /// How much longer it is kept; nothing, where its time is over, or the clock has jumped.
    pub(crate) fn left(&self, patience: Duration) -> Option<Duration> {
        let left = Duration::from_secs(self.until.checked_sub(now())?);
        (!left.is_zero() && left <= patience).then_some(left)
    }

    /// Notes it in a folder.
    pub(crate) fn store(&self, dir: &Path) -> Result<()> {
        let path = path(dir);
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::file("write", &path)(std::io::Error::other(error)))?;
        files::replace_for_now(&path, &text)
    }

    /// What is noted in a folder; nothing, where it can't be read or is of another form.
    pub(crate) fn load(dir: &Path) -> Option<Self> {
        let noted = files::read_json::<Self>(&path(dir)).ok()??;
        (noted.version == VERSION).then_some(noted)
    }
}

/// Where it lies in a folder.
pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("kept.json")
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Purpose;
    use crate::report::Strategy;

    const PATIENCE: Duration = Duration::from_secs(600);

    #[test]
    fn a_clock_that_jumped_keeps_nothing_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let peer = crate::store::Store::open(dir.path()).unwrap();
        let hello = Hello::example(Purpose::Migrate);
        let plan = Plan {
            strategy: Strategy::Base,
            base: None,
            quick: false,
        };
        let key = peer.identity().unwrap().key();
        let note = KeptNote::new(key, hello, plan, PATIENCE);
        let left = |days: i64| {
            let until = note.until.checked_add_signed(-days * 86_400).unwrap();
            KeptNote {
                until,
                ..note.clone()
            }
            .left(PATIENCE)
        };
        assert!(left(0).is_some_and(|left| left <= PATIENCE));
        // The clock went on by days, or back.
        assert_eq!(left(3), None);
        assert_eq!(left(-3), None);
    }
}
