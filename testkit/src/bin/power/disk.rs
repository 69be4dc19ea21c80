//! Disks whose writes and flushes are noted in the order in which they come: files of a FUSE file
//! system that this program serves, for loop devices to rest on.
//!
//! A loop device passes on what the file system above it asks of a disk: writes, and a flush
//! where it wants all writes before to be durable (a write that is to be durable by itself is
//! turned into a write and a flush by the kernel, as loop devices have no such write). The kernel
//! asks for one thing after another here, so that there is one order over all disks; what is
//! remarked meanwhile ([`Log::remark`]) has its place in it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
};

/// What the kernel is told never changes.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);
/// Files are numbered from here; the folder has the number before.
const FIRST: u64 = INodeNo::ROOT.0 + 1;

/// One thing that happened, in order.
#[derive(Debug)]
pub(crate) enum Event<R> {
    /// Bytes were written to a disk. They may be on it from then on.
    Write {
        disk: usize,
        at: u64,
        data: Box<[u8]>,
    },
    /// All that was written to this disk before is on it.
    Flush { disk: usize },
    /// What this program saw just then.
    Remark(R),
}

/// All that happened.
#[derive(Debug)]
pub(crate) struct Log<R>(Arc<Mutex<Vec<Event<R>>>>);

impl<R> Clone for Log<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Log<R> {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event<R>>> {
        // Nothing but pushing is done with it held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: Event<R>) {
        self.events().push(event);
    }

    /// Notes what was seen, after all that happened before.
    pub(crate) fn remark(&self, seen: R) {
        self.note(Event::Remark(seen));
    }

    /// Takes out all that happened so far.
    pub(crate) fn take(&self) -> Vec<Event<R>> {
        std::mem::take(&mut self.events())
    }
}

/// The disks, as files in a folder; gone when dropped. What is mounted on them must be gone before.
pub(crate) struct Disks {
    dir: PathBuf,
    _session: BackgroundSession,
}

impl Disks {
    /// Serves these images in a folder. They are read and written; their length stays.
    pub(crate) fn serve<R: Send + 'static>(
        dir: &Path,
        images: &[PathBuf],
        log: &Log<R>,
    ) -> anyhow::Result<Self> {
        let mut disks = Vec::new();
        for path in images {
            let what = || format!("cannot open {}", path.display());
            let image = File::options().read(true).write(true).open(path);
            let image = image.with_context(what)?;
            let bytes = image.metadata().with_context(what)?.len();
            disks.push(Disk { image, bytes });
        }
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("power".into())];
        let served = Served {
            disks,
            log: log.clone(),
        };
        let session = Session::new(served, dir, &config)
            .and_then(Session::spawn)
            .with_context(|| format!("cannot serve disks in {}", dir.display()))?;
        Ok(Self {
            dir: dir.to_owned(),
            _session: session,
        })
    }

    /// Where a disk is found.
    pub(crate) fn path(&self, disk: usize) -> PathBuf {
        self.dir.join(disk.to_string())
    }
}

#[derive(Debug)]
struct Disk {
    image: File,
    bytes: u64,
}

#[derive(Debug)]
struct Served<R> {
    disks: Vec<Disk>,
    log: Log<R>,
}

impl<R> Served<R> {
    fn index(&self, ino: INodeNo) -> Option<usize> {
        let index = usize::try_from(ino.0.checked_sub(FIRST)?).ok()?;
        (index < self.disks.len()).then_some(index)
    }

    fn disk(&self, ino: INodeNo) -> Option<&Disk> {
        self.disks.get(self.index(ino)?)
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        let bytes = match ino {
            INodeNo::ROOT => None,
            ino => Some(self.disk(ino)?.bytes),
        };
        Some(FileAttr {
            ino,
            size: bytes.unwrap_or(0),
            blocks: bytes.unwrap_or(0) / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: bytes.map_or(FileType::Directory, |_| FileType::RegularFile),
            perm: bytes.map_or(0o700, |_| 0o600),
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_i32)
}

impl<R: Send + 'static> Filesystem for Served<R> {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
        let ino = number.and_then(|number| number.checked_add(FIRST));
        match ino.and_then(|ino| self.attributes(INodeNo(ino))) {
            Some(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(disk) = self.disk(ino) else {
            return reply.error(Errno::ENOENT);
        };
        let left = disk.bytes.saturating_sub(offset);
        let mut bytes = vec![0; u64::from(size).min(left) as usize];
        match disk.image.read_exact_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (Some(index), Some(disk)) = (self.index(ino), self.disk(ino)) else {
            return reply.error(Errno::ENOENT);
        };
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > disk.bytes) {
            return reply.error(Errno::EFBIG);
        }
        match disk.image.write_all_at(data, offset) {
            Ok(()) => {
                self.log.note(Event::Write {
                    disk: index,
                    at: offset,
                    data: data.into(),
                });
                // A request is never longer than its length field.
                reply.written(data.len() as u32);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Of a descriptor that is closed: nothing that a disk knows.
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.index(ino) {
            Some(disk) => {
                self.log.note(Event::Flush { disk });
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }
}
