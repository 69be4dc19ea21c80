//! What two sites say to each other.
//!
//! ```text
//! source                                              target
//!   | -- Hello (VM, purpose, generations) -------------> |  checks what would fail later
//!   | <------------- Welcome (generations, lacks) | Refused
//!   | -- Probe --------------------------------------->  |  a few KiB, to time the line
//!   | <---------------------------------------- Probed   |
//!   | -- Plan (strategy, base generation) ------------>  |
//!   | -- File, Data.., DataEnd ----------------------->  |  Base: base files it lacks
//!   | -- Later, Data.., DataEnd ---------------------->  |  Base, with post-copy: the hashes of a disk
//!   | <---------------------------------------- Lacks..  |  image, of which only the pages come that
//!   | -- Blocks.. ------------------------------------>  |  the guest has in its memory
//!   | <------------------------------------------ Took   |
//!   | -- Rest ---------------------------------------->  |  no more of it for now
//!   | <---------------------------------------- Lacks..  |
//!   | -- Generation, <images>, Publish --------------->  |  Base: the generation, if it lacks it
//!   | <--------------------------------------- Published |
//!   | -- Prepare ------------------------------------->  |  a working copy of the generation
//!   | -- Log.. --------------------------------------->  |  Log: restores a fork, replays
//!   | <----------------------- Replaying.., Replayed     |  Replay; again with the tail of the log
//!   | -- <images> ------------------------------------>  |  Rounds, where they are asked for:
//!   | -- Rounds --------------------------------------->  |  the images as copied while the VM
//!   | -- Changed.., Pages.., PagesEnd ---------------->  |  runs, then what changed of them
//!   | -- RoundEnd ------------------------------------>  |  since, again and again
//!   | <---------------------------------------- Rounded  |  roots of what it has now
//!   | -- Freeze -------------------------------------->  |  Stop: both sides stand still
//!   | -- Changed.., Pages.., PagesEnd ---------------->  |  after rounds: what changed last
//!   | -- Layout.., Rearrangement.. ------------------>  |  after a replay with a twin
//!   | -- <images> ------------------------------------>  |  Device, Disk, Ram
//!   | -- Commit (manifest) --------------------------->  |  durable, lease held there
//!   | <--------------------------------------- Committed |
//!   | -- Resume -------------------------------------->  |
//!   | <----------------------------------------- Resumed |
//!
//! Where the target follows, pieces of the log come long before Log, while the user works:
//!   | -- Follow.. ------------------------------------>  |  replayed as they come; empty now and
//!   | <------------------------------------- Following   |  then, to show that the line lives
//!   | -- CatchUp ------------------------------------->  |  the user moves: nothing else comes
//!   | <--------------------------------------- Replayed  |  before Freeze
//!   | -- Leave --------------------------------------->  |  or the user stays where they are
//!
//! After a migration with post-copy, over a line of its own that begins with Hello, the rest of the disk images:
//!   | -- Rest ---------------------------------------->  |  for each
//!   | <---------------------------------------- Lacks..  |
//!   | -- Blocks.. ------------------------------------>  |
//!   | <------------------------------------ Took, Want   |  and what the guest waits for, which comes next
//!   | <------------------------------------------ Here   |  all of one has come and is verified
//!
//! With a hub, which holds for others what it can't read ([`hub`]):
//!   | -- Deposit ------------------------------------->  |  what is there, and for which key to seal
//!   | <----------------------------------------- Shelf   |
//!   | -- Parcel, Data.., DataEnd --------------------->  |
//!   | <------------------------------------------ Held   |
//! and from the standby to the hub:
//!   | -- Collect ------------------------------------->  |  what the standby has
//!   | <--------------------------------------- Parcels   |
//!   | -- Fetch --------------------------------------->  |
//!   | <----------------------- Content.., ContentEnd     |
//!
//! <images>, for each image:
//!   | -- Image (which, size), Offer.. ---------------->  |  all images at once, before any answer
//!   | <---------------------------------------- Lacks..  |  one image after the other from here
//!   | -- Seek.. -------------------------------------->  |  where much is not at the address where
//!   | <---------------------------------------- Lacks..  |  the twin has it: answered once more
//!   | -- Pages.., PagesEnd --------------------------->  |
//!   | <-------------------------------------- Unpatched..  |  patches that do not fit, and what is
//!   | -- Pages.., PagesEnd --------------------------->  |  there: sent line by line
//!   | <------------------------------------------ Whole..  |  lines that do not fit: sent whole
//!   | -- Pages.., PagesEnd --------------------------->  |
//!   | <---------------------- Verified (root) | Differs   |
//!   | -- Nodes --------------------------------------->  |  only after Differs: descends the tree
//!   | <---------------------------------------- Refetch..  |  then the pages that are wrong
//!   | -- Pages.., PagesEnd --------------------------->  |  once more, and verified again
//! ```
//!
//! Every message is one frame. Messages that may exceed a frame travel as [`BlobPart`]s. The
//! target holds nothing but a working folder until Commit: a connection that ends earlier, in
//! whatever way, leaves it as it was. But for one: a replay that follows the source outlives its
//! line for some minutes, and a `Hello` of the same transfer goes on with it. Asking about a hand-over that was cut off at its last step
//! is a connection of its own: `Hello` with [`Purpose::Settle`], answered by `Settled`.
//!
//! **Versions.** The transport's preamble carries [`crate::transport`]'s version; this file
//! belongs to it. Messages are postcard, so any change of a type here is a new version.

