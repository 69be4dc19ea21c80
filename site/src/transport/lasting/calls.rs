//! Both ends of a conversation find each other again: the caller calls until it is answered, the
//! called keeps what it has for a while.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::super::traffic::Traffic;
use super::super::{ConnectError, Connection, Limits, Receiver, Sender, WireError};
use super::pump::{Over, Record, carry};
use super::{Condition, End, Lasting, SILENCE, Shared};
use crate::error::chain_of;
use crate::identity::SiteKey;

/// Names a conversation among those of one caller.
pub(crate) type Name = [u8; 16];

/// Opens a connection to the other end, counted by these counters.
pub(crate) type Dial = Box<
    dyn Fn(Traffic) -> Pin<Box<dyn Future<Output = Result<Connection, CallError>> + Send>>
        + Send
        + Sync,
>;

/// Why a call failed, as far as that matters for another one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The line, or who answers.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Something at this site.
    #[error(transparent)]
    Here(Box<crate::error::Error>),
}

impl CallError {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Connect(error) if error.may_pass())
    }
}

/// Waits between calls: the first, and the longest. One call is made at once.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];

/// How long the other end may take to say where it is.
const ANSWER: Duration = Duration::from_secs(20);

impl Lasting {
    /// Calls; afterwards the line is called again by itself as often as it is cut, for as long as
    /// [`Lasting::set_patience`] says. `traffic` counts them all, and perhaps holds them to a rate.
    pub(crate) async fn call(
        dial: Dial,
        name: Name,
        patience: Duration,
        traffic: Traffic,
    ) -> Result<Self, CallError> {
        let (mut sender, mut receiver) = dial(traffic.clone()).await?.split();
        set_limits(&mut sender, &mut receiver);
        let shared = Shared::new(patience, traffic);
        let begun = sender.send(&Record::Begin { name }).await;
        let carried = shared.clone();
        tokio::spawn(async move {
            let first = match begun {
                Ok(()) => carry(&carried, sender, receiver, 0).await,
                Err(error) => Over::Cut(chain_of(&error)),
            };
            keep_calling(&carried, first, name, &dial).await;
        });
        Ok(Self::over(shared))
    }
}

/// What differs from messages' limits: somebody speaks all the time.
fn set_limits(sender: &mut Sender, receiver: &mut Receiver) {
    let limits = Limits::default();
    // What is to be sent may wait for a reader that is busy; its signs of life still come.
    sender.set_limits(limits);
    receiver.set_limits(Limits {
        idle: Some(SILENCE),
        ..limits
    });
}

async fn keep_calling(shared: &Arc<Shared>, first: Over, name: Name, dial: &Dial) {
    let mut over = first;
    let mut turn = 0;
    loop {
        let why = match over {
            Over::Done => return shared.end(End::Closed),
            Over::Cut(why) => why,
        };
        if !shared.went_down(turn, &why) {
            return;
        }
        tracing::warn!(why, "the line is lost; calling again");
        let mut condition = shared.condition.subscribe();
        let ended = condition.wait_for(|condition| *condition == Condition::Ended);
        let again = tokio::select! {
            again = call_again(shared, name, dial) => again,
            _ = ended => return,
        };
        match again {
            Ok((sender, receiver, next)) => {
                tracing::info!("the line is back");
                turn = next;
                over = carry(shared, sender, receiver, turn).await;
            }
            Err(end) => return shared.end(end),
        }
    }
}

/// Calls until somebody answers who knows of the conversation.
async fn call_again(
    shared: &Arc<Shared>,
    name: Name,
    dial: &Dial,
) -> Result<(Sender, Receiver, u64), End> {
    let begun = Instant::now();
    let mut wait = BACK_OFF[0];
    loop {
        let left = |shared: &Shared| shared.state().patience.saturating_sub(begun.elapsed());
        let tried = timeout(left(shared), resume(shared, name, dial)).await;
        let why = match tried {
            Ok(Ok(resumed)) => return Ok(resumed),
            Ok(Err(Failed::For(end))) => return Err(end),
            Ok(Err(Failed::Now(why))) => why,
            Err(_) => "nobody answers".to_owned(),
        };
        tracing::debug!(why, "the line could not be called");
        let left = left(shared);
        if left.is_zero() {
            return Err(End::Lost(begun.elapsed(), why));
        }
        tokio::time::sleep(wait.min(left)).await;
        wait = (wait * 2).min(BACK_OFF[1]);
    }
}

/// Why a call did not do.
enum Failed {
    /// The next may.
    Now(String),
    /// None will.
    For(End),
}

