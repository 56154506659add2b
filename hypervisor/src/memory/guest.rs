//! Guest RAM: which host frame stands behind which guest frame.
//!
//! RAM is taken from the frame allocator when the guest first touches it, in chunks of the size that the operator
//! allows to be mapped: 2 MiB, 1 GiB (where the whole GiB is this guest's RAM; else 2 MiB), or 4 KiB. It is given back
//! when the VM ends; until then [`super::relocate`] may move it, or take pages away and keep their content.
//!
//! One word a chunk says where it is. Resolving a frame whose chunk exists is one load; nobody takes a lock. Two vCPUs
//! that miss the same chunk both allocate and clear one, and a compare-and-swap decides; the loser gives its own back.
//! That is safe because nobody else has seen it. With blocks of 1 GiB clearing twice would be felt, and a
//! block needs its whole GiB: then a lock is taken.
//!
//! # The life of a word
//! ```text
//!   0 ──► present ──► busy ──► present, elsewhere      a page's word (of a 4 KiB chunk, or in a broken chunk)
//!   ▲        ▲         │ └───► taken ──► busy ──► present
//!   └────────┼─────────┘
//!   0 ──► present ──► busy ──► present, elsewhere      a word of a 2 MiB chunk
//!   └──► broken ──► present, elsewhere
//! ```
//! - *Busy* belongs to whoever made it so; others look again. It is short: a copy, never a wait for a lock.
//! - A *taken* page is brought back by whoever needs it, alone: taken → busy → present.
//! - A *broken* chunk has a table of 512 words, one a page. The table stays when the chunk is whole again, because a reader
//!   may be on its way to it; its words are busy then, which sends such a reader back to the chunk's word.
//! - What was present ceases to be so only inside an invalidation of its frames ([`nestling::Worker::invalidate`]), and when
//!   nobody in the hypervisor has it pinned ([`super::pins`]). A fault may carry an older answer of
//!   [`GuestRam::resolve`] into the lock; there it finds that it was overtaken.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::asm;
use core::hint::spin_loop;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use nestling::format::MemoryType;
use nestling::host::{Access, BackingError, Extent};
use nestling::{Gfn, GfnRange, Gpa, Hfn, Hpa, OutOfMemory};
use spin::Mutex;

use super::frames::{self, FRAME};
use super::kept::{Kept, PAGE};
use super::pins::{Pin, Pins};
use crate::guest::{GuestMemory, GuestMemoryError};
use crate::seams;

pub(super) const ORDER_2M: u32 = 9;
const ORDER_1G: u32 = 18;
/// Chunks of 2 MiB in one of 1 GiB.
const CHUNKS_1G: usize = 1 << (ORDER_1G - ORDER_2M);
/// Pages of a 2 MiB chunk.
pub(super) const PAGES_2M: usize = 1 << ORDER_2M;

/// It exists; the rest of the word is its address.
pub(super) const PRESENT: u64 = 1;
/// The chunk is a part of a block of 1 GiB.
pub(super) const GIANT: u64 = 2;
/// Each page of the chunk has a word of its own.
pub(super) const BROKEN: u64 = 4;
/// The page's content is kept: the rest of the word is [`Kept::into_word`]'s.
pub(super) const TAKEN: u64 = 8;
/// Somebody is changing it.
pub(super) const BUSY: u64 = 16;
const FLAGS: u64 = 63;

/// The address in a word with any of the flags.
pub(super) const fn address(word: u64) -> u64 {
    word & !FLAGS
}

/// The size in which RAM is taken from the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChunkSize {
    /// 4 KiB.
    K4,
    /// 2 MiB.
    M2,
    /// 1 GiB where it fits, else 2 MiB.
    G1,
}

/// The words of a broken chunk's pages.
#[derive(Debug)]
pub(super) struct PageTable(pub(super) [AtomicU64; PAGES_2M]);

