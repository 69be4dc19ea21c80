//! The log says what QEMU gave the guest, according to QEMU's own trace of its input events.

#![allow(clippy::unwrap_used)] // Helpers of tests, which clippy does not recognise as such.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::RangeInclusive;

use common::{Qemu, RawViewer, record};
use recorder::evdev::{DeviceSource, RawEvent};
use tokio::sync::mpsc;
use traces::Event;
use vm_host::keys::linux_from_qnum;

/// A key that no test presses otherwise, to know that QEMU has come this far: F12.
const SENTINEL: (u32, &str) = (0xffc9, "f12");

/// The names of QEMU's key codes, with the Linux codes they stand for.
async fn key_names(qemu: &Qemu) -> BTreeMap<String, u16> {
    let mut viewer = RawViewer::connect_shared(&qemu.vnc()).await;
    for qnum in 1..=255 {
        // Releases of keys that are up go nowhere, but are traced.
        viewer.extended_key(0, qnum, false).await;
    }
    let trace = qemu.trace_until(|t| t.contains("keycode 0xff ")).await;
    let mut names = BTreeMap::new();
    for line in trace.lines().filter(|l| l.contains("vnc_key_event_ext")) {
        let (_, rest) = line.split_once("keycode 0x").unwrap();
        let (qnum, name) = rest.split_once(" [").unwrap();
        let qnum = u8::from_str_radix(qnum, 16).unwrap();
        let name = name.trim_end_matches(']');
        if let Some(code) = linux_from_qnum(qnum).filter(|_| name != "unmapped") {
            names.entry(name.to_owned()).or_insert(code);
        }
    }
    // QEMU takes these two for one key when it hands them on.
    names.insert("print".to_owned(), names["sysrq"]);
    assert!(names.len() > 100, "{names:?}");
    names
}

/// What the guest's kernel makes of QEMU's key events: repeats are dropped.
fn key_edges(trace: &str, names: &BTreeMap<String, u16>) -> Vec<(u16, bool)> {
    let mut held = BTreeSet::new();
    let mut edges = Vec::new();
    for line in trace.lines().filter(|l| !l.contains("qcode unmapped")) {
        let Some((_, rest)) = line.split_once("key qcode ") else {
            continue;
        };
        let (name, down) = rest.split_once(", down ").unwrap();
        let code = *names
            .get(name)
            .unwrap_or_else(|| panic!("no Linux code for {name}"));
        let down = down.trim() == "1";
        if if down {
            held.insert(code)
        } else {
            held.remove(&code)
        } {
            edges.push((code, down));
        }
    }
    edges
}

/// Key messages of viewers that QEMU has read: not those of the screen observer, nor releases
/// that the recorder adds.
fn key_messages(trace: &str) -> usize {
    let own = |l: &&str| l.contains("sym 0xff23 ") || l.contains("down 0, sym 0x0,");
    let messages = trace.lines().filter(|l| l.starts_with("vnc_key_event_"));
    messages.filter(|l| !own(l)).count()
}

/// Keys that are released together are so in no particular order.
fn unordered_releases(mut edges: Vec<(u16, bool)>) -> Vec<(u16, bool)> {
    for together in edges.chunk_by_mut(|a, b| !a.1 && !b.1) {
        together.sort_unstable();
    }
    edges
}

fn assert_same(logged: &[(u16, bool)], given: &[(u16, bool)]) {
    let differ = logged.iter().zip(given).position(|(l, g)| l != g);
    let at = differ.unwrap_or(logged.len().min(given.len()));
    let around = |edges: &[(u16, bool)]| {
        format!(
            "{:?}",
            edges
                .iter()
                .skip(at.saturating_sub(4))
                .take(8)
                .collect::<Vec<_>>()
        )
    };
    assert!(
        logged == given,
        "at {at}: logged {}, given {}",
        around(logged),
        around(given)
    );
}

/// Returns once QEMU has worked off what was typed. It forgets keys beyond about 340 that wait.
async fn press_sentinel(viewer: &mut RawViewer<tokio::net::UnixStream>, qemu: &Qemu) -> String {
    let released = format!("qcode {}, down 0", SENTINEL.1);
    let before = qemu.trace().matches(&released).count();
    viewer.key(SENTINEL.0, true).await;
    viewer.key(SENTINEL.0, false).await;
    qemu.trace_until(|t| t.matches(&released).count() > before)
        .await
}

