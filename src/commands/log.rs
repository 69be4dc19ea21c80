//! `replay-migrate log`

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use serde_json::json;
use site::{Store, VmDir, retention};
use traces::{GuestTime, Header, Log, Masking, Summary};

use super::vm_of;
use crate::args::{LogCommand, LogFile};
use crate::output::{Output, bytes, table};

pub(crate) async fn run(store: &Store, command: LogCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        LogCommand::List { name } => list(&vm_of(store, &name).await?, output),
        LogCommand::Show(file) => show(&vm_of(store, &file.name).await?, &file, output),
        LogCommand::Export { log, unmask } => {
            let vm = vm_of(store, &log.name).await?;
            let read = Log::read(&path_of(&vm, &log)?, &store.log_key()?)?;
            let masking = if unmask {
                Masking::Plain
            } else {
                Masking::Masked
            };
            let mut out = std::io::stdout().lock();
            traces::export_json_lines(&mut out, Some(&read.header), &read.records, masking)?;
            Ok(())
        }
        LogCommand::Prune {
            name,
            older_than,
            dry_run,
        } => prune(&vm_of(store, &name).await?, older_than, dry_run, output),
        LogCommand::Redact { log, from, to } => {
            redact(&vm_of(store, &log.name).await?, &log, from, to, output)
        }
    }
}

fn list(vm: &VmDir, output: &Output) -> anyhow::Result<()> {
    vm.record()?;
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for (generation, path) in vm.logs()? {
        let header = Header::read(&path)?;
        let length = std::fs::metadata(&path)
            .with_context(|| format!("cannot measure {}", path.display()))?
            .len();
        values.push(
            json!({ "generation": generation, "log": path, "bytes": length,
            "created": header.created }),
        );
        rows.push(vec![
            format!("generation {generation}"),
            bytes(length),
            path.display().to_string(),
        ]);
    }
    output.result(&values, |_| table(&rows))
}

fn show(vm: &VmDir, file: &LogFile, output: &Output) -> anyhow::Result<()> {
    let log = Log::read(&path_of(vm, file)?, &vm.store().log_key()?)?;
    let summary = Summary::of(&log.records, log.bytes);
    output.result(&summary, |summary| {
        let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
        let count = |what: &str, count: usize| vec![what.to_owned(), count.to_string()];
        table(&[
            vec!["duration".into(), seconds(summary.duration)],
            vec!["of it idle".into(), seconds(summary.idle)],
            count("interactions", summary.interactions),
            count("keys", summary.counts.keys),
            count("buttons", summary.counts.buttons),
            count("pointer moves", summary.counts.moves),
            count("wheel clicks", summary.counts.wheel),
            count("gaps", summary.counts.gaps),
            count("redacted", summary.counts.redacted),
            vec!["size".into(), bytes(summary.bytes)],
        ])
    })
}

fn prune(vm: &VmDir, older_than: Duration, dry_run: bool, output: &Output) -> anyhow::Result<()> {
    let gone = retention::prune_logs(vm, older_than, SystemTime::now(), dry_run)?;
    output.result(&gone, |gone| {
        let verb = if dry_run { "would go" } else { "gone" };
        if gone.is_empty() {
            return "no log is that old".to_owned();
        }
        let rows: Vec<_> = gone
            .iter()
            .map(|old| {
                let what = format!("{verb}: log of generation {}", old.generation);
                vec![what, bytes(old.bytes)]
            })
            .collect();
        table(&rows)
    })
}

fn redact(
    vm: &VmDir,
    file: &LogFile,
    from: Duration,
    to: Duration,
    output: &Output,
) -> anyhow::Result<()> {
    let (generation, path) = found(vm, file)?;
    let micros = |time: Duration| GuestTime {
        micros: time.as_micros() as u64,
    };
    let redaction = site::redaction::redact(vm, generation, micros(from)..micros(to))?;
    let result = json!({ "removed": redaction.removed, "kept": redaction.kept, "log": path });
    output.result(&result, |_| {
        format!(
            "{} records taken out, {} kept",
            redaction.removed, redaction.kept
        )
    })
}

fn path_of(vm: &VmDir, file: &LogFile) -> anyhow::Result<PathBuf> {
    Ok(found(vm, file)?.1)
}

/// The log that was asked for, or the newest, and its generation.
fn found(vm: &VmDir, file: &LogFile) -> anyhow::Result<(u64, PathBuf)> {
    vm.record()?;
    let logs = vm.logs()?;
    let found = match file.generation {
        Some(generation) => logs.into_iter().find(|(number, _)| *number == generation),
        None => logs.into_iter().next_back(),
    };
    Ok(found.ok_or_else(|| {
        site::Error::Refused(format!(
            "{0} has no such log; `replay-migrate log list {0}` shows those there are",
            vm.name()
        ))
    })?)
}
