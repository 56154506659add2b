//! Guest after guest, each with a seed of its own, in one session of the hypervisor.
//!
//! A series is for guests of which nothing good is to be expected: random machine code. Each has the machine for a slice of
//! time, whatever it does; then it is ended from outside, and the next one is made. When a guest has gone, the machine must
//! be as before: page tables and guest memory given back, every frame in the allocator but those that the heap has taken,
//! and the heap as full as it was. What is not as before is a leak, and is told with the seed.
//!
//! **A failure has a seed.** A guest's seed is told, and has left the machine, before anything of the guest exists. A
//! hypervisor that panics, or a machine that stops, was running the guest that was told last.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};

use nestling_control::bundle::Bundle;
use nestling_control::config::{HugePages, Series};
use nestling_control::message::{DeathReason, GuestExit, Leak, SeriesReport, ToCommand};

use super::exit;
use super::house::{self, FAULTS, Finished, Manner};
use super::time::VmClock;
use crate::boot::ap;
use crate::control::{self, log};
use crate::emulate;
use crate::memory::{frames, usage};

const NS_PER_MS: u64 = 1_000_000;
/// One guest in so many is mapped by 4 KiB pages only.
const SMALL_PAGES_EVERY: u64 = 4;
/// After so many guests it is told what came of all until then: what is told last counts.
const TOLD_EVERY: u64 = 32;
/// So many leaks are told. One is too many already.
const LEAKS_TOLD: usize = 16;

/// What must be the same before and behind a guest.
#[derive(Clone, Copy)]
struct Stock {
    /// Free frames, and those that the heap has.
    frames: u64,
    heap_bytes: u64,
}

impl Stock {
    fn take() -> Self {
        while !ap::all_idle() {
            core::hint::spin_loop();
        }
        Self { frames: frames::counts().0 + usage::heap_frames(), heap_bytes: usage::heap_bytes() }
    }

    /// What is missing now, where nothing of the guest is left but `remains`.
    fn compare(self, remains: &Remains) -> Option<Leak> {
        let (now, seed) = (Self::take(), remains.leak.seed);
        let leak = Leak {
            frames: self.frames.wrapping_sub(now.frames) as i64,
            heap_bytes: now.heap_bytes.wrapping_sub(self.heap_bytes) as i64,
            ..remains.leak
        };
        (leak != Leak { seed, ..Leak::default() }).then_some(leak)
    }
}

/// What is kept of a guest: nothing that is on the heap, which is looked at while this lives.
struct Remains {
    leak: Leak,
    end: &'static str,
    exits: [u64; exit::KINDS],
    faults: [u64; FAULTS.len()],
    table_frames_peak: u64,
    stopped_by_operator: bool,
}

impl Remains {
    fn of(finished: &Finished, seed: u64) -> Self {
        let Finished { report, stopped_by_operator, .. } = finished;
        let from = |counts: &BTreeMap<String, u64>, name| counts.get(name).copied().unwrap_or(0);
        Self {
            leak: Leak {
                seed,
                table_frames: report.table_frames.left,
                guest_frames: report.guest_frames_left,
                kept_pages: report.kept_pages_left,
                ..Leak::default()
            },
            end: end_name(finished),
            exits: exit::NAMES.map(|name| from(&report.exits, name)),
            faults: FAULTS.map(|name| from(&report.faults, name)),
            table_frames_peak: report.table_frames.peak,
            stopped_by_operator: *stopped_by_operator,
        }
    }

    fn add_to(&self, total: &mut SeriesReport) {
        total.guests += 1;
        total.table_frames_peak = total.table_frames_peak.max(self.table_frames_peak);
        add(&mut total.ends, &[self.end], &[1]);
        add(&mut total.exits, &exit::NAMES, &self.exits);
        add(&mut total.faults, &FAULTS, &self.faults);
    }
}

/// Runs the series to its end, and tells what came of it.
///
/// # Errors
/// Why a guest could not be started.
pub(super) fn run(bundle: &Bundle<'_>, series: Series, cpus: usize) -> Result<GuestExit, String> {
    control::reserve();
    emulate::prepare();
    let clock = VmClock::start();
    let mut bundle = bundle.clone();
    let (words, pages) = (bundle.config.command_line.clone(), bundle.config.huge_pages);
    let mut total = SeriesReport::default();
    let mut exit = GuestExit::PowerOff;
    for number in 0..series.guests {
        if clock.now().ns / NS_PER_MS >= series.duration_ms {
            break;
        }
        let seed = series.seed.wrapping_add(number);
        bundle.config.command_line = format!("{words} seed={seed}");
        bundle.config.huge_pages = if seed.is_multiple_of(SMALL_PAGES_EVERY) { HugePages::None } else { pages };
        control::send(&ToCommand::GuestBegins { seed });
        control::flush();
        let before = Stock::take();
        let finished = house::start(&bundle, cpus, Manner::Slice(series.slice_ms.saturating_mul(NS_PER_MS)))?;
        let reason = finished.death.as_ref().map(|death| &death.reason);
        log::info!("guest {seed}: {:?} {reason:x?}", finished.exit);
        let remains = Remains::of(&finished, seed);
        drop(finished);
        let leak = before.compare(&remains);
        remains.add_to(&mut total);
        total.leaks.extend(leak.filter(|_| total.leaks.len() < LEAKS_TOLD));
        if total.guests.is_multiple_of(TOLD_EVERY) {
            control::send(&ToCommand::Series(Box::new(total.clone())));
        }
        if remains.stopped_by_operator {
            exit = GuestExit::Stopped;
            break;
        }
    }
    total.duration_ns = clock.now().ns;
    control::send(&ToCommand::Series(Box::new(total)));
    Ok(exit)
}

fn add(total: &mut BTreeMap<String, u64>, names: &[&str], counts: &[u64]) {
    for (name, &count) in names.iter().zip(counts).filter(|(_, count)| **count > 0) {
        *total.entry((*name).to_string()).or_default() += count;
    }
}

fn end_name(finished: &Finished) -> &'static str {
    match (&finished.exit, finished.death.as_ref().map(|death| &death.reason)) {
        (GuestExit::PowerOff, _) => "power-off",
        (GuestExit::Reset, _) => "reset",
        (GuestExit::DebugExit { .. }, _) => "debug-exit",
        (GuestExit::Stopped | GuestExit::Migrated, _) => "slice-over",
        (GuestExit::Error { .. }, _) => "error",
        (GuestExit::Died, Some(DeathReason::TripleFault)) => "triple-fault",
        (GuestExit::Died, Some(DeathReason::Shutdown)) => "shutdown",
        (GuestExit::Died, Some(DeathReason::UnexpectedExit { .. })) => "unexpected-exit",
        (GuestExit::Died, Some(DeathReason::MmioWithoutDevice { .. })) => "mmio-without-device",
        (GuestExit::Died, Some(DeathReason::NotEmulated { .. })) => "not-emulated",
        (GuestExit::Died, Some(DeathReason::SilentConsole { .. })) => "silent-console",
        (GuestExit::Died, Some(DeathReason::Internal { .. }) | None) => "internal",
    }
}
