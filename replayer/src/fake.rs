//! A guest without a guest: a screen of one colour per moment, and a list of what it was given.
//!
//! Only the schedule is tested with it, under a clock that jumps; that input and screen really
//! reach each other is tested with QEMU.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use traces::{Anchor, Event, Pixels, Region};

use crate::Error;
use crate::guest::Guest;

const EDGE: u16 = 64;
/// A frame around copied cells moves on after this time.
const MARCH: Duration = Duration::from_millis(200);
/// A caret is on for this long, and off for as long.
const BLINK: Duration = Duration::from_millis(530);
/// Where the caret is, and the clock: column, row, width, height.
const CARET: [usize; 4] = [20, 20, 2, 14];
const CLOCK: [usize; 4] = [48, 50, 12, 8];

/// What it was given, and how long after its start.
pub(crate) type Given = (Duration, Event);

/// What a key or a button that is pressed brings about.
#[derive(Clone, Copy)]
pub(crate) struct Reaction {
    /// For so long it computes at full speed,
    pub(crate) computing: Duration,
    /// and then it waits for so long, for a disk or a timer, until the next colour is shown.
    pub(crate) waiting: Duration,
}

pub(crate) struct Fake {
    begun: Instant,
    /// The screen's colour from each of these times on; in order, the first at zero.
    colours: Mutex<Vec<(Duration, u8)>>,
    /// Stretches in which it computes at full speed, in order.
    busy: Mutex<Vec<(Duration, Duration)>>,
    reaction: Option<Reaction>,
    /// Whether there are a caret and a clock on the screen.
    restless: bool,
    /// Whether there is a frame on it that moves.
    framed: bool,
    /// By how much who waits for a moment oversleeps.
    oversleeps: Duration,
    /// How long it takes until it has what it is given.
    takes: Duration,
    /// For how long it ran before it was made.
    ran_for: Duration,
    pub(crate) given: Mutex<Vec<Given>>,
    pub(crate) calls: Mutex<usize>,
}

impl Fake {
    pub(crate) fn new(colours: &[(Duration, u8)], busy_until: Duration) -> Self {
        Self {
            begun: Instant::now(),
            colours: Mutex::new(colours.to_vec()),
            busy: Mutex::new(vec![(Duration::ZERO, busy_until)]),
            reaction: None,
            restless: false,
            framed: false,
            oversleeps: Duration::ZERO,
            takes: Duration::ZERO,
            ran_for: Duration::ZERO,
            given: Mutex::default(),
            calls: Mutex::default(),
        }
    }

    /// One that shows colour 0, and after each press the next.
    pub(crate) fn reacting(reaction: Reaction) -> Self {
        Self {
            reaction: Some(reaction),
            ..Self::new(&[(Duration::ZERO, 0)], Duration::ZERO)
        }
    }

    /// One that also computes in this stretch, after all others.
    pub(crate) fn computing(self, from: Duration, to: Duration) -> Self {
        self.busy.lock().unwrap().push((from, to));
        self
    }

    /// With a caret and a clock on its screen.
    pub(crate) fn restless(self) -> Self {
        Self {
            restless: true,
            ..self
        }
    }

    /// At which whoever waits for a moment oversleeps by so much.
    pub(crate) fn oversleeping(self, oversleeps: Duration) -> Self {
        Self { oversleeps, ..self }
    }

    /// One that ran for so long before it was replayed to.
    pub(crate) fn having_run_for(self, ran_for: Duration) -> Self {
        Self { ran_for, ..self }
    }

    /// Which has what it is given so much later.
    pub(crate) fn taking(self, takes: Duration) -> Self {
        Self { takes, ..self }
    }

    /// With a frame on its screen that moves.
    pub(crate) fn framed(self) -> Self {
        Self {
            framed: true,
            ..self
        }
    }

    /// An anchor with such a frame, of which the recorder did not know that it moves.
    pub(crate) fn framed_anchor(colour: u8) -> Event {
        let mut rgb = picture(colour, None);
        frame(&mut rgb, 200);
        Event::Anchor(Anchor::capture(&pixels(&rgb), whole()))
    }

    /// An anchor on a screen of this colour.
    pub(crate) fn anchor(colour: u8) -> Event {
        let rgb = picture(colour, None);
        Event::Anchor(Anchor::capture(&pixels(&rgb), whole()))
    }

    /// The same with a caret and a clock, both of which the recorder knew.
    pub(crate) fn restless_anchor(colour: u8) -> Event {
        let rgb = picture(colour, Some(3));
        let restless = |tile: Region| {
            [CARET, CLOCK].iter().any(|[x, y, width, height]| {
                let within = |at: usize, size: usize, from: u16| {
                    at < usize::from(from) + 16 && usize::from(from) < at + size
                };
                within(*x, *width, tile.x) && within(*y, *height, tile.y)
            })
        };
        Event::Anchor(Anchor::capture_except(&pixels(&rgb), whole(), restless))
    }