use reconciler::{BlobPart, NodesReply, NodesRequest, PageChunk, Root};
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, Link};
use crate::generation::{GenerationId, Manifest};
use crate::hub;
use crate::identity::SiteKey;
use crate::phase::Phase;
use crate::report::{ReplaySummary, StandbyCost, Strategy};
use crate::vm::{BaseFile, FileHash, Id, VmName, VmRecord};

/// From the source of a VM, or from who calls at a hub.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToTarget {
    /// First message.
    Hello(Box<Hello>),
    /// Timing of the line.
    Probe(#[serde(with = "serde_bytes")] Vec<u8>),
    /// How it will be done.
    Plan(Plan),
    /// A base file follows, as `Data`.
    File(BaseFile),
    /// The images of a generation follow, as they differ from an older one.
    Generation {
        /// The generation.
        manifest: Box<Manifest>,
        /// The common generation that the images rest on; none: the base files alone.
        base: Option<u64>,
    },
    /// Part of a base file, in zstd.
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// There is no more of it.
    DataEnd,
    /// All images of the generation were sent and verified: keep it.
    Publish,
    /// Base is over: make a working copy of the generation that the plan names.
    Prepare,
    /// Part of a log segment: [`traces::encode_records`].
    Log(BlobPart),
    /// Part of a log segment that was recorded just now, to be replayed while more is recorded.
    Follow {
        /// The part.
        part: BlobPart,
        /// The recorded time now, in microseconds: nothing from before it is still to come.
        at: u64,
    },
    /// The source stands still, or soon will: the replay that follows is to reach this recorded
    /// time. Answered by `Replayed` when it has.
    CatchUp {
        /// In microseconds.
        at: u64,
    },
    /// The target need not follow any longer.
    Leave,
    /// No more replay; the source stands still.
    Freeze,
    /// Part of [`reconciler::Layout::encode`]: how the guest's processes lie in the RAM that
    /// follows, so that a replayed one can be brought into the same layout.
    Layout(BlobPart),
    /// Part of [`reconciler::Rearrangement::encode`]: how to put the device state that follows
    /// together from a replayed one.
    Rearrangement(BlobPart),
    /// An image, and what is different in it.
    Image(ImageHead),
    /// Part of [`reconciler`]'s offer.
    Offer(BlobPart),
    /// Part of [`reconciler::Seek::encode`]: what should have been there, and may lie elsewhere.
    Seek(BlobPart),
    /// Pages that the target lacks.
    Pages(PageChunk),
    /// There are no more of them.
    PagesEnd,
    /// The answer to `Differs`.
    Nodes(NodesReply),
    /// The images are one generation; take the VM over.
    Commit(Box<CommitRequest>),
    /// Go on.
    Resume {
        /// Not yet: leave it paused.
        paused: bool,
    },
    /// The images that were sent are what RAM and disks are brought on from: the VM still runs.
    Rounds,
    /// These pages of an image have changed, and follow as they are now or as the difference to
    /// what the target has of them, in this order.
    Changed {
        /// Of which image.
        kind: ImageKind,
        /// Part of [`reconciler::PageSet::encode`].
        part: BlobPart,
    },
    /// A round is over. Answered by `Rounded`.
    RoundEnd,
    /// A disk image is to come in pieces, most of it after the VM: the hashes of its pages follow, as `Data`
    /// ([`reconciler::ImageTree::encode`]). Answered by `Lacks`.
    Later {
        /// Of which disk.
        disk: u8,
    },
    /// Pages of a disk image.
    Blocks(Blocks),
    /// What is lacking of a disk image is to be said: in a migration no more comes of it before the VM has moved;
    /// afterwards it comes now. Answered by `Lacks`.
    Rest {
        /// Of which disk.
        disk: u8,
    },
    /// First message, to a hub: there may be a parcel to hold. Answered by `Shelf`.
    Deposit {
        /// Of which VM.
        vm: Id,
        /// For which site.
        to: SiteKey,
    },
    /// A parcel follows, as `Data`: its body is sealed. Answered by `Held`.
    Parcel {
        /// What it is.
        head: Box<hub::Head>,
        /// Its body's length.
        bytes: u64,
        /// What the caller has laid there of that VM for that site goes, once this is whole.
        replaces: bool,
    },
    /// First message, to a hub: what there is for the caller. Answered by `Parcels`.
    Collect(Box<hub::Collect>),
    /// Send this parcel. Answered by `Content`.
    Fetch(hub::ParcelName),
}

