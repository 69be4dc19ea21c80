//! The delta codecs of the papers on the pages that a target with the base lacks.
//!
//! VMsync found that sending dirty pages takes three times as many bytes as sending the bytes
//! in them that changed; [`DeltaRow::dirty_to_changed`] is that figure for a capture. RAM of
//! two captured desktop sessions has 3.09 and 3.10, their disks 1.15.

use std::time::Instant;

use reconciler::{
    Holdings, ImageTree, Known, Offer, OfferOptions, PAGE_SIZE, Page, PageDelta, Place, PlaceKind,
    ReadPages, Salt, resolve,
};
use serde::Serialize;

use crate::error::{Error, Result};

/// One codec on one image.
#[derive(Clone, Debug, Serialize)]
pub struct DeltaRow {
    /// As [`PageDelta::name`] says.
    pub codec: String,
    /// As in [`crate::Row`].
    pub image: String,
    /// Pages that differ from the base, and whose content the base and the disks have nowhere.
    pub pages: u64,
    /// Bytes in them.
    pub dirty_bytes: u64,
    /// Bytes in them that differ from the base.
    pub changed_bytes: u64,
    /// Pages that the codec cannot tell in less than a page, and leaves as they are.
    pub overflows: u64,
    /// What it makes of all.
    pub encoded_bytes: u64,
    /// The same, compressed with zstd at level 3, all pages together.
    pub zstd_bytes: u64,
    /// What telling takes, without compressing.
    pub encode_seconds: f64,
    /// What making pages of it takes.
    pub decode_seconds: f64,
}

impl DeltaRow {
    /// How many bytes of dirty pages there are for each that changed.
    pub fn dirty_to_changed(&self) -> f64 {
        self.dirty_bytes as f64 / self.changed_bytes.max(1) as f64
    }

    /// The heads of [`DeltaRow::line`]'s columns.
    pub fn heads() -> String {
        format!(
            "{:13} {:7} {:>8} {:>12} {:>12} {:>6} {:>9} {:>12} {:>12} {:>8} {:>8}",
            "delta",
            "image",
            "pages",
            "dirty bytes",
            "changed",
            "ratio",
            "overflows",
            "encoded",
            "with zstd",
            "encode s",
            "decode s"
        )
    }

    /// For a table in a terminal.
    pub fn line(&self) -> String {
        format!(
            "{:13} {:7} {:>8} {:>12} {:>12} {:>6.2} {:>9} {:>12} {:>12} {:>8.2} {:>8.2}",
            self.codec,
            self.image,
            self.pages,
            self.dirty_bytes,
            self.changed_bytes,
            self.dirty_to_changed(),
            self.overflows,
            self.encoded_bytes,
            self.zstd_bytes,
            self.encode_seconds,
            self.decode_seconds,
        )
    }
}

/// An image and its tree.
pub(crate) type Side<'a> = (&'a dyn ReadPages, &'a ImageTree);

/// Runs codecs on what `image` has and neither `base` nor `others` hold.
pub(crate) fn measure(
    which: &[PageDelta],
    name: &str,
    image: Side<'_>,
    base: Side<'_>,
    others: &[Side<'_>],
) -> Result<Vec<DeltaRow>> {
    if which.is_empty() {
        return Ok(Vec::new());
    }
    let failed = |source| Error::Reconcile {
        strategy: "telling deltas",
        image: name.to_owned(),
        source,
    };
    let sides = std::iter::once(&base).chain(others);
    let places: Vec<Place<'_>> = sides
        .map(|(reader, tree)| Place {
            kind: PlaceKind::Base,
            tree,
            reader: *reader,
        })
        .collect();
    let shared: Vec<_> = places.iter().map(|place| place.tree).collect();
    let holdings = Holdings {
        base: base.1,
        base_reader: Some(base.0),
        current: base.1,
        places: &places,
    };
    let known = Known {
        shared: &shared,
        twin: &[],
        nothing_else: true,
    };
    let options = OfferOptions {
        salt: Salt([7; 32]),
        candidates: holdings.candidates(),
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let offer = Offer::knowing(image.1, base.1, &known, &options).map_err(failed)?;
    let lacking = resolve(&offer, &holdings)
        .and_then(|resolution| resolution.answer(&offer))
        .and_then(|answer| offer.decode_answer(&answer))
        .map_err(failed)?;
    let mut pages = Vec::with_capacity(lacking.len());
    let unreadable = |page| {
        move |source| {
            failed(reconciler::Error::Read {
                image: "the capture",
                page,
                source,
            })
        }
    };
    for index in lacking {
        let (mut old, mut new) = (Box::new([0; PAGE_SIZE]), Box::new([0; PAGE_SIZE]));
        base.0.read(index, &mut old).map_err(unreadable(index))?;
        image.0.read(index, &mut new).map_err(unreadable(index))?;
        pages.push((old, new));
    }
    which
        .iter()
        .map(|delta| one(name, *delta, &pages))
        .collect()
}

fn one(name: &str, delta: PageDelta, pages: &[(Box<Page>, Box<Page>)]) -> Result<DeltaRow> {
    let begun = Instant::now();
    let encoded: Vec<Option<Vec<u8>>> = pages
        .iter()
        .map(|(old, new)| delta.encode(old, new))
        .collect();
    let encode_seconds = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    for ((old, new), encoded) in pages.iter().zip(&encoded) {
        let Some(encoded) = encoded else {
            continue;
        };
        let mut page = **old;
        delta
            .decode(encoded, &mut page)
            .map_err(|source| Error::Reconcile {
                strategy: delta.name(),
                image: name.to_owned(),
                source,
            })?;
        if page != **new {
            return Err(Error::Differs {
                strategy: delta.name(),
                image: name.to_owned(),
                page: 0,
            });
        }
    }
    let decode_seconds = begun.elapsed().as_secs_f64();
    let mut all = Vec::new();
    for ((_, new), encoded) in pages.iter().zip(&encoded) {
        all.extend_from_slice(encoded.as_deref().unwrap_or(&**new));
    }
    let changed = pages.iter().map(|(old, new)| {
        let pairs = old.iter().zip(&**new);
        pairs.filter(|(old, new)| old != new).count() as u64
    });
    let zstd = zstd::bulk::compress(&all, 3);
    Ok(DeltaRow {
        codec: delta.name().to_owned(),
        image: name.to_owned(),
        pages: pages.len() as u64,
        dirty_bytes: (pages.len() * PAGE_SIZE) as u64,
        changed_bytes: changed.sum(),
        overflows: encoded.iter().filter(|encoded| encoded.is_none()).count() as u64,
        encoded_bytes: all.len() as u64,
        zstd_bytes: zstd.map_err(Error::Compress)?.len() as u64,
        encode_seconds,
        decode_seconds,
    })
}
