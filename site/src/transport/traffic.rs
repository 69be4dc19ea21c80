//! Counts what really crossed the socket, and holds it to a rate where one is given: everything
//! beneath TLS, handshake and record headers included, which is what a thin line charges for.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// The bytes one connection has carried so far, or several together. Clones show the same
/// counters, which outlive the connections.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    cap: Option<Arc<RateCap>>,
}

/// The most that all connections together may send that share it.
///
/// A token bucket that holds what may be sent in [`Self::BURST`].
#[derive(Debug)]
pub struct RateCap {
    bytes_per_second: f64,
    /// From then on more may be sent.
    next: Mutex<Instant>,
}

impl RateCap {
    /// What was not sent for so long is made up for, and no more.
    const BURST: Duration = Duration::from_millis(50);

    /// So much is handed to the socket at once at least: a segment.
    const SEGMENT: usize = 1460;

    /// So many bits per second.
    pub fn new(bits_per_second: u64) -> Self {
        Self {
            bytes_per_second: (bits_per_second.max(1) as f64) / 8.0,
            next: Mutex::new(Instant::now()),
        }
    }

    fn next(&self) -> Instant {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As much as may be handed over at once.
    fn most(&self) -> usize {
        let burst = self.bytes_per_second * Self::BURST.as_secs_f64();
        (burst as usize).max(Self::SEGMENT)
    }

    fn spend(&self, bytes: usize) {
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let from = now.checked_sub(Self::BURST).unwrap_or(now).max(*next);
        *next = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
    }
}

impl Traffic {
    /// Counts what is held to a rate.
    pub(crate) fn capped(cap: Option<Arc<RateCap>>) -> Self {
        Self(Arc::new(Counters {
            cap,
            ..Counters::default()
        }))
    }

    /// Bytes handed to the socket, TLS included, TCP and IP headers not.
    pub fn sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Bytes taken from the socket, TLS included, TCP and IP headers not.
    pub fn received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }
}

/// A stream that counts what passes through it.
#[derive(Debug)]
pub struct Counted<S> {
    inner: S,
    traffic: Traffic,
    /// More may be sent when it ends.
    rest: Option<Pin<Box<Sleep>>>,
}

impl<S> Counted<S> {
    pub(crate) fn new(inner: S, traffic: Traffic) -> Self {
        Self {
            inner,
            traffic,
            rest: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let got = buf.filled().len() - before;
        self.traffic
            .0
            .received
            .fetch_add(got as u64, Ordering::Relaxed);
        polled
    }
}

impl<S: AsyncWrite + Unpin> Counted<S> {
    fn sent(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &polled {
            self.traffic
                .0
                .sent
                .fetch_add(*bytes as u64, Ordering::Relaxed);
        }
        polled
    }

    /// Waits until something may be sent, and writes as much of it as may be.
    fn poll_capped(
        &mut self,
        cap: &RateCap,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(rest) = &mut self.rest {
                ready!(rest.as_mut().poll(cx));
                self.rest = None;
            }
            let next = cap.next();
            if next <= Instant::now() {
                break;
            }
            self.rest = Some(Box::pin(sleep_until(next)));
        }
        let buf = &buf[..buf.len().min(cap.most())];
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(bytes)) = polled {
            cap.spend(bytes);
        }
        self.sent(polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(cap) = self.traffic.0.cap.clone() {
            return self.poll_capped(&cap, cx, buf);
        }
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.sent(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.traffic.0.cap.is_some() {
            let first = bufs.iter().find(|buf| !buf.is_empty());
            return self.poll_write(cx, first.map_or(&[], |buf| buf));
        }
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.sent(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn what_shares_a_cap_sends_no_more_together() {
        const RATE: u64 = 800_000;
        const BYTES: usize = 300_000;
        let cap = Arc::new(RateCap::new(RATE));
        let begun = Instant::now();
        let mut sending = tokio::task::JoinSet::new();
        let mut traffics = Vec::new();
        for _ in 0..2 {
            let (here, mut there) = tokio::io::duplex(1 << 20);
            let traffic = Traffic::capped(Some(cap.clone()));
            traffics.push(traffic.clone());
            sending.spawn(async move {
                let mut here = Counted::new(here, traffic);
                here.write_all(&vec![7; BYTES]).await.unwrap();
                drop(here);
                let mut arrived = Vec::new();
                there.read_to_end(&mut arrived).await.unwrap();
                assert_eq!(arrived, vec![7; BYTES]);
            });
        }
        while let Some(sent) = sending.join_next().await {
            sent.unwrap();
        }
        let sent: u64 = traffics.iter().map(Traffic::sent).sum();
        assert_eq!(sent, 2 * BYTES as u64);
        let seconds = begun.elapsed().as_secs_f64();
        let least = (sent * 8) as f64 / RATE as f64;
        assert!(
            (least - 0.1..least * 1.05).contains(&seconds),
            "{seconds} of {least}"
        );
    }
}
