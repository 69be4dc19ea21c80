//! The line's own accuracy, on real sockets. Upper bounds on time leave room for a busy
//! machine; lower bounds, which are the model's promise, do not.

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

#[track_caller]
fn assert_takes(took: Duration, wanted: Duration) {
    let (took, wanted) = (took.as_secs_f64(), wanted.as_secs_f64());
    assert!(
        took > wanted * 0.98,
        "too fast: {took:.3} s instead of {wanted:.3} s"
    );
    assert!(
        took < wanted * 1.10 + 0.02,
        "too slow: {took:.3} s instead of {wanted:.3} s"
    );
}

#[test]
fn a_megabyte_takes_as_long_as_the_rate_says() {
    let (link, listener) = line(Rate::mbit(10), ms(50));
    let (client, server) = open(&link, &listener);
    let (took, got) = transfer((client, server), |out| fill(out, 1_000_000));
    assert_eq!(
        (got, link.bytes_up(), link.bytes_down()),
        (1_000_000, 1_000_000, 0)
    );
    assert_takes(took, ms(800 + 50));
}

#[test]
fn small_writes_are_as_fast_as_large_ones() {
    let (link, listener) = line(Rate::mbit(10), ms(100));
    let (client, server) = open(&link, &listener);
    let (took, got) = transfer((server, client), |out| {
        for _ in 0..5_000 {
            out.write_all(&[1; 100]).unwrap();
        }
    });
    assert_eq!((got, link.bytes_down()), (500_000, 500_000));
    assert_takes(took, ms(400 + 100));
}

#[test]
fn the_ways_do_not_share_their_rate() {
    let (link, listener) = line(Rate::mbit(10), ms(10));
    let (client, server) = open(&link, &listener);
    let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let send = |out: &mut TcpStream| out.write_all(&vec![1; 500_000]).unwrap();
    let up = thread::spawn(move || transfer((client, server), send));
    let (down, _) = transfer(back, send);
    assert_takes(down, ms(410));
    assert_takes(up.join().unwrap().0, ms(410));
}

#[test]
fn connections_share_the_line() {
    let (link, listener) = line(Rate::mbit(10), ms(10));
    let pairs: Vec<_> = (0..4).map(|_| open(&link, &listener)).collect();
    let start = Instant::now();
    thread::scope(|scope| {
        for pair in pairs {
            scope.spawn(|| transfer(pair, |out| fill(out, 125_000)));
        }
    });
    assert_takes(start.elapsed(), ms(410));
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
    let mut trips: Vec<Duration> = (0..7)
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
    assert!(trips[3] < ms(108), "{trips:?}");
}

#[test]
fn opening_a_connection_takes_three_delays() {
    let (link, listener) = line(Rate::mbit(10), ms(40));
    let start = Instant::now();
    let mut client = TcpStream::connect(link.addr()).unwrap();
    client.write_all(&[1]).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.read_exact(&mut [0]).unwrap();
    assert_takes(start.elapsed(), ms(120));
    // The target's first word comes a fourth later.
    server.write_all(&[2]).unwrap();
    client.read_exact(&mut [0]).unwrap();
    assert_takes(start.elapsed(), ms(160));
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
    let (link, listener) = line(Rate::mbit(10), ms(20));
    let (client, server) = open(&link, &listener);
    let start = Instant::now();
    let moving = thread::spawn(move || transfer((client, server), |out| fill(out, 500_000)));
    thread::sleep(ms(150));
    link.stall();
    let stalled = Instant::now();
    thread::sleep(ms(50)); // what was just being handed out
    let at_stall = link.bytes_up();
    assert!((50_000..400_000).contains(&at_stall), "{at_stall}");
    thread::sleep(ms(250));
    assert_eq!(link.bytes_up(), at_stall);
    link.mend();
    let stood = stalled.elapsed();
    let (_, got) = moving.join().unwrap();
    assert_eq!(got, 500_000);
    assert_takes(start.elapsed(), ms(420) + stood);
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
