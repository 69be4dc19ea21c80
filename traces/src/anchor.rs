//! Anchors: whether a screen shows what it showed when an interaction began.
//!
//! Replay gives input to a guest that is a little faster or slower than the recorded one. An
//! anchor tells when the thing to be clicked or typed into is there. Comparing whole frames
//! would never match (clocks, carets, progress bars), so a small region is compared, tile by
//! tile, and one small spot of it may differ. What is known to change by itself is not compared
//! at all: its tile holds [`Anchor::UNCOMPARED`] in place of a hash, a value that no picture has.
//! (A log from before this had a meaning holds none, but by one chance in four thousand million
//! a tile; a reader from before compares such a tile, and at worst counts a miss.)
//!
//! Replay in step with the screen is VNCplay's idea (Zeldovich and Chandra, "Interactive
//! Performance Measurement with VNCplay", FREENIX 2005); hashed tiles in place of pixels keep an
//! anchor at four bytes for 256 pixels.

use crate::{Anchor, Region};

/// A frame: `height` rows of `width` pixels, each red, green and blue, without padding.
#[derive(Clone, Copy)]
pub struct Pixels<'a> {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// `width * height * 3` bytes; where there are fewer, nothing is shown.
    pub rgb: &'a [u8],
}

/// How a frame compares with an anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// Tiles compared, without those that change by themselves.
    pub tiles: usize,
    /// How many of them differ.
    pub differing: usize,
    /// Columns and rows of tiles of the smallest box around those that differ.
    pub spread: (usize, usize),
}

/// How one tile of a frame compares with an anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileMatch {
    /// It shows what it showed.
    Same,
    /// It shows something else, or isn't on the screen.
    Differs,
    /// It changes by itself; what it showed is not known.
    Uncompared,
}

impl Pixels<'_> {
    /// The pixels of a region, row by row, if all of it is on the screen.
    pub fn part(&self, region: Region) -> Option<Vec<u8>> {
        let stride = usize::from(self.width) * 3;
        let row = usize::from(region.width) * 3;
        let left = usize::from(region.x) * 3;
        if left + row > stride {
            return None;
        }
        let mut part = Vec::with_capacity(row * usize::from(region.height));
        for y in 0..usize::from(region.height) {
            let start = (usize::from(region.y) + y) * stride + left;
            part.extend_from_slice(self.rgb.get(start..start + row)?);
        }
        Some(part)
    }
}

impl Match {
    /// Whether the frame shows what the anchor saw, but for a blinking caret.
    ///
    /// A caret or a block cursor is up to 16 pixels wide and 32 high, so wherever it stands on
    /// the grid it touches a box of at most two by three tiles. What differs has to fit in one
    /// such box, and in a quarter of the region (two tiles of a small one), so that a window
    /// that isn't there yet never passes for a caret.
    pub fn is_match(&self) -> bool {
        self.differing == 0
            || (self.spread.0 <= 2
                && self.spread.1 <= 3
                && self.differing <= (self.tiles / 4).max(2)
                && self.differing < self.tiles)
    }
}

impl Anchor {
    /// Edge of a tile, in pixels.
    pub const TILE: u16 = 16;
    /// Stands for a tile that changes by itself.
    pub const UNCOMPARED: u32 = 0;

    /// What `frame` shows in `region`, which is first cut down to what is on the screen.
    pub fn capture(frame: &Pixels<'_>, region: Region) -> Self {
        Self::capture_except(frame, region, |_| false)
    }

    /// The same, without the tiles that change by themselves, as `restless` says of each.
    pub fn capture_except(
        frame: &Pixels<'_>,
        region: Region,
        restless: impl Fn(Region) -> bool,
    ) -> Self {
        let x = region.x.min(frame.width);
        let y = region.y.min(frame.height);
        let region = Region {
            x,
            y,
            width: region.width.min(frame.width - x),
            height: region.height.min(frame.height - y),
        };
        let tiles = grid(region)
            .map(|(_, _, tile)| {
                if restless(tile.region()) {
                    return Self::UNCOMPARED;
                }
                hash(frame, &tile).unwrap_or(Self::UNCOMPARED)
            })
            .collect();
        Self { region, tiles }
    }

