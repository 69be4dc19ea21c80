//! Disk images that are on their way: a VM runs here on a base image of which a part is still at the site that it
//! came from.
//!
//! ```text
//! images/HASH            sparse; pages that have not come are holes
//! images/HASH.tree       the hash of each page, as the site said that gave the VM
//! images/HASH.pages      one bit a page: it is there
//! images/HASH.arriving   that all this is so, and who brings the rest
//! ```
//!
//! Each page is checked against its hash before it is written, and the whole file against its name before it is taken
//! for the image: until then nobody reads it but through [`Arriving`], which has the guest wait for what is not
//! there. What says that a page is there is written after the page is durable.

mod arrivals;
mod note;
mod pages;

use std::collections::BTreeMap;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use reconciler::{ImageTree, PAGE_SIZE, Page, PageHash, PageIndex, PageSet};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::files;
use crate::generation;
use crate::peers::Peer;
use crate::store::Store;
use crate::vm::{BaseFile, FileHash};

pub(crate) use arrivals::{Arrivals, socket};
use note::{Note, note_of, users};
pub(crate) use note::{Paths, missing, require_served, require_whole};
use pages::Pages;

/// How long a guest waits for a page before its disk fails it, and it stands still until the page is there: QEMU
/// can't be talked with while it waits.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked for along with a page that a guest waits for: what it reads next, most likely.
const READ_AHEAD: u64 = 32;

/// Bytes after which what has come is noted.
const NOTED_AFTER: u64 = 16 << 20;

/// The pages that are there without having come.
fn zeroes(tree: &ImageTree) -> Pages {
    let mut here = Pages::none(tree.pages());
    (0..tree.pages())
        .filter(|&page| tree.leaf(PageIndex(page)).is_zero())
        .for_each(|page| here.set(page));
    here
}

/// An image that is on its way.
pub(crate) struct Arriving {
    store: Store,
    file: BaseFile,
    data: RwLock<Arc<File>>,
    tree: ImageTree,
    state: Mutex<State>,
    /// Pages have come.
    came: Notify,
    /// How many reads have waited so far.
    asked: watch::Sender<u64>,
    unnoted: AtomicU64,
    noting: Mutex<()>,
    /// A read was given up, and the guest stands still for it or soon will.
    stalled: AtomicBool,
    waking: AtomicBool,
}

struct State {
    here: Pages,
    /// Reads that wait, by number.
    waiting: BTreeMap<u64, Range<u64>>,
    next: u64,
}

impl Arriving {
    /// Begins with an image of which nothing is here, or goes on with what has come of it.
    pub(crate) fn begin(
        store: &Store,
        file: BaseFile,
        tree: &ImageTree,
        from: &Peer,
    ) -> Result<()> {
        let wrong = |what: &str| {
            Error::Refused(format!(
                "{} announced the image {} {what}",
                from.name, file.hash
            ))
        };
        if file.bytes == 0 || !file.bytes.is_multiple_of(PAGE_SIZE as u64) {
            return Err(wrong("with a length that no disk image has here"));
        }
        let count = file.bytes / PAGE_SIZE as u64;
        if tree.pages() != count {
            return Err(wrong("with hashes of another length"));
        }
        let paths = Paths::of(store, file.hash);
        let note = Note::of(file.bytes, from);
        if let Some(known) = note_of(store, file.hash)? {
            match Self::open(store, file.hash) {
                Ok(Some(here)) if here.tree.root() == tree.root() => {
                    if known != note && !known.wrong {
                        files::write_json(&paths.note, &note)?;
                    }
                    return Ok(());
                }
                // What a VM here runs on is nobody's to throw away.
                opened => {
                    if let Some((vm, _)) = users(store, file.hash)?.first() {
                        return Err(wrong(&format!(
                            "with other hashes than {} did, and {} runs on what came from there{}",
                            known.from_name,
                            vm.name(),
                            opened
                                .err()
                                .map_or_else(String::new, |error| format!(" ({error})")),
                        )));
                    }
                }
            }
        } else if paths.data.exists() {
            return Err(Error::Refused(format!(
                "the image {} is here already",
                file.hash
            )));
        }
        // From here on whatever lies under its name is not taken for the image.
        files::write_json(&paths.note, &note)?;
        // In this order: nothing is said to be there that is not.
        files::remove_file(&paths.pages)?;
        files::remove_file(&paths.data)?;
        let data = files::create_private(&paths.data)?;
        data.set_len(file.bytes)
            .map_err(Error::file("size", &paths.data))?;
        generation::save_tree(&paths.tree, tree)?;
        zeroes(tree).store(&paths.pages)
    }

