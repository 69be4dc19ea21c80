//! A migration up to its commit: everything is sent and verified, and nothing is decided.

use std::sync::Arc;

use reconciler::PageSet;
use vm_host::Vm;

use super::account::account;
use super::persist::View;
use super::replay::{realign, tell, without_twin};
use super::stop::Stopped;
use super::twin::Twin;
use super::{MigrateOptions, Opened, TwinTurn};
use crate::error::Result;
use crate::exchange::{self, Outgoing, Sent};
use crate::generation::{GenerationId, Manifest};
use crate::line::Line;
use crate::local::{self, Live};
use crate::moving::Moving;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::plan::Estimate;
use crate::progress::Progress;
use crate::protocol::Stage;
use crate::report::{ByteReport, LiveReport, PhaseClock, ReplaySummary, Roots, Strategy};
use crate::state::{Base, State};
use crate::store::VmDir;
use crate::vm::VmRecord;

pub(super) struct Migration<'a> {
    pub(super) vm: &'a VmDir,
    pub(super) record: &'a VmRecord,
    pub(super) peer: &'a Peer,
    pub(super) options: MigrateOptions,
    pub(super) progress: &'a dyn Progress,
    pub(super) qemu: &'a Vm,
    pub(super) qemu_version: String,
    pub(super) was_running: bool,
    pub(super) fence: u64,
    /// As it is noted.
    pub(super) moving: Moving,
    pub(super) view: Arc<View>,
    pub(super) clock: PhaseClock<'a>,
    /// Whether this migration has paused the guest.
    pub(super) stopped: bool,
    /// The replay at this site, beside the target's.
    pub(super) twin: Option<Twin>,
    /// What was predicted, where the strategy was chosen by that.
    pub(super) predicted: Option<Estimate>,
    /// Of each disk, the pages of its image that come after the VM.
    pub(super) absent: Vec<PageSet>,
}

/// All that is sent and verified, before anything is decided.
pub(super) struct Prepared {
    pub(super) line: Line,
    pub(super) live: Live,
    pub(super) state: Arc<State>,
    pub(super) base_images: Arc<Base>,
    pub(super) manifest: Manifest,
    pub(super) strategy: Strategy,
    pub(super) base: Option<GenerationId>,
    pub(super) rate: f64,
    pub(super) sent: Vec<Sent>,
    pub(super) bytes: ByteReport,
    pub(super) verified: Roots,
    pub(super) replay: Option<ReplaySummary>,
    pub(super) rounds: Option<LiveReport>,
    /// Some of it came over an earlier line: its times tell nothing.
    pub(super) pieced: bool,
}

impl Migration<'_> {
    /// Writes down how far it is, before that is so.
    pub(super) fn note(&mut self, phase: Phase, paused: bool) -> Result<()> {
        self.moving.phase = phase;
        self.moving.paused = paused;
        self.moving.store(self.vm)
    }

    /// A line over which it goes from here on.
    pub(super) fn goes_over(&self, line: &mut Line) {
        line.set_patience(self.options.give_up_after);
        self.view.line(line.handle());
    }

    /// Everything up to the commit.
    pub(super) async fn prepare(&mut self, opened: Option<Opened>) -> Result<Prepared> {
        let live = Live::of_running(self.vm, self.qemu).await?;
        let next = local::next_generation(self.vm)?;
        let Opened {
            mut line,
            strategy,
            base,
            rate,
            records,
            mut bytes,
            twin,
            behind,
            kept,
        } = match opened {
            Some(mut opened) => {
                self.goes_over(&mut opened.line);
                opened
            }
            None => self.open(&live, next).await?,
        };
        self.twin = twin;
        let base_images = {
            let (vm, record) = (self.vm.clone(), self.record.clone());
            let number = base.map(|base| base.number);
            let absent = self.absent.clone();
            let load = move || Base::load_without(&vm, &record, number, &absent);
            tokio::spawn(local::blocking(load))
        };

        let mut replay = None;
        let live_replay = strategy == Strategy::Live && self.options.live.replay;
        if (strategy == Strategy::Replay || live_replay)
            && let Some(base) = base
            && behind.is_none()
            && kept != Some(Stage::Frozen)
        {
            // Beside a replay that is on its way or done it would only be late.
            let begins = !matches!(kept, Some(Stage::Replaying { .. }));
            if self.options.twin == TwinTurn::Beside && begins {
                self.start_twin(base).await;
            }
            let (summary, log) = self.replay(&mut line, base, records).await?;
            replay = Some(summary);
            bytes.log += log;
        }
        let base_images = Arc::new(local::joined(base_images).await?);
        let mut ahead = if strategy == Strategy::Live {
            // What came of an earlier attempt is in the target's copy.
            let mixed = live_replay || kept == Some(Stage::Frozen);
            let rounds = self.rounds(&mut line, &live, &base_images, rate, mixed);
            Some(Box::pin(rounds).await?)
        } else {
            None
        };

        let still = if let Some(behind) = behind {
            self.stop_followed(&mut line, &live, base, records, behind)
                .await?
        } else {
            self.stop(&mut line, &live).await?
        };
        let Stopped {
            state,
            free_dropped,
            twin,
            replay: followed,
            log,
        } = still;
        bytes.log += log;
        replay = replay.or(followed);
        let twin = match twin {
            Some(twin) => without_twin(realign(twin, &state, &base_images).await),
            None => None,
        };
        let (twin, lie) = twin.unzip();
        if let Some(lie) = &lie {
            bytes.hashes += tell(&mut line, lie).await?;
        }

        let number = base.map(|base| base.number);
        let went_ahead = ahead.is_some();
        let against = match &mut ahead {
            Some(ahead) => Box::pin(self.last_round(&mut line, ahead, &state, number)).await?,
            None => base_images.clone(),
        };
        let clock = &mut self.clock;
        let out = Outgoing {
            state: &state,
            base: &against,
            // What rounds have brought on is known exactly.
            replayed: (replay.is_some() || kept == Some(Stage::Frozen)) && !went_ahead,
            twin: twin.as_ref(),
            rate,
            progress: self.progress,
        };
        let mut enter = |phase| clock.enter(phase);
        let mut sent = exchange::send_images(&mut line, &out, &mut enter).await?;
        let rounds = ahead.map(|ahead| ahead.close(&mut sent));
        account(&mut bytes, &sent);

        self.clock.enter(Phase::Verify);
        let (infos, disks) = state.infos();
        let verified = Roots {
            ram: infos[0].root,
            disk: disks.iter().map(|disk| disk.root).collect(),
            device: infos[1].root,
        };

        let mut manifest = Manifest::new(
            self.record.id,
            next,
            live.generation,
            self.record.hardware.clone(),
            self.qemu_version.clone(),
            infos,
            disks,
        );
        manifest.free_dropped = free_dropped;
        Ok(Prepared {
            line,
            live,
            state,
            base_images,
            manifest,
            strategy,
            base,
            rate,
            sent,
            bytes,
            verified,
            replay,
            rounds,
            pieced: kept.is_some(),
        })
    }
}
