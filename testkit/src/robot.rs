//! A person at a VNC viewer: looks at the screen, moves the pointer, clicks, drags, types.
//!
//! Why: what a migration replays is what a person did, with the rhythm a person has. A robot
//! that jumps with the pointer and types at once would make logs, and replays, of another kind.
//!
//! Promises: the pointer travels, at about 60 moves a second; keys are as far apart as a
//! [`User`] has them, and Shift is pressed and released as on a keyboard; waiting is for what the screen shows,
//! with a limit, besides the time that a person thinks. What is to be done stands in a
//! [`Session`](crate::session::Session).
//!
//! Sources: RFC 6143 (RFB 3.8) through the `vnc-rs` client; X11's `keysymdef.h`.

mod canvas;
pub mod keys;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use image::RgbImage;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use vnc::{
    ClientKeyEvent, ClientMouseEvent, PixelFormat, VncClient, VncConnector, VncEncoding, VncError,
    X11Event,
};

use crate::user::User;
use canvas::Canvas;
pub use canvas::Region;
pub use keys::Chord;
use keys::SHIFT;

/// From one click of the wheel to the next.
pub const CLICK_SPACING: Duration = Duration::from_millis(80);
/// How long a button is held.
const HOLD: Duration = Duration::from_millis(30);
/// Between the events of a moving pointer.
const MOVE_SPACING: Duration = Duration::from_millis(16);
/// How often the screen is looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// From the connection to the first whole picture.
const FIRST_PICTURE_LIMIT: Duration = Duration::from_secs(20);

/// Where a VNC server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VncAddr {
    /// A port.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl std::str::FromStr for VncAddr {
    type Err = std::net::AddrParseError;

    /// `ADDRESS:PORT`, `unix:PATH`, or a path with a slash in it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        text.parse().map(Self::Tcp)
    }
}

impl std::fmt::Display for VncAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why the robot could not go on.
#[derive(Debug, Error)]
pub enum RobotError {
    /// Nobody listens there.
    #[error("cannot reach the VNC server at {addr}")]
    Connect {
        /// Where.
        addr: VncAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// What answered is no VNC server without a password.
    #[error("the VNC server at {addr} can't be used")]
    Handshake {
        /// Where.
        addr: VncAddr,
        /// What the client library said.
        source: VncError,
    },
    /// The connection is gone.
    #[error("the VNC connection to {addr} was lost: {reason}")]
    Lost {
        /// Where.
        addr: VncAddr,
        /// What ended it.
        reason: String,
    },
    /// No whole picture in time.
    #[error("the VNC server at {addr} sent no whole picture in {} s", limit.as_secs())]
    NoPicture {
        /// Where.
        addr: VncAddr,
        /// How long was waited.
        limit: Duration,
    },
}

/// Whether what was waited for came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// It did.
    Happened,
    /// The limit came first; a person would go on, too.
    Limit,
}

/// A person at a viewer. Dropping it closes the connection, with all keys and buttons released.
pub struct Robot {
    addr: VncAddr,
    shared: Arc<Mutex<Canvas>>,
    input: mpsc::UnboundedSender<X11Event>,
    lost: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
    pointer: (u16, u16),
    buttons: u8,
    /// How many pixels had changed, by the canvas's count, when the last action began.
    mark: u64,
    user: User,
}

impl Robot {
    /// Connects, and waits until the whole screen is seen.
    pub async fn connect(addr: &VncAddr) -> Result<Self, RobotError> {
        let failed = |source| RobotError::Connect {
            addr: addr.clone(),
            source,
        };
        let client = match addr {
            VncAddr::Tcp(to) => {
                let stream = TcpStream::connect(to).await.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                handshake(stream).await
            }
            VncAddr::Unix(path) => {
                handshake(UnixStream::connect(path).await.map_err(failed)?).await
            }
        };
        let client = client.map_err(|source| RobotError::Handshake {
            addr: addr.clone(),
            source,
        })?;
        let shared = Arc::new(Mutex::new(Canvas::default()));
        let (input, inbox) = mpsc::unbounded_channel();
        let (tell, lost) = watch::channel(None);
        let task = tokio::spawn(look(client, shared.clone(), inbox, tell));
        let robot = Self {
            addr: addr.clone(),
            shared,
            input,
            lost,
            task,
            pointer: (0, 0),
            buttons: 0,
            mark: 0,
            user: User::default(),
        };
        let limit = FIRST_PICTURE_LIMIT;
        match robot.wait(limit, |canvas, _| canvas.is_whole()).await? {
            Waited::Happened => Ok(robot),
            Waited::Limit => Err(RobotError::NoPicture {
                addr: addr.clone(),
                limit,
            }),
        }
    }

    /// Types from now on as this user does.
    pub fn set_user(&mut self, user: User) {
        self.user = user;
    }

