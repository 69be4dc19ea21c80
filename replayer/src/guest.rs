//! What the replayer needs of a guest; a trait so that hours of schedule are tested in no time.

use std::time::Duration;

use tokio::time::Instant;
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
    /// Waits until then, as exactly as can be.
    fn until(&self, at: Instant) -> impl Future<Output = ()> + Send;
}

/// A guest in QEMU.
pub(crate) struct Real<'a> {
    pub(crate) vm: &'a Vm,
    pub(crate) observer: &'a Observer,
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

    async fn until(&self, at: Instant) {
        vm_host::alarm::until(at).await;
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
