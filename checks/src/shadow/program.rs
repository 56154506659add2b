//! Guests that edit the page tables they run on.
//!
//! Each format has a few tables a level, whose first two entries change at random: to nothing, to tables of the next level
//! (or of any, so that a frame is read in several ways), to large pages, to pages of data and to pages that are tables.
//! A part of the address space never changes: it maps all tables, writable for the supervisor, once by small pages and
//! once by large ones. Through it, and through whatever else happens to lead to a table, the guest writes entries. It
//! flushes when it feels like it.
//!
//! The last table of each level lies in a block of memory that a large leaf could map, and is there for a while, as long as
//! something leads to it.

use std::sync::Arc;
use std::thread;

use nestling::guest::{Controls, CpuFeatures, Privilege, Width};
use nestling::shadow::ShadowConfig;
use nestling::{Access, AddressSpace, Config, Gfn, GfnRange, Gpa, Mmu, SlotConfig, SlotFlags, SlotId, VcpuId, Worker};

use super::cpu::{Done, ShadowCpu};
use super::machine::{BLOCK, BLOCKS, END, FRAMES, LARGE, SECOND, ShadowMachine};
use super::oracle::{Paging, Question};
use crate::rng::Rng;

/// How the guest's tables are laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Long mode, four levels.
    Long4,
    /// Long mode, five levels.
    Long5,
    /// PAE.
    Pae,
    /// Entries of four bytes.
    Legacy,
    /// Long mode, four levels, with PCIDs: some loads of CR3 keep what a CPU has.
    Pcid,
}

impl Layout {
    /// All.
    pub const ALL: [Self; 5] = [Self::Long4, Self::Long5, Self::Pae, Self::Legacy, Self::Pcid];

    fn controls(self) -> Controls {
        let cr0 = 1 << 31 | 1 << 16 | 1;
        match self {
            Self::Long4 => Controls { cr0, cr4: 1 << 5, efer: 1 << 10 | 1 << 11 },
            Self::Long5 => Controls { cr0, cr4: 1 << 5 | 1 << 12, efer: 1 << 10 | 1 << 11 },
            Self::Pae => Controls { cr0, cr4: 1 << 5, efer: 1 << 11 },
            Self::Legacy => Controls { cr0, cr4: 1 << 4, efer: 0 },
            Self::Pcid => Controls { cr0, cr4: 1 << 5 | 1 << 17, efer: 1 << 10 | 1 << 11 },
        }
    }
}

/// Tables of each level that change.
const TABLES: u64 = 3;
/// The part that never changes: its tables, from level 1 up.
const FIXED: u64 = 40;
const P: u64 = 1;
const ALL: u64 = P | 2 | 4 | 1 << 5 | 1 << 6;

/// The tables of a guest.
#[derive(Clone, Copy, Debug)]
struct Map {
    layout: Layout,
    levels: u64,
    bits: u64,
    width: Width,
}

impl Map {
    fn new(layout: Layout) -> Self {
        let (levels, bits, width) = Paging { controls: layout.controls(), cr3: 0 }.shape();
        Self { layout, levels: u64::from(levels), bits: u64::from(bits), width }
    }

    fn table(self, level: u64, number: u64) -> Gfn {
        match number + 1 {
            TABLES => Gfn(LARGE + level - 1),
            _ => Gfn(1 + (level - 1) * TABLES + number),
        }
    }

    const fn size(self) -> u64 {
        if matches!(self.width, Width::Four) { 4 } else { 8 }
    }

    /// The entry of the top table that leads to the part that never changes, and the bits above it in an address.
    const fn fixed_index(self) -> u64 {
        match self.layout {
            Layout::Long4 | Layout::Long5 | Layout::Pcid => 255,
            Layout::Pae => 3,
            Layout::Legacy => 1023,
        }
    }

    const fn shift(self, level: u64) -> u64 {
        12 + self.bits * (level - 1)
    }

    /// Where the guest finds a frame with a table: by a small page, or in a large one.
    const fn frame(self, gfn: u64, large: bool) -> u64 {
        let page = match (large, gfn < LARGE) {
            (true, _) => BLOCK + gfn,
            (false, true) => gfn,
            (false, false) => SECOND + gfn - LARGE,
        };
        self.fixed_index() << self.shift(self.levels) | page << 12
    }

    fn link(self, level: u64, gfn: Gfn, flags: u64) -> u64 {
        let pointer = self.layout == Layout::Pae && level == 3;
        gfn.0 << 12 | if pointer { P } else { flags }
    }

