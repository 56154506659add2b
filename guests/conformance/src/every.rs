//! All cases of a smaller space, in order.
//!
//! For each size of page and each level above it: every combination of that level's bits, of the leaf's rights, of the control
//! bits, of accesses; and what comes second is the same access once more, another one, or the same one after the level's
//! entry was made to let everything through. Entries at other levels do. Entries that are not present are told apart by
//! nothing but whether all their other bits are set, too.

use crate::TABLE_SETS;
use crate::space::{Access, Case, Change, Controls, Cpu, Entry, Features, Flush, Kind, LEVELS, Paging, Shot};

/// Data accesses and fetches of each ring, with AC and without where it could count; and the CPU's own.
const ACCESSES: [Access; 13] = {
    const fn access(kind: Kind, user: bool, ac: bool) -> Access {
        Access { kind, user, ac }
    }
    [
        access(Kind::Read, false, false),
        access(Kind::Read, false, true),
        access(Kind::Read, true, false),
        access(Kind::Write, false, false),
        access(Kind::Write, false, true),
        access(Kind::Write, true, false),
        access(Kind::Fetch, false, false),
        access(Kind::Fetch, false, true),
        access(Kind::Fetch, true, false),
        access(Kind::ReadDescriptor, false, false),
        access(Kind::ReadDescriptor, true, true),
        access(Kind::MarkDescriptor, false, false),
        access(Kind::MarkDescriptor, true, false),
    ]
};
const SECONDS: u64 = 3;
/// Keys off; on, and the leaf's forbids nothing, access, writing.
const KEY_STATES: u64 = 4;

/// Cases with a leaf of one level, in which the entry of one level is looked at closely.
#[derive(Clone, Copy)]
struct Family {
    leaf: u8,
    looked_at: u8,
}

fn families(paging: Paging, cpu: Cpu) -> impl Iterator<Item = Family> {
    let largest = match paging {
        Paging::Legacy | Paging::Pae => 2,
        Paging::Long4 | Paging::Long5 => 2 + u8::from(cpu.features.contains(Features::GIGANTIC)),
    };
    (1..=largest).flat_map(move |leaf| (leaf..=paging.levels()).map(move |looked_at| Family { leaf, looked_at }))
}

/// The bits of an entry that are tried, beside presence.
fn bits(paging: Paging, family: Family) -> Entry {
    if paging.is_pointer(family.looked_at) {
        return Entry::empty();
    }
    let mut all = Entry::WRITABLE | Entry::USER | Entry::ACCESSED;
    // At level 1 it is a memory type.
    all.set(Entry::LARGE, family.looked_at > 1);
    all.set(Entry::DIRTY, family.looked_at == family.leaf);
    all.set(Entry::LOW, family.looked_at == family.leaf && family.leaf > 1);
    all.set(Entry::NO_EXECUTE | Entry::HIGH, paging != Paging::Legacy);
    all
}

/// The rights of a leaf that is not the entry that is looked at.
fn leaf_rights(paging: Paging, family: Family) -> Entry {
    let mut all = Entry::empty();
    if family.leaf != family.looked_at {
        all = Entry::WRITABLE | Entry::USER;
        all.set(Entry::NO_EXECUTE, paging != Paging::Legacy);
    }
    all
}

/// Control bits that are combined freely.
fn free_controls(paging: Paging, cpu: Cpu) -> Controls {
    cpu.controls(paging) - Controls::PKE
}

fn key_states(paging: Paging, cpu: Cpu) -> u64 {
    if paging.is_long() && cpu.features.contains(Features::PKU) { KEY_STATES } else { 1 }
}

fn combinations(bits: u32) -> u64 {
    1 << bits
}

fn size(paging: Paging, cpu: Cpu, family: Family) -> u64 {
    (2 + combinations(bits(paging, family).bits().count_ones()))
        * combinations(leaf_rights(paging, family).bits().count_ones())
        * combinations(free_controls(paging, cpu).bits().count_ones())
        * key_states(paging, cpu)
        * ACCESSES.len() as u64
        * SECONDS
}

