//! Conversations over real sockets, behind a line that is cut.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_bytes::ByteBuf;
use tempfile::TempDir;
use testkit::link::{Link, LinkProfile, Rate};
use tokio::time::timeout;

use super::calls::CallError;
use super::pump::Record;
use super::*;
use crate::identity::Identity;
use crate::peers::{Peer, PeerAddr, PeerStore};
use crate::transport::{Connection, Listener, connect_counted};

const SOON: Duration = Duration::from_secs(20);
const PATIENT: Duration = Duration::from_secs(60);

/// A called end that lets two callers in, behind a line.
struct World {
    _dir: TempDir,
    called: Arc<Identity>,
    callers: [Arc<Identity>; 2],
    link: Link,
    conversations: Conversations,
    begun: tokio::sync::mpsc::UnboundedReceiver<Lasting>,
    listening: tokio::task::JoinHandle<()>,
}

impl World {
    async fn new(profile: LinkProfile) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let called = Arc::new(Identity::load_or_create(&dir.path().join("keys")).unwrap());
        let callers = [(); 2].map(|()| Arc::new(Identity::ephemeral().unwrap()));
        let peers = PeerStore::new(dir.path());
        for (name, caller) in ["one", "two"].iter().zip(&callers) {
            let addr = "127.0.0.1:1".parse().unwrap();
            let peer = Peer::new(name.parse().unwrap(), addr, caller.key());
            peers.trust(peer, None).unwrap();
        }
        let mut listener = Listener::bind("127.0.0.1:0", &called, peers).await.unwrap();
        let link = Link::start(listener.local_addr(), profile).unwrap();
        let conversations = Conversations::default();
        let (tell, begun) = tokio::sync::mpsc::unbounded_channel();
        let known = conversations.clone();
        let listening = tokio::spawn(async move {
            loop {
                let connection = listener.accept().await.connection;
                let (known, tell) = (known.clone(), tell.clone());
                tokio::spawn(async move {
                    if let Some(lasting) = known.admit(connection).await {
                        let _ = tell.send(lasting);
                    }
                });
            }
        });
        Self {
            _dir: dir,
            called,
            callers,
            link,
            conversations,
            begun,
            listening,
        }
    }

    fn dial(&self, caller: usize) -> Dial {
        let addr: PeerAddr = self.link.addr().to_string().parse().unwrap();
        let (caller, key) = (self.callers[caller].clone(), self.called.key());
        Box::new(move |traffic| {
            let (caller, addr) = (caller.clone(), addr.clone());
            Box::pin(async move {
                let called = connect_counted(&addr, &caller, &key, SOON, traffic).await;
                called.map_err(CallError::from)
            })
        })
    }

    async fn raw(&self, caller: usize) -> Connection {
        self.dial(caller)(Traffic::default()).await.unwrap()
    }

    async fn pair(&mut self) -> (Lasting, Lasting) {
        let name = crate::vm::Id::random().unwrap().0;
        let caller = Lasting::call(self.dial(0), name, PATIENT, Traffic::default())
            .await
            .unwrap();
        let called = self.begun.recv().await.unwrap();
        (caller, called)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

fn line() -> LinkProfile {
    LinkProfile::symmetric(Rate::mbit(50), Duration::from_millis(10))
}

/// What does not compress, and differs from message to message.
fn message(number: u64) -> ByteBuf {
    let mut bytes = vec![0; 1 + (number as usize * 7919) % 60_000];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    ByteBuf::from(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_arrives_once_and_in_order_however_often_the_line_is_cut() {
    const MESSAGES: u64 = 300;
    let mut world = World::new(line()).await;
    let (mut caller, mut called) = world.pair().await;
    called.set_patience(PATIENT);
    let payload: u64 = (0..MESSAGES)
        .map(|number| message(number).len() as u64)
        .sum();
    let arrived = Arc::new(AtomicU64::new(0));
    let count = arrived.clone();
    let listening = tokio::spawn(async move {
        for number in 0..MESSAGES {
            let heard: ByteBuf = called.recv().await.unwrap();
            assert!(heard == message(number), "message {number}");
            count.store(number + 1, Ordering::SeqCst);
            // Something goes the other way, too.
            called.send(&number).await.unwrap();
        }
        called.close().await.unwrap();
    });
    let cutting = async {
        for part in 1..=5 {
            while arrived.load(Ordering::SeqCst) < part * MESSAGES / 6 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            world.link.cut();
            world.link.mend();
        }
    };
    let talking = async {
        for number in 0..MESSAGES {
            caller.send(&message(number)).await.unwrap();
        }
        for number in 0..MESSAGES {
            assert_eq!(caller.recv::<u64>().await.unwrap(), number);
        }
        let end = caller.recv::<u64>().await.unwrap_err();
        assert!(matches!(end, WireError::Closed), "{end:?}");
    };
    let all = timeout(PATIENT, async { tokio::join!(cutting, talking) });
    all.await.unwrap();
    listening.await.unwrap();
    // What reached the other end is not sent again: handshakes, and one record at each cut.
    let more = world.link.bytes_up() - payload;
    let few = payload / 100 + 5 * (8192 + (16 << 10));
    assert!(more < few, "{more} more bytes than {payload} arrived");
    assert!(caller.handle().resent() > 0, "no cut cost anything");
}

#[tokio::test]
async fn a_line_without_patience_ends_with_its_connection() {
    let mut world = World::new(line()).await;
    let (mut caller, mut called) = world.pair().await;
    caller.set_patience(Duration::ZERO);
    world.link.cut();
    for end in [&mut caller, &mut called] {
        let error = timeout(SOON, end.recv::<()>()).await.unwrap().unwrap_err();
        assert!(matches!(error, WireError::Cut), "{error:?}");
    }
}

#[tokio::test]
async fn a_line_that_does_not_come_back_is_given_up() {
    let mut world = World::new(line()).await;
    let (mut caller, mut called) = world.pair().await;
    for end in [&mut caller, &mut called] {
        end.set_patience(Duration::from_millis(600));
    }
    world.link.cut();
    for end in [&mut caller, &mut called] {
        let error = timeout(SOON, end.recv::<()>()).await.unwrap().unwrap_err();
        assert!(matches!(error, WireError::Lost { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn who_hangs_up_is_not_waited_for() {
    let mut world = World::new(line()).await;
    let (caller, mut called) = world.pair().await;
    called.set_patience(PATIENT);
    let handle = caller.handle();
    drop(caller);
    handle.ended().await;
    let error = timeout(SOON, called.recv::<()>())
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, WireError::HungUp), "{error:?}");
}

#[tokio::test]
async fn what_the_other_end_has_lost_is_not_waited_for() {
    let mut world = World::new(line()).await;
    let (mut caller, called) = world.pair().await;
    world.link.cut();
    // As when its process died.
    called.abandon();
    world.link.mend();
    let error = timeout(SOON, caller.recv::<()>())
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, WireError::Forgotten), "{error:?}");
}

#[tokio::test]
async fn only_who_began_goes_on() {
    let mut world = World::new(line()).await;
    let name = [7; 16];
    let _caller = Lasting::call(world.dial(0), name, PATIENT, Traffic::default())
        .await
        .unwrap();
    let mut called = world.begun.recv().await.unwrap();
    called.set_patience(PATIENT);
    let (mut sender, mut receiver) = world.raw(1).await.split();
    sender
        .send(&Record::Resume { name, received: 0 })
        .await
        .unwrap();
    sender.flush().await.unwrap();
    let answer = receiver.recv_borrowed::<Record<'_>>().await.unwrap();
    assert!(matches!(answer, Record::Unknown), "{answer:?}");
    // Nor may a name be taken twice.
    let (mut sender, mut receiver) = world.raw(0).await.split();
    sender.send(&Record::Begin { name }).await.unwrap();
    sender.flush().await.unwrap();
    assert!(receiver.recv_borrowed::<Record<'_>>().await.is_err());
    assert!(!called.handle().is_down());
}

#[tokio::test]
async fn who_says_that_more_arrived_than_was_sent_is_hung_up_on() {
    let mut world = World::new(line()).await;
    for lie in [
        Record::Ack(1),
        Record::Resumed { received: 0 },
        Record::Begin { name: [1; 16] },
    ] {
        let name = crate::vm::Id::random().unwrap().0;
        let (mut sender, _receiver) = world.raw(0).await.split();
        sender.send(&Record::Begin { name }).await.unwrap();
        sender.send(&lie).await.unwrap();
        sender.flush().await.unwrap();
        let mut called = world.begun.recv().await.unwrap();
        called.set_patience(PATIENT);
        let error = timeout(SOON, called.recv::<()>())
            .await
            .unwrap()
            .unwrap_err();
        assert!(!error.is_disconnect(), "{lie:?}: {error:?}");
    }
}

#[tokio::test]
async fn who_does_not_read_holds_the_other_back() {
    let mut world = World::new(LinkProfile::symmetric(Rate::mbit(1000), Duration::ZERO)).await;
    let (mut caller, mut called) = world.pair().await;
    let block = ByteBuf::from(vec![1; 1 << 20]);
    let mut sent = 0_usize;
    while timeout(Duration::from_millis(500), caller.send(&block))
        .await
        .is_ok()
    {
        sent += 1;
        assert!(sent < 64, "nobody is held back");
    }
    assert!(called.handle.0.state().inbox.len() <= INBOX + (1 << 20));
    assert!(caller.handle.0.state().out.len() <= WINDOW);
    for _ in 0..sent {
        let heard: ByteBuf = timeout(SOON, called.recv()).await.unwrap().unwrap();
        assert_eq!(heard.len(), block.len());
    }
    drop(world.conversations.clone());
}
