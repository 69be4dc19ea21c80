//! What is recorded: two sites' whole life with a VM, from their keys to its last move back, and what
//! is certain at each moment of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use serde_json::Value;
use testkit::site::Site;

use crate::disk::{Event, Log};
use crate::guest::MEMORY;
use crate::look;

/// The VM that moves.
pub(crate) const VM: &str = "desk";
/// A VM that is made and deleted again.
const SPARE: &str = "spare";
/// A phase that has not begun by then never will.
const LIMIT: Duration = Duration::from_secs(120);
/// How often the outside world is looked at.
const STEP: Duration = Duration::from_millis(20);

/// The sites: the VM is made at the first.
pub(crate) const SITES: [&str; 2] = ["a", "b"];

/// What this program saw.
#[derive(Clone, Debug)]
pub(crate) enum Fact {
    /// A command says that the site has this key.
    Key { site: usize, key: String },
    /// A command says that both trust each other.
    Trust,
    /// A command says that the VM is made.
    Made,
    /// A command says that it is done, and there is this generation.
    Has { site: usize, generation: u64 },
    /// Generations of the site may go from here on.
    Prunes { site: usize },
    /// The VM may become another site's from here on.
    Gives,
    /// The source has heard that the VM is this site's.
    Owned { site: usize },
    /// A VM may go from here on.
    Deletes,
    /// It is gone.
    Deleted,
}

/// What is certain, whatever else is lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) keys: [Option<String>; 2],
    pub(crate) trust: bool,
    pub(crate) made: bool,
    /// Whose the VM is, where that is not being decided.
    pub(crate) owner: Option<usize>,
    pub(crate) generations: [BTreeSet<u64>; 2],
    /// Whether the spare VM is there: not said where it is being made or deleted.
    pub(crate) spare_gone: bool,
}

impl Known {
    /// What is certain after these events.
    pub(crate) fn after(events: &[Event<Fact>]) -> Self {
        let mut known = Self::default();
        for event in events {
            let Event::Remark(fact) = event else {
                continue;
            };
            match fact {
                Fact::Key { site, key } => known.keys[*site] = Some(key.clone()),
                Fact::Trust => known.trust = true,
                Fact::Made => (known.made, known.owner) = (true, Some(0)),
                Fact::Has { site, generation } => {
                    known.generations[*site].insert(*generation);
                }
                Fact::Prunes { site } => known.generations[*site].clear(),
                Fact::Gives => known.owner = None,
                Fact::Owned { site } => known.owner = Some(*site),
                Fact::Deletes => {}
                Fact::Deleted => known.spare_gone = true,
            }
        }
        known
    }
}

/// The tellers of the story.
pub(crate) struct Story<'a> {
    pub(crate) sites: &'a mut [Site; 2],
    pub(crate) log: &'a Log<Fact>,
    pub(crate) disk: &'a Path,
}

impl Story<'_> {
    /// Tells it. Processes run when this returns.
    pub(crate) async fn tell(&mut self) -> anyhow::Result<()> {
        for site in 0..2 {
            let key = self.sites[site].key().await?;
            self.log.remark(Fact::Key { site, key });
        }
        let [one, other] = &mut *self.sites;
        testkit::site::introduce(one, other).await?;
        self.log.remark(Fact::Trust);
        self.make(VM).await?;
        self.log.remark(Fact::Made);
        self.run(0, &["vm", "start", VM]).await?;
        self.works(0).await?;
        self.run(0, &["checkpoint", VM]).await?;
        self.has(0)?;
        self.run(0, &["seed", VM, "--to", SITES[1]]).await?;
        self.has(1)?;
        self.works(0).await?;
        self.run(0, &["checkpoint", VM]).await?;
        self.has(0)?;
        self.run(0, &["vm", "stop", VM]).await?;
        self.has(0)?;
        self.run(0, &["vm", "start", VM]).await?;
        self.works(0).await?;
        self.moves(0, 1, &[]).await?;
        self.works(1).await?;
        self.make(SPARE).await?;
        self.log.remark(Fact::Deletes);
        self.run(0, &["vm", "delete", SPARE, "--yes"]).await?;
        self.log.remark(Fact::Deleted);
        // More than one that nobody will need: where they are pruned, their overlays are merged.
        for _ in 0..3 {
            self.run(1, &["checkpoint", VM]).await?;
            self.has(1)?;
            self.works(1).await?;
        }
        self.prunes(0).await?;
        self.prunes(1).await?;
        self.moves(1, 0, &["--paused"]).await?;
        self.run(0, &["vm", "resume", VM]).await?;
        self.works(0).await?;
        self.run(0, &["vm", "stop", VM]).await?;
        self.has(0)
    }

    async fn run(&self, site: usize, words: &[&str]) -> anyhow::Result<Value> {
        Ok(self.sites[site].json(words).await?)
    }

    async fn make(&self, name: &str) -> anyhow::Result<()> {
        let disk = self.disk.to_string_lossy();
        let words = ["vm", "create", name, "--disk", &disk, "--memory", MEMORY];
        let words = [&words[..], &["--no-network"]].concat();
        self.run(0, &words).await.map(drop)
    }

    /// What there is now is there for good: the command that made it is done.
    fn has(&self, site: usize) -> anyhow::Result<()> {
        for generation in look::generations(self.sites[site].dir(), VM)? {
            self.log.remark(Fact::Has { site, generation });
        }
        Ok(())
    }

    async fn prunes(&self, site: usize) -> anyhow::Result<()> {
        self.log.remark(Fact::Prunes { site });
        self.run(site, &["generations", "prune", VM]).await?;
        self.has(site)
    }

    /// Waits until the guest has written to its disk again.
    async fn works(&self, site: usize) -> anyhow::Result<()> {
        let live = self.sites[site].dir().join("vms").join(VM).join("live/run");
        let before = written(&live)?;
        let end = Instant::now() + LIMIT;
        while written(&live)? == before {
            anyhow::ensure!(Instant::now() < end, "the guest does not write to its disk");
            tokio::time::sleep(STEP).await;
        }
        Ok(())
    }

    async fn moves(&self, from: usize, to: usize, more: &[&str]) -> anyhow::Result<()> {
        self.log.remark(Fact::Gives);
        let words = ["migrate", VM, "--to", SITES[to], "--strategy", "base"];
        let words = [&words[..], more].concat();
        let mut migration = self.sites[from].spawn(&words)?;
        // It begins when the source has heard that the target has the VM.
        let resumes = migration
            .until("resume", LIMIT, |line| line["phase"] == "resume")
            .await?;
        if resumes.is_some() {
            self.log.remark(Fact::Owned { site: to });
        }
        migration.finish(LIMIT).await?.success()?;
        self.has(from)?;
        self.has(to)
    }
}

/// What tells whether a guest has written: its overlays, and when each changed.
fn written(live: &Path) -> anyhow::Result<BTreeSet<(PathBuf, SystemTime)>> {
    let mut overlays = BTreeSet::new();
    let what = || format!("cannot list {}", live.display());
    for entry in std::fs::read_dir(live).with_context(what)? {
        let path = entry?.path();
        if path.extension().is_some_and(|is| is == "qcow2") {
            let changed = path.metadata()?.modified()?;
            overlays.insert((path, changed));
        }
    }
    Ok(overlays)
}
