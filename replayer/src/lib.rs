//! Replays an interaction log on a restored copy of the guest, in step with its screen.
//!
//! The copy does nearly what the original did, but not in the same time: a program may be up a
//! second later. Input given by the clock alone would go into the wrong window. So before each
//! interaction the replayer waits until its recorded time has come *and* the screen around it
//! shows what it showed then (its anchor), up to a limit; what comes later is put off by as
//! much. Within an interaction the rhythm is kept, as double clicks and repeated keys
//! depend on it; only typing may be quicker, at a quick pace.
//!
//! At a quick pace ([`Pace::Quick`]) the recorded time need not have come: it is enough that the
//! guest has come to rest and the screen shows what it showed. What a quick replay gained is
//! never held against the guest: before an anchor is given up, the guest has had all the time
//! that it had when recorded.
//!
//! Promises: recorded events are injected once and in order; all of them, whatever the screen
//! shows, unless the copy has gone another way for good ([`DivergenceOptions`]): then none from
//! there on, as they would go where they were not meant for. The replay ends in bounded time
//! ([`Options`] has the limits); where the copy went another way is in the [`ReplayReport`]. What a replay brings about is never trusted: the reconciler compares
//! every page afterwards. Nothing here touches the network; whoever restores the copy leaves it
//! unplugged.
//!
//! After VNCplay (Zeldovich and Chandra, FREENIX 2005), with two differences: only a small
//! region is compared, as whole screens never match, and a guest that has come to rest is not
//! waited for any longer, as nothing is going to change there.

mod course;
mod guest;
mod moving;
mod options;
mod picture;
mod play;
mod report;
mod rest;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::time::Duration;

use traces::{GuestTime, Record};
use vm_host::Vm;
use vm_host::screen::{Observer, ScreenError};

pub use guest::input_of;
pub use options::{DivergenceOptions, Options, Pace, QuickOptions, RestOptions};
pub use picture::{MissPictures, Picture};
pub use report::{Divergence, Miss, Progress, ReplayReport, Why};

use guest::Real;
use play::Player;

/// Why a replay could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// QEMU is gone or refuses.
    #[error("the replayed guest could not be driven; the replay is void, start it again")]
    Host(#[source] vm_host::Error),
    /// The screen can't be seen any more.
    #[error("the replayed guest's screen was lost; the replay is void, start it again")]
    Screen(#[source] ScreenError),
    /// Options that mean nothing.
    #[error("{what}")]
    Options {
        /// What is wrong with them, and what they have to be.
        what: &'static str,
    },
}

/// Replays a whole log and waits until the guest has come to rest.
///
/// The guest is running, and has been since `options.start` of the recorded time. Dropping the
/// future stops the replay; keys may then be held down in the guest.
pub async fn replay(
    vm: &Vm,
    observer: &Observer,
    records: &[Record],
    options: &Options,
    progress: impl FnMut(&Progress),
) -> Result<ReplayReport, Error> {
    let mut replay = Replay::new(vm, observer, options)?;
    replay.play(records, progress).await?;
    replay.settle().await
}

/// A replay whose log comes in pieces: the source may still be recording while the first is
/// played. Each piece goes on in the schedule where the last one ended.
pub struct Replay<'a> {
    player: Player<Real<'a>>,
}

impl<'a> Replay<'a> {
    /// Begins now. Recorded times are counted from when the guest began to run, or, of one that
    /// ran before `vm` was attached to it, from then; that is `options.start`.
    pub fn new(vm: &'a Vm, observer: &'a Observer, options: &Options) -> Result<Self, Error> {
        Ok(Self {
            player: Player::new(Real::new(vm, observer), options)?,
        })
    }

    /// Injects the next piece of the log. `progress` is told before each interaction and at the
    /// end; it should return at once.
    ///
    /// Once the replay has diverged, see [`ReplayReport::diverged`], this injects nothing more,
    /// but for the release of what was held then, and returns at once.
    pub async fn play(
        &mut self,
        records: &[Record],
        progress: impl FnMut(&Progress),
    ) -> Result<(), Error> {
        self.player.play(records, progress).await
    }

    /// Lets the guest idle until this recorded time, for at most `limit` from now: so that what
    /// the source did by itself after the last event, such as writing its files back to the
    /// disk some seconds later, is done here too. Returns at once if the replay has diverged.
    pub async fn idle(&mut self, until: GuestTime, limit: Duration) {
        self.player.idle(until, limit).await;
    }

    /// Waits until the guest has come to rest, or for the limit, and says how it all went.
    /// More may be played afterwards; the report is then of the whole.
    pub async fn settle(&mut self) -> Result<ReplayReport, Error> {
        self.player.settle().await
    }

    /// How it went so far.
    pub fn report(&self) -> ReplayReport {
        self.player.report()
    }

    /// The recorded time up to which the log has been played.
    pub fn position(&self) -> GuestTime {
        self.player.position()
    }
}
