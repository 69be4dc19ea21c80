//! What arrives besides images: logs and base files.

use reconciler::Rearrangement;
use traces::Record;

use crate::error::{Error, Result};
use crate::leftovers;
use crate::line::TargetLine;
use crate::local::blocking;
use crate::phase::Phase;
use crate::protocol::ToTarget;
use crate::store::Store;
use crate::vm::{BaseFile, VmRecord};

/// The most records a log segment may hold, and bytes before it is unpacked.
pub(super) const LOG_LIMITS: traces::Limits = traces::Limits {
    records: 8 << 20,
    bytes: 32 << 20,
};

/// Bytes of a log segment as sent.
const LOG_BYTES: u64 = 64 << 20;

/// Receives a piece of the log, whose parts travel as `Log` or as `Follow`.
pub(super) async fn receive_log(
    line: &mut TargetLine,
    first: reconciler::BlobPart,
    following: bool,
) -> Result<Vec<Record>> {
    let malformed = || Error::reconcile("the log sent is malformed");
    let mut assembler = reconciler::BlobAssembler::new(LOG_BYTES);
    let mut part = first;
    let bytes = loop {
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            break bytes;
        }
        part = match line.receive(Phase::Log).await? {
            ToTarget::Log(part) if !following => part,
            ToTarget::Follow { part, .. } if following => part,
            _ => return Err(line.unexpected(Phase::Log, "half a log")),
        };
    };
    traces::decode_records(&bytes, LOG_LIMITS).map_err(Error::log("the log sent is malformed"))
}

pub(super) async fn receive_layout(
    line: &mut TargetLine,
    first: reconciler::BlobPart,
    pages: u64,
) -> Result<reconciler::Layout> {
    let malformed = || Error::reconcile("the layout sent is malformed");
    let mut assembler = reconciler::BlobAssembler::new(reconciler::Layout::max_encoded_len(pages));
    let mut part = first;
    let bytes = loop {
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            break bytes;
        }
        part = match line.receive(Phase::Stop).await? {
            ToTarget::Layout(part) => part,
            _ => return Err(line.unexpected(Phase::Stop, "half a layout")),
        };
    };
    reconciler::Layout::decode(&bytes, pages).map_err(malformed())
}

pub(super) async fn receive_rearrangement(
    line: &mut TargetLine,
    first: reconciler::BlobPart,
) -> Result<Rearrangement> {
    let malformed = || Error::reconcile("what was sent of the device state is malformed");
    let mut assembler = reconciler::BlobAssembler::new(Rearrangement::MAX_ENCODED_LEN);
    let mut part = first;
    let bytes = loop {
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            break bytes;
        }
        part = match line.receive(Phase::Stop).await? {
            ToTarget::Rearrangement(part) => part,
            _ => return Err(line.unexpected(Phase::Stop, "half a rearrangement")),
        };
    };
    Rearrangement::decode(&bytes).map_err(malformed())
}

/// Receives a base file; it is kept only if its content has the announced hash.
pub(super) async fn receive_file(
    store: &Store,
    line: &mut TargetLine,
    vm: &VmRecord,
    file: BaseFile,
) -> Result<()> {
    use std::io::Write;
    if !vm.base_files().contains(&file) {
        return Err(line.unexpected(Phase::Base, "a file that the VM does not need"));
    }
    let images = store.root().join("images");
    let partial = leftovers::receiving(&images)?;
    let path = partial.path().join("file");
    let out = std::fs::File::create(&path).map_err(Error::file("create", &path))?;
    let mut out = zstd::stream::write::Decoder::new(SparseWriter::new(out, file.bytes))
        .map_err(Error::file("write", &path))?;
    loop {
        match line.receive(Phase::Base).await? {
            ToTarget::Data(chunk) => {
                out.write_all(&chunk).map_err(Error::file("write", &path))?;
            }
            ToTarget::DataEnd => break,
            _ => return Err(line.unexpected(Phase::Base, "half a file")),
        }
    }
    out.flush()
        .and_then(|()| out.into_inner().finish())
        .map_err(Error::file("write", &path))?;
    let store = store.clone();
    let kept = blocking(move || {
        let kept = store.adopt_announced(&path, file)?;
        drop(partial);
        Ok(kept)
    })
    .await?;
    if kept {
        Ok(())
    } else {
        Err(line.unexpected(Phase::Base, "a file with another content than announced"))
    }
}

/// Writes a file of a known length and leaves holes for zeros.
struct SparseWriter {
    file: std::fs::File,
    at: u64,
    length: u64,
}

impl SparseWriter {
    fn new(file: std::fs::File, length: u64) -> Self {
        Self {
            file,
            at: 0,
            length,
        }
    }

    fn finish(self) -> std::io::Result<()> {
        self.file.set_len(self.at)
    }
}

impl std::io::Write for SparseWriter {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        use std::os::unix::fs::FileExt;
        // Never more than was announced, however much a small stream unpacks to.
        if self.at + buf.len() as u64 > self.length {
            return Err(std::io::Error::other(
                "there is more of it than was announced",
            ));
        }
        let page = 4096 - (self.at % 4096) as usize;
        let count = page.min(buf.len());
        if buf[..count].iter().any(|byte| *byte != 0) {
            self.file.write_all_at(&buf[..count], self.at)?;
        }
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::FileHash;

    #[test]
    fn a_file_of_another_content_or_length_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let content = b"a kernel";
        let right = BaseFile {
            hash: FileHash(*blake3::hash(content).as_bytes()),
            bytes: content.len() as u64,
        };
        let file = dir.path().join("received");
        let other = FileHash([7; 32]);
        for wrong in [
            BaseFile {
                hash: other,
                ..right
            },
            BaseFile { bytes: 7, ..right },
        ] {
            std::fs::write(&file, content).unwrap();
            assert!(!store.adopt_announced(&file, wrong).unwrap());
            assert_eq!(store.base_file(wrong.hash), None);
        }
        assert!(store.adopt_announced(&file, right).unwrap());
        let kept = store.base_file(right.hash).unwrap();
        assert_eq!(std::fs::read(kept).unwrap(), content);
    }
}
