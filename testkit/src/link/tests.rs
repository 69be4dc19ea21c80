//! The line's own accuracy, on real sockets.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use super::*;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A line with a listener behind it.
fn line(rate: Rate, delay: Duration) -> (Link, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    (
        Link::start(target, LinkProfile::symmetric(rate, delay)).unwrap(),
        listener,
    )
}

/// Both ends of an open connection over the line.
fn open(link: &Link, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(link.addr()).unwrap();
    client.set_nodelay(true).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_nodelay(true).unwrap();
    for stream in [&client, &server] {
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
    }
    (client, server)
}

/// How long it takes until all that `write` sends has arrived.
fn transfer(
    (mut from, mut to): (TcpStream, TcpStream),
    write: impl FnOnce(&mut TcpStream) + Send + 'static,
) -> (Duration, usize) {
    let start = Instant::now();
    let writer = thread::spawn(move || {
        write(&mut from);
        from.shutdown(Shutdown::Write).unwrap();
        from
    });
    let got = io::copy(&mut to, &mut io::sink()).unwrap();
    let took = start.elapsed();
    drop(writer.join().unwrap());
    (took, got as usize)
}

fn fill(out: &mut TcpStream, bytes: usize) {
    out.write_all(&vec![1; bytes]).unwrap();
}

/// Every attempt must take as long as the model says; one of a few must take no longer. A
/// busy machine makes anything late, but nothing makes it early.
#[track_caller]
fn assert_takes(wanted: Duration, mut attempt: impl FnMut() -> Duration) {
    let mut all = Vec::new();
    for _ in 0..6 {
        let took = attempt();
        assert!(
            took > wanted.mul_f64(0.98),
            "too fast: {took:?} instead of {wanted:?}"
        );
        if took < wanted.mul_f64(1.05) + ms(5) {
            return;
        }
        all.push(took);
    }
    panic!("too slow: {all:?} instead of {wanted:?}");
}

#[test]
fn a_megabyte_takes_as_long_as_the_rate_says() {
    let (link, listener) = line(Rate::mbit(10), ms(50));
    let mut sent = 0;
    assert_takes(ms(800 + 50), || {
        let (took, got) = transfer(open(&link, &listener), |out| fill(out, 1_000_000));
        sent += 1_000_000;
        assert_eq!(got, 1_000_000);
        assert_eq!((link.bytes_up(), link.bytes_down()), (sent, 0));
        took
    });
}

#[test]
fn small_writes_are_as_fast_as_large_ones() {
    let (link, listener) = line(Rate::mbit(10), ms(100));
    assert_takes(ms(400 + 100), || {
        let (client, server) = open(&link, &listener);
        let (took, got) = transfer((server, client), |out| {
            for _ in 0..5_000 {
                out.write_all(&[1; 100]).unwrap();
            }
        });
        assert_eq!(got, 500_000);
        took
    });
    assert_eq!((link.bytes_up(), link.bytes_down() % 500_000), (0, 0));
}

#[test]
fn the_ways_do_not_share_their_rate() {
    let (link, listener) = line(Rate::mbit(10), ms(10));
    assert_takes(ms(410), || {
        let (client, server) = open(&link, &listener);
        let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
        let send = |out: &mut TcpStream| fill(out, 500_000);
        let up = thread::spawn(move || transfer((client, server), send));
        let (down, _) = transfer(back, send);
        down.max(up.join().unwrap().0)
    });
}

#[test]
fn connections_share_the_line() {
    let (link, listener) = line(Rate::mbit(10), ms(10));
    assert_takes(ms(410), || {
        let pairs: Vec<_> = (0..4).map(|_| open(&link, &listener)).collect();
        let start = Instant::now();
        thread::scope(|scope| {
            for pair in pairs {
                scope.spawn(|| transfer(pair, |out| fill(out, 125_000)));
            }
        });
        start.elapsed()
    });
}

#[test]
fn a_round_trip_takes_two_delays() {
    let (link, listener) = line(Rate::mbit(10), ms(50));
    let (mut client, mut server) = open(&link, &listener);
    let echo = thread::spawn(move || {
        let mut byte = [0];
        while server.read(&mut byte).unwrap() == 1 {
            server.write_all(&byte).unwrap();
        }
    });
    let mut trips: Vec<Duration> = (0..20)
        .map(|_| {
            let start = Instant::now();
            client.write_all(&[1]).unwrap();
            client.read_exact(&mut [0]).unwrap();
            start.elapsed()
        })
        .collect();
    client.shutdown(Shutdown::Write).unwrap();
    echo.join().unwrap();
    trips.sort();
    assert!(trips[0] >= ms(100), "{trips:?}");
    assert!(trips[1] < ms(107), "{trips:?}");
}

