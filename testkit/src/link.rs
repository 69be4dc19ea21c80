//! A thin line, for tests and demonstrations: a TCP proxy that lets bytes through as slowly
//! and as late as a long-distance line does.
//!
//! Modelled, per direction: a **rate** all connections share, by a virtual clock that books
//! every chunk its time on the line; a **propagation delay**, by a queue of chunks stamped
//! with their arrival, so that a delay costs time once and never throughput; a **router's
//! buffer** before the line, which fills and then holds the sender back; the three delays
//! that opening a TCP connection takes before its first byte arrives. The line can be
//! stalled, cut and mended, and damage a byte.
//!
//! Not modelled: loss and retransmission, TCP's slow start, header overhead (the rate is that
//! of the payload), jitter. Two things differ for the client: its `connect` succeeds at once,
//! even if nobody listens behind the line (it is reset instead of refused), and bytes it
//! has written may wait in this host's socket buffers, as they would in its own.
//!
//! A link runs on a thread of its own, so that what is tested can't make it late, and works
//! in tests with and without a runtime.

mod line;
mod units;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use line::{Direction, Line, LineTime};
pub use units::{ParseUnitError, Rate, parse_delay};

/// What a line is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkProfile {
    /// From the client to the target.
    pub up: Rate,
    /// From the target to the client.
    pub down: Rate,
    /// Propagation delay, each way.
    pub delay: Duration,
    /// Bytes that wait for the line in each direction before the sender is held back.
    pub buffer: usize,
}

impl LinkProfile {
    /// The same rate both ways, and a buffer of 100 ms, as routers have: 64 KiB at least.
    pub fn symmetric(rate: Rate, delay: Duration) -> Self {
        let buffer = (rate.bytes_in(Duration::from_millis(100)) as usize).max(64 << 10);
        Self {
            up: rate,
            down: rate,
            delay,
            buffer,
        }
    }
}

/// A running line. Dropping it cuts all connections and closes the port.
#[derive(Debug)]
pub struct Link {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    profile: LinkProfile,
    line: watch::Sender<Line>,
    up: Direction,
    down: Direction,
}

impl Link {
    /// A line to `target` behind a free port of the loopback interface.
    pub fn start(target: SocketAddr, profile: LinkProfile) -> io::Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), target, profile)
    }

    /// A line to `target` behind the port `listen`.
    pub fn start_on(
        listen: SocketAddr,
        target: SocketAddr,
        profile: LinkProfile,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let listener = {
            let _inside = runtime.enter();
            let socket = socket_for(listen)?;
            socket.set_reuseaddr(true)?;
            socket.bind(listen)?;
            socket.listen(1024)?
        };
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            profile,
            line: watch::Sender::new(Line::new()),
            up: Direction::new(profile.up, profile.buffer),
            down: Direction::new(profile.down, profile.buffer),
        });
        let (stop, stopped) = oneshot::channel();
        let serving = serve(listener, shared.clone(), stopped);
        let thread = std::thread::Builder::new()
            .name("thin-link".to_owned())
            .spawn(move || runtime.block_on(serving))?;
        Ok(Self {
            addr,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where to connect to instead of the target.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Payload that has arrived at the target, in bytes, over all connections.
    pub fn bytes_up(&self) -> u64 {
        self.shared.up.delivered.load(Ordering::SeqCst)
    }

    /// Payload that has arrived at clients, in bytes, over all connections.
    pub fn bytes_down(&self) -> u64 {
        self.shared.down.delivered.load(Ordering::SeqCst)
    }

    /// Resets all connections, and every new one, until [`mend`](Self::mend).
    pub fn cut(&self) {
        self.shared.line.send_modify(Line::cut);
    }

    /// Changes a bit of what arrives at the target next.
    pub fn damage_up(&self) {
        self.shared.up.damage();
    }

    /// Changes a bit of what arrives at a client next.
    pub fn damage_down(&self) {
        self.shared.down.damage();
    }

    /// Lets nothing through, without a word to either end, until [`mend`](Self::mend). Time
    /// stands still on the line: what was under way goes on from where it was.
    pub fn stall(&self) {
        self.shared.line.send_modify(Line::stall);
    }

    /// The line works again. Connections that were cut stay dead.
    pub fn mend(&self) {
        self.shared.line.send_modify(Line::mend);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cut();
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// Small kernel buffers: what waits, waits in the modelled ones.
fn socket_for(addr: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_recv_buffer_size(128 << 10)?;
    socket.set_send_buffer_size(128 << 10)?;
    Ok(socket)
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    connections.spawn(carry(client, shared.clone()));
                }
                // Out of descriptors: a connection must end first, or time must pass.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
        }
    }
    drop(listener);
    // They have been cut, and say so to both their ends.
    while connections.join_next().await.is_some() {}
}

