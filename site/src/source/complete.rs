//! Commit and Resume: the VM goes to the target, and what stays here becomes its stale copy.

use super::account::{finish_traffic, pages};
use super::hand_over::keep;
use super::later;
use super::persist::Guest;
use super::{Migration, Prepared, warn_unclean};
use crate::error::Result;
use crate::generation::Manifest;
use crate::generations::seen;
use crate::line::{Line, LinkHistory};
use crate::moving::Moving;
use crate::ownership::{self, Offer};
use crate::phase::Phase;
use crate::plan::Lesson;
use crate::protocol::{CommitRequest, ToSource, ToTarget};
use crate::report::MigrationReport;
use crate::work::Workplace;

impl Migration<'_> {
    /// The commit, and what comes after it.
    pub(super) async fn complete(
        &mut self,
        prepared: Prepared,
    ) -> Result<(MigrationReport, Option<Lesson>)> {
        let Prepared {
            mut line,
            live,
            state,
            base_images,
            manifest,
            strategy,
            base,
            rate,
            sent,
            mut bytes,
            verified,
            replay,
            rounds,
            pieced,
        } = prepared;
        self.clock.enter(Phase::Commit);
        self.view.guest(Guest::HandedOver);
        // Not written: from here on the lease says how far it is.
        self.moving.phase = Phase::Commit;
        if self.absent.iter().any(|pages| !pages.is_empty()) {
            later::owe(self.vm, self.peer)?;
        } else {
            later::forget(self.vm)?;
        }
        self.commit(&mut line, &manifest).await?;
        self.clock.enter(Phase::Resume);
        let resumed = self.resume(&mut line).await;
        finish_traffic(&mut bytes, &line.handle());
        line.close().await;
        // The VM is at the target, whether or not it runs there yet: nothing that fails from
        // here on changes that.
        let (generation, free_dropped) = (manifest.generation, manifest.free_dropped);
        seen::warn_unnoted(seen::shared(self.vm, self.peer, manifest.identity()));
        warn_unclean(Workplace::Incoming.clear(self.vm).await);
        let lesson = (!pieced).then(|| Lesson {
            state: state.clone(),
            base: base_images,
            rate,
        });
        if let Err(error) = keep(self.vm, self.qemu, &live, state, manifest).await {
            tracing::warn!(error = error.chain(), "no stale copy was kept here");
        }
        if let Err(error) = Moving::forget(self.vm) {
            tracing::warn!(error = error.chain(), "the move is still noted");
        }
        resumed?;
        let report = MigrationReport {
            vm: self.vm.name().clone(),
            strategy,
            generation_from: base.map(|base| base.number),
            generation_to: generation,
            bytes,
            pages: pages(&sent),
            seconds: std::collections::BTreeMap::new(),
            verified,
            free_dropped,
            refetched: sent.iter().map(|sent| sent.outcome.refetched).sum(),
            replay,
            live: rounds,
            rest: None,
            predicted: self.predicted,
        };
        let noted = LinkHistory::load(self.vm.store())
            .and_then(|history| history.note(self.vm.store(), self.peer, &sent));
        if let Err(error) = noted {
            tracing::warn!(error = error.chain(), "the line's rate was not noted");
        }
        Ok((report, lesson))
    }

    /// Has the target go on with the VM, which is its own by now.
    async fn resume(&mut self, line: &mut Line) -> Result<()> {
        let paused = self.options.paused || !self.was_running;
        line.send(ToTarget::Resume { paused }).await?;
        match line.recv(Phase::Resume).await? {
            ToSource::Resumed => {
                self.clock.up();
                Ok(())
            }
            _ => Err(line.unexpected(Phase::Resume, "no word that the VM runs")),
        }
    }

    /// The step that decides. From the moment the lease is offered until the answer, this site
    /// does not run the VM.
    async fn commit(&mut self, line: &mut Line, manifest: &Manifest) -> Result<()> {
        let offer = Offer {
            fence: self.fence,
            transfer: self.moving.transfer,
            to: self.peer.key,
            to_name: self.peer.name.to_string(),
            was_running: self.was_running,
        };
        let asked = async |link| {
            let request = CommitRequest {
                manifest: manifest.clone(),
                fence: self.fence + 1,
                link,
            };
            line.send(ToTarget::Commit(Box::new(request))).await?;
            match line.recv(Phase::Commit).await? {
                ToSource::Committed => Ok(()),
                _ => Err(line.unexpected(Phase::Commit, "no word that it took the VM")),
            }
        };
        ownership::give(self.vm, offer, asked).await
    }
}
