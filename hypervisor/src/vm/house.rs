//! One VM from its bundle to its report, as CPU 0 sees it.
//!
//! Every step may fail with a text for the operator; nothing is started before all that can be checked has been.
//!
//! The end has an order. The vCPUs are made to leave and their jobs finish, which says that no CPU runs on the VM's
//! tables; counters are read while tables and RAM are still there; then vCPUs, MMU and RAM go, in this order; what is
//! left after that is counted and told.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::arch::x86_64::__cpuid;
use core::fmt::Display;
use core::sync::atomic::{AtomicUsize, Ordering};

use nestling::guest::CpuFeatures;
use nestling::shadow::{Metadata, ShadowConfig};
use nestling::{AddressSpace, Config, Counters, GfnRange, Gpa, Hpa, Level, Mmu, SlotConfig, SlotFlags, SlotId};
use nestling_control::bundle::Bundle;
use nestling_control::config::{GuestKind, HugePages, MmuKind, Origin, RunConfig};
use nestling_control::message::{
    BytesByPageSize, DeathReason, DeathReport, GuestExit, Report, ShadowReport, Span, TableFrames, ToCommand,
    ToHypervisor,
};
use nestling_control::window::FromHypervisor;
use spin::Mutex;

use super::copy::{self, Fixed, Incoming, Purpose};
use super::exit;
use super::handle::Policy;
use super::leave::{self, Leave};
use super::meter::{self, Meter};
use super::pause::Phase;
use super::policy::cpuid::{CpuidConfig, CpuidPolicy, ThisCpu};
use super::policy::msr::{MsrConfig, MsrState};
use super::saved::{Likeness, SavedMachine};
use super::series;
use super::shared::{CONSOLE_PIECE, End, Shared};
use super::storm::{self, Storm};
use super::time::VmClock;
use super::vcpu::{AnyVcpu, Remains, Vcpu};
use super::walk;
use crate::boot::ap;
use crate::control::window::Window;
use crate::control::{self, log};
use crate::cpu::{apic, clock, instructions, local, rtc};
use crate::devices::board::BoardConfig;
use crate::devices::platform::{Platform, PlatformConfig};
use crate::ghost;
use crate::guest::layout::RamLayout;
use crate::guest::{LinuxConfig, MultibootConfig, VcpuInit, load_linux, load_multiboot};
use crate::memory::embedder::{self, Machine};
use crate::memory::frames;
use crate::memory::guest::{self, ChunkSize, GuestRam};
use crate::memory::kept;
use crate::seams;
use crate::svm::{self, permission::Maps};

/// How often CPU 0 looks at its ports while nobody wakes it.
const TICK_US: u64 = 2_000;
/// Memory that must be free beside the guest's RAM: tables, vCPUs, queues.
const RESERVE_BYTES: u64 = 16 << 20;

/// Runs what a bundle asks for to its end, and tells what it was like.
#[must_use]
pub fn run(bundle: &[u8], cpus: usize) -> GuestExit {
    let exit = Bundle::parse(bundle).map_err(text).and_then(|bundle| match bundle.config.series {
        Some(series) => series::run(&bundle, series, cpus),
        None => start(&bundle, cpus, Manner::Alone).map(tell),
    });
    exit.unwrap_or_else(|text| GuestExit::Error { text })
}

fn text(error: impl Display) -> String {
    error.to_string()
}

/// How a guest is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Manner {
    /// For its own sake: its console and what is said of it go out.
    Alone,
    /// As one of many: for so many nanoseconds, and nothing is said but what comes back at the end.
    Slice(u64),
}

/// What a guest leaves.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) exit: GuestExit,
    pub(super) death: Option<DeathReport>,
    pub(super) report: Report,
    /// The operator wanted it to end.
    pub(super) stopped_by_operator: bool,
}

/// Tells what a guest has left.
fn tell(finished: Finished) -> GuestExit {
    let Finished { exit, death, report, .. } = finished;
    if let Some(death) = death {
        control::send(&ToCommand::Death(death));
    }
    control::send(&ToCommand::Report(Box::new(report)));
    exit
}

