//! Disks whose base image has not arrived yet: QEMU reads it at a socket, see [`crate::nbd`], and from its file
//! once it is whole.

use std::path::Path;

use serde_json::{Value, json};

use crate::disk::chain_of;
use crate::qmp::commands::{BlockdevDel, BlockdevReopen};
use crate::snapshot::file_node;
use crate::{Error, Launch, Result, Vm};

/// How long QEMU tries to reach whoever brings the image, once that is gone, before the guest stands still.
const RECONNECT: u32 = 60;

/// What each disk is opened by, what is behind a node before it; nothing, where its files say all.
pub(crate) fn nodes(launch: &Launch) -> Result<Vec<Vec<Value>>> {
    let sockets = launch.arriving.iter().map(Option::as_deref);
    let sockets = sockets.chain(std::iter::repeat(None));
    let disks = launch.disks.iter().zip(sockets).enumerate();
    disks
        .map(|(index, (top, socket))| match socket {
            Some(socket) => chain(index, top, socket),
            None => Ok(Vec::new()),
        })
        .collect()
}

/// A chain, named from top to bottom `disk0`, `disk0-1`, ...: as overlays are named that come later.
fn chain(index: usize, top: &Path, socket: &Path) -> Result<Vec<Value>> {
    let mut behind = line_node(index);
    // Each is named by the one above it: what its header says is not asked for then.
    let mut nodes = vec![json!({
        "driver": "nbd",
        "node-name": behind,
        "read-only": true,
        "server": { "type": "unix", "path": socket },
        "export": "",
        "reconnect-delay": RECONNECT,
    })];
    for (depth, file) in chain_of(top)?.iter().enumerate().rev() {
        let name = match depth {
            0 => format!("disk{index}"),
            _ => format!("disk{index}-{depth}"),
        };
        let mut layer = json!({
            "driver": "qcow2",
            "node-name": name,
            "file": { "driver": "file", "filename": file, "node-name": file_node(&name) },
            "backing": behind,
        });
        if depth == 0 {
            layer["discard"] = "unmap".into();
        } else {
            layer["read-only"] = true.into();
            layer["file"]["read-only"] = true.into();
        }
        nodes.push(layer);
        behind = name;
    }
    Ok(nodes)
}

fn line_node(index: usize) -> String {
    format!("disk{index}-line")
}

impl Vm {
    /// Has QEMU read a disk's base image from its file, which is whole by now, and leave the socket. Does nothing for
    /// a disk that is not read at one.
    ///
    /// # Errors
    /// Then it goes on to read at the socket.
    pub async fn base_arrived(&self, disk: usize, image: &Path) -> Result<()> {
        let chain = self.backing_chain(disk).await?;
        let [rest @ .., bottom, last] = chain.as_slice() else {
            return Ok(());
        };
        if *last != line_node(disk) {
            return Ok(());
        }
        let doing = "read a disk's base image from its file";
        let path = image.to_str().ok_or_else(|| Error::Path {
            path: image.to_owned(),
            problem: "is not UTF-8, which QMP can't carry; rename it",
        })?;
        let file = json!({
            "driver": "file",
            "filename": path,
            "read-only": true,
        });
        let whole = format!("disk{disk}-whole");
        let added = json!({
            "driver": "raw",
            "node-name": whole,
            "read-only": true,
            "file": file,
        });
        self.ask(doing, AddNode(added)).await?;
        let mut options = json!({
            "driver": "qcow2",
            "node-name": bottom,
            "file": file_node(bottom),
            "backing": whole,
        });
        if rest.is_empty() {
            options["discard"] = "unmap".into();
        } else {
            options["read-only"] = true.into();
        }
        let options = vec![options];
        if let Err(error) = self.ask(doing, BlockdevReopen { options }).await {
            // The first error is the one to tell.
            let _ = self.qmp.execute(BlockdevDel { node_name: whole }).await;
            return Err(error);
        }
        // It was opened along with the overlays: where QEMU has closed it by itself, that is all right.
        let node_name = line_node(disk);
        if self.node_names().await?.contains(&node_name) {
            let _ = self.qmp.execute(BlockdevDel { node_name }).await;
        }
        Ok(())
    }
}

/// `blockdev-add`, with whatever a node takes.
#[derive(Debug, serde::Serialize)]
#[serde(transparent)]
struct AddNode(Value);

impl qapi::Command for AddNode {
    type Ok = qapi::Empty;
    const NAME: &'static str = "blockdev-add";
    const ALLOW_OOB: bool = false;
}