#[test]
fn opening_a_connection_takes_three_delays() {
    let (link, listener) = line(Rate::mbit(10), ms(40));
    assert_takes(ms(120), || {
        let start = Instant::now();
        let mut client = TcpStream::connect(link.addr()).unwrap();
        client.write_all(&[1]).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.read_exact(&mut [0]).unwrap();
        start.elapsed()
    });
    // The target's first word comes a fourth later.
    assert_takes(ms(160), || {
        let start = Instant::now();
        let mut client = TcpStream::connect(link.addr()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(&[2]).unwrap();
        client.read_exact(&mut [0]).unwrap();
        start.elapsed()
    });
}

#[test]
fn a_full_buffer_holds_the_sender_back() {
    let (link, listener) = line(Rate::bits_per_second(80_000), ms(0));
    let (mut client, _server) = open(&link, &listener);
    client.set_write_timeout(Some(ms(500))).unwrap();
    let mut written = 0;
    while let Ok(bytes) = client.write(&vec![1; 65_536]) {
        written += bytes;
        assert!(written < 32 << 20, "swallows everything");
    }
    assert!(link.bytes_up() < 40_000, "{}", link.bytes_up());
}

#[test]
fn a_stalled_line_goes_on_where_it_was() {
    let (link, listener) = line(Rate::mbit(4), ms(20));
    let (client, server) = open(&link, &listener);
    let start = Instant::now();
    let moving = thread::spawn(move || transfer((client, server), |out| fill(out, 500_000)));
    while link.bytes_up() < 50_000 {
        thread::yield_now();
    }
    link.stall();
    let stalled = Instant::now();
    thread::sleep(ms(50)); // what was just being handed out
    let at_stall = link.bytes_up();
    thread::sleep(ms(250));
    assert_eq!(link.bytes_up(), at_stall);
    assert!(at_stall < 500_000, "all was through before the stall");
    let stood = stalled.elapsed();
    link.mend();
    let (_, got) = moving.join().unwrap();
    assert_eq!(got, 500_000);
    // No burst after the stall makes up for it.
    assert!(start.elapsed() > ms(1020) + stood, "{:?}", start.elapsed());
}

#[test]
fn a_cut_line_resets_until_it_is_mended() {
    let (link, listener) = line(Rate::mbit(10), ms(1));
    let (mut client, mut server) = open(&link, &listener);
    client.write_all(&[1]).unwrap();
    server.read_exact(&mut [0]).unwrap();
    link.cut();
    for stream in [&mut client, &mut server] {
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    let mut refused = TcpStream::connect(link.addr()).unwrap();
    assert!(matches!(refused.read(&mut [0]), Err(_) | Ok(0)));
    link.mend();
    let (mut client, mut server) = open(&link, &listener);
    client.write_all(&[1]).unwrap();
    server.read_exact(&mut [0]).unwrap();
}

#[test]
fn nobody_behind_the_line_is_a_reset() {
    let (link, listener) = line(Rate::mbit(10), ms(1));
    drop(listener);
    let mut client = TcpStream::connect(link.addr()).unwrap();
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn dropping_the_link_frees_the_port() {
    let (link, listener) = line(Rate::mbit(10), ms(1));
    let addr = link.addr();
    let (mut client, _server) = open(&link, &listener);
    drop(link);
    assert!(client.read(&mut [0]).is_err());
    let error = TcpStream::connect(addr).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn damage_changes_one_bit_one_way_and_once() {
    let (link, listener) = line(Rate::mbit(100), ms(1));
    let (mut client, mut server) = open(&link, &listener);
    let sent = vec![0x55; 3000];
    let through = |from: &mut TcpStream, to: &mut TcpStream| {
        from.write_all(&sent).unwrap();
        let mut got = vec![0; sent.len()];
        to.read_exact(&mut got).unwrap();
        got.iter()
            .zip(&sent)
            .map(|(a, b)| (a ^ b).count_ones())
            .sum::<u32>()
    };
    link.damage_up();
    assert_eq!(through(&mut server, &mut client), 0);
    assert_eq!(through(&mut client, &mut server), 1);
    assert_eq!(through(&mut client, &mut server), 0);
    link.damage_down();
    assert_eq!(through(&mut client, &mut server), 0);
    assert_eq!(through(&mut server, &mut client), 1);
}
