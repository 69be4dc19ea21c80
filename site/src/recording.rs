//! Recording a VM: a checkpoint, the recording proxy, and the log it writes.
//!
//! The recorder is a process of its own; others reach it by its [`control`] socket.

mod begin;
mod control;
pub(crate) mod stretch;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use recorder::{Listen, RecordSink, SinkClosed};
use serde::Serialize;
use tokio::sync::oneshot;
use traces::{Log, LogId, LogWriter, Record};

use crate::chance;
use crate::control_socket::ControlSocket;
use crate::error::{Error, Result};
use crate::local;
use crate::store::VmDir;
use begin::{Begun, begin};
use control::Control;
use writer::{FLUSH_EVERY, ToWriter};

pub use control::{Logging, set_paused};
pub(crate) use control::{Position, Viewers, flush, hold, logging, moved, viewers};

/// Bounds of [`RecordOptions::long_turns`].
pub use introspection::turns::{LONGEST as LONGEST_TURN, SHORTEST as SHORTEST_TURN};

/// What to record, and where.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// Where VNC viewers connect: `HOST:PORT` or `unix:PATH`.
    pub listen: String,
    /// Input devices of this machine to take as well.
    pub evdev: Vec<PathBuf>,
    /// Programs of a replay-friendly guest take turns of this length, see [`introspection::turns`].
    pub long_turns: Option<Duration>,
    /// The guest goes on in a new QEMU, as its replays do.
    pub fresh_qemu: bool,
}

/// What is being recorded, once viewers can connect.
#[derive(Clone, Debug, Serialize)]
pub struct Recording {
    /// The generation that the log continues.
    pub generation: u64,
    /// Where viewers connect.
    pub listening: String,
    /// The log.
    pub log: PathBuf,
}

/// What was recorded.
#[derive(Clone, Debug, Serialize)]
pub struct Recorded {
    /// The generation that the log continues.
    pub generation: u64,
    /// The log.
    pub log: PathBuf,
    /// Its length.
    pub log_bytes: u64,
    /// Input events and anchors in it.
    pub records: u64,
    /// Why the recording ended.
    pub ended: Ended,
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The user stopped it.
    Stopped,
    /// The VM has moved to another site.
    Moved,
    /// QEMU ended.
    VmEnded,
}

/// `HOST:PORT` or `unix:PATH`.
fn parse_listen(text: &str) -> Result<Listen> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Listen::Unix(path.into()));
    }
    text.parse().map(Listen::Tcp).map_err(|_| {
        Error::Refused(format!(
            "{text:?} is no place to listen: say ADDRESS:PORT, as 127.0.0.1:5900, or unix:PATH"
        ))
    })
}

/// A port that is taken is told before the checkpoint, which would be for nothing.
fn require_free(listen: &Listen) -> Result<()> {
    let Listen::Tcp(addr) = listen else {
        return Ok(());
    };
    std::net::TcpListener::bind(addr).map(drop).map_err(|error| {
        Error::Refused(format!(
            "cannot listen for viewers at {addr}: {error}; stop what uses it, or choose another \
             address with --listen"
        ))
    })
}

/// Hands records to the thread that writes the log.
struct LogSink(mpsc::Sender<ToWriter>);

impl RecordSink for LogSink {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self.0
            .send(ToWriter::Record(record))
            .map_err(|_| SinkClosed)
    }
}

/// Records until `stop` ends, the VM moves away or QEMU ends.
///
/// `begun` is told as soon as viewers can connect.
pub async fn record(
    vm: &VmDir,
    options: &RecordOptions,
    begun: impl FnOnce(&Recording),
    stop: impl Future<Output = ()>,
) -> Result<Recorded> {
    local::require_lease(vm)?;
    let _recording = chance::recording_lock(vm)?
        .ok_or_else(|| Error::Refused(format!("{} is being recorded already", vm.name())))?;
    let qemu = local::attach_running(vm).await?;
    let listen = parse_listen(&options.listen)?;
    require_free(&listen)?;
    let Begun {
        qemu,
        generation,
        clock,
        held,
    } = begin(vm, qemu, options).await?;
    let vnc = qemu.vnc_socket().to_owned();
    let log = vm.log_path(generation);
    let writer = open_log(vm, &log, generation)?;
    let (sender, receiver) = mpsc::channel();
    // Dropped when the writer ends, before all when it can't write.
    let (writes, writer_ended) = oneshot::channel::<()>();
    let writing = std::thread::spawn(move || {
        let written = writer::write(writer, &receiver, FLUSH_EVERY);
        drop(writes);
        written
    });
    let config = recorder::RecorderConfig {
        listen,
        evdev: options.evdev.clone(),
        ..recorder::RecorderConfig::new(vnc)
    };
    let recorder = recorder::Recorder::start(config, LogSink(sender.clone()), clock.clone())
        .await
        .map_err(Error::Recorder)?;
    let socket = ControlSocket::bind(control::path(vm)?)?;
    let control = Control::new(generation, &sender, &clock, &recorder);
    begun(&Recording {
        generation,
        listening: recorder.local_addr().to_string(),
        log: log.clone(),
    });
    let ended = tokio::select! {
        () = stop => Ended::Stopped,
        ended = control.serve(&socket.listener) => ended?,
        // Others drive QEMU meanwhile: a migration, before all.
        _ = qemu.death_from_afar() => Ended::VmEnded,
        // What it could not write is told below.
        _ = writer_ended => Ended::Stopped,
    };
    drop(socket);
    match held {
        Some(held) if ended != Ended::Stopped => held.forget(),
        held => drop(held),
    }
    let shut = recorder.shutdown().await;
    drop(sender);
    let (records, log_bytes) = local::blocking(move || match writing.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
    .await?;
    shut.map_err(Error::Recorder)?;
    Ok(Recorded {
        generation,
        log,
        log_bytes,
        records,
        ended,
    })
}

/// A new log, or the one of this generation where recording went on before.
fn open_log(vm: &VmDir, path: &Path, generation: u64) -> Result<LogWriter> {
    let key = vm.store().log_key()?;
    if path.exists() {
        let (writer, _) = LogWriter::append_to(path, &key).map_err(Error::log(format!(
            "cannot continue the log {}",
            path.display()
        )))?;
        return Ok(writer);
    }
    let id = LogId {
        vm: vm.record()?.id.0,
        generation,
        base_position: 0,
    };
    LogWriter::create(path, &key, id).map_err(Error::log(format!(
        "cannot begin the log {}",
        path.display()
    )))
}

/// All that was recorded since a generation, as one log: where there are later generations,
/// each has a log of its own, and those follow in order; also those of generations that were
/// pruned since.
pub(crate) fn records_since(vm: &VmDir, from: u64) -> Result<Vec<Record>> {
    let key = vm.store().log_key()?;
    let id = vm.record()?.id;
    let mut records: Vec<Record> = Vec::new();
    for generation in vm.line()? {
        let path = vm.log_path(generation);
        if generation < from || !path.exists() {
            continue;
        }
        let log = Log::read(&path, &key).map_err(Error::log(format!(
            "cannot read the log {}",
            path.display()
        )))?;
        log.header
            .expect(&path, id.0, generation)
            .map_err(Error::log(format!(
                "{} is not what it should be",
                path.display()
            )))?;
        let offset = records.last().map_or(0, |last| last.at.micros);
        records.extend(log.records.into_iter().map(|mut record| {
            record.at.micros += offset;
            record
        }));
    }
    Ok(records)
}
