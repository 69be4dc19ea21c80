//! What is done with a VM at its site, and with its generations.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};

use super::values::size;

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM
    Create(CreateArgs),
    /// Start a VM: from its newest generation, or by booting it
    Start {
        /// The VM
        name: String,
        /// Restore it, but do not let it run yet
        #[arg(long)]
        paused: bool,
        /// Wait until its desktop is up, if it boots
        #[arg(long)]
        wait: bool,
        /// How QEMU runs the guest
        #[arg(long, value_enum, default_value_t = AccelArg::Auto)]
        accel: AccelArg,
    },
    /// Stop a VM: a checkpoint, then QEMU quits
    Stop {
        /// The VM
        name: String,
        /// No checkpoint: what the guest did since its last generation is lost
        #[arg(long)]
        discard: bool,
    },
    /// Pause the guest
    Pause {
        /// The VM
        name: String,
    },
    /// Let a paused guest run
    Resume {
        /// The VM
        name: String,
    },
    /// All VMs of this site
    List,
    /// What a VM is and does
    Status {
        /// The VM
        name: String,
    },
    /// Save what the guest's screen shows
    Screenshot {
        /// The VM
        name: String,
        /// PNG file
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Go on with the stale copy here, because the site that has the VM is gone for good. What was
    /// done there since is lost; should it come back, its copy is stale for ever
    Takeover {
        /// The VM
        name: String,
        /// The fencing number under which it goes on: at least 1000 beyond the one known here,
        /// which `vm status` shows, so that the lost site can have none as high
        #[arg(long, value_name = "N", required_unless_present = "by")]
        fence: Option<u64>,
        /// Not here: this trusted site took it over, and is believed when it offers the VM
        #[arg(long, value_name = "SITE", conflicts_with = "fence")]
        by: Option<String>,
        /// Do it: without this, it is only said what it would mean
        #[arg(long)]
        yes: bool,
    },
    /// Remove a VM with its generations and logs
    Delete {
        /// The VM
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum GenerationsCommand {
    /// Size, age, who relies on each, and what `prune` would make of it
    List {
        /// The VM
        name: String,
    },
    /// Take those that nobody relies on, the logs that only they were good for, and what was
    /// left half-made. The newest stays, and what the VM runs on, what its newest log continues,
    /// and what trusted sites have in common with this one
    Prune {
        /// The VM
        name: String,
        /// Keep so many of the newest, too
        #[arg(long, value_name = "N", default_value_t = 1,
              value_parser = clap::value_parser!(u32).range(1..))]
        keep: u32,
        /// Take no more, the oldest first, than until they fit: 500M, 20G [default: all that may
        /// go]
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max_bytes: Option<u64>,
        /// Say what would go, and stop
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CreateArgs {
    /// The VM
    pub(crate) name: String,
    /// A bootable disk image, or the folder of a guest from `guest build`
    #[arg(long, value_name = "IMG")]
    pub(crate) disk: PathBuf,
    /// Boot this Linux kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// With this initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// And this command line
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(crate) append: Option<String>,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u8,
    /// No network card
    #[arg(long)]
    pub(crate) no_network: bool,
    /// Take chance out of a Linux guest that boots a kernel: no address-space randomisation for
    /// its programs, kernel objects in order once it is recorded (defences less), freed memory
    /// zeroed, no times of last access to files
    #[arg(long)]
    pub(crate) replay_friendly: bool,
    /// Let the guest's clock count its instructions, 2^N ns each, so that a replay does the same things at the same time; always
    /// under software emulation, for the VM's whole life
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true,
          default_missing_value = "1")]
    pub(crate) icount: Option<u8>,
    /// The line on the guest's serial port that says that its desktop is up
    #[arg(long, value_name = "TEXT")]
    pub(crate) ready_marker: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AccelArg {
    /// KVM where it works, else software emulation
    Auto,
    /// KVM
    Kvm,
    /// Software emulation
    Tcg,
}
