//! Peers that are tools of the system: rsync, zstd and xdelta3, each with the base on the
//! receiving side, and each with its own way back, whose result is compared.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::Interrupt;
use crate::capture::{Capture, Image, copy_part, gives};
use crate::rows::{Row, Way};

/// zstd takes patches of less than 2 GiB, old and new together: larger images go in pieces.
const PIECE: usize = 768 << 20;

/// A tool that is to be run. Interrupted, it is killed.
struct Tool {
    name: &'static str,
    /// Which Debian package brings it.
    package: &'static str,
}

const RSYNC: Tool = Tool {
    name: "rsync",
    package: "rsync",
};
const ZSTD: Tool = Tool {
    name: "zstd",
    package: "zstd",
};
const XDELTA3: Tool = Tool {
    name: "xdelta3",
    package: "xdelta3",
};

/// A tool that is not there.
#[derive(Debug, thiserror::Error)]
#[error("not installed; install the Debian package {package}, or run scripts/setup --peers")]
pub(crate) struct NotInstalled {
    package: &'static str,
}

impl Tool {
    fn command(&self) -> Command {
        let mut command = Command::new(self.name);
        command
            .stdin(Stdio::null())
            .kill_on_drop(true)
            // Its numbers are read.
            .env("LC_ALL", "C")
            .env_remove("XDELTA");
        command
    }

    fn explain(&self, error: io::Error) -> anyhow::Error {
        match error.kind() {
            io::ErrorKind::NotFound => NotInstalled {
                package: self.package,
            }
            .into(),
            _ => anyhow::Error::new(error).context(format!("cannot start {}", self.name)),
        }
    }

    /// Runs it to its end, which must be a good one.
    async fn run(
        &self,
        interrupt: &Interrupt,
        arguments: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Output> {
        let mut command = self.command();
        arguments(&mut command);
        let output = interrupt.guard(command.output()).await?;
        let output = output.map_err(|error| self.explain(error))?;
        ensure!(
            output.status.success(),
            "{} failed ({}): {}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output)
    }

    /// Runs it and compares what it writes to standard output.
    async fn gives(
        &self,
        interrupt: &Interrupt,
        arguments: impl FnOnce(&mut Command),
        expected: &[u8],
    ) -> anyhow::Result<()> {
        let mut command = self.command();
        arguments(&mut command);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|error| self.explain(error))?;
        let mut out = child.stdout.take().context("a pipe is missing")?;
        let compare = async {
            let mut buffer = vec![0; 1 << 20];
            let mut left = expected;
            loop {
                let length = out.read(&mut buffer).await?;
                match left.split_at_checked(length) {
                    _ if length == 0 => return io::Result::Ok(left.is_empty()),
                    Some((now, rest)) if now == &buffer[..length] => left = rest,
                    _ => return Ok(false),
                }
            }
        };
        let same = interrupt.guard(compare).await?;
        let same = same.with_context(|| format!("cannot read what {} writes", self.name))?;
        ensure!(
            same,
            "what {} makes of its own bytes is not the source's image",
            self.name
        );
        let status = interrupt.guard(child.wait()).await??;
        ensure!(
            status.success(),
            "{} failed on its own bytes ({status})",
            self.name
        );
        Ok(())
    }

    /// Its name with its version.
    async fn version(&self, interrupt: &Interrupt, option: &str) -> anyhow::Result<String> {
        let said = self.run(interrupt, |tool| {
            tool.arg(option);
        });
        let said = said.await?;
        // xdelta3 says it on standard error.
        let text = [said.stdout, said.stderr].concat();
        let version = version_in(&String::from_utf8_lossy(&text));
        Ok(format!("{} {version}", self.name))
    }
}

/// The first word that is a version.
fn version_in(text: &str) -> String {
    text.split(|c: char| c.is_whitespace() || c == ',')
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
        .unwrap_or("of an unknown version")
        .to_owned()
}

/// rsync with compression, every image; `pages` makes its blocks pages instead of what it takes
/// itself, which grows with the image.
pub(crate) async fn rsync(
    capture: &Capture,
    pages: bool,
    scratch: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Row>> {
    let version = RSYNC.version(interrupt, "--version").await?;
    let way = if pages { Way::RsyncPages } else { Way::Rsync };
    let mut rows = Vec::new();
    for image in &capture.images {
        let (base, source) = (capture.path("base", image), capture.path("source", image));
        let out = scratch.join(&image.file);
        let began = Instant::now();
        let output = RSYNC.run(interrupt, |rsync| {
            rsync.args([
                "-z",
                "--no-whole-file",
                "--ignore-times",
                "--sparse",
                "--stats",
            ]);
            rsync.args(pages.then_some("--block-size=4096"));
            // The old image is what the new one is told against; it is not written to.
            let old = base.parent().unwrap_or(Path::new("."));
            let mut option = std::ffi::OsString::from("--compare-dest=");
            option.push(old);
            rsync.arg(option).arg(&source).arg(&out);
        });
        let output = output.await?;
        let seconds = began.elapsed().as_secs_f64();
        let bytes = sent_and_received(&String::from_utf8_lossy(&output.stdout))?;
        let (expected, path) = (capture.map("source", image)?, out.clone());
        let compared = tokio::task::spawn_blocking(move || {
            std::fs::File::open(&path).and_then(|file| gives(file, &expected))
        });
        let same = interrupt.guard(compared).await??;
        let same = same.with_context(|| format!("cannot read {}", out.display()))?;
        ensure!(same, "what rsync made is not the source's image");
        remove(&out)?;
        let mut row = capture.row(way, &image.name, bytes, seconds);
        row.note.clone_from(&version);
        rows.push(row);
    }
    Ok(rows)
}

/// What went over rsync's pipe both ways, from `--stats`.
fn sent_and_received(stats: &str) -> anyhow::Result<u64> {
    let field = |name: &str| -> anyhow::Result<u64> {
        let value = stats
            .lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))
            .with_context(|| format!("rsync's statistics have no {name:?}"))?;
        let digits: String = value.chars().filter(|c| !matches!(c, ',' | ' ')).collect();
        digits
            .parse()
            .with_context(|| format!("rsync's {name:?} is {value:?}"))
    };
    Ok(field("Total bytes sent")? + field("Total bytes received")?)
}

