//! What a viewer says after the handshake, parsed in full.
//!
//! RFB has no message lengths: to find the next message every one before it must be understood,
//! so an unknown type ends the connection. Sources: RFC 6143 section 7.5 for types 0 to 6, the
//! community's rfbproto (<https://github.com/rfbproto/rfbproto>) for the extensions.
//!
//! Promises: nothing is kept that the log has no use for (of a clipboard only its length), what
//! is kept never shows in `Debug`, and every length is checked before anything is allocated.

use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;

use crate::codec::Framed;

/// Clipboard bytes a viewer may send at once: QEMU's own limit, beyond which it hangs up.
pub const CUT_TEXT_MAX: u32 = 1 << 20;
/// Payload of a fence, by its specification.
const FENCE_MAX: u8 = 64;
/// Flags that open every extended clipboard message.
const EXTENDED_CLIPBOARD_FLAGS: u32 = 4;

/// One client-to-server message.
#[derive(Clone, PartialEq, Eq)]
pub enum ClientMessage {
    /// Type 0: how pixels are to be sent. Of no interest here.
    SetPixelFormat,
    /// Type 2: what the viewer understands.
    SetEncodings {
        /// Encodings and pseudo-encodings, most wanted first.
        encodings: Vec<i32>,
    },
    /// Type 3: pixels, please.
    FramebufferUpdateRequest,
    /// Type 4: a key, by X11 keysym.
    Key {
        /// X11 keysym.
        keysym: u32,
        /// Pressed or released.
        down: bool,
    },
    /// Type 5: where the pointer is and which buttons are down.
    Pointer {
        /// Column, in framebuffer pixels.
        x: u16,
        /// Row.
        y: u16,
        /// Bit 0 left, 1 middle, 2 right, 3 to 6 wheel up, down, left, right.
        buttons: u8,
    },
    /// Type 6: the clipboard, as Latin-1.
    CutText {
        /// Bytes of text.
        length: u32,
    },
    /// Type 6 with a negative length: the extended clipboard.
    ExtendedCutText {
        /// Bytes, flags included.
        length: u32,
    },
    /// Type 150: updates without asking.
    EnableContinuousUpdates,
    /// Type 248: a fence, or the answer to one.
    Fence,
    /// Type 250: shut down, reboot or reset.
    Xvp,
    /// Type 251: the viewer wants another screen size.
    SetDesktopSize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Type 255, subtype 0: a key, by its place on the keyboard.
    ExtendedKey {
        /// X11 keysym, for what depends on the letter (lock states).
        keysym: u32,
        /// QEMU's qnum: the XT scan code, an `e0` prefix folded into bit 7.
        qnum: u32,
        /// Pressed or released.
        down: bool,
    },
    /// Type 255, subtype 1: sound on, off, or its format.
    Audio,
}

impl ClientMessage {
    /// What kind it is, fit for a log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::SetPixelFormat => "SetPixelFormat",
            Self::SetEncodings { .. } => "SetEncodings",
            Self::FramebufferUpdateRequest => "FramebufferUpdateRequest",
            Self::Key { .. } => "KeyEvent",
            Self::Pointer { .. } => "PointerEvent",
            Self::CutText { .. } => "ClientCutText",
            Self::ExtendedCutText { .. } => "extended ClientCutText",
            Self::EnableContinuousUpdates => "EnableContinuousUpdates",
            Self::Fence => "ClientFence",
            Self::Xvp => "xvp",
            Self::SetDesktopSize { .. } => "SetDesktopSize",
            Self::ExtendedKey { .. } => "QEMU extended key event",
            Self::Audio => "QEMU audio",
        }
    }

    /// Whether it reaches the guest's input devices.
    pub fn is_input(&self) -> bool {
        matches!(
            self,
            Self::Key { .. } | Self::Pointer { .. } | Self::ExtendedKey { .. }
        )
    }
}

/// The kind only: keys are what the user types.
impl std::fmt::Debug for ClientMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a viewer can't be understood.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Malformed {
    /// No message has this type.
    #[error("message type {0} is unknown, so the next message can't be found")]
    UnknownType(u8),
    /// QEMU's own message has no such subtype.
    #[error("QEMU message subtype {0} is unknown, so the next message can't be found")]
    UnknownQemuSubtype(u8),
    /// QEMU's audio message has no such operation.
    #[error("QEMU audio operation {0} is unknown, so the next message can't be found")]
    UnknownAudioOperation(u16),
    /// More clipboard than QEMU takes.
    #[error("a clipboard of {0} bytes is more than the {CUT_TEXT_MAX} that QEMU takes")]
    CutTextTooLong(u32),
    /// Too short to hold its flags.
    #[error("an extended clipboard message of {0} bytes has no room for its flags")]
    ExtendedCutTextTooShort(u32),
    /// Longer than the specification allows.
    #[error("a fence of {0} bytes is more than the {FENCE_MAX} it may have")]
    FenceTooLong(u8),
}

/// How far a message goes, as far as the bytes so far tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// This many bytes must be there before more is known.
    AtLeast(usize),
    /// The whole message has this many bytes.
    Exactly(usize),
}