    /// Moves the pointer there, along a line, faster in the middle than at the ends.
    pub async fn move_to(&mut self, x: u16, y: u16) -> Result<(), RobotError> {
        let from = (f64::from(self.pointer.0), f64::from(self.pointer.1));
        let way = (f64::from(x) - from.0, f64::from(y) - from.1);
        let length = way.0.hypot(way.1);
        if length < 1.0 {
            return Ok(());
        }
        // Fitts: a far target takes longer, but by far less than its distance.
        let time = Duration::from_secs_f64(0.12 + 0.08 * (length / 10.0).log2().max(0.0));
        let steps = (time.as_millis() / MOVE_SPACING.as_millis()).max(1) as u32;
        let mut tick = tokio::time::interval(MOVE_SPACING);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for step in 1..=steps {
            tick.tick().await;
            let t = f64::from(step) / f64::from(steps);
            let eased = t * t * (3.0 - 2.0 * t);
            let at = |from: f64, way: f64| (from + way * eased).round().clamp(0.0, 65535.0) as u16;
            self.point(at(from.0, way.0), at(from.1, way.1))?;
        }
        Ok(())
    }

    /// Goes there and presses a button once.
    pub async fn click(&mut self, x: u16, y: u16, button: Button) -> Result<(), RobotError> {
        self.move_to(x, y).await?;
        tokio::time::sleep(HOLD).await;
        self.begin_action();
        self.hold(button)?;
        tokio::time::sleep(HOLD).await;
        self.release(button)
    }

    /// Goes there and presses the left button twice.
    pub async fn double_click(&mut self, x: u16, y: u16) -> Result<(), RobotError> {
        self.click(x, y, Button::Left).await?;
        tokio::time::sleep(2 * HOLD).await;
        self.hold(Button::Left)?;
        tokio::time::sleep(HOLD).await;
        self.release(Button::Left)
    }

    /// Takes what is at one place with the left button, and drops it at another.
    pub async fn drag(&mut self, from: (u16, u16), to: (u16, u16)) -> Result<(), RobotError> {
        self.move_to(from.0, from.1).await?;
        tokio::time::sleep(2 * HOLD).await;
        self.begin_action();
        self.hold(Button::Left)?;
        tokio::time::sleep(2 * HOLD).await;
        self.move_to(to.0, to.1).await?;
        tokio::time::sleep(2 * HOLD).await;
        self.release(Button::Left)
    }

    /// Goes there and turns the wheel by so many clicks.
    pub async fn wheel(
        &mut self,
        x: u16,
        y: u16,
        turn: Button,
        clicks: u32,
    ) -> Result<(), RobotError> {
        self.move_to(x, y).await?;
        self.begin_action();
        for _ in 0..clicks {
            self.hold(turn)?;
            self.release(turn)?;
            tokio::time::sleep(CLICK_SPACING).await;
        }
        Ok(())
    }

    /// Types text: printable ASCII, newline for Enter, tab.
    ///
    /// Anything else is left out, as a US keyboard has no key for it; sessions are checked for
    /// that when they are read.
    pub async fn type_text(&mut self, text: &str) -> Result<(), RobotError> {
        self.begin_action();
        for chord in text.chars().filter_map(Chord::of_char) {
            self.press(&chord).await?;
        }
        Ok(())
    }

    /// Presses one key, with its modifiers.
    pub async fn key(&mut self, chord: &Chord) -> Result<(), RobotError> {
        self.begin_action();
        self.press(chord).await
    }

    async fn press(&mut self, chord: &Chord) -> Result<(), RobotError> {
        for modifier in &chord.modifiers {
            self.key_event(*modifier, true)?;
            // Shift comes just before; the others are found first.
            let before = if *modifier == SHIFT {
                self.user.hold()
            } else {
                self.user.key_spacing()
            };
            tokio::time::sleep(before).await;
        }
        self.key_event(chord.key, true)?;
        tokio::time::sleep(self.user.hold()).await;
        self.key_event(chord.key, false)?;
        for modifier in chord.modifiers.iter().rev() {
            self.key_event(*modifier, false)?;
        }
        let rest = self.user.key_spacing().saturating_sub(self.user.hold());
        tokio::time::sleep(rest).await;
        Ok(())
    }

    /// Waits until nothing in the region (or on the whole screen) has changed for so long.
    pub async fn wait_quiet(
        &self,
        region: Option<Region>,
        quiet: Duration,
        limit: Duration,
    ) -> Result<Waited, RobotError> {
        let begun = Instant::now();
        self.wait(limit, |canvas, now| {
            // What happened before the wait is no sign that nothing is to come.
            now.duration_since(begun) >= quiet && canvas.quiet_for(region, now) >= quiet
        })
        .await
    }

    /// Waits until something in the region has changed since the last action began.
    pub async fn wait_changed(
        &self,
        region: Option<Region>,
        limit: Duration,
    ) -> Result<Waited, RobotError> {
        let mark = self.mark;
        self.wait(limit, |canvas, _| canvas.changed_since(region, mark))
            .await
    }

