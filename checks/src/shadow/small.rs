//! A small guest in long mode, for tests that go step by step.

use std::sync::Arc;

use nestling::guest::{Controls, CpuFeatures, Privilege, Width};
use nestling::shadow::ShadowConfig;
use nestling::{Access, AddressSpace, Config, Gfn, Gpa, Mmu, SlotConfig, SlotFlags, SlotId, VcpuId, Worker};

use super::cpu::{Done, ShadowCpu};
use super::machine::ShadowMachine;
use super::oracle::{Paging, Question};

/// Long mode, with CR0.WP.
pub const LONG: Controls = Controls { cr0: 1 << 31 | 1 << 16 | 1, cr4: 1 << 5, efer: 1 << 10 | 1 << 11 };
/// The supervisor, under SMAP if there is one.
pub const KERNEL: Privilege = Privilege::Supervisor { ac: false };
/// P, W, U, A, D.
pub const ALL: u64 = 0x67;
/// The same without W.
pub const READ_ONLY: u64 = ALL & !2;
/// PS.
pub const LARGE: u64 = 1 << 7;
/// Tables of level 4 to 1 of the first root; a second root of its own leads to the same level 3.
pub const TABLES: [u64; 4] = [1, 2, 3, 4];
/// See [`TABLES`].
pub const OTHER_ROOT: u64 = 5;
/// A frame of data, and the page that leads to it.
pub const DATA: u64 = 20;

/// A machine whose guest maps address `n << 12` to frame n, for n below 64, writable for all.
pub fn machine(pages: u32) -> (Arc<Mmu<ShadowMachine>>, Worker<ShadowMachine>) {
    machine_of(pages, 2)
}

/// The same, with so many vCPUs.
pub fn machine_of(pages: u32, vcpus: u16) -> (Arc<Mmu<ShadowMachine>>, Worker<ShadowMachine>) {
    let machine = ShadowMachine::new(1024, 0);
    let config = Config { vcpus, workers: 2, slots: 4, ..Config::default() };
    let put = |table: u64, entry: u32, value| machine.prepare(Gfn(table), entry * 8, Width::Eight, value);
    put(OTHER_ROOT, 0, TABLES[1] << 12 | ALL);
    for level in 0..3 {
        put(TABLES[level], 0, TABLES[level + 1] << 12 | ALL);
    }
    (0..64).for_each(|page| put(TABLES[3], page, u64::from(page) << 12 | ALL));
    let mmu = Mmu::new(machine, config).expect("the configuration is right");
    let cpu = CpuFeatures { physical_bits: 40, gigantic_pages: true };
    mmu.enable_shadow(ShadowConfig { pages, cpu }).expect("there is memory");
    let mut worker = mmu.worker().expect("a worker is free");
    let slot = SlotConfig {
        id: SlotId(0),
        space: AddressSpace::Main,
        base: Gpa(0),
        size: 64 << 12,
        flags: SlotFlags::empty(),
        backing: 0,
    };
    worker.add_slot(slot).expect("the slot fits");
    (mmu, worker)
}

/// A CPU in that mode, on the first root.
pub fn cpu(mmu: &Arc<Mmu<ShadowMachine>>, id: u16, controls: Controls) -> ShadowCpu {
    let vcpu = mmu.shadow_vcpu(VcpuId(id)).expect("there is memory").expect("each vCPU is made once");
    let mut cpu = ShadowCpu::new(vcpu, Paging { controls, cr3: TABLES[0] << 12 }, 1);
    cpu.alone = true;
    cpu
}

/// An access to a page.
pub fn ask(page: u64, access: Access, privilege: Privilege) -> Question {
    Question { linear: page << 12, access, privilege }
}

/// The guest writes an entry of its own tables, at the address at which it has the table.
pub fn write_entry(cpu: &mut ShadowCpu, table: u64, entry: u64, value: u64) {
    let store = Some((entry as u32 * 8, Width::Eight, value));
    assert_eq!(cpu.access(ask(table, Access::Write, KERNEL), store), Done::Memory);
}

/// Nothing was violated, and nothing is left.
#[track_caller]
pub fn end(mmu: Arc<Mmu<ShadowMachine>>, worker: Worker<ShadowMachine>, cpus: Vec<ShadowCpu>) {
    let arena = Arc::clone(&mmu.host().arena);
    assert_eq!(mmu.host().record().violations, Vec::<String>::new());
    drop((worker, cpus, mmu));
    assert_eq!((arena.live(), arena.take_misuse()), (0, Vec::new()));
}
