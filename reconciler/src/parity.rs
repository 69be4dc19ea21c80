//! Which of many values are not what the other side has, told by fewer numbers than there are values.
//!
//! Most of what the twin has at its own address the target has there as well. To name each of
//! these contents by a hash of its own tells the target nothing in nine cases of ten. So the
//! source sends the check symbols of an error-correcting code over the hashes, a quarter as
//! many as there are hashes: the target's own hashes are the word that was received, and those
//! pages where it differs are the errors. Decoding tells where they are and what the source has
//! there.
//!
//! The code is Reed and Solomon's (1960) over GF(2^16), with the syndromes themselves sent as
//! check symbols: `t` of them find up to `t / 2` errors. Found by Berlekamp's and Massey's
//! algorithm (Massey, 1969), a search of all positions (Chien) and Forney's formula; what is
//! found is checked against all syndromes, so that too many errors are an answer of their own
//! and no wrong one, but for odds of one to the factorial of `t / 2`.
//!
//! Values go to blocks in turn, so that errors that lie together are shared out among all, and
//! the work for each value is bounded by the size of a block.

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::error::Error;
use crate::wire::{Cursor, put_varint};

/// The most values in a block, of the 65,535 that the field would allow.
const BLOCK: usize = 1024;
/// In the smallest block so many errors are found whatever its size.
const LEAST_ERRORS: usize = 8;
/// One value of so many may be wrong.
const VALUES_PER_ERROR: usize = 8;

/// The elements but zero: powers of x, which is primitive.
const ORDER: usize = 65_535;
/// x^16 + x^12 + x^3 + x + 1.
const POLYNOMIAL: u32 = 0x1_100b;

struct Field {
    /// Twice over, so that two logarithms can be added.
    powers: Vec<u16>,
    /// Of all elements but zero.
    logarithms: Vec<u16>,
}

static FIELD: LazyLock<Field> = LazyLock::new(|| {
    let (mut powers, mut logarithms) = (vec![0; 2 * ORDER], vec![0; ORDER + 1]);
    let mut element = 1_u32;
    for power in 0..ORDER {
        powers[power] = element as u16;
        powers[power + ORDER] = element as u16;
        logarithms[element as usize] = power as u16;
        element <<= 1;
        if element > 0xffff {
            element ^= POLYNOMIAL;
        }
    }
    Field { powers, logarithms }
});

impl Field {
    fn log(&self, element: u16) -> usize {
        self.logarithms[usize::from(element)].into()
    }

    fn multiply(&self, one: u16, other: u16) -> u16 {
        if one == 0 || other == 0 {
            return 0;
        }
        self.powers[self.log(one) + self.log(other)]
    }

    /// By an element that is not zero.
    fn divide(&self, one: u16, by: u16) -> u16 {
        if one == 0 {
            return 0;
        }
        self.powers[self.log(one) + ORDER - self.log(by)]
    }

    /// A polynomial, its lowest coefficient first, at x to the power of `at`.
    fn evaluate(&self, polynomial: &[u16], at: usize) -> u16 {
        let mut exponent = 0;
        let mut sum = 0;
        for &coefficient in polynomial {
            if coefficient != 0 {
                sum ^= self.powers[self.log(coefficient) + exponent];
            }
            exponent += at;
            if exponent >= ORDER {
                exponent -= ORDER;
            }
        }
        sum
    }

    /// Adds to each syndrome what a value at this position gives to it.
    fn add(&self, syndromes: &mut [u16], position: usize, value: u16) {
        if value == 0 {
            return;
        }
        let mut exponent = self.log(value);
        for syndrome in syndromes {
            *syndrome ^= self.powers[exponent];
            exponent += position;
            if exponent >= ORDER {
                exponent -= ORDER;
            }
        }
    }
}

/// Check symbols of a list of values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parity {
    /// For each block, one after the other.
    symbols: Vec<u16>,
    each: usize,
}

impl Parity {
    /// Of these values, with as many symbols as are expected to do.
    pub(crate) fn of(values: &[u16]) -> Self {
        let block = values.len().div_ceil(blocks(values.len()).max(1));
        let errors = LEAST_ERRORS + block / VALUES_PER_ERROR;
        Self::with(values, (2 * errors).min(block))
    }

