use proptest::prelude::*;
use serde_bytes::ByteBuf;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex, split};

use super::*;

fn limits(max_frame: usize) -> Limits {
    Limits {
        max_frame,
        idle: Some(Duration::from_millis(100)),
    }
}

fn pair(pipe: usize) -> (FrameWriter<DuplexStream>, FrameReader<DuplexStream>) {
    let (a, b) = duplex(pipe);
    (
        FrameWriter::new(a, Limits::default()),
        FrameReader::new(b, Limits::default()),
    )
}

#[tokio::test]
async fn a_message_waits_for_flush() {
    let (mut writer, mut reader) = pair(1 << 20);
    reader.set_limits(limits(100));
    writer.send("hello").await.unwrap();
    assert!(matches!(
        reader.recv::<String>().await,
        Err(WireError::Silent(_))
    ));
    writer.flush().await.unwrap();
    assert_eq!(reader.recv::<String>().await.unwrap(), "hello");
    assert_eq!(reader.buffer.len(), HEADER + 1 + 5);
}

#[tokio::test]
async fn the_kinds_of_end_are_told_apart() {
    let (mut writer, mut reader) = pair(64);
    writer.send(&7u8).await.unwrap();
    writer.shutdown().await.unwrap();
    assert_eq!(reader.recv::<u8>().await.unwrap(), 7);
    assert!(matches!(reader.recv::<u8>().await, Err(WireError::Closed)));

    for cut in [&[5][..], &[5, 0, 0, 0], &[5, 0, 0, 0, 1, 2]] {
        let (mut a, b) = duplex(64);
        a.write_all(cut).await.unwrap();
        drop(a);
        let mut reader = FrameReader::new(b, Limits::default());
        let want = if cut.len() < 4 { 4 } else { 9 };
        let got = reader.recv::<u8>().await.unwrap_err();
        assert!(
            matches!(got, WireError::Truncated { have, want: w } if have == cut.len() && w == want),
            "{got:?}"
        );
        assert!(got.is_disconnect());
    }
}

#[tokio::test]
async fn a_length_is_refused_before_it_is_allocated() {
    let (mut a, b) = duplex(64);
    a.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let mut reader = FrameReader::new(b, limits(1000));
    let error = reader.recv::<ByteBuf>().await.unwrap_err();
    assert!(matches!(
        error,
        WireError::TooLong {
            len: 0xffff_ffff,
            max: 1000
        }
    ));
    assert!(!error.is_disconnect());
    assert!(reader.buffer.capacity() <= 2 * READ_ROOM);
}

#[tokio::test]
async fn the_longest_message_passes_and_a_longer_one_leaves_no_trace() {
    let (mut writer, mut reader) = pair(1 << 20);
    writer.set_limits(limits(1000));
    reader.set_limits(limits(1000));
    let fits = ByteBuf::from(vec![1; 998]); // two bytes of length
    writer.send(&fits).await.unwrap();
    let error = writer.send(&ByteBuf::from(vec![2; 999])).await.unwrap_err();
    assert!(matches!(error, WireError::TooLongToSend { max: 1000 }));
    writer.send("after").await.unwrap();
    writer.flush().await.unwrap();
    assert_eq!(reader.recv::<ByteBuf>().await.unwrap(), fits);
    assert_eq!(reader.recv::<String>().await.unwrap(), "after");
}

#[tokio::test]
async fn a_frame_holds_one_message_exactly() {
    let (mut writer, mut reader) = pair(1 << 20);
    writer.send(&(1u8, 2u8)).await.unwrap();
    writer.send(&1u8).await.unwrap();
    writer.flush().await.unwrap();
    assert!(matches!(
        reader.recv::<u8>().await,
        Err(WireError::Trailing { bytes: 1 })
    ));
    assert!(matches!(
        reader.recv::<(u8, u8)>().await,
        Err(WireError::Malformed(_))
    ));
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_noticed() {
    let (mut writer, _reader) = pair(10);
    writer.set_limits(limits(1000));
    writer.send(&ByteBuf::from(vec![0; 100])).await.unwrap();
    assert!(matches!(writer.flush().await, Err(WireError::Stalled(_))));
}

#[tokio::test]
async fn cancelling_loses_nothing() {
    let (mut writer, mut reader) = pair(1000);
    let message = ByteBuf::from((0..=255).cycle().take(200_000).collect::<Vec<u8>>());
    // The pipe is full long before the frame is out: the send is dropped half way.
    let soon = Duration::from_millis(20);
    assert!(timeout(soon, writer.send(&message)).await.is_err());
    assert!(timeout(soon, reader.recv::<ByteBuf>()).await.is_err());
    let sent = tokio::spawn(async move {
        writer.send("after").await.unwrap();
        writer.flush().await.unwrap();
        writer
    });
    assert_eq!(reader.recv::<ByteBuf>().await.unwrap(), message);
    assert_eq!(reader.recv::<String>().await.unwrap(), "after");
    drop(sent.await.unwrap());
}

#[tokio::test]
async fn borrowed_bytes_are_not_copied() {
    let (mut writer, mut reader) = pair(1000);
    writer.send(serde_bytes::Bytes::new(b"page")).await.unwrap();
    writer.flush().await.unwrap();
    assert_eq!(reader.recv_borrowed::<&[u8]>().await.unwrap(), b"page");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn messages_arrive_as_sent_through_any_pipe(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5000), 0..40),
        pipe in 1usize..3000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (a, b) = duplex(pipe);
            let (_, a) = split(a);
            let mut writer = FrameWriter::new(a, Limits::default());
            let mut reader = FrameReader::new(b, Limits::default());
            let send = async {
                for message in &messages {
                    writer.send(serde_bytes::Bytes::new(message)).await.unwrap();
                }
                writer.shutdown().await.unwrap();
            };
            let recv = async {
                for message in &messages {
                    assert_eq!(reader.recv::<ByteBuf>().await.unwrap().as_slice(), &message[..]);
                }
                assert!(matches!(reader.recv::<ByteBuf>().await, Err(WireError::Closed)));
            };
            tokio::join!(send, recv);
        });
    }

    #[test]
    fn any_bytes_are_answered(bytes: Vec<u8>) {
        let _ = frame_len(&bytes, 1000);
        let _ = decode::<Vec<(u32, String, Option<ByteBuf>)>>(&bytes);
    }
}
