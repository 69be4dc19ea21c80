//! Waiting for a moment, mostly to within a tenth of a millisecond.
//!
//! Tokio's timers count whole milliseconds and are late by up to one. A guest notes when its input
//! came, and most programs do so in milliseconds: input that is late by one leaves other times
//! in its memory than the source's.

use std::io;
use std::os::fd::OwnedFd;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use crate::process::async_fd;

/// Waits until then. Where the kernel has no timer for it, one of Tokio's has to do.
pub async fn until(at: Instant) {
    if at <= Instant::now() {
        return;
    }
    let rung = match arm(at) {
        // A timer's descriptor is readable once it has expired (timerfd_create(2)).
        Ok(timer) => timer.readable().await.map(drop),
        Err(error) => Err(error),
    };
    if let Err(error) = rung {
        tracing::debug!(%error, "no timer of the kernel's, so one that is late by a millisecond");
        sleep_until(at).await;
    }
}

fn arm(at: Instant) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let left = at.saturating_duration_since(Instant::now());
    let left = Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        // Zero would disarm it.
        tv_nsec: i64::from(left.subsec_nanos()).max(1),
    };
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value: left,
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    async_fd(timer)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn it_is_never_too_early() {
        for micros in [0, 1, 300, 1_500, 20_000] {
            let at = Instant::now() + Duration::from_micros(micros);
            until(at).await;
            assert!(Instant::now() >= at);
        }
        assert!(arm(Instant::now() + Duration::from_secs(1)).is_ok());
        let past = Instant::now();
        until(past).await;
    }
}
