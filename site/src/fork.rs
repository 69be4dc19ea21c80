//! A fork: a generation restored beside the VM, with the network unplugged, for a log to be
//! replayed on. Nothing of it reaches the user's disks; its overlays are its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use replayer::{Options, Replay, ReplayReport};
use tokio::sync::mpsc;
use traces::{GuestTime, Record};
use vm_host::screen::Observer;
use vm_host::{Accelerator, Network, Vm};

use crate::error::{Error, Result};
use crate::local;
use crate::store::VmDir;
use crate::vm::VmRecord;

/// Where a fork's files lie.
pub(crate) struct ForkFiles {
    /// RAM and sockets.
    pub runtime: PathBuf,
    /// Its overlays, one a disk.
    pub disks: Vec<PathBuf>,
    /// The device state it begins with.
    pub device: Vec<u8>,
}

/// How far a piece of the log has been replayed.
pub(crate) enum Played {
    /// On the way.
    Progress(replayer::Progress),
    /// The step is over; this is how all of them went so far.
    Done(Box<ReplayReport>),
}

/// What a fork is to do next.
enum Step {
    /// Play a piece of the log.
    Play(Vec<Record>),
    /// Come to rest, or let the limit for that pass.
    Settle,
    /// Go on until this recorded time, for so long at most.
    Idle(GuestTime, Duration),
}

/// A fork that replays what it is given, piece by piece.
pub(crate) struct Fork {
    qemu: Arc<Vm>,
    steps: mpsc::Sender<Step>,
    played: mpsc::Receiver<Result<Played>>,
    playing: tokio::task::JoinHandle<()>,
}

impl Fork {
    /// Restores the fork and lets it run.
    pub(crate) async fn start(
        vm: &VmDir,
        record: &VmRecord,
        files: ForkFiles,
        options: Options,
    ) -> Result<Self> {
        let launch = local::launch(
            vm,
            record,
            &record.hardware,
            &files.runtime,
            files.disks,
            Network::Unplugged,
            Accelerator::Auto,
            true,
        );
        let what = |what: &str| format!("cannot {what} a fork of {}", vm.name());
        let qemu = Vm::start(&launch)
            .await
            .map_err(Error::host(what("start")))?;
        let qemu = Arc::new(qemu);
        let begun = async {
            qemu.load_device_state(&files.device)
                .await
                .map_err(Error::host(what("restore")))?;
            let observer = Observer::connect(qemu.vnc_socket())
                .await
                .map_err(|source| Error::Screen { source })?;
            qemu.resume().await.map_err(Error::host(what("run")))?;
            Ok(observer)
        };
        let observer = match begun.await {
            Ok(observer) => observer,
            Err(error) => {
                let _ = qemu.kill().await;
                return Err(error);
            }
        };
        let (steps, mut inbox) = mpsc::channel(1);
        let (outbox, played) = mpsc::channel(16);
        let guest = qemu.clone();
        let playing = tokio::spawn(async move {
            let mut replay = match Replay::new(&guest, &observer, &options) {
                Ok(replay) => replay,
                Err(error) => {
                    let _ = outbox.send(Err(Error::Replay(error))).await;
                    return;
                }
            };
            while let Some(step) = inbox.recv().await {
                let told = |progress: &replayer::Progress| {
                    // When the line is busy, the next one will do.
                    let _ = outbox.try_send(Ok(Played::Progress(*progress)));
                };
                let outcome = match step {
                    Step::Play(records) => {
                        let played = replay.play(&records, told).await;
                        played.map(|()| replay.report())
                    }
                    Step::Settle => replay.settle().await,
                    Step::Idle(until, limit) => {
                        replay.idle(until, limit).await;
                        Ok(replay.report())
                    }
                };
                let outcome = outcome
                    .map(|report| Played::Done(Box::new(report)))
                    .map_err(Error::Replay);
                if outbox.send(outcome).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            qemu,
            steps,
            played,
            playing,
        })
    }

    /// Gives it the next piece of the log; then [`Self::played`] until that is done.
    pub(crate) async fn play(&self, records: Vec<Record>) -> Result<()> {
        self.step(Step::Play(records)).await
    }

    /// Has it come to rest; then [`Self::played`] until that is done.
    pub(crate) async fn settle(&self) -> Result<()> {
        self.step(Step::Settle).await
    }

    /// Lets it go on by itself until this recorded time, for at most `limit`; then
    /// [`Self::played`] until that is done.
    pub(crate) async fn idle(&self, until: GuestTime, limit: Duration) -> Result<()> {
        self.step(Step::Idle(until, limit)).await
    }

    async fn step(&self, step: Step) -> Result<()> {
        self.steps.send(step).await.map_err(|_| Self::lost())
    }

    /// Waits for a step, past its progress.
    pub(crate) async fn done(&mut self) -> Result<ReplayReport> {
        loop {
            if let Played::Done(report) = self.played().await? {
                return Ok(*report);
            }
        }
    }

    /// How the replay gets on.
    pub(crate) async fn played(&mut self) -> Result<Played> {
        self.played
            .recv()
            .await
            .unwrap_or_else(|| Err(Self::lost()))
    }

    fn lost() -> Error {
        Error::Refused("the replay has ended before its time; start it again".into())
    }

    /// Stops it; its RAM, overlays and the device state returned are the replayed state.
    pub(crate) async fn freeze(self) -> Result<Vec<u8>> {
        self.playing.abort();
        let frozen = async {
            self.qemu.pause().await?;
            let device = self.qemu.save_device_state().await?;
            self.qemu.quit().await?;
            Ok(device)
        };
        match frozen.await {
            Ok(device) => Ok(device),
            Err(error) => {
                let _ = self.qemu.kill().await;
                Err(Error::host("cannot stop the fork")(error))
            }
        }
    }

    /// Ends it at once.
    pub(crate) async fn kill(self) -> Result<()> {
        self.playing.abort();
        self.qemu
            .kill()
            .await
            .map_err(Error::host("cannot end a fork"))
    }
}
