//! What the source's own replay, the twin, is good for: the layout in which both replays are brought
//! into the source's, and what that takes.

use std::time::Instant;

use introspection::{Linux, Physical, address_spaces};
use reconciler::{
    ImageTree, Layout, PAGE_SIZE, PageHash, Processes, Realigned, Rearrangement, SlicePages, Space,
};

use crate::error::{Error, Result};
use crate::report::{Seconds, Strategy};
use crate::states::{State, tree_of};

/// What the source's own replay is good for.
pub(crate) struct Told {
    pub(crate) twin: State,
    pub(crate) twin_pages: Realigned,
    /// Of the twin so realigned.
    pub(crate) twin_tree: ImageTree,
    /// The target's pages in the source's layout, what they replaced, and the tree after.
    pub(crate) pages: Realigned,
    pub(crate) displaced: Vec<u8>,
    pub(crate) displaced_tree: ImageTree,
    pub(crate) tree: ImageTree,
    pub(crate) layout_bytes: u64,
    pub(crate) seconds: Seconds,
    pub(crate) device: ToldDevice,
}

/// The device states in the order of the source's.
pub(crate) struct ToldDevice {
    pub(crate) twin: Vec<u8>,
    pub(crate) twin_tree: ImageTree,
    pub(crate) begins: Vec<u8>,
    pub(crate) tree: ImageTree,
    /// What saying so took.
    pub(crate) bytes: u64,
    pub(crate) seconds: Seconds,
}

impl ToldDevice {
    fn new(source: &State, begins: &State, twin: &State) -> Result<Self> {
        let failed = |source| Error::Reconcile {
            strategy: Strategy::Twin.name(),
            image: "the order of device".to_owned(),
            source,
        };
        let begun = Instant::now();
        let len = source.device.len();
        let told = Rearrangement::between(&source.device, &twin.device);
        let encoded = told.encode().map_err(failed)?;
        let twin = told.apply(&twin.device, len);
        let mut seconds = Seconds {
            layout: begun.elapsed().as_secs_f64(),
            ..Seconds::default()
        };
        let begun = Instant::now();
        let told = Rearrangement::decode(&encoded).map_err(failed)?;
        let begins = told.apply(&begins.device, len);
        seconds.realign = begun.elapsed().as_secs_f64();
        Ok(Self {
            twin_tree: tree_of(&SlicePages(&twin))?,
            twin,
            tree: tree_of(&SlicePages(&begins))?,
            begins,
            // What changes nothing is not sent.
            bytes: if told.is_empty() {
                0
            } else {
                encoded.len() as u64
            },
            seconds,
        })
    }
}

/// The processes in a guest's RAM; none if it is no Linux that is understood.
fn spaces(ram: &[u8]) -> Vec<Space> {
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

fn processes<'a>(state: &'a State, spaces: &'a [Space]) -> Processes<'a> {
    Processes {
        ram: &state.ram,
        tree: &state.ram_tree,
        spaces,
    }
}

impl Told {
    pub(crate) fn new(
        source: &State,
        base: Option<&State>,
        begins: &State,
        twin: State,
    ) -> Result<Self> {
        let device = ToldDevice::new(source, begins, &twin)?;
        let failed = |source| Error::Reconcile {
            strategy: Strategy::Twin.name(),
            image: "the layout of ram".to_owned(),
            source,
        };
        let pages = source.ram_tree.pages();
        let no_base = ImageTree::zero(pages).map_err(Error::Hash)?;
        let base = base.map_or(&no_base, |base| &base.ram_tree);
        let begun = Instant::now();
        let (there, here) = (spaces(&source.ram), spaces(&twin.ram));
        let (layout, twin_pages) =
            Layout::between(processes(source, &there), processes(&twin, &here), base);
        let encoded = layout.encode().map_err(failed)?;
        let mut twin_tree = twin.ram_tree.clone();
        for (index, page) in &twin_pages {
            let hash = PageHash::of(page);
            twin_tree.set(*index, hash).map_err(Error::Hash)?;
        }
        let mut seconds = Seconds {
            layout: begun.elapsed().as_secs_f64(),
            ..Seconds::default()
        };
        let begun = Instant::now();
        let layout = Layout::decode(&encoded, pages).map_err(failed)?;
        let here = spaces(&begins.ram);
        let moved = layout.realign(processes(begins, &here), base);
        let mut tree = begins.ram_tree.clone();
        let mut displaced = Vec::with_capacity(moved.len() * PAGE_SIZE);
        for (index, page) in &moved {
            let start = index.0 as usize * PAGE_SIZE;
            displaced.extend_from_slice(begins.ram.get(start..start + PAGE_SIZE).unwrap_or(&[]));
            tree.set(*index, PageHash::of(page)).map_err(Error::Hash)?;
        }
        seconds.realign = begun.elapsed().as_secs_f64();
        Ok(Self {
            twin,
            twin_pages,
            twin_tree,
            pages: moved,
            displaced_tree: tree_of(&SlicePages(&displaced))?,
            displaced,
            tree,
            // A layout that says nothing is not sent.
            layout_bytes: if layout.is_empty() {
                0
            } else {
                encoded.len() as u64
            },
            seconds,
            device,
        })
    }
}
