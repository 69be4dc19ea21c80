//! The conversation with a peer: typed messages over a line, its failures told in words, and how
//! fast the line to each peer was found to be.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::admission::Guarded;
use crate::error::{Error, Result};
use crate::exchange::Sent;
use crate::files;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::protocol::{ToSource, ToTarget};
use crate::store::Store;
use crate::transport::{self, CallError, Dial, Lasting, LineHandle, RateCap, Traffic, WireError};
use crate::vm::Id;

/// How long a call to a peer may take until both sides know each other.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// How long a line that was cut is called again, where nobody says otherwise.
pub(crate) const CALL_AGAIN: Duration = Duration::from_secs(120);

/// A conversation, from either side of it.
pub(crate) struct Conversation<In, Out> {
    carrier: Carrier<In, Out>,
    peer: Peer,
    stop: CancellationToken,
    revoked: CancellationToken,
    /// Watches the list of peers for as long as this lives, where this side began.
    _guarded: Option<Guarded>,
}

/// What carries it.
enum Carrier<In, Out> {
    /// Connections to another site.
    Lasting(Lasting),
    /// Nothing but this process.
    Local {
        to: mpsc::Sender<Result<Out, WireError>>,
        from: mpsc::Receiver<Result<In, WireError>>,
        handle: LineHandle,
    },
}

impl<In: DeserializeOwned, Out: Serialize> Carrier<In, Out> {
    async fn send(&mut self, message: Out) -> Result<(), WireError> {
        match self {
            Self::Lasting(lasting) => lasting.send(&message).await,
            Self::Local { to, .. } => to.send(Ok(message)).await.map_err(|_| WireError::Closed),
        }
    }

    async fn flush(&mut self) -> Result<(), WireError> {
        match self {
            Self::Lasting(lasting) => lasting.flush().await,
            Self::Local { .. } => Ok(()),
        }
    }

    async fn recv(&mut self) -> Result<In, WireError> {
        match self {
            Self::Lasting(lasting) => lasting.recv().await,
            Self::Local { from, .. } => from.recv().await.unwrap_or(Err(WireError::Closed)),
        }
    }

    fn handle(&self) -> LineHandle {
        match self {
            Self::Lasting(lasting) => lasting.handle(),
            Self::Local { handle, .. } => handle.clone(),
        }
    }
}

/// The source's side.
pub(crate) type Line = Conversation<ToSource, ToTarget>;

/// The target's side.
pub(crate) type TargetLine = Conversation<ToTarget, ToSource>;

impl Line {
    /// Calls a peer. A line that is cut later is called again by itself, for [`CALL_AGAIN`].
    pub(crate) async fn connect(store: &Store, peer: &Peer) -> Result<Self> {
        Self::connect_capped(store, peer, None).await
    }

    /// The same, where no more is sent than this, with whatever else shares it.
    pub(crate) async fn connect_capped(
        store: &Store,
        peer: &Peer,
        cap: Option<Arc<RateCap>>,
    ) -> Result<Self> {
        let guarded = Guarded::begin(&store.peers(), peer)?;
        let (name, traffic) = (Id::random()?.0, Traffic::capped(cap));
        let called = Lasting::call(dial(store, peer), name, CALL_AGAIN, traffic).await;
        let connection = called.map_err(|error| match error {
            CallError::Connect(error) => Error::Connect(error),
            CallError::Here(error) => *error,
        })?;
        Ok(Self {
            carrier: Carrier::Lasting(connection),
            peer: peer.clone(),
            stop: CancellationToken::new(),
            revoked: guarded.revoked.clone(),
            _guarded: Some(guarded),
        })
    }

    /// Queues a message. If the line has failed because the target gave up, its reason counts.
    pub(crate) async fn send(&mut self, message: ToTarget) -> Result<()> {
        match self.put(message).await {
            Err(error) => Err(self.reason(error).await),
            Ok(()) => Ok(()),
        }
    }

    /// Hands all that is queued to the kernel; errors as [`Self::send`]'s.
    pub(crate) async fn flush(&mut self) -> Result<()> {
        match self.push().await {
            Err(error) => Err(self.reason(error).await),
            Ok(()) => Ok(()),
        }
    }

    /// What the target said before it hung up, if it said why.
    async fn reason(&mut self, error: Error) -> Error {
        // Bounded: what was said before the end is here already, or will never come.
        const LIMIT: Duration = Duration::from_secs(1);
        while let Ok(Ok(message)) = tokio::time::timeout(LIMIT, self.receive(Phase::Ram)).await {
            if let Err(said) = self.refusal(message) {
                return said;
            }
        }
        error
    }

    /// The next message; what the target refuses or fails at is an error.
    pub(crate) async fn recv(&mut self, phase: Phase) -> Result<ToSource> {
        let message = self.receive(phase).await?;
        self.refusal(message)
    }

