//! Records as few bytes: one column for each kind of number, each number as what it differs
//! by from a prediction, in a varint (LEB128). Columns of small differences are what zstd
//! compresses best; the same records coded one after the other came out a third larger.
//!
//! ```text
//! count     varint, of the records
//! noise     a byte for each: the low bits of `times`
//! length    varint, of what the zstd frame holds
//! frame     zstd, of:
//!   lengths of the columns, varints, in this order
//!   kinds     a byte for up to 16 records of one kind: (count - 1) << 4 | kind
//!   times     zigzag difference from the prediction, microseconds, without the low 8 bits
//!   moves     zigzag differences of column and row from the last pointer position
//!   codes     Linux input codes
//!   rest      wheel clicks, screen sizes, anchors' regions (from the pointer), tile counts
//!   tiles     anchors' tile hashes, four bytes each, little endian
//! ```
//!
//! The prediction is the time of the record before, except between pointer moves in quick
//! succession: those come at the viewer's steady rate, so it is one more step of that rate. The
//! low bits of what is left are noise: in the frame they cost more than they are long, as they
//! spoil its one table of symbol frequencies.
//!
//! Promises: decoding what was encoded gives the same records; decoding anything else gives an
//! error or some records, in memory bounded by a small multiple of the input, and no panic.

use crate::pack::{pack, remember, unpack};
use crate::{Anchor, Error, Event, GuestTime, Record, Region};

const KEY_DOWN: u8 = 0;
const KEY_UP: u8 = 1;
const POINTER: u8 = 2;
const BUTTON_DOWN: u8 = 3;
const BUTTON_UP: u8 = 4;
const WHEEL: u8 = 5;
const SCREEN: u8 = 6;
const ANCHOR: u8 = 7;
const GAP: u8 = 8;
const REDACTED: u8 = 9;

/// Pointer moves further apart than this don't predict the next one.
const STEADY_MICROS: u64 = 50_000;

const COLUMNS: usize = 6;

/// How much a decoder accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records.
    pub records: usize,
    /// Bytes after decompression; records take up to about fifty times that in memory.
    pub bytes: usize,
}

/// What one direction of coding remembers from one block to the next.
#[derive(Clone, Default)]
pub(crate) struct Context {
    at: u64,
    pointer: (u16, u16),
    pointer_at: u64,
    /// The usual time between two pointer moves, or 0 when they don't come steadily.
    pointer_step: u64,
    /// The tail of what was compressed before.
    history: Vec<u8>,
}

impl Context {
    fn predicted(&self, kind: u8) -> u64 {
        if kind == POINTER && self.pointer_step > 0 {
            self.pointer_at.wrapping_add(self.pointer_step)
        } else {
            self.at
        }
    }

    fn advance(&mut self, kind: u8, at: u64) {
        self.at = at;
        if kind == POINTER {
            let step = at.wrapping_sub(self.pointer_at);
            self.pointer_step = match (step, self.pointer_step) {
                (STEADY_MICROS.., _) => 0,
                (_, 0) => step,
                // Steps jitter to both sides, so the mean of the last few predicts best.
                (_, usual) => (usual * 7 + step) / 8,
            };
            self.pointer_at = at;
        }
    }
}

#[derive(Default)]
struct Columns {
    noise: Vec<u8>,
    kinds: Vec<u8>,
    times: Vec<u8>,
    moves: Vec<u8>,
    codes: Vec<u8>,
    rest: Vec<u8>,
    tiles: Vec<u8>,
}

/// Codes `records` behind those that `context` has seen.
pub(crate) fn encode(records: &[Record], context: &mut Context) -> Result<Vec<u8>, Error> {
    let mut columns = Columns::default();
    for record in records {
        columns.push(record, context);
    }
    let Columns {
        noise,
        kinds,
        times,
        moves,
        codes,
        rest,
        tiles,
    } = columns;
    let columns = [kinds, times, moves, codes, rest, tiles];
    let mut plain = Vec::new();
    for column in &columns {
        put(&mut plain, column.len() as u64);
    }
    for column in columns {
        plain.extend(column);
    }
    let mut bytes = Vec::new();
    put(&mut bytes, noise.len() as u64);
    bytes.extend(noise);
    put(&mut bytes, plain.len() as u64);
    bytes.extend(pack(&plain, &context.history)?);
    remember(&mut context.history, &plain);
    Ok(bytes)
}