/// Few, but reproducible.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_keysym_is_logged_as_the_key_that_qemu_pressed() {
    let qemu = Qemu::start();
    let names = key_names(&qemu).await;
    let (recorder, log, listen) = record(&qemu).await;
    let mut viewer = RawViewer::connect(&listen).await;
    let keysyms = (0x20..0x100)
        .chain(0xfe00..0xfe40)
        .chain(0xff00..0x1_0000)
        .chain([0x0100_0041]);
    let keysyms: Vec<u32> = keysyms.filter(|k| *k != SENTINEL.0).collect();
    for some in keysyms.chunks(60) {
        for keysym in some {
            viewer.key(*keysym, true).await;
            viewer.key(*keysym, false).await;
        }
        press_sentinel(&mut viewer, &qemu).await;
    }
    let trace = press_sentinel(&mut viewer, &qemu).await;
    recorder.flush().unwrap();
    let edges = log.edges();
    assert!(edges.len() > 300, "{}", edges.len());
    assert_same(&edges, &key_edges(&trace, &names));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wild_typing_is_logged_as_qemu_passed_it_on() {
    let qemu = Qemu::start();
    let names = key_names(&qemu).await;
    let (recorder, log, listen) = record(&qemu).await;
    let mut viewers = [
        RawViewer::connect(&listen).await,
        RawViewer::connect(&listen).await,
    ];
    // Shift, control, alt and lock keys, letters, digits, keypad, shared keysyms.
    let keysyms = b"aAbB12<>|Z".iter().copied().map(u32::from).chain([
        0xffe1, 0xffe2, 0xffe3, 0xffe9, 0xffea, 0xffe5, 0xff7f, 0xffb7, 0xff95, 0xffab, 0xffae,
    ]);
    let keysyms: Vec<u32> = keysyms.collect();
    let mut dice = Dice(7);
    let mut typed = key_messages(&qemu.trace());
    for round in 0..400 {
        if round % 100 == 99 {
            press_sentinel(&mut viewers[0], &qemu).await;
            typed += 2;
        }
        let keysym = keysyms[dice.roll(keysyms.len() as u64) as usize];
        let (down, who) = (dice.roll(2) == 0, dice.roll(2) as usize);
        if dice.roll(4) == 0 {
            let qnum = [0x1e, 0x2a, 0x3a, 0x47, 0x38, 0x02][dice.roll(6) as usize];
            viewers[who].extended_key(keysym, qnum, down).await;
        } else {
            viewers[who].key(keysym, down).await;
        }
        // QEMU reads sockets that are ready at once in an order of its own.
        typed += 1;
        qemu.trace_until(|t| key_messages(t) >= typed).await;
    }
    let trace = press_sentinel(&mut viewers[0], &qemu).await;
    recorder.flush().unwrap();
    let edges = log.edges();
    assert!(edges.len() > 100, "{}", edges.len());
    let given = key_edges(&trace, &names);
    assert_same(&unordered_releases(edges), &unordered_releases(given));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leaving_viewer_holds_is_released_in_the_guest_and_in_the_log() {
    let qemu = Qemu::start();
    let (recorder, log, listen) = record(&qemu).await;
    let mut viewer = RawViewer::connect(&listen).await;
    viewer.key(0xffe1, true).await;
    viewer.point(10, 20, 1).await;
    log.until(|e| {
        e.contains(&Event::Button {
            code: 0x110,
            down: true,
        })
    })
    .await;
    drop(viewer);
    log.until(|e| e.len() >= 2 && matches!(e[e.len() - 1], Event::Key { down: false, .. }))
        .await;
    let edges = log.edges();
    assert_eq!(edges[..2], [(42, true), (0x110, true)]);
    assert_eq!(
        edges[2..].iter().copied().collect::<BTreeSet<_>>(),
        [(42, false), (0x110, false)].into()
    );
    qemu.trace_until(|t| t.contains("qcode shift, down 0") && t.contains("button left, down 0"))
        .await;
    assert_eq!(recorder.shutdown().await.unwrap().viewers, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_leaves_a_gap_and_holds_what_is_held() {
    let qemu = Qemu::start();
    let (recorder, log, listen) = record(&qemu).await;
    let mut viewer = RawViewer::connect(&listen).await;
    viewer.key(u32::from(b'a'), true).await;
    log.until(|e| e.iter().any(|e| matches!(e, Event::Key { .. })))
        .await;
    viewer.key(0xffe1, true).await;
    log.until(|e| {
        e.contains(&Event::Key {
            code: 42,
            down: true,
        })
    })
    .await;
    recorder.pause();
    recorder.pause();
    viewer.key(u32::from(b'a'), false).await;
    viewer.key(u32::from(b'b'), true).await;
    viewer.point(3, 4, 0).await;
    // Input still reaches the guest.
    qemu.trace_until(|t| t.contains("qcode b, down 1")).await;
    while recorder.statistics().forwarded < 5 {
        tokio::task::yield_now().await;
    }
    recorder.resume();
    viewer.key(u32::from(b'b'), false).await;
    viewer.key(u32::from(b'c'), true).await;
    log.until(|e| {
        e.contains(&Event::Key {
            code: 46,
            down: true,
        })
    })
    .await;
    let events = log.events();
    let after = events.iter().position(|e| *e == Event::Gap).unwrap();
    // SeaBIOS may be changing to text mode.
    let input = |e: &&Event| !matches!(e, Event::Anchor(_) | Event::Screen { .. });
    assert_eq!(
        events[after..]
            .iter()
            .filter(input)
            .cloned()
            .collect::<Vec<_>>(),
        [
            Event::Gap,
            Event::Key {
                code: 42,
                down: true
            },
            Event::Pointer { x: 3, y: 4 },
            Event::Key {
                code: 46,
                down: true
            },
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_anchor_goes_before_what_it_anchors_and_times_never_go_back() {
    let qemu = Qemu::halted();
    let (recorder, log, listen) = record(&qemu).await;
    let mut viewer = RawViewer::connect(&listen).await;
    viewer.point(100, 100, 0).await;
    viewer.point(100, 100, 1).await;
    viewer.point(100, 100, 0).await;
    viewer.key(u32::from(b'x'), true).await;
    viewer.key(u32::from(b'x'), false).await;
    let done = |e: &[Event]| {
        e.contains(&Event::Key {
            code: 45,
            down: false,
        })
    };
    let events = log.until(done).await;
    assert!(matches!(events[0], Event::Screen { .. }));
    let press = events
        .iter()
        .position(|e| matches!(e, Event::Button { down: true, .. }))
        .unwrap();
    let Event::Anchor(anchor) = &events[press - 1] else {
        panic!("{events:?}")
    };
    let region = anchor.region;
    assert!(
        region.x <= 100 && 100 < region.x + region.width,
        "{region:?}"
    );
    assert_eq!(
        anchor.tiles.len(),
        usize::from(region.width.div_ceil(16) * region.height.div_ceil(16))
    );
    assert_eq!(recorder.statistics().anchors, 1);
    let times: Vec<_> = log.records().iter().map(|r| r.at).collect();
    assert!(times.is_sorted());
    let keys: Vec<_> = log
        .records()
        .iter()
        .rev()
        .take(2)
        .map(|r| r.at.micros)
        .collect();
    assert!(keys[0] - keys[1] >= 10_000, "QEMU spaces keys: {keys:?}");
}

/// A device that does what the test says.
struct FakeDevice(mpsc::UnboundedReceiver<(u16, u16, i32)>);

impl DeviceSource for FakeDevice {
    async fn next(&mut self) -> io::Result<RawEvent> {
        match self.0.recv().await {
            Some((kind, code, value)) => Ok(RawEvent { kind, code, value }),
            None => Err(io::Error::other("unplugged")),
        }
    }

    fn position_range(&self) -> Option<[RangeInclusive<i32>; 2]> {
        None
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_of_this_machine_reaches_guest_and_log() {
    let qemu = Qemu::start();
    let (mut recorder, log, _) = record(&qemu).await;
    let (device, events) = mpsc::unbounded_channel();
    recorder.capture(FakeDevice(events));
    let report = |raw: &[(u16, u16, i32)]| {
        raw.iter()
            .chain(&[(0, 0, 0)])
            .for_each(|event| device.send(*event).unwrap());
    };
    report(&[(1, 30, 1)]);
    report(&[(1, 30, 2)]);
    report(&[(2, 0, 5), (1, 0x111, 1)]);
    report(&[(2, 8, -1)]);
    report(&[(1, 30, 0)]);
    report(&[(1, 42, 1)]);
    qemu.trace_until(|t| t.contains("qcode shift, down 1"))
        .await;
    drop(device);
    qemu.trace_until(|t| t.contains("qcode shift, down 0") && t.contains("button right, down 0"))
        .await;
    let trace = qemu.trace();
    assert!(trace.contains("button wheel-down, down 1"), "{trace}");
    assert!(trace.contains("input_event_abs"), "{trace}");
    assert!(!trace.contains("input_event_rel"), "{trace}");
    recorder.shutdown().await.unwrap();
    let mut edges = log.edges();
    assert!(log.events().contains(&Event::Wheel {
        vertical: -1,
        horizontal: 0
    }));
    let rest: BTreeSet<_> = edges.split_off(4).into_iter().collect();
    assert_eq!(edges, [(30, true), (0x111, true), (30, false), (42, true)]);
    assert_eq!(rest, [(42, false), (0x111, false)].into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pointer_is_where_the_log_says_even_for_a_viewer_of_few_words() {
    let qemu = Qemu::start();
    let (recorder, log, listen) = record(&qemu).await;
    // Past the change to text mode, which positions are scaled by.
    log.until(|e| {
        e.contains(&Event::Screen {
            width: 720,
            height: 400,
        })
    })
    .await;
    let mut viewer = RawViewer::connect(&listen).await;
    for (x, y) in [(0, 0), (360, 100), (719, 399), (5000, 5000)] {
        viewer.point(x, y, 0).await;
    }
    let scaled = |value: u32, size: u32| value * 0x7fff / size;
    let last = format!("axis y, value {:#x}", scaled(399, 400));
    let trace = qemu
        .trace_until(|t| t.lines().any(|l| l.ends_with(&last)))
        .await;
    assert!(trace.contains(&format!("axis x, value {:#x}", scaled(360, 720))));
    recorder.flush().unwrap();
    let pointers = log.events().into_iter().filter_map(|e| match e {
        Event::Pointer { x, y } => Some((x, y)),
        _ => None,
    });
    let pointers: Vec<_> = pointers.collect();
    // What lies beyond the screen is its edge.
    assert_eq!(pointers, [(0, 0), (360, 100), (719, 399)]);
}
