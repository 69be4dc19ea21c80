//! A guest without a guest: a screen of one colour per moment, and a list of what it was given.
//!
//! Only the schedule is tested with it, under a clock that jumps; that input and screen really
//! reach each other is tested with QEMU.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use traces::{Anchor, Event, Pixels, Region};

use crate::Error;
use crate::guest::Guest;

const EDGE: u16 = 64;

/// What it was given, and how long after its start.
pub(crate) type Given = (Duration, Event);

pub(crate) struct Fake {
    begun: Instant,
    /// The screen's colour from each of these times on; in order, the first at zero.
    colours: Vec<(Duration, u8)>,
    /// Until when it computes at full speed.
    busy_until: Duration,
    pub(crate) given: Mutex<Vec<Given>>,
    pub(crate) calls: Mutex<usize>,
}

impl Fake {
    pub(crate) fn new(colours: &[(Duration, u8)], busy_until: Duration) -> Self {
        Self {
            begun: Instant::now(),
            colours: colours.to_vec(),
            busy_until,
            given: Mutex::default(),
            calls: Mutex::default(),
        }
    }

    /// An anchor on a screen of this colour.
    pub(crate) fn anchor(colour: u8) -> Event {
        let rgb = picture(colour);
        let pixels = Pixels {
            width: EDGE,
            height: EDGE,
            rgb: &rgb,
        };
        let region = Region {
            x: 0,
            y: 0,
            width: EDGE,
            height: EDGE,
        };
        Event::Anchor(Anchor::capture(&pixels, region))
    }

    fn current(&self) -> usize {
        let now = self.begun.elapsed();
        self.colours
            .iter()
            .rposition(|(from, _)| *from <= now)
            .unwrap()
    }
}

fn picture(colour: u8) -> Vec<u8> {
    vec![colour; usize::from(EDGE) * usize::from(EDGE) * 3]
}

impl Guest for &Fake {
    type Version = usize;

    async fn send(&self, events: &[Event]) -> Result<(), Error> {
        let now = self.begun.elapsed();
        self.given
            .lock()
            .unwrap()
            .extend(events.iter().map(|event| (now, event.clone())));
        *self.calls.lock().unwrap() += 1;
        Ok(())
    }

    fn look<T>(&self, look: impl FnOnce(&Pixels<'_>) -> T) -> (usize, Option<T>) {
        let current = self.current();
        let rgb = picture(self.colours[current].1);
        (
            current,
            Some(look(&Pixels {
                width: EDGE,
                height: EDGE,
                rgb: &rgb,
            })),
        )
    }

    fn version(&self) -> usize {
        self.current()
    }

    async fn changed(&self, since: usize) -> Result<(), Error> {
        match self.colours.get(since + 1) {
            Some((at, _)) => sleep_until(self.begun + *at).await,
            None => std::future::pending().await,
        }
        Ok(())
    }

    fn cpu_time(&self) -> Result<Duration, Error> {
        Ok(self.begun.elapsed().min(self.busy_until))
    }
}
