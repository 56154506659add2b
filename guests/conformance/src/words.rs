//! Cases and outcomes in words.

use core::fmt::{self, Display, Formatter};

use crate::NO_FAULT;
use crate::outcome::{Outcome, Seen};
use crate::space::{Access, Case, Controls, Entry, Flush, Kind, Paging, Shot};

/// Its own name in a manual.
fn level_name(paging: Paging, level: u8) -> &'static str {
    match (paging, level) {
        (_, 1) => "PTE",
        (_, 2) => "PDE",
        (Paging::Pae | Paging::Legacy, _) => "PDPTE",
        (_, 3) => "PDPE",
        (_, 4) => "PML4E",
        _ => "PML5E",
    }
}

struct EntryWords(Entry);

impl Display for EntryWords {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        const NAMES: [(Entry, &str); 12] = [
            (Entry::PRESENT, "P"),
            (Entry::WRITABLE, "W"),
            (Entry::USER, "U"),
            (Entry::ACCESSED, "A"),
            (Entry::DIRTY, "D"),
            (Entry::LARGE, "PS"),
            (Entry::NO_EXECUTE, "NX"),
            (Entry::KEY, "key"),
            (Entry::HIGH, "reserved-high"),
            (Entry::LOW, "reserved-low"),
            (Entry::IGNORED, "ignored"),
            (Entry::OTHER, "other-page"),
        ];
        let mut between = "";
        for (bit, name) in NAMES {
            // What is not set is worth a word where it decides.
            let decides = Entry::OPEN.contains(bit);
            if self.0.contains(bit) || decides {
                write!(f, "{between}{}{name}", if self.0.contains(bit) { "" } else { "!" })?;
                between = " ";
            }
        }
        Ok(())
    }
}

impl Display for Controls {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        const NAMES: [(Controls, &str); 6] = [
            (Controls::WP, "WP"),
            (Controls::NXE, "NXE"),
            (Controls::SMEP, "SMEP"),
            (Controls::SMAP, "SMAP"),
            (Controls::PKE, "PKE"),
            (Controls::PSE, "PSE"),
        ];
        if self.is_empty() {
            return f.write_str("no control bits");
        }
        let mut between = "";
        for (bit, name) in NAMES {
            if self.contains(bit) {
                write!(f, "{between}{name}")?;
                between = " ";
            }
        }
        Ok(())
    }
}

impl Display for Access {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let whose = if self.user { "user" } else { "supervisor" };
        let what = match self.kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Update => "locked update",
            Kind::Fetch => "fetch",
            Kind::ReadDescriptor => "LAR (an implicit read)",
            Kind::MarkDescriptor => "MOV to GS (an implicit read and write)",
        };
        write!(f, "{whose} {what}{}", if self.ac { " with AC" } else { "" })
    }
}

impl Display for Shot {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.controls)?;
        if self.controls.contains(Controls::PKE) {
            write!(f, ", PKRU {:#x}", self.pkru())?;
        }
        let flush = match self.flush {
            Flush::None => "",
            Flush::Page => ", INVLPG",
            Flush::All => ", CR3 loaded",
        };
        write!(f, "{flush}; {}", self.access)
    }
}

impl Display for Case {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.paging.name())?;
        for level in (1..=self.paging.levels()).rev() {
            let entry = self.entries[usize::from(level) - 1];
            write!(f, ", {} {}", level_name(self.paging, level), EntryWords(entry))?;
        }
        write!(f, "; first: {}; then: ", self.shots[0])?;
        if let Some(change) = self.shots[1].change {
            write!(f, "{} becomes {}, ", level_name(self.paging, change.level), EntryWords(change.entry))?;
        }
        write!(f, "{}", self.shots[1])
    }
}

impl Seen {
    fn describe(&self, paging: Paging, f: &mut Formatter<'_>) -> fmt::Result {
        match self.vector {
            NO_FAULT => write!(f, "no fault, EAX {:#x}", self.value)?,
            14 => write!(f, "#PF {:#x} at {:#x}", self.error, self.cr2)?,
            vector => write!(f, "exception {vector} ({:#x})", self.error)?,
        }
        for (level, bits) in (1..).zip(self.changed).filter(|(_, bits)| *bits != 0) {
            let name = level_name(paging, level);
            match bits {
                0x20 => write!(f, ", {name} +A")?,
                0x40 => write!(f, ", {name} +D")?,
                0x60 => write!(f, ", {name} +A +D")?,
                _ => write!(f, ", {name} ^ {bits:#x}")?,
            }
        }
        let [[descriptor, word], [other, beside]] = self.memory;
        write!(f, ", memory {descriptor:x} {word:x} {other:x} {beside:x}")
    }
}

impl Outcome {
    /// Its words: they depend on the paging.
    #[must_use]
    pub fn in_words(&self, paging: Paging) -> impl Display {
        Words(*self, paging)
    }
}

struct Words(Outcome, Paging);

impl Display for Words {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(Outcome([first, second]), paging) = self;
        f.write_str("first ")?;
        first.describe(*paging, f)?;
        f.write_str("; then ")?;
        second.describe(*paging, f)
    }
}
