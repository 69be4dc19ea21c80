//! Recording a VM: a checkpoint, the recording proxy, and the log it writes.
//!
//! The recorder is a process of its own. A migration in another process reaches it over a
//! control socket in the VM's runtime directory: one line a request (`flush`, `stop`, `pause`,
//! `resume`, `tell`, `viewers`, `hold`), one line of JSON back. What it answers to `flush` is on disk; once it has
//! answered to `pause`, nothing that is typed gets into the log.

mod begin;
pub(crate) mod stretch;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use recorder::{Clock, Listen, RecordSink, RecorderHandle, SinkClosed};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use traces::{GuestTime, Log, LogId, LogWriter, Record};

use crate::chance;
use crate::control_socket::{self, ControlSocket};
use crate::error::{Error, Result};
use crate::local;
use crate::store::VmDir;
use begin::{Begun, SinceCheckpoint, begin};
use writer::{FLUSH_EVERY, ToWriter};

/// How long a recorder may take to answer on its control socket.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);

/// What is typed waits for no longer, whatever it waits for.
const HOLD_LIMIT: Duration = Duration::from_secs(60);

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

/// The recorder's answer on its control socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// What was recorded is on disk.
    Flushed {
        /// The guest time since the checkpoint, in microseconds.
        at: u64,
    },
    Stopping,
    /// Whether it logs, from here on.
    Logs {
        paused: bool,
        /// The guest time since the checkpoint, in microseconds.
        at: u64,
    },
    Viewers(Viewers),
    /// What is typed waits until the caller hangs up.
    Held(Option<Position>),
    Failed(String),
}

/// A moment of what is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// The log, by the generation that it continues.
    pub(crate) log: u64,
    /// The guest time since that generation, in microseconds.
    pub(crate) at: u64,
}

/// Who looks on through a recorder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Viewers {
    /// How many do now.
    pub(crate) now: usize,
    /// How many have come since it began.
    pub(crate) admitted: u64,
    /// How often keys were pressed since with which a desktop is locked.
    #[serde(default)]
    pub(crate) locks: u64,
}

/// Whether what is typed gets into the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Logging {
    /// It does not; it reaches the guest all the same.
    pub paused: bool,
    /// Since when, or when it was asked, in microseconds of guest time since the log began.
    pub at: u64,
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
    let socket = ControlSocket::bind(control_path(vm)?)?;
    let control = Control {
        log: generation,
        writer: &sender,
        clock: &clock,
        recorder: &recorder,
    };
    begun(&Recording {
        generation,
        listening: recorder.local_addr().to_string(),
        log: log.clone(),
    });
    let ended = tokio::select! {
        () = stop => Ended::Stopped,
        ended = serve_control(&socket.listener, &control) => ended?,
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

fn control_path(vm: &VmDir) -> Result<PathBuf> {
    Ok(vm.runtime_dir("live")?.join("record.sock"))
}

/// What answers on the control socket.
struct Control<'a> {
    log: u64,
    writer: &'a mpsc::Sender<ToWriter>,
    clock: &'a SinceCheckpoint,
    recorder: &'a RecorderHandle,
}

async fn serve_control(listener: &UnixListener, control: &Control<'_>) -> Result<Ended> {
    let mut paused = false;
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(source) => {
                return Err(Error::File {
                    action: "accept on",
                    path: "the control socket".into(),
                    source,
                });
            }
        };
        // One after the other: an answer takes no time, and the next caller waits for it.
        let answered = control.answer(stream, &mut paused);
        match tokio::time::timeout(CONTROL_LIMIT, answered).await {
            Ok(Ok(Some(ended))) => return Ok(ended),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "control socket"),
            Err(_) => tracing::warn!("a caller on the control socket said nothing"),
        }
    }
}

impl Control<'_> {
    async fn answer(&self, stream: UnixStream, paused: &mut bool) -> io::Result<Option<Ended>> {
        let Self {
            log,
            writer,
            clock,
            recorder,
        } = self;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        tokio::io::AsyncReadExt::take(&mut stream, 64)
            .read_line(&mut line)
            .await?;
        let (answer, ended) = match line.trim() {
            "flush" => {
                // What happens from here on may be missing; what happened before is not.
                let at = clock.now().micros;
                let (sender, receiver) = oneshot::channel();
                let _ = writer.send(ToWriter::Flush(sender));
                match receiver.await {
                    Ok(Ok(())) => (Answer::Flushed { at }, None),
                    Ok(Err(error)) => (Answer::Failed(error.chain()), None),
                    Err(_) => (
                        Answer::Failed("the log can't be written any more".into()),
                        None,
                    ),
                }
            }
            "stop" => (Answer::Stopping, Some(Ended::Moved)),
            word @ ("pause" | "resume" | "tell") => {
                match word {
                    "pause" => recorder.pause(),
                    "resume" => recorder.resume(),
                    _ => {}
                }
                if word != "tell" {
                    *paused = word == "pause";
                }
                let (paused, at) = (*paused, clock.now().micros);
                (Answer::Logs { paused, at }, None)
            }
            "viewers" => {
                let recorded = recorder.statistics();
                let viewers = Viewers {
                    now: recorded.viewers,
                    admitted: recorded.admitted,
                    locks: recorded.locks,
                };
                (Answer::Viewers(viewers), None)
            }
            "hold" => {
                let held = recorder.hold().await;
                let (log, at) = (*log, clock.now().micros);
                let position = (!*paused).then_some(Position { log, at });
                say(&mut stream, &Answer::Held(position)).await?;
                tokio::spawn(async move {
                    // Nothing is said: the end is waited for.
                    let mut rest = [0; 1];
                    let hung_up = tokio::io::AsyncReadExt::read(&mut stream, &mut rest);
                    let _ = tokio::time::timeout(HOLD_LIMIT, hung_up).await;
                    drop(held);
                });
                return Ok(None);
            }
            _ => (
                Answer::Failed("say flush, stop, pause, resume, tell, viewers or hold".into()),
                None,
            ),
        };
        say(&mut stream, &answer).await?;
        Ok(ended)
    }
}

