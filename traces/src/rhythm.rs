//! What changes by itself on a screen: a caret that blinks, a clock, a spinner, a moving frame.
//!
//! A tile is *restless* once it has changed four times, at intervals of which none is more than
//! twice another, and for as long as it goes on; so it is told from a program's late answer.
//! The recorder leaves such tiles out of the anchors that it takes, and the replayer out of those
//! that it waits for, where the recorder had not looked for long enough.

use std::time::{Duration, Instant};

use crate::{Anchor, Pixels, Region};

/// Intervals that make a rhythm.
const RHYTHM: usize = 3;
/// The longer of two intervals that are alike is at most twice the other, and what looking now
/// and then adds to each.
const SLACK: Duration = Duration::from_millis(200);

/// What the tiles of a screen, or of a part of it, did while there was no input.
#[derive(Default)]
pub struct Rhythms {
    size: (u16, u16),
    /// What the screen showed last; nothing before the first look of a calm stretch.
    shown: Vec<u8>,
    tiles: Vec<Rhythm>,
    looked: Option<Instant>,
    /// Time watched.
    watched: Duration,
    /// Tiles that changed when any did last in this calm stretch, but for restless ones.
    latest: Vec<usize>,
}

#[derive(Clone, Default)]
struct Rhythm {
    /// When it changed last, in time watched.
    last: Duration,
    /// Whether that was in this calm stretch.
    running: bool,
    /// The last intervals between changes in one stretch; zero where there was none yet.
    intervals: [Duration; RHYTHM],
}

impl Rhythm {
    fn changed(&mut self, now: Duration) {
        if self.running {
            self.intervals.rotate_left(1);
            // Both are times watched, of which the later is the longer.
            self.intervals[RHYTHM - 1] = now.saturating_sub(self.last);
        }
        self.running = true;
        self.last = now;
    }

    fn is_restless(&self, now: Duration) -> bool {
        let [shortest, longest] = [
            self.intervals.iter().min().copied().unwrap_or_default(),
            self.intervals.iter().max().copied().unwrap_or_default(),
        ];
        !shortest.is_zero()
            && longest <= shortest * 2 + SLACK
            && now.saturating_sub(self.last) <= longest * 2 + SLACK
    }
}

impl Rhythms {
    /// Input came: what changes now is no sign. Nothing that was learned is forgotten.
    pub fn interrupt(&mut self) {
        if self.looked.take().is_some() {
            self.latest.clear();
            self.shown.clear();
            for tile in &mut self.tiles {
                tile.running = false;
            }
        }
    }

    /// Looks at a screen without input.
    pub fn look(&mut self, frame: &Pixels<'_>, now: Instant) {
        let size = (frame.width, frame.height);
        if size != self.size {
            *self = Self {
                size,
                watched: self.watched,
                ..Self::default()
            };
            let (columns, rows) = self.grid();
            self.tiles = vec![Rhythm::default(); columns * rows];
        }
        if let Some(before) = self.looked.replace(now) {
            self.watched += now.saturating_duration_since(before);
            if self.shown.len() == frame.rgb.len() && self.shown != frame.rgb {
                self.compare(frame);
            }
        }
        self.shown.clear();
        self.shown.extend_from_slice(frame.rgb);
    }

    fn compare(&mut self, frame: &Pixels<'_>) {
        let (columns, _) = self.grid();
        let stride = usize::from(self.size.0) * 3;
        let edge = usize::from(Anchor::TILE);
        if stride == 0 {
            return;
        }
        let mut changed = vec![false; self.tiles.len()];
        let rows = self.shown.chunks(stride).zip(frame.rgb.chunks(stride));
        for (y, (before, after)) in rows.enumerate().filter(|(_, (b, a))| b != a) {
            let tiles = before.chunks(edge * 3).zip(after.chunks(edge * 3));
            for (column, _) in tiles.enumerate().filter(|(_, (b, a))| b != a) {
                if let Some(changed) = changed.get_mut(y / edge * columns + column) {
                    *changed = true;
                }
            }
        }
        let mut latest = Vec::new();
        let tiles = self.tiles.iter_mut().zip(changed).enumerate();
        for (index, (tile, _)) in tiles.filter(|(_, (_, changed))| *changed) {
            tile.changed(self.watched);
            if !tile.is_restless(self.watched) {
                latest.push(index);
            }
        }
        if !latest.is_empty() {
            self.latest = latest;
        }
    }

    /// The middle of the tile where what changed last ends, as text does: the first one of the
    /// lowest row.
    pub fn answer(&self) -> Option<(u16, u16)> {
        let (columns, _) = self.grid();
        let row = self.latest.last()? / columns;
        let first = self.latest.iter().find(|index| *index / columns == row)?;
        let middle = |tile: usize, size: u16| {
            let at = tile * usize::from(Anchor::TILE) + usize::from(Anchor::TILE) / 2;
            // Within the screen, of which the last tile may be a part only.
            u16::try_from(at)
                .unwrap_or(u16::MAX)
                .min(size.saturating_sub(1))
        };
        let (width, height) = self.size;
        Some((middle(first % columns, width), middle(row, height)))
    }

