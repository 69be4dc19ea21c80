//! A recorder: listens for viewers, watches the screen, keeps the log.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::OwnedRwLockWriteGuard;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use vm_host::screen::{Observer, ScreenError};

use crate::anchors::LOOK;
use crate::evdev::{DeviceError, DeviceSource, GrabbedDevice};
use crate::journal::{Clock, Journal, RecordSink, SinkClosed};
use crate::listen::{Listen, Listener};
use crate::proxy::{Proxy, with_causes};
use crate::stats::Statistics;

/// Pause after a failed accept: it fails for want of file descriptors, and nothing tells when
/// there are some again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What to record.
#[derive(Clone, Debug)]
pub struct RecorderConfig {
    /// Where viewers connect.
    pub listen: Listen,
    /// QEMU's VNC server, a unix socket.
    pub upstream_vnc: PathBuf,
    /// Input devices of this machine to take as well, as files under `/dev/input`.
    pub evdev: Vec<PathBuf>,
    /// Viewers at a time. QEMU takes 32 connections, of which one is the recorder's own.
    pub max_viewers: usize,
}

impl RecorderConfig {
    /// Records the VM behind this VNC socket, for viewers on this machine's display 0.
    pub fn new(upstream_vnc: PathBuf) -> Self {
        Self {
            listen: Listen::default(),
            upstream_vnc,
            evdev: Vec::new(),
            max_viewers: 16,
        }
    }
}

/// Why recording can't start, or can't go on.
#[derive(Debug, Error)]
pub enum RecorderError {
    /// Somebody else listens there.
    #[error(
        "cannot listen for viewers at {listen}: it is in use; \
             stop what uses it or choose another address"
    )]
    Busy {
        /// Where.
        listen: Listen,
    },
    /// No place to listen at.
    #[error("{0:?} is no address to listen at; give IP:PORT, like 127.0.0.1:5900, or unix:PATH")]
    Address(String),
    /// An input device can't be taken.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Listening failed otherwise.
    #[error("cannot listen for viewers at {listen}")]
    Listen {
        /// Where.
        listen: Listen,
        /// What the system said.
        source: std::io::Error,
    },
    /// The screen can't be watched, so nothing can be recorded that could be replayed.
    #[error(transparent)]
    Screen(#[from] ScreenError),
    /// The log takes no more.
    #[error(transparent)]
    Sink(#[from] SinkClosed),
}

/// Starts recording.
#[derive(Clone, Copy, Debug)]
pub struct Recorder;

impl Recorder {
    /// Listens for viewers of the VM and records into `sink` what they do; the first record is
    /// the size of the screen. `clock` says how long the guest has run.
    ///
    /// Nothing is left behind on failure. Must be called within a tokio runtime.
    pub async fn start(
        config: RecorderConfig,
        sink: impl RecordSink,
        clock: impl Clock,
    ) -> Result<RecorderHandle, RecorderError> {
        let RecorderConfig {
            listen,
            upstream_vnc,
            evdev,
            max_viewers,
        } = config;
        let devices = evdev.iter().map(|path| GrabbedDevice::open(path));
        let devices = devices.collect::<Result<Vec<_>, _>>()?;
        let bound = Listener::bind(&listen).await;
        let (listener, local) =
            bound
                .and_then(|l| l.local().map(|at| (l, at)))
                .map_err(|source| match source.kind() {
                    std::io::ErrorKind::AddrInUse => RecorderError::Busy {
                        listen: listen.clone(),
                    },
                    _ => RecorderError::Listen {
                        listen: listen.clone(),
                        source,
                    },
                })?;
        let observer = Arc::new(Observer::connect(&upstream_vnc).await?);
        let journal = Arc::new(Journal::new(
            Arc::clone(&observer),
            Box::new(sink),
            Arc::new(clock),
        ));
        journal.note_screen();
        let stop = CancellationToken::new();
        let proxy = Arc::new(Proxy {
            upstream: upstream_vnc,
            max_viewers,
            journal: Arc::clone(&journal),
            stop: stop.clone(),
            gate: Arc::default(),
        });
        let sizes = tokio::spawn(follow_size(
            Arc::clone(&observer),
            Arc::clone(&journal),
            stop.clone(),
        ));
        let restless = tokio::spawn(follow_restless(
            Arc::clone(&observer),
            Arc::clone(&journal),
            stop.clone(),
        ));
        let load = tokio::spawn(follow_load(Arc::clone(&journal), stop.clone()));
        let viewers = tokio::spawn(accept(listener, Arc::clone(&proxy)));
        let mut handle = RecorderHandle {
            local,
            proxy,
            observer,
            tasks: vec![sizes, restless, load, viewers],
        };
        for device in devices {
            handle.capture(device);
        }
        Ok(handle)
    }
}

/// Input waits for as long as this is there.
#[derive(Debug)]
pub struct Held {
    _none_passes: OwnedRwLockWriteGuard<()>,
}

/// A running recorder. Dropping it stops it without waiting; [`RecorderHandle::shutdown`] waits.
pub struct RecorderHandle {
    local: Listen,
    proxy: Arc<Proxy>,
    observer: Arc<Observer>,
    tasks: Vec<JoinHandle<()>>,
}

impl RecorderHandle {
    /// Where viewers connect, with the port that the system chose.
    pub fn local_addr(&self) -> &Listen {
        &self.local
    }

    /// The screen as the recorder sees it.
    pub fn screen(&self) -> &Arc<Observer> {
        &self.observer
    }

    /// Takes input from a device of this machine, too, until it goes away or the recorder
    /// stops. What it holds then is released.
    pub fn capture(&mut self, device: impl DeviceSource) {
        let proxy = Arc::clone(&self.proxy);
        self.tasks.push(tokio::spawn(async move {
            if let Err(error) = proxy.serve_device(device).await {
                tracing::warn!(error = %with_causes(&error), "capture of an input device ended");
            }
        }));
    }

    /// Stops logging; input goes on to the guest. A gap is logged, once.
    pub fn pause(&self) {
        self.proxy.journal.pause();
    }

    /// Goes on logging.
    pub fn resume(&self) {
        self.proxy.journal.resume();
    }

    /// Has all input wait until the answer is dropped: QEMU would lose what it gets while the guest
    /// stands still. Returns once none is on its way to QEMU.
    pub async fn hold(&self) -> Held {
        Held {
            _none_passes: Arc::clone(&self.proxy.gate).write_owned().await,
        }
    }

    /// Returns once everything that went to QEMU before is in the sink, and the sink flushed.
    pub fn flush(&self) -> Result<(), RecorderError> {
        Ok(self.proxy.journal.flush()?)
    }

    /// Fails if recording is broken: the log takes no more, or the screen is gone.
    pub fn check(&self) -> Result<(), RecorderError> {
        self.proxy.journal.check_sink()?;
        Ok(self.observer.check()?)
    }

    /// What it has done so far.
    pub fn statistics(&self) -> Statistics {
        self.proxy.journal.statistics()
    }

    /// Disconnects all viewers, releasing what they hold, and flushes the log.
    pub async fn shutdown(mut self) -> Result<Statistics, RecorderError> {
        self.proxy.stop.cancel();
        for task in std::mem::take(&mut self.tasks) {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task of the recorder failed");
            }
        }
        self.proxy.journal.flush()?;
        Ok(self.proxy.journal.statistics())
    }
}

