//! Moving a running guest's memory to other host frames, and taking pages away.
//!
//! # Protocol
//! One relocation at a time, by a thread that runs no vCPU. Each goes:
//! 1. everything that can fail, fails: is the memory there, is there a frame, is there room;
//! 2. `take` begins an invalidation of the frames: no vCPU reaches them any more, faults on them are retried;
//! 3. the word is made busy and the hypervisor's own accesses drained ([`super::pins`]): now nobody has the memory;
//! 4. the content goes to where it will be, the new word is published, and the old memory is freed: no TLB, no table, no fault
//!    that will not be retried, and no pin leads to it;
//! 5. the invalidation ends.
//!
//! A page in a 2 MiB chunk is moved or taken by breaking the chunk: its other pages stay where they are, each with a word of its
//! own. They were not taken from the guest, and need not be: what is mapped of them stays true. Moving a whole chunk makes
//! a broken one whole again.
//!
//! A relocation leaves the last frames of the host alone. The guest's own faults, and tables, may need them; a page that
//! is not moved harms nobody.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use nestling::{Gfn, GfnRange, Level, OutOfMemory};

use super::frames::{self, FRAME};
use super::guest::{
    BROKEN, BUSY, Bank, Found, GIANT, GuestRam, ORDER_2M, PAGES_2M, PRESENT, TAKEN, address, give_back, give_block,
    page, take_block,
};
use super::kept::{Kept, Packed};
use crate::ghost;

/// Frames that a relocation leaves free.
const RESERVE: u64 = (16 << 20) / FRAME;

/// Why a relocation was not carried out. The guest does not notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Skipped {
    /// There is no memory behind the frame, or it is no RAM.
    Nothing,
    /// The host has no frame for it, or no room to keep the content.
    NoMemory,
}

impl From<OutOfMemory> for Skipped {
    fn from(_: OutOfMemory) -> Self {
        Self::NoMemory
    }
}

impl GuestRam {
    /// Moves the page behind a frame to another host frame.
    ///
    /// `take` takes frames from the guest for as long as what it returns lives: [`nestling::Worker::invalidate`].
    ///
    /// # Errors
    /// Why it was not done.
    pub fn move_page<T>(&self, gfn: Gfn, take: impl FnOnce(GfnRange) -> T) -> Result<(), Skipped> {
        let _alone = self.relocation.lock();
        let bank = self.with_memory(gfn)?;
        let new = Spare::take(0)?;
        let taken = take(GfnRange::block(Level::K4, gfn));
        let result = self.seize(bank, gfn).map(|(cell, old)| {
            // SAFETY: both frames are this function's alone: nobody knows of the new one, and the old one was seized.
            unsafe { page(new.block).copy_from_slice(page(old)) };
            cell.store(new.use_up() | PRESENT, Ordering::Release);
            give_away(old, 0);
        });
        drop(taken);
        result
    }

    /// Takes the page behind a frame away and keeps its content; the next access brings it back.
    ///
    /// # Errors
    /// Why it was not done.
    pub fn take_page<T>(&self, gfn: Gfn, take: impl FnOnce(GfnRange) -> T) -> Result<(), Skipped> {
        let _alone = self.relocation.lock();
        let bank = self.with_memory(gfn)?;
        let taken = take(GfnRange::block(Level::K4, gfn));
        let result = self.seize(bank, gfn).and_then(|(cell, old)| {
            // SAFETY: the frame was seized.
            let word = match Kept::pack(unsafe { page(old) }) {
                Packed::Zero => 0,
                Packed::Kept(kept) => kept.into_word() | TAKEN,
                Packed::NoRoom => {
                    cell.store(old | PRESENT, Ordering::Release);
                    return Err(Skipped::NoMemory);
                }
            };
            cell.store(word, Ordering::Release);
            give_away(old, 0);
            Ok(())
        });
        drop(taken);
        result
    }

