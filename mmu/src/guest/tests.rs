//! Walks beside a second statement of the rules: the whole path is collected first, then judged at once.

use super::*;
use crate::addr::Gpa;
use crate::host::Access;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::vec::Vec;

const CPU: CpuFeatures = CpuFeatures { physical_bits: 40, gigantic_pages: true };
const PG: u64 = 1 << 31;
const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;

/// Memory that is what was put there; and somebody who changes an entry behind the walk's back.
#[derive(Clone, Debug, Default)]
struct Memory {
    entries: BTreeMap<u64, u64>,
    rom: bool,
    /// Each `mark` finds another value as long as this is not 0.
    disturbed: u32,
}

impl Memory {
    fn of(entries: &[(u64, u64)]) -> Self {
        Self { entries: entries.iter().copied().collect(), ..Self::default() }
    }
}

impl Tables for Memory {
    fn read(&mut self, at: Gpa, width: Width) -> Option<u64> {
        let bytes = if width == Width::Four { 4 } else { 8 };
        assert_eq!(at.0 % bytes, 0, "aligned to its width");
        self.entries.get(&at.0).copied()
    }

    fn mark(&mut self, at: Gpa, _: Width, old: u64, new: u64) -> Marked {
        if self.rom {
            return Marked::ReadOnly;
        }
        if self.disturbed > 0 {
            self.disturbed -= 1;
            return Marked::Changed;
        }
        let entry = self.entries.get_mut(&at.0).expect("only what was read is marked");
        if *entry != old {
            return Marked::Changed;
        }
        *entry = new;
        Marked::Done
    }
}

fn read(linear: u64) -> Request {
    Request { linear, access: Access::Read, privilege: Privilege::Supervisor { ac: false }, pkru: 0 }
}

fn long(cr4: u64) -> Mode {
    Mode::new(Controls { cr0: PG | WP, cr4: PAE | cr4, efer: LMA | NXE }, CPU)
}

fn code(result: Result<Translation, Refused>) -> FaultCode {
    match result {
        Err(Refused::Fault(fault)) => fault.code,
        other => panic!("no page fault: {other:?}"),
    }
}

#[test]
fn each_mode_finds_its_page() {
    let off = Mode::new(Controls { cr0: 0, cr4: 0, efer: 0 }, CPU);
    let found = walk(&off, 0x1000, &read(0x1_0000_7c00), &mut Memory::default()).unwrap();
    assert_eq!((found.gpa, found.steps().count()), (Gpa(0x7c00), 0));

    let legacy = Mode::new(Controls { cr0: PG, cr4: PSE, efer: 0 }, CPU);
    let mut memory = Memory::of(&[(0x1000, 0x2003), (0x2004, 0x9003), (0x1004, 0x0080_6083)]);
    let small = walk(&legacy, 0x1018, &read(0x1abc), &mut memory).unwrap();
    assert_eq!((small.gpa, small.page_shift), (Gpa(0x9abc), 12), "CR3's flag bits are no address");
    let large = walk(&legacy, 0x1000, &read(0x40_1234), &mut memory).unwrap();
    assert_eq!((large.gpa, large.page_shift), (Gpa(0x3_0080_1234), 22), "PSE-36");

    let pae = Mode::new(Controls { cr0: PG, cr4: PAE, efer: 0 }, CPU);
    let mut memory = Memory::of(&[(0x1038, 0x2021), (0x2000, 0x3003), (0x3008, 0x7003), (0x2008, 0x20_0083)]);
    assert_eq!(walk(&pae, 0x1020, &read(0xc000_1000), &mut memory).unwrap().gpa, Gpa(0x7000));
    assert_eq!(memory.entries[&0x1038], 0x2021, "no mark of ours at the top, and one of the CPU's is no fault");
    assert_eq!(walk(&pae, 0x1020, &read(0xc020_0004), &mut memory).unwrap().page_shift, 21);

    let mut memory = Memory::of(&[
        (0x1ff8, 0x2003),
        (0x2000, 0x3003),
        (0x3008, 0x4003),
        (0x3010, 0x4000_0083),
        (0x4018, 0x5003),
        (0x4020, 0x20_0083),
        (0x5020, 0x6003),
    ]);
    let deep = long(LA57);
    let top = 0x1ff << 48;
    let found = walk(&deep, 0x1000, &read(top | 1 << 30 | 3 << 21 | 4 << 12 | 5), &mut memory).unwrap();
    let levels: Vec<_> = found.steps().map(|(level, step)| (level, step.at.0)).collect();
    assert_eq!(found.gpa, Gpa(0x6005));
    assert_eq!(levels, [(5, 0x1ff8), (4, 0x2000), (3, 0x3008), (2, 0x4018), (1, 0x5020)]);
    let found = walk(&deep, 0x1000, &read(top | 1 << 30 | 4 << 21 | 6), &mut memory).unwrap();
    assert_eq!((found.gpa, found.page_shift), (Gpa(0x20_0006), 21));
    let found = walk(&deep, 0x1000, &read(top | 2 << 30 | 7), &mut memory).unwrap();
    assert_eq!((found.gpa, found.page_shift), (Gpa(0x4000_0007), 30));
}

