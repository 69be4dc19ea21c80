//! The schedule, under a clock that jumps.

mod astray;
mod follow;
mod quick;

use std::time::Duration;

use proptest::prelude::*;
use tokio::time::{Instant, sleep_until};
use traces::{Event, GuestTime, Record};

use crate::fake::{Fake, Given};
use crate::play::Player;
use crate::{Options, Progress, ReplayReport, RestOptions};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn at(millis: u64, event: Event) -> Record {
    Record {
        at: GuestTime {
            micros: millis * 1000,
        },
        event,
    }
}

fn key(code: u16, down: bool) -> Event {
    Event::Key { code, down }
}

/// Down at this time, and up 50 ms later.
fn stroke(millis: u64, code: u16) -> [Record; 2] {
    [
        at(millis, key(code, true)),
        at(millis + 50, key(code, false)),
    ]
}

/// Never at rest, so that only the limits end a wait.
const RESTLESS: Duration = Duration::from_secs(100_000);

async fn play(guest: &Fake, records: &[Record], options: &Options) -> ReplayReport {
    let mut player = Player::new(guest, options).unwrap();
    player.play(records, |_| ()).await.unwrap();
    player.report()
}

fn given(guest: &Fake) -> Vec<Given> {
    guest.given.lock().unwrap().clone()
}

/// When each was given, in milliseconds; timers have that grain.
fn times(guest: &Fake) -> Vec<u64> {
    given(guest)
        .iter()
        .map(|(at, _)| at.as_micros().div_ceil(1000) as u64)
        .collect()
}

fn near(found: &[u64], wanted: &[u64]) {
    let close = found.len() == wanted.len()
        && found
            .iter()
            .zip(wanted)
            .all(|(found, wanted)| found.abs_diff(*wanted) <= 2);
    assert!(close, "{found:?}, not {wanted:?}");
}

#[tokio::test(start_paused = true)]
async fn without_anchors_it_keeps_the_recorded_times() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let records = [stroke(700, 30), stroke(800, 31), stroke(5000, 32)].concat();
    let report = play(&guest, &records, &Options::default()).await;
    near(&times(&guest), &[700, 750, 800, 850, 5000, 5050]);
    assert_eq!((report.interactions, report.events), (3 - 1, 6));
    assert_eq!((report.recorded, report.waited), (ms(5050), ms(0)));
}

#[tokio::test(start_paused = true)]
async fn speed_scales_the_thinking_and_not_the_acting() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let records = [stroke(700, 30), stroke(800, 31), stroke(4850, 32)].concat();
    let options = Options {
        speed: 2.0,
        ..Options::default()
    };
    play(&guest, &records, &options).await;
    near(&times(&guest), &[350, 400, 450, 500, 2500, 2550]);
}

