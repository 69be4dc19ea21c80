//! Taking a VM over: the step that decides, going on with the VM, and answering afterwards
//! whether it was decided.

use vm_host::{Accelerator, Network, Vm};

use crate::error::{Error, Result};
use crate::files::{self};
use crate::generations::seen;
use crate::lease::Lease;
use crate::line::TargetLine;
use crate::local::{self};
use crate::ownership;
use crate::phase::Phase;
use crate::protocol::{CommitRequest, Hello, ToSource};
use crate::vm::Id;
use crate::work::{Received, Work};

use super::Session;

impl Session {
    /// Takes the VM over. When this returns, it is this site's for good.
    pub(super) async fn commit(
        &mut self,
        work: Work,
        received: Received,
        request: CommitRequest,
    ) -> Result<crate::work::Kept> {
        let CommitRequest { manifest, fence } = request;
        let hello = &self.hello;
        if manifest.vm != hello.vm.id
            || manifest.generation != hello.next
            || manifest.hardware != hello.vm.hardware
            || Some(fence) != hello.fence.checked_add(1)
        {
            return Err(self.out_of_place("a commit of another state"));
        }
        let kept = work.keep(received, manifest).await?;
        self.note_vm()?;
        let came = kept.manifest.identity();
        ownership::take(&self.vm, hello.transfer, fence)?;
        self.committed = true;
        seen::warn_unnoted(seen::came_with(&self.vm, &self.peer, came));
        tracing::info!(vm = %self.vm.name(), generation = kept.manifest.generation, "taken over");
        Ok(kept)
    }

    /// Writes down what the VM is, if it is new here.
    pub(super) fn note_vm(&self) -> Result<()> {
        if self.vm.try_record()?.is_none() {
            let lease = Lease::Elsewhere {
                fence: self.hello.fence,
                owner: self.peer.key,
                owner_name: self.peer.name.to_string(),
            };
            self.vm.create(&self.hello.vm, &lease)?;
        }
        Ok(())
    }

    /// Starts the VM on the images that were received.
    pub(super) async fn resume(&self, kept: crate::work::Kept, paused: bool) -> Result<()> {
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