    fn refusal(&self, message: ToSource) -> Result<ToSource> {
        let site = || self.peer.name.to_string();
        match message {
            ToSource::Refused(reason) => Err(Error::PeerRefused {
                site: site(),
                reason: readable(&reason),
            }),
            ToSource::Failed { phase, reason } => Err(Error::PeerFailed {
                site: site(),
                phase,
                reason: readable(&reason),
            }),
            ToSource::Superseded { fence, chain } => Err(Error::Superseded {
                site: site(),
                fence,
                chain: Box::new(chain),
            }),
            ToSource::Replayed(mut summary) => {
                summary.diverged = summary.diverged.map(|why| readable(&why));
                Ok(ToSource::Replayed(summary))
            }
            ToSource::Verified(mut outcome) => {
                outcome.pages.retain(|(recipe, _)| is_recipe(recipe));
                outcome.pages.truncate(RECIPES);
                Ok(ToSource::Verified(outcome))
            }
            other => Ok(other),
        }
    }
}

impl TargetLine {
    /// Queues a message.
    pub(crate) async fn send(&mut self, message: ToSource) -> Result<()> {
        self.put(message).await
    }

    /// Hands all that is queued to the kernel.
    pub(crate) async fn flush(&mut self) -> Result<()> {
        self.push().await
    }

    /// Refuses a call before anything was said.
    pub(crate) async fn turn_away(mut self, why: &Error) {
        // Who does not take it is not waited for.
        const LIMIT: Duration = Duration::from_secs(2);
        let _ = tokio::time::timeout(LIMIT, async {
            let _ = self.send(ToSource::Refused(why.chain())).await;
            self.close().await;
        })
        .await;
    }
}

impl<In: DeserializeOwned, Out: Serialize> Conversation<In, Out> {
    /// A conversation that has begun; it ends when `stop` is cancelled, because this site ends, or
    /// `revoked`, because the peer is to be talked with no longer.
    pub(crate) fn over(
        connection: Lasting,
        peer: Peer,
        stop: CancellationToken,
        revoked: CancellationToken,
    ) -> Self {
        Self {
            carrier: Carrier::Lasting(connection),
            peer,
            stop,
            revoked,
            _guarded: None,
        }
    }

    /// One that crosses no line: what is said goes here, and what is heard comes from there, as if
    /// it were this peer's.
    pub(crate) fn local(
        peer: Peer,
        to: mpsc::Sender<Result<Out, WireError>>,
        from: mpsc::Receiver<Result<In, WireError>>,
    ) -> Self {
        let handle = LineHandle::of_nothing();
        Self {
            carrier: Carrier::Local { to, from, handle },
            peer,
            stop: CancellationToken::new(),
            revoked: CancellationToken::new(),
            _guarded: None,
        }
    }

