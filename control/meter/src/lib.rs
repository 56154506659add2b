//! The meter: how a measuring guest has things done to its memory from outside, and learns what they cost.
//!
//! # Protocol
//! Whoever runs the guest gives it one memslot beside its RAM: [`BASE`], as many pages as the guest's command line says.
//! It is there when the guest starts. The guest writes an [`Operation`]'s number to [`PORT`], 32 bits wide; the operation
//! is carried out before the instruction ends. Then four 32-bit ports tell of the last operation: its cost in ticks of the
//! time stamp counter, low and high half at [`PORT`] and [`TICKS_HIGH`]; how many pages it met at [`COUNT`]; and whether
//! it was carried out at all at [`STATE`] ([`DONE`], or [`NOT_HERE`] where whoever runs the guest does not have it).
//!
//! Costs that the guest sees itself, of faults and exits, it measures itself. With an emulator that counts instructions,
//! a tick is an instruction, for whoever reads the counter.
//!
//! What it found the guest prints, a line a figure: [`LINE`], the figure's name, how often, ticks in all.
#![no_std]

/// First port of the meter: written, an operation; read, the low half of its cost.
pub const PORT: u16 = 0xbe0;
/// Read: the high half of the last operation's cost.
pub const TICKS_HIGH: u16 = PORT + 4;
/// Read: how many pages the last operation met.
pub const COUNT: u16 = PORT + 8;
/// Read: what became of the last operation.
pub const STATE: u16 = PORT + 12;
/// Ports of the meter.
pub const PORTS: core::ops::Range<u16> = PORT..PORT + 16;

/// The last operation was carried out.
pub const DONE: u32 = 1;
/// There is no such operation here.
pub const NOT_HERE: u32 = 0;

/// Where the slot begins, in bytes of guest-physical memory.
pub const BASE: u64 = 256 << 20;
/// The most pages it may have: 256 MiB.
pub const MAX_PAGES: u32 = 1 << 16;

/// A word on the guest's command line: measure what large pages cost, and nothing else.
pub const LARGE_PAGES: &str = "large";
/// The other word in its place.
pub const SMALL_PAGES: &str = "small";

/// How a line with a figure begins. The rest: a name, a count, ticks; decimal, a space between.
pub const LINE: &str = "meter:";
/// The guest's line when all is measured.
pub const END: &str = "meter: end";

/// What can be done to the slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Operation {
    /// Nothing: what asking costs.
    Nothing = 0,
    /// Adds the slot again that was deleted.
    Add,
    /// Deletes it, and with it all its mappings.
    Delete,
    /// Gives each of its pages a frame of the host, without mapping it.
    Populate,
    /// Takes its memory away for a moment: an invalidation of all its pages, as for a host that moves them.
    Invalidate,
    /// Begins to log which pages are written.
    LogStart,
    /// As [`Operation::LogStart`], with all pages counted as written already.
    LogStartAllSet,
    /// Reads the log and begins anew.
    Harvest,
    /// Stops logging.
    LogStop,
    /// Looks which pages were used since the last look, and forgets it.
    Age,
    /// Zaps everything.
    ZapAll,
    /// Nothing; what is to be looked at closely begins here, or ends.
    Mark,
    /// Splits the large pages that map it.
    Split,
    /// Makes large pages of its small ones.
    Collapse,
    /// Nothing; [`COUNT`] says how many pages of 4 KiB all tables that map guests' memory take.
    Tables,
    /// Turns a vCPU to a root of another kind and back, again and again; [`COUNT`] says how often it turned.
    SwitchRoot,
    /// Nothing; the cost is that part of the last [`Operation::ZapAll`] in which nobody else could map anything.
    ZapAllFront,
    /// Nothing; [`COUNT`] says how often the vCPU that asks has left its guest so far.
    Exits,
    /// Nothing; [`COUNT`] says how many bytes whoever runs this has in use beside frames of guests' memory and of the tables
    /// that map it: books about both, and whatever else it keeps.
    Books,
}

impl Operation {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 19] = [
        Self::Nothing,
        Self::Add,
        Self::Delete,
        Self::Populate,
        Self::Invalidate,
        Self::LogStart,
        Self::LogStartAllSet,
        Self::Harvest,
        Self::LogStop,
        Self::Age,
        Self::ZapAll,
        Self::Mark,
        Self::Split,
        Self::Collapse,
        Self::Tables,
        Self::SwitchRoot,
        Self::ZapAllFront,
        Self::Exits,
        Self::Books,
    ];

    /// The operation of this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u32 == number)
    }
}

/// A figure as the guest prints it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Figure<'a> {
    /// What was measured.
    pub name: &'a str,
    /// How often it was done, or on how many pages.
    pub count: u64,
    /// What all of it cost.
    pub ticks: u64,
}

impl<'a> Figure<'a> {
    /// Reads a line of the guest's console; `None` if it holds no figure.
    #[must_use]
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.trim().strip_prefix(LINE)?.split_ascii_whitespace();
        let figure =
            Self { name: words.next()?, count: words.next()?.parse().ok()?, ticks: words.next()?.parse().ok()? };
        words.next().is_none().then_some(figure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_name_operations() {
        for (number, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(Operation::from_number(number as u32), Some(operation));
        }
        assert_eq!(Operation::from_number(Operation::ALL.len() as u32), None);
    }

    #[test]
    fn figures_are_read_and_nothing_else() {
        let figure = Figure { name: "write_fault", count: 4096, ticks: 123_456_789_012 };
        assert_eq!(Figure::parse("meter: write_fault 4096 123456789012\r\n"), Some(figure));
        for other in ["", END, "meter: a 1", "meter: a 1 x", "meter: a 1 2 3", "write_fault 4096 1", "meter: a -1 2"] {
            assert_eq!(Figure::parse(other), None, "{other}");
        }
    }
}
