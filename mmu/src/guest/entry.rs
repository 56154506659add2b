//! What one entry of a guest's tables means, apart from any walk: for whoever keeps what was made of it, and wants to
//! know whether it would be made of it again.

use super::Rights;
use super::mode::{Format, LARGE, Mode, NO_EXECUTE};
use super::walk::{ACCESSED, DIRTY, FRAME, PRESENT, USER, WRITABLE};
use crate::addr::{Gfn, Gpa, INDEX_BITS, PAGE_SHIFT};

/// An entry, judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Judged {
    /// Leads nowhere: not present, a reserved bit is set, or no CPU has used it since its accessed bit was cleared. Each
    /// of these needs a walk before anything is made of it.
    Nothing,
    /// Leads to a table.
    Table { gfn: Gfn, rights: Rights },
    /// Maps a page, large or not, from `gfn` on.
    Page { gfn: Gfn, rights: Rights, key: u8, dirty: bool },
}

impl Mode {
    /// Of a present entry of a table of level 1: the bits of the frame's address, and those that must be 0.
    pub(crate) fn bits_of_leaves(&self) -> (u64, u64) {
        let frame = if self.format == Some(Format::Legacy) { 0xffff_f000 } else { FRAME };
        (frame, self.reserved[0][1])
    }

    /// Whether entries have protection keys.
    pub(crate) const fn has_keys(&self) -> bool {
        self.keys
    }

    /// Judges an entry of a table of `level`.
    pub(crate) fn judge(&self, level: u8, entry: u64) -> Judged {
        let Some(format) = self.format else { return Judged::Nothing };
        let leaf = level == 1 || entry & LARGE != 0 && self.large_levels & 1 << level != 0;
        if entry & PRESENT == 0 || entry & self.reserved[usize::from(level) - 1][usize::from(leaf)] != 0 {
            return Judged::Nothing;
        }
        // The four entries at the top of PAE hold no rights and no marks.
        if format == Format::Pae && level == 3 {
            return Judged::Table { gfn: Gpa(entry & FRAME).gfn(), rights: Rights::ALL };
        }
        if entry & ACCESSED == 0 {
            return Judged::Nothing;
        }
        let rights = Rights {
            user: entry & USER != 0,
            write: entry & WRITABLE != 0,
            execute: format == Format::Legacy || entry & NO_EXECUTE == 0,
        };
        let frame = match format {
            // PSE-36: bits 20:13 of a 4 MiB page are address bits 39:32.
            Format::Legacy if leaf && level == 2 => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
            Format::Legacy => entry & 0xffff_f000,
            Format::Pae | Format::Long if leaf => {
                entry & FRAME & !((1 << (PAGE_SHIFT + INDEX_BITS * (u32::from(level) - 1))) - 1)
            }
            Format::Pae | Format::Long => entry & FRAME,
        };
        let gfn = Gpa(frame).gfn();
        if !leaf {
            return Judged::Table { gfn, rights };
        }
        let key = if self.keys { (entry >> 59) as u8 & 15 } else { 0 };
        Judged::Page { gfn, rights, key, dirty: entry & DIRTY != 0 }
    }
}
