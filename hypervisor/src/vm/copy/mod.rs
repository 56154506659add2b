//! Sending a running VM through the window, and taking one in.
//!
//! **Sending** is a job on a CPU that runs no vCPU ([`send()`]): first the memory behind a dirty log, while the guest runs
//! ([`rounds`]); then, while it is held ([`super::pause`]), what it has written since, and the state of the machine.
//! After a snapshot the guest goes on at once. In a migration it stays held until the command says that the other side has
//! it, in which case this VM ends; or until the command wants no more, in which case it goes on here, as it was.
//!
//! Nothing of the guest is lost by a copy that fails: its memory is all here, its logs are stopped, and the next copy begins
//! with everything dirty. Whatever happens, the job ends with one last message, and with a guest that runs on or has been
//! given away: a command that stops reading, or is gone, is not waited for longer than a minute.
//!
//! **Taking in** is [`incoming`]'s part.

mod incoming;
mod rounds;
mod send;
mod throttle;

pub(super) use incoming::Incoming;
pub(super) use send::{Fixed, Purpose, send};
