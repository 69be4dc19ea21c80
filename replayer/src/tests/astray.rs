//! Misses, and a replay that goes another way for good.

use super::*;
use crate::{DivergenceOptions, Why};

/// Anchors of these colours, four seconds apart, a key after each.
fn anchored(colours: &[u8]) -> Vec<Record> {
    let each = (1..).zip(colours);
    each.flat_map(|(nth, colour)| {
        let millis = nth * 4000;
        let [down, up] = stroke(millis, 30 + nth as u16);
        [at(millis, Fake::anchor(*colour)), down, up]
    })
    .collect()
}

#[tokio::test(start_paused = true)]
async fn a_screen_that_stays_another_stops_it_before_the_next_key() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let mut player = Player::new(&guest, &Options::default()).unwrap();
    let records = anchored(&[1, 9, 9, 9, 9, 1, 1]);
    let mut told = Vec::new();
    player
        .play(&records, |progress: &Progress| told.push(progress.missed))
        .await
        .unwrap();
    let report = player.report();
    let diverged = report.diverged.unwrap();
    assert_eq!(diverged.at.micros, 20_000_000);
    let why = Why::Screen {
        anchors: 4,
        tiles: 64,
        differing: 64,
    };
    assert_eq!(diverged.why, why);
    assert_eq!(
        diverged.to_string(),
        "at 20.0 s of the recording, the screen was another: in 4 anchors in a row 64 of 64 \
         tiles differed"
    );
    assert_eq!(
        (report.interactions, report.skipped, report.events),
        (4, 3, 8)
    );
    assert_eq!((report.matched, report.missed.len()), (1, 4));
    assert_eq!(*told.last().unwrap(), 4);

    // Nothing more is played, and nobody waits.
    let position = player.position();
    player.play(&anchored(&[1, 1]), |_| ()).await.unwrap();
    player
        .idle(GuestTime { micros: 90_000_000 }, ms(90_000))
        .await;
    let after = player.report();
    assert_eq!((after.skipped, after.events), (5, 8));
    assert_eq!(
        (after.duration, player.position()),
        (report.duration, position)
    );
    assert_eq!(given(&guest).len(), 8);
    assert!(player.settle().await.unwrap().came_to_rest);
}

#[tokio::test(start_paused = true)]
async fn what_is_held_is_released_when_it_stops() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let mut records = vec![at(1000, key(42, true))];
    records.extend(anchored(&[9, 9, 9, 9, 9]));
    let report = play(&guest, &records, &Options::default()).await;
    assert!(report.diverged.is_some());
    let events: Vec<_> = given(&guest).into_iter().map(|(_, event)| event).collect();
    assert_eq!(*events.last().unwrap(), key(42, false));
    assert_eq!(events.len(), 1 + 2 * 3 + 1);
}

#[tokio::test(start_paused = true)]
async fn misses_between_matches_do_not_stop_it() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let report = play(
        &guest,
        &anchored(&[9, 9, 9, 1, 9, 9, 9, 1]),
        &Options::default(),
    )
    .await;
    assert_eq!((report.diverged, report.skipped), (None, 0));
    assert_eq!((report.matched, report.missed.len()), (2, 6));
}

#[tokio::test(start_paused = true)]
async fn it_is_told_to_stop_never_or_sooner() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let options = Options {
        divergence: None,
        ..Options::default()
    };
    let report = play(&guest, &anchored(&[9; 12]), &options).await;
    assert_eq!((report.diverged, report.missed.len()), (None, 12));

    let options = Options {
        divergence: Some(DivergenceOptions {
            misses: 2,
            ..DivergenceOptions::default()
        }),
        ..Options::default()
    };
    let report = play(&guest, &anchored(&[9; 12]), &options).await;
    assert_eq!(report.diverged.unwrap().why, Why::Misses { anchors: 2 });
}

#[tokio::test(start_paused = true)]
async fn the_pictures_of_the_first_misses_are_kept_and_never_told() {
    let guest = Fake::new(&[(ms(0), 77)], ms(0));
    let options = Options {
        pictures: 2,
        ..Options::default()
    };
    let report = play(&guest, &anchored(&[9, 9, 9]), &options).await;
    let kept: Vec<_> = report
        .missed
        .iter()
        .map(|miss| miss.pictures.is_some())
        .collect();
    assert_eq!(kept, [true, true, false]);
    let pictures = report.missed[0].pictures.as_ref().unwrap();
    assert_eq!((pictures.seen.width, pictures.seen.height), (64, 64));
    assert!(pictures.seen.rgb.iter().all(|value| *value == 77));
    assert_ne!(pictures.seen, pictures.expected);
    let miss = &report.missed[0];
    assert!(miss.looks > 10, "{miss:?}");
    assert!(!format!("{report:?}").contains("77"));
}
