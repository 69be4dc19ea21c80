//! The line that is played.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::chain::Link;
use crate::error::Error;
use crate::protocol::Hello;

#[derive(Clone, Debug)]
pub(super) enum Said {
    Hello(Box<Hello>),
    Welcome,
    Refused,
    Commit { fence: u64, link: Link },
    Committed,
    Settled { taken: bool },
}

/// A connection. Each end learns of its loss by itself.
#[derive(Default)]
pub(super) struct Wire {
    pub(super) up: VecDeque<Said>,
    pub(super) down: VecDeque<Said>,
    pub(super) giver_lost: bool,
    pub(super) taker_lost: bool,
}

#[derive(Clone)]
pub(super) struct End {
    pub(super) wire: Rc<RefCell<Wire>>,
    pub(super) giver: bool,
}

pub(super) struct Lost;

impl From<Lost> for Error {
    fn from(Lost: Lost) -> Self {
        Self::Refused("the line is lost".into())
    }
}

impl End {
    /// Waits a step before, so that who sends can die with the message unsent.
    pub(super) async fn send(&self, said: Said) -> Result<(), Lost> {
        Pause(false).await;
        let mut wire = self.wire.borrow_mut();
        let (lost, queue) = if self.giver {
            (wire.giver_lost, &mut wire.up)
        } else {
            (wire.taker_lost, &mut wire.down)
        };
        if lost {
            return Err(Lost);
        }
        queue.push_back(said);
        Ok(())
    }

    /// What has arrived is heard, also after the line was lost.
    pub(super) async fn hear(&self) -> Result<Said, Lost> {
        std::future::poll_fn(|_| {
            let mut wire = self.wire.borrow_mut();
            let (lost, queue) = if self.giver {
                (wire.giver_lost, &mut wire.down)
            } else {
                (wire.taker_lost, &mut wire.up)
            };
            match queue.pop_front() {
                Some(said) => Poll::Ready(Ok(said)),
                None if lost => Poll::Ready(Err(Lost)),
                None => Poll::Pending,
            }
        })
        .await
    }
}

/// Lets the others have a step.
struct Pause(bool);

impl Future for Pause {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}