/// The part that can fail before a guest runs, and then the run.
pub(super) fn start(bundle: &Bundle<'_>, cpus: usize, manner: Manner) -> Result<Finished, String> {
    let features = svm::check(bundle.config.mmu).map_err(text)?;
    let config = &bundle.config;
    let (needed, present) = (config.cpus() as usize, cpus + 1);
    if needed > present {
        let storm = if config.storm.is_some() { ", one storms" } else { "" };
        return Err(format!(
            "{} vCPUs need {needed} CPUs (one keeps house{storm}), this machine has {present}",
            config.vcpus
        ));
    }
    let free = frames::counts().0 * frames::FRAME;
    if config.memory_bytes + RESERVE_BYTES > free {
        let mib = |bytes: u64| bytes >> 20;
        let (asked, free) = (mib(config.memory_bytes + RESERVE_BYTES), mib(free));
        return Err(format!("the guest needs {asked} MiB with what belongs to it, this machine has {free} MiB free"));
    }
    let mmu = memory(config)?;
    let maps = Maps::new().ok_or("no memory for the permission maps")?;
    let ram = mmu.host().ram();
    let begin = match config.origin {
        Origin::Boot => Begin::Boot(Box::new(load(bundle, ram)?)),
        Origin::Window => {
            let mut incoming = Incoming::open()?;
            let taken = incoming.take(ram);
            return match taken {
                Ok(saved) => Vm { config, features, maps, mmu, manner, cpus }.run_incoming(saved, incoming),
                Err(text) => refuse(incoming, text),
            };
        }
    };
    Vm { config, features, maps, mmu, manner, cpus }.run(begin)
}

/// Tells the other end of the window why its guest is not run here.
fn refuse(mut incoming: Incoming, text: String) -> Result<Finished, String> {
    // If this finds no room, the control channel tells it as well.
    let _ = incoming.answer(&FromHypervisor::Refused(text.clone()));
    Err(text)
}

/// Loads the kernel of a bundle.
fn load(bundle: &Bundle<'_>, ram: &GuestRam) -> Result<VcpuInit, String> {
    let (config, initrd) = (&bundle.config, bundle.initrd.unwrap_or_default());
    let (memory_bytes, vcpus) = (config.memory_bytes, config.vcpus);
    match config.kind {
        GuestKind::Linux => {
            let machine = LinuxConfig { memory_bytes, vcpus };
            load_linux(ram, bundle.kernel, initrd, &config.command_line, &machine).map_err(text)
        }
        GuestKind::Multiboot => {
            let machine = MultibootConfig { memory_bytes, vcpus };
            load_multiboot(ram, bundle.kernel, initrd, &config.command_line, &machine).map_err(text)
        }
    }
}

