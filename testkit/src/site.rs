//! Sites, driven as a person drives them: through the `replay-migrate` command.
//!
//! Promise: a [`Site`] that is dropped, also by a panic, leaves no process behind: its agent and
//! recorders are asked to end and waited for, and the QEMU of each of its VMs is ended with
//! `vm stop --discard`. The state directory stays; it belongs to the caller.

mod compare;
mod process;
mod whole;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

pub use compare::{Difference, compare_disks, compare_files, newest_generation};
pub use process::{Finished, Qemu, Running, qemus_on};
pub use whole::whole_generation;

use crate::robot::VncAddr;

/// A command that takes longer hangs.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// How long an agent or a recorder may take until it listens.
const LISTEN_LIMIT: Duration = Duration::from_secs(120);
/// A build of the guest downloads packages, and a first boot is emulated.
const GUEST_LIMIT: Duration = Duration::from_secs(1800);

/// What `vm create` and `guest build` are asked for where chance is to be taken out of a guest.
pub fn guest_options(replay_friendly: bool) -> &'static [&'static str] {
    if replay_friendly {
        &["--replay-friendly"]
    } else {
        &[]
    }
}

/// Why a site can't be driven on.
#[derive(Debug, Error)]
pub enum SiteError {
    /// The command can't be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The command ended with another exit code than 0.
    #[error("`{command}` ended with {code:?}: {stderr}")]
    Failed {
        /// What was run.
        command: String,
        /// Its exit code; none after a signal.
        code: Option<i32>,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// The command printed something else than it promises.
    #[error("`{command}` printed {printed:?}")]
    Printed {
        /// What was run.
        command: String,
        /// Its last line.
        printed: String,
        /// Why that can't be read.
        source: serde_json::Error,
    },
    /// The command did not get on.
    #[error("`{command}` did not {what} within {} s: {stderr}", limit.as_secs())]
    Late {
        /// What was run.
        command: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
        /// What it wrote to standard error until then.
        stderr: String,
    },
    /// A file of the site can't be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A generation is not what its manifest says.
    #[error("{}: {reason}", path.display())]
    NotWhole {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// A site: a state directory, and the command that works on it.
#[derive(Debug)]
pub struct Site {
    name: String,
    dir: PathBuf,
    program: PathBuf,
    env: Vec<(OsString, OsString)>,
    agent: Option<(Running, Agent)>,
    /// Where its agent listens, once that is known.
    listen: Option<SocketAddr>,
}

/// An agent that listens.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct Agent {
    /// Where.
    #[serde(rename = "listening")]
    pub addr: SocketAddr,
    /// Its site's key.
    pub key: String,
}

/// A recording that has begun.
#[derive(Debug)]
pub struct Recorder {
    /// The process; [`Running::stop`] ends it.
    pub process: Running,
    /// Where a viewer connects.
    pub vnc: VncAddr,
    /// What it said when it began.
    pub begun: Value,
}

impl Site {
    /// A site of this name with its state in `dir`, which need not exist yet.
    pub fn new(program: impl Into<PathBuf>, name: &str, dir: impl Into<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            dir: dir.into(),
            program: program.into(),
            env: Vec::new(),
            agent: None,
            listen: None,
        }
    }

    /// The name that others know it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sets an environment variable for all commands from now on.
    pub fn set_env(&mut self, key: &str, value: impl Into<OsString>) {
        self.env.retain(|(known, _)| known != key);
        self.env.push((key.into(), value.into()));
    }

    /// Starts a command with `--json`, which prints lines as it gets on.
    pub fn spawn(&self, args: &[&str]) -> Result<Running, SiteError> {
        let mut words: Vec<OsString> = vec!["--site".into(), self.dir.clone().into()];
        words.push("--json".into());
        words.extend(args.iter().map(Into::into));
        Running::start(&self.program, &words, &self.env)
    }

    /// Runs a command with `--json` to its end, whatever that is.
    pub async fn run(&self, args: &[&str]) -> Result<Finished, SiteError> {
        self.spawn(args)?.finish(COMMAND_LIMIT).await
    }

    /// Runs a command that must succeed, and reads its last line.
    pub async fn ask<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T, SiteError> {
        self.run(args).await?.success()?.last()
    }

    /// As [`Self::ask`], where the answer may have any form.
    pub async fn json(&self, args: &[&str]) -> Result<Value, SiteError> {
        self.ask(args).await
    }

    /// What `vm status` says of a VM.
    pub async fn status(&self, vm: &str) -> Result<Value, SiteError> {
        self.json(&["vm", "status", vm]).await
    }

    /// What a VM does here: `running`, `paused`, `stopped`, `elsewhere`, `in_doubt`.
    pub async fn state(&self, vm: &str) -> Result<String, SiteError> {
        let status = self.status(vm).await?;
        Ok(status["state"].as_str().unwrap_or_default().to_owned())
    }

    /// Where a viewer reaches a running VM directly, without being recorded.
    pub async fn vnc(&self, vm: &str) -> Result<VncAddr, SiteError> {
        let status = self.status(vm).await?;
        Ok(VncAddr::Unix(
            status["vnc"].as_str().unwrap_or_default().into(),
        ))
    }

    /// The file that is the RAM of a VM with a QEMU.
    pub async fn live_ram(&self, vm: &str) -> Result<PathBuf, SiteError> {
        let VncAddr::Unix(socket) = self.vnc(vm).await? else {
            unreachable_socket()
        };
        Ok(socket.with_file_name("ram.img"))
    }

    /// This site's key.
    pub async fn key(&self) -> Result<String, SiteError> {
        let id = self.json(&["site", "id"]).await?;
        Ok(id["key"].as_str().unwrap_or_default().to_owned())
    }

    /// Starts the agent, on a port of its own, unless it runs.
    pub async fn serve(&mut self) -> Result<Agent, SiteError> {
        self.serve_at(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts the agent where it listened before, unless it runs. Somebody else may have taken
    /// the port meanwhile.
    pub async fn serve_again(&mut self) -> Result<Agent, SiteError> {
        match self.listen {
            Some(before) => self.serve_at(before).await,
            None => self.serve().await,
        }
    }

    async fn serve_at(&mut self, listen: SocketAddr) -> Result<Agent, SiteError> {
        if let Some((_, agent)) = &self.agent {
            return Ok(agent.clone());
        }
        let mut process = self.spawn(&["serve", "--listen", &listen.to_string()])?;
        let agent: Agent = process.next("listen", LISTEN_LIMIT).await?;
        let path = Self::pid_file(&self.dir);
        std::fs::write(&path, process.id().to_string())
            .map_err(|source| SiteError::File { path, source })?;
        self.listen = Some(agent.addr);
        self.agent = Some((process, agent.clone()));
        Ok(agent)
    }

    /// Ends the agent at once, without a chance to clean up.
    pub fn kill_agent(&mut self) {
        if let Some((process, _)) = self.agent.take() {
            process.kill();
        }
    }

    /// What the agent has written to its log so far.
    pub fn agent_log(&self) -> String {
        let agent = self.agent.as_ref();
        agent.map_or_else(String::new, |(process, _)| process.stderr())
    }

    /// Ends the agent, in order.
    pub fn stop_serving(&mut self) {
        self.agent = None;
    }

    /// Trusts another site, to be reached at `addr`.
    pub async fn trust(&self, name: &str, addr: SocketAddr, key: &str) -> Result<Value, SiteError> {
        self.json(&["site", "trust", name, &addr.to_string(), key])
            .await
    }

    /// Begins to record a VM.
    pub async fn record(&self, vm: &str) -> Result<Recorder, SiteError> {
        self.record_with(vm, &[]).await
    }

    /// The same, with more options.
    pub async fn record_with(&self, vm: &str, more: &[&str]) -> Result<Recorder, SiteError> {
        let mut words = vec!["record", vm, "--listen", "127.0.0.1:0"];
        words.extend(more);
        let mut process = self.spawn(&words)?;
        let begun: Value = process.next("begin to record", LISTEN_LIMIT).await?;
        let listening = begun["listening"].as_str().unwrap_or_default();
        let vnc = listening.parse().map_err(|_| SiteError::Late {
            command: process.command().to_owned(),
            what: "say where viewers connect",
            limit: Duration::ZERO,
            stderr: begun.to_string(),
        })?;
        Ok(Recorder {
            process,
            vnc,
            begun,
        })
    }

    /// The folder of the demo's desktop, built from packages and booted once where the cache has none;
    /// nothing of it is kept at the site. `options` are those of `vm create` that it is to be booted with.
    pub async fn build_guest(&self, options: &[&str]) -> Result<String, SiteError> {
        #[derive(Deserialize)]
        struct Built {
            dir: String,
        }
        let mut words = vec!["guest", "build"];
        words.extend(options);
        let built = self.spawn(&words)?.finish(GUEST_LIMIT).await?;
        Ok(built.success()?.last::<Built>()?.dir)
    }

    /// Ends whatever a site in this directory has left running, as after a crash of the caller.
    pub fn clear_leftovers(program: &Path, dir: &Path) {
        let pid_file = Self::pid_file(dir);
        if let Ok(pid) = std::fs::read_to_string(&pid_file) {
            // The number may be another process's by now: its command line tells.
            let words = std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
            let ours = words
                .split(|byte| *byte == 0)
                .any(|word| word == dir.as_os_str().as_encoded_bytes());
            if let (true, Ok(pid)) = (ours, pid.trim().parse()) {
                process::end_stranger(pid);
            }
        }
        Self::discard_all(program, dir, &[]);
    }

    fn pid_file(dir: &Path) -> PathBuf {
        dir.join("agent.pid")
    }

    /// Ends the QEMU of every VM. Blocks, and gives up on what fails: this cleans up.
    fn discard_all(program: &Path, dir: &Path, env: &[(OsString, OsString)]) {
        let Ok(vms) = std::fs::read_dir(dir.join("vms")) else {
            return;
        };
        for vm in vms
            .flatten()
            .filter(|vm| vm.path().join("vm.json").exists())
        {
            let mut command = std::process::Command::new(program);
            command
                .arg("--site")
                .arg(dir)
                .args(["-q", "vm", "stop", "--discard"]);
            command
                .arg(vm.file_name())
                .envs(env.iter().map(|(key, value)| (key, value)));
            match command.output() {
                Ok(output) if output.status.success() => {}
                Ok(output) => eprintln!(
                    "cannot stop {} at {}: {}",
                    vm.path().display(),
                    dir.display(),
                    String::from_utf8_lossy(&output.stderr).trim()
                ),
                Err(error) => eprintln!("cannot start {}: {error}", program.display()),
            }
        }
    }
}

/// `vm status` names a unix socket, always.
fn unreachable_socket() -> ! {
    unreachable!("vnc() makes unix addresses only")
}

impl Drop for Site {
    fn drop(&mut self) {
        self.agent = None;
        // A test may have put a broken QEMU here; a working one ends what runs.
        Self::discard_all(&self.program, &self.dir, &[]);
    }
}

/// Makes two sites trust each other, each reached at its agent's address; both must serve.
pub async fn introduce(one: &mut Site, other: &mut Site) -> Result<(), SiteError> {
    let (a, b) = (one.serve().await?, other.serve().await?);
    one.trust(&other.name, b.addr, &b.key).await?;
    other.trust(&one.name, a.addr, &a.key).await?;
    Ok(())
}

/// The `replay-migrate` command that was built along with the calling program: of the test's
/// environment, else in the caller's folder or the one above it.
pub fn program() -> Result<PathBuf, SiteError> {
    const NAME: &str = "replay-migrate";
    if let Some(path) = std::env::var_os("CARGO_BIN_EXE_replay-migrate") {
        return Ok(path.into());
    }
    let missing = |source| SiteError::Start {
        program: NAME.into(),
        source,
    };
    let current = std::env::current_exe().map_err(missing)?;
    current
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(NAME))
        .find(|path| path.is_file())
        .ok_or_else(|| missing(std::io::ErrorKind::NotFound.into()))
}