    fn with(values: &[u16], each: usize) -> Self {
        let blocks = blocks(values.len());
        let mut symbols = vec![0; blocks * each];
        if each > 0 {
            let all = symbols.par_chunks_mut(each).enumerate();
            all.for_each(|(block, syndromes)| {
                let own = values.iter().skip(block).step_by(blocks);
                for (position, value) in own.enumerate() {
                    FIELD.add(syndromes, position, *value);
                }
            });
        }
        Self { symbols, each }
    }

    /// The values that these are of, in their order, given others that should be the same; `None` for
    /// those of which that can't be told, as too many are not.
    pub(crate) fn correct(&self, others: &[u16]) -> Vec<Option<u16>> {
        let blocks = blocks(others.len());
        let mut right = vec![None; others.len()];
        if self.each == 0 {
            return right;
        }
        let own = Self::with(others, self.each);
        let both = self.symbols.par_chunks(self.each);
        let errors: Vec<_> = both
            .zip(own.symbols.par_chunks(self.each))
            .enumerate()
            .map(|(block, (theirs, own))| {
                let syndromes: Vec<u16> = theirs.iter().zip(own).map(|(a, b)| a ^ b).collect();
                let positions = others.len().saturating_sub(block).div_ceil(blocks);
                errors(&syndromes, positions)
            })
            .collect();
        for (block, errors) in errors.into_iter().enumerate() {
            let Some(errors) = errors else {
                continue;
            };
            for at in (block..others.len()).step_by(blocks) {
                right[at] = Some(others[at]);
            }
            for (position, error) in errors {
                let at = block + position * blocks;
                right[at] = Some(others[at] ^ error);
            }
        }
        right
    }

    /// The most bytes that symbols of so many values take.
    pub(crate) const fn max_encoded_len(values: u64) -> u64 {
        10 + 2 * (values + BLOCK as u64)
    }

    pub(crate) fn encode_into(&self, out: &mut Vec<u8>) {
        put_varint(out, self.each as u64);
        out.extend(self.symbols.iter().flat_map(|symbol| symbol.to_le_bytes()));
    }

    /// Reads those of so many values.
    pub(crate) fn decode(cursor: &mut Cursor<'_>, values: u64) -> Result<Self, Error> {
        let each = cursor.varint()?;
        if each > values.min(BLOCK as u64) {
            return Err(cursor.malformed("more check symbols than values"));
        }
        let blocks = values.div_ceil(BLOCK as u64);
        let bytes = cursor.bytes(blocks * each * 2)?;
        let (pairs, _) = bytes.as_chunks();
        Ok(Self {
            symbols: pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect(),
            each: each as usize,
        })
    }
}

const fn blocks(values: usize) -> usize {
    values.div_ceil(BLOCK)
}

/// The errors of so many positions that have these syndromes, none if there are too many.
fn errors(syndromes: &[u16], positions: usize) -> Option<Vec<(usize, u16)>> {
    let field = &*FIELD;
    if syndromes.iter().all(|syndrome| *syndrome == 0) {
        return Some(Vec::new());
    }
    let locator = locator(field, syndromes)?;
    let count = locator.len() - 1;
    // Lambda(x^-position) is zero where an error is.
    let inverse = |position: usize| (ORDER - position) % ORDER;
    let found: Vec<usize> = (0..positions)
        .filter(|position| field.evaluate(&locator, inverse(*position)) == 0)
        .collect();
    if found.len() != count {
        return None;
    }
    // Omega = S * Lambda, of which the terms below the number of errors matter.
    let evaluator: Vec<u16> = (0..count)
        .map(|term| {
            let products = (0..=term).map(|i| field.multiply(syndromes[term - i], locator[i]));
            products.fold(0, |sum, product| sum ^ product)
        })
        .collect();
    // The derivative in a field of characteristic two: odd terms alone are left.
    let derivative: Vec<u16> = (1..locator.len())
        .map(|i| if i % 2 == 1 { locator[i] } else { 0 })
        .collect();
    let mut rest = syndromes.to_vec();
    let mut errors = Vec::with_capacity(count);
    for position in found {
        let at = inverse(position);
        let slope = field.evaluate(&derivative, at);
        if slope == 0 {
            return None;
        }
        let ratio = field.divide(field.evaluate(&evaluator, at), slope);
        // Syndromes begin with the power zero, which leaves a factor of the position itself.
        let error = field.multiply(ratio, field.powers[position]);
        field.add(&mut rest, position, error);
        errors.push((position, error));
    }
    rest.iter().all(|syndrome| *syndrome == 0).then_some(errors)
}