/// The guest's RAM and the MMU that maps it.
fn memory(config: &RunConfig) -> Result<Arc<Mmu<Machine>>, String> {
    let (largest, chunk) = match largest_page(config.huge_pages) {
        HugePages::None => (Level::K4, ChunkSize::K4),
        HugePages::M2 => (Level::M2, ChunkSize::M2),
        HugePages::G1 => (Level::G1, ChunkSize::G1),
    };
    // The hole between 640 KiB and 1 MiB is RAM as well, which no map tells the guest of: kernels look there for
    // firmware's tables and adapters' ROMs without asking, and find zeros. The hole below 4 GiB is nobody's.
    let layout = RamLayout::new(config.memory_bytes).map_err(text)?;
    let high = layout.ranges().get(2);
    let bounds = [Some((0, layout.low_end())), high.map(|r| (r.gpa, r.end()))];
    let range = |(start, end)| GfnRange { start: Gpa(start).gfn(), end: Gpa(end).gfn() };
    let ranges: Vec<GfnRange> = bounds.into_iter().flatten().map(range).collect();
    let metered = (config.meter_pages > 0).then(|| meter::range(config.meter_pages));
    let banks: Vec<GfnRange> = ranges.iter().copied().chain(metered).collect();
    let ram = GuestRam::new(&banks, chunk).map_err(text)?;
    let (storm, meter_pages, asked) = (config.storm.is_some(), config.meter_pages, config);
    let config = Config {
        // One more for the meter.
        vcpus: config.vcpus as u16 + u16::from(metered.is_some()),
        // For the guest's demands, for a storm, for a meter, and for whoever copies the VM.
        workers: 4,
        largest,
        // With 52 address bits an NPT entry has no reserved bit that could mark MMIO.
        mmio_entries: physical_bits() < 52,
        ..Config::default()
    };
    ghost::begin();
    seams::begin();
    let mmu = Mmu::new(Machine::new(ram), config).map_err(text)?;
    if asked.mmu == MmuKind::Shadow {
        let cpu = CpuFeatures { physical_bits: physical_bits() as u8, gigantic_pages: has_giant_pages() };
        mmu.enable_shadow(ShadowConfig { pages: asked.shadow_pages(), cpu }).map_err(text)?;
    }
    let mut worker = mmu.worker().map_err(text)?;
    let banks = ranges.iter().enumerate();
    let slots = banks.flat_map(|(bank, &range)| storm::cut(range, storm).map(move |range| (bank, range)));
    for (id, (bank, range)) in slots.enumerate() {
        let slot = SlotConfig {
            id: SlotId(id as u32),
            space: AddressSpace::Main,
            base: range.start.gpa(),
            size: range.pages() * frames::FRAME,
            flags: SlotFlags::empty(),
            backing: bank as u64,
        };
        worker.add_slot(slot).map_err(text)?;
    }
    if metered.is_some() {
        worker.add_slot(meter::slot(meter_pages, ranges.len() as u64)).map_err(text)?;
    }
    drop(worker);
    Ok(mmu)
}

/// What was asked for, or less if this CPU lacks it.
fn largest_page(asked: HugePages) -> HugePages {
    if asked == HugePages::G1 && !has_giant_pages() { HugePages::M2 } else { asked }
}

/// CPUID 0x8000_0001, EDX bit 26.
fn has_giant_pages() -> bool {
    __cpuid(0x8000_0001).edx & 1 << 26 != 0
}

/// Bits of a physical address, the guest's too.
fn physical_bits() -> u32 {
    __cpuid(0x8000_0008).eax & 0xff
}

/// A VM whose memory is loaded.
struct Vm<'a> {
    config: &'a RunConfig,
    features: svm::Features,
    maps: Maps,
    mmu: Arc<Mmu<Machine>>,
    manner: Manner,
    /// CPUs beside CPU 0.
    cpus: usize,
}

/// What the vCPUs begin with.
enum Begin {
    /// The first in the state that a loader left.
    Boot(Box<VcpuInit>),
    /// All of them where they were.
    Saved(Box<SavedMachine>),
}

/// A VM that can be run.
struct Built {
    shared: Arc<Shared>,
    vcpus: Vec<Box<dyn AnyVcpu>>,
    fixed: Fixed,
}

/// Where a CPU leaves what is left of its vCPU.
type Left = Arc<[Mutex<Option<Remains>>]>;

