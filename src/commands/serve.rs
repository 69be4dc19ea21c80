//! `replay-migrate serve`

use std::time::Duration;

use serde_json::json;
use site::{Store, agent};

use crate::output::Output;

pub(crate) async fn run(
    store: &Store,
    listen: &str,
    keep_logs: Option<Duration>,
    output: &Output,
) -> anyhow::Result<()> {
    let agent = agent::Agent::bind(store, listen)
        .await?
        .keep_logs(keep_logs);
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
