//! A conversation that outlives its connections: what was said is kept until the other end has
//! it, and after a cut both go on at the byte at which they were.
//!
//! Above lie the messages of [`super::framing`], which see one stream of bytes each way; below
//! lie connections that come and go, on which records travel: bytes, and how many have arrived.
//!
//! ```text
//! caller                                     called
//!   | -- Begin (name) --------------------------> |  once, then bytes both ways
//!   | <========= Data, Ack, both ways ==========> |
//!   |        ... the connection is cut ...        |
//!   | -- Resume (name, bytes received) ---------> |  on a new one
//!   | <------------- Resumed (bytes received) --- |  or Unknown: nobody waits for it here
//!   | <========= Data, Ack, both ways ==========> |  from there on: nothing is said twice
//!   | -- Farewell ------------------------------> |  no more bytes in this direction
//!   | -- HangUp --------------------------------> |  or: called off, as is
//! ```
//!
//! The idea is that of Eternal Terminal's and Mosh's sessions (eternalterminal.dev/howitworks).
//! Whoever proves the key that began a conversation may resume it; its name is no secret.
//!
//! Promises: bytes arrive once and in order, or the conversation ends. Both ends hold at most
//! [`WINDOW`] bytes that are not known to have arrived, and [`INBOX`] that nobody has read. A
//! connection on which nothing comes for [`SILENCE`] counts as cut.
//!
//! Not promised: that what was written has arrived; that a conversation survives either process.

mod calls;
mod pump;

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::ser::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, watch};

use super::traffic::Traffic;
use super::{FrameReader, FrameWriter, Limits, WireError};

pub(crate) use calls::{CallError, Conversations, Dial, Name};
#[cfg(test)]
pub(super) use pump::Record;

/// Bytes that may be on their way: more than any line that a desktop is moved over holds.
const WINDOW: usize = 8 << 20;

/// Bytes from which on nothing more is read from the connection until some are taken.
const INBOX: usize = 1 << 20;

/// So many bytes arrive before the other end is told so, while there is nothing else to say.
const ACK_EVERY: u64 = 256 << 10;

/// How often the other end hears something at least.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// A connection on which nothing was heard for so long carries nothing any more.
const SILENCE: Duration = Duration::from_secs(30);

/// How long a farewell may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How a conversation stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// A connection carries it.
    Up,
    /// None does.
    Down {
        /// Since then.
        since: Instant,
        /// Why the last one ended, or the last call failed.
        why: String,
    },
    /// It is over.
    Ended,
}

/// Why a conversation is over.
#[derive(Clone, Debug)]
enum End {
    /// Both have said what they had to say, or the other end has.
    Closed,
    /// The other end called it off.
    HungUp,
    /// The connection was lost, and this conversation is not one that waits for another.
    Cut,
    /// There was no other connection in time.
    Lost(Duration, String),
    /// The other end has lost its part.
    Forgotten,
    /// What came is nothing that this protocol has.
    Broken(&'static str),
}

impl End {
    fn into_error(self, otherwise: WireError) -> WireError {
        match self {
            Self::Closed => otherwise,
            Self::HungUp => WireError::HungUp,
            Self::Cut => WireError::Cut,
            Self::Lost(after, why) => WireError::Lost { after, why },
            Self::Forgotten => WireError::Forgotten,
            Self::Broken(what) => {
                WireError::Io(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()))
            }
        }
    }
}

/// One end of a conversation. Dropping it calls the conversation off.
#[derive(Debug)]
pub(crate) struct Lasting {
    sender: FrameWriter<Outlet>,
    receiver: FrameReader<Inlet>,
    handle: LineHandle,
    /// Nothing is to be said when it is dropped.
    quiet: bool,
}

/// Shows how a conversation stands, and can end it from elsewhere.
#[derive(Clone, Debug)]
pub(crate) struct LineHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There may be something to send.
    send: Notify,
    /// There may be room in the inbox.
    room: Notify,
    condition: watch::Sender<Condition>,
    traffic: Traffic,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that are not known to have arrived.
    out: VecDeque<u8>,
    /// How many have, before those.
    acked: u64,
    /// How many were handed to the connection, from the beginning on.
    sent: u64,
    /// How many were, though an earlier connection had been given them already.
    resent: u64,
    /// Bytes that came, and were not read.
    inbox: VecDeque<u8>,
    /// How many came.
    received: u64,
    /// How many the other end was told of.
    told: u64,
    /// Nothing is written any more; once all was sent, that is said.
    farewell: bool,
    farewell_said: bool,
    /// Called off here; that is to be said.
    hang_up: bool,
    /// The other end writes nothing any more.
    farewell_heard: bool,
    end: Option<End>,
    /// How long another connection is waited for.
    patience: Duration,
    /// Counts connections: one that was replaced may not go on.
    turn: u64,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()] {
            waker.into_iter().for_each(Waker::wake);
        }
    }
}

