//! What the file promises: whole, private, small; a crash costs the last block, and whoever
//! changes it is found out.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use crate::coding::{self, Context};
use crate::format::{HEAD_BYTES, HEADER_BYTES};
use crate::testing::{any_records, busy_minute};
use crate::{
    Anchor, End, Error, Event, GuestTime, Header, Log, LogId, LogKey, LogReader, LogWriter, Record,
    Region,
};

const ID: LogId = LogId {
    vm: [7; 16],
    generation: 3,
    base_position: 100,
};

fn key() -> LogKey {
    LogKey::from_bytes([9; 32])
}

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session.log");
    (dir, path)
}

/// Writes a log with a block for each part, and gives where each block ends.
fn write(path: &Path, parts: &[Vec<Record>]) -> Vec<u64> {
    let mut writer = LogWriter::create(path, &key(), ID).unwrap();
    let mut ends = Vec::new();
    for part in parts {
        for record in part {
            writer.append(record.clone()).unwrap();
        }
        writer.flush().unwrap();
        ends.push(writer.bytes());
    }
    ends
}

fn typed(count: u64) -> Vec<Record> {
    (0..count)
        .map(|n| Record {
            at: GuestTime { micros: n * 90_000 },
            event: Event::Key {
                code: 30,
                down: n % 2 == 0,
            },
        })
        .collect()
}

/// The records that a reader gives before it ends or fails.
fn salvage(path: &Path) -> (Vec<Record>, Option<Error>) {
    let mut records = Vec::new();
    let mut reader = match LogReader::open(path, &key()) {
        Ok(reader) => reader,
        Err(error) => return (records, Some(error)),
    };
    loop {
        match reader.next_block() {
            Ok(Some(block)) => records.extend(block),
            Ok(None) => return (records, None),
            Err(error) => return (records, Some(error)),
        }
    }
}

