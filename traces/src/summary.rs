//! A log at a glance.

use std::time::Duration;

use serde::Serialize;

use crate::interaction::pause;
use crate::{Event, Interaction, Record, interactions};

/// What a log holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// From the first record to the last, in guest time.
    pub duration: Duration,
    /// Of it, in pauses of [`Interaction::PAUSE`] or more.
    pub idle: Duration,
    /// Stretches of acting; see [`interactions`].
    pub interactions: usize,
    /// Those with an anchor.
    pub anchored: usize,
    /// Records by kind.
    pub counts: Counts,
    /// Length of the log file; 0 for records that are in none.
    pub bytes: u64,
}

/// Records by kind. Presses are counted and releases are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// All records.
    pub records: usize,
    /// Keys pressed.
    pub keys: usize,
    /// Pointer moves.
    pub moves: usize,
    /// Buttons pressed.
    pub buttons: usize,
    /// Turns of the wheel.
    pub wheel: usize,
    /// Changes of the screen's size.
    pub screens: usize,
    /// Pauses of the recording.
    pub gaps: usize,
    /// Stretches taken out.
    pub redacted: usize,
}

impl Summary {
    /// Of these records, from a log file of `bytes`.
    pub fn of(records: &[Record], bytes: u64) -> Self {
        let acts = interactions(records);
        let times = || records.iter().map(|record| record.at);
        let duration = match (times().min(), times().max()) {
            (Some(first), Some(last)) => pause(first, last),
            _ => Duration::ZERO,
        };
        let idle = records
            .windows(2)
            .map(|pair| pause(pair[0].at, pair[1].at))
            .filter(|pause| *pause >= Interaction::PAUSE)
            .sum();
        let mut counts = Counts {
            records: records.len(),
            ..Counts::default()
        };
        for record in records {
            let count = match record.event {
                Event::Key { down: true, .. } => &mut counts.keys,
                Event::Button { down: true, .. } => &mut counts.buttons,
                Event::Pointer { .. } => &mut counts.moves,
                Event::Wheel { .. } => &mut counts.wheel,
                Event::Screen { .. } => &mut counts.screens,
                Event::Gap => &mut counts.gaps,
                Event::Redacted => &mut counts.redacted,
                Event::Key { .. } | Event::Button { .. } | Event::Anchor(_) => continue,
            };
            *count += 1;
        }
        Self {
            duration,
            idle,
            interactions: acts.len(),
            anchored: acts.iter().filter(|act| act.anchor.is_some()).count(),
            counts,
            bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestTime;
    use crate::testing::busy_minute;

    #[test]
    fn a_busy_minute_is_counted() {
        let mut records = busy_minute(1);
        let last = records.last().unwrap().at.micros;
        records.push(Record {
            at: GuestTime {
                micros: last + 7_000_000,
            },
            event: Event::Gap,
        });
        let summary = Summary::of(&records, 12);
        assert_eq!(summary.counts.moves, 3600);
        assert!((470..=480).contains(&summary.counts.keys));
        assert_eq!(
            (summary.counts.gaps, summary.bytes, summary.anchored),
            (1, 12, 30)
        );
        assert_eq!(summary.idle, Duration::from_secs(7));
        assert!(summary.duration > Duration::from_secs(66));
        assert_eq!(Summary::of(&[], 0), Summary::default());
    }
}
