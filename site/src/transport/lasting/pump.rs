//! What carries a conversation over one connection, as long as that lasts.

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::super::{Receiver, Sender, WireError};
use super::{ACK_EVERY, End, HEARTBEAT, INBOX, LAST_WORDS, Name, Shared};

/// Bytes in one record: a cut loses no more than what was on its way, and part of one.
const RECORD: usize = 16 << 10;

/// What travels on a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::transport) enum Record<'a> {
    /// A new conversation. First on its first connection.
    Begin { name: Name },
    /// One goes on, of which so many bytes have arrived here. First on every other connection.
    Resume { name: Name, received: u64 },
    /// The answer: so many have arrived there.
    Resumed { received: u64 },
    /// The answer where there is none of that name.
    Unknown,
    /// The next bytes.
    Data(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// So many bytes have arrived since the beginning.
    Ack(u64),
    /// No more bytes will come.
    Farewell,
    /// Nobody wants to go on.
    HangUp,
}

/// How a connection's time ended.
pub(super) enum Over {
    /// The conversation is over.
    Done,
    /// The connection is.
    Cut(String),
}

/// What is to be said next.
enum Next {
    Data(Vec<u8>),
    Ack(u64),
    Farewell,
    HangUp,
    /// Nothing, for now.
    Wait,
    /// Nothing on this connection.
    Stop,
}

/// Carries what there is to carry until the connection or the conversation ends.
pub(super) async fn carry(
    shared: &Shared,
    mut sender: Sender,
    mut receiver: Receiver,
    turn: u64,
) -> Over {
    let talk = talk(shared, &mut sender, turn);
    let hear = hear(shared, &mut receiver, turn);
    tokio::pin!(talk, hear);
    let ended = tokio::select! {
        said = &mut talk => match said {
            Ok(()) => {
                // Who hangs up with something unread resets the connection, and what was said
                // last may never be heard (RFC 2525 section 2.17).
                let _ = timeout(LAST_WORDS, &mut hear).await;
                Ok(())
            }
            Err(error) => Err(error),
        },
        heard = &mut hear => heard,
    };
    match ended {
        Ok(()) => Over::Done,
        Err(error) => Over::Cut(crate::error::chain_of(&error)),
    }
}

async fn talk(shared: &Shared, sender: &mut Sender, turn: u64) -> Result<(), WireError> {
    loop {
        let woken = shared.send.notified();
        tokio::pin!(woken);
        // Before looking: nothing that is written in between is missed.
        woken.as_mut().enable();
        match shared.next(turn) {
            Next::Data(bytes) => sender.send(&Record::Data(&bytes)).await?,
            Next::Ack(received) => sender.send(&Record::Ack(received)).await?,
            Next::Farewell => {
                sender.send(&Record::Farewell).await?;
                return sender.shutdown().await;
            }
            Next::HangUp => {
                sender.send(&Record::HangUp).await?;
                return sender.shutdown().await;
            }
            Next::Stop => return Err(WireError::Cut),
            Next::Wait => {
                sender.flush().await?;
                if timeout(HEARTBEAT, woken).await.is_err() {
                    let received = shared.told_all();
                    sender.send(&Record::Ack(received)).await?;
                    sender.flush().await?;
                }
            }
        }
    }
}

async fn hear(shared: &Shared, receiver: &mut Receiver, turn: u64) -> Result<(), WireError> {
    loop {
        let heard = match receiver.recv_borrowed::<Record<'_>>().await {
            Ok(Record::Data(bytes)) => shared.take_in(turn, bytes),
            Ok(Record::Ack(arrived)) => shared.acknowledged(turn, arrived),
            Ok(Record::Farewell) => {
                let mut state = shared.state();
                state.farewell_heard = true;
                state.wake();
                Ok(())
            }
            Ok(Record::HangUp) => {
                shared.end(End::HungUp);
                return Ok(());
            }
            Ok(_) => Err("a line was begun where it had begun"),
            Err(WireError::Closed) if shared.state().farewell_heard => return Ok(()),
            Err(error) if error.is_disconnect() || matches!(error, WireError::Io(_)) => {
                return Err(error);
            }
            Err(error) => {
                tracing::warn!(%error, "a record can't be read");
                Err("a record can't be read")
            }
        };
        if let Err(what) = heard {
            shared.end(End::Broken(what));
            return Ok(());
        }
        shared.wait_for_room(turn).await;
    }
}

impl Shared {
    fn next(&self, turn: u64) -> Next {
        let mut state = self.state();
        if state.turn != turn || state.end.is_some() {
            return Next::Stop;
        }
        // Never beyond what there is: both count from the same beginning.
        let at = (state.sent - state.acked) as usize;
        if state.hang_up && state.out.len() - at > RECORD {
            return Next::HangUp;
        }
        if state.received - state.told >= ACK_EVERY {
            state.told = state.received;
            return Next::Ack(state.received);
        }
        let count = (state.out.len() - at).min(RECORD);
        if count > 0 {
            let (first, second) = state.out.as_slices();
            let here = first.get(at..).unwrap_or_default();
            let mut bytes = here[..here.len().min(count)].to_vec();
            // What is not in the one is in the other.
            let from = at.saturating_sub(first.len());
            bytes.extend_from_slice(&second[from..from + count - bytes.len()]);
            state.sent += count as u64;
            return Next::Data(bytes);
        }
        if state.hang_up {
            return Next::HangUp;
        }
        if state.farewell && !state.farewell_said {
            state.farewell_said = true;
            return Next::Farewell;
        }
        Next::Wait
    }

    fn told_all(&self) -> u64 {
        let mut state = self.state();
        state.told = state.received;
        state.received
    }

    fn take_in(&self, turn: u64, bytes: &[u8]) -> Result<(), &'static str> {
        let mut state = self.state();
        if state.turn != turn || state.end.is_some() {
            return Ok(());
        }
        if state.farewell_heard {
            return Err("bytes after a farewell");
        }
        state.inbox.extend(bytes);
        state.received += bytes.len() as u64;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        let due = state.received - state.told >= ACK_EVERY;
        drop(state);
        if due {
            self.send.notify_waiters();
        }
        Ok(())
    }

    fn acknowledged(&self, turn: u64, arrived: u64) -> Result<(), &'static str> {
        let mut state = self.state();
        if state.turn != turn {
            return Ok(());
        }
        let Some(fresh) = arrived.checked_sub(state.acked) else {
            return Err("less has arrived than before");
        };
        if arrived > state.sent {
            return Err("more has arrived than was sent");
        }
        state.out.drain(..fresh as usize);
        state.acked = arrived;
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
        Ok(())
    }

    /// Waits until somebody has read enough of what came.
    async fn wait_for_room(&self, turn: u64) {
        loop {
            let woken = self.room.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            {
                let state = self.state();
                if state.inbox.len() < INBOX || state.end.is_some() || state.turn != turn {
                    return;
                }
            }
            woken.await;
        }
    }
}
