//! Guest RAM: which host frame stands behind which guest frame.
//!
//! RAM is taken from the frame allocator when the guest first touches it, in chunks of the size that the operator
//! allows to be mapped: 2 MiB, 1 GiB (where the whole GiB is this guest's RAM; else 2 MiB), or 4 KiB. A chunk never
//! changes its place and is given back when the VM ends, all at once.
//!
//! One word a chunk says where it is. Resolving a frame whose chunk exists is one load; nobody takes a lock. Two vCPUs
//! that miss the same chunk both allocate and clear one, and a compare-and-swap decides; the loser gives its own back.
//! That is safe because nobody else has seen it. With blocks of 1 GiB clearing twice would be felt, and a
//! block needs its whole GiB: then a lock is taken.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::asm;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use nestling::format::MemoryType;
use nestling::host::{Access, BackingError, Extent};
use nestling::{Gfn, GfnRange, Gpa, Hpa, OutOfMemory};
use spin::Mutex;

use super::frames::{self, FRAME};
use crate::guest::{GuestMemory, GuestMemoryError};

const ORDER_2M: u32 = 9;
const ORDER_1G: u32 = 18;
/// Chunks of 2 MiB in one of 1 GiB.
const CHUNKS_1G: usize = 1 << (ORDER_1G - ORDER_2M);

/// The chunk exists; the rest of the word is its address.
const PRESENT: u64 = 1;
/// The chunk is a part of a block of 1 GiB.
const GIANT: u64 = 2;

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

/// One contiguous range of guest RAM.
#[derive(Debug)]
struct Bank {
    range: GfnRange,
    /// Number of the first chunk: chunks are aligned in the guest's address space.
    first: u64,
    chunks: Box<[AtomicU64]>,
}

/// All RAM of one guest. Its banks are numbered from 0; a memslot's `backing` is that number.
#[derive(Debug)]
pub struct GuestRam {
    banks: Vec<Bank>,
    order: u32,
    giant: bool,
    giants: Mutex<()>,
}

/// Frames behind all guests' RAM now.
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// Host frames that guests have now.
#[must_use]
pub fn frames_in_use() -> u64 {
    FRAMES.load(Ordering::Relaxed)
}

impl GuestRam {
    /// RAM at these ranges, none of it allocated yet.
    ///
    /// # Errors
    /// No memory for the tables of chunks.
    pub fn new(ranges: &[GfnRange], size: ChunkSize) -> Result<Self, OutOfMemory> {
        let order = if size == ChunkSize::K4 { 0 } else { ORDER_2M };
        let mut banks = Vec::new();
        for &range in ranges {
            let first = range.start.0 >> order;
            let count = ((range.end.0 - 1) >> order) + 1 - first;
            let mut chunks = Vec::new();
            chunks.try_reserve_exact(count as usize).map_err(OutOfMemory::from)?;
            chunks.resize_with(count as usize, || AtomicU64::new(0));
            banks.push(Bank { range, first, chunks: chunks.into_boxed_slice() });
        }
        Ok(Self { banks, order, giant: size == ChunkSize::G1, giants: Mutex::new(()) })
    }

