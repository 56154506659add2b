//! Pages that were taken from a guest: their content, compressed, in the hypervisor's heap.
//!
//! A page of zeros is kept as nothing at all, and one that does not shrink as it is. What is kept is reached by one word
//! ([`Kept::into_word`]), which fits where a page's address would be; whoever takes the word out of circulation
//! owns the content. How much is kept at one time is bounded, as it comes from the memory that the tables come from.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use super::frames::FRAME;

/// Bytes of a page.
pub(super) const PAGE: usize = FRAME as usize;
/// The most that is kept at one time, in bytes.
const MAX_BYTES: u64 = 32 << 20;

/// Pages kept for all guests now, those of zeros not counted.
static PAGES: AtomicU64 = AtomicU64::new(0);
/// What they take, in bytes.
static BYTES: AtomicU64 = AtomicU64::new(0);

/// Pages of guests that are kept compressed now.
#[must_use]
pub fn pages_kept() -> u64 {
    PAGES.load(Ordering::Relaxed)
}

/// The content of one page. Aligned so that the low six bits of its address are free for flags.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Kept {
    /// As long as a page: the page as it was. Shorter: compressed.
    bytes: Vec<u8>,
}

/// What became of a page's content.
#[derive(Debug)]
pub(super) enum Packed {
    /// It was all zeros.
    Zero,
    /// It is kept.
    Kept(Box<Kept>),
    /// There is no room to keep it.
    NoRoom,
}

impl Kept {
    /// Keeps a page.
    pub(super) fn pack(page: &[u8; PAGE]) -> Packed {
        if page.iter().all(|&byte| byte == 0) {
            return Packed::Zero;
        }
        if BYTES.load(Ordering::Relaxed) + FRAME > MAX_BYTES {
            return Packed::NoRoom;
        }
        let mut room = [0; lz4_flex::block::get_maximum_output_size(PAGE)];
        let content = match lz4_flex::block::compress_into(page, &mut room) {
            Ok(length) if length < PAGE => &room[..length],
            _ => &page[..],
        };
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(content.len()).is_err() {
            return Packed::NoRoom;
        }
        bytes.extend_from_slice(content);
        PAGES.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Packed::Kept(Box::new(Self { bytes }))
    }

    /// Writes the content back.
    ///
    /// # Panics
    /// When it is not what was packed: the heap was damaged, and the guest would go on with another page's content.
    pub(super) fn unpack(&self, page: &mut [u8; PAGE]) {
        if self.bytes.len() == PAGE {
            page.copy_from_slice(&self.bytes);
            return;
        }
        let length = lz4_flex::block::decompress_into(&self.bytes, page);
        assert!(matches!(length, Ok(PAGE)), "a kept page was damaged");
    }

    /// The word that stands for it; its low six bits are 0.
    pub(super) fn into_word(self: Box<Self>) -> u64 {
        Box::into_raw(self).expose_provenance() as u64
    }

    /// Looks at it.
    ///
    /// # Safety
    /// `word` came from [`Kept::into_word`], and is the caller's and not taken back for as long as the result lives.
    pub(super) unsafe fn peek<'a>(word: u64) -> &'a Self {
        // SAFETY: the pointer came from a box that is still there, by the caller's promise.
        unsafe { &*ptr::with_exposed_provenance(word as usize) }
    }

    /// Takes it back.
    ///
    /// # Safety
    /// `word` came from [`Kept::into_word`], and this is the only time that it is used.
    pub(super) unsafe fn from_word(word: u64) -> Box<Self> {
        // SAFETY: the pointer came from a box, whose only owner is now the caller.
        unsafe { Box::from_raw(ptr::with_exposed_provenance_mut(word as usize)) }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        PAGES.fetch_sub(1, Ordering::Relaxed);
        BYTES.fetch_sub(self.bytes.len() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_as_they_were() {
        let mut noise = [0; PAGE];
        let mut seed = 1u64;
        for byte in &mut noise {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 56) as u8;
        }
        let mut last = [0; PAGE];
        last[PAGE - 1] = 1;
        for (page, shrinks) in [([7; PAGE], true), (last, true), (noise, false)] {
            let Packed::Kept(kept) = Kept::pack(&page) else { panic!("not kept") };
            assert_eq!(kept.bytes.len() < PAGE, shrinks);
            let word = kept.into_word();
            assert_eq!(word & 63, 0);
            let mut back = [0xaa; PAGE];
            // SAFETY: the word was made above, and is used once.
            unsafe { Kept::from_word(word) }.unpack(&mut back);
            assert!(back == page);
        }
        assert!(matches!(Kept::pack(&[0; PAGE]), Packed::Zero));
    }
}
