//! `replay-migrate generations`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::HumanDuration;
use site::Store;
use site::generations::{Fate, Kind, Limits, Listed, Pruned, Reliance, list, prune};

use super::vm_of;
use crate::args::GenerationsCommand;
use crate::output::{Output, bytes, table};

pub(crate) async fn run(
    store: &Store,
    command: GenerationsCommand,
    output: &Output,
) -> anyhow::Result<()> {
    match command {
        GenerationsCommand::List { name } => {
            let listed = list(&vm_of(store, &name).await?).await?;
            output.result(&listed, |listed| as_table(listed))
        }
        GenerationsCommand::Prune {
            name,
            keep,
            max_bytes,
            dry_run,
        } => {
            let limits = Limits {
                keep: keep as usize,
                max_bytes,
                ..Limits::default()
            };
            let pruned = prune(&vm_of(store, &name).await?, limits, dry_run).await?;
            output.result(&pruned, |pruned| as_text(pruned, max_bytes))
        }
    }
}

fn as_table(listed: &[Listed]) -> String {
    let head = [
        "generation",
        "kind",
        "age",
        "RAM",
        "disks",
        "device",
        "log",
        "other",
        "prune takes",
        "relied on by",
    ];
    let rows = listed.iter().map(|one| {
        let amount = |amount: u64| match amount {
            0 => "-".to_owned(),
            amount => bytes(amount),
        };
        vec![
            one.generation.to_string(),
            kind(one.kind).to_owned(),
            one.created.map_or("-".to_owned(), age),
            amount(one.bytes.ram),
            amount(one.bytes.disks),
            amount(one.bytes.device),
            amount(one.log_bytes),
            amount(one.bytes.other),
            takes(one.prune).to_owned(),
            relied_on_by(one),
        ]
    });
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned).to_vec())
        .chain(rows)
        .collect();
    table(&rows)
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Whole => "whole",
        Kind::Pruned => "pruned",
        Kind::Unfinished => "unfinished",
    }
}

fn takes(fate: Fate) -> &'static str {
    match fate {
        Fate::Stay => "nothing",
        Fate::Disks => "all but disks",
        Fate::Note => "all but a note",
        Fate::Go => "all",
    }
}

/// Who needs the state, and whose disks rest on its own.
fn relied_on_by(one: &Listed) -> String {
    let mut who: Vec<String> = one
        .relied_on_by
        .iter()
        .map(|reliance| match reliance {
            Reliance::Newest => "the VM (newest)".to_owned(),
            Reliance::Run => "the VM (last run)".to_owned(),
            Reliance::Log => "its log".to_owned(),
            Reliance::Peer(name) => name.clone(),
        })
        .collect();
    who.dedup();
    if one.below_live {
        who.push("live disks".to_owned());
    }
    who.extend(one.below.iter().map(|above| format!("disks of {above}")));
    if who.is_empty() {
        who.push("nobody".to_owned());
    }
    who.join(", ")
}

fn age(created: u64) -> String {
    // Another site said it: it may be beyond what a clock can show.
    let made = UNIX_EPOCH.checked_add(Duration::from_secs(created));
    let age = made.and_then(|made| SystemTime::now().duration_since(made).ok());
    let age = age.unwrap_or_default();
    HumanDuration(age).to_string()
}

fn as_text(pruned: &Pruned, max_bytes: Option<u64>) -> String {
    let mut text = String::new();
    for taken in &pruned.taken {
        text.push_str(&format!(
            "{} {}: {}, {}\n",
            match taken.kind {
                Kind::Whole => "generation",
                Kind::Pruned => "pruned generation",
                Kind::Unfinished => "unfinished generation",
            },
            taken.generation,
            takes(taken.fate),
            bytes(taken.freed)
        ));
    }
    for merged in &pruned.merged {
        let from = merged.from.iter().map(u64::to_string);
        text.push_str(&format!(
            "disk {}: overlays of {} merged into that of {}\n",
            merged.disk,
            from.collect::<Vec<_>>().join(", "),
            merged.into
        ));
    }
    if let Some(why) = &pruned.unmerged {
        text.push_str(&format!(
            "disks of pruned generations were not merged: {why}\n"
        ));
    }
    for log in &pruned.logs {
        text.push_str(&format!("the log of generation {log}\n"));
    }
    for left in &pruned.leftovers {
        text.push_str(&format!("{}\n", left.display()));
    }
    let (freed, left) = (bytes(pruned.freed), bytes(pruned.left));
    text.push_str(&if pruned.dry_run {
        format!("{freed} would become free, {left} would stay")
    } else {
        format!("{freed} became free, {left} stay")
    });
    if let (Some(false), Some(max)) = (pruned.within, max_bytes) {
        text.push_str(&format!(
            "; that is more than {}, and is relied on: `generations list` shows by whom",
            bytes(max)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_no_clock_shows_is_no_reason_to_fail() {
        for created in [0, u64::MAX, i64::MAX as u64] {
            assert!(!age(created).is_empty());
        }
    }
}
