//! The thread that writes the log while it is recorded.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use traces::{LogWriter, Record};

use crate::error::{Error, Result};

/// A block of the log is written when its oldest record is this old; a crash loses no more.
pub(super) const FLUSH_EVERY: Duration = Duration::from_secs(2);

/// What the writer is asked.
pub(super) enum ToWriter {
    /// Append it.
    Record(Record),
    /// Bring all to the disk, and say so.
    Flush(oneshot::Sender<Result<()>>),
}

/// Writes until the last sender is gone; how many records there are, and the log's length.
/// Blocks are written as they age, however many records come meanwhile, and when somebody asks.
pub(super) fn write(
    mut log: LogWriter,
    inbox: &Receiver<ToWriter>,
    flush_every: Duration,
) -> Result<(u64, u64)> {
    let failed = |error| Error::log("cannot write the log")(error);
    // When the oldest record is due that is not written.
    let mut due: Option<Instant> = None;
    loop {
        let now = Instant::now();
        if due.is_some_and(|due| due <= now) {
            log.flush().map_err(failed)?;
            due = None;
        }
        let wait = due.map_or(flush_every, |due| due - now);
        match inbox.recv_timeout(wait) {
            Ok(ToWriter::Record(record)) => {
                log.append(record).map_err(failed)?;
                // A full block is written at once.
                due = match log.pending() {
                    0 => None,
                    _ => due.or(Some(Instant::now() + flush_every)),
                };
            }
            Ok(ToWriter::Flush(answer)) => {
                let result = log.flush().and_then(|()| log.sync()).map_err(failed);
                due = None;
                // Whoever asked may have gone.
                let _ = answer.send(result);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                // Those that wait are among them.
                let records = log.records();
                return Ok((records, log.close().map_err(failed)?));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use traces::{Event, GuestTime, LogId, LogKey};

    use super::*;

    #[test]
    fn records_that_keep_coming_are_written_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let id = LogId {
            vm: [1; 16],
            generation: 1,
            base_position: 0,
        };
        let log = LogWriter::create(&path, &LogKey::from_bytes([7; 32]), id).unwrap();
        let length = || path.metadata().unwrap().len();
        let before = length();
        let (sender, inbox) = mpsc::channel();
        let every = Duration::from_millis(200);
        let writing = std::thread::spawn(move || write(log, &inbox, every));
        let begun = Instant::now();
        let mut sent = 0;
        while length() == before {
            assert!(begun.elapsed() < every * 50, "{sent} records, none written");
            let at = GuestTime { micros: sent };
            let event = Event::Pointer { x: 1, y: 2 };
            sender.send(ToWriter::Record(Record { at, event })).unwrap();
            sent += 1;
            std::thread::sleep(every / 20);
        }
        // One is still to be written when recording ends.
        let record = Record {
            at: GuestTime { micros: sent },
            event: Event::Gap,
        };
        sender.send(ToWriter::Record(record)).unwrap();
        sent += 1;
        drop(sender);
        let (records, bytes) = writing.join().unwrap().unwrap();
        assert_eq!((records, bytes), (sent, length()));
    }
}
