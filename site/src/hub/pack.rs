//! Packing: a seed that is held with oneself.
//!
//! The source has the generation that the standby has, and so can be both ends of the conversation
//! that would bring the standby to a newer one: it makes a working copy of the older generation,
//! answers its own offers from it, and verifies what that becomes. What was said from the source's
//! side is what the standby needs to hear; its own answers would be the same, as they follow from the
//! generation alone.
//!
//! So nothing of the exchange exists twice, and a parcel was applied once before it is sent.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use vm_host::probe;

use super::seal::{Sealer, SealingKey};
use super::{Head, unusable};
use crate::error::{Error, Result};
use crate::exchange::{self, Outgoing, Sent};
use crate::files;
use crate::generation::{GenerationId, Manifest};
use crate::identity::Signature;
use crate::line::{Line, TargetLine};
use crate::local::{blocking, joined};
use crate::peers::Peer;
use crate::phase::Phase;
use crate::progress::Silent;
use crate::protocol::{Hello, ToSource, ToTarget};
use crate::state::{Base, State};
use crate::store::VmDir;
use crate::transport::{Limits, PROTOCOL_VERSION, WireError, framing};
use crate::vm::Id;
use crate::work::{Work, Workplace};

/// Messages between the two ends.
const QUEUE: usize = 16;

/// A parcel that is made.
pub(crate) struct Packed {
    pub(crate) head: Head,
    /// Its body.
    pub(crate) body: PathBuf,
    pub(crate) sent: Vec<Sent>,
    /// Where it was packed: gone when this is dropped.
    _place: Place,
}

impl Packed {
    /// Whether what it was told against was not as it should have been here: a standby, where it is,
    /// can't follow what was said about that.
    pub(crate) fn repaired(&self) -> bool {
        self.sent.iter().any(|sent| sent.outcome.refetched > 0)
    }
}

/// A folder that goes when nobody needs it any more.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = files::remove_dir(&self.0) {
            tracing::warn!(error = error.chain(), "what was packed is still there");
        }
    }
}

/// What is to be packed.
pub(crate) struct Parcel<'a> {
    pub(crate) vm: &'a VmDir,
    /// The standby.
    pub(crate) to: &'a Peer,
    pub(crate) key: SealingKey,
    /// The generation that it has; none: the bare images.
    pub(crate) from: Option<GenerationId>,
    /// The generation that it is to have.
    pub(crate) manifest: Manifest,
    pub(crate) hello: Hello,
    /// The rate of the line, in bits per second: how hard it is compressed.
    pub(crate) rate: f64,
}

/// Packs a parcel. What packs holds the lock of who keeps standbys.
pub(crate) async fn pack(parcel: &Parcel<'_>) -> Result<Packed> {
    let Parcel {
        vm,
        to,
        key,
        from,
        manifest,
        hello,
        rate,
    } = parcel;
    let record = hello.vm.clone();
    check_room(vm, record.hardware.memory_bytes())?;
    let transfer = Id::random()?;
    let place = Place(Workplace::Packing.dir(vm).join(transfer.to_string()));
    let number = from.map(|id| id.number);
    let base = (number, Vec::new());
    let work = Work::prepare_fork(vm, &record, Workplace::Packing, transfer, base).await?;
    let (state, base) = {
        let (vm, manifest) = ((*vm).clone(), manifest.clone());
        blocking(move || {
            Ok((
                Arc::new(State::of_generation(&vm, &manifest)?),
                Arc::new(Base::load(&vm, &record, number)?),
            ))
        })
        .await?
    };
    let identity = vm.store().identity()?;
    let head = Head {
        version: PROTOCOL_VERSION,
        vm: hello.vm.id,
        from: *from,
        to: manifest.identity(),
        recipient: to.key,
        by: identity.public(),
        key: [0; 32],
        signature: Signature::NONE,
    };
    let body = place.0.join("body");
    let out = BufWriter::new(files::create_private(&body)?);
    let sealing = Sealer::new(&identity, key, head, out);
    let (head, sealer) = sealing.map_err(Error::file("seal", &body))?;

    let (say, said) = mpsc::channel(QUEUE);
    let (pass, passed) = mpsc::channel(QUEUE);
    let (answer, answers) = mpsc::channel(QUEUE);
    let mut source = Line::local((*to).clone(), say, answers);
    let target = TargetLine::local((*to).clone(), answer, passed);
    let writing = tokio::spawn(blocking({
        let body = body.clone();
        move || write(said, &pass, sealer).map_err(Error::file("seal", &body))
    }));
    let answering = tokio::spawn(answer_from(work, target));
    let out = Outgoing {
        state: &state,
        base: &base,
        replayed: false,
        twin: None,
        rate: *rate,
        progress: &Silent,
    };
    let spoken = async {
        source
            .send(ToTarget::Hello(Box::new(hello.clone())))
            .await?;
        let manifest = Box::new(manifest.clone());
        let base = number;
        source.send(ToTarget::Generation { manifest, base }).await?;
        let sent = exchange::send_images(&mut source, &out, &mut |_| {}).await?;
        source.send(ToTarget::Publish).await?;
        Ok::<_, Error>(sent)
    };
    let spoken = spoken.await;
    drop(source);
    // Why it was written or answered no further tells more than that it was not.
    joined(writing).await?;
    joined(answering).await?;
    Ok(Packed {
        head,
        body,
        sent: spoken?,
        _place: place,
    })
}