impl Vm<'_> {
    fn run(self, begin: Begin) -> Result<Finished, String> {
        let built = self.build(begin)?;
        self.run_built(built)
    }

    /// Runs a VM that came in, when its other end says so.
    fn run_incoming(self, saved: SavedMachine, mut incoming: Incoming) -> Result<Finished, String> {
        let (ticks, ready) = (saved.ticks, saved.ready_ns);
        let line = saved.line.clone();
        let built = match self.build(Begin::Saved(Box::new(saved))) {
            Ok(built) => built,
            Err(text) => return refuse(incoming, text),
        };
        if let Err(text) = incoming.wait_to_run() {
            return refuse(incoming, text);
        }
        built.shared.clock.go_on_from(ticks);
        built.shared.resume_console(&line, ready);
        // The ring was empty but for what was answered: there is room.
        let _ = incoming.answer(&FromHypervisor::Running);
        self.run_built(built)
    }

    fn build(&self, begin: Begin) -> Result<Built, String> {
        let count = self.config.vcpus as usize;
        let extended = __cpuid(0x8000_0001).edx;
        let (tsc_aux, ffxsr) = (extended & 1 << 27 != 0, extended & 1 << 25 != 0);
        let clock = match &begin {
            Begin::Boot(_) => VmClock::start(),
            Begin::Saved(saved) => {
                let clock = VmClock::new(0, saved.tsc_khz);
                clock.go_on_from(saved.ticks);
                clock
            }
        };
        let tsc_khz = clock.khz();
        let cpuid = CpuidConfig { vcpus: self.config.vcpus, xsave: true, tsc_aux, tsc_khz };
        let cpuid = Arc::new(CpuidPolicy::new(&ThisCpu, cpuid));
        let likeness = Likeness {
            kind: self.config.kind,
            memory_bytes: self.config.memory_bytes,
            vcpus: self.config.vcpus,
            features: cpuid.features(),
        };
        let board = (self.config.kind == GuestKind::Multiboot)
            .then_some(BoardConfig { ram_bytes: self.config.memory_bytes, vcpus: self.config.vcpus });
        let now_s = rtc::unix_seconds();
        let mut devices =
            PlatformConfig { wall_clock_s: now_s, console_output: CONSOLE_PIECE, board, ..PlatformConfig::default() };
        let (init, platform, saved) = match begin {
            Begin::Boot(init) => (Some(init), Platform::new(devices), Vec::new()),
            Begin::Saved(saved) => {
                saved.fits(&likeness, clock::tsc_khz()).map_err(text)?;
                let away_s = now_s.saturating_sub(saved.saved_at_s);
                devices.wall_clock_s = saved.wall_clock_s.saturating_add(away_s);
                let mut platform = saved.platform;
                platform.check(devices, clock.ns_in(saved.ticks), away_s).map_err(text)?;
                (None, platform, saved.vcpus)
            }
        };
        let worker = self.mmu.worker().map_err(text)?;
        let physical_bits = physical_bits();
        let mut shared = Shared::new(Arc::clone(&self.mmu), worker, clock, count, platform, &self.config.ready_marker);
        shared.mmu_kind = self.config.mmu;
        shared.storm = Storm::new(self.config.storm);
        shared.silent = self.manner != Manner::Alone;
        if self.config.meter_pages > 0 {
            let bank = self.mmu.host().ram().ranges().count() as u64 - 1;
            let slot = meter::slot(self.config.meter_pages, bank);
            // Behind the guest's own; with shadow paging there is none of this kind.
            let turner = match self.config.mmu {
                MmuKind::Nested => self.mmu.vcpu(nestling::VcpuId(self.config.vcpus as u16)),
                MmuKind::Shadow => None,
            };
            shared.meter = Some(Mutex::new(Meter::new(self.mmu.worker().map_err(text)?, slot, turner)));
        }
        let shared = Arc::new(shared);
        let tsc_offset = shared.clock.started().wrapping_neg();
        let linear_bits = cpuid.linear_bits();
        let msrs = MsrConfig { tsc_khz, tsc_offset, physical_bits, linear_bits, ffxsr, tsc_aux };
        let mut vcpus: Vec<Box<dyn AnyVcpu>> = Vec::new();
        for number in 0..count {
            let (cpuid, wall_clock_s) = (Arc::clone(&cpuid), devices.wall_clock_s);
            let policy = Policy { cpuid, msrs: MsrState::new(msrs), tsc_aux, physical_bits, wall_clock_s };
            vcpus.push(match self.config.mmu {
                MmuKind::Nested => self.vcpu::<svm::Nested>(number, &shared, policy)?,
                MmuKind::Shadow => self.vcpu::<svm::Shadowed>(number, &shared, policy)?,
            });
        }
        for (vcpu, saved) in vcpus.iter_mut().zip(saved) {
            vcpu.restore(saved).map_err(text)?;
        }
        if let Some(init) = init {
            vcpus[0].start(&init);
        }
        let fixed = Fixed { likeness, wall_clock_s: devices.wall_clock_s };
        Ok(Built { shared, vcpus, fixed })
    }

    /// A vCPU that waits to be started.
    fn vcpu<P: svm::Paging>(
        &self,
        number: usize,
        shared: &Arc<Shared>,
        policy: Policy,
    ) -> Result<Box<dyn AnyVcpu>, String> {
        let cpu = svm::Vcpu::<P>::new(self.features, &self.maps).ok_or("no memory for a vCPU")?;
        let vcpu = Vcpu::new(number, shared, cpu, policy).ok_or("no memory for a vCPU, or its number is taken")?;
        Ok(Box::new(vcpu))
    }

    fn run_built(self, built: Built) -> Result<Finished, String> {
        let Built { shared, vcpus, fixed } = built;
        let count = vcpus.len();
        if self.manner == Manner::Alone {
            control::send(&ToCommand::GuestStarted {
                vcpus: self.config.vcpus,
                memory_bytes: self.config.memory_bytes,
                huge_pages: largest_page(self.config.huge_pages),
                mmu: self.config.mmu,
            });
        }
        let storm = shared.storm.is_planned().then(|| self.mmu.worker()).transpose().map_err(text)?;
        let running = Arc::new(AtomicUsize::new(count + usize::from(storm.is_some())));
        let left: Left = (0..count).map(|_| Mutex::new(None)).collect();
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let (running, left) = (Arc::clone(&running), Arc::clone(&left));
            let job = Box::new(move || {
                // The vCPU's share of the VM is gone before the VM hears of it: what CPU 0 drops next is the last.
                *left[number].lock() = Some(vcpu.run());
                drop(left);
                running.fetch_sub(1, Ordering::Release);
                embedder::kick_housekeeper();
            });
            ap::run_on(embedder::cpu_of(number), job);
        }
        if let Some(worker) = storm {
            let (vm, running) = (Arc::clone(&shared), Arc::clone(&running));
            let job = Box::new(move || {
                storm::blow(&vm, worker);
                drop(vm);
                running.fetch_sub(1, Ordering::Release);
                embedder::kick_housekeeper();
            });
            ap::run_on(embedder::cpu_of(count), job);
        }
        let copier = Copier { cpu: self.config.cpus() as usize, cpus: self.cpus, fixed };
        self.keep_house(&shared, &running, &copier);
        Ok(self.finish(shared, &left))
    }

    /// Serves the ports until every vCPU has left.
    fn keep_house(&self, vm: &Arc<Shared>, running: &Arc<AtomicUsize>, copier: &Copier) {
        let mut leave = Leave::default();
        let mut wanted = None;
        let timer = &local::this().timer_fired;
        let mut typed: Vec<u8> = Vec::new();
        while running.load(Ordering::Acquire) > 0 {
            while typed.len() < 64
                && let Some(byte) = control::console_read()
            {
                typed.push(byte);
            }
            vm.try_with_ports(|platform, now| {
                let taken = platform.console_push(now, &typed);
                typed.drain(..taken);
            });
            match control::next_command() {
                Some(ToHypervisor::Stop) => vm.end(End::Exit(GuestExit::Stopped)),
                Some(ToHypervisor::Snapshot) => wanted = Some(Purpose::Snapshot),
                Some(ToHypervisor::Migrate(limits)) => wanted = Some(Purpose::Migrate(limits)),
                None => {}
            }
            // One after the other, whatever the command says.
            if !vm.stopping()
                && !vm.copying.load(Ordering::SeqCst)
                && let Some(purpose) = wanted.take()
            {
                copier.start(vm, running, purpose);
            }
            control::pump();
            self.watch_time(vm);
            if vm.stopping() {
                leave.look(vm, timer.load(Ordering::Relaxed));
            } else if self.features.emulated() {
                leave::forgotten(vm);
            }
            timer.store(false, Ordering::Relaxed);
            clock::set_timer_at(instructions::rdtsc() + clock::tsc_from_us(TICK_US));
            // SAFETY: ring 0, interrupts off, no lock held. The timer ends it at the latest.
            unsafe { instructions::halt() };
        }
        apic::set_timer(0);
    }

    fn watch_time(&self, vm: &Shared) {
        if let Manner::Slice(ns) = self.manner
            && vm.clock.now().ns >= ns
        {
            vm.end(End::Slice);
        }
        let Some(limit_ms) = self.config.silence_timeout_ms else { return };
        let silent_ms = vm.clock.now().ns.saturating_sub(vm.last_output()) / 1_000_000;
        let held = vm.pause.phase() != Phase::Run;
        if silent_ms >= limit_ms && !held && !vm.stopping() {
            vm.end(End::Death(DeathReason::SilentConsole { silent_ms }, None));
        }
    }

    /// Counts, takes down, counts again, tells.
    fn finish(self, shared: Arc<Shared>, left: &Left) -> Finished {
        ghost::end();
        let ticks = shared.clock.ticks();
        let run_guest = Span { ns: shared.clock.ns_in(ticks), ticks };
        // What the guest printed last may still be in its UART.
        shared.try_with_ports(|platform, now| platform.poll(now));
        let mut remains: Vec<Remains> = left.iter().filter_map(|slot| slot.lock().take()).collect();
        let counters = self.mmu.counters();
        let roots = remains.iter().map(|r| r.root).filter(|&root| root != Hpa(0));
        // SAFETY: no vCPU runs, `remains` holds the roots, nobody else changes the tables. An obsolete root, which a halted
        // vCPU may still have, is empty.
        let touched = |root: Hpa| unsafe { walk::accessed_bytes(root.0) };
        let touched_bytes = match self.config.mmu {
            MmuKind::Nested => roots.map(touched).max().unwrap_or(0),
            // A page is mapped there when it is used, and its mark means that it was used lately.
            MmuKind::Shadow => counters.mapped_bytes().iter().sum(),
        };
        let states = super::vcpu::states(&mut remains);
        let exits = exits(&remains);
        let (cause, ready) = (shared.cause(), shared.ready());
        let span = |ticks| Span { ns: shared.clock.ns_in(ticks), ticks };
        let idle = span(remains.iter().map(|r| r.idle_ticks).sum());
        let longest_vcpu_stall = span(shared.storm.longest_stall());
        let longest_lock_hold = span(self.mmu.host().longest_hold());
        let retries = counters.faults_retried + shared.storm.without_slot();
        let storm = shared.storm.report();
        let clock = shared.clock.clone();
        let had = self.mmu.shadow_metadata();
        meter::mark_end();
        let began = instructions::rdtsc();
        drop(remains);
        drop(shared);
        if had.is_some() {
            zap_shadow(&self.mmu);
        }
        let counting = instructions::rdtsc();
        meter::mark_end();
        let shadow = had.zip(self.mmu.shadow_metadata()).map(|(had, left)| shadow_report(had, left, &counters));
        meter::mark_end();
        let counted = instructions::rdtsc() - counting;
        drop(self.mmu);
        let ticks = instructions::rdtsc() - began - counted;
        meter::mark_end();
        let teardown = Span { ns: clock.ns_in(ticks), ticks };
        let stopped_by_operator = cause == Some(End::Exit(GuestExit::Stopped));
        let (exit, death) = match cause {
            Some(End::Exit(exit)) => (exit, None),
            Some(End::Slice) => (GuestExit::Stopped, None),
            Some(End::Death(reason, vcpu)) => {
                (GuestExit::Died, Some(DeathReport { reason, vcpu, guest_ns: run_guest.ns, vcpus: states }))
            }
            None => (GuestExit::Error { text: "the vCPUs left without a cause".to_string() }, None),
        };
        let [size_4k, size_2m, size_1g] = counters.mapped_bytes();
        let (tables_left, tables_peak) = embedder::table_frames();
        let report = Report {
            vcpus: self.config.vcpus,
            memory_bytes: self.config.memory_bytes,
            exits,
            faults: faults(&counters),
            mapped_bytes: BytesByPageSize { size_4k, size_2m, size_1g },
            touched_bytes,
            mmu: self.config.mmu,
            shadow,
            table_frames: TableFrames { peak: tables_peak, left: tables_left },
            teardown,
            guest_frames_left: guest::frames_in_use(),
            tlb_flushes: counters.flushes,
            kicks: counters.kicks,
            roots_freed: counters.roots_freed,
            roots_kept: counters.roots_kept,
            retries,
            longest_lock_hold,
            longest_vcpu_stall,
            kept_pages_left: kept::pages_kept(),
            storm,
            boot_guest_ns: ready,
            run_guest,
            idle,
            seams: seams::tell().map(|tally| tally.report()),
        };
        Finished { exit, death, report, stopped_by_operator }
    }
}

