//! `replay-migrate vm`

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;
use site::local::{self, NewVm, VmState, VmStatus};
use site::{Lease, Store, VmDir};
use vm_host::{Accelerator, Hardware, programs};

use super::vm_of;
use crate::args::{AccelArg, CreateArgs, VmCommand};
use crate::output::{Output, table};

/// A guest that has said nothing for so long will not.
const READY_LIMIT: Duration = Duration::from_secs(600);

pub(crate) async fn run(store: &Store, command: VmCommand, output: &Output) -> anyhow::Result<()> {
    let name = |name: &str| vm_of(store, name);
    match command {
        VmCommand::Create(args) => create(&name(&args.name)?, &args, output).await,
        VmCommand::Start {
            name: vm,
            paused,
            wait,
            accel,
        } => {
            let vm = name(&vm)?;
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
            let vm = name(&vm)?;
            vm.record()?;
            if discard {
                local::discard(&vm).await?;
            } else {
                local::suspend(&vm).await?;
            }
            show(&vm, output).await
        }
        VmCommand::Pause { name: vm } => {
            let vm = name(&vm)?;
            local::pause(&vm).await?;
            show(&vm, output).await
        }
        VmCommand::Resume { name: vm } => {
            let vm = name(&vm)?;
            site::source::settle(&vm).await?;
            local::resume(&vm).await?;
            show(&vm, output).await
        }
        VmCommand::List => {
            let mut all = Vec::new();
            for vm in store.vms()? {
                all.push(local::status(&vm).await?);
            }
            output.result(&all, |all| table(&all.iter().map(row).collect::<Vec<_>>()))
        }
        VmCommand::Status { name: vm } => show(&name(&vm)?, output).await,
        VmCommand::Screenshot { name: vm, out } => {
            let vm = name(&vm)?;
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
        VmCommand::Delete { name: vm, yes } => {
            let vm = name(&vm)?;
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
        (VmState::Running, _) => "running".into(),
        (VmState::Paused, _) => "paused".into(),
        _ => "stopped".into(),
    };
    let generation = status
        .generations
        .last()
        .map_or("none".into(), u64::to_string);
    vec![
        status.record.name.to_string(),
        state,
        format!("{} MiB", status.record.hardware.memory_mib),
        format!("generation {generation}"),
    ]
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
