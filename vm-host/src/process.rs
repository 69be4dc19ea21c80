//! QEMU as a process: it outlives us, is found again, and says why it died.
//!
//! QEMU runs in its own session (through util-linux's `setsid`, which becomes it), so that a
//! Ctrl-C at our terminal or our death doesn't reach it. A process is identified by its number
//! *and* its start time, held by a pidfd: numbers are reused.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::error::Context as _;
use crate::{Error, Result};

/// How much of QEMU's last words goes into an error.
const TAIL_BYTES: u64 = 2000;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Exit status or signal, where it was our child; nobody else is told.
    pub status: Option<std::process::ExitStatus>,
    /// The end of what it wrote to standard error.
    pub last_words: String,
    /// Where all of it is.
    pub log: PathBuf,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.status {
            Some(status) => write!(f, "{status}; ")?,
            None => write!(f, "nobody knows its exit status; ")?,
        }
        match self.last_words.as_str() {
            "" => write!(f, "it said nothing (its log is {})", self.log.display()),
            words => write!(f, "it said: {words}"),
        }
    }
}

/// Which process, for ever: numbers are reused, start times since boot tell them apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// In clock ticks since boot.
    started: u64,
    boot: String,
}

impl Identity {
    fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "/proc stat not understood");
        let fields = after_name(&stat).ok_or_else(bad)?;
        // A zombie is dead already; only nobody has asked for its status yet.
        if fields.first() == Some(&"Z") || fields.first() == Some(&"X") {
            return Err(io::ErrorKind::NotFound.into());
        }
        let started = fields
            .get(19)
            .and_then(|f| f.parse().ok())
            .ok_or_else(bad)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?
            .trim()
            .to_owned();
        Ok(Self { pid, started, boot })
    }
}

/// The fields of `/proc/PID/stat` from the third on. The second is the name, in parentheses,
/// and may hold anything, parentheses too.
fn after_name(stat: &str) -> Option<Vec<&str>> {
    Some(
        stat.get(stat.rfind(')')? + 1..)?
            .split_ascii_whitespace()
            .collect(),
    )
}

/// A process that is held by a pidfd.
#[derive(Debug)]
pub(crate) struct Process {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    log: PathBuf,
    status: Option<watch::Receiver<Option<std::process::ExitStatus>>>,
}

impl Process {
    /// Starts a program in its own session, with standard error going to `log`.
    pub(crate) fn start(program: &Path, args: &[String], dir: &Path, log: &Path) -> Result<Self> {
        // setsid would report a missing program only in the log.
        let program = find_program(program).ok_or_else(|| Error::MissingProgram {
            program: program.into(),
            package: "qemu-system-x86",
        })?;
        let stderr = File::create(log).context("create", log)?;
        let stdout = stderr.try_clone().context("open", log)?;
        let mut child = tokio::process::Command::new("setsid")
            .arg(&program)
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => Error::MissingProgram {
                    program: "setsid".into(),
                    package: "util-linux",
                },
                _ => Error::Io {
                    doing: "start",
                    path: program.clone(),
                    source,
                },
            })?;
        // Not a process group leader, as `setsid` needs to exec without forking: the number of
        // our child is QEMU's.
        let pid = child.id().unwrap_or_default();
        let mut process = Self::hold(pid, log)
            .context("watch", &program)?
            .ok_or_else(|| Error::Died {
                name: program.display().to_string(),
                doing: "start".into(),
                death: Death {
                    status: None,
                    last_words: tail(log),
                    log: log.to_owned(),
                },
            })?;
        let (sender, receiver) = watch::channel(None);
        process.status = Some(receiver);
        // Reaps it, if it ends before us.
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                let _ = sender.send(Some(status));
            }
        });
        Ok(process)
    }

    /// Takes hold of a running process; `None` if there is none with this number.
    pub(crate) fn hold(pid: u32, log: &Path) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(number, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Read after the pidfd was opened: whatever this describes can't be a successor.
        match Identity::of(pid) {
            Ok(identity) => Ok(Some(Self {
                identity,
                pidfd: async_fd(pidfd)?,
                log: log.to_owned(),
                status: None,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            // Gone already.
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it is gone and tells how.
    pub(crate) async fn death(&self) -> Death {
        // A pidfd becomes readable when the process ends, and stays so. Failing to wait for it
        // means that the runtime shuts down; there's nobody left to tell.
        let _ = self.pidfd.readable().await;
        let mut status = None;
        if let Some(receiver) = &self.status {
            let mut receiver = receiver.clone();
            let told = receiver.wait_for(Option::is_some);
            status = match tokio::time::timeout(Duration::from_secs(1), told).await {
                Ok(Ok(status)) => *status,
                _ => None,
            };
        }
        Death {
            status,
            last_words: tail(&self.log),
            log: self.log.clone(),
        }
    }
}

/// Lets the runtime wait for a descriptor.
#[allow(
    deprecated,
    reason = "unsound only for types that may change their descriptor"
)]
pub(crate) fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// The end of a log file, on one line; empty if there is none.
pub(crate) fn tail(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join(" / ")
}

/// Finds a program as a shell would.
pub(crate) fn find_program(program: &Path) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        return is_program(program).then(|| program.to_owned());
    }
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| is_program(path))
}

/// Time a thread has been executing on a host CPU.
pub(crate) fn thread_cpu_time(pid: u32, thread: u32) -> io::Result<Duration> {
    let dir = format!("/proc/{pid}/task/{thread}");
    // Nanoseconds, where the kernel keeps scheduler statistics.
    if let Ok(text) = fs::read_to_string(format!("{dir}/schedstat"))
        && let Some(Ok(nanos)) = text.split_ascii_whitespace().next().map(str::parse)
    {
        return Ok(Duration::from_nanos(nanos));
    }
    // Else user and system time in ticks, of which Linux reports 100 a second (USER_HZ).
    let stat = fs::read_to_string(format!("{dir}/stat"))?;
    let ticks: u64 = after_name(&stat)
        .and_then(|f| Some(f.get(11)?.parse::<u64>().ok()? + f.get(12)?.parse::<u64>().ok()?))
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(Duration::from_millis(ticks * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_confuse() {
        let stat = "12 (a) S 9 (b) R 3 4 5";
        assert_eq!(after_name(stat).unwrap(), ["R", "3", "4", "5"]);
    }

    #[tokio::test]
    async fn the_dead_are_told_from_the_living() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let shell = Path::new("sh");
        let script = ["-c".to_owned(), "echo last words >&2; exit 3".to_owned()];
        let process = Process::start(shell, &script, dir.path(), &log);
        // It may be gone before it could be held; both ends are right.
        let death = match process {
            Ok(process) => {
                let death = process.death().await;
                assert_eq!(death.status.and_then(|s| s.code()), Some(3));
                assert!(Process::hold(process.identity.pid, &log).unwrap().is_none());
                death
            }
            Err(Error::Died { death, .. }) => death,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(death.last_words, "last words");
        assert!(Process::hold(std::process::id(), &log).unwrap().is_some());
        assert!(Process::hold(0, &log).unwrap().is_none());
    }
}
