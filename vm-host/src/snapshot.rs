//! A running VM's disks get fresh overlays: what was written so far stands still from then on.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::disk::{Format, create_overlay};
use crate::qmp::commands::{
    BlockInfo, BlockNode, BlockdevAdd, BlockdevDel, QueryBlock, QueryNamedBlockNodes, Transaction,
};
use crate::{Error, Result, Status, Vm};

/// The topmost image of a disk: QEMU's name for it, and its file.
struct Top {
    node: String,
    file: PathBuf,
}

impl Vm {
    /// The topmost image file of each disk, in order: as launched at first, and after
    /// [`Vm::snapshot_disks`] the overlays it was given.
    pub async fn disks(&self) -> Result<Vec<PathBuf>> {
        Ok(self.tops().await?.into_iter().map(|top| top.file).collect())
    }

    async fn tops(&self) -> Result<Vec<Top>> {
        let blocks = self.ask("list its disks", QueryBlock {}).await?;
        let nodes = self.nodes().await?;
        let find = |index| find_top(&blocks, &nodes, index).ok_or_else(|| missing(index));
        (0..self.launch.disks.len()).map(find).collect()
    }

    /// QEMU's name for a disk's topmost image.
    pub(crate) async fn top_node(&self, disk: usize) -> Result<String> {
        let tops = self.tops().await?;
        let top = tops.into_iter().nth(disk).ok_or_else(|| missing(disk))?;
        Ok(top.node)
    }

    /// The names of all block nodes.
    pub(crate) async fn node_names(&self) -> Result<Vec<String>> {
        let nodes = self.nodes().await?;
        Ok(nodes
            .into_iter()
            .filter_map(|node| node.node_name)
            .collect())
    }

    pub(crate) async fn nodes(&self) -> Result<Vec<BlockNode>> {
        let all = QueryNamedBlockNodes { flat: true };
        self.ask("list its block nodes", all).await
    }

    /// Puts a fresh overlay on each disk, on all of them or on none: what the guest wrote so
    /// far is in the files that were topmost, which QEMU only reads from now on.
    ///
    /// `overlays` has one path a disk. One that doesn't exist is made, naming the old file by
    /// its name if both are in one directory and by its absolute path otherwise; one that
    /// exists must be an unused overlay of it. The guest may run or be paused, but must not
    /// have had its device state saved since it stopped: QEMU has let go of its disks then. So
    /// a checkpoint is: pause, snapshot disks, save device state, keep the RAM, resume.
    pub async fn snapshot_disks(&self, overlays: &[PathBuf]) -> Result<()> {
        let status = self.status().await?;
        if !matches!(status, Status::Running | Status::Paused) {
            let (doing, must_be) = ("put overlays on disks", "running, or paused and not saved");
            return Err(Error::State {
                doing,
                is: status.to_string(),
                must_be,
            });
        }
        let tops = self.tops().await?;
        if overlays.len() != tops.len() {
            return Err(Error::OutOfBounds {
                what: "the number of overlays",
                value: overlays.len().to_string(),
                bounds: "the number of the VM's disks",
            });
        }
        let mut added: Vec<String> = Vec::new();
        let swapped = self.swap(&tops, overlays, &mut added).await;
        if let Err(error) = swapped {
            for node_name in added {
                // The first error is the one to tell; QEMU frees the rest when it ends.
                let _ = self.qmp.execute(BlockdevDel { node_name }).await;
            }
            return Err(self.blame("put overlays on its disks", error).await);
        }
        Ok(())
    }

