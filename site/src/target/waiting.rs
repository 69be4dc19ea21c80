//! The pieces of the log that wait for the fork that follows: bounded, as a source may send more
//! than any person types.

use std::collections::VecDeque;

use traces::GuestTime;

use super::receive::LOG_LIMITS;
use crate::error::{Error, Result};

/// Pieces of the log that wait to be played: there is one a second at most.
const MOST_PIECES: usize = 10_000;

/// Memory that they may take, in bytes: twice what a day of busy typing and pointing takes, which
/// comes at once where following begins late.
const MOST_BYTES: u64 = 256 << 20;

/// What was given to the fork, and is not known to be played.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// The recorded time of each piece, and the memory that it takes.
    pieces: VecDeque<(GuestTime, u64)>,
    /// The memory of all.
    bytes: u64,
    /// Records that ever came.
    records: u64,
}

impl Waiting {
    /// Notes a piece, of which the fork is given the records.
    ///
    /// # Errors
    /// When that is more than may wait, or ever come; nothing is noted then.
    pub(super) fn push(&mut self, records: &[traces::Record], at: GuestTime) -> Result<()> {
        let took = traces::memory_of(records);
        let (bytes, all) = (self.bytes + took, self.records + records.len() as u64);
        if self.pieces.len() >= MOST_PIECES || bytes > MOST_BYTES || all > LOG_LIMITS.records as u64
        {
            return Err(Error::Refused(
                "more of a log came than can be followed; end `follow`, and migrate".into(),
            ));
        }
        self.pieces.push_back((at, took));
        (self.bytes, self.records) = (bytes, all);
        Ok(())
    }

    /// The oldest piece was played; its recorded time.
    pub(super) fn played(&mut self) -> Option<GuestTime> {
        let (at, took) = self.pieces.pop_front()?;
        self.bytes -= took;
        Some(at)
    }

    /// All was played.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.bytes = 0;
    }

    /// Records that ever came.
    pub(super) fn records(&self) -> u64 {
        self.records
    }
}

#[cfg(test)]
mod tests {
    use traces::{Anchor, Event, Record, Region};

    use super::*;

    const AT: GuestTime = GuestTime { micros: 7 };

    fn piece(tiles: usize) -> Vec<Record> {
        let region = Region {
            x: 0,
            y: 0,
            width: 1,
            height: 1,
        };
        vec![Record {
            at: AT,
            event: Event::Anchor(Anchor {
                region,
                tiles: vec![0; tiles],
            }),
        }]
    }

    #[test]
    fn pieces_that_wait_are_bounded_in_bytes() {
        let mut waiting = Waiting::default();
        // The records are few, and the pieces too: what their anchors hold is much.
        let large = piece(4 << 20);
        let fit = MOST_BYTES / traces::memory_of(&large);
        for _ in 0..fit {
            waiting.push(&large, AT).unwrap();
        }
        assert!(matches!(waiting.push(&large, AT), Err(Error::Refused(_))));
        assert_eq!(waiting.records(), fit);
        // What was played makes room.
        assert_eq!(waiting.played(), Some(AT));
        waiting.push(&large, AT).unwrap();
        waiting.clear();
        waiting.push(&large, AT).unwrap();
        assert_eq!(waiting.bytes, traces::memory_of(&large));
    }

    #[test]
    fn pieces_that_wait_are_bounded_in_number() {
        let mut waiting = Waiting::default();
        for _ in 0..MOST_PIECES {
            waiting.push(&[], AT).unwrap();
        }
        assert!(matches!(waiting.push(&[], AT), Err(Error::Refused(_))));
    }
}
