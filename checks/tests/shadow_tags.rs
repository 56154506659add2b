//! What a vCPU on shadow tables has its TLB forget, and what it may keep: a tag a root.

use std::thread;

use nestling::guest::{Controls, Privilege, Width};
use nestling::shadow::tags::{Tag, TagFlush};
use nestling::slots::dirty::{LogConfig, LogStart, Tracking};
use nestling::{Access, AddressSpace, Gfn, GfnRange, Request, SlotId, VcpuId, Wait, Worker};
use nestling_checks::shadow::cpu::{Done, ShadowCpu};
use nestling_checks::shadow::machine::ShadowMachine;
use nestling_checks::shadow::small::{
    ALL, DATA, KERNEL, LARGE, LONG, OTHER_ROOT, READ_ONLY, TABLES, ask, cpu, end, machine, write_entry,
};

const ROOTS: [u64; 2] = [TABLES[0] << 12, OTHER_ROOT << 12];

fn read(cpu: &mut ShadowCpu, page: u64) -> Done {
    cpu.access(ask(page, Access::Read, KERNEL), None)
}

/// What is owed at the next entry, and by which tag; paid.
fn owed(cpu: &mut ShadowCpu) -> (Tag, Option<TagFlush>) {
    let mut inside = cpu.vcpu.enter().expect("there is memory for a root");
    let owed = (inside.tag(), inside.take_flush());
    drop(inside);
    // The CPU does as it is told, and sees that nothing more is.
    if owed.1.is_some() {
        cpu.forget(owed.0, owed.1);
    }
    owed
}

/// A CPU that has read a page by both roots, and owes nothing.
fn settled(cpu: &mut ShadowCpu) -> [Tag; 2] {
    let tags = ROOTS.map(|root| {
        cpu.load_cr3(root);
        assert_eq!(read(cpu, DATA), Done::Memory);
        owed(cpu).0
    });
    for (root, tag) in ROOTS.into_iter().zip(tags) {
        cpu.load_cr3(root);
        assert_eq!(owed(cpu), (tag, None));
    }
    tags
}

#[test]
fn roots_keep_what_is_still_so() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let tags = settled(&mut cpu);
    assert_ne!(tags[0], tags[1]);
    let before = mmu.counters().flushes_spared;
    for turn in 0..10 {
        cpu.load_cr3(ROOTS[turn % 2]);
        assert_eq!(owed(&mut cpu), (tags[turn % 2], None));
        // The same value again, and other controls under which the tables are read alike.
        cpu.load_cr3(ROOTS[turn % 2]);
        assert_eq!(owed(&mut cpu), (tags[turn % 2], None));
    }
    assert_eq!(mmu.counters().flushes_spared, before + 20);
    // What the guest adds, or gives rights to, needs no flush either.
    mmu.host().prepare(Gfn(TABLES[3]), 100 * 8, Width::Eight, DATA << 12 | ALL);
    assert_eq!(read(&mut cpu, 100), Done::Memory);
    cpu.load_cr3(ROOTS[0]);
    assert_eq!(owed(&mut cpu), (tags[0], None));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn what_the_guest_takes_back_is_forgotten_under_each_root_when_that_is_loaded() {
    let (mmu, worker) = machine(64);
    let mut cpus = [0, 1].map(|id| cpu(&mmu, id, LONG));
    let tags = settled(&mut cpus[0]);
    settled(&mut cpus[1]);
    for entry in [DATA << 12 | READ_ONLY, (DATA + 1) << 12 | ALL, 0, DATA << 12 | ALL & !4] {
        write_entry(&mut cpus[0], TABLES[3], DATA, DATA << 12 | ALL);
        for cpu in &mut cpus {
            for root in ROOTS.into_iter().chain(ROOTS) {
                cpu.load_cr3(root);
                assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
            }
        }
        write_entry(&mut cpus[0], TABLES[3], DATA, entry);
        // One vCPU compares, the other finds nothing that it would have to.
        for cpu in &mut cpus {
            for root in ROOTS {
                cpu.load_cr3(root);
                // (The CPUs know better than to let this through.)
                cpu.access(ask(DATA, Access::Write, Privilege::User), None);
                cpu.access(ask(DATA, Access::Read, Privilege::User), None);
            }
        }
    }
    cpus[0].load_cr3(ROOTS[0]);
    assert_eq!(owed(&mut cpus[0]).0, tags[0]);
    end(mmu, worker, cpus.into());
}

