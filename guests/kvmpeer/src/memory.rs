//! The guest's memory: two pieces of this process's, and the one place that touches them through pointers.

use std::{error::Error, io, ptr::NonNull};

use nestling_hypervisor::guest::{GuestMemory, GuestMemoryError};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The small ones of the host's pages.
pub(crate) const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;

/// How the host is to map a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pages {
    /// By pages of 4 KiB.
    Small,
    /// By pages of 2 MiB, as far as it has them.
    Large,
}

/// A piece of memory that a guest has.
#[derive(Debug)]
pub(crate) struct Memory {
    mapping: NonNull<u8>,
    mapped_bytes: usize,
    /// The first address in it that a large page could have, where the guest's begins.
    start: NonNull<u8>,
    bytes: usize,
}

impl Memory {
    /// So many bytes, none of which has a page yet.
    pub(crate) fn new(bytes: usize, pages: Pages) -> Result<Self, Box<dyn Error>> {
        let mapped_bytes = bytes + LARGE_PAGE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a mapping at an address of the kernel's choice touches nothing that is there.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped_bytes, protection, flags)? };
        let mapping = NonNull::new(mapping.cast::<u8>()).ok_or("memory at address 0")?;
        let offset = mapping.as_ptr().align_offset(LARGE_PAGE);
        // SAFETY: the offset is less than a large page, which the mapping has in excess.
        let start = unsafe { mapping.add(offset) };
        let memory = Self { mapping, mapped_bytes, start, bytes };
        memory.advise(match pages {
            Pages::Small => Advice::LinuxNoHugepage,
            Pages::Large => Advice::LinuxHugepage,
        })?;
        Ok(memory)
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is this mapping's. Nobody has a reference into it, so contents may become zero.
        unsafe { Ok(madvise(self.start.as_ptr().cast(), self.bytes, advice)?) }
    }

    /// Where it is in this process.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where so many bytes are in this process.
    fn place(&self, gpa: u64, bytes: usize) -> Result<NonNull<u8>, GuestMemoryError> {
        let beyond = GuestMemoryError::NotRam { gpa, bytes: bytes as u64 };
        let at = usize::try_from(gpa).map_err(|_| beyond)?;
        at.checked_add(bytes).filter(|end| *end <= self.bytes).ok_or(beyond)?;
        // SAFETY: inside the mapping, as was checked.
        Ok(unsafe { self.start.add(at) })
    }

    /// Gives each page a frame.
    pub(crate) fn populate(&self) {
        for at in (0..self.bytes).step_by(PAGE) {
            // SAFETY: inside the mapping. What is written is what was there.
            unsafe {
                let byte = self.start.add(at).as_ptr();
                byte.write_volatile(byte.read_volatile());
            }
        }
    }

    /// Takes the frames away.
    pub(crate) fn drop_pages(&self) -> io::Result<()> {
        self.advise(Advice::LinuxDontNeed)
    }
}

/// From address 0 on, without a hole; not while the guest runs.
impl GuestMemory for Memory {
    fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let from = self.place(gpa, into.len())?;
        // SAFETY: the range was checked, and no reference to it exists.
        unsafe { into.as_mut_ptr().copy_from_nonoverlapping(from.as_ptr(), into.len()) };
        Ok(())
    }

    fn write(&self, gpa: u64, content: &[u8]) -> Result<(), GuestMemoryError> {
        let to = self.place(gpa, content.len())?;
        // SAFETY: the range was checked, and no reference to it exists.
        unsafe { to.as_ptr().copy_from_nonoverlapping(content.as_ptr(), content.len()) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it. It does not fail for a mapping that is there.
        let _ = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapped_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_access_reaches_beyond_the_end() {
        let memory = Memory::new(2 * PAGE, Pages::Small).expect("there is memory");
        memory.write(PAGE as u64, &[7; PAGE]).expect("inside");
        let mut last = [0];
        memory.read(2 * PAGE as u64 - 1, &mut last).expect("inside");
        assert_eq!(last, [7]);
        for (gpa, bytes) in [(2 * PAGE as u64, 1), (2 * PAGE as u64 - 1, 2), (u64::MAX, 1), (0, 2 * PAGE + 1)] {
            let beyond = GuestMemoryError::NotRam { gpa, bytes: bytes as u64 };
            assert_eq!(memory.write(gpa, &vec![0; bytes]), Err(beyond));
            assert_eq!(memory.read(gpa, &mut vec![0; bytes]), Err(beyond));
        }
    }
}
