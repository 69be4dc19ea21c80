//! `replay-migrate vm`

use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::HumanDuration;
use serde_json::json;
use site::local::{self, NewVm, Takeover, VmState, VmStatus};
use site::{Lease, Store, VmDir};
use vm_host::{Accelerator, Hardware, programs};

use super::{peer_of, vm_of};
use crate::args::{AccelArg, CreateArgs, VmCommand};
use crate::output::{Output, bytes, table};

/// A guest that has said nothing for so long will not.
const READY_LIMIT: Duration = Duration::from_secs(600);

pub(crate) async fn run(store: &Store, command: VmCommand, output: &Output) -> anyhow::Result<()> {
    let name = async |name: &str| vm_of(store, name).await;
    match command {
        VmCommand::Create(args) => create(&name(&args.name).await?, &args, output).await,
        VmCommand::Start {
            name: vm,
            paused,
            wait,
            accel,
        } => {
            let vm = name(&vm).await?;
            // One that is restored does not say again what it said when it booted.
            let boots = local::will_boot(&vm)?;
            let qemu = local::start(&vm, accelerator(accel), paused).await?;
            if wait && boots && !paused {
                output.say("waiting for the desktop ...");
                local::wait_until_ready(&vm, &qemu, READY_LIMIT).await?;
            }
            // QEMU serves one at a time.
            drop(qemu);
            show(&vm, output).await
        }
        VmCommand::Stop { name: vm, discard } => {
            let vm = name(&vm).await?;
            vm.record()?;
            if discard {
                local::discard(&vm).await?;
            } else {
                local::suspend(&vm).await?;
            }
            show(&vm, output).await
        }
        VmCommand::Pause { name: vm } => {
            let vm = name(&vm).await?;
            local::pause(&vm).await?;
            show(&vm, output).await
        }
        VmCommand::Resume { name: vm } => {
            let vm = name(&vm).await?;
            site::source::settle(&vm).await?;
            local::resume(&vm).await?;
            show(&vm, output).await
        }
        VmCommand::List => {
            let mut all = Vec::new();
            for vm in store.vms()? {
                let vm = vm_of(store, vm.name().as_str()).await?;
                all.push(local::status(&vm).await?);
            }
            output.result(&all, |all| table(&all.iter().map(row).collect::<Vec<_>>()))
        }
        VmCommand::Status { name: vm } => show(&name(&vm).await?, output).await,
        VmCommand::Screenshot { name: vm, out } => {
            let vm = name(&vm).await?;
            let qemu = local::attach_running(&vm).await?;
            let image = qemu.screenshot().await?;
            image
                .save(&out)
                .with_context(|| format!("cannot write {}", out.display()))?;
            let (width, height) = image.dimensions();
            output.result(
                &json!({ "file": out, "width": width, "height": height }),
                |_| format!("{width} x {height} pixels in {}", out.display()),
            )
        }
        VmCommand::Takeover {
            name: vm,
            fence: _,
            by: Some(by),
            yes,
        } => {
            let vm = name(&vm).await?;
            let peer = peer_of(store, &by)?;
            if !yes {
                bail!(site::Error::Refused(format!(
                    "{} will be taken from {} though the site that has it by what is known here \
                     did not give it: should that one not be lost, there are two. Say --yes to do \
                     it",
                    vm.name(),
                    peer.name
                )));
            }
            local::believe(&vm, &peer)?;
            output.result(&json!({ "vm": vm.name(), "taken_by": peer.name }), |_| {
                format!(
                    "{} will be taken from {}; the stale copy here stays what it is until then",
                    vm.name(),
                    peer.name
                )
            })
        }
        VmCommand::Takeover {
            name: vm,
            fence,
            by: None,
            yes,
        } => {
            let vm = name(&vm).await?;
            // The command line asks for the one or the other.
            let fence = fence.context("a fencing number is needed")?;
            if !yes {
                let meant = describe(&local::takeover_of(&vm, fence)?);
                bail!(site::Error::Refused(format!("{meant}. Say --yes to do it")));
            }
            let taken = local::takeover(&vm, fence).await?;
            output.result(&taken, |taken| {
                let go_on = if taken.generation.is_some() {
                    "start"
                } else {
                    "resume"
                };
                format!(
                    "{}\n{1} is this site's now: `replay-migrate vm {go_on} {1}`",
                    describe(taken),
                    taken.vm,
                )
            })
        }
        VmCommand::Delete { name: vm, yes } => {
            let vm = name(&vm).await?;
            let record = vm.record()?;
            if !yes && !confirmed(&format!("Remove {} with all its generations?", record.name))? {
                bail!(site::Error::Refused(format!(
                    "{} was not removed",
                    record.name
                )));
            }
            local::delete(&vm).await?;
            output.result(&json!({ "deleted": record.name }), |_| {
                format!("{} is removed", record.name)
            })
        }
    }
}