/// One contiguous range of guest RAM.
#[derive(Debug)]
pub(super) struct Bank {
    pub(super) range: GfnRange,
    /// Number of the first chunk: chunks are aligned in the guest's address space.
    first: u64,
    chunks: Box<[AtomicU64]>,
    /// A table for each 2 MiB chunk that was ever broken.
    tables: Box<[AtomicPtr<PageTable>]>,
}

impl Bank {
    fn new(range: GfnRange, order: u32) -> Result<Self, OutOfMemory> {
        let first = range.start.0 >> order;
        let count = (((range.end.0 - 1) >> order) + 1 - first) as usize;
        let chunks = table_of(count, || AtomicU64::new(0))?;
        let tables = if order == 0 { 0 } else { count };
        Ok(Self { range, first, chunks, tables: table_of(tables, || AtomicPtr::new(ptr::null_mut()))? })
    }

    /// A chunk's word.
    pub(super) fn chunk(&self, index: usize) -> &AtomicU64 {
        &self.chunks[index]
    }

    /// The table of a chunk's pages, if it has one.
    pub(super) fn table(&self, index: usize) -> Option<&PageTable> {
        let table = self.tables.get(index)?.load(Ordering::Acquire);
        // SAFETY: tables come from a box and are freed with the bank.
        unsafe { table.as_ref() }
    }

    /// As [`Bank::table`]; made if there is none.
    pub(super) fn make_table(&self, index: usize) -> Result<&PageTable, OutOfMemory> {
        if let Some(table) = self.table(index) {
            return Ok(table);
        }
        let mut words = Vec::new();
        words.try_reserve_exact(1)?;
        words.push(PageTable([const { AtomicU64::new(0) }; PAGES_2M]));
        let new = Box::into_raw(words.into_boxed_slice()).cast::<PageTable>();
        let place = &self.tables[index];
        match place.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just published, and freed with the bank.
            Ok(_) => Ok(unsafe { &*new }),
            Err(other) => {
                // SAFETY: nobody has seen the new one; the other one is published, and freed with the bank.
                unsafe {
                    drop(Box::from_raw(new));
                    Ok(&*other)
                }
            }
        }
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        for table in self.tables.iter_mut().map(|table| *table.get_mut()).filter(|table| !table.is_null()) {
            // SAFETY: it came from a box, and nobody else can have the bank any more.
            drop(unsafe { Box::from_raw(table) });
        }
    }
}

fn table_of<T>(count: usize, make: impl FnMut() -> T) -> Result<Box<[T]>, OutOfMemory> {
    let mut items = Vec::new();
    items.try_reserve_exact(count)?;
    items.resize_with(count, make);
    Ok(items.into_boxed_slice())
}

/// The word that says where a frame is, as it was when it was looked up.
pub(super) struct Found<'a> {
    pub(super) cell: &'a AtomicU64,
    pub(super) word: u64,
    /// Of what the word stands for.
    pub(super) order: u32,
}

/// All RAM of one guest. Its banks are numbered from 0; a memslot's `backing` is that number.
#[derive(Debug)]
pub struct GuestRam {
    banks: Vec<Bank>,
    pub(super) order: u32,
    /// The bits of an address that are inside a chunk.
    offset_mask: u64,
    giant: bool,
    giants: Mutex<()>,
    pub(super) pins: Pins,
    /// One relocation at a time.
    pub(super) relocation: Mutex<()>,
}

/// Frames behind all guests' RAM now.
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// Host frames that guests have now.
#[must_use]
pub fn frames_in_use() -> u64 {
    FRAMES.load(Ordering::Relaxed)
}

/// Takes a block for a guest.
pub(super) fn take_block(order: u32) -> Option<u64> {
    let block = frames::alloc(order)?;
    FRAMES.fetch_add(1 << order, Ordering::Relaxed);
    Some(block)
}

/// Gives a guest's block back.
pub(super) fn give_block(block: u64, order: u32) {
    frames::free(block, order);
    FRAMES.fetch_sub(1 << order, Ordering::Relaxed);
}

