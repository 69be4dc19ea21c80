//! What the guest's screen shows, kept up to date by watching QEMU's VNC server.
//!
//! The recorder and the replayer both need to know what the user saw at a given moment, many
//! times a second and without stopping the guest. QMP's `screendump` costs a few milliseconds
//! and a file each time and says nothing about *when* the screen changed; a VNC client is told.
//!
//! Promised: [`Observer`] holds every pixel of the framebuffer, losslessly (raw encoding, 8 bits
//! a channel, equal to `screendump`), and a version that grows only when a pixel really changed.
//! The pointer is not part of it wherever QEMU hands cursors to the viewer (virtio-gpu does), so
//! that what is seen does not depend on where the mouse happens to be.
//! Not promised: that every intermediate frame is seen. QEMU samples its display.
//!
//! QEMU looks at its display ever more rarely while no VNC client sends input, down to once in
//! three seconds (`vnc_refresh` in `ui/vnc.c`); only a message above type 3 makes it go back to
//! 30 ms. Input sent through QMP is no such message, so a replay would see its own effects
//! seconds late. The observer therefore repeats the *release of a key nobody holds*, which QEMU
//! drops before any device sees it (`qkbd_state_key_event` in `ui/kbd-state.c`) yet counts as
//! activity.
//!
//! Protocol: RFC 6143 (RFB 3.8), through the `vnc-rs` client.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use vnc::{
    ClientKeyEvent, PixelFormat, Rect, VncClient, VncConnector, VncEncoding, VncError, VncEvent,
    X11Event,
};

/// How long QEMU may take from the connection to the first whole frame.
const FIRST_FRAME_LIMIT: Duration = Duration::from_secs(20);
/// How often QEMU is reminded that somebody watches.
const WAKE_INTERVAL: Duration = Duration::from_millis(100);
/// X11's `XK_Henkan_Mode`: in QEMU's default key map, on no keyboard that a viewer is likely to
/// have, and only ever released here.
const IDLE_KEY: u32 = 0xff23;
/// Bytes of a pixel as QEMU is asked to send them: red, green, blue, padding.
const WIRE_PIXEL: usize = 4;
/// Bytes of a pixel as they are kept: red, green, blue.
const RGB: usize = 3;

/// Why the guest's screen can't be watched.
#[derive(Debug, Error)]
pub enum ScreenError {
    /// Nobody listens on the socket.
    #[error("cannot reach QEMU's VNC server at {}; is the VM running?", socket.display())]
    Connect {
        /// The VNC socket.
        socket: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// QEMU answered, but not as a VNC server without a password does.
    #[error("QEMU's VNC server at {} refused the screen observer", socket.display())]
    Handshake {
        /// The VNC socket.
        socket: PathBuf,
        /// What the client library said.
        source: VncError,
    },
    /// QEMU never sent a whole frame.
    #[error(
        "QEMU's VNC server at {} sent no whole frame within {} s", socket.display(), limit.as_secs()
    )]
    NoFrame {
        /// The VNC socket.
        socket: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// The connection was there and is gone.
    #[error("the connection to QEMU's screen at {} was lost: {reason}", socket.display())]
    Lost {
        /// The VNC socket.
        socket: PathBuf,
        /// What ended it, in words.
        reason: String,
    },
}

/// Counts changes of the screen: two equal versions of one [`Observer`] are the same picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameVersion(u64);

/// A picture of the guest's screen, borrowed while it is locked.
#[derive(Clone, Copy)]
pub struct FrameRef<'a> {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// Red, green and blue of each pixel, row by row without padding:
    /// `width * height * 3` bytes.
    pub rgb: &'a [u8],
    /// Which picture this is.
    pub version: FrameVersion,
    /// Since the screen last changed size, every pixel has been received.
    pub whole: bool,
}

/// A picture of the guest's screen, copied.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// Red, green and blue of each pixel, row by row without padding.
    pub rgb: Vec<u8>,
    /// Which picture this is.
    pub version: FrameVersion,
}

/// Sizes only: what the screen shows is the user's.
impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frame")
            .field("width", &self.width)
            .field("height", &self.height)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Watches a running guest's screen until dropped.
pub struct Observer {
    shared: Arc<Shared>,
    progress: watch::Receiver<Progress>,
    task: JoinHandle<()>,
}

struct Shared {
    socket: PathBuf,
    canvas: Mutex<Canvas>,
}

impl Shared {
    /// A panic in a reader's closure leaves the picture itself intact.
    fn canvas(&self) -> MutexGuard<'_, Canvas> {
        self.canvas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Default)]
struct Progress {
    version: FrameVersion,
    whole: bool,
    lost: Option<String>,
}

impl Observer {
    /// Connects to QEMU's VNC server on a unix socket and returns once the whole screen is known.
    ///
    /// Other viewers stay connected. Must be called within a tokio runtime.
    pub async fn connect(socket: &Path) -> Result<Self, ScreenError> {
        let connecting = tokio::time::timeout(FIRST_FRAME_LIMIT, Self::connect_unbounded(socket));
        connecting.await.unwrap_or_else(|_| {
            Err(ScreenError::NoFrame {
                socket: socket.to_owned(),
                limit: FIRST_FRAME_LIMIT,
            })
        })
    }

