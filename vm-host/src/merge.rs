//! Merging overlays behind the topmost one: chains that grow with each checkpoint get shorter.
//!
//! QEMU itself has to do it for a disk that it has open, as it remembers where things are in each file:
//! `block-commit` of its `qapi/block-core.json`. What the overlays from `top` to `base` hold is written into
//! the file of `base`, which is then what `top` was, and which the caller gives the name of `top`: no header
//! has to name another file, and a power cut at any point leaves a chain that reads the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Context as _;
use crate::qmp::commands::{
    BlockCommit, BlockGraph, BlockdevDel, JobCancel, JobDismiss, JobInfo, QueryBlockGraph,
    QueryJobs,
};
use crate::{Error, Result, Vm};

/// What the jobs of merges are called before their own name.
const JOBS: &str = "merge-";

/// Others wait meanwhile: a merge of more than can be written in this time is called off.
const LIMIT: Duration = Duration::from_secs(30);

/// Overlays of one disk that are to become one.
#[derive(Clone, Copy, Debug)]
pub struct Merge<'a> {
    /// Names it, for [`Vm::merges`]; of letters, digits and dashes.
    pub name: &'a str,
    /// Which disk.
    pub disk: usize,
    /// Its files, by their headers, the topmost first, and the base image last.
    pub files: &'a [PathBuf],
    /// The first of those that are merged; not the topmost.
    pub top: usize,
    /// The last of them, into whose file they are written.
    pub base: usize,
    /// How the overlay before `top` is to name what it rests on.
    pub backing: &'a str,
}

impl Vm {
    /// Merges overlays, and waits until that is done and in the file of `base`. QEMU remembers
    /// it until [`Vm::forget_merge`], also for who comes after one that died.
    ///
    /// # Errors
    /// Also when QEMU has another chain open than the one that was described. Whatever fails, all
    /// overlays read as they did.
    pub async fn merge_overlays(&self, merge: &Merge<'_>) -> Result<()> {
        let doing = "merge overlays";
        let nodes = self.backing_chain(merge.disk).await?;
        let differs = |what: &'static str, value: usize| Error::OutOfBounds {
            what,
            value: value.to_string(),
            bounds: "as in the chain of files that QEMU has open",
        };
        if nodes.len() != merge.files.len() {
            return Err(differs("the number of a disk's files", merge.files.len()));
        }
        let merged = nodes.get(merge.top..=merge.base);
        let (Some([top, .., base]), Some(active), 1..) = (merged, nodes.first(), merge.top) else {
            return Err(differs("the first of the merged overlays", merge.top));
        };
        // QEMU opens the file that it writes to anew, and that whose header it writes.
        let mut names = Vec::new();
        for written in [merge.top - 1, merge.base] {
            if let (Some(node), Some(file)) = (nodes.get(written), merge.files.get(written)) {
                names.push(Named::for_now(file, &self.file_of_node(node).await?)?);
            }
        }
        let job = format!("{JOBS}{}", merge.name);
        let command = BlockCommit {
            job_id: job.clone(),
            device: active.clone(),
            top_node: top.clone(),
            base_node: base.clone(),
            backing_file: merge.backing.to_owned(),
            auto_dismiss: false,
        };
        self.ask(doing, command).await?;
        self.concluded_or_called_off(&job).await?;
        drop(names);
        let error = self.jobs().await?.remove(&job).and_then(|job| job.error);
        if let Some(reason) = error {
            self.forget_merge(merge.name).await?;
            let command = "block-commit";
            return Err(Error::Refused { command, reason });
        }
        Ok(())
    }

    /// The merges that are done and not forgotten, by name; those that are still under way are waited for, and
    /// called off after a while.
    pub async fn merges(&self) -> Result<Vec<String>> {
        let mut done = Vec::new();
        for job in self.jobs().await?.into_keys() {
            let Some(name) = job.strip_prefix(JOBS) else {
                continue;
            };
            self.concluded_or_called_off(&job).await?;
            let failed = |job: JobInfo| job.error.is_some();
            if self.jobs().await?.remove(&job).is_none_or(failed) {
                self.forget_merge(name).await?;
            } else {
                done.push(name.to_owned());
            }
        }
        Ok(done)
    }

    /// Forgets a merge that is done; QEMU closes the files that were merged.
    pub async fn forget_merge(&self, name: &str) -> Result<()> {
        let doing = "close overlays that were merged";
        let id = format!("{JOBS}{name}");
        self.ask(doing, JobDismiss { id }).await?;
        // Those that were added by name stay open until they are removed by name.
        let mut used = Vec::new();
        for disk in 0..self.launch.disks.len() {
            used.extend(self.backing_chain(disk).await?);
        }
        for node_name in self.node_names().await? {
            if is_overlay(&node_name) && !used.contains(&node_name) {
                self.ask(doing, BlockdevDel { node_name }).await?;
            }
        }
        Ok(())
    }

    async fn jobs(&self) -> Result<BTreeMap<String, JobInfo>> {
        let jobs = self.ask("list its jobs", QueryJobs {}).await?;
        Ok(jobs.into_iter().map(|job| (job.id.clone(), job)).collect())
    }

    async fn concluded_or_called_off(&self, id: &str) -> Result<()> {
        let concluded = tokio::time::timeout(LIMIT, self.until_concluded(id));
        if let Ok(concluded) = concluded.await {
            return concluded;
        }
        // What it has written so far is hidden, as ever.
        let job = JobCancel { id: id.to_owned() };
        self.ask("call a job off", job).await?;
        self.until_concluded(id).await
    }

    async fn until_concluded(&self, id: &str) -> Result<()> {
        let mut events = self.qmp.events();
        loop {
            // Asked after the events were subscribed to: none is missed.
            let status = self.jobs().await?.remove(id).map(|job| job.status);
            if status.is_none_or(|status| status == "concluded") {
                return Ok(());
            }
            // Any error leads to the question above, which says what is wrong.
            while matches!(events.recv().await, Ok(event) if event.name != "JOB_STATUS_CHANGE") {}
        }
    }

    /// What QEMU takes for the name of a node's file: the one that it opened it by.
    async fn file_of_node(&self, node: &str) -> Result<PathBuf> {
        let graph = self.ask("describe its disks", QueryBlockGraph {}).await?;
        let own = children(&graph, "file").remove(node).map(str::to_owned);
        let nodes = self.nodes().await?;
        let own = nodes.into_iter().find(|one| one.node_name == own);
        let file = own.map(|own| PathBuf::from(own.file));
        file.filter(|file| file.is_absolute())
            .ok_or_else(|| Error::Protocol {
                command: "query-named-block-nodes",
                reason: format!("the file of {node} is missing"),
            })
    }

    /// The nodes of a disk, from the topmost to the base.
    pub(crate) async fn backing_chain(&self, disk: usize) -> Result<Vec<String>> {
        let top = self.top_node(disk).await?;
        let graph = self.ask("describe its disks", QueryBlockGraph {}).await?;
        Ok(chain_in(&graph, &top))
    }
}

