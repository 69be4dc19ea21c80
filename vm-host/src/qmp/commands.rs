//! QMP commands and replies that `qapi` (whose schema is QEMU 9.1's) can't carry for every
//! QEMU from 7.2 on, cut to the fields that are used. Unknown fields are ignored.

use qapi::{Command, Empty};
use serde::{Deserialize, Serialize};
use serde_json::Value;

macro_rules! commands {
    ($($(#[$doc:meta])* $name:literal $type:ident { $($field:ident: $of:ty),* } -> $ok:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub(crate) struct $type { $(pub(crate) $field: $of),* }

        impl Command for $type {
            type Ok = $ok;
            const NAME: &'static str = $name;
            const ALLOW_OOB: bool = false;
        }
    )*};
}

commands! {
    /// The run state; `qapi`'s reply type knows a closed set of states.
    "query-status" QueryStatus {} -> StatusInfo;
    /// Switches migration capabilities; `qapi`'s knows a closed set.
    "migrate-set-capabilities" MigrateSetCapabilities { capabilities: Vec<Capability> } -> Empty;
    /// Migration speed.
    "migrate-set-parameters" MigrateSetParameters { max_bandwidth: u64 } -> Empty;
    /// Makes an object, here a filter of a network.
    "object-add" ObjectAdd { qom_type: &'static str, id: &'static str, netdev: &'static str,
        interval: u32 } -> Empty;
    /// Sets an object's property.
    "qom-set" QomSet { path: String, property: String, value: Value } -> Empty;
    /// A line of the human monitor, which alone reads memory.
    "human-monitor-command" HumanMonitorCommand { command_line: String } -> String;
    /// Sends state.
    "migrate" Migrate { uri: String } -> Empty;
    /// Receives state.
    "migrate-incoming" MigrateIncoming { uri: String } -> Empty;
    /// Ends a migration.
    "migrate_cancel" MigrateCancel {} -> Empty;
    /// How a migration goes.
    "query-migrate" QueryMigrate {} -> MigrationInfo;
    /// Block devices and what they hold.
    "query-block" QueryBlock {} -> Vec<BlockInfo>;
    /// All block nodes, each by itself.
    "query-named-block-nodes" QueryNamedBlockNodes { flat: bool } -> Vec<BlockNode>;
    /// Adds a block node.
    "blockdev-add" BlockdevAdd { driver: &'static str, node_name: String, read_only: bool,
        discard: &'static str, file: Value, backing: Option<String> } -> Empty;
    /// Opens nodes anew, with other options or another one behind them.
    "blockdev-reopen" BlockdevReopen { options: Vec<Value> } -> Empty;
    /// Removes a block node.
    "blockdev-del" BlockdevDel { node_name: String } -> Empty;
    /// Writes what overlays hold into the one behind them.
    "block-commit" BlockCommit { job_id: String, device: String, top_node: String,
        base_node: String, backing_file: String, auto_dismiss: bool } -> Empty;
    /// How all nodes and their users hang together.
    "x-debug-query-block-graph" QueryBlockGraph {} -> BlockGraph;
    /// Jobs that run, and those that are done and were not dismissed.
    "query-jobs" QueryJobs {} -> Vec<JobInfo>;
    /// Ends a job before it is done.
    "job-cancel" JobCancel { id: String } -> Empty;
    /// Forgets a job that is done.
    "job-dismiss" JobDismiss { id: String } -> Empty;
    /// All or nothing.
    "transaction" Transaction { actions: Vec<Value> } -> Empty;
    /// Which CPUs there are, and the host threads that run them.
    "query-cpus-fast" QueryCpusFast {} -> Vec<CpuInfo>;
}

#[derive(Debug, Deserialize)]
pub(crate) struct StatusInfo {
    pub(crate) status: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Capability {
    pub(crate) capability: String,
    pub(crate) state: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrationInfo {
    pub(crate) error_desc: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct BlockInfo {
    pub(crate) qdev: Option<String>,
    pub(crate) inserted: Option<Inserted>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Inserted {
    pub(crate) node_name: Option<String>,
    pub(crate) file: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BlockNode {
    pub(crate) node_name: Option<String>,
    pub(crate) file: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct BlockGraph {
    pub(crate) nodes: Vec<GraphNode>,
    pub(crate) edges: Vec<GraphEdge>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphNode {
    pub(crate) id: u64,
    pub(crate) r#type: String,
    pub(crate) name: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphEdge {
    pub(crate) parent: u64,
    pub(crate) child: u64,
    pub(crate) name: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct JobInfo {
    pub(crate) id: String,
    pub(crate) status: String,
    pub(crate) error: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct CpuInfo {
    pub(crate) thread_id: u32,
}
