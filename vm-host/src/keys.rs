//! Key numbers: Linux input codes and QEMU's "qnum".
//!
//! The log speaks Linux input codes; QMP's `input-send-event` and the RFB extended key event
//! (message 255, subtype 0) speak QEMU's qnum: the AT set 1 scan code, with an `e0` prefix
//! folded into bit 7. The pairs below are those of keycodemapdb's `data/keymaps.csv`
//! (<https://gitlab.com/keycodemap/keycodemapdb>), the table QEMU itself is built with, kept
//! to the keys that QEMU has a key code (`QKeyCode`) for: no other key reaches a guest.
//!
//! Promise: the two functions are inverse to each other on their domains, but for the two
//! historical qnums of Print, of which 0x54 is the one produced.

/// QEMU's historical second number for Print/SysRq, still accepted by it.
const QNUM_PRINT_HISTORICAL: u8 = 0xb7;

/// The qnum of the key that Linux calls `code` (`KEY_*`); `None` if QEMU can't press that key.
pub fn qnum_from_linux(code: u16) -> Option<u8> {
    let at = PAIRS
        .binary_search_by_key(&code, |&(linux, _)| linux)
        .ok()?;
    PAIRS.get(at).map(|&(_, qnum)| qnum)
}

/// The Linux input code (`KEY_*`) of the key with this qnum; `None` if QEMU ignores the number.
pub fn linux_from_qnum(qnum: u8) -> Option<u16> {
    if qnum == QNUM_PRINT_HISTORICAL {
        return Some(99);
    }
    PAIRS
        .iter()
        .find(|&&(_, candidate)| candidate == qnum)
        .map(|&(linux, _)| linux)
}

