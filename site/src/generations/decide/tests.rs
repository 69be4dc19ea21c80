use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn folder(number: u64, kind: Kind, rests_on: &[u64]) -> Folder {
    Folder {
        number,
        kind,
        own: Sizes {
            ram: if kind == Kind::Whole { 10 * MIB } else { 0 },
            disks: MIB,
            device: 0,
            other: 0,
        },
        relied: Vec::new(),
        rests_on: Some(rests_on.iter().copied().collect()),
    }
}

/// 1 <- 2 <- 3 <- 4, with a VM that runs on 4.
fn chain() -> Vec<Folder> {
    let rests = [&[][..], &[1], &[2], &[3]];
    (1..)
        .zip(rests)
        .map(|(number, on)| folder(number, Kind::Whole, on))
        .collect()
}

fn fates(line: &[Folder], in_use: &[u64], limits: Limits) -> Vec<(u64, Fate)> {
    let in_use = in_use.iter().copied().collect();
    let decision = decide(line, &in_use, &BTreeMap::new(), limits).unwrap();
    decision.fates.into_iter().collect()
}

fn keep(keep: usize) -> Limits {
    Limits {
        keep,
        ..Limits::default()
    }
}

#[test]
fn what_is_on_its_way_to_a_standby_stays_and_so_do_logs_where_that_is_wanted() {
    let shipped = Limits {
        from: Some(3),
        keep_logs: true,
        ..keep(1)
    };
    let expected = [
        (1, Fate::Disks),
        (2, Fate::Disks),
        (3, Fate::Stay),
        (4, Fate::Stay),
    ];
    assert_eq!(fates(&chain(), &[], shipped), expected);
    let logs = BTreeMap::from([(1, 10), (3, 10)]);
    let decision = decide(&chain(), &BTreeSet::new(), &logs, shipped).unwrap();
    assert_eq!(decision.logs, BTreeSet::new());
    let decision = decide(&chain(), &BTreeSet::new(), &logs, keep(1)).unwrap();
    assert_eq!(decision.logs, BTreeSet::from([1, 3]));
}

#[test]
fn the_newest_stays_and_what_it_rests_on_keeps_its_disks() {
    let all = [
        (1, Fate::Disks),
        (2, Fate::Disks),
        (3, Fate::Disks),
        (4, Fate::Stay),
    ];
    assert_eq!(fates(&chain(), &[], keep(0)), all);
    assert_eq!(fates(&chain(), &[4], keep(1)), all);
    assert_eq!(fates(&chain(), &[], keep(2))[2], (3, Fate::Stay));
    assert!(
        fates(&chain(), &[], keep(9))
            .iter()
            .all(|(_, fate)| *fate == Fate::Stay)
    );
}

#[test]
fn a_state_that_somebody_begins_with_stays() {
    for reliance in [Reliance::Run, Reliance::Log, Reliance::Peer("b".into())] {
        let mut line = chain();
        line[1].relied.push(reliance);
        let fates = fates(&line, &[], keep(1));
        assert_eq!(fates[1], (2, Fate::Stay));
        assert_eq!(fates[2], (3, Fate::Disks));
    }
}

#[test]
fn what_nothing_rests_on_goes_whole_or_leaves_a_note_for_what_is_older() {
    // 4 was received in full: it rests on the base image.
    let mut line = chain();
    line[3].rests_on = Some(BTreeSet::new());
    assert_eq!(
        fates(&line, &[], keep(1)),
        [(1, Fate::Go), (2, Fate::Go), (3, Fate::Go), (4, Fate::Stay)]
    );
    line[1].relied.push(Reliance::Peer("b".into()));
    assert_eq!(
        fates(&line, &[], keep(1)),
        [
            (1, Fate::Disks),
            (2, Fate::Stay),
            (3, Fate::Note),
            (4, Fate::Stay)
        ]
    );
}

#[test]
fn what_was_never_finished_goes_but_for_disks_in_use_and_the_newest_numbers() {
    let mut line = chain();
    line[2].kind = Kind::Unfinished;
    line.push(folder(5, Kind::Unfinished, &[4]));
    // 4 rests on the unfinished 3: a checkpoint swapped the disks before it failed.
    let expected = [
        (1, Fate::Disks),
        (2, Fate::Disks),
        (3, Fate::Disks),
        (4, Fate::Stay),
        (5, Fate::Note),
    ];
    assert_eq!(fates(&line, &[], keep(1)), expected);
    assert_eq!(fates(&line, &[5], keep(1))[4], (5, Fate::Disks));
    line[3].rests_on = Some([2].into());
    assert_eq!(fates(&line, &[], keep(1))[2], (3, Fate::Go));
}

#[test]
fn a_vm_that_was_never_checkpointed_loses_no_disk_in_use() {
    let line = [
        folder(1, Kind::Unfinished, &[]),
        folder(2, Kind::Unfinished, &[]),
    ];
    let expected = [(1, Fate::Disks), (2, Fate::Note)];
    assert_eq!(fates(&line, &[1], keep(1)), expected);
}

