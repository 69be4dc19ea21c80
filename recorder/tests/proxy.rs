//! Viewers of all kinds through the proxy to a real QEMU.

#![allow(clippy::unwrap_used)] // Helpers of tests, which clippy does not recognise as such.

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Log, PATIENCE, Qemu, RawViewer, config, record};
use recorder::{Listen, Recorder, RecorderConfig, RecorderError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use traces::{Event, GuestTime};
use vnc::{ClientKeyEvent, PixelFormat, VncClient, VncConnector, VncEncoding, VncEvent, X11Event};

const REFRESH_ALL: [u8; 10] = [3, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];

async fn real_viewer(socket: &Path) -> VncClient {
    let stream = UnixStream::connect(socket).await.unwrap();
    VncConnector::new(stream)
        .set_auth_method(async { Ok(String::new()) })
        .add_encoding(VncEncoding::Tight)
        .add_encoding(VncEncoding::Raw)
        .add_encoding(VncEncoding::DesktopSizePseudo)
        .allow_shared(false)
        .set_pixel_format(PixelFormat::bgra())
        .build()
        .unwrap()
        .try_start()
        .await
        .unwrap()
        .finish()
        .unwrap()
}

async fn pixels(viewer: &VncClient) {
    let wait =
        async { while !matches!(viewer.recv_event().await.unwrap(), VncEvent::RawImage(..)) {} };
    tokio::time::timeout(PATIENCE, wait).await.unwrap();
}

async fn type_key(viewer: &VncClient, keysym: u8) {
    for down in [true, false] {
        let event = ClientKeyEvent {
            keycode: keysym.into(),
            down,
        };
        viewer.input(X11Event::KeyEvent(event)).await.unwrap();
    }
}

fn typed(code: u16) -> impl Fn(&[Event]) -> bool {
    move |events| events.contains(&Event::Key { code, down: false })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_real_viewers_that_want_the_screen_alone_share_it() {
    let qemu = Qemu::start();
    let (recorder, log, listen) = record(&qemu).await;
    let (one, two) = (real_viewer(&listen).await, real_viewer(&listen).await);
    pixels(&one).await;
    pixels(&two).await;
    type_key(&one, b'a').await;
    log.until(typed(30)).await;
    type_key(&two, b'b').await;
    log.until(typed(48)).await;
    pixels_again(&one).await;
    let statistics = recorder.statistics();
    assert_eq!(
        (statistics.viewers, statistics.admitted, statistics.refused),
        (2, 2, 0)
    );
    assert_eq!(statistics.forwarded, 4);
    recorder.check().unwrap();
}

async fn pixels_again(viewer: &VncClient) {
    viewer.input(X11Event::FullRefresh).await.unwrap();
    pixels(viewer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_version_gets_what_qemu_says() {
    let qemu = Qemu::start();
    let (_recorder, log, listen) = record(&qemu).await;
    let mut inits = Vec::new();
    for minor in [3, 7, 8] {
        let mut viewer = RawViewer(UnixStream::connect(&listen).await.unwrap());
        viewer.handshake(minor).await;
        inits.push(viewer.server_init().await);
        viewer.key(u32::from(b'0') + u32::from(minor), true).await;
        viewer.key(u32::from(b'0') + u32::from(minor), false).await;
        log.until(typed(u16::from(minor) + 1)).await;
    }
    for init in inits {
        assert_eq!(&init[24..], b"QEMU");
        assert_eq!(init[4..6], [32, 24]);
    }
}

/// What QEMU said, by connection.
type Said = Arc<Mutex<Vec<Arc<Mutex<Vec<u8>>>>>>;

/// Stands before QEMU and notes what it says on each connection.
fn tap(listen: &Path, qemu: &Path) -> Said {
    let listener = UnixListener::bind(listen).unwrap();
    let (heard, qemu) = (Arc::new(Mutex::new(Vec::new())), qemu.to_owned());
    let all = Arc::clone(&heard);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let said = Arc::new(Mutex::new(Vec::new()));
            all.lock().unwrap().push(Arc::clone(&said));
            let server = UnixStream::connect(&qemu).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            tokio::spawn(async move {
                let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
                let _ = to_server.shutdown().await;
            });
            tokio::spawn(async move {
                let mut buffer = vec![0; 5000];
                while let Ok(length @ 1..) = from_server.read(&mut buffer).await {
                    said.lock().unwrap().extend_from_slice(&buffer[..length]);
                    if to_client.write_all(&buffer[..length]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    heard
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_qemu_says_arrives_untouched() {
    let qemu = Qemu::start();
    let tapped = qemu.path("tapped");
    let heard = tap(&tapped, &qemu.vnc());
    let listen = qemu.path("viewers");
    let clock = GuestTime::default;
    let recorder = Recorder::start(config(&listen, &tapped), Log::default().sink(), clock)
        .await
        .unwrap();
    let mut viewer = RawViewer(UnixStream::connect(&listen).await.unwrap());
    viewer.handshake(3).await;
    let mut got = viewer.server_init().await;
    // Tight, ZRLE and zlib have streams that one lost byte breaks; the rest are extensions.
    for (encoding, enough) in [(7, 16), (16, 16), (6, 16), (0, 500_000)] {
        viewer
            .set_encodings(&[encoding, -223, -258, -261, -308, -239])
            .await;
        viewer.send(&REFRESH_ALL).await;
        got.extend(viewer.read(enough).await);
    }
    recorder.shutdown().await.unwrap();
    got.extend(viewer.read_to_end().await);
    // The observer came first. QEMU's handshake of 3.8 is ours, the rest the viewer's.
    let said = heard.lock().unwrap()[1].lock().unwrap().clone();
    let session = &said[12 + 2 + 4..];
    assert!(got.len() > 500_000);
    assert!(
        session.starts_with(&got),
        "{} bytes of {}",
        got.len(),
        session.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_refused_with_a_reason_and_disturbs_nobody() {
    let qemu = Qemu::start();
    let (recorder, log, listen) = record(&qemu).await;
    let good = real_viewer(&listen).await;
    pixels(&good).await;

    // No RFB at all: a reason in the form of RFB 3.8.
    let mut web = RawViewer(UnixStream::connect(&listen).await.unwrap());
    web.send(b"GET / HTTP/1.1\r\n\r\n").await;
    let answer = web.read_to_end().await;
    assert_eq!(answer[..13], *b"RFB 003.008\n\0");
    assert!(String::from_utf8_lossy(&answer[17..]).contains("does not speak RFB"));

    // A security type that was not offered.
    let mut wrong = RawViewer(UnixStream::connect(&listen).await.unwrap());
    wrong.send(b"RFB 003.008\n\x10").await;
    let answer = wrong.read_to_end().await;
    assert!(String::from_utf8_lossy(&answer).contains("only None (1) was offered"));

    // Garbage after the handshake, and a clipboard of two gigabytes.
    for nonsense in [
        &[99; 40][..],
        &[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff],
        &[255, 9],
    ] {
        let mut viewer = RawViewer::connect(&listen).await;
        viewer.key(u32::from(b'q'), true).await;
        viewer.send(nonsense).await;
        viewer.read_to_end().await;
    }
    // One that hangs up in the middle of a message.
    let mut short = RawViewer::connect(&listen).await;
    short.send(&[5, 0, 1]).await;
    short.0.shutdown().await.unwrap();
    short.read_to_end().await;

    while recorder.statistics().refused < 6 {
        tokio::task::yield_now().await;
    }
    type_key(&good, b'g').await;
    log.until(typed(34)).await;
    pixels_again(&good).await;
    let q = log
        .edges()
        .into_iter()
        .filter(|(code, _)| *code == 16)
        .collect::<Vec<_>>();
    assert_eq!(q, [(16, true), (16, false)].repeat(3));
    assert_eq!(recorder.statistics().viewers, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_of_a_dead_vm_is_told_so() {
    let mut qemu = Qemu::start();
    let (recorder, log, listen) = record(&qemu).await;
    let mut held = RawViewer::connect(&listen).await;
    held.key(u32::from(b'k'), true).await;
    log.until(|e| {
        e.contains(&Event::Key {
            code: 37,
            down: true,
        })
    })
    .await;
    qemu.kill();
    held.read_to_end().await;
    let mut late = RawViewer(UnixStream::connect(&listen).await.unwrap());
    late.send(b"RFB 003.003\n").await;
    let answer = late.read_to_end().await;
    assert_eq!(answer[12..16], [0; 4]);
    assert!(
        String::from_utf8_lossy(&answer).contains("is the VM running"),
        "{answer:?}"
    );
    let broken = async {
        while recorder.check().is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, broken).await.unwrap();
    recorder.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_room_for_so_many() {
    let qemu = Qemu::start();
    let listen = qemu.path("viewers");
    let config = RecorderConfig {
        max_viewers: 1,
        ..config(&listen, &qemu.vnc())
    };
    let recorder = Recorder::start(config, Log::default().sink(), GuestTime::default)
        .await
        .unwrap();
    let first = RawViewer::connect(&listen).await;
    let mut second = RawViewer(UnixStream::connect(&listen).await.unwrap());
    second.send(b"RFB 003.008\n").await;
    let answer = second.read_to_end().await;
    assert!(String::from_utf8_lossy(&answer).contains("1 viewers already"));
    drop(first);
    while recorder.statistics().viewers > 0 {
        tokio::task::yield_now().await;
    }
    RawViewer::connect(&listen).await;
}

#[tokio::test]
async fn busy_places_are_named_and_stale_sockets_replaced() {
    let qemu = Qemu::start();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut wanted = RecorderConfig::new(qemu.vnc());
    wanted.listen = Listen::Tcp(taken.local_addr().unwrap());
    let start = |config| Recorder::start(config, Log::default().sink(), GuestTime::default);
    let Err(error) = start(wanted.clone()).await else {
        panic!()
    };
    assert!(matches!(error, RecorderError::Busy { .. }));
    assert!(error.to_string().contains("is in use"), "{error}");

    drop(taken);
    wanted.listen = "127.0.0.1:0".parse().unwrap();
    let recorder = start(wanted.clone()).await.unwrap();
    let Listen::Tcp(address) = recorder.local_addr().clone() else {
        panic!()
    };
    let mut viewer = RawViewer(TcpStream::connect(address).await.unwrap());
    viewer.handshake(7).await;
    viewer.server_init().await;
    drop(recorder);
    viewer.read_to_end().await;

    let stale = qemu.path("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    wanted.listen = format!("unix:{}", stale.display()).parse().unwrap();
    let recorder = start(wanted.clone()).await.unwrap();
    assert!(matches!(
        start(wanted.clone()).await,
        Err(RecorderError::Busy { .. })
    ));
    recorder.shutdown().await.unwrap();
    assert!(!stale.exists());

    std::fs::write(&stale, "no socket").unwrap();
    assert!(start(wanted).await.is_err());
    assert_eq!(std::fs::read(&stale).unwrap(), b"no socket");
    let Err(error) = "localhost".parse::<Listen>() else {
        panic!()
    };
    assert!(error.to_string().contains("IP:PORT"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_takes_no_visible_time() {
    const ROUNDS: usize = 300;
    let qemu = Qemu::start();
    let (recorder, _log, listen) = record(&qemu).await;
    let mut direct = RawViewer::connect_shared(&qemu.vnc()).await;
    let mut proxied = RawViewer::connect(&listen).await;
    let (mut there, mut through) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        there.push(echo(&mut direct, round).await);
        through.push(echo(&mut proxied, round).await);
    }
    there.sort();
    through.sort();
    let added = through[ROUNDS / 2].saturating_sub(there[ROUNDS / 2]);
    let inside = recorder.statistics().latency;
    println!(
        "round trip of a pointer event: direct {:?}, through the proxy {:?}; inside it {inside:?}",
        there[ROUNDS / 2],
        through[ROUNDS / 2],
    );
    assert!(added < Duration::from_millis(1), "the proxy adds {added:?}");
    assert!(inside.median() < Duration::from_millis(1), "{inside:?}");
}

/// How long it takes until QEMU has seen a pointer event: what comes after it is answered at once.
async fn echo(viewer: &mut RawViewer<UnixStream>, round: usize) -> Duration {
    let start = std::time::Instant::now();
    viewer.point(round as u16, 7, 0).await;
    // QEMU acknowledges its extended key events with a rectangle of their number.
    viewer.set_encodings(&[-258]).await;
    assert_eq!(viewer.read(16).await[12..], (-258_i32).to_be_bytes());
    start.elapsed()
}
