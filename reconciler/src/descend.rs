//! After a mismatch: which pages differ, found from the root downwards.
//!
//! The target asks for the children of nodes, the source answers with their hashes, and the
//! target goes on below those that are not its own. Every answer must hash to what the level
//! above said, up to the root that the offer named: a source cannot contradict itself unseen.

use serde::{Deserialize, Serialize};

use crate::error::{Error, within};
use crate::page::PageIndex;
use crate::page_set::PageSet;
use crate::tree::{FAN_OUT, ImageTree, NodeHash, Root, height, node_hash, root_hash, zero_node};
use crate::verify::Mismatch;

/// Nodes in one request; their children take 8 KiB each, 256 KiB in all.
pub const MAX_NODES: usize = 32;
const WHAT: &str = "tree nodes";

/// Asks for the children of some nodes of one level.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesRequest {
    /// 1 for chunks, whose children are pages; more towards the root.
    pub level: u32,
    /// At most [`MAX_NODES`], counted from the start of the level.
    pub nodes: Vec<u64>,
}

/// The hashes of the 256 children of each node asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesReply {
    /// 8 KiB for each node.
    #[serde(with = "serde_bytes")]
    pub children: Vec<u8>,
}

/// A tree with its upper levels at hand.
struct Levels<'a> {
    tree: &'a ImageTree,
    upper: Vec<Vec<NodeHash>>,
}

impl<'a> Levels<'a> {
    fn new(tree: &'a ImageTree) -> Self {
        Self {
            tree,
            upper: tree.levels(),
        }
    }

    /// The 256 children of a node; beyond the image, those of zero pages.
    fn children(&self, level: u32, node: u64) -> [NodeHash; FAN_OUT] {
        let mut out = [zero_node(level - 1); FAN_OUT];
        let first = node.saturating_mul(FAN_OUT as u64);
        if level == 1 {
            for (i, slot) in out.iter_mut().enumerate() {
                *slot = self.tree.leaf(PageIndex(first.saturating_add(i as u64))).0;
            }
        } else if let Some(below) = self.upper.get(level as usize - 2) {
            let first = usize::try_from(first).unwrap_or(usize::MAX);
            let held = below.get(first..).unwrap_or_default();
            let count = held.len().min(FAN_OUT);
            out[..count].copy_from_slice(&held[..count]);
        }
        out
    }
}

/// The source's side: answers requests about its tree.
pub struct NodeServer<'a>(Levels<'a>);

impl<'a> NodeServer<'a> {
    /// Serves the tree whose root was offered.
    pub fn new(tree: &'a ImageTree) -> Self {
        Self(Levels::new(tree))
    }

    /// Answers one request.
    pub fn answer(&self, request: &NodesRequest) -> Result<NodesReply, Error> {
        within(
            "the number of nodes",
            request.nodes.len() as u64,
            MAX_NODES as u64,
        )?;
        if !(1..=height(self.0.tree.pages())).contains(&request.level) {
            return Err(Error::malformed(WHAT, "no such level"));
        }
        let children = request
            .nodes
            .iter()
            .flat_map(|&node| self.0.children(request.level, node).into_iter().flatten());
        Ok(NodesReply {
            children: children.collect(),
        })
    }
}

/// A node to look into.
#[derive(Clone, Copy)]
struct Suspect {
    level: u32,
    node: u64,
    /// What its children must hash to; the top answers to the root.
    expected: Option<NodeHash>,
}

/// The target's side: finds the pages that differ.
pub struct Descent<'a> {
    ours: Levels<'a>,
    root: Root,
    open: Vec<Suspect>,
    asked: Vec<Suspect>,
    differing: Vec<u64>,
}

impl<'a> Descent<'a> {
    /// Begins at the root.
    pub fn new(mismatch: &'a Mismatch) -> Self {
        Self::between(mismatch.tree(), mismatch.expected())
    }