    /// The banks' ranges, in the order of their numbers.
    pub fn ranges(&self) -> impl Iterator<Item = GfnRange> + '_ {
        self.banks.iter().map(|bank| bank.range)
    }

    /// What stands behind a frame of a bank; allocated now if nothing does yet.
    ///
    /// # Errors
    /// The host has no memory, or the bank does not have this frame.
    #[inline]
    pub fn resolve(&self, bank: u64, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let bank = self.banks.get(bank as usize).filter(|b| b.range.contains(gfn)).ok_or(BackingError::NotBacked)?;
        let number = gfn.0 >> self.order;
        let word = bank.chunks[(number - bank.first) as usize].load(Ordering::Acquire);
        let word = if word & PRESENT != 0 { word } else { self.populate(bank, number)? };
        let (order, address) = if word & GIANT != 0 {
            let inside = (number << self.order) % (1 << ORDER_1G);
            (ORDER_1G, (word & !0xfff) - inside * FRAME)
        } else {
            (self.order, word & !0xfff)
        };
        let start = Gfn(gfn.0 >> order << order);
        Ok(Extent {
            gfns: GfnRange { start, end: Gfn(start.0 + (1 << order)) },
            hfn: Hpa(address).hfn(),
            writable: true,
            memory: MemoryType::WriteBack,
        })
    }

    /// Gives a chunk its memory.
    #[cold]
    fn populate(&self, bank: &Bank, number: u64) -> Result<u64, BackingError> {
        let chunk = &bank.chunks[(number - bank.first) as usize];
        // With 1 GiB blocks every chunk is made under the lock: a block needs all its chunks to be without memory still.
        let one_at_a_time = self.giant.then(|| self.giants.lock());
        if one_at_a_time.is_some() {
            let word = chunk.load(Ordering::Acquire);
            if word & PRESENT != 0 || self.populate_giant(bank, number) {
                return Ok(chunk.load(Ordering::Acquire));
            }
        }
        let block = frames::alloc(self.order).ok_or(BackingError::OutOfMemory)?;
        clear(block, self.order);
        match chunk.compare_exchange(0, block | PRESENT, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                FRAMES.fetch_add(1 << self.order, Ordering::Relaxed);
                Ok(block | PRESENT)
            }
            Err(other) => {
                frames::free(block, self.order);
                Ok(other)
            }
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
        let Some(block) = frames::alloc(ORDER_1G) else { return false };
        clear(block, ORDER_1G);
        for (chunk, address) in chunks.iter().zip((block..).step_by((FRAME << ORDER_2M) as usize)) {
            chunk.store(address | PRESENT | GIANT, Ordering::Release);
        }
        FRAMES.fetch_add(1 << ORDER_1G, Ordering::Relaxed);
        true
    }

    /// Copies into guest memory, allocating it. Fails where there is none.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`]; what lies before the place that failed is written.
    pub fn write(&self, mut at: Gpa, mut bytes: &[u8]) -> Result<(), BackingError> {
        while !bytes.is_empty() {
            let (host, run) = self.locate(at)?;
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
            let (host, run) = self.locate(at)?;
            let count = bytes.len().min(run);
            let (now, rest) = bytes.split_at_mut(count);
            // SAFETY: as in `write`.
            unsafe { ptr::copy_nonoverlapping(host, now.as_mut_ptr(), count) };
            (at, bytes) = (Gpa(at.0 + count as u64), rest);
        }
        Ok(())
    }

    /// Replaces 1, 2, 4 or 8 bytes of guest memory in one step if they are `old`; says whether they were. They need not be
    /// aligned, but lie in one page.
    ///
    /// # Errors
    /// Those of [`GuestRam::resolve`].
    pub fn compare_exchange(&self, at: Gpa, bytes: usize, old: u64, new: u64) -> Result<bool, BackingError> {
        let (host, run) = self.locate(at)?;
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

    /// Copies out of guest memory that has host memory already; false when some of it has not.
    #[must_use]
    pub fn peek(&self, at: Gpa, bytes: &mut [u8]) -> bool {
        let last = Gpa(at.0.saturating_add(bytes.len() as u64).saturating_sub(1));
        let mut gfn = at.gfn();
        while gfn <= last.gfn() {
            let Some(bank) = self.banks.iter().find(|b| b.range.contains(gfn)) else { return false };
            let chunk = &bank.chunks[((gfn.0 >> self.order) - bank.first) as usize];
            if chunk.load(Ordering::Acquire) & PRESENT == 0 {
                return false;
            }
            gfn = Gfn(gfn.0 + 1);
        }
        self.read(at, bytes).is_ok()
    }

    /// The host address behind a guest address, and the bytes up to the end of the run.
    fn locate(&self, at: Gpa) -> Result<(*mut u8, usize), BackingError> {
        let gfn = at.gfn();
        let bank = self.banks.iter().position(|b| b.range.contains(gfn)).ok_or(BackingError::NotBacked)?;
        let extent = self.resolve(bank as u64, gfn, Access::Write)?;
        let offset = at.0 - extent.gfns.start.gpa().0;
        let end = extent.gfns.end.gpa().0.min(self.banks[bank].range.end.gpa().0);
        Ok((ptr::with_exposed_provenance_mut((extent.hfn.hpa().0 + offset) as usize), (end - at.0) as usize))
    }

    /// Gives every frame back. The caller owns the RAM alone: no guest runs on it and no table maps it any more.
    pub fn release(&mut self) {
        for bank in &mut self.banks {
            let mut index = 0;
            while index < bank.chunks.len() {
                let word = core::mem::take(bank.chunks[index].get_mut());
                let (order, step) = if word & GIANT != 0 { (ORDER_1G, CHUNKS_1G) } else { (self.order, 1) };
                if word & PRESENT != 0 {
                    frames::free(word & !0xfff, order);
                    FRAMES.fetch_sub(1 << order, Ordering::Relaxed);
                }
                index += step;
            }
        }
    }
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

/// Clears a block that was just allocated, 64 bytes a step.
fn clear(block: u64, order: u32) {
    // SAFETY: the block is this function's caller's alone, aligned to 4 KiB and a multiple of 64 bytes long.
    unsafe {
        asm!(
            "xorps {zero}, {zero}",
            "2: movaps [{at}], {zero}",
            "movaps [{at} + 16], {zero}",
            "movaps [{at} + 32], {zero}",
            "movaps [{at} + 48], {zero}",
            "add {at}, 64",
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
mod tests {
    use super::*;
    use crate::memory::frames::testing;
    use std::thread;
    use std::vec;

    const MIB: u64 = 1 << 20;

    fn ram(size: ChunkSize) -> GuestRam {
        testing::machine();
        let range = |start: u64, end: u64| GfnRange { start: Gpa(start).gfn(), end: Gpa(end).gfn() };
        GuestRam::new(&[range(0, 5 * MIB), range(64 * MIB, 68 * MIB)], size).unwrap()
    }

    #[test]
    fn memory_comes_zeroed_when_it_is_touched_and_stays_where_it_is() {
        for (size, pages) in [(ChunkSize::M2, 512), (ChunkSize::K4, 1), (ChunkSize::G1, 512)] {
            let ram = ram(size);
            let gfn = Gpa(3 * MIB + 0x5000).gfn();
            assert!(!ram.peek(gfn.gpa(), &mut [0]), "nothing is there before the first touch");
            let extent = ram.resolve(0, gfn, Access::Read).unwrap();
            assert_eq!((extent.gfns.pages(), extent.gfns.contains(gfn)), (pages, true));
            assert_eq!(extent.hfn.0 % pages, extent.gfns.start.0 % pages, "aligned alike on both sides");
            assert_eq!(ram.resolve(0, gfn, Access::Write), Ok(extent));
            let mut page = vec![0xff; 4096];
            ram.read(gfn.gpa(), &mut page).unwrap();
            assert!(page.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn copies_cross_chunks_and_end_with_the_memory() {
        let ram = ram(ChunkSize::M2);
        let text: vec::Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
        ram.write(Gpa(MIB + 7), &text).unwrap();
        let mut back = vec![0; text.len()];
        assert!(ram.peek(Gpa(MIB + 7), &mut back));
        assert!(back == text);
        assert_eq!(ram.write(Gpa(5 * MIB - 2), b"abc"), Err(BackingError::NotBacked));
        assert!(!ram.peek(Gpa(5 * MIB - 2), &mut [0; 3]));
        assert_eq!(ram.resolve(1, Gpa(0).gfn(), Access::Read), Err(BackingError::NotBacked));
        assert_eq!(ram.resolve(2, Gpa(64 * MIB).gfn(), Access::Read), Err(BackingError::NotBacked));
        assert_eq!(
            GuestMemory::read(&ram, u64::MAX - 1, &mut [0; 4]),
            Err(GuestMemoryError::NotRam { gpa: u64::MAX - 1, bytes: 4 })
        );
    }

    #[test]
    fn exchanges_change_just_their_bytes() {
        let ram = ram(ChunkSize::M2);
        for bytes in [1usize, 2, 4, 8] {
            ram.write(Gpa(0x1000), &[0xaa; 24]).unwrap();
            let mask = u64::MAX >> (64 - 8 * bytes);
            let (old, new) = (0xaaaa_aaaa_aaaa_aaaa & mask, 0x1122_3344_5566_7788 & mask);
            assert_eq!(ram.compare_exchange(Gpa(0x1007), bytes, old ^ 1, new), Ok(false));
            assert_eq!(ram.compare_exchange(Gpa(0x1007), bytes, old, new), Ok(true));
            let mut expected = [0xaa; 24];
            expected[7..7 + bytes].copy_from_slice(&new.to_le_bytes()[..bytes]);
            let mut found = [0; 24];
            ram.read(Gpa(0x1000), &mut found).unwrap();
            assert_eq!(found, expected);
        }
        assert_eq!(ram.compare_exchange(Gpa(5 * MIB - 2), 4, 0, 1), Err(BackingError::NotBacked));
    }

    #[test]
    fn racing_touches_agree() {
        for size in [ChunkSize::M2, ChunkSize::K4] {
            let ram = ram(size);
            let all =
                |_| (0..1024).map(|gfn| ram.resolve(0, Gfn(gfn), Access::Write).unwrap().hfn).collect::<vec::Vec<_>>();
            thread::scope(|scope| {
                let threads: vec::Vec<_> = (0..4).map(|n| scope.spawn(move || all(n))).collect();
                let seen: vec::Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
                assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
            });
        }
    }
}
