//! A running QEMU.
//!
//! Its life: [`Vm::start`] boots a guest, or waits for device state and then stands still until
//! [`Vm::resume`]. A process of ours that crashed finds it again with [`Vm::attach`]. It ends by
//! [`Vm::quit`], [`Vm::kill`], or when the guest powers off.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use qapi::Command;

use crate::counted::{self, Skew};
use crate::error::Context as _;
use crate::hardware::{Accelerator, Launch};
use crate::process::{Death, Process};
use crate::qmp::{Qmp, commands};
use crate::runtime::{Paths, Record, prepare_ram, remove};
use crate::start::{SOCKET_POLL, blame, bring_up, explain_start, is_not_there_yet, vcpu_threads};
use crate::vcpus::{self, Vcpus};
use crate::{Error, Result, programs};

/// How long it may take to end.
const QUIT_LIMIT: Duration = Duration::from_secs(60);

/// How long a living one may take to greet.
const ATTACH_LIMIT: Duration = Duration::from_secs(10);

/// What a VM is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The guest runs.
    Running,
    /// The guest stands still and can be resumed.
    Paused,
    /// As [`Status::Paused`], and its device state was saved since it stopped.
    Saved,
    /// It waits for device state.
    Incoming,
    /// Anything else, in QEMU's words (`RunState` in its `run-state.json`): the guest was shut
    /// down, a disk failed.
    Other(String),
}

impl Status {
    fn parse(words: &str) -> Self {
        match words {
            "running" => Self::Running,
            "paused" | "prelaunch" => Self::Paused,
            "postmigrate" => Self::Saved,
            "inmigrate" => Self::Incoming,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saved => "paused with its device state saved",
            Self::Incoming => "waiting for device state",
            Self::Other(words) => words,
        })
    }
}

/// A QEMU process and the means to drive it. Dropping this leaves QEMU running.
#[derive(Debug)]
pub struct Vm {
    pub(crate) launch: Launch,
    accelerator: Accelerator,
    pub(crate) paths: Paths,
    process: Process,
    pub(crate) qmp: Qmp,
    vcpu_threads: Vec<u32>,
    pub(crate) screen_size: std::sync::Mutex<(u16, u16)>,
    /// Its clock, from when it last began to run; none where that is the host's.
    skew: std::sync::Mutex<Option<Arc<Skew>>>,
}

impl Vm {
    /// Starts QEMU, detached from us.
    ///
    /// A guest that boots runs when this returns; its RAM file is made anew. One that waits for
    /// device state needs its RAM file in place, as it was when that state was saved.
    /// On failure no process and no socket is left. If this is dropped before it ends, a QEMU
    /// may be left, which [`Vm::attach`] finds.
    pub async fn start(launch: &Launch) -> Result<Self> {
        let launch = launch.checked()?;
        let paths = Paths::new(&launch.runtime_dir)?;
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(&paths.dir)
            .context("create", &paths.dir)?;
        if let Some(record) = Record::read(&paths)?
            && let Some(process) = record.living(&paths)?
        {
            let pid = process.identity().pid;
            return Err(Error::AlreadyRunning {
                runtime_dir: paths.dir,
                pid,
            });
        }
        paths.clear()?;
        remove(&paths.serial_log)?;
        let boot_files = launch
            .boot
            .iter()
            .flat_map(|b| std::iter::once(&b.kernel).chain(&b.initrd));
        for path in launch.disks.iter().chain(boot_files) {
            fs::metadata(path).context("find", path)?;
        }
        prepare_ram(&launch)?;
        let accelerator = match launch.accelerator {
            Accelerator::Auto if launch.hardware.icount.is_some() => Accelerator::Tcg,
            Accelerator::Auto => crate::probe::accelerator(),
            chosen => chosen,
        };

        let mut record = Record::new(launch, accelerator);
        record.write(&paths)?;
        let nodes = crate::arriving::nodes(&record.launch)?;
        let args = crate::command_line::arguments(&record.launch, accelerator, &paths, &nodes);
        let qemu = programs::qemu();
        tracing::debug!(qemu = %qemu.display(), ?args, "starting");
        let process = match Process::start(&qemu, &args, &paths.dir, &paths.log) {
            Ok(process) => process,
            Err(error) => {
                paths.clear()?;
                return Err(explain_start(error, &qemu, &record.launch));
            }
        };
        record.process = Some(process.identity().clone());
        let brought_up = async {
            record.write(&paths)?;
            bring_up(&process, &record.launch, &paths).await
        };
        match brought_up.await {
            Ok((qmp, vcpu_threads)) => Ok(Self::assemble(
                record.launch,
                accelerator,
                paths,
                process,
                qmp,
                vcpu_threads,
            )),
            Err(error) => {
                process.kill().context("kill", &qemu)?;
                process.death().await;
                paths.clear()?;
                Err(explain_start(error, &qemu, &record.launch))
            }
        }
    }

