//! The demo's session, whose target follows while the user works: from the user's "go" to the
//! desktop at the target, and what following costs.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::words::{NOT_MEASURED, Table, count, one_decimal, percent_of, reached};
use super::{Results, Spread};

/// How soon the desktop is to be usable at the target, in seconds.
const AIM_USABLE: f64 = 10.0;

/// One run of the demo.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// How long the session was, in seconds.
    pub session_seconds: f64,
    /// From the user's "go" until the VM ran at the target.
    pub usable_seconds: f64,
    /// While nobody ran it.
    pub downtime_seconds: f64,
    /// Until the source had its stale copy in place.
    pub total_seconds: f64,
    /// Anchors that the replay did not see in time.
    pub missed: u64,
    /// On the wire, both ways.
    pub replay_bytes: u64,
    /// The same state against the stale copy, without a replay.
    pub base_bytes: u64,
    /// The same without a stale copy.
    pub full_bytes: u64,
    /// Of one processor, what following took the target.
    pub standby_cpu_percent: f64,
    /// What it took of memory.
    pub standby_mib: f64,
    /// The guest's RAM, of that.
    pub standby_guest_mib: f64,
}

impl Move {
    /// What a demo's report says; `None` if images differed or a figure is missing.
    pub fn of(report: &Value) -> Option<Self> {
        let strategies = &report["strategies"];
        let bytes = |strategy: &str| {
            let bytes = &strategies[strategy]["bytes"];
            Some(bytes["sent"].as_u64()? + bytes["received"].as_u64()?)
        };
        let (moved, standby) = (&strategies["replay"], &report["standby"]);
        let seconds = |name: &str| moved["seconds"][name].as_f64();
        report["identical"]
            .as_bool()
            .filter(|identical| *identical)?;
        Some(Self {
            session_seconds: report["session_seconds"].as_f64()?,
            usable_seconds: seconds("usable")?,
            downtime_seconds: seconds("downtime")?,
            total_seconds: seconds("total")?,
            missed: moved["replay"]["missed"].as_u64()?,
            replay_bytes: bytes("replay")?,
            base_bytes: bytes("base")?,
            full_bytes: bytes("full")?,
            standby_cpu_percent: standby["cpu_percent"].as_f64()?,
            standby_mib: standby["memory_mib"].as_f64()?,
            standby_guest_mib: standby["of_it_guest_ram_mib"].as_f64()?,
        })
    }
}

/// The part of the section that says what a move takes.
pub(super) fn markdown(results: &Results) -> String {
    let mut text = "### While the user works\n\nThe demo's session in a replay-friendly guest, recorded with long turns, followed by the target and \
                    moved over 10 Mbit/s with 50 ms of delay each way; all images compared. *Usable*: from the user's \
                    \"go\" until the VM runs at the target. *Following*: of one of the target's processors, and its memory.\n\n"
        .to_owned();
    if results.moves.is_empty() {
        return text + NOT_MEASURED + ".\n";
    }
    let mut table = Table::new(
        0,
        &[
            "run",
            "usable after, s",
            "standing still, s",
            "missed",
            "`replay`, bytes",
            "of `base`",
            "of `full`",
            "following, CPU",
            "memory, MiB",
            "of it the guest's",
        ],
    );
    for (at, moved) in results.moves.iter().enumerate() {
        let share = |of: u64| percent_of(100.0 * moved.replay_bytes as f64 / of.max(1) as f64);
        table.line(&[
            (at + 1).to_string(),
            one_decimal(moved.usable_seconds),
            one_decimal(moved.downtime_seconds),
            moved.missed.to_string(),
            count(moved.replay_bytes as f64),
            share(moved.base_bytes),
            share(moved.full_bytes),
            percent_of(moved.standby_cpu_percent),
            count(moved.standby_mib),
            count(moved.standby_guest_mib),
        ]);
    }
    text += &table.text();
    if let Some(spread) = Spread::of(results.moves.iter().map(|moved| moved.usable_seconds)) {
        text += &format!(
            "\nUsable after {} s in the median. The aim is under {} s; it is {}.\n",
            one_decimal(spread.median),
            one_decimal(AIM_USABLE),
            reached(spread.median < AIM_USABLE),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn moves_are_read_from_reports_kept_and_held_against_the_aim() {
        let of = |bytes: u64| json!({ "bytes": { "sent": bytes, "received": 1000 } });
        let mut report = json!({
            "identical": true,
            "session_seconds": 92.0,
            "standby": { "cpu_percent": 39.0, "memory_mib": 856.0, "of_it_guest_ram_mib": 515.0 },
            "strategies": { "replay": of(2_999_000), "base": of(29_999_000), "full": of(59_999_000) },
        });
        assert_eq!(Move::of(&report), None, "no seconds");
        report["strategies"]["replay"]["seconds"] =
            json!({ "usable": 8.7, "downtime": 8.6, "total": 10.0 });
        report["strategies"]["replay"]["replay"] = json!({ "missed": 1 });
        let moved = Move::of(&report).unwrap();
        assert_eq!(moved.replay_bytes, 3_000_000);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("replay.json");
        let mut results = Results::new("a machine");
        assert!(markdown(&results).contains("not measured"));
        results.moves = vec![moved.clone(), moved];
        results.save(&path).unwrap();
        let results = Results::load(&path).unwrap().unwrap();
        let text = markdown(&results);
        let line = "| 2 | 8.7 | 8.6 | 1 | 3,000,000 | 10.0 % | 5.0 % | 39.0 % | 856 | 515 |";
        assert!(text.lines().any(|other| other == line), "{text}");
        assert!(
            text.contains(
                "Usable after 8.7 s in the median. The aim is under 10.0 s; it is reached"
            )
        );
        report["identical"] = json!(false);
        assert_eq!(Move::of(&report), None);
    }
}
