//! One walk of a guest's tables.

use super::Rights;
use super::mode::{Format, LARGE, Mode, NO_EXECUTE};
use crate::addr::{Gpa, INDEX_BITS, PAGE_SHIFT};
use crate::host::Access;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// How often a walk starts over because entries change under it. A guest that changes them faster than they are read
/// loses its time and nobody else's.
const ATTEMPTS: u32 = 16;
/// Levels of the deepest table.
const MAX_LEVELS: usize = 5;

bitflags::bitflags! {
    /// The error code of a page fault (APM vol. 2, 8.4.2).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct FaultCode: u32 {
        /// All entries were present.
        const PRESENT = 1 << 0;
        /// A write.
        const WRITE = 1 << 1;
        /// From ring 3.
        const USER = 1 << 2;
        /// A reserved bit was set.
        const RESERVED = 1 << 3;
        /// An instruction fetch; only where fetches are told apart from reads.
        const FETCH = 1 << 4;
        /// A protection key forbids it.
        const KEY = 1 << 5;
    }
}

/// A #PF that the guest is to get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// What the CPU pushes.
    pub code: FaultCode,
    /// What it puts into CR2.
    pub address: u64,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// Ring 3.
    User,
    /// Rings 0 to 2.
    Supervisor {
        /// RFLAGS.AC: opens user pages where SMAP closes them.
        ac: bool,
    },
    /// The CPU itself, whatever the ring: descriptor tables, the TSS. AC does not count (APM vol. 2, 5.6.6).
    Implicit,
}

/// An access that lies in one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Where. Without long mode, bits 63:32 are not looked at.
    pub linear: u64,
    /// What for.
    pub access: Access,
    /// For whom.
    pub privilege: Privilege,
    /// PKRU; not looked at where protection keys are off.
    pub pkru: u32,
}

/// Size of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    /// 4 bytes: 32-bit paging.
    Four,
    /// 8 bytes.
    Eight,
}

/// What came of marking an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Marked {
    /// It was the old value and is the new one.
    Done,
    /// It was something else, and still is.
    Changed,
    /// The memory is not writable. A CPU's write to ROM goes nowhere, and its walk goes on.
    ReadOnly,
}

/// Guest-physical memory that holds page tables.
pub trait Tables {
    /// The entry at `at`, which is aligned to its width, read in one piece. `None`: there is no memory.
    fn read(&mut self, at: Gpa, width: Width) -> Option<u64>;
    /// Replaces `old` by `new` in one step, if it is still `old`. Only for entries that were read.
    fn mark(&mut self, at: Gpa, width: Width, old: u64, new: u64) -> Marked;
}

/// An entry that a walk went through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Step {
    /// Where it is.
    pub at: Gpa,
    /// What it was, with the bits that the walk set.
    pub entry: u64,
}

/// A walk that succeeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Where the address leads.
    pub gpa: Gpa,
    /// log2 of the size of the guest's page: 12, 21, 22 or 30; 32 without paging.
    pub page_shift: u8,
    /// What all levels together allow.
    pub rights: Rights,
    /// The leaf's protection key; 0 where keys are off.
    pub key: u8,
    /// The leaf's dirty bit, after this walk.
    pub dirty: bool,
    steps: [Step; MAX_LEVELS],
    top: u8,
    leaf: u8,
}

impl Translation {
    /// The entries, the top one first.
    pub fn steps(&self) -> impl Iterator<Item = (u8, &Step)> {
        (self.leaf..=self.top)
            .rev()
            .filter(|&level| level > 0)
            .map(|level| (level, &self.steps[usize::from(level) - 1]))
    }
}

/// Why there is no translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// The guest's fault.
    Fault(PageFault),
    /// An entry should be at an address that has no memory.
    NoMemory {
        /// Where.
        at: Gpa,
    },
    /// Entries kept changing. The guest may try its access again.
    Changing,
}

/// A protection key's two bits in PKRU.
#[derive(Clone, Copy)]
struct Key {
    access_disabled: bool,
    write_disabled: bool,
}

impl Mode {
    fn fault(&self, request: &Request, cause: FaultCode) -> Refused {
        let mut code = cause;
        code.set(FaultCode::WRITE, request.access == Access::Write);
        code.set(FaultCode::USER, request.privilege == Privilege::User);
        code.set(FaultCode::FETCH, request.access == Access::Execute && (self.no_execute || self.smep));
        let address = if self.format == Some(Format::Long) { request.linear } else { request.linear & 0xffff_ffff };
        Refused::Fault(PageFault { code, address })
    }

    /// Whether the rights of all levels together allow the access (APM vol. 2, 5.6).
    fn allows(&self, rights: Rights, request: &Request) -> bool {
        let Rights { user, write, execute } = rights;
        let by_right = match request.access {
            Access::Read => true,
            Access::Write => write,
            Access::Execute => execute,
        };
        let open_to_supervisor = match request.privilege {
            Privilege::User => return user && by_right,
            Privilege::Supervisor { ac } => ac,
            Privilege::Implicit => false,
        };
        match request.access {
            Access::Execute => by_right && !(user && self.smep),
            // Without CR0.WP the supervisor writes to what is read-only.
            Access::Read | Access::Write => {
                (by_right || !self.write_protect) && (!user || !self.smap || open_to_supervisor)
            }
        }
    }

