//! Deduplication and xz, as VM handoff has it for a thin line (Ha et al., "You Can Teach
//! Elephants to Dance: Agile VM Handoff for Edge Computing", SEC 2017), and the yardstick beside
//! it.
//!
//! Of the pages that changed, one that the target has anywhere (RAM, disk or device state of the
//! base, whatever was sent before) costs a reference of 8 bytes; the others go through `xz -6`,
//! one stream for each image. Which pages these are is not counted, in the peer's favour.

use std::collections::HashMap;
use std::io::{Read, Write as _};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use liblzma::read::XzDecoder;
use liblzma::write::XzEncoder;
use vm_host::RamMap;

use crate::capture::{Capture, PAGE, changed, gives, page_of};
use crate::rows::{Row, Way};

/// What saying where a page is takes.
const REFERENCE: u64 = 8;
const XZ_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// Where a page is: in which of the images that the target has, and its index there.
type Place = (usize, usize);

/// 128 bits: no two pages of some GiB share them by chance, and what is found is compared.
type Key = [u8; 16];

fn key_of(page: &[u8; PAGE]) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
    key
}

/// Measures and decodes; works for some minutes where images are large.
pub(crate) fn dedup_xz(capture: &Capture) -> anyhow::Result<Vec<Row>> {
    // First all of the base, then the source's as they are sent.
    let mut images: Vec<RamMap> = Vec::new();
    for state in ["base", "source"] {
        for image in &capture.images {
            images.push(capture.map(state, image)?);
        }
    }
    let count = capture.images.len();
    let began = Instant::now();
    let mut known: HashMap<Key, Place> = HashMap::new();
    for (at, image) in images[..count].iter().enumerate() {
        for index in 0..image.len().div_ceil(PAGE) {
            let page = page_of(image, index).filter(|page| *page != [0; PAGE]);
            if let Some(page) = page {
                known.entry(key_of(&page)).or_insert((at, index));
            }
        }
    }
    let prepared = began.elapsed().as_secs_f64() / count as f64;
    let mut rows = Vec::new();
    for (at, image) in capture.images.iter().enumerate() {
        let began = Instant::now();
        let source = &images[count + at];
        let mut literals = Vec::new();
        let mut references = 0;
        let mut encoder = XzEncoder::new(Vec::new(), XZ_LEVEL);
        for index in changed(&images[at], source) {
            let page = page_of(source, index).context("an image has grown shorter")?;
            let key = key_of(&page);
            let place = known.get(&key);
            let there = place.and_then(|(image, index)| page_of(&images[*image], *index));
            if page == [0; PAGE] || there == Some(page) {
                references += 1;
                continue;
            }
            known.entry(key).or_insert((count + at, index));
            literals.push(index);
            encoder.write_all(&page).context("xz failed")?;
        }
        let packed = encoder.finish().context("xz failed")?;
        let seconds = began.elapsed().as_secs_f64() + prepared;
        // References have been compared above.
        let mut unpacking = XzDecoder::new(&packed[..]);
        check(&mut unpacking, source, &literals)?;
        ensure!(
            gives(unpacking, &[]).context("cannot unpack what xz packed")?,
            "xz unpacked more than was packed"
        );
        let bytes = packed.len() as u64 + REFERENCE * references;
        let mut row = capture.row(Way::DedupXz, &image.name, bytes, seconds);
        row.note = format!(
            "{} pages through xz -{XZ_LEVEL}, {references} references of {REFERENCE} bytes; which \
             pages these are is not counted",
            literals.len()
        );
        rows.push(row);
    }
    Ok(rows)
}

/// Pages that differ from the base at the same place, one after the other through zstd.
pub(crate) fn changed_zstd(capture: &Capture) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for image in &capture.images {
        let (base, source) = (capture.map("base", image)?, capture.map("source", image)?);
        let began = Instant::now();
        let mut encoder =
            zstd::stream::Encoder::new(Vec::new(), ZSTD_LEVEL).context("zstd failed")?;
        let pages: Vec<usize> = changed(&base, &source).collect();
        for index in &pages {
            let page = page_of(&source, *index).context("an image has grown shorter")?;
            encoder.write_all(&page).context("zstd failed")?;
        }
        let packed = encoder.finish().context("zstd failed")?;
        let seconds = began.elapsed().as_secs_f64();
        let mut unpacking = zstd::stream::Decoder::new(&packed[..]).context("zstd failed")?;
        check(&mut unpacking, &source, &pages)?;
        let mut row = capture.row(Way::ChangedZstd, &image.name, packed.len() as u64, seconds);
        row.note = format!(
            "{} pages in one stream; which pages these are is not counted",
            pages.len()
        );
        rows.push(row);
    }
    Ok(rows)
}

/// Whether these pages are what comes out next.
fn check(unpacking: &mut impl Read, source: &[u8], pages: &[usize]) -> anyhow::Result<()> {
    for index in pages {
        let mut unpacked = [0; PAGE];
        unpacking
            .read_exact(&mut unpacked)
            .context("cannot unpack what was packed")?;
        ensure!(
            page_of(source, *index) == Some(unpacked),
            "page {index} is not as it was packed"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::tests::small;

    #[test]
    fn pages_are_found_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let rows = dedup_xz(&small(dir.path())).unwrap();
        let of = |name: &str| rows.iter().find(|row| row.images == name).unwrap();
        // One is on the disk, one elsewhere in RAM, one is empty; two are new, and noise.
        let ram = of("ram");
        assert!(
            ram.note.starts_with("2 pages through xz -6, 3 references"),
            "{}",
            ram.note
        );
        let bytes = ram.bytes.unwrap();
        assert!((8192 + 24..8192 + 400).contains(&bytes), "{bytes}");
        assert!(
            of("disk").note.starts_with("1 pages"),
            "{}",
            of("disk").note
        );
        assert!(
            of("device").note.starts_with("1 pages"),
            "{}",
            of("device").note
        );
    }

    #[test]
    fn changed_pages_are_all_counted() {
        let dir = tempfile::tempdir().unwrap();
        let rows = changed_zstd(&small(dir.path())).unwrap();
        let ram = rows.iter().find(|row| row.images == "ram").unwrap();
        assert!(ram.note.starts_with("5 pages"), "{}", ram.note);
        let bytes = ram.bytes.unwrap();
        assert!((4 * 4096..4 * 4096 + 200).contains(&bytes), "{bytes}");
    }

    #[test]
    fn other_pages_are_refused() {
        let source = [3; 2 * PAGE];
        assert!(check(&mut &source[..], &source, &[0, 1]).is_ok());
        assert!(check(&mut &source[..PAGE], &source, &[0, 1]).is_err());
        assert!(check(&mut &[4; PAGE][..], &source, &[1]).is_err());
    }
}