    fn prepare(self, machine: &ShadowMachine) {
        let put = |gfn: Gfn, index: u64, value| machine.prepare(gfn, (index * self.size()) as u32, self.width, value);
        for gfn in 0..SECOND {
            put(Gfn(FIXED), gfn, gfn << 12 | ALL & !4);
        }
        for gfn in LARGE..LARGE + self.levels {
            put(Gfn(FIXED), SECOND + gfn - LARGE, gfn << 12 | ALL & !4);
        }
        for level in 2..=self.levels {
            let (index, below) = if level == self.levels { (self.fixed_index(), level - 2) } else { (0, level - 2) };
            let tops = (0..TABLES).map(|number| self.table(self.levels, number));
            let tables: Vec<Gfn> = if level == self.levels { tops.collect() } else { vec![Gfn(FIXED + level - 1)] };
            for table in tables {
                put(table, index, self.link(level, Gfn(FIXED + below), ALL));
            }
        }
        // The large pages beside: from entry 1 of the level-2 table on; in the short format that is the top table itself.
        let directories: Vec<Gfn> = match self.layout {
            Layout::Legacy => Vec::new(),
            _ => vec![Gfn(FIXED + 1)],
        };
        for block in [0, LARGE / BLOCK] {
            directories.iter().for_each(|table| put(*table, 1 + block, (block * BLOCK) << 12 | ALL | 1 << 7));
        }
    }

    const fn has_large(self) -> bool {
        !matches!(self.layout, Layout::Legacy)
    }

    fn cr3(self, number: u64) -> u64 {
        let pcid = if self.layout == Layout::Pcid { number } else { 0 };
        self.table(self.levels, number).0 << 12 | pcid
    }

    /// A random entry for a table of `level`.
    fn entry(self, rng: &mut Rng, level: u64) -> u64 {
        let mut flags = P;
        for (bit, often) in [(2, 4), (4, 4), (1 << 5, 5), (1 << 6, 3)] {
            if !rng.once_in(often) {
                flags |= bit;
            }
        }
        if self.width == Width::Eight && rng.once_in(5) && !(self.layout == Layout::Pae && level == 3) {
            flags |= 1 << 63;
        }
        match rng.below(8) {
            0 | 1 => 0,
            // In the short format a large page is of 4 MiB, and the first block is its second half.
            2 if level == 2 && self.layout == Layout::Legacy => flags | 1 << 7,
            2 if level == 2 => (rng.below(1 + BLOCKS) * BLOCK) << 12 | flags | 1 << 7,
            2 if level == 3 && self.levels > 3 && rng.once_in(2) => flags | 1 << 7,
            3 if level > 1 => {
                let other = 1 + rng.below(self.levels);
                self.link(level, self.table(other, rng.below(TABLES)), flags)
            }
            _ if level > 1 => self.link(level, self.table(level - 1, rng.below(TABLES)), flags),
            3 => self.link(level, self.table(1 + rng.below(self.levels), rng.below(TABLES)), flags),
            4 if rng.once_in(3) => self.link(level, Gfn(END - BLOCK + rng.below(2)), flags),
            4 => self.link(level, Gfn(SECOND + rng.below(8)), flags),
            _ => self.link(level, Gfn(20 + rng.below(8)), flags),
        }
    }

    /// A random address in the part that changes. Of a page of 4 MiB, it may be in either half.
    fn address(self, rng: &mut Rng) -> u64 {
        let half = if self.layout == Layout::Legacy { rng.below(2) << 21 } else { 0 };
        half + (1..=self.levels).map(|level| rng.below(2) << self.shift(level)).sum::<u64>()
    }
}

/// A machine with a guest's tables in it, ready for vCPUs.
pub fn scene(layout: Layout, vcpus: u16, pages: u32, rough: u64) -> Arc<Mmu<ShadowMachine>> {
    let machine = ShadowMachine::new(pages as usize * 2 + 64, rough);
    Map::new(layout).prepare(&machine);
    let config = Config { vcpus, workers: 2, slots: 4, ..Config::default() };
    let mmu = Mmu::new(machine, config).expect("the configuration is right");
    let cpu = CpuFeatures { physical_bits: 40, gigantic_pages: true };
    mmu.enable_shadow(ShadowConfig { pages, cpu }).expect("there is memory");
    let mut worker = mmu.worker().expect("a worker is free");
    worker.add_slot(slot(0)).expect("the slot fits");
    worker.add_slot(slot(2)).expect("the slot fits");
    mmu.host().set_second(true);
    worker.add_slot(slot(1)).expect("the slot fits");
    mmu
}

fn slot(number: u32) -> SlotConfig {
    let (base, pages) = [(0, SECOND), (SECOND, FRAMES - SECOND), (LARGE, END - LARGE)][number as usize];
    SlotConfig {
        id: SlotId(number),
        space: AddressSpace::Main,
        base: Gpa(base << 12),
        size: pages << 12,
        flags: SlotFlags::empty(),
        backing: 0,
    }
}

