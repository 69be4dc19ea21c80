//! Guest time: how long a guest has been running, which is what a log counts in.
//!
//! QEMU reports STOP and RESUME with a time stamp of its own, so that the delay until we see
//! them doesn't count. The guest's own clock (`-rtc clock=vm`) stands still in just the same
//! stretches.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tokio::task::JoinHandle;

use crate::Result;
use crate::counted::{self, Skew};
use crate::qmp::Qmp;

/// What nobody asks for exactly may be off by about a half of this.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// After each key of a viewer's QEMU keeps the next one back for so long (`key-delay-ms`), by itself. Where
/// instructions are counted it does not: by the guest's clock, which it reads when the guest wakes up, that could be long.
pub const KEY_DELAY: Duration = Duration::from_millis(10);

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
///
/// Where the guest's instructions are counted it is the guest's own clock that is shown, looked at ten times a second
/// and when asked to; else QEMU tells when the guest runs, and the host's clock how long.
#[derive(Debug)]
pub struct GuestClock {
    qmp: Arc<Qmp>,
    start: Duration,
    skew: Arc<Skew>,
    /// What was shown last, in nanoseconds: it never goes back.
    shown: AtomicU64,
    looking: Option<JoinHandle<()>>,
}

impl Drop for GuestClock {
    fn drop(&mut self) {
        if let Some(looking) = &self.looking {
            looking.abort();
        }
    }
}

impl GuestClock {
    /// Starts a clock that shows `start` now, and goes on from there as the guest runs.
    pub async fn follow(socket: &Path, start: Duration) -> Result<Self> {
        let qmp = Arc::new(Qmp::connect(socket, Duration::from_secs(10)).await?);
        qmp.learn_run_state().await?;
        let skew = Arc::new(Skew::default());
        let mut looking = None;
        if counted::is_readable(&qmp).await {
            skew.look(&qmp).await?;
            looking = Some(tokio::spawn(look_on(Arc::clone(&qmp), Arc::clone(&skew))));
        }
        Ok(Self {
            qmp,
            start,
            skew,
            shown: AtomicU64::new(0),
            looking,
        })
    }

    /// Guest running time.
    pub fn now(&self) -> Duration {
        let ran = self.start + self.qmp.stopwatch().elapsed(Instant::now());
        if self.looking.is_none() {
            return ran;
        }
        let ran = u64::try_from(ran.as_nanos()).unwrap_or(u64::MAX);
        let shows = ran.saturating_add_signed(self.skew.last());
        Duration::from_nanos(self.shown.fetch_max(shows, Ordering::Relaxed).max(shows))
    }

    /// Looks at the guest's own clock, where it is that which is shown, unless somebody just has.
    pub async fn look(&self) {
        if self.looking.is_none() {
            return;
        }
        if let Err(error) = self.skew.look(&self.qmp).await {
            tracing::debug!(%error, "the guest's clock can't be looked at");
        }
    }

    /// For how long QEMU keeps a viewer's next key back after each.
    pub fn key_delay(&self) -> Duration {
        if self.looking.is_some() {
            Duration::ZERO
        } else {
            KEY_DELAY
        }
    }

    /// Whether the guest runs at the moment.
    pub fn is_running(&self) -> bool {
        self.qmp.stopwatch().is_running()
    }
}

/// Looks at the guest's clock while the guest runs, until QEMU is gone.
async fn look_on(qmp: Arc<Qmp>, skew: Arc<Skew>) {
    let mut running = qmp.watch_running();
    loop {
        if running.wait_for(Stopwatch::is_running).await.is_err() {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
        if let Err(error) = skew.look(&qmp).await {
            tracing::debug!(%error, "the guest's clock is not looked at any more");
            return;
        }
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
