//! Guest time: how long a guest has been running, which is what a log counts in.
//!
//! QEMU reports STOP and RESUME with a time stamp of its own, so that the delay until we see
//! them doesn't count. The guest's own clock (`-rtc clock=vm`) stands still in just the same
//! stretches.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::Result;
use crate::qmp::Qmp;

/// A time stamp older than this is taken for a step of the host's clock.
const EVENT_DELAY_MAX: Duration = Duration::from_secs(1);

/// Adds up stretches of running.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopwatch {
    ran: Duration,
    since: Option<Instant>,
    changes: u64,
}

impl Stopwatch {
    pub(crate) fn stopped() -> Self {
        Self {
            ran: Duration::ZERO,
            since: None,
            changes: 0,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.since.is_some()
    }

    /// How often it was started or stopped.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// The guest started or stopped running at that moment.
    pub(crate) fn set(&mut self, running: bool, at: Instant) {
        self.changes += 1;
        match (self.since, running) {
            (Some(since), false) => {
                self.ran += at.saturating_duration_since(since);
                self.since = None;
            }
            (None, true) => self.since = Some(at),
            _ => {}
        }
    }

    pub(crate) fn elapsed(&self, now: Instant) -> Duration {
        self.ran
            + self
                .since
                .map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// Translates a time stamp of QEMU's to our monotonic clock.
pub(crate) fn instant_of(at: SystemTime) -> Instant {
    let now = Instant::now();
    let age = SystemTime::now().duration_since(at).unwrap_or_default();
    if age > EVENT_DELAY_MAX {
        now
    } else {
        now.checked_sub(age).unwrap_or(now)
    }
}

/// A clock that runs while the guest does.
///
/// It holds the VM's clock socket ([`crate::Vm::clock_qmp_socket`]), which QEMU lends to one
/// client at a time. When QEMU is gone, it stands still for ever.
#[derive(Debug)]
pub struct GuestClock {
    qmp: Qmp,
    start: Duration,
}

impl GuestClock {
    /// Starts a clock that shows `start` now, and goes on from there as the guest runs.
    pub async fn follow(socket: &Path, start: Duration) -> Result<Self> {
        let qmp = Qmp::connect(socket, Duration::from_secs(10)).await?;
        qmp.learn_run_state().await?;
        Ok(Self { qmp, start })
    }

    /// Guest running time.
    pub fn now(&self) -> Duration {
        self.start + self.qmp.stopwatch().elapsed(Instant::now())
    }

    /// Whether the guest runs at the moment.
    pub fn is_running(&self) -> bool {
        self.qmp.stopwatch().is_running()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_running_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watch = Stopwatch::stopped();
        assert_eq!(watch.elapsed(at(50)), Duration::ZERO);
        watch.set(true, at(100));
        watch.set(true, at(150)); // told twice
        assert_eq!(watch.elapsed(at(200)), Duration::from_millis(100));
        watch.set(false, at(300));
        watch.set(false, at(350));
        assert_eq!(watch.elapsed(at(900)), Duration::from_millis(200));
        watch.set(true, at(1000));
        assert_eq!(watch.elapsed(at(1001)), Duration::from_millis(201));
    }

    #[test]
    fn late_events_count_from_when_they_happened() {
        let late = instant_of(SystemTime::now() - Duration::from_millis(300));
        assert!(late.elapsed() >= Duration::from_millis(300));
        // The host's clock was set.
        assert!(
            instant_of(SystemTime::now() - Duration::from_secs(3600))
                .elapsed()
                .as_secs()
                < 1
        );
        assert!(
            instant_of(SystemTime::now() + Duration::from_secs(3600))
                .elapsed()
                .as_secs()
                < 1
        );
    }
}
