//! A runtime directory: the files of one VM while its QEMU runs, and the record by which a
//! QEMU is found again.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Context as _;
use crate::hardware::{Accelerator, Launch, check_socket_path};
use crate::process::{Identity, Process};
use crate::{Error, Result};

/// The files of a runtime directory.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub(crate) dir: PathBuf,
    pub(crate) control: PathBuf,
    pub(crate) clock: PathBuf,
    pub(crate) vnc: PathBuf,
    /// For the moment that device state goes through it.
    pub(crate) state: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) serial_log: PathBuf,
    /// Device state as it was last saved, while the guest stands still there.
    pub(crate) saved: PathBuf,
    pub(crate) record: PathBuf,
}

impl Paths {
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let at = |name: &str| dir.join(name);
        let paths = Self {
            dir: dir.to_owned(),
            control: at("control.qmp"),
            clock: at("clock.qmp"),
            vnc: at("vnc.sock"),
            state: at("state.sock"),
            log: at("qemu.log"),
            serial_log: at("serial.log"),
            saved: at("device.saved"),
            record: at("vm.json"),
        };
        for socket in [&paths.control, &paths.clock, &paths.vnc, &paths.state] {
            check_socket_path(socket)?;
        }
        Ok(paths)
    }

    /// Removes what a QEMU that is gone left behind; its logs stay.
    pub(crate) fn clear(&self) -> Result<()> {
        let stale = [
            &self.control,
            &self.clock,
            &self.vnc,
            &self.state,
            &self.saved,
            &self.record,
        ];
        stale.into_iter().try_for_each(|path| remove(path))
    }
}

pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

/// Writes a file so that it is either there as a whole or not at all.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let fresh = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)
        .context("create", &fresh)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .context("write", &fresh)?;
    fs::rename(&fresh, path).context("rename to", path)
}

/// What a runtime directory says about its QEMU.
#[derive(Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub(crate) launch: Launch,
    pub(crate) accelerator: Accelerator,
    /// Missing if we died between starting QEMU and writing this.
    pub(crate) process: Option<Identity>,
}

const RECORD_VERSION: u32 = 1;

impl Record {
    /// A record of a QEMU that is about to be started.
    pub(crate) fn new(launch: Launch, accelerator: Accelerator) -> Self {
        Self {
            version: RECORD_VERSION,
            launch,
            accelerator,
            process: None,
        }
    }

    pub(crate) fn read(paths: &Paths) -> Result<Option<Self>> {
        let bytes = match fs::read(&paths.record) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.context("read", &paths.record)?,
        };
        let record: Self = serde_json::from_slice(&bytes)
            .map_err(io::Error::from)
            .context("understand", &paths.record)?;
        if record.version != RECORD_VERSION {
            let problem = format!("is of version {}, not {RECORD_VERSION}", record.version);
            return Err(Error::Image {
                path: paths.record.clone(),
                problem,
            });
        }
        Ok(Some(record))
    }

    pub(crate) fn write(&self, paths: &Paths) -> Result<()> {
        let json = serde_json::to_vec_pretty(self).map_err(io::Error::from);
        write_atomically(&paths.record, &json.context("describe", &paths.record)?)
    }

    /// The process it tells of, if that is alive.
    pub(crate) fn living(&self, paths: &Paths) -> Result<Option<Process>> {
        let Some(known) = &self.process else {
            return Ok(None);
        };
        let held = Process::hold(known.pid, &paths.log).context("watch", &paths.record)?;
        Ok(held.filter(|process| process.identity() == known))
    }
}

/// A guest that boots finds its RAM zeroed, one that is loaded finds it as it was left.
pub(crate) fn prepare_ram(launch: &Launch) -> Result<()> {
    let path = &launch.ram;
    let wanted = launch.hardware.memory_bytes();
    if launch.incoming {
        let length = fs::metadata(path).context("find the RAM file", path)?.len();
        if length != wanted {
            return Err(Error::Image {
                path: path.clone(),
                problem: format!("holds {length} bytes of RAM, this VM has {wanted}"),
            });
        }
        return Ok(());
    }
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path);
    file.context("create", path)?
        .set_len(wanted)
        .context("size", path)
}
