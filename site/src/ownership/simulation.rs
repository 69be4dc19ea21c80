//! Hand-overs among three sites, with crashes, restarts, lost lines and late messages at any
//! point, seed by seed.
//!
//! Each site is a real state directory, and each step the code that sites run: [`give`],
//! [`offered`] and [`decide`] at the giver, [`check_known`], [`take`] and [`was_taken`] at the taker, with the
//! VM's lock held as they hold it. Only the line is played: two queues of messages for each
//! connection, whose ends learn of its loss at different times, so that what was said before is
//! heard after the other side has long asked again. A seed picks who does the next step; a
//! process that dies is a future that is dropped, which it can be wherever it waits: before it
//! sends, and before it hears. A seed that fails fails again.

mod line;

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};

use line::{End, Lost, Said, Wire};

use super::*;
use crate::chain::Way;
use crate::local::require_lease;
use crate::peers::Peer;
use crate::protocol::{Hello, Purpose};
use crate::target::check_known;
use crate::vm::VmRecord;

/// Hundreds, in a few seconds.
const SEEDS: u64 = 400;
/// A hand-over takes some twenty.
const STEPS: u32 = 400;
/// Nobody fails any more; more than all that is left to do takes.
const CALM_STEPS: u32 = 4000;
const SITES: usize = 3;
/// At most so many steps: enough for others to call again, and to be done.
const SLEEP: u32 = 120;

/// `SplitMix64`, by Sebastiano Vigna (public domain).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % sides as u64).unwrap()
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// A site, and the guest's QEMU there, which outlives the processes that look after it.
struct Place {
    vm: VmDir,
    key: SiteKey,
    runs: Rc<RefCell<bool>>,
    /// Whether its agent is up.
    serves: bool,
}

impl Place {
    /// As others know it.
    fn peer(&self, name: &str) -> Peer {
        let addr = "127.0.0.1:1".parse().unwrap();
        Peer::new(name.parse().unwrap(), addr, self.key)
    }
}

/// A process or a conversation of a site's.
struct Doing {
    at: usize,
    agents: bool,
    /// It gets no step before: its processor is busy, or its network is.
    sleeps_until: u32,
    task: Task,
}

