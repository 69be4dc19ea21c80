//! When rounds have done what they can, and what the VM would stand still for if it were stopped.

use std::time::Duration;

use crate::report::RoundsEnd;

/// A round that does not bring the expected downtime below this share of the best one so far
/// has gained nothing.
const GAIN: f64 = 0.9;

/// So many rounds in a row that gain nothing are enough: one may have been unlucky.
const GAINLESS: u32 = 2;

/// What a round sent, for what that says of the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// Bytes of pages.
    pub(super) bytes: u64,
    /// How long it took.
    pub(super) took: Duration,
    /// How long the round before took: that is when what this one sent had changed.
    pub(super) before: Duration,
}

/// Seconds that the VM would stand still if it were stopped after this round, on a line of
/// `rate` bits per second, where standing still takes `besides` seconds beside sending.
///
/// What changed while the round before took its time made so many bytes; while this one took
/// its time, as many more or fewer. That is too much where the same pages change again and
/// again, so that a round that took longer is not expected to leave more.
pub(super) fn expected(round: Round, rate: f64, besides: f64) -> f64 {
    let longer = round.took.as_secs_f64() / round.before.as_secs_f64().max(0.001);
    besides + round.bytes as f64 * longer.min(1.0) * 8.0 / rate.max(1.0)
}

/// Decides whether there is to be another round.
pub(crate) struct Judge {
    downtime: Duration,
    rounds: u32,
    done: u32,
    best: f64,
    gainless: u32,
}

impl Judge {
    /// Rounds until the VM would stand still no longer than that, and no more than so many.
    pub(crate) fn new(downtime: Duration, rounds: u32) -> Self {
        Self {
            downtime,
            rounds,
            done: 0,
            best: f64::INFINITY,
            gainless: 0,
        }
    }

    /// After a round, with the seconds that the VM would stand still now.
    pub(crate) fn after(&mut self, expected: f64) -> Option<RoundsEnd> {
        self.done += 1;
        if expected < self.best * GAIN {
            self.gainless = 0;
        } else {
            self.gainless += 1;
        }
        self.best = self.best.min(expected);
        if expected <= self.downtime.as_secs_f64() {
            Some(RoundsEnd::Short)
        } else if self.done >= self.rounds {
            Some(RoundsEnd::Rounds)
        } else if self.gainless >= GAINLESS {
            Some(RoundsEnd::NoGain)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(downtime: f64, rounds: u32, expected: &[f64]) -> (usize, Option<RoundsEnd>) {
        let mut judge = Judge::new(Duration::from_secs_f64(downtime), rounds);
        for (at, expected) in expected.iter().enumerate() {
            if let Some(end) = judge.after(*expected) {
                return (at + 1, Some(end));
            }
        }
        (expected.len(), None)
    }

    #[test]
    fn rounds_end_when_the_downtime_is_short_enough() {
        let short = Some(RoundsEnd::Short);
        assert_eq!(ended(1.0, 30, &[8.0, 4.0, 0.9, 0.1]), (3, short));
        assert_eq!(ended(1.0, 30, &[1.0]), (1, short));
        assert_eq!(ended(0.5, 30, &[8.0, 4.0, 0.9]), (3, None));
    }

    #[test]
    fn rounds_end_when_they_gain_nothing() {
        let no_gain = Some(RoundsEnd::NoGain);
        assert_eq!(ended(0.1, 30, &[8.0, 4.0, 3.9, 3.9, 3.8]), (4, no_gain));
        // One that gained nothing may be followed by one that did.
        assert_eq!(ended(0.1, 30, &[8.0, 8.5, 4.0, 5.0, 2.0]), (5, None));
        // Small steps add up.
        assert_eq!(ended(0.1, 30, &[8.0, 7.5, 7.0, 6.5]), (3, no_gain));
    }

    #[test]
    fn there_are_no_more_rounds_than_asked_for() {
        let rounds = Some(RoundsEnd::Rounds);
        assert_eq!(ended(0.1, 2, &[8.0, 4.0, 2.0]), (2, rounds));
        assert_eq!(ended(0.1, 1, &[8.0]), (1, rounds));
    }

    #[test]
    fn what_is_expected_goes_by_bytes_time_and_line() {
        let round = |bytes, took, before| Round {
            bytes,
            took: Duration::from_secs(took),
            before: Duration::from_secs(before),
        };
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(close(expected(round(1_000_000, 1, 4), 1e6, 1.5), 1.5 + 2.0));
        assert!(close(expected(round(1_000_000, 8, 4), 1e6, 0.0), 8.0));
        assert!(close(expected(round(0, 1, 1), 1e6, 0.5), 0.5));
        assert!(expected(round(10, 1, 0), 0.0, 0.0).is_finite());
    }
}
