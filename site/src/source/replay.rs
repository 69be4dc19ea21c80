//! The replay: the log goes to the target and is replayed there, and here as well.

use std::sync::Arc;
use std::time::Duration;

use traces::Event;

use super::twin::{self, Twin};
use super::{Migration, TwinTurn};
use crate::error::{Error, Result};
use crate::fork::pace_of;
use crate::generation::GenerationId;
use crate::layout::{Lie, TwinState};
use crate::line::Line;
use crate::local;
use crate::phase::Phase;
use crate::protocol::{ToSource, ToTarget};
use crate::recording;
use crate::report::ReplaySummary;
use crate::state::{Base, State};
use crate::work::Workplace;

/// The tail of the log that is typed while the target replays is replayed too, so often.
const TAIL_ROUNDS: usize = 3;

/// A target that waits for the twin hears of the source so often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

impl Migration<'_> {
    /// Ships the log but for what the target has, and has it replayed, then the tail that was
    /// typed meanwhile.
    pub(super) async fn replay(
        &mut self,
        line: &mut Line,
        base: GenerationId,
        had: usize,
    ) -> Result<(ReplaySummary, u64)> {
        let mut sent_records = had;
        let mut log_bytes = 0;
        let mut total: Option<ReplaySummary> = None;
        for _ in 0..TAIL_ROUNDS {
            self.clock.enter(Phase::Log);
            recording::flush(self.vm).await?;
            let records = {
                let vm = self.vm.clone();
                local::blocking(move || recording::records_since(&vm, base.number)).await?
            };
            if sent_records > records.len() {
                return Err(line.unexpected(Phase::Log, "more of the log than there is"));
            }
            let new = records.get(sent_records..).unwrap_or_default();
            if new.iter().any(|record| record.event == Event::Gap) {
                self.progress.note(
                    "recording was paused for a while: the replay may go astray there, and its \
                     best pages are kept",
                );
            }
            if new.is_empty() && total.is_some() {
                break;
            }
            let segment = traces::encode_records(new).map_err(Error::log("cannot pack the log"))?;
            sent_records = records.len();
            log_bytes += segment.len() as u64;
            for part in reconciler::blob_parts(&segment) {
                line.send(ToTarget::Log(part)).await?;
            }
            line.flush().await?;
            self.clock.enter(Phase::Replay);
            if let Some(twin) = self.twin.as_mut()
                && without_twin(twin.play(&records)).is_none()
            {
                self.drop_twin().await;
            }
            let summary = loop {
                match line.recv(Phase::Replay).await? {
                    ToSource::Replaying { done, total } => {
                        self.progress.advance(Phase::Replay, done, Some(total));
                    }
                    ToSource::Replayed(summary) => break self.judged(summary).await,
                    _ => return Err(line.unexpected(Phase::Replay, "no word of the replay")),
                }
            };
            // A report is of all pieces so far.
            let in_step = summary.diverged.is_none();
            let first = total.replace(summary).is_none() && had == 0;
            if first && in_step && self.options.twin == TwinTurn::After {
                self.start_twin(base).await;
                if let Some(twin) = self.twin.as_mut() {
                    without_twin(twin.play(&records));
                }
            }
            self.settle_twin(line).await?;
        }
        // The first round always replays, if only an empty log.
        Ok((total.unwrap_or_default(), log_bytes))
    }

    pub(super) async fn start_twin(&mut self, base: GenerationId) {
        let twin = Twin::start(
            self.vm,
            self.record,
            Workplace::Incoming,
            self.moving.transfer,
            base.number,
            pace_of(self.options.quick),
            None,
        );
        let twin = twin.await;
        self.twin = without_twin(twin).flatten();
    }

    /// Waits until the twin has played what it was given, as long as that is worth it; the
    /// target hears now and then that it is not forgotten.
    async fn settle_twin(&mut self, line: &mut Line) -> Result<()> {
        let patience = match self.options.twin {
            TwinTurn::After => None,
            _ => Some(twin::PATIENCE),
        };
        let settled = {
            // It stays where it is: whoever interrupts this ends it.
            let Some(twin) = self.twin.as_mut() else {
                return Ok(());
            };
            let settling = twin.settle(patience);
            tokio::pin!(settling);
            loop {
                tokio::select! {
                    settled = &mut settling => break settled,
                    () = tokio::time::sleep(SIGN_OF_LIFE) => {
                        line.send(ToTarget::Probe(Vec::new())).await?;
                        let ToSource::Probed = line.recv(Phase::Replay).await? else {
                            return Err(line.unexpected(Phase::Replay, "no answer to a probe"));
                        };
                    }
                }
            }
        };
        if without_twin(settled).is_none() {
            self.drop_twin().await;
        }
        Ok(())
    }

    /// A replay that went astray is not like the twin: patches of it would not fit.
    pub(super) async fn judged(&mut self, summary: ReplaySummary) -> ReplaySummary {
        if let Some(why) = &summary.diverged {
            self.progress.note(&format!(
                "the replay went astray ({why}); its best pages are kept"
            ));
            self.drop_twin().await;
        }
        summary
    }

    pub(super) async fn drop_twin(&mut self) {
        if let Some(twin) = self.twin.take() {
            twin.kill().await;
        }
    }
}

/// Brings the twin to lie as the state does; the target is told how to do the same.
pub(super) async fn realign(
    mut twin: TwinState,
    state: &Arc<State>,
    base: &Arc<Base>,
) -> Result<(Arc<TwinState>, Lie)> {
    let (state, base) = (state.clone(), base.clone());
    local::blocking(move || {
        let lie = twin.realign(&state, &base)?;
        Ok((Arc::new(twin), lie))
    })
    .await
}

/// Tells the target how the state lies; the bytes that this took. What says nothing isn't sent.
pub(super) async fn tell(line: &mut Line, lie: &Lie) -> Result<u64> {
    let mut bytes = 0;
    if !lie.ram.is_empty() {
        let encoded = lie
            .ram
            .encode()
            .map_err(Error::reconcile("cannot say how RAM lies"))?;
        bytes += encoded.len() as u64;
        for part in reconciler::blob_parts(&encoded) {
            line.send(ToTarget::Layout(part)).await?;
        }
    }
    if !lie.device.is_empty() {
        let encoded = lie
            .device
            .encode()
            .map_err(Error::reconcile("cannot say how the device state lies"))?;
        bytes += encoded.len() as u64;
        for part in reconciler::blob_parts(&encoded) {
            line.send(ToTarget::Rearrangement(part)).await?;
        }
    }
    Ok(bytes)
}

/// A twin that fails is done without.
pub(super) fn without_twin<T>(outcome: Result<T>) -> Option<T> {
    outcome
        .map_err(|error| tracing::warn!(error = error.chain(), "going on without a twin"))
        .ok()
}
