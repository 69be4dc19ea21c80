//! Whose turn it is for what: whether a message may come now, by what the conversation is for
//! and what came before it.
//!
//! A question changes nothing; images are built while nobody else writes to them, and are not
//! touched again once they are verified; and after a commit there is nothing to say. The table is
//! in `docs/protocol.md`, section "The target's states".

use crate::protocol::{Purpose, ToTarget};
use crate::report::Strategy;

/// What of a conversation decides what may come next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn<'a> {
    /// What the conversation is for.
    pub purpose: &'a Purpose,
    /// It was said that the VM is to be followed.
    pub follows: bool,
    /// The VM is this conversation's to change.
    pub locked: bool,
    /// How it will be done, once that was said.
    pub strategy: Option<Strategy>,
    /// There is a working copy.
    pub work: bool,
    /// All images were received and verified.
    pub received: bool,
    /// What was received is being brought on, by rounds.
    pub rounds: bool,
    /// There is a fork that replays.
    pub fork: bool,
    /// That fork follows the source.
    pub following: bool,
    /// The VM is this site's.
    pub committed: bool,
}

impl Turn<'_> {
    /// Whether the message has a place here.
    pub(super) fn allows(&self, message: &ToTarget) -> bool {
        let migrates = *self.purpose == Purpose::Migrate;
        // A copy that is left for later is brought near by a replay as well.
        let seeds = *self.purpose == Purpose::Seed;
        let after_replay = match self.strategy {
            Some(Strategy::Replay) => migrates || seeds,
            Some(Strategy::Live) => migrates,
            _ => false,
        };
        let replays = self.work && !self.received && !self.rounds && after_replay;
        match message {
            ToTarget::Probe(_) => true,
            _ if !self.locked || self.committed => false,
            ToTarget::Generation { .. } | ToTarget::Prepare | ToTarget::File(_) => !self.fork,
            ToTarget::Later { .. } | ToTarget::Blocks(_) | ToTarget::Rest { .. } => {
                migrates && !self.work && !self.fork
            }
            ToTarget::Image(_) | ToTarget::Layout(_) | ToTarget::Rearrangement(_) => {
                !self.fork && self.work && !self.received
            }
            ToTarget::Log(_) => replays,
            ToTarget::Follow { .. } => replays && migrates && self.follows,
            ToTarget::Rounds => {
                let live = self.strategy == Some(Strategy::Live);
                migrates && live && self.received && !self.rounds
            }
            ToTarget::Changed { .. } | ToTarget::RoundEnd => {
                migrates && self.rounds && !self.received && !self.fork
            }
            ToTarget::Freeze => (migrates || seeds) && !self.received,
            ToTarget::Plan(_) => migrates || seeds,
            ToTarget::CatchUp { .. } | ToTarget::Leave => self.following,
            ToTarget::Commit(_) => migrates && self.received,
            ToTarget::Publish => self.received,
            // Parts of what was announced before: they never begin anything.
            ToTarget::Hello(_)
            | ToTarget::Data(_)
            | ToTarget::DataEnd
            | ToTarget::Offer(_)
            | ToTarget::Seek(_)
            | ToTarget::Pages(_)
            | ToTarget::PagesEnd
            | ToTarget::Nodes(_)
            | ToTarget::Resume { .. }
            // Said to hubs.
            | ToTarget::Deposit { .. }
            | ToTarget::Parcel { .. }
            | ToTarget::Collect(_)
            | ToTarget::Fetch { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, proptest};
    use reconciler::{BlobPart, NodesReply, PageChunk, StreamId};

    use super::*;
    use crate::chain::Chain;
    use crate::generation::{ImageInfo, Manifest};
    use crate::identity::Identity;
    use crate::protocol::{Blocks, CommitRequest, Hello, ImageHead, ImageKind, Plan};
    use crate::vm::{BaseFile, FileHash, Id};

    fn manifest() -> Manifest {
        let image = ImageInfo {
            bytes: 4096,
            root: reconciler::Root([0; 32]),
        };
        let hardware = vm_host::Hardware::new("pc-q35-7.2");
        Manifest::new(
            Id([1; 16]),
            1,
            None,
            hardware,
            "7.2.0".into(),
            [image, image],
            vec![image],
        )
    }

    /// One message of each kind, by name.
    fn messages() -> Vec<(&'static str, ToTarget)> {
        let part = || BlobPart {
            bytes: Vec::new(),
            last: true,
        };
        let file = BaseFile {
            hash: FileHash([2; 32]),
            bytes: 4096,
        };
        vec![
            (
                "Hello",
                ToTarget::Hello(Box::new(Hello::example(Purpose::Migrate))),
            ),
            ("Probe", ToTarget::Probe(Vec::new())),
            (
                "Plan",
                ToTarget::Plan(Plan {
                    strategy: Strategy::Replay,
                    base: None,
                    quick: false,
                }),
            ),
            ("File", ToTarget::File(file)),
            (
                "Generation",
                ToTarget::Generation {
                    manifest: Box::new(manifest()),
                    base: None,
                },
            ),
            ("Data", ToTarget::Data(Vec::new())),
            ("DataEnd", ToTarget::DataEnd),
            ("Publish", ToTarget::Publish),
            ("Prepare", ToTarget::Prepare),
            ("Log", ToTarget::Log(part())),
            (
                "Follow",
                ToTarget::Follow {
                    part: part(),
                    at: 0,
                },
            ),
            ("CatchUp", ToTarget::CatchUp { at: 0 }),
            ("Leave", ToTarget::Leave),
            ("Freeze", ToTarget::Freeze),
            ("Layout", ToTarget::Layout(part())),
            ("Rearrangement", ToTarget::Rearrangement(part())),
            (
                "Image",
                ToTarget::Image(ImageHead {
                    kind: ImageKind::Device,
                    bytes: 4096,
                }),
            ),
            ("Offer", ToTarget::Offer(part())),
            ("Seek", ToTarget::Seek(part())),
            (
                "Pages",
                ToTarget::Pages(PageChunk {
                    stream: StreamId::Kinds,
                    bytes: Vec::new(),
                }),
            ),
            ("PagesEnd", ToTarget::PagesEnd),
            (
                "Nodes",
                ToTarget::Nodes(NodesReply {
                    children: Vec::new(),
                }),
            ),
            (
                "Commit",
                ToTarget::Commit(Box::new(CommitRequest {
                    manifest: manifest(),
                    fence: 2,
                    link: Chain::start(Id([1; 16]), 1, &Identity::ephemeral().unwrap()).links()[0],
                })),
            ),
            ("Resume", ToTarget::Resume { paused: false }),
            ("Rounds", ToTarget::Rounds),
            (
                "Changed",
                ToTarget::Changed {
                    kind: ImageKind::Ram,
                    part: part(),
                },
            ),
            ("RoundEnd", ToTarget::RoundEnd),
            ("Later", ToTarget::Later { disk: 0 }),
            (
                "Blocks",
                ToTarget::Blocks(Blocks {
                    disk: 0,
                    runs: Vec::new(),
                    bytes: Vec::new(),
                }),
            ),
            ("Rest", ToTarget::Rest { disk: 0 }),
        ]
    }

    fn allowed(turn: &Turn<'_>) -> Vec<&'static str> {
        let all = messages();
        let allowed = all.iter().filter(|(_, message)| turn.allows(message));
        allowed.map(|(name, _)| *name).collect()
    }

    fn begun(purpose: &Purpose) -> Turn<'_> {
        Turn {
            purpose,
            follows: true,
            locked: true,
            strategy: None,
            work: false,
            received: false,
            rounds: false,
            fork: false,
            following: false,
            committed: false,
        }
    }

    #[test]
    fn a_migration_takes_each_message_in_its_turn() {
        let purpose = Purpose::Migrate;
        let begun = begun(&purpose);
        let base = ["Probe", "Plan", "File", "Generation", "Prepare", "Freeze"];
        let later = ["Later", "Blocks", "Rest"];
        assert_eq!(allowed(&begun), [&base[..], &later].concat());
        let planned = Turn {
            strategy: Some(Strategy::Replay),
            work: true,
            ..begun
        };
        assert_eq!(
            allowed(&planned),
            [
                "Probe",
                "Plan",
                "File",
                "Generation",
                "Prepare",
                "Log",
                "Follow",
                "Freeze",
                "Layout",
                "Rearrangement",
                "Image"
            ]
        );
        let replaying = Turn {
            fork: true,
            ..planned
        };
        assert_eq!(
            allowed(&replaying),
            ["Probe", "Plan", "Log", "Follow", "Freeze"]
        );
        let following = Turn {
            following: true,
            ..replaying
        };
        assert_eq!(
            allowed(&following),
            [
                "Probe", "Plan", "Log", "Follow", "CatchUp", "Leave", "Freeze"
            ]
        );
        let received = Turn {
            received: true,
            ..planned
        };
        assert_eq!(
            allowed(&received),
            [
                "Probe",
                "Plan",
                "File",
                "Generation",
                "Publish",
                "Prepare",
                "Commit"
            ]
        );
    }

    #[test]
    fn rounds_bring_on_what_was_received_once() {
        let purpose = Purpose::Migrate;
        let received = Turn {
            strategy: Some(Strategy::Live),
            work: true,
            received: true,
            ..begun(&purpose)
        };
        assert!(allowed(&received).contains(&"Rounds"));
        let rounds = Turn {
            received: false,
            rounds: true,
            ..received
        };
        let now = allowed(&rounds);
        for name in ["Changed", "RoundEnd", "Image", "Freeze"] {
            assert!(now.contains(&name), "{name}");
        }
        for name in ["Rounds", "Commit", "Log", "Follow"] {
            assert!(!now.contains(&name), "{name}");
        }
        let verified = Turn {
            received: true,
            ..rounds
        };
        let now = allowed(&verified);
        assert!(now.contains(&"Commit"));
        assert!(!now.contains(&"Rounds") && !now.contains(&"Changed"));
    }

    #[test]
    fn a_vm_is_followed_only_if_that_was_said_at_first() {
        let purpose = Purpose::Migrate;
        let unsaid = Turn {
            strategy: Some(Strategy::Replay),
            work: true,
            follows: false,
            ..begun(&purpose)
        };
        assert!(!allowed(&unsaid).contains(&"Follow"));
        assert!(allowed(&unsaid).contains(&"Log"));
    }

    #[test]
    fn a_seed_may_be_played_and_is_never_followed_nor_committed() {
        let purpose = Purpose::Seed;
        let work = Turn {
            strategy: Some(Strategy::Replay),
            work: true,
            ..begun(&purpose)
        };
        let now = allowed(&work);
        assert!(now.contains(&"Log") && now.contains(&"Freeze"));
        assert!(!now.contains(&"Follow") && !now.contains(&"Rounds"));
        let live = Turn {
            strategy: Some(Strategy::Live),
            ..work
        };
        assert!(!allowed(&live).contains(&"Log"));
        let received = Turn {
            strategy: Some(Strategy::Replay),
            work: true,
            received: true,
            ..begun(&purpose)
        };
        assert_eq!(
            allowed(&received),
            ["Probe", "Plan", "File", "Generation", "Publish", "Prepare"]
        );
    }

    #[test]
    fn who_only_asks_changes_nothing_and_after_a_commit_there_is_nothing_to_say() {
        for purpose in [Purpose::Estimate, Purpose::Settle(Id([3; 16]))] {
            let asking = Turn {
                locked: false,
                ..begun(&purpose)
            };
            assert_eq!(allowed(&asking), ["Probe"]);
        }
        let purpose = Purpose::Migrate;
        let committed = Turn {
            committed: true,
            work: true,
            received: true,
            ..begun(&purpose)
        };
        assert_eq!(allowed(&committed), ["Probe"]);
    }

    proptest! {
        /// Whatever came before: an image is never touched while a fork runs on it or once it is
        /// verified, and nothing is committed or published that was not verified.
        #[test]
        fn nothing_is_taken_that_was_not_verified(flags in any::<[bool; 7]>(), seed in any::<bool>()) {
            let purpose = if seed { Purpose::Seed } else { Purpose::Migrate };
            let [locked, work, received, rounds, fork, following, committed] = flags;
            let turn = Turn {
                purpose: &purpose,
                follows: true,
                locked,
                strategy: Some(Strategy::Replay),
                work,
                received,
                rounds,
                fork,
                following,
                committed,
            };
            for name in allowed(&turn) {
                match name {
                    "Probe" => {}
                    _ if !locked || committed => prop_assert!(false, "{name}"),
                    "Commit" | "Publish" => prop_assert!(received, "{name}"),
                    "Image" => prop_assert!(work && !received && !fork, "{name}"),
                    "Changed" | "RoundEnd" => {
                        prop_assert!(rounds && !received && !fork && !seed, "{name}");
                    }
                    "Log" => prop_assert!(work && !received && !rounds, "{name}"),
                    "Later" | "Blocks" | "Rest" => {
                        prop_assert!(!seed && !work && !fork, "{name}");
                    }
                    "Follow" => {
                        prop_assert!(work && !received && !rounds && !seed, "{name}");
                    }
                    _ => {}
                }
            }
        }
    }
}
