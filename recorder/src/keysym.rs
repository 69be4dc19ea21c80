//! X11 keysyms to key positions, as QEMU maps them for a viewer that sends no positions.
//!
//! The log must hold the keys that QEMU pressed in the guest, so this follows QEMU: the "en-us"
//! layout that its VNC server loads when no other is asked for (`pc-bios/keymaps/en-us`), and
//! the choice between several keys for one keysym of `keysym2scancode` (`ui/keymaps.c`). Names in
//! the layout that QEMU has no number for (`Linefeed`, `ISO_Left_Tab`) are no keys there. Only
//! the low 16 bits of a keysym count there, and so they do here.

/// A modifier that distinguishes keys with the same keysym.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Modifiers {
    pub(crate) shift: bool,
    pub(crate) altgr: bool,
    pub(crate) ctrl: bool,
}

const PLAIN: Modifiers = Modifiers {
    shift: false,
    altgr: false,
    ctrl: false,
};
const SHIFT: Modifiers = Modifiers {
    shift: true,
    ..PLAIN
};
const ALTGR: Modifiers = Modifiers {
    altgr: true,
    ..PLAIN
};

/// Characters of the keys in rows, from the given qnum on: without shift, with shift.
const ROWS: [(u8, &[u8], &[u8]); 4] = [
    (0x02, b"1234567890-=", b"!@#$%^&*()_+"),
    (0x10, b"qwertyuiop[]", b"QWERTYUIOP{}"),
    (0x1e, b"asdfghjkl;'`", b"ASDFGHJKL:\"~"),
    (0x2b, b"\\zxcvbnm,./", b"|ZXCVBNM<>?"),
];

/// Keysyms that more than one key has. The first is taken if no modifiers fit.
const SHARED: [(u16, [(u8, Modifiers); 2]); 4] = [
    (b'|' as u16, [(0x2b, SHIFT), (0x56, ALTGR)]),
    (b'<' as u16, [(0x33, SHIFT), (0x56, PLAIN)]),
    (b'>' as u16, [(0x34, SHIFT), (0x56, SHIFT)]),
    (0xffae, [(0x53, PLAIN), (0x7e, PLAIN)]), // KP_Decimal
];

/// The rest, by number (`X11/keysymdef.h`).
#[rustfmt::skip]
const NAMED: &[(u16, u8)] = &[
    (0x0020, 0x39), // space
    (0x00a6, 0x56), // brokenbar
    (0xfe03, 0xb8), // ISO_Level3_Shift
    (0xff08, 0x0e), // BackSpace
    (0xff09, 0x0f), // Tab
    (0xff0d, 0x1c), // Return
    (0xff13, 0xc6), // Pause
    (0xff14, 0x46), // Scroll_Lock
    (0xff15, 0x54), // Sys_Req
    (0xff1b, 0x01), // Escape
    (0xff22, 0x7b), // Muhenkan
    (0xff23, 0x79), // Henkan_Mode
    (0xff50, 0xc7), // Home
    (0xff51, 0xcb), // Left
    (0xff52, 0xc8), // Up
    (0xff53, 0xcd), // Right
    (0xff54, 0xd0), // Down
    (0xff55, 0xc9), // Prior
    (0xff56, 0xd1), // Next
    (0xff57, 0xcf), // End
    (0xff61, 0x54), // Print
    (0xff62, 0x54), // Execute
    (0xff63, 0xd2), // Insert
    (0xff67, 0xdd), // Menu
    (0xff7e, 0xb8), // Mode_switch
    (0xff7f, 0x45), // Num_Lock
    (0xff8d, 0x9c), // KP_Enter
    (0xff95, 0x47), (0xff96, 0x4b), (0xff97, 0x48), (0xff98, 0x4d), // KP_Home, Left, Up, Right
    (0xff99, 0x50), (0xff9a, 0x49), (0xff9b, 0x51), (0xff9c, 0x4f), // KP_Down, Prior, Next, End
    (0xff9d, 0x4c), (0xff9e, 0x52), (0xff9f, 0x53), // KP_Begin, Insert, Delete
    (0xffaa, 0x37), (0xffab, 0x4e), (0xffac, 0x53), // KP_Multiply, Add, Separator
    (0xffad, 0x4a), (0xffaf, 0xb5), // KP_Subtract, Divide
    (0xffb0, 0x52), (0xffb1, 0x4f), (0xffb2, 0x50), (0xffb3, 0x51), (0xffb4, 0x4b), // KP_0 to 4
    (0xffb5, 0x4c), (0xffb6, 0x4d), (0xffb7, 0x47), (0xffb8, 0x48), (0xffb9, 0x49), // KP_5 to 9
    (0xffbd, 0x59), // KP_Equal
    (0xffbe, 0x3b), (0xffbf, 0x3c), (0xffc0, 0x3d), (0xffc1, 0x3e), // F1 to F4
    (0xffc2, 0x3f), (0xffc3, 0x40), (0xffc4, 0x41), (0xffc5, 0x42), // F5 to F8
    (0xffc6, 0x43), (0xffc7, 0x44), (0xffc8, 0x57), (0xffc9, 0x58), // F9 to F12
    (0xffe1, 0x2a), (0xffe2, 0x36), // Shift_L, Shift_R
    (0xffe3, 0x1d), (0xffe4, 0x9d), // Control_L, Control_R
    (0xffe5, 0x3a), // Caps_Lock
    (0xffe7, 0x38), (0xffe8, 0xb8), // Meta_L, Meta_R
    (0xffe9, 0x38), (0xffea, 0xb8), // Alt_L, Alt_R
    (0xffeb, 0xdb), (0xffec, 0xdc), // Super_L, Super_R
    (0xffff, 0xd3), // Delete
];

