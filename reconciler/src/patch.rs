//! Pages as what a second replay shows to be volatile: the twin.
//!
//! The image that the target built by replaying the source's input is not at hand at the
//! source, so nothing can be sent as the difference to it. But the source can replay its own
//! input on its own copy of the base. Where that image, the twin, differs from the source's
//! are the 8-byte words that depend on timing and chance: times, counters, addresses,
//! identifiers. The target's page differs in much the same words. So the source sends which
//! words those are and what they hold at the source, and the target lays them over its page.
//!
//! Measured on a 768 MiB desktop after 90 s of work: of 14,589 pages that replay got wrong,
//! 10,752 differed in under 256 bytes, and laying the twin's volatile words over the target's
//! pages made 12,064 the source's bit for bit, for 1.67 MiB. With 64-byte lines in place of
//! words 13,293 were, but for 3.4 MiB. Masks as bitmaps and words as they are compress best:
//! runs in place of bitmaps took 8 % more, the words XORed with the base's 3 %, and their bytes
//! sorted into planes 18 %.
//!
//! Promised: a page that passes has the short hash that the offer names; the root is compared
//! at the end all the same. Not promised: that a patch fits. One that does not costs a round
//! trip and its page sent in another way.

use crate::page::{PAGE_SIZE, Page};

/// Words as most of a guest's pointers, times and counters are.
pub(crate) const WORD: usize = 8;
const WORDS: usize = PAGE_SIZE / WORD;
/// A bit for each word of a page.
pub(crate) const MASK_BYTES: usize = WORDS / 8;

/// Pages of which more words than this differ from the twin are no patches: what is left of
/// them is hardly ever the same at the target. The same bound holds for pages that are
/// realigned ([`crate::Layout`]).
///
/// Measured on two sessions of a 768 MiB desktop, LZMA: with a half of all words RAM took 2,591
/// and 4,298 kB, with three tenths 2,563 and 4,195 kB, with a quarter 2,595 and 4,211 kB.
pub(crate) const MOST_WORDS: usize = WORDS * 3 / 10;

/// Pages of which lines with more words than this differ from the target's guess are sent
/// whole. Any bound between three quarters and all came within 0.1 % of the best in the two
/// sessions of [`crate::lines`]; a half was 0.3 and 0.8 % off.
const MOST_IN_LINES: usize = WORDS * 3 / 4;

/// Pages of fewer words are not asked for by lines from the start: the hashes of their lines and one
/// line are as much.
const LEAST_WORDS: usize = 32;

/// Some words of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask(pub(crate) [u8; MASK_BYTES]);

impl Mask {
    /// No words.
    pub(crate) const NONE: Self = Self([0; MASK_BYTES]);

    /// The words in which two pages differ.
    fn differing(page: &Page, other: &Page) -> Self {
        let mut mask = [0; MASK_BYTES];
        let (words, others) = (words_of(page), words_of(other));
        for (i, (word, other)) in words.iter().zip(others).enumerate() {
            mask[i / 8] |= u8::from(word != other) << (i % 8);
        }
        Self(mask)
    }

    /// How many words are in it.
    pub(crate) fn words(&self) -> usize {
        self.0.iter().map(|bits| bits.count_ones() as usize).sum()
    }

    /// The places of its words, ascending.
    fn places(&self) -> impl Iterator<Item = usize> + '_ {
        let bytes = self.0.iter().enumerate().filter(|&(_, &bits)| bits != 0);
        bytes.flat_map(|(i, &bits)| {
            (0..8)
                .filter(move |bit| bits >> bit & 1 == 1)
                .map(move |bit| i * 8 + bit)
        })
    }

    /// Appends its words of `page`.
    pub(crate) fn gather(&self, page: &Page, out: &mut Vec<u8>) {
        let words = words_of(page);
        for place in self.places() {
            out.extend_from_slice(&words[place]);
        }
    }

    /// Puts words where they were gathered from.
    pub(crate) fn overlay(&self, words: &[u8], page: &mut Page) {
        let page = page.as_chunks_mut::<WORD>().0;
        for (place, word) in self.places().zip(words.as_chunks::<WORD>().0) {
            page[place] = *word;
        }
    }
}

fn words_of(page: &Page) -> &[[u8; WORD]] {
    page.as_chunks::<WORD>().0
}

/// How a page is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Literal,
    Delta,
    Patch(Mask),
    /// The words of lines in which the target's guess differs.
    Lines(Mask),
}