#[test]
fn marks_are_set_on_the_way_down_and_dirty_only_by_a_write_that_may() {
    let entries = [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x5001)];
    let mut memory = Memory::of(&entries);
    let write = Request { access: Access::Write, ..read(0) };
    assert_eq!(code(walk(&long(0), 0x1000, &write, &mut memory)), FaultCode::PRESENT | FaultCode::WRITE);
    assert_eq!(memory.entries.values().copied().collect::<Vec<_>>(), [0x2023, 0x3023, 0x4023, 0x5001]);
    walk(&long(0), 0x1000, &read(0), &mut memory).unwrap();
    assert_eq!(memory.entries[&0x4000], 0x5021);
    let no_wp = Mode::new(Controls { cr0: PG, cr4: PAE, efer: LMA }, CPU);
    assert!(walk(&no_wp, 0x1000, &write, &mut memory).unwrap().dirty);
    assert_eq!(memory.entries[&0x4000], 0x5061);

    let mut rom = Memory { rom: true, ..Memory::of(&entries) };
    let found = walk(&no_wp, 0x1000, &write, &mut rom).unwrap();
    assert!(!found.dirty, "nothing says that it was written");
    assert_eq!(rom.entries, Memory::of(&entries).entries);
}

#[test]
fn an_entry_that_changed_is_not_marked_and_the_walk_starts_over() {
    let entries = [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x5003)];
    let mut memory = Memory { disturbed: 5, ..Memory::of(&entries) };
    assert_eq!(walk(&long(0), 0x1000, &read(0x123), &mut memory).unwrap().gpa, Gpa(0x5123));
    let mut memory = Memory { disturbed: u32::MAX, ..Memory::of(&entries) };
    assert_eq!(walk(&long(0), 0x1000, &read(0), &mut memory), Err(Refused::Changing), "and it ends");
    let mut nothing = Memory::default();
    assert_eq!(walk(&long(0), 0x1000, &read(0), &mut nothing), Err(Refused::NoMemory { at: Gpa(0x1000) }));
}

#[test]
fn supervisor_rules() {
    let user_page = [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x5007)];
    let ask = |cr4, access, privilege| {
        walk(&long(cr4), 0x1000, &Request { access, privilege, ..read(0) }, &mut Memory::of(&user_page)).map(|_| ())
    };
    let kernel = |ac| Privilege::Supervisor { ac };
    assert_eq!(ask(0, Access::Execute, kernel(false)), Ok(()));
    assert!(ask(SMEP, Access::Execute, kernel(true)).is_err(), "AC opens data only");
    assert_eq!(ask(SMEP, Access::Execute, Privilege::User), Ok(()));
    assert_eq!(ask(SMAP, Access::Write, kernel(true)), Ok(()));
    assert!(ask(SMAP, Access::Read, kernel(false)).is_err());
    assert!(ask(SMAP, Access::Read, Privilege::Implicit).is_err(), "AC is not the CPU's");
    assert_eq!(ask(SMAP, Access::Execute, kernel(false)), Ok(()), "SMAP is about data");
    let mut memory = Memory::of(&user_page);
    let fetch = Request { access: Access::Execute, ..read(0) };
    let code = code(walk(&long(SMEP), 0x1000, &fetch, &mut memory));
    assert_eq!(code, FaultCode::PRESENT | FaultCode::FETCH);
}

