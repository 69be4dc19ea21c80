//! Viewers' messages to what reached the guest's input devices.
//!
//! One [`Devices`] stands for the guest's keyboard and tablet, whichever viewer moves them; a
//! [`ViewerInput`] keeps what QEMU keeps for each viewer. Only changes become events: QEMU and
//! the guest's kernel drop the rest, too. Source: `pointer_event` in QEMU's `ui/vnc.c`.

use std::collections::BTreeSet;

use traces::Event;

use crate::keyboard::{KeyInput, Keyboard};
use crate::messages::ClientMessage;

/// QEMU's pseudo-encoding for lock lights.
const LED_STATE: i32 = -261;
/// `BTN_LEFT`, `BTN_MIDDLE`, `BTN_RIGHT`: bits 0 to 2 of an RFB button mask.
pub(crate) const BUTTONS: [u16; 3] = [0x110, 0x112, 0x111];
/// Clicks, vertical and horizontal, that bits 3 to 6 of an RFB button mask stand for.
const WHEELS: [(i8, i8); 4] = [(1, 0), (-1, 0), (0, -1), (0, 1)];
const FIRST_WHEEL_BIT: u32 = 3;

/// The guest's keyboard and pointer.
#[derive(Default)]
pub(crate) struct Devices {
    keyboard: Keyboard,
    buttons: BTreeSet<u16>,
    pointer: Option<(u16, u16)>,
    screen: Option<(u16, u16)>,
}

/// What QEMU remembers of one viewer.
#[derive(Default)]
pub(crate) struct ViewerInput {
    knows_leds: bool,
    buttons: u8,
    pointer: (u16, u16),
}

impl ViewerInput {
    /// Where this viewer's pointer is, if it holds a button there.
    pub(crate) fn dragging_at(&self) -> Option<(u16, u16)> {
        (self.buttons != 0).then_some(self.pointer)
    }
}

impl Devices {
    /// Where the pointer is, in guest pixels.
    pub(crate) fn pointer(&self) -> Option<(u16, u16)> {
        self.pointer
    }

    /// Keys and buttons that are down.
    pub(crate) fn down(&self) -> BTreeSet<u16> {
        self.keyboard
            .held()
            .chain(self.buttons.iter().copied())
            .collect()
    }

    /// The screen has this size from now on.
    pub(crate) fn set_screen(&mut self, width: u16, height: u16, out: &mut Vec<Event>) {
        if self.screen != Some((width, height)) {
            self.screen = Some((width, height));
            out.push(Event::Screen { width, height });
        }
    }

    /// Appends what reaches the guest because of a viewer's message.
    pub(crate) fn apply(
        &mut self,
        viewer: &mut ViewerInput,
        message: &ClientMessage,
        out: &mut Vec<Event>,
    ) {
        let knows_leds = viewer.knows_leds;
        match *message {
            ClientMessage::SetEncodings { ref encodings } => {
                viewer.knows_leds = encodings.contains(&LED_STATE);
            }
            ClientMessage::Key { keysym, down } => {
                self.keyboard.apply(
                    KeyInput {
                        keysym,
                        qnum: None,
                        down,
                        knows_leds,
                    },
                    out,
                );
            }
            ClientMessage::ExtendedKey { keysym, qnum, down } => {
                self.keyboard.apply(
                    KeyInput {
                        keysym,
                        qnum: Some(qnum),
                        down,
                        knows_leds,
                    },
                    out,
                );
            }
            ClientMessage::Pointer { x, y, buttons } => self.point(viewer, x, y, buttons, out),
            _ => {}
        }
    }

    /// Keys that the last message has released without naming them, as qnums.
    pub(crate) fn take_lifted(&mut self) -> Vec<u8> {
        self.keyboard.take_lifted()
    }

    /// The keys that a leaving viewer leaves pressed, as qnums.
    pub(crate) fn held_qnums(&self) -> Vec<u8> {
        self.keyboard.held_qnums()
    }

    /// A viewer has left: QEMU releases every key, whoever held it.
    pub(crate) fn leave(&mut self, out: &mut Vec<Event>) {
        self.keyboard.lift_all(out);
    }

