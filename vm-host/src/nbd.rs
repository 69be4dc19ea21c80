//! A disk that QEMU reads from this process: the server's side of NBD, over a unix socket.
//!
//! Why: a disk image that is still on its way has no file that QEMU could read. Whoever brings it answers QEMU's
//! reads itself, and makes them wait for what is not there yet.
//!
//! As much of the protocol as QEMU's client needs to read one export, by the NetworkBlockDevice project's
//! `doc/proto.md`: fixed newstyle negotiation and simple replies. The export can't be written to. Requests of one
//! connection are answered as they are done, in any order.

use std::future::Future;
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

/// Handshake flags, of both sides: fixed newstyle, and no zeroes after `EXPORT_NAME`.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

/// Options.
const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const INFO: u32 = 6;
const GO: u32 = 7;

/// Replies to options.
const ACK: u32 = 1;
const REP_INFO: u32 = 3;
const UNSUPPORTED: u32 = (1 << 31) + 1;
const INVALID: u32 = (1 << 31) + 3;

/// What is said of an export: there are flags, it is read-only, and several connections see the same.
const TRANSMISSION: u16 = 1 | 1 << 1 | 1 << 8;
const INFO_EXPORT: u16 = 0;

/// Commands.
const READ: u16 = 0;
const DISCONNECT: u16 = 2;

/// Errors.
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// The longest option that is read; a name has at most 4,096 bytes.
const OPTION_MAX: u32 = 16 << 10;
/// Options before a client is hung up on.
const OPTIONS: usize = 64;
/// The most that one request may read, the protocol's default limit.
const READ_MAX: u32 = 32 << 20;
/// Requests that wait or are answered at a time; QEMU has sixteen under way.
const AT_ONCE: usize = 64;

/// What is exported.
pub trait Export: Send + Sync + 'static {
    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// Reads `length` bytes, all of which lie inside; may wait for them.
    fn read(&self, offset: u64, length: u32) -> impl Future<Output = io::Result<Vec<u8>>> + Send;
}