#[tokio::test(start_paused = true)]
async fn what_timers_oversleep_does_not_add_up() {
    let records: Vec<Record> = (1..=40).flat_map(|n| stroke(n * 3000, 30)).collect();
    for speed in [1.0, 4.0] {
        let guest = Fake::new(&[(ms(0), 1)], RESTLESS).oversleeping(ms(7));
        let options = Options {
            speed,
            ..Options::default()
        };
        play(&guest, &records, &options).await;
        for (stroke, pressed) in (1..).zip(times(&guest).into_iter().step_by(2)) {
            let thought = 3000 + (stroke - 1) * 2950;
            let due = (thought as f64 / speed) as u64 + (stroke - 1) * 50;
            assert!((due..=due + 15).contains(&pressed), "{stroke}: {pressed}");
        }
    }

    // Neither is a guest hurried that was late,
    let guest = Fake::new(&[(ms(0), 1), (ms(1300), 2)], RESTLESS);
    let records = [
        &[at(1000, Fake::anchor(2))][..],
        &stroke(1000, 32),
        &stroke(3000, 33),
    ]
    .concat();
    play(&guest, &records, &Options::default()).await;
    near(&times(&guest), &[1300, 1350, 3300, 3350]);

    // nor is a pause cut by more than a tenth, or one in which two clicks might become a double one.
    for (pause, least) in [(600, 540), (540, 540)] {
        let records = [
            &[at(1000, Fake::anchor(2))][..],
            &stroke(1000, 32),
            &[at(1050 + pause, Fake::anchor(2))],
            &stroke(1050 + pause, 33),
        ]
        .concat();
        // Late by 95 ms.
        let guest = Fake::new(&[(ms(0), 1), (ms(1095), 2)], RESTLESS);
        play(&guest, &records, &Options::default()).await;
        let given = times(&guest);
        let took = given[2] - given[1];
        assert!((least..least + 8).contains(&took), "{given:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_overdue_waits_for_its_screen() {
    let guest = Fake::new(&[(ms(0), 1), (ms(16_000), 2)], RESTLESS);
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    player.play(&stroke(500, 30), |_| ()).await.unwrap();
    sleep_until(Instant::now() + ms(14_000)).await;
    let late = [&[at(2000, Fake::anchor(2))][..], &stroke(2000, 31)].concat();
    player.play(&late, |_| ()).await.unwrap();
    let report = player.report();
    assert_eq!((report.matched, report.missed.len()), (1, 0));
    assert!(report.waited.abs_diff(ms(1450)) < ms(30), "{report:?}");
    near(&times(&guest), &[500, 550, 16_000, 16_050]);
}

#[tokio::test(start_paused = true)]
async fn recorded_times_are_counted_from_when_the_guest_began_to_run() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS).having_run_for(ms(40));
    play(&guest, &stroke(500, 30), &Options::default()).await;
    near(&times(&guest), &[460, 510]);
}

