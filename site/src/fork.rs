//! A fork: a generation restored beside the VM, with the network unplugged, for a log to be
//! replayed on. Nothing of it reaches the user's disks; its overlays are its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use replayer::{Options, Pace, QuickOptions, Replay, ReplayReport};
use tokio::sync::{mpsc, watch};
use traces::{GuestTime, Record};
use vm_host::ahead::asleep_for;
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

/// How far behind its source a fork follows: what is recorded arrives well before it is due, so
/// that the rhythm is kept. The user waits for it when the VM moves.
const BEHIND: Duration = Duration::from_secs(1);

/// How a fork follows that begins with these records, at this recorded time.
///
/// Where nothing was typed yet, the time until now is not waited for: a fork that is late at its
/// beginning would stay so.
pub(crate) fn following_from(records: &[Record], at: GuestTime) -> Options {
    let typed = |record: &&Record| {
        use traces::Event::{Button, Key, Pointer, Wheel};
        matches!(
            record.event,
            Key { .. } | Button { .. } | Pointer { .. } | Wheel { .. }
        )
    };
    let first = records.iter().find(typed);
    let first = first.map_or(at, |record| record.at.min(at));
    Options {
        start: moved(first, -(BEHIND.as_micros() as i64)),
        pace: Pace::Follow(QuickOptions::default()),
        ..Options::default()
    }
}

fn moved(time: GuestTime, micros: i64) -> GuestTime {
    GuestTime {
        micros: time.micros.saturating_add_signed(micros),
    }
}

/// How a fork replays a whole log.
pub(crate) fn pace_of(quick: bool) -> Options {
    Options {
        pace: if quick {
            Pace::quick(None)
        } else {
            Pace::Recorded
        },
        ..Options::default()
    }
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

/// A fork that replays what it is given, piece by piece. Steps wait for their turn, and for each
/// there is one [`Played::Done`].
pub(crate) struct Fork {
    qemu: Arc<Vm>,
    steps: mpsc::UnboundedSender<Step>,
    done: mpsc::UnboundedReceiver<Result<ReplayReport>>,
    progress: watch::Receiver<replayer::Progress>,
    playing: tokio::task::JoinHandle<()>,
    /// Steps that are not known to be over.
    pending: usize,
}

impl Fork {
    /// Restores the fork and lets it run.
    ///
    /// Where `since` is given, the recorded time was `options.start` then, and went on: the time
    /// that starting takes does not make it late. What it did not live through since its base it
    /// has slept through, if that can be, so that its clock shows what the source's did.
    pub(crate) async fn start(
        vm: &VmDir,
        record: &VmRecord,
        files: ForkFiles,
        mut options: Options,
        since: Option<Instant>,
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
        if let Some(since) = since {
            options.start = moved(options.start, since.elapsed().as_micros() as i64);
        }
        let missed = Duration::from_micros(options.start.micros);
        let asleep = asleep_for(&files.device, missed, qemu.accelerator());
        tracing::info!(?missed, slept = asleep.is_some(), "a fork begins to live");
        let begun = async {
            qemu.load_device_state(asleep.as_deref().unwrap_or(&files.device))
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
        let (steps, mut inbox) = mpsc::unbounded_channel();
        let (outbox, done) = mpsc::unbounded_channel();
        let (telling, progress) = watch::channel(replayer::Progress::default());
        let guest = qemu.clone();
        let playing = tokio::spawn(async move {
            let mut replay = match Replay::new(&guest, &observer, &options) {
                Ok(replay) => replay,
                Err(error) => {
                    let _ = outbox.send(Err(Error::Replay(error)));
                    return;
                }
            };
            while let Some(step) = inbox.recv().await {
                let told = |progress: &replayer::Progress| {
                    telling.send_replace(*progress);
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
                if outbox.send(outcome.map_err(Error::Replay)).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            qemu,
            steps,
            done,
            progress,
            playing,
            pending: 0,
        })
    }

    /// Gives it the next piece of the log; then [`Self::played`] until that is done.
    pub(crate) fn play(&mut self, records: Vec<Record>) -> Result<()> {
        self.step(Step::Play(records))
    }

    /// Has it come to rest; then [`Self::played`] until that is done.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.step(Step::Settle)
    }

    /// Lets it go on by itself until this recorded time, for at most `limit`; then
    /// [`Self::played`] until that is done.
    pub(crate) fn idle(&mut self, until: GuestTime, limit: Duration) -> Result<()> {
        self.step(Step::Idle(until, limit))
    }

    fn step(&mut self, step: Step) -> Result<()> {
        self.steps.send(step).map_err(|_| Self::lost())?;
        self.pending += 1;
        Ok(())
    }

    /// Steps that are not known to be over: as many [`Played::Done`] are still to come.
    pub(crate) fn pending(&self) -> usize {
        self.pending
    }

    /// Waits until all steps are over, past their progress.
    pub(crate) async fn done(&mut self) -> Result<ReplayReport> {
        loop {
            if let Played::Done(report) = self.played().await?
                && self.pending == 0
            {
                return Ok(*report);
            }
        }
    }

    /// How the replay gets on. Loses nothing when dropped.
    pub(crate) async fn played(&mut self) -> Result<Played> {
        tokio::select! {
            biased;
            done = self.done.recv() => {
                self.pending = self.pending.saturating_sub(1);
                let report = done.unwrap_or_else(|| Err(Self::lost()))?;
                Ok(Played::Done(Box::new(report)))
            }
            Ok(()) = self.progress.changed() => {
                Ok(Played::Progress(*self.progress.borrow_and_update()))
            }
        }
    }

    /// QEMU's process number.
    pub(crate) fn pid(&self) -> u32 {
        self.qemu.pid()
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

#[cfg(test)]
mod tests {
    use traces::Event;

    use super::*;

    #[test]
    fn time_in_which_nothing_was_typed_is_not_waited_for() {
        let at = |millis: u64, event| Record {
            at: GuestTime {
                micros: millis * 1000,
            },
            event,
        };
        let now = GuestTime { micros: 60_000_000 };
        let screen = at(
            1,
            Event::Screen {
                width: 1280,
                height: 800,
            },
        );
        let start = |records: &[Record]| following_from(records, now).start.micros;
        assert_eq!(start(&[]), 59_000_000);
        assert_eq!(start(std::slice::from_ref(&screen)), 59_000_000);
        let key = Event::Key {
            code: 30,
            down: true,
        };
        let typed = [screen, at(9000, key.clone()), at(20_000, key)];
        assert_eq!(start(&typed), 8_000_000);
    }
}
