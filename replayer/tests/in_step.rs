//! In step with the screen, for real: a guest of 64 bytes in QEMU, and a copy of it that
//! computes twenty times as long.
//!
//! The guest throws away what was typed too early, shows a prompt, waits for a key, computes,
//! and shows the key. Whoever types by the clock alone into the slower copy loses keys.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests, which clippy does not recognise as such.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use replayer::{Options, Pace, ReplayReport};
use tempfile::TempDir;
use traces::{Anchor, Event, GuestTime, Pixels, Record, Region};
use vm_host::screen::{Frame, Observer};
use vm_host::{Accelerator, Hardware, Input, Launch, Network, Vm, programs};

/// H, E, L, O as Linux input codes.
const TYPED: [u16; 4] = [35, 18, 38, 24];
/// Ticks a key: twenty times those of the original.
const SLOW: u16 = 20;

/// The boot sector of a guest that computes for `ticks` of the BIOS's clock (55 ms) a key.
fn boot_sector(ticks: u16) -> Vec<u8> {
    let [low, high] = ticks.to_le_bytes();
    let code = [
        &[0x31, 0xc0, 0x8e, 0xd8, 0x31, 0xdb, 0xfb][..], // ds and bx are 0; sti
        &[0xb8, 0x03, 0x00, 0xcd, 0x10],                 // text mode
        // next: throw away what was typed
        &[
            0xb4, 0x01, 0xcd, 0x16, 0x74, 0x06, 0xb4, 0x00, 0xcd, 0x16, 0xeb, 0xf4,
        ],
        // the prompt, ">>>>>": larger than a caret
        &[0xb9, 0x05, 0x00, 0xb8, 0x3e, 0x0e, 0xcd, 0x10, 0xe2, 0xf9],
        &[0xb4, 0x00, 0xcd, 0x16, 0x50], // wait for a key, keep it
        &[0xb9, low, high],              // count ticks of the clock at 0x46c, never halting
        &[
            0xa1, 0x6c, 0x04, 0x90, 0x3b, 0x06, 0x6c, 0x04, 0x74, 0xf9, 0xe2, 0xf4,
        ],
        &[0x58, 0xb4, 0x0e, 0xcd, 0x10], // show the key
        &[0xeb, 0xcf],                   // next
    ]
    .concat();
    let mut sector = vec![0; 1 << 20];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}

struct Guest {
    vm: Vm,
    observer: Observer,
    _dir: TempDir,
}

impl Guest {
    async fn start(ticks: u16) -> Self {
        // Not under TMPDIR: unix sockets need short paths.
        let dir = tempfile::Builder::new()
            .prefix("rpl")
            .tempdir_in("/tmp")
            .unwrap();
        let (raw, disk) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
        fs::write(&raw, boot_sector(ticks)).unwrap();
        convert(&raw, &disk);
        let mut hardware = Hardware::new(programs::default_machine(&programs::qemu()).unwrap());
        hardware.memory_mib = 64;
        let launch = Launch {
            name: format!("in step {ticks}"),
            hardware,
            boot: None,
            accelerator: Accelerator::Tcg,
            runtime_dir: dir.path().join("run"),
            ram: dir.path().join("ram"),
            disks: vec![disk],
            arriving: Vec::new(),
            network: Network::Unplugged,
            incoming: false,
        };
        let vm = Vm::start(&launch).await.unwrap();
        let observer = Observer::connect(vm.vnc_socket()).await.unwrap();
        let guest = Self {
            vm,
            observer,
            _dir: dir,
        };
        guest.await_line(&[true]).await;
        guest
    }

    /// Waits until the first line of text has these prompts.
    async fn await_line(&self, lit: &[bool]) {
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            let frame = self.observer.frame();
            if (frame.width, frame.height) == (720, 400)
                && lit
                    .iter()
                    .enumerate()
                    .all(|(n, lit)| prompt_is_lit(&frame, n) == *lit)
            {
                return;
            }
            let changed = self.observer.changed(frame.version);
            let left = limit.saturating_duration_since(Instant::now());
            tokio::time::timeout(left, changed)
                .await
                .expect("the prompt is late")
                .unwrap();
        }
    }
}

impl Drop for Guest {
    /// No QEMU outlives its test, even one that fails.
    fn drop(&mut self) {
        let pid = self.vm.pid().to_string();
        let _ = Command::new("kill")
            .args(["-9", &pid])
            .stderr(Stdio::null())
            .status();
    }
}

/// Whether all of the `n`-th prompt is on the screen: each prompt and its key take six cells of 9 x 16
/// pixels. A screen may arrive in pieces: each character has to look like the first of all, but for the rows of
/// the caret.
fn prompt_is_lit(frame: &Frame, n: usize) -> bool {
    let cell = |column: usize| {
        (0..13).flat_map(move |row| {
            let start = (row * usize::from(frame.width) + column * 9) * 3;
            &frame.rgb[start..start + 9 * 3]
        })
    };
    let looks_like_the_first = |column| cell(column).eq(cell(0));
    cell(0).any(|byte| *byte > 100) && (n * 6..n * 6 + 5).all(looks_like_the_first)
}

