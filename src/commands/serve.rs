//! `replay-migrate serve`

use std::time::Duration;

use serde_json::json;
use site::at_rest::AtRest;
use site::{Store, agent};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::output::Output;

/// How to serve.
pub(crate) struct Options<'a> {
    pub(crate) listen: &'a str,
    pub(crate) keep_logs: Option<Duration>,
    /// With 0 all are kept.
    pub(crate) keep_generations: u32,
    /// By default what a hub gives where nothing is said.
    pub(crate) hub_room: Option<u64>,
    pub(crate) require_encryption: bool,
}

pub(crate) async fn run(
    store: &Store,
    options: Options<'_>,
    output: &Output,
) -> anyhow::Result<()> {
    if options.require_encryption {
        AtRest::of(store)?.require()?;
    }
    let mut agent = agent::Agent::bind(store, options.listen)
        .await?
        .keep_logs(options.keep_logs)
        .hub_room(options.hub_room.unwrap_or(site::hub::DEFAULT_ROOM));
    if options.keep_generations > 0 {
        agent = agent.keep_generations(options.keep_generations as usize);
    }
    let (address, key) = (
        agent.local_addr().to_string(),
        store.identity()?.key().to_string(),
    );
    output.result(&json!({ "listening": address, "key": key }), |_| {
        format!("listening on {address}; the key of this site is {key}")
    })?;
    agent.run(stop_signal()).await?;
    Ok(())
}

/// A token that Ctrl-C and SIGTERM cancel for as long as this is there.
pub(crate) struct OnSignal {
    pub(crate) token: CancellationToken,
    waiting: JoinHandle<()>,
}

impl OnSignal {
    pub(crate) fn new() -> Self {
        let token = CancellationToken::new();
        let cancelled = token.clone();
        let waiting = tokio::spawn(async move {
            stop_signal().await;
            cancelled.cancel();
        });
        Self { token, waiting }
    }
}

impl Drop for OnSignal {
    fn drop(&mut self) {
        self.waiting.abort();
    }
}

/// Ends on Ctrl-C or SIGTERM.
pub(crate) async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = match signal(SignalKind::terminate()) {
        Ok(term) => term,
        Err(error) => {
            tracing::warn!(%error, "SIGTERM can't be caught");
            let _ = tokio::signal::ctrl_c().await;
            return;
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
}
