//! Bare machines (SeaBIOS and an empty disk) for tests with the real QEMU.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;
use vm_host::{Accelerator, Hardware, Launch, Network, Vm, programs};

/// A directory for a machine, and its launch.
pub struct Bare {
    pub dir: TempDir,
    pub launch: Launch,
}

impl Bare {
    pub fn new(name: &str) -> Self {
        // Under /tmp and not TMPDIR: unix sockets need short paths.
        let dir = tempfile::Builder::new()
            .prefix("vmh")
            .tempdir_in("/tmp")
            .unwrap();
        let disk = dir.path().join("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "16M"]);
        let mut hardware = Hardware::new(programs::default_machine(&programs::qemu()).unwrap());
        hardware.memory_mib = 64;
        let launch = Launch {
            name: name.into(),
            hardware,
            boot: None,
            accelerator: Accelerator::Tcg,
            runtime_dir: dir.path().join("run"),
            ram: dir.path().join("ram"),
            disks: vec![disk],
            arriving: Vec::new(),
            network: Network::Connected,
            incoming: false,
        };
        Self { dir, launch }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Bare {
    /// No QEMU outlives its test, even one that fails.
    fn drop(&mut self) {
        let record = std::fs::read_to_string(self.launch.runtime_dir.join("vm.json"));
        // It may be outside the directory.
        let _ = std::fs::remove_file(&self.launch.ram);
        let Ok(record) = record else { return };
        let pid = record
            .split("\"pid\": ")
            .nth(1)
            .and_then(|r| r.split([',', '\n']).next());
        if let Some(pid) = pid {
            let _ = Command::new("kill")
                .args(["-9", pid.trim()])
                .stderr(Stdio::null())
                .status();
        }
    }
}

pub fn qemu_img(args: &[&str]) -> String {
    let output = Command::new(programs::qemu_img())
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Sends a command of the test's own on the clock's socket.
pub fn qmp(vm: &Vm, command: &str) -> String {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(vm.clock_qmp_socket()).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = || {
        let line = lines.next().unwrap().unwrap();
        if line.contains("\"event\"") {
            lines.next().unwrap().unwrap()
        } else {
            line
        }
    };
    next();
    let mut answer = String::new();
    for command in [r#"{"execute":"qmp_capabilities"}"#, command] {
        writeln!(stream, "{command}").unwrap();
        answer = next();
        assert!(answer.contains("return"), "{answer}");
    }
    answer
}

/// Writes to a disk as its guest would.
pub fn guest_writes(vm: &Vm, disk: usize, pattern: u8, offset: &str, length: &str) {
    let command = format!(
        r#"{{"execute":"human-monitor-command","arguments":{{"command-line":
        "qemu-io -d /machine/peripheral/disk{disk}/virtio-backend \"write -P {pattern} {offset} {length}\""}}}}"#
    );
    let answer = qmp(vm, &command.replace('\n', " "));
    assert!(!answer.contains("rror"), "{answer}");
}
