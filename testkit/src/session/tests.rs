//! Sessions as they are read, without a viewer.

use super::*;

#[test]
fn the_sessions_that_come_along_can_be_played() {
    for (name, _) in SUITE {
        let session = Session::named(name).unwrap();
        for (user, limit) in [(User::Practised, 180), (User::Ordinary, 240)] {
            let nominal = session.clone().by(user).nominal().as_secs();
            assert!(
                (60..limit).contains(&nominal),
                "{name} takes {nominal} s ({user})"
            );
        }
        let looks = |(_, step): &(usize, Step)| matches!(step, Step::Look(_));
        assert!(
            session.steps.last().is_some_and(looks),
            "{name} does not show how it ended"
        );
    }
    assert!(Session::named("short").unwrap().steps.len() > 5);
}

#[test]
fn the_nominal_time_counts_what_is_certain() {
    let text = "type \"abcde\"\nthink 1s\nsince 3s\nquiet 500ms 60s\nsince 2s\nchanged 9s";
    let session: Session = text.parse().unwrap();
    // Five keys, three seconds after them, half a second; the second `since` is over by then.
    let expected = |user: User| 5 * user.key_spacing() + Duration::from_millis(3500);
    assert_eq!(session.nominal(), expected(User::Practised));
    // A pause after the last action is as long whoever acts.
    assert_eq!(
        session.by(User::Ordinary).nominal(),
        expected(User::Ordinary)
    );
}

#[test]
fn an_ordinary_user_prepares_for_each_step() {
    let session: Session = "think 500ms\nthink 2s".parse().unwrap();
    assert_eq!(session.nominal(), Duration::from_millis(2500));
    let slower = session.by(User::Ordinary).nominal();
    assert_eq!(slower, Duration::from_millis(3350));
}

#[test]
fn what_is_waited_for_was_learned_before() {
    let text = "learn prompt 1 2 3 4\nshows prompt 5 6 7s";
    assert!(text.parse::<Session>().is_ok());
    for fault in ["shows prompt 5 6 7s", "learn a 1 2 3 4\nshows b 5 6 7s"] {
        let error = fault.parse::<Session>().unwrap_err();
        assert_eq!(error.line, fault.lines().count());
    }
}

#[test]
fn steps_are_read() {
    let text = "# a comment\n\nrepeat 2 type \"a\\n\\\"\"\nquiet 1 2 3 4 500ms 2s\nchanged 9s";
    let session: Session = text.parse().unwrap();
    let typed = Step::Type("a\n\"".to_owned());
    let region = Some(Region {
        x: 1,
        y: 2,
        width: 3,
        height: 4,
    });
    let (quiet, limit) = (Duration::from_millis(500), Duration::from_secs(2));
    assert_eq!(
        session.steps,
        [
            (3, typed.clone()),
            (3, typed),
            (
                4,
                Step::Quiet {
                    region,
                    quiet,
                    limit
                }
            ),
            (
                5,
                Step::Changed {
                    region: None,
                    limit: Duration::from_secs(9)
                }
            ),
        ]
    );
}

#[test]
fn faults_are_told_with_their_line() {
    for wrong in [
        "jump 1 2",
        "click 1",
        "click 1 70000",
        "think 5",
        "think -1s",
        "type hello",
        "type \"caf\u{e9}\"",
        "type \"\\x\"",
        "wheel 1 2 left 3",
        "quiet 1 2 3 1s 2s",
        "look ../x",
        "key hyper+x",
        "repeat x type \"a\"",
    ] {
        let error = Session::from_str(&format!("\n{wrong}")).unwrap_err();
        assert_eq!(error.line, 2, "{wrong}");
    }
}