    async fn connect_unbounded(socket: &Path) -> Result<Self, ScreenError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| ScreenError::Connect {
                socket: socket.to_owned(),
                source,
            })?;
        let client = handshake(stream)
            .await
            .map_err(|source| ScreenError::Handshake {
                socket: socket.to_owned(),
                source,
            })?;
        let shared = Arc::new(Shared {
            socket: socket.to_owned(),
            canvas: Mutex::new(Canvas::default()),
        });
        let (publish, progress) = watch::channel(Progress::default());
        let task = tokio::spawn(watch_screen(client, Arc::clone(&shared), publish));
        let observer = Self {
            shared,
            progress,
            task,
        };
        observer.first_frame().await?;
        Ok(observer)
    }

    async fn first_frame(&self) -> Result<(), ScreenError> {
        let mut progress = self.progress.clone();
        let seen = progress.wait_for(|p| p.whole || p.lost.is_some()).await;
        let lost = match seen {
            Ok(progress) => progress.lost.clone(),
            Err(_) => Some("its task ended".to_owned()),
        };
        lost.map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    /// Runs `look` on the current picture. The picture can't change meanwhile, so `look` should
    /// only copy or hash what it needs.
    pub fn with_frame<T>(&self, look: impl FnOnce(FrameRef<'_>) -> T) -> T {
        let canvas = self.shared.canvas();
        look(FrameRef {
            width: canvas.width,
            height: canvas.height,
            rgb: &canvas.rgb,
            version: canvas.version,
            whole: canvas.is_whole(),
        })
    }

    /// A copy of the current picture.
    pub fn frame(&self) -> Frame {
        self.with_frame(|f| Frame {
            width: f.width,
            height: f.height,
            rgb: f.rgb.to_vec(),
            version: f.version,
        })
    }

    /// Which picture is current.
    pub fn version(&self) -> FrameVersion {
        self.progress.borrow().version
    }

    /// Waits until the picture is another one than `since` and says which.
    ///
    /// Dropping the future loses nothing. Fails once the connection is gone.
    pub async fn changed(&self, since: FrameVersion) -> Result<FrameVersion, ScreenError> {
        let mut progress = self.progress.clone();
        let next = progress
            .wait_for(|p| p.version != since || p.lost.is_some())
            .await;
        match next {
            Ok(p) if p.version != since => Ok(p.version),
            Ok(p) => Err(self.lost(p.lost.clone().unwrap_or_default())),
            Err(_) => Err(self.lost("its task ended".to_owned())),
        }
    }

    /// How long no pixel has changed.
    pub fn quiet_for(&self) -> Duration {
        self.shared.canvas().changed_at.elapsed()
    }

    /// Fails if the picture is no longer kept up to date because the connection is gone.
    pub fn check(&self) -> Result<(), ScreenError> {
        let lost = self.progress.borrow().lost.clone();
        lost.map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    fn lost(&self, reason: String) -> ScreenError {
        ScreenError::Lost {
            socket: self.shared.socket.clone(),
            reason,
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        // The task owns the client, and dropping that closes the connection.
        self.task.abort();
    }
}

async fn handshake(stream: UnixStream) -> Result<VncClient, VncError> {
    // Raw only: exact, and over a unix socket cheaper than any compression.
    VncConnector::new(stream)
        .set_auth_method(async { Err(VncError::NoPassword) })
        .add_encoding(VncEncoding::Raw)
        .add_encoding(VncEncoding::DesktopSizePseudo)
        .allow_shared(true)
        .set_pixel_format(PixelFormat::rgba())
        .build()?
        .try_start()
        .await?
        .finish()
}

/// Keeps the canvas current until the connection ends, and then says why it did.
async fn watch_screen(client: VncClient, shared: Arc<Shared>, publish: watch::Sender<Progress>) {
    let reason = match follow(&client, &shared, &publish).await {
        Ok(reason) => reason,
        Err(VncError::ClientNotRunning) => "QEMU closed it".to_owned(),
        Err(error) => error.to_string(),
    };
    tracing::debug!(socket = %shared.socket.display(), reason, "screen observer ends");
    publish.send_modify(|p| p.lost = Some(reason));
}

/// Returns the reason when the server ends the connection in an orderly way.
async fn follow(
    client: &VncClient,
    shared: &Shared,
    publish: &watch::Sender<Progress>,
) -> Result<String, VncError> {
    let mut wake = tokio::time::interval(WAKE_INTERVAL);
    wake.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut next = tokio::select! {
            event = client.recv_event() => Some(event?),
            _ = wake.tick() => None,
        };
        if next.is_none() {
            let release = ClientKeyEvent {
                keycode: IDLE_KEY,
                down: false,
            };
            client.input(X11Event::KeyEvent(release)).await?;
            continue;
        }
        // An update has no end that the client tells of, so all that has arrived is taken in one
        // go. One request too many does no harm: QEMU remembers at most one.
        while let Some(event) = next {
            if let VncEvent::Error(reason) = event {
                return Ok(reason);
            }
            let (version, whole) = {
                let mut canvas = shared.canvas();
                canvas.apply(&event);
                (canvas.version, canvas.is_whole())
            };
            publish.send_if_modified(|p| {
                let news = (p.version, p.whole) != (version, whole);
                (p.version, p.whole) = (version, whole);
                news
            });
            next = client.poll_event().await?;
        }
        client.input(X11Event::Refresh).await?;
    }
}

/// The pixels and what is known about them.
struct Canvas {
    width: u16,
    height: u16,
    rgb: Vec<u8>,
    version: FrameVersion,
    changed_at: Instant,
    /// Pixels received since the size changed. The first update after that is a full one whose
    /// rectangles don't overlap, so counting is enough to know when it is complete.
    received: u64,
}

impl Default for Canvas {
    fn default() -> Self {
        Self {
            width: 0,
            height: 0,
            rgb: Vec::new(),
            version: FrameVersion::default(),
            changed_at: Instant::now(),
            received: 0,
        }
    }
}

impl Canvas {
    fn is_whole(&self) -> bool {
        let all = u64::from(self.width) * u64::from(self.height);
        all > 0 && self.received >= all
    }

    fn apply(&mut self, event: &VncEvent) {
        match event {
            VncEvent::SetResolution(screen) => self.resize(screen.width, screen.height),
            VncEvent::RawImage(rect, pixels) => self.draw(*rect, pixels),
            // The rest was not asked for, or is not about pixels.
            _ => {}
        }
    }

    fn resize(&mut self, width: u16, height: u16) {
        if (width, height) == (self.width, self.height) {
            return;
        }
        // The client library has bounded both (at most 8192 each, 8 Mi pixels together).
        (self.width, self.height) = (width, height);
        self.rgb = vec![0; usize::from(width) * usize::from(height) * RGB];
        self.received = 0;
        self.touch();
    }

    fn draw(&mut self, rect: Rect, pixels: &[u8]) {
        let Some(inside) = Inside::of(rect, self.width, self.height) else {
            return;
        };
        let wire_stride = usize::from(rect.width) * WIRE_PIXEL;
        let stride = usize::from(self.width) * RGB;
        let first = usize::from(rect.x) * RGB;
        let mut changed = false;
        let rows = self
            .rgb
            .chunks_exact_mut(stride)
            .skip(usize::from(rect.y))
            .take(inside.rows);
        for (row, wire) in rows.zip(pixels.chunks_exact(wire_stride)) {
            let row = &mut row[first..first + inside.columns * RGB];
            for (old, new) in row.chunks_exact_mut(RGB).zip(wire.chunks_exact(WIRE_PIXEL)) {
                if *old != new[..RGB] {
                    old.copy_from_slice(&new[..RGB]);
                    changed = true;
                }
            }
        }
        self.received = self
            .received
            .saturating_add((inside.columns * inside.rows) as u64);
        if changed {
            self.touch();
        }
    }

    fn touch(&mut self) {
        self.version.0 += 1;
        self.changed_at = Instant::now();
    }
}

/// The part of a rectangle that lies on the screen.
struct Inside {
    columns: usize,
    rows: usize,
}

impl Inside {
    fn of(rect: Rect, width: u16, height: u16) -> Option<Self> {
        let columns = rect.width.min(width.checked_sub(rect.x)?);
        let rows = rect.height.min(height.checked_sub(rect.y)?);
        (columns > 0 && rows > 0).then(|| Self {
            columns: columns.into(),
            rows: rows.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_real_change_makes_a_new_version() {
        let mut canvas = Canvas::default();
        canvas.resize(2, 2);
        let blank = canvas.version;
        let rect = Rect {
            x: 1,
            y: 0,
            width: 1,
            height: 2,
        };
        canvas.draw(rect, &[0, 0, 0, 255, 0, 0, 0, 255]);
        assert_eq!(canvas.version, blank);
        assert!(!canvas.is_whole());
        canvas.draw(rect, &[1, 2, 3, 0, 4, 5, 6, 0]);
        assert!(canvas.version > blank);
        assert_eq!(canvas.rgb, [0, 0, 0, 1, 2, 3, 0, 0, 0, 4, 5, 6]);
        assert!(canvas.is_whole());
    }

    #[test]
    fn rectangles_beyond_the_screen_are_clipped() {
        let mut canvas = Canvas::default();
        canvas.resize(2, 1);
        let pixels = [9; 2 * 2 * WIRE_PIXEL];
        canvas.draw(
            Rect {
                x: 1,
                y: 0,
                width: 2,
                height: 2,
            },
            &pixels,
        );
        assert_eq!(canvas.rgb, [0, 0, 0, 9, 9, 9]);
        canvas.draw(
            Rect {
                x: 5,
                y: 5,
                width: 2,
                height: 2,
            },
            &pixels,
        );
        assert_eq!(canvas.rgb, [0, 0, 0, 9, 9, 9]);
    }
}
