//! Measuring what memory management, exits and emulation cost: the guest's half of `nestling-meter`.
//!
//! Runs on one processor with interrupts off. The slot is mapped by 4 KiB pages of this kernel's own, so that the same
//! image tells of shadow paging what there is to tell. Each figure is one line; the command that started the run knows
//! what they mean.

use core::sync::atomic::{AtomicU64, Ordering};

use nestling_meter::{
    BASE, COUNT, DONE, END, LARGE_PAGES, LINE, MAX_PAGES, NOT_HERE, Operation, PORT, STATE, TICKS_HIGH,
};

use crate::cpu::{self, inl, outb, outl, rdtsc};
use crate::{check, machine, serial};

const PAGE: u64 = 4096;
/// How often an exit is taken for its figure.
const EXITS: u64 = 1000;
/// The serial port's scratch register: a device's, and nothing comes of it.
const SCRATCH: u16 = 0x3ff;
/// Entries of a table.
const ENTRIES: usize = 512;

/// Tables that are written before the reload that has to look at all of them.
const UNSYNC_TABLES: usize = 8;

const ACCESSED_DIRTY_WRITABLE_PRESENT: u64 = 0x63;

#[repr(align(4096))]
struct Table([AtomicU64; ENTRIES]);

/// One table for each 2 MiB that the slot may have.
static TABLES: [Table; MAX_PAGES as usize / ENTRIES] =
    [const { Table([const { AtomicU64::new(0) }; ENTRIES]) }; MAX_PAGES as usize / ENTRIES];

unsafe extern "C" {
    /// The boot code's directories of 2 MiB pages, for the first 4 GiB.
    static directories: [AtomicU64; 4 * ENTRIES];
}

/// Measures everything. `words`: the command line behind the kernel's name and this check's: pages, how whoever runs this
/// maps them, and the figure to be marked.
pub(crate) fn run<'a>(mut words: impl Iterator<Item = &'a str>) {
    let pages = words.next().and_then(|word| word.parse::<u32>().ok()).unwrap_or(0);
    check!((1..=MAX_PAGES).contains(&pages), "the second word is the number of pages, 1 to {MAX_PAGES}");
    let large = words.next() == Some(LARGE_PAGES);
    let slot = Slot { pages: u64::from(pages), marked: words.next().unwrap_or("") };
    slot.map();
    if large {
        slot.large();
        serial::print(format_args!("{END}\n"));
        return;
    }
    slot.faults();
    slot.dirty_log();
    slot.invalidation();
    slot.translations();
    slot.exits();
    // For whoever runs the guest to measure its end with all of the slot mapped.
    slot.write();
    serial::print(format_args!("{END}\n"));
}

/// Ticks that some work takes, less what looking at the clock takes.
fn ticks(work: impl FnOnce()) -> u64 {
    let (start, nothing) = (rdtsc(), rdtsc());
    work();
    (rdtsc() - nothing).saturating_sub(nothing - start)
}

/// What came of an operation: its cost and the pages it met; `None` if whoever runs this does not have it.
fn ask(operation: Operation) -> Option<(u64, u64)> {
    outl(PORT, operation as u32);
    let state = inl(STATE);
    check!(state == DONE || state == NOT_HERE, "no meter: the state is {state:#x} after {operation:?}");
    let ticks = u64::from(inl(TICKS_HIGH)) << 32 | u64::from(inl(PORT));
    (state == DONE).then(|| (ticks, u64::from(inl(COUNT))))
}

/// Has an operation done that everybody has.
fn must(operation: Operation) -> (u64, u64) {
    let done = ask(operation);
    check!(done.is_some(), "{operation:?} is not there");
    done.unwrap_or_default()
}

/// Prints a figure, if there is one.
fn print(name: &str, count: u64, ticks: Option<u64>) {
    if let Some(ticks) = ticks {
        serial::print(format_args!("{LINE} {name} {count} {ticks}\n"));
    }
}

struct Slot<'a> {
    pages: u64,
    /// The figure whose work is to be looked at closely.
    marked: &'a str,
}