/// The shortest recurrence that the syndromes follow, if it is short enough to be certain.
fn locator(field: &Field, syndromes: &[u16]) -> Option<Vec<u16>> {
    let (mut current, mut before) = (vec![1_u16], vec![1_u16]);
    let (mut length, mut gap, mut last) = (0, 1, 1_u16);
    for at in 0..syndromes.len() {
        let terms = (1..=length.min(current.len() - 1))
            .map(|i| field.multiply(current[i], syndromes[at - i]));
        let discrepancy = terms.fold(syndromes[at], |sum, term| sum ^ term);
        if discrepancy == 0 {
            gap += 1;
            continue;
        }
        let factor = field.divide(discrepancy, last);
        let old = (2 * length <= at).then(|| current.clone());
        if current.len() < before.len() + gap {
            current.resize(before.len() + gap, 0);
        }
        for (i, coefficient) in before.iter().enumerate() {
            current[i + gap] ^= field.multiply(factor, *coefficient);
        }
        if let Some(old) = old {
            length = at + 1 - length;
            before = old;
            last = discrepancy;
            gap = 1;
        } else {
            gap += 1;
        }
        if 2 * length > syndromes.len() {
            return None;
        }
    }
    while current.last() == Some(&0) {
        current.pop();
    }
    (current.len() == length + 1).then_some(current)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(count: usize, seed: u64) -> Vec<u16> {
        let mut state = seed | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as u16
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn the_field_is_one() {
        let field = &*FIELD;
        let mut seen = vec![false; ORDER + 1];
        for power in 0..ORDER {
            let element = field.powers[power];
            assert!(element != 0 && !std::mem::replace(&mut seen[usize::from(element)], true));
            assert_eq!(field.log(element), power);
        }
        // x^15 times x is x^16, which the polynomial makes x^12 + x^3 + x + 1.
        assert_eq!(field.multiply(0x8000, 2), 0x100b);
        assert_eq!(field.divide(0x100b, 2), 0x8000);
    }

    proptest! {
        #[test]
        fn few_errors_are_corrected_and_many_are_told(
            count in 0_usize..3000,
            seed: u64,
            share in 0.0_f64..0.3,
        ) {
            let theirs = values(count, seed);
            let parity = Parity::of(&theirs);
            let mut own = theirs.clone();
            let wrong = values(count, !seed);
            for (value, odds) in own.iter_mut().zip(&wrong) {
                if f64::from(*odds) / 65_536.0 < share {
                    *value ^= odds | 1;
                }
            }
            let right = parity.correct(&own);
            let blocks = blocks(count);
            for block in 0..blocks {
                let all: Vec<usize> = (block..count).step_by(blocks).collect();
                let errors = all.iter().filter(|at| own[**at] != theirs[**at]).count();
                let told = all.iter().all(|at| right[*at] == Some(theirs[*at]));
                let untold = all.iter().all(|at| right[*at].is_none());
                let right = if errors * 2 <= parity.each { told } else { untold };
                prop_assert!(right, "block {} of {}, errors: {}", block, blocks, errors);
            }
        }

        #[test]
        fn symbols_come_back(count in 0_usize..3000, seed: u64) {
            let parity = Parity::of(&values(count, seed));
            let mut bytes = Vec::new();
            parity.encode_into(&mut bytes);
            prop_assert!(bytes.len() as u64 <= Parity::max_encoded_len(count as u64));
            let mut cursor = Cursor::new("test", &bytes);
            prop_assert_eq!(Parity::decode(&mut cursor, count as u64).unwrap(), parity);
            cursor.end().unwrap();
        }

        #[test]
        fn any_symbols_end_well(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            count in 0_usize..200,
            seed: u64,
        ) {
            if let Ok(parity) = Parity::decode(&mut Cursor::new("test", &bytes), count as u64) {
                prop_assert_eq!(parity.correct(&values(count, seed)).len(), count);
            }
        }
    }

    #[test]
    fn a_quarter_of_the_bytes_tells_an_eighth_of_errors() {
        let parity = Parity::of(&values(10_000, 1));
        let mut bytes = Vec::new();
        parity.encode_into(&mut bytes);
        assert_eq!(bytes.len(), 2 + 10 * 2 * 2 * (8 + 1000 / 8));
    }
}
