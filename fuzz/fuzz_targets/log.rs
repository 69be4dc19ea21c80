//! A damaged log. Whatever was done to the file, what is read from it is what was written, up
//! to some point: never another event. The input says what is done: first where to cut the
//! file off (two bytes), then bytes to change (two for the place, one to XOR with).
#![no_main]

use std::fs;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use traces::{Event, GuestTime, LogId, LogKey, LogReader, LogWriter, Record};

struct Original {
    dir: tempfile::TempDir,
    key: LogKey,
    bytes: Vec<u8>,
    records: Vec<Record>,
}

fn write_one() -> Original {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("original");
    let key = LogKey::from_bytes([7; 32]);
    let id = LogId {
        vm: [1; 16],
        generation: 1,
        base_position: 0,
    };
    let mut writer = LogWriter::create(&path, &key, id).expect("a log");
    let records: Vec<Record> = (0..40u16)
        .map(|i| Record {
            at: GuestTime {
                micros: u64::from(i) * 1000,
            },
            event: Event::Key {
                code: i,
                down: i % 2 == 0,
            },
        })
        .collect();
    for (i, record) in records.iter().enumerate() {
        writer.append(record.clone()).expect("appended");
        if i % 10 == 9 {
            writer.flush().expect("flushed");
        }
    }
    writer.close().expect("closed");
    let bytes = fs::read(&path).expect("the log");
    Original {
        dir,
        key,
        bytes,
        records,
    }
}

fuzz_target!(|input: &[u8]| {
    static ORIGINAL: OnceLock<Original> = OnceLock::new();
    let original = ORIGINAL.get_or_init(write_one);
    let Some((cut, edits)) = input.split_first_chunk::<2>() else {
        return;
    };
    let mut bytes = original.bytes.clone();
    bytes.truncate(usize::from(u16::from_le_bytes(*cut)));
    for edit in edits.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]]));
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= edit[2];
        }
    }
    // One file a process: libFuzzer runs one input at a time.
    let path = original.dir.path().join("damaged");
    fs::write(&path, &bytes).expect("written");
    let Ok(mut reader) = LogReader::open(&path, &original.key) else {
        return;
    };
    let mut records = Vec::new();
    while let Ok(Some(block)) = reader.next_block() {
        records.extend(block);
    }
    assert!(
        original.records.starts_with(&records),
        "an event that nobody made"
    );
});
