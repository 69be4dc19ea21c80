//! Epochs by log: a standby replays what was recorded since its generation, and is sent what differs
//! then, where that is less than what differs without.
//!
//! What a replay leaves over can't be known before. What it left over so far, beside what the states
//! would have taken, is the best guess; each epoch that went this way is one more measurement.

use std::sync::Arc;

use serde::Serialize;
use traces::Record;

use crate::error::{Error, Result};
use crate::local::blocking;
use crate::plan;
use crate::recording::{self, stretch};
use crate::report::ReplaySummary;
use crate::state::{Base, State};
use crate::store::VmDir;

/// By what epochs are shipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// What differs in the state.
    #[default]
    State,
    /// What was recorded, and what differs once it is replayed; the state where that can't be.
    Log,
    /// Whichever is expected to take fewer bytes.
    Less,
}

/// How an epoch that was shipped by log went.
#[derive(Clone, Debug, Serialize)]
pub struct ByLog {
    /// The replay at the standby.
    pub replay: ReplaySummary,
    /// Bytes that the state was expected to take, if that was asked.
    pub state_expected: Option<u64>,
}

/// What was recorded for an epoch.
pub(in crate::source) struct Recorded {
    /// It, packed.
    pub(in crate::source) segment: Vec<u8>,
    /// What the state is expected to take, if that was asked.
    pub(in crate::source) state_expected: Option<f64>,
}

/// Which way epochs go to one standby.
#[derive(Clone, Debug)]
pub(in crate::source) struct Choice {
    by: By,
    /// Bytes that an epoch by log took for each that its state was expected to take.
    ratio: Option<f64>,
    /// Epochs by state since the last one by log.
    since: u32,
    /// The attempt that is being made is one by log.
    under_way: bool,
    /// The last attempt by log failed: the next is not one.
    failed: bool,
}

impl Choice {
    /// Where logs have not paid, one is tried again after so many.
    const AGAIN: u32 = 16;

    /// A state that takes no more is sent as it is: it is there before a replay has begun.
    const LITTLE: f64 = 128.0 * 1024.0;

    pub(in crate::source) fn new(by: By) -> Self {
        Self {
            by,
            ratio: None,
            since: 0,
            under_way: false,
            failed: false,
        }
    }

    /// What to have replayed, if this epoch is to go by log: from one generation to another.
    pub(in crate::source) async fn recorded(
        &mut self,
        vm: &VmDir,
        stretch: [u64; 2],
        state: &Arc<State>,
        base: &Arc<Base>,
        rate: f64,
    ) -> Option<Recorded> {
        self.under_way = false;
        if self.by == By::State || std::mem::take(&mut self.failed) {
            return None;
        }
        let by = self.by;
        let found = async {
            let flushed = recording::flush(vm).await?.is_some();
            let (vm, state, base) = (vm.clone(), state.clone(), base.clone());
            blocking(move || {
                let Some(records) = stretch::between(&vm, stretch, flushed)? else {
                    return Ok(None);
                };
                let segment = pack(&records)?;
                let state_expected = match by {
                    By::Less => Some(plan::state_bytes(&state, &base, rate)?),
                    By::State | By::Log => None,
                };
                Ok(Some(Recorded {
                    segment,
                    state_expected,
                }))
            })
            .await
        };
        let found = found.await.unwrap_or_else(|error| {
            tracing::warn!(vm = %vm.name(), error = error.chain(), "this epoch can't go by log");
            None
        });
        let paying = found.filter(|recorded| match recorded.state_expected {
            Some(expected) => self.pays(recorded.segment.len(), expected),
            None => true,
        });
        self.under_way = paying.is_some();
        paying
    }

    fn pays(&mut self, log: usize, state: f64) -> bool {
        let expected = log as f64 + self.ratio.unwrap_or(0.0) * state;
        let again = self.since >= Self::AGAIN;
        let pays = state > Self::LITTLE && (expected < state || again);
        self.since = if pays { 0 } else { self.since + 1 };
        pays
    }

    /// An epoch went by log, and took so many bytes in all.
    pub(in crate::source) fn took(&mut self, sent: u64, state_expected: Option<f64>) {
        self.under_way = false;
        let Some(expected) = state_expected.filter(|expected| *expected > 0.0) else {
            return;
        };
        let now = sent as f64 / expected;
        // Sessions change: the last few count.
        self.ratio = Some(self.ratio.map_or(now, |before| f64::midpoint(before, now)));
    }

    /// An attempt failed, for whatever reason; whether it was one by log, and so is followed by another.
    pub(in crate::source) fn failed(&mut self) -> bool {
        self.failed = std::mem::take(&mut self.under_way);
        self.failed
    }
}

fn pack(records: &[Record]) -> Result<Vec<u8>> {
    traces::encode_records(records).map_err(Error::log("cannot pack the log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATE: f64 = 4e6;

    #[test]
    fn what_took_fewer_bytes_is_chosen_and_the_other_way_is_tried_again() {
        let mut choice = Choice::new(By::Less);
        assert!(choice.pays(1000, STATE), "nothing is known yet");
        choice.took(1_000_000, Some(STATE));
        assert!(choice.pays(1000, STATE));
        assert!(!choice.pays(1000, 1000.0), "it is not worth a replay");
        for _ in 0..5 {
            choice.took(5_000_000, Some(STATE));
        }
        choice.since = 0;
        let tried = (0..=Choice::AGAIN).filter(|_| choice.pays(1000, STATE));
        assert_eq!(tried.count(), 1);
        choice.took(100, None);
        assert!(
            !choice.pays(1000, STATE),
            "what was not asked teaches nothing"
        );
        for _ in 0..5 {
            choice.took(1_000_000, Some(STATE));
        }
        assert!(choice.pays(1000, STATE));
    }
}
