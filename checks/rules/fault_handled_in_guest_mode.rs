//! A vCPU that counts as in guest mode handles no fault for which it may have to wait: a flusher would wait for it to leave,
//! while it may wait inside the lock for the flusher.

use crate::{Fault, FaultError, Host, Outcome, Vcpu};

pub(crate) fn right<H: Host>(vcpu: &mut Vcpu<H>, fault: Fault) -> Result<Outcome, FaultError> {
    drop(vcpu.enter()?);
    vcpu.fault(fault)
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(vcpu: &mut Vcpu<H>, fault: Fault) -> Result<Outcome, FaultError> {
    let guest = vcpu.enter()?;
    let outcome = vcpu.fault(fault);
    drop(guest);
    outcome
}
