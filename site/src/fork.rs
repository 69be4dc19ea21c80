//! A fork: a generation restored beside the VM, with the network unplugged, for a log to be
//! replayed on. Nothing of it reaches the user's disks; its overlays are its own.

use std::path::PathBuf;
use std::sync::Arc;

use replayer::{Options, Replay, ReplayReport};
use tokio::sync::mpsc;
use traces::Record;
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
    /// The piece is played, and the guest has come to rest, or the limit for that has passed.
    Done(Box<ReplayReport>),
}

/// A fork that replays what it is given, piece by piece.
pub(crate) struct Fork {
    qemu: Arc<Vm>,
    pieces: mpsc::Sender<Vec<Record>>,
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
        let (pieces, mut inbox) = mpsc::channel::<Vec<Record>>(1);
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
            while let Some(records) = inbox.recv().await {
                let told = |progress: &replayer::Progress| {
                    // When the line is busy, the next one will do.
                    let _ = outbox.try_send(Ok(Played::Progress(*progress)));
                };
                let outcome = match replay.play(&records, told).await {
                    Ok(()) => replay.settle().await,
                    Err(error) => Err(error),
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
            pieces,
            played,
            playing,
        })
    }

    /// Gives it the next piece of the log; then [`Self::played`] until that is done.
    pub(crate) async fn play(&self, records: Vec<Record>) -> Result<()> {
        self.pieces.send(records).await.map_err(|_| Self::lost())
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