/// Chooses by how many 8-byte words each way has to tell.
///
/// A delta that is nearly full compresses worse than text among its like. On a desktop's RAM
/// after replay, deltas took a third off (3.36 to 2.18 MiB at level 3), and any bound between
/// a half and seven eighths was within 1 % of the best.
///
/// A patch has to save a third against the other two, for it may not fit, and its words are
/// those that compress worst. In an 80 s session on a 768 MiB desktop (6,469
/// pages left by replay, level 9) a twin brought all bytes from 2.16 MB to 1.75 MB: 2,671
/// patches fitted and 633 did not. Where patches had only to be shorter 842 did not fit, and it
/// was 1.78 MB; any bound between a half and two thirds came within 1 % of the best.
///
/// A page that equals the twin is a patch of no words: the target does not have it, so its own
/// replay came out otherwise, in words that nobody here can tell. But they are few, as they are
/// between any two replays, so the target is left to ask for the lines that are wrong, unless the
/// whole page takes no more than that.
///
/// Lines that differ from the target's guess are sent unless that is most of the page.
pub(crate) fn choose(
    page: &Page,
    base: Option<&Page>,
    twin: Option<&Page>,
    lines: Option<Mask>,
) -> Choice {
    if let Some(lines) = lines
        && (1..=MOST_IN_LINES).contains(&lines.words())
    {
        return Choice::Lines(lines);
    }
    let full = words_of(page)
        .iter()
        .filter(|&word| *word != [0; WORD])
        .count();
    let delta = base
        .map(|base| {
            words_of(page)
                .iter()
                .zip(words_of(base))
                .filter(|(a, b)| a != b)
                .count()
        })
        .filter(|changed| changed * 4 <= full * 3);
    if let Some(twin) = twin {
        let mask = Mask::differing(page, twin);
        let words = mask.words();
        let whole = delta.unwrap_or(full);
        if words == 0 && whole >= LEAST_WORDS {
            return Choice::Patch(mask);
        }
        if (1..=MOST_WORDS).contains(&words) && words * 3 <= whole * 2 {
            return Choice::Patch(mask);
        }
    }
    delta.map_or(Choice::Literal, |_| Choice::Delta)
}

/// XORs `with` into `page`; twice is nothing.
pub(crate) fn xor(page: &mut Page, with: &Page) {
    for (a, b) in page.iter_mut().zip(with) {
        *a ^= b;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::ZERO_PAGE;

    fn noise(seed: u8) -> Page {
        let mut page = ZERO_PAGE;
        let mut out = blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof();
        out.fill(&mut page);
        page
    }

    #[test]
    fn small_changes_go_as_deltas_and_new_text_does_not() {
        let old = noise(1);
        let mut touched = old;
        touched[100] ^= 1;
        let text = [b'x'; PAGE_SIZE];
        assert_eq!(choose(&touched, Some(&old), None, None), Choice::Delta);
        assert_eq!(choose(&text, Some(&old), None, None), Choice::Literal);
        assert_eq!(
            choose(&touched, Some(&ZERO_PAGE), None, None),
            Choice::Literal
        );
        assert_eq!(choose(&touched, None, None, None), Choice::Literal);
        xor(&mut touched, &old);
        assert_eq!(touched.iter().filter(|&&byte| byte != 0).count(), 1);
    }

    #[test]
    fn a_twin_pays_when_it_is_nearer_than_the_base() {
        let (new, old) = (noise(1), noise(2));
        let mut twin = new;
        let nothing = Choice::Patch(Mask::NONE);
        assert_eq!(choose(&new, None, Some(&twin), None), nothing);
        let mut few = ZERO_PAGE;
        few[..WORD * (LEAST_WORDS - 1)].fill(1);
        assert_eq!(choose(&few, None, Some(&few), None), Choice::Literal);
        few[WORD * (LEAST_WORDS - 1)] = 1;
        assert_eq!(choose(&few, None, Some(&few), None), nothing);
        twin[8..24].fill(0);
        let Choice::Patch(mask) = choose(&new, Some(&old), Some(&twin), None) else {
            panic!("no patch");
        };
        assert_eq!((mask.0[0], mask.words()), (0b110, 2));
        assert_eq!(choose(&new, Some(&twin), Some(&twin), None), Choice::Delta);
        twin[..MOST_WORDS * WORD].fill(0);
        assert!(matches!(
            choose(&new, None, Some(&twin), None),
            Choice::Patch(_)
        ));
        twin[..(MOST_WORDS + 1) * WORD].fill(0);
        assert_eq!(choose(&new, None, Some(&twin), None), Choice::Literal);
    }

    proptest! {
        #[test]
        fn what_differs_from_the_twin_makes_it_the_page(
            touched in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..60),
        ) {
            let page = noise(3);
            let mut twin = page;
            for (at, byte) in touched {
                twin[at] = byte;
            }
            let mask = Mask::differing(&page, &twin);
            let mut words = Vec::new();
            mask.gather(&page, &mut words);
            prop_assert_eq!(words.len(), mask.words() * WORD);
            mask.overlay(&words, &mut twin);
            prop_assert!(twin == page);
        }
    }
}
