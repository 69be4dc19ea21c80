//! Exit codes: 0 done, 1 failed, 2 usage, 3 refused before anything changed, 4 interrupted and
//! resumable. Clap exits with 2 by itself.

use std::process::ExitCode;

use site::Class;

const FAILED: u8 = 1;
const REFUSED: u8 = 3;
const INTERRUPTED: u8 = 4;

/// The exit code for an error.
pub(crate) fn code_of(error: &anyhow::Error) -> ExitCode {
    let class = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<site::Error>())
        .map(site::Error::class);
    ExitCode::from(match class {
        Some(Class::Refused) => REFUSED,
        Some(Class::Interrupted) => INTERRUPTED,
        Some(Class::Failed) | None => FAILED,
    })
}