    /// Whether it crosses no line.
    pub(crate) const fn is_local(&self) -> bool {
        matches!(self.carrier, Carrier::Local { .. })
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The counters of its sockets.
    pub(crate) fn traffic(&self) -> Traffic {
        self.carrier.handle().traffic()
    }

    /// Shows how the line is, and can end it.
    pub(crate) fn handle(&self) -> LineHandle {
        self.carrier.handle()
    }

    /// How long another line is waited for when this one is cut; with zero that is its end.
    pub(crate) fn set_patience(&mut self, patience: Duration) {
        if let Carrier::Lasting(lasting) = &mut self.carrier {
            lasting.set_patience(patience);
        }
    }

    /// Ends the conversation as a cut does: the other end keeps what it keeps then.
    pub(crate) fn abandon(self) {
        if let Carrier::Lasting(lasting) = self.carrier {
            lasting.abandon();
        }
    }

    async fn put(&mut self, message: Out) -> Result<()> {
        tokio::select! {
            biased;
            () = self.revoked.cancelled() => Err(revoked(&self.peer)),
            () = self.stop.cancelled() => Err(stopping()),
            sent = self.carrier.send(message) => Ok(sent.map_err(|e| wire(&self.peer, e))?),
        }
    }

    async fn push(&mut self) -> Result<()> {
        tokio::select! {
            biased;
            () = self.revoked.cancelled() => Err(revoked(&self.peer)),
            () = self.stop.cancelled() => Err(stopping()),
            sent = self.carrier.flush() => Ok(sent.map_err(|e| wire(&self.peer, e))?),
        }
    }

    /// The next message, whatever it says.
    pub(crate) async fn receive(&mut self, _phase: Phase) -> Result<In> {
        tokio::select! {
            biased;
            () = self.revoked.cancelled() => Err(revoked(&self.peer)),
            () = self.stop.cancelled() => Err(stopping()),
            message = self.carrier.recv() => Ok(message.map_err(|e| wire(&self.peer, e))?),
        }
    }

    /// An error for a message that has no place here.
    pub(crate) fn unexpected(&self, phase: Phase, what: impl Into<String>) -> Error {
        Error::Protocol {
            site: self.peer.name.to_string(),
            phase,
            what: what.into(),
        }
    }

    /// Ends the conversation; what can still go wrong then matters to nobody. One that is to end
    /// at once is hung up without a word.
    pub(crate) async fn close(self) {
        if self.revoked.is_cancelled() {
            return;
        }
        let Carrier::Lasting(lasting) = self.carrier else {
            return;
        };
        if let Err(error) = lasting.close().await {
            tracing::debug!(%error, "the connection did not end in order");
        }
    }
}

/// How a peer is called: where the list of sites has it by then.
fn dial(store: &Store, peer: &Peer) -> Dial {
    let (store, peer) = (store.clone(), peer.clone());
    Box::new(move |traffic| {
        let (store, peer) = (store.clone(), peer.clone());
        Box::pin(async move {
            let here = |error: Error| CallError::Here(Box::new(error));
            let identity = store.identity().map_err(here)?;
            let known = store.peers().by_key(&peer.key);
            let known = known.map_err(|error| here(error.into()))?.unwrap_or(peer);
            let called = transport::connect_counted(
                &known.addr,
                &identity,
                &known.key,
                CONNECT_LIMIT,
                traffic,
            );
            Ok(called.await?)
        })
    })
}

/// A peer's words, for a terminal: nothing that drives it or turns the order of what it shows
/// (UTR 36, section 2.5), and no more than one reads.
fn readable(said: &str) -> String {
    const LENGTH: usize = 2000;
    let hidden = |c: char| {
        matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}')
    };
    said.chars()
        .filter(|c| !c.is_control() && !hidden(*c))
        .take(LENGTH)
        .collect()
}

/// There are fewer recipes than this.
const RECIPES: usize = 64;

/// Whether this may name a recipe, for a report.
fn is_recipe(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    name.len() <= 40 && name.bytes().all(plain)
}

fn wire(peer: &Peer, source: WireError) -> Error {
    Error::Line {
        site: peer.name.to_string(),
        source,
    }
}

fn revoked(peer: &Peer) -> Error {
    Error::Revoked {
        site: peer.name.to_string(),
    }
}

fn stopping() -> Error {
    Error::Refused("this site's agent is stopping".into())
}

/// The best rate reached to each peer: what a short probe can't see on a long, fast line.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct LinkHistory {
    /// Bits per second, by address and key: the same site at another address is reached over
    /// another line.
    rates: BTreeMap<String, f64>,
}

impl LinkHistory {
    /// Transfers below this tell nothing about a line.
    const TELLING_BYTES: u64 = 1 << 20;

    pub(crate) fn load(store: &Store) -> Result<Self> {
        Ok(files::read_json(&store.root().join("links.json"))?.unwrap_or_default())
    }

    /// The rate to a peer, in bits per second.
    pub(crate) fn rate(&self, peer: &Peer) -> Option<f64> {
        self.rates.get(&Self::line_to(peer)).copied()
    }

    fn line_to(peer: &Peer) -> String {
        format!("{} {}", peer.addr, peer.key)
    }

    /// Keeps what the last transfer reached: lines change, so the newest counts.
    pub(crate) fn note(self, store: &Store, peer: &Peer, sent: &[Sent]) -> Result<()> {
        // What took no time was not timed.
        let sent = || sent.iter().filter(|image| image.seconds > 0.0);
        let bytes: u64 = sent().map(|image| image.payload).sum();
        let seconds: f64 = sent().map(|image| image.seconds).sum();
        self.reached(store, peer, bytes, seconds)
    }

    /// Keeps what so many bytes reached that took so long.
    pub(crate) fn reached(
        mut self,
        store: &Store,
        peer: &Peer,
        bytes: u64,
        seconds: f64,
    ) -> Result<()> {
        if bytes < Self::TELLING_BYTES || seconds <= 0.0 {
            return Ok(());
        }
        self.rates
            .insert(Self::line_to(peer), bytes as f64 * 8.0 / seconds);
        files::write_json(&store.root().join("links.json"), &self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_do_not_drive_the_terminal() {
        assert_eq!(readable("no\u{1b}[2J room\r\n"), "no[2J room");
        assert_eq!(readable("a\u{202e}b\u{2066}c\u{9b}1md é"), "abc1md é");
        assert!(readable(&"x".repeat(1 << 20)).len() < 4096);
        assert!(
            is_recipe("moved_from_disk") && !is_recipe("\u{1b}[2J") && !is_recipe(&"x".repeat(50))
        );
    }
}
