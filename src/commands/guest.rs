//! `replay-migrate guest`

use std::path::{Path, PathBuf};

use guest::{BuildOptions, GuestImage, Progress};
use serde_json::json;
use site::booted;
use site::local::NewVm;
use vm_host::{Hardware, programs};

use crate::args::GuestCommand;
use crate::output::Output;

pub(crate) async fn run(command: GuestCommand, output: &Output) -> anyhow::Result<()> {
    let GuestCommand::Build {
        out,
        no_boot,
        replay_friendly,
        icount,
    } = command;
    let options = BuildOptions {
        out,
        cache: guest::default_cache()?,
    };
    let image = tokio::task::block_in_place(|| {
        guest::build(&options, |progress| match progress {
            Progress::Cached => output.say("the guest was built before"),
            Progress::Waiting => output.say("another process builds the guest; waiting for it"),
            Progress::Step(step) => output.say(step),
            Progress::Copying => output.say("copying"),
            _ => {}
        })
    })?;
    let state = if no_boot {
        None
    } else {
        let mut new = new_vm(&image)?;
        new.replay_friendly = replay_friendly;
        new.hardware.icount = icount;
        Some(booted::ensure(&booted_cache()?, &new, &|text| output.say(text)).await?)
    };
    let result = json!({ "dir": image.dir, "disk": image.disk, "booted": state });
    output.result(&result, |_| image.dir.display().to_string())
}

/// What a VM from this guest's folder is.
pub(crate) fn from_folder(dir: &Path) -> anyhow::Result<NewVm> {
    new_vm(&GuestImage::load(dir)?)
}

fn new_vm(image: &GuestImage) -> anyhow::Result<NewVm> {
    Ok(NewVm {
        disk: image.disk.clone(),
        boot: Some((
            image.kernel.clone(),
            Some(image.initrd.clone()),
            image.append.clone(),
        )),
        hardware: Hardware {
            memory_mib: image.memory_mib,
            screen_width: image.screen.width,
            screen_height: image.screen.height,
            ..Hardware::new(programs::default_machine(&programs::qemu())?)
        },
        ready_marker: Some(image.ready_marker.clone()),
        booted: Some(booted_cache()?),
        replay_friendly: false,
    })
}

fn booted_cache() -> anyhow::Result<PathBuf> {
    let guests = guest::default_cache()?;
    Ok(guests.with_file_name("booted"))
}