impl Shared {
    fn new(patience: Duration, traffic: Traffic) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                patience,
                ..State::default()
            }),
            send: Notify::new(),
            room: Notify::new(),
            condition: watch::Sender::new(Condition::Up),
            traffic,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of it is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the conversation, unless it has ended.
    fn end(&self, end: End) {
        self.end_locked(&mut self.state(), end);
    }

    fn end_locked(&self, state: &mut State, end: End) {
        if state.end.is_none() {
            state.end = Some(end);
        }
        state.wake();
        self.condition.send_replace(Condition::Ended);
        self.send.notify_waiters();
        self.room.notify_waiters();
    }

    /// A connection has ended. Whether another one is waited for.
    fn went_down(&self, turn: u64, why: &str) -> bool {
        let mut state = self.state();
        if state.turn != turn || state.end.is_some() {
            return false;
        }
        if state.farewell_heard {
            self.end_locked(&mut state, End::Closed);
        } else if state.hang_up || state.patience.is_zero() {
            self.end_locked(&mut state, End::Cut);
        } else {
            self.condition.send_replace(Condition::Down {
                since: Instant::now(),
                why: why.to_owned(),
            });
            return true;
        }
        false
    }

    /// Another connection carries it, at whose other end so many bytes have arrived. The
    /// connection's turn, and how many have arrived here.
    fn come_up(&self, arrived: u64) -> Option<(u64, u64)> {
        let mut state = self.state();
        let fresh = arrived.checked_sub(state.acked)?;
        if state.end.is_some() || arrived > state.sent {
            return None;
        }
        state.resent += state.sent - arrived;
        // Not more than were sent, and so not more than there are.
        state.out.drain(..fresh as usize);
        state.acked = arrived;
        state.sent = arrived;
        state.told = state.received;
        state.farewell_said = false;
        state.turn += 1;
        state.wake();
        self.condition.send_replace(Condition::Up);
        // The one before, should it not have noticed.
        self.send.notify_waiters();
        self.room.notify_waiters();
        Some((state.turn, state.received))
    }
}

impl LineHandle {
    /// Of a conversation that no connection carries, and none ever will.
    pub(crate) fn of_nothing() -> Self {
        Self(Shared::new(Duration::ZERO, Traffic::default()))
    }

    /// How the conversation stands, and what becomes of it.
    pub(crate) fn condition(&self) -> watch::Receiver<Condition> {
        self.0.condition.subscribe()
    }

    /// The counters of all its connections together.
    pub(crate) fn traffic(&self) -> Traffic {
        self.0.traffic.clone()
    }

    /// Waits until a connection carries it, or it is over.
    pub(crate) async fn up(&self) {
        let mut condition = self.condition();
        // Ends with an error only if there is nothing any more to wait for.
        let _ = condition
            .wait_for(|condition| !matches!(condition, Condition::Down { .. }))
            .await;
    }

    /// Whether no connection carries it, and it may still go on.
    pub(crate) fn is_down(&self) -> bool {
        matches!(*self.0.condition.borrow(), Condition::Down { .. })
    }

    /// Ends it without a word, as a cut does.
    pub(crate) fn cut(&self) {
        self.0.end(End::Cut);
    }

    /// Waits until the other end was told that it is over, if it can be.
    pub(crate) async fn ended(&self) {
        let mut condition = self.condition();
        let ended = condition.wait_for(|condition| *condition == Condition::Ended);
        // A line that is down is not waited for: nobody would hear.
        if !self.is_down() {
            let _ = tokio::time::timeout(2 * LAST_WORDS, ended).await;
        }
    }

    /// Bytes that were sent again because a connection was lost that had taken them, before TLS
    /// and records.
    pub(crate) fn resent(&self) -> u64 {
        self.0.state().resent
    }
}

