//! The quick pace.

use super::*;
use crate::fake::Reaction;
use crate::{Pace, QuickOptions};

fn quick() -> Options {
    Options {
        pace: Pace::quick(None),
        ..Options::default()
    }
}

/// The pointer goes somewhere, and 60 ms later a button is clicked on a screen of this colour.
fn click(millis: u64, anchor: Event) -> [Record; 4] {
    let button = |down| Event::Button { code: 0x110, down };
    [
        at(
            millis,
            Event::Pointer {
                x: 9,
                y: millis as u16,
            },
        ),
        at(millis + 60, anchor),
        at(millis + 60, button(true)),
        at(millis + 120, button(false)),
    ]
}

/// What a user does who reads and thinks for two to seven seconds after each of their actions,
/// at a guest that shows the next colour at each press.
fn session(anchor: impl Fn(u8) -> Event) -> (Vec<Record>, Duration) {
    let mut records = Vec::new();
    let mut now = 1000;
    for (colour, think) in (0..16).zip([2000, 4500, 7000, 3200].into_iter().cycle()) {
        records.extend(click(now, anchor(colour)));
        now += 120 + think;
    }
    let recorded = records.last().unwrap().at;
    (records, Duration::from_micros(recorded.micros))
}

const FAST: Reaction = Reaction {
    computing: Duration::from_millis(700),
    waiting: Duration::from_millis(40),
};

#[tokio::test(start_paused = true)]
async fn ordinary_think_times_take_at_most_half_as_long() {
    let guest = Fake::reacting(FAST);
    let (records, recorded) = session(Fake::anchor);
    let report = play(&guest, &records, &quick()).await;
    assert_eq!((report.matched, report.missed.len()), (16, 0));
    assert!(
        report.duration * 2 <= recorded,
        "{report:?} of {recorded:?}"
    );
    let saved = recorded.saturating_sub(report.duration);
    assert!(report.saved.abs_diff(saved) < ms(20), "{report:?}");
    let wanted: Vec<_> = records
        .iter()
        .filter(|record| !matches!(record.event, Event::Anchor(_)))
        .map(|record| record.event.clone())
        .collect();
    let events: Vec<_> = given(&guest).into_iter().map(|(_, event)| event).collect();
    assert_eq!(events, wanted);
}

#[tokio::test(start_paused = true)]
async fn a_caret_and_a_clock_neither_miss_nor_hold_it_up() {
    let guest = Fake::reacting(FAST).restless();
    let (records, recorded) = session(Fake::restless_anchor);
    let report = play(&guest, &records, &quick()).await;
    assert_eq!((report.matched, report.missed.len()), (16, 0));
    assert!(
        report.duration * 2 <= recorded,
        "{report:?} of {recorded:?}"
    );

    // Also where the screen as a whole is never still for long enough.
    let guest = Fake::reacting(FAST).restless();
    let options = Options {
        pace: Pace::Quick(QuickOptions {
            rest: ms(1800),
            ..QuickOptions::default()
        }),
        ..Options::default()
    };
    let report = play(&guest, &records, &options).await;
    assert_eq!((report.matched, report.missed.len()), (16, 0));
    assert!(
        report.duration * 2 <= recorded,
        "{report:?} of {recorded:?}"
    );

    // Had they not been known, every other anchor would be missed at the recorded pace, too.
    let guest = Fake::reacting(FAST).restless();
    let (records, _) = session(Fake::anchor);
    let options = Options {
        divergence: None,
        anchor_limit: ms(0),
        ..Options::default()
    };
    assert!(play(&guest, &records, &options).await.missed.len() > 4);
}

#[tokio::test(start_paused = true)]
async fn it_waits_until_the_guest_has_computed() {
    // The same colour before and after: only that it computes tells that it is not ready.
    let guest = Fake::new(&[(ms(0), 1)], ms(3000));
    let records = [&[at(9000, Fake::anchor(1))][..], &stroke(9000, 30)].concat();
    play(&guest, &records, &quick()).await;
    let [down, _] = times(&guest)[..] else {
        panic!("{:?}", times(&guest))
    };
    assert!((3300..3700).contains(&down), "{down}");
}

#[tokio::test(start_paused = true)]
async fn what_is_shown_before_the_work_is_done_does_not_count() {
    // By a timer something appears at three seconds, and is worked on for two more.
    let guest = Fake::new(&[(ms(0), 1), (ms(3000), 2)], ms(0)).computing(ms(3000), ms(5000));
    let records = [&[at(9000, Fake::anchor(2))][..], &stroke(9000, 30)].concat();
    play(&guest, &records, &quick()).await;
    let down = times(&guest)[0];
    assert!((5300..5700).contains(&down), "{down}");
}

#[tokio::test(start_paused = true)]
async fn the_floor_is_kept_and_a_shorter_pause_is_kept_whole() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let records = [
        &stroke(100, 30)[..],
        &[at(450, Fake::anchor(1))],
        &stroke(450, 31),
        &[at(5500, Fake::anchor(1))],
        &stroke(5500, 32),
    ]
    .concat();
    play(&guest, &records, &quick()).await;
    near(&times(&guest), &[100, 112, 412, 424, 1024, 1036]);
}

