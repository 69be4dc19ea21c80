//! Pictures of a miss, for a person to see what went another way.
//!
//! The log holds no pictures of what was expected, only hashes: some kilobytes a picture would
//! outweigh all the rest of it, and show what the user saw to whoever opens a log. So one picture
//! is what the replay's screen showed, and the other the part of it that is known to be as
//! expected. Both are of the user's screen: `Debug` tells sizes only.

use std::fmt;
use std::io::{self, Cursor};
use std::ops::Range;

use image::{ImageFormat, RgbImage};
use traces::{Anchor, Pixels, Region, TileMatch};

/// Columns and rows, at most: anchors are smaller, but a log is written by others.
const EDGE: u16 = 512;
/// What is shown around the anchor's region on each side: enough to see where that is.
const MARGIN: u16 = 80;
/// What a pixel that should have been another is drawn as, every few of them.
const STRUCK: [u8; 3] = [255, 0, 255];
/// The distance of those.
const STRIPES: usize = 4;

/// Part of a screen.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// Red, green and blue of each pixel, row by row.
    pub rgb: Vec<u8>,
}

/// The two pictures of a miss, of the anchor's region and what is around it on the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissPictures {
    /// What the screen showed.
    pub seen: Picture,
    /// What is known of what was expected: tiles that are as they were recorded, as they are;
    /// those that differ struck out in magenta, as only their hashes were recorded; all else
    /// dimmed: those that change by themselves, and what is around the region.
    pub expected: Picture,
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Picture")
            .field("width", &self.width)
            .field("height", &self.height)
            .finish_non_exhaustive()
    }
}

impl Picture {
    /// The picture as a PNG file.
    ///
    /// # Errors
    /// If `rgb` has another length than `width * height * 3`, or the picture is empty.
    pub fn png(&self) -> io::Result<Vec<u8>> {
        let (width, height) = (self.width.into(), self.height.into());
        let image = RgbImage::from_raw(width, height, self.rgb.clone())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let mut png = Cursor::new(Vec::new());
        image
            .write_to(&mut png, ImageFormat::Png)
            .map_err(io::Error::other)?;
        Ok(png.into_inner())
    }

    /// Where a stretch of a row lies in `rgb`.
    fn place(&self, y: usize, columns: &Range<usize>) -> Range<usize> {
        let start = y * usize::from(self.width);
        (start + columns.start) * 3..(start + columns.end) * 3
    }
}

impl MissPictures {
    /// None where nothing of the region is on the screen.
    pub(crate) fn take(frame: &Pixels<'_>, anchor: &Anchor) -> Option<Self> {
        let shown = around(frame, anchor.region)?;
        let seen = cut(frame, shown)?;
        let mut expected = seen.clone();
        dim(&mut expected.rgb);
        for (tile, found) in anchor.compare(frame) {
            let Some(tile) = within(shown, tile) else {
                continue;
            };
            match found {
                TileMatch::Same => keep(&mut expected, &seen, &tile),
                TileMatch::Differs => strike(&mut expected, &tile),
                TileMatch::Uncompared => {}
            }
        }
        Some(Self { seen, expected })
    }
}

/// The region with what is around it on the screen.
fn around(frame: &Pixels<'_>, region: Region) -> Option<Region> {
    let span = |from: u16, size: u16, limit: u16| {
        if from >= limit || size == 0 {
            return None;
        }
        let to = from.saturating_add(size).saturating_add(MARGIN).min(limit);
        let from = from.saturating_sub(MARGIN);
        Some((from, (to - from).min(EDGE)))
    };
    let (x, width) = span(region.x, region.width, frame.width)?;
    let (y, height) = span(region.y, region.height, frame.height)?;
    Some(Region {
        x,
        y,
        width,
        height,
    })
}

fn cut(frame: &Pixels<'_>, shown: Region) -> Option<Picture> {
    let (width, height) = (usize::from(shown.width), usize::from(shown.height));
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        let row = usize::from(shown.y) + y;
        let start = row * usize::from(frame.width) + usize::from(shown.x);
        rgb.extend_from_slice(frame.rgb.get(start * 3..(start + width) * 3)?);
    }
    Some(Picture {
        width: shown.width,
        height: shown.height,
        rgb,
    })
}

