use super::*;
use crate::hub::ParcelName;
use crate::hub::seal::Sealer;
use crate::identity::{Identity, Signature};

const VM: Id = Id([7; 16]);

fn id(number: u64) -> GenerationId {
    GenerationId {
        number,
        digest: [number as u8; 32],
    }
}

struct World {
    _dir: tempfile::TempDir,
    store: Store,
    maker: Identity,
    site: Identity,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self {
            _dir: dir,
            store,
            maker: Identity::ephemeral().unwrap(),
            site: Identity::ephemeral().unwrap(),
        }
    }

    fn shelves(&self) -> Shelves {
        Shelves::of(&self.store, self.site.key())
    }

    fn parcel(&self, from: Option<u64>, to: u64) -> (Head, Vec<u8>) {
        let head = Head {
            version: PROTOCOL_VERSION,
            vm: VM,
            from: from.map(id),
            to: id(to),
            recipient: self.site.key(),
            by: self.maker.public(),
            key: [0; 32],
            signature: Signature::NONE,
        };
        let key = SealingKey::of(&self.site);
        let (head, mut sealer) = Sealer::new(&self.maker, &key, head, Vec::new()).unwrap();
        sealer.write_all(b"what is in it").unwrap();
        (head, sealer.finish().unwrap())
    }

    fn lay(&self, from: Option<u64>, to: u64, replaces: bool) {
        let (head, body) = self.parcel(from, to);
        let mut file = self.shelves().begin(&head, body.len() as u64).unwrap();
        file.write_all(&body).unwrap();
        self.shelves().keep(&head, file, replaces).unwrap();
    }

    fn lying(&self) -> Vec<u64> {
        let parcels = self.shelves().parcels(VM).unwrap();
        parcels.iter().map(|lying| lying.head.to.number).collect()
    }

    fn receipt(&self, has: &[u64]) -> Receipt {
        Receipt::sign(
            &self.site,
            VM,
            has.iter().map(|number| id(*number)).collect(),
        )
    }

    fn collect(&self, receipts: Vec<Receipt>, useless: &[u64]) -> Collect {
        Collect {
            key: SealingKey::of(&self.site),
            receipts,
            makers: vec![self.maker.key()],
            useless: useless
                .iter()
                .map(|number| ParcelName {
                    vm: VM,
                    to: id(*number),
                    by: self.maker.key(),
                })
                .collect(),
        }
    }

    fn shelf(&self) -> Shelf {
        let shelves = self.shelves();
        let parcels = shelves.parcels(VM).unwrap();
        Shelf {
            key: shelves.key().unwrap(),
            receipt: shelves.receipt(VM).unwrap(),
            parcels: parcels.into_iter().map(|lying| lying.head).collect(),
        }
    }

    fn next(&self, newest: u64, ours: &[u64]) -> Next {
        let ours: Vec<_> = ours.iter().map(|number| id(*number)).collect();
        let shelf = self.shelf();
        shelf
            .check(VM, &self.site.key(), &self.maker.key())
            .unwrap();
        shelf.next(id(newest), &ours)
    }

    fn usable(&self, has: &[u64]) -> Option<u64> {
        let has: Vec<_> = has.iter().map(|number| id(*number)).collect();
        let parcels = self.shelves().parcels(VM).unwrap();
        usable(&has, &parcels).map(|lying| lying.head.to.number)
    }
}

#[test]
fn a_parcel_follows_what_lies_there() {
    let world = World::new();
    assert_eq!(world.next(1, &[1]), Next::Instead(None));
    world.lay(None, 1, true);
    assert_eq!(world.next(1, &[1]), Next::There);
    assert_eq!(world.next(3, &[1, 3]), Next::After(id(1)));
    // It was pruned here.
    assert_eq!(world.next(3, &[3]), Next::Instead(None));
    world.lay(Some(1), 3, false);
    assert_eq!(world.next(4, &[1, 3, 4]), Next::After(id(3)));
    // The site has called, and has the first.
    world
        .shelves()
        .heard(&world.collect(vec![world.receipt(&[1])], &[]))
        .unwrap();
    assert_eq!(world.lying(), [3]);
    assert_eq!(world.next(4, &[1, 3, 4]), Next::After(id(3)));
    assert_eq!(world.next(4, &[1, 4]), Next::Instead(Some(id(1))));
    // It could not use the second.
    world
        .shelves()
        .heard(&world.collect(Vec::new(), &[3]))
        .unwrap();
    assert_eq!(world.lying(), [0_u64; 0]);
    assert_eq!(world.next(4, &[1, 3, 4]), Next::After(id(1)));
    world
        .shelves()
        .heard(&world.collect(vec![world.receipt(&[1, 4])], &[]))
        .unwrap();
    assert_eq!(world.next(4, &[1, 3, 4]), Next::There);
}