#[test]
fn protection_keys_are_for_data_on_user_pages() {
    let page = |leaf: u64| [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, leaf | 5 << 59)];
    let ask = |leaf, access, privilege, pkru| {
        let request = Request { access, privilege, pkru, ..read(0) };
        walk(&long(PKE), 0x1000, &request, &mut Memory::of(&page(leaf))).map(|found| found.key)
    };
    let (no_access, no_write) = (1 << 10, 2 << 10);
    assert_eq!(ask(0x5007, Access::Read, Privilege::User, !no_access), Ok(5), "other keys' bits");
    let denied = ask(0x5007, Access::Read, Privilege::Supervisor { ac: false }, no_access);
    assert!(matches!(denied, Err(Refused::Fault(f)) if f.code == FaultCode::PRESENT | FaultCode::KEY));
    assert_eq!(ask(0x5007, Access::Read, Privilege::User, no_write), Ok(5));
    assert!(ask(0x5007, Access::Write, Privilege::Supervisor { ac: false }, no_write).is_err(), "CR0.WP is set");
    assert_eq!(ask(0x5007, Access::Execute, Privilege::User, !0), Ok(5));
    assert_eq!(ask(0x5003, Access::Write, Privilege::Supervisor { ac: false }, !0), Ok(5), "a supervisor page");
}