    /// How many colours have been shown, and how often the caret has blinked or the frame moved.
    fn current(&self) -> (usize, u64) {
        let now = self.begun.elapsed();
        let colours = self.colours.lock().unwrap();
        let shown = colours.iter().rposition(|(from, _)| *from <= now).unwrap();
        let blinks = now.as_millis() / BLINK.as_millis();
        let steps = now.as_millis() / MARCH.as_millis();
        let moved = match (self.restless, self.framed) {
            (true, _) => blinks as u64,
            (false, true) => steps as u64,
            (false, false) => 0,
        };
        (shown, moved)
    }

    fn react(&self, reaction: Reaction) {
        let now = self.begun.elapsed();
        let mut busy = self.busy.lock().unwrap();
        // One after the other.
        let from = busy.last().map_or(now, |(_, to)| now.max(*to));
        busy.push((from, from + reaction.computing));
        let mut colours = self.colours.lock().unwrap();
        let (last, colour) = *colours.last().unwrap();
        let shown = (from + reaction.computing + reaction.waiting).max(last);
        colours.push((shown, colour + 1));
    }
}

fn whole() -> Region {
    Region {
        x: 0,
        y: 0,
        width: EDGE,
        height: EDGE,
    }
}

fn pixels(rgb: &[u8]) -> Pixels<'_> {
    Pixels {
        width: EDGE,
        height: EDGE,
        rgb,
    }
}

/// Draws a frame along the upper and the left edge, as it is after so many steps.
fn frame(rgb: &mut [u8], step: u64) {
    let row = usize::from(EDGE) * 3;
    let shade = 100 + (step % 100) as u8;
    for (at, pixel) in rgb.iter_mut().enumerate() {
        if at < row || at % row < 3 {
            *pixel = shade;
        }
    }
}

fn picture(colour: u8, blinks: Option<u64>) -> Vec<u8> {
    let mut rgb = vec![colour; usize::from(EDGE) * usize::from(EDGE) * 3];
    let mut paint = |[x, y, width, height]: [usize; 4], colour: u8| {
        for row in y..y + height {
            let start = (row * usize::from(EDGE) + x) * 3;
            rgb[start..start + width * 3].fill(colour);
        }
    };
    if let Some(blinks) = blinks {
        paint(CARET, if blinks % 2 == 0 { 255 } else { colour });
        paint(CLOCK, 100 + (blinks / 2) as u8);
    }
    rgb
}

impl Guest for &Fake {
    type Version = (usize, u64);

    async fn send(&self, events: &[Event]) -> Result<(), Error> {
        if !self.takes.is_zero() {
            sleep(self.takes).await;
        }
        let now = self.begun.elapsed();
        self.given
            .lock()
            .unwrap()
            .extend(events.iter().map(|event| (now, event.clone())));
        *self.calls.lock().unwrap() += 1;
        let pressed = events.iter().any(|event| {
            matches!(
                event,
                Event::Key { down: true, .. } | Event::Button { down: true, .. }
            )
        });
        if let Some(reaction) = self.reaction.filter(|_| pressed) {
            self.react(reaction);
        }
        Ok(())
    }

    fn look<T>(&self, look: impl FnOnce(&Pixels<'_>) -> T) -> (Self::Version, Option<T>) {
        let current = self.current();
        let colour = self.colours.lock().unwrap()[current.0].1;
        let mut rgb = picture(colour, self.restless.then_some(current.1));
        if self.framed {
            frame(&mut rgb, current.1);
        }
        (current, Some(look(&pixels(&rgb))))
    }

    fn version(&self) -> Self::Version {
        self.current()
    }

    async fn changed(&self, since: Self::Version) -> Result<(), Error> {
        let colour = self.colours.lock().unwrap().get(since.0 + 1).copied();
        let next = u32::try_from(since.1 + 1).unwrap();
        let blink = match (self.restless, self.framed) {
            (true, _) => Some(BLINK * next),
            (false, true) => Some(MARCH * next),
            (false, false) => None,
        };
        match colour.map(|(at, _)| at).into_iter().chain(blink).min() {
            Some(at) => sleep_until(self.begun + at).await,
            None => std::future::pending().await,
        }
        Ok(())
    }

    fn cpu_time(&self) -> Result<Duration, Error> {
        let now = self.begun.elapsed();
        let busy = self.busy.lock().unwrap();
        Ok(busy
            .iter()
            .map(|(from, to)| now.min(*to).saturating_sub(*from))
            .sum())
    }

    fn ran_for(&self) -> Duration {
        self.ran_for
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn host_time(&self, at: Instant) -> Instant {
        at
    }

    async fn until(&self, at: Instant) {
        if at > Instant::now() {
            sleep_until(at + self.oversleeps).await;
        }
    }
}
