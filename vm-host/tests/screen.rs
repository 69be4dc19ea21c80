//! The screen observer against a real QEMU: what it holds is what `screendump` writes.

#![allow(clippy::unwrap_used)] // Helpers of tests, which clippy does not recognise as such.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vm_host::screen::Observer;

/// A machine without disks: SeaBIOS and iPXE draw a text screen and stop there.
struct BareQemu {
    child: Child,
    dir: tempfile::TempDir,
    qmp: BufReader<StdStream>,
}

impl BareQemu {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("unix:{}", dir.path().join(name).display());
        let child = Command::new(vm_host::programs::qemu())
            .args(["-machine", "q35,accel=tcg", "-m", "64", "-display", "none"])
            .args(["-vnc", &format!("{},share=ignore", at("vnc"))])
            .args(["-qmp", &format!("{},server=on,wait=off", at("qmp"))])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let give_up = Instant::now() + Duration::from_secs(30);
        let stream = loop {
            match StdStream::connect(dir.path().join("qmp")) {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < give_up, "no QMP socket: {e}"),
            }
            std::thread::yield_now();
        };
        let mut qemu = Self {
            child,
            dir,
            qmp: BufReader::new(stream),
        };
        qemu.qmp(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    fn qmp(&mut self, command: &str) {
        writeln!(self.qmp.get_mut(), "{command}").unwrap();
        let mut line = String::new();
        while !line.starts_with(r#"{"return""#) {
            assert!(!line.starts_with(r#"{"error""#), "{line}");
            line.clear();
            assert_ne!(self.qmp.read_line(&mut line).unwrap(), 0, "QMP ended");
        }
    }

    fn screendump(&mut self) -> (u16, u16, Vec<u8>) {
        let file = self.dir.path().join("dump.ppm");
        let path = file.display();
        self.qmp(&format!(
            r#"{{"execute":"screendump","arguments":{{"filename":"{path}"}}}}"#
        ));
        let ppm = std::fs::read(&file).unwrap();
        let header = ppm
            .splitn(4, |b| *b == b'\n' || *b == b' ')
            .collect::<Vec<_>>();
        let number = |b: &[u8]| std::str::from_utf8(b).unwrap().parse::<u16>().unwrap();
        let rgb = header[3].strip_prefix(b"255\n").unwrap();
        (number(header[1]), number(header[2]), rgb.to_vec())
    }
}

impl Drop for BareQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equals_screendump_and_notices_the_end() {
    let mut qemu = BareQemu::start();
    let observer = Observer::connect(&qemu.dir.path().join("vnc"))
        .await
        .unwrap();
    // The text cursor blinks and the firmware still writes: equal at some moment is enough,
    // but with text on it, and after the change from QEMU's 640x480 notice to text mode.
    let equal = async {
        loop {
            let dump = qemu.screendump();
            let frame = observer.frame();
            let lit = frame.rgb.iter().filter(|b| **b > 0).count();
            if (frame.width, frame.height, &frame.rgb) == (dump.0, dump.1, &dump.2)
                && frame.width == 720
                && lit > 1000
            {
                break;
            }
            observer.changed(observer.version()).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(30), equal)
        .await
        .unwrap();
    assert!(observer.with_frame(|f| f.whole));
    observer.check().unwrap();
    drop(qemu);
    let end = async { while observer.changed(observer.version()).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(10), end)
        .await
        .unwrap();
    let error = observer.check().unwrap_err().to_string();
    assert!(error.contains("was lost"), "{error}");
}

#[tokio::test]
async fn says_where_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let Err(error) = Observer::connect(&dir.path().join("none")).await else {
        panic!()
    };
    assert!(error.to_string().contains("is the VM running"), "{error}");
}
