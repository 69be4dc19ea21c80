//! A replay that follows its source.

use super::*;
use crate::{Pace, QuickOptions};

/// Two seconds behind a source that was at a minute.
fn following() -> Options {
    Options {
        pace: Pace::Follow(QuickOptions::default()),
        start: GuestTime { micros: 58_000_000 },
        ..Options::default()
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_in_time_is_given_as_recorded() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let mut player = Player::new(&guest, &following()).unwrap();
    for piece in [stroke(61_000, 30), stroke(67_000, 31)] {
        player.play(&piece, |_| ()).await.unwrap();
    }
    near(&times(&guest), &[3000, 3050, 9000, 9050]);
}

#[tokio::test(start_paused = true)]
async fn a_piece_that_came_late_does_not_put_off_the_rest_and_none_comes_early() {
    let guest = Fake::new(&[(ms(0), 1)], ms(0));
    let mut player = Player::new(&guest, &following()).unwrap();
    player.play(&stroke(61_000, 30), |_| ()).await.unwrap();
    // The line was cut for half a minute.
    tokio::time::sleep(ms(27_000)).await;
    let missed = [
        stroke(64_000, 31),
        stroke(74_000, 32),
        stroke(84_000, 33),
        stroke(94_000, 34),
    ];
    player.play(&missed.concat(), |_| ()).await.unwrap();
    let times = times(&guest);
    // At once, then as soon as the guest has rested, and at last in time again.
    near(&times[..4], &[3000, 3050, 30_050, 30_100]);
    assert!(times[4] < 32_000 && times[6] < 34_000, "{times:?}");
    near(&times[8..], &[36_000, 36_050]);
}

#[tokio::test(start_paused = true)]
async fn it_idles_until_it_is_as_old_as_its_source_though_a_screen_kept_it_waiting() {
    let guest = Fake::new(&[(ms(0), 1)], RESTLESS);
    let mut player = Player::new(&guest, &following()).unwrap();
    let missed = [&[at(60_000, Fake::anchor(9))][..], &stroke(60_000, 30)].concat();
    player.play(&missed, |_| ()).await.unwrap();
    assert_eq!(player.report().missed.len(), 1);
    let late = times(&guest)[0];
    assert!(late >= 12_000, "{late}");
    let until = GuestTime { micros: 75_000_000 };
    player.idle(until, ms(60_000)).await;
    assert_eq!(player.report().duration, ms(17_000));
}
