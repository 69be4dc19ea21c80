//! The cases of the matrix: a fault, where it strikes, and when.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($(#[$each:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub(crate) enum $name {
            $($(#[$each])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// All of them, in order.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),+];

            /// As files and tables have it.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

names! {
    /// A phase of a migration, named as the command's progress names it.
    Phase {
        Hello = "hello",
        Plan = "plan",
        Base = "base",
        Log = "log",
        Replay = "replay",
        Stop = "stop",
        Device = "device",
        Disk = "disk",
        Ram = "ram",
        Verify = "verify",
        Commit = "commit",
        /// Not a phase: the target's lease says that the VM is its own, and the source has not
        /// heard of it, as the line is longer than that.
        Taken = "taken",
        Resume = "resume",
    }
}

names! {
    /// Which side of the migration is struck. Bytes of the line are damaged on their way to it.
    Side {
        Source = "source",
        Target = "target",
    }
}

names! {
    /// What goes wrong.
    Fault {
        /// SIGKILL of the `migrate` command, or of the target's agent.
        Process = "process",
        /// SIGKILL of the VM's QEMU.
        Qemu = "qemu",
        /// SIGKILL of the QEMU that replays: the target's, or the source's own beside it.
        Replay = "replaying-qemu",
        /// All connections are reset, and new ones too, for some seconds.
        Cut = "cut",
        /// Nothing gets through for a while, and neither end is told.
        Stall = "stall",
        /// One bit of what arrives changes.
        Damage = "damage",
        /// The file system with the VM's files has no room left, from then on.
        Full = "disk-full",
        /// No file can be made durable, from then on.
        Sync = "fsync-error",
    }
}

/// The way of the migration that is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// After a recording; the target lacks its generation and replays.
    Replay,
    /// Against the stale copy.
    Base,
}

/// One fault at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) phase: Phase,
    pub(crate) side: Side,
    pub(crate) fault: Fault,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.phase, self.side, self.fault)
    }
}

impl Case {
    /// All cases that apply: those of a kind of guest together, as a fresh one takes a while.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for &fault in Fault::ALL {
            for &phase in Phase::ALL {
                for &side in Side::ALL {
                    let case = Self { phase, side, fault };
                    if case.left_out().is_none() {
                        all.push(case);
                    }
                }
            }
        }
        // A desktop that had its QEMU killed boots: those come last.
        all.sort_by_key(|case| (case.way(), case.loses_the_run(), case.fault, case.phase));
        all
    }

    /// Why a combination is none.
    pub(crate) const fn left_out(self) -> Option<&'static str> {
        use Phase::{Commit, Hello, Log, Ram, Replay, Resume, Stop, Taken};
        let phase = self.phase;
        match (self.fault, self.side) {
            (Fault::Qemu, Side::Target) if !matches!(phase, Resume) => {
                Some("the VM has no QEMU at the target before")
            }
            (Fault::Replay, _) if matches!(phase, Log) => Some("it begins with the replay"),
            (Fault::Replay, _) if !matches!(phase, Replay | Stop) => Some("nobody replays then"),
            (Fault::Cut | Fault::Stall, Side::Source) => {
                Some("a line has two ends: both are struck, and counted as the target's")
            }
            (Fault::Sync, Side::Source) if !matches!(phase, Hello | Commit | Taken | Resume) => {
                Some("the source makes nothing durable before Commit: the case there is the same")
            }
            (Fault::Full, Side::Source)
                if !matches!(phase, Hello | Replay | Stop | Ram | Commit | Taken | Resume) =>
            {
                Some("the source writes nothing between this phase and the next that is a case")
            }
            _ => None,
        }
    }

    /// Only a move by replay has all phases; only one by base is quick.
    pub(crate) const fn way(self) -> Way {
        match (self.phase, self.fault) {
            (Phase::Base | Phase::Log | Phase::Replay, _) | (_, Fault::Replay) => Way::Replay,
            _ => Way::Base,
        }
    }

    /// Whether the guest's RAM dies with the fault, as with a power cut: while it runs, nothing
    /// else holds it.
    pub(crate) const fn loses_the_run(self) -> bool {
        matches!((self.fault, self.side), (Fault::Qemu, Side::Source))
    }

    /// Whether the target had the VM and lost only its agent: it runs there as soon as there is
    /// an agent again, without a command.
    pub(crate) const fn goes_on_by_itself(self) -> bool {
        matches!(
            (self.fault, self.side, self.phase),
            (Fault::Process, Side::Target, Phase::Taken | Phase::Resume)
        )
    }

    /// Whether the source replays as well.
    pub(crate) const fn has_twin(self) -> bool {
        matches!(
            (self.fault, self.side, self.phase),
            (Fault::Replay, Side::Source, _) | (Fault::Process, Side::Source, Phase::Replay)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn there_are_a_hundred_and_each_is_one() {
        let all = Case::all();
        assert!(all.len() >= 100, "{}", all.len());
        let names: BTreeSet<_> = all.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all.len());
        for &phase in Phase::ALL {
            for &side in Side::ALL {
                let here = |case: &&Case| case.phase == phase && case.side == side;
                assert!(all.iter().filter(here).count() >= 3, "{phase} {side}");
            }
        }
    }

    #[test]
    fn what_boots_comes_last_of_its_kind() {
        let all = Case::all();
        for way in [Way::Replay, Way::Base] {
            let of_it: Vec<_> = all.iter().filter(|case| case.way() == way).collect();
            let first = of_it.iter().position(|case| case.loses_the_run()).unwrap();
            assert!(of_it[first..].iter().all(|case| case.loses_the_run()));
        }
    }
}