/// Whether a node was added under a name of ours: `disk0`, `disk0-1`; `disk0-1-file` goes with its own.
fn is_overlay(node: &str) -> bool {
    let numbers = node.strip_prefix("disk").map(|rest| rest.split('-'));
    numbers.is_some_and(|mut numbers| numbers.all(|number| number.parse::<u64>().is_ok()))
}

/// The nodes behind one, and itself first.
fn chain_in(graph: &BlockGraph, top: &str) -> Vec<String> {
    let behind = children(graph, "backing");
    let mut chain = vec![top.to_owned()];
    let mut at = top;
    while let Some(next) = behind.get(at).filter(|_| chain.len() <= behind.len()) {
        chain.push((*next).to_owned());
        at = next;
    }
    chain
}

/// Each node's child of this kind.
fn children<'a>(graph: &'a BlockGraph, kind: &str) -> BTreeMap<&'a str, &'a str> {
    let names: BTreeMap<u64, &str> = graph
        .nodes
        .iter()
        .filter(|node| node.r#type == "block-driver")
        .map(|node| (node.id, node.name.as_str()))
        .collect();
    let edges = graph.edges.iter().filter(|edge| edge.name == kind);
    edges
        .filter_map(|edge| Some((*names.get(&edge.parent)?, *names.get(&edge.child)?)))
        .collect()
}

/// A file under the name that QEMU opened it by, which it may have lost since; dropped, it loses it again.
struct Named {
    name: Option<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Named {
    fn for_now(file: &Path, name: &Path) -> Result<Self> {
        let identity = |path: &Path| {
            let metadata = fs::symlink_metadata(path)?;
            Ok::<_, io::Error>((metadata.dev(), metadata.ino()))
        };
        let wanted = identity(file).context("find", file)?;
        let mut named = Self {
            name: None,
            folders: Vec::new(),
        };
        match identity(name) {
            Ok(there) if there == wanted => return Ok(named),
            Ok(_) => {
                return Err(Error::Image {
                    path: name.to_owned(),
                    problem: "is another file than the one that QEMU opened by that name".into(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("find", name),
        }
        // QEMU puts a chain's names one behind the other: `10/../9/disk0.qcow2` leads through a folder `10`.
        let mut folder = PathBuf::new();
        for component in name.parent().into_iter().flat_map(Path::components) {
            folder.push(component);
            if !folder.exists() {
                fs::create_dir(&folder).context("make", &folder)?;
                named.folders.push(folder.clone());
            }
        }
        fs::hard_link(file, name).context("link", name)?;
        named.name = Some(name.to_owned());
        Ok(named)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // What can't be taken away is in nobody's way.
        if let Some(name) = &self.name {
            let _ = fs::remove_file(name);
        }
        for folder in self.folders.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}
