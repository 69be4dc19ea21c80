//! An agent and those who call it, on real sockets.

use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::identity::Identity;
use crate::peers::{Peer, PeerAddr, Permissions};
use crate::protocol::{Hello, Purpose, ToSource, ToTarget};
use crate::transport::{CallError, Dial, Lasting, Traffic, WireError, connect_counted};
use crate::vm::Id;

const SOON: Duration = Duration::from_secs(20);

struct Running {
    _dir: TempDir,
    store: Store,
    addr: PeerAddr,
    caller: Arc<Identity>,
    agent: JoinHandle<Result<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.agent.abort();
    }
}

/// An agent that trusts one caller with this.
async fn running(may: &str) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let caller = Arc::new(Identity::ephemeral().unwrap());
    trust(&store, &caller, may);
    let agent = Agent::bind(&store, "127.0.0.1:0").await.unwrap();
    let addr = agent.local_addr().to_string().parse().unwrap();
    let agent = tokio::spawn(agent.run(std::future::pending()));
    Running {
        _dir: dir,
        store,
        addr,
        caller,
        agent,
    }
}

fn trust(store: &Store, caller: &Identity, may: &str) {
    let addr = "127.0.0.1:1".parse().unwrap();
    let peer = Peer::new("office".parse().unwrap(), addr, caller.key());
    let may: Permissions = may.parse().unwrap();
    store.peers().trust(peer, Some(may)).unwrap();
}

impl Running {
    async fn call(&self) -> Lasting {
        self.call_as(&self.caller).await
    }

    async fn call_as(&self, caller: &Arc<Identity>) -> Lasting {
        let key = self.store.identity().unwrap().key();
        let (addr, caller) = (self.addr.clone(), caller.clone());
        let dial: Dial = Box::new(move |traffic| {
            let (addr, caller) = (addr.clone(), caller.clone());
            Box::pin(async move {
                let called = connect_counted(&addr, &caller, &key, SOON, traffic).await;
                called.map_err(CallError::from)
            })
        });
        let name = Id::random().unwrap().0;
        Lasting::call(dial, name, Duration::ZERO, Traffic::default())
            .await
            .unwrap()
    }

    /// What is answered to a first word.
    async fn said_to(&self, hello: Hello) -> ToSource {
        let mut line = self.call().await;
        let hello = ToTarget::Hello(Box::new(hello));
        line.send(&hello).await.unwrap();
        line.recv().await.unwrap()
    }
}

async fn ended(mut line: Lasting) {
    let end = tokio::time::timeout(SOON, line.recv::<ToSource>()).await;
    let end = end.expect("it is ended at once");
    assert!(matches!(end, Err(ref e) if e.is_disconnect()), "{end:?}");
}

#[tokio::test]
async fn open_connections_of_who_is_trusted_no_longer_end_at_once() {
    let running = running("send").await;
    let (silent, talking) = (running.call().await, running.call().await);
    let mut talking = talking;
    let asks = ToTarget::Hello(Box::new(Hello::example(Purpose::Settle(Id([9; 16])))));
    talking.send(&asks).await.unwrap();
    let answer: ToSource = talking.recv().await.unwrap();
    assert!(matches!(answer, ToSource::Settled { taken: false }));
    running
        .store
        .peers()
        .remove(&"office".parse().unwrap())
        .unwrap();
    ended(silent).await;
    ended(talking).await;
}

#[tokio::test]
async fn open_connections_of_who_may_do_less_end_at_once_and_others_live_on() {
    let running = running("send,follow").await;
    let other = Arc::new(Identity::ephemeral().unwrap());
    let addr = "127.0.0.1:1".parse().unwrap();
    let peer = Peer::new("home".parse().unwrap(), addr, other.key());
    running.store.peers().trust(peer, None).unwrap();
    let mut lives = running.call_as(&other).await;
    let less = running.call().await;
    trust(&running.store, &running.caller, "send");
    ended(less).await;
    let asks = ToTarget::Hello(Box::new(Hello::example(Purpose::Settle(Id([9; 16])))));
    lives.send(&asks).await.unwrap();
    let answer: ToSource = lives.recv().await.unwrap();
    assert!(matches!(answer, ToSource::Settled { taken: false }));
}

#[tokio::test]
async fn who_may_not_send_learns_nothing_but_who_owns_what() {
    let running = running("receive,follow").await;
    for purpose in [Purpose::Migrate, Purpose::Seed, Purpose::Estimate] {
        let said = running.said_to(Hello::example(purpose)).await;
        let ToSource::Refused(why) = said else {
            panic!("{said:?}");
        };
        assert!(why.contains("send VMs"), "{why}");
        assert!(!why.contains("desk"), "{why}");
    }
    let said = running
        .said_to(Hello::example(Purpose::Settle(Id([9; 16]))))
        .await;
    assert!(matches!(said, ToSource::Settled { taken: false }));
    assert!(!running.store.root().join("vms/desk").exists());
}

#[tokio::test]
async fn who_may_not_follow_is_refused_at_the_beginning() {
    let running = running("send").await;
    let follows = Hello {
        follows: true,
        ..Hello::example(Purpose::Migrate)
    };
    let said = running.said_to(follows).await;
    assert!(matches!(said, ToSource::Refused(ref why) if why.contains("followed")));
}

#[tokio::test]
async fn a_peer_has_no_more_conversations_than_are_bounded() {
    let running = running("send").await;
    let mut open = Vec::new();
    for _ in 0..MOST_CALLS {
        open.push(running.call().await);
    }
    let mut more = running.call().await;
    let said: Result<ToSource, WireError> = more.recv().await;
    assert!(matches!(said, Ok(ToSource::Refused(ref why)) if why.contains("32")));
    // One that ends makes room.
    ended_orderly(open.pop()).await;
    tokio::time::timeout(SOON, async {
        loop {
            let asks = Hello::example(Purpose::Settle(Id([9; 16])));
            if let ToSource::Settled { .. } = running.said_to(asks).await {
                return;
            }
        }
    })
    .await
    .expect("there is room again");
}

async fn ended_orderly(line: Option<Lasting>) {
    line.expect("it was opened").close().await.unwrap();
}
