//! The images that are on their way to a site, each at its socket for as long as the agent serves.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reconciler::ImageTree;
use tokio::net::UnixListener;
use tokio::task::AbortHandle;
use vm_host::{Status, nbd};

use super::{Arriving, Paths, note_of, users};
use crate::error::{Error, Result};
use crate::files;
use crate::local::{self, blocking};
use crate::peers::Peer;
use crate::store::{Store, VmDir, runtime_base};
use crate::vm::{BaseFile, FileHash};

/// When it is seen to guests that stand still since nobody served their image: QEMU has to try again before it finds
/// that somebody does.
const WAKE: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_secs(3),
    Duration::from_secs(10),
];

/// How often it is looked whether an image has come by another way.
const LOOK: Duration = Duration::from_secs(1);

/// How long until QEMUs are told once more that an image is whole, where that failed.
const AGAIN: Duration = Duration::from_secs(5);

/// Pause after a failed accept: it fails for want of file descriptors, and nothing tells when there are some again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The socket at which an image is read that is on its way.
pub(crate) fn socket(store: &Store, hash: FileHash) -> Result<PathBuf> {
    let mut hasher = blake3::Hasher::new_derive_key("replay-migrate 2026 images on their way");
    hasher.update(store.root().as_os_str().as_encoded_bytes());
    let site = hasher.finalize().to_hex();
    let name = hash.to_string();
    let dir = runtime_base()?.join(format!("images-{}", &site[..16]));
    Ok(dir.join(format!("{}.sock", &name[..16])))
}

/// Images on their way, by their names. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Arrivals(Arc<Shared>);

#[derive(Default)]
struct Shared {
    images: Mutex<HashMap<FileHash, Served>>,
}