/// One guest CPU and its random program.
#[derive(Debug)]
pub struct Guest {
    /// The CPU.
    pub cpu: ShadowCpu,
    map: Map,
    rng: Rng,
    /// For the moment it rarely changes its tables, and often goes from one root to another.
    calm: bool,
    /// Accesses that reached memory.
    pub reached: u64,
}

impl Guest {
    /// The guest of a vCPU.
    pub fn new(mmu: &Arc<Mmu<ShadowMachine>>, layout: Layout, id: u16, seed: u64) -> Self {
        let vcpu = mmu.shadow_vcpu(VcpuId(id)).expect("there is memory").expect("each vCPU is made once");
        let map = Map::new(layout);
        let paging = Paging { controls: layout.controls(), cr3: map.cr3(0) };
        let mut cpu = ShadowCpu::new(vcpu, paging, seed ^ 0x5eed);
        cpu.at_once_each = 2;
        Self { cpu, map, rng: Rng::new(seed), calm: false, reached: 0 }
    }

    /// One step of the program.
    pub fn step(&mut self) {
        let (map, rng) = (self.map, &mut self.rng);
        self.calm ^= rng.once_in(150);
        let what = match rng.below(32) {
            16..28 if self.calm && !rng.once_in(16) => 32 + rng.below(2),
            what => what,
        };
        match what {
            0..16 => {
                let linear = map.address(rng);
                let access = [Access::Read, Access::Read, Access::Write, Access::Execute][rng.below(4) as usize];
                let privilege = match rng.below(3) {
                    0 => Privilege::Supervisor { ac: rng.once_in(2) },
                    _ => Privilege::User,
                };
                // A write may hit a table, as an entry.
                let store = (access == Access::Write).then(|| {
                    let level = 1 + rng.below(map.levels);
                    ((rng.below(2) * map.size()) as u32, map.width, map.entry(rng, level))
                });
                self.access(Question { linear, access, privilege }, store);
            }
            16..26 => {
                let level = 1 + rng.below(map.levels);
                let (table, index, value) = (map.table(level, rng.below(TABLES)), rng.below(2), map.entry(rng, level));
                let linear = map.frame(table.0, map.has_large() && rng.once_in(4));
                let question =
                    Question { linear, access: Access::Write, privilege: Privilege::Supervisor { ac: true } };
                let store = Some(((index * map.size()) as u32, map.width, value));
                let done = self.access(question, store);
                if !matches!(done, Done::Memory) {
                    let text = format!("the fixed part at {linear:#x} is not writable: {done:?}");
                    self.cpu.vcpu.mmu().host().record().violate(text);
                }
            }
            26..28 => {
                let linear = map.address(rng);
                self.cpu.invlpg(linear);
            }
            28 | 29 | 32 => {
                let cr3 = map.cr3(rng.below(TABLES));
                if map.layout == Layout::Pcid && rng.once_in(2) {
                    self.cpu.load_cr3_and_keep(cr3);
                } else {
                    self.cpu.load_cr3(cr3);
                }
            }
            30 => {
                let mut controls = self.cpu.paging().controls;
                match rng.below(3) {
                    0 | 1 => controls.cr0 ^= 1 << 16,
                    _ => controls.cr4 ^= 1 << (20 + rng.below(2)),
                }
                self.cpu.set_controls(controls);
            }
            33 => {
                let linear = map.frame(rng.below(SECOND), map.has_large() && rng.once_in(4));
                let privilege = Privilege::Supervisor { ac: true };
                self.access(Question { linear, access: Access::Read, privilege }, None);
            }
            _ => {
                let paging = self.cpu.paging();
                self.cpu.set_controls(paging.controls);
            }
        }
    }

    fn access(&mut self, question: Question, store: Option<(u32, Width, u64)>) -> Done {
        let done = self.cpu.access(question, store);
        match done {
            Done::Memory => self.reached += 1,
            Done::Fault | Done::Elsewhere => {}
            Done::Failed(_) | Done::Stuck => {
                let text = format!("{question:x?} ended as {done:?}");
                self.cpu.vcpu.mmu().host().record().violate(text);
            }
        }
        done
    }
}

/// What the host does.
#[derive(Debug)]
pub struct HostProgram {
    worker: Worker<ShadowMachine>,
    rng: Rng,
    /// The second slot is there.
    second: bool,
    tracked: Option<Gfn>,
}

impl HostProgram {
    /// The host of this machine.
    pub fn new(mmu: &Arc<Mmu<ShadowMachine>>, seed: u64) -> Self {
        let worker = mmu.worker().expect("a worker is free");
        Self { worker, rng: Rng::new(seed), second: true, tracked: None }
    }

