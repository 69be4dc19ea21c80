//! What a guest may write into its RAM: nothing is read beyond it, and looking always ends.
#![no_main]

use introspection::{Linux, Physical, address_spaces, entropy, kinds, slabs};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|ram: &[u8]| {
    let ram = &ram[..ram.len().min(1 << 20)];
    if let Some(linux) = Linux::find(Physical::new(ram)) {
        let pages = ram.len().div_ceil(4096) as u64;
        for space in address_spaces(&linux) {
            assert!(space.pages.iter().all(|(_, page)| *page < pages));
        }
        if let Some(kinds) = kinds::of(&linux) {
            assert_eq!(kinds.all().len(), ram.len() / 4096);
            if let Some(slabs) = slabs::of(&linux, &kinds) {
                assert!((0..pages).all(|page| slabs.name(page).is_none_or(|name| name.len() < 64)));
            }
        }
    }
    if let Some(generator) = entropy::find(ram) {
        for (at, bytes) in [generator.hold(), generator.release()] {
            assert!(at + bytes.len() <= ram.len());
        }
    }
});