/// `zstd --patch-from`, every image.
pub(crate) async fn zstd_patch(
    capture: &Capture,
    scratch: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Row>> {
    let version = ZSTD.version(interrupt, "--version").await?;
    let mut rows = Vec::new();
    for image in &capture.images {
        let source = capture.map("source", image)?;
        let (mut bytes, mut seconds) = (0, 0.0);
        let pieces: Vec<&[u8]> = source.chunks(PIECE).collect();
        for (index, expected) in pieces.iter().enumerate() {
            let (old, new) = match pieces.len() {
                1 => (capture.path("base", image), capture.path("source", image)),
                _ => pieces_of(capture, image, index, scratch, interrupt).await?,
            };
            let patch = scratch.join("patch.zst");
            let mut option = std::ffi::OsString::from("--patch-from=");
            option.push(&old);
            let began = Instant::now();
            let packing = ZSTD.run(interrupt, |zstd| {
                zstd.args(["-3", "--long=31", "--force", "--quiet"]);
                zstd.arg(&option).arg(&new).arg("-o").arg(&patch);
            });
            packing.await?;
            seconds += began.elapsed().as_secs_f64();
            bytes += length(&patch)?;
            let unpacking = |zstd: &mut Command| {
                zstd.args(["-d", "-c", "--long=31", "--quiet"]);
                zstd.arg(&option).arg(&patch);
            };
            ZSTD.gives(interrupt, unpacking, expected).await?;
            remove(&patch)?;
            if pieces.len() > 1 {
                remove(&old)?;
                remove(&new)?;
            }
        }
        let mut row = capture.row(Way::ZstdPatch, &image.name, bytes, seconds);
        row.note = format!("{version}, -3 --long=31");
        if pieces.len() > 1 {
            row.note += &format!(
                "; in pieces of {} MiB, as it takes less than 2 GiB",
                PIECE >> 20
            );
        }
        rows.push(row);
    }
    Ok(rows)
}

/// The same piece of an image's old and new state, as files.
async fn pieces_of(
    capture: &Capture,
    image: &Image,
    index: usize,
    scratch: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<(PathBuf, PathBuf)> {
    let paths = ["base", "source"].map(|state| scratch.join(format!("{state}.piece")));
    for (state, path) in ["base", "source"].into_iter().zip(&paths) {
        let (whole, path) = (capture.map(state, image)?, path.clone());
        let copied = tokio::task::spawn_blocking(move || {
            let from = (index * PIECE).min(whole.len());
            copy_part(&whole[from..(from + PIECE).min(whole.len())], &path)
        });
        interrupt.guard(copied).await???;
    }
    Ok(paths.into())
}

/// `xdelta3`, every image.
pub(crate) async fn xdelta3(
    capture: &Capture,
    scratch: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Row>> {
    let version = XDELTA3.version(interrupt, "-V").await?;
    let mut rows = Vec::new();
    for image in &capture.images {
        let (base, source) = (capture.path("base", image), capture.path("source", image));
        // All of the old image is in reach, as far as it can be.
        let window = length(&base)?.clamp(1 << 19, 1 << 30).to_string();
        let patch = scratch.join("patch.xdelta");
        let began = Instant::now();
        let packing = XDELTA3.run(interrupt, |xdelta3| {
            // Without the second compressor that may be missing, and without names of files.
            xdelta3.args(["-e", "-f", "-q", "-A", "-S", "lzma", "-B", &window, "-s"]);
            xdelta3.arg(&base).arg(&source).arg(&patch);
        });
        packing.await?;
        let seconds = began.elapsed().as_secs_f64();
        let bytes = length(&patch)?;
        let unpacking = |xdelta3: &mut Command| {
            xdelta3.args(["-d", "-c", "-q", "-B", &window, "-s"]);
            xdelta3.arg(&base).arg(&patch);
        };
        let expected = capture.map("source", image)?;
        XDELTA3.gives(interrupt, unpacking, &expected).await?;
        remove(&patch)?;
        let mut row = capture.row(Way::Xdelta3, &image.name, bytes, seconds);
        row.note = format!("{version}, -S lzma, with up to 1 GiB of the old image in reach");
        rows.push(row);
    }
    Ok(rows)
}

fn length(path: &Path) -> anyhow::Result<u64> {
    let there = path.metadata();
    Ok(there
        .with_context(|| format!("cannot find {}", path.display()))?
        .len())
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            bail!("cannot remove {}: {error}", path.display())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::tests::small;

    #[test]
    fn statistics_are_read() {
        let stats = "Number of files: 1 (reg: 1)\nTotal file size: 8,388,608 bytes\n\
            Total bytes sent: 208,655\nTotal bytes received: 17418\n\n\
            sent 208,655 bytes  received 17,418 bytes  452,146.00 bytes/sec\n";
        assert_eq!(sent_and_received(stats).unwrap(), 226_073);
        assert!(sent_and_received("Total bytes sent: 5\n").is_err());
        assert!(sent_and_received("Total bytes sent: 5\nTotal bytes received: 1.2K").is_err());
    }

    #[test]
    fn versions_are_found() {
        assert_eq!(
            version_in("rsync  version 3.5.0  protocol version 32\n"),
            "3.5.0"
        );
        assert_eq!(
            version_in("*** Zstandard CLI (64-bit) v1.5.4, by Y"),
            "1.5.4"
        );
        assert_eq!(
            version_in("Xdelta version 3.0.11, Copyright (C) 2007"),
            "3.0.11"
        );
        assert_eq!(version_in("none"), "of an unknown version");
    }

    #[tokio::test]
    async fn a_tool_that_is_not_there_is_named() {
        let tool = Tool {
            name: "no-such-tool-at-all",
            package: "its-package",
        };
        let error = tool.run(&Interrupt::never(), |_| {}).await.unwrap_err();
        assert!(error.is::<NotInstalled>());
        assert!(error.to_string().contains("its-package"), "{error}");
    }

    #[tokio::test]
    async fn what_comes_back_is_compared() {
        let tool = Tool {
            name: "printf",
            package: "coreutils",
        };
        let never = Interrupt::never();
        let say = |tool: &mut Command| {
            tool.arg("hello");
        };
        tool.gives(&never, say, b"hello").await.unwrap();
        for other in [&b"hellO"[..], b"hell", b"hello!", b""] {
            assert!(tool.gives(&never, say, other).await.is_err(), "{other:?}");
        }
    }

    /// With the tools that are installed; the others must say so.
    #[tokio::test]
    async fn tools_send_less_than_everything() {
        let (dir, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (capture, never) = (small(dir.path()), Interrupt::never());
        let scratch = scratch.path();
        for outcome in [
            rsync(&capture, false, scratch, &never).await,
            rsync(&capture, true, scratch, &never).await,
            zstd_patch(&capture, scratch, &never).await,
            xdelta3(&capture, scratch, &never).await,
        ] {
            let rows = match outcome {
                Err(error) if error.is::<NotInstalled>() => continue,
                rows => rows.unwrap(),
            };
            assert_eq!(rows.len(), 3);
            for row in &rows {
                let bytes = row.bytes.unwrap();
                let whole = 64 << 12;
                assert!(bytes > 0 && bytes < whole && row.checked, "{row:?}");
            }
            let ram = rows.iter().find(|row| row.images == "ram").unwrap();
            // Two pages are new, and noise.
            assert!(ram.bytes.unwrap() > 8192, "{ram:?}");
        }
        let left = std::fs::read_dir(scratch).unwrap().count();
        assert_eq!(left, 0);
    }
}