    /// One operation.
    pub fn step(&mut self) {
        let Self { worker, rng, second, tracked } = self;
        let mmu = Arc::clone(worker.mmu());
        let gfn =
            Gfn(if rng.once_in(4) { LARGE + rng.below(BLOCKS) * BLOCK + rng.below(8) } else { rng.below(FRAMES) });
        match rng.below(11) {
            10 if rng.once_in(2) => worker.split(SlotId(2)).expect("the slot is there"),
            10 => drop(worker.collapse(SlotId(2)).expect("the slot has no log")),
            0 => drop(worker.zap(GfnRange { start: gfn, end: Gfn(gfn.0 + 1 + rng.below(8)) })),
            1 => drop(worker.zap_all()),
            2 if *second => {
                worker.delete_slot(SlotId(1)).expect("the slot is there");
                mmu.host().set_second(false);
                *second = false;
            }
            2 | 3 if !*second => {
                mmu.host().set_second(true);
                worker.add_slot(slot(1)).expect("the slot fits");
                *second = true;
            }
            4 => drop(worker.zap(GfnRange { start: Gfn(0), end: Gfn(1 << 30) })),
            5 => match tracked.take() {
                Some(gfn) => {
                    mmu.host().set_tracked(None);
                    worker.untrack_page(AddressSpace::Main, gfn).expect("it is tracked");
                }
                None => {
                    // One without a table: those have to stay writable.
                    let gfn = Gfn(END - BLOCK + rng.below(2));
                    worker.track_page(AddressSpace::Main, gfn).expect("the slot is there");
                    mmu.host().set_tracked(Some(gfn));
                    *tracked = Some(gfn);
                }
            },
            6 => {
                let block = rng.below(BLOCKS);
                let range = GfnRange::new(Gfn(LARGE + block * BLOCK), BLOCK).expect("the block is not empty");
                let invalidation = worker.invalidate(range);
                mmu.host().move_block(block);
                drop(invalidation);
            }
            _ => {
                let invalidation = worker.invalidate(GfnRange { start: gfn, end: Gfn(gfn.0 + 1) });
                mmu.host().move_frame(gfn);
                drop(invalidation);
            }
        }
    }
}

fn end(mmu: Arc<Mmu<ShadowMachine>>) -> Vec<String> {
    let arena = Arc::clone(&mmu.host().arena);
    let mut found = std::mem::take(&mut mmu.host().record().violations);
    drop(mmu);
    found.extend(arena.take_misuse().iter().map(|misuse| format!("table frames: {misuse:?}")));
    if arena.live() != 0 {
        found.push(format!("{} tables are left behind", arena.live()));
    }
    found
}

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    /// What must not be.
    pub found: Vec<String>,
    /// Accesses that reached memory.
    pub reached: u64,
    /// Large leaves that there were, at each look.
    pub large: u64,
}

/// One thread, several vCPUs by turns.
pub fn single(layout: Layout, seed: u64, steps: u64, pages: u32) -> Outcome {
    let mmu = scene(layout, 3, pages, 0);
    let mut rng = Rng::new(seed);
    let mut guests: Vec<Guest> = (0..3).map(|id| Guest::new(&mmu, layout, id, rng.next())).collect();
    guests.iter_mut().for_each(|guest| guest.cpu.alone = true);
    let mut host = HostProgram::new(&mmu, rng.next());
    let mut large = 0;
    for _ in 0..steps {
        if rng.once_in(24) {
            host.step();
        } else {
            let number = rng.below(3) as usize;
            guests[number].step();
        }
        large += mmu.counters().leaves_2m;
        if !mmu.host().record().violations.is_empty() {
            break;
        }
    }
    let reached = guests.iter().map(|guest| guest.reached).sum();
    drop((guests, host));
    Outcome { found: end(mmu), reached, large }
}

/// Several threads, each with a vCPU, and one for the host.
pub fn storm(layout: Layout, seed: u64, steps: u64, pages: u32) -> Outcome {
    let mmu = scene(layout, 3, pages, 7);
    let (reached, large) = thread::scope(|scope| {
        let guests: Vec<_> = (0..3u16)
            .map(|id| {
                let mut guest = Guest::new(&mmu, layout, id, seed ^ u64::from(id) << 32);
                scope.spawn(move || {
                    (0..steps).for_each(|_| guest.step());
                    guest.reached
                })
            })
            .collect();
        let host = {
            let mmu = Arc::clone(&mmu);
            scope.spawn(move || {
                let mut host = HostProgram::new(&mmu, seed ^ 0xff);
                let mut large = 0;
                for _ in 0..steps / 16 {
                    host.step();
                    large += mmu.counters().leaves_2m;
                    thread::yield_now();
                }
                large
            })
        };
        let large = host.join().expect("the host does not panic");
        (guests.into_iter().map(|guest| guest.join().expect("a guest does not panic")).sum(), large)
    });
    Outcome { found: end(mmu), reached, large }
}
