//! What the robot sees, and when which part of it last changed.

use std::time::Duration;

use image::RgbImage;
use tokio::time::Instant;
use vnc::{Rect, VncEvent};

/// Edge of the squares whose changes are told apart, in pixels.
const TILE: usize = 16;
/// Bytes of a pixel on the wire: red, green, blue, padding.
const WIRE_PIXEL: usize = 4;
/// Bytes of a pixel as kept.
const RGB: usize = 3;

/// A part of the screen, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First column.
    pub x: u16,
    /// First row.
    pub y: u16,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The last change of a tile.
#[derive(Clone, Copy)]
struct Tile {
    at: Instant,
    /// The number of the change, over the whole canvas.
    number: u64,
}

/// The screen's pixels, with the time of the last change of each tile.
#[derive(Default)]
pub(super) struct Canvas {
    width: u16,
    height: u16,
    rgb: Vec<u8>,
    tiles: Vec<Tile>,
    changes: u64,
    /// Pixels received since the size last changed: the first update is a full one.
    received: u64,
}

impl Canvas {
    pub(super) fn is_whole(&self) -> bool {
        let all = u64::from(self.width) * u64::from(self.height);
        all > 0 && self.received >= all
    }

    /// The number of the last change.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// How long no pixel of the region has changed.
    pub(super) fn quiet_for(&self, region: Option<Region>, now: Instant) -> Duration {
        let last = self.tiles_in(region).map(|tile| tile.at).max();
        last.map_or(Duration::MAX, |last| now.duration_since(last))
    }

    /// Whether a pixel of the region has changed after the change of this number.
    pub(super) fn changed_since(&self, region: Option<Region>, number: u64) -> bool {
        self.tiles_in(region).any(|tile| tile.number > number)
    }

    /// Whether a picture is shown there, all of it.
    pub(super) fn shows(&self, picture: &RgbImage, (x, y): (u16, u16)) -> bool {
        let screen = usize::from(self.width) * RGB;
        let width = picture.width() as usize * RGB;
        let left = usize::from(x) * RGB;
        if width == 0 || left + width > screen {
            return false;
        }
        let shown = self.rgb.chunks(screen).skip(y.into());
        let rows = picture.as_raw().chunks(width);
        rows.len() <= shown.len()
            && rows
                .zip(shown)
                .all(|(row, shown)| shown.get(left..left + width) == Some(row))
    }

    pub(super) fn picture(&self) -> RgbImage {
        // The buffer always has the size of the screen.
        RgbImage::from_raw(self.width.into(), self.height.into(), self.rgb.clone())
            .unwrap_or_default()
    }

    pub(super) fn apply(&mut self, event: &VncEvent, now: Instant) {
        match event {
            VncEvent::SetResolution(screen) => self.resize(screen.width, screen.height, now),
            VncEvent::RawImage(rect, pixels) => self.draw(*rect, pixels, now),
            // The rest was not asked for, or is not about pixels.
            _ => {}
        }
    }

    fn columns(&self) -> usize {
        usize::from(self.width).div_ceil(TILE)
    }