fn any_parts() -> impl Strategy<Value = Vec<Vec<Record>>> {
    prop::collection::vec(any_records(12), 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_records_survive(parts in any_parts()) {
        let (_dir, path) = place();
        write(&path, &parts);
        let log = Log::read(&path, &key()).unwrap();
        prop_assert_eq!(log.records, parts.concat());
        prop_assert_eq!(log.header.id, ID);
        prop_assert_eq!(log.end, End::Open);
        prop_assert_eq!(log.bytes, fs::metadata(&path).unwrap().len());
    }

    #[test]
    fn a_torn_log_gives_its_whole_blocks_and_goes_on(
        parts in any_parts(), cut in any::<prop::sample::Index>(), zeros in 0..40_usize,
    ) {
        let (_dir, path) = place();
        let ends = write(&path, &parts);
        let bytes = fs::read(&path).unwrap();
        let cut = HEADER_BYTES + cut.index(bytes.len() - HEADER_BYTES + 1);
        fs::write(&path, &bytes[..cut]).unwrap();
        let whole = ends.iter().filter(|end| **end as usize <= cut).count();
        let kept = parts[..whole].concat();
        let last = ends[..whole].last().copied().unwrap_or(HEADER_BYTES as u64);
        let torn = cut as u64 - last;

        let log = Log::read(&path, &key()).unwrap();
        prop_assert_eq!(&log.records, &kept);
        let end = if torn == 0 { End::Open } else { End::Torn { bytes: torn } };
        prop_assert_eq!(log.end, end);

        // A power failure may leave zeros where the end was.
        if torn == 0 {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(&vec![0; zeros]).unwrap();
            let (records, error) = salvage(&path);
            prop_assert!(error.is_none());
            prop_assert_eq!(&records, &kept);
        }

        let (mut writer, resumed) = LogWriter::append_to(&path, &key()).unwrap();
        prop_assert_eq!(resumed.records, kept.len() as u64);
        for record in typed(5) {
            writer.append(record).unwrap();
        }
        writer.close().unwrap();
        let log = Log::read(&path, &key()).unwrap();
        prop_assert_eq!(log.end, End::Closed);
        prop_assert_eq!(log.records, [kept, typed(5)].concat());
    }

    #[test]
    fn a_flipped_bit_never_gives_wrong_records(
        parts in any_parts(), at in any::<prop::sample::Index>(), bit in 0..8,
    ) {
        let (_dir, path) = place();
        write(&path, &parts);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        fs::write(&path, &bytes).unwrap();
        let (records, error) = salvage(&path);
        let all = parts.concat();
        prop_assert!(records.len() < all.len() || error.is_some() || all.is_empty());
        prop_assert_eq!(&records, &all[..records.len()]);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(
        tail in prop::collection::vec(any::<u8>(), 0..300), keep in 0..=HEADER_BYTES,
    ) {
        let (_dir, path) = place();
        write(&path, &[]);
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(keep);
        bytes.extend(tail);
        fs::write(&path, &bytes).unwrap();
        let (records, _) = salvage(&path);
        prop_assert!(records.is_empty());
    }
}

#[test]
fn a_minute_of_idling_costs_nothing() {
    let (_dir, path) = place();
    let mut writer = LogWriter::create(&path, &key(), ID).unwrap();
    let before = writer.bytes();
    // Somebody bumps the desk once; the recorder goes on flushing every two seconds.
    let moved = Event::Pointer { x: 641, y: 400 };
    writer
        .append(Record {
            at: GuestTime { micros: 31_000_000 },
            event: moved,
        })
        .unwrap();
    for _ in 0..30 {
        writer.sync().unwrap();
    }
    let cost = writer.bytes() - before;
    eprintln!("an idle minute: {cost} B");
    assert!(cost < 200, "{cost}");
}

#[test]
fn a_busy_minute_is_small() {
    for seed in [1, 2, 3] {
        let (_dir, path) = place();
        let records = busy_minute(seed);
        let mut writer = LogWriter::create(&path, &key(), ID).unwrap();
        let mut flush = 2_000_000;
        for record in &records {
            if record.at.micros >= flush {
                writer.flush().unwrap();
                flush += 2_000_000;
            }
            writer.append(record.clone()).unwrap();
        }
        let bytes = writer.close().unwrap();
        eprintln!("a busy minute: {bytes} B for {} records", records.len());
        assert!(bytes < 20_000, "{bytes}");
        assert_eq!(Log::read(&path, &key()).unwrap().records, records);
    }
}

#[test]
fn damage_before_the_end_is_not_taken_for_a_crash() {
    let (_dir, path) = place();
    let ends = write(&path, &[typed(20), typed(20), typed(20)]);
    let bytes = fs::read(&path).unwrap();
    // The length, the checks and the body of the second block.
    for at in [0, 5, 9, 13, HEAD_BYTES + 4] {
        let mut changed = bytes.clone();
        changed[ends[0] as usize + at] ^= 0x40;
        fs::write(&path, &changed).unwrap();
        let (records, error) = salvage(&path);
        assert_eq!(records, typed(20));
        assert!(
            matches!(error, Some(Error::Damaged { block: 1, .. })),
            "{at}: {error:?}"
        );
        assert!(LogWriter::append_to(&path, &key()).is_err());
        assert_eq!(fs::read(&path).unwrap(), changed, "nothing is cut off");
    }
}

#[test]
fn a_block_that_was_moved_or_forged_is_found_out() {
    let (_dir, path) = place();
    let ends = write(&path, &[typed(20), typed(20)]);
    let original = fs::read(&path).unwrap();
    // With checks made right, as somebody would who knows the format but not the key.
    let mut forged = original.clone();
    let start = ends[0] as usize;
    forged[start + HEAD_BYTES + 3] ^= 1;
    let check = crate::format::body_check(1, &forged[start + HEAD_BYTES..]);
    forged[start + 12..start + HEAD_BYTES].copy_from_slice(&check);
    fs::write(&path, &forged).unwrap();
    assert!(matches!(
        salvage(&path).1,
        Some(Error::Forged { block: 1, .. })
    ));
    // The first block again in place of the second.
    let mut moved = original[..start].to_vec();
    moved.extend_from_slice(&original[HEADER_BYTES..start]);
    fs::write(&path, &moved).unwrap();
    assert!(matches!(
        salvage(&path).1,
        Some(Error::Damaged { block: 1, .. })
    ));
}

#[test]
fn a_torn_blocks_nonce_is_not_used_again() {
    let (_dir, path) = place();
    write(&path, &[typed(20)]);
    let before = fs::read(&path).unwrap();
    let whole = before.len() as u64 - 1;
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(whole)
        .unwrap();
    let (mut writer, resumed) = LogWriter::append_to(&path, &key()).unwrap();
    assert!(matches!(resumed.end, End::Torn { .. }));
    for record in typed(20) {
        writer.append(record).unwrap();
    }
    writer.flush().unwrap();
    let after = fs::read(&path).unwrap();
    assert_eq!(after.len(), before.len());
    // The same plaintext in the same place: under the same nonce it would look the same.
    assert_ne!(
        after[HEADER_BYTES + HEAD_BYTES..],
        before[HEADER_BYTES + HEAD_BYTES..]
    );
}

#[test]
fn the_file_is_private_and_shows_nothing() {
    let (_dir, path) = place();
    write(&path, &[typed(2)]);
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let record = &typed(1)[0];
    assert!(!format!("{record:?}").contains("30"), "{record:?}");
}

/// The stretches of so many bytes of `inside` that are also in `file`.
fn shared(file: &[u8], inside: &[u8]) -> usize {
    const STRETCH: usize = 8;
    let here: HashSet<_> = file.windows(STRETCH).collect();
    inside
        .windows(STRETCH)
        .filter(|stretch| here.contains(stretch))
        .count()
}

#[test]
fn the_bytes_on_disk_hold_no_plain_text() {
    let (dir, path) = place();
    // What a person types: no two keys in a row alike, so that it does not pack away.
    let records: Vec<Record> = (0..600_u64)
        .map(|n| Record {
            at: GuestTime {
                micros: n * 90_000 + n * n * 7919 % 40_000,
            },
            event: match n % 20 {
                19 => Event::Anchor(Anchor {
                    region: Region {
                        x: 0,
                        y: 0,
                        width: 64,
                        height: 64,
                    },
                    tiles: (0..16)
                        .map(|tile| u32::wrapping_mul(tile + n as u32, 0x9e37_79b9))
                        .collect(),
                }),
                _ => Event::Key {
                    code: (n * 31 % 97) as u16 + 2,
                    down: n % 2 == 0,
                },
            },
        })
        .collect();
    write(&path, std::slice::from_ref(&records));
    let file = fs::read(&path).unwrap();
    let content = &file[HEADER_BYTES..];
    let coded = coding::encode(&records, &mut Context::default()).unwrap();
    let codes: Vec<u8> = records
        .iter()
        .filter_map(|record| match record.event {
            Event::Key { code, .. } => Some(code as u8),
            _ => None,
        })
        .collect();
    let tiles: Vec<u8> = records
        .iter()
        .filter_map(|record| match &record.event {
            Event::Anchor(anchor) => Some(anchor.tiles.iter().flat_map(|tile| tile.to_le_bytes())),
            _ => None,
        })
        .flatten()
        .collect();
    // As it is before it is sealed it would be found: it is this that the file must not hold.
    assert!(shared(&coded, &coded) > 500 && coded.len() <= content.len());
    for plain in [&coded, &codes, &tiles] {
        assert_eq!(shared(&file, plain), 0);
    }
    // Nor does the same, typed again, look the same.
    let again = dir.path().join("again.log");
    write(&again, &[records]);
    assert_eq!(
        shared(content, &fs::read(&again).unwrap()[HEADER_BYTES..]),
        0
    );
}

#[test]
fn only_one_process_writes() {
    let (_dir, path) = place();
    let writer = LogWriter::create(&path, &key(), ID).unwrap();
    assert!(matches!(
        LogWriter::append_to(&path, &key()),
        Err(Error::Busy { .. })
    ));
    assert!(matches!(
        LogWriter::create(&path, &key(), ID),
        Err(Error::Io { .. })
    ));
    assert!(
        Log::read(&path, &key()).is_ok(),
        "readers may look meanwhile"
    );
    // As a program has it open that is just being started.
    let inherited = writer.file().try_clone().unwrap();
    drop(writer);
    assert!(LogWriter::append_to(&path, &key()).is_ok());
    drop(inherited);
}

#[test]
fn each_wrong_file_is_refused_in_one_sentence() {
    let (dir, path) = place();
    write(&path, &[typed(4)]);
    let bytes = fs::read(&path).unwrap();
    let other = dir.path().join("other.log");
    let open = |bytes: &[u8]| {
        fs::write(&other, bytes).unwrap();
        LogReader::open(&other, &key()).err().unwrap()
    };
    let mut newer = bytes.clone();
    newer[8] = 2;
    let mut header = bytes.clone();
    header[30] ^= 1;
    let wrong = LogKey::from_bytes([1; 32]);
    let reader = LogReader::open(&path, &key()).unwrap();
    let found = [
        open(b"PK\x03\x04 not a log"),
        open(b""),
        open(&bytes[..9]),
        open(&bytes[..99]),
        open(&newer),
        open(&header),
        LogReader::open(&path, &wrong).err().unwrap(),
        reader.expect([8; 16], 3).unwrap_err(),
        reader.expect([7; 16], 4).unwrap_err(),
    ];
    let kinds = [
        matches!(found[0], Error::Foreign { .. }),
        matches!(found[1], Error::Foreign { .. }),
        matches!(found[2], Error::Truncated { bytes: 9, .. }),
        matches!(found[3], Error::Truncated { bytes: 99, .. }),
        matches!(found[4], Error::Newer { version: 2, .. }),
        matches!(found[5], Error::HeaderDamaged { .. }),
        matches!(found[6], Error::OtherKey { .. }),
        matches!(found[7], Error::OtherVm { .. }),
        matches!(
            found[8],
            Error::OtherGeneration {
                wanted: 4,
                found: 3,
                ..
            }
        ),
    ];
    for (right, error) in kinds.iter().zip(&found) {
        assert!(right, "{error}");
        let text = error.to_string();
        assert!(
            text.contains(".log") && text.contains(';') && !text.contains('\n'),
            "{text}"
        );
    }
    reader.expect([7; 16], 3).unwrap();
    assert_eq!(
        Header::read(&path).unwrap().id,
        ID,
        "the header needs no key"
    );
}

#[test]
fn an_anchor_beyond_all_screens_is_refused() {
    let (_dir, path) = place();
    let mut writer = LogWriter::create(&path, &key(), ID).unwrap();
    let region = Region {
        x: 0,
        y: 0,
        width: 0,
        height: 0,
    };
    let mut anchor = |tiles| {
        let event = Event::Anchor(Anchor {
            region,
            tiles: vec![0; tiles],
        });
        writer.append(Record {
            at: GuestTime::default(),
            event,
        })
    };
    assert!(matches!(
        anchor((1 << 14) + 1),
        Err(Error::AnchorTooLarge { .. })
    ));
    anchor(1 << 14).unwrap();
    assert_eq!(
        Log::read(&path, &key()).unwrap().records.len(),
        1,
        "a large one goes out at once"
    );
}