/// From the target of a VM, or from a hub.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToSource {
    /// The answer to `Hello`, unless refused.
    Welcome(Box<Welcome>),
    /// Not possible; nothing was changed.
    Refused(String),
    /// The answer to `Probe`, and to `Follow` when it has arrived.
    Probed,
    /// The generation is kept.
    Published,
    /// The replay goes on.
    Replaying {
        /// Recorded time replayed so far, in milliseconds.
        done: u64,
        /// Recorded time in all, in milliseconds.
        total: u64,
    },
    /// This segment of the log is replayed.
    Replayed(ReplaySummary),
    /// How far the replay is that follows: said for each piece once it is played.
    Following {
        /// Records that arrived whole.
        records: u64,
        /// The recorded time up to which the log was replayed, in microseconds.
        at: u64,
        /// Interactions so far that the screen did not match.
        missed: u64,
        /// What that costs so far, if it can be measured there.
        cost: Option<StandbyCost>,
    },
    /// Part of [`reconciler`]'s answer to an offer: what is lacking. Or of what is lacking of a disk image:
    /// [`reconciler::PageSet::encode`].
    Lacks(BlobPart),
    /// The image is the source's.
    Verified(ImageOutcome),
    /// It is not; these parts of the tree are asked for.
    Differs(NodesRequest),
    /// These pages were told as patches that do not fit what is here: part of
    /// [`reconciler::Unpatched::encode`]. What differs in them is to be sent.
    Unpatched(BlobPart),
    /// That did not make these pages right either: part of [`reconciler::PageSet::encode`].
    /// They are to be sent whole.
    Whole(BlobPart),
    /// These pages are: part of [`reconciler::PageSet::encode`]. They are to be sent again.
    Refetch(BlobPart),
    /// The VM is this site's now.
    Committed,
    /// It runs, or stands paused as asked.
    Resumed,
    /// The answer to [`Purpose::Settle`].
    Settled {
        /// Whether the hand-over took place.
        taken: bool,
    },
    /// Something went wrong; the connection ends and the target is clean.
    Failed {
        /// During which phase.
        phase: Phase,
        /// What.
        reason: String,
    },
    /// The round is applied.
    Rounded {
        /// The root of RAM, as it is now.
        ram: Root,
        /// Those of the disks.
        disks: Vec<Root>,
    },
    /// The answer to `Hello` where the VM belongs to the target, under a higher number than the
    /// one that was said: the caller's copy is of the past.
    Superseded {
        /// The target's fencing number.
        fence: u64,
        /// How it came to it.
        chain: Chain,
    },
    /// `Blocks` are taken.
    Took,
    /// The guest waits for these pages of a disk image.
    Want {
        /// Of which disk.
        disk: u8,
        /// The first.
        first: u64,
        /// How many.
        count: u32,
    },
    /// A disk image is here, whole and verified.
    Here {
        /// Of which disk.
        disk: u8,
    },
    /// The answer to `Deposit`.
    Shelf(Box<hub::Shelf>),
    /// The parcel is kept.
    Held,
    /// The answer to `Collect`: of each VM and maker the parcel that the caller can use and gains most by.
    Parcels(Vec<hub::Head>),
    /// Part of a parcel's body.
    Content(#[serde(with = "serde_bytes")] Vec<u8>),
    /// There is no more of it.
    ContentEnd,
}

