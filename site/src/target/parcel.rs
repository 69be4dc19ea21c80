//! A seed that came by way of a hub: taken as one over a line is, with every check that there is.

use super::{Ended, Standbys, open};
use crate::error::{Error, Result};
use crate::hub::Head;
use crate::line::TargetLine;
use crate::phase::Phase;
use crate::protocol::{Purpose, ToTarget};
use crate::store::Store;
use crate::vm::VmName;

/// Takes what a parcel of this head says, which comes over a line that nobody answers at; the VM of which
/// the generation is here then.
pub(crate) async fn take_parcel(
    store: &Store,
    mut line: TargetLine,
    head: &Head,
) -> Result<VmName> {
    let ToTarget::Hello(hello) = line.receive(Phase::Hello).await? else {
        return Err(line.unexpected(Phase::Hello, "no hello"));
    };
    if hello.purpose != Purpose::Seed || hello.vm.id != head.vm {
        return Err(line.unexpected(Phase::Hello, "another thing than its head says"));
    }
    let name = hello.vm.name.clone();
    let mut session = open(store, &Standbys::default(), &line, *hello).await?;
    let mut line = Some(line);
    let outcome = session.run(&mut line).await;
    session.clean().await?;
    outcome.map_err(|Ended { error, .. }| error)?;
    // What ended before it was published left nothing.
    let here = store.vm(&name).generation(head.to.number).load_manifest()?;
    if here.is_some_and(|here| here.identity() == head.to) {
        return Ok(name);
    }
    Err(Error::Parcel {
        why: "it does not bring the generation that its head names".into(),
    })
}
