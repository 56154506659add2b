//! The clock: it must agree between CPUs, never run backwards, and wake sleepers on every CPU.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{failure::Failure, sys};

const READINGS: u32 = 2000;
const SLEEP: Duration = Duration::from_millis(20);
/// A loaded emulator may oversleep by much; a timer that never fires, or a clock that runs at a wrong rate by a large
/// factor, exceeds even this.
const SLEPT_TOO_LONG: Duration = Duration::from_secs(10);

/// Checks the clock from all CPUs at once.
pub(crate) fn check(cpus: &[usize]) -> Result<(), Failure> {
    let start = Instant::now();
    let latest_ns = AtomicU64::new(0);
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = cpus
            .iter()
            .map(|&cpu| {
                let latest_ns = &latest_ns;
                scope.spawn(move || check_on(cpu, start, latest_ns))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a panic aborts")).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    println!("nestling-selfcheck: clock: {READINGS} readings on each of {} CPUs: good", cpus.len());
    Ok(())
}

/// `latest_ns` is the latest time that any CPU has read. A CPU looks at it *before* it reads its own clock: a time that
/// was published before must not lie after.
fn check_on(cpu: usize, start: Instant, latest_ns: &AtomicU64) -> Result<(), Failure> {
    sys::pin_to(cpu)?;
    for _ in 0..READINGS {
        let published = latest_ns.load(Ordering::SeqCst);
        let now = start.elapsed().as_nanos() as u64;
        if now < published {
            return Err(Failure::ClockBackwards { cpu, by_ns: published - now });
        }
        latest_ns.fetch_max(now, Ordering::SeqCst);
    }
    let before = Instant::now();
    thread::sleep(SLEEP);
    let slept = before.elapsed();
    if slept < SLEEP || slept > SLEPT_TOO_LONG {
        let asked_ms = SLEEP.as_millis() as u64;
        return Err(Failure::Sleep { cpu, asked_ms, slept_ms: slept.as_millis() as u64 });
    }
    Ok(())
}
