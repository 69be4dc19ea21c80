//! Just enough of QMP (QEMU's `docs/interop/qmp-spec`) to have one QEMU migrate to another: the
//! library does so with the RAM left out, and has no reason to do otherwise.

use std::collections::VecDeque;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
    /// Those that came before an answer.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, and agrees on the protocol.
    pub async fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let (read, write) = stream.into_split();
        let mut qmp = Self {
            lines: BufReader::new(read).lines(),
            write,
            events: VecDeque::new(),
        };
        qmp.next().await?;
        qmp.ask("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Executes a command.
    pub async fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.write
            .write_all(line.as_bytes())
            .await
            .context("cannot write to QEMU")?;
        loop {
            let mut message = self.next().await?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!("QEMU refused {command}: {}", error["desc"]);
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// The next event, of those that came before an answer too.
    pub async fn event(&mut self) -> anyhow::Result<Value> {
        match self.events.pop_front() {
            Some(event) => Ok(event),
            None => self.next().await,
        }
    }

    /// Waits until the migration is over; `events` must be among its capabilities.
    pub async fn migrated(&mut self) -> anyhow::Result<()> {
        loop {
            let event = self.event().await?;
            if event["event"] != "MIGRATION" {
                continue;
            }
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let info = self.ask("query-migrate", json!({})).await?;
                    bail!("the migration failed: {}", info["error-desc"]);
                }
                _ => {}
            }
        }
    }

    async fn next(&mut self) -> anyhow::Result<Value> {
        let line = self
            .lines
            .next_line()
            .await
            .context("cannot read from QEMU")?;
        let line = line.context("QEMU is gone")?;
        serde_json::from_str(&line).context("QEMU says what is no JSON")
    }
}

/// Where an incoming QEMU listens, from its `query-migrate`.
pub fn port_of(info: &Value) -> Option<u16> {
    info["socket-address"][0]["port"].as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read() {
        let info = json!({ "status": "setup", "socket-address": [
            { "port": "40961", "ipv6": false, "host": "127.0.0.1", "type": "inet" },
        ] });
        assert_eq!(port_of(&info), Some(40961));
        assert_eq!(port_of(&json!({})), None);
    }
}