    async fn swap(
        &self,
        tops: &[Top],
        overlays: &[PathBuf],
        added: &mut Vec<String>,
    ) -> Result<()> {
        let mut actions: Vec<Value> = Vec::new();
        let nodes = self.nodes().await?;
        for (top, overlay) in tops.iter().zip(overlays) {
            let overlay = std::path::absolute(overlay).map_err(|source| Error::Io {
                doing: "make absolute",
                path: overlay.clone(),
                source,
            })?;
            if !overlay.exists() {
                let same_dir = overlay.parent() == top.file.parent();
                let name = top.file.file_name().filter(|_| same_dir).map(Path::new);
                create_overlay(&overlay, name.unwrap_or(&top.file), Format::Qcow2)?;
            }
            let node_name = free_node(&top.node, &nodes);
            let command = BlockdevAdd {
                driver: "qcow2",
                node_name: node_name.clone(),
                read_only: false,
                discard: "unmap",
                file: json!({
                    "driver": "file",
                    "filename": overlay,
                    "node-name": file_node(&node_name),
                }),
                // It gets the old one, as it is open already, by the snapshot.
                backing: None,
            };
            self.qmp.execute(command).await?;
            actions.push(json!({
                "type": "blockdev-snapshot",
                "data": { "node": top.node, "overlay": node_name },
            }));
            added.push(node_name);
        }
        self.qmp.execute(Transaction { actions }).await?;
        Ok(())
    }
}

/// The name of the node below that of an image: that of its file.
pub(crate) fn file_node(node: &str) -> String {
    format!("{node}-file")
}

fn find_top(blocks: &[BlockInfo], nodes: &[BlockNode], index: usize) -> Option<Top> {
    let component = format!("disk{index}");
    let block = blocks.iter().find(|block| {
        block
            .qdev
            .as_ref()
            .is_some_and(|path| path.split('/').any(|c| c == component))
    });
    let inserted = block?.inserted.as_ref()?;
    let node = inserted.node_name.clone()?;
    // Of a node of its own QEMU tells the file as it is. Before those had names, an image was told by a
    // description of all that it rests on, which QEMU cuts off at 4,096 bytes.
    let own = file_node(&node);
    let own = nodes
        .iter()
        .find(|one| one.node_name.as_ref() == Some(&own));
    let file = match own {
        Some(own) => own.file.clone().into(),
        None => file_of(&inserted.file)?,
    };
    Some(Top { node, file })
}

/// The file behind QEMU's name of an image, which is a `json:` description where the image's
/// header alone wouldn't say how QEMU has it open.
fn file_of(name: &str) -> Option<PathBuf> {
    let Some(json) = name.strip_prefix("json:") else {
        return Some(name.into());
    };
    let image: Value = serde_json::from_str(json).ok()?;
    Some(
        image
            .pointer("/file/filename")
            .or(image.get("file.filename"))?
            .as_str()?
            .into(),
    )
}

fn missing(index: usize) -> Error {
    Error::Protocol {
        command: "query-block",
        reason: format!("disk {index} is missing"),
    }
}

/// A name for the node above one: `disk0`, `disk0-1`, `disk0-2`. One that is taken was added by a process
/// that died before it was put on top.
fn free_node(node: &str, taken: &[BlockNode]) -> String {
    let (disk, number) = node.split_once('-').unwrap_or((node, "0"));
    let mut number = number.parse::<u64>().unwrap_or(0);
    loop {
        number += 1;
        let name = format!("{disk}-{number}");
        let is_it = |one: &BlockNode| one.node_name.as_ref() == Some(&name);
        if !taken.iter().any(is_it) {
            return name;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_in_descriptions() {
        let json = r#"json:{"backing": {"file": {"filename": "/old"}}, "driver": "qcow2",
            "file": {"driver": "file", "filename": "/new"}}"#;
        assert_eq!(file_of(json), Some("/new".into()));
        assert_eq!(file_of("/plain.qcow2"), Some("/plain.qcow2".into()));
        assert_eq!(file_of("json:{}"), None);
    }

    #[test]
    fn nodes_get_new_names() {
        let node = |name: &str| BlockNode {
            node_name: Some(name.to_owned()),
            file: String::new(),
        };
        assert_eq!(free_node("disk0", &[]), "disk0-1");
        let taken = ["disk0-9", "disk0-10", "disk1-11"].map(node);
        assert_eq!(free_node("disk0-9", &taken), "disk0-11");
    }
}
