//! How a recording begins: the generation that its log continues, and the clock that counts from there.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use recorder::Clock;
use traces::GuestTime;
use vm_host::{GuestClock, Vcpus, Vm};

use super::RecordOptions;
use crate::chance::{self, Held};
use crate::error::{Error, Result};
use crate::local::{self, After, Renewed};
use crate::store::VmDir;

/// A guest that has been made ready to be recorded, and runs if it did.
pub(super) struct Begun {
    pub(super) qemu: Vm,
    pub(super) generation: u64,
    pub(super) clock: SinceCheckpoint,
    pub(super) held: Option<Held>,
}

/// Makes the generation that the log continues. Chance is taken out of a replay-friendly guest while
/// it stands still for that.
pub(super) async fn begin(vm: &VmDir, qemu: Vm, options: &RecordOptions) -> Result<Begun> {
    let friendly = vm.record()?.replay_friendly;
    let hold = || {
        friendly
            .then(|| chance::hold(vm, options.long_turns))
            .flatten()
    };
    let follow = async |qemu: &Vm| {
        GuestClock::follow(qemu.clock_qmp_socket(), Duration::ZERO)
            .await
            .map_err(Error::host(format!(
                "cannot follow the clock of {}",
                vm.name()
            )))
    };
    let held = Mutex::new(None);
    let _lock = vm.lock_soon().await?;
    let (qemu, clock, origin, generation) = if options.fresh_qemu {
        let prepare = || {
            if let Ok(mut held) = held.lock() {
                *held = hold();
            }
        };
        let renewed = local::renew_locked(vm, qemu, &prepare).await?;
        // From before its first instruction; but it is to run, whatever comes of that.
        let clock = follow(&renewed.qemu).await;
        renewed.go_on(vm).await?;
        let Renewed { qemu, manifest, .. } = renewed;
        (qemu, clock?, Duration::ZERO, manifest.generation)
    } else {
        let clock = follow(&qemu).await?;
        let origin = Mutex::new(Duration::ZERO);
        let prepare = || {
            if let (Ok(mut origin), Ok(mut held)) = (origin.lock(), held.lock()) {
                *origin = clock.now();
                *held = hold();
            }
        };
        let made = local::checkpoint_locked(vm, &qemu, Some(&prepare), After::GoesOn).await?;
        let origin = origin.into_inner().unwrap_or_default();
        (qemu, clock, origin, made.manifest.generation)
    };
    Ok(Begun {
        clock: SinceCheckpoint {
            clock: Arc::new(clock),
            origin,
            vcpus: qemu.vcpus(),
        },
        qemu,
        generation,
        held: held.into_inner().unwrap_or_default(),
    })
}

/// Guest time since the checkpoint that the log rests on.
#[derive(Clone)]
pub(super) struct SinceCheckpoint {
    clock: Arc<GuestClock>,
    origin: Duration,
    vcpus: Vcpus,
}

impl Clock for SinceCheckpoint {
    fn now(&self) -> GuestTime {
        let clock: &GuestClock = &self.clock;
        let since = clock.now().saturating_sub(self.origin);
        GuestTime {
            micros: since.as_micros() as u64,
        }
    }

    fn is_running(&self) -> bool {
        self.clock.is_running()
    }

    fn look(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.clock.look())
    }

    fn key_delay(&self) -> Duration {
        self.clock.key_delay()
    }

    fn processor_time(&self) -> Option<Duration> {
        // It may just have ended, which is noticed elsewhere.
        self.vcpus.cpu_time().ok()
    }
}