/// How many there are.
#[must_use]
pub fn count(paging: Paging, cpu: Cpu) -> u64 {
    families(paging, cpu).map(|family| size(paging, cpu, family)).sum()
}

/// The bits of `mask` that the bits of a number choose.
fn spread(mask: u16, number: u64) -> u16 {
    let mut left = mask;
    let mut chosen = 0;
    let mut number = number;
    while left != 0 {
        let lowest = left & left.wrapping_neg();
        if number & 1 != 0 {
            chosen |= lowest;
        }
        left ^= lowest;
        number >>= 1;
    }
    chosen
}

/// The case of that number, below [`count`]; beyond it they come again.
#[must_use]
pub fn every(paging: Paging, cpu: Cpu, number: u64) -> Case {
    let mut rest = number % count(paging, cpu).max(1);
    let mut chosen = Family { leaf: 1, looked_at: 1 };
    for family in families(paging, cpu) {
        chosen = family;
        let size = size(paging, cpu, family);
        if rest < size {
            break;
        }
        rest -= size;
    }
    let mut digit = |limit: u64| {
        let digit = rest % limit;
        rest /= limit;
        digit
    };
    // What changes fastest is what a hypervisor's tables depend on most: neighbours are most different.
    let access = ACCESSES[digit(ACCESSES.len() as u64) as usize];
    let second = digit(SECONDS);
    let free = free_controls(paging, cpu);
    let mut controls =
        Controls::from_bits_truncate(spread(free.bits().into(), digit(combinations(free.bits().count_ones()))) as u8);
    let key = digit(key_states(paging, cpu));
    let rights = leaf_rights(paging, chosen);
    let rights = Entry::from_bits_truncate(spread(rights.bits(), digit(combinations(rights.bits().count_ones()))));
    let bits = bits(paging, chosen);
    let looked_at = match digit(2 + combinations(bits.bits().count_ones())) {
        0 => Entry::empty(),
        1 => bits,
        number => Entry::PRESENT | Entry::from_bits_truncate(spread(bits.bits(), number - 2)),
    };

    let large = |level: u8| if level == chosen.leaf && level > 1 { Entry::LARGE } else { Entry::empty() };
    let mut entries = [Entry::empty(); LEVELS];
    for level in chosen.leaf..=paging.levels() {
        entries[usize::from(level) - 1] = Entry::OPEN | Entry::ACCESSED | large(level);
    }
    // Where a large bit is taken away there is a page behind.
    for level in 1..chosen.leaf {
        entries[usize::from(level) - 1] = Entry::OPEN;
    }
    let leaf = usize::from(chosen.leaf) - 1;
    if chosen.leaf != chosen.looked_at {
        entries[leaf] = Entry::PRESENT | rights | large(chosen.leaf);
    }
    let at = usize::from(chosen.looked_at) - 1;
    entries[at] = looked_at ^ if looked_at.contains(Entry::PRESENT) { large(chosen.looked_at) } else { Entry::empty() };
    let mut keys = 0;
    if key > 0 {
        controls |= Controls::PKE;
        entries[leaf] |= Entry::KEY;
        keys = (key as u8 - 1) << 2;
    }
    let first = Shot { change: None, controls, keys, flush: Flush::All, access };
    let mut last = Shot { flush: Flush::None, ..first };
    match second {
        0 => {}
        1 => {
            last.access.kind = match access.kind {
                Kind::Read => Kind::Write,
                Kind::Write => Kind::Fetch,
                _ => Kind::Read,
            };
        }
        _ => {
            let entry = Entry::OPEN | large(chosen.looked_at);
            last.change = Some(Change { level: chosen.looked_at, entry });
            last.flush = Flush::Page;
        }
    }
    let tables = (number % u64::from(TABLE_SETS)) as u8;
    Case { paging, tables, entries, shots: [first, last] }.sound(cpu)
}
