//! A QMP connection (QEMU's `docs/interop/qmp-spec`): commands, answers, events.
//!
//! The command types are `qapi`'s where its QEMU 9.1 schema fits every QEMU from 7.2 on, and
//! those of [`commands`] where it doesn't. The transport is our own: `qapi`'s ends the whole
//! connection at the first event it has no type for, which any newer QEMU may send.
//!
//! Promise: answers go to whoever asked, in any order; events are seen in QEMU's order, with
//! QEMU's time stamp; nobody waits for ever.

pub(crate) mod commands;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qapi::{Command, Execute};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::task::JoinHandle;

use crate::clock::{Stopwatch, instant_of};
use crate::error::Context as _;
use crate::{Error, Result};

/// No message of QEMU's that we ask for comes near this.
const LINE_MAX: u64 = 16 << 20;
/// How long QEMU may take for one command. Its main loop answers within milliseconds, even on
/// a loaded host; stopping a guest waits for its disk requests.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Something QEMU reports on its own.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// Its name, as `STOP`.
    pub(crate) name: String,
    /// Its arguments.
    pub(crate) data: Value,
}

type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>>>>;

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

/// One connection. Dropping it closes the socket; QEMU then takes the next client.
#[derive(Debug)]
pub(crate) struct Qmp {
    socket: PathBuf,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Pending,
    next_id: AtomicU64,
    events: broadcast::Sender<Event>,
    running: watch::Sender<Stopwatch>,
    reader: JoinHandle<()>,
    peer: Option<u32>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// QEMU serves one client a socket: with another one connected, this waits for its turn
    /// until the limit.
    pub(crate) async fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let connecting = async {
            let stream = UnixStream::connect(socket)
                .await
                .context("connect to", socket)?;
            let peer = stream
                .peer_cred()
                .ok()
                .and_then(|c| c.pid())
                .map(i32::cast_unsigned);
            let (read, write) = stream.into_split();
            let mut read = BufReader::new(read);
            if read_line(&mut read)
                .await
                .context("read from", socket)?
                .is_none()
            {
                return Err(Error::Disconnected {
                    socket: socket.to_owned(),
                });
            }
            let (events, _) = broadcast::channel(1024);
            let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
            let running = watch::Sender::new(Stopwatch::stopped());
            let reader = tokio::spawn(read_all(
                read,
                pending.clone(),
                events.clone(),
                running.clone(),
                socket.to_owned(),
            ));
            let qmp = Self {
                socket: socket.to_owned(),
                writer: tokio::sync::Mutex::new(write),
                pending,
                next_id: AtomicU64::new(0),
                events,
                running,
                reader,
                peer,
            };
            qmp.execute(qapi::qmp::qmp_capabilities { enable: None })
                .await?;
            Ok(qmp)
        };
        tokio::time::timeout(limit, connecting)
            .await
            .unwrap_or_else(|_| {
                Err(Error::Timeout {
                    doing: format!("the greeting on {}", socket.display()),
                    limit,
                })
            })
    }

    /// The process that listens at the other end.
    pub(crate) fn peer(&self) -> Option<u32> {
        self.peer
    }

    /// Events from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Asks whether the guest runs; from then on events tell.
    pub(crate) async fn learn_run_state(&self) -> Result<()> {
        let before = self.stopwatch().changes();
        let running = self.execute(commands::QueryStatus {}).await?.status == "running";
        let now = std::time::Instant::now();
        self.running.send_if_modified(|stopwatch| {
            // An event that came meanwhile knows better.
            let ask = stopwatch.changes() == before;
            if ask {
                stopwatch.set(running, now);
            }
            ask
        });
        Ok(())
    }

    /// How long the guest has been seen running on this connection.
    pub(crate) fn stopwatch(&self) -> Stopwatch {
        *self.running.borrow()
    }

    /// Tells each change between running and not.
    pub(crate) fn watch_running(&self) -> watch::Receiver<Stopwatch> {
        self.running.subscribe()
    }

    /// Sends a command and waits for QEMU's answer to it.
    pub(crate) async fn execute<C: Command>(&self, command: C) -> Result<C::Ok> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        let disconnected = || Error::Disconnected {
            socket: self.socket.clone(),
        };
        let protocol = |reason: String| Error::Protocol {
            command: C::NAME,
            reason,
        };
        lock(&self.pending)
            .as_mut()
            .ok_or_else(disconnected)?
            .insert(id, sender);

        let mut line = serde_json::to_vec(&Execute::new(command, Some(id)))
            .map_err(|error| protocol(format!("the command can't be written: {error}")))?;
        line.push(b'\n');
        let exchange = async {
            // A writer that is gone shows as an answer that never comes; the lock is not held
            // while waiting for it.
            let written = self.writer.lock().await.write_all(&line).await;
            written.map_err(|_| disconnected())?;
            answer.await.map_err(|_| disconnected())
        };
        let outcome = tokio::time::timeout(ANSWER_LIMIT, exchange).await;
        if let Some(pending) = lock(&self.pending).as_mut() {
            pending.remove(&id);
        }
        match outcome {
            Err(_) => Err(Error::Timeout {
                doing: C::NAME.to_owned(),
                limit: ANSWER_LIMIT,
            }),
            Ok(Err(error)) => Err(error),
            Ok(Ok(Err(Refusal { desc }))) => Err(Error::Refused {
                command: C::NAME,
                reason: desc,
            }),
            Ok(Ok(Ok(value))) => {
                serde_json::from_value(value).map_err(|error| protocol(error.to_string()))
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing panics while holding these locks; and if it did, the maps would still be whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_line(read: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    read.take(LINE_MAX).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message without an end",
        ));
    }
    Ok(Some(line))
}