impl Columns {
    fn push(&mut self, record: &Record, context: &mut Context) {
        let kind = kind(&record.event);
        match self.kinds.last_mut() {
            Some(last) if *last & 0xf == kind && *last < 0xf0 => *last += 0x10,
            _ => self.kinds.push(kind),
        }
        let at = record.at.micros;
        let time = zigzag(at.wrapping_sub(context.predicted(kind)).cast_signed());
        self.noise.push(time as u8);
        put(&mut self.times, time >> 8);
        context.advance(kind, at);
        match &record.event {
            Event::Key { code, .. } | Event::Button { code, .. } => {
                put(&mut self.codes, u64::from(*code));
            }
            Event::Pointer { x, y } => {
                put_delta(&mut self.moves, *x, context.pointer.0);
                put_delta(&mut self.moves, *y, context.pointer.1);
                context.pointer = (*x, *y);
            }
            Event::Wheel {
                vertical,
                horizontal,
            } => {
                self.rest
                    .extend([vertical.cast_unsigned(), horizontal.cast_unsigned()]);
            }
            Event::Screen { width, height } => {
                put(&mut self.rest, u64::from(*width));
                put(&mut self.rest, u64::from(*height));
            }
            Event::Anchor(Anchor { region, tiles }) => {
                put_delta(&mut self.rest, region.x, context.pointer.0);
                put_delta(&mut self.rest, region.y, context.pointer.1);
                put(&mut self.rest, u64::from(region.width));
                put(&mut self.rest, u64::from(region.height));
                put(&mut self.rest, tiles.len() as u64);
                self.tiles
                    .extend(tiles.iter().flat_map(|tile| tile.to_le_bytes()));
            }
            Event::Gap | Event::Redacted => {}
        }
    }
}

/// Decodes what [`encode`] gave; what exceeds `limits` is refused before it takes memory.
pub(crate) fn decode(
    bytes: &[u8],
    context: &mut Context,
    limits: Limits,
) -> Result<Vec<Record>, Error> {
    let mut bytes = Cursor(bytes);
    let count = bytes.bounded(limits.records, "records")?;
    let noise = bytes.take(count)?;
    let length = bytes.bounded(limits.bytes, "bytes")?;
    let plain = unpack(bytes.0, length, &context.history)?;
    let records = decode_columns(&plain, noise, context)?;
    remember(&mut context.history, &plain);
    Ok(records)
}

fn decode_columns(plain: &[u8], noise: &[u8], context: &mut Context) -> Result<Vec<Record>, Error> {
    let mut all = Cursor(plain);
    let mut lengths = [0; COLUMNS];
    for length in &mut lengths {
        *length = all.length()?;
    }
    let mut columns = [const { Cursor(&[]) }; COLUMNS];
    for (column, length) in columns.iter_mut().zip(lengths) {
        *column = Cursor(all.take(length)?);
    }
    let [kinds, mut times, mut moves, mut codes, mut rest, mut tiles] = columns;
    let mut noise = Cursor(noise);
    let mut records = Vec::new();
    for byte in kinds.0 {
        let (kind, count) = (byte & 0xf, usize::from(byte >> 4) + 1);
        for _ in 0..count {
            let high = times.varint()?;
            let time = high << 8 | u64::from(noise.byte()?);
            if time >> 8 != high {
                return Err(OUT_OF_RANGE);
            }
            let at = context.predicted(kind).wrapping_add_signed(unzigzag(time));
            context.advance(kind, at);
            let event = match kind {
                KEY_DOWN | KEY_UP => Event::Key {
                    code: codes.small()?,
                    down: kind == KEY_DOWN,
                },
                BUTTON_DOWN | BUTTON_UP => Event::Button {
                    code: codes.small()?,
                    down: kind == BUTTON_DOWN,
                },
                POINTER => {
                    let x = moves.delta(context.pointer.0)?;
                    let y = moves.delta(context.pointer.1)?;
                    context.pointer = (x, y);
                    Event::Pointer { x, y }
                }
                WHEEL => Event::Wheel {
                    vertical: rest.byte()?.cast_signed(),
                    horizontal: rest.byte()?.cast_signed(),
                },
                SCREEN => Event::Screen {
                    width: rest.small()?,
                    height: rest.small()?,
                },
                ANCHOR => {
                    let region = Region {
                        x: rest.delta(context.pointer.0)?,
                        y: rest.delta(context.pointer.1)?,
                        width: rest.small()?,
                        height: rest.small()?,
                    };
                    let count = rest.length()?;
                    // The bytes are there, so the vector is no larger than the input.
                    let bytes = tiles.take(count.checked_mul(4).ok_or(SHORT)?)?;
                    let tiles = bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|tile| u32::from_le_bytes(*tile))
                        .collect();
                    Event::Anchor(Anchor { region, tiles })
                }
                GAP => Event::Gap,
                REDACTED => Event::Redacted,
                _ => {
                    return Err(Error::Malformed {
                        what: "there is no such kind of event",
                    });
                }
            };
            records.push(Record {
                at: GuestTime { micros: at },
                event,
            });
        }
    }
    if [all, noise, times, moves, codes, rest, tiles]
        .iter()
        .any(|column| !column.0.is_empty())
    {
        return Err(Error::Malformed {
            what: "bytes are left over",
        });
    }
    Ok(records)
}

