//! The messages of the control channel.
//!
//! The hypervisor speaks in this order: one [`ToCommand::Hello`], then [`ToCommand::Log`] at any time,
//! [`ToCommand::GuestStarted`] once the guest's first vCPU is about to run, [`ToCommand::GuestReady`] at most once, and
//! at the end [`ToCommand::Death`] if the guest died, [`ToCommand::Report`] if a guest was started, and exactly one
//! [`ToCommand::Done`], after which it says nothing more and ends the machine. A stream that stops before `Done` means
//! that the hypervisor itself has died. A series has no `GuestStarted`, `GuestReady`, `Death` and `Report`: it sends one
//! [`ToCommand::GuestBegins`] a guest, before it makes it, and [`ToCommand::Series`] now and then and at the end.
//!
//! The command may send [`ToHypervisor::Stop`] at any time after `Hello`; everything of the end follows as usual.
//!
//! All numbers come from a machine that may be broken: a reader shows them and never indexes, allocates or waits by them.

use alloc::{boxed::Box, collections::BTreeMap, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::config::{HugePages, MmuKind};

/// What the hypervisor tells the command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCommand {
    /// The hypervisor is up and the channel works.
    Hello(Hello),
    /// A line for people.
    Log {
        /// How much it matters.
        level: LogLevel,
        /// One line without its end.
        text: String,
    },
    /// The bundle was accepted and the guest's first vCPU starts now.
    GuestStarted {
        /// vCPUs of the guest.
        vcpus: u32,
        /// Guest RAM in bytes.
        memory_bytes: u64,
        /// The largest mapping that will be used: what was asked for, or less if this CPU lacks it.
        huge_pages: HugePages,
        /// What translates.
        mmu: MmuKind,
    },
    /// The guest's console printed the configuration's ready marker.
    GuestReady {
        /// Nanoseconds of guest time since the first VM entry.
        guest_ns: u64,
    },
    /// The next guest of a series is about to be made.
    GuestBegins {
        /// Its seed.
        seed: u64,
    },
    /// What came of a series.
    Series(Box<SeriesReport>),
    /// The guest died.
    Death(DeathReport),
    /// What the run cost, taken when all vCPUs have left guest mode for good.
    Report(Box<Report>),
    /// The end. Nothing follows.
    Done(GuestExit),
}

/// What the command tells the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHypervisor {
    /// End the guest now, give everything back and report.
    Stop,
    /// Send a copy of the guest through the [`window`](crate::window); it goes on afterwards.
    Snapshot,
    /// Send the guest through the window, to be run elsewhere.
    Migrate(MigrateLimits),
}

/// How a migration goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateLimits {
    /// How long the guest may stand still, in milliseconds, if that can be kept.
    pub downtime_ms: u32,
    /// After so many rounds the guest is stopped whatever it still writes.
    pub rounds: u32,
}

/// The hypervisor and its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the hypervisor.
    pub protocol: u32,
    /// CPUs that have started, the boot CPU included.
    pub cpus: u32,
    /// Usable host memory in bytes.
    pub memory_bytes: u64,
    /// The processor's brand string.
    pub cpu_name: String,
    /// SVM features that CPUID reports (leaf 0x8000_000a), by their manual's short names.
    pub svm_features: Vec<String>,
}

/// How much a [`ToCommand::Log`] line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LogLevel {
    /// Something went wrong that should not.
    Error,
    /// Something unusual that the run survives.
    Warn,
    /// Progress.
    Info,
    /// Details.
    Debug,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestExit {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote this value to the debug-exit port, 0xf4.
    DebugExit {
        /// The value written, as wide as it was written.
        value: u32,
    },
    /// The command asked for it with [`ToHypervisor::Stop`].
    Stopped,
    /// The guest was given to another hypervisor, which runs it.
    Migrated,
    /// The guest died; a [`ToCommand::Death`] said how.
    Died,
    /// The hypervisor could not start or not go on.
    Error {
        /// Why, for people.
        text: String,
    },
}

