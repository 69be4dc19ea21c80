//! The RFB handshake, on both sides of the proxy (RFC 6143 section 7.1 to 7.3.1).
//!
//! Towards the viewer we are a server of RFB 3.8 without a password that also speaks 3.7 and
//! 3.3; towards QEMU we are a viewer of 3.8 that shares the screen. The two handshakes are kept
//! apart, so that a viewer of any version gets a reason it can show when something is wrong, and
//! QEMU only ever sees viewers that have come this far. Everything QEMU sends after ClientInit,
//! ServerInit first, goes to the viewer as it is.

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const OUR_VERSION: &[u8; 12] = b"RFB 003.008\n";
/// Security type None.
const NO_SECURITY: u8 = 1;
/// Longest reason taken from QEMU.
const REASON_MAX: u32 = 4096;

/// How a viewer speaks during the handshake; afterwards versions don't differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// RFB 3.3: the server decides on security.
    V3,
    /// RFB 3.7: the viewer chooses, and None has no result.
    V7,
    /// RFB 3.8: there is always a result, with a reason.
    V8,
}

/// Why a handshake failed.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// Whoever connected doesn't speak RFB.
    #[error("the viewer does not speak RFB 3.x: it did not open with a version")]
    NotRfb,
    /// The viewer chose what it wasn't offered.
    #[error("the viewer chose security type {0}, but only None (1) was offered")]
    WrongSecurity(u8),
    /// The viewer hung up or its socket failed.
    #[error("the viewer left during the handshake")]
    Viewer(#[source] std::io::Error),
    /// QEMU hung up or its socket failed.
    #[error(
        "QEMU's VNC server hung up during the handshake; \
         is the VM still running, and are there fewer viewers than QEMU's `connections` limit?"
    )]
    Upstream(#[source] std::io::Error),
    /// What QEMU's socket said isn't RFB.
    #[error("what listens on the VM's VNC socket is no RFB 3.8 server")]
    UpstreamNotRfb,
    /// QEMU gave a reason for refusing.
    #[error("QEMU's VNC server refused the connection: {0}")]
    UpstreamRefused(String),
    /// QEMU wants a password or encryption.
    #[error(
        "QEMU's VNC server asks for security types {0:?}, but only None can be recorded; \
         start the VM with VNC on a unix socket and without a password"
    )]
    UpstreamSecurity(Vec<u8>),
}

/// Says who we are and learns how the viewer speaks.
///
/// One that doesn't speak RFB has been told so when this returns.
pub(crate) async fn read_version<S>(viewer: &mut S) -> Result<Version, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    viewer
        .write_all(OUR_VERSION)
        .await
        .map_err(HandshakeError::Viewer)?;
    let mut opening = [0; 12];
    viewer
        .read_exact(&mut opening)
        .await
        .map_err(HandshakeError::Viewer)?;
    parse_version(&opening).ok_or(HandshakeError::NotRfb)
}

/// Versions in between mean the older of their neighbours (RFC 6143 section 7.1.1).
fn parse_version(opening: &[u8; 12]) -> Option<Version> {
    let digits = opening.strip_prefix(b"RFB 003.")?.strip_suffix(b"\n")?;
    let minor = std::str::from_utf8(digits).ok()?;
    if !minor.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    match minor.parse::<u16>().ok()? {
        ..7 => Some(Version::V3),
        7 => Some(Version::V7),
        // Apple's 3.889 among them, which speaks 3.8 with a server that says 3.8.
        8.. => Some(Version::V8),
    }
}

/// Tells a viewer, in place of the security types, why it can't come in.
pub(crate) async fn refuse<S>(viewer: &mut S, version: Version, reason: &str) -> std::io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let mut message = match version {
        Version::V3 => vec![0; 4],
        Version::V7 | Version::V8 => vec![0],
    };
    push_reason(&mut message, reason);
    viewer.write_all(&message).await?;
    viewer.flush().await
}

fn push_reason(message: &mut Vec<u8>, reason: &str) {
    // Reasons are ours or bounded, far below 4 GiB.
    message.extend_from_slice(&(reason.len() as u32).to_be_bytes());
    message.extend_from_slice(reason.as_bytes());
}

/// Agrees on no security with the viewer and reads its ClientInit.
///
/// Whether it asked for the screen to itself is ignored: several may watch.
pub(crate) async fn admit<S>(viewer: &mut S, version: Version) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if version == Version::V3 {
        let decided = u32::from(NO_SECURITY).to_be_bytes();
        viewer
            .write_all(&decided)
            .await
            .map_err(HandshakeError::Viewer)?;
    } else {
        viewer
            .write_all(&[1, NO_SECURITY])
            .await
            .map_err(HandshakeError::Viewer)?;
        let chosen = viewer.read_u8().await.map_err(HandshakeError::Viewer)?;
        if chosen != NO_SECURITY {
            let error = HandshakeError::WrongSecurity(chosen);
            let mut result = 1_u32.to_be_bytes().to_vec();
            if version == Version::V8 {
                push_reason(&mut result, &error.to_string());
            }
            viewer
                .write_all(&result)
                .await
                .map_err(HandshakeError::Viewer)?;
            return Err(error);
        }
        if version == Version::V8 {
            viewer
                .write_all(&0_u32.to_be_bytes())
                .await
                .map_err(HandshakeError::Viewer)?;
        }
    }
    viewer.read_u8().await.map_err(HandshakeError::Viewer)?;
    Ok(())
}

