//! One viewer's way to QEMU and back.
//!
//! Each viewer has a connection of its own to QEMU, so none can hold another up, and whatever
//! one says wrong ends only its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::RwLock;
use tokio_util::codec::Decoder;
use tokio_util::sync::CancellationToken;

use crate::codec::{ClientCodec, DecodeError, Framed};
use crate::evdev::{DeviceSource, LocalViewer};
use crate::events::ViewerInput;
use crate::handshake::{self, HandshakeError, Version};
use crate::journal::{Journal, Seat};
use crate::listen::Stream;

/// A viewer that takes longer to introduce itself is turned away.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long QEMU may take to close a connection that we have ended.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Screen bytes taken from QEMU at once.
const SCREEN_BUFFER: usize = 64 << 10;
/// Input bytes taken from a viewer at once; longer messages grow it.
const INPUT_BUFFER: usize = 4 << 10;

/// How long a viewer that has left waits for input to pass.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// Why a viewer's connection ended, other than by its own wish.
#[derive(Debug, Error)]
pub(crate) enum ViewerError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the viewer did not finish the handshake within {} s", HANDSHAKE_LIMIT.as_secs())]
    Slow,
    #[error("there are {0} viewers already, which is the limit")]
    Full(usize),
    #[error("the VM's VNC server at {} cannot be reached; is the VM running?", socket.display())]
    NoUpstream {
        socket: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the input device is gone")]
    Device(#[source] std::io::Error),
    #[error("QEMU closed the viewer's connection")]
    UpstreamClosed,
    #[error("passing bytes on failed")]
    Io(#[from] std::io::Error),
}

/// What all viewers have in common.
pub(crate) struct Proxy {
    pub(crate) upstream: PathBuf,
    pub(crate) max_viewers: usize,
    pub(crate) journal: Arc<Journal>,
    pub(crate) stop: CancellationToken,
    /// Read while input is handed to QEMU; written while it is to wait.
    pub(crate) gate: Arc<RwLock<()>>,
}

impl Proxy {
    /// Serves one viewer until it leaves, is cut off, or the recorder stops.
    pub(crate) async fn serve(&self, viewer: Box<dyn Stream>, peer: &str) {
        let ended = tokio::select! {
            biased;
            () = self.stop.cancelled() => return,
            ended = self.introduce(viewer) => ended,
        };
        let ended = match ended {
            Ok(session) => {
                tracing::info!(peer, "viewer connected");
                self.journal.count_admitted();
                self.run(session).await
            }
            Err(error) => Err(error),
        };
        match ended {
            Ok(()) => tracing::info!(peer, "viewer disconnected"),
            Err(ViewerError::UpstreamClosed) => tracing::info!(peer, "QEMU closed the connection"),
            Err(error) => {
                self.journal.count_refused();
                tracing::warn!(peer, error = %with_causes(&error), "viewer refused");
            }
        }
    }

    /// The handshake on both sides. A viewer that speaks RFB is told what went wrong.
    async fn introduce(&self, mut viewer: Box<dyn Stream>) -> Result<Session, ViewerError> {
        let give_up = tokio::time::sleep(HANDSHAKE_LIMIT);
        tokio::pin!(give_up);
        let version = tokio::select! {
            version = handshake::read_version(&mut viewer) => version,
            () = &mut give_up => return Err(ViewerError::Slow),
        };
        let version = match version {
            Ok(version) => version,
            Err(error) => {
                // A reason as a viewer of the version we offered expects it.
                let _ = handshake::refuse(&mut viewer, Version::V8, &error.to_string()).await;
                return Err(error.into());
            }
        };
        let opened = tokio::select! {
            opened = self.open_upstream() => opened,
            () = &mut give_up => Err(ViewerError::Slow),
        };
        let (qemu, seat) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let _ = handshake::refuse(&mut viewer, version, &error.to_string()).await;
                return Err(error);
            }
        };
        let admitted = tokio::select! {
            admitted = handshake::admit(&mut viewer, version) => admitted.map_err(Into::into),
            () = &mut give_up => Err(ViewerError::Slow),
        };
        if let Err(error) = admitted {
            self.journal.leave(ViewerInput::default(), None);
            let (from_qemu, to_qemu) = qemu.into_split();
            close(from_qemu, to_qemu).await;
            return Err(error);
        }
        Ok(Session { viewer, qemu, seat })
    }

    async fn open_upstream(&self) -> Result<(UnixStream, Seat), ViewerError> {
        let seat = self.journal.seat(self.max_viewers);
        let seat = seat.ok_or(ViewerError::Full(self.max_viewers))?;
        Ok((self.connect_upstream().await?, seat))
    }

    /// A connection on which QEMU waits for ClientInit.
    async fn connect_upstream(&self) -> Result<UnixStream, ViewerError> {
        let connected = UnixStream::connect(&self.upstream).await;
        let mut qemu = connected.map_err(|source| ViewerError::NoUpstream {
            socket: self.upstream.clone(),
            source,
        })?;
        handshake::approach(&mut qemu).await?;
        Ok(qemu)
    }

    async fn run(&self, session: Session) -> Result<(), ViewerError> {
        let Session {
            viewer,
            mut qemu,
            seat,
        } = session;
        handshake::join_shared(&mut qemu).await?;
        let (from_qemu, to_qemu) = qemu.into_split();
        let (from_viewer, mut to_viewer) = tokio::io::split(viewer);
        let mut input = ViewerInput::default();
        let mut screen = BufReader::with_capacity(SCREEN_BUFFER, from_qemu);
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = self.follow(from_viewer, &to_qemu, &mut input) => ended,
            copied = tokio::io::copy_buf(&mut screen, &mut to_viewer) => match copied {
                Ok(_) => Err(ViewerError::UpstreamClosed),
                // The viewer is gone, or QEMU is: neither is the viewer's fault.
                Err(_) => Ok(()),
            },
        };
        let _ = to_viewer.shutdown().await;
        self.leave(input, &to_qemu).await;
        close(screen.into_inner(), to_qemu).await;
        drop(seat);
        ended
    }

    /// Serves an input device of this machine until it goes away, QEMU does, or the recorder
    /// stops.
    pub(crate) async fn serve_device(&self, device: impl DeviceSource) -> Result<(), ViewerError> {
        let mut qemu = self.connect_upstream().await?;
        handshake::join_shared(&mut qemu).await?;
        let (from_qemu, to_qemu) = qemu.into_split();
        let mut screen = BufReader::with_capacity(SCREEN_BUFFER, from_qemu);
        let mut input = ViewerInput::default();
        let mut nowhere = tokio::io::sink();
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = self.follow_device(device, &to_qemu, &mut input) => ended,
            // No pixels are asked for; what QEMU says unasked is of no use here.
            _ = tokio::io::copy_buf(&mut screen, &mut nowhere) => {
                Err(ViewerError::UpstreamClosed)
            }
        };
        self.leave(input, &to_qemu).await;
        close(screen.into_inner(), to_qemu).await;
        ended
    }

    async fn follow_device(
        &self,
        mut device: impl DeviceSource,
        qemu: &OwnedWriteHalf,
        input: &mut ViewerInput,
    ) -> Result<(), ViewerError> {
        let mut local = LocalViewer::new(device.position_range());
        loop {
            let event = device.next().await.map_err(ViewerError::Device)?;
            let read_at = Instant::now();
            for message in local.say(event, self.journal.screen_size()) {
                if let Some(framed) = Framed::input(message) {
                    self.forward(&framed, read_at, qemu, input).await?;
                }
            }
        }
    }

    /// Forwards what the viewer says until it hangs up.
    async fn follow(
        &self,
        mut viewer: impl AsyncRead + Unpin,
        qemu: &OwnedWriteHalf,
        input: &mut ViewerInput,
    ) -> Result<(), ViewerError> {
        let mut codec = ClientCodec::default();
        let mut buffer = BytesMut::with_capacity(INPUT_BUFFER);
        loop {
            let read = viewer
                .read_buf(&mut buffer)
                .await
                .map_err(DecodeError::Io)?;
            let read_at = Instant::now();
            while let Some(framed) = codec.decode(&mut buffer)? {
                self.forward(&framed, read_at, qemu, input).await?;
            }
            if read == 0 {
                return if buffer.is_empty() {
                    Ok(())
                } else {
                    Err(DecodeError::Truncated.into())
                };
            }
            buffer.reserve(INPUT_BUFFER);
        }
    }

    /// What a viewer held is released, once the guest can be told.
    async fn leave(&self, input: ViewerInput, qemu: &OwnedWriteHalf) {
        // One that stands still for longer is told when QEMU looks.
        let _may_pass = tokio::time::timeout(LEAVE_LIMIT, self.gate.read()).await;
        self.journal.leave(input, Some(qemu));
    }

    async fn forward(
        &self,
        framed: &Framed,
        read_at: Instant,
        qemu: &OwnedWriteHalf,
        input: &mut ViewerInput,
    ) -> std::io::Result<()> {
        let mut sent = 0;
        let mut may_pass = None;
        if framed.message.is_input() {
            may_pass = Some(self.gate.read().await);
            self.journal.look_at_clock().await;
            loop {
                match self.journal.forward(input, framed, read_at, qemu) {
                    Ok(written) => {
                        sent = written;
                        break;
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => qemu.writable().await?,
                    Err(e) => return Err(e),
                }
            }
        }
        write_all(qemu, &framed.bytes[sent..]).await?;
        drop(may_pass);
        if !framed.message.is_input() {
            self.journal.note(input, &framed.message);
        }
        Ok(())
    }
}

/// A viewer that has been admitted, and its connection to QEMU.
struct Session {
    viewer: Box<dyn Stream>,
    qemu: UnixStream,
    seat: Seat,
}

async fn write_all(qemu: &OwnedWriteHalf, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        qemu.writable().await?;
        match qemu.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Lets QEMU read to the end: it drops what is left unread when a unix socket is closed at once.
async fn close(mut from_qemu: OwnedReadHalf, mut to_qemu: OwnedWriteHalf) {
    if to_qemu.shutdown().await.is_ok() {
        let drain = async {
            let mut rest = vec![0; SCREEN_BUFFER];
            while matches!(from_qemu.read(&mut rest).await, Ok(1..)) {}
        };
        let _ = tokio::time::timeout(CLOSE_LIMIT, drain).await;
    }
}

pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
