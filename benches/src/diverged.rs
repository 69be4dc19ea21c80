//! What a replay did not make as the source did.

use std::collections::BTreeMap;
use std::fmt;

use introspection::Physical;
use introspection::kinds;
use reconciler::ImageTree;
use serde::Serialize;

use crate::states::State;

/// Pages of a replayed state that are not in the same place of the source's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diverged {
    /// Of the device state.
    pub device: u64,
    /// Of all disks.
    pub disk: u64,
    /// Of RAM.
    pub ram: u64,
    /// The latter by the kind that they have at the source, see [`introspection::kinds`]; empty
    /// where the guest is no Linux that is understood.
    pub kinds: BTreeMap<String, u64>,
}

impl Diverged {
    pub(crate) fn between(source: &State, replayed: &State) -> Self {
        let pages = |one: &ImageTree, other: &ImageTree| {
            // Of two sizes: what only one of them has differs.
            let longer = one.pages().max(other.pages());
            let common = one.pages().min(other.pages());
            let differing = (0..common).filter(|page| {
                let page = reconciler::PageIndex(*page);
                one.leaf(page) != other.leaf(page)
            });
            differing.count() as u64 + (longer - common)
        };
        let kinds = kinds::classify(Physical::new(&source.ram)).map(|kinds| {
            let differing = kinds.differing(&source.ram, &replayed.ram);
            let named = differing
                .iter()
                .map(|(kind, count)| (kind.to_string(), *count));
            named.filter(|(_, count)| *count > 0).collect()
        });
        let disks = source.disks.iter().zip(&replayed.disks);
        Self {
            device: pages(&source.device_tree, &replayed.device_tree),
            disk: disks
                .map(|(one, other)| pages(&one.tree, &other.tree))
                .sum(),
            ram: pages(&source.ram_tree, &replayed.ram_tree),
            kinds: kinds.unwrap_or_default(),
        }
    }
}

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            device, disk, ram, ..
        } = self;
        write!(
            f,
            "pages that the replay left otherwise: device {device}, disk {disk}, ram {ram}"
        )?;
        let mut kinds: Vec<_> = self.kinds.iter().collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (index, (kind, count)) in kinds.into_iter().enumerate() {
            let before = if index == 0 { " (" } else { ", " };
            write!(f, "{before}{kind} {count}")?;
        }
        if !self.kinds.is_empty() {
            f.write_str(")")?;
        }
        Ok(())
    }
}
