//! How other commands reach the process that follows a VM: over a socket in the VM's runtime
//! directory, one line of JSON a request, and lines of JSON back until the last word.
//!
//! That process holds the line, the twin and all that the target knows already, so it is the one
//! that moves the VM. Who asked hears the progress as if it did so itself, and hanging up calls
//! it off.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::MigrateOptions;
use crate::control_socket::{self, ControlSocket};
use crate::error::{Class, Error, Result};
use crate::identity::SiteKey;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::plan::Following;
use crate::progress::Progress;
use crate::report::MigrationReport;
use crate::store::VmDir;

/// How long a caller may take to say what it wants.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// How long a follower may take to say how far it is.
const TELL_LIMIT: Duration = Duration::from_secs(5);

/// How long a follower may take to let go.
const LEAVE_LIMIT: Duration = Duration::from_secs(30);

/// The longest line either side says.
const LINE: u64 = 1 << 20;

/// What is asked of a follower.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// Move the VM to the site where it is followed.
    Move {
        /// That site.
        to: SiteKey,
        /// Leave it paused there.
        paused: bool,
        /// Make the guest's free pages zero before.
        drop_free: bool,
        /// How long a line that is lost is called again, in seconds.
        give_up_after: u64,
    },
    /// Say how far it is; nothing changes.
    Tell,
    /// End.
    Leave,
}

/// What a follower says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Phase(Phase),
    Advance {
        phase: Phase,
        done: u64,
        total: Option<u64>,
    },
    Note(String),
    /// The last word: it has moved.
    Moved(Box<MigrationReport>),
    /// The last word: it has not, or is not known to have.
    Failed {
        class: Class,
        said: String,
    },
    /// The last word: where it follows, and how far it is.
    Follows {
        to: SiteKey,
        following: Following,
    },
    /// The last word: nobody follows any longer.
    Left,
}

fn path(vm: &VmDir) -> Result<PathBuf> {
    Ok(vm.runtime_dir("live")?.join("follow.sock"))
}

/// Where a follower is asked.
pub(super) struct Control(ControlSocket);

/// Somebody who asked, and waits.
pub(super) struct Caller {
    words: mpsc::UnboundedSender<Word>,
    writing: tokio::task::JoinHandle<()>,
    /// Cancelled when they hang up.
    pub(super) gone: CancellationToken,
}

impl Control {
    /// Listens; the caller holds the lock of who follows.
    pub(super) fn bind(vm: &VmDir) -> Result<Self> {
        ControlSocket::bind(path(vm)?).map(Self)
    }

    /// The next request. Loses nothing but a half-said request when dropped.
    pub(super) async fn asked(&self) -> Result<(Request, Caller)> {
        loop {
            let accepted = self.0.listener.accept().await;
            let (stream, _) = accepted.map_err(Error::file("accept on", &self.0.path))?;
            let asked = tokio::time::timeout(ASK_LIMIT, hear(stream)).await;
            match asked {
                Ok(Ok(asked)) => return Ok(asked),
                Ok(Err(error)) => tracing::warn!(%error, "a caller could not be understood"),
                Err(_) => tracing::warn!("a caller said nothing"),
            }
        }
    }
}

async fn hear(stream: UnixStream) -> io::Result<(Request, Caller)> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read.take(LINE));
    let mut line = String::new();
    read.read_line(&mut line).await?;
    let request = serde_json::from_str(&line)?;
    let gone = CancellationToken::new();
    let hung_up = gone.clone();
    tokio::spawn(async move {
        // They say nothing more: this ends when they hang up.
        let _ = read.read_line(&mut String::new()).await;
        hung_up.cancel();
    });
    let (words, mut said) = mpsc::unbounded_channel::<Word>();
    let writing = tokio::spawn(async move {
        while let Some(word) = said.recv().await {
            // Types of our own, without maps whose keys are no strings.
            let Ok(mut text) = serde_json::to_vec(&word) else {
                continue;
            };
            text.push(b'\n');
            if write.write_all(&text).await.is_err() {
                return;
            }
        }
    });
    Ok((
        request,
        Caller {
            words,
            writing,
            gone,
        },
    ))
}

impl Caller {
    /// Tells how it ended, and hangs up.
    pub(super) async fn end(self, outcome: &Result<Option<MigrationReport>>) {
        let _ = self.words.send(match outcome {
            Ok(Some(report)) => Word::Moved(Box::new(report.clone())),
            Ok(None) => Word::Left,
            Err(error) => Word::Failed {
                class: error.class(),
                said: error.chain(),
            },
        });
        drop(self.words);
        let _ = self.writing.await;
    }

