//! Reading a log, block by block or whole.
//!
//! A crash of the writer leaves an unfinished block at the end: it is skipped and reported as
//! [`End::Torn`]. Anything else that is wrong is an error, after all records before it were
//! given; a reader never gives records that were not recorded.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::coding::{self, Context};
use crate::format::{
    self, CLOSED, Cipher, HEAD_BYTES, HEADER_BYTES, Head, Header, LIMITS, Place, RECORDS,
};
use crate::{Error, LogKey, Record};

/// How a log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The writer has closed it.
    Closed,
    /// On a whole block: still being written, or the writer was killed between two.
    Open,
    /// In an unfinished block.
    Torn {
        /// Bytes of it.
        bytes: u64,
    },
}

/// A log that was read whole.
#[derive(Debug)]
pub struct Log {
    /// What it is of.
    pub header: Header,
    /// All records.
    pub records: Vec<Record>,
    /// How it ends.
    pub end: End,
    /// The file's length.
    pub bytes: u64,
}

impl Log {
    /// Reads a log.
    pub fn read(path: &Path, key: &LogKey) -> Result<Self, Error> {
        let mut reader = LogReader::open(path, key)?;
        let mut records = Vec::new();
        while let Some(block) = reader.next_block()? {
            records.extend(block);
        }
        Ok(Self {
            header: reader.header,
            records,
            end: reader.end(),
            bytes: reader.length,
        })
    }
}

/// Reads a log block by block.
pub struct LogReader {
    path: PathBuf,
    file: BufReader<File>,
    length: u64,
    header: Header,
    cipher: Cipher,
    /// Where the next block starts.
    pub(crate) offset: u64,
    pub(crate) number: u64,
    pub(crate) context: Context,
    end: End,
}

/// Opens a log and reads its header, up to where the first block starts.
pub(crate) fn open(path: &Path) -> Result<(Header, BufReader<File>, u64), Error> {
    let file = File::open(path).map_err(Error::io("open the log", path))?;
    start(path, file)
}

fn start(path: &Path, file: File) -> Result<(Header, BufReader<File>, u64), Error> {
    let length = file
        .metadata()
        .map_err(Error::io("examine the log", path))?
        .len();
    let mut file = BufReader::new(file);
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    file.by_ref()
        .take(HEADER_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read the log", path))?;
    let header = Header::decode(path, &bytes, length)?;
    Ok((header, file, length))
}

impl LogReader {
    /// Opens a log.
    pub fn open(path: &Path, key: &LogKey) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open the log", path))?;
        Self::with_file(path, file, key)
    }

    /// Reads from a file that is at its start.
    pub(crate) fn with_file(path: &Path, file: File, key: &LogKey) -> Result<Self, Error> {
        let (header, file, length) = start(path, file)?;
        let cipher = Cipher::new(path, &header, key)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
            header,
            cipher,
            offset: HEADER_BYTES as u64,
            number: 0,
            context: Context::default(),
            end: End::Open,
        })
    }

    /// What the log is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Refuses a log of another VM or one that starts from another generation.
    pub fn expect(&self, vm: [u8; 16], generation: u64) -> Result<(), Error> {
        self.header.expect(&self.path, vm, generation)
    }

    /// How the log ends; known once [`Self::next_block`] has given `None`.
    pub fn end(&self) -> End {
        self.end
    }

    /// The records of the next block (possibly none), or `None` at the end.
    ///
    /// After an error, the records given so far are all that can be had.
    pub fn next_block(&mut self) -> Result<Option<Vec<Record>>, Error> {
        let left = self.length - self.offset;
        if left == 0 || matches!(self.end, End::Torn { .. }) {
            return Ok(None);
        }
        let torn = End::Torn { bytes: left };
        if left < HEAD_BYTES as u64 {
            self.end = torn;
            return Ok(None);
        }
        let mut head = [0; HEAD_BYTES];
        self.read(&mut head)?;
        if head == [0; HEAD_BYTES] {
            // After a power failure the file may have its length but not yet its bytes.
            self.end = torn;
            return Ok(None);
        }
        let head = Head::decode(self.number, &head).ok_or_else(|| self.damaged())?;
        let whole = HEAD_BYTES as u64 + u64::from(head.length);
        if left < whole {
            self.end = torn;
            return Ok(None);
        }
        let mut sealed = vec![0; head.length as usize];
        self.read(&mut sealed)?;
        if format::body_check(self.number, &sealed) != head.body_check {
            if left > whole {
                return Err(self.damaged());
            }
            self.end = torn;
            return Ok(None);
        }
        let place = Place {
            number: self.number,
            session: head.session,
        };
        let forged = || Error::Forged {
            path: self.path.clone(),
            block: self.number,
        };
        let body = self.cipher.open(place, &mut sealed).ok_or_else(forged)?;
        let records = self.decode(&sealed[..body])?;
        self.offset += whole;
        self.number += 1;
        Ok(Some(records))
    }

    fn decode(&mut self, body: &[u8]) -> Result<Vec<Record>, Error> {
        match body.split_first() {
            Some((&RECORDS, coded)) => {
                self.end = End::Open;
                coding::decode(coded, &mut self.context, LIMITS)
            }
            Some((&CLOSED, [])) => {
                self.end = End::Closed;
                Ok(Vec::new())
            }
            _ => Err(Error::Malformed {
                what: "there is no such kind of block",
            }),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact(bytes)
            .map_err(|error| match error.kind() {
                // It was long enough when it was opened: somebody cut it off meanwhile.
                ErrorKind::UnexpectedEof => self.damaged(),
                _ => Error::io("read the log", &self.path)(error),
            })
    }

    fn damaged(&self) -> Error {
        Error::Damaged {
            path: self.path.clone(),
            block: self.number,
            offset: self.offset,
        }
    }

    /// Goes on as a writer: the file, positioned and cut off behind the last whole block.
    pub(crate) fn into_file(self) -> Result<(File, Cipher), Error> {
        let mut file = self.file.into_inner();
        let mut cut = || -> std::io::Result<()> {
            if self.length > self.offset {
                file.set_len(self.offset)?;
                file.sync_all()?;
            }
            file.seek(SeekFrom::Start(self.offset))?;
            Ok(())
        };
        cut().map_err(Error::io(
            "cut off the unfinished end of the log",
            &self.path,
        ))?;
        Ok((file, self.cipher))
    }
}
