//! Taking a VM over: the step that decides, going on with the VM, and answering afterwards
//! whether it was decided.

use vm_host::{Accelerator, Network, Vm};

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::files::{self};
use crate::generations::seen;
use crate::lease::{Lease, Title};
use crate::line::TargetLine;
use crate::local::{self};
use crate::ownership;
use crate::phase::Phase;
use crate::protocol::{CommitRequest, Hello, ToSource};
use crate::resuming::Resuming;
use crate::vm::Id;
use crate::work::{Received, Work};

use super::Session;
use super::check::{check_known, name_of};

impl Session {
    /// Takes the VM over. When this returns, it is this site's for good.
    pub(super) async fn commit(
        &mut self,
        work: Work,
        received: Received,
        request: CommitRequest,
    ) -> Result<crate::work::Kept> {
        let CommitRequest {
            manifest,
            fence,
            link,
        } = request;
        let hello = &self.hello;
        if manifest.vm != hello.vm.id
            || manifest.generation != hello.next
            || manifest.hardware != hello.vm.hardware
            || Some(fence) != hello.fence.checked_add(1)
        {
            return Err(self.out_of_place("a commit of another state"));
        }
        // Once more: the line may be another one by now, with another Hello.
        let known = check_known(&self.vm, hello, &self.peer)?;
        let us = self.store.identity()?.key();
        let chain = hello
            .chain
            .prove(hello.vm.id)
            .ok()
            .and_then(|proven| proven.handed_over(&known, link, us))
            .filter(|chain| chain.fence() == Some(fence))
            .ok_or_else(|| self.out_of_place("a hand-over that nobody signed"))?;
        let kept = work.keep(received, manifest).await?;
        self.note_vm(known)?;
        let came = kept.manifest.identity();
        // From the next step on the VM is to run here, whoever dies.
        Resuming::of(hello.transfer, false).store(&self.vm)?;
        if let Err(error) = ownership::take(&self.vm, hello.transfer, fence, chain) {
            // It is past, and known to be as soon as somebody looks.
            let _ = Resuming::forget(&self.vm);
            return Err(error);
        }
        self.committed = true;
        seen::warn_unnoted(seen::came_with(&self.vm, &self.peer, came));
        tracing::info!(vm = %self.vm.name(), generation = kept.manifest.generation, "taken over");
        Ok(kept)
    }

    /// Writes down what the VM is, if it is new here, and how it came to who has it.
    pub(super) fn note_vm(&self, chain: Chain) -> Result<()> {
        if self.vm.try_record()?.is_some() {
            // Its lease stays: by that it is answered what was taken here.
            let title = self.vm.title()?;
            return Title { chain, ..title }.store(&self.vm.lease_path());
        }
        let owner = chain.owner().unwrap_or(self.peer.key);
        let owner_name = if self.peer.had(&owner) {
            self.peer.name.to_string()
        } else {
            name_of(&self.vm, &owner)?
        };
        let lease = Lease::Elsewhere {
            fence: self.hello.fence,
            owner,
            owner_name,
        };
        self.vm.create(&self.hello.vm, Title::new(lease, chain))
    }

    /// Starts the VM on the images that were received.
    pub(super) async fn resume(&self, kept: crate::work::Kept, paused: bool) -> Result<()> {
        if paused {
            Resuming::of(self.hello.transfer, paused).store(&self.vm)?;
        }
        let resumed = self.start(kept, paused).await;
        // It runs, or the source is told why it does not: nothing is left to be done by others.
        if let Err(error) = Resuming::forget(&self.vm) {
            tracing::warn!(error = error.chain(), "that it runs is not noted");
        }
        resumed
    }

    async fn start(&self, kept: crate::work::Kept, paused: bool) -> Result<()> {
        let record = &self.hello.vm;
        let live = local::lay_overlays(&self.vm, record, Some(&kept.manifest))?;
        let runtime = self.vm.runtime_dir("live")?;
        files::remove_dir(&runtime)?;
        files::make_dir(&runtime)?;
        let ram = runtime.join("ram.img");
        std::fs::rename(&kept.ram, &ram).map_err(Error::file("move into place", &ram))?;
        let launch = local::launch(
            &self.vm,
            record,
            &record.hardware,
            &runtime,
            live.overlay_paths(&self.vm),
            Network::Connected,
            Accelerator::Auto,
            true,
        );
        let what = || {
            format!(
                "cannot go on with {0}, which is this site's now; `replay-migrate vm start {0}` \
                 here tries again",
                self.vm.name()
            )
        };
        let device = kept.generation.load_device()?;
        let qemu = Vm::start(&launch).await.map_err(Error::host(what()))?;
        let loaded = qemu
            .load_device_state(&device)
            .await
            .map_err(Error::host(what()));
        let resumed = match loaded {
            Ok(()) if paused => Ok(()),
            Ok(()) => local::resume_live(&self.vm, &qemu).await,
            Err(error) => Err(error),
        };
        if resumed.is_ok() && !paused {
            // The images are the source's bit for bit by now, and verified; what follows is the
            // VM's own life, of which this is a part.
            if let Err(error) = crate::chance::release_unless_recorded(&self.vm).await {
                tracing::warn!(
                    error = error.chain(),
                    "the guest's random numbers stay held"
                );
            }
        }
        if resumed.is_err() {
            let _ = qemu.kill().await;
            files::remove_dir(&self.vm.live_dir())?;
        }
        resumed
    }

    /// Answers whether a hand-over took place; if it did not, it never will.
    pub(super) async fn settle(&mut self, line: &mut TargetLine, transfer: Id) -> Result<()> {
        self.phase = Phase::Commit;
        let Hello { vm, fence, .. } = &self.hello;
        let taken = ownership::was_taken(&self.vm, vm.id, transfer, *fence)?;
        line.send(ToSource::Settled { taken }).await?;
        line.flush().await
    }
}