/// Every tag is behind, not only the one that the vCPU ran by.
#[test]
fn a_removal_by_others_is_flushed_from_each_tag_when_it_is_used_next() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let tags = settled(&mut cpu);
    let invalidation = worker.invalidate(GfnRange::new(Gfn(DATA), 1).unwrap());
    mmu.host().move_frame(Gfn(DATA));
    drop(invalidation);
    assert_eq!(owed(&mut cpu), (tags[1], Some(TagFlush::All)));
    assert_eq!(owed(&mut cpu), (tags[1], None));
    cpu.load_cr3(ROOTS[0]);
    assert_eq!(owed(&mut cpu), (tags[0], Some(TagFlush::All)), "it has not been flushed");
    // Had it not been: the memory is another's by now.
    assert_eq!(read(&mut cpu, DATA), Done::Memory);
    for turn in 0..4 {
        cpu.load_cr3(ROOTS[turn % 2]);
        assert_eq!(owed(&mut cpu), (tags[turn % 2], None));
    }
    end(mmu, worker, vec![cpu]);
}

/// What the host takes away, until its flush is over, may have been gone when entries were compared.
#[test]
fn while_a_removal_waits_for_its_flush_every_flush_of_the_guests_is_one() {
    let (mmu, mut worker) = machine(64);
    let mut cpus = [0, 1].map(|id| cpu(&mmu, id, LONG));
    let log = LogConfig { tracking: Tracking::WriteProtect, start: LogStart::AllDirty, ..LogConfig::default() };
    worker.start_log(SlotId(0), log).expect("it has none");
    let removals: [fn(&mut Worker<ShadowMachine>); 3] = [
        |worker| assert_eq!(worker.zap(GfnRange::new(Gfn(DATA), 1).unwrap()).leaves, 1),
        |worker| assert_ne!(worker.harvest_dirty(SlotId(0), 0, &mut [0]), Ok(0)),
        |worker| worker.track_page(AddressSpace::Main, Gfn(DATA + 1)).expect("it has memory"),
    ];
    for remove in removals {
        for page in [DATA, DATA + 1] {
            assert_eq!(cpus[0].access(ask(page, Access::Write, KERNEL), None), Done::Memory);
        }
        settled(&mut cpus[0]);
        let [first, second] = &mut cpus;
        // One that does not leave, for whom the removal waits.
        let stays = second.vcpu.enter().expect("there is memory for a root");
        let before = mmu.counters().kicks;
        thread::scope(|scope| {
            let removal = scope.spawn(|| remove(&mut worker));
            while mmu.counters().kicks == before {
                thread::yield_now();
            }
            for _ in 0..3 {
                first.load_cr3(ROOTS[1]);
                assert_eq!(owed(first).1, Some(TagFlush::All));
            }
            drop(stays);
            removal.join().expect("it does not panic");
        });
        first.load_cr3(ROOTS[1]);
        assert_eq!(owed(first).1, None, "it is over");
    }
    end(mmu, worker, cpus.into());
}

#[test]
fn a_tag_that_gets_another_root_is_flushed_first() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    // More roots than tags: frames of the first tables again, and each has an entry for the same page.
    let roots = [30, 31, 32, 33, 34, 35];
    assert!(roots.len() > Tag::COUNT);
    roots.iter().for_each(|root| mmu.host().prepare(Gfn(*root), 0, Width::Eight, TABLES[1] << 12 | ALL));
    for _ in 0..3 {
        for root in roots {
            cpu.load_cr3(root << 12);
            assert_eq!(owed(&mut cpu).1, Some(TagFlush::All), "root {root}");
            assert_eq!(read(&mut cpu, DATA), Done::Memory);
        }
    }
    // The last ones are at hand, under a tag each.
    let mut tags = Vec::new();
    for root in roots[roots.len() - Tag::COUNT..].iter().rev() {
        cpu.load_cr3(root << 12);
        let (tag, flush) = owed(&mut cpu);
        assert!(flush.is_none() && !tags.contains(&tag), "root {root}");
        tags.push(tag);
    }
    end(mmu, worker, vec![cpu]);
}

