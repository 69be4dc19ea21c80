//! Pictures of a miss, for a person to see what went another way.
//!
//! The log holds no pictures of what was expected, only hashes: eight kilobytes a picture would
//! outweigh all the rest of it, and show what the user saw to whoever opens a log. So one picture
//! is what the replay's screen showed, and the other the part of it that is known to be as
//! expected. Both are of the user's screen: `Debug` tells sizes only.

use std::fmt;
use std::io::{self, Cursor};

use image::{ImageFormat, RgbImage};
use traces::{Anchor, Pixels, Region, TileMatch};

/// Columns and rows, at most: anchors are smaller, but a log is written by others.
const EDGE: u16 = 512;
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

/// The two pictures of a miss, of the anchor's region as far as it is on the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissPictures {
    /// What the screen showed.
    pub seen: Picture,
    /// What is known of what was expected: tiles that are as they were recorded, as they are;
    /// those that differ struck out in magenta, as only their hashes were recorded; those that
    /// change by themselves dimmed.
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

    fn row(&mut self, y: usize, from: usize, to: usize) -> Option<&mut [u8]> {
        let start = y * usize::from(self.width);
        self.rgb.get_mut((start + from) * 3..(start + to) * 3)
    }
}

impl MissPictures {
    /// None where nothing of the region is on the screen.
    pub(crate) fn take(frame: &Pixels<'_>, anchor: &Anchor) -> Option<Self> {
        let seen = cut(frame, anchor.region)?;
        let mut expected = seen.clone();
        for (tile, found) in anchor.compare(frame) {
            mark(&mut expected, anchor.region, tile, found);
        }
        Some(Self { seen, expected })
    }
}

fn cut(frame: &Pixels<'_>, region: Region) -> Option<Picture> {
    let width = region
        .width
        .min(frame.width.checked_sub(region.x)?)
        .min(EDGE);
    let height = region
        .height
        .min(frame.height.checked_sub(region.y)?)
        .min(EDGE);
    let mut rgb = Vec::with_capacity(usize::from(width) * usize::from(height) * 3);
    for y in 0..usize::from(height) {
        let start = (usize::from(region.y) + y) * usize::from(frame.width) + usize::from(region.x);
        let row = start * 3..(start + usize::from(width)) * 3;
        rgb.extend_from_slice(frame.rgb.get(row)?);
    }
    (!rgb.is_empty()).then_some(Picture { width, height, rgb })
}

fn mark(picture: &mut Picture, region: Region, tile: Region, found: TileMatch) {
    let from = usize::from(tile.x.saturating_sub(region.x));
    let to = (from + usize::from(tile.width)).min(picture.width.into());
    let top = usize::from(tile.y.saturating_sub(region.y));
    let bottom = (top + usize::from(tile.height)).min(picture.height.into());
    if from >= to || found == TileMatch::Same {
        return;
    }
    for y in top..bottom {
        let Some(row) = picture.row(y, from, to) else {
            return;
        };
        for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
            match found {
                TileMatch::Differs if (x + y) % STRIPES < 2 => pixel.copy_from_slice(&STRUCK),
                _ => pixel.iter_mut().for_each(|value| *value /= 4),
            }
        }
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
        assert_eq!((*width, *height, rgb.len()), (40, 32, 40 * 32 * 3));
        assert!(rgb.iter().all(|value| *value == 200));
        let pixel = |x: usize, y: usize| {
            let at = (y * 40 + x) * 3;
            [0, 1, 2].map(|i| pictures.expected.rgb[at + i])
        };
        assert_eq!(pixel(3, 3), [200; 3]);
        assert_eq!((pixel(16, 0), pixel(18, 0)), (STRUCK, [50; 3]));
        assert_eq!((pixel(3, 20), pixel(39, 31)), ([50; 3], [200; 3]));
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
        assert_eq!(take(590, 10, 80, 16), Some((10, 10)));
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