impl GuestRam {
    /// RAM at these ranges, none of it allocated yet.
    ///
    /// # Errors
    /// No memory for the tables of chunks.
    pub fn new(ranges: &[GfnRange], size: ChunkSize) -> Result<Self, OutOfMemory> {
        let order = if size == ChunkSize::K4 { 0 } else { ORDER_2M };
        let banks = ranges.iter().map(|&range| Bank::new(range, order)).collect::<Result<Vec<_>, _>>()?;
        let giant = size == ChunkSize::G1;
        let offset_mask = (FRAME << order) - 1;
        Ok(Self {
            banks,
            order,
            offset_mask,
            giant,
            giants: Mutex::new(()),
            pins: Pins::new(),
            relocation: Mutex::new(()),
        })
    }

    /// The banks' ranges, in the order of their numbers.
    pub fn ranges(&self) -> impl Iterator<Item = GfnRange> + '_ {
        self.banks.iter().map(|bank| bank.range)
    }

    /// Whether a guest frame is RAM.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.bank(gfn).is_some()
    }

    /// The bank that holds a frame.
    pub(super) fn bank(&self, gfn: Gfn) -> Option<&Bank> {
        self.banks.iter().find(|bank| bank.range.contains(gfn))
    }

    /// The place of a frame's chunk among its bank's.
    pub(super) fn index(&self, bank: &Bank, gfn: Gfn) -> usize {
        ((gfn.0 >> self.order) - bank.first) as usize
    }

    /// The word of a frame of `bank`: its page's if its chunk is broken, else its chunk's.
    pub(super) fn find<'a>(&self, bank: &'a Bank, gfn: Gfn) -> Found<'a> {
        let index = self.index(bank, gfn);
        let (cell, order) = (&bank.chunks[index], self.order);
        let word = cell.load(Ordering::Acquire);
        match bank.table(index) {
            Some(table) if word & BROKEN != 0 => {
                let cell = &table.0[gfn.0 as usize % PAGES_2M];
                Found { cell, word: cell.load(Ordering::Acquire), order: 0 }
            }
            _ => Found { cell, word, order },
        }
    }

    /// What stands behind a frame of a bank; allocated or brought back now if nothing does.
    ///
    /// # Errors
    /// The host has no memory, or the bank does not have this frame.
    #[inline]
    pub fn resolve(&self, bank: u64, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let bank = self.banks.get(bank as usize).filter(|b| b.range.contains(gfn)).ok_or(BackingError::NotBacked)?;
        let word = bank.chunks[self.index(bank, gfn)].load(Ordering::Acquire);
        if word & PRESENT != 0 { Ok(self.extent(gfn, word, self.order)) } else { self.resolve_absent(bank, gfn) }
    }

    /// The host frame of a frame of a bank, where its chunk's word tells.
    #[inline]
    pub(super) fn frame_at_hand(&self, bank: u64, gfn: Gfn) -> Option<Hfn> {
        let bank = self.banks.get(bank as usize).filter(|b| b.range.contains(gfn))?;
        let word = bank.chunks.get(self.index(bank, gfn))?.load(Ordering::Acquire);
        // A part of a block of 1 GiB has its own address in its word, as any other chunk.
        let inside = gfn.0 & ((1 << self.order) - 1);
        (word & PRESENT != 0).then(|| Hfn(Hpa(address(word)).hfn().0 + inside))
    }

    /// The run that a present word stands for.
    #[inline]
    fn extent(&self, gfn: Gfn, word: u64, order: u32) -> Extent {
        let (order, address) = if word & GIANT != 0 {
            let inside = (gfn.0 >> ORDER_2M << ORDER_2M) % (1 << ORDER_1G);
            (ORDER_1G, address(word) - inside * FRAME)
        } else {
            (order, address(word))
        };
        let start = Gfn(gfn.0 >> order << order);
        Extent {
            gfns: GfnRange { start, end: Gfn(start.0 + (1 << order)) },
            hfn: Hpa(address).hfn(),
            writable: true,
            memory: MemoryType::WriteBack,
        }
    }

    /// As [`GuestRam::resolve`] where the chunk's word alone does not tell.
    #[cold]
    fn resolve_absent(&self, bank: &Bank, gfn: Gfn) -> Result<Extent, BackingError> {
        loop {
            let Found { cell, word, order } = self.find(bank, gfn);
            if word & PRESENT != 0 {
                return Ok(self.extent(gfn, word, order));
            } else if word & TAKEN != 0 {
                bring_back(cell, word)?;
            } else if word & (BUSY | BROKEN) != 0 {
                // Whoever made it busy holds no lock that this caller could have, and waits for nobody. Broken: the chunk
                // became so behind the look for its table.
                spin_loop();
            } else if order == 0 {
                populate(cell, 0)?;
            } else {
                self.populate_chunk(bank, cell, gfn)?;
            }
        }
    }

    /// Gives a 2 MiB chunk its memory: a block; or a table, to be filled page by page, where no block is left.
    fn populate_chunk(&self, bank: &Bank, chunk: &AtomicU64, gfn: Gfn) -> Result<(), BackingError> {
        // With 1 GiB blocks every chunk is made under the lock: a block needs all its chunks to be without memory still.
        let one_at_a_time = self.giant.then(|| self.giants.lock());
        if one_at_a_time.is_some()
            && (chunk.load(Ordering::Acquire) != 0 || self.populate_giant(bank, gfn.0 >> ORDER_2M))
        {
            return Ok(());
        }
        if populate(chunk, ORDER_2M).is_ok() {
            return Ok(());
        }
        bank.make_table(self.index(bank, gfn)).map_err(|OutOfMemory| BackingError::OutOfMemory)?;
        // Losing means that somebody else has given it memory, or a table.
        let _ = chunk.compare_exchange(0, BROKEN, Ordering::AcqRel, Ordering::Relaxed);
        Ok(())
    }

    /// Turns the 1 GiB block that a chunk is a part of into 512 chunks of their own. The caller has taken the chunk from
    /// the guest, which overtakes every fault that was told of the whole block.
    pub(super) fn split_giant(&self, bank: &Bank, gfn: Gfn) {
        let _no_new_ones = self.giants.lock();
        let start = Gfn(gfn.0 >> ORDER_1G << ORDER_1G);
        let first = self.index(bank, start);
        for chunk in &bank.chunks[first..first + CHUNKS_1G] {
            chunk.fetch_and(!GIANT, Ordering::AcqRel);
        }
    }

    /// Gives the whole GiB around a chunk one block, if it is all of this bank's, has no memory yet, and the host has
    /// such a block. The lock is held.
    fn populate_giant(&self, bank: &Bank, number: u64) -> bool {
        let start = Gfn(number << self.order >> ORDER_1G << ORDER_1G);
        if !bank.range.covers(GfnRange { start, end: Gfn(start.0 + (1 << ORDER_1G)) }) {
            return false;
        }
        let first = ((start.0 >> self.order) - bank.first) as usize;
        let chunks = &bank.chunks[first..first + CHUNKS_1G];
        if chunks.iter().any(|chunk| chunk.load(Ordering::Relaxed) != 0) {
            return false;
        }
        let Some(block) = take_block(ORDER_1G) else { return false };
        clear(block, ORDER_1G);
        for (chunk, address) in chunks.iter().zip((block..).step_by((FRAME << ORDER_2M) as usize)) {
            chunk.store(address | PRESENT | GIANT, Ordering::Release);
        }
        true
    }

    /// Copies into guest memory, allocating it. Fails where there is none.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`]; what lies before the place that failed is written.
    pub fn write(&self, mut at: Gpa, mut bytes: &[u8]) -> Result<(), BackingError> {
        while !bytes.is_empty() {
            let (host, run, _pin) = self.locate(at)?;
            let (now, rest) = bytes.split_at(bytes.len().min(run));
            // SAFETY: `locate` gave `run` bytes of this guest's RAM. The guest may write them at the same time, as it
            // may with any device's DMA: they are bytes, and no reference to them exists.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), host, now.len()) };
            (at, bytes) = (Gpa(at.0 + now.len() as u64), rest);
        }
        Ok(())
    }

    /// Copies out of guest memory, allocating it (as zeros). Fails where there is none.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`].
    pub fn read(&self, mut at: Gpa, mut bytes: &mut [u8]) -> Result<(), BackingError> {
        while !bytes.is_empty() {
            let (host, run, _pin) = self.locate(at)?;
            let count = bytes.len().min(run);
            let (now, rest) = bytes.split_at_mut(count);
            // SAFETY: as in `write`.
            unsafe { ptr::copy_nonoverlapping(host, now.as_mut_ptr(), count) };
            (at, bytes) = (Gpa(at.0 + count as u64), rest);
        }
        Ok(())
    }

    /// Copies `N` bytes out, which lie in one page.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`]; also that they do not.
    #[inline]
    pub fn read_within<const N: usize>(&self, at: Gpa) -> Result<[u8; N], BackingError> {
        if at.0 % FRAME + N as u64 > FRAME {
            return Err(BackingError::NotBacked);
        }
        let (host, _pin) = self.locate_byte(at)?;
        // SAFETY: `locate_byte` gave what is left of the page, of this guest's RAM. The guest may write it at the same time:
        // they are bytes, and no reference to them exists.
        Ok(unsafe { host.cast::<[u8; N]>().read_unaligned() })
    }

    /// Replaces 1, 2, 4 or 8 bytes of guest memory in one step if they are `old`; says whether they were. They need not be
    /// aligned, but lie in one page.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`].
    pub fn compare_exchange(&self, at: Gpa, bytes: usize, old: u64, new: u64) -> Result<bool, BackingError> {
        let (host, run, _pin) = self.locate(at)?;
        if run < bytes {
            return Err(BackingError::NotBacked);
        }
        let done: u8;
        // SAFETY: the bytes are this guest's RAM. The guest may use them at the same time, which is why the instruction is
        // a locked one; Rust's atomics would ask for alignment, the CPU does not.
        unsafe {
            match bytes {
                1 => asm!("lock cmpxchg byte ptr [{at}], {new}", "sete {done}", at = in(reg) host,
                    new = in(reg_byte) new as u8, done = lateout(reg_byte) done, inout("al") old as u8 => _),
                2 => asm!("lock cmpxchg word ptr [{at}], {new:x}", "sete {done}", at = in(reg) host,
                    new = in(reg) new as u16, done = lateout(reg_byte) done, inout("ax") old as u16 => _),
                4 => asm!("lock cmpxchg dword ptr [{at}], {new:e}", "sete {done}", at = in(reg) host,
                    new = in(reg) new as u32, done = lateout(reg_byte) done, inout("eax") old as u32 => _),
                _ => asm!("lock cmpxchg qword ptr [{at}], {new}", "sete {done}", at = in(reg) host,
                    new = in(reg) new, done = lateout(reg_byte) done, inout("rax") old => _),
            }
        }
        Ok(done != 0)
    }

    /// The first frame from `gfn` on that has memory, or whose content is kept. All others hold zeros.
    #[must_use]
    pub fn next_with_memory(&self, gfn: Gfn) -> Option<Gfn> {
        let mut gfn = gfn;
        for bank in &self.banks {
            gfn = gfn.max(bank.range.start);
            while gfn < bank.range.end {
                let found = self.find(bank, gfn);
                if found.word != 0 {
                    return Some(gfn);
                }
                gfn = Gfn(((gfn.0 >> found.order) + 1) << found.order);
            }
        }
        None
    }

    /// Copies out of guest memory that has host memory already; false when some of it has not.
    #[must_use]
    pub fn peek(&self, at: Gpa, bytes: &mut [u8]) -> bool {
        let last = Gpa(at.0.saturating_add(bytes.len() as u64).saturating_sub(1));
        let mut gfn = at.gfn();
        while gfn <= last.gfn() {
            let Some(bank) = self.bank(gfn) else { return false };
            if self.find(bank, gfn).word == 0 {
                return false;
            }
            gfn = Gfn(gfn.0 + 1);
        }
        self.read(at, bytes).is_ok()
    }

    /// Reads `bytes` (4 or 8), aligned to that, in one piece: an entry of a page table, which others may be changing.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`].
    #[inline]
    pub fn read_entry(&self, at: Gpa, bytes: usize) -> Result<u64, BackingError> {
        let (host, _pin) = self.locate_byte(Gpa(at.0 & !(bytes as u64 - 1)))?;
        // SAFETY: `locate` gave at least this much of the guest's RAM, aligned as the address is. Guests change it at the
        // same time, atomically or not; it is read atomically, and means nothing to this program.
        unsafe {
            Ok(match bytes {
                4 => u64::from(AtomicU32::from_ptr(host.cast()).load(Ordering::Relaxed)),
                _ => AtomicU64::from_ptr(host.cast()).load(Ordering::Relaxed),
            })
        }
    }

    /// As [`GuestRam::locate`], where what is used ends in the same page.
    #[inline]
    fn locate_byte(&self, at: Gpa) -> Result<(*mut u8, Pin<'_>), BackingError> {
        let gfn = at.gfn();
        let bank = self.bank(gfn).ok_or(BackingError::NotBacked)?;
        let pin = self.pins.pin(gfn);
        let word = bank.chunks[self.index(bank, gfn)].load(Ordering::Acquire);
        if word & PRESENT == 0 {
            drop(pin);
            return self.locate(at).map(|(host, _, pin)| (host, pin));
        }
        let offset = at.0 & self.offset_mask;
        Ok((ptr::with_exposed_provenance_mut((address(word) + offset) as usize), pin))
    }

    /// The host address behind a guest address, the bytes up to the end of the run, and what keeps them there.
    fn locate(&self, at: Gpa) -> Result<(*mut u8, usize, Pin<'_>), BackingError> {
        let gfn = at.gfn();
        let bank = self.bank(gfn).ok_or(BackingError::NotBacked)?;
        loop {
            let pin = self.pins.pin(gfn);
            let Found { word, order, .. } = self.find(bank, gfn);
            if word & PRESENT == 0 {
                // Not while it is pinned: whoever makes it busy may be waiting for that.
                drop(pin);
                self.resolve_absent(bank, gfn)?;
                continue;
            }
            // The run ends with its 2 MiB, as the pin does.
            let pages = 1 << order;
            let offset = at.0 % (pages * FRAME);
            let end = (at.0 - offset + pages * FRAME).min(bank.range.end.gpa().0);
            let host = ptr::with_exposed_provenance_mut((address(word) + offset) as usize);
            return Ok((host, (end - at.0) as usize, pin));
        }
    }

    /// Gives every frame back. The caller owns the RAM alone: no guest runs on it and no table maps it any more.
    pub fn release(&mut self) {
        let mut run = Run::default();
        for bank in &mut self.banks {
            let mut index = 0;
            while index < bank.chunks.len() {
                let word = core::mem::take(bank.chunks[index].get_mut());
                index += 1;
                if word & PRESENT != 0 {
                    let giant = word & GIANT != 0;
                    run.give(address(word), if giant { ORDER_1G } else { self.order });
                    index += if giant { CHUNKS_1G - 1 } else { 0 };
                } else if word & BROKEN != 0 {
                    let pages = bank.table(index - 1).into_iter().flat_map(|table| &table.0);
                    pages.for_each(|page| give_back(page.swap(0, Ordering::Relaxed), 0));
                } else if word != 0 {
                    give_back(word, self.order);
                }
            }
        }
    }
}

