//! `make power-cuts`, with few cuts; and that it notices what it is there for.

#![allow(clippy::unwrap_used, reason = "what can't go on fails the test")]

use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// This host can't do it.
const SKIPPED: Option<i32> = Some(77);

/// One at a time: each runs guests.
static TURN: Mutex<()> = Mutex::new(());

/// Exit code and output of a run; nothing, where this host can't do it.
fn power(words: &[&str]) -> Option<(Option<i32>, String)> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let place = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_power"))
        .arg("--place")
        .arg(place.path())
        .args(words)
        .output()
        .unwrap();
    let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy);
    if output.status.code() == SKIPPED {
        // A word for whoever looks: nothing was tested.
        eprintln!("{}", said[1].trim());
        return None;
    }
    Some((output.status.code(), said.concat()))
}

#[test]
fn promises_hold_after_a_power_cut_at_any_moment() {
    if let Some((code, said)) = power(&["--cuts", "50", "--go-on-each", "10"]) {
        assert_eq!(code, Some(0), "{said}");
    }
}

#[test]
fn what_is_not_made_durable_is_noticed() {
    let cuts = ["--cuts", "40", "--go-on-each", "100", "--without-fsync"];
    if let Some((code, said)) = power(&cuts) {
        assert_eq!(code, Some(1), "{said}");
        // What becomes of files that nobody made durable is the kernel's business, and depends on when it writes
        // by itself: some are not there, others are there and empty.
        let noticed = said.matches("is lost").count() + said.matches("is damaged").count();
        assert!(noticed > 0, "{said}");
    }
}
