//! A guest's own page tables, walked as its CPU walks them (AMD APM vol. 2, chapter 5).
//!
//! Four formats: none, two levels of 32-bit entries (with 4 MiB pages), PAE, and long mode with four or five levels. A walk
//! checks, in the CPU's order, presence, reserved bits and rights, and reports a violation as the error code that #PF would
//! push. A walk that succeeds sets the accessed bits on its way and, for a write, the dirty bit of the leaf, by
//! compare-and-swap from the entry that was judged: if another vCPU has changed the entry since, the walk starts over,
//! and never marks an entry that it did not judge.
//!
//! Protection keys are looked at in long mode, for user pages (APM vol. 2, 5.6.7).

use super::{Bus, Exception, Stop};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const KEY_SHIFT: u32 = 59;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const CODE_PRESENT: u32 = 1 << 0;
const CODE_WRITE: u32 = 1 << 1;
const CODE_USER: u32 = 1 << 2;
const CODE_RESERVED: u32 = 1 << 3;
const CODE_FETCH: u32 = 1 << 4;
const CODE_KEY: u32 = 1 << 5;

/// How often a walk starts over because entries change under it.
const ATTEMPTS: usize = 16;
/// Levels of the deepest table.
const MAX_LEVELS: usize = 5;

/// What an address is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// The registers that say how a guest translates, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// RFLAGS: AC opens user pages to the supervisor.
    pub rflags: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// Physical address bits.
    pub physical_bits: u32,
    /// Rights by protection keys: two bits a key, no access and no write.
    pub pkru: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    /// 32-bit entries, ten index bits a level.
    Legacy,
    Pae,
    Long,
}

impl Paging {
    fn format(&self) -> Option<(Format, usize, u64)> {
        if self.cr0 & CR0_PG == 0 {
            None
        } else if self.efer & EFER_LMA != 0 {
            Some((Format::Long, if self.cr4 & CR4_LA57 != 0 { 5 } else { 4 }, self.cr3 & FRAME))
        } else if self.cr4 & CR4_PAE != 0 {
            Some((Format::Pae, 3, self.cr3 & 0xffff_ffe0))
        } else {
            Some((Format::Legacy, 2, self.cr3 & 0xffff_f000))
        }
    }

    fn user(&self) -> bool {
        self.cpl == 3
    }

    fn fault(&self, linear: u64, access: Access, cause: u32) -> Exception {
        let mut code = cause;
        if access == Access::Write {
            code |= CODE_WRITE;
        }
        if self.user() {
            code |= CODE_USER;
        }
        // The bit exists only where fetches are told apart (APM vol. 2, 8.4.2).
        if access == Access::Execute && (self.no_execute() || self.cr4 & CR4_SMEP != 0) {
            code |= CODE_FETCH;
        }
        Exception::PageFault { code, address: linear }
    }

    /// NX exists with PAE entries only.
    fn no_execute(&self) -> bool {
        self.efer & EFER_NXE != 0 && self.cr4 & CR4_PAE != 0
    }

    /// Bits that must be 0 in a present entry. `leaf`: it maps a page.
    fn reserved(&self, format: Format, level: usize, leaf: bool) -> u64 {
        let above = FRAME & !((1 << self.physical_bits.clamp(32, 52)) - 1);
        match format {
            // PSE-36: bits 20:13 are address bits 39:32 (5.2.2); bit 21 is none.
            Format::Legacy if leaf && level == 2 => 1 << 21,
            Format::Legacy => 0,
            // The four entries at the top are checked when CR3 is loaded (5.2.3), and hold no rights.
            Format::Pae if level == 3 => 0,
            Format::Pae | Format::Long => {
                let no_execute = if self.no_execute() { 0 } else { NO_EXECUTE };
                let offset = if leaf && level > 1 { (1 << (12 + 9 * (level - 1))) - (1 << 13) } else { 0 };
                let top = match format {
                    Format::Pae => 0x7ff << 52,
                    _ if level > 3 => LARGE,
                    _ => 0,
                };
                above | no_execute | offset | top
            }
        }
    }

    /// Whether `rights` (the bits that all levels have, NX if any has it) allow the access (APM vol. 2, 5.6).
    fn allows(&self, rights: Rights, access: Access) -> bool {
        let Rights { user, write, execute } = rights;
        if self.user() {
            return user
                && match access {
                    Access::Read => true,
                    Access::Write => write,
                    Access::Execute => execute,
                };
        }
        if access == Access::Execute {
            return execute && !(user && self.cr4 & CR4_SMEP != 0);
        }
        let closed = user && self.cr4 & CR4_SMAP != 0 && self.rflags & RFLAGS_AC == 0;
        !closed && (access == Access::Read || write || self.cr0 & CR0_WP == 0)
    }
}