    /// What has come of an image; nothing, if it is not on its way.
    pub(crate) fn open(store: &Store, hash: FileHash) -> Result<Option<Self>> {
        let Some(note) = note_of(store, hash)? else {
            return Ok(None);
        };
        let paths = Paths::of(store, hash);
        let count = note.bytes / PAGE_SIZE as u64;
        let damaged = |path: &PathBuf, reason: &str| Error::Damaged {
            path: path.clone(),
            reason: format!(
                "{reason}: remove it and {}, and have the VM sent again",
                paths.note.display()
            ),
        };
        let opened = || {
            // What was whole may have been made read-only just before whoever did that died.
            std::fs::set_permissions(&paths.data, Permissions::from_mode(0o600))?;
            File::options().read(true).write(true).open(&paths.data)
        };
        let data = opened().map_err(Error::file("open", &paths.data))?;
        let there = data
            .metadata()
            .map_err(Error::file("measure", &paths.data))?
            .len();
        if there != note.bytes {
            return Err(damaged(
                &paths.data,
                "it is of another length than the image",
            ));
        }
        let tree = generation::load_tree(&paths.tree, None)?;
        if tree.pages() != count {
            return Err(damaged(
                &paths.tree,
                "it is of another length than the image",
            ));
        }
        let here = match Pages::load(&paths.pages, count) {
            Ok(Some(here)) => here,
            // Whatever is there comes once more.
            Ok(None) | Err(Error::Damaged { .. }) => zeroes(&tree),
            Err(error) => return Err(error),
        };
        Ok(Some(Self {
            store: store.clone(),
            file: BaseFile {
                hash,
                bytes: note.bytes,
            },
            data: RwLock::new(Arc::new(data)),
            tree,
            state: Mutex::new(State {
                here,
                waiting: BTreeMap::new(),
                next: 0,
            }),
            came: Notify::new(),
            asked: watch::Sender::new(0),
            unnoted: AtomicU64::new(0),
            noting: Mutex::new(()),
            stalled: AtomicBool::new(false),
            waking: AtomicBool::new(false),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data(&self) -> Arc<File> {
        // Whoever holds the lock only puts another file in place.
        let data = self.data.read().unwrap_or_else(PoisonError::into_inner);
        data.clone()
    }

    /// It has come by another way: who waits reads what lies under its name now.
    pub(crate) fn has_come(&self) -> Result<()> {
        let path = self.store.base_path(self.file.hash);
        let whole = File::open(&path).map_err(Error::file("open", &path))?;
        *self.data.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(whole);
        self.state().here = Pages::all(self.tree.pages());
        self.came.notify_waiters();
        Ok(())
    }

    /// Whether what is written to it is what others find under its name.
    pub(crate) fn is_in_place(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let path = self.store.base_path(self.file.hash);
        let there = std::fs::metadata(path).map(|there| (there.dev(), there.ino()));
        let here = self.data().metadata().map(|here| (here.dev(), here.ino()));
        matches!((there, here), (Ok(there), Ok(here)) if there == here)
    }

    /// What it is.
    pub(crate) fn file(&self) -> BaseFile {
        self.file
    }

    /// The pages that have not come.
    pub(crate) fn absent(&self) -> PageSet {
        self.state().here.absent()
    }

    /// Whether all have.
    pub(crate) fn is_whole(&self) -> bool {
        self.state().here.is_full()
    }

    /// Takes pages that came, if they are what they should be.
    pub(crate) fn put(&self, first: u64, bytes: &[u8]) -> Result<()> {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        let end = first.saturating_add(pages.len() as u64);
        let right = rest.is_empty() && end <= self.tree.pages();
        let is =
            |(index, page): (u64, &Page)| PageHash::of(page) == self.tree.leaf(PageIndex(index));
        if !right || !(first..).zip(pages).all(is) {
            return Err(Error::Refused(format!(
                "pages of the image {} are not what was announced",
                self.file.hash
            )));
        }
        if self.is_whole() {
            return Ok(());
        }
        let path = || self.store.base_path(self.file.hash);
        self.data()
            .write_all_at(bytes, first * PAGE_SIZE as u64)
            .map_err(|error| Error::file("write", &path())(error))?;
        {
            let mut state = self.state();
            (first..end).for_each(|page| state.here.set(page));
        }
        self.came.notify_waiters();
        let unnoted = self
            .unnoted
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if unnoted + bytes.len() as u64 >= NOTED_AFTER {
            self.note()?;
        }
        Ok(())
    }

    /// Makes what came durable, and then notes that it is there.
    pub(crate) fn note(&self) -> Result<()> {
        let _one = self.noting.lock().unwrap_or_else(PoisonError::into_inner);
        self.unnoted.store(0, Ordering::Relaxed);
        let here = self.state().here.clone();
        let paths = Paths::of(&self.store, self.file.hash);
        self.data()
            .sync_data()
            .map_err(Error::file("write", &paths.data))?;
        here.store(&paths.pages)
    }

    /// All has come: whether it is the image. If not, that is noted, and never looked at again.
    ///
    /// # Errors
    /// When its content has another hash, which only the site that gave the VM can have brought about.
    pub(crate) fn verify(&self) -> Result<()> {
        if !self.is_whole() {
            return Err(Error::Refused(format!(
                "not all of the image {} has come",
                self.file.hash
            )));
        }
        let paths = Paths::of(&self.store, self.file.hash);
        let wrong = || {
            Error::Damaged {
            path: paths.data.clone(),
            reason: "all of it has come, and it is not the image of its name: the site that the VM came from did \
                     not have the right one, or lied about it. The VM runs on what that site gave"
                .into(),
        }
        };
        let note = note_of(&self.store, self.file.hash)?;
        if note.as_ref().is_some_and(|note| note.wrong) {
            return Err(wrong());
        }
        self.note()?;
        if Store::identify(&paths.data)? == self.file {
            return Ok(());
        }
        if let Some(note) = note {
            let note = note.of_another();
            files::write_json(&paths.note, &note)?;
        }
        Err(wrong())
    }

    /// Ranges of pages that reads wait for, by number, from this number on.
    pub(crate) fn waiting(&self, from: u64) -> Vec<(u64, Range<u64>)> {
        let state = self.state();
        let waiting = state.waiting.range(from..);
        waiting
            .map(|(number, range)| (*number, range.clone()))
            .collect()
    }

    /// Whether a guest may stand still because a read was given up.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Acquire)
    }

    /// Whether nobody sees to guests that stand still yet; somebody does from then on, until [`Self::has_woken`].
    pub(crate) fn begin_to_wake(&self) -> bool {
        !self.waking.swap(true, Ordering::AcqRel)
    }

    /// Nobody sees to guests any more.
    pub(crate) fn has_woken(&self) {
        self.waking.store(false, Ordering::Release);
    }

    /// It goes on.
    pub(crate) fn goes_on(&self) {
        self.stalled.store(false, Ordering::Release);
    }

    /// Changes with each read that waits.
    pub(crate) fn asked(&self) -> watch::Receiver<u64> {
        self.asked.subscribe()
    }

    /// Waits for pages.
    async fn wait_for(&self, pages: Range<u64>) -> io::Result<()> {
        let mut waits: Option<Waits<'_>> = None;
        let end = Instant::now() + PATIENCE;
        loop {
            let came = self.came.notified();
            tokio::pin!(came);
            // Before looking: none that comes meanwhile is missed.
            came.as_mut().enable();
            {
                let mut state = self.state();
                let Some(first) = state.here.first_absent(pages.clone()) else {
                    return Ok(());
                };
                if waits.is_none() {
                    let number = state.next;
                    state.next += 1;
                    let end = pages.end.max(first + READ_AHEAD).min(self.tree.pages());
                    state.waiting.insert(number, first..end);
                    waits = Some(Waits {
                        arriving: self,
                        number,
                    });
                    self.asked.send_replace(number + 1);
                }
            }
            if tokio::time::timeout_at(end, came).await.is_err() {
                let page = pages.start;
                self.stalled.store(true, Ordering::Release);
                return Err(io::Error::other(format!(
                    "page {page} and others have not come"
                )));
            }
        }
    }
}

/// A read that waits.
struct Waits<'a> {
    arriving: &'a Arriving,
    number: u64,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.arriving.state().waiting.remove(&self.number);
    }
}

impl vm_host::nbd::Export for Arriving {
    fn bytes(&self) -> u64 {
        self.file.bytes
    }

    async fn read(&self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        let end = offset + u64::from(length);
        let pages = offset / PAGE_SIZE as u64..end.div_ceil(PAGE_SIZE as u64);
        self.wait_for(pages).await?;
        let data = self.data();
        tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length as usize];
            data.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
        .await
        .map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests;
