//! Following: the log goes to the target as it is recorded, and is replayed there a few seconds
//! behind the user. When the user wants to move, only the tail is left.
//!
//! The twin follows too, so that all three guests have lived as long when the VM stops, which is
//! worth more bytes than anything else: what a desktop does by itself in a minute differs in as
//! many pages as what its user does.
//!
//! A line that is lost is called again, and the standby at the target, which waits, gets what it
//! missed. The VM's lock is taken only to move: checkpoints may be made meanwhile.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use traces::Record;

use super::control::{self, Caller, Control, Request};
use super::hand_over::give_way_if_so;
use super::open::ship_base;
use super::opening::{begin, hello, live};
use super::persist::persist;
use super::replay::without_twin;
use super::standing::{FollowOptions, Followed, Standing};
use super::twin::Twin;
use super::{MigrateOptions, Opened, TwinTurn, settle};
use crate::error::{Error, Result};
use crate::files::FileLock;
use crate::fork::following_from;
use crate::generation::GenerationId;
use crate::lease::Lease;
use crate::line::Line;
use crate::local;
use crate::moving::Moving;
use crate::peers::{Peer, Permission};
use crate::phase::Phase;
use crate::plan::{Feasible, Following};
use crate::progress::Progress;
use crate::protocol::{Hello, Plan, Purpose, ToSource, ToTarget};
use crate::recording;
use crate::report::{ByteReport, Strategy};
use crate::store::VmDir;
use crate::transport::WireError;
use crate::vm::{Id, VmRecord};
use crate::work::Workplace;

/// How often the recorder is asked for what is new.
const POLL: Duration = Duration::from_millis(400);

/// How often the target hears something when nothing is typed.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// A target that was not heard for so long can't be.
const SILENCE: Duration = Duration::from_secs(30);

/// Waits between calls to a target that can't be reached: the first, and the longest.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];

/// Has a site follow a VM that is being recorded, until it has moved there or `stop` is cancelled.
pub async fn follow(
    vm: &VmDir,
    peer: &Peer,
    options: FollowOptions,
    progress: &dyn Progress,
    standing: &(dyn Fn(&Standing) + Sync),
    stop: &CancellationToken,
) -> Result<Followed> {
    settle(vm).await?;
    peer.require(Permission::Receive)?;
    peer.require(Permission::Follow)?;
    let record = vm.record()?;
    local::require_lease(vm)?;
    // Not held on to: checkpoints need QEMU, too.
    drop(local::attach_running(vm).await?);
    let _only = following_lock(vm)?
        .ok_or_else(|| Error::Refused(format!("{} is being followed already", vm.name())))?;
    Workplace::Following.clear(vm).await?;
    let mut follower = Follower {
        vm,
        record: &record,
        peer,
        options,
        progress,
        standing,
        stop,
        control: Control::bind(vm)?,
        transfer: Id::random()?,
        next: 0,
        base: None,
        records: Vec::new(),
        sent: 0,
        bytes: ByteReport::default(),
        twin: None,
        clock: None,
        behind: None,
    };
    let followed = Box::pin(follower.run()).await;
    if let Some(twin) = follower.twin.take() {
        twin.kill().await;
    }
    Workplace::Following.clear(vm).await?;
    give_way_if_so(vm, peer, followed).await
}

/// The lock of who has a VM followed, if nobody does.
pub(crate) fn following_lock(vm: &VmDir) -> Result<Option<FileLock>> {
    FileLock::try_take(&vm.dir().join("follow.lock"))
}

/// Ends a twin that was left behind by a process that followed the VM and died.
pub(crate) async fn clear_following(vm: &VmDir) -> Result<()> {
    match following_lock(vm)? {
        Some(_only) => Workplace::Following.clear(vm).await,
        None => Ok(()),
    }
}