impl Slot<'_> {
    fn count(&self) -> u64 {
        self.pages
    }

    /// Prints a figure: so often, by work that says its ticks.
    fn tell(&self, name: &str, count: u64, work: impl FnOnce() -> u64) {
        self.tell_if(name, count, || Some(work()));
    }

    /// As [`Slot::tell`], unless the work could not be done.
    fn tell_if(&self, name: &str, count: u64, work: impl FnOnce() -> Option<u64>) {
        print(name, count, self.between_marks(name, work));
    }

    /// Does a figure's work, marked if it is to be looked at closely.
    fn between_marks<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        let mark = || {
            if name == self.marked {
                ask(Operation::Mark);
            }
        };
        mark();
        let done = work();
        mark();
        done
    }

    /// Maps the slot by 4 KiB pages in place of the boot code's large ones.
    fn map(&self) {
        let block = PAGE * ENTRIES as u64;
        for (index, table) in TABLES[..self.pages.div_ceil(ENTRIES as u64) as usize].iter().enumerate() {
            let start = BASE + index as u64 * block;
            for (entry, page) in table.0.iter().zip((start..).step_by(PAGE as usize)) {
                entry.store(page | ACCESSED_DIRTY_WRITABLE_PRESENT, Ordering::SeqCst);
            }
            let address = core::ptr::from_ref(table).expose_provenance() as u64;
            // SAFETY: the boot code's table, which nobody else changes; what it maps is this slot either way.
            unsafe { directories[(start / block) as usize].store(address | 7, Ordering::SeqCst) };
        }
        cpu::reload_cr3();
    }

    /// Writes one word of each page.
    fn write(&self) {
        for page in (BASE..).step_by(PAGE as usize).take(self.pages as usize) {
            machine::set_word(page, page as u32);
        }
    }

    fn faults(&self) {
        self.tell("slot_delete_empty", 1, || must(Operation::Delete).0);
        let books = || ask(Operation::Books).map(|(_, bytes)| bytes);
        let without = books();
        must(Operation::Add);
        must(Operation::Populate);
        let tables = || ask(Operation::Tables).map(|(_, pages)| pages * PAGE);
        let before = tables();
        let mut after = None;
        self.tell("write_fault", self.count(), || {
            let ticks = ticks(|| self.write());
            // Before anything is printed: that may be the first use of a page as well.
            after = tables();
            ticks
        });
        self.tell_if("table_bytes", self.count(), || Some(after? - before?));
        self.tell_if("book_bytes", self.count(), || Some(books()?.saturating_sub(without?)));
        self.tell("write_again", self.count(), || ticks(|| self.write()));
        self.tell("slot_delete", self.count(), || must(Operation::Delete).0);
        must(Operation::Add);
        must(Operation::Populate);
    }

    fn dirty_log(&self) {
        self.write();
        if ask(Operation::LogStart).is_none() {
            return;
        }
        must(Operation::LogStop);
        self.write();
        let harvest = |expected: u64| {
            let (ticks, dirty) = must(Operation::Harvest);
            check!(dirty == expected, "{dirty} pages are dirty of {expected} that were written");
            ticks
        };
        self.tell("dirty_enable", self.count(), || must(Operation::LogStart).0);
        self.tell("dirty_write_fault", self.count(), || ticks(|| self.write()));
        self.tell("dirty_harvest", self.count(), || harvest(self.count()));
        self.tell("dirty_harvest_clean", self.count(), || harvest(0));
        self.write();
        self.tell("dirty_disable", self.count(), || must(Operation::LogStop).0);
        self.write();
        self.optional("dirty_enable_all_set", 1, Operation::LogStartAllSet);
        must(Operation::LogStop);
        self.write();
        self.optional("age", self.count(), Operation::Age);
    }

    /// A figure of an operation that not everybody has.
    fn optional(&self, name: &str, count: u64, operation: Operation) {
        self.tell_if(name, count, || ask(operation).map(|(ticks, _)| ticks));
    }

    /// What touches the guest's own tables: nothing for nested paging, a lot for shadow paging.
    fn translations(&self) {
        self.write();
        let invalidate = || (BASE..).step_by(PAGE as usize).take(self.pages as usize).for_each(cpu::invlpg);
        self.tell("invlpg", self.count(), || ticks(invalidate));
        self.write();
        self.tell("cr3_reload", EXITS, || ticks(|| (0..EXITS).for_each(|_| cpu::reload_cr3())));
        self.write();
        // Entries are written as they are: whoever shadows these tables has to find that out.
        let tables = &TABLES[..(self.pages as usize / ENTRIES).min(UNSYNC_TABLES)];
        for entry in tables.iter().flat_map(|table| &table.0) {
            entry.store(entry.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        self.tell("cr3_reload_unsync", tables.len() as u64, || ticks(cpu::reload_cr3));
    }

    /// What large pages cost, where whoever runs this has them.
    fn large(&self) {
        let blocks = self.count().div_ceil(ENTRIES as u64);
        must(Operation::Delete);
        must(Operation::Add);
        must(Operation::Populate);
        let touch =
            || (BASE..).step_by(PAGE as usize * ENTRIES).take(blocks as usize).for_each(|at| machine::set_word(at, 1));
        self.tell("fault_2m", blocks, || ticks(touch));
        self.write();
        self.optional("split_2m", blocks, Operation::Split);
        self.write();
        self.optional("collapse_2m", blocks, Operation::Collapse);
    }

    fn invalidation(&self) {
        self.write();
        self.tell("host_invalidate", self.count(), || must(Operation::Invalidate).0);
        must(Operation::Populate);
        self.write();
        let all = self.between_marks("zap_all", || ask(Operation::ZapAll)).map(|(ticks, _)| ticks);
        let front = ask(Operation::ZapAllFront).map(|(ticks, _)| ticks);
        print("zap_all", self.count(), all);
        print("zap_all_front", 1, front);
        print("zap_all_back", self.count(), all.zip(front).map(|(all, front)| all - front));
        if let Some((ticks, turns)) = self.between_marks("root_switch", || ask(Operation::SwitchRoot)) {
            print("root_switch", turns.max(1), Some(ticks));
        }
    }

    /// What leaving the guest costs.
    fn exits(&self) {
        self.tell("nothing", 1, || must(Operation::Nothing).0);
        let exit = || _ = core::arch::x86_64::__cpuid(0);
        self.tell("cpuid_exit", EXITS, || ticks(|| (0..EXITS).for_each(|_| exit())));
        self.tell("port_write", EXITS, || ticks(|| (0..EXITS).for_each(|_| outb(SCRATCH, 0))));
        let read = || _ = core::hint::black_box(machine::word(machine::TEST_RAM));
        self.tell("mmio_read", EXITS, || ticks(|| (0..EXITS).for_each(|_| read())));
    }
}
