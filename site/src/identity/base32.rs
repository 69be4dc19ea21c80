//! Crockford's base32 (<https://www.crockford.com/base32.html>), for lengths that are
//! multiples of five bytes: no padding, and no two characters that a person mixes up.

use super::ParseKeyError;

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

pub(super) fn encode(bytes: &[u8], group: usize) -> String {
    debug_assert_eq!(bytes.len() % 5, 0);
    let mut out = String::with_capacity(bytes.len() * 2);
    let mut written = 0;
    for chunk in bytes.chunks_exact(5) {
        let bits = chunk
            .iter()
            .fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for shift in (0..8).rev() {
            if written > 0 && written % group == 0 {
                out.push('-');
            }
            out.push(char::from(ALPHABET[(bits >> (5 * shift)) as usize & 31]));
            written += 1;
        }
    }
    out
}

/// Reads exactly `expected` characters, a multiple of eight, into five bytes per eight.
pub(super) fn decode(text: &str, expected: usize) -> Result<Vec<u8>, ParseKeyError> {
    let mut digits = Vec::with_capacity(expected);
    let mut got = 0;
    for c in text.chars().filter(|c| *c != '-' && !c.is_whitespace()) {
        let digit = match c.to_ascii_uppercase() {
            'O' => 0,
            'I' | 'L' => 1,
            upper => ALPHABET
                .iter()
                .position(|known| char::from(*known) == upper)
                .ok_or(ParseKeyError::Character(c))?,
        };
        got += 1;
        if digits.len() < expected {
            digits.push(digit as u64);
        }
    }
    if got != expected {
        return Err(ParseKeyError::Length { expected, got });
    }
    Ok(digits
        .chunks_exact(8)
        .flat_map(|chunk| {
            let bits = chunk.iter().fold(0u64, |bits, digit| bits << 5 | digit);
            (0..5).rev().map(move |shift| (bits >> (8 * shift)) as u8)
        })
        .collect())
}
