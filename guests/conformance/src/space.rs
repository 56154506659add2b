//! What a case is made of.

use crate::{DATA, FRAMES, FRESH_DESCRIPTOR, KEY, TARGET};

/// The most levels.
pub const LEVELS: usize = 5;

/// How addresses are translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Paging {
    /// 32-bit paging: two levels of 4-byte entries.
    Legacy,
    /// PAE.
    Pae,
    /// 64-bit mode, four levels.
    Long4,
    /// 64-bit mode, five levels.
    Long5,
}

impl Paging {
    /// Each.
    pub const ALL: [Self; 4] = [Self::Legacy, Self::Pae, Self::Long4, Self::Long5];

    /// Its name in reports and on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Pae => "pae",
            Self::Long4 => "long4",
            Self::Long5 => "long5",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|paging| paging.name() == name)
    }

    /// Levels of tables.
    #[must_use]
    pub const fn levels(self) -> u8 {
        self as u8 + 2
    }

    /// Whether it is 64-bit mode.
    #[must_use]
    pub const fn is_long(self) -> bool {
        matches!(self, Self::Long4 | Self::Long5)
    }

    /// log2 of the bytes that an entry of a level stands for.
    #[must_use]
    pub const fn shift(self, level: u8) -> u32 {
        12 + (level as u32 - 1) * if matches!(self, Self::Legacy) { 10 } else { 9 }
    }

    /// The address that all cases are about. Where a page of 1 GiB maps it, [`TARGET`] is where it leads.
    #[must_use]
    pub const fn linear(self) -> u64 {
        match self {
            Self::Legacy | Self::Pae => 2 << 30 | TARGET,
            Self::Long4 => 0xffff << 48 | 0x1a5 << 39 | 0xb3 << 30 | TARGET,
            Self::Long5 => 0x7f << 57 | 0x18b << 48 | 0x1a5 << 39 | 0xb3 << 30 | TARGET,
        }
    }

    /// Where in its table the entry of a level is, in bytes.
    #[must_use]
    pub const fn offset(self, level: u8) -> u64 {
        let (bits, bytes) = if matches!(self, Self::Legacy) { (10, 4) } else { (9, 8) };
        let linear = if self.is_long() { self.linear() } else { self.linear() & 0xffff_ffff };
        (linear >> self.shift(level) & ((1 << bits) - 1)) * bytes
    }

    /// Whether entries of a level are PAE's four pointers, which hold no rights.
    #[must_use]
    pub const fn is_pointer(self, level: u8) -> bool {
        matches!(self, Self::Pae) && level == 3
    }
}

bitflags::bitflags! {
    /// What a CPU has, of what cases use if it is there.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Features: u8 {
        /// Pages of 1 GiB.
        const GIGANTIC = 1 << 0;
        /// Execute disable.
        const NX = 1 << 1;
        /// Supervisor-mode execution prevention.
        const SMEP = 1 << 2;
        /// Supervisor-mode access prevention.
        const SMAP = 1 << 3;
        /// Protection keys.
        const PKU = 1 << 4;
        /// Five levels.
        const LA57 = 1 << 5;
    }
}

/// A CPU, as far as cases depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpu {
    /// What it has.
    pub features: Features,
    /// Physical address bits.
    pub physical_bits: u8,
}

impl Cpu {
    /// As one number, for command lines.
    #[must_use]
    pub const fn number(self) -> u32 {
        (self.physical_bits as u32) << 8 | self.features.bits() as u32
    }

    /// The CPU of that number.
    #[must_use]
    pub fn of_number(number: u32) -> Option<Self> {
        let features = Features::from_bits(number as u8)?;
        let physical_bits = u8::try_from(number >> 8).ok()?;
        (32..=52).contains(&physical_bits).then_some(Self { features, physical_bits })
    }

    /// Whether it has such paging.
    #[must_use]
    pub const fn has(self, paging: Paging) -> bool {
        !matches!(paging, Paging::Long5) || self.features.contains(Features::LA57)
    }

