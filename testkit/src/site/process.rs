//! A running command: its lines as they come, and its end.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::mpsc;

use super::SiteError;

/// How long a process that was asked to end may clean up.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(10);

/// A command that runs. Dropping it asks it to end and waits until it has.
#[derive(Debug)]
pub struct Running {
    child: Child,
    command: String,
    lines: mpsc::UnboundedReceiver<String>,
    seen: VecDeque<String>,
    stderr: Arc<Mutex<String>>,
    ended: Option<ExitStatus>,
}

/// A command that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// What was run.
    pub command: String,
    /// Its exit code; none after a signal.
    pub code: Option<i32>,
    /// The lines of its standard output.
    pub lines: Vec<String>,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Itself, if it succeeded.
    pub fn success(self) -> Result<Self, SiteError> {
        if self.code == Some(0) {
            return Ok(self);
        }
        Err(SiteError::Failed {
            command: self.command,
            code: self.code,
            stderr: self.stderr,
        })
    }

    /// Its last line, read as JSON.
    pub fn last<T: DeserializeOwned>(&self) -> Result<T, SiteError> {
        read(&self.command, self.lines.last().map_or("", String::as_str))
    }
}

impl Running {
    pub(super) fn start(
        program: &Path,
        args: &[OsString],
        env: &[(OsString, OsString)],
    ) -> Result<Self, SiteError> {
        let mut command = Command::new(program);
        command
            .args(args)
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C at the terminal is the caller's to pass on.
            .process_group(0);
        let failed = |source| SiteError::Start {
            program: program.to_owned(),
            source,
        };
        let mut child = command.spawn().map_err(failed)?;
        let (sender, lines) = mpsc::unbounded_channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let stderr = Arc::new(Mutex::new(String::new()));
        if let Some(mut pipe) = child.stderr.take() {
            let text = stderr.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                    let part = String::from_utf8_lossy(&buffer[..length]);
                    text.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push_str(&part);
                }
            });
        }
        // Without the state directory, which is long and the same for all.
        let words: Vec<_> = args
            .iter()
            .skip(2)
            .map(|word| word.to_string_lossy())
            .collect();
        Ok(Self {
            child,
            command: words.join(" "),
            lines,
            seen: VecDeque::new(),
            stderr,
            ended: None,
        })
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What was run.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// The next line, read as JSON.
    pub async fn next<T: DeserializeOwned>(
        &mut self,
        what: &'static str,
        limit: Duration,
    ) -> Result<T, SiteError> {
        let line = self.line(what, limit).await?;
        read(&self.command, &line)
    }

    /// Waits for a line of progress that `wanted` picks; `None` if the command ends before.
    pub async fn until(
        &mut self,
        what: &'static str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Option<Value>, SiteError> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = match tokio::time::timeout(left, self.lines.recv()).await {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(None),
                Err(_) => return Err(self.late(what, limit)),
            };
            let value = serde_json::from_str(&line).unwrap_or_default();
            self.seen.push_back(line);
            if wanted(&value) {
                return Ok(Some(value));
            }
        }
    }

    async fn line(&mut self, what: &'static str, limit: Duration) -> Result<String, SiteError> {
        match tokio::time::timeout(limit, self.lines.recv()).await {
            Ok(Some(line)) => {
                self.seen.push_back(line.clone());
                Ok(line)
            }
            Ok(None) => {
                let code = self.reap(limit).await?.code();
                let (command, stderr) = (self.command.clone(), self.stderr());
                Err(SiteError::Failed {
                    command,
                    code,
                    stderr,
                })
            }
            Err(_) => Err(self.late(what, limit)),
        }
    }

    /// Sends Ctrl-C.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Ends it at once, without a chance to clean up.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Sends Ctrl-C, and waits until it has cleaned up.
    pub async fn stop(self) -> Result<Finished, SiteError> {
        self.interrupt();
        self.finish(END_LIMIT).await
    }

    /// Waits until it ends by itself.
    pub async fn finish(mut self, limit: Duration) -> Result<Finished, SiteError> {
        let end = Instant::now() + limit;
        let mut seen: Vec<String> = std::mem::take(&mut self.seen).into();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.lines.recv()).await {
                Ok(Some(line)) => seen.push(line),
                Ok(None) => break,
                Err(_) => return Err(self.late("end", limit)),
            }
        }
        let code = self.reap(limit).await?.code();
        let (command, stderr) = (self.command.clone(), self.stderr());
        Ok(Finished {
            command,
            code,
            lines: seen,
            stderr,
        })
    }

    async fn reap(&mut self, limit: Duration) -> Result<ExitStatus, SiteError> {
        let end = Instant::now() + limit;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                self.ended = Some(status);
                // The thread that reads standard error sees its end at the same time.
                tokio::time::sleep(POLL).await;
                return Ok(status);
            }
            if Instant::now() >= end {
                return Err(self.late("end", limit));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn late(&self, what: &'static str, limit: Duration) -> SiteError {
        SiteError::Late {
            command: self.command.clone(),
            what,
            limit,
            stderr: self.stderr(),
        }
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .trim()
            .to_owned()
    }

    fn signal(&self, signal: Signal) {
        if self.ended.is_none()
            && let Some(pid) = Pid::from_raw(self.child.id().cast_signed())
        {
            // It may have ended just now.
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_some() || matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal(Signal::TERM);
        let end = Instant::now() + END_LIMIT;
        while Instant::now() < end {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(POLL);
        }
        eprintln!("`{}` does not end: killed", self.command);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A QEMU that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// Its number.
    pub pid: u32,
    /// What it was started with.
    pub command_line: String,
}

impl Qemu {
    /// Ends it at once, as a crash would.
    pub fn kill(&self) {
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            // It may have ended just now.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The QEMUs that have a file of this folder open, by their command lines.
pub fn qemus_on(dir: &Path) -> Vec<Qemu> {
    let dir = dir.to_string_lossy().into_owned();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            // One that ended meanwhile has none.
            let words = std::fs::read(process.path().join("cmdline")).ok()?;
            let command_line = String::from_utf8_lossy(&words).replace('\0', " ");
            let program = command_line.split(' ').next()?;
            let ours = program.contains("qemu-system") && command_line.contains(&dir);
            ours.then_some(Qemu { pid, command_line })
        })
        .collect()
}

/// Ends a process that is no child of ours.
pub(super) fn end_stranger(pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else {
        return;
    };
    let _ = kill_process(pid, Signal::TERM);
    let end = Instant::now() + END_LIMIT;
    while test_kill_process(pid).is_ok() && Instant::now() < end {
        std::thread::sleep(POLL);
    }
}

fn read<T: DeserializeOwned>(command: &str, line: &str) -> Result<T, SiteError> {
    serde_json::from_str(line).map_err(|source| SiteError::Printed {
        command: command.to_owned(),
        printed: line.to_owned(),
        source,
    })
}