#[derive(Deserialize)]
struct Message {
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
}

#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    /// QEMU sends -1 for both if it couldn't tell.
    fn time(&self) -> Option<SystemTime> {
        let seconds = Duration::from_secs(u64::try_from(self.seconds).ok()?);
        let micros = Duration::from_micros(u64::try_from(self.microseconds).ok()?);
        UNIX_EPOCH.checked_add(seconds)?.checked_add(micros)
    }
}

async fn read_all(
    mut read: BufReader<OwnedReadHalf>,
    pending: Pending,
    events: broadcast::Sender<Event>,
    running: watch::Sender<Stopwatch>,
    socket: PathBuf,
) {
    loop {
        let line = match read_line(&mut read).await {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(socket = %socket.display(), %error, "QMP connection lost");
                break;
            }
        };
        let message: Message = match serde_json::from_slice(&line) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(socket = %socket.display(), %error, "QMP message not understood");
                continue;
            }
        };
        if let Some(name) = message.event {
            tracing::trace!(event = name, data = %message.data, "QMP event");
            let at = message
                .timestamp
                .and_then(|t| t.time())
                .unwrap_or_else(SystemTime::now);
            match name.as_str() {
                "RESUME" => running.send_modify(|s| s.set(true, instant_of(at))),
                "STOP" => running.send_modify(|s| s.set(false, instant_of(at))),
                _ => {}
            }
            // No receiver is no error: nobody is interested at the moment.
            let _ = events.send(Event {
                name,
                data: message.data,
            });
            continue;
        }
        let answer = match (message.error, message.value) {
            (Some(refusal), _) => Err(refusal),
            (None, value) => Ok(value.unwrap_or_default()),
        };
        let waiting = message
            .id
            .and_then(|id| lock(&pending).as_mut().and_then(|map| map.remove(&id)));
        // The asker may have given up.
        if waiting.is_none_or(|sender| sender.send(answer).is_err()) {
            tracing::warn!(id = ?message.id, "QMP answer nobody waits for");
        }
    }
    running.send_modify(|s| s.set(false, std::time::Instant::now()));
    // Dropping the senders tells those who wait, None tells those who come later.
    lock(&pending).take();
}
