//! The part of a log between two generations: what a site that has the one replays to come near the
//! other.
//!
//! A log goes on from the generation that it began with, however many are made meanwhile. So a
//! generation that is made while the VM is recorded notes how far its log was by then.

use std::path::PathBuf;

use traces::{End, Event, GuestTime, Log, Record};

use super::Position;
use crate::error::{Error, Result};
use crate::files;
use crate::store::VmDir;

fn path(vm: &VmDir, generation: u64) -> PathBuf {
    vm.generation(generation).dir().join("recorded.json")
}

/// Notes how far the log was when a generation was made.
pub(crate) fn note(vm: &VmDir, generation: u64, position: Position) -> Result<()> {
    files::write_json(&path(vm, generation), &position)
}

/// What was recorded from one generation to another, in guest time since the first. None where it
/// isn't known, or not without gaps. `flushed` says that a recorder has just written what it had.
pub(crate) fn between(
    vm: &VmDir,
    [from, to]: [u64; 2],
    flushed: bool,
) -> Result<Option<Vec<Record>>> {
    let noted = |generation| files::read_json::<Position>(&path(vm, generation));
    let Some(end) = noted(to)? else {
        return Ok(None);
    };
    let begin = if end.log == from {
        Some(Position { at: 0, ..end })
    } else {
        noted(from)?
    };
    let Some(begin) = begin.filter(|begin| begin.log == end.log) else {
        return Ok(None);
    };
    let log_path = vm.log_path(end.log);
    if !log_path.exists() {
        return Ok(None);
    }
    let key = vm.store().log_key()?;
    let log = Log::read(&log_path, &key).map_err(Error::log(format!(
        "cannot read the log {}",
        log_path.display()
    )))?;
    log.header
        .expect(&log_path, vm.record()?.id.0, end.log)
        .map_err(Error::log(format!(
            "{} is not what it should be",
            log_path.display()
        )))?;
    // One that a recorder did not close may lack its end, unless it has just been told to write it.
    let newest = vm.logs()?.into_iter().map(|(number, _)| number).max();
    if log.end != End::Closed && !(flushed && newest == Some(end.log)) {
        return Ok(None);
    }
    Ok(cut(log.records, begin.at, end.at))
}

/// The records of a stretch of time, with what they rest on of the time before.
fn cut(records: Vec<Record>, begin: u64, end: u64) -> Option<Vec<Record>> {
    let (mut screen, mut pointer) = (None, None);
    let mut stretch = Vec::new();
    for mut record in records {
        if record.at.micros >= end {
            break;
        }
        // How far it goes is not noted.
        if matches!(record.event, Event::Redacted) {
            return None;
        }
        if record.at.micros < begin {
            match record.event {
                Event::Screen { .. } => screen = Some(record),
                Event::Pointer { .. } => pointer = Some(record),
                _ => {}
            }
            continue;
        }
        if matches!(record.event, Event::Gap) {
            return None;
        }
        record.at.micros -= begin;
        stretch.push(record);
    }
    let at = GuestTime { micros: 0 };
    let before = [screen, pointer].into_iter().flatten();
    let before = before.map(|record| Record { at, ..record });
    Some(before.chain(stretch).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(micros: u64, event: Event) -> Record {
        let at = GuestTime { micros };
        Record { at, event }
    }

    fn key(micros: u64) -> Record {
        let (code, down) = (30, true);
        record(micros, Event::Key { code, down })
    }

    #[test]
    fn a_stretch_begins_with_the_screen_and_the_pointer_as_they_were() {
        let (width, height) = (800, 600);
        let screen = record(0, Event::Screen { width, height });
        let pointer = |at, x| record(at, Event::Pointer { x, y: 5 });
        let all = vec![
            screen.clone(),
            pointer(2, 1),
            pointer(3, 2),
            key(4),
            key(10),
            key(19),
            key(20),
        ];
        let cut_out = cut(all.clone(), 10, 20).unwrap();
        assert_eq!(cut_out, [screen.clone(), pointer(0, 2), key(0), key(9)]);
        assert_eq!(cut(all.clone(), 0, 3).unwrap(), [screen, pointer(2, 1)]);
        assert!(cut(all, 30, 40).is_some_and(|cut| cut.len() == 2));
    }

    #[test]
    fn what_has_gaps_is_no_stretch() {
        let all = vec![key(1), record(5, Event::Gap), key(9)];
        assert_eq!(cut(all.clone(), 0, 10), None);
        assert_eq!(cut(all, 6, 10).unwrap(), [key(3)]);
        let redacted = vec![key(1), record(5, Event::Redacted), key(9)];
        assert_eq!(cut(redacted.clone(), 6, 10), None, "it may reach into it");
        assert_eq!(cut(redacted, 0, 5).unwrap(), [key(1)]);
    }
}