struct Follower<'a> {
    vm: &'a VmDir,
    record: &'a VmRecord,
    peer: &'a Peer,
    options: FollowOptions,
    progress: &'a dyn Progress,
    standing: &'a (dyn Fn(&Standing) + Sync),
    stop: &'a CancellationToken,
    control: Control,
    /// Names the standby at the target.
    transfer: Id,
    /// The number that the next generation has, as the target was told.
    next: u64,
    /// What it began with.
    base: Option<GenerationId>,
    /// All that was recorded since.
    records: Vec<Record>,
    /// How many of those the target has.
    sent: usize,
    /// What went over lines that are gone.
    bytes: ByteReport,
    twin: Option<Twin>,
    /// A recorded time, and when it was that.
    clock: Option<(Duration, Instant)>,
    /// How far behind the target was last.
    behind: Option<Duration>,
}

/// Why a line was left.
enum Turn {
    Stop,
    Asked(Request, Caller),
}

impl Follower<'_> {
    async fn run(&mut self) -> Result<Followed> {
        let mut wait = BACK_OFF[0];
        let mut reached = false;
        loop {
            let error = match self.connect().await {
                Ok((mut line, rate)) => {
                    reached = true;
                    wait = BACK_OFF[0];
                    match self.stream(&mut line).await {
                        Ok(Turn::Stop) => {
                            leave(line).await;
                            return Ok(Followed::Left);
                        }
                        Ok(Turn::Asked(request, caller)) => {
                            if let Some(followed) = self.answer(request, caller, line, rate).await?
                            {
                                return Ok(followed);
                            }
                            continue;
                        }
                        Err(error) if !error.is_disconnect() => {
                            leave(line).await;
                            error
                        }
                        Err(error) => {
                            let traffic = line.traffic();
                            self.bytes.sent += traffic.sent();
                            self.bytes.received += traffic.received();
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            // At first a person looks on: what can't be done is said at once.
            if !reached || !self.again(&error) {
                return Err(error);
            }
            let why = error.chain();
            tracing::warn!(error = why, "the target can't be followed");
            (self.standing)(&Standing::Waiting {
                why,
                seconds: wait.as_secs_f64(),
            });
            tokio::select! {
                () = self.stop.cancelled() => return Ok(Followed::Left),
                asked = self.asked() => {
                    let (request, caller) = asked?;
                    if let Request::Leave = request {
                        caller.end(&Ok(None)).await;
                        return Ok(Followed::Left);
                    }
                    caller.end(&Err(error)).await;
                }
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 2).min(BACK_OFF[1]);
        }
    }

    /// Whether it may go better the next time.
    fn again(&mut self, error: &Error) -> bool {
        match error {
            Error::Line { source, .. } => source.is_disconnect(),
            Error::Connect(_) | Error::PeerRefused { .. } => true,
            Error::PeerFailed { .. } => {
                // Its replay is gone, and another begins.
                self.begin_anew();
                true
            }
            _ => false,
        }
    }

    fn begin_anew(&mut self) {
        self.base = None;
        self.behind = None;
        self.sent = 0;
        self.records.clear();
    }

    /// Calls the target; afterwards it has the base, and what it says it has of the log.
    async fn connect(&mut self) -> Result<(Line, f64)> {
        let fence = local::require_lease(self.vm)?;
        let live = live(self.vm)?;
        let next = local::next_generation(self.vm)?;
        self.next = next;
        if self.base.is_none() {
            self.transfer = Id::random()?;
        }
        let mut line = Line::connect(self.vm.store(), self.peer).await?;
        // What was recorded meanwhile comes with the next call, which is made here.
        line.set_patience(Duration::ZERO);
        let (vm, record) = (self.vm, self.record);
        let version = local::qemu_version().await?;
        let purpose = Purpose::Migrate;
        let hello = Hello {
            follows: true,
            ..hello(
                vm,
                record,
                self.peer,
                purpose,
                self.transfer,
                fence,
                next,
                &version,
            )?
        };
        let (welcome, rate) = begin(&mut line, vm, hello).await?;
        if let (Some(_), Some(standby)) = (self.base, welcome.standby) {
            let standby = usize::try_from(standby).unwrap_or(usize::MAX);
            if standby > self.records.len() {
                return Err(line.unexpected(Phase::Hello, "more of the log than was sent"));
            }
            self.sent = standby;
            return Ok((line, rate));
        }
        self.sent = 0;
        let feasible = Feasible::of(vm, &live, &welcome)?;
        let strategy = Strategy::Replay;
        let base = feasible.base_for(vm, strategy)?;
        line.send(ToTarget::Plan(Plan {
            strategy,
            base,
            quick: false,
        }))
        .await?;
        let shipped = ship_base(&mut line, vm, record, &welcome, base, rate, self.progress).await?;
        self.bytes.base += shipped;
        line.send(ToTarget::Prepare).await?;
        // That takes seconds, which are not to make the replay late.
        line.send(ToTarget::Probe(Vec::new())).await?;
        line.flush().await?;
        let ToSource::Probed = line.recv(Phase::Base).await? else {
            return Err(line.unexpected(Phase::Base, "no answer to a probe"));
        };
        if self.base != base {
            // A twin of another base is of no use.
            if let Some(twin) = self.twin.take() {
                twin.kill().await;
            }
        }
        self.base = base;
        Ok((line, rate))
    }

    /// Sends what is recorded, until something else is wanted.
    async fn stream(&mut self, line: &mut Line) -> Result<Turn> {
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut spoke: Option<Instant> = None;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return Ok(Turn::Stop),
                asked = self.asked() => {
                    let (request, caller) = asked?;
                    return Ok(Turn::Asked(request, caller));
                }
                _ = poll.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Err(Error::Line {
                            site: self.peer.name.to_string(),
                            source: WireError::Silent(SILENCE),
                        });
                    }
                    let due = spoke.is_none_or(|spoke| spoke.elapsed() >= HEARTBEAT);
                    if self.feed(line, due).await? {
                        spoke = Some(Instant::now());
                    }
                }
                word = line.recv(Phase::Replay) => {
                    heard = Instant::now();
                    let (records, at, missed, cost) = match word? {
                        ToSource::Following { records, at, missed, cost } => {
                            (records, at, missed, cost)
                        }
                        // It has what was sent last.
                        ToSource::Probed => continue,
                        _ => {
                            return Err(line.unexpected(Phase::Replay, "no word of the replay"));
                        }
                    };
                    let behind = self.now().saturating_sub(Duration::from_micros(at));
                    self.behind = Some(behind);
                    (self.standing)(&Standing::Behind {
                        records,
                        seconds: behind.as_secs_f64(),
                        missed,
                        sent: self.bytes.sent + line.traffic().sent(),
                        cost,
                    });
                }
            }
        }
    }

    /// What somebody wants done. Who only wants to know how far the target is is told here.
    async fn asked(&self) -> Result<(Request, Caller)> {
        loop {
            match self.control.asked().await? {
                (Request::Tell, caller) => caller.tell(self.peer, self.following()).await,
                asked => return Ok(asked),
            }
        }
    }

    fn following(&self) -> Following {
        Following {
            site: self.peer.name.to_string(),
            base: self.base,
            records: self.sent as u64,
            seconds_behind: self.behind.map(|behind| behind.as_secs_f64()),
        }
    }

    /// The recorded time, by what the recorder said last.
    fn now(&self) -> Duration {
        self.clock
            .map_or(Duration::ZERO, |(at, since)| at + since.elapsed())
    }

    /// Sends what was recorded since the last time, or nothing where the target is due to hear
    /// something all the same; whether anything was sent.
    async fn feed(&mut self, line: &mut Line, due: bool) -> Result<bool> {
        let Some(base) = self.base else {
            return Ok(false);
        };
        let at = recording::flush(self.vm).await?.ok_or_else(|| {
            Error::Refused(format!(
                "{0} is not being recorded any more: `replay-migrate record {0}` first",
                self.vm.name()
            ))
        })?;
        let vm = self.vm.clone();
        self.clock = Some((Duration::from_micros(at.micros), Instant::now()));
        self.records = local::blocking(move || recording::records_since(&vm, base.number)).await?;
        let new = self.records.get(self.sent..).unwrap_or_default();
        if new.is_empty() && !due {
            return Ok(false);
        }
        let segment = traces::encode_records(new).map_err(Error::log("cannot pack the log"))?;
        if !new.is_empty() {
            self.bytes.log += segment.len() as u64;
        }
        for part in reconciler::blob_parts(&segment) {
            let at = at.micros;
            line.send(ToTarget::Follow { part, at }).await?;
        }
        line.flush().await?;
        self.sent = self.records.len();
        if self.options.twin {
            self.feed_twin(base, at).await;
        }
        Ok(true)
    }

    /// The twin gets what was recorded, too; one that fails is done without.
    async fn feed_twin(&mut self, base: GenerationId, at: traces::GuestTime) {
        if self.twin.is_none() {
            let options = following_from(&self.records, at);
            let place = Workplace::Following;
            let (vm, record) = (self.vm, self.record);
            let since = self.clock.map(|(_, since)| since.into_std());
            let (transfer, base) = (self.transfer, base.number);
            let twin = Twin::start(vm, record, place, transfer, base, options, since).await;
            self.twin = without_twin(twin).flatten();
        }
        if let Some(twin) = self.twin.as_mut()
            && without_twin(twin.play(&self.records)).is_none()
            && let Some(twin) = self.twin.take()
        {
            twin.kill().await;
        }
        self.options.twin = self.twin.is_some();
    }

    /// Does what somebody asked for; `None` if following goes on.
    async fn answer(
        &mut self,
        request: Request,
        caller: Caller,
        mut line: Line,
        mut rate: f64,
    ) -> Result<Option<Followed>> {
        let Request::Move {
            to,
            paused,
            drop_free,
            give_up_after,
        } = request
        else {
            leave(line).await;
            caller.end(&Ok(None)).await;
            return Ok(Some(Followed::Left));
        };
        if to != self.peer.key {
            let refused = control::elsewhere(self.vm, self.peer.name.as_str());
            caller.end(&Err(refused)).await;
            // The standby waits for the next call.
            line.abandon();
            return Ok(None);
        }
        if local::next_generation(self.vm)? != self.next {
            // A checkpoint was made: the target is to know of it.
            line.abandon();
            (line, rate) = match self.connect().await {
                Ok(connected) => connected,
                Err(error) => {
                    caller.end(&Err(error)).await;
                    return Ok(None);
                }
            };
        }
        let opened = Opened {
            line,
            strategy: Strategy::Replay,
            base: self.base,
            rate,
            records: self.sent,
            bytes: self.bytes,
            twin: self.twin.take(),
            behind: Some(self.behind.unwrap_or(Duration::MAX)),
            kept: None,
        };
        let options = MigrateOptions {
            strategy: Some(Strategy::Replay),
            paused,
            drop_free,
            twin: TwinTurn::Beside,
            quick: false,
            give_up_after: Duration::from_secs(give_up_after),
            ..MigrateOptions::default()
        };
        caller.note(&match self.behind {
            Some(behind) => format!(
                "strategy replay: {} follows already, {:.1} s behind, and only that tail is left \
                 to replay",
                self.peer.name,
                behind.as_secs_f64()
            ),
            None => format!(
                "strategy replay: {} follows already, and has all of the log but its tail",
                self.peer.name
            ),
        });
        let (vm, peer) = (self.vm, self.peer);
        let moving = Moving::of(self.transfer, peer, local::require_lease(vm)?);
        let gone = caller.gone.clone();
        let moved = persist(vm, peer, moving, options, Some(opened), &caller, &gone);
        let outcome = moved.await.map(Some);
        Workplace::Following.clear(vm).await?;
        let here = matches!(vm.lease()?, Lease::Held { .. });
        caller.end(&outcome).await;
        match outcome {
            Ok(Some(report)) => Ok(Some(Followed::Moved(Box::new(report)))),
            Ok(None) => Ok(None),
            Err(error) if !here => Err(error),
            Err(error) => {
                tracing::warn!(error = error.chain(), "the VM did not move");
                self.begin_anew();
                self.bytes = ByteReport::default();
                Ok(None)
            }
        }
    }
}

/// Tells the target that it need not follow any longer.
async fn leave(mut line: Line) {
    if line.send(ToTarget::Leave).await.is_ok() {
        let _ = line.flush().await;
    }
    line.close().await;
}
