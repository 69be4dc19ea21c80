//! What the caller decides about a replay.

use std::time::Duration;

use traces::GuestTime;

use crate::Error;

/// How to replay.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Think time is divided by this; 1 is as recorded. Faster replays diverge more: the guest
    /// did things of its own in that time.
    pub speed: f64,
    /// Whether think time is waited out.
    pub pace: Pace,
    /// The guest's time when it began to run.
    pub start: GuestTime,
    /// How long an interaction that is due waits for its anchor; then it goes on, and that is
    /// counted as a miss.
    pub anchor_limit: Duration,
    /// An interaction that is due gives up on its anchor earlier, when the guest has been at
    /// rest for this long: nothing is going to change there.
    pub anchor_rest: Duration,
    /// How the end is found.
    pub rest: RestOptions,
    /// When a replay has gone astray and stops; none to never stop.
    pub divergence: Option<DivergenceOptions>,
    /// Of how many misses the pictures are kept, the first ones. Those are of the user's screen,
    /// and take 344 kB each.
    pub pictures: usize,
}

/// What becomes of the time in which the user did nothing.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum Pace {
    /// It passes as recorded, divided by [`Options::speed`].
    #[default]
    Recorded,
    /// It passes likewise at the most, and ends as soon as the guest has nothing left to do and
    /// the screen is ready for the next interaction.
    Quick(QuickOptions),
    /// As recorded while the replay is about in time, counted from its beginning; quickly where
    /// it is later than [`QuickOptions::late`], until it no longer is. For a replay that follows while the recording goes on: a
    /// piece of the log that came late, or a wait for the screen, does not put off all the rest.
    Follow(QuickOptions),
}

impl Pace {
    /// A quick one with the defaults, and this bound: see [`QuickOptions::at_most`].
    pub fn quick(at_most: Option<f64>) -> Self {
        Self::Quick(QuickOptions {
            at_most,
            ..QuickOptions::default()
        })
    }
}

/// When the next interaction of a quick replay may begin before its time.
#[derive(Clone, Debug, PartialEq)]
pub struct QuickOptions {
    /// Think time is cut to this part of it at most: with 4, to a quarter. None for no bound.
    pub at_most: Option<f64>,
    /// Of a think time this much is always left, or all of a shorter one.
    pub floor: Duration,
    /// For how long the guest has to have been at rest, where the anchor tells that the screen
    /// is ready.
    pub rest: Duration,
    /// How late a replay that follows may be. All that the guest takes down from then on is
    /// later than at the source by so much; think time that is cut is only noticed by a guest
    /// that was not at rest.
    pub late: Duration,
    /// As `rest`, where there is no anchor; and for how long the vCPUs have to have been idle
    /// where there is one and the rest of the screen never comes to rest.
    pub unanchored_rest: Duration,
    /// Between the release of one typed key and the press of the next this much is always left,
    /// and the vCPUs have to have been idle for so long, or all of a shorter gap. The same holds
    /// between the press of a typed key and its release if it was a tap.
    pub key_gap: Duration,
    /// A key that makes text and is held for no longer is tapped: for how long means nothing.
    /// Other keys, and buttons, are held as long as recorded.
    pub tap: Duration,
}

impl Default for QuickOptions {
    /// The floor is above the 400 ms (GTK, Qt) and the 500 ms (Windows) in which two clicks are
    /// one double-click. A guest that is given something to do shows it within the 30 ms that
    /// QEMU needs to show anything, so 400 ms of rest are the end of it, unless it waits for a
    /// timer, and the anchor tells that. Where there is no anchor, a second is what also ends an
    /// interaction in the recording. Keys that are held begin to repeat after 250 ms at the
    /// earliest (Windows; X11 after 500 or 660, unless the user says otherwise).
    fn default() -> Self {
        Self {
            at_most: None,
            floor: Duration::from_millis(550),
            rest: Duration::from_millis(400),
            late: Duration::from_millis(250),
            unanchored_rest: Duration::from_secs(1),
            key_gap: Duration::from_millis(12),
            tap: Duration::from_millis(200),
        }
    }
}

/// When a replay has gone another way for good.
#[derive(Clone, Debug, PartialEq)]
pub struct DivergenceOptions {
    /// So many misses in a row, whatever differs.
    pub misses: usize,
    /// So many misses in a row of which
    pub anchors: usize,
    /// this share of all tiles differs, from 0 to 1.
    pub differing: f64,
}

impl Default for DivergenceOptions {
    /// Stopping a good replay costs all that it would have saved, and going on with a bad one
    /// some time, as of each page the better copy is taken: so a stop needs much evidence. One
    /// other line in a terminal makes some tiles differ at every command until it has scrolled
    /// away; a window that is not there, or another one in front, nearly all.
    fn default() -> Self {
        Self {
            misses: 8,
            anchors: 4,
            differing: 0.6,
        }
    }
}

/// When a guest counts as at rest: over a window of time, its vCPUs were hardly used and its
/// screen showed the same, but for a caret or a clock.
#[derive(Clone, Debug, PartialEq)]
pub struct RestOptions {
    /// The window.
    pub window: Duration,
    /// Share of one CPU that all vCPUs together used in it, at most.
    pub busy: f64,
    /// How long to wait for that after the last event.
    pub limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            speed: 1.0,
            pace: Pace::Recorded,
            start: GuestTime::default(),
            anchor_limit: Duration::from_secs(10),
            anchor_rest: Duration::from_secs(2),
            rest: RestOptions::default(),
            divergence: Some(DivergenceOptions::default()),
            pictures: 16,
        }
    }
}

impl Default for RestOptions {
    /// An idle desktop of Xorg, terminal and editor was measured to use 0.2 to 2 % of a CPU under
    /// emulation, and a working one all it gets.
    fn default() -> Self {
        Self {
            window: Duration::from_secs(1),
            busy: 0.1,
            limit: Duration::from_secs(30),
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let what = if !(0.01..=1000.0).contains(&self.speed) {
            "the replay speed has to be between 0.01 and 1000"
        } else if self.rest.busy.is_nan() || self.rest.busy <= 0.0 {
            "the CPU share that counts as rest has to be above 0"
        } else if self
            .quick_bound()
            .is_some_and(|bound| !(1.0..=1000.0).contains(&bound))
        {
            "the speed that a quick replay does not exceed has to be between 1 and 1000"
        } else {
            return Ok(());
        };
        Err(Error::Options { what })
    }

    fn quick_bound(&self) -> Option<f64> {
        match &self.pace {
            Pace::Recorded => None,
            Pace::Quick(quick) | Pace::Follow(quick) => quick.at_most,
        }
    }
}