#[test]
fn an_address_is_forgotten_alone_and_a_larger_page_as_a_whole() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    // Pages 512 to 1023 are one large page, of frames from 0 on.
    mmu.host().prepare(Gfn(TABLES[2]), 8, Width::Eight, ALL | LARGE);
    let [tag, other] = settled(&mut cpu);
    cpu.load_cr3(ROOTS[0]);
    let neighbours = [512 + DATA, 512 + DATA + 9, 512 + 63];
    neighbours.iter().for_each(|page| assert_eq!(read(&mut cpu, *page), Done::Memory));
    for page in [DATA, 512 + DATA] {
        cpu.invlpg(page << 12);
        assert_eq!(owed(&mut cpu), (tag, Some(TagFlush::Address(page << 12))), "nothing has changed");
    }
    // A page of 4 KiB becomes another one.
    write_entry(&mut cpu, TABLES[3], DATA, (DATA + 1) << 12 | ALL);
    cpu.invlpg(DATA << 12);
    assert_eq!(owed(&mut cpu), (tag, Some(TagFlush::Address(DATA << 12))));
    assert_eq!(read(&mut cpu, DATA), Done::Memory);
    // Two addresses are two flushes, or one of everything.
    cpu.invlpg(DATA << 12);
    cpu.invlpg(1 << 12);
    assert_eq!(owed(&mut cpu), (tag, Some(TagFlush::All)));
    // The large page becomes another one: all that is known of it goes, by an address at which nothing was used.
    neighbours.iter().for_each(|page| assert_eq!(read(&mut cpu, *page), Done::Memory));
    let table = 40;
    (0..64).for_each(|entry| {
        mmu.host().prepare(Gfn(table), entry * 8, Width::Eight, u64::from(entry) << 12 | READ_ONLY);
    });
    write_entry(&mut cpu, TABLES[2], 1, table << 12 | ALL);
    cpu.invlpg((512 + 1) << 12);
    assert_eq!(owed(&mut cpu), (tag, Some(TagFlush::All)));
    for page in neighbours {
        assert_eq!(cpu.access(ask(page, Access::Write, KERNEL), None), Done::Fault);
    }
    // The other root's tag is asked when it is loaded.
    cpu.load_cr3(ROOTS[1]);
    assert_eq!(owed(&mut cpu), (other, Some(TagFlush::All)));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn loads_that_keep_translations_are_loads_all_the_same() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let tags = settled(&mut cpu);
    // The table is opened, and brought in step under this root: under the other one its leaf is forgotten, too.
    write_entry(&mut cpu, TABLES[3], DATA, 0);
    cpu.invlpg(DATA << 12);
    assert_eq!(owed(&mut cpu), (tags[1], Some(TagFlush::Address(DATA << 12))));
    cpu.vcpu.load_cr3(ROOTS[0], true);
    assert_eq!(owed(&mut cpu), (tags[0], Some(TagFlush::All)));
    cpu.vcpu.load_cr3(ROOTS[0], true);
    assert_eq!(owed(&mut cpu), (tags[0], None), "the same value again");
    end(mmu, worker, vec![cpu]);
}

#[test]
fn requests_flush_one_tag_or_all() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let tags = settled(&mut cpu);
    for (request, others) in [(Request::FlushCurrent, None), (Request::Flush, Some(TagFlush::All))] {
        worker.request(VcpuId(0), request, Wait::No).expect("there is such a vCPU");
        assert_eq!(owed(&mut cpu), (tags[1], Some(TagFlush::All)), "{request:?}");
        cpu.load_cr3(ROOTS[0]);
        assert_eq!(owed(&mut cpu), (tags[0], others), "{request:?}");
        cpu.load_cr3(ROOTS[1]);
        assert_eq!(owed(&mut cpu), (tags[1], None), "{request:?}");
    }
    let made = mmu.counters().roots_made;
    worker.request(VcpuId(0), Request::Reload, Wait::No).expect("there is such a vCPU");
    assert_eq!(owed(&mut cpu).1, Some(TagFlush::All));
    assert_eq!(mmu.counters().roots_made, made + 1, "it is loaded anew");
    end(mmu, worker, vec![cpu]);
}

/// A page of 4 MiB is two entries of ours.
#[test]
fn invlpg_of_an_address_forgets_both_halves_of_a_page_of_4_mib() {
    const LEGACY: Controls = Controls { cr0: LONG.cr0, cr4: 1 << 4, efer: 0 };
    // A directory: pages of 4 MiB, the first where the test looks, the second through which the guest writes.
    let directory = 30;
    let (mmu, worker) = machine(64);
    let put = |entry: u32, value| mmu.host().prepare(Gfn(directory), entry * 4, Width::Four, value);
    put(0, ALL | LARGE);
    put(1, ALL | LARGE);
    let mut cpu = cpu(&mmu, 0, LEGACY);
    cpu.load_cr3(directory << 12);
    assert_eq!(read(&mut cpu, DATA), Done::Memory);
    let store = Some((0, Width::Four, 0));
    assert_eq!(cpu.access(ask(1024 + directory, Access::Write, KERNEL), store), Done::Memory);
    // In the other half, where nothing was used.
    cpu.invlpg((512 + DATA) << 12);
    assert_eq!(read(&mut cpu, DATA), Done::Fault);
    end(mmu, worker, vec![cpu]);
}

