//! What `--help` lists is there, and what is there is listed.

use assert_cmd::Command;

fn help(words: &[&str]) -> String {
    let mut command = Command::new(crate::common::program());
    let output = command.args(words).arg("--help").assert().success();
    String::from_utf8(output.get_output().stdout.clone()).unwrap()
}

/// The commands that a help text lists.
fn commands(help: &str) -> Vec<&str> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect()
}

#[test]
fn the_commands_are_those_of_the_design() {
    let all = [
        "doctor",
        "guest",
        "serve",
        "site",
        "vm",
        "checkpoint",
        "generations",
        "record",
        "seed",
        "follow",
        "migrate",
        "supply",
        "sync",
        "collect",
        "hub",
        "switch",
        "replay",
        "log",
        "capture",
        "bench",
    ];
    assert_eq!(commands(&help(&[])), all);
    for (command, parts) in [
        ("guest", &["build"][..]),
        (
            "site",
            &["id", "trust", "untrust", "list", "status", "lock"],
        ),
        (
            "vm",
            &[
                "create",
                "start",
                "stop",
                "pause",
                "resume",
                "list",
                "status",
                "screenshot",
                "takeover",
                "delete",
            ],
        ),
        ("generations", &["list", "prune"]),
        ("log", &["list", "show", "export", "prune", "redact"]),
        ("bench", &["reconcile"]),
    ] {
        assert_eq!(commands(&help(&[command])), parts, "{command}");
    }
}

#[test]
fn exit_codes_are_documented() {
    let text = help(&[]);
    for code in [
        "0 done",
        "1 failed",
        "2 usage",
        "3 refused",
        "4 interrupted",
    ] {
        assert!(text.contains(code), "{code} in {text}");
    }
}

#[test]
fn usage_errors_exit_with_2() {
    for words in [
        &["migrate"][..],
        &["migrate", "x", "--to", "y", "--strategy", "magic"],
        &["x"],
    ] {
        Command::new(crate::common::program())
            .args(words)
            .assert()
            .code(2);
    }
}