/// Goes through QEMU's handshake up to where it waits for ClientInit.
pub async fn approach<S>(qemu: &mut S) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut opening = [0; 12];
    qemu.read_exact(&mut opening)
        .await
        .map_err(HandshakeError::Upstream)?;
    if parse_version(&opening) != Some(Version::V8) {
        return Err(HandshakeError::UpstreamNotRfb);
    }
    qemu.write_all(OUR_VERSION)
        .await
        .map_err(HandshakeError::Upstream)?;
    let count = qemu.read_u8().await.map_err(HandshakeError::Upstream)?;
    if count == 0 {
        return Err(HandshakeError::UpstreamRefused(read_reason(qemu).await?));
    }
    let mut types = vec![0; usize::from(count)];
    qemu.read_exact(&mut types)
        .await
        .map_err(HandshakeError::Upstream)?;
    if !types.contains(&NO_SECURITY) {
        return Err(HandshakeError::UpstreamSecurity(types));
    }
    qemu.write_all(&[NO_SECURITY])
        .await
        .map_err(HandshakeError::Upstream)?;
    match qemu.read_u32().await.map_err(HandshakeError::Upstream)? {
        0 => Ok(()),
        _ => Err(HandshakeError::UpstreamRefused(read_reason(qemu).await?)),
    }
}

async fn read_reason<S: AsyncRead + Unpin>(qemu: &mut S) -> Result<String, HandshakeError> {
    let length = qemu.read_u32().await.map_err(HandshakeError::Upstream)?;
    if length > REASON_MAX {
        return Err(HandshakeError::UpstreamNotRfb);
    }
    let mut reason = vec![0; length as usize];
    qemu.read_exact(&mut reason)
        .await
        .map_err(HandshakeError::Upstream)?;
    Ok(String::from_utf8_lossy(&reason).into_owned())
}

/// Starts the session with QEMU, shared with all other viewers.
///
/// QEMU takes a viewer's pointer for a relative one until it has named its encodings (`absolute`
/// in `ui/vnc.c`), and would move the guest's pointer by the differences. So the one that every
/// viewer has is named for it; QEMU sends nothing in return, and forgets it at the viewer's own.
pub(crate) async fn join_shared<S: AsyncWrite + Unpin>(qemu: &mut S) -> Result<(), HandshakeError> {
    const CLIENT_INIT: [u8; 1] = [1];
    const SET_ENCODINGS_RAW: [u8; 8] = [2, 0, 0, 1, 0, 0, 0, 0];
    let opening = [&CLIENT_INIT[..], &SET_ENCODINGS_RAW].concat();
    qemu.write_all(&opening)
        .await
        .map_err(HandshakeError::Upstream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (opening, version) in [
            (b"RFB 003.003\n", Some(Version::V3)),
            (b"RFB 003.005\n", Some(Version::V3)),
            (b"RFB 003.007\n", Some(Version::V7)),
            (b"RFB 003.008\n", Some(Version::V8)),
            (b"RFB 003.889\n", Some(Version::V8)),
            (b"RFB 004.001\n", None),
            (b"RFB 003.+07\n", None),
            (b"GET / HTTP/1", None),
        ] {
            assert_eq!(parse_version(opening), version);
        }
    }

    async fn dialogue(
        viewer_says: &[u8],
        version: Version,
    ) -> (Result<(), HandshakeError>, Vec<u8>) {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        theirs.write_all(viewer_says).await.unwrap();
        let result = admit(&mut ours, version).await;
        drop(ours);
        let mut heard = Vec::new();
        theirs.read_to_end(&mut heard).await.unwrap();
        (result, heard)
    }

    #[tokio::test]
    async fn each_version_is_admitted_its_own_way() {
        for (version, says, hears) in [
            (Version::V3, &[0][..], &[0, 0, 0, 1][..]),
            (Version::V7, &[1, 0], &[1, 1]),
            (Version::V8, &[1, 0], &[1, 1, 0, 0, 0, 0]),
        ] {
            let (result, heard) = dialogue(says, version).await;
            result.unwrap();
            assert_eq!(heard, hears, "{version:?}");
        }
    }

    #[tokio::test]
    async fn a_security_type_that_was_not_offered_is_refused_with_a_reason() {
        let (result, heard) = dialogue(&[2], Version::V8).await;
        assert!(matches!(result, Err(HandshakeError::WrongSecurity(2))));
        assert_eq!(heard[..6], [1, 1, 0, 0, 0, 1]);
        assert!(String::from_utf8_lossy(&heard[10..]).contains("security type 2"));
    }

    #[tokio::test]
    async fn a_server_with_a_password_is_not_approached() {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        theirs
            .write_all(b"RFB 003.008\n\x02\x02\x13")
            .await
            .unwrap();
        let error = approach(&mut ours).await.unwrap_err();
        assert!(matches!(&error, HandshakeError::UpstreamSecurity(t) if *t == [2, 19]));
        assert!(error.to_string().contains("without a password"));
    }

    #[tokio::test]
    async fn a_long_reason_is_not_read() {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        theirs
            .write_all(b"RFB 003.008\n\0\xff\xff\xff\xff")
            .await
            .unwrap();
        assert!(matches!(
            approach(&mut ours).await,
            Err(HandshakeError::UpstreamNotRfb)
        ));
    }
}
