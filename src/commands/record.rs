//! `replay-migrate record`

use std::time::Duration;

use site::recording::{self, Ended, RecordOptions};
use site::{VmDir, source};

use super::serve::stop_signal;
use crate::output::{Output, bytes};

pub(crate) async fn run(
    vm: &VmDir,
    options: &RecordOptions,
    output: &Output,
) -> anyhow::Result<()> {
    source::settle(vm).await?;
    let mut shown = Ok(());
    let begun = |recording: &recording::Recording| {
        shown = output.result(recording, |recording| {
            format!(
                "recording on top of generation {}; VNC viewers connect to {}",
                recording.generation, recording.listening
            )
        });
    };
    let recorded = recording::record(vm, options, begun, stop_signal()).await?;
    shown?;
    output.result(&recorded, |recorded| {
        let why = match recorded.ended {
            Ended::Stopped => "stopped",
            Ended::Moved => "the VM has moved",
            Ended::VmEnded => "the VM has ended",
        };
        format!(
            "{why}; {} records in {} of log",
            recorded.records,
            bytes(recorded.log_bytes)
        )
    })
}

/// Has the recorder that runs pause, or go on.
pub(crate) async fn set_paused(vm: &VmDir, paused: bool, output: &Output) -> anyhow::Result<()> {
    vm.record()?;
    let logging = recording::set_paused(vm, paused).await?;
    output.result(&logging, |logging| {
        let at = Duration::from_micros(logging.at).as_secs_f64();
        if logging.paused {
            format!(
                "paused after {at:.1} s: nothing that is typed gets into the log before \
                 `replay-migrate record {} --resume`",
                vm.name()
            )
        } else {
            format!("recording goes on after {at:.1} s")
        }
    })
}
