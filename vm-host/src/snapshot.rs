//! A running VM's disks get fresh overlays: what was written so far stands still from then on.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::disk::{Format, create_overlay};
use crate::qmp::commands::{BlockInfo, BlockdevAdd, BlockdevDel, QueryBlock, Transaction};
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
        let find = |index| find_top(&blocks, index).ok_or_else(|| missing(index));
        (0..self.launch.disks.len()).map(find).collect()
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
            let node_name = next_node(&top.node);
            let command = BlockdevAdd {
                driver: "qcow2",
                node_name: node_name.clone(),
                read_only: false,
                discard: "unmap",
                file: json!({ "driver": "file", "filename": overlay }),
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

fn find_top(blocks: &[BlockInfo], index: usize) -> Option<Top> {
    let component = format!("disk{index}");
    let block = blocks.iter().find(|block| {
        block
            .qdev
            .as_ref()
            .is_some_and(|path| path.split('/').any(|c| c == component))
    });
    let inserted = block?.inserted.as_ref()?;
    Some(Top {
        node: inserted.node_name.clone()?,
        file: file_of(&inserted.file)?,
    })
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

/// A name for the node above one: `disk0`, `disk0-1`, `disk0-2`.
fn next_node(node: &str) -> String {
    let (disk, number) = node.split_once('-').unwrap_or((node, "0"));
    format!("{disk}-{}", number.parse::<u64>().unwrap_or(0) + 1)
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
        assert_eq!(next_node("disk0"), "disk0-1");
        assert_eq!(next_node("disk0-9"), "disk0-10");
    }
}
