//! Sealing: what is written for one site, and read by no other.
//!
//! HPKE (RFC 9180) in its base mode, with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and
//! ChaCha20-Poly1305. The body is cut into chunks, each a message of one context, so that none can be
//! left out, changed or moved; the last is shorter than all others, and says that it is the last. Who
//! sealed it is told by the signature over the head, which covers the encapsulated key.
//!
//! A site's secret for this follows from its identity: it is derived from an Ed25519 signature over
//! fixed words, which RFC 8032 makes the same each time and which is shown to nobody. So there is no
//! further secret to keep, and a new identity has a new one.

use std::io::{self, Read, Write};

use hpke::aead::{AeadCtxR, AeadCtxS, ChaCha20Poly1305};
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, HpkeError, Kem, OpModeR, OpModeS, Serializable};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::Head;
use crate::identity::{Identity, PublicKey, Signature, SiteKey};

/// What a site signs to derive its secret; never anything that is said to anybody.
const SECRET: &[u8] = b"replay-migrate sealing secret 1";

/// What a site signs to name what is to be sealed for.
const NAMED: &[u8] = b"replay-migrate sealing key 1";

/// Separates this use of BLAKE3 from all others.
const CONTEXT: &str = "replay-migrate 2026 sealing secret";

/// Bytes of a chunk before it is sealed.
const CHUNK: usize = 64 << 10;

/// Bytes that a chunk grows by.
const TAG: usize = 16;

type Secret = <X25519HkdfSha256 as Kem>::PrivateKey;
type Public = <X25519HkdfSha256 as Kem>::PublicKey;
type Encapped = <X25519HkdfSha256 as Kem>::EncappedKey;

/// What is sealed for a site, in its own word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealingKey {
    /// An X25519 public key.
    pub key: [u8; 32],
    /// Of which site.
    pub by: PublicKey,
    /// By that site.
    pub signature: Signature,
}

impl SealingKey {
    /// This site's.
    pub fn of(identity: &Identity) -> Self {
        let (_, public) = pair(identity);
        let key = public.to_bytes().into();
        Self {
            key,
            by: identity.public(),
            signature: identity.sign(&Self::signed(&key)),
        }
    }

    fn signed(key: &[u8; 32]) -> Vec<u8> {
        [NAMED, key].concat()
    }

    /// Whether it is this site's.
    pub(crate) fn is_of(&self, site: &SiteKey) -> bool {
        self.by.key() == *site && self.by.verify(&Self::signed(&self.key), &self.signature)
    }
}

/// A site's secret, and what goes with it.
fn pair(identity: &Identity) -> (Secret, Public) {
    let mut seed = blake3::derive_key(CONTEXT, identity.sign(SECRET).as_bytes());
    let pair = X25519HkdfSha256::derive_keypair(&seed);
    seed.zeroize();
    pair
}

fn failed(what: &'static str) -> impl FnOnce(HpkeError) -> io::Error {
    move |error| io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {error}"))
}

/// Seals what is written to it.
pub struct Sealer<W> {
    out: W,
    context: AeadCtxS<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>,
    chunk: Vec<u8>,
}

impl<W: Write> Sealer<W> {
    /// Begins a parcel; `head` is all but its key and signature, which are made here.
    ///
    /// # Errors
    /// When the key is none that can be sealed for.
    pub fn new(
        identity: &Identity,
        to: &SealingKey,
        mut head: Head,
        out: W,
    ) -> io::Result<(Head, Self)> {
        let public = Public::from_bytes(&to.key).map_err(failed("it can't be sealed for"))?;
        let info = head.context();
        let (key, context): (Encapped, _) = hpke::setup_sender(&OpModeS::Base, &public, &info)
            .map_err(failed("it can't be sealed for"))?;
        head.key = key.to_bytes().into();
        head.signature = identity.sign(&head.signed());
        let chunk = Vec::with_capacity(CHUNK);
        Ok((
            head,
            Self {
                out,
                context,
                chunk,
            },
        ))
    }

    fn seal(&mut self, last: bool) -> io::Result<()> {
        let sealed = self.context.seal(&self.chunk, &[u8::from(last)]);
        self.chunk.zeroize();
        self.out.write_all(&sealed.map_err(failed("can't seal"))?)
    }

    /// Ends it: without this nobody can open it to its end.
    ///
    /// # Errors
    /// As those of what it is written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.seal(true)?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Sealer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.seal(false)?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens what was sealed for this site; what it reads is as it was written, or there is an error.
pub struct Opener<R> {
    from: R,
    context: AeadCtxR<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>,
    chunk: Vec<u8>,
    /// Bytes of the chunk that were read.
    read: usize,
    last: bool,
}

impl<R: Read> Opener<R> {
    /// Opens a parcel of this head, whose signature was checked.
    ///
    /// # Errors
    /// When its key is none. What is for another site, or was changed, fails where it is read.
    pub fn new(identity: &Identity, head: &Head, from: R) -> io::Result<Self> {
        let (secret, _) = pair(identity);
        let key = Encapped::from_bytes(&head.key).map_err(failed("its key is none"))?;
        let context = hpke::setup_receiver(&OpModeR::Base, &secret, &key, &head.context())
            .map_err(failed("it is not for this site"))?;
        Ok(Self {
            from,
            context,
            chunk: Vec::new(),
            read: 0,
            last: false,
        })
    }

