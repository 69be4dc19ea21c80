//! A bare QEMU that says what input it got, and a viewer made of bytes.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use recorder::{Listen, Recorder, RecorderConfig, RecorderHandle};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use traces::{Event, GuestTime, Record};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// The processor's instruction that waits for an interrupt; here none comes.
const HLT: u8 = 0xf4;

/// A guest with nothing to boot, tracing its input.
pub struct Qemu {
    child: Child,
    dir: TempDir,
}

impl Qemu {
    /// SeaBIOS, which changes the size of the screen once and writes on it.
    pub fn start() -> Self {
        Self::with_firmware(None)
    }

    /// A guest that runs, but does nothing: its screen stands still.
    pub fn halted() -> Self {
        Self::with_firmware(Some(&vec![HLT; 64 << 10]))
    }

    fn with_firmware(firmware: Option<&[u8]>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let own = firmware.map(|image| {
            let path = dir.path().join("firmware");
            std::fs::write(&path, image).unwrap();
            ["-bios".into(), path.into_os_string()]
        });
        let child = Command::new(vm_host::programs::qemu())
            // Without PS/2 the only pointer is the tablet, as if the guest had a driver for it.
            .args([
                "-nodefaults",
                "-machine",
                "q35,accel=tcg,i8042=off",
                "-m",
                "64",
            ])
            .args([
                "-device",
                "virtio-keyboard-pci",
                "-device",
                "virtio-tablet-pci",
            ])
            .args(own.into_iter().flatten())
            .args(["-vga", "std", "-display", "none", "-monitor", "none"])
            .args(["-vnc", &format!("unix:{}/vnc", dir.path().display())])
            .args(["-trace", "input_event_*", "-trace", "vnc_key_event_*"])
            .arg("-D")
            .arg(dir.path().join("trace"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let qemu = Self { child, dir };
        let give_up = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(qemu.vnc()).is_err() {
            assert!(Instant::now() < give_up, "QEMU does not listen");
            std::thread::yield_now();
        }
        qemu
    }

    pub fn vnc(&self) -> PathBuf {
        self.path("vnc")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn trace(&self) -> String {
        std::fs::read_to_string(self.path("trace")).unwrap_or_default()
    }

    /// Returns the trace once it fulfils `wanted`.
    pub async fn trace_until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let trace = self.trace();
            if wanted(&trace) {
                return trace;
            }
            let input = trace
                .lines()
                .filter(|l| l.starts_with("input_event_"))
                .count();
            assert!(
                Instant::now() < give_up,
                "QEMU got only {input} input events"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Records in memory.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Record>>>);

impl Log {
    pub fn sink(&self) -> impl FnMut(Record) + Send + use<> {
        let records = Arc::clone(&self.0);
        move |record| records.lock().unwrap().push(record)
    }

    pub fn records(&self) -> Vec<Record> {
        self.0.lock().unwrap().clone()
    }

    pub fn events(&self) -> Vec<Event> {
        self.records().into_iter().map(|r| r.event).collect()
    }

    /// What was typed and clicked, without positions, sizes and anchors.
    pub fn edges(&self) -> Vec<(u16, bool)> {
        let edge = |event: &Event| match event {
            Event::Key { code, down } | Event::Button { code, down } => Some((*code, *down)),
            _ => None,
        };
        self.events().iter().filter_map(edge).collect()
    }

    /// Returns the events once they fulfil `wanted`.
    pub async fn until(&self, wanted: impl Fn(&[Event]) -> bool) -> Vec<Event> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let events = self.events();
            if wanted(&events) {
                return events;
            }
            assert!(Instant::now() < give_up, "only {} events", events.len());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

pub fn config(listen: &Path, vnc: &Path) -> RecorderConfig {
    RecorderConfig {
        listen: Listen::Unix(listen.to_owned()),
        ..RecorderConfig::new(vnc.to_owned())
    }
}

/// Records on a unix socket next to QEMU's, with a clock that counts real time.
pub async fn record(qemu: &Qemu) -> (RecorderHandle, Log, PathBuf) {
    let log = Log::default();
    let listen = qemu.path("viewers");
    let start = Instant::now();
    let clock = move || GuestTime {
        micros: start.elapsed().as_micros() as u64,
    };
    let recorder = Recorder::start(config(&listen, &qemu.vnc()), log.sink(), clock)
        .await
        .unwrap();
    (recorder, log, listen)
}

/// A viewer made by hand.
pub struct RawViewer<S>(pub S);

impl RawViewer<UnixStream> {
    /// RFB 3.8 up to and including ServerInit.
    pub async fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).await.unwrap();
        let mut viewer = Self(stream);
        viewer.handshake(8).await;
        viewer.server_init().await;
        viewer
    }
}

impl RawViewer<UnixStream> {
    /// Straight to QEMU, leaving its other viewers alone.
    pub async fn connect_shared(socket: &Path) -> Self {
        let mut viewer = Self(UnixStream::connect(socket).await.unwrap());
        viewer.greet(8).await;
        viewer.send(&[1]).await;
        viewer.server_init().await;
        viewer
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> RawViewer<S> {
    pub async fn read(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let reading = self.0.read_exact(&mut bytes);
        tokio::time::timeout(PATIENCE, reading)
            .await
            .unwrap()
            .unwrap();
        bytes
    }

    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let reading = self.0.read_to_end(&mut bytes);
        let _ = tokio::time::timeout(PATIENCE, reading).await.unwrap();
        bytes
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
        self.0.flush().await.unwrap();
    }

    /// Up to and including ClientInit, asking for the screen alone.
    pub async fn handshake(&mut self, minor: u8) {
        self.greet(minor).await;
        self.send(&[0]).await;
    }

    /// Up to ClientInit.
    pub async fn greet(&mut self, minor: u8) {
        assert_eq!(self.read(12).await, b"RFB 003.008\n");
        self.send(format!("RFB 003.00{minor}\n").as_bytes()).await;
        if minor == 3 {
            assert_eq!(self.read(4).await, [0, 0, 0, 1]);
        } else {
            assert_eq!(self.read(2).await, [1, 1]);
            self.send(&[1]).await;
            if minor == 8 {
                assert_eq!(self.read(4).await, [0; 4]);
            }
        }
    }

    pub async fn server_init(&mut self) -> Vec<u8> {
        let mut init = self.read(24).await;
        let name = u32::from_be_bytes(init[20..24].try_into().unwrap());
        init.extend(self.read(name as usize).await);
        init
    }

    pub async fn key(&mut self, keysym: u32, down: bool) {
        let mut message = vec![4, u8::from(down), 0, 0];
        message.extend(keysym.to_be_bytes());
        self.send(&message).await;
    }

    pub async fn extended_key(&mut self, keysym: u32, qnum: u32, down: bool) {
        let mut message = vec![255, 0, 0, u8::from(down)];
        message.extend(keysym.to_be_bytes());
        message.extend(qnum.to_be_bytes());
        self.send(&message).await;
    }

    pub async fn point(&mut self, x: u16, y: u16, buttons: u8) {
        let mut message = vec![5, buttons];
        message.extend(x.to_be_bytes());
        message.extend(y.to_be_bytes());
        self.send(&message).await;
    }

    pub async fn set_encodings(&mut self, encodings: &[i32]) {
        let mut message = vec![2, 0];
        message.extend((encodings.len() as u16).to_be_bytes());
        message.extend(encodings.iter().flat_map(|e| e.to_be_bytes()));
        self.send(&message).await;
    }
}