    /// Moves the 2 MiB around a frame to another block; if they were in pieces, they are whole then.
    ///
    /// # Errors
    /// Why it was not done. With chunks of 4 KiB there is nothing to move.
    pub fn move_chunk<T>(&self, gfn: Gfn, take: impl FnOnce(GfnRange) -> T) -> Result<(), Skipped> {
        let _alone = self.relocation.lock();
        let block = GfnRange::block(Level::M2, gfn);
        let bank = self.bank(gfn).ok_or(Skipped::Nothing)?;
        let index = self.index(bank, gfn);
        let chunk = bank.chunk(index);
        // A chunk at the end of a bank that is not a multiple of 2 MiB is whole in memory all the same.
        if self.order != ORDER_2M || chunk.load(Ordering::Acquire) & (PRESENT | BROKEN) == 0 {
            return Err(Skipped::Nothing);
        }
        let new = Spare::take(ORDER_2M)?;
        let taken = take(block);
        if chunk.load(Ordering::Acquire) & GIANT != 0 {
            self.split_giant(bank, gfn);
        }
        let word = chunk.load(Ordering::Acquire);
        match bank.table(index) {
            Some(table) if word & BROKEN != 0 => {
                let words = table.0.each_ref().map(make_busy);
                self.pins.wait(gfn);
                for (number, &word) in words.iter().enumerate() {
                    // SAFETY: the new block has room for 512 pages and nobody knows of it; the word was seized.
                    unsafe { restore(word, new.block + number as u64 * FRAME) };
                }
                // The table's words stay busy: who came by the old word of the chunk looks at the chunk again.
                chunk.store(new.use_up() | PRESENT, Ordering::Release);
                words
                    .into_iter()
                    .filter(|word| word & PRESENT != 0)
                    .for_each(|word| ghost::gave_away(address(word), 1));
                words.into_iter().for_each(|word| give_back(word, 0));
            }
            _ => {
                let word = make_busy(chunk);
                self.pins.wait(gfn);
                // SAFETY: both blocks are this function's alone: nobody knows of the new one, the old one was seized.
                unsafe { copy(address(word), new.block, PAGES_2M) };
                chunk.store(new.use_up() | PRESENT, Ordering::Release);
                give_away(address(word), ORDER_2M);
            }
        }
        drop(taken);
        Ok(())
    }

    /// The bank of a frame that has memory now, with all that breaking its chunk would need.
    fn with_memory(&self, gfn: Gfn) -> Result<&Bank, Skipped> {
        let bank = self.bank(gfn).ok_or(Skipped::Nothing)?;
        let found = self.find(bank, gfn);
        if found.word & PRESENT == 0 {
            return Err(Skipped::Nothing);
        }
        if found.order != 0 {
            bank.make_table(self.index(bank, gfn))?;
        }
        Ok(bank)
    }

    /// Makes the word of a page busy and waits until nobody uses the page, which is the caller's then: its word and its
    /// frame. The page's frame has been taken from the guest.
    fn seize<'a>(&self, bank: &'a Bank, gfn: Gfn) -> Result<(&'a AtomicU64, u64), Skipped> {
        if self.find(bank, gfn).order != 0 {
            self.break_chunk(bank, gfn)?;
        }
        let Found { cell, .. } = self.find(bank, gfn);
        let word = make_busy(cell);
        if word & PRESENT == 0 {
            // It was there, and only relocations take a page away.
            cell.store(word, Ordering::Release);
            return Err(Skipped::Nothing);
        }
        self.pins.wait(gfn);
        Ok((cell, address(word)))
    }

    /// Gives each page of a 2 MiB chunk a word of its own. They stay where they are.
    fn break_chunk(&self, bank: &Bank, gfn: Gfn) -> Result<(), Skipped> {
        let index = self.index(bank, gfn);
        let table = bank.make_table(index)?;
        if bank.chunk(index).load(Ordering::Acquire) & GIANT != 0 {
            self.split_giant(bank, gfn);
        }
        let block = address(bank.chunk(index).load(Ordering::Acquire));
        for (word, frame) in table.0.iter().zip((block..).step_by(FRAME as usize)) {
            word.store(frame | PRESENT, Ordering::Relaxed);
        }
        bank.chunk(index).store(BROKEN, Ordering::Release);
        Ok(())
    }
}

/// The guest had the block until now.
fn give_away(block: u64, order: u32) {
    ghost::gave_away(block, 1 << order);
    give_block(block, order);
}

/// Makes a word busy, whoever else may be bringing its page back; returns what it was.
fn make_busy(cell: &AtomicU64) -> u64 {
    loop {
        let word = cell.load(Ordering::Acquire);
        if word & BUSY == 0 && cell.compare_exchange(word, BUSY, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return word;
        }
        core::hint::spin_loop();
    }
}