/// Why a guest died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeathReason {
    /// A vCPU could not deliver a double fault (AMD APM volume 2, 8.2.9: shutdown from #DF).
    TripleFault,
    /// A vCPU entered the shutdown state otherwise.
    Shutdown,
    /// An exit that the hypervisor never asks for, or that it cannot continue from.
    UnexpectedExit {
        /// EXITCODE of the VMCB.
        code: u64,
        /// EXITINFO1.
        info1: u64,
        /// EXITINFO2.
        info2: u64,
    },
    /// An access to guest physical memory where there is neither RAM nor a device.
    MmioWithoutDevice {
        /// The guest physical address.
        gpa: u64,
        /// Whether it was a write.
        write: bool,
    },
    /// An instruction on device memory that is not emulated, or one whose code or page tables are in device memory.
    NotEmulated {
        /// The bytes at RIP, as far as they could be read; zeros if not at all.
        instruction: [u8; MAX_INSTRUCTION_BYTES],
    },
    /// The console printed nothing for as long as the configuration allows.
    SilentConsole {
        /// For how long, in milliseconds.
        silent_ms: u64,
    },
    /// The hypervisor found its own state wrong, or ran out of memory for the guest.
    Internal {
        /// What, for people.
        text: String,
    },
}

/// A dead guest, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeathReport {
    /// Why it died.
    pub reason: DeathReason,
    /// The vCPU that died, if it was one.
    pub vcpu: Option<u32>,
    /// Nanoseconds of guest time since the first VM entry.
    pub guest_ns: u64,
    /// All vCPUs that were started, in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
}

/// One vCPU of a dead guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Its number.
    pub vcpu: u32,
    /// Its registers at its last exit.
    pub registers: Registers,
    /// Up to [`MAX_INSTRUCTION_BYTES`] at RIP; fewer where the guest's tables end, none where RIP is not mapped.
    pub instruction: Vec<u8>,
    /// The guest's own page walk for the address that matters (CR2 after a page fault, otherwise RIP), root first.
    pub guest_walk: Vec<WalkStep>,
    /// The nested walk for the guest physical address that matters, root first.
    pub nested_walk: Vec<WalkStep>,
    /// Its last exits, oldest first, equal neighbours counted once.
    pub last_exits: Vec<ExitRecord>,
}

/// The longest x86 instruction, in bytes.
pub const MAX_INSTRUCTION_BYTES: usize = 15;

/// A vCPU's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// The sixteen general registers by their encoding: rax rcx rdx rbx rsp rbp rsi rdi r8 … r15.
    pub general: [u64; 16],
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Privilege level.
    pub cpl: u8,
    /// ES, CS, SS, DS, FS, GS in this order.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Global descriptor table: base and limit only.
    pub gdtr: Segment,
    /// Interrupt descriptor table: base and limit only.
    pub idtr: Segment,
}

/// A segment register with its hidden part, as the VMCB holds it (AMD APM volume 2, appendix B).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// The descriptor's attribute bits 55:52 and 47:40, packed into twelve.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

/// One entry read on a page walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkStep {
    /// Level of the table: 1 maps 4 KiB, 2 maps 2 MiB and so on.
    pub level: u8,
    /// Where the entry is: a guest physical address on a guest walk, a host physical one on a nested walk.
    pub address: u64,
    /// Its value.
    pub entry: u64,
}

/// One kind of exit at one place, as often as it happened in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// EXITCODE of the VMCB.
    pub code: u64,
    /// Guest RIP.
    pub rip: u64,
    /// EXITINFO1.
    pub info1: u64,
    /// How often in a row.
    pub count: u32,
}

/// What a run cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// vCPUs of the guest.
    pub vcpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Exits by reason, over all vCPUs.
    pub exits: BTreeMap<String, u64>,
    /// Nested page faults by outcome, over all vCPUs.
    pub faults: BTreeMap<String, u64>,
    /// Guest memory mapped at the end of the run, just before teardown.
    pub mapped_bytes: BytesByPageSize,
    /// Guest memory that the guest has accessed and that was mapped for it, in bytes, just before teardown.
    pub touched_bytes: u64,
    /// What translated.
    pub mmu: MmuKind,
    /// What shadow paging had, if it was that.
    pub shadow: Option<ShadowReport>,
    /// Page-table frames of the hypervisor's, of the second stage or shadow.
    pub table_frames: TableFrames,
    /// How long teardown took: vCPUs, tables and RAM given back.
    pub teardown: Span,
    /// Frames of guest memory not given back after teardown.
    pub guest_frames_left: u64,
    /// Remote and local TLB flushes that the library asked for.
    pub tlb_flushes: u64,
    /// Kicks sent to vCPUs.
    pub kicks: u64,
    /// Roots of page tables that vCPUs dropped because they were obsolete.
    pub roots_freed: u64,
    /// Roots that vCPUs were asked about and kept, because they were not.
    pub roots_kept: u64,
    /// Accesses that had to be tried again because the memory behind them was changing.
    pub retries: u64,
    /// The longest time for which memory management held the MMU lock, to the exclusion of at least somebody.
    pub longest_lock_hold: Span,
    /// The longest time for which a vCPU was kept from its guest by a second-stage fault, all tries of one access
    /// together, or by an interrupt of the host's. Measured under a storm only.
    pub longest_vcpu_stall: Span,
    /// Pages whose content was still kept compressed after teardown.
    pub kept_pages_left: u64,
    /// What the storm did.
    pub storm: Option<StormReport>,
    /// Nanoseconds of guest time from the first VM entry to the ready marker on the console. `None` if it never came.
    pub boot_guest_ns: Option<u64>,
    /// Guest time from just before the first VM entry to the end.
    pub run_guest: Span,
    /// How long vCPUs had nothing to run, all of them together.
    pub idle: Span,
    /// Where the run's time went, if the hypervisor was built to count that.
    pub seams: Option<Seams>,
}

