//! How a guest's processes lie in its RAM, for [`reconciler::Layout`].

use introspection::{Linux, Physical, address_spaces};
use reconciler::{ImageTree, Layout, Overlaid, Processes, ReadPages, Realigned, Space};
use vm_host::RamMap;

use crate::protocol::ImageKind;
use crate::state::{Base, State, tree_of};

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

/// The RAM that this site's own replay has left, as the target will make it of its own.
pub(crate) struct TwinRam {
    ram: RamMap,
    tree: ImageTree,
    realigned: Realigned,
}

impl TwinRam {
    /// As it was left.
    pub(crate) fn new(ram: RamMap) -> crate::error::Result<Self> {
        let tree = tree_of(&reconciler::SlicePages(&ram), "the twin's RAM")?;
        Ok(Self {
            ram,
            tree,
            realigned: Vec::new(),
        })
    }

    /// Brings it to the layout of a state; what to tell the target for it to do the same.
    pub(crate) fn realign(
        &mut self,
        state: &State,
        base: &Base,
    ) -> crate::error::Result<Option<Layout>> {
        let here = spaces(&self.ram);
        let there = spaces(state.ram());
        let source = Processes {
            ram: state.ram(),
            tree: state.tree(ImageKind::Ram),
            spaces: &there,
        };
        let twin = Processes {
            ram: &self.ram,
            tree: &self.tree,
            spaces: &here,
        };
        let (layout, realigned) = Layout::between(source, twin, &base.tree(ImageKind::Ram)?);
        tracing::info!(
            pages = layout.pages(),
            landmarks = layout.landmarks(),
            "layout told"
        );
        self.realigned = realigned;
        Ok((!layout.is_empty()).then_some(layout))
    }

    /// Lends its pages.
    pub(crate) fn with_pages<T>(&self, look: impl FnOnce(&dyn ReadPages) -> T) -> T {
        look(&Overlaid::new(&self.ram, &self.realigned))
    }
}