struct Served {
    image: Arc<Arriving>,
    listening: AbortHandle,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Arrivals {
    fn images(&self) -> MutexGuard<'_, HashMap<FileHash, Served>> {
        // No code that holds the lock can leave the map half changed.
        self.0.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves all images that are on their way to a site, and looks after the guests that read one when the agent
    /// before this one ended.
    pub(crate) fn revive(&self, store: &Store) -> Result<()> {
        for vm in store.vms()? {
            let disks = match vm.record() {
                Ok(record) => record.disks,
                Err(error) => {
                    let (vm, error) = (vm.name(), error.chain());
                    tracing::error!(%vm, error, "what it rests on is not known");
                    continue;
                }
            };
            for disk in disks {
                match self.get(store, disk.hash) {
                    Ok(None) => {}
                    Ok(Some(image)) => {
                        let store = store.clone();
                        tokio::spawn(async move {
                            // QEMU comes back by itself when it is asked to read, and fails that one.
                            for wait in WAKE {
                                tokio::time::sleep(wait).await;
                                let_go_on(&store, &image).await;
                            }
                        });
                    }
                    Err(error) => {
                        let (vm, error) = (vm.name(), error.chain());
                        tracing::error!(%vm, error, "what has come of its disk can't be read");
                    }
                }
            }
            tokio::spawn(look_after_readers(vm));
        }
        Ok(())
    }

    /// An image is to come.
    pub(crate) fn begin(
        &self,
        store: &Store,
        file: BaseFile,
        tree: &ImageTree,
        from: &Peer,
    ) -> Result<()> {
        let mut images = self.images();
        Arriving::begin(store, file, tree, from)?;
        // What was there before may have been thrown away.
        let same = |served: &Served| served.image.is_in_place();
        if !images.get(&file.hash).is_some_and(same) {
            images.remove(&file.hash);
        }
        Ok(())
    }

    /// An image that is on its way, which is served from then on; nothing, if it is not.
    pub(crate) fn get(&self, store: &Store, hash: FileHash) -> Result<Option<Arc<Arriving>>> {
        let mut images = self.images();
        if note_of(store, hash)?.is_none() {
            return Ok(None);
        }
        if let Some(served) = images.get(&hash) {
            return Ok(Some(served.image.clone()));
        }
        let Some(image) = Arriving::open(store, hash)?.map(Arc::new) else {
            return Ok(None);
        };
        let path = socket(store, hash)?;
        if let Some(dir) = path.parent() {
            files::make_dir(dir)?;
        }
        // There is one agent: whoever listened here is gone.
        files::remove_file(&path)?;
        let listener = UnixListener::bind(&path).map_err(Error::file("listen at", &path))?;
        let whole = image.is_whole();
        let listening = tokio::spawn(serve(store.clone(), listener, image.clone())).abort_handle();
        let served = Served {
            image: image.clone(),
            listening,
        };
        images.insert(hash, served);
        if whole {
            Self::settle(store, image.clone(), false);
        }
        Ok(Some(image))
    }

    /// All of an image has come: the QEMUs that read it here go over to its file, and it is like any other. Where it
    /// was not verified, it is first.
    pub(crate) fn settle(store: &Store, image: Arc<Arriving>, verified: bool) {
        let store = store.clone();
        tokio::spawn(async move {
            let mut verified = verified;
            loop {
                match settle(&store, &image, &mut verified).await {
                    Ok(()) => break,
                    Err(error) if !verified && matches!(error, Error::Damaged { .. }) => {
                        tracing::error!(
                            error = error.chain(),
                            "a disk image is not what was announced"
                        );
                        break;
                    }
                    Err(error) => {
                        let (image, error) = (image.file().hash, error.chain());
                        tracing::warn!(%image, error, "it has come, and is not used as a file yet");
                    }
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Sees to it that guests go on which stood still because an image could not be read, now that it comes again.
    /// Nobody waits for that: what they read may be what is to come next.
    pub(crate) fn wake(store: &Store, image: &Arc<Arriving>) {
        if image.begin_to_wake() {
            let (store, image) = (store.clone(), image.clone());
            tokio::spawn(async move {
                let_go_on(&store, &image).await;
                image.has_woken();
            });
        }
    }
}

async fn let_go_on(store: &Store, image: &Arriving) {
    let users = users(store, image.file().hash).unwrap_or_else(|error| {
        tracing::warn!(error = error.chain(), "the VMs can't be listed");
        Vec::new()
    });
    let mut gone_on = false;
    for (vm, _) in users {
        match go_on(&vm).await {
            Ok(went) => gone_on |= went,
            Err(error) => {
                let (vm, error) = (vm.name(), error.chain());
                tracing::warn!(%vm, error, "whether it stands still for its disk can't be told");
            }
        }
    }
    if gone_on {
        image.goes_on();
    }
}

/// Lets a guest go on that stands still because its disk could not be read; whether it did.
async fn go_on(vm: &VmDir) -> Result<bool> {
    // Whoever is at work on it has it stand still, or looks after it.
    let Ok(_lock) = vm.lock() else {
        return Ok(false);
    };
    let Some(qemu) = local::attach(vm).await? else {
        return Ok(false);
    };
    if local::guest_status(vm, &qemu).await? != Status::Other("io-error".into()) {
        return Ok(false);
    }
    local::require_lease(vm)?;
    tracing::info!(vm = %vm.name(), "its disk is being brought again: it goes on");
    qemu.resume()
        .await
        .map_err(Error::host(format!("cannot resume {}", vm.name())))?;
    Ok(true)
}

/// A QEMU that was left at the socket of an image which is whole by now goes over to the file.
async fn look_after_readers(vm: VmDir) {
    let done = async {
        let Some(qemu) = local::attach(&vm).await? else {
            return Ok(());
        };
        let sockets = qemu.launch().arriving.clone();
        let mut went = false;
        for (index, disk) in vm.record()?.disks.iter().enumerate() {
            let at_socket = sockets.get(index).is_some_and(Option::is_some);
            if at_socket && !vm.store().is_arriving(disk.hash) {
                let path = vm.store().base_path(disk.hash);
                let what = || format!("cannot have {} read its disk from its file", vm.name());
                qemu.base_arrived(index, &path)
                    .await
                    .map_err(Error::host(what()))?;
                went = true;
            }
        }
        drop(qemu);
        if went {
            go_on(&vm).await?;
        }
        Ok::<_, Error>(())
    };
    if let Err(error) = done.await {
        let (vm, error) = (vm.name(), error.chain());
        tracing::error!(%vm, error, "it may stand still for its disk");
    }
}

async fn settle(store: &Store, image: &Arc<Arriving>, verified: &mut bool) -> Result<()> {
    let hash = image.file().hash;
    if note_of(store, hash)?.is_none() {
        return Ok(());
    }
    if !*verified {
        let whole = image.clone();
        blocking(move || whole.verify()).await?;
        *verified = true;
    }
    let_go_on(store, image).await;
    go_over(store, hash).await?;
    // One that starts in this moment finds the socket, which is served as long as the agent is.
    Paths::of(store, hash).settle()?;
    tracing::info!(image = %hash, "all of it is here");
    Ok(())
}

/// The QEMUs here that read an image at its socket go over to its file.
async fn go_over(store: &Store, hash: FileHash) -> Result<()> {
    let path = store.base_path(hash);
    for (vm, disk) in users(store, hash)? {
        if let Some(qemu) = local::attach(&vm).await? {
            let reads = format!("{} goes on to read its disk from this program", vm.name());
            qemu.base_arrived(disk, &path)
                .await
                .map_err(Error::host(reads))?;
        }
    }
    Ok(())
}

/// Serves an image at its socket. Should it come by another way, its readers go over to the file.
async fn serve(store: Store, listener: UnixListener, image: Arc<Arriving>) {
    let hash = image.file().hash;
    // Somebody may read here that has not been asked to go over.
    let fresh = AtomicBool::new(true);
    let watching = async {
        loop {
            tokio::time::sleep(LOOK).await;
            if store.is_arriving(hash) || !fresh.swap(false, Ordering::AcqRel) {
                continue;
            }
            let used = async {
                if !image.is_whole() {
                    image.has_come()?;
                }
                go_over(&store, hash).await
            };
            if let Err(error) = used.await {
                fresh.store(true, Ordering::Release);
                let error = error.chain();
                tracing::warn!(image = %hash, error, "it has come, and is not used as a file yet");
                tokio::time::sleep(AGAIN).await;
            }
            let_go_on(&store, &image).await;
        }
    };
    let accepting = async {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a reader of an image could not be let in");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            fresh.store(true, Ordering::Release);
            let image = image.clone();
            tokio::spawn(async move {
                if let Err(error) = nbd::serve(stream, image).await {
                    tracing::debug!(%error, "a reader of an image is gone");
                }
            });
        }
    };
    // Neither ends; who goes over may have to be let in once more meanwhile.
    tokio::join!(watching, accepting);
}
