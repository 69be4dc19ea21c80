//! Input for the guest, as if from its viewer.
//!
//! Promise: what a log holds reaches the guest exactly as it did when QEMU's VNC server passed
//! it on, one report of the device an event (`ui/vnc.c` and `ui/input.c` of QEMU).

use serde::Serialize;
use serde_json::{Value, json};
use std::sync::PoisonError;

use crate::keys::qnum_from_linux;
use crate::{Error, Result, Vm};

/// `INPUT_EVENT_ABS_MAX` of QEMU.
const ABS_MAX: u32 = 0x7fff;
/// QEMU's VNC server rounds the width of its copy of the screen up to this, and scales with it
/// (`VNC_DIRTY_PIXELS_PER_BIT`).
const WIDTH_STEP: u32 = 16;

/// One event of an input device. Codes are those of `linux/input-event-codes.h`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// A key, as `KEY_*`.
    Key {
        /// Linux input code.
        code: u16,
        /// Pressed or released.
        down: bool,
    },
    /// The pointer's position in guest pixels from the top left.
    Pointer {
        /// Column.
        x: u16,
        /// Row.
        y: u16,
    },
    /// A pointer button, as `BTN_LEFT`, `BTN_RIGHT`, `BTN_MIDDLE`, `BTN_SIDE`, `BTN_EXTRA`.
    Button {
        /// Linux input code.
        code: u16,
        /// Pressed or released.
        down: bool,
    },
    /// Wheel clicks; up and right are positive.
    Wheel {
        /// Vertical clicks.
        vertical: i8,
        /// Horizontal clicks. QEMU's tablet has no horizontal wheel: guests don't see them.
        horizontal: i8,
    },
    /// The screen has this size in pixels from here on, which positions are scaled by. Nothing
    /// is sent.
    Screen {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
}

impl std::fmt::Debug for Input {
    /// Says what kind it is, not which key: that is what the user typed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Key { .. } => "Key",
            Self::Pointer { .. } => "Pointer",
            Self::Button { .. } => "Button",
            Self::Wheel { .. } => "Wheel",
            Self::Screen { .. } => "Screen",
        })
    }
}

#[derive(Serialize)]
struct InputSendEvent {
    events: Vec<Value>,
}

impl qapi::Command for InputSendEvent {
    type Ok = qapi::Empty;
    const NAME: &'static str = "input-send-event";
    const ALLOW_OOB: bool = false;
}

/// A position as QEMU's VNC server would pass it on to the tablet.
fn scale(value: u16, size: u32) -> u32 {
    // size is at least 1; a position beyond the edge means the edge, as the server clamps it.
    let size = size.max(1);
    u32::from(value).min(size - 1) * ABS_MAX / size
}

fn button(name: &str, down: bool) -> Value {
    json!({ "type": "btn", "data": { "button": name, "down": down } })
}

fn axis(name: &str, value: u32) -> Value {
    json!({ "type": "abs", "data": { "axis": name, "value": value } })
}

/// The reports of one event: each inner list is seen by the guest at once.
fn reports(input: Input, size: (u16, u16)) -> Vec<Vec<Value>> {
    match input {
        // A key QEMU has no number for reaches no guest, whoever sends it.
        Input::Key { code, down } => qnum_from_linux(code).map_or(Vec::new(), |qnum| {
            let key = json!({ "type": "number", "data": qnum });
            vec![vec![
                json!({ "type": "key", "data": { "key": key, "down": down } }),
            ]]
        }),
        Input::Pointer { x, y } => {
            let width = u32::from(size.0).next_multiple_of(WIDTH_STEP);
            vec![vec![
                axis("x", scale(x, width)),
                axis("y", scale(y, size.1.into())),
            ]]
        }
        Input::Button { code, down } => {
            let name = match code {
                0x110 => "left",
                0x111 => "right",
                0x112 => "middle",
                0x113 => "side",
                0x114 => "extra",
                _ => return Vec::new(),
            };
            vec![vec![button(name, down)]]
        }
        Input::Wheel {
            vertical,
            horizontal,
        } => {
            let clicks = |count: i8, positive, negative| {
                let name = if count > 0 { positive } else { negative };
                let click = [vec![button(name, true)], vec![button(name, false)]];
                std::iter::repeat_n(click, count.unsigned_abs().into()).flatten()
            };
            clicks(vertical, "wheel-up", "wheel-down")
                .chain(clicks(horizontal, "wheel-right", "wheel-left"))
                .collect()
        }
        Input::Screen { .. } => Vec::new(),
    }
}

impl Vm {
    /// Passes events to the guest, in order. Those no guest could see (keys and buttons unknown
    /// to QEMU) are left out, as QEMU itself does.
    ///
    /// Fails if the guest isn't running: QEMU would drop them without a word.
    pub async fn send(&self, events: &[Input]) -> Result<()> {
        for &event in events {
            let size = {
                // Two numbers can't be left half written.
                let mut size = self
                    .screen_size
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if let Input::Screen { width, height } = event {
                    *size = (width, height);
                }
                *size
            };
            for events in reports(event, size) {
                if !self.qmp.stopwatch().is_running() {
                    let is = self.status().await?.to_string();
                    return Err(Error::State {
                        doing: "send input",
                        is,
                        must_be: "running",
                    });
                }
                self.ask("take input", InputSendEvent { events }).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_scale_as_in_qemu() {
        // qemu_input_scale_axis(value, 0, size, 0, 0x7fff)
        assert_eq!(scale(0, 1280), 0);
        assert_eq!(scale(640, 1280), 16_383);
        assert_eq!(scale(1279, 1280), 32_741);
        assert_eq!(scale(5000, 1280), 32_741);
        assert_eq!(scale(1, 0), 0);
        // 1366 is rounded up to 1376.
        let pointer = reports(Input::Pointer { x: 683, y: 0 }, (1366, 768));
        assert_eq!(pointer[0][0]["data"]["value"], 683 * 0x7fff / 1376);
    }

    #[test]
    fn wheels_click_once_each() {
        let wheel = reports(
            Input::Wheel {
                vertical: -2,
                horizontal: 1,
            },
            (640, 480),
        );
        let names: Vec<_> = wheel
            .iter()
            .map(|r| r[0]["data"]["button"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            [["wheel-down"; 2], ["wheel-down"; 2], ["wheel-right"; 2]].concat()
        );
    }

    #[test]
    fn unknown_keys_are_left_out_and_known_ones_not_shown() {
        assert!(
            reports(
                Input::Key {
                    code: 9999,
                    down: true
                },
                (640, 480)
            )
            .is_empty()
        );
        assert!(
            reports(
                Input::Button {
                    code: 30,
                    down: true
                },
                (640, 480)
            )
            .is_empty()
        );
        assert_eq!(
            format!(
                "{:?}",
                Input::Key {
                    code: 30,
                    down: true
                }
            ),
            "Key"
        );
    }
}
