//! Many short processes on all CPUs at once: new address spaces, copy-on-write, page tables made and thrown away.
//!
//! One worker process a CPU forks children; each child writes to memory it shares with its worker until the write, looks
//! whether it got its own copy, and executes `busybox true`. The worker then looks whether its own memory is unchanged.

use crate::{failure::Failure, sys};

/// Processes in all, spread over the CPUs.
const PROCESSES: usize = 120;
const SHARED_WORDS: usize = 32 * 4096 / size_of::<u64>();

/// Exit statuses of a worker and of a child.
const COPY_WRONG: u8 = 90;
const EXEC_FAILED: u8 = 91;
const CHILD_FAILED: u8 = 92;
const NO_CHILD: u8 = 93;

/// Runs the storm. The caller must have one thread.
pub(crate) fn check(cpus: &[usize]) -> Result<(), Failure> {
    let each = PROCESSES.div_ceil(cpus.len());
    let workers =
        cpus.iter().map(|&cpu| Ok((cpu, sys::fork(|| worker(cpu, each))?))).collect::<Result<Vec<_>, Failure>>()?;
    let mut result = Ok(());
    for (cpu, pid) in workers {
        let status = sys::wait(pid)?;
        if status != 0 {
            result = result.and(Err(Failure::Storm { cpu, status }));
        }
    }
    result?;
    println!("nestling-selfcheck: storm: {} processes on {} CPUs: good", each * cpus.len(), cpus.len());
    Ok(())
}

fn worker(cpu: usize, processes: usize) -> u8 {
    if sys::pin_to(cpu).is_err() {
        return NO_CHILD;
    }
    let mut shared: Vec<u64> = (0..SHARED_WORDS as u64).collect();
    for round in 1..=processes as u64 {
        let Ok(pid) = sys::fork(|| child(&mut shared, round)) else { return NO_CHILD };
        match sys::wait(pid) {
            Ok(0) => {}
            _ => return CHILD_FAILED,
        }
        if !shared.iter().enumerate().all(|(index, &word)| word == index as u64) {
            return COPY_WRONG;
        }
    }
    0
}

fn child(shared: &mut [u64], round: u64) -> u8 {
    for (index, word) in shared.iter_mut().enumerate().step_by(509) {
        *word = index as u64 ^ (round << 32);
    }
    let copied = shared.iter().enumerate().all(|(index, &word)| {
        let written = index % 509 == 0;
        word == if written { index as u64 ^ (round << 32) } else { index as u64 }
    });
    if !copied {
        return COPY_WRONG;
    }
    sys::exec("/bin/busybox", &["true"]);
    EXEC_FAILED
}