/// Linux code and qnum, sorted by Linux code.
#[rustfmt::skip]
const PAIRS: &[(u16, u8)] = &[
    (1, 0x01), // KEY_ESC
    (2, 0x02), // KEY_1
    (3, 0x03), // KEY_2
    (4, 0x04), // KEY_3
    (5, 0x05), // KEY_4
    (6, 0x06), // KEY_5
    (7, 0x07), // KEY_6
    (8, 0x08), // KEY_7
    (9, 0x09), // KEY_8
    (10, 0x0a), // KEY_9
    (11, 0x0b), // KEY_0
    (12, 0x0c), // KEY_MINUS
    (13, 0x0d), // KEY_EQUAL
    (14, 0x0e), // KEY_BACKSPACE
    (15, 0x0f), // KEY_TAB
    (16, 0x10), // KEY_Q
    (17, 0x11), // KEY_W
    (18, 0x12), // KEY_E
    (19, 0x13), // KEY_R
    (20, 0x14), // KEY_T
    (21, 0x15), // KEY_Y
    (22, 0x16), // KEY_U
    (23, 0x17), // KEY_I
    (24, 0x18), // KEY_O
    (25, 0x19), // KEY_P
    (26, 0x1a), // KEY_LEFTBRACE
    (27, 0x1b), // KEY_RIGHTBRACE
    (28, 0x1c), // KEY_ENTER
    (29, 0x1d), // KEY_LEFTCTRL
    (30, 0x1e), // KEY_A
    (31, 0x1f), // KEY_S
    (32, 0x20), // KEY_D
    (33, 0x21), // KEY_F
    (34, 0x22), // KEY_G
    (35, 0x23), // KEY_H
    (36, 0x24), // KEY_J
    (37, 0x25), // KEY_K
    (38, 0x26), // KEY_L
    (39, 0x27), // KEY_SEMICOLON
    (40, 0x28), // KEY_APOSTROPHE
    (41, 0x29), // KEY_GRAVE
    (42, 0x2a), // KEY_LEFTSHIFT
    (43, 0x2b), // KEY_BACKSLASH
    (44, 0x2c), // KEY_Z
    (45, 0x2d), // KEY_X
    (46, 0x2e), // KEY_C
    (47, 0x2f), // KEY_V
    (48, 0x30), // KEY_B
    (49, 0x31), // KEY_N
    (50, 0x32), // KEY_M
    (51, 0x33), // KEY_COMMA
    (52, 0x34), // KEY_DOT
    (53, 0x35), // KEY_SLASH
    (54, 0x36), // KEY_RIGHTSHIFT
    (55, 0x37), // KEY_KPASTERISK
    (56, 0x38), // KEY_LEFTALT
    (57, 0x39), // KEY_SPACE
    (58, 0x3a), // KEY_CAPSLOCK
    (59, 0x3b), // KEY_F1
    (60, 0x3c), // KEY_F2
    (61, 0x3d), // KEY_F3
    (62, 0x3e), // KEY_F4
    (63, 0x3f), // KEY_F5
    (64, 0x40), // KEY_F6
    (65, 0x41), // KEY_F7
    (66, 0x42), // KEY_F8
    (67, 0x43), // KEY_F9
    (68, 0x44), // KEY_F10
    (69, 0x45), // KEY_NUMLOCK
    (70, 0x46), // KEY_SCROLLLOCK
    (71, 0x47), // KEY_KP7
    (72, 0x48), // KEY_KP8
    (73, 0x49), // KEY_KP9
    (74, 0x4a), // KEY_KPMINUS
    (75, 0x4b), // KEY_KP4
    (76, 0x4c), // KEY_KP5
    (77, 0x4d), // KEY_KP6
    (78, 0x4e), // KEY_KPPLUS
    (79, 0x4f), // KEY_KP1
    (80, 0x50), // KEY_KP2
    (81, 0x51), // KEY_KP3
    (82, 0x52), // KEY_KP0
    (83, 0x53), // KEY_KPDOT
    (86, 0x56), // KEY_102ND
    (87, 0x57), // KEY_F11
    (88, 0x58), // KEY_F12
    (89, 0x73), // KEY_RO
    (91, 0x77), // KEY_HIRAGANA
    (92, 0x79), // KEY_HENKAN
    (93, 0x70), // KEY_KATAKANAHIRAGANA
    (94, 0x7b), // KEY_MUHENKAN
    (96, 0x9c), // KEY_KPENTER
    (97, 0x9d), // KEY_RIGHTCTRL
    (98, 0xb5), // KEY_KPSLASH
    (99, 0x54), // KEY_SYSRQ
    (100, 0xb8), // KEY_RIGHTALT
    (101, 0x5b), // KEY_LINEFEED
    (102, 0xc7), // KEY_HOME
    (103, 0xc8), // KEY_UP
    (104, 0xc9), // KEY_PAGEUP
    (105, 0xcb), // KEY_LEFT
    (106, 0xcd), // KEY_RIGHT
    (107, 0xcf), // KEY_END
    (108, 0xd0), // KEY_DOWN
    (109, 0xd1), // KEY_PAGEDOWN
    (110, 0xd2), // KEY_INSERT
    (111, 0xd3), // KEY_DELETE
    (113, 0xa0), // KEY_MUTE
    (114, 0xae), // KEY_VOLUMEDOWN
    (115, 0xb0), // KEY_VOLUMEUP
    (116, 0xde), // KEY_POWER
    (117, 0x59), // KEY_KPEQUAL
    (119, 0xc6), // KEY_PAUSE
    (121, 0x7e), // KEY_KPCOMMA
    (122, 0x72), // KEY_HANGEUL
    (123, 0x71), // KEY_HANJA
    (124, 0x7d), // KEY_YEN
    (125, 0xdb), // KEY_LEFTMETA
    (126, 0xdc), // KEY_RIGHTMETA
    (127, 0xdd), // KEY_COMPOSE
    (128, 0xe8), // KEY_STOP
    (129, 0x85), // KEY_AGAIN
    (130, 0x86), // KEY_PROPS
    (131, 0x87), // KEY_UNDO
    (132, 0x8c), // KEY_FRONT
    (133, 0xf8), // KEY_COPY
    (134, 0x64), // KEY_OPEN
    (135, 0x65), // KEY_PASTE
    (136, 0xc1), // KEY_FIND
    (137, 0xbc), // KEY_CUT
    (138, 0xf5), // KEY_HELP
    (139, 0x9e), // KEY_MENU
    (140, 0xa1), // KEY_CALC
    (142, 0xdf), // KEY_SLEEP
    (143, 0xe3), // KEY_WAKEUP
    (155, 0xec), // KEY_MAIL
    (156, 0xe6), // KEY_BOOKMARKS
    (157, 0xeb), // KEY_COMPUTER
    (158, 0xea), // KEY_BACK
    (159, 0xe9), // KEY_FORWARD
    (163, 0x99), // KEY_NEXTSONG
    (164, 0xa2), // KEY_PLAYPAUSE
    (165, 0x90), // KEY_PREVIOUSSONG
    (166, 0xa4), // KEY_STOPCD
    (172, 0xb2), // KEY_HOMEPAGE
    (173, 0xe7), // KEY_REFRESH
    (183, 0x5d), // KEY_F13
    (184, 0x5e), // KEY_F14
    (185, 0x5f), // KEY_F15
    (186, 0x55), // KEY_F16
    (187, 0x83), // KEY_F17
    (188, 0xf7), // KEY_F18
    (189, 0x84), // KEY_F19
    (190, 0x5a), // KEY_F20
    (191, 0x74), // KEY_F21
    (192, 0xf9), // KEY_F22
    (193, 0x6d), // KEY_F23
    (194, 0x6f), // KEY_F24
    (226, 0xed), // KEY_MEDIA
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_has_no_number_twice() {
        assert!(PAIRS.windows(2).all(|w| w[0].0 < w[1].0));
        let numbers: std::collections::BTreeSet<u8> = PAIRS.iter().map(|&(_, q)| q).collect();
        assert_eq!(numbers.len(), PAIRS.len());
    }

    #[test]
    fn every_key_comes_back() {
        for code in 0..=u16::MAX {
            if let Some(qnum) = qnum_from_linux(code) {
                assert_eq!(linux_from_qnum(qnum), Some(code));
            }
        }
        for qnum in (0..=u8::MAX).filter(|&q| q != QNUM_PRINT_HISTORICAL) {
            if let Some(code) = linux_from_qnum(qnum) {
                assert_eq!(qnum_from_linux(code), Some(qnum));
            }
        }
    }

    #[test]
    fn well_known_keys() {
        assert_eq!(qnum_from_linux(30), Some(0x1e)); // A
        assert_eq!(qnum_from_linux(103), Some(0xc8)); // up: e0 48
        assert_eq!(qnum_from_linux(122), Some(0x72)); // hangul: its qnum keeps seven bits only
        assert_eq!(linux_from_qnum(0xb7), Some(99));
        assert_eq!(qnum_from_linux(0), None);
        assert_eq!(linux_from_qnum(0xff), None);
        assert_eq!(qnum_from_linux(u16::MAX), None);
    }
}
