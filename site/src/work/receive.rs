//! Device, Disk, Ram and Verify at the target: the images arrive and are checked.

use std::borrow::Cow;

use reconciler::{Holdings, ImageTree, Offer, Place, PlaceKind, SlicePages, SlicePagesMut};
use tokio::runtime::Handle;
use vm_host::RamMapMut;

use super::device::{device_head, resized};
use super::exchange::{Talk, exchange, receive_offer};
use super::{Received, Work};
use crate::disks::{self, DiskImage, WorkDisk};
use crate::error::{Error, Result};
use crate::line::TargetLine;
use crate::local::joined;
use crate::phase::Phase;
use crate::protocol::{ImageHead, ImageKind, ToTarget};
use crate::state::tree_of;

impl Work {
    /// Receives all images and verifies each; `first` is the message that announces the first.
    /// What came before a failure is in the copy.
    pub(crate) async fn receive(
        mut self,
        mut line: TargetLine,
        first: ImageHead,
    ) -> (Self, TargetLine, Result<Received>) {
        let offers = match self.offers(&mut line, first).await {
            Ok(offers) => offers,
            Err(error) => return (self, line, Err(error)),
        };
        // All that follows reads and writes images; it asks the runtime for messages.
        let runtime = Handle::current();
        let receiving = tokio::task::spawn_blocking(move || {
            let received = self.receive_images(&mut line, &runtime, &offers);
            (self, line, received)
        });
        match receiving.await {
            Ok(received) => received,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn offers(
        &self,
        line: &mut TargetLine,
        first: ImageHead,
    ) -> Result<Vec<(ImageHead, Offer)>> {
        let expected = self.heads(first.bytes)?;
        let mut offers = Vec::new();
        for (position, expected) in expected.iter().enumerate() {
            let head = match position {
                0 => first,
                _ => match line.receive(expected.kind.phase()).await? {
                    ToTarget::Image(head) => head,
                    _ => return Err(line.unexpected(expected.kind.phase(), "no image")),
                },
            };
            if head != *expected {
                return Err(line.unexpected(
                    head.kind.phase(),
                    format!("{head:?} where {expected:?} belongs"),
                ));
            }
            offers.push((head, receive_offer(line, head).await?));
        }
        Ok(offers)
    }

    fn receive_images(
        &mut self,
        line: &mut TargetLine,
        runtime: &Handle,
        offers: &[(ImageHead, Offer)],
    ) -> Result<Received> {
        tracing::debug!("offers have come");
        let mut trees = Vec::new();
        for (head, offer) in offers {
            let mut talk = Talk {
                line,
                runtime,
                phase: head.kind.phase(),
                next: None,
                aside: self.dir.clone(),
            };
            self.write_note(!matches!(head.kind, ImageKind::Disk(_)));
            trees.push(self.receive_image(&mut talk, *head, offer, &trees)?);
        }
        let mut trees = trees.into_iter();
        let (device, ram) = (trees.next(), trees.next_back());
        let (Some(device), Some(ram)) = (device, ram) else {
            return Err(line.unexpected(Phase::Ram, "no images"));
        };
        Ok(Received {
            ram,
            disks: trees.collect(),
            device,
        })
    }

    /// The images that must come, in order. Only the device state's size is the source's to say.
    fn heads(&self, device: u64) -> Result<Vec<ImageHead>> {
        let mut heads = vec![device_head(device)?];
        for (index, (image, _)) in self.base.disks().iter().enumerate() {
            heads.push(ImageHead {
                kind: ImageKind::Disk(index as u8),
                bytes: image.bytes(),
            });
        }
        heads.push(ImageHead {
            kind: ImageKind::Ram,
            bytes: self.record.hardware.memory_bytes(),
        });
        Ok(heads)
    }

    /// Brings one image to the source's state; `done` are the trees of those before it.
    fn receive_image(
        &mut self,
        talk: &mut Talk<'_>,
        head: ImageHead,
        offer: &Offer,
        done: &[ImageTree],
    ) -> Result<ImageTree> {
        let base = self.base.clone();
        if let Some(tree) = self.brought_to(head.kind) {
            return self.receive_ahead(talk, head.kind, offer, &tree);
        }
        let base_tree = base.tree(head.kind)?;
        base.with_pages(head.kind, |base_pages| match head.kind {
            ImageKind::Device => {
                // Both sides know how long the new one is; what follows it is cut off.
                let len = head.bytes as usize;
                match self
                    .rearrangement
                    .take()
                    .filter(|_| self.replayed.is_some())
                {
                    Some(told) => self.device = told.apply(&self.device, len),
                    None => self.device = resized(&self.device, len),
                }
                let current = tree_of(&SlicePages(&self.device), "the device state")?;
                let places: Vec<_> = base_pages
                    .iter()
                    .map(|reader| Place {
                        kind: PlaceKind::Base,
                        tree: &base_tree,
                        reader: *reader,
                    })
                    .collect();
                let holdings = Holdings {
                    base: &base_tree,
                    base_reader: base_pages,
                    current: &current,
                    places: &places,
                };
                let mut image = SlicePagesMut(&mut self.device);
                exchange(talk, offer, &holdings, &mut image, None)
            }
            ImageKind::Disk(index) => {
                let index = usize::from(index);
                let top = self.disk_path(index);
                let current = if self.replayed.is_some() {
                    let image = DiskImage::open(&top)?;
                    disks::tree_since(&self.vm, &self.record, self.base_number, index, &image)?
                } else {
                    base_tree.clone()
                };
                let ram = vm_host::RamMap::open(&self.ram_path())
                    .map_err(Error::host("cannot read the guest's RAM"))?;
                let ram_pages = SlicePages(&ram);
                let base_ram = base.tree(ImageKind::Ram)?;
                let ram_tree = self.replayed.as_ref().unwrap_or(&base_ram);
                let mut places = vec![Place {
                    kind: PlaceKind::OtherImage,
                    tree: ram_tree,
                    reader: &ram_pages,
                }];
                let readable = base.readable(index, Cow::Borrowed(&base_tree))?;
                if let Some(reader) = base_pages {
                    places.insert(
                        0,
                        Place {
                            kind: PlaceKind::Base,
                            tree: &readable,
                            reader,
                        },
                    );
                }
                let holdings = Holdings {
                    base: &base_tree,
                    base_reader: base_pages,
                    current: &current,
                    places: &places,
                };
                let mut image = WorkDisk::open(&top)?;
                let exchanged = exchange(talk, offer, &holdings, &mut image, Some(&current));
                // Also if it was cut off: what came is in it, and its own tables are kept in memory.
                let synced = image.sync();
                let tree = exchanged?;
                synced?;
                Ok(tree)
            }
            ImageKind::Ram => {
                let displaced = self.realign(&base_tree)?;
                let hashed = match self.hashing.take() {
                    Some(hashing) => Some(talk.runtime.block_on(joined(hashing))?),
                    None => None,
                };
                let mut ram = RamMapMut::open(&self.ram_path())
                    .map_err(Error::host("cannot write the guest's RAM"))?;
                // Of this very RAM, in which nobody else can have changed anything since.
                let hashed = self.replayed.as_ref().or(hashed.as_ref());
                let current = hashed.unwrap_or(&base_tree).clone();
                let before = hashed.map(|_| &current);
                let disks = self
                    .disk_paths()
                    .iter()
                    .map(|path| DiskImage::open(path))
                    .collect::<Result<Vec<_>>>()?;
                let mut places = Vec::new();
                if let Some(reader) = base_pages {
                    places.push(Place {
                        kind: PlaceKind::Base,
                        tree: &base_tree,
                        reader,
                    });
                }
                let displaced_pages = displaced.as_ref().map(|(pages, _)| SlicePages(pages));
                if let (Some((_, tree)), Some(reader)) = (&displaced, &displaced_pages) {
                    places.push(Place {
                        kind: PlaceKind::Replayed,
                        tree,
                        reader,
                    });
                }
                // The trees before: device state, then the disks as they are now.
                let trees = done.iter().skip(1).enumerate();
                let trees = trees.map(|(index, tree)| base.readable(index, Cow::Borrowed(tree)));
                let trees = trees.collect::<Result<Vec<_>>>()?;
                for (image, tree) in disks.iter().zip(&trees) {
                    places.push(Place {
                        kind: PlaceKind::Disk,
                        tree,
                        reader: image,
                    });
                }
                let holdings = Holdings {
                    base: &base_tree,
                    base_reader: base_pages,
                    current: &current,
                    places: &places,
                };
                exchange(talk, offer, &holdings, &mut SlicePagesMut(&mut ram), before)
            }
        })
    }
}