    /// Bits of control registers that it lets be set.
    #[must_use]
    pub fn controls(self, paging: Paging) -> Controls {
        let mut all = Controls::WP;
        all.set(Controls::PSE, paging == Paging::Legacy);
        all.set(Controls::NXE, self.features.contains(Features::NX));
        all.set(Controls::SMEP, self.features.contains(Features::SMEP));
        all.set(Controls::SMAP, self.features.contains(Features::SMAP));
        all.set(Controls::PKE, self.features.contains(Features::PKU));
        all
    }
}

bitflags::bitflags! {
    /// Bits of control registers.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Controls: u8 {
        /// CR0.WP.
        const WP = 1 << 0;
        /// EFER.NXE.
        const NXE = 1 << 1;
        /// CR4.SMEP.
        const SMEP = 1 << 2;
        /// CR4.SMAP.
        const SMAP = 1 << 3;
        /// CR4.PKE.
        const PKE = 1 << 4;
        /// CR4.PSE.
        const PSE = 1 << 5;
    }
}

bitflags::bitflags! {
    /// What an entry says. Its address is none of it: see [`Case::raw`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Entry: u16 {
        /// Present.
        const PRESENT = 1 << 0;
        /// Writable.
        const WRITABLE = 1 << 1;
        /// For user code too.
        const USER = 1 << 2;
        /// Accessed.
        const ACCESSED = 1 << 3;
        /// Dirty.
        const DIRTY = 1 << 4;
        /// Bit 7: a large page, a memory type, or nothing that may be set.
        const LARGE = 1 << 5;
        /// Bit 63.
        const NO_EXECUTE = 1 << 6;
        /// The first address bit that the CPU does not have. Not in 4-byte entries.
        const HIGH = 1 << 7;
        /// In large pages, an address bit below their own.
        const LOW = 1 << 8;
        /// Protection key [`KEY`], or bits of it that PAE reserves.
        const KEY = 1 << 9;
        /// All bits that are software's own, and the cache types.
        const IGNORED = 1 << 10;
        /// A leaf leads to the page beside.
        const OTHER = 1 << 11;
    }
}

impl Entry {
    /// Present, with all rights.
    pub const OPEN: Self = Self::PRESENT.union(Self::WRITABLE).union(Self::USER);
}

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// A word is read.
    Read,
    /// A word is written.
    Write,
    /// A word is read and written in one step.
    Update,
    /// Code is executed.
    Fetch,
    /// The CPU reads a descriptor (LAR), as supervisor whatever the ring.
    ReadDescriptor,
    /// The CPU reads a descriptor and marks it as used (MOV to GS), as supervisor whatever the ring.
    MarkDescriptor,
}

impl Kind {
    /// Each.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Write, Self::Update, Self::Fetch, Self::ReadDescriptor, Self::MarkDescriptor];
}

/// An access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// What.
    pub kind: Kind,
    /// From ring 3.
    pub user: bool,
    /// RFLAGS.AC is set.
    pub ac: bool,
}

/// What is dropped of cached translations before an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// Nothing.
    None,
    /// The address's (INVLPG).
    Page,
    /// All (MOV to CR3).
    All,
}

/// A change of one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Its level.
    pub level: u8,
    /// What it becomes.
    pub entry: Entry,
}

/// One access and what comes before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shot {
    /// An entry is written.
    pub change: Option<Change>,
    /// Control bits.
    pub controls: Controls,
    /// For key 0 in bits 1:0 and for [`KEY`] in bits 3:2: access disabled, write disabled.
    pub keys: u8,
    /// What is dropped then.
    pub flush: Flush,
    /// The access.
    pub access: Access,
}

impl Shot {
    /// PKRU.
    #[must_use]
    pub const fn pkru(&self) -> u32 {
        (self.keys as u32 & 3) | (self.keys as u32 >> 2 & 3) << (2 * KEY)
    }