/// Writes what a page's word stands for to a frame.
///
/// # Safety
/// Word and frame are the caller's alone.
unsafe fn restore(word: u64, frame: u64) {
    // SAFETY: the caller's condition.
    let to = unsafe { page(frame) };
    if word & PRESENT != 0 {
        // SAFETY: the caller's condition; two frames are never one.
        to.copy_from_slice(unsafe { page(address(word)) });
    } else if word & TAKEN != 0 {
        // SAFETY: the word is the caller's, who frees it later by `give_back`: it is only looked at.
        unsafe { Kept::peek(address(word)) }.unpack(to);
    } else {
        to.fill(0);
    }
}

/// Copies pages from one block to another.
///
/// # Safety
/// Both are the caller's alone, and as long as that.
unsafe fn copy(from: u64, to: u64, pages: usize) {
    let (from, to) = (ptr::with_exposed_provenance::<u8>(from as usize), ptr::with_exposed_provenance_mut(to as usize));
    // SAFETY: the caller's condition.
    unsafe { ptr::copy_nonoverlapping(from, to, pages * FRAME as usize) };
}

/// A block for a relocation; goes back if it is not used.
struct Spare {
    block: u64,
    order: u32,
}

impl Spare {
    fn take(order: u32) -> Result<Self, Skipped> {
        if frames::counts().0 < RESERVE + (1 << order) {
            return Err(Skipped::NoMemory);
        }
        take_block(order).map(|block| Self { block, order }).ok_or(Skipped::NoMemory)
    }