/// The length of the message that `bytes` begins with.
pub(crate) fn extent(bytes: &[u8]) -> Result<Extent, Malformed> {
    use Extent::{AtLeast, Exactly};
    let Some(&kind) = bytes.first() else {
        return Ok(AtLeast(1));
    };
    // How many bytes decide the length; beyond them nothing is looked at.
    let header = match kind {
        0 | 3 | 4 | 5 | 150 | 250 => 1,
        2 => 4,
        6 | 251 => 8,
        248 => 9,
        255 => 2,
        other => return Err(Malformed::UnknownType(other)),
    };
    if bytes.len() < header {
        return Ok(AtLeast(header));
    }
    let total = match kind {
        0 => 20,
        2 => 4 + 4 * usize::from((&bytes[2..]).get_u16()),
        3 | 150 => 10,
        4 => 8,
        5 => 6,
        6 => 8 + cut_text_length((&bytes[4..]).get_i32())? as usize,
        248 if bytes[8] > FENCE_MAX => return Err(Malformed::FenceTooLong(bytes[8])),
        248 => 9 + usize::from(bytes[8]),
        250 => 4,
        251 => 8 + 16 * usize::from(bytes[6]),
        _ => return qemu_extent(bytes),
    };
    Ok(Exactly(total))
}

fn cut_text_length(length: i32) -> Result<u32, Malformed> {
    let bytes = length.unsigned_abs();
    if bytes > CUT_TEXT_MAX {
        Err(Malformed::CutTextTooLong(bytes))
    } else if length < 0 && bytes < EXTENDED_CLIPBOARD_FLAGS {
        Err(Malformed::ExtendedCutTextTooShort(bytes))
    } else {
        Ok(bytes)
    }
}

fn qemu_extent(bytes: &[u8]) -> Result<Extent, Malformed> {
    match bytes[1] {
        0 => Ok(Extent::Exactly(12)),
        1 if bytes.len() < 4 => Ok(Extent::AtLeast(4)),
        1 => match (&bytes[2..]).get_u16() {
            0 | 1 => Ok(Extent::Exactly(4)),
            2 => Ok(Extent::Exactly(10)),
            other => Err(Malformed::UnknownAudioOperation(other)),
        },
        other => Err(Malformed::UnknownQemuSubtype(other)),
    }
}

/// Reads a message whose bytes are exactly those that [`extent`] found.
pub(crate) fn parse(bytes: &[u8]) -> Result<ClientMessage, Malformed> {
    let mut rest = bytes;
    let message = match rest.get_u8() {
        0 => ClientMessage::SetPixelFormat,
        2 => {
            rest.advance(3);
            let encodings = rest.chunks_exact(4).map(|mut e| e.get_i32()).collect();
            ClientMessage::SetEncodings { encodings }
        }
        3 => ClientMessage::FramebufferUpdateRequest,
        4 => {
            let down = rest.get_u8() != 0;
            rest.advance(2);
            ClientMessage::Key {
                keysym: rest.get_u32(),
                down,
            }
        }
        5 => {
            let buttons = rest.get_u8();
            ClientMessage::Pointer {
                x: rest.get_u16(),
                y: rest.get_u16(),
                buttons,
            }
        }
        6 => {
            rest.advance(3);
            match rest.get_i32() {
                length @ ..0 => ClientMessage::ExtendedCutText {
                    length: length.unsigned_abs(),
                },
                length => ClientMessage::CutText {
                    length: length.unsigned_abs(),
                },
            }
        }
        150 => ClientMessage::EnableContinuousUpdates,
        248 => ClientMessage::Fence,
        250 => ClientMessage::Xvp,
        251 => {
            rest.advance(1);
            ClientMessage::SetDesktopSize {
                width: rest.get_u16(),
                height: rest.get_u16(),
            }
        }
        255 => match rest.get_u8() {
            0 => {
                let down = rest.get_u16() != 0;
                ClientMessage::ExtendedKey {
                    down,
                    keysym: rest.get_u32(),
                    qnum: rest.get_u32(),
                }
            }
            1 => ClientMessage::Audio,
            other => return Err(Malformed::UnknownQemuSubtype(other)),
        },
        other => return Err(Malformed::UnknownType(other)),
    };
    Ok(message)
}

impl Framed {
    /// The bytes of an input message that has none of a viewer's; `None` for other messages.
    pub(crate) fn input(message: ClientMessage) -> Option<Self> {
        let mut bytes = BytesMut::with_capacity(12);
        match message {
            ClientMessage::Key { keysym, down } => {
                bytes.put_slice(&[4, u8::from(down), 0, 0]);
                bytes.put_u32(keysym);
            }
            ClientMessage::Pointer { x, y, buttons } => {
                bytes.put_slice(&[5, buttons]);
                bytes.put_u16(x);
                bytes.put_u16(y);
            }
            ClientMessage::ExtendedKey { keysym, qnum, down } => {
                bytes.put_slice(&[255, 0, 0, u8::from(down)]);
                bytes.put_u32(keysym);
                bytes.put_u32(qnum);
            }
            _ => return None,
        }
        Some(Self {
            message,
            bytes: bytes.freeze(),
        })
    }
}
