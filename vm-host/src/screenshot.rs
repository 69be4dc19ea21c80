//! Pictures of the guest's screen.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use image::RgbImage;

use crate::error::Context as _;
use crate::runtime::remove;
use crate::{Error, Result, Vm};

/// QEMU's VNC server stops at 5120 by 2160; nothing reads a larger screen.
const EDGE_MAX: u32 = 8192;

impl Vm {
    /// What the screen shows now, the guest running or not. Takes a few milliseconds.
    ///
    /// The pointer isn't on it where the guest leaves drawing it to the viewer.
    pub async fn screenshot(&self) -> Result<RgbImage> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self
            .paths
            .dir
            .join(format!("screen-{}-{number}.ppm", std::process::id()));
        let filename = path.to_string_lossy().into_owned();
        // PPM, the default, is what every version writes.
        let command = qapi::qmp::screendump {
            device: None,
            head: None,
            format: None,
            filename,
        };
        let taken = self.ask("take a screenshot", command).await;
        let bytes = taken.and_then(|_| fs::read(&path).context("read", &path));
        remove(&path)?;
        parse_ppm(&bytes?).map_err(|reason| Error::Screenshot {
            reason: reason.to_owned(),
        })
    }
}

/// Reads a binary PPM of 8 bits a colour (`P6`, see netpbm's ppm(5)).
fn parse_ppm(bytes: &[u8]) -> Result<RgbImage, &'static str> {
    let mut rest = bytes;
    let mut word = || {
        let end = rest
            .iter()
            .position(u8::is_ascii_whitespace)
            .ok_or("its header is cut short")?;
        let (word, after) = (rest.get(..end), rest.get(end + 1..));
        rest = after.unwrap_or_default();
        word.and_then(|w| std::str::from_utf8(w).ok())
            .ok_or("its header isn't text")
    };
    if word()? != "P6" {
        return Err("it is no PPM");
    }
    let mut number = || {
        word()?
            .parse::<u32>()
            .map_err(|_| "its header has no numbers")
    };
    let (width, height, depth) = (number()?, number()?, number()?);
    if width > EDGE_MAX || height > EDGE_MAX || depth != 255 {
        return Err("its size or depth is out of bounds");
    }
    let length = width as usize * height as usize * 3;
    let pixels = rest.get(..length).ok_or("its pixels are cut short")?;
    RgbImage::from_raw(width, height, pixels.to_vec()).ok_or("its pixels are cut short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_read() {
        let image = parse_ppm(b"P6\n2 1\n255\nabc\n\n\n").unwrap();
        assert_eq!((image.width(), image.height()), (2, 1));
        assert_eq!(image.get_pixel(0, 0).0, *b"abc");
        assert_eq!(image.get_pixel(1, 0).0, *b"\n\n\n");
    }

    #[test]
    fn broken_pictures_are_refused() {
        for bytes in [
            &b""[..],
            b"P6",
            b"P5\n1 1\n255\nabc",
            b"P6\n1 x\n255\nabc",
            b"P6\n4294967295 4294967295\n255\nabc",
            b"P6\n1 1\n65535\nabcabc",
            b"P6\n2 1\n255\nabc",
        ] {
            assert!(parse_ppm(bytes).is_err(), "{bytes:?}");
        }
    }
}