/// Carries one connection to its end; an end that isn't orderly resets both sides.
async fn carry(mut client: TcpStream, shared: Arc<Shared>) {
    let mut line = shared.line.subscribe();
    let cuts = line.borrow().cuts();
    let down = line.borrow().is_cut();
    let mut target = None;
    let end = if down {
        Err(io::ErrorKind::ConnectionReset.into())
    } else {
        tokio::select! {
            end = pump(&mut client, &mut target, &shared) => end,
            _ = line.wait_for(|line| line.cuts() != cuts) => {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
    };
    if end.is_err() {
        for stream in [Some(client), target].into_iter().flatten() {
            let _ = set_socket_linger(&stream, Some(Duration::ZERO));
        }
    }
}

async fn pump(
    client: &mut TcpStream,
    target: &mut Option<TcpStream>,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    let delay = shared.profile.delay;
    let mut line = shared.line.subscribe();
    let opened = line.borrow().now();
    // SYN and SYN-ACK, after which the client may speak; its first segment opens the
    // connection at the target.
    line::reach(&mut line, opened + 2 * delay).await;
    let (from_client, to_client) = client.split();
    let (up, up_out) = channel(shared, &shared.up);
    let (down, down_out) = channel(shared, &shared.down);
    let dial = async {
        line::reach(&mut line, opened + 3 * delay).await;
        let socket = socket_for(shared.target)?;
        let target = target.insert(socket.connect(shared.target).await?);
        target.set_nodelay(true)?;
        let (from_target, to_target) = target.split();
        tokio::try_join!(
            take_in(from_target, shared, &shared.down, down),
            hand_out(to_target, shared, &shared.up, up_out),
        )
    };
    tokio::try_join!(
        take_in(from_client, shared, &shared.up, up),
        hand_out(to_client, shared, &shared.down, down_out),
        dial,
    )?;
    Ok(())
}

/// What is on its way, and when it arrives.
struct Parcel {
    due: LineTime,
    what: What,
    /// Its place in the queue.
    _room: OwnedSemaphorePermit,
}

enum What {
    Bytes(Vec<u8>),
    End,
    Reset,
}

struct Intake {
    parcels: mpsc::UnboundedSender<Parcel>,
    /// Bounds what is under way when the receiver doesn't take it.
    room: Arc<Semaphore>,
}

fn channel(shared: &Shared, way: &Direction) -> (Intake, mpsc::UnboundedReceiver<Parcel>) {
    let under_way = way.rate.bytes_in(shared.profile.delay) as usize;
    let room = (shared.profile.buffer + under_way + 4 * way.chunk()).min(u32::MAX as usize / 2);
    let (parcels, out) = mpsc::unbounded_channel();
    (
        Intake {
            parcels,
            room: Arc::new(Semaphore::new(room)),
        },
        out,
    )
}

/// Takes bytes from a sender as the router's buffer has room, and books their time.
async fn take_in(
    mut from: ReadHalf<'_>,
    shared: &Shared,
    way: &Direction,
    intake: Intake,
) -> io::Result<()> {
    let mut line = shared.line.subscribe();
    let chunk = way.chunk();
    loop {
        line::reach(&mut line, way.room_at()).await;
        let room = intake.room.clone().acquire_many_owned(chunk as u32).await;
        let mut room = room.map_err(io::Error::other)?;
        let mut bytes = vec![0; chunk];
        let (len, what) = match from.read(&mut bytes).await {
            Ok(0) => (0, What::End),
            Ok(len) => {
                bytes.truncate(len);
                (len, What::Bytes(bytes))
            }
            Err(_) => (0, What::Reset),
        };
        drop(room.split(chunk - len));
        let due = way.book(len, line.borrow().now()) + shared.profile.delay;
        let last = len == 0;
        // The other end hangs up only when the whole connection does.
        let _ = intake.parcels.send(Parcel {
            due,
            what,
            _room: room,
        });
        if last {
            return Ok(());
        }
    }
}

/// Gives a receiver what has arrived.
async fn hand_out(
    mut to: WriteHalf<'_>,
    shared: &Shared,
    way: &Direction,
    mut parcels: mpsc::UnboundedReceiver<Parcel>,
) -> io::Result<()> {
    let mut line = shared.line.subscribe();
    while let Some(parcel) = parcels.recv().await {
        line::reach(&mut line, parcel.due).await;
        match parcel.what {
            What::Bytes(mut bytes) => {
                way.pass(&mut bytes);
                // Before the receiver can have them: whoever compares after reading finds all.
                way.delivered
                    .fetch_add(bytes.len() as u64, Ordering::SeqCst);
                to.write_all(&bytes).await?;
            }
            What::End => return to.shutdown().await,
            What::Reset => return Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