/// What the rules say of one address, with everything on the table at once.
fn judge(mode: &Mode, controls: Controls, request: &Request, path: &[u64]) -> Result<u64, FaultCode> {
    let Controls { cr0, cr4, efer } = controls;
    let five = if cr4 & LA57 != 0 { 5 } else { 4 };
    let (mut user, mut write, mut execute) = (true, true, true);
    let fetch = request.access == Access::Execute;
    let base = [
        (request.access == Access::Write, FaultCode::WRITE),
        (request.privilege == Privilege::User, FaultCode::USER),
        (fetch && (efer & NXE != 0 || cr4 & SMEP != 0), FaultCode::FETCH),
    ];
    let base = base.iter().filter(|(is, _)| *is).fold(FaultCode::empty(), |code, (_, bit)| code | *bit);
    assert_eq!(mode.levels(), five);
    for (depth, &entry) in path.iter().enumerate() {
        let level = five as usize - depth;
        if entry & 1 == 0 {
            return Err(base);
        }
        let leaf = level == 1 || level <= 3 && entry & 0x80 != 0;
        let size = 1u64 << (12 + 9 * (level - 1));
        let bad_address = (40..52).any(|bit| entry >> bit & 1 != 0);
        let bad_offset = leaf && level > 1 && (13..64).any(|bit| 1u64 << bit < size && entry >> bit & 1 != 0);
        let bad_large = level > 3 && entry & 0x80 != 0;
        if bad_address || bad_offset || bad_large || entry >> 63 != 0 && efer & NXE == 0 {
            return Err(base | FaultCode::PRESENT | FaultCode::RESERVED);
        }
        (user, write, execute) = (user && entry & 4 != 0, write && entry & 2 != 0, execute && entry >> 63 == 0);
        if !leaf {
            continue;
        }
        let ring3 = request.privilege == Privilege::User;
        let ac = request.privilege == Privilege::Supervisor { ac: true };
        let wp = cr0 & WP != 0;
        let pkru = request.pkru >> (2 * (entry >> 59 & 15));
        let writes = request.access == Access::Write;
        let keyed = cr4 & PKE != 0 && user && !fetch && (pkru & 1 != 0 || writes && pkru & 2 != 0 && (ring3 || wp));
        let denied = match (ring3, request.access) {
            (true, Access::Read) => !user,
            (true, Access::Write) => !user || !write,
            (true, Access::Execute) => !user || !execute,
            (false, Access::Execute) => !execute || user && cr4 & SMEP != 0,
            (false, _) => writes && !write && wp || user && cr4 & SMAP != 0 && !ac,
        };
        return match (keyed, denied) {
            (false, false) => Ok(entry & 0xff_ffff_f000 & !(size - 1) | request.linear & (size - 1)),
            (true, _) => Err(base | FaultCode::PRESENT | FaultCode::KEY),
            (false, true) => Err(base | FaultCode::PRESENT),
        };
    }
    unreachable!("level 1 is a leaf")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn long_mode_agrees_with_the_rules(
        cr0_wp in any::<bool>(),
        cr4 in 0u64..16,
        nx in any::<bool>(),
        la57 in any::<bool>(),
        flags in prop::collection::vec(0u64..64, 5),
        wild in prop::option::weighted(0.3, (0usize..5, 0u32..64)),
        access in prop::sample::select(&[Access::Read, Access::Write, Access::Execute][..]),
        privilege in prop::sample::select(
            &[Privilege::User, Privilege::Supervisor { ac: false }, Privilege::Supervisor { ac: true }, Privilege::Implicit][..]
        ),
        pkru in any::<u32>(),
    ) {
        let pick = |bit: u32, mask: u64| if cr4 >> bit & 1 != 0 { mask } else { 0 };
        let controls = Controls {
            cr0: PG | if cr0_wp { WP } else { 0 },
            cr4: PAE | pick(0, SMEP) | pick(1, SMAP) | pick(2, PKE) | if la57 { LA57 } else { 0 },
            efer: LMA | if nx { NXE } else { 0 },
        };
        let mode = Mode::new(controls, CPU);
        let levels = usize::from(mode.levels());
        let linear = 0xabc;
        // Present nearly always, then writable, user, large, NX, key; one bit anywhere now and then.
        let mut path: Vec<u64> = (0..levels).map(|depth| {
            let bits = flags[depth];
            let small = u64::from(bits & 7 != 7) | (bits & 8) >> 2 | (bits & 16) >> 2;
            let high = if bits & 32 != 0 && bits & 1 != 0 { 1 << 63 } else { 0 };
            let large = if levels - depth > 1 && levels - depth <= 3 && bits & 3 == 3 { 0x80 } else { 0 };
            small | high | large | (bits >> 1 & 15) << 59 | (depth as u64 + 1) << 30
        }).collect();
        if let Some((depth, bit)) = wild {
            path[depth % levels] ^= 1 << bit;
        }
        let mut memory = Memory::default();
        let mut table = 0x1000;
        for (depth, entry) in path.iter().enumerate() {
            // Index 0 everywhere.
            if memory.entries.insert(table, *entry).is_some() {
                return Ok(());
            }
            let level = levels - depth;
            if entry & 1 == 0 || level == 1 || level <= 3 && entry & 0x80 != 0 {
                break;
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        let before = memory.clone();
        let request = Request { linear, access, privilege, pkru };
        let expected = judge(&mode, controls, &request, &path);
        match (walk(&mode, 0x1000, &request, &mut memory), expected) {
            (Ok(found), Ok(gpa)) => {
                prop_assert_eq!(found.gpa, Gpa(gpa));
                let (_, leaf) = found.steps().last().unwrap();
                prop_assert_eq!(leaf.entry & 0x20, 0x20);
                prop_assert!(access != Access::Write || leaf.entry & 0x40 != 0);
                prop_assert!(found.steps().all(|(_, step)| memory.entries[&step.at.0] == step.entry));
            }
            (Err(Refused::Fault(fault)), Err(code)) => {
                prop_assert_eq!(fault, PageFault { code, address: linear });
            }
            (found, expected) => prop_assert!(false, "{:?} is not {:?}", found, expected),
        }
        for (at, entry) in &memory.entries {
            prop_assert_eq!(entry & !0x60, before.entries[at] & !0x60, "only marks change");
        }
    }
}