    /// The address that its access begins with.
    #[must_use]
    pub const fn linear(&self, paging: Paging) -> u64 {
        paging.linear()
            + match self.access.kind {
                Kind::Read | Kind::Write | Kind::Update => DATA,
                Kind::Fetch => crate::CODE,
                Kind::ReadDescriptor => crate::USED_DESCRIPTOR,
                Kind::MarkDescriptor => FRESH_DESCRIPTOR,
            }
    }
}

/// What the shot of that number writes.
#[must_use]
pub const fn written(shot: usize) -> u32 {
    0x57a7_0000 | shot as u32
}

/// A case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Case {
    /// How addresses are translated.
    pub paging: Paging,
    /// Which set of tables it uses.
    pub tables: u8,
    /// Its entries before the first shot, by level − 1.
    pub entries: [Entry; LEVELS],
    /// Its accesses. The first changes no entry and begins with nothing cached.
    pub shots: [Shot; 2],
}

impl Case {
    /// The entries as written for a shot, by level − 1.
    #[must_use]
    pub fn entries(&self, shot: usize) -> [Entry; LEVELS] {
        let mut entries = self.entries;
        for change in self.shots[..=shot].iter().filter_map(|shot| shot.change) {
            entries[usize::from(change.level) - 1] = change.entry;
        }
        entries
    }

    /// Whether bit 7 makes an entry of a level a leaf.
    #[must_use]
    pub fn may_be_large(&self, level: u8, cpu: Cpu, controls: Controls) -> bool {
        match self.paging {
            Paging::Legacy => level == 2 && controls.contains(Controls::PSE),
            Paging::Pae => level == 2,
            Paging::Long4 | Paging::Long5 => level == 2 || level == 3 && cpu.features.contains(Features::GIGANTIC),
        }
    }

    /// Whether such an entry is a leaf.
    #[must_use]
    pub fn is_leaf(&self, level: u8, entry: Entry, cpu: Cpu, controls: Controls) -> bool {
        level == 1 || entry.contains(Entry::LARGE) && self.may_be_large(level, cpu, controls)
    }

    /// The level of the leaf that a shot's entries lead to, were all of them present.
    #[must_use]
    pub fn leaf(&self, shot: usize, cpu: Cpu) -> u8 {
        let (entries, controls) = (self.entries(shot), self.shots[shot].controls);
        let leaf = |&level: &u8| self.is_leaf(level, entries[usize::from(level) - 1], cpu, controls);
        (1..=self.paging.levels()).rev().find(leaf).unwrap_or(1)
    }

    /// The physical page that a shot's entries lead to, were all of them present.
    #[must_use]
    pub fn frame(&self, shot: usize, cpu: Cpu) -> u64 {
        let leaf = self.leaf(shot, cpu);
        let other = self.entries(shot)[usize::from(leaf) - 1].contains(Entry::OTHER);
        TARGET ^ self.beside(leaf, other)
    }

    fn beside(&self, leaf: u8, other: bool) -> u64 {
        let bit = 1 << self.paging.shift(leaf);
        if other && FRAMES.contains(&(TARGET ^ bit)) { bit } else { 0 }
    }