/// Pages of a disk image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Of which disk.
    pub disk: u8,
    /// Runs of pages: the first of each, and how many.
    pub runs: Vec<(u64, u32)>,
    /// The pages, one behind the other, in zstd.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

impl Blocks {
    /// No more pages than these come at a time.
    pub const PAGES: u64 = 256;
}

/// Who wants what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// What for.
    pub purpose: Purpose,
    /// The VM.
    pub vm: VmRecord,
    /// Names this attempt.
    pub transfer: Id,
    /// The source's fencing number.
    pub fence: u64,
    /// How the VM came to it, from where the target may know it on. Empty where it is only asked
    /// whether a hand-over took place.
    pub chain: Chain,
    /// The generations that the source has, oldest first.
    pub generations: Vec<GenerationId>,
    /// The number that the new generation will have.
    pub next: u64,
    /// The source's QEMU.
    pub qemu: String,
    /// The VM is in use: `Follow` will come.
    pub follows: bool,
}

impl Hello {
    /// A site keeps fewer generations of a VM than this.
    pub const GENERATIONS: usize = 4096;

    /// Fencing numbers and those of generations stay below, so that counting on never overflows.
    pub const NUMBERS: u64 = 1 << 48;

    /// No QEMU says of its version in more bytes.
    pub const QEMU: usize = 256;
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Move the VM.
    Migrate,
    /// Leave a copy of its newest generation.
    Seed,
    /// Only ask what a migration would cost.
    Estimate,
    /// Ask whether this transfer was committed; if it was not, it never will be.
    Settle(Id),
    /// Bring the rest of the disk images of a VM that was moved with post-copy.
    Supply,
}

/// What the target has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// Its generations of this VM that the source has too, oldest first.
    pub common: Vec<GenerationId>,
    /// Base files that it lacks.
    pub lacks: Vec<FileHash>,
    /// Its QEMU.
    pub qemu: String,
    /// Records that its replay of this transfer has; none, where there is no such replay that
    /// follows.
    pub standby: Option<u64>,
    /// What it has of an earlier attempt at this transfer.
    pub kept: Option<Kept>,
}

/// What a target has of an attempt to move a VM whose line was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// How it was to be done.
    pub plan: Plan,
    /// How far it came.
    pub stage: Stage,
}

