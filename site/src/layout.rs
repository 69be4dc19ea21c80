//! What this site's own replay has left, and how it is brought to lie as the VM's state does: the
//! guest's processes by [`reconciler::Layout`], the device state by
//! [`reconciler::Rearrangement`].

use std::path::PathBuf;

use introspection::{Linux, Physical, address_spaces};
use reconciler::{
    ImageTree, Layout, Overlaid, PageHash, Processes, ReadPages, Realigned, Rearrangement,
    SlicePages, Space,
};
use vm_host::RamMap;

use crate::disks::{self, DiskImage};
use crate::error::{Error, Result};
use crate::protocol::ImageKind;
use crate::state::{Base, State, tree_of};
use crate::store::VmDir;
use crate::vm::VmRecord;

/// The processes in a guest's RAM; none if it is no Linux that is understood.
pub(crate) fn spaces(ram: &[u8]) -> Vec<Space> {
    let Some(linux) = Linux::find(Physical::new(ram)) else {
        return Vec::new();
    };
    address_spaces(&linux)
        .into_iter()
        .map(|space| Space {
            key: space.key(),
            pages: space.pages,
        })
        .collect()
}

/// How a state lies, for a target to bring its replayed one into the same order.
pub(crate) struct Lie {
    /// The guest's processes in its RAM.
    pub ram: Layout,
    /// The device state.
    pub device: Rearrangement,
}

/// The state that this site's own replay has left, as the target will make it of its own.
pub(crate) struct TwinState {
    ram: RamMap,
    ram_tree: ImageTree,
    /// Pages of RAM in the layout of the VM's state, and the tree with them.
    realigned: Realigned,
    realigned_tree: ImageTree,
    disks: Vec<(DiskImage, ImageTree)>,
    /// The device state, in the order of the VM's once that is known.
    device: Vec<u8>,
    device_tree: ImageTree,
}

impl TwinState {
    /// As it was left, on top of this generation.
    pub(crate) fn new(
        vm: &VmDir,
        record: &VmRecord,
        generation: u64,
        ram: RamMap,
        disks: &[PathBuf],
        device: Vec<u8>,
    ) -> Result<Self> {
        let ram_tree = tree_of(&SlicePages(&ram), "the twin's RAM")?;
        let disks = disks.iter().enumerate().map(|(index, path)| {
            let image = DiskImage::open(path)?;
            let tree = disks::tree_since(vm, record, Some(generation), index, &image)?;
            Ok((image, tree))
        });
        Ok(Self {
            realigned: Vec::new(),
            realigned_tree: ram_tree.clone(),
            ram,
            ram_tree,
            disks: disks.collect::<Result<_>>()?,
            device_tree: tree_of(&SlicePages(&device), "the twin's device state")?,
            device,
        })
    }

    /// Brings it to lie as a state does; what to tell the target for it to do the same.
    pub(crate) fn realign(&mut self, state: &State, base: &Base) -> Result<Lie> {
        let device = Rearrangement::between(state.device(), &self.device);
        self.device = device.apply(&self.device, state.device().len());
        self.device_tree = tree_of(&SlicePages(&self.device), "the twin's device state")?;
        let here = spaces(&self.ram);
        let there = spaces(state.ram());
        let source = Processes {
            ram: state.ram(),
            tree: state.tree(ImageKind::Ram),
            spaces: &there,
        };
        let twin = Processes {
            ram: &self.ram,
            tree: &self.ram_tree,
            spaces: &here,
        };
        let (layout, realigned) = Layout::between(source, twin, &base.tree(ImageKind::Ram)?);
        tracing::info!(
            pages = layout.pages(),
            landmarks = layout.landmarks(),
            device_parts = device.len(),
            "layout told"
        );
        for (index, page) in &realigned {
            self.realigned_tree
                .set(*index, PageHash::of(page))
                .map_err(Error::reconcile("cannot hash the twin's RAM"))?;
        }
        self.realigned = realigned;
        Ok(Lie {
            ram: layout,
            device,
        })
    }

    /// Lends the pages of an image.
    pub(crate) fn with_pages<T>(
        &self,
        kind: ImageKind,
        look: impl FnOnce(Option<&dyn ReadPages>) -> T,
    ) -> T {
        match kind {
            ImageKind::Device => look(Some(&SlicePages(&self.device))),
            ImageKind::Disk(index) => look(
                self.disks
                    .get(usize::from(index))
                    .map(|(image, _)| image as &dyn ReadPages),
            ),
            ImageKind::Ram => look(Some(&Overlaid::new(&self.ram, &self.realigned))),
        }
    }

    /// What the target's replay may have made of an image, likeliest first; see
    /// [`reconciler::Known::twin`].
    pub(crate) fn trees(&self, kind: ImageKind) -> Vec<&ImageTree> {
        match kind {
            ImageKind::Device => vec![&self.device_tree],
            ImageKind::Disk(index) => {
                let disk = self.disks.get(usize::from(index));
                disk.map(|(_, tree)| tree).into_iter().collect()
            }
            ImageKind::Ram => vec![&self.realigned_tree, &self.ram_tree],
        }
    }
}
