//! `--report`: what a run cost, as JSON for scripts.
//!
//! Every field is always there; what was not learned is `null`, or empty for a table of counts.
//!
//! - `boot_guest_s`: seconds of guest time from the first VM entry until the console shows the first line of the default
//!   guest's init (`nestling-init: …`), as the hypervisor measured it. With another initrd: `null`.
//! - `boot_wall_s`: seconds on this machine's clock from the start of QEMU until that line arrived here, so it holds the
//!   start of QEMU and of the hypervisor too.
//! - `idle_guest_s`: how long vCPUs had nothing to run, all of them together, of the guest's time `run_guest_s`.
//! - `mapped_bytes`, `touched_bytes`: just before teardown; `table_frames.left`, `guest_frames_left` and
//!   `kept_pages_left` (compressed): after it.
//! - `mmu`: `npt` or `shadow`. `shadow` is `null` with the former; otherwise shadow pages and the bytes of the books about
//!   them when the guest ended, how many went because there were too many (`recycled`) or because the guest wrote to their
//!   tables as if they were none (`flooded`), and what was left when all had been zapped: pages, entries of the reverse
//!   maps, handles that vCPUs keep. Anything but 0 there is a leak.
//! - `storm`: operations carried out, by kind; `storm_skipped`: those that found nothing to act on, or no memory.
//! - `longest_lock_hold`: memory management holding the MMU lock, to the exclusion of at least somebody.
//!   `longest_vcpu_stall`: a vCPU kept from its guest by a fault, all tries of one access together, or by an interrupt of
//!   the hypervisor's; 0 without a storm. `instructions` is `null` unless the emulator counts them.

use std::{collections::BTreeMap, fs, path::Path};

use nestling_control::message::{DeathReport, Span};
use serde::Serialize;

use crate::{accel::Acceleration, args::Mode, error::Error, outcome::Outcome, plan::Plan};

/// The file's content.
#[derive(Debug, Serialize)]
pub struct JsonReport<'a> {
    verdict: Verdict,
    exit_status: u8,
    end: &'a str,
    /// The sentence that people read.
    summary: String,
    mode: Mode,
    accel: Acceleration,
    mmu: &'a str,
    vcpus: u32,
    memory_bytes: u64,
    boot_guest_s: Option<f64>,
    boot_wall_s: Option<f64>,
    run_guest_s: Option<f64>,
    idle_guest_s: Option<f64>,
    run_wall_s: f64,
    exits: BTreeMap<&'a str, u64>,
    faults: BTreeMap<&'a str, u64>,
    mapped_bytes: Option<MappedBytes>,
    touched_bytes: Option<u64>,
    table_frames: Option<TableFrames>,
    shadow: Option<Shadow>,
    guest_frames_left: Option<u64>,
    tlb_flushes: Option<u64>,
    kicks: Option<u64>,
    roots_freed: Option<u64>,
    roots_kept: Option<u64>,
    retries: Option<u64>,
    longest_lock_hold: Option<Length>,
    longest_vcpu_stall: Option<Length>,
    kept_pages_left: Option<u64>,
    storm_seed: Option<u64>,
    storm: BTreeMap<&'a str, u64>,
    storm_skipped: BTreeMap<&'a str, u64>,
    death: Option<&'a DeathReport>,
}

#[derive(Debug, Serialize)]
struct Length {
    ns: u64,
    instructions: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Pass,
    Fail,
}

#[derive(Debug, Serialize)]
struct MappedBytes {
    #[serde(rename = "4K")]
    size_4k: u64,
    #[serde(rename = "2M")]
    size_2m: u64,
    #[serde(rename = "1G")]
    size_1g: u64,
}

#[derive(Debug, Serialize)]
struct Shadow {
    pages: u64,
    book_bytes: u64,
    recycled: u64,
    flooded: u64,
    pages_left: u64,
    mappings_left: u64,
    handles_left: u64,
}

#[derive(Debug, Serialize)]
struct TableFrames {
    peak: u64,
    left: u64,
}

impl<'a> JsonReport<'a> {
    /// The report of a finished run.
    #[must_use]
    pub fn new(plan: &Plan, outcome: &'a Outcome) -> Self {
        let record = &outcome.record;
        let report = record.report.as_ref();
        let storm = report.and_then(|report| report.storm.as_ref());
        let counted = outcome.acceleration == Acceleration::Counted;
        let length = |span: Span| Length { ns: span.ns, instructions: counted.then_some(span.ticks) };
        let counts =
            |counts: &'a BTreeMap<String, u64>| counts.iter().map(|(name, &count)| (name.as_str(), count)).collect();
        Self {
            verdict: if outcome.passed() { Verdict::Pass } else { Verdict::Fail },
            exit_status: outcome.exit_status(),
            end: outcome.end_name(),
            summary: outcome.sentence(),
            mode: outcome.mode,
            accel: outcome.acceleration,
            mmu: plan.guest.config.mmu.name(),
            vcpus: plan.guest.config.vcpus,
            memory_bytes: plan.guest.config.memory_bytes,
            boot_guest_s: report.and_then(|report| report.boot_guest_ns).map(seconds),
            boot_wall_s: record.boot_wall.map(|boot| boot.as_secs_f64()),
            run_guest_s: report.map(|report| seconds(report.run_guest.ns)),
            idle_guest_s: report.map(|report| seconds(report.idle.ns)),
            run_wall_s: record.wall.as_secs_f64(),
            exits: report.map(|report| counts(&report.exits)).unwrap_or_default(),
            faults: report.map(|report| counts(&report.faults)).unwrap_or_default(),
            mapped_bytes: report.map(|report| MappedBytes {
                size_4k: report.mapped_bytes.size_4k,
                size_2m: report.mapped_bytes.size_2m,
                size_1g: report.mapped_bytes.size_1g,
            }),
            touched_bytes: report.map(|report| report.touched_bytes),
            table_frames: report
                .map(|report| TableFrames { peak: report.table_frames.peak, left: report.table_frames.left }),
            shadow: report.and_then(|report| report.shadow).map(|shadow| Shadow {
                pages: shadow.pages,
                book_bytes: shadow.book_bytes,
                recycled: shadow.recycled,
                flooded: shadow.flooded,
                pages_left: shadow.pages_left,
                mappings_left: shadow.mappings_left,
                handles_left: shadow.handles_left,
            }),
            guest_frames_left: report.map(|report| report.guest_frames_left),
            tlb_flushes: report.map(|report| report.tlb_flushes),
            kicks: report.map(|report| report.kicks),
            roots_freed: report.map(|report| report.roots_freed),
            roots_kept: report.map(|report| report.roots_kept),
            retries: report.map(|report| report.retries),
            longest_lock_hold: report.map(|report| length(report.longest_lock_hold)),
            longest_vcpu_stall: report.map(|report| length(report.longest_vcpu_stall)),
            kept_pages_left: report.map(|report| report.kept_pages_left),
            storm_seed: storm.map(|storm| storm.seed),
            storm: storm.map(|storm| counts(&storm.done)).unwrap_or_default(),
            storm_skipped: storm.map(|storm| counts(&storm.skipped)).unwrap_or_default(),
            death: record.death.as_ref(),
        }
    }

    /// Writes it, with a line end, to `path`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let doing = || format!("write the report to {}", path.display());
        let mut text = serde_json::to_vec_pretty(self).map_err(|cause| Error::io(doing())(cause.into()))?;
        text.push(b'\n');
        fs::write(path, text).map_err(Error::io(doing()))
    }
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}
