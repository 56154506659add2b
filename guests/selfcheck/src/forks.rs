//! What processes cost: the guest's half of `nestling-meter`, for a Linux guest.
//!
//! Each process is forked, executes `busybox true`, and is waited for. Ticks are the guest's own clock's, which runs as the
//! host's; how often its vCPU has left it, the guest asks whoever runs it. Both are printed as figures of the meter.

use nestling_meter::{COUNT, DONE, END, LINE, Operation, PORT, PORTS, STATE};

use crate::{failure::Failure, sys};

/// Exit status of a child that could not execute.
const EXEC_FAILED: u8 = 91;

/// Runs so many processes, one after the other, and prints what they cost. The caller must have one thread.
pub(crate) fn run(count: u64) -> Result<(), Failure> {
    let ports = sys::Ports::new(PORTS)?;
    let exits = || {
        ports.write(PORT, Operation::Exits as u32);
        (ports.read(STATE) == DONE).then(|| ports.read(COUNT))
    };
    let before = exits();
    let start = sys::ticks();
    for _ in 0..count {
        let child = sys::fork(|| {
            sys::exec("/bin/busybox", &["true"]);
            EXEC_FAILED
        })?;
        match sys::wait(child)? {
            0 => {}
            status => return Err(Failure::Storm { cpu: 0, status }),
        }
    }
    let ticks = sys::ticks() - start;
    println!("{LINE} fork {count} {ticks}");
    if let Some((before, after)) = before.zip(exits()) {
        println!("{LINE} fork_exits {count} {}", after.wrapping_sub(before));
    }
    println!("{END}");
    Ok(())
}
