//! A session on a guest that chance is taken out of, and what can be kept of it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use introspection::{Linux, Physical, address_spaces, entropy, freelists, turns};

use crate::common::{CHANCE_TAKEN_OUT, SOON, VM, World, qemus_on, work};
use vm_host::Hardware;

/// What the clock of a guest shows whose instructions are counted (`icount_vmstate_timers` in QEMU).
fn guest_clock(device: &Path) -> Duration {
    const NAME: &[u8] = b"\x05\x0ctimer/icount\0\0\0\x01";
    let state = std::fs::read(device).unwrap();
    let at = state.windows(NAME.len()).position(|words| words == NAME);
    let fields = &state[at.expect("a count of instructions") + NAME.len()..];
    let field = |at: usize| i64::from_be_bytes(fields[at..at + 8].try_into().unwrap());
    let (bias, instructions) = (field(0), field(8));
    let each = 1 << Hardware::ICOUNT;
    Duration::from_nanos((bias + instructions * each).try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_captured_while_chance_is_held_in_place() {
    let world = World::new().await;
    let a = &world.a;
    let guest = world.guest_without_chance().await;
    let mut create = vec!["vm", "create", VM, "--disk", &guest];
    create.extend(CHANCE_TAKEN_OUT);
    a.json(&create).await.unwrap();
    a.json(&["vm", "start", VM]).await.unwrap();
    let live = a.live_ram(VM).await.unwrap();
    let held = || {
        let ram = std::fs::read(&live).unwrap();
        let generator = entropy::find(&ram).expect("the guest's generator");
        let turns = turns::find(&ram).expect("the guest's turns");
        assert_eq!(generator.is_held(), turns.is_held());
        turns.is_held()
    };
    assert!(!held());
    let shuffled = || freelists::random_orders(&std::fs::read(&live).unwrap()).len();
    assert!(shuffled() > 50, "caches that fill their slabs at random");

    let out = world.dir.path().join("capture");
    let out = out.to_str().unwrap();
    let early = a.run(&["capture", VM, "--out", out]).await.unwrap();
    assert_eq!(early.code, Some(3), "{}", early.stderr);
    assert!(!Path::new(out).exists());

    let recorder = a
        .record_with(VM, &["--long-turns=1s", "--fresh-qemu"])
        .await
        .unwrap();
    assert!(held());
    // But for one that had no slab before.
    let left = shuffled();
    assert!(left < 5, "{left} caches still fill their slabs at random");
    work(&recorder).await;
    let quickly = ["capture", VM, "--out", out, "--quick-replays", "1"];
    let captured = a.json(&quickly).await.unwrap();
    let replays = captured["replays"].as_array().unwrap();
    let states: Vec<_> = replays.iter().map(|replay| &replay["state"]).collect();
    assert_eq!(states, ["replayed", "twin", "quick-1"], "{captured}");
    assert!(captured["replays"][0]["events"].as_u64().unwrap() > 100);
    assert_eq!(a.state(VM).await.unwrap(), "running");
    assert_eq!(qemus_on(a.dir()), 1, "only the VM itself");
    let mode = Path::new(out).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "others may look into the capture");
    for state in ["base", "source", "replayed", "twin", "quick-1"] {
        let dir = Path::new(out).join(state);
        let ram = std::fs::read(dir.join("ram.img")).unwrap();
        assert!(entropy::find(&ram).unwrap().is_held(), "{state}");
        assert!(turns::find(&ram).unwrap().is_held(), "{state}");
        assert!(freelists::random_orders(&ram).len() < 5, "{state}");
        // The terminal that was typed into is a process of the guest.
        let spaces = address_spaces(&Linux::find(Physical::new(&ram)).unwrap());
        let has = |program: &str, words: &[u8]| {
            let space = spaces.iter().find(|space| space.name == program.as_bytes());
            let space = space.unwrap_or_else(|| panic!("{state}: no {program}"));
            assert!(space.pages.len() > 100, "{state}: {program}");
            space.pages.iter().any(|(_, page)| {
                let page = &ram[*page as usize * 4096..][..4096];
                page.windows(words.len()).any(|window| window == words)
            })
        };
        // What the kernel's command line has systemd tell all programs.
        let told = b"\0GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:";
        let terminal = "/usr/bin/xterm";
        assert!(has(terminal, told), "{state}");
        assert!(has(terminal, b"\0G_SLICE=always-malloc\0"), "{state}");
        assert!(has("/usr/lib/xorg/Xorg", b"\0-dumbSched\0"), "{state}");
        for file in ["disk.img", "device.bin"] {
            assert!(
                dir.join(file).metadata().unwrap().len() > 1 << 20,
                "{state}/{file}"
            );
        }
    }
    // Replays are given input by the guest's own clock, and end by it: not before the session did, as they would by the
    // host's where the guest computed. On a host with more to do they may end seconds later, having waited for the screen.
    let clock = |state| guest_clock(&Path::new(out).join(state).join("device.bin"));
    let [source, base] = ["source", "base"].map(clock);
    assert!(source > base);
    for state in ["replayed", "twin"] {
        let lived = clock(state);
        let blur = Duration::from_millis(250);
        assert!(
            lived + blur > source,
            "{state}: {lived:?}, {source:?}: {captured}"
        );
    }
    let again = a.run(&["capture", VM, "--out", out]).await.unwrap();
    assert_eq!(again.code, Some(3), "{}", again.stderr);

    recorder.process.interrupt();
    recorder
        .process
        .finish(SOON)
        .await
        .unwrap()
        .success()
        .unwrap();
    assert!(!held());
}