    /// Finds the QEMU that was started in a runtime directory; `None` if there is none any more.
    ///
    /// QEMU lends its control socket to one process at a time: as long as another one of ours
    /// has it, this fails with [`Error::Unreachable`] after ten seconds.
    pub async fn attach(runtime_dir: &Path) -> Result<Option<Self>> {
        let dir = std::path::absolute(runtime_dir).context("make absolute", runtime_dir)?;
        let paths = Paths::new(&dir)?;
        let Some(record) = Record::read(&paths)? else {
            return Ok(None);
        };
        let begun = Instant::now();
        let connected = loop {
            match Qmp::connect(&paths.control, ATTACH_LIMIT).await {
                // Somebody may have started it this very moment.
                Err(error)
                    if is_not_there_yet(&error)
                        && begun.elapsed() < ATTACH_LIMIT
                        && record.living(&paths)?.is_some() =>
                {
                    tokio::time::sleep(SOCKET_POLL).await;
                }
                outcome => break outcome,
            }
        };
        match connected {
            Ok(qmp) => {
                // Whoever listens at the socket is the one to hold, says the kernel.
                let pid = qmp.peer().unwrap_or_default();
                let held = Process::hold(pid, &paths.log).context("watch", &paths.record)?;
                let Some(process) = held else { return Ok(None) };
                if record
                    .process
                    .as_ref()
                    .is_some_and(|known| known != process.identity())
                {
                    return Err(Error::Unreachable {
                        runtime_dir: dir,
                        pid,
                    });
                }
                qmp.learn_run_state().await?;
                let vcpus = vcpu_threads(&qmp).await?;
                let Record {
                    launch,
                    accelerator,
                    ..
                } = record;
                Ok(Some(Self::assemble(
                    launch,
                    accelerator,
                    paths,
                    process,
                    qmp,
                    vcpus,
                )))
            }
            Err(error) => match record.living(&paths)? {
                Some(process) => {
                    tracing::debug!(%error, "no contact");
                    Err(Error::Unreachable {
                        runtime_dir: dir,
                        pid: process.identity().pid,
                    })
                }
                None => Ok(None),
            },
        }
    }

    fn assemble(
        launch: Launch,
        accelerator: Accelerator,
        paths: Paths,
        process: Process,
        qmp: Qmp,
        vcpu_threads: Vec<u32>,
    ) -> Self {
        let size = (launch.hardware.screen_width, launch.hardware.screen_height);
        let screen_size = std::sync::Mutex::new(size);
        Self {
            launch,
            accelerator,
            paths,
            process,
            qmp,
            vcpu_threads,
            screen_size,
            skew: std::sync::Mutex::default(),
        }
    }

    /// What it was started with, paths made absolute.
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// What runs the guest: [`Accelerator::Auto`] is decided.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// Where its sockets and logs are.
    pub fn runtime_dir(&self) -> &Path {
        &self.paths.dir
    }

    /// The unix socket of its VNC server. Takes any number of clients.
    pub fn vnc_socket(&self) -> &Path {
        &self.paths.vnc
    }

    /// A QMP socket for a [`GuestClock`](crate::GuestClock), which may live in another process.
    pub fn clock_qmp_socket(&self) -> &Path {
        &self.paths.clock
    }

    /// What the guest wrote to its serial port since QEMU was started.
    pub fn serial_log(&self) -> &Path {
        &self.paths.serial_log
    }

    /// QEMU's process number.
    pub fn pid(&self) -> u32 {
        self.process.identity().pid
    }

    /// Its virtual CPUs, to be watched also where this is not at hand.
    pub fn vcpus(&self) -> Vcpus {
        Vcpus::new(self.pid(), self.vcpu_threads.clone())
    }

    /// Time its virtual CPUs have been executing on the host. Under TCG an idle guest uses none.
    pub fn cpu_time(&self) -> Result<Duration> {
        vcpus::cpu_time(self.pid(), &self.vcpu_threads)
    }

    /// For how long the guest has been running, as far as this connection to QEMU saw it. Counted
    /// from QEMU's own time stamps, and not from when they were read.
    pub fn ran_for(&self) -> Duration {
        self.qmp.stopwatch().elapsed(Instant::now())
    }

    /// What it is doing.
    pub async fn status(&self) -> Result<Status> {
        let info = self.ask("tell its state", commands::QueryStatus {}).await?;
        Ok(Status::parse(&info.status))
    }