fn kind(event: &Event) -> u8 {
    match event {
        Event::Key { down: true, .. } => KEY_DOWN,
        Event::Key { down: false, .. } => KEY_UP,
        Event::Pointer { .. } => POINTER,
        Event::Button { down: true, .. } => BUTTON_DOWN,
        Event::Button { down: false, .. } => BUTTON_UP,
        Event::Wheel { .. } => WHEEL,
        Event::Screen { .. } => SCREEN,
        Event::Anchor(_) => ANCHOR,
        Event::Gap => GAP,
        Event::Redacted => REDACTED,
    }
}

const SHORT: Error = Error::Malformed {
    what: "a column ends early",
};

/// Appends a varint.
pub(crate) fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Small numbers of either sign as small numbers without.
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

fn put_delta(bytes: &mut Vec<u8>, value: u16, from: u16) {
    put(
        bytes,
        zigzag(i64::from(value.wrapping_sub(from).cast_signed())),
    );
}

/// Reads numbers off the front of a slice.
pub(crate) struct Cursor<'a>(pub(crate) &'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let (taken, left) = self.0.split_at_checked(length).ok_or(SHORT)?;
        self.0 = left;
        Ok(taken)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Error> {
        let (byte, left) = self.0.split_first().ok_or(SHORT)?;
        self.0 = left;
        Ok(*byte)
    }

    /// A varint. Each value has one coding only: longer ones of the same value are refused.
    pub(crate) fn varint(&mut self) -> Result<u64, Error> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits || (byte == 0 && shift > 0) {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Error::Malformed {
            what: "a number is not coded as numbers are",
        })
    }

    fn delta(&mut self, from: u16) -> Result<u16, Error> {
        let delta = i16::try_from(unzigzag(self.varint()?)).map_err(|_| OUT_OF_RANGE)?;
        Ok(from.wrapping_add_signed(delta))
    }

    fn small(&mut self) -> Result<u16, Error> {
        u16::try_from(self.varint()?).map_err(|_| OUT_OF_RANGE)
    }

    fn length(&mut self) -> Result<usize, Error> {
        usize::try_from(self.varint()?).map_err(|_| OUT_OF_RANGE)
    }

    fn bounded(&mut self, limit: usize, unit: &'static str) -> Result<usize, Error> {
        let found = self.varint()?;
        let length = usize::try_from(found)
            .ok()
            .filter(|length| *length <= limit);
        length.ok_or(Error::TooMuch {
            found,
            limit: limit as u64,
            unit,
        })
    }
}

const OUT_OF_RANGE: Error = Error::Malformed {
    what: "a number is out of its range",
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::any_records;

    const LIMITS: Limits = Limits {
        records: 60,
        bytes: 1 << 16,
    };

    proptest! {
        #[test]
        fn any_records_survive_in_any_division(records in any_records(60), cut in 0..60_usize) {
            let (first, second) = records.split_at(cut.min(records.len()));
            let (mut coder, mut decoder) = (Context::default(), Context::default());
            for part in [first, second] {
                let bytes = encode(part, &mut coder).unwrap();
                prop_assert_eq!(decode(&bytes, &mut decoder, LIMITS).unwrap(), part);
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes, &mut Context::default(), LIMITS);
            // Behind a compressor that anybody can run.
            let (noise, plain) = bytes.split_at(bytes.len() / 2);
            let _ = decode_columns(plain, noise, &mut Context::default());
        }

        #[test]
        fn columns_with_one_byte_changed_do_no_harm(
            records in any_records(20), at in any::<prop::sample::Index>(), value in any::<u8>(),
        ) {
            let bytes = encode(&records, &mut Context::default()).unwrap();
            let mut cursor = Cursor(&bytes);
            let count = cursor.length().unwrap();
            let noise = cursor.take(count).unwrap();
            let length = cursor.length().unwrap();
            let mut plain = unpack(cursor.0, length, &[]).unwrap();
            let at = at.index(plain.len());
            plain[at] = value;
            let _ = decode_columns(&plain, noise, &mut Context::default());
        }

        #[test]
        fn numbers_survive(value in any::<u64>(), signed in any::<i64>()) {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            put(&mut bytes, zigzag(signed));
            let mut cursor = Cursor(&bytes);
            prop_assert_eq!(cursor.varint().unwrap(), value);
            prop_assert_eq!(unzigzag(cursor.varint().unwrap()), signed);
            prop_assert!(cursor.0.is_empty());
        }
    }

    #[test]
    fn more_records_than_allowed_are_refused() {
        let gap = Record {
            at: GuestTime { micros: 5 },
            event: Event::Gap,
        };
        let bytes = encode(&vec![gap; 61], &mut Context::default()).unwrap();
        assert!(matches!(
            decode(&bytes, &mut Context::default(), LIMITS),
            Err(Error::TooMuch {
                found: 61,
                limit: 60,
                unit: "records"
            })
        ));
    }

    #[test]
    fn numbers_have_one_coding() {
        for bytes in [&[0x80, 0][..], &[0xff; 10], &[0xff; 9], &[0x80]] {
            assert!(Cursor(bytes).varint().is_err(), "{bytes:?}");
        }
        assert_eq!(Cursor(&[0]).varint().unwrap(), 0);
    }
}
