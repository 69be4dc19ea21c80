//! The recorder's control socket, in the VM's runtime directory: how a migration in another process reaches it.
//!
//! One line a request (`flush`, `stop`, `pause`, `resume`, `tell`, `viewers`, `hold`), one line of JSON back. What it
//! answers to `flush` is on disk; once it has answered to `pause`, nothing that is typed gets into the log.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use recorder::{Clock, RecorderHandle};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use traces::GuestTime;

use super::Ended;
use super::begin::SinceCheckpoint;
use super::writer::ToWriter;
use crate::control_socket;
use crate::error::{Error, Result};
use crate::store::VmDir;

/// How long a recorder may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// What is typed waits for no longer, whatever it waits for.
const HOLD_LIMIT: Duration = Duration::from_secs(60);

/// The recorder's answer.
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

/// Where the socket is.
pub(super) fn path(vm: &VmDir) -> Result<PathBuf> {
    Ok(vm.runtime_dir("live")?.join("record.sock"))
}

/// What answers.
pub(super) struct Control<'a> {
    log: u64,
    writer: &'a mpsc::Sender<ToWriter>,
    clock: &'a SinceCheckpoint,
    recorder: &'a RecorderHandle,
}

impl<'a> Control<'a> {
    /// For a recorder whose log continues generation `log`.
    pub(super) fn new(
        log: u64,
        writer: &'a mpsc::Sender<ToWriter>,
        clock: &'a SinceCheckpoint,
        recorder: &'a RecorderHandle,
    ) -> Self {
        Self {
            log,
            writer,
            clock,
            recorder,
        }
    }

    /// Answers until it is told that the VM has moved.
    pub(super) async fn serve(&self, listener: &UnixListener) -> Result<Ended> {
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
            let answered = self.answer(stream, &mut paused);
            match tokio::time::timeout(LIMIT, answered).await {
                Ok(Ok(Some(ended))) => return Ok(ended),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "control socket"),
                Err(_) => tracing::warn!("a caller on the control socket said nothing"),
            }
        }
    }

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
    let path = path(vm)?;
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
    match tokio::time::timeout(LIMIT, talk).await {
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
