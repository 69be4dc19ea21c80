use super::*;

fn estimate(strategy: Strategy, bytes: u64, before: f64, down: f64) -> Estimate {
    Estimate {
        strategy,
        bytes,
        seconds_before: before,
        seconds_down: down,
    }
}

fn estimates(strategies: Vec<Estimate>, following: Option<Following>) -> Estimates {
    Estimates {
        bits_per_second: 10e6,
        choice: match following {
            Some(_) => Strategy::Replay,
            None => choose(&strategies),
        },
        strategies,
        following,
        assumed: Assumed {
            replay_leaves: Some(0.451),
            replays: 0,
            seconds_besides: None,
            off: None,
        },
    }
}

fn follower(behind: Option<f64>) -> Following {
    Following {
        site: "B".into(),
        base: Some(GenerationId {
            number: 3,
            digest: [0; 32],
        }),
        records: 120,
        seconds_behind: behind,
    }
}

fn heavy(before: f64) -> Vec<Estimate> {
    vec![
        estimate(Strategy::Replay, 2_100_000, before, 1.7),
        estimate(Strategy::Base, 30_900_000, 0.0, 24.7),
        estimate(Strategy::Full, 205_000_000, 0.0, 164.0),
    ]
}

#[test]
fn a_session_that_made_much_is_replayed() {
    let estimates = estimates(heavy(103.0), None);
    assert_eq!(estimates.choice, Strategy::Replay);
    assert_eq!(
        estimates.why(),
        "strategy replay: 103 s of replaying while the guest runs on, then the guest stands still \
         for about 1.7 s while 2.0 MiB are sent at 10.0 Mbit/s, against 25 s and 29.5 MiB with \
         base, and 164 s and 195.5 MiB with full"
    );
}

#[test]
fn no_user_waits_for_a_replay_that_saves_less_than_a_second() {
    let light = vec![
        estimate(Strategy::Replay, 560_000, 82.0, 0.5),
        estimate(Strategy::Base, 1_330_000, 0.0, 1.1),
        estimate(Strategy::Full, 205_000_000, 0.0, 164.0),
    ];
    let estimates = estimates(light, None);
    assert_eq!(estimates.choice, Strategy::Base);
    assert_eq!(
        estimates.why(),
        "strategy base: the guest stands still for about 1.1 s while 1.3 MiB are sent at 10.0 \
         Mbit/s, against 0.5 s and 0.5 MiB with replay after 82 s of replaying, and 164 s and \
         195.5 MiB with full"
    );
}

#[test]
fn where_time_does_not_decide_bytes_do() {
    let fast = [
        estimate(Strategy::Full, 205_000_000, 0.0, 0.9),
        estimate(Strategy::Base, 30_900_000, 0.0, 0.2),
    ];
    assert_eq!(choose(&fast), Strategy::Base);
    assert_eq!(choose(&fast[..1]), Strategy::Full);
}

#[test]
fn a_vm_that_is_followed_has_only_the_tail_to_replay() {
    let near = estimates(heavy(0.0), Some(follower(Some(2.1))));
    assert_eq!(near.choice, Strategy::Replay);
    assert!(
        near.why().starts_with(
            "strategy replay: B follows already, 2.1 s behind, and only that tail is left to \
             replay; the guest stands still for about 1.7 s"
        ),
        "{}",
        near.why()
    );
    let far = estimates(heavy(35.0), Some(follower(Some(35.0))));
    assert!(
        far.why().contains("needs 35 s to catch up"),
        "{}",
        far.why()
    );
}

#[test]
fn only_the_tail_counts_of_a_replay_that_follows() {
    let ahead = |following: Option<&Following>| {
        let ahead = Ahead::of(150, Duration::from_secs(90), following);
        (ahead.records, ahead.seconds)
    };
    assert_eq!(ahead(None), (150, 90.0));
    assert_eq!(ahead(Some(&follower(Some(2.1)))), (30, 0.0));
    assert_eq!(ahead(Some(&follower(Some(35.0)))), (30, 35.0));
    // It has the log, and has not said yet how far it is.
    assert_eq!(ahead(Some(&follower(None))), (30, 90.0));
    // It has nothing yet.
    let mut calls = follower(None);
    calls.base = None;
    assert_eq!(ahead(Some(&calls)), (150, 90.0));
    // It was sent what was recorded since the log was read here.
    let mut newer = follower(Some(1.0));
    newer.records = 151;
    assert_eq!(ahead(Some(&newer)), (0, 0.0));
}

#[test]
fn what_is_assumed_is_said() {
    let mut assumed = estimates(heavy(0.0), None).assumed;
    assert_eq!(
        assumed.said(),
        "assumed: a replay leaves 45 % of what base sends, as other sessions did; what standing \
         still takes beside sending is not known yet"
    );
    assumed.off = Some(Off {
        moves: 2,
        bytes: 1.1,
        seconds: 0.925,
    });
    assert!(
        assumed.said().ends_with(
            "; the last 2 of this VM's moves from here took 1.10 times the bytes and 0.93 times the \
             seconds of standing still that were predicted, in the median"
        ),
        "{}",
        assumed.said()
    );
    assumed.off = None;
    assumed.replays = 3;
    assumed.seconds_besides = Some(4.25);
    assert_eq!(
        assumed.said(),
        "assumed: a replay leaves 45 % of what base sends, as the last 3 replays of this VM from \
         here did; standing still takes 4.2 s beside sending, as it did before"
    );
}
