//! The library's walk of a guest's tables beside the model of the manuals that the conformance guest is held against: the
//! same cases, each access on its own tables.

use std::collections::BTreeMap;

use nestling::guest::{
    Controls, CpuFeatures, FaultCode, Marked, Mode, Privilege, Refused, Request, Tables, Width, walk,
};
use nestling::{Access, Gpa};
use nestling_conformance::{
    Case, Controls as Bits, Cpu, Entry, Features, Kind, Paging, Shot, count, every, model, sample,
};

const CPU: Cpu = Cpu { features: Features::all(), physical_bits: 40 };
/// Of each kind of paging, at random and of all.
const CASES: u64 = 40_000;

fn table(level: u8) -> u64 {
    0x10_0000 + 0x1000 * u64::from(level)
}

/// A case's entries, and nothing else.
struct Memory(BTreeMap<u64, u64>);

impl Tables for Memory {
    fn read(&mut self, at: Gpa, _: Width) -> Option<u64> {
        self.0.get(&at.0).copied()
    }

    fn mark(&mut self, at: Gpa, _: Width, old: u64, new: u64) -> Marked {
        assert_eq!(self.0.insert(at.0, new), Some(old), "what was read is marked");
        Marked::Done
    }
}

fn registers(case: &Case, shot: &Shot) -> Controls {
    let bit = |control, bit: u64| if shot.controls.contains(control) { bit } else { 0 };
    let mut controls = Controls {
        cr0: 1 << 31 | bit(Bits::WP, 1 << 16),
        cr4: bit(Bits::SMEP, 1 << 20) | bit(Bits::SMAP, 1 << 21) | bit(Bits::PKE, 1 << 22) | bit(Bits::PSE, 1 << 4),
        efer: bit(Bits::NXE, 1 << 11),
    };
    if case.paging != Paging::Legacy {
        controls.cr4 |= 1 << 5;
    }
    if case.paging == Paging::Long5 {
        controls.cr4 |= 1 << 12;
    }
    if case.paging.is_long() {
        controls.efer |= 1 << 10;
    }
    controls
}

/// The page fault of one shot with the entries as written, and the marks that it leaves; for the CPU's own accesses, of the
/// read that they begin with.
fn found(case: &Case, number: usize) -> (Option<(u32, u64)>, [u64; 5], Option<Gpa>) {
    let shot = &case.shots[number];
    let entries = case.entries(number);
    let at = |level: u8| table(level) + case.paging.offset(level);
    let raw = |level: u8| {
        let entry: Entry = entries[usize::from(level) - 1];
        case.raw(level, entry, table(level - 1), CPU, shot.controls)
    };
    let levels = case.paging.levels();
    let mut memory = Memory((1..=levels).map(|level| (at(level), raw(level))).collect());
    let features = CpuFeatures { physical_bits: CPU.physical_bits, gigantic_pages: true };
    let mode = Mode::new(registers(case, shot), features);
    let access = match shot.access.kind {
        Kind::Read | Kind::ReadDescriptor | Kind::MarkDescriptor => Access::Read,
        Kind::Write | Kind::Update => Access::Write,
        Kind::Fetch => Access::Execute,
    };
    let privilege = match (shot.access.kind, shot.access.user) {
        (Kind::ReadDescriptor | Kind::MarkDescriptor, _) => Privilege::Implicit,
        (_, true) => Privilege::User,
        (_, false) => Privilege::Supervisor { ac: shot.access.ac },
    };
    let request = Request { linear: shot.linear(case.paging), access, privilege, pkru: shot.pkru() };
    let (fault, page) = match walk(&mode, table(levels), &request, &mut memory) {
        Ok(translation) => (None, Some(translation.gpa)),
        Err(Refused::Fault(fault)) => (Some((fault.code.bits(), fault.address)), None),
        Err(other) => panic!("{case}: {other:?}"),
    };
    let mut marks = [0; 5];
    for level in 1..=levels {
        marks[usize::from(level) - 1] = memory.0[&at(level)] ^ raw(level);
    }
    (fault, marks, page)
}

/// The case whose first shot is another's second, with the entries as they were written for it.
fn second_alone(case: &Case) -> Case {
    let second = Shot { change: None, ..case.shots[1] };
    Case { entries: case.entries(1), shots: [second; 2], ..*case }
}

fn agrees(case: &Case) {
    let [expected, _] = model::expect(case, CPU).0;
    let (fault, marks, page) = found(case, 0);
    // The write that marks a descriptor comes behind a read that is allowed.
    if case.shots[0].access.kind == Kind::MarkDescriptor && fault.is_none() {
        return;
    }
    let wanted = (expected.vector == 14).then_some((expected.error, expected.cr2));
    assert_eq!((fault, marks), (wanted, expected.changed), "{case}");
    if let Some(page) = page {
        let linear = case.shots[0].linear(case.paging);
        assert_eq!(page, Gpa(case.frame(0, CPU) | linear & 0xfff), "{case}");
    }
}

#[test]
fn the_librarys_walk_is_what_the_manuals_say() {
    assert!(FaultCode::all().bits() == 0x3f, "the model knows no other bits");
    for paging in Paging::ALL {
        let all = count(paging, CPU);
        for number in 0..CASES {
            for case in
                [sample(paging, CPU, 1, number), every(paging, CPU, all / CASES * number + number % (all / CASES))]
            {
                agrees(&case);
                agrees(&second_alone(&case));
            }
        }
    }
}