    fn open(&mut self) -> io::Result<()> {
        let mut sealed = Vec::with_capacity(CHUNK + TAG);
        let most = (CHUNK + TAG) as u64;
        Read::by_ref(&mut self.from)
            .take(most)
            .read_to_end(&mut sealed)?;
        if sealed.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "its end is missing",
            ));
        }
        self.last = sealed.len() < CHUNK + TAG;
        let opened = self.context.open(&sealed, &[u8::from(self.last)]);
        self.chunk = opened.map_err(failed(
            "it is not for this site's present key, was changed on its way, or its end is missing",
        ))?;
        self.read = 0;
        Ok(())
    }
}

impl<R: Read> Read for Opener<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.read == self.chunk.len() {
            if self.last {
                return Ok(0);
            }
            self.open()?;
        }
        let bytes = into.len().min(self.chunk.len() - self.read);
        into[..bytes].copy_from_slice(&self.chunk[self.read..self.read + bytes]);
        self.read += bytes;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::generation::GenerationId;
    use crate::vm::Id;

    fn head(by: &Identity, to: &Identity) -> Head {
        let id = |number| GenerationId {
            number,
            digest: [number as u8; 32],
        };
        Head {
            version: 9,
            vm: Id([7; 16]),
            from: Some(id(3)),
            to: id(5),
            recipient: to.key(),
            by: by.public(),
            key: [0; 32],
            signature: Signature::NONE,
        }
    }

    fn sealed(by: &Identity, to: &Identity, content: &[u8]) -> (Head, Vec<u8>) {
        let (head, mut sealer) =
            Sealer::new(by, &SealingKey::of(to), head(by, to), Vec::new()).unwrap();
        sealer.write_all(content).unwrap();
        (head, sealer.finish().unwrap())
    }

    fn opened(identity: &Identity, head: &Head, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Opener::new(identity, head, body)?.read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn a_parcel_is_opened_by_whom_it_is_for() {
        let [a, b, c] = [(); 3].map(|()| Identity::ephemeral().unwrap());
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let content: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let (head, body) = sealed(&a, &b, &content);
            assert!(head.holds());
            assert_eq!(opened(&b, &head, &body).unwrap(), content);
            assert!(opened(&c, &head, &body).is_err());
            assert!(opened(&a, &head, &body).is_err());
        }
        assert!(SealingKey::of(&b).is_of(&b.key()));
        assert!(!SealingKey::of(&b).is_of(&c.key()));
        assert_eq!(SealingKey::of(&b), SealingKey::of(&b), "it stays the same");
    }

    #[test]
    fn what_is_said_of_a_parcel_is_its_makers_word() {
        let [a, b, c] = [(); 3].map(|()| Identity::ephemeral().unwrap());
        let (head, body) = sealed(&a, &b, b"content");
        let id = GenerationId {
            number: 4,
            digest: [9; 32],
        };
        let changed = [
            Head {
                to: id,
                ..head.clone()
            },
            Head {
                from: None,
                ..head.clone()
            },
            Head {
                vm: Id([8; 16]),
                ..head.clone()
            },
            Head {
                recipient: c.key(),
                ..head.clone()
            },
            Head {
                by: c.public(),
                ..head.clone()
            },
            Head {
                key: [1; 32],
                ..head.clone()
            },
        ];
        for other in changed {
            assert!(!other.holds());
            assert!(opened(&b, &other, &body).is_err(), "{other:?}");
        }
        let backwards = Head {
            from: Some(head.to),
            ..head.clone()
        };
        let signed = Head {
            signature: a.sign(&backwards.signed()),
            ..backwards
        };
        assert!(!signed.holds());
        let encoded = postcard::to_stdvec(&head).unwrap();
        assert!(encoded.len() <= Head::LONGEST, "{}", encoded.len());
    }

    #[test]
    fn chunks_stay_where_they_are() {
        let [a, b] = [(); 2].map(|()| Identity::ephemeral().unwrap());
        let (head, body) = sealed(&a, &b, &vec![5; 3 * CHUNK + 100]);
        let chunks: Vec<&[u8]> = body.chunks(CHUNK + TAG).collect();
        assert_eq!(chunks.len(), 4);
        for order in [
            &[0, 1, 2][..],
            &[0, 1, 3],
            &[1, 0, 2, 3],
            &[0, 0, 2, 3],
            &[3],
        ] {
            let other: Vec<u8> = order.iter().flat_map(|at| chunks[*at]).copied().collect();
            assert!(opened(&b, &head, &other).is_err(), "{order:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_changed_is_noticed(at in any::<proptest::sample::Index>(), bit in 0_u32..8, cut in any::<bool>()) {
            let [a, b] = [[1_u8; 1], [2; 1]].map(|_| Identity::ephemeral().unwrap());
            let content = vec![3; CHUNK + 500];
            let (head, mut body) = sealed(&a, &b, &content);
            let at = at.index(body.len());
            if cut {
                body.truncate(at);
            } else {
                body[at] ^= 1 << bit;
            }
            let mut read = Vec::new();
            let outcome = Opener::new(&b, &head, &body[..]).unwrap().read_to_end(&mut read);
            prop_assert!(outcome.is_err());
            prop_assert_eq!(&read[..], &content[..read.len()], "nothing else was read before");
        }
    }
}
