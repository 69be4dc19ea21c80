//! What a guest's VNC server says, to the proxy before a viewer is let in, and to whoever watches
//! the screen: it is understood or refused, and no picture is larger than was announced.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use vm_host::screen::Observer;

/// Version, no security, and a screen of 16 x 8 pixels of 32 bits: what makes most inputs end
/// early is not left to chance where the first byte is odd.
const OPENING: &[u8] = b"RFB 003.008\n\x01\x01\0\0\0\0\0\x10\0\x08\
    \x20\x18\0\x01\0\xff\0\xff\0\xff\x10\x08\0\0\0\0\0\0\0\x04QEMU";

struct World {
    runtime: Runtime,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a folder");
    World {
        runtime: Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime"),
        socket: dir.path().join("vnc"),
        _dir: dir,
    }
});

fuzz_target!(|input: &[u8]| {
    let Some((&opened, bytes)) = input.split_first() else {
        return;
    };
    let bytes = if opened % 2 == 1 {
        [OPENING, bytes].concat()
    } else {
        bytes.to_vec()
    };
    let World {
        runtime, socket, ..
    } = &*WORLD;
    runtime.block_on(async {
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 16);
        let (said, _) = tokio::join!(recorder::approach(&mut ours), async {
            let _ = theirs.write_all(&bytes).await;
            let _ = theirs.shutdown().await;
            drop(theirs);
        });
        if let Err(error) = said {
            // The reasons that a server gives are bounded.
            assert!(error.to_string().len() < 8192);
        }

        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).expect("a socket");
        let server = async {
            let (mut stream, _) = listener.accept().await.expect("a viewer");
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            // What the viewer says is of no interest, but it must be able to say it.
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        };
        let viewer = async {
            if let Ok(observer) = Observer::connect(socket).await {
                let frame = observer.frame();
                let pixels = usize::from(frame.width) * usize::from(frame.height);
                assert_eq!(frame.rgb.len(), pixels * 3);
            }
        };
        let both = async { tokio::join!(server, viewer) };
        // Far less than the observer's own limit: the stream has ended.
        tokio::time::timeout(Duration::from_secs(10), both)
            .await
            .expect("an end is noticed");
    });
});