/// How far an attempt came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// There is a working copy of the base.
    Prepared,
    /// A replay goes on from it.
    Replaying {
        /// Records of the log that it has.
        records: u64,
    },
    /// The replay is over, or images have begun to come: what is there is nobody's base any more,
    /// but like the source's state in most pages.
    Frozen,
}

/// How it will be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The strategy.
    pub strategy: Strategy,
    /// The generation that both sites have once Base is over.
    pub base: Option<GenerationId>,
    /// The replay does not wait out the time in which the user thought.
    pub quick: bool,
}

/// An image of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageHead {
    /// Which.
    pub kind: ImageKind,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Which image of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageKind {
    /// The device state.
    Device,
    /// A disk, by its number.
    Disk(u8),
    /// Guest RAM.
    Ram,
}

impl ImageKind {
    /// The phase in which it is reconciled.
    pub fn phase(self) -> Phase {
        match self {
            Self::Device => Phase::Device,
            Self::Disk(_) => Phase::Disk,
            Self::Ram => Phase::Ram,
        }
    }
}

/// How an image came about at the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOutcome {
    /// The root of what the target holds, computed from its content.
    pub root: Root,
    /// Pages by recipe.
    pub pages: Vec<(String, u64)>,
    /// Pages that were wrong at first.
    pub refetched: u64,
}

/// What makes the images a generation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CommitRequest {
    /// The new generation.
    pub manifest: Manifest,
    /// The new fencing number.
    pub fence: u64,
    /// The source's signature that the VM is the target's under that number.
    pub link: Link,
}

/// What the receiving side checks before it believes anything in a `Hello`.
#[cfg(test)]
impl Hello {
    /// What a site says first that has nothing of [`VmRecord::example`] but its disk.
    pub(crate) fn example(purpose: Purpose) -> Self {
        Self {
            purpose,
            vm: VmRecord::example(),
            transfer: Id([3; 16]),
            fence: 1,
            chain: Chain::default(),
            generations: Vec::new(),
            next: 1,
            qemu: "7.2.0".into(),
            follows: false,
        }
    }
}

impl Hello {
    /// Bounds and consistency.
    pub fn validate(&self) -> crate::error::Result<()> {
        self.vm.validate()?;
        if self.qemu.len() > Self::QEMU || self.qemu.chars().any(char::is_control) {
            return Err(crate::Error::Refused(
                "the QEMU of the other site has a version that no QEMU has".into(),
            ));
        }
        let numbers = self.generations.iter().map(|id| id.number);
        if self.generations.len() > Self::GENERATIONS
            || self.next == 0
            || self.fence >= Self::NUMBERS
            || numbers.chain([self.next]).max() >= Some(Self::NUMBERS)
        {
            return Err(crate::Error::Refused(format!(
                "{} has more generations or hand-overs than are possible",
                self.vm.name
            )));
        }
        Ok(())
    }

    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.vm.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            generations: vec![GenerationId {
                number: 1,
                digest: [0; 32],
            }],
            next: 2,
            ..Hello::example(Purpose::Migrate)
        }
    }

    #[test]
    fn numbers_that_could_overflow_are_refused() {
        hello().validate().unwrap();
        let mut bad = hello();
        bad.fence = u64::MAX;
        assert!(bad.validate().is_err());
        let mut bad = hello();
        bad.generations[0].number = u64::MAX;
        assert!(bad.validate().is_err());
        let mut bad = hello();
        bad.next = Hello::NUMBERS;
        assert!(bad.validate().is_err());
    }

    #[test]
    fn a_version_that_would_drive_the_terminal_is_refused() {
        for qemu in ["7.2\u{1b}[2J".to_owned(), "7".repeat(Hello::QEMU + 1)] {
            let bad = Hello { qemu, ..hello() };
            assert!(bad.validate().is_err());
        }
    }
}