impl Paging {
    /// Whether the key in a user page's entry forbids an access that its other bits allow. Fetches need no key, and writes
    /// of the supervisor heed it where they heed write protection.
    fn locked(&self, entry: u64, access: Access) -> bool {
        let rights = self.pkru >> (2 * (entry >> KEY_SHIFT & 0xf)) & 3;
        let guarded = access == Access::Write && (self.user() || self.cr0 & CR0_WP != 0);
        self.cr4 & CR4_PKE != 0 && access != Access::Execute && (rights & 1 != 0 || rights & 2 != 0 && guarded)
    }
}

#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    write: bool,
    execute: bool,
}

/// Translates a linear address for an access that lies in one page.
pub(super) fn translate(bus: &mut impl Bus, paging: &Paging, linear: u64, access: Access) -> Result<u64, Stop> {
    let Some((format, levels, root)) = paging.format() else { return Ok(linear & 0xffff_ffff) };
    for _ in 0..ATTEMPTS {
        if let Some(gpa) = attempt(bus, paging, format, levels, root, linear, access)? {
            return Ok(gpa);
        }
    }
    Err(Stop::Again)
}

/// One walk; `None` if an entry changed before it was marked.
fn attempt(
    bus: &mut impl Bus,
    paging: &Paging,
    format: Format,
    levels: usize,
    root: u64,
    linear: u64,
    access: Access,
) -> Result<Option<u64>, Stop> {
    let linear = if format == Format::Long { linear } else { linear & 0xffff_ffff };
    let (index_bits, bytes) = if format == Format::Legacy { (10, 4) } else { (9, 8) };
    let mut rights = Rights { user: true, write: true, execute: true };
    let mut seen = [(0, 0); MAX_LEVELS];
    let mut table = root;
    for level in (1..=levels).rev() {
        let shift = 12 + index_bits * (level - 1);
        let at = table + (linear >> shift & ((1 << index_bits) - 1)) * bytes;
        let mut raw = [0; 8];
        if !bus.read_ram(at, &mut raw[..bytes as usize]) {
            return Err(Stop::Unsupported);
        }
        let entry = u64::from_le_bytes(raw);
        if entry & PRESENT == 0 {
            return Err(paging.fault(linear, access, 0).into());
        }
        let large = match format {
            Format::Legacy => level == 2 && entry & LARGE != 0 && paging.cr4 & CR4_PSE != 0,
            Format::Pae => level == 2 && entry & LARGE != 0,
            Format::Long => (2..=3).contains(&level) && entry & LARGE != 0,
        };
        let leaf = level == 1 || large;
        if entry & paging.reserved(format, level, leaf) != 0 {
            return Err(paging.fault(linear, access, CODE_PRESENT | CODE_RESERVED).into());
        }
        seen[level - 1] = (at, entry);
        if !(format == Format::Pae && level == 3) {
            rights.user &= entry & USER != 0;
            rights.write &= entry & WRITABLE != 0;
            rights.execute &= entry & NO_EXECUTE == 0;
        }
        if !leaf {
            table = entry & FRAME;
            continue;
        }
        if !paging.allows(rights, access) {
            return Err(paging.fault(linear, access, CODE_PRESENT).into());
        }
        if format == Format::Long && rights.user && paging.locked(entry, access) {
            return Err(paging.fault(linear, access, CODE_PRESENT | CODE_KEY).into());
        }
        for (index, &(at, entry)) in seen[..levels].iter().enumerate().skip(level - 1) {
            let dirty = if index + 1 == level && access == Access::Write { DIRTY } else { 0 };
            let marked = entry | ACCESSED | dirty;
            let marks = !(format == Format::Pae && index == 2);
            if marks && marked != entry && !bus.compare_exchange(at, bytes as usize, entry, marked)? {
                return Ok(None);
            }
        }
        let offset = (1u64 << shift) - 1;
        let frame = if format == Format::Legacy && large {
            entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
        } else {
            entry & FRAME & !offset
        };
        return Ok(Some(frame | linear & offset));
    }
    Err(Stop::Unsupported)
}