    /// How many of its tiles are compared.
    pub fn compared(&self) -> usize {
        let compared = |tile: &&u32| **tile != Self::UNCOMPARED;
        self.tiles.iter().filter(compared).count()
    }

    /// The same, with more tiles left out.
    #[must_use]
    pub fn except(&self, restless: impl Fn(Region) -> bool) -> Self {
        let tiles = grid(self.region).zip(&self.tiles);
        let left = tiles.map(|((_, _, tile), wanted)| {
            if restless(tile.region()) {
                Self::UNCOMPARED
            } else {
                *wanted
            }
        });
        Self {
            region: self.region,
            tiles: left.collect(),
        }
    }

    /// Where each tile lies, and how it compares with what `frame` shows now. Nothing for an
    /// anchor that holds another number of tiles than its region has.
    pub fn compare<'a>(
        &'a self,
        frame: &'a Pixels<'_>,
    ) -> impl Iterator<Item = (Region, TileMatch)> + 'a {
        let (columns, rows) = extent(self.region);
        let whole = columns * rows == self.tiles.len();
        grid(self.region)
            .zip(&self.tiles)
            .take_while(move |_| whole)
            .map(|((_, _, tile), wanted)| (tile.region(), compare(frame, &tile, *wanted)))
    }

    /// Compares what `frame` shows now. Tiles that aren't on the screen differ, and so do all
    /// those of an anchor that holds another number of them than its region has.
    pub fn matches(&self, frame: &Pixels<'_>) -> Match {
        let (columns, rows) = extent(self.region);
        let tiles = columns * rows;
        if tiles != self.tiles.len() {
            return Match {
                tiles,
                differing: tiles.max(1),
                spread: (columns, rows),
            };
        }
        let (mut compared, mut differing) = (0, 0);
        let (mut left, mut right, mut top, mut bottom) = (usize::MAX, 0, usize::MAX, 0);
        for ((column, row, tile), wanted) in grid(self.region).zip(&self.tiles) {
            let found = compare(frame, &tile, *wanted);
            compared += usize::from(found != TileMatch::Uncompared);
            if found == TileMatch::Differs {
                differing += 1;
                (left, right) = (left.min(column), right.max(column));
                (top, bottom) = (top.min(row), bottom.max(row));
            }
        }
        let spread = if differing == 0 {
            (0, 0)
        } else {
            (right - left + 1, bottom - top + 1)
        };
        Match {
            tiles: compared,
            differing,
            spread,
        }
    }
}

impl Region {
    /// A square of `edge` pixels around a point, cut off at the left and top of the screen
    /// ([`Anchor::capture`] cuts it off at the right and bottom).
    pub fn around(x: u16, y: u16, edge: u16) -> Self {
        let left = x.saturating_sub(edge / 2);
        let top = y.saturating_sub(edge / 2);
        Self {
            x: left,
            y: top,
            width: x.saturating_add(edge.div_ceil(2)) - left,
            height: y.saturating_add(edge.div_ceil(2)) - top,
        }
    }
}

/// Columns and rows of tiles.
fn extent(region: Region) -> (usize, usize) {
    (
        usize::from(region.width.div_ceil(Anchor::TILE)),
        usize::from(region.height.div_ceil(Anchor::TILE)),
    )
}

/// Column, row and place of each tile, in row order.
fn grid(region: Region) -> impl Iterator<Item = (usize, usize, Place)> {
    let (columns, rows) = extent(region);
    let edge = usize::from(Anchor::TILE);
    let (width, height) = (usize::from(region.width), usize::from(region.height));
    (0..rows).flat_map(move |row| {
        (0..columns).map(move |column| {
            let place = Place {
                x: usize::from(region.x) + column * edge,
                y: usize::from(region.y) + row * edge,
                width: (width - column * edge).min(edge),
                height: (height - row * edge).min(edge),
            };
            (column, row, place)
        })
    })
}

