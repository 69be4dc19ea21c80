//! Two sites and a guest that goes to and fro between them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;
use testkit::link::{Link, LinkProfile, Rate};
use testkit::robot::{Button, Robot};
use testkit::site::{Qemu, Recorder, Site, qemus_on};

use crate::case::Side;
use crate::volume::Volume;

/// The VM of all cases.
pub(crate) const VM: &str = "desk";
/// The sites' names.
const NAMES: [&str; 2] = ["a", "b"];
/// So long that a phase is still under way when this program hears that it began.
const DELAY: Duration = Duration::from_millis(20);
/// What the line carries, in Mbit/s.
const RATE: u64 = 100;
/// Nobody holds a VM's lock for longer who only looks after it.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
/// What the user types, to have something to replay.
const TYPED: &str = "date\n";

/// Two sites that trust each other, and a VM at one of them.
pub(crate) struct World {
    sites: [Site; 2],
    /// From each site to the other.
    links: [Link; 2],
    volumes: [Volume; 2],
    /// Which site has the VM.
    home: usize,
    /// Whether the desktop is up, so that one can work at it.
    pub(crate) desktop: bool,
}

impl World {
    /// A fresh one in this folder; what was there before goes. The VM runs at one site, and the
    /// other has a stale copy.
    pub(crate) async fn new(
        program: &Path,
        out: &Path,
        shim: &Path,
        guest: &str,
    ) -> anyhow::Result<Self> {
        let mut volumes = Vec::new();
        let mut sites = Vec::new();
        for name in NAMES {
            let dir = out.join(name);
            if dir.exists() {
                Site::clear_leftovers(program, &dir);
                std::fs::remove_dir_all(&dir)
                    .with_context(|| format!("cannot remove {}", dir.display()))?;
            }
            let switch = out.join(format!("{name}.fails"));
            let volume = Volume::mount(&dir.join("vms"), switch)?;
            volume.mend()?;
            let mut site = Site::new(program, name, &dir);
            for (key, value) in volume.environment(shim) {
                site.set_env(key, value);
            }
            // The read-only base images; a VM that is made and removed leaves them.
            site.json(&["vm", "create", "images", "--disk", guest])
                .await?;
            site.json(&["vm", "delete", "images", "--yes"]).await?;
            volumes.push(volume);
            sites.push(site);
        }
        let (Ok(mut sites), Ok(volumes)) = (
            <[Site; 2]>::try_from(sites),
            <[Volume; 2]>::try_from(volumes),
        ) else {
            bail!("two sites have two names");
        };
        let profile = LinkProfile::symmetric(Rate::mbit(RATE), DELAY);
        let mut links = Vec::new();
        for from in 0..2 {
            let to = 1 - from;
            let agent = sites[to].serve().await?;
            let link = Link::start(agent.addr, profile)?;
            sites[from]
                .trust(NAMES[to], link.addr(), &agent.key)
                .await?;
            links.push(link);
        }
        let Ok(links) = <[Link; 2]>::try_from(links) else {
            bail!("two sites have two links");
        };
        let world = Self {
            sites,
            links,
            volumes,
            home: 0,
            desktop: true,
        };
        let home = world.site(Side::Source);
        home.json(&["vm", "create", VM, "--disk", guest]).await?;
        home.json(&["vm", "start", VM]).await?;
        home.json(&["checkpoint", VM]).await?;
        home.json(&["seed", VM, "--to", NAMES[1]]).await?;
        Ok(world)
    }

    /// Source is who has the VM before the case.
    const fn index(&self, side: Side) -> usize {
        match side {
            Side::Source => self.home,
            Side::Target => 1 - self.home,
        }
    }

    pub(crate) fn site(&self, side: Side) -> &Site {
        &self.sites[self.index(side)]
    }

    pub(crate) fn site_mut(&mut self, side: Side) -> &mut Site {
        &mut self.sites[self.index(side)]
    }

    pub(crate) fn volume(&self, side: Side) -> &Volume {
        &self.volumes[self.index(side)]
    }

    /// From the source to the target.
    pub(crate) fn link(&self) -> &Link {
        &self.links[self.home]
    }

    /// Both ways, so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.link().bytes_up() + self.link().bytes_down()
    }

    /// The VM is at the other site now.
    pub(crate) fn moved(&mut self) {
        self.home = 1 - self.home;
    }

    /// The folder of the VM at a site.
    pub(crate) fn vm_dir(&self, side: Side) -> PathBuf {
        self.site(side).dir().join("vms").join(VM)
    }

    /// The lease as the file has it; nothing where there is none.
    pub(crate) fn lease(&self, side: Side) -> anyhow::Result<Option<Value>> {
        let path = self.vm_dir(side).join("lease.json");
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .with_context(|| format!("{} is damaged", path.display())),
        }
    }

    /// What the lease says: `held`, `offered`, `elsewhere`, or `unknown` where there is none.
    pub(crate) fn right(&self, side: Side) -> anyhow::Result<String> {
        let lease = self.lease(side)?;
        let state = lease.as_ref().and_then(|lease| lease["state"].as_str());
        Ok(state.unwrap_or("unknown").to_owned())
    }

    /// The VM's own QEMU, and not one of a fork.
    pub(crate) fn qemu(&self, side: Side) -> Option<Qemu> {
        let live = self.vm_dir(side).join("live");
        qemus_on(&live).pop()
    }

    /// The QEMU of a fork that replays.
    pub(crate) fn replaying_qemu(&self, side: Side) -> Option<Qemu> {
        let incoming = self.vm_dir(side).join("incoming");
        qemus_on(&incoming).pop()
    }

    /// How many QEMUs a site has, whatever they are for.
    pub(crate) fn qemus(&self, side: Side) -> usize {
        qemus_on(self.site(side).dir()).len()
    }

    /// Records the VM while its user does something.
    pub(crate) async fn record(&self) -> anyhow::Result<Recorder> {
        let recorder = self.site(Side::Source).record(VM).await?;
        let mut robot = Robot::connect(&recorder.vnc).await?;
        robot.click(300, 100, Button::Left).await?;
        robot.type_text(TYPED).await?;
        Ok(recorder)
    }

    /// The agents run, the line works, and there is room.
    pub(crate) async fn mend(&mut self) -> anyhow::Result<()> {
        self.link().mend();
        for volume in &self.volumes {
            volume.mend()?;
        }
        for site in &mut self.sites {
            site.serve_again().await?;
        }
        Ok(())
    }

    /// Ends both agents in order, and starts them again: what a death has left is cleared then.
    pub(crate) async fn restart_agents(&mut self) -> anyhow::Result<()> {
        for site in &mut self.sites {
            site.stop_serving();
            site.serve_again().await?;
        }
        Ok(())
    }

    /// Only the newest generations stay, or memory fills up.
    pub(crate) async fn prune(&self) -> anyhow::Result<()> {
        let end = Instant::now() + BUSY_LIMIT;
        for site in &self.sites {
            loop {
                let pruned = site.run(&["generations", "prune", VM]).await?;
                // An agent that puts things right has the VM's lock for a moment.
                if pruned.code == Some(0) || Instant::now() >= end {
                    pruned.success()?;
                    break;
                }
                tokio::time::sleep(BUSY_LIMIT / 100).await;
            }
        }
        Ok(())
    }
}