    fn use_up(self) -> u64 {
        let block = self.block;
        core::mem::forget(self);
        block
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        give_block(self.block, self.order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::frames::testing;
    use crate::memory::guest::ChunkSize;
    use crate::memory::kept;
    use nestling::Gpa;
    use nestling::host::Access;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::vec::Vec;

    const PAGES: u64 = 1024;

    fn ram(size: ChunkSize) -> GuestRam {
        testing::machine();
        GuestRam::new(&[GfnRange { start: Gfn(0), end: Gfn(PAGES) }], size).unwrap()
    }

    fn host(ram: &GuestRam, gfn: Gfn) -> u64 {
        let extent = ram.resolve(0, gfn, Access::Read).unwrap();
        extent.hfn.0 + (gfn.0 - extent.gfns.start.0)
    }

    #[test]
    fn a_page_moves_alone_and_its_chunk_becomes_whole_again() {
        let ram = ram(ChunkSize::M2);
        assert_eq!(ram.move_page(Gfn(5), |_| ()), Err(Skipped::Nothing), "nothing is there yet");
        for gfn in 0..512u64 {
            ram.write(Gfn(gfn).gpa(), &gfn.to_le_bytes()).unwrap();
        }
        let before: Vec<_> = (0..512).map(|gfn| host(&ram, Gfn(gfn))).collect();
        let mut asked = None;
        ram.move_page(Gfn(5), |range| asked = Some(range)).unwrap();
        assert_eq!(asked, Some(GfnRange { start: Gfn(5), end: Gfn(6) }), "just that page is taken from the guest");
        for gfn in 0..512 {
            assert_eq!(host(&ram, Gfn(gfn)) == before[gfn as usize], gfn != 5);
            let extent = ram.resolve(0, Gfn(gfn), Access::Read).unwrap();
            assert_eq!(extent.gfns.pages(), 1, "the old extent would reach over what has moved");
        }
        ram.take_page(Gfn(6), |_| ()).unwrap();
        ram.take_page(Gfn(0), |_| ()).unwrap();
        assert_eq!(ram.take_page(Gfn(6), |_| ()), Err(Skipped::Nothing), "it is away already");
        ram.move_chunk(Gfn(7), |range| asked = Some(range)).unwrap();
        assert_eq!(asked.map(GfnRange::pages), Some(512));
        for gfn in 0..512u64 {
            let mut word = [0; 8];
            ram.read(Gfn(gfn).gpa(), &mut word).unwrap();
            assert_eq!(u64::from_le_bytes(word), gfn);
            assert_eq!(ram.resolve(0, Gfn(gfn), Access::Read).unwrap().gfns.pages(), 512);
        }
        // And broken again, through the table that it has already.
        ram.take_page(Gfn(9), |_| ()).unwrap();
        ram.move_page(Gfn(10), |_| ()).unwrap();
        assert_eq!(host(&ram, Gfn(11)), host(&ram, Gfn(12)) - 1);
        let mut word = [0; 8];
        ram.read(Gfn(9).gpa(), &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 9);
        assert_eq!(ram.move_chunk(Gfn(PAGES), |_| ()), Err(Skipped::Nothing), "no RAM");
    }

    #[test]
    fn what_moves_and_goes_is_never_lost_to_who_uses_it() {
        for size in [ChunkSize::M2, ChunkSize::K4] {
            let ram = ram(size);
            let done = AtomicBool::new(false);
            const ROUNDS: u64 = 20_000;
            thread::scope(|scope| {
                let count = |at: u64| {
                    let ram = &ram;
                    move || {
                        for round in 0..ROUNDS {
                            // Pages far apart and near, and a value that lies across two of them.
                            let at = Gpa(at + round % 7 * 0x3000);
                            loop {
                                let mut old = [0; 4];
                                ram.read(at, &mut old).unwrap();
                                let old = u32::from_le_bytes(old);
                                let new = u64::from(old.wrapping_add(1));
                                if ram.compare_exchange(at, 4, u64::from(old), new).unwrap() {
                                    break;
                                }
                            }
                        }
                    }
                };
                let users = [scope.spawn(count(0x1000)), scope.spawn(count(0x1000)), scope.spawn(count(0x1008))];
                let mover = scope.spawn(|| {
                    let (mut seed, mut carried_out) = (1u64, 0);
                    // On a busy machine the others may be through before this begins.
                    while !done.load(Ordering::Relaxed) || carried_out == 0 {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let gfn = Gfn((seed >> 33) % 24);
                        let result = match seed >> 60 {
                            0..=6 => ram.take_page(gfn, |_| ()),
                            7..=14 => ram.move_page(gfn, |_| ()),
                            _ => ram.move_chunk(gfn, |_| ()),
                        };
                        carried_out += u64::from(result.is_ok());
                    }
                });
                users.into_iter().for_each(|user| user.join().unwrap());
                done.store(true, Ordering::Relaxed);
                mover.join().unwrap();
            });
            let sum = |at: u64| {
                (0..7)
                    .map(|page| {
                        let mut bytes = [0; 4];
                        ram.read(Gpa(at + page * 0x3000), &mut bytes).unwrap();
                        u64::from(u32::from_le_bytes(bytes))
                    })
                    .sum::<u64>()
            };
            assert_eq!((sum(0x1000), sum(0x1008)), (2 * ROUNDS, ROUNDS));
        }
    }

    #[test]
    fn where_no_gibibyte_is_left_its_pieces_move_all_the_same() {
        testing::machine();
        let ram = GuestRam::new(&[GfnRange { start: Gfn(0), end: Gfn(1 << 18) }], ChunkSize::G1).unwrap();
        // The tests' machine has no such block, so it has 2 MiB instead.
        ram.write(Gpa(0x20_0000), b"there").unwrap();
        ram.move_chunk(Gfn(512), |_| ()).unwrap();
        ram.take_page(Gfn(512), |_| ()).unwrap();
        let mut text = [0; 5];
        ram.read(Gpa(0x20_0000), &mut text).unwrap();
        assert_eq!(&text, b"there");
    }

    #[test]
    fn kept_pages_end_with_their_guest() {
        let ram = ram(ChunkSize::K4);
        for gfn in 0..PAGES {
            ram.write(Gfn(gfn).gpa(), b"something").unwrap();
            ram.take_page(Gfn(gfn), |_| ()).unwrap();
        }
        assert!(kept::pages_kept() >= PAGES);
        let (cell, word) = (ram.bank(Gfn(1)).unwrap().chunk(1), ram.find(ram.bank(Gfn(1)).unwrap(), Gfn(1)).word);
        assert_eq!((cell.load(Ordering::Relaxed), word & TAKEN), (word, TAKEN));
        let before = kept::pages_kept();
        drop(ram);
        assert!(kept::pages_kept() < before);
    }
}