    fn between(tree: &'a ImageTree, root: Root) -> Self {
        let top = Suspect {
            level: height(tree.pages()),
            node: 0,
            expected: None,
        };
        Self {
            ours: Levels::new(tree),
            root,
            open: vec![top],
            asked: Vec::new(),
            differing: Vec::new(),
        }
    }

    /// What to ask next; `None` when all is known.
    pub fn next_request(&mut self) -> Option<NodesRequest> {
        let level = self.open.last()?.level;
        self.asked.clear();
        while let Some(suspect) = self.open.pop_if(|suspect| suspect.level == level) {
            self.asked.push(suspect);
            if self.asked.len() == MAX_NODES {
                break;
            }
        }
        Some(NodesRequest {
            level,
            nodes: self.asked.iter().map(|suspect| suspect.node).collect(),
        })
    }

    /// Takes the answer to the last request.
    pub fn take(&mut self, reply: &NodesReply) -> Result<(), Error> {
        let (children, rest) = reply.children.as_chunks::<32>();
        if !rest.is_empty() || children.len() != self.asked.len() * FAN_OUT {
            return Err(Error::malformed(WHAT, "not as many as were asked for"));
        }
        for (suspect, theirs) in std::mem::take(&mut self.asked)
            .into_iter()
            .zip(children.chunks(FAN_OUT))
        {
            let node = node_hash(suspect.level, theirs.iter());
            let consistent = match suspect.expected {
                Some(expected) => node == expected,
                None => root_hash(self.ours.tree.pages(), &node) == self.root,
            };
            if !consistent {
                return Err(Error::malformed(
                    WHAT,
                    "they do not lead to the root that was offered",
                ));
            }
            let ours = self.ours.children(suspect.level, suspect.node);
            for (i, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
                if theirs != ours {
                    self.below(suspect, i as u64, *theirs)?;
                }
            }
        }
        Ok(())
    }

    fn below(&mut self, parent: Suspect, child: u64, hash: NodeHash) -> Result<(), Error> {
        let node = parent.node * FAN_OUT as u64 + child;
        let span = (FAN_OUT as u64).pow(parent.level - 1);
        if node.saturating_mul(span) >= self.ours.tree.pages() {
            return Err(Error::malformed(WHAT, "content past the end of the image"));
        }
        if parent.level == 1 {
            self.differing.push(node);
        } else {
            self.open.push(Suspect {
                level: parent.level - 1,
                node,
                expected: Some(hash),
            });
        }
        Ok(())
    }

    /// The pages that differ, once [`Descent::next_request`] has said `None`.
    pub fn into_differing(self) -> PageSet {
        PageSet::from_unsorted(self.differing)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::PageHash;

    fn descend(
        ours: &ImageTree,
        theirs: &ImageTree,
        spoil: Option<usize>,
    ) -> Result<PageSet, Error> {
        let server = NodeServer::new(theirs);
        let mut descent = Descent::between(ours, theirs.root());
        while let Some(request) = descent.next_request() {
            let mut reply = server.answer(&request)?;
            if let Some(at) = spoil {
                let at = at % reply.children.len();
                reply.children[at] ^= 1;
            }
            descent.take(&reply)?;
        }
        Ok(descent.into_differing())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn finds_exactly_what_differs(
            pages in prop_oneof![1u64..600, 65_000u64..200_000],
            edits in prop::collection::vec((any::<u64>(), 1u8..), 0..60),
            spoil in any::<usize>(),
        ) {
            let ours = ImageTree::zero(pages).unwrap();
            let mut theirs = ours.clone();
            for (index, byte) in edits {
                theirs.set(PageIndex(index % pages), PageHash([byte; 32])).unwrap();
            }
            prop_assert_eq!(descend(&ours, &theirs, None).unwrap(), theirs.differing(&ours));
            prop_assert!(descend(&ours, &theirs, Some(spoil)).is_err());
        }
    }
}