fn convert(raw: &PathBuf, disk: &PathBuf) {
    let status = Command::new(programs::qemu_img())
        .args(["convert", "-O", "qcow2"])
        .args([raw, disk])
        .stdin(Stdio::null())
        .status();
    assert!(status.unwrap().success());
}

fn whole(observer: &Observer, look: impl FnOnce(&Pixels<'_>, Region) -> Anchor) -> Anchor {
    observer.with_frame(|frame| {
        let region = Region {
            x: 0,
            y: 0,
            width: frame.width,
            height: 64,
        };
        look(
            &Pixels {
                width: frame.width,
                height: frame.height,
                rgb: frame.rgb,
            },
            region,
        )
    })
}

/// A user at the fast guest: looks at the screen, thinks, types.
async fn record(guest: &Guest, thought: Duration) -> Vec<Record> {
    let begun = Instant::now();
    let mut records = Vec::new();
    let mut note = |event| {
        let micros = begun.elapsed().as_micros() as u64;
        records.push(Record {
            at: GuestTime { micros },
            event,
        });
    };
    for (n, code) in TYPED.into_iter().enumerate() {
        guest.await_line(&vec![true; n + 1]).await;
        tokio::time::sleep(thought).await;
        note(Event::Anchor(whole(&guest.observer, Anchor::capture)));
        for down in [true, false] {
            note(Event::Key { code, down });
            guest.vm.send(&[Input::Key { code, down }]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    }
    guest.await_line(&[true; TYPED.len() + 1]).await;
    records
}

/// Replays, and what the screen shows then: once it shows this, if that is what is waited for. A guest at
/// rest has drawn all of it; that QEMU tells so may take a while.
async fn replay(
    records: &[Record],
    options: &Options,
    ticks: u16,
    wanted: Option<&Anchor>,
) -> (ReplayReport, Anchor) {
    const LIMIT: Duration = Duration::from_secs(10);
    let copy = Guest::start(ticks).await;
    let report = replayer::replay(&copy.vm, &copy.observer, records, options, |_| ())
        .await
        .unwrap();
    let end = Instant::now() + LIMIT;
    loop {
        let version = copy.observer.frame().version;
        let shown = whole(&copy.observer, Anchor::capture);
        let there = wanted.is_none_or(|wanted| differing(wanted, &shown) <= 2);
        let left = end.saturating_duration_since(Instant::now());
        if there || left.is_zero() {
            return (report, shown);
        }
        let _ = tokio::time::timeout(left, copy.observer.changed(version)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slower_copy_gets_every_key() {
    let original = Guest::start(1).await;
    let records = record(&original, Duration::from_millis(200)).await;
    let wanted = whole(&original.observer, Anchor::capture);
    drop(original);

    let (report, shown) = replay(&records, &Options::default(), SLOW, Some(&wanted)).await;
    eprintln!("{report:?}");
    assert_eq!((report.matched, report.missed.len()), (TYPED.len(), 0));
    assert_eq!(
        (report.interactions, report.events),
        (TYPED.len(), 2 * TYPED.len())
    );
    assert!(report.came_to_rest);
    assert!(
        report.waited > Duration::from_secs(1),
        "the copy is slower by a second a key"
    );
    assert!(
        differing(&wanted, &shown) <= 2,
        "but for the caret the screens are the same"
    );

    // Were it not in step with the screen, it would lose keys.
    let options = Options {
        anchor_limit: Duration::ZERO,
        ..Options::default()
    };
    let (report, shown) = replay(&records, &options, SLOW, None).await;
    assert!(!report.missed.is_empty());
    assert!(differing(&wanted, &shown) > 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_ready_is_not_kept_waiting_and_one_that_is_not_loses_no_key() {
    let original = Guest::start(1).await;
    let records = record(&original, Duration::from_millis(2500)).await;
    let wanted = whole(&original.observer, Anchor::capture);
    drop(original);

    let options = Options {
        pace: Pace::quick(None),
        ..Options::default()
    };
    let mut saved = Vec::new();
    for ticks in [1, SLOW] {
        let (report, shown) = replay(&records, &options, ticks, Some(&wanted)).await;
        eprintln!("{report:?}");
        assert_eq!((report.matched, report.missed.len()), (TYPED.len(), 0));
        assert!(
            differing(&wanted, &shown) <= 2,
            "but for the caret the screens are the same"
        );
        saved.push((report.saved, report.recorded));
    }
    let (quick, recorded) = saved[0];
    assert!(quick * 2 >= recorded, "{saved:?}");
    assert!(saved[1].0 < quick, "it waits for a slower copy: {saved:?}");
}

fn differing(one: &Anchor, other: &Anchor) -> usize {
    assert_eq!(one.region, other.region);
    one.tiles
        .iter()
        .zip(&other.tiles)
        .filter(|(one, other)| one != other)
        .count()
}
