//! Records for the tests of this crate.

use proptest::prelude::*;

use crate::{Anchor, Event, GuestTime, Record, Region};

/// Any records at all, also such as no recorder would write.
pub(crate) fn any_records(limit: usize) -> impl Strategy<Value = Vec<Record>> {
    prop::collection::vec(any_record(), 0..=limit)
}

fn any_record() -> impl Strategy<Value = Record> {
    let at = prop_oneof![any::<u64>(), 0..10_000_000_u64];
    (at, any_event()).prop_map(|(micros, event)| Record {
        at: GuestTime { micros },
        event,
    })
}

fn any_event() -> impl Strategy<Value = Event> {
    let region = any::<(u16, u16, u16, u16)>().prop_map(|(x, y, width, height)| Region {
        x,
        y,
        width,
        height,
    });
    prop_oneof![
        any::<(u16, bool)>().prop_map(|(code, down)| Event::Key { code, down }),
        any::<(u16, u16)>().prop_map(|(x, y)| Event::Pointer { x, y }),
        any::<(u16, bool)>().prop_map(|(code, down)| Event::Button { code, down }),
        any::<(i8, i8)>().prop_map(|(vertical, horizontal)| Event::Wheel {
            vertical,
            horizontal
        }),
        any::<(u16, u16)>().prop_map(|(width, height)| Event::Screen { width, height }),
        (region, prop::collection::vec(any::<u32>(), 0..20))
            .prop_map(|(region, tiles)| Event::Anchor(Anchor { region, tiles })),
        Just(Event::Gap),
        Just(Event::Redacted),
    ]
}

/// Reproducible numbers (SplitMix64), so that a size measured in a test is always the same.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Between 0 and `below`, exclusive.
    pub(crate) fn below(&mut self, below: u64) -> u64 {
        self.next() % below
    }

    /// About normally distributed around 0, within `spread` on either side.
    fn around_zero(&mut self, spread: u64) -> i64 {
        (0..4)
            .map(|_| self.below(spread).cast_signed())
            .sum::<i64>()
            / 2
            - spread.cast_signed()
    }
}

/// A minute in which somebody never stops: the pointer at 60 Hz with the jitter of a real
/// viewer, eight keys a second, an anchor of 16 tiles every two seconds. A third of the tiles
/// are plain background; the others have never been seen before, which is the worst case.
pub(crate) fn busy_minute(seed: u64) -> Vec<Record> {
    let mut random = Random(seed);
    let mut records = Vec::new();
    let minute = 60_000_000;
    let (mut x, mut y) = (640.0_f64, 400.0_f64);
    let (mut speed_x, mut speed_y) = (0.0, 0.0);
    for step in 0..3600_u64 {
        // A hand: smooth, changing its mind, never still.
        speed_x = speed_x * 0.92 + random.around_zero(400) as f64 / 100.0;
        speed_y = speed_y * 0.92 + random.around_zero(400) as f64 / 100.0;
        x = (x + speed_x).clamp(0.0, 1279.0);
        y = (y + speed_y).clamp(0.0, 799.0);
        let micros = (step * 16_667 + 2000).saturating_add_signed(random.around_zero(1500));
        records.push((
            micros,
            Event::Pointer {
                x: x as u16,
                y: y as u16,
            },
        ));
    }
    let letters: Vec<u16> = (16..=25).chain(30..=38).chain(44..=50).collect();
    let mut at = 0;
    for _ in 0..480 {
        at += 125_000_u64.saturating_add_signed(random.around_zero(60_000));
        let code = match random.below(6) {
            0 => 57,
            _ => letters[random.below(letters.len() as u64) as usize],
        };
        let held = 80_000_u64.saturating_add_signed(random.around_zero(30_000));
        records.push((at, Event::Key { code, down: true }));
        records.push((at + held, Event::Key { code, down: false }));
    }
    for step in 0..30 {
        let tiles = (0..16)
            .map(|_| {
                if random.below(3) == 0 {
                    0x5eed_5eed
                } else {
                    random.next() as u32
                }
            })
            .collect();
        let region = Region {
            x: random.below(1216) as u16,
            y: random.below(736) as u16,
            width: 64,
            height: 64,
        };
        let micros = step * 2_000_000 + random.below(500_000);
        records.push((micros, Event::Anchor(Anchor { region, tiles })));
    }
    records.retain(|(micros, _)| *micros < minute);
    records.sort_by_key(|(micros, _)| *micros);
    records
        .into_iter()
        .map(|(micros, event)| Record {
            at: GuestTime { micros },
            event,
        })
        .collect()
}
