//! Brings a stale or replayed image to the source's state over a thin line.
//!
//! Guest RAM, disks and device state are arrays of 4 KiB pages; all are treated alike. Pure:
//! this crate knows no QEMU, no sockets and no async runtime. Every message is a plain value
//! with a bound on its size; whoever owns the wire frames them.
//!
//! ```text
//!  source                                              target
//!  ImageTree::build(image)                             ImageTree::build(replayed image)
//!  Offer::new(tree, base tree)
//!        ── Offer::encode, as BlobPart ──────────────►  Offer::decode, resolve
//!  offer.decode_answer  ◄── Resolution::answer, as BlobPart ──
//!  offer.seek ── Seek::encode, as BlobPart ──────────►  resolve_again, if much was not where
//!  offer.decode_answer  ◄── Resolution::answer ──       the twin has it
//!                                                       Applier::new (local copies)
//!  encode_pages ── PageChunk, PageChunk, ... ────────►  applier.push ...
//!                     ◄── Unpatched::encode ──          applier.retry, if a patch did not fit
//!  encode_pages (lines) ── PageChunk ... ────────────►  applier.push ...
//!                       ◄── PageSet::encode ──          applier.retry, if lines did not fit
//!  encode_pages (no twin) ── PageChunk ... ──────────►  applier.push ... finish -> Applied
//!                                                       applied.verify -> Verified
//!                                          or Mismatch: Descent::new
//!  NodeServer::answer  ◄── NodesRequest ──              descent.next_request
//!        ── NodesReply ──────────────────────────────►  descent.take ... into_differing
//!                       ◄── PageSet::encode ──          mismatch.repair
//!  encode_pages (neither) ── PageChunk ... ──────────►  repairer.push ... finish, verify
//! ```
//!
//! Promises: only an image whose root is the source's becomes a [`Verified`]; decoders neither
//! panic nor allocate beyond stated bounds, whatever they read; an exchange holds a few MiB,
//! the trees (32 bytes per page that is not zero), some 80 bytes for each page that travels and
//! what the compressors hold: at most 190 MiB for each stream where they write, 128 MiB where
//! they read. Not promised: any result if an image changes while it is read.

mod answer;
mod apply;
mod by_hash;
mod codec;
mod compress;
mod delta;
mod descend;
mod encode;
mod error;
mod file;
mod governor;
mod known;
mod lines;
mod live;
mod memory;
mod offer;
mod pace;
mod page;
mod page_set;
mod parity;
mod patch;
mod realign;
mod realign_landmarks;
mod rearrange;
mod relative;
mod resolve;
mod seek;
mod short;
mod spool;
mod stats;
mod stream;
mod tree;
mod tree_codec;
mod verify;
mod wire;

pub use apply::{Applier, ApplyOptions, Retry};
pub use codec::{Codec, Effort};
pub use delta::PageDelta;
pub use descend::{Descent, MAX_NODES, NodeServer, NodesReply, NodesRequest};
pub use encode::{Closed, EncodeOptions, EncodeStats, References, encode_pages, encode_pages_by};
pub use error::Error;
pub use file::FilePages;
pub use governor::Governor;
pub use known::Known;
pub use lines::Unpatched;
pub use live::{Captured, Incoming, Shadow};
pub use memory::{
    MAX_REPAIRS, Message, Options, Source, Stats, Times, reconcile_in_memory, reconcile_overlapped,
};
pub use offer::{Offer, OfferOptions};
pub use pace::Overlapped;
pub use page::{
    Image, MAX_PAGES, PAGE_SIZE, Page, PageHash, PageIndex, ReadPages, SlicePages, SlicePagesMut,
    WritePages, ZERO_PAGE, is_zero, pages_for,
};
pub use page_set::PageSet;
pub use realign::{Layout, Overlaid, Processes, Realigned, Space};
pub use rearrange::Rearrangement;
pub use resolve::{Holdings, Place, PlaceKind, Resolution, resolve, resolve_again};
pub use seek::Seek;
pub use short::{Salt, short_bits};
pub use stats::PageCounts;
pub use stream::{PageChunk, StreamId};
pub use tree::{FAN_OUT, ImageTree, Progress, Root, no_progress};
pub use verify::{Applied, Mismatch, Repairer, Verification, Verified};
pub use wire::{BlobAssembler, BlobPart, MAX_CHUNK, blob_parts};