/// Whoever copies the VM.
struct Copier {
    /// The CPU that it works on.
    cpu: usize,
    /// CPUs beside CPU 0.
    cpus: usize,
    fixed: Fixed,
}

impl Copier {
    /// Begins a copy. None goes on.
    fn start(&self, vm: &Arc<Shared>, running: &Arc<AtomicUsize>, purpose: Purpose) {
        if self.cpu > self.cpus {
            return log::warning!("no CPU is left that could copy the guest: {} are needed", self.cpu + 1);
        }
        let Some(window) = Window::find() else {
            return log::warning!("this machine has no window through which the guest could be copied");
        };
        let (vm, fixed, running) = (Arc::clone(vm), self.fixed.clone(), Arc::clone(running));
        running.fetch_add(1, Ordering::Relaxed);
        vm.copying.store(true, Ordering::SeqCst);
        let job = Box::new(move || {
            copy::send(&vm, &fixed, &window, purpose);
            vm.copying.store(false, Ordering::SeqCst);
            drop(vm);
            running.fetch_sub(1, Ordering::Release);
            embedder::kick_housekeeper();
        });
        ap::run_on(self.cpu, job);
    }
}

/// Takes shadow paging's tables down as any zap does, so that what it leaves can be counted. Without a vCPU.
fn zap_shadow(mmu: &Arc<Mmu<Machine>>) {
    // Without memory for a worker nothing goes, and all of it shows.
    if let Ok(mut worker) = mmu.worker() {
        worker.zap_all();
    }
}

fn shadow_report(had: Metadata, left: Metadata, counters: &Counters) -> ShadowReport {
    ShadowReport {
        pages: had.pages,
        book_bytes: had.bytes(),
        recycled: counters.shadow_recycled,
        flooded: counters.shadow_flooded,
        pages_left: left.pages,
        mappings_left: left.mappings,
        handles_left: left.handles,
    }
}

fn exits(remains: &[Remains]) -> BTreeMap<String, u64> {
    let sum = |kind: usize| remains.iter().map(|r| r.exits[kind]).sum();
    let all = exit::NAMES.iter().enumerate().map(|(kind, name)| ((*name).to_string(), sum(kind)));
    all.filter(|(_, count)| *count > 0).collect()
}

/// How a second-stage fault can end.
pub(super) const FAULTS: [&str; 6] = ["fixed", "spurious", "retried", "mmio", "read_only", "failed"];

fn faults(counters: &Counters) -> BTreeMap<String, u64> {
    let counts = [
        counters.faults_fixed,
        counters.faults_spurious,
        counters.faults_retried,
        counters.faults_mmio,
        counters.faults_read_only,
        counters.faults_failed,
    ];
    FAULTS.iter().map(|name| (*name).to_string()).zip(counts).collect()
}
