//! Where the instructions of a run go: the guest's own against the hypervisor's, and those by what they were executed for.
//! Built in with the feature `seams` (`nestling bench --profile linux`); otherwise every function here is empty.
//!
//! **What is counted.** The time stamp counter, which counts executed instructions where the emulator is told to. It is read
//! at the two seams of every run of a guest: right before the world switch and right behind it. What passes between the two
//! is the guest's and the switch's own; what passes from there to the next run is counted for the exit that ended the last
//! one. So nothing is sampled, and nothing is left out from the first run to the last. Time in which nothing is executed,
//! because the guest halts, is taken off.
//!
//! **What it does not know.** The CPUs of an emulator that counts instructions take turns: what the housekeeper executes
//! meanwhile is in whatever it came in between. And counting is work as well: how much each run has of it, on either side
//! of the seam, is measured at the start ([`begin`]) and told, for whoever reads the counts to take it off.
//!
//! # Protocol
//! On the CPU of the vCPU: [`entering`] and [`left`] in turns, and behind each `left` one [`exit`] that says what it was.
//! Behind that, [`at_once`] says that it was handled in guest mode, and [`idle`] that nothing was executed for a while.

pub mod tally;

#[cfg(feature = "seams")]
mod seam {
    use spin::Mutex;

    use super::tally::Tally;
    use crate::cpu::{MAX_CPUS, instructions::rdtsc, local};

    static TALLIES: [Mutex<Tally>; MAX_CPUS] = [const { Mutex::new(Tally::new()) }; MAX_CPUS];
    /// Rounds that it takes to find out what counting takes.
    const ROUNDS: u64 = 1000;

    fn here() -> spin::MutexGuard<'static, Tally> {
        TALLIES[local::this().number()].lock()
    }

    /// A VM is about to be made.
    pub fn begin() {
        TALLIES.iter().for_each(|tally| *tally.lock() = Tally::new());
        for _ in 0..ROUNDS {
            entering();
            left();
            exit(0);
        }
        let calibrated = core::mem::take(&mut *here());
        TALLIES.iter().for_each(|tally| tally.lock().costs_as(&calibrated));
    }

    /// What was counted since.
    #[must_use]
    pub fn tell() -> Option<Tally> {
        let mut all = Tally::new();
        TALLIES.iter().for_each(|tally| all.add(&tally.lock()));
        Some(all)
    }

    /// The guest is about to be run.
    pub fn entering() {
        let mut tally = here();
        // As late as possible; unlocking is what is left.
        tally.entering(rdtsc());
    }

    /// It was left.
    pub fn left() {
        // As early as possible.
        let now = rdtsc();
        here().left(now);
    }

    /// By an exit of this kind.
    pub fn exit(kind: usize) {
        here().exit(kind);
    }

    /// That was handled without leaving guest mode.
    pub fn at_once() {
        here().at_once();
    }

    /// Nothing was executed for so long.
    pub fn idle(ticks: u64) {
        here().idle(ticks);
    }

    /// Clears memory, which is counted by itself as well.
    pub fn clearing<R>(work: impl FnOnce() -> R) -> R {
        let start = rdtsc();
        let done = work();
        let ticks = rdtsc() - start;
        here().cleared(ticks);
        done
    }
}

#[cfg(not(feature = "seams"))]
mod seam {
    use super::tally::Tally;

    /// A VM is about to be made.
    #[inline(always)]
    pub fn begin() {}

    /// What was counted since.
    #[inline(always)]
    #[must_use]
    pub fn tell() -> Option<Tally> {
        None
    }

    /// The guest is about to be run.
    #[inline(always)]
    pub fn entering() {}

    /// It was left.
    #[inline(always)]
    pub fn left() {}

    /// By an exit of this kind.
    #[inline(always)]
    pub fn exit(_kind: usize) {}

    /// That was handled without leaving guest mode.
    #[inline(always)]
    pub fn at_once() {}

    /// Nothing was executed for so long.
    #[inline(always)]
    pub fn idle(_ticks: u64) {}

    /// Clears memory, which is counted by itself as well.
    #[inline(always)]
    pub fn clearing<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
}

pub use seam::{at_once, begin, clearing, entering, exit, idle, left, tell};