    /// Waits until the screen shows this picture, with its top left corner here.
    pub async fn wait_shows(
        &self,
        picture: &RgbImage,
        at: (u16, u16),
        limit: Duration,
    ) -> Result<Waited, RobotError> {
        self.wait(limit, |canvas, _| canvas.shows(picture, at))
            .await
    }

    /// What a part of the screen shows; less where it is not all on the screen.
    pub fn cut_out(&self, region: Region) -> RgbImage {
        let (x, y) = (region.x.into(), region.y.into());
        let (width, height) = (region.width.into(), region.height.into());
        image::imageops::crop_imm(&self.picture(), x, y, width, height).to_image()
    }

    /// What the screen shows.
    pub fn picture(&self) -> RgbImage {
        self.canvas().picture()
    }

    /// Saves what the screen shows.
    pub fn save(&self, path: &Path) -> image::ImageResult<()> {
        self.picture().save(path)
    }

    /// Fails if the connection is gone.
    pub fn check(&self) -> Result<(), RobotError> {
        match &*self.lost.borrow() {
            None => Ok(()),
            Some(reason) => Err(RobotError::Lost {
                addr: self.addr.clone(),
                reason: reason.clone(),
            }),
        }
    }

    async fn wait(
        &self,
        limit: Duration,
        there: impl Fn(&Canvas, Instant) -> bool,
    ) -> Result<Waited, RobotError> {
        let end = Instant::now() + limit;
        loop {
            self.check()?;
            let now = Instant::now();
            if there(&self.canvas(), now) {
                return Ok(Waited::Happened);
            }
            if now >= end {
                return Ok(Waited::Limit);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn begin_action(&mut self) {
        let changes = self.canvas().changes();
        self.mark = changes;
    }

    fn hold(&mut self, button: Button) -> Result<(), RobotError> {
        self.buttons |= button.mask();
        self.point(self.pointer.0, self.pointer.1)
    }

    fn release(&mut self, button: Button) -> Result<(), RobotError> {
        self.buttons &= !button.mask();
        self.point(self.pointer.0, self.pointer.1)
    }

    fn point(&mut self, x: u16, y: u16) -> Result<(), RobotError> {
        self.pointer = (x, y);
        self.send(X11Event::PointerEvent(ClientMouseEvent {
            position_x: x,
            position_y: y,
            bottons: self.buttons,
        }))
    }

    fn key_event(&self, keysym: u32, down: bool) -> Result<(), RobotError> {
        self.send(X11Event::KeyEvent(ClientKeyEvent {
            keycode: keysym,
            down,
        }))
    }

    fn send(&self, event: X11Event) -> Result<(), RobotError> {
        self.check()?;
        self.input.send(event).map_err(|_| RobotError::Lost {
            addr: self.addr.clone(),
            reason: "its task ended".to_owned(),
        })
    }

    /// A panic elsewhere leaves the picture itself intact.
    fn canvas(&self) -> MutexGuard<'_, Canvas> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Robot {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A button of the mouse, or a turn of its wheel, which RFB counts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Button {
    /// The first.
    Left,
    /// The second.
    Middle,
    /// The third.
    Right,
    /// The wheel, away from the user.
    WheelUp,
    /// The wheel, towards the user.
    WheelDown,
}

impl Button {
    /// RFC 6143, 7.5.5: bit 0 is the first button.
    const fn mask(self) -> u8 {
        match self {
            Self::Left => 1,
            Self::Middle => 1 << 1,
            Self::Right => 1 << 2,
            Self::WheelUp => 1 << 3,
            Self::WheelDown => 1 << 4,
        }
    }
}

async fn handshake<S>(stream: S) -> Result<VncClient, VncError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
{
    // Raw only: the line is this machine's own.
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

/// Keeps the picture up to date and passes input on, until the connection ends.
async fn look(
    client: VncClient,
    shared: Arc<Mutex<Canvas>>,
    mut inbox: mpsc::UnboundedReceiver<X11Event>,
    tell: watch::Sender<Option<String>>,
) {
    let reason = match follow(&client, &shared, &mut inbox).await {
        Ok(reason) => reason,
        Err(VncError::ClientNotRunning) => "the server closed it".to_owned(),
        Err(error) => error.to_string(),
    };
    tell.send_replace(Some(reason));
}

async fn follow(
    client: &VncClient,
    shared: &Mutex<Canvas>,
    inbox: &mut mpsc::UnboundedReceiver<X11Event>,
) -> Result<String, VncError> {
    loop {
        let mut next = tokio::select! {
            event = client.recv_event() => Some(event?),
            input = inbox.recv() => match input {
                Some(input) => {
                    client.input(input).await?;
                    None
                }
                None => return Ok("the robot left".to_owned()),
            },
        };
        if next.is_none() {
            continue;
        }
        // The client tells of no end of an update: all that has arrived is taken in one go.
        while let Some(event) = next {
            if let vnc::VncEvent::Error(reason) = event {
                return Ok(reason);
            }
            shared
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .apply(&event, Instant::now());
            next = client.poll_event().await?;
        }
        client.input(X11Event::Refresh).await?;
    }
}