#[tokio::test(start_paused = true)]
async fn what_has_no_anchor_needs_a_longer_rest() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let records = [stroke(100, 30), stroke(8000, 31)].concat();
    play(&guest, &records, &quick()).await;
    near(&times(&guest), &[100, 112, 1112, 1124]);
}

#[tokio::test(start_paused = true)]
async fn the_bound_is_kept() {
    for (bound, wanted) in [(1.0, 8000), (2.0, 4000), (5.0, 1600), (100.0, 600)] {
        let guest = Fake::new(&[(ms(0), 1)], ms(0));
        let records = [&[at(8000, Fake::anchor(1))][..], &stroke(8000, 30)].concat();
        let options = Options {
            pace: Pace::quick(Some(bound)),
            ..Options::default()
        };
        play(&guest, &records, &options).await;
        let down = times(&guest)[0];
        assert!((wanted..=wanted + 102).contains(&down), "{bound}: {down}");
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_never_later_than_the_recorded_pace() {
    // Never at rest, and with an anchor that it would have to wait for at any pace.
    let guest = Fake::new(&[(ms(0), 1), (ms(7000), 2)], RESTLESS);
    let records = [
        &stroke(1000, 30)[..],
        &click(4000, Fake::anchor(2)),
        &stroke(9000, 31),
    ]
    .concat();
    play(&guest, &records, &quick()).await;
    let quick = times(&guest);
    let guest = Fake::new(&[(ms(0), 1), (ms(7000), 2)], RESTLESS);
    play(&guest, &records, &Options::default()).await;
    near(&quick, &times(&guest));
}

#[tokio::test(start_paused = true)]
async fn what_it_saved_is_given_back_where_an_anchor_needs_it() {
    // Five seconds after the key, something appears by a timer; the guest is idle until then.
    let timer = Reaction {
        computing: ms(0),
        waiting: ms(5000),
    };
    let guest = Fake::reacting(timer);
    let records = [&stroke(1000, 30)[..], &click(8000, Fake::anchor(1))].concat();
    let report = play(&guest, &records, &quick()).await;
    assert_eq!((report.matched, report.missed.len()), (1, 0));
    let [key, _, moved, down, _] = times(&guest)[..] else {
        panic!("{:?}", times(&guest))
    };
    assert!(moved < key + 1000 && (key + 5000..key + 5200).contains(&down));

    // What never appears is missed as late as at the recorded pace, give or take a look.
    let missed = async |options: &Options| {
        let guest = Fake::reacting(timer);
        let records = [&stroke(1000, 30)[..], &click(8000, Fake::anchor(9))].concat();
        let report = play(&guest, &records, options).await;
        assert_eq!(report.missed.len(), 1);
        report.duration
    };
    let (quick, recorded) = (missed(&quick()).await, missed(&Options::default()).await);
    assert!(
        (ms(1)..ms(2200)).contains(&recorded.saturating_sub(quick)),
        "{quick:?}, {recorded:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_held_is_held_as_long() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let records = [
        at(5000, key(42, true)),
        at(9000, Fake::anchor(1)),
        at(9000, key(30, true)),
        at(9050, key(30, false)),
        at(9100, key(42, false)),
    ];
    play(&guest, &records, &quick()).await;
    let given = times(&guest);
    near(
        &given[1..],
        &[4000, 4050, 4100].map(|later| given[0] + later),
    );
}

/// So many keys, each held for 50 ms, one every 120 ms.
fn typed(keys: u64) -> Vec<Record> {
    (0..keys)
        .flat_map(|n| stroke(100 + 120 * n, 30 + n as u16))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_typed_key_follows_as_soon_as_the_one_before_is_taken_in() {
    // Nothing is computed: the gap that is always left.
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let report = play(&guest, &typed(4), &quick()).await;
    near(&times(&guest), &[100, 112, 124, 136, 148, 160, 172, 184]);
    assert!(
        report.saved.abs_diff(ms(3 * 58 + 4 * 38)) < ms(8),
        "{report:?}"
    );
    assert!(report.duration + report.saved <= report.recorded + ms(3));

    // Each press is worked on for 80 ms, 30 ms of it after the release.
    let slow = Reaction {
        computing: ms(80),
        waiting: ms(0),
    };
    let guest = Fake::reacting(slow);
    play(&guest, &typed(3), &quick()).await;
    let given = times(&guest);
    for press in [2, 4] {
        let gap = given[press] - given[press - 1];
        assert!((40..=50).contains(&gap), "{given:?}");
    }

    // One that has never done keeps the recorded times.
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    play(&guest, &typed(3), &quick()).await;
    near(&times(&guest), &[100, 150, 220, 270, 340, 390]);
}

#[tokio::test(start_paused = true)]
async fn typing_has_its_rhythm_where_keys_overlap_and_at_other_paces() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let shifted = [
        at(100, key(42, true)),
        at(300, key(30, true)),
        at(350, key(30, false)),
        at(420, key(31, true)),
        at(470, key(31, false)),
        at(500, key(42, false)),
    ];
    play(&guest, &shifted, &quick()).await;
    near(&times(&guest), &[100, 300, 350, 420, 470, 500]);

    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    play(&guest, &typed(2), &Options::default()).await;
    near(&times(&guest), &[100, 150, 220, 270]);

    // Not quicker than it was allowed to be.
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let bounded = Options {
        pace: Pace::quick(Some(2.0)),
        ..Options::default()
    };
    play(&guest, &typed(2), &bounded).await;
    near(&times(&guest), &[100, 125, 160, 185]);
}

#[tokio::test(start_paused = true)]
async fn what_is_held_beyond_a_tap_repeats_as_often() {
    let held = |key_up: u64| {
        [
            at(100, key(30, true)),
            at(key_up, key(30, false)),
            at(key_up + 100, key(31, true)),
            at(key_up + 150, key(31, false)),
        ]
    };
    for (key_up, expected) in [
        (300, [100, 112, 124, 136]),
        (310, [100, 310, 322, 334]),
        (900, [100, 900, 912, 924]),
    ] {
        let guest = Fake::new(&[(ms(0), 1)], ms(0));
        play(&guest, &held(key_up), &quick()).await;
        near(&times(&guest), &expected);
    }

    // A button is no key.
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let button = |down| Event::Button { code: 272, down };
    let clicked = [at(100, button(true)), at(150, button(false))];
    play(&guest, &clicked, &quick()).await;
    near(&times(&guest), &[100, 150]);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_acts_on_what_was_typed_comes_as_late_as_recorded() {
    // A dialog that takes a name in by a timer is idle until then, and Enter comes too early.
    const ENTER: u16 = 28;
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let records = [
        stroke(100, 30),
        stroke(220, 31),
        stroke(600, ENTER),
        stroke(800, 32),
        stroke(920, 33),
    ]
    .concat();
    play(&guest, &records, &quick()).await;
    near(
        &times(&guest),
        &[100, 112, 124, 136, 466, 516, 666, 678, 690, 702],
    );

    // Shift is let go of between two letters.
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let records = [stroke(100, 42), stroke(220, 31)].concat();
    play(&guest, &records, &quick()).await;
    near(&times(&guest), &[100, 150, 162, 174]);
}

#[test]
fn bounds_that_mean_nothing_are_refused() {
    for bound in [0.0, 0.5, f64::NAN, f64::INFINITY] {
        let options = Options {
            pace: Pace::quick(Some(bound)),
            ..Options::default()
        };
        assert!(options.check().is_err(), "{bound}");
    }
    quick().check().unwrap();
    let unbounded = QuickOptions::default().at_most;
    assert_eq!(unbounded, None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_order_is_kept_and_within_an_interaction_the_times(
        steps in prop::collection::vec((0..6000_u64, 0..4_u8), 1..40),
        computing in 0..2000_u64, waiting in 0..2000_u64,
    ) {
        let mut millis = 0;
        let mut records = Vec::new();
        for (step, kind) in steps {
            millis += step;
            records.push(at(millis, match kind {
                0 => Fake::anchor(records.len() as u8),
                1 => Event::Pointer { x: millis as u16, y: 0 },
                2 => Event::Wheel { vertical: 1, horizontal: 0 },
                _ => key(30, records.len() % 2 == 0),
            }));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let (given, report) = runtime.block_on(async {
            let guest = Fake::reacting(Reaction {
                computing: ms(computing),
                waiting: ms(waiting),
            });
            let options = Options { divergence: None, ..quick() };
            let report = play(&guest, &records, &options).await;
            (given(&guest), report)
        });
        let mut next = given.iter();
        for act in traces::interactions(&records) {
            let mut before: Option<(&Record, Duration)> = None;
            for record in &records[act.records] {
                if matches!(record.event, Event::Anchor(_)) {
                    continue;
                }
                let (at, event) = next.next().unwrap();
                prop_assert_eq!(event, &record.event);
                if let Some((recorded, real)) = before {
                    let wanted = Duration::from_micros(record.at.micros - recorded.at.micros);
                    let took = at.saturating_sub(real);
                    // There is one key alone, so that it is the one that may be held.
                    let typed = recorded.event == key(30, false) && record.event == key(30, true)
                        || wanted <= ms(200)
                            && recorded.event == key(30, true)
                            && record.event == key(30, false);
                    prop_assert!(took <= wanted + ms(3));
                    let least = if typed { wanted.min(ms(12)) } else { wanted };
                    prop_assert!(took + ms(3) >= least);
                }
                before = Some((record, *at));
            }
        }
        prop_assert!(next.next().is_none());
        prop_assert!(report.saved <= report.recorded);
    }
}
