//! What a long command tells about itself while it works. No user interface in here.

use crate::phase::Phase;

/// Hears how a migration, a seed or a replay gets on. Called from several threads.
pub trait Progress: Send + Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// Work of this phase done so far, and how much there will be where that is known.
    ///
    /// Bytes, except in [`Phase::Replay`], where it is milliseconds of recorded time.
    fn advance(&self, phase: Phase, done: u64, total: Option<u64>);
    /// Something the user wants to know.
    fn note(&self, text: &str);
}

/// Hears nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _: Phase) {}
    fn advance(&self, _: Phase, _: u64, _: Option<u64>) {}
    fn note(&self, _: &str) {}
}
