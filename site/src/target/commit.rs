//! Taking a VM over: the step that decides, going on with the VM, and answering afterwards
//! whether it was decided.

use vm_host::{Accelerator, Network, Vm};

use crate::error::{Error, Result};
use crate::files::{self};
use crate::lease::Lease;
use crate::line::TargetLine;
use crate::local::{self};
use crate::phase::Phase;
use crate::protocol::{CommitRequest, ToSource};
use crate::store::VmDir;
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
        if is_void(&self.vm, hello.transfer) {
            return Err(Error::Refused(
                "this hand-over was given up meanwhile".into(),
            ));
        }
        let kept = work.keep(received, manifest).await?;
        self.note_vm()?;
        Lease::Held {
            fence,
            transfer: Some(self.hello.transfer),
        }
        .store(&self.vm.lease_path())?;
        self.committed = true;
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
                "cannot go on with {}; `vm start` tries again",
                self.vm.name()
            )
        };
        let qemu = Vm::start(&launch).await.map_err(Error::host(what()))?;
        let device = kept.generation.load_device()?;
        let loaded = qemu
            .load_device_state(&device)
            .await
            .map_err(Error::host(what()));
        let resumed = match loaded {
            Ok(()) if paused => Ok(()),
            Ok(()) => local::resume_live(&self.vm, &qemu).await,
            Err(error) => Err(error),
        };
        if resumed.is_err() {
            let _ = qemu.kill().await;
            files::remove_dir(&self.vm.live_dir())?;
        }
        resumed
    }

    /// Answers whether a hand-over took place; if it did not, it never will.
    pub(super) async fn settle(&mut self, line: &mut TargetLine, transfer: Id) -> Result<()> {
        self.phase = Phase::Commit;
        let known = self
            .vm
            .try_record()?
            .is_some_and(|record| record.id == self.hello.vm.id);
        let taken = known
            && match self.vm.lease()? {
                Lease::Held {
                    transfer: Some(by),
                    fence,
                } => by == transfer || fence > self.hello.fence,
                // It was taken, and handed on since.
                lease => lease.fence() > self.hello.fence,
            };
        if !taken {
            void(&self.vm, transfer)?;
        }
        line.send(ToSource::Settled { taken }).await?;
        line.flush().await
    }
}

/// A hand-over that the source gave up must not be committed later, by a conversation that is
/// still open here.
fn void(vm: &VmDir, transfer: Id) -> Result<()> {
    let dir = vm.store().root().join("void");
    files::make_dir(&dir)?;
    files::write_atomic(&dir.join(transfer.to_string()), b"")
}

fn is_void(vm: &VmDir, transfer: Id) -> bool {
    vm.store()
        .root()
        .join("void")
        .join(transfer.to_string())
        .exists()
}