/// What is done in guest mode is what would be done at entry; what is not is left to that.
#[test]
fn a_load_of_cr3_in_guest_mode_turns_to_a_root_that_owes_nothing_to_others() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let tags = settled(&mut cpu);
    cpu.at_once_each = 1;
    let load = |cpu: &mut ShadowCpu, turn: usize| {
        let before = cpu.done_at_once;
        cpu.load_cr3(ROOTS[turn % 2]);
        cpu.done_at_once > before
    };
    for turn in 0..10 {
        assert!(load(&mut cpu, turn / 2), "{turn}");
        assert_eq!(owed(&mut cpu), (tags[turn / 2 % 2], None));
        assert_eq!(read(&mut cpu, DATA), Done::Memory);
    }
    let before = cpu.done_at_once;
    cpu.invlpg(DATA << 12);
    assert_eq!((cpu.done_at_once, owed(&mut cpu)), (before + 1, (tags[0], None)), "paid at once");
    assert_eq!(read(&mut cpu, DATA), Done::Memory);
    // What the guest takes back under one root is compared there, by an entry, and owed under the other one.
    write_entry(&mut cpu, TABLES[3], DATA, DATA << 12 | READ_ONLY);
    assert!(!load(&mut cpu, 0), "there is something to compare");
    assert_eq!(owed(&mut cpu), (tags[0], Some(TagFlush::All)));
    assert!(!load(&mut cpu, 1), "of that it is not known under this root");
    assert_eq!(owed(&mut cpu), (tags[1], Some(TagFlush::All)));
    let spared = cpu.spared;
    assert!(load(&mut cpu, 0) && load(&mut cpu, 1));
    assert_eq!((read(&mut cpu, DATA), cpu.spared), (Done::Memory, spared));
    assert_eq!(cpu.access(ask(DATA, Access::Write, KERNEL), None), Done::Fault);
    // What is gone is gone under the other root as well.
    write_entry(&mut cpu, TABLES[3], DATA, DATA << 12 | ALL);
    assert!(!load(&mut cpu, 1));
    assert_eq!(owed(&mut cpu).0, tags[1]);
    assert!(!load(&mut cpu, 0));
    assert_eq!(owed(&mut cpu).0, tags[0]);
    let invalidation = worker.invalidate(GfnRange::new(Gfn(DATA), 1).unwrap());
    mmu.host().move_frame(Gfn(DATA));
    drop(invalidation);
    assert!(!load(&mut cpu, 1), "its tag is behind");
    assert_eq!(owed(&mut cpu), (tags[1], Some(TagFlush::All)));
    assert_eq!(read(&mut cpu, DATA), Done::Memory);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn code_is_what_the_cpu_fetches() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    settled(&mut cpu);
    mmu.host().prepare(Gfn(DATA), 0, Width::Eight, 0x0807_0605_0403_0201);
    mmu.host().prepare(Gfn(DATA), 8, Width::Eight, 0x100f_0e0d_0c0b_0a09);
    mmu.host().prepare(Gfn(DATA), 4088, Width::Eight, 0x1817_1615_1413_1211);
    assert_eq!(cpu.access(ask(DATA, Access::Execute, KERNEL), None), Done::Memory);
    let at = |offset: u64| (DATA << 12) + offset;
    let whole = [(0, 0x0403_0201), (4, 0x0807_0605), (5, 0x0908_0706), (7, 0x0b0a_0908), (4092, 0x1817_1615)];
    for (offset, bytes) in whole {
        assert_eq!(cpu.vcpu.code(at(offset)), Some(bytes), "{offset}");
    }
    assert_eq!(cpu.vcpu.code(at(4093)), None, "they are in two pages");
    let mut inside = cpu.vcpu.enter().expect("there is memory for a root");
    assert_eq!(inside.take_flush(), None);
    for (offset, bytes) in whole.into_iter().chain(whole) {
        assert_eq!(inside.code(at(offset)), Some(bytes), "{offset}");
    }
    assert_eq!((inside.code(at(4093)), inside.code(at(4096 * 9))), (None, None));
    drop(inside);
    end(mmu, worker, vec![cpu]);
}
