//! Records what two sites say to each other, as test vectors: `make wire`.
//!
//! Two sites with a VM that has nothing but its firmware do all that sites do with one another, each
//! through a tap that holds both their keys ([`testkit::tap`]). What was said is kept, without the
//! bulk of it, in `site/tests/wire/vN/`, where N is the version that they spoke: so an older program is
//! recorded as well as the present one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use testkit::robot::Robot;
use testkit::site::Site;
use testkit::tap::{Speaker, Tap, said_by};
use testkit::wire::{self, Entry, What};

const VM: &str = "desk";
const OTHER: &str = "other";
/// Memory in MiB: its firmware needs less.
const MEMORY: &str = "32";
/// A recording is no larger.
const LARGEST: usize = 50_000;
/// What two agents do by themselves is done by then.
const SOON: Duration = Duration::from_secs(60);
/// The kind of a source's message with a piece of the log.
const FOLLOW: u8 = 10;
/// The kind of a source's message that asks for the commit.
const COMMIT: u8 = 22;

/// Records what two sites say to each other.
#[derive(Parser)]
#[command(name = "wire")]
struct Options {
    /// The `replay-migrate` that is recorded
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/debug/replay-migrate"
    )]
    program: PathBuf,
    /// Where recordings lie, by version
    #[arg(long, value_name = "DIR", default_value = "site/tests/wire")]
    out: PathBuf,
}

struct World {
    a: Site,
    b: Site,
    /// Where B listens itself.
    hub: std::net::SocketAddr,
    /// What A says to B goes through it.
    there: Tap,
    /// And what B says to A.
    back: Tap,
    /// Has the next hand-over from A cut off once it was asked for.
    armed: Arc<AtomicBool>,
    /// Connections that were kept already, of each.
    kept: [usize; 2],
    out: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let program = options
        .program
        .canonicalize()
        .with_context(|| format!("there is no {}", options.program.display()))?;
    let dir = tempfile::tempdir()?;
    let mut world = World::new(&program, dir.path(), options.out).await?;
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20])?;
    let disk = disk.to_string_lossy();
    let create = ["vm", "create", VM, "--disk", &disk, "--memory", MEMORY];
    world.a.json(&create).await?;
    world.a.json(&["vm", "start", VM]).await?;
    record_post_copy(&mut world, dir.path()).await?;
    record_hub(&mut world, &program, dir.path(), &disk).await?;
    record(&mut world).await
}

impl World {
    async fn new(program: &Path, dir: &Path, out: PathBuf) -> anyhow::Result<Self> {
        let mut a = Site::new(program, "a", dir.join("a"));
        let mut b = Site::new(program, "b", dir.join("b"));
        let (of_a, of_b) = (a.serve().await?, b.serve().await?);
        let armed = Arc::new(AtomicBool::new(false));
        let cuts = armed.clone();
        let until = move |said: &[u8]| {
            cuts.load(Relaxed) && asks(said, COMMIT) && cuts.swap(false, Relaxed)
        };
        let there = Tap::start(a.dir(), b.dir(), of_b.addr, until).await?;
        let back = Tap::start(b.dir(), a.dir(), of_a.addr, |_| false).await?;
        a.trust("b", there.addr(), &of_b.key).await?;
        b.trust("a", back.addr(), &of_a.key).await?;
        Ok(Self {
            a,
            b,
            hub: of_b.addr,
            there,
            back,
            armed,
            kept: [0; 2],
            out,
        })
    }

    /// Keeps what was said since, under this name.
    fn keep(&mut self, name: &str) -> anyhow::Result<()> {
        let mut number = 0;
        for (tap, kept) in [&self.there, &self.back].into_iter().zip(&mut self.kept) {
            let heard = tap.heard();
            for connection in &heard[*kept..] {
                let entries = wire::entries(connection);
                if !entries.iter().any(|entry| entry.what == What::Message) {
                    continue;
                }
                number += 1;
                let name = match number {
                    1 => format!("{name}.zst"),
                    more => format!("{name}-{more}.zst"),
                };
                write(&self.out, &name, entries)?;
            }
            *kept = heard.len();
        }
        ensure!(number > 0, "nothing was said: {name}");
        Ok(())
    }
}

fn write(out: &Path, name: &str, entries: Vec<Entry>) -> anyhow::Result<()> {
    let version = wire::version(&entries).context("a conversation without a preamble")?;
    let dir = out.join(format!("v{version}"));
    std::fs::create_dir_all(&dir)?;
    let all = entries.len();
    let entries = wire::without_bulk(entries);
    let packed = wire::pack(&entries)?;
    ensure!(
        packed.len() <= LARGEST,
        "{name} takes {} bytes",
        packed.len()
    );
    let path = dir.join(name);
    std::fs::write(&path, &packed)?;
    println!(
        "{}: {} of {all} entries, {} bytes",
        path.display(),
        entries.len(),
        packed.len()
    );
    Ok(())
}

