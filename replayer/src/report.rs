//! How a replay went.

use std::time::Duration;

use serde::Serialize;
use traces::{GuestTime, Region};

/// How a replay is going.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Interactions injected of this piece of the log,
    pub interactions: usize,
    /// of so many.
    pub of_interactions: usize,
    /// Recorded time that was played of this piece,
    pub played: Duration,
    /// of so much.
    pub of_recorded: Duration,
    /// Anchors missed so far, in all pieces.
    pub missed: usize,
}

/// How a replay went.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ReplayReport {
    /// Interactions injected.
    pub interactions: usize,
    /// Events injected.
    pub events: usize,
    /// Anchors that matched.
    pub matched: usize,
    /// Those that did not within the limit.
    pub missed: Vec<Miss>,
    /// Time that interactions were put off while waiting for their anchors.
    pub waited: Duration,
    /// From the beginning to now, waiting for rest included.
    pub duration: Duration,
    /// Recorded time from the beginning to the last record.
    pub recorded: Duration,
    /// Whether the guest was at rest in the end; `false` also before that was waited for.
    pub came_to_rest: bool,
}

/// An anchor that did not match: the copy had gone another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Miss {
    /// When the interaction was recorded.
    pub at: GuestTime,
    /// Where it looked.
    pub region: Region,
    /// Tiles there,
    pub tiles: usize,
    /// and how many differed when it gave up.
    pub differing: usize,
    /// How long it had waited.
    pub waited: Duration,
}