    /// Whether the rights of all levels together, and the page's key, allow the access.
    pub(crate) fn lets(&self, rights: Rights, key: u8, request: &Request) -> bool {
        self.allows(rights, request) && !self.key_forbids(key, rights, request)
    }

    /// Whether the page's key forbids writing to whoever heeds write protection.
    pub(crate) const fn key_protects(&self, key: u8, rights: Rights, pkru: u32) -> bool {
        self.keys && rights.user && pkru >> (2 * (key & 15) as u32) & 2 != 0
    }

    /// Whether the page's key forbids the access (APM vol. 2, 5.6.7): data accesses to user pages only.
    fn key_forbids(&self, key: u8, rights: Rights, request: &Request) -> bool {
        if !self.keys || !rights.user || request.access == Access::Execute {
            return false;
        }
        let bits = request.pkru >> (2 * u32::from(key & 15));
        let key = Key { access_disabled: bits & 1 != 0, write_disabled: bits & 2 != 0 };
        let writes_count = request.privilege == Privilege::User || self.write_protect;
        key.access_disabled || request.access == Access::Write && key.write_disabled && writes_count
    }
}

/// Translates one address as the guest's CPU would, and leaves the accessed and dirty bits behind that it would leave.
///
/// `cr3` is the register's value.
pub fn walk(mode: &Mode, cr3: u64, request: &Request, tables: &mut impl Tables) -> Result<Translation, Refused> {
    let Some(format) = mode.format else {
        let gpa = Gpa(request.linear & 0xffff_ffff);
        let steps = [Step::default(); MAX_LEVELS];
        return Ok(Translation {
            gpa,
            page_shift: 32,
            rights: Rights::ALL,
            key: 0,
            dirty: true,
            steps,
            top: 0,
            leaf: 0,
        });
    };
    for _ in 0..ATTEMPTS {
        if let Some(translation) = attempt(mode, format, cr3, request, tables)? {
            return Ok(translation);
        }
    }
    Err(Refused::Changing)
}

/// One walk; `None` if an entry changed before it was marked.
fn attempt(
    mode: &Mode,
    format: Format,
    cr3: u64,
    request: &Request,
    tables: &mut impl Tables,
) -> Result<Option<Translation>, Refused> {
    let (index_bits, width) = match format {
        Format::Legacy => (INDEX_BITS + 1, Width::Four),
        Format::Pae | Format::Long => (INDEX_BITS, Width::Eight),
    };
    let linear = if format == Format::Long { request.linear } else { request.linear & 0xffff_ffff };
    let mut rights = Rights::ALL;
    let mut steps = [Step::default(); MAX_LEVELS];
    let mut table = mode.root(cr3);
    let mut level = mode.levels;
    loop {
        let shift = PAGE_SHIFT + index_bits * (u32::from(level) - 1);
        let bytes = if width == Width::Four { 4 } else { 8 };
        let at = Gpa(table.0 + (linear >> shift & ((1 << index_bits) - 1)) * bytes);
        let entry = tables.read(at, width).ok_or(Refused::NoMemory { at })?;
        if entry & PRESENT == 0 {
            return Err(mode.fault(request, FaultCode::empty()));
        }
        let leaf = level == 1 || entry & LARGE != 0 && mode.large_levels & 1 << level != 0;
        if entry & mode.reserved[usize::from(level) - 1][usize::from(leaf)] != 0 {
            return Err(mode.fault(request, FaultCode::PRESENT | FaultCode::RESERVED));
        }
        // The four entries at the top of PAE hold no rights and no marks.
        let is_pointer = format == Format::Pae && level == 3;
        if !is_pointer {
            rights.user &= entry & USER != 0;
            rights.write &= entry & WRITABLE != 0;
            rights.execute &= entry & NO_EXECUTE == 0;
        }
        let key = if leaf && mode.keys { (entry >> 59) as u8 & 15 } else { 0 };
        let mut wanted = entry;
        if leaf {
            let forbidden = mode.key_forbids(key, rights, request);
            if forbidden || !mode.allows(rights, request) {
                let cause = if forbidden { FaultCode::PRESENT | FaultCode::KEY } else { FaultCode::PRESENT };
                return Err(mode.fault(request, cause));
            }
            if request.access == Access::Write {
                wanted |= DIRTY;
            }
        }
        if !is_pointer {
            // On the way down, as the CPU does: a walk that ends in a fault further below has used this entry.
            wanted |= ACCESSED;
        }
        let mut now = wanted;
        if wanted != entry {
            match tables.mark(at, width, entry, wanted) {
                Marked::Done => {}
                Marked::Changed => return Ok(None),
                Marked::ReadOnly => now = entry,
            }
        }
        steps[usize::from(level) - 1] = Step { at, entry: now };
        if !leaf {
            table = Gpa(entry & if width == Width::Four { 0xffff_f000 } else { FRAME });
            level -= 1;
            continue;
        }
        let offset = (1u64 << shift) - 1;
        let frame = if format == Format::Legacy && level == 2 {
            // PSE-36: bits 20:13 are address bits 39:32.
            entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
        } else {
            entry & FRAME & !offset
        };
        return Ok(Some(Translation {
            gpa: Gpa(frame | linear & offset),
            page_shift: shift as u8,
            rights,
            key,
            dirty: now & DIRTY != 0,
            steps,
            top: mode.levels,
            leaf: level,
        }));
    }
}