async fn create(vm: &VmDir, args: &CreateArgs, output: &Output) -> anyhow::Result<()> {
    let mut new = if args.disk.is_dir() {
        if args.kernel.is_some() {
            bail!(site::Error::Refused(
                "a guest's folder says itself how it boots; leave --kernel out".into()
            ));
        }
        super::guest::from_folder(&args.disk)?
    } else {
        NewVm {
            disk: args.disk.clone(),
            boot: args.kernel.clone().map(|kernel| {
                (
                    kernel,
                    args.initrd.clone(),
                    args.append.clone().unwrap_or_default(),
                )
            }),
            hardware: Hardware::new(programs::default_machine(&programs::qemu())?),
            ready_marker: None,
            booted: None,
            replay_friendly: false,
        }
    };
    new.replay_friendly = args.replay_friendly;
    if let Some(memory) = args.memory {
        new.hardware.memory_mib = memory;
    }
    new.hardware.cpus = args.cpus;
    new.hardware.network = !args.no_network;
    new.hardware.icount = args.icount;
    if args.ready_marker.is_some() {
        new.ready_marker.clone_from(&args.ready_marker);
    }
    local::create_from(vm, &new).await?;
    show(vm, output).await
}

async fn show(vm: &VmDir, output: &Output) -> anyhow::Result<()> {
    let status = local::status(vm).await?;
    output.result(&status, |status| table(&[row(status)]))
}

fn row(status: &VmStatus) -> Vec<String> {
    let state = match (&status.state, &status.lease) {
        (VmState::Elsewhere, Lease::Elsewhere { owner_name, .. }) => format!("at {owner_name}"),
        (VmState::InDoubt, Lease::Offered { to_name, .. }) => format!("here or at {to_name}"),
        (VmState::Running, _) => match status.recording {
            Some(logging) if logging.paused => "running, recording paused".into(),
            Some(_) => "running, recorded".into(),
            None => "running".into(),
        },
        (VmState::Paused, _) => "paused".into(),
        _ => "stopped".into(),
    };
    let generation = status
        .generations
        .last()
        .map_or("none".into(), u64::to_string);
    let mut row = vec![
        status.record.name.to_string(),
        state,
        format!("{} MiB", status.record.hardware.memory_mib),
        format!("generation {generation}"),
    ];
    if status.arriving > 0 {
        row.push(format!("{} of its disk to come", bytes(status.arriving)));
    }
    row.extend(
        status
            .owed
            .as_ref()
            .map(|site| format!("disk owed to {site}")),
    );
    row
}

/// What taking a VM over means, for the person who decides.
fn describe(taken: &Takeover) -> String {
    let from = match (taken.generation, taken.age) {
        (Some(generation), Some(age)) => format!(
            "generation {generation}, which is {} old",
            HumanDuration(age)
        ),
        (Some(generation), None) => {
            format!("generation {generation}, which this host's clock says is yet to come")
        }
        (None, _) => "where it has stood still here since its hand-over was cut off".to_owned(),
    };
    format!(
        "{} goes on here from {from}, under number {} ({} is known here); what was done at {} \
         since then is lost, and the copy there is stale for ever",
        taken.vm, taken.fence, taken.fence_known, taken.from
    )
}

fn accelerator(arg: AccelArg) -> Accelerator {
    match arg {
        AccelArg::Auto => Accelerator::Auto,
        AccelArg::Kvm => Accelerator::Kvm,
        AccelArg::Tcg => Accelerator::Tcg,
    }
}

fn confirmed(question: &str) -> anyhow::Result<bool> {
    use std::io::{IsTerminal, Write};
    if !std::io::stdin().is_terminal() {
        return Err(site::Error::Refused(format!("{question} Say --yes.")).into());
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
