//! What a reader of a disk image says at its socket: it is answered or hung up on, and is told no byte that lies
//! outside the image, nor any but what it asked for.
#![no_main]

use std::io;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use vm_host::nbd::{self, Export};

/// A client's flags, and the option GO: what makes most inputs end early is not left to chance where the first byte is
/// odd.
const OPENING: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

const BYTES: u64 = 1 << 16;

struct Image;

impl Export for Image {
    fn bytes(&self) -> u64 {
        BYTES
    }

    async fn read(&self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        assert!(offset + u64::from(length) <= BYTES);
        Ok(vec![7; length as usize])
    }
}

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime")
});

fuzz_target!(|input: &[u8]| {
    let Some((&opened, said)) = input.split_first() else {
        return;
    };
    RUNTIME.block_on(async {
        let (client, server) = UnixStream::pair().expect("a pair of sockets");
        let serving = tokio::spawn(nbd::serve(server, Arc::new(Image)));
        let (mut reads, mut writes) = client.into_split();
        let hearing = tokio::spawn(async move {
            let mut heard = Vec::new();
            let _ = reads.read_to_end(&mut heard).await;
            heard.len()
        });
        if opened % 2 == 1 {
            let _ = writes.write_all(OPENING).await;
        }
        let _ = writes.write_all(said).await;
        let _ = writes.shutdown().await;
        let _ = serving.await.expect("it does not panic");
        let heard = hearing.await.expect("it does not panic");
        // A request takes 28 bytes, and is answered by 16 and what it asked for.
        assert!(heard as u64 <= 4096 + (said.len() as u64 / 28 + 1) * (16 + BYTES) + 40 * said.len() as u64);
    });
});
