//! The keyboard as QEMU's VNC server keeps it, one for all viewers.
//!
//! QEMU does not hand a viewer's keys to the guest as they are: it drops releases of keys that
//! are up, presses Caps Lock or Num Lock by itself when a letter's case or a keypad digit tells
//! that the viewer's lock state is another one, and keeps Ctrl-Alt-digit to itself. The log must
//! hold what the guest got, so the same rules run here. Source: `do_key_event` in `ui/vnc.c` and
//! `ui/kbd-state.c`; QEMU 7.2 to 10.x behave alike. What is assumed: QEMU runs without `-k`, with
//! `lock-key-sync` on (its default), and nobody else types through its VNC server.

use std::collections::BTreeSet;

use traces::Event;
use vm_host::keys::{linux_from_qnum, qnum_from_linux};

use crate::keysym::{Modifiers, qnum_of};

const LEFT_SHIFT: u16 = 42;
const RIGHT_SHIFT: u16 = 54;
const LEFT_CTRL: u16 = 29;
const RIGHT_CTRL: u16 = 97;
const LEFT_ALT: u16 = 56;
const RIGHT_ALT: u16 = 100;
const CAPS_LOCK: u16 = 58;
const NUM_LOCK: u16 = 69;
/// `KEY_1` to `KEY_9`.
const DIGITS: std::ops::RangeInclusive<u16> = 2..=10;

/// Keys held and locks, as the guest was told.
#[derive(Default)]
pub(crate) struct Keyboard {
    held: BTreeSet<u16>,
    caps: bool,
    num: bool,
    lifted: Vec<u8>,
}

/// A key event of a viewer, whichever message brought it.
#[derive(Clone, Copy)]
pub(crate) struct KeyInput {
    pub(crate) keysym: u32,
    /// The key's place, if the viewer told it.
    pub(crate) qnum: Option<u32>,
    pub(crate) down: bool,
    /// The viewer asked to be told of the guest's lock lights, so it keeps its own in step and
    /// QEMU leaves the locks alone.
    pub(crate) knows_leds: bool,
}

impl Keyboard {
    /// What reaches the guest because of `input`.
    pub(crate) fn apply(&mut self, input: KeyInput, out: &mut Vec<Event>) {
        let KeyInput { keysym, down, .. } = input;
        let qnum = match input.qnum {
            // QEMU keeps 16 bits and knows no number above 255.
            Some(qnum) => u8::try_from(qnum as u16).ok(),
            None => qnum_of(keysym, down, self.modifiers(), |qnum| {
                linux_from_qnum(qnum).is_some_and(|code| self.held.contains(&code))
            }),
        };
        let code = qnum.and_then(linux_from_qnum);
        if down && code.is_some_and(|c| DIGITS.contains(&c)) && self.ctrl() && self.alt() {
            // QEMU's own key: another console. Since 9.1, QEMU releases what is held only if that
            // console exists; being told the releases, every version does.
            self.lifted = self.held_qnums();
            self.lift_all(out);
            return;
        }
        if down && !input.knows_leds {
            self.sync_locks(keysym, qnum, out);
        }
        if let Some(code) = code {
            self.set(code, down, out);
        }
    }

    /// Releases everything, as QEMU does whenever a viewer leaves.
    pub(crate) fn lift_all(&mut self, out: &mut Vec<Event>) {
        for code in std::mem::take(&mut self.held) {
            out.push(Event::Key { code, down: false });
        }
    }

