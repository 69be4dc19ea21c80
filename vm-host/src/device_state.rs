//! Device state as an array of bytes: everything of a VM besides RAM and disks.
//!
//! QEMU's migration does it, with the capability `x-ignore-shared` that leaves out RAM in
//! shared files, over a unix socket at whose other end we are: `exec:` would need QEMU to be
//! allowed to start programs, and `file:` came with QEMU 8.2. Almost all of it is video RAM.

use std::fs;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast;

use crate::error::Context as _;
use crate::qmp::{Event, commands};
use crate::runtime::{remove, write_atomically};
use crate::start::apply_network;
use crate::{Error, Result, Status, Vm};

/// The longest device state, in bytes, that is saved or taken from another site. It holds 8 MiB
/// of video RAM and what the guest's driver keeps in the screen device, which `virtio-vga` bounds
/// at 256 MiB (`max_hostmem`).
pub const DEVICE_STATE_MAX: u64 = 512 << 20;
/// It takes 40 ms; a loaded host may be slow, but not this slow.
const LIMIT: Duration = Duration::from_secs(60);

impl Vm {
    /// Reads the device state of a paused VM, which can be resumed afterwards.
    ///
    /// RAM and disks hold still from the pause to the resume: together with this they are the
    /// VM. Asked again before that, it answers the same.
    pub async fn save_device_state(&self) -> Result<Vec<u8>> {
        match self.status().await? {
            Status::Paused => {}
            // QEMU migrates a VM only once; what it said is still true.
            Status::Saved => {
                return fs::read(&self.paths.saved).context("read", &self.paths.saved);
            }
            other => {
                let is = other.to_string();
                return Err(Error::State {
                    doing: "save device state",
                    is,
                    must_be: "paused",
                });
            }
        }
        let saving = tokio::time::timeout(LIMIT, self.save());
        let saved = saving.await.unwrap_or(Err(Error::Timeout {
            doing: "saving device state".into(),
            limit: LIMIT,
        }));
        remove(&self.paths.state)?;
        let state = match saved {
            Ok(state) => state,
            Err(error) => {
                // Whatever went wrong, the VM must stay usable.
                let _ = self.qmp.execute(commands::MigrateCancel {}).await;
                return Err(self.blame("save device state", error).await);
            }
        };
        write_atomically(&self.paths.saved, &state)?;
        Ok(state)
    }

    async fn save(&self) -> Result<Vec<u8>> {
        let socket = &self.paths.state;
        remove(socket)?;
        let listener = UnixListener::bind(socket).context("listen on", socket)?;
        self.prepare_migration().await?;
        self.qmp
            .execute(commands::MigrateSetParameters {
                max_bandwidth: 1 << 40,
            })
            .await?;
        let mut events = self.qmp.events();
        let uri = format!("unix:{}", socket.display());
        self.qmp.execute(commands::Migrate { uri }).await?;
        let receive = async {
            let (stream, _) = listener.accept().await.context("accept on", socket)?;
            let mut state = Vec::new();
            stream
                .take(DEVICE_STATE_MAX + 1)
                .read_to_end(&mut state)
                .await
                .context("read from", socket)?;
            Ok(state)
        };
        // QEMU closes the socket before it tells how it went. A failure may come without a
        // connection.
        let outcome = migration_end(&mut events);
        tokio::pin!(receive, outcome);
        let state: Vec<u8> = tokio::select! {
            state = &mut receive => {
                let state = state?;
                self.reason(outcome.await).await?;
                state
            }
            done = &mut outcome => {
                self.reason(done).await?;
                receive.await?
            }
            _ = self.death() => return Err(Error::Disconnected { socket: socket.clone() }),
        };
        let (length, status) = (state.len(), self.status().await?);
        if state.is_empty() || length as u64 > DEVICE_STATE_MAX || status != Status::Saved {
            let reason = format!("{length} bytes came, and the VM is {status}");
            return Err(Error::DeviceState {
                doing: "saved",
                reason,
            });
        }
        Ok(state)
    }

    /// Gives a VM that was started as `incoming` its device state. It is paused afterwards,
    /// with its network as its launch says.
    ///
    /// A state that QEMU doesn't accept ends it, with its reason in the error.
    pub async fn load_device_state(&self, state: &[u8]) -> Result<()> {
        let status = self.status().await?;
        if status != Status::Incoming {
            let is = status.to_string();
            let must_be = "started to wait for it";
            return Err(Error::State {
                doing: "load device state",
                is,
                must_be,
            });
        }
        let loading = tokio::time::timeout(LIMIT, self.load(state));
        let loaded = loading.await.unwrap_or(Err(Error::Timeout {
            doing: "loading device state".into(),
            limit: LIMIT,
        }));
        remove(&self.paths.state)?;
        match loaded {
            Err(error) => Err(self.blame("load device state", error).await),
            Ok(()) => Ok(()),
        }
    }

    async fn load(&self, state: &[u8]) -> Result<()> {
        let socket = &self.paths.state;
        remove(socket)?;
        // With the URI on QEMU's command line instead, the capability would come too late.
        self.prepare_migration().await?;
        let mut events = self.qmp.events();
        let uri = format!("unix:{}", socket.display());
        self.qmp.execute(commands::MigrateIncoming { uri }).await?;
        let mut stream = UnixStream::connect(socket)
            .await
            .context("connect to", socket)?;
        let send = async {
            stream.write_all(state).await?;
            stream.shutdown().await
        };
        // A state that is refused midway shows as a broken pipe here and as a reason there.
        if let Err(error) = send.await {
            tracing::debug!(%error, "QEMU stopped reading device state");
        }
        let loaded = migration_end(&mut events);
        tokio::select! {
            outcome = loaded => self.reason(outcome).await?,
            _ = self.death() => return Err(Error::Disconnected { socket: socket.clone() }),
        }
        // The last step of loading is a task of QEMU's main loop, which also answers this.
        while self.status().await? == Status::Incoming {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // Should the state have been saved from a running VM: nobody is to run unasked.
        self.qmp.execute(qapi::qmp::stop {}).await?;
        apply_network(&self.qmp, &self.launch).await
    }

    /// A failed migration's reason is told only if asked for.
    async fn reason(&self, outcome: Result<()>) -> Result<()> {
        let Err(Error::DeviceState { doing, reason }) = outcome else {
            return outcome;
        };
        let info = self.qmp.execute(commands::QueryMigrate {}).await?;
        Err(Error::DeviceState {
            doing,
            reason: info.error_desc.unwrap_or(reason),
        })
    }

    async fn prepare_migration(&self) -> Result<()> {
        let on = |name: &str| commands::Capability {
            capability: name.into(),
            state: true,
        };
        let capabilities = vec![on("x-ignore-shared"), on("events")];
        self.qmp
            .execute(commands::MigrateSetCapabilities { capabilities })
            .await?;
        Ok(())
    }
}

/// Waits for the end of a migration.
async fn migration_end(events: &mut broadcast::Receiver<Event>) -> Result<()> {
    loop {
        let event = match events.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => {
                return std::future::pending().await;
            }
        };
        if event.name != "MIGRATION" {
            continue;
        }
        match event.data.get("status").and_then(serde_json::Value::as_str) {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(Error::DeviceState {
                    doing: "migrated",
                    reason: event.data.to_string(),
                });
            }
            _ => {}
        }
    }
}