/// Answers one client until it hangs up.
///
/// # Errors
/// When it doesn't speak the protocol, or the socket fails.
pub async fn serve<E: Export>(stream: UnixStream, export: Arc<E>) -> io::Result<()> {
    let mut stream = stream;
    if negotiate(&mut stream, export.bytes()).await? {
        transmit(stream, export).await?;
    }
    Ok(())
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Whether the client goes on to read.
async fn negotiate(stream: &mut UnixStream, bytes: u64) -> io::Result<bool> {
    stream.write_u64(NBDMAGIC).await?;
    stream.write_u64(IHAVEOPT).await?;
    stream.write_u16(FIXED_NEWSTYLE | NO_ZEROES).await?;
    let flags = stream.read_u32().await?;
    if flags & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(broken("the client doesn't speak fixed newstyle"));
    }
    for _ in 0..OPTIONS {
        if stream.read_u64().await? != IHAVEOPT {
            return Err(broken("an option without its magic number"));
        }
        let option = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if length > OPTION_MAX {
            return Err(broken("an option that is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        match option {
            EXPORT_NAME => {
                stream.write_u64(bytes).await?;
                stream.write_u16(TRANSMISSION).await?;
                if flags & u32::from(NO_ZEROES) == 0 {
                    stream.write_all(&[0; 124]).await?;
                }
                return Ok(true);
            }
            ABORT => {
                reply(stream, option, ACK, &[]).await?;
                return Ok(false);
            }
            INFO | GO if is_info(&data) => {
                let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                info.extend_from_slice(&bytes.to_be_bytes());
                info.extend_from_slice(&TRANSMISSION.to_be_bytes());
                reply(stream, option, REP_INFO, &info).await?;
                reply(stream, option, ACK, &[]).await?;
                if option == GO {
                    return Ok(true);
                }
            }
            INFO | GO => reply(stream, option, INVALID, &[]).await?,
            _ => reply(stream, option, UNSUPPORTED, &[]).await?,
        }
    }
    Err(broken("a client that negotiates without an end"))
}

/// Whether this is the length of a name, that name, a count, and as many requests for information. There is one
/// export, whatever it is called, and all is told of it.
fn is_info(data: &[u8]) -> bool {
    let parse = || {
        let (length, rest) = data.split_first_chunk::<4>()?;
        let rest = rest.get(u32::from_be_bytes(*length) as usize..)?;
        let (count, rest) = rest.split_first_chunk::<2>()?;
        Some(rest.len() == 2 * usize::from(u16::from_be_bytes(*count)))
    };
    parse().unwrap_or(false)
}

async fn reply(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut message = OPTION_REPLY.to_be_bytes().to_vec();
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&(data.len() as u32).to_be_bytes());
    message.extend_from_slice(data);
    stream.write_all(&message).await
}

async fn transmit<E: Export>(stream: UnixStream, export: Arc<E>) -> io::Result<()> {
    let (mut requests, mut replies) = stream.into_split();
    let (sender, mut answers) = mpsc::channel::<Vec<u8>>(AT_ONCE);
    let writing = tokio::spawn(async move {
        while let Some(answer) = answers.recv().await {
            replies.write_all(&answer).await?;
        }
        replies.shutdown().await
    });
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let bytes = export.bytes();
    loop {
        let request = tokio::select! {
            request = next(&mut requests) => request?,
            // Nobody hears answers any more.
            () = sender.closed() => break,
        };
        let Some(Request {
            command,
            cookie,
            offset,
            length,
        }) = request
        else {
            break;
        };
        let inside = offset
            .checked_add(u64::from(length))
            .is_some_and(|end| end <= bytes);
        let error = match command {
            DISCONNECT => break,
            READ if inside && length <= READ_MAX => None,
            READ => Some(EINVAL),
            _ => Some(EPERM),
        };
        if let Some(error) = error {
            if sender.send(answer(cookie, error, &[])).await.is_err() {
                break;
            }
            continue;
        }
        // It is never closed.
        let Ok(permit) = room.clone().acquire_owned().await else {
            break;
        };
        let (export, sender) = (export.clone(), sender.clone());
        tokio::spawn(async move {
            let read = tokio::select! {
                read = export.read(offset, length) => read,
                () = sender.closed() => return,
            };
            let said = match read {
                Ok(data) if data.len() == length as usize => answer(cookie, 0, &data),
                Ok(_) => answer(cookie, EIO, &[]),
                Err(error) => {
                    tracing::debug!(%error, offset, length, "a read failed");
                    answer(cookie, EIO, &[])
                }
            };
            let _ = sender.send(said).await;
            drop(permit);
        });
    }
    drop(sender);
    match writing.await {
        Ok(written) => written,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

struct Request {
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

/// The next request; nothing, where the client has hung up.
async fn next(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Option<Request>> {
    match stream.read_u32().await {
        Ok(REQUEST) => {}
        Ok(_) => return Err(broken("a request without its magic number")),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    // Flags of commands that are not offered.
    let _flags = stream.read_u16().await?;
    let command = stream.read_u16().await?;
    let cookie = stream.read_u64().await?;
    let offset = stream.read_u64().await?;
    let length = stream.read_u32().await?;
    if command == 1 {
        // What was to be written follows, of a length that its sender chose: it is not read.
        return Err(broken("a write to what can't be written to"));
    }
    Ok(Some(Request {
        command,
        cookie,
        offset,
        length,
    }))
}

fn answer(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(16 + data.len());
    message.extend_from_slice(&REPLY.to_be_bytes());
    message.extend_from_slice(&error.to_be_bytes());
    message.extend_from_slice(&cookie.to_be_bytes());
    message.extend_from_slice(data);
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop};
    use proptest::proptest;

    use super::*;

    struct Bytes(Vec<u8>);

    impl Export for Bytes {
        fn bytes(&self) -> u64 {
            self.0.len() as u64
        }

        async fn read(&self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
            if offset == 4096 {
                return Err(io::Error::other("not there"));
            }
            if offset == 0 {
                // Answered after what is asked for later.
                tokio::task::yield_now().await;
            }
            Ok(self.0[offset as usize..][..length as usize].to_vec())
        }
    }

    fn pair() -> (UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let content = (0..1 << 16).map(|at: u32| at.to_le_bytes()[1]).collect();
        let serving = tokio::spawn(serve(theirs, Arc::new(Bytes(content))));
        (ours, serving)
    }

    async fn go(client: &mut UnixStream) {
        assert_eq!(client.read_u64().await.unwrap(), NBDMAGIC);
        assert_eq!(client.read_u64().await.unwrap(), IHAVEOPT);
        client.read_u16().await.unwrap();
        client.write_u32(3).await.unwrap();
        // An option that is not known: structured replies.
        for (option, data) in [(8, vec![]), (GO, vec![0, 0, 0, 0, 0, 0])] {
            client.write_u64(IHAVEOPT).await.unwrap();
            client.write_u32(option).await.unwrap();
            client.write_u32(data.len() as u32).await.unwrap();
            client.write_all(&data).await.unwrap();
        }
        let mut replies = [0; 20 + 20 + 12 + 20];
        client.read_exact(&mut replies).await.unwrap();
        assert_eq!(replies[12..16], UNSUPPORTED.to_be_bytes());
        assert_eq!(replies[20 + 22..20 + 30], (1_u64 << 16).to_be_bytes());
    }

    async fn ask(client: &mut UnixStream, command: u16, cookie: u64, offset: u64, length: u32) {
        client.write_u32(REQUEST).await.unwrap();
        client.write_u16(0).await.unwrap();
        client.write_u16(command).await.unwrap();
        client.write_u64(cookie).await.unwrap();
        client.write_u64(offset).await.unwrap();
        client.write_u32(length).await.unwrap();
    }

    async fn hear(client: &mut UnixStream, length: usize) -> (u32, u64, Vec<u8>) {
        assert_eq!(client.read_u32().await.unwrap(), REPLY);
        let error = client.read_u32().await.unwrap();
        let cookie = client.read_u64().await.unwrap();
        let mut data = vec![0; if error == 0 { length } else { 0 }];
        client.read_exact(&mut data).await.unwrap();
        (error, cookie, data)
    }

    #[tokio::test]
    async fn what_is_exported_is_read_and_nothing_else_is_done() {
        let (mut client, serving) = pair();
        go(&mut client).await;
        ask(&mut client, READ, 7, 256, 512).await;
        let (error, cookie, data) = hear(&mut client, 512).await;
        assert_eq!((error, cookie), (0, 7));
        assert_eq!((data[0], data[511]), (1, 2));
        for (command, offset, length, error) in [
            (READ, 4096, 512, EIO),
            (READ, (1 << 16) - 256, 512, EINVAL),
            (READ, u64::MAX, 512, EINVAL),
            (READ, 0, READ_MAX + 1, EINVAL),
            // Trim.
            (4, 0, 512, EPERM),
        ] {
            ask(&mut client, command, 9, offset, length).await;
            assert_eq!(hear(&mut client, 512).await, (error, 9, vec![]));
        }
        ask(&mut client, DISCONNECT, 0, 0, 0).await;
        serving.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_write_is_the_end() {
        let (mut client, serving) = pair();
        go(&mut client).await;
        ask(&mut client, 1, 1, 0, 512).await;
        serving.await.unwrap().unwrap_err();
    }

    proptest! {
        #[test]
        fn whatever_comes_ends_or_is_answered(said in prop::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (mut client, serving) = pair();
                client.write_u32(1).await.unwrap();
                client.write_u64(IHAVEOPT).await.unwrap();
                let _ = client.write_all(&said).await;
                client.shutdown().await.unwrap();
                let _ = serving.await.unwrap();
            });
        }
    }
}