    /// Whether the guest runs, and each change of it: `changed()` of the receiver waits for the
    /// next one. Ends, as not running, with QEMU.
    pub fn watch_running(&self) -> tokio::sync::watch::Receiver<bool> {
        let mut source = self.qmp.watch_running();
        let (sender, receiver) = tokio::sync::watch::channel(source.borrow().is_running());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = sender.closed() => break,
                    changed = source.changed() => {
                        let running = changed.is_ok() && source.borrow().is_running();
                        sender.send_if_modified(|old| std::mem::replace(old, running) != running);
                        if changed.is_err() {
                            break;
                        }
                    }
                }
            }
        });
        receiver
    }

    /// Stops the guest. When this returns, all its disk writes are in the image files: whoever
    /// reads them sees what the guest would.
    pub async fn pause(&self) -> Result<()> {
        self.ask("pause", qapi::qmp::stop {}).await.map(drop)
    }

    /// Lets the guest run, also after its device state was saved.
    pub async fn resume(&self) -> Result<()> {
        if self.status().await? == Status::Incoming {
            let is = Status::Incoming.to_string();
            return Err(Error::State {
                doing: "resume",
                is,
                must_be: "given its device state",
            });
        }
        remove(&self.paths.saved)?;
        self.note_clock().await;
        self.ask("resume", qapi::qmp::cont {}).await.map(drop)
    }

    /// Where the guest's instructions are counted, its clock is counted from here on.
    async fn note_clock(&self) {
        if self.launch.hardware.icount.is_none() || !counted::is_readable(&self.qmp).await {
            return;
        }
        let skew = Skew::default();
        match skew.look(&self.qmp).await {
            Ok(_) => {
                let mut noted = self.skew.lock().unwrap_or_else(PoisonError::into_inner);
                noted.get_or_insert_with(|| Arc::new(skew));
            }
            // Input comes by the host's clock then, which is less exact.
            Err(error) => tracing::warn!(%error, "the guest's clock can't be read"),
        }
    }

    /// Whether input can come by the guest's own clock: its instructions are counted.
    pub fn has_clock(&self) -> bool {
        self.skew().is_some()
    }

    /// How far the guest's own clock is ahead of [`Self::ran_for`] since this resumed it, in nanoseconds; zero where that is not known.
    pub async fn skew_now(&self) -> i64 {
        match self.skew() {
            Some(skew) => match skew.look(&self.qmp).await {
                Ok(ahead) => ahead,
                Err(_) => skew.last(),
            },
            None => 0,
        }
    }

    fn skew(&self) -> Option<Arc<Skew>> {
        let noted = self.skew.lock().unwrap_or_else(PoisonError::into_inner);
        noted.clone()
    }

    /// Ends QEMU in an orderly way (the guest isn't asked), and waits until it is gone.
    pub async fn quit(&self) -> Result<()> {
        match self.qmp.execute(qapi::qmp::quit {}).await {
            // It may be gone before its answer is read.
            Ok(_) | Err(Error::Disconnected { .. }) => {}
            Err(error) => return Err(error),
        }
        tokio::time::timeout(QUIT_LIMIT, self.death())
            .await
            .map_err(|_| Error::Timeout {
                doing: "its end".into(),
                limit: QUIT_LIMIT,
            })?;
        self.paths.clear()
    }

    /// Ends QEMU at once, and waits until it is gone. Disk writes it has not yet made are lost.
    pub async fn kill(&self) -> Result<()> {
        self.process
            .kill()
            .context("kill the QEMU in", &self.paths.dir)?;
        self.death().await;
        self.paths.clear()
    }

    /// Waits until QEMU is gone, whatever the reason, and tells it.
    pub async fn death(&self) -> Death {
        self.process.death().await
    }

    /// As [`Vm::death`], but lends the control socket to other processes meanwhile.
    pub async fn death_from_afar(self) -> Death {
        let Self { process, qmp, .. } = self;
        drop(qmp);
        process.death().await
    }

    /// Executes a command; if QEMU is found dead, the error says why it died.
    pub(crate) async fn ask<C: Command>(&self, doing: &str, command: C) -> Result<C::Ok> {
        let answer = self.qmp.execute(command).await;
        match answer {
            Err(error) => Err(blame(&self.process, &self.launch.name, doing, error).await),
            answer => answer,
        }
    }

    /// As [`Vm::ask`] does, for failures from elsewhere.
    pub(crate) async fn blame(&self, doing: &str, error: Error) -> Error {
        blame(&self.process, &self.launch.name, doing, error).await
    }
}