    fn point(&mut self, viewer: &mut ViewerInput, x: u16, y: u16, mask: u8, out: &mut Vec<Event>) {
        // QEMU sends buttons and position in one input report, so the guest sees the click at
        // the new position.
        let (width, height) = self.screen.unwrap_or((u16::MAX, u16::MAX));
        let at = (
            x.min(width.saturating_sub(1)),
            y.min(height.saturating_sub(1)),
        );
        if self.pointer != Some(at) {
            self.pointer = Some(at);
            out.push(Event::Pointer { x: at.0, y: at.1 });
        }
        let changed = viewer.buttons ^ mask;
        (viewer.buttons, viewer.pointer) = (mask, at);
        for (bit, code) in BUTTONS.into_iter().enumerate() {
            if changed >> bit & 1 == 1 {
                self.button(code, mask >> bit & 1 == 1, out);
            }
        }
        for (bit, (vertical, horizontal)) in (FIRST_WHEEL_BIT..).zip(WHEELS) {
            if changed & mask & 1 << bit != 0 {
                out.push(Event::Wheel {
                    vertical,
                    horizontal,
                });
            }
        }
    }

    fn button(&mut self, code: u16, down: bool, out: &mut Vec<Event>) {
        let changed = if down {
            self.buttons.insert(code)
        } else {
            self.buttons.remove(&code)
        };
        if changed {
            out.push(Event::Button { code, down });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEFT: u16 = 0x110;

    fn pointer(x: u16, y: u16, buttons: u8) -> ClientMessage {
        ClientMessage::Pointer { x, y, buttons }
    }

    #[test]
    fn a_click_lands_at_the_new_position_and_only_changes_are_told() {
        let (mut devices, mut viewer, mut out) = <(Devices, ViewerInput, Vec<_>)>::default();
        for message in [
            pointer(5, 6, 1),
            pointer(5, 6, 1),
            pointer(7, 6, 1),
            pointer(7, 6, 0),
        ] {
            devices.apply(&mut viewer, &message, &mut out);
        }
        assert_eq!(
            out,
            [
                Event::Pointer { x: 5, y: 6 },
                Event::Button {
                    code: LEFT,
                    down: true
                },
                Event::Pointer { x: 7, y: 6 },
                Event::Button {
                    code: LEFT,
                    down: false
                },
            ]
        );
    }

    #[test]
    fn a_wheel_clicks_when_its_button_goes_down() {
        let (mut devices, mut viewer, mut out) = <(Devices, ViewerInput, Vec<_>)>::default();
        for buttons in [8, 8, 0, 16, 32, 64, 0] {
            devices.apply(&mut viewer, &pointer(0, 0, buttons), &mut out);
        }
        let wheels =
            [(1, 0), (-1, 0), (0, -1), (0, 1)].map(|(vertical, horizontal)| Event::Wheel {
                vertical,
                horizontal,
            });
        assert_eq!(out[1..], wheels);
    }

    #[test]
    fn two_viewers_move_one_pointer_and_hold_one_button() {
        let (mut devices, mut out) = <(Devices, Vec<_>)>::default();
        let (mut one, mut two) = <(ViewerInput, ViewerInput)>::default();
        devices.apply(&mut one, &pointer(1, 1, 1), &mut out);
        devices.apply(&mut two, &pointer(2, 2, 0), &mut out);
        devices.apply(&mut two, &pointer(2, 2, 1), &mut out);
        devices.apply(&mut one, &pointer(2, 2, 0), &mut out);
        devices.apply(&mut two, &pointer(2, 2, 0), &mut out);
        assert_eq!(
            out,
            [
                Event::Pointer { x: 1, y: 1 },
                Event::Button {
                    code: LEFT,
                    down: true
                },
                Event::Pointer { x: 2, y: 2 },
                Event::Button {
                    code: LEFT,
                    down: false
                },
            ]
        );
        assert_eq!(one.dragging_at(), None);
    }

    #[test]
    fn positions_stay_on_the_screen() {
        let (mut devices, mut viewer, mut out) = <(Devices, ViewerInput, Vec<_>)>::default();
        devices.set_screen(640, 480, &mut out);
        devices.set_screen(640, 480, &mut out);
        devices.apply(&mut viewer, &pointer(9999, 480, 0), &mut out);
        assert_eq!(
            out,
            [
                Event::Screen {
                    width: 640,
                    height: 480
                },
                Event::Pointer { x: 639, y: 479 }
            ]
        );
    }

    #[test]
    fn a_viewer_that_knows_the_lights_keeps_its_own_locks() {
        let (mut devices, mut viewer, mut out) = <(Devices, ViewerInput, Vec<_>)>::default();
        let encodings = ClientMessage::SetEncodings {
            encodings: vec![0, LED_STATE],
        };
        devices.apply(&mut viewer, &encodings, &mut out);
        let capital = ClientMessage::Key {
            keysym: u32::from(b'A'),
            down: true,
        };
        devices.apply(&mut viewer, &capital, &mut out);
        assert_eq!(
            out,
            [Event::Key {
                code: 30,
                down: true
            }]
        );
    }
}
