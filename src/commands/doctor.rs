//! `replay-migrate doctor`

use std::path::Path;

use anyhow::bail;
use vm_host::probe::{self, Outcome};

use crate::output::{Output, table};

/// Memory of the guest that the checks have in mind: the demo desktop's.
const GUEST_MEMORY: u64 = 768 << 20;

pub(crate) fn run(site: &Path, output: &Output) -> anyhow::Result<()> {
    let checks = probe::host(site, &site::runtime_base()?, GUEST_MEMORY);
    output.result(&checks, |checks| {
        let mut text = String::new();
        for check in checks {
            let outcome = match check.outcome {
                Outcome::Ok => "ok",
                Outcome::Warn => "warning",
                Outcome::Fail => "FAILED",
            };
            let row = vec![
                format!("{outcome:7}  {:12}", check.name),
                check.detail.clone(),
            ];
            text.push_str(&table(&[row]));
            if let Some(remedy) = &check.remedy {
                text.push_str(&format!("         {remedy}\n"));
            }
        }
        text
    })?;
    if checks.iter().any(|check| check.outcome == Outcome::Fail) {
        bail!("this host can't run VMs as it is");
    }
    Ok(())
}