#[test]
fn a_limit_takes_the_oldest_first_and_no_more_than_it_has_to() {
    let limit = |max| Limits {
        keep: 1,
        max_bytes: Some(max),
        ..Limits::default()
    };
    // Each has 11 MiB, of which 1 must stay.
    let count = |max: u64| {
        let fates = fates(&chain(), &[], limit(max));
        fates.iter().filter(|(_, f)| *f == Fate::Stay).count()
    };
    assert_eq!(count(44 * MIB), 4);
    assert_eq!(count(44 * MIB - 1), 3);
    assert_eq!(count(34 * MIB), 3);
    assert_eq!(count(14 * MIB), 1);
    assert_eq!(count(0), 1);
    let kept = Limits {
        keep: 3,
        max_bytes: Some(0),
        ..Limits::default()
    };
    assert_eq!(fates(&chain(), &[], kept)[1], (2, Fate::Stay));
}

#[test]
fn logs_go_once_nothing_is_left_to_replay_them_on() {
    let logs: BTreeMap<u64, u64> = [(1, 100), (2, 100), (4, 100)].into();
    let mut line = chain();
    let none = BTreeSet::new();
    let decision = decide(&line, &none, &logs, keep(1)).unwrap();
    assert_eq!(decision.logs, [1, 2].into());
    assert_eq!(decision.freed, 30 * MIB + 200);
    line[0].relied.push(Reliance::Peer("b".into()));
    // From 1 on, the log of 2 is a part of what is replayed.
    let decision = decide(&line, &none, &logs, keep(1)).unwrap();
    assert!(decision.logs.is_empty());
}

#[test]
fn nothing_is_decided_where_a_chain_can_not_be_followed() {
    let mut line = chain();
    line[1].rests_on = None;
    let none = BTreeSet::new();
    let decided = decide(&line, &none, &BTreeMap::new(), keep(1));
    assert_eq!(decided, Err(Unreadable(2)));
    // One that is not needed is of no interest.
    line[2].rests_on = Some(BTreeSet::new());
    assert!(decide(&line, &none, &BTreeMap::new(), keep(1)).is_ok());
}

fn line() -> impl Strategy<Value = Vec<Folder>> {
    let kinds = prop_oneof![
        4 => Just(Kind::Whole),
        1 => Just(Kind::Pruned),
        1 => Just(Kind::Unfinished)
    ];
    let one = (kinds, any::<u8>(), 0_u8..4, 0_u64..100);
    proptest::collection::vec(one, 0..12).prop_map(|drawn| {
        let mut line = Vec::new();
        for (number, (kind, below, relied, bytes)) in (1_u64..).zip(drawn) {
            // On any older one, or on the base image.
            let on = u64::from(below) % number;
            let below = [on];
            let rests_on = if on == 0 { &[][..] } else { &below };
            let mut made = folder(number, kind, rests_on);
            made.own.ram += bytes;
            if kind == Kind::Whole && relied == 0 {
                made.relied.push(Reliance::Peer("b".into()));
            }
            line.push(made);
        }
        line
    })
}

proptest! {
    #[test]
    fn what_is_relied_on_never_goes(
        line in line(),
        live in proptest::collection::btree_set(1_u64..12, 0..3),
        keep in 0_usize..4,
        max_bytes in proptest::option::of(0_u64..(130 << 20)),
    ) {
        let limits = Limits {
            keep,
            max_bytes,
            ..Limits::default()
        };
        let decision = decide(&line, &live, &BTreeMap::new(), limits).unwrap();
        let fate = |number: u64| decision.fates[&number];
        let mut wholes: Vec<u64> = Vec::new();
        for folder in &line {
            if folder.kind == Kind::Whole {
                wholes.push(folder.number);
            }
            if !folder.relied.is_empty() {
                prop_assert_eq!(fate(folder.number), Fate::Stay);
            }
            if live.contains(&folder.number) {
                prop_assert!(matches!(fate(folder.number), Fate::Stay | Fate::Disks));
            }
            // Whoever keeps its disks finds what they rest on.
            if matches!(fate(folder.number), Fate::Stay | Fate::Disks) {
                for below in folder.rests_on.iter().flatten() {
                    prop_assert!(matches!(fate(*below), Fate::Stay | Fate::Disks));
                }
            }
        }
        for number in wholes.iter().rev().take(keep.max(1)) {
            prop_assert_eq!(fate(*number), Fate::Stay);
        }
        let before: u64 = line.iter().map(|folder| folder.own.total()).sum();
        prop_assert_eq!(decision.freed + decision.left, before);
        // A second pruning finds nothing more to do.
        let after: Vec<Folder> = line
            .iter()
            .filter(|folder| fate(folder.number) != Fate::Go)
            .map(|folder| {
                let mut folder = folder.clone();
                if fate(folder.number) != Fate::Stay {
                    folder.own = match fate(folder.number) {
                        Fate::Disks => Sizes { disks: folder.own.disks, ..Sizes::default() },
                        _ => Sizes::default(),
                    };
                    folder.rests_on = match fate(folder.number) {
                        Fate::Disks => folder.rests_on,
                        _ => Some(BTreeSet::new()),
                    };
                    if folder.kind == Kind::Whole {
                        folder.kind = Kind::Pruned;
                    }
                }
                folder
            })
            .collect();
        let again = decide(&after, &live, &BTreeMap::new(), limits).unwrap();
        prop_assert_eq!(again.freed, 0);
    }
}