impl Drop for RecorderHandle {
    fn drop(&mut self) {
        self.proxy.stop.cancel();
    }
}

async fn accept(listener: Listener, proxy: Arc<Proxy>) {
    let mut viewers = JoinSet::new();
    loop {
        tokio::select! {
            () = proxy.stop.cancelled() => break,
            // Reaps those that have left; one that panicked took only itself along.
            Some(ended) = viewers.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "serving a viewer failed");
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let proxy = Arc::clone(&proxy);
                    viewers.spawn(async move { proxy.serve(stream, &peer).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "a viewer could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    while viewers.join_next().await.is_some() {}
}

/// Logs changes of the screen's size as they happen.
async fn follow_size(observer: Arc<Observer>, journal: Arc<Journal>, stop: CancellationToken) {
    let mut version = observer.version();
    loop {
        journal.note_screen();
        let changed = tokio::select! {
            () = stop.cancelled() => return,
            changed = observer.changed(version) => changed,
        };
        match changed {
            Ok(next) => version = next,
            Err(error) => {
                tracing::warn!(%error, "anchors and screen sizes are no longer recorded");
                return;
            }
        }
    }
}

/// Learns what changes on the screen without input, for anchors to leave out.
async fn follow_restless(observer: Arc<Observer>, journal: Arc<Journal>, stop: CancellationToken) {
    if let Err(error) = journal.restless().watch(&observer, &stop).await {
        tracing::debug!(%error, "no longer learning what changes by itself");
    }
}

/// Follows what the guest's processors use.
async fn follow_load(journal: Arc<Journal>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        journal.note_load();
    }
}
