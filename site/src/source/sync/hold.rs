//! Who wants to move a VM has the process that keeps its standbys hold still: it ships nothing and
//! makes no generation for as long as the connection to its socket lasts.

use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::control_socket::{self, ControlSocket};
use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::store::VmDir;

/// A generation that is being made is finished first.
const HOLD_LIMIT: Duration = Duration::from_secs(60);

/// What is said once it holds still.
const HELD: u8 = b'h';

/// The lock of who keeps a VM's standbys, if nobody does.
pub(crate) fn syncing_lock(vm: &VmDir) -> Result<Option<FileLock>> {
    FileLock::try_take(&vm.dir().join("sync.lock"))
}

/// Not that of the VM that runs: standbys are also kept while it is stopped.
fn dir(vm: &VmDir) -> Result<PathBuf> {
    vm.runtime_dir("sync")
}

fn path(vm: &VmDir) -> Result<PathBuf> {
    Ok(dir(vm)?.join("sync.sock"))
}

/// Listens for those who want it to hold still; the caller holds the lock.
pub(super) fn bind(vm: &VmDir) -> Result<ControlSocket> {
    files::make_dir(&dir(vm)?)?;
    ControlSocket::bind(path(vm)?)
}

/// Nobody listens any more.
pub(super) fn clear(vm: &VmDir) -> Result<()> {
    files::remove_dir(&dir(vm)?)
}

/// It holds still until this is dropped.
pub(crate) struct Held(#[expect(dead_code, reason = "its end is what is said")] Option<UnixStream>);

/// Has the process that keeps a VM's standbys hold still; without one there is nothing to do.
///
/// # Errors
/// When it does not answer.
pub(crate) async fn hold(vm: &VmDir) -> Result<Held> {
    let path = path(vm)?;
    let Some(mut stream) = control_socket::call(&path, "reach who keeps standbys at").await? else {
        return Ok(Held(None));
    };
    match tokio::time::timeout(HOLD_LIMIT, stream.read_u8()).await {
        Ok(Ok(HELD)) => Ok(Held(Some(stream))),
        // It ended just then.
        Ok(_) => Ok(Held(None)),
        Err(_) => Err(Error::Refused(format!(
            "the process that keeps standbys of {} does not answer; end it, then try again",
            vm.name()
        ))),
    }
}

/// Says that it holds still, and waits until the caller lets go.
pub(super) async fn until_let_go(mut caller: UnixStream) {
    if caller.write_u8(HELD).await.is_ok() {
        // Nothing is said: its end is waited for.
        let mut rest = Vec::new();
        let _ = (&mut caller).take(1).read_to_end(&mut rest).await;
    }
}