impl Lasting {
    fn over(shared: Arc<Shared>) -> Self {
        let limits = Limits::default();
        let mut lasting = Self {
            sender: FrameWriter::new(Outlet(shared.clone()), limits),
            receiver: FrameReader::new(Inlet(shared.clone()), limits),
            handle: LineHandle(shared),
            quiet: false,
        };
        lasting.allow(lasting.patience());
        lasting
    }

    fn patience(&self) -> Duration {
        self.handle.0.state().patience
    }

    /// How long another connection is waited for when one is lost; with zero the conversation is
    /// over then.
    pub(crate) fn set_patience(&mut self, patience: Duration) {
        let shared = &self.handle.0;
        let mut state = shared.state();
        state.patience = patience;
        if patience.is_zero() && self.handle.is_down() {
            shared.end_locked(&mut state, End::Cut);
        }
        drop(state);
        self.allow(patience);
    }

    /// What one waits for may take as long as ever, and as long as no connection may be there.
    fn allow(&mut self, patience: Duration) {
        let limits = Limits::default();
        let limits = Limits {
            idle: limits.idle.map(|idle| idle + patience),
            ..limits
        };
        self.sender.set_limits(limits);
        self.receiver.set_limits(limits);
    }

    /// Shows how it stands.
    pub(crate) fn handle(&self) -> LineHandle {
        self.handle.clone()
    }

    /// As [`FrameWriter::send`].
    pub(crate) async fn send<T: Serialize + ?Sized>(
        &mut self,
        message: &T,
    ) -> Result<(), WireError> {
        let sent = self.sender.send(message).await;
        sent.map_err(|error| self.why(error))
    }

    /// As [`FrameWriter::flush`], but that the connection has it later.
    pub(crate) async fn flush(&mut self) -> Result<(), WireError> {
        let flushed = self.sender.flush().await;
        flushed.map_err(|error| self.why(error))
    }

    /// The next message. Flushes first, so that no question waits here for its own answer.
    pub(crate) async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, WireError> {
        self.flush().await?;
        let received = self.receiver.recv().await;
        received.map_err(|error| self.why(error))
    }

    /// Sends what is queued and says farewell; the other end reads [`WireError::Closed`].
    pub(crate) async fn close(mut self) -> Result<(), WireError> {
        self.flush().await?;
        self.quiet = true;
        self.handle.0.state().farewell = true;
        self.handle.0.send.notify_waiters();
        self.handle.ended().await;
        Ok(())
    }

    /// Ends it without a word: the other end can't tell it from a cut.
    pub(crate) fn abandon(mut self) {
        self.quiet = true;
        self.handle.cut();
    }

    /// The reason that is behind an error of the stream.
    fn why(&self, error: WireError) -> WireError {
        let end = self.handle.0.state().end.clone();
        match end {
            Some(end) => end.into_error(error),
            None => error,
        }
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        if self.quiet {
            return;
        }
        let shared = &self.handle.0;
        let mut state = shared.state();
        state.hang_up = true;
        if self.handle.is_down() {
            shared.end_locked(&mut state, End::Cut);
        }
        drop(state);
        shared.send.notify_waiters();
    }
}

/// Where messages are written.
#[derive(Debug)]
struct Outlet(Arc<Shared>);

impl AsyncWrite for Outlet {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.state();
        if state.end.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = WINDOW.saturating_sub(state.out.len()).min(bytes.len());
        if room == 0 && !bytes.is_empty() {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        state.out.extend(&bytes[..room]);
        drop(state);
        self.0.send.notify_waiters();
        Poll::Ready(Ok(room))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.state().farewell = true;
        self.0.send.notify_waiters();
        Poll::Ready(Ok(()))
    }
}

/// Where messages are read.
#[derive(Debug)]
struct Inlet(Arc<Shared>);

impl AsyncRead for Inlet {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.0.state();
        if state.inbox.is_empty() {
            return match &state.end {
                _ if state.farewell_heard => Poll::Ready(Ok(())),
                Some(End::Closed) => Poll::Ready(Ok(())),
                Some(_) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                None => {
                    state.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            };
        }
        let (first, _) = state.inbox.as_slices();
        let count = first.len().min(into.remaining());
        into.put_slice(&first[..count]);
        state.inbox.drain(..count);
        drop(state);
        self.0.room.notify_waiters();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
