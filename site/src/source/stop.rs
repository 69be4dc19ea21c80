//! Stop: the VM stands still, its state is hashed, and the replays end.

use std::sync::Arc;
use std::time::Duration;

use traces::GuestTime;

use super::Migration;
use super::free::drop_free;
use super::persist::Guest;
use super::replay::without_twin;
use super::twin::Twin;
use crate::error::{Error, Result};
use crate::generation::GenerationId;
use crate::layout::TwinState;
use crate::line::Line;
use crate::local::{self, Live};
use crate::phase::Phase;
use crate::protocol::{ToSource, ToTarget};
use crate::recording;
use crate::report::ReplaySummary;
use crate::state::State;

/// A standby that is further behind than this catches up while the VM still runs.
pub(crate) const CLOSE: Duration = Duration::from_secs(4);

/// What there is once the VM stands still.
pub(super) struct Stopped {
    pub(super) state: Arc<State>,
    /// Free pages that were made zero.
    pub(super) free_dropped: u64,
    pub(super) twin: Option<TwinState>,
    /// What a standby did, if there was one.
    pub(super) replay: Option<ReplaySummary>,
    /// Bytes of the log that were sent meanwhile.
    pub(super) log: u64,
}

impl Migration<'_> {
    /// Stops the VM, and the replays wherever they are.
    pub(super) async fn stop(&mut self, line: &mut Line, live: &Live) -> Result<Stopped> {
        self.stand_still(line).await?;
        let twin = self.twin.take();
        let this = &*self;
        // The twin stops while the VM's devices are saved. Both end if this is interrupted.
        let stop_guest = async {
            this.pause().await?;
            line.send(ToTarget::Freeze).await?;
            line.flush().await?;
            this.hashed(live).await
        };
        let (state, twin) = tokio::join!(stop_guest, this.stop_twin(twin));
        let (state, free_dropped) = state?;
        Ok(Stopped {
            state,
            free_dropped,
            twin,
            replay: None,
            log: 0,
        })
    }

    /// Stops the VM; the replays that follow go on until they are as old.
    ///
    /// What a desktop does by itself goes on all the time, so each second that one of them lived
    /// longer than the others is pages to send. They follow a second behind, during a part of which
    /// the VM's state is hashed.
    pub(super) async fn stop_followed(
        &mut self,
        line: &mut Line,
        live: &Live,
        base: Option<GenerationId>,
        records: usize,
        behind: Duration,
    ) -> Result<Stopped> {
        let base = base.map_or(0, |base| base.number);
        let mut tail = Tail {
            base,
            records,
            log: 0,
        };
        if behind > CLOSE {
            self.clock.enter(Phase::Log);
            let at = self.send_tail(line, &mut tail).await?;
            self.clock.enter(Phase::Replay);
            caught_up(line).await?;
            if let Some(twin) = self.twin.as_mut()
                && without_twin(twin.catch_up(at).await).is_none()
            {
                self.drop_twin().await;
            }
        }
        self.stand_still(line).await?;
        self.pause().await?;
        // The guest's clock stands still, too: this is where all are to end.
        let at = self.send_tail(line, &mut tail).await?;
        let twin = self.twin.take();
        let this = &*self;
        let stop_twin = async {
            let mut twin = twin?;
            if without_twin(twin.catch_up(at).await).is_none() {
                twin.kill().await;
                return None;
            }
            this.stop_twin(Some(twin)).await
        };
        let stop_standby = async {
            let replay = caught_up(line).await?;
            tracing::info!("the target's replay is as old as the VM");
            line.send(ToTarget::Freeze).await?;
            line.flush().await?;
            Ok::<_, Error>(replay)
        };
        let (state, replay, twin) = tokio::join!(this.hashed(live), stop_standby, stop_twin);
        let replay = self.judged(replay?).await;
        let (state, free_dropped) = state?;
        Ok(Stopped {
            state,
            free_dropped,
            // One that is in step says nothing of a replay that is not.
            twin: twin.filter(|_| replay.diverged.is_none()),
            replay: Some(replay),
            log: tail.log,
        })
    }

    async fn stop_twin(&self, twin: Option<Twin>) -> Option<TwinState> {
        let twin = without_twin(twin?.stop(self.vm, self.record).await);
        tracing::info!("the twin's state is hashed");
        twin
    }

    /// The VM is about to be paused; not while there is no line to move it over.
    async fn stand_still(&mut self, line: &Line) -> Result<()> {
        self.clock.enter(Phase::Stop);
        line.handle().up().await;
        self.note(Phase::Stop, self.was_running)?;
        self.stopped = true;
        if self.was_running {
            self.view.guest(Guest::StandsStill);
        }
        self.clock.down();
        Ok(())
    }

    async fn pause(&self) -> Result<()> {
        let what = || format!("cannot pause {}", self.vm.name());
        self.qemu.pause().await.map_err(Error::host(what()))?;
        tracing::info!("the VM stands still");
        Ok(())
    }

    /// The state of the VM, which stands still, and how many free pages were made zero in it.
    async fn hashed(&self, live: &Live) -> Result<(Arc<State>, u64)> {
        let free_dropped = if self.options.drop_free {
            drop_free(self.vm).await?
        } else {
            0
        };
        let what = format!("cannot save the devices of {}", self.vm.name());
        let (vm, record, live) = (self.vm.clone(), self.record.clone(), live.clone());
        let ram = self.vm.runtime_dir("live")?.join("ram.img");
        let work = move || {
            let overlays = live.overlay_paths(&vm);
            State::of_paused(&vm, &record, live.generation, &ram, &overlays, Vec::new())
        };
        // RAM and disks are hashed while the devices are saved, which changes neither.
        let device = async {
            let saved = self.qemu.save_device_state().await;
            saved.map_err(Error::host(what))
        };
        let (device, state) = tokio::try_join!(device, local::blocking(work))?;
        let state = Arc::new(state.with_device(device)?);
        tracing::info!("the VM's state is hashed");
        Ok((state, free_dropped))
    }

    /// Sends what is left of the log and the time that the standby is to reach; the twin gets
    /// the same.
    async fn send_tail(&mut self, line: &mut Line, tail: &mut Tail) -> Result<GuestTime> {
        let flushed = recording::flush(self.vm).await?;
        let (vm, base) = (self.vm.clone(), tail.base);
        let all = local::blocking(move || recording::records_since(&vm, base)).await?;
        let last = all.last().map_or(GuestTime::default(), |last| last.at);
        let at = flushed.unwrap_or(last).max(last);
        let new = all.get(tail.records..).unwrap_or_default();
        if !new.is_empty() {
            let segment = traces::encode_records(new).map_err(Error::log("cannot pack the log"))?;
            tail.log += segment.len() as u64;
            for part in reconciler::blob_parts(&segment) {
                let at = at.micros;
                line.send(ToTarget::Follow { part, at }).await?;
            }
        }
        if let Some(twin) = self.twin.as_mut()
            && without_twin(twin.play(&all)).is_none()
        {
            self.drop_twin().await;
        }
        tail.records = all.len();
        line.send(ToTarget::CatchUp { at: at.micros }).await?;
        line.flush().await?;
        Ok(at)
    }
}

/// What of the log is still to be sent.
struct Tail {
    base: u64,
    records: usize,
    log: u64,
}

/// Waits until the standby has reached the time it was told.
async fn caught_up(line: &mut Line) -> Result<ReplaySummary> {
    loop {
        match line.recv(Phase::Replay).await? {
            ToSource::Following { .. } | ToSource::Probed => {}
            ToSource::Replayed(summary) => return Ok(summary),
            _ => return Err(line.unexpected(Phase::Replay, "no word of the replay")),
        }
    }
}
