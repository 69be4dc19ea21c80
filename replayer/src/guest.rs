//! What the replayer needs of a guest; a trait so that hours of schedule are tested in no time.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use traces::{Event, Pixels};
use vm_host::screen::{FrameVersion, Observer};
use vm_host::{Input, Vm};

use crate::Error;

/// A running guest with a screen.
pub(crate) trait Guest {
    /// Which picture the screen shows; a later one has another version.
    type Version: Copy + PartialEq + Send + Sync;

    /// Injects events, in order, now.
    fn send(&self, events: &[Event]) -> impl Future<Output = Result<(), Error>> + Send;
    /// Looks at the screen; `None` while no whole picture of it is known.
    fn look<T>(&self, look: impl FnOnce(&Pixels<'_>) -> T) -> (Self::Version, Option<T>);
    /// Which picture there is.
    fn version(&self) -> Self::Version;
    /// Waits until the screen shows another picture than `since`.
    fn changed(&self, since: Self::Version) -> impl Future<Output = Result<(), Error>> + Send;
    /// CPU time that all vCPUs have used.
    fn cpu_time(&self) -> Result<Duration, Error>;
    /// For how long it has been running.
    fn ran_for(&self) -> Duration;
    /// The time by the guest's clock, as if that had gone like the host's from the start.
    fn now(&self) -> Instant;
    /// When by the host's clock it is that time by the guest's, if that goes like the host's from now on.
    fn host_time(&self, at: Instant) -> Instant;
    /// Waits until it is that time by the guest's clock, as exactly as can be.
    fn until(&self, at: Instant) -> impl Future<Output = ()> + Send;
}

/// A guest in QEMU.
pub(crate) struct Real<'a> {
    vm: &'a Vm,
    observer: &'a Observer,
    /// How far its clock was ahead of the host's when that was last looked at, in nanoseconds.
    ahead: AtomicI64,
}

impl<'a> Real<'a> {
    pub(crate) fn new(vm: &'a Vm, observer: &'a Observer) -> Self {
        Self {
            vm,
            observer,
            ahead: AtomicI64::new(0),
        }
    }
}

/// A guest's clock is looked at again so long before the time that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(4);
/// For less than this it is not looked at, which takes a good part of that.
const NO_LOOK: Duration = Duration::from_millis(1);
/// One that is busy on a slow host falls behind; by more than this it is not waited for.
const PATIENCE: u32 = 8;

fn moved(at: Instant, nanos: i64) -> Instant {
    let by = Duration::from_nanos(nanos.unsigned_abs());
    let moved = if nanos < 0 {
        at.checked_sub(by)
    } else {
        at.checked_add(by)
    };
    moved.unwrap_or(at)
}

impl Guest for Real<'_> {
    type Version = FrameVersion;

    async fn send(&self, events: &[Event]) -> Result<(), Error> {
        let inputs: Vec<_> = events.iter().filter_map(input_of).collect();
        self.vm.send(&inputs).await.map_err(Error::Host)
    }

    fn look<T>(&self, look: impl FnOnce(&Pixels<'_>) -> T) -> (FrameVersion, Option<T>) {
        self.observer.with_frame(|frame| {
            let pixels = Pixels {
                width: frame.width,
                height: frame.height,
                rgb: frame.rgb,
            };
            (frame.version, frame.whole.then(|| look(&pixels)))
        })
    }

    fn version(&self) -> FrameVersion {
        self.observer.version()
    }

    async fn changed(&self, since: FrameVersion) -> Result<(), Error> {
        self.observer
            .changed(since)
            .await
            .map(|_| ())
            .map_err(Error::Screen)
    }

    fn cpu_time(&self) -> Result<Duration, Error> {
        self.vm.cpu_time().map_err(Error::Host)
    }

    fn ran_for(&self) -> Duration {
        self.vm.ran_for()
    }

    fn now(&self) -> Instant {
        moved(Instant::now(), self.ahead.load(Ordering::Relaxed))
    }

    fn host_time(&self, at: Instant) -> Instant {
        moved(at, -self.ahead.load(Ordering::Relaxed))
    }

    async fn until(&self, at: Instant) {
        if !self.vm.has_clock() {
            return vm_host::alarm::until(at).await;
        }
        let begun = Instant::now();
        if self.host_time(at) <= begun + NO_LOOK {
            return vm_host::alarm::until(self.host_time(at)).await;
        }
        let wanted = self.host_time(at).saturating_duration_since(begun);
        let limit = begun + wanted * PATIENCE + Duration::from_secs(1);
        loop {
            let ahead = self.vm.skew_now().await;
            self.ahead.store(ahead, Ordering::Relaxed);
            let due = self.host_time(at).min(limit);
            if due.saturating_duration_since(Instant::now()) <= LOOK_AGAIN {
                return vm_host::alarm::until(due).await;
            }
            sleep_until(due - LOOK_AGAIN / 2).await;
        }
    }
}

/// What a recorded event is to QEMU; anchors and notes are nothing to it.
pub fn input_of(event: &Event) -> Option<Input> {
    Some(match *event {
        Event::Key { code, down } => Input::Key { code, down },
        Event::Pointer { x, y } => Input::Pointer { x, y },
        Event::Button { code, down } => Input::Button { code, down },
        Event::Wheel {
            vertical,
            horizontal,
        } => Input::Wheel {
            vertical,
            horizontal,
        },
        Event::Screen { width, height } => Input::Screen { width, height },
        Event::Anchor(_) | Event::Gap | Event::Redacted => return None,
    })
}