    /// Tells how far it is, and hangs up.
    pub(super) async fn tell(self, peer: &Peer, following: Following) {
        let to = peer.key;
        let _ = self.words.send(Word::Follows { to, following });
        drop(self.words);
        let _ = self.writing.await;
    }
}

impl Progress for Caller {
    fn phase(&self, phase: Phase) {
        let _ = self.words.send(Word::Phase(phase));
    }

    fn advance(&self, phase: Phase, done: u64, total: Option<u64>) {
        let _ = self.words.send(Word::Advance { phase, done, total });
    }

    fn note(&self, text: &str) {
        let _ = self.words.send(Word::Note(text.to_owned()));
    }
}

/// Has the process that follows the VM move it; `None` if there is no such process.
pub(super) async fn move_followed(
    vm: &VmDir,
    peer: &Peer,
    options: &MigrateOptions,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Option<MigrationReport>> {
    let Some(stream) = call(vm).await? else {
        return Ok(None);
    };
    let request = Request::Move {
        to: peer.key,
        paused: options.paused,
        drop_free: options.drop_free,
        give_up_after: options.give_up_after.as_secs(),
    };
    match talk(vm, stream, &request, progress, cancel).await? {
        Word::Moved(report) => Ok(Some(*report)),
        Word::Failed { class, said } => Err(Error::Follower { class, said }),
        _ => Err(lost(vm)),
    }
}

/// How far the process is that follows the VM at this site; `None` if there is no such process.
///
/// # Errors
/// As moving it there would: it is followed at another site.
pub(super) async fn standing(vm: &VmDir, peer: &Peer) -> Result<Option<Following>> {
    let Some(stream) = call(vm).await? else {
        return Ok(None);
    };
    let never = CancellationToken::new();
    let told = talk(vm, stream, &Request::Tell, &crate::Silent, &never);
    match tokio::time::timeout(TELL_LIMIT, told).await {
        Ok(Ok(Word::Follows { to, following })) if to == peer.key => Ok(Some(following)),
        Ok(Ok(Word::Follows { following, .. })) => Err(elsewhere(vm, &following.site)),
        Ok(Err(error)) => Err(error),
        Ok(Ok(_)) => Err(lost(vm)),
        Err(_) => Err(Error::Refused(format!(
            "the process that follows {} still calls its site, or ships the stale copy; try \
             again when it follows",
            vm.name()
        ))),
    }
}

/// A VM that is followed at a site is not moved to another.
pub(super) fn elsewhere(vm: &VmDir, site: &str) -> Error {
    Error::Refused(format!(
        "{} is followed at {site}; end that `replay-migrate follow`, or move it there",
        vm.name()
    ))
}

/// Ends the process that follows the VM, if there is one.
pub(super) async fn stop_following(vm: &VmDir) -> Result<()> {
    let Some(stream) = call(vm).await? else {
        return Ok(());
    };
    let never = CancellationToken::new();
    let told = talk(vm, stream, &Request::Leave, &crate::Silent, &never);
    match tokio::time::timeout(LEAVE_LIMIT, told).await {
        Ok(word) => word.map(drop),
        Err(_) => Err(lost(vm)),
    }
}

async fn call(vm: &VmDir) -> Result<Option<UnixStream>> {
    control_socket::call(&path(vm)?, "reach who follows at").await
}

fn lost(vm: &VmDir) -> Error {
    Error::Refused(format!(
        "the process that follows {} does not answer; end it, then try again",
        vm.name()
    ))
}

/// Says what is wanted, and listens until the last word.
async fn talk(
    vm: &VmDir,
    stream: UnixStream,
    request: &Request,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Word> {
    let unheard = |_| lost(vm);
    let (read, mut write) = stream.into_split();
    let mut text = serde_json::to_vec(request).map_err(|_| lost(vm))?;
    text.push(b'\n');
    write.write_all(&text).await.map_err(unheard)?;
    let mut write = Some(write);
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        tokio::select! {
            heard = read.read_until(b'\n', &mut line) => {
                if heard.map_err(unheard)? == 0 {
                    return Err(lost(vm));
                }
            }
            // Hanging up calls it off; what comes of that is still heard.
            () = cancel.cancelled(), if write.is_some() => {
                write = None;
                continue;
            }
        }
        let word = serde_json::from_slice(&line).map_err(|_| lost(vm))?;
        line.clear();
        match word {
            Word::Phase(phase) => progress.phase(phase),
            Word::Advance { phase, done, total } => progress.advance(phase, done, total),
            Word::Note(text) => progress.note(&text),
            last => return Ok(last),
        }
    }
}