    /// The tiles that change by themselves, in rows; those at the right and lower edge may be
    /// smaller.
    pub fn restless(&self) -> Vec<Region> {
        let (columns, _) = self.grid();
        let (width, height) = self.size;
        let place = |index: usize, limit: u16| {
            // A tile's place on a screen of at most 65,535 pixels.
            let at = u16::try_from(index * usize::from(Anchor::TILE)).unwrap_or(u16::MAX);
            (at, Anchor::TILE.min(limit.saturating_sub(at)))
        };
        let restless = self
            .tiles
            .iter()
            .enumerate()
            .filter(|(_, tile)| tile.is_restless(self.watched));
        restless
            .map(|(index, _)| {
                let (x, width) = place(index % columns, width);
                let (y, height) = place(index / columns, height);
                Region {
                    x,
                    y,
                    width,
                    height,
                }
            })
            .collect()
    }

    /// Columns and rows of tiles.
    fn grid(&self) -> (usize, usize) {
        let (width, height) = self.size;
        let tiles = |size: u16| usize::from(size.div_ceil(Anchor::TILE));
        (tiles(width), tiles(height))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: u16 = 72;
    const HEIGHT: u16 = 40;

    /// A screen with some spots of other colours than black.
    fn screen(spots: &[(usize, usize, u8)]) -> Vec<u8> {
        let mut rgb = vec![0; usize::from(WIDTH) * usize::from(HEIGHT) * 3];
        for (x, y, colour) in spots {
            rgb[(y * usize::from(WIDTH) + x) * 3] = *colour;
        }
        rgb
    }

    /// A watcher, and the time in its world.
    struct World {
        rhythms: Rhythms,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            Self {
                rhythms: Rhythms::default(),
                now: Instant::now(),
            }
        }

        fn look(&mut self, rgb: &[u8]) {
            let pixels = Pixels {
                width: WIDTH,
                height: HEIGHT,
                rgb,
            };
            self.rhythms.look(&pixels, self.now);
        }

        /// Looks ten times a second, at what is shown so long after the beginning.
        fn watch(&mut self, millis: std::ops::Range<u64>, shown: impl Fn(u64) -> Vec<u8>) {
            for at in millis.step_by(100) {
                self.look(&shown(at));
                self.now += Duration::from_millis(100);
            }
        }

        fn restless(&self) -> Vec<(u16, u16)> {
            self.rhythms.restless().iter().map(|r| (r.x, r.y)).collect()
        }
    }

    fn blink(at: u64) -> u8 {
        u8::from((at / 530).is_multiple_of(2))
    }

    #[test]
    fn a_caret_and_a_clock_are_learned_and_what_stands_still_is_not() {
        let mut world = World::new();
        let shown = |at: u64| screen(&[(20, 20, blink(at)), (70, 39, (at / 1000) as u8)]);
        world.watch(0..1500, shown);
        assert_eq!(world.restless(), []);
        world.watch(1500..5000, shown);
        assert_eq!(world.restless(), [(16, 16), (64, 32)]);
        // The tiles at the edges are narrower.
        let last = world.rhythms.restless()[1];
        assert_eq!((last.width, last.height), (8, 8));
    }

    #[test]
    fn a_caret_that_has_gone_is_forgotten_but_not_while_there_is_input() {
        let mut world = World::new();
        world.watch(0..4000, |at| screen(&[(20, 20, blink(at))]));
        assert_eq!(world.restless(), [(16, 16)]);
        world.rhythms.interrupt();
        world.now += Duration::from_secs(30);
        assert_eq!(world.restless(), [(16, 16)]);
        world.watch(0..4000, |at| screen(&[(50, 20, blink(at))]));
        assert_eq!(world.restless(), [(48, 16)]);
    }

    #[test]
    fn typing_goes_to_where_the_screen_answered_last_but_for_carets() {
        let mut world = World::new();
        let caret = |at: u64| (70, 39, blink(at));
        world.watch(0..4000, |at| screen(&[caret(at)]));
        assert_eq!(world.restless(), [(64, 32)]);
        world.rhythms.interrupt();
        assert_eq!(world.rhythms.answer(), None);
        // Two lines of output at once, then nothing but the caret.
        let output = [(5, 3, 1), (40, 3, 1), (20, 20, 1), (40, 20, 1)];
        world.watch(0..3000, |at| {
            let shown = if at < 1000 { &[][..] } else { &output };
            screen(&[shown, &[caret(at)]].concat())
        });
        assert_eq!(world.rhythms.answer(), Some((24, 24)));
        world.rhythms.interrupt();
        assert_eq!(world.rhythms.answer(), None);
    }

    #[test]
    fn what_a_program_shows_late_is_no_rhythm() {
        let mut world = World::new();
        // Something appears in steps, further and further apart.
        let steps = [300, 700, 2000, 2300, 5000];
        world.watch(0..6000, |at| {
            let shown = steps.iter().filter(|step| **step <= at).count();
            screen(&[(20, 20, shown as u8)])
        });
        assert_eq!(world.restless(), []);
    }

    #[test]
    fn changes_across_input_make_no_rhythm() {
        let mut world = World::new();
        for colour in 0..20 {
            world.watch(0..300, |at| {
                screen(&[(20, 20, colour * 2 + u8::from(at > 100))])
            });
            world.rhythms.interrupt();
            world.now += Duration::from_secs(1);
        }
        assert_eq!(world.restless(), []);
    }

    #[test]
    fn another_screen_size_begins_anew() {
        let mut world = World::new();
        world.watch(0..4000, |at| screen(&[(20, 20, blink(at))]));
        let rgb = vec![0; 30 * 30 * 3];
        let pixels = Pixels {
            width: 30,
            height: 30,
            rgb: &rgb,
        };
        world.rhythms.look(&pixels, world.now);
        assert_eq!(world.restless(), []);
        assert_eq!(world.rhythms.tiles.len(), 4);
    }
}
