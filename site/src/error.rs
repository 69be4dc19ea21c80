//! What can go wrong at a site, for the person who has to do something about it.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::phase::Phase;

/// Anything the site's own code can fail with.
///
/// The text says what failed and on what; the cause is chained as the source and not repeated.
/// [`Error::class`] tells whether anything was changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder of the state directory could not be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of the state directory holds something else than it should.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Refused before anything was changed.
    #[error("{0}")]
    Refused(String),
    /// What lies here is encrypted, and the kernel has not got the key.
    #[error(
        "{} is encrypted and locked, and its key {} {why}: put the right one there, or say with \
         --keys where this site's keys are",
        dir.display(), key.display()
    )]
    Locked {
        /// The folder.
        dir: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong with it, as in "is not there".
        why: String,
    },
    /// The other site refused before anything was changed.
    #[error("{site} refused: {reason}")]
    PeerRefused {
        /// Its name here.
        site: String,
        /// What it said.
        reason: String,
    },
    /// The VM was taken over by the other site.
    #[error(
        "the VM was taken over by {site}, under number {fence}: what is here is of the past, and \
         does not run any more"
    )]
    Superseded {
        /// Its name here.
        site: String,
        /// Its fencing number.
        fence: u64,
        /// How it came to it.
        chain: Box<Chain>,
    },
    /// The other site gave up during a phase.
    #[error("{site} failed in phase {phase}: {reason}")]
    PeerFailed {
        /// Its name here.
        site: String,
        /// During which phase.
        phase: Phase,
        /// What it said.
        reason: String,
    },
    /// The other site said something that the protocol has no place for.
    #[error("{site} broke the protocol in phase {phase}: {what}")]
    Protocol {
        /// Its name here.
        site: String,
        /// During which phase.
        phase: Phase,
        /// What came.
        what: String,
    },
    /// The peer is not to be talked with any more.
    #[error(
        "the line to {site} was cut here: this site trusts it no longer, or with less than before \
         (`replay-migrate site list` shows what it may do)"
    )]
    Revoked {
        /// Its name here.
        site: String,
    },
    /// A migration failed; the source VM is as it was.
    #[error("phase {phase} failed")]
    Phase {
        /// Which.
        phase: Phase,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// Interrupted by the user; the source VM is as it was.
    #[error("interrupted in phase {0}; {then}", then = after_interrupt(*.0))]
    Interrupted(Phase),
    /// The line was lost while the guest stood still, and did not come back soon.
    #[error(
        "the line to {site} was lost, and {vm} stood still for {} s without it",
        waited.as_secs()
    )]
    StoodStill {
        /// The VM.
        vm: String,
        /// The target.
        site: String,
        /// How long the line was waited for.
        waited: std::time::Duration,
    },
    /// The line was lost for too long; the source VM is as it was, and the target keeps what it
    /// has for a while.
    #[error(
        "the line to {site} was lost and did not come back within {seconds} s; {vm} goes on here. \
         {site} keeps what it has for some minutes: the same command goes on with that"
    )]
    GaveUp {
        /// The VM.
        vm: String,
        /// The target.
        site: String,
        /// How long it was tried.
        seconds: u64,
        /// What happened last.
        #[source]
        source: Box<Error>,
    },
    /// The VM was handed over, but it is not known to run at the target.
    #[error(
        "{vm} belongs to {site} now, but did not go on there or could not say so: if the agent there \
         was cut off, it goes on with it as soon as it serves again. Look there with \
         `replay-migrate vm status {vm}`, and if it stays stopped, `vm start` it"
    )]
    NotResumed {
        /// The VM.
        vm: String,
        /// The site that owns it now.
        site: String,
        /// What went wrong.
        #[source]
        source: Box<Error>,
    },
    /// Who owns the VM could not be found out.
    #[error(
        "the hand-over of {vm} to {site} was cut off at its last step, and whose it is can't be \
         settled now; {vm} stays stopped here until it is: the agent asks {site}, and so does the \
         same command"
    )]
    InDoubt {
        /// The VM.
        vm: String,
        /// The site that may own it now.
        site: String,
        /// Why it could not be asked.
        #[source]
        source: Option<Box<Error>>,
    },
    /// QEMU or the host.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: vm_host::Error,
    },
    /// The line to a peer could not be opened.
    #[error(transparent)]
    Connect(#[from] crate::transport::ConnectError),
    /// This site's agent could not begin to listen.
    #[error(transparent)]
    Listen(#[from] crate::transport::ListenError),
    /// The line to a peer failed.
    #[error("the line to {site} failed")]
    Line {
        /// Its name here.
        site: String,
        /// How.
        #[source]
        source: crate::transport::WireError,
    },
    /// Keys and identity.
    #[error(transparent)]
    Identity(#[from] crate::identity::IdentityError),
    /// A site's key that can't be one.
    #[error(transparent)]
    Key(#[from] crate::identity::ParseKeyError),
    /// The list of peers.
    #[error(transparent)]
    Peers(#[from] crate::peers::PeerError),
    /// The interaction log.
    #[error("{what}")]
    Log {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: traces::Error,
    },
    /// Reconciling an image.
    #[error("{what}")]
    Reconcile {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: reconciler::Error,
    },
    /// What came by way of a hub.
    #[error("a parcel can't be used: {why}")]
    Parcel {
        /// Why not.
        why: String,
    },
    /// What the process that follows the VM said.
    #[error("{said}")]
    Follower {
        /// What it means.
        class: Class,
        /// Its words.
        said: String,
    },
    /// Replaying the log.
    #[error("the replay failed")]
    Replay(#[source] replayer::Error),
    /// Watching the screen of a fork.
    #[error("the screen of a replaying fork can't be watched")]
    Screen {
        /// Why not.
        #[source]
        source: vm_host::screen::ScreenError,
    },
    /// The recorder.
    #[error("recording failed")]
    Recorder(#[source] recorder::RecorderError),
}

/// What an error means for the caller; the command line's exit codes follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Something failed on the way.
    Failed,
    /// Refused before anything changed.
    Refused,
    /// Stopped on the way; the same command goes on or starts again.
    Interrupted,
}

/// What is left after an interruption in `phase`, and what to do.
const fn after_interrupt(phase: Phase) -> &'static str {
    match phase {
        Phase::Rest => "what has come stays, and the same command goes on with it",
        _ => "the VM goes on here, and the same command starts again",
    }
}

impl Error {
    /// Which class this error belongs to.
    pub fn class(&self) -> Class {
        match self {
            Self::Refused(_)
            | Self::Locked { .. }
            | Self::PeerRefused { .. }
            | Self::Superseded { .. }
            | Self::Identity(_)
            | Self::Key(_)
            | Self::Connect(_)
            | Self::Listen(_)
            | Self::Peers(_)
            // Programs are looked for before they are needed.
            | Self::Host {
                source: vm_host::Error::MissingProgram { .. },
                ..
            }
            | Self::Phase {
                phase: Phase::Hello | Phase::Plan,
                ..
            } => Class::Refused,
            Self::Interrupted(_) | Self::InDoubt { .. } | Self::GaveUp { .. } => {
                Class::Interrupted
            }
            Self::Follower { class, .. } => *class,
            Self::Phase { source, .. } => source.class(),
            _ => Class::Failed,
        }
    }

    /// Whether the line was lost, and nothing else went wrong.
    pub(crate) fn is_disconnect(&self) -> bool {
        match self {
            Self::Line { source, .. } => source.is_disconnect(),
            Self::Phase { source, .. } => source.is_disconnect(),
            _ => false,
        }
    }

    /// The number under which another site has taken the VM over, if that is what went wrong, and
    /// how it came to it.
    pub(crate) fn superseded(&self) -> Option<(u64, &Chain)> {
        match self {
            Self::Superseded { fence, chain, .. } => Some((*fence, chain)),
            Self::Phase { source, .. } => source.superseded(),
            _ => None,
        }
    }

    /// Whether another attempt may succeed where this one has not: the line was lost, or the other
    /// site has lost its part.
    pub(crate) fn may_go_better(&self) -> bool {
        match self {
            Self::Line { .. } => self.is_disconnect() && !self.is_called_off(),
            Self::Connect(error) => error.may_pass(),
            Self::StoodStill { .. } => true,
            Self::Phase { source, .. } => source.may_go_better(),
            _ => false,
        }
    }

    /// How long the line had been waited for when this error was made.
    pub(crate) fn waited(&self) -> std::time::Duration {
        match self {
            Self::Line {
                source: crate::transport::WireError::Lost { after, .. },
                ..
            } => *after,
            Self::StoodStill { waited, .. } => *waited,
            Self::Phase { source, .. } => source.waited(),
            _ => std::time::Duration::ZERO,
        }
    }

    /// Whether the other side ended it on purpose.
    pub(crate) fn is_called_off(&self) -> bool {
        use crate::transport::WireError::{Closed, HungUp};
        match self {
            Self::Line { source, .. } => matches!(source, Closed | HungUp),
            Self::Phase { source, .. } => source.is_called_off(),
            _ => false,
        }
    }

    /// The error with its chain of causes on one line, as it is sent to a peer or shown.
    pub fn chain(&self) -> String {
        chain_of(self)
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(vm_host::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }

    pub(crate) fn log(what: impl Into<String>) -> impl FnOnce(traces::Error) -> Self {
        let what = what.into();
        move |source| Self::Log { what, source }
    }

    pub(crate) fn reconcile(what: impl Into<String>) -> impl FnOnce(reconciler::Error) -> Self {
        let what = what.into();
        move |source| Self::Reconcile { what, source }
    }
}

/// An error with its chain of causes on one line.
pub fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

/// Result of the site's own code.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;
