//! What a person did, in units of doing: something appears, they think, they act.
//!
//! Replay may shorten or stretch the thinking, and has to keep the acting as it was: the time
//! between two presses makes a double click, the time between press and release a repeated key.

use std::ops::Range;
use std::time::Duration;

use crate::{Event, GuestTime, Record};

/// A stretch of acting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interaction {
    /// When its first event reached the guest, or its anchor was taken.
    pub start: GuestTime,
    /// When its last event reached the guest.
    pub end: GuestTime,
    /// Index of its anchor among the records, if one was taken.
    pub anchor: Option<usize>,
    /// Indices of its records, the anchor among them.
    pub records: Range<usize>,
}

impl Interaction {
    /// A pause from which on somebody is thinking, or waiting for the screen.
    pub const PAUSE: Duration = Duration::from_secs(1);
}

/// Divides records into interactions: together they cover all records, in order.
///
/// An interaction begins at each anchor, and after a pause of [`Interaction::PAUSE`] or a
/// [`Event::Gap`] with no key or button held. While one is held, only an anchor begins another.
pub fn interactions(records: &[Record]) -> Vec<Interaction> {
    let mut all: Vec<Interaction> = Vec::new();
    let mut held: Vec<u16> = Vec::new();
    for (index, record) in records.iter().enumerate() {
        let anchored = matches!(record.event, Event::Anchor(_));
        let after = index.checked_sub(1).and_then(|before| records.get(before));
        let begins = match after {
            None => true,
            Some(before) => {
                anchored
                    || before.event == Event::Gap
                    || (held.is_empty() && pause(before.at, record.at) >= Interaction::PAUSE)
            }
        };
        match all.last_mut() {
            Some(last) if !begins => {
                last.records.end = index + 1;
                last.end = last.end.max(record.at);
            }
            _ => all.push(Interaction {
                start: record.at,
                end: record.at,
                anchor: anchored.then_some(index),
                records: index..index + 1,
            }),
        }
        follow(&mut held, &record.event);
    }
    all
}

/// Keeps account of the keys and buttons that are down.
pub(crate) fn follow(held: &mut Vec<u16>, event: &Event) {
    match event {
        Event::Key { code, down } | Event::Button { code, down } => {
            held.retain(|other| other != code);
            if *down {
                held.push(*code);
            }
        }
        // What was released meanwhile was not seen.
        Event::Gap | Event::Redacted => held.clear(),
        _ => {}
    }
}

/// From one record to the next.
pub(crate) fn pause(from: GuestTime, to: GuestTime) -> Duration {
    Duration::from_micros(to.micros.saturating_sub(from.micros))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::any_records;
    use crate::{Anchor, Region};

    fn at(millis: u64, event: Event) -> Record {
        Record {
            at: GuestTime {
                micros: millis * 1000,
            },
            event,
        }
    }

    fn anchor() -> Event {
        let region = Region {
            x: 0,
            y: 0,
            width: 0,
            height: 0,
        };
        Event::Anchor(Anchor {
            region,
            tiles: Vec::new(),
        })
    }

    fn key(down: bool) -> Event {
        Event::Key { code: 30, down }
    }

    fn ranges(records: &[Record]) -> Vec<Range<usize>> {
        interactions(records)
            .into_iter()
            .map(|interaction| interaction.records)
            .collect()
    }

    #[test]
    fn an_anchor_begins_an_interaction() {
        let records = [
            at(0, anchor()),
            at(0, key(true)),
            at(80, key(false)),
            at(300, anchor()),
            at(301, key(true)),
        ];
        assert_eq!(ranges(&records), [0..3, 3..5]);
        assert_eq!(interactions(&records)[1].anchor, Some(3));
    }

    #[test]
    fn so_does_a_pause_unless_something_is_held() {
        let moved = Event::Pointer { x: 1, y: 1 };
        let records = [
            at(0, moved.clone()),
            at(1000, key(true)),
            at(3000, key(false)),
            at(3999, moved.clone()),
            at(4999, moved),
        ];
        assert_eq!(ranges(&records), [0..1, 1..4, 4..5]);
    }

    proptest! {
        #[test]
        fn every_record_is_in_one_interaction(records in any_records(40)) {
            let mut next = 0;
            for interaction in interactions(&records) {
                prop_assert_eq!(interaction.records.start, next);
                prop_assert!(!interaction.records.is_empty());
                prop_assert!(interaction.start <= interaction.end);
                next = interaction.records.end;
            }
            prop_assert_eq!(next, records.len());
        }
    }
}
