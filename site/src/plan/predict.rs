//! How many bytes it takes to reconcile a state with a base, found out without a target.
//!
//! The offer is the exchange's own: a target that has not replayed holds the base and the disks
//! that came before, so what it lacks is known here. A sample of that goes through the real
//! encoder at the line's own level. The device state is left out: a guest that runs has none,
//! and it takes some ten thousand bytes.

use reconciler::{
    EncodeOptions, Holdings, Known, Offer, OfferOptions, PageIndex, Place, PlaceKind, References,
    Salt, SlicePages,
};

use crate::error::{Error, Result};
use crate::exchange::shared;
use crate::protocol::ImageKind;
use crate::state::{Base, State};

/// Pages compressed to predict what all would compress to.
const SAMPLE: usize = 1024;

/// The sample is taken in so many runs: pages compress with their neighbours.
const RUNS: usize = 16;

/// About how many bytes the disks and RAM of a state take that are reconciled with a base.
pub(crate) fn bytes(state: &State, base: &Base, rate: f64) -> Result<f64> {
    let kinds = state.heads().into_iter().map(|head| head.kind);
    kinds
        .filter(|kind| *kind != ImageKind::Device)
        .map(|kind| image(state, base, kind, rate))
        .sum()
}

fn image(state: &State, base: &Base, kind: ImageKind, rate: f64) -> Result<f64> {
    let failed = || Error::reconcile("cannot predict what an image takes");
    let base_tree = base.tree(kind)?;
    let base_ram = base.tree(ImageKind::Ram)?;
    let shared = shared(state, base, kind, &base_tree, &base_ram, false)?;
    let shared: Vec<_> = shared.iter().map(AsRef::as_ref).collect();
    let options = OfferOptions {
        // Nobody else sees it.
        salt: Salt([0; 32]),
        candidates: base.candidates(),
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let known = Known {
        shared: &shared,
        twin: &[],
        nothing_else: true,
    };
    let offer = Offer::knowing(state.tree(kind), &base_tree, &known, &options).map_err(failed())?;
    // To find out where a page is, only trees are looked at.
    let unread = SlicePages(&[]);
    let places: Vec<Place<'_>> = shared
        .iter()
        .map(|tree| Place {
            kind: PlaceKind::OtherImage,
            tree,
            reader: &unread,
        })
        .collect();
    let holdings = Holdings {
        base: &base_tree,
        base_reader: Some(&unread),
        current: &base_tree,
        places: &places,
    };
    let resolution = reconciler::resolve(&offer, &holdings).map_err(failed())?;
    let answer = resolution.answer(&offer).map_err(failed())?;
    let lacking = offer.decode_answer(&answer).map_err(failed())?;
    let hashes = offer.encode().map_err(failed())?.len() + answer.len();
    let taken = sample(&lacking);
    if taken.is_empty() {
        return Ok(hashes as f64);
    }
    let options = EncodeOptions::for_line(rate as u64);
    let stats = state.with_pages(kind, |pages| {
        base.with_pages(kind, |base| {
            let references = References {
                base,
                ..References::default()
            };
            reconciler::encode_pages(pages, references, &taken, options, &mut |_| Ok(()))
        })
    });
    let sampled = stats.map_err(failed())?.bytes() as f64;
    Ok(hashes as f64 + sampled / taken.len() as f64 * lacking.len() as f64)
}

/// Runs of pages from all over; all of them, where they are few.
fn sample(pages: &[PageIndex]) -> Vec<PageIndex> {
    if pages.len() <= SAMPLE {
        return pages.to_vec();
    }
    let part = pages.len() / RUNS;
    pages
        .chunks(part)
        .take(RUNS)
        .flat_map(|part| part.iter().take(SAMPLE / RUNS).copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_runs_from_all_over() {
        let pages: Vec<PageIndex> = (0..100_001).map(PageIndex).collect();
        let taken = sample(&pages);
        assert_eq!(taken.len(), SAMPLE);
        assert!(taken.is_sorted());
        assert!(taken.last().unwrap().0 > 90_000);
        let next = |pair: &[PageIndex]| pair[1].0 == pair[0].0 + 1;
        let neighbours = taken.windows(2).filter(|pair| next(pair)).count();
        assert_eq!(neighbours, SAMPLE - RUNS);
        assert_eq!(sample(&pages[..SAMPLE]), &pages[..SAMPLE]);
        assert_eq!(sample(&pages[..=SAMPLE]).len(), SAMPLE);
        assert_eq!(sample(&[]), &[]);
    }
}