async fn say(stream: &mut BufReader<UnixStream>, answer: &Answer) -> io::Result<()> {
    let mut text = serde_json::to_string(answer)?;
    text.push('\n');
    stream.get_mut().write_all(text.as_bytes()).await
}

/// Asks the recorder of a VM, if there is one.
async fn ask(vm: &VmDir, request: &str) -> Result<Option<Answer>> {
    let asked = ask_and_stay(vm, request).await?;
    Ok(asked.map(|(answer, _)| answer))
}

/// The same; it is hung up when what comes with the answer is dropped.
async fn ask_and_stay(
    vm: &VmDir,
    request: &str,
) -> Result<Option<(Answer, BufReader<UnixStream>)>> {
    let path = control_path(vm)?;
    let Some(stream) = control_socket::call(&path, "reach the recorder at").await? else {
        return Ok(None);
    };
    let talk = async {
        let mut stream = BufReader::new(stream);
        stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .await?;
        let mut line = String::new();
        tokio::io::AsyncReadExt::take(&mut stream, 4096)
            .read_line(&mut line)
            .await?;
        Ok((serde_json::from_str(&line)?, stream))
    };
    match tokio::time::timeout(CONTROL_LIMIT, talk).await {
        Ok(result) => result
            .map(Some)
            .map_err(Error::file("talk to the recorder at", &path)),
        Err(_) => Err(Error::Refused(format!(
            "the recorder of {} does not answer; end its process, then try again",
            vm.name()
        ))),
    }
}

/// Has the recorder write what it has, and says what guest time it is; without a recorder there
/// is nothing to do.
pub(crate) async fn flush(vm: &VmDir) -> Result<Option<GuestTime>> {
    match ask(vm, "flush").await? {
        None => Ok(None),
        Some(Answer::Flushed { at }) => Ok(Some(GuestTime { micros: at })),
        Some(other) => Err(other.refusal(vm)),
    }
}

impl Answer {
    /// What it means where something else was asked for.
    fn refusal(&self, vm: &VmDir) -> Error {
        Error::Refused(match self {
            Self::Failed(reason) => format!("the recorder of {} failed: {reason}", vm.name()),
            _ => format!("the recorder of {} is just stopping; try again", vm.name()),
        })
    }
}

/// Has the recorder log nothing of what is typed and pointed at from now on, or go on. It reaches
/// the guest all the same; the log notes the gap. To do so once more changes nothing.
///
/// # Errors
/// When the VM is not being recorded.
pub async fn set_paused(vm: &VmDir, paused: bool) -> Result<Logging> {
    let word = if paused { "pause" } else { "resume" };
    match ask(vm, word).await? {
        Some(Answer::Logs { paused, at }) => Ok(Logging { paused, at }),
        Some(other) => Err(other.refusal(vm)),
        None => Err(Error::Refused(format!(
            "{0} is not being recorded; `replay-migrate record {0}` begins to",
            vm.name()
        ))),
    }
}

/// Whether what is typed gets into a log; `None` if nobody records the VM, or does not answer.
pub(crate) async fn logging(vm: &VmDir) -> Option<Logging> {
    match ask(vm, "tell").await {
        Ok(Some(Answer::Logs { paused, at })) => Some(Logging { paused, at }),
        _ => None,
    }
}

/// How many look on through the recorder; `None` if nobody records the VM, or does not answer.
pub(crate) async fn viewers(vm: &VmDir) -> Option<Viewers> {
    match ask(vm, "viewers").await {
        Ok(Some(Answer::Viewers(viewers))) => Some(viewers),
        _ => None,
    }
}

/// What is typed and pointed at through the recorder waits until this is dropped.
pub(crate) struct HeldInput {
    /// From when on; none where nothing is logged.
    pub(crate) position: Option<Position>,
    _hung_up_then: BufReader<UnixStream>,
}

/// Has what is typed wait: QEMU would lose what it gets while the guest stands still. `None` if nobody
/// records the VM; one that does not answer holds up nobody.
pub(crate) async fn hold(vm: &VmDir) -> Option<HeldInput> {
    match ask_and_stay(vm, "hold").await {
        Ok(Some((Answer::Held(position), stream))) => Some(HeldInput {
            position,
            _hung_up_then: stream,
        }),
        Ok(None) => None,
        Ok(Some(_)) | Err(_) => {
            tracing::warn!(vm = %vm.name(), "the recorder holds nothing back: keys may be lost");
            None
        }
    }
}

/// Tells the recorder that the VM has moved.
pub(crate) async fn moved(vm: &VmDir) -> Result<()> {
    ask(vm, "stop").await.map(drop)
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