async fn resume(
    shared: &Arc<Shared>,
    name: Name,
    dial: &Dial,
) -> Result<(Sender, Receiver, u64), Failed> {
    let now = |error: &dyn std::error::Error| Failed::Now(chain_of(error));
    let connection = match dial(shared.traffic.clone()).await {
        Ok(connection) => connection,
        Err(error) if error.may_pass() => return Err(now(&error)),
        Err(error) => return Err(Failed::For(End::Lost(Duration::ZERO, chain_of(&error)))),
    };
    let (mut sender, mut receiver) = connection.split();
    set_limits(&mut sender, &mut receiver);
    let received = shared.state().received;
    let ask = async {
        sender.send(&Record::Resume { name, received }).await?;
        sender.flush().await?;
        receiver
            .recv_borrowed::<Record<'_>>()
            .await
            .map(|answer| match answer {
                Record::Resumed { received } => Ok(received),
                Record::Unknown => Err(End::Forgotten),
                _ => Err(End::Broken("no answer to the question how far it is")),
            })
    };
    match timeout(ANSWER, ask).await {
        Ok(Ok(Ok(arrived))) => match shared.come_up(arrived) {
            Some((turn, _)) => Ok((sender, receiver, turn)),
            None => Err(Failed::For(End::Broken("it has what was never sent"))),
        },
        Ok(Ok(Err(end))) => Err(Failed::For(end)),
        Ok(Err(error)) => Err(now(&error)),
        Err(_) => Err(now(&WireError::Silent(ANSWER))),
    }
}

/// The conversations that may be resumed at the called end, as long as somebody has them.
#[derive(Clone, Default)]
pub(crate) struct Conversations(Arc<Mutex<Known>>);

type Known = HashMap<(SiteKey, Name), Weak<Shared>>;

impl Conversations {
    /// Takes a connection in: the conversation that begins with it. Nothing, where it carries on
    /// one that began before, or begins none.
    pub(crate) async fn admit(&self, connection: Connection) -> Option<Lasting> {
        let (peer, traffic) = (connection.peer_key(), connection.traffic());
        let (mut sender, mut receiver) = connection.split();
        set_limits(&mut sender, &mut receiver);
        let first = match timeout(ANSWER, receiver.recv_borrowed::<Record<'_>>()).await {
            Ok(Ok(Record::Begin { name })) => Ok(name),
            Ok(Ok(Record::Resume { name, received })) => Err((name, received)),
            Ok(Ok(_)) => {
                tracing::warn!("a line was used that was not begun");
                return None;
            }
            Ok(Err(error)) => {
                tracing::warn!(error = chain_of(&error), "a caller said nothing");
                return None;
            }
            Err(_) => {
                tracing::warn!("a caller said nothing");
                return None;
            }
        };
        match first {
            Ok(name) => {
                let shared = Shared::new(Duration::ZERO, traffic);
                if !self.keep((peer, name), &shared) {
                    tracing::warn!("a line was begun twice");
                    return None;
                }
                tokio::spawn(serve(shared.clone(), sender, receiver, 0));
                Some(Lasting::over(shared))
            }
            Err((name, arrived)) => {
                let found = self.find(&(peer, name));
                let up = found.and_then(|shared| {
                    let (turn, received) = shared.come_up(arrived)?;
                    Some((shared, turn, received))
                });
                let Some((shared, turn, received)) = up else {
                    tracing::info!("a caller goes on with what nobody knows here");
                    if sender.send(&Record::Unknown).await.is_ok() {
                        let _ = sender.shutdown().await;
                        // Its end is waited for, so that the answer is not lost to a reset.
                        let _ = timeout(super::LAST_WORDS, receiver.recv::<()>()).await;
                    }
                    return None;
                };
                tracing::info!("the line is back");
                match sender.send(&Record::Resumed { received }).await {
                    Ok(()) => {
                        tokio::spawn(serve(shared, sender, receiver, turn));
                    }
                    Err(error) => {
                        let over = Over::Cut(chain_of(&error));
                        tokio::spawn(async move { wait(&shared, over, turn).await });
                    }
                }
                None
            }
        }
    }

    fn keep(&self, key: (SiteKey, Name), shared: &Arc<Shared>) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, known| known.strong_count() > 0);
        if all.contains_key(&key) {
            return false;
        }
        all.insert(key, Arc::downgrade(shared));
        true
    }

    fn find(&self, key: &(SiteKey, Name)) -> Option<Arc<Shared>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(key)?.upgrade()
    }
}

async fn serve(shared: Arc<Shared>, sender: Sender, receiver: Receiver, turn: u64) {
    let over = carry(&shared, sender, receiver, turn).await;
    wait(&shared, over, turn).await;
}

/// After a connection's end: waits for the next, which another task carries on, or for the end.
async fn wait(shared: &Shared, over: Over, turn: u64) {
    let why = match over {
        Over::Done => return shared.end(End::Closed),
        Over::Cut(why) => why,
    };
    if !shared.went_down(turn, &why) {
        return;
    }
    tracing::warn!(why, "the line is lost; waiting for another call");
    let mut condition = shared.condition.subscribe();
    let begun = Instant::now();
    loop {
        let patience = shared.state().patience;
        let left = patience.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return shared.end(End::Lost(begun.elapsed(), why));
        }
        let gone_on = condition.wait_for(|condition| !matches!(condition, Condition::Down { .. }));
        if timeout(left, gone_on).await.is_ok() {
            return;
        }
    }
}