/// Blocks of a guest's that follow each other in memory, on their way back: one visit to the allocator for all of them.
/// What the guest touched in order mostly lies in order.
#[derive(Default)]
struct Run(Range<u64>);

impl Run {
    fn give(&mut self, block: u64, order: u32) {
        if block != self.0.end {
            self.end();
            self.0.start = block;
        }
        self.0.end = block + (FRAME << order);
    }

    fn end(&mut self) {
        if !self.0.is_empty() {
            frames::free_run(self.0.clone());
            FRAMES.fetch_sub((self.0.end - self.0.start) / FRAME, Ordering::Relaxed);
            self.0.start = self.0.end;
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.end();
    }
}

/// Gives back what a word that is out of circulation stands for.
pub(super) fn give_back(word: u64, order: u32) {
    if word & PRESENT != 0 {
        give_block(address(word), order);
    } else if word & TAKEN != 0 {
        // SAFETY: the word is out of circulation, so this is its only use.
        drop(unsafe { Kept::from_word(address(word)) });
    }
}

/// Gives an empty word a block of its own, unless somebody else is faster.
fn populate(cell: &AtomicU64, order: u32) -> Result<(), BackingError> {
    let block = take_block(order).ok_or(BackingError::OutOfMemory)?;
    seams::clearing(|| clear(block, order));
    if cell.compare_exchange(0, block | PRESENT, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        give_block(block, order);
    }
    Ok(())
}

/// Brings a taken page back, unless somebody else is doing it.
fn bring_back(cell: &AtomicU64, word: u64) -> Result<(), BackingError> {
    let block = take_block(0).ok_or(BackingError::OutOfMemory)?;
    if cell.compare_exchange(word, BUSY, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        give_block(block, 0);
        return Ok(());
    }
    // SAFETY: whoever made the word busy took it out of circulation.
    let kept = unsafe { Kept::from_word(address(word)) };
    // SAFETY: the block was just allocated, and nobody else knows of it.
    kept.unpack(unsafe { page(block) });
    cell.store(block | PRESENT, Ordering::Release);
    Ok(())
}

/// A page of host memory.
///
/// # Safety
/// The frame is the caller's, and the result is its only use for as long as it lives.
pub(super) unsafe fn page<'a>(frame: u64) -> &'a mut [u8; PAGE] {
    // SAFETY: identity-mapped RAM that is the caller's.
    unsafe { &mut *ptr::with_exposed_provenance_mut(frame as usize) }
}

impl GuestMemory for GuestRam {
    fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let bytes = into.len() as u64;
        self.read(Gpa(gpa), into).map_err(|error| guest_error(error, gpa, bytes))
    }

    fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        self.write(Gpa(gpa), bytes).map_err(|error| guest_error(error, gpa, bytes.len() as u64))
    }
}

fn guest_error(error: BackingError, gpa: u64, bytes: u64) -> GuestMemoryError {
    match error {
        BackingError::OutOfMemory => GuestMemoryError::OutOfFrames { gpa },
        BackingError::NotBacked | BackingError::Poisoned => GuestMemoryError::NotRam { gpa, bytes },
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        self.release();
    }
}

/// Clears a block that was just allocated, 256 bytes a step.
fn clear(block: u64, order: u32) {
    // SAFETY: the block is this function's caller's alone, aligned to 4 KiB and a multiple of 256 bytes long.
    unsafe {
        asm!(
            "xorps {zero}, {zero}",
            "2:",
            ".irp offset, 0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240",
            "movaps [{at} + \\offset], {zero}",
            ".endr",
            "add {at}, 256",
            "cmp {at}, {end}",
            "jb 2b",
            zero = out(xmm_reg) _,
            at = inout(reg) block => _,
            end = in(reg) block + (FRAME << order),
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests;