#[tokio::test(start_paused = true)]
async fn input_is_given_sooner_by_what_the_guest_takes_to_have_it() {
    let records: Vec<Record> = (1..=30).flat_map(|n| stroke(n * 1500, 30)).collect();
    // No more than two are made up for: a guest that holds its QEMU up is a slow guest.
    for (takes, late) in [(2, 0), (20, 18)] {
        let guest = Fake::new(&[(ms(0), 1)], RESTLESS).taking(ms(takes));
        play(&guest, &records, &Options::default()).await;
        let given = times(&guest);
        assert_eq!(given[0], 1500 + takes);
        for (stroke, pressed) in (1..).zip(given.into_iter().step_by(2)).skip(15) {
            let due = stroke * 1500 + late;
            assert!(pressed.abs_diff(due) <= 1, "{takes}: {stroke}: {pressed}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_the_screen_and_puts_off_what_follows() {
    // Recorded: the window came at once. Replayed: it is up at 3.2 s.
    let guest = Fake::new(&[(ms(0), 1), (ms(3200), 2)], RESTLESS);
    let records = [
        &[at(1000, Fake::anchor(1))][..],
        &stroke(1000, 30),
        &[at(2000, Fake::anchor(2))],
        &stroke(2000, 31),
        &[at(4000, Fake::anchor(2))],
        &stroke(4000, 32),
    ]
    .concat();
    let report = play(&guest, &records, &Options::default()).await;
    near(&times(&guest), &[1000, 1050, 3200, 3250, 5200, 5250]);
    assert_eq!((report.matched, report.missed.len()), (3, 0));
    assert!(
        (ms(1199)..ms(1203)).contains(&report.waited),
        "{:?}",
        report.waited
    );
}

#[tokio::test(start_paused = true)]
async fn what_moves_by_itself_is_not_waited_for_though_the_recorder_did_not_know() {
    let records = [&[at(1000, Fake::framed_anchor(2))][..], &stroke(1000, 30)].concat();
    // Under it is what was expected: two seconds are enough to tell.
    let guest = Fake::new(&[(ms(0), 2)], RESTLESS).framed();
    let report = play(&guest, &records, &Options::default()).await;
    assert_eq!((report.matched, report.missed.len()), (1, 0));
    assert!((ms(2000)..ms(2300)).contains(&report.waited), "{report:?}");
    // It comes later.
    let guest = Fake::new(&[(ms(0), 1), (ms(6000), 2)], RESTLESS).framed();
    let report = play(&guest, &records, &Options::default()).await;
    assert_eq!((report.matched, report.missed.len()), (1, 0));
    assert!((ms(5000)..ms(5300)).contains(&report.waited), "{report:?}");
    // It never comes: that something moves does not make it match.
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS).framed();
    let report = play(&guest, &records, &Options::default()).await;
    assert_eq!((report.matched, report.missed.len()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn after_the_limit_it_goes_on_and_counts_a_miss() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let records = [
        &[at(1000, Fake::anchor(9))][..],
        &stroke(1000, 30),
        &stroke(3050, 31),
    ]
    .concat();
    let report = play(&guest, &records, &Options::default()).await;
    near(&times(&guest), &[11_000, 11_050, 13_050, 13_100]);
    assert_eq!(report.matched, 0);
    let miss = &report.missed[0];
    assert_eq!(
        (miss.at.micros, miss.differing, miss.tiles),
        (1_000_000, 16, 16)
    );
    assert_eq!(miss.region.width, 64);
    assert!(miss.waited >= ms(10_000));
}

#[tokio::test(start_paused = true)]
async fn a_guest_at_rest_is_not_waited_for() {
    let guest = Fake::new(&[(ms(0), 1)], ms(4000));
    let records = [&[at(1000, Fake::anchor(9))][..], &stroke(1000, 30)].concat();
    let report = play(&guest, &records, &Options::default()).await;
    let waited = report.missed[0].waited;
    assert!((ms(4600)..ms(5200)).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_due_at_once_goes_in_one_call() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let moved = |x| Event::Pointer { x, y: 5 };
    let records = [
        at(100, moved(1)),
        at(
            100,
            Event::Button {
                code: 0x110,
                down: true,
            },
        ),
        at(
            100,
            Event::Button {
                code: 0x110,
                down: false,
            },
        ),
        at(120, moved(2)),
    ];
    play(&guest, &records, &Options::default()).await;
    assert_eq!(*guest.calls.lock().unwrap(), 2);
    let events: Vec<_> = given(&guest).into_iter().map(|(_, event)| event).collect();
    assert_eq!(events, records.map(|record| record.event));
}

#[tokio::test(start_paused = true)]
async fn a_second_piece_goes_on_in_the_same_schedule() {
    let guest = Fake::new(&[(ms(0), 1), (ms(3000), 2)], RESTLESS);
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    let first = [&[at(1000, Fake::anchor(2))][..], &stroke(1000, 30)].concat();
    player.play(&first, |_| ()).await.unwrap();
    // The piece arrives early or late: what counts is the pause between the two.
    tokio::time::sleep(ms(500)).await;
    player.play(&stroke(2050, 31), |_| ()).await.unwrap();
    tokio::time::sleep(ms(10_000)).await;
    player.play(&stroke(2300, 32), |_| ()).await.unwrap();
    near(&times(&guest), &[3000, 3050, 4050, 4100, 14_100, 14_150]);
    assert_eq!(player.position(), GuestTime { micros: 2_350_000 });
    assert_eq!(player.report().interactions, 3);
}

#[tokio::test(start_paused = true)]
async fn it_idles_as_the_source_did_within_a_limit() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    player.play(&stroke(1000, 30), |_| ()).await.unwrap();
    let time = |millis: u64| GuestTime {
        micros: millis * 1000,
    };
    player.idle(time(500), ms(9000)).await;
    near(&[player.report().duration.as_millis() as u64], &[1050]);
    player.idle(time(5000), ms(9000)).await;
    near(&[player.report().duration.as_millis() as u64], &[5000]);
    player.idle(time(60_000), ms(1000)).await;
    near(&[player.report().duration.as_millis() as u64], &[6000]);
    player.play(&stroke(60_500, 31), |_| ()).await.unwrap();
    near(&times(&guest), &[1000, 1050, 6500, 6550]);
}

#[tokio::test(start_paused = true)]
async fn a_gap_releases_what_was_held() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let records = [
        at(100, key(42, true)),
        at(200, key(30, true)),
        at(250, key(30, false)),
        at(300, Event::Gap),
        at(400, key(31, true)),
    ];
    play(&guest, &records, &Options::default()).await;
    let events: Vec<_> = given(&guest).into_iter().map(|(_, event)| event).collect();
    assert_eq!(events[3..], [key(42, false), key(31, true)]);
}

#[tokio::test(start_paused = true)]
async fn a_held_key_is_held_as_long_at_any_speed() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let records = [
        at(1000, key(30, true)),
        at(4000, Fake::anchor(1)),
        at(4000, key(30, false)),
    ];
    let options = Options {
        speed: 4.0,
        ..Options::default()
    };
    play(&guest, &records, &options).await;
    near(&times(&guest), &[250, 3250]);
}

#[tokio::test(start_paused = true)]
async fn it_settles_when_computing_and_drawing_have_ended() {
    let guest = Fake::new(&[(ms(0), 1), (ms(6000), 2)], ms(4000));
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    let report = player.settle().await.unwrap();
    // Quiet and idle at 4.8 s, before the screen changes at 6 s.
    assert!(
        report.came_to_rest && (ms(4700)..ms(5000)).contains(&report.duration),
        "{report:?}"
    );

    let guest = Fake::new(&[(ms(0), 1), (ms(2000), 2)], ms(500));
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    tokio::time::sleep(ms(1500)).await;
    let report = player.settle().await.unwrap();
    assert!(
        report.came_to_rest && (ms(2900)..ms(3200)).contains(&report.duration),
        "{report:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn it_settles_for_the_limit() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let rest = RestOptions {
        limit: ms(7000),
        ..RestOptions::default()
    };
    let options = Options {
        rest,
        ..Options::default()
    };
    let begun = Instant::now();
    let report = Player::new(&guest, &options)
        .unwrap()
        .settle()
        .await
        .unwrap();
    assert!(!report.came_to_rest);
    assert!((ms(7000)..ms(7002)).contains(&begun.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn progress_is_told() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let records = [stroke(700, 30), stroke(5000, 32)].concat();
    let mut told = Vec::new();
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    player
        .play(&records, |progress: &Progress| told.push(*progress))
        .await
        .unwrap();
    let interactions: Vec<_> = told.iter().map(|progress| progress.interactions).collect();
    assert_eq!(interactions, [0, 1, 2]);
    let last = told.last().unwrap();
    assert_eq!(
        (last.played, last.of_recorded, last.of_interactions),
        (ms(5050), ms(5050), 2)
    );
}

#[test]
fn options_that_mean_nothing_are_refused() {
    for speed in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(
            Options {
                speed,
                ..Options::default()
            }
            .check()
            .is_err(),
            "{speed}"
        );
    }
    Options::default().check().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_event_is_given_once_in_order_and_never_early(
        steps in prop::collection::vec((0..3000_u64, 0..4_u8), 1..40),
        changes in prop::collection::vec((0..4000_u64, 0..4_u8), 0..10),
    ) {
        let mut millis = 0;
        let mut records = Vec::new();
        for (step, kind) in steps {
            millis += step;
            records.push(at(millis, match kind {
                0 => Fake::anchor(kind),
                1 => Event::Pointer { x: millis as u16, y: 0 },
                2 => Event::Wheel { vertical: 1, horizontal: 0 },
                _ => key(30, true),
            }));
        }
        let mut from = 0;
        let mut colours = vec![(ms(0), 0)];
        for (step, colour) in changes {
            from += step + 1;
            colours.push((ms(from), colour));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let given = runtime.block_on(async {
            let guest = Fake::new(&colours, RESTLESS);
            let options = Options {
                divergence: None,
                ..Options::default()
            };
            play(&guest, &records, &options).await;
            given(&guest)
        });
        let wanted: Vec<_> =
            records.iter().filter(|record| !matches!(record.event, Event::Anchor(_))).collect();
        prop_assert_eq!(given.len(), wanted.len());
        for ((at, event), record) in given.iter().zip(wanted) {
            prop_assert_eq!(event, &record.event);
            prop_assert!(*at + ms(1) >= Duration::from_micros(record.at.micros));
        }
    }
}
