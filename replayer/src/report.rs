//! How a replay went.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use traces::{GuestTime, Region};

use crate::MissPictures;

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
    /// Think time that was not waited out.
    pub saved: Duration,
    /// Where the replay was given up, if it was.
    pub diverged: Option<Divergence>,
    /// Interactions that were not injected, as it had been given up.
    pub skipped: usize,
    /// From the beginning to now, waiting for rest included.
    pub duration: Duration,
    /// Recorded time from the beginning to the last record.
    pub recorded: Duration,
    /// Whether the guest was at rest in the end; `false` also before that was waited for.
    pub came_to_rest: bool,
}

/// An anchor that did not match: the copy had gone another way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Miss {
    /// When the interaction was recorded.
    pub at: GuestTime,
    /// Where it looked.
    pub region: Region,
    /// Tiles there that are compared,
    pub tiles: usize,
    /// and how many differed when it gave up.
    pub differing: usize,
    /// How long it had waited.
    pub waited: Duration,
    /// How often it had looked: at each change of the screen, and ten times a second.
    pub looks: usize,
    /// What was there, for the first misses; never written out with the rest, as the screen is
    /// the user's own.
    #[serde(skip)]
    pub pictures: Option<Arc<MissPictures>>,
}

/// The replay had gone another way than the source for good, and stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Divergence {
    /// When the first interaction that was not injected had been recorded.
    pub at: GuestTime,
    /// What showed it.
    pub why: Why,
}

/// What shows that a replay has gone another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// One anchor after the other did not match.
    Misses {
        /// So many.
        anchors: usize,
    },
    /// The screen does not resemble the source's.
    Screen {
        /// So many anchors did not match,
        anchors: usize,
        /// and of so many tiles in them
        tiles: usize,
        /// so many differed.
        differing: usize,
    },
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = Duration::from_micros(self.at.micros).as_secs_f64();
        write!(f, "at {seconds:.1} s of the recording, {}", self.why)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misses { anchors } => {
                write!(f, "{anchors} anchors in a row did not match")
            }
            Self::Screen {
                anchors,
                tiles,
                differing,
            } => write!(
                f,
                "the screen was another: in {anchors} anchors in a row {differing} of {tiles} \
                 tiles differed"
            ),
        }
    }
}