/// Columns and rows of a tile in the picture, as far as it is there.
fn within(shown: Region, tile: Region) -> Option<[Range<usize>; 2]> {
    let span = |from: u16, size: u16, at: u16, limit: u16| {
        let from = usize::from(from.checked_sub(at)?);
        let to = (from + usize::from(size)).min(limit.into());
        (from < to).then_some(from..to)
    };
    Some([
        span(tile.x, tile.width, shown.x, shown.width)?,
        span(tile.y, tile.height, shown.y, shown.height)?,
    ])
}

fn keep(picture: &mut Picture, seen: &Picture, [columns, rows]: &[Range<usize>; 2]) {
    for y in rows.clone() {
        let place = picture.place(y, columns);
        if let (Some(into), Some(from)) = (picture.rgb.get_mut(place.clone()), seen.rgb.get(place))
        {
            into.copy_from_slice(from);
        }
    }
}

fn strike(picture: &mut Picture, [columns, rows]: &[Range<usize>; 2]) {
    for y in rows.clone() {
        let place = picture.place(y, columns);
        let row = picture.rgb.get_mut(place).unwrap_or_default();
        for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
            if (x + y) % STRIPES < STRIPES / 2 {
                pixel.copy_from_slice(&STRUCK);
            }
        }
    }
}

fn dim(rgb: &mut [u8]) {
    for value in rgb {
        *value /= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_show_what_is_known_and_tell_nothing_else() {
        let (width, height) = (48, 32);
        let rgb = vec![200; 48 * 32 * 3];
        let frame = Pixels {
            width,
            height,
            rgb: &rgb,
        };
        let region = Region {
            x: 0,
            y: 0,
            width: 40,
            height: 32,
        };
        let mut anchor = Anchor::capture(&frame, region);
        anchor.tiles[1] ^= 1;
        anchor.tiles[3] = Anchor::UNCOMPARED;
        let pictures = MissPictures::take(&frame, &anchor).unwrap();
        let Picture { width, height, rgb } = &pictures.seen;
        assert_eq!((*width, *height, rgb.len()), (48, 32, 48 * 32 * 3));
        assert!(rgb.iter().all(|value| *value == 200));
        let pixel = |x: usize, y: usize| {
            let at = (y * 48 + x) * 3;
            [0, 1, 2].map(|i| pictures.expected.rgb[at + i])
        };
        assert_eq!(pixel(3, 3), [200; 3]);
        assert_eq!((pixel(16, 0), pixel(18, 0)), (STRUCK, [50; 3]));
        assert_eq!((pixel(3, 20), pixel(39, 31)), ([50; 3], [200; 3]));
        assert_eq!(pixel(40, 3), [50; 3]);
        assert!(!format!("{pictures:?}").contains("200"));
        let png = pictures.expected.png().unwrap();
        let read = image::load_from_memory(&png).unwrap().into_rgb8();
        assert_eq!(read.into_raw(), pictures.expected.rgb);
    }

    #[test]
    fn regions_beyond_the_screen_do_no_harm() {
        let rgb = vec![1; 600 * 20 * 3];
        let frame = Pixels {
            width: 600,
            height: 20,
            rgb: &rgb,
        };
        let take = |x, y, width, height| {
            let region = Region {
                x,
                y,
                width,
                height,
            };
            let anchor = Anchor {
                region,
                tiles: vec![7; 5],
            };
            MissPictures::take(&frame, &anchor).map(|p| (p.seen.width, p.seen.height))
        };
        assert_eq!(take(590, 10, 80, 16), Some((90, 20)));
        assert_eq!(take(200, 2, 96, 8), Some((256, 20)));
        assert_eq!(take(0, 0, u16::MAX, u16::MAX), Some((512, 20)));
        assert_eq!(take(600, 0, 80, 16), None);
        assert_eq!(take(700, 0, 80, 16), None);
        let short = Pixels {
            rgb: &rgb[..90],
            ..frame
        };
        let anchor = Anchor::capture(&frame, Region::around(50, 10, 32));
        assert!(MissPictures::take(&short, &anchor).is_none());
    }
}
