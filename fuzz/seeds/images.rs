//! A small VM's state, and what sites say of it.

use fuzz_seeds::DISK;
use reconciler::{
    Codec, EncodeOptions, ImageTree, Offer, OfferOptions, PAGE_SIZE, PageSet, References, Salt,
    SlicePages, blob_parts, encode_pages, no_progress,
};
use site::chain::Chain;
use site::generation::{ImageInfo, Manifest};
use site::identity::Identity;
use site::protocol::{Hello, ImageHead, ImageKind, Purpose, ToTarget};
use site::vm::{BaseFile, FileHash, Id, VmRecord};

use crate::{RAM, Result};

/// A small VM's state: a page of device state, a disk as its base, and RAM with some pages.
pub(crate) struct Images {
    pub(crate) device: Vec<u8>,
    pub(crate) disk: Vec<u8>,
    pub(crate) ram: Vec<u8>,
    pub(crate) record: VmRecord,
    /// Who has the VM.
    pub(crate) caller: Identity,
}

pub(crate) fn tree(bytes: &[u8]) -> Result<ImageTree> {
    Ok(ImageTree::build(&SlicePages(bytes), &no_progress)?)
}

impl Images {
    pub(crate) fn new() -> Result<Self> {
        let disk = vec![0; DISK];
        let mut ram = vec![0; RAM];
        for (page, byte) in [(3, 1), (4, 1), (500, 2), (8000, 3)] {
            ram[page * PAGE_SIZE..(page + 1) * PAGE_SIZE].fill(byte);
        }
        let mut hardware = vm_host::Hardware::new("pc-q35-7.2");
        hardware.memory_mib = 32;
        let record = VmRecord {
            id: Id([1; 16]),
            name: "desk".parse()?,
            hardware,
            disks: vec![BaseFile {
                hash: FileHash(*blake3::hash(&disk).as_bytes()),
                bytes: DISK as u64,
            }],
            boot: None,
            ready_marker: None,
            replay_friendly: false,
        };
        Ok(Self {
            device: vec![7; PAGE_SIZE],
            disk,
            ram,
            record,
            caller: fuzz_seeds::caller(tempfile::tempdir()?.path())?,
        })
    }

    pub(crate) fn each(&self) -> [(ImageKind, &[u8]); 3] {
        [
            (ImageKind::Device, &self.device),
            (ImageKind::Disk(0), &self.disk),
            (ImageKind::Ram, &self.ram),
        ]
    }

    pub(crate) fn manifest(&self, generation: u64) -> Result<Manifest> {
        let info = |bytes: &[u8]| -> Result<ImageInfo> {
            Ok(ImageInfo {
                bytes: bytes.len() as u64,
                root: tree(bytes)?.root(),
            })
        };
        let mut manifest = Manifest::new(
            self.record.id,
            generation,
            None,
            self.record.hardware.clone(),
            "7.2.0".into(),
            [info(&self.ram)?, info(&self.device)?],
            vec![info(&self.disk)?],
        );
        // The same in every run.
        manifest.created = 1_700_000_000;
        Ok(manifest)
    }

    pub(crate) fn hello(&self, purpose: Purpose) -> Hello {
        Hello {
            purpose,
            vm: self.record.clone(),
            transfer: Id([3; 16]),
            fence: 1,
            chain: self.chain(),
            generations: Vec::new(),
            next: 1,
            qemu: "7.2.0".into(),
            follows: false,
        }
    }

    /// The caller has had the VM since it was made.
    pub(crate) fn chain(&self) -> Chain {
        Chain::start(self.record.id, 1, &self.caller)
    }

    /// All images, as a source sends them to a target that has the disk alone.
    pub(crate) fn sent(&self) -> Result<Vec<ToTarget>> {
        let mut messages = Vec::new();
        let options = OfferOptions {
            salt: Salt([1; 32]),
            candidates: 1 << 14,
            force_bits: None,
            seek_from: OfferOptions::SEEK_FROM,
        };
        for (kind, bytes) in self.each() {
            messages.push(ToTarget::Image(ImageHead {
                kind,
                bytes: bytes.len() as u64,
            }));
            let base = base_of(kind, bytes)?;
            let offer = Offer::new(&tree(bytes)?, &base, &options)?.encode()?;
            messages.extend(blob_parts(&offer).map(ToTarget::Offer));
        }
        for (kind, bytes) in self.each() {
            let base = base_of(kind, bytes)?;
            messages.extend(pages_of(bytes, &tree(bytes)?.differing(&base))?);
        }
        Ok(messages)
    }
}

/// What a target has of an image that has only the disks: zeros, and no device state at all.
pub(crate) fn base_of(kind: ImageKind, image: &[u8]) -> Result<ImageTree> {
    let pages = match kind {
        ImageKind::Device => 0,
        ImageKind::Disk(_) | ImageKind::Ram => image.len() / PAGE_SIZE,
    };
    Ok(ImageTree::zero(pages as u64)?)
}

/// These pages as they are.
pub(crate) fn pages_of(image: &[u8], pages: &PageSet) -> Result<Vec<ToTarget>> {
    let pages: Vec<_> = pages.iter().collect();
    let options = EncodeOptions {
        codec: Codec::for_line(1 << 40),
        workers: 0,
    };
    let mut messages = Vec::new();
    let mut sink = |chunk| {
        messages.push(ToTarget::Pages(chunk));
        Ok(())
    };
    let against = References::default();
    encode_pages(&SlicePages(image), against, &pages, options, &mut sink)?;
    messages.push(ToTarget::PagesEnd);
    Ok(messages)
}
