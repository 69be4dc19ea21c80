//! Logs that are kept no longer than somebody wants: what was typed is worth most while a move
//! may still replay it, and only a risk after that.
//!
//! A log is as old as its beginning, where its oldest keys are: with a limit of thirty days
//! nothing that was typed longer ago is left in any log but the one that is being recorded. What
//! goes is deleted, not overwritten, and what was typed is still in the guest and in generations.
//! A VM whose newest log is gone moves without a replay.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use traces::Header;

use crate::chance::recording_lock;
use crate::error::{Error, Result};
use crate::files;
use crate::local::Live;
use crate::store::{Store, VmDir};

/// A log that went, or would go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OldLog {
    /// The generation that it continued.
    pub generation: u64,
    /// Where it lay.
    pub log: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// Deletes the logs of a VM that began longer ago than `older_than`, durably; which these were.
/// With `dry_run` they are only named. The one that is being recorded stays.
///
/// # Errors
/// When another process works on the VM, or a log can't be read or deleted; those before it are
/// gone then.
pub fn prune_logs(
    vm: &VmDir,
    older_than: Duration,
    now: SystemTime,
    dry_run: bool,
) -> Result<Vec<OldLog>> {
    vm.record()?;
    // A move reads logs while it goes on.
    let _lock = vm.lock()?;
    let recorded = match recording_lock(vm)? {
        Some(_nobody_records) => None,
        None => Live::load(vm)?.and_then(|live| live.generation),
    };
    let mut old = Vec::new();
    for (generation, log) in vm.logs()? {
        if recorded == Some(generation) {
            continue;
        }
        let created = Header::read(&log)
            .map_err(Error::log("cannot tell how old a log is"))?
            .created;
        // One from the future, by a clock that was set back, is not old.
        if now.duration_since(created).unwrap_or_default() <= older_than {
            continue;
        }
        let bytes = fs::metadata(&log)
            .map_err(Error::file("measure", &log))?
            .len();
        old.push(OldLog {
            generation,
            log,
            bytes,
        });
    }
    if !dry_run && !old.is_empty() {
        for one in &old {
            fs::remove_file(&one.log).map_err(Error::file("delete", &one.log))?;
        }
        let dir = vm.dir().join("log");
        files::sync_dir(&dir).map_err(Error::file("sync", &dir))?;
    }
    Ok(old)
}

/// Deletes what is too old of all VMs of a site. A VM that is being worked on is left for the
/// next time; what goes wrong is told in the agent's own log.
pub(crate) fn prune_all(store: &Store, older_than: Duration) {
    let vms = store.vms().unwrap_or_else(|error| {
        tracing::warn!(error = error.chain(), "old logs can't be looked for");
        Vec::new()
    });
    for vm in vms {
        match prune_logs(&vm, older_than, SystemTime::now(), false) {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => tracing::info!(vm = %vm.name(), logs = gone.len(), "old logs deleted"),
            Err(error) => {
                tracing::warn!(vm = %vm.name(), error = error.chain(), "old logs were kept");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use traces::{LogId, LogWriter};

    use super::*;
    use crate::lease::Lease;
    use crate::vm::VmRecord;

    const DAY: Duration = Duration::from_secs(86_400);

    fn vm(dir: &std::path::Path, logs: &[u64]) -> VmDir {
        let store = Store::open(dir).unwrap();
        let vm = store.vm(&"desk".parse().unwrap());
        let record = VmRecord::example();
        let held = Lease::Held {
            fence: 1,
            transfer: None,
        };
        vm.create(&record, &held).unwrap();
        let key = store.log_key().unwrap();
        for generation in logs {
            let id = LogId {
                vm: record.id.0,
                generation: *generation,
                base_position: 0,
            };
            let writer = LogWriter::create(&vm.log_path(*generation), &key, id).unwrap();
            writer.close().unwrap();
        }
        vm
    }

    fn kept(vm: &VmDir) -> Vec<u64> {
        let logs = vm.logs().unwrap();
        logs.into_iter().map(|(generation, _)| generation).collect()
    }

    #[test]
    fn logs_older_than_the_limit_go() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm(dir.path(), &[1, 2]);
        let (now, later) = (SystemTime::now(), SystemTime::now() + 31 * DAY);
        assert!(prune_logs(&vm, 30 * DAY, now, false).unwrap().is_empty());
        // A clock that was set back makes nothing old.
        let before = now - 100 * DAY;
        assert!(prune_logs(&vm, 30 * DAY, before, false).unwrap().is_empty());
        let named = prune_logs(&vm, 30 * DAY, later, true).unwrap();
        assert_eq!(named.len(), 2);
        assert_eq!(kept(&vm), [1, 2], "they were only named");
        assert_eq!(prune_logs(&vm, 30 * DAY, later, false).unwrap(), named);
        assert!(kept(&vm).is_empty());
    }

    #[test]
    fn a_log_is_not_deleted_under_who_works_on_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm(dir.path(), &[1]);
        let later = SystemTime::now() + 31 * DAY;
        let busy = vm.lock().unwrap();
        assert!(matches!(
            prune_logs(&vm, DAY, later, false),
            Err(Error::Refused(_))
        ));
        drop(busy);
        prune_all(vm.store(), Duration::ZERO);
        assert!(kept(&vm).is_empty());
    }

    #[test]
    fn the_log_that_is_being_recorded_stays() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm(dir.path(), &[1, 2]);
        let live = Live {
            generation: Some(2),
            overlays: Vec::new(),
            ran: true,
        };
        files::make_dir(&vm.live_dir()).unwrap();
        live.store(&vm).unwrap();
        let recording = recording_lock(&vm).unwrap().unwrap();
        let later = SystemTime::now() + 31 * DAY;
        let gone = prune_logs(&vm, DAY, later, false).unwrap();
        assert_eq!(gone.len(), 1);
        assert_eq!(kept(&vm), [2]);
        drop(recording);
        prune_logs(&vm, DAY, later, false).unwrap();
        assert!(kept(&vm).is_empty());
    }
}
