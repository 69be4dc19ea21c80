//! Holding the guest's random numbers in place while a session is recorded.
//!
//! Linux stirs new entropy, interrupt times above all, into its random number generator when it
//! is asked for numbers and has not done so for a minute. From then on original and replay get
//! different numbers, and much follows from them: the order in which the slab allocator gives
//! out the places of a page, keys of hash tables, and with them the layout of whole heaps.
//! Between two such moments the numbers are determined by the generator's key alone
//! (`crng_fast_key_erasure` in `drivers/char/random.c`), and a replay gets the same.
//!
//! So the time of the last one is set into the future. The generator goes on with its key of
//! 256 bits, which is secret and has been seeded before; what is given up meanwhile is that it
//! recovers from a key that was stolen. [`release`] has it stir at the next request.

use crate::{Linux, Physical};

/// Where the generator's state is, as offsets in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generator {
    /// When it was last seeded, in jiffies: 8 bytes.
    birth: usize,
    /// The time in jiffies when this was looked up.
    jiffies: u64,
    /// What `birth` was then.
    born: u64,
}

/// Of `base_crng`: 32 bytes of key come before `birth`.
const BIRTH: u64 = 32;

/// So far ahead that it never comes, and is not taken for the past.
const AHEAD: u64 = 1 << 62;

/// Ten days at 1000 a second, and longer at the usual 250: what lies further from now is no time
/// of a seeding.
const PLAUSIBLE: u64 = 1_000 * 86_400 * 10;

/// `CRNG_READY`: it was seeded.
const READY: u32 = 2;

/// Finds the generator of a guest that stands still; `None` if the guest is no Linux of this
/// kind, or the generator isn't as it should be.
pub fn find(ram: &[u8]) -> Option<Generator> {
    let physical = Physical::new(ram);
    let linux = Linux::find(physical)?;
    let [crng, ready, jiffies] = linux.variables(["base_crng", "crng_init", "jiffies_64"]);
    let (crng, ready, jiffies) = (crng?, ready?, jiffies?);
    let birth = crng.checked_add(BIRTH as usize)?;
    let number = |at: usize| -> Option<u64> {
        let bytes = ram.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let state = u32::from_le_bytes(ram.get(ready..ready.checked_add(4)?)?.try_into().ok()?);
    let (jiffies, born) = (number(jiffies)?, number(birth)?);
    // An atomic store later on needs the word to be aligned, as it is in every kernel.
    let usable = state == READY && birth % 8 == 0;
    // Seeded before now, or held already.
    let generator = Generator {
        birth,
        jiffies,
        born,
    };
    let seeded = jiffies.wrapping_sub(born) < PLAUSIBLE;
    let plausible = seeded || generator.is_held() || born == RELEASED;
    (usable && plausible).then_some(generator)
}

/// No time at which a kernel seeds: it begins to count at five minutes before the 32-bit
/// overflow.
const RELEASED: u64 = 1;

impl Generator {
    /// Whether it is held in place.
    pub fn is_held(&self) -> bool {
        let since = self.jiffies.wrapping_sub(self.born).wrapping_add(AHEAD);
        since < PLAUSIBLE
    }

    /// Offset in RAM, and the 8 bytes to put there, so that it is not stirred.
    pub fn hold(&self) -> (usize, [u8; 8]) {
        (self.birth, self.jiffies.wrapping_add(AHEAD).to_le_bytes())
    }

    /// Offset in RAM, and the 8 bytes to put there, so that it is stirred at the next request.
    pub fn release(&self) -> (usize, [u8; 8]) {
        (self.birth, RELEASED.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn put(ram: &mut [u8], (at, bytes): (usize, [u8; 8])) {
        ram[at..at + 8].copy_from_slice(&bytes);
    }

    #[test]
    fn it_is_held_released_and_held_again() {
        let mut ram = testing::kernel();
        let generator = find(&ram).unwrap();
        assert!(!generator.is_held());
        put(&mut ram, generator.hold());
        let birth = u64::from_le_bytes(ram[testing::CRNG + 32..][..8].try_into().unwrap());
        // As `crng_has_old_seed` asks, a minute at 250 Hz later and in a million years.
        for later in [15_000_u64, 1 << 60] {
            let age = (birth.wrapping_add(15_000)).wrapping_sub(testing::NOW + later);
            assert!(age.cast_signed() > 0, "stirred {later} jiffies later");
        }
        let again = find(&ram).unwrap();
        assert!(again.is_held());
        assert_eq!(again.hold(), generator.hold());
        put(&mut ram, again.release());
        let birth = u64::from_le_bytes(ram[testing::CRNG + 32..][..8].try_into().unwrap());
        let age = birth.wrapping_add(15_000).wrapping_sub(testing::NOW);
        assert!(age.cast_signed() < 0, "not stirred at the next request");
        assert!(!find(&ram).unwrap().is_held());
        assert_eq!(
            ram[testing::CRNG..][..32],
            [0x5e; 32],
            "the key is not touched"
        );
    }

    #[test]
    fn a_generator_that_is_not_as_it_should_be_is_left_alone() {
        let mut unseeded = testing::kernel();
        unseeded[testing::READY] = 1;
        assert_eq!(find(&unseeded), None);
        let mut other = testing::kernel();
        // Another structure, where this one is taken to be.
        put(&mut other, (testing::CRNG + 32, [0x5e; 8]));
        assert_eq!(find(&other), None);
        assert_eq!(find(&[0; 4096]), None);
    }
}
