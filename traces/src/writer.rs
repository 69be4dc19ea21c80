//! Writing a log: records are gathered, and each flush appends them as one block.
//!
//! Blocks are never changed once written. Whoever records decides when to flush: every couple
//! of seconds of activity keeps both the loss at a crash and the file small; when nothing
//! happens, nothing is written.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::coding::{self, Context};
use crate::format::{CLOSED, Cipher, Header, LogId, MAX_TILES, Place, RECORDS};
use crate::key::random;
use crate::reader::LogReader;
use crate::{End, Error, Event, GuestTime, LogKey, Record, files};

/// A block is written at the latest when this many records are pending,
const FLUSH_RECORDS: usize = 4096;
/// or this many tiles in their anchors.
const FLUSH_TILES: usize = 1 << 14;

/// Appends records to a log file that no other process writes.
pub struct LogWriter {
    path: PathBuf,
    file: File,
    header: Header,
    cipher: Cipher,
    place: Place,
    context: Context,
    pending: Vec<Record>,
    pending_tiles: usize,
    records: u64,
    bytes: u64,
    /// A write failed: the file may end in part of a block.
    poisoned: bool,
}

/// What [`LogWriter::append_to`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Records that are in the log.
    pub records: u64,
    /// When the last of them reached the guest.
    pub last: GuestTime,
    /// How the log ended; the bytes of a torn end have been cut off.
    pub end: End,
}

impl LogWriter {
    /// Starts a new log, mode 0600; there must be no file of that name yet.
    pub fn create(path: &Path, key: &LogKey, id: LogId) -> Result<Self, Error> {
        Self::create_as_of(path, key, id, SystemTime::now())
    }

    /// The same for a log of what was recorded from `created` on, however late it is written.
    pub(crate) fn create_as_of(
        path: &Path,
        key: &LogKey,
        id: LogId,
        created: SystemTime,
    ) -> Result<Self, Error> {
        let header = Header::new(id, key, created)?;
        let cipher = Cipher::new(path, &header, key)?;
        let bytes = header.encode();
        let file = files::create("create the log", path, &bytes)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            header,
            cipher,
            place: Place {
                number: 0,
                session: session()?,
            },
            context: Context::default(),
            pending: Vec::new(),
            pending_tiles: 0,
            records: 0,
            bytes: bytes.len() as u64,
            poisoned: false,
        })
    }

    /// Goes on with an existing log. What a crash left unfinished at its end is cut off.
    pub fn append_to(path: &Path, key: &LogKey) -> Result<(Self, Resumed), Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(Error::io("open the log", path))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::Busy {
                path: path.to_owned(),
            },
            TryLockError::Error(error) => Error::io("lock the log", path)(error),
        })?;
        let mut reader = LogReader::with_file(path, file, key)?;
        let (mut records, mut last) = (0, GuestTime::default());
        while let Some(block) = reader.next_block()? {
            records += block.len() as u64;
            last = block.last().map_or(last, |record| record.at);
        }
        let resumed = Resumed {
            records,
            last,
            end: reader.end(),
        };
        let (header, bytes) = (*reader.header(), reader.offset);
        let place = Place {
            number: reader.number,
            session: session()?,
        };
        let context = std::mem::take(&mut reader.context);
        let (file, cipher) = reader.into_file()?;
        let writer = Self {
            path: path.to_owned(),
            file,
            header,
            cipher,
            place,
            context,
            pending: Vec::new(),
            pending_tiles: 0,
            records,
            bytes,
            poisoned: false,
        };
        Ok((writer, resumed))
    }

    /// What the log is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Records in the log, with those not flushed yet.
    pub fn records(&self) -> u64 {
        self.records + self.pending.len() as u64
    }

    /// Records that a crash would lose.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a record. It is in the file after the next flush, which is now if many are pending.
    pub fn append(&mut self, record: Record) -> Result<(), Error> {
        if let Event::Anchor(anchor) = &record.event {
            if anchor.tiles.len() > MAX_TILES {
                return Err(Error::AnchorTooLarge {
                    tiles: anchor.tiles.len(),
                    limit: MAX_TILES,
                });
            }
            self.pending_tiles += anchor.tiles.len();
        }
        self.pending.push(record);
        if self.pending.len() >= FLUSH_RECORDS || self.pending_tiles >= FLUSH_TILES {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what is pending as a block. It then survives a crash of this process; for one of
    /// the host there is [`Self::sync`].
    pub fn flush(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        // The coder moves on only with the file: the reader knows nothing of what failed.
        let mut context = self.context.clone();
        let mut body = vec![RECORDS];
        body.extend(coding::encode(&self.pending, &mut context)?);
        self.write(body)?;
        self.context = context;
        self.records += self.pending.len() as u64;
        self.pending.clear();
        self.pending_tiles = 0;
        Ok(())
    }

    /// Flushes and waits until the disk has it.
    pub fn sync(&mut self) -> Result<(), Error> {
        self.flush()?;
        self.file
            .sync_data()
            .map_err(Error::io("make durable the log", &self.path))
    }

    /// Ends the log in an orderly way and gives its length. A log that is dropped instead is
    /// flushed as well as it goes, and ends [`End::Open`].
    pub fn close(mut self) -> Result<u64, Error> {
        self.flush()?;
        self.write(vec![CLOSED])?;
        self.file
            .sync_all()
            .map_err(Error::io("make durable the log", &self.path))?;
        Ok(self.bytes)
    }

    #[cfg(test)]
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    fn write(&mut self, body: Vec<u8>) -> Result<(), Error> {
        if self.poisoned {
            return Err(Error::Poisoned {
                path: self.path.clone(),
            });
        }
        // Until it has worked: half a block in the file, and a nonce that is used up.
        self.poisoned = true;
        let block = self.cipher.seal(self.place, body)?;
        self.file
            .write_all(&block)
            .map_err(Error::io("append to the log", &self.path))?;
        self.place.number += 1;
        self.bytes += block.len() as u64;
        self.poisoned = false;
        Ok(())
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        if !self.poisoned {
            // Nobody to tell here; `close` and `sync` do.
            let _ = self.flush();
        }
        // Not left to closing it: a program that another thread is just starting has the file open, too, until it
        // is that program, and whoever goes on with this log would be told that it is busy.
        let _ = self.file.unlock();
    }
}

fn session() -> Result<u32, Error> {
    random().map(u32::from_le_bytes)
}