/// Packing takes as much of the disk as the guest has memory, where its own overlays grow as well.
fn check_room(vm: &VmDir, memory: u64) -> Result<()> {
    const MARGIN: u64 = 256 << 20;
    let free = probe::free_space(vm.dir()).map_err(Error::host("cannot measure free space"))?;
    let needed = memory.saturating_add(MARGIN);
    if free >= needed {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "packing a generation of {} takes up to {} MiB on the disk with {}, and there are {} MiB free",
        vm.name(),
        needed >> 20,
        vm.dir().display(),
        free >> 20
    )))
}

/// Writes down what the source says, and has the target hear what it is to answer.
fn write(
    mut said: mpsc::Receiver<Result<ToTarget, WireError>>,
    pass: &mpsc::Sender<Result<ToTarget, WireError>>,
    mut sealer: Sealer<BufWriter<File>>,
) -> std::io::Result<()> {
    let mut frame = Vec::new();
    while let Some(message) = said.blocking_recv() {
        let Ok(message) = message else {
            break;
        };
        frame.clear();
        framing::encode_frame(&message, &mut frame, Limits::default().max_frame)
            .map_err(std::io::Error::other)?;
        sealer.write_all(&frame)?;
        let of_images = !matches!(
            message,
            ToTarget::Hello(_) | ToTarget::Generation { .. } | ToTarget::Publish
        );
        // Who has ended says why itself.
        if of_images && pass.blocking_send(Ok(message)).is_err() {
            break;
        }
    }
    sealer.finish()?.into_inner()?.sync_all()
}

/// The standby's part.
async fn answer_from(work: Work, mut line: TargetLine) -> Result<()> {
    let ToTarget::Image(first) = line.receive(Phase::Device).await? else {
        return Err(unusable("what was packed does not begin with an image"));
    };
    let (_, _, received) = work.receive(line, first).await;
    received.map(drop)
}

/// Who speaks, and is not answered: what a standby says to a parcel.
pub(super) fn unheard() -> mpsc::Sender<Result<ToSource, WireError>> {
    let (sender, mut answers) = mpsc::channel(QUEUE);
    tokio::spawn(async move { while answers.recv().await.is_some() {} });
    sender
}

/// Messages of a parcel's body, as they come.
pub(super) fn messages<R: std::io::Read + Send + 'static>(
    mut from: R,
) -> mpsc::Receiver<Result<ToTarget, WireError>> {
    let (sender, messages) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        loop {
            let next = next_message(&mut from).transpose();
            let Some(next) = next else {
                return;
            };
            let failed = next.is_err();
            if sender.blocking_send(next).is_err() || failed {
                return;
            }
        }
    });
    messages
}

/// The next message; nothing at the end.
pub(super) fn next_message(from: &mut impl std::io::Read) -> Result<Option<ToTarget>, WireError> {
    let broken = |error: std::io::Error| {
        WireError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, error))
    };
    let mut length = [0; 4];
    // At least one byte, or the end.
    match from.read(&mut length[..1]).map_err(broken)? {
        0 => return Ok(None),
        _ => from.read_exact(&mut length[1..]).map_err(broken)?,
    }
    let bytes = framing::frame_len(&length, Limits::default().max_frame)?.unwrap_or(0);
    let mut frame = vec![0; bytes];
    from.read_exact(&mut frame).map_err(broken)?;
    framing::decode(&frame).map(Some)
}