struct World {
    places: Vec<Place>,
    record: VmRecord,
    doing: Vec<Doing>,
    wires: Vec<Rc<RefCell<Wire>>>,
    transfers: u64,
    /// Steps so far.
    now: u32,
    dice: Dice,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(seed: u64) -> Self {
        // Where fsync costs nothing, if there is such a place.
        let shared = std::path::Path::new("/dev/shm");
        let dir = if shared.is_dir() {
            tempfile::tempdir_in(shared).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        let record = VmRecord::example();
        let places: Vec<_> = (0..SITES)
            .map(|index| {
                let store = Store::open(dir.path().join(index.to_string())).unwrap();
                let vm = store.vm(&record.name);
                files::make_dir(vm.dir()).unwrap();
                Place {
                    key: store.identity().unwrap().key(),
                    vm,
                    runs: Rc::new(RefCell::new(index == 0)),
                    serves: true,
                }
            })
            .collect();
        let held = Lease::Held {
            fence: 1,
            transfer: None,
        };
        // One in four was made before there were chains.
        let title = if seed.is_multiple_of(4) {
            Title::from(&held)
        } else {
            let identity = places[0].vm.store().identity().unwrap();
            Title::new(held, Chain::start(record.id, 1, &identity))
        };
        places[0].vm.create(&record, title).unwrap();
        Self {
            places,
            record,
            doing: Vec::new(),
            wires: Vec::new(),
            transfers: 0,
            now: 0,
            dice: Dice(seed),
            _dir: dir,
        }
    }

    /// A line to a site whose agent is up, and a conversation at its other end.
    fn call(&mut self, from: usize, to: usize) -> Option<End> {
        if !self.places[to].serves {
            return None;
        }
        let wire = Rc::new(RefCell::new(Wire::default()));
        self.wires.push(wire.clone());
        let end = |giver| End {
            wire: wire.clone(),
            giver,
        };
        let place = &self.places[to];
        let task = converse(
            place.vm.clone(),
            end(false),
            self.places[from].peer("there"),
            place.runs.clone(),
        );
        self.doing.push(Doing {
            at: to,
            agents: true,
            sleeps_until: 0,
            task: Box::pin(task),
        });
        Some(end(true))
    }

    /// Somebody at a site has the VM moved, or asks whose it is.
    fn begin(&mut self, from: usize) {
        let to = (from + 1 + self.dice.roll(SITES - 1)) % SITES;
        let place = &self.places[from];
        let Ok(Some(lease)) = Lease::load(&place.vm.lease_path()) else {
            return;
        };
        let offered = match &lease {
            Lease::Offered { to, .. } => {
                let to = *to;
                self.places.iter().position(|place| place.key == to)
            }
            _ => None,
        };
        let Some(line) = self.call(from, offered.unwrap_or(to)) else {
            return;
        };
        self.transfers += 1;
        let mut transfer = Id([0; 16]);
        transfer.0[..8].copy_from_slice(&self.transfers.to_le_bytes());
        let place = &self.places[from];
        let (vm, runs) = (place.vm.clone(), place.runs.clone());
        let hello = Hello {
            transfer,
            fence: 0,
            ..Hello::example(Purpose::Migrate)
        };
        let target = self.places[to].peer("there");
        let unattended = self.dice.roll(2) == 0;
        let task: Task = if offered.is_some() {
            Box::pin(async move {
                // What fails is asked again by whoever comes next.
                let _ = resolve(&vm, &hello, &line, &runs, unattended).await;
            })
        } else {
            Box::pin(async move {
                let Ok(_lock) = vm.lock() else { return };
                let _ = migrate(&vm, hello, &target, &line, &runs).await;
            })
        };
        self.doing.push(Doing {
            at: from,
            agents: false,
            sleeps_until: 0,
            task,
        });
    }

    /// One more step of somebody's.
    fn go_on(&mut self) {
        self.now += 1;
        if self.doing.is_empty() {
            return;
        }
        let index = self.dice.roll(self.doing.len());
        if self.doing[index].sleeps_until > self.now {
            return;
        }
        let mut context = Context::from_waker(Waker::noop());
        if self.doing[index]
            .task
            .as_mut()
            .poll(&mut context)
            .is_ready()
        {
            drop(self.doing.swap_remove(index));
        }
    }

    /// All processes of a site die; QEMU goes on.
    fn crash(&mut self, at: usize) {
        self.doing.retain(|doing| doing.at != at);
        self.places[at].serves = false;
    }

    /// As [`crate::agent::Agent::bind`] does it.
    fn serve(&mut self, at: usize) {
        if !std::mem::replace(&mut self.places[at].serves, true) {
            forget_voids(self.places[at].vm.store()).unwrap();
        }
    }

    fn fail_somewhere(&mut self) {
        let at = self.dice.roll(SITES);
        match self.dice.roll(9) {
            0 => self.crash(at),
            // A command is killed, the agent lives.
            1 => self.doing.retain(|doing| doing.at != at || doing.agents),
            2 => self.serve(at),
            // A stale copy is deleted.
            3 => self.delete(at),
            4..6 => self.slow_down(),
            _ => self.lose_a_line(),
        }
    }

    fn slow_down(&mut self) {
        if self.doing.is_empty() {
            return;
        }
        let index = self.dice.roll(self.doing.len());
        self.doing[index].sleeps_until = self.now + self.dice.roll(SLEEP as usize) as u32;
    }

    fn lose_a_line(&mut self) {
        // Nobody is at either end of the others.
        self.wires.retain(|wire| Rc::strong_count(wire) > 1);
        if self.wires.is_empty() {
            return;
        }
        let index = self.dice.roll(self.wires.len());
        let (giver, late) = (self.dice.roll(2) == 0, self.dice.roll(2) == 0);
        let mut wire = self.wires[index].borrow_mut();
        if giver {
            wire.giver_lost = true;
            wire.down.clear();
        } else {
            wire.taker_lost = true;
            // What is in its socket's buffer already is still read.
            if late {
                wire.up.clear();
            }
        }
    }

    fn delete(&mut self, at: usize) {
        let vm = &self.places[at].vm;
        let Ok(_lock) = vm.lock() else { return };
        if let Ok(Some(Lease::Elsewhere { .. })) = Lease::load(&vm.lease_path()) {
            vm.note_deleted().unwrap();
            files::remove_dir(vm.dir()).unwrap();
            files::make_dir(vm.dir()).unwrap();
        }
    }

    /// `vm start`, by somebody who does not know better.
    fn start(&mut self, at: usize) {
        let place = &self.places[at];
        let Ok(_lock) = place.vm.lock() else { return };
        if place.vm.try_record().unwrap().is_some() && require_lease(&place.vm).is_ok() {
            *place.runs.borrow_mut() = true;
        }
    }

    /// What the sites have written down of the hand-overs is one chain.
    fn assert_chained(&self, seed: u64) {
        let titles = self.places.iter().filter_map(|place| {
            let title = Title::load(&place.vm.lease_path()).unwrap()?;
            (!title.chain.is_empty()).then_some(title)
        });
        let titles: Vec<_> = titles.collect();
        let newest = titles.iter().max_by_key(|title| title.fence());
        let Some(newest) = newest.filter(|title| is_held(&title.lease)) else {
            return;
        };
        let proven = newest.chain.prove(self.record.id).unwrap();
        assert_eq!(proven.fence(), newest.lease.fence(), "seed {seed}");
        for title in &titles {
            let way = proven.way_from(&title.chain);
            assert_eq!(way, Way::On(Vec::new()), "seed {seed}: {title:?}");
        }
    }

    /// As they are written down.
    fn leases(&self) -> Vec<Option<Lease>> {
        let lease = |place: &Place| Lease::load(&place.vm.lease_path()).unwrap();
        self.places.iter().map(lease).collect()
    }

    /// What must hold at any moment; the site, if there is one, whose hand-over is in doubt.
    fn assert_one(&self, seed: u64) -> Option<usize> {
        let leases = self.leases();
        let held = leases.iter().flatten().filter(|lease| is_held(lease));
        let running = self.places.iter().filter(|place| *place.runs.borrow());
        let (held, running) = (held.count(), running.count());
        assert!(held <= 1, "seed {seed}: {held} sites hold the lease");
        assert!(running <= 1, "seed {seed}: it runs at {running} sites");
        let offered = |lease: &Option<Lease>| matches!(lease, Some(Lease::Offered { .. }));
        leases.iter().position(offered)
    }
}

fn is_held(lease: &Lease) -> bool {
    matches!(lease, Lease::Held { .. })
}

/// The source of a migration, from hello on.
async fn migrate(
    vm: &VmDir,
    hello: Hello,
    to: &Peer,
    line: &End,
    runs: &RefCell<bool>,
) -> Result<()> {
    let fence = require_lease(vm)?;
    let hello = Hello {
        fence,
        chain: proof(vm)?.since(hello.vm.id, to),
        ..hello
    };
    line.send(Said::Hello(Box::new(hello.clone()))).await?;
    let Said::Welcome = line.hear().await? else {
        return Ok(());
    };
    // Stop: all images are sent and verified.
    let was_running = runs.replace(false);
    let offer = Offer {
        fence,
        transfer: hello.transfer,
        to: to.key,
        to_name: "there".into(),
        was_running,
    };
    let asked = async |link| {
        let fence = fence + 1;
        line.send(Said::Commit { fence, link }).await?;
        match line.hear().await? {
            Said::Committed => Ok(()),
            _ => Err(Lost.into()),
        }
    };
    give(vm, offer, asked).await
}

/// Whoever comes after a hand-over that was cut off. A command keeps others from the VM while it
/// asks, an agent does not.
async fn resolve(
    vm: &VmDir,
    hello: &Hello,
    line: &End,
    runs: &RefCell<bool>,
    unattended: bool,
) -> Result<()> {
    let lock = vm.lock()?;
    let Some(offer) = offered(vm)? else {
        return Ok(());
    };
    let held = if unattended {
        drop(lock);
        None
    } else {
        Some(lock)
    };
    line.send(Said::Hello(Box::new(Hello {
        purpose: Purpose::Settle(offer.transfer),
        transfer: offer.transfer,
        fence: offer.fence,
        ..hello.clone()
    })))
    .await?;
    let Said::Settled { taken } = line.hear().await? else {
        return Ok(());
    };
    let _held = match held {
        Some(lock) => lock,
        None => vm.lock()?,
    };
    if let Settled::Here { was_running: true } = decide(vm, offer, taken)? {
        require_lease(vm)?;
        *runs.borrow_mut() = true;
    }
    Ok(())
}

/// A target's conversation.
async fn converse(vm: VmDir, line: End, caller: Peer, runs: Rc<RefCell<bool>>) {
    // It ends early in whatever way it does: nothing was decided then, or all is.
    let _ = answer(&vm, &line, caller, &runs).await;
}

async fn answer(vm: &VmDir, line: &End, caller: Peer, runs: &RefCell<bool>) -> Result<()> {
    let Said::Hello(hello) = line.hear().await? else {
        return Ok(());
    };
    if let Purpose::Settle(transfer) = hello.purpose {
        let taken = was_taken(vm, hello.vm.id, transfer, hello.fence)?;
        line.send(Said::Settled { taken }).await?;
        return Ok(());
    }
    let known = vm.lock().and_then(|lock| {
        check_known(vm, &hello, &caller)?;
        Ok(lock)
    });
    let Ok(_lock) = known else {
        line.send(Said::Refused).await?;
        return Ok(());
    };
    line.send(Said::Welcome).await?;
    let Said::Commit { fence, link } = line.hear().await? else {
        return Ok(());
    };
    let known = check_known(vm, &hello, &caller)?;
    let us = vm.store().identity()?.key();
    let proven = hello.chain.prove(hello.vm.id).unwrap();
    let chain = proven.handed_over(&known, link, us).unwrap();
    // The images are kept by now, and it is known what they are of.
    if vm.try_record()?.is_none() {
        let lease = Lease::Elsewhere {
            fence: hello.fence,
            owner: caller.key,
            owner_name: "there".into(),
        };
        vm.create(&hello.vm, Title::new(lease, known))?;
    }
    take(vm, hello.transfer, fence, chain)?;
    let told = line.send(Said::Committed).await;
    *runs.borrow_mut() = true;
    Ok(told?)
}

/// What a seed has seen.
#[derive(Default)]
struct Seen {
    hand_overs: u64,
    doubts: u64,
}

fn simulate(seed: u64) -> Seen {
    let mut world = World::new(seed);
    let mut seen = Seen::default();
    for _ in 0..STEPS {
        match world.dice.roll(20) {
            0 => world.fail_somewhere(),
            1..5 => {
                let at = world.dice.roll(SITES);
                world.begin(at);
            }
            5 => {
                let at = world.dice.roll(SITES);
                world.start(at);
            }
            _ => world.go_on(),
        }
        seen.doubts += u64::from(world.assert_one(seed).is_some());
    }
    // All lines and processes of before end, and everybody can talk: it is clear soon whose it is.
    for at in 0..SITES {
        world.crash(at);
    }
    for at in 0..SITES {
        world.serve(at);
    }
    let mut doubt = world.assert_one(seed);
    for _ in 0..CALM_STEPS {
        match doubt {
            Some(at) if world.doing.is_empty() => world.begin(at),
            None if world.doing.is_empty() => break,
            _ => world.go_on(),
        }
        doubt = world.assert_one(seed);
    }
    assert_eq!(doubt, None, "seed {seed}: still in doubt");
    let leases: Vec<_> = world.leases().into_iter().flatten().collect();
    let held = leases.iter().filter(|lease| is_held(lease)).count();
    assert_eq!(held, 1, "seed {seed}: who has it?");
    world.assert_chained(seed);
    seen.hand_overs = leases.iter().map(Lease::fence).max().unwrap() - 1;
    seen
}

#[test]
fn one_site_has_the_vm_whatever_fails() {
    let (mut hand_overs, mut doubts) = (0, 0);
    for seed in 0..SEEDS {
        let seen = simulate(seed);
        hand_overs += seen.hand_overs;
        doubts += seen.doubts;
    }
    // A simulation in which nothing happens proves nothing.
    assert!(hand_overs > SEEDS, "{hand_overs} hand-overs");
    assert!(doubts > SEEDS, "{doubts} steps in doubt");
}