    fn tiles_in(&self, region: Option<Region>) -> impl Iterator<Item = Tile> + '_ {
        let columns = self.columns().max(1);
        let (x, y) = region.map_or((0..usize::MAX, 0..usize::MAX), |r| {
            let tiles = |from: u16, length: u16| {
                usize::from(from) / TILE..(usize::from(from) + usize::from(length)).div_ceil(TILE)
            };
            (tiles(r.x, r.width), tiles(r.y, r.height))
        });
        self.tiles
            .iter()
            .enumerate()
            .filter(move |(index, _)| {
                x.contains(&(index % columns)) && y.contains(&(index / columns))
            })
            .map(|(_, tile)| *tile)
    }

    fn resize(&mut self, width: u16, height: u16, now: Instant) {
        if (width, height) == (self.width, self.height) {
            return;
        }
        // The client library bounds both: at most 8192 each, 8 Mi pixels together.
        (self.width, self.height) = (width, height);
        self.rgb = vec![0; usize::from(width) * usize::from(height) * RGB];
        self.changes += 1;
        let tiles = self.columns() * usize::from(height).div_ceil(TILE);
        self.tiles = vec![
            Tile {
                at: now,
                number: self.changes
            };
            tiles
        ];
        self.received = 0;
    }

    fn draw(&mut self, rect: Rect, pixels: &[u8], now: Instant) {
        let (Some(right), Some(below)) = (
            self.width.checked_sub(rect.x),
            self.height.checked_sub(rect.y),
        ) else {
            return;
        };
        let columns = usize::from(rect.width.min(right));
        let rows = usize::from(rect.height.min(below));
        if columns == 0 || rows == 0 {
            return;
        }
        let stride = usize::from(self.width) * RGB;
        let tile_columns = self.columns();
        self.changes += 1;
        let wire_rows = pixels
            .chunks_exact(usize::from(rect.width) * WIRE_PIXEL)
            .take(rows);
        for (row, wire) in wire_rows.enumerate() {
            let y = usize::from(rect.y) + row;
            for (column, new) in wire.chunks_exact(WIRE_PIXEL).take(columns).enumerate() {
                let x = usize::from(rect.x) + column;
                let old = &mut self.rgb[y * stride + x * RGB..][..RGB];
                if old != &new[..RGB] {
                    old.copy_from_slice(&new[..RGB]);
                    let tile = &mut self.tiles[y / TILE * tile_columns + x / TILE];
                    *tile = Tile {
                        at: now,
                        number: self.changes,
                    };
                }
            }
        }
        self.received += (columns * rows) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn region(x: u16, y: u16, width: u16, height: u16) -> Region {
        Region {
            x,
            y,
            width,
            height,
        }
    }

    #[test]
    fn a_change_belongs_to_its_region() {
        let mut canvas = Canvas::default();
        let begun = Instant::now();
        canvas.resize(64, 48, begun);
        assert!(!canvas.is_whole());
        let mark = canvas.changes();
        let later = begun + Duration::from_secs(1);
        let rect = Rect {
            x: 40,
            y: 20,
            width: 2,
            height: 1,
        };
        canvas.draw(rect, &[1, 2, 3, 0, 4, 5, 6, 0], later);
        assert!(canvas.changed_since(None, mark));
        assert!(canvas.changed_since(Some(region(32, 16, 16, 16)), mark));
        assert!(!canvas.changed_since(Some(region(0, 0, 32, 48)), mark));
        let now = later + Duration::from_secs(1);
        assert_eq!(
            canvas.quiet_for(Some(region(33, 17, 1, 1)), now),
            Duration::from_secs(1)
        );
        assert_eq!(
            canvas.quiet_for(Some(region(0, 0, 32, 16)), now),
            Duration::from_secs(2)
        );
        let mark = canvas.changes();
        canvas.draw(rect, &[1, 2, 3, 9, 4, 5, 6, 9], now);
        assert!(
            !canvas.changed_since(None, mark),
            "the same pixels once more are no change"
        );
        assert_eq!(canvas.picture().get_pixel(41, 20).0, [4, 5, 6]);
    }

    #[test]
    fn a_picture_is_found_where_it_is_and_nowhere_else() {
        let mut canvas = Canvas::default();
        let now = Instant::now();
        canvas.resize(4, 3, now);
        let rect = Rect {
            x: 1,
            y: 1,
            width: 2,
            height: 2,
        };
        let pixels: Vec<u8> = (0..2 * 2 * WIRE_PIXEL as u8).collect();
        canvas.draw(rect, &pixels, now);
        let picture = image::imageops::crop_imm(&canvas.picture(), 1, 1, 2, 2).to_image();
        assert!(canvas.shows(&picture, (1, 1)));
        for elsewhere in [(0, 1), (1, 0), (2, 1), (3, 1), (1, 2), (1, 9), (9, 1)] {
            assert!(!canvas.shows(&picture, elsewhere), "{elsewhere:?}");
        }
        assert!(!canvas.shows(&RgbImage::new(0, 0), (0, 0)));
    }

    #[test]
    fn what_lies_beyond_the_screen_is_left_out() {
        let mut canvas = Canvas::default();
        let now = Instant::now();
        canvas.resize(2, 1, now);
        let wide = Rect {
            x: 1,
            y: 0,
            width: 2,
            height: 2,
        };
        canvas.draw(wide, &[9; 2 * 2 * WIRE_PIXEL], now);
        assert_eq!(canvas.rgb, [0, 0, 0, 9, 9, 9]);
        canvas.draw(
            Rect {
                x: 5,
                y: 5,
                width: 1,
                height: 1,
            },
            &[7; 4],
            now,
        );
        assert_eq!(canvas.rgb, [0, 0, 0, 9, 9, 9]);
    }
}