/// A tile's pixels; not `u16`, as a malformed region may end beyond 65,535.
struct Place {
    x: usize,
    y: usize,
    width: usize,
    height: usize,
}

impl Place {
    /// The part of it that a screen could have.
    fn region(&self) -> Region {
        let on_screen = |at: usize| u16::try_from(at).unwrap_or(u16::MAX);
        Region {
            x: on_screen(self.x),
            y: on_screen(self.y),
            width: on_screen(self.width),
            height: on_screen(self.height),
        }
    }
}

fn compare(frame: &Pixels<'_>, place: &Place, wanted: u32) -> TileMatch {
    if wanted == Anchor::UNCOMPARED {
        TileMatch::Uncompared
    } else if hash(frame, place) == Some(wanted) {
        TileMatch::Same
    } else {
        TileMatch::Differs
    }
}

/// The hash of a tile, if the frame has all of it. Never [`Anchor::UNCOMPARED`].
fn hash(frame: &Pixels<'_>, place: &Place) -> Option<u32> {
    let stride = usize::from(frame.width);
    if place.x + place.width > stride || place.y + place.height > usize::from(frame.height) {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    for row in place.y..place.y + place.height {
        let start = (row * stride + place.x) * 3;
        hasher.update(frame.rgb.get(start..start + place.width * 3)?);
    }
    let hash = hasher.finalize();
    let [a, b, c, d, ..] = *hash.as_bytes();
    Some(u32::from_le_bytes([a, b, c, d]).max(Anchor::UNCOMPARED + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTH: u16 = 200;
    const HEIGHT: u16 = 120;

    fn picture() -> Vec<u8> {
        (0..usize::from(WIDTH) * usize::from(HEIGHT) * 3)
            .map(|at| (at * 7 / 5) as u8)
            .collect()
    }

    fn frame(rgb: &[u8]) -> Pixels<'_> {
        Pixels {
            width: WIDTH,
            height: HEIGHT,
            rgb,
        }
    }

    fn paint(rgb: &mut [u8], x: usize, y: usize, width: usize, height: usize) {
        for row in y..y + height {
            let start = (row * usize::from(WIDTH) + x) * 3;
            for byte in &mut rgb[start..start + width * 3] {
                *byte ^= 0xff;
            }
        }
    }

    proptest! {
        #[test]
        fn the_same_frame_matches_wherever_the_region_lies(
            x in any::<u16>(), y in any::<u16>(), width in 0..300_u16, height in 0..300_u16,
        ) {
            let rgb = picture();
            let anchor = Anchor::capture(&frame(&rgb), Region { x, y, width, height });
            let found = anchor.matches(&frame(&rgb));
            prop_assert_eq!(found.differing, 0);
            prop_assert!(found.is_match());
            prop_assert!(anchor.region.x + anchor.region.width <= WIDTH);
            prop_assert!(anchor.region.y + anchor.region.height <= HEIGHT);
        }

        #[test]
        fn a_caret_is_tolerated_wherever_it_stands(x in 0..184_usize, y in 0..88_usize) {
            let rgb = picture();
            let region = Region { x: 30, y: 20, width: 96, height: 96 };
            let anchor = Anchor::capture(&frame(&rgb), region);
            for (width, height) in [(2, 18), (1, 20), (8, 16), (16, 32)] {
                let mut changed = rgb.clone();
                paint(&mut changed, x, y, width, height);
                let found = anchor.matches(&frame(&changed));
                prop_assert!(found.is_match(), "{:?}", found);
            }
        }

        #[test]
        fn a_malformed_anchor_does_no_harm(
            x in any::<u16>(), y in any::<u16>(), width in 0..600_u16, height in 0..600_u16,
            tiles in prop::collection::vec(any::<u32>(), 0..30),
        ) {
            let anchor = Anchor { region: Region { x, y, width, height }, tiles };
            let rgb = picture();
            let _ = anchor.matches(&frame(&rgb));
            let _ = anchor.matches(&Pixels { width: 300, height: 3, rgb: &rgb[..10] });
        }
    }

    #[test]
    fn what_is_more_than_a_caret_does_not_match() {
        let rgb = picture();
        let region = Region {
            x: 32,
            y: 32,
            width: 64,
            height: 64,
        };
        let anchor = Anchor::capture(&frame(&rgb), region);
        // A word, a small window, the whole region, two spots far apart.
        for spots in [
            &[(40, 40, 40, 12)][..],
            &[(50, 50, 30, 40)],
            &[(32, 32, 64, 64)],
            &[(34, 34, 2, 2), (90, 90, 2, 2)],
        ] {
            let mut changed = rgb.clone();
            for (x, y, width, height) in spots {
                paint(&mut changed, *x, *y, *width, *height);
            }
            let found = anchor.matches(&frame(&changed));
            assert!(!found.is_match(), "{spots:?}: {found:?}");
        }
    }

    #[test]
    fn what_changes_by_itself_is_not_compared() {
        let rgb = picture();
        let region = Region {
            x: 32,
            y: 32,
            width: 64,
            height: 64,
        };
        // A clock at the top, and a caret below: two spots, one of them known.
        let clock = |tile: Region| tile.y < 48 && tile.x >= 64;
        let anchor = Anchor::capture_except(&frame(&rgb), region, clock);
        assert_eq!((anchor.tiles.len(), anchor.compared()), (16, 14));
        let mut changed = rgb.clone();
        paint(&mut changed, 66, 34, 28, 10);
        paint(&mut changed, 40, 80, 2, 14);
        let plain = Anchor::capture(&frame(&rgb), region);
        assert!(!plain.matches(&frame(&changed)).is_match());
        let found = anchor.matches(&frame(&changed));
        assert_eq!((found.tiles, found.differing), (14, 1));
        assert!(found.is_match());
        let count = |wanted| {
            let pixels = frame(&changed);
            anchor
                .compare(&pixels)
                .filter(|(_, found)| *found == wanted)
                .count()
        };
        assert_eq!(
            [TileMatch::Same, TileMatch::Differs, TileMatch::Uncompared].map(count),
            [13, 1, 2]
        );
        // A window that covers all of it is still seen.
        paint(&mut changed, 32, 32, 64, 64);
        assert!(!anchor.matches(&frame(&changed)).is_match());
    }

    #[test]
    fn another_screen_size_does_not_match() {
        let rgb = picture();
        let anchor = Anchor::capture(
            &frame(&rgb),
            Region {
                x: 100,
                y: 60,
                width: 64,
                height: 64,
            },
        );
        let smaller = Pixels {
            width: 120,
            height: 80,
            rgb: &rgb,
        };
        assert!(!anchor.matches(&smaller).is_match());
    }

    #[test]
    fn what_lies_around_the_region_does_not_matter() {
        let rgb = picture();
        let region = Region {
            x: 32,
            y: 32,
            width: 50,
            height: 40,
        };
        let anchor = Anchor::capture(&frame(&rgb), region);
        let mut changed = rgb.clone();
        paint(&mut changed, 0, 0, 200, 32);
        paint(&mut changed, 82, 0, 100, 120);
        paint(&mut changed, 0, 72, 200, 48);
        assert_eq!(anchor.matches(&frame(&changed)).differing, 0);
    }

    #[test]
    fn a_square_around_a_point_stays_on_the_plane() {
        assert_eq!(
            Region::around(100, 50, 64),
            Region {
                x: 68,
                y: 18,
                width: 64,
                height: 64
            }
        );
        assert_eq!(
            Region::around(10, 0, 64),
            Region {
                x: 0,
                y: 0,
                width: 42,
                height: 32
            }
        );
        assert_eq!(
            Region::around(u16::MAX, 0, 64),
            Region {
                x: 65503,
                y: 0,
                width: 32,
                height: 32
            }
        );
    }
}
