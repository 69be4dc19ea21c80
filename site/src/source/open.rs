//! Hello, Plan and Base: a line to a target that has all that it needs to begin.

use super::later::announce;
use super::opening::{begin, hello};
use super::seed::{ship_files, ship_generation};
use super::{Migration, Opened};
use crate::error::Result;
use crate::generation::GenerationId;
use crate::line::Line;
use crate::local::Live;
use crate::phase::Phase;
use crate::plan::{self, Feasible};
use crate::progress::Progress;
use crate::protocol::{Kept, Plan, Purpose, Stage, ToTarget, Welcome};
use crate::report::{ByteReport, Strategy};
use crate::store::VmDir;
use crate::vm::VmRecord;

impl Migration<'_> {
    /// Whether what a target has kept is what is wanted now.
    fn suits(&self, kept: &Kept) -> Result<bool> {
        let Plan {
            strategy,
            base,
            quick,
        } = kept.plan;
        let wanted = self
            .options
            .strategy
            .is_none_or(|wanted| wanted == strategy)
            && (strategy != Strategy::Replay || quick == self.options.quick);
        let here = match base {
            None => true,
            Some(base) => {
                let here = self.vm.generation(base.number).load_manifest()?;
                here.is_some_and(|here| here.identity() == base)
            }
        };
        Ok(wanted && here)
    }

    /// Calls the target, and hears what it has.
    async fn call(&mut self, next: u64) -> Result<(Line, Welcome, f64)> {
        let mut line = Line::connect(self.vm.store(), self.peer).await?;
        self.goes_over(&mut line);
        let hello = hello(
            self.vm,
            self.record,
            self.peer,
            Purpose::Migrate,
            self.moving.transfer,
            self.fence,
            next,
            &self.qemu_version,
        )?;
        let (welcome, rate) = begin(&mut line, self.vm, hello).await?;
        Ok((line, welcome, rate))
    }

    /// Hello, Plan and Base: the target has all that it needs to begin.
    pub(super) async fn open(&mut self, live: &Live, next: u64) -> Result<Opened> {
        self.clock.enter(Phase::Hello);
        let (mut line, mut welcome, mut rate) = self.call(next).await?;
        if let Some(kept) = &welcome.kept
            && !self.suits(kept)?
        {
            self.progress.note(&format!(
                "{} has kept what is not wanted now, and clears it away",
                self.peer.name
            ));
            line.close().await;
            (line, welcome, rate) = self.call(next).await?;
        }

        self.clock.enter(Phase::Plan);
        if let Some(kept) = &welcome.kept {
            let has = match kept.stage {
                Stage::Prepared => "its working copy".to_owned(),
                Stage::Replaying { records } => format!("its replay, of {records} records"),
                Stage::Frozen => "the copy that it was building".to_owned(),
            };
            self.progress.note(&format!(
                "strategy {}: going on with what {} has kept: {has}",
                kept.plan.strategy, self.peer.name
            ));
            let records = match kept.stage {
                Stage::Replaying { records } => records,
                Stage::Prepared | Stage::Frozen => 0,
            };
            return Ok(Opened {
                line,
                strategy: kept.plan.strategy,
                base: kept.plan.base,
                rate,
                records: usize::try_from(records).unwrap_or(usize::MAX),
                bytes: ByteReport::default(),
                twin: None,
                behind: None,
                kept: Some(kept.stage),
            });
        }
        let feasible = Feasible::of(self.vm, live, &welcome)?;
        let strategy = if let Some(strategy) = self.options.strategy {
            strategy
        } else {
            let (vm, record) = (self.vm, self.record);
            let estimates =
                plan::estimate(vm, record, live, feasible.clone(), rate, None, None).await?;
            self.progress.note(&estimates.why());
            self.predicted = estimates.chosen();
            estimates.choice
        };
        let base = match strategy {
            // A replay begins where the log does.
            Strategy::Live if self.options.live.replay => {
                feasible.base_for(self.vm, Strategy::Replay)?
            }
            _ => feasible.base_for(self.vm, strategy)?,
        };
        line.send(ToTarget::Plan(Plan {
            strategy,
            base,
            quick: self.options.quick,
        }))
        .await?;

        self.clock.enter(Phase::Base);
        let (vm, record) = (self.vm, self.record);
        let traffic = line.traffic();
        let before = traffic.sent();
        if self.options.post_copy && base.is_some() {
            self.progress.note(
                "nothing comes after the VM: against a stale copy all images are needed before (--strategy full, or \
                 live to a site without one, can do without)",
            );
        }
        if self.options.post_copy && base.is_none() {
            let announced = announce(&mut line, vm, record, &welcome, rate, self.progress);
            self.absent = announced.await?;
            let later = record.disks.iter().map(|disk| disk.hash);
            let later: Vec<_> = later.collect();
            welcome.lacks.retain(|lacked| !later.contains(lacked));
        }
        ship_base(&mut line, vm, record, &welcome, base, rate, self.progress).await?;
        let shipped = traffic.sent() - before;
        line.send(ToTarget::Prepare).await?;
        line.flush().await?;
        Ok(Opened {
            line,
            strategy,
            base,
            rate,
            records: 0,
            bytes: ByteReport {
                base: shipped,
                ..ByteReport::default()
            },
            twin: None,
            behind: None,
            kept: None,
        })
    }
}

/// Sends the base files and the generation that the target lacks; the bytes it took.
pub(super) async fn ship_base(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    welcome: &Welcome,
    base: Option<GenerationId>,
    rate: f64,
    progress: &dyn Progress,
) -> Result<u64> {
    let traffic = line.traffic();
    let before = traffic.sent();
    ship_files(line, vm, record, welcome, progress).await?;
    if let Some(base) = base
        && !welcome.common.contains(&base)
    {
        ship_generation(line, vm, record, base.number, welcome, rate, None, progress).await?;
    }
    Ok(traffic.sent() - before)
}