#[test]
fn many_that_wait_are_replaced_by_one() {
    let world = World::new();
    let all: Vec<u64> = (1..40).collect();
    world
        .shelves()
        .heard(&world.collect(vec![world.receipt(&[1])], &[]))
        .unwrap();
    let mut replaced = 0;
    for newest in 2..40 {
        match world.next(newest, &all) {
            Next::There => panic!("{newest} is not there"),
            Next::After(from) => {
                assert_eq!(from, id(newest - 1));
                world.lay(Some(from.number), newest, false);
            }
            Next::Instead(from) => {
                assert_eq!(from, Some(id(1)));
                world.lay(Some(1), newest, true);
                assert_eq!(world.lying(), [newest]);
                replaced += 1;
            }
        }
        assert!(world.lying().len() <= Shelf::PARCELS / 2);
    }
    assert!(replaced >= 4, "{replaced}");
}

#[test]
fn who_else_leaves_something_takes_nobodys_place() {
    let mut world = World::new();
    world.lay(None, 2, false);
    world.lay(Some(2), 3, false);
    let maker = std::mem::replace(&mut world.maker, Identity::ephemeral().unwrap());
    world.lay(None, 1000, true);
    assert_eq!(world.lying(), [2, 3, 1000]);
    let offers = |world: &World| {
        let offers = world.shelves().offers().unwrap();
        let mut offers: Vec<_> = offers.iter().map(|one| one.head.to.number).collect();
        offers.sort_unstable();
        offers
    };
    let stranger = world.maker.key();
    world.lay(None, 2, false);
    assert_eq!(world.lying(), [2, 2, 3, 1000]);
    world.maker = maker;
    // It takes from the one, and finds what it made to be of no use.
    world
        .shelves()
        .heard(&world.collect(Vec::new(), &[2]))
        .unwrap();
    assert_eq!(world.lying(), [2, 3, 1000]);
    assert_eq!(offers(&world), [0_u64; 0]);
    world.lay(None, 4, true);
    assert_eq!(world.lying(), [2, 4, 1000]);
    assert_eq!(offers(&world), [4]);
    let mut both = world.collect(Vec::new(), &[]);
    both.makers.push(stranger);
    world.shelves().heard(&both).unwrap();
    assert_eq!(offers(&world), [4, 1000]);
}

#[test]
fn a_site_is_given_what_it_can_use_and_gains_most_by() {
    let world = World::new();
    world.lay(None, 2, false);
    world.lay(Some(2), 3, false);
    world.lay(Some(2), 5, false);
    world.lay(Some(3), 6, false);
    assert_eq!(world.usable(&[]), Some(2));
    assert_eq!(world.usable(&[2]), Some(5));
    assert_eq!(world.usable(&[2, 3]), Some(6));
    assert_eq!(world.usable(&[5]), None);
    assert_eq!(
        world.usable(&[1]),
        Some(2),
        "also where it has another line"
    );
    assert_eq!(world.usable(&[7]), None);
}

#[test]
fn only_a_sites_own_word_is_believed() {
    let world = World::new();
    let mut late = world.receipt(&[4]);
    late.at += 100;
    assert!(!late.is_of(&world.site.key()), "it was changed");
    // What a hub makes up, or confuses.
    let other = Identity::ephemeral().unwrap();
    let good = world.shelf();
    let lies = [
        Shelf {
            key: Some(SealingKey::of(&other)),
            ..good.clone()
        },
        Shelf {
            receipt: Some(Receipt::sign(&other, VM, vec![id(9)])),
            ..good.clone()
        },
        Shelf {
            receipt: Some(Receipt::sign(&world.site, Id([8; 16]), vec![id(9)])),
            ..good.clone()
        },
        Shelf {
            parcels: vec![world.parcel(None, 1).0; Shelf::PARCELS + 1],
            ..good.clone()
        },
        Shelf {
            parcels: vec![Head {
                to: id(8),
                ..world.parcel(None, 1).0
            }],
            ..good.clone()
        },
    ];
    let check = |shelf: &Shelf| shelf.check(VM, &world.site.key(), &world.maker.key());
    check(&good).unwrap();
    for lie in lies {
        assert!(check(&lie).is_err(), "{lie:?}");
    }
}

#[test]
fn what_is_no_parcel_is_left_alone_and_counts() {
    let world = World::new();
    world.lay(None, 1, false);
    let taken_before = taken(&world.store).unwrap();
    let dir = world.shelves().vm(VM);
    for (name, content) in [
        ("2-00000000.parcel", &[0xff; 100][..]),
        ("3-00000000.parcel", &[]),
        (".coming-half", &[0; 50]),
    ] {
        fs::write(dir.join(name), content).unwrap();
    }
    // A whole one, in the place of another site's.
    let (head, _) = world.parcel(None, 4);
    let strange = Shelves::of(&world.store, world.maker.key());
    fs::create_dir_all(strange.vm(VM)).unwrap();
    fs::write(strange.vm(VM).join("4-x.parcel"), begin(&head).unwrap()).unwrap();
    assert_eq!(world.lying(), [1]);
    assert!(strange.parcels(VM).unwrap().is_empty());
    assert!(taken(&world.store).unwrap() >= taken_before + 150);
    clear(&world.store).unwrap();
    assert!(!dir.join(".coming-half").exists() && dir.join("2-00000000.parcel").exists());
    let listed = lies(&world.store).unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(
        drop_for(&world.store, &world.site.key().to_string()).unwrap(),
        1
    );
    assert_eq!(world.lying(), [0_u64; 0]);
    assert!(drop_for(&world.store, "nobody").is_err());
}
