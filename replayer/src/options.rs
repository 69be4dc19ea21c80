//! What the caller decides about a replay.

use std::time::Duration;

use traces::GuestTime;

use crate::Error;

/// How to replay.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Think time is divided by this; 1 is as recorded. Faster replays diverge more: the guest
    /// did things of its own in that time.
    pub speed: f64,
    /// The guest's time when the replay begins.
    pub start: GuestTime,
    /// How long an interaction that is due waits for its anchor; then it goes on, and that is
    /// counted as a miss.
    pub anchor_limit: Duration,
    /// An interaction that is due gives up on its anchor earlier, when the guest has been at
    /// rest for this long: nothing is going to change there.
    pub anchor_rest: Duration,
    /// How the end is found.
    pub rest: RestOptions,
}

/// When a guest counts as at rest: over a window of time, its vCPUs were hardly used and its
/// screen showed the same, but for a caret or a clock.
#[derive(Clone, Debug, PartialEq)]
pub struct RestOptions {
    /// The window.
    pub window: Duration,
    /// Share of one CPU that all vCPUs together used in it, at most.
    pub busy: f64,
    /// How long to wait for that after the last event.
    pub limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            speed: 1.0,
            start: GuestTime::default(),
            anchor_limit: Duration::from_secs(10),
            anchor_rest: Duration::from_secs(2),
            rest: RestOptions::default(),
        }
    }
}

impl Default for RestOptions {
    /// An idle desktop of Xorg, terminal and editor was measured to use 0.2 to 2 % of a CPU under
    /// emulation, and a working one all it gets.
    fn default() -> Self {
        Self {
            window: Duration::from_secs(1),
            busy: 0.1,
            limit: Duration::from_secs(30),
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let what = if !(0.01..=1000.0).contains(&self.speed) {
            "the replay speed has to be between 0.01 and 1000"
        } else if self.rest.busy.is_nan() || self.rest.busy <= 0.0 {
            "the CPU share that counts as rest has to be above 0"
        } else {
            return Ok(());
        };
        Err(Error::Options { what })
    }
}
