//! The line's own time, and the booking of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::Rate;

/// Time on the line since it was laid: stands still while the line is stalled.
pub(super) type LineTime = Duration;

/// Whether the line works, and how its time runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    laid: Instant,
    /// Time spent stalled, up to the last end of a stall.
    stood: Duration,
    stalled_since: Option<Instant>,
    cut: bool,
    cuts: u64,
}

impl Line {
    pub(super) fn new() -> Self {
        Self {
            laid: Instant::now(),
            stood: Duration::ZERO,
            stalled_since: None,
            cut: false,
            cuts: 0,
        }
    }

    pub(super) fn now(&self) -> LineTime {
        let until = self.stalled_since.unwrap_or_else(Instant::now);
        until
            .saturating_duration_since(self.laid)
            .saturating_sub(self.stood)
    }

    pub(super) const fn is_cut(&self) -> bool {
        self.cut
    }

    /// How often it was cut so far: a connection older than the last cut is dead.
    pub(super) const fn cuts(&self) -> u64 {
        self.cuts
    }

    pub(super) fn stall(&mut self) {
        self.stalled_since.get_or_insert_with(Instant::now);
    }

    pub(super) fn cut(&mut self) {
        self.cut = true;
        self.cuts += 1;
    }

    pub(super) fn mend(&mut self) {
        self.cut = false;
        if let Some(since) = self.stalled_since.take() {
            self.stood += since.elapsed();
        }
    }
}

/// Waits until it is that late on the line.
pub(super) async fn reach(line: &mut watch::Receiver<Line>, time: LineTime) {
    loop {
        let state = *line.borrow_and_update();
        let changed = if state.stalled_since.is_some() {
            line.changed().await
        } else {
            let at = state.laid + state.stood + time;
            if Instant::now() >= at {
                return;
            }
            tokio::select! {
                () = sleep_until(at) => Ok(()),
                changed = line.changed() => changed,
            }
        };
        if changed.is_err() {
            return; // The link is gone, and this task with it in a moment.
        }
    }
}

/// One way of the line.
#[derive(Debug)]
pub(super) struct Direction {
    pub(super) rate: Rate,
    /// How long a full buffer takes to leave.
    buffer: Duration,
    /// When the last byte booked so far will have left.
    busy_until: Mutex<LineTime>,
    pub(super) delivered: AtomicU64,
    /// Whether the next chunk arrives damaged.
    damages: AtomicBool,
}

impl Direction {
    pub(super) fn new(rate: Rate, buffer: usize) -> Self {
        Self {
            rate,
            buffer: rate.time_for(buffer as u64),
            busy_until: Mutex::new(Duration::ZERO),
            delivered: AtomicU64::new(0),
            damages: AtomicBool::new(false),
        }
    }

    /// Has the next chunk arrive damaged.
    pub(super) fn damage(&self) {
        self.damages.store(true, Ordering::SeqCst);
    }

    /// What the line does to a chunk: one bit in its middle, if that was asked for.
    pub(super) fn pass(&self, chunk: &mut [u8]) {
        let middle = chunk.len() / 2;
        if let Some(byte) = chunk.get_mut(middle)
            && self.damages.swap(false, Ordering::SeqCst)
        {
            *byte ^= 0x10;
        }
    }

    /// Bytes taken at once: a millisecond's worth, a full Ethernet segment at least.
    pub(super) fn chunk(&self) -> usize {
        (self.rate.bytes_in(Duration::from_millis(1)) as usize).clamp(1460, 64 << 10)
    }

    /// When the buffer will have room again.
    pub(super) fn room_at(&self) -> LineTime {
        let busy = *self
            .busy_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        busy.saturating_sub(self.buffer)
    }

    /// Queues bytes that come at `now`; when the last of them will have left.
    pub(super) fn book(&self, bytes: usize, now: LineTime) -> LineTime {
        let mut busy = self
            .busy_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *busy = (*busy).max(now) + self.rate.time_for(bytes as u64);
        *busy
    }
}
