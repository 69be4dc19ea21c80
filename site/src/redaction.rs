//! Taking a stretch out of a VM's log for good.

use std::fs;
use std::ops::Range;
use std::path::Path;

use traces::{GuestTime, Redaction};

use crate::chance::recording_lock;
use crate::error::{Error, Result};
use crate::files;
use crate::local::Live;
use crate::store::VmDir;

/// Takes what happened in `stretch` out of the log of a generation, durably.
///
/// # Errors
/// When the log is being written, or can't be read or written; it is as it was then.
pub fn redact(vm: &VmDir, generation: u64, stretch: Range<GuestTime>) -> Result<Redaction> {
    let path = vm.log_path(generation);
    // A recorder goes on writing to the file that it has opened.
    let live = Live::load(vm)?.and_then(|live| live.generation);
    let _nobody_records = match recording_lock(vm)? {
        Some(lock) => Some(lock),
        None if live != Some(generation) => None,
        None => {
            return Err(Error::Refused(format!(
                "{} is being recorded into this log: end the recording first, then take the \
                 stretch out",
                vm.name()
            )));
        }
    };
    let fresh = path.with_extension("redacting");
    // What an interrupted attempt left is worth nothing.
    let _ = fs::remove_file(&fresh);
    let redaction = traces::redact(&path, &fresh, &vm.store().log_key()?, stretch).map_err(
        Error::log(format!("cannot take a stretch out of {}", path.display())),
    )?;
    fs::rename(&fresh, &path)
        .and_then(|()| files::sync_dir(path.parent().unwrap_or(Path::new("."))))
        .map_err(Error::file("replace", &path))?;
    Ok(redaction)
}