    /// Keys that the last input has released without naming them, as qnums; QEMU has to be told.
    pub(crate) fn take_lifted(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.lifted)
    }

    /// The keys held, as Linux codes.
    pub(crate) fn held(&self) -> impl Iterator<Item = u16> + '_ {
        self.held.iter().copied()
    }

    /// The keys held, as qnums.
    pub(crate) fn held_qnums(&self) -> Vec<u8> {
        self.held
            .iter()
            .filter_map(|&code| qnum_from_linux(code))
            .collect()
    }

    fn sync_locks(&mut self, keysym: u32, qnum: Option<u8>, out: &mut Vec<Event>) {
        if qnum.is_some_and(|q| (0x47..=0x53).contains(&q)) {
            let numeric = matches!(keysym & 0xffff, 0xffb0..=0xffb9 | 0xffac | 0xffae);
            if numeric != self.num {
                self.tap(NUM_LOCK, out);
            }
        }
        let upper = (0x41..=0x5a).contains(&keysym);
        if upper || (0x61..=0x7a).contains(&keysym) {
            let would_be_upper = self.caps != self.shift();
            if upper != would_be_upper {
                self.tap(CAPS_LOCK, out);
            }
        }
    }

    fn tap(&mut self, code: u16, out: &mut Vec<Event>) {
        self.set(code, true, out);
        self.set(code, false, out);
    }

    fn set(&mut self, code: u16, down: bool, out: &mut Vec<Event>) {
        // A repeated press of a lock key turns its state over as well, in QEMU's eyes alone.
        match code {
            CAPS_LOCK if down => self.caps = !self.caps,
            NUM_LOCK if down => self.num = !self.num,
            _ => {}
        }
        let changed = if down {
            self.held.insert(code)
        } else {
            self.held.remove(&code)
        };
        if changed {
            out.push(Event::Key { code, down });
        }
    }

    fn modifiers(&self) -> Modifiers {
        Modifiers {
            shift: self.shift(),
            altgr: self.held.contains(&RIGHT_ALT),
            ctrl: self.ctrl(),
        }
    }

    fn shift(&self) -> bool {
        self.held.contains(&LEFT_SHIFT) || self.held.contains(&RIGHT_SHIFT)
    }

    fn ctrl(&self) -> bool {
        self.held.contains(&LEFT_CTRL) || self.held.contains(&RIGHT_CTRL)
    }

    fn alt(&self) -> bool {
        self.held.contains(&LEFT_ALT)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: u16 = 30;

    fn plain(keysym: u32, down: bool) -> KeyInput {
        KeyInput {
            keysym,
            qnum: None,
            down,
            knows_leds: false,
        }
    }

    fn run(inputs: &[KeyInput]) -> Vec<(u16, bool)> {
        let mut keyboard = Keyboard::default();
        let mut out = Vec::new();
        for input in inputs {
            keyboard.apply(*input, &mut out);
        }
        keys(&out)
    }

    fn keys(events: &[Event]) -> Vec<(u16, bool)> {
        let key = |event: &Event| match event {
            Event::Key { code, down } => (*code, *down),
            other => panic!("{other:?}"),
        };
        events.iter().map(key).collect()
    }

    #[test]
    fn a_capital_without_shift_presses_caps_lock_first() {
        let a = u32::from(b'A');
        assert_eq!(
            run(&[plain(a, true), plain(a, false)]),
            [(CAPS_LOCK, true), (CAPS_LOCK, false), (A, true), (A, false)]
        );
        let shifted = [plain(0xffe1, true), plain(a, true)];
        assert_eq!(run(&shifted), [(LEFT_SHIFT, true), (A, true)]);
        let led = KeyInput {
            knows_leds: true,
            ..plain(a, true)
        };
        assert_eq!(run(&[led]), [(A, true)]);
    }

    #[test]
    fn a_keypad_digit_presses_num_lock_first() {
        assert_eq!(
            run(&[plain(0xffb7, true)]),
            [(NUM_LOCK, true), (NUM_LOCK, false), (71, true)]
        );
        assert_eq!(run(&[plain(0xff95, true)]), [(71, true)]);
    }

    #[test]
    fn repeats_and_stray_releases_are_not_logged() {
        let a = u32::from(b'a');
        assert_eq!(
            run(&[
                plain(a, false),
                plain(a, true),
                plain(a, true),
                plain(a, false)
            ]),
            [(A, true), (A, false)]
        );
    }

    #[test]
    fn console_keys_stay_with_qemu() {
        let inputs = [
            plain(0xffe3, true),
            plain(0xffe9, true),
            plain(u32::from(b'2'), true),
        ];
        assert_eq!(
            run(&inputs),
            [
                (LEFT_CTRL, true),
                (LEFT_ALT, true),
                (LEFT_CTRL, false),
                (LEFT_ALT, false)
            ]
        );
    }

    #[test]
    fn a_place_on_the_keyboard_counts_for_itself() {
        let at = |qnum| KeyInput {
            keysym: 0,
            qnum: Some(qnum),
            down: true,
            knows_leds: true,
        };
        assert_eq!(
            run(&[at(0x1e), at(0xcb), at(0x0), at(0x1_0000), at(0x100)]),
            [(A, true), (105, true)]
        );
    }

    proptest! {
        #[test]
        fn what_comes_out_alternates_and_ends_released(
            inputs in prop::collection::vec((any::<u16>(), prop::option::of(0..300_u32), any::<bool>(), any::<bool>()), 0..60)
        ) {
            let mut keyboard = Keyboard::default();
            let mut out = Vec::new();
            for (keysym, qnum, down, knows_leds) in inputs {
                let keysym = u32::from(keysym);
                keyboard.apply(KeyInput { keysym, qnum, down, knows_leds }, &mut out);
            }
            keyboard.lift_all(&mut out);
            let mut held = BTreeSet::new();
            for (code, down) in keys(&out) {
                let changed = if down { held.insert(code) } else { held.remove(&code) };
                prop_assert!(changed);
            }
            prop_assert!(held.is_empty());
        }
    }
}