    /// An entry as it stands in memory. `table`: the address of the next table.
    #[must_use]
    pub fn raw(&self, level: u8, entry: Entry, table: u64, cpu: Cpu, controls: Controls) -> u64 {
        let legacy = self.paging == Paging::Legacy;
        let leaf = self.is_leaf(level, entry, cpu, controls);
        let large = leaf && level > 1;
        let pick = |flag, bits: u64| if entry.contains(flag) { bits } else { 0 };
        let low = if legacy { 1 << 21 } else { 1 << 13 };
        let software = match self.paging {
            Paging::Legacy => 0xe18,
            Paging::Pae if level == 3 => 0xe00,
            Paging::Pae => 0xe18,
            // Bits 62:59 are the key's.
            Paging::Long4 | Paging::Long5 => 0x7f << 52 | 0xe18,
        };
        let address = if leaf {
            TARGET & !((1 << self.paging.shift(level)) - 1) ^ self.beside(level, entry.contains(Entry::OTHER))
        } else {
            table
        };
        address
            | pick(Entry::PRESENT, 1 << 0)
            | pick(Entry::WRITABLE, 1 << 1)
            | pick(Entry::USER, 1 << 2)
            | pick(Entry::ACCESSED, 1 << 5)
            | pick(Entry::DIRTY, 1 << 6)
            | pick(Entry::LARGE, 1 << 7)
            | pick(Entry::NO_EXECUTE, if legacy { 0 } else { 1 << 63 })
            | pick(Entry::HIGH, if legacy { 0 } else { 1 << self.reserved_bit(cpu) })
            | pick(Entry::LOW, if large { low } else { 0 })
            | pick(Entry::KEY, if legacy { 0 } else { u64::from(KEY) << 59 })
            | pick(Entry::IGNORED, software)
    }

    /// The bit of [`Entry::HIGH`]; what lies above address bits of 52 is no address bit.
    const fn reserved_bit(&self, cpu: Cpu) -> u8 {
        if cpu.physical_bits < 52 { cpu.physical_bits } else { 51 }
    }

    /// Takes away what this paging and CPU do not have, and what no architecture defines.
    #[must_use]
    pub fn sound(mut self, cpu: Cpu) -> Self {
        let has = cpu.controls(self.paging);
        let meaningful = |level: u8, mut entry: Entry| {
            if self.paging.is_pointer(level) {
                // The other bits are reserved, and judged when CR3 is loaded.
                entry &= Entry::PRESENT | Entry::IGNORED;
            }
            if self.paging == Paging::Legacy {
                entry -= Entry::NO_EXECUTE | Entry::HIGH | Entry::KEY;
            }
            if cpu.physical_bits == 52 {
                entry -= Entry::HIGH;
            }
            entry
        };
        for (level, entry) in (1..).zip(&mut self.entries) {
            *entry = if level > self.paging.levels() { Entry::empty() } else { meaningful(level, *entry) };
        }
        let [first, second] = &mut self.shots;
        for shot in [&mut *first, &mut *second] {
            shot.controls &= has;
            if !shot.controls.contains(Controls::PKE) {
                shot.keys = 0;
            }
            // AC opens user pages for explicit accesses only (APM vol. 2, 5.6.6; SDM vol. 3, 4.6). QEMU's emulated CPU (7.2)
            // takes that of rings 0 to 2 for the CPU's own accesses too; a hypervisor that executes such an instruction
            // does not.
            let of_cpu = matches!(shot.access.kind, Kind::ReadDescriptor | Kind::MarkDescriptor);
            if of_cpu && !shot.access.user && shot.controls.contains(Controls::SMAP) {
                shot.access.ac = false;
            }
        }
        (first.change, first.flush) = (None, Flush::All);
        // Addresses in the entries are written for one of the two.
        second.controls.set(Controls::PSE, first.controls.contains(Controls::PSE));
        // What is cached may be judged by these as they were.
        if (first.controls ^ second.controls).intersects(!Controls::WP) {
            second.flush = Flush::All;
        }
        if let Some(change) = &mut second.change {
            change.level = change.level.clamp(1, self.paging.levels());
            change.entry = meaningful(change.level, change.entry);
            if self.paging.is_pointer(change.level) {
                // The CPU has its own copies of these.
                second.flush = Flush::All;
            } else if second.flush == Flush::None
                && self.entries[usize::from(change.level) - 1].contains(Entry::PRESENT)
            {
                second.flush = Flush::Page;
            }
        }
        self
    }
}

/// Which of [`FRAMES`] a page is: the mark in what it holds.
#[must_use]
pub fn frame_mark(frame: u64) -> u32 {
    FRAMES.iter().position(|known| *known == frame).unwrap_or_default() as u32
}
