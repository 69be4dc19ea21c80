//! The keys of a US keyboard, as X11 keysyms, which is what a VNC viewer sends.

/// X11's `XK_Shift_L`.
pub const SHIFT: u32 = 0xffe1;
const CONTROL: u32 = 0xffe3;
const ALT: u32 = 0xffe9;

/// A key, with the modifiers that are held while it is pressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chord {
    /// Keysyms of the modifiers, in the order in which they are pressed.
    pub modifiers: Vec<u32>,
    /// The key's keysym.
    pub key: u32,
}

impl Chord {
    /// The key of a printable ASCII character, of newline (Enter) or of tab.
    pub fn of_char(c: char) -> Option<Self> {
        let key = match c {
            '\n' => 0xff0d,
            '\t' => 0xff09,
            // Keysyms of these are their codes.
            ' '..='~' => u32::from(c),
            _ => return None,
        };
        let shifted = c.is_ascii_uppercase() || "~!@#$%^&*()_+{}|:\"<>?".contains(c);
        Some(Self {
            modifiers: if shifted { vec![SHIFT] } else { Vec::new() },
            key,
        })
    }

    /// A chord by name: `Return`, `ctrl+s`, `alt+F4`, `ctrl+shift+Home`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts: Vec<&str> = text.split('+').collect();
        let last = parts.pop()?;
        let mut modifiers = Vec::new();
        for part in parts {
            modifiers.push(match part {
                "ctrl" => CONTROL,
                "alt" => ALT,
                "shift" => SHIFT,
                _ => return None,
            });
        }
        let mut chars = last.chars();
        let key = match (chars.next(), chars.next()) {
            (Some(c), None) => {
                let plain = Self::of_char(c)?;
                modifiers.extend(plain.modifiers);
                plain.key
            }
            _ => named(last)?,
        };
        Some(Self { modifiers, key })
    }
}

/// The keysym of a key that has no character, from X11's `keysymdef.h`.
fn named(name: &str) -> Option<u32> {
    Some(match name {
        "BackSpace" => 0xff08,
        "Tab" => 0xff09,
        "Return" => 0xff0d,
        "Escape" => 0xff1b,
        "Home" => 0xff50,
        "Left" => 0xff51,
        "Up" => 0xff52,
        "Right" => 0xff53,
        "Down" => 0xff54,
        "Prior" => 0xff55,
        "Next" => 0xff56,
        "End" => 0xff57,
        "Insert" => 0xff63,
        "Delete" => 0xffff,
        "F1" => 0xffbe,
        "F2" => 0xffbf,
        "F3" => 0xffc0,
        "F4" => 0xffc1,
        "F5" => 0xffc2,
        "F6" => 0xffc3,
        "F7" => 0xffc4,
        "F8" => 0xffc5,
        "F9" => 0xffc6,
        "F10" => 0xffc7,
        "F11" => 0xffc8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shift_is_held_where_a_us_keyboard_needs_it() {
        assert_eq!(
            Chord::of_char('a'),
            Some(Chord {
                modifiers: vec![],
                key: 0x61
            })
        );
        assert_eq!(
            Chord::of_char('A'),
            Some(Chord {
                modifiers: vec![SHIFT],
                key: 0x41
            })
        );
        assert_eq!(
            Chord::of_char('|'),
            Some(Chord {
                modifiers: vec![SHIFT],
                key: 0x7c
            })
        );
        assert_eq!(
            Chord::of_char('/'),
            Some(Chord {
                modifiers: vec![],
                key: 0x2f
            })
        );
        assert_eq!(Chord::of_char('\n').map(|chord| chord.key), Some(0xff0d));
        assert_eq!(Chord::of_char('ä'), None);
        assert_eq!(Chord::of_char('\u{7f}'), None);
    }

    #[test]
    fn chords_have_names() {
        assert_eq!(
            Chord::parse("ctrl+s"),
            Some(Chord {
                modifiers: vec![CONTROL],
                key: 0x73
            })
        );
        assert_eq!(
            Chord::parse("alt+F4"),
            Some(Chord {
                modifiers: vec![ALT],
                key: 0xffc1
            })
        );
        assert_eq!(
            Chord::parse("Return"),
            Some(Chord {
                modifiers: vec![],
                key: 0xff0d
            })
        );
        for wrong in ["", "ctrl+", "hyper+x", "Retur", "s+ctrl"] {
            assert_eq!(Chord::parse(wrong), None, "{wrong}");
        }
    }
}