/// Whether a source that has said this has said a message of this kind.
fn asks(said: &[u8], kind: u8) -> bool {
    let entries = wire::entries(&vec![(Speaker::Caller, said.to_vec())]);
    let mut messages = entries.iter().filter(|entry| entry.what == What::Message);
    messages.any(|message| message.bytes.first() == Some(&kind))
}

/// Waits until something is so.
async fn eventually(
    what: &str,
    holds: impl AsyncFn() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    while !holds().await? {
        ensure!(begun.elapsed() < SOON, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// A VM goes to B, which has nothing of its disk.
async fn record_post_copy(world: &mut World, dir: &Path) -> anyhow::Result<()> {
    let disk = dir.join("other.raw");
    let content: Vec<u8> = (0..1_u32 << 17).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&disk, content)?;
    let disk = disk.to_string_lossy();
    let create = ["vm", "create", OTHER, "--disk", &disk, "--memory", MEMORY];
    world.a.json(&create).await?;
    world.a.json(&["vm", "start", OTHER]).await?;
    let post_copy = ["--to", "b", "--strategy", "full", "--post-copy"];
    world
        .a
        .json(&[&["migrate", OTHER][..], &post_copy].concat())
        .await?;
    world.b.json(&["vm", "stop", OTHER]).await?;
    world.keep("post-copy")
}

/// A third site is a standby, which fetches at B what A leaves there.
async fn record_hub(
    world: &mut World,
    program: &Path,
    dir: &Path,
    disk: &str,
) -> anyhow::Result<()> {
    let c = Site::new(program, "c", dir.join("c"));
    // The tap needs it.
    let key = c.key().await?;
    let tap = Tap::start(c.dir(), world.b.dir(), world.hub, |_| false).await?;
    let nowhere = "127.0.0.1:1".parse()?;
    c.trust("b", tap.addr(), &world.b.key().await?).await?;
    c.trust("a", nowhere, &world.a.key().await?).await?;
    for site in [&world.a, &world.b] {
        site.trust("c", nowhere, &key).await?;
    }
    let create = ["vm", "create", OTHER, "--disk", disk, "--memory", MEMORY];
    c.json(&create).await?;
    let collect = ["collect", "--from", "b"];
    c.json(&collect).await?;
    world.a.json(&["sync", VM, "--to", "c@b", "--once"]).await?;
    world.keep("deposit")?;
    let came = c.json(&collect).await?;
    ensure!(came["collected"][0]["vm"] == VM, "nothing came: {came}");
    for (number, connection) in tap.heard().iter().enumerate() {
        let name = format!("collect-{}.zst", number + 1);
        write(&world.out, &name, wire::entries(connection))?;
    }
    Ok(())
}

async fn record(world: &mut World) -> anyhow::Result<()> {
    let migrate = |to, how: &[&'static str]| [&["migrate", VM, "--to", to], how].concat();
    world.a.json(&["checkpoint", VM]).await?;
    world.a.json(&["seed", VM, "--to", "b"]).await?;
    world.keep("seed")?;
    world.a.json(&migrate("b", &["--dry-run"])).await?;
    world.keep("estimate")?;

    let recorder = world.a.record(VM).await?;
    let follower = world.a.spawn(&["follow", VM, "--to", "b"])?;
    let mut robot = Robot::connect(&recorder.vnc).await?;
    robot.type_text("hello").await?;
    eventually("the log arrives", async || {
        let heard = world.there.heard();
        let mut said = heard.iter().map(|all| said_by(all, Speaker::Caller));
        Ok(said.next_back().is_some_and(|said| asks(&said, FOLLOW)))
    })
    .await?;
    world.a.json(&migrate("b", &[])).await?;
    drop((robot, recorder, follower));
    world.keep("follow")?;
    world.b.json(&migrate("a", &["--strategy", "base"])).await?;
    world.keep("base")?;

    let recorder = world.a.record(VM).await?;
    let mut robot = Robot::connect(&recorder.vnc).await?;
    robot.type_text("hello").await?;
    let replay = migrate("b", &["--strategy", "replay"]);
    world.a.json(&replay).await?;
    drop((robot, recorder));
    world.keep("replay")?;
    world.b.json(&migrate("a", &["--strategy", "live"])).await?;
    world.keep("live")?;

    world.armed.store(true, Relaxed);
    let doubted = migrate("b", &["--strategy", "base", "--give-up-after", "1"]);
    let doubted = world.a.run(&doubted).await?;
    ensure!(
        world.there.is_cut(),
        "no hand-over was cut off: {doubted:?}"
    );
    world.there.mend();
    eventually("A knows that B has it", async || {
        Ok(world.a.state(VM).await? == "elsewhere")
    })
    .await?;
    world.keep("settle")?;

    world.b.kill_agent();
    let fence = world.a.status(VM).await?["lease"]["fence"].as_u64();
    let beyond = (fence.context("a lease has a number")? + 1000).to_string();
    let takeover = ["vm", "takeover", VM, "--fence", &beyond, "--yes"];
    world.a.json(&takeover).await?;
    world.b.serve_again().await?;
    eventually("B knows that A has it", async || {
        Ok(world.b.state(VM).await? == "elsewhere")
    })
    .await?;
    world.keep("superseded")
}