/// The key that QEMU takes for a keysym, as its qnum; `None` if it has none.
///
/// `modifiers` are those held when a key goes down, `is_held` tells whether a key is down; a key
/// that goes up is preferably one that is.
pub(crate) fn qnum_of(
    keysym: u32,
    down: bool,
    modifiers: Modifiers,
    is_held: impl Fn(u8) -> bool,
) -> Option<u8> {
    // QEMU looks capital letters up as small ones (before it drops the high bits).
    let keysym = match keysym {
        0x41..=0x5a => (keysym + 0x20) as u16,
        _ => keysym as u16,
    };
    if let Some((_, keys)) = SHARED.iter().find(|(shared, _)| *shared == keysym) {
        let fits = |(qnum, needs): &(u8, Modifiers)| {
            if down {
                *needs == modifiers
            } else {
                is_held(*qnum)
            }
        };
        return keys
            .iter()
            .find(|key| fits(key))
            .or(keys.first())
            .map(|(qnum, _)| *qnum);
    }
    character(keysym).or_else(|| {
        let at = NAMED
            .binary_search_by_key(&keysym, |(named, _)| *named)
            .ok()?;
        NAMED.get(at).map(|(_, qnum)| *qnum)
    })
}

fn character(keysym: u16) -> Option<u8> {
    let character = u8::try_from(keysym).ok()?;
    ROWS.iter().find_map(|(first, plain, shifted)| {
        let at = [plain, shifted]
            .into_iter()
            .find_map(|row| row.iter().position(|c| *c == character));
        at.map(|at| first + at as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted() {
        assert!(NAMED.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn characters_of_both_levels_are_one_key() {
        for (small, capital, qnum) in [(b'a', b'A', 0x1e), (b'1', b'!', 0x02), (b'/', b'?', 0x35)] {
            for keysym in [small, capital] {
                assert_eq!(qnum_of(keysym.into(), true, PLAIN, |_| false), Some(qnum));
            }
        }
    }

    #[test]
    fn a_shared_keysym_follows_modifiers_down_and_what_is_held_up() {
        let less = u32::from(b'<');
        assert_eq!(qnum_of(less, true, SHIFT, |_| false), Some(0x33));
        assert_eq!(qnum_of(less, true, PLAIN, |_| false), Some(0x56));
        assert_eq!(qnum_of(less, false, PLAIN, |q| q == 0x33), Some(0x33));
        assert_eq!(qnum_of(less, false, SHIFT, |q| q == 0x56), Some(0x56));
        let ctrl = Modifiers {
            ctrl: true,
            ..PLAIN
        };
        assert_eq!(qnum_of(less, true, ctrl, |_| false), Some(0x33));
    }

    #[test]
    fn no_key_has_an_umlaut() {
        assert_eq!(qnum_of(0xe4, true, PLAIN, |_| false), None);
    }
}
