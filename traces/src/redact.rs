//! Taking a stretch out of a log, for good.
//!
//! A log can't be changed in place, and should not be: the stretch would stay on the disk. A
//! new one is written without it, under a new salt; whoever redacts then deletes the old file.
//!
//! What stays must replay sensibly: a key that was held when the stretch began is released at
//! its start, and the release of one that was pressed inside is taken out with its press. The
//! screen's size at the end of the stretch is kept.

use std::ops::Range;
use std::path::Path;

use crate::interaction::follow;
use crate::{Error, Event, GuestTime, Log, LogKey, LogWriter, Record};

/// What was taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redaction {
    /// Records taken out.
    pub removed: u64,
    /// Records in the new log.
    pub kept: u64,
}

/// Writes the log `from` to the new file `to`, without what happened in `stretch`.
///
/// On failure there is no complete log at `to`, and `from` is as it was.
pub fn redact(
    from: &Path,
    to: &Path,
    key: &LogKey,
    stretch: Range<GuestTime>,
) -> Result<Redaction, Error> {
    let log = Log::read(from, key)?;
    let kept = redact_records(&log.records, &stretch);
    let inside = log
        .records
        .iter()
        .filter(|record| stretch.contains(&record.at))
        .count();
    // It is as old as before: what is left of it was not typed just now.
    let created = log.header.created;
    let mut writer = LogWriter::create_as_of(to, key, log.header.id, created)?;
    for record in &kept {
        writer.append(record.clone())?;
    }
    writer.close()?;
    Ok(Redaction {
        removed: inside as u64,
        kept: kept.len() as u64,
    })
}

/// The records without those in `stretch`; where there were any, [`Event::Redacted`] says so.
pub fn redact_records(records: &[Record], stretch: &Range<GuestTime>) -> Vec<Record> {
    let mut kept = Vec::with_capacity(records.len());
    let mut held = Vec::new();
    // Keys and buttons pressed inside and not released there: their releases go too.
    let mut hidden: Vec<u16> = Vec::new();
    let mut inside = false;
    let mut screen = None;
    for record in records {
        if stretch.contains(&record.at) {
            if !inside {
                inside = true;
                let at = stretch.start;
                for event in held.drain(..).map(release) {
                    kept.push(Record { at, event });
                }
                kept.push(Record {
                    at,
                    event: Event::Redacted,
                });
            }
            follow(&mut hidden, &record.event);
            if matches!(record.event, Event::Screen { .. }) {
                screen = Some(record.event.clone());
            }
            continue;
        }
        if inside {
            inside = false;
            kept.extend(screen.take().map(|event| Record {
                at: stretch.start,
                event,
            }));
        }
        match &record.event {
            Event::Key { code, down } | Event::Button { code, down } => {
                let was_hidden = hidden.contains(code);
                hidden.retain(|other| other != code);
                if was_hidden && !down {
                    continue;
                }
                held.retain(|event| match event {
                    Event::Key { code: other, .. } | Event::Button { code: other, .. } => {
                        other != code
                    }
                    _ => false,
                });
                if *down {
                    held.push(record.event.clone());
                }
            }
            Event::Gap | Event::Redacted => held.clear(),
            _ => {}
        }
        kept.push(record.clone());
    }
    kept.extend(screen.map(|event| Record {
        at: stretch.start,
        event,
    }));
    kept
}

fn release(event: Event) -> Event {
    match event {
        Event::Key { code, .. } => Event::Key { code, down: false },
        Event::Button { code, .. } => Event::Button { code, down: false },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;

    use super::*;
    use crate::testing::any_records;
    use crate::{End, LogId};

    fn time(millis: u64) -> GuestTime {
        GuestTime {
            micros: millis * 1000,
        }
    }

    fn key(millis: u64, code: u16, down: bool) -> Record {
        Record {
            at: time(millis),
            event: Event::Key { code, down },
        }
    }

    #[test]
    fn nothing_of_the_stretch_stays_and_no_key_stays_down() {
        let records = [
            key(0, 42, true),
            key(10, 30, true),
            key(20, 30, false),
            // The stretch: Shift is held from before, 31 is released only after it.
            key(100, 31, true),
            key(150, 42, false),
            key(200, 31, false),
            key(300, 31, true),
            key(310, 31, false),
        ];
        let kept = redact_records(&records, &(time(100)..time(200)));
        let redacted = Record {
            at: time(100),
            event: Event::Redacted,
        };
        let mut wanted = records[..3].to_vec();
        wanted.extend([key(100, 42, false), redacted]);
        wanted.extend_from_slice(&records[6..]);
        assert_eq!(kept, wanted);
    }

    #[test]
    fn a_redacted_log_is_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a.log"), dir.path().join("b.log"));
        let log_key = LogKey::generate().unwrap();
        let id = LogId {
            vm: [3; 16],
            generation: 4,
            base_position: 5,
        };
        let mut writer = LogWriter::create(&from, &log_key, id).unwrap();
        for millis in 0..100 {
            writer.append(key(millis, 30, millis % 2 == 0)).unwrap();
        }
        writer.close().unwrap();
        // The clock of a file goes in milliseconds: the redacted one is written in another.
        let created = crate::Header::read(&from).unwrap().created;
        while SystemTime::now().duration_since(created).unwrap() < Duration::from_millis(2) {
            std::thread::yield_now();
        }
        let done = redact(&from, &to, &log_key, time(10)..time(20)).unwrap();
        assert_eq!(crate::Header::read(&to).unwrap().created, created);
        assert_eq!(
            done,
            Redaction {
                removed: 10,
                kept: 91
            }
        );
        let log = Log::read(&to, &log_key).unwrap();
        assert_eq!(
            (log.header.id, log.end, log.records.len()),
            (id, End::Closed, 91)
        );
        assert!(
            redact(&from, &to, &log_key, time(1)..time(2)).is_err(),
            "never over a file"
        );
    }

    proptest! {
        #[test]
        fn what_is_outside_stays_in_order(
            records in any_records(40), start in 0..10_000_000_u64, length in 0..5_000_000_u64,
        ) {
            let stretch = GuestTime { micros: start }..GuestTime { micros: start + length };
            let kept = redact_records(&records, &stretch);
            let stays = |record: &&Record| {
                !stretch.contains(&record.at)
                    && !matches!(record.event, Event::Key { .. } | Event::Button { .. })
            };
            let outside: Vec<_> = records.iter().filter(stays).collect();
            let still: Vec<_> = kept.iter().filter(stays).collect();
            prop_assert_eq!(outside, still);
            let harmless = kept.iter().filter(|record| stretch.contains(&record.at)).all(|record| {
                matches!(
                    record.event,
                    Event::Redacted
                        | Event::Screen { .. }
                        | Event::Key { down: false, .. }
                        | Event::Button { down: false, .. }
                )
            });
            prop_assert!(harmless);
        }
    }
}