/// Where a run's time went, in ticks of the time stamp counter, over all vCPUs. Every run of a guest has two seams, before
/// and behind the world switch: what passes between them is the guest's, what passes up to the next run the exit's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seams {
    /// Runs of a guest.
    pub runs: u64,
    /// All that passed in them: guest, switch, and counting.
    pub guest_ticks: u64,
    /// The least that passed in one.
    pub shortest_ticks: u64,
    /// What was done, by the exit that it was done for: how often, and all that passed.
    pub exits: BTreeMap<String, SeamCount>,
    /// What of that cleared memory for the guest.
    pub clearing_ticks: u64,
    /// What counting takes of each run.
    pub counting_inside: u64,
    /// What it takes of each exit.
    pub counting_outside: u64,
}

/// How often something was done, and how long it took in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeamCount {
    /// How often.
    pub count: u64,
    /// In ticks.
    pub ticks: u64,
}

/// What came of a series of guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeriesReport {
    /// Guests run.
    pub guests: u64,
    /// Nanoseconds from the first one's making to the last one's end.
    pub duration_ns: u64,
    /// How they ended, by name: every kind of death, and every other end.
    pub ends: BTreeMap<String, u64>,
    /// Exits by reason, over all guests.
    pub exits: BTreeMap<String, u64>,
    /// Nested page faults by outcome, over all guests.
    pub faults: BTreeMap<String, u64>,
    /// The most frames of page tables at one time.
    pub table_frames_peak: u64,
    /// Guests that did not give back all that they had, the first few of them.
    pub leaks: Vec<Leak>,
}

/// What was not as before when a guest of a series was gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leak {
    /// The guest's seed.
    pub seed: u64,
    /// Page-table frames left.
    pub table_frames: u64,
    /// Frames of guest memory left.
    pub guest_frames: u64,
    /// Pages whose content was still kept compressed.
    pub kept_pages: u64,
    /// Frames that the allocator has fewer than before, the heap's own not counted; negative: more.
    pub frames: i64,
    /// Bytes of the heap in use, more than before; negative: fewer.
    pub heap_bytes: i64,
}

/// A length of time, as the time stamp counter measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Nanoseconds.
    pub ns: u64,
    /// Ticks of the counter: instructions, where the emulator counts these.
    pub ticks: u64,
}

/// What a storm did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StormReport {
    /// Where its random choices began.
    pub seed: u64,
    /// Operations carried out, by [`StormKind::name`](crate::config::StormKind::name).
    pub done: BTreeMap<String, u64>,
    /// Operations that found nothing to act on, or no memory.
    pub skipped: BTreeMap<String, u64>,
}

/// Bytes mapped by leaves of each size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesByPageSize {
    /// By 4 KiB leaves.
    pub size_4k: u64,
    /// By 2 MiB leaves.
    pub size_2m: u64,
    /// By 1 GiB leaves.
    pub size_1g: u64,
}

/// What shadow paging had, and what was left of it when everything had been zapped: before the MMU itself was taken down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowReport {
    /// Shadow pages when the guest ended.
    pub pages: u64,
    /// Books about them and about what they map, in bytes, when the guest ended.
    pub book_bytes: u64,
    /// Pages that went because there were too many.
    pub recycled: u64,
    /// Pages that went because the guest wrote to their tables as if they were none.
    pub flooded: u64,
    /// Shadow pages left. Anything but 0 is a leak, as with all of these.
    pub pages_left: u64,
    /// Mappings left in the reverse maps.
    pub mappings_left: u64,
    /// Handles of pages that vCPUs had and did not give up.
    pub handles_left: u64,
}

/// Page-table frames in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableFrames {
    /// The most at one time.
    pub peak: u64,
    /// After teardown. Anything but 0 is a leak.
    pub left: u64,
}
