//! A bounded queue of bytes.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Bytes on their way to a port.
#[derive(Debug)]
pub(super) struct Queue {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Queue {
    /// A queue for at most `limit` bytes.
    pub(super) const fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit }
    }

    /// Takes all the memory that it can ever need.
    pub(super) fn reserve(&mut self) {
        self.bytes.reserve_exact(self.limit - self.bytes.len());
    }

    /// Bytes that still have room.
    pub(super) fn room(&self) -> usize {
        self.limit - self.bytes.len()
    }

    /// Adds all bytes if `reserve` bytes stay free then, else none.
    pub(super) fn push_all(&mut self, bytes: &[u8], reserve: usize) -> bool {
        let room = self.bytes.len() + bytes.len() + reserve <= self.limit;
        if room {
            self.bytes.extend(bytes);
        }
        room
    }

    /// Copies up to `N` bytes from the front.
    pub(super) fn front<const N: usize>(&self) -> Vec<u8> {
        self.bytes.iter().take(N).copied().collect()
    }

    /// Takes bytes away that [`Queue::front`] gave.
    pub(super) fn consume(&mut self, count: usize) {
        self.bytes.drain(..count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_the_order_stays() {
        let mut queue = Queue::new(4);
        assert!(queue.push_all(b"ab", 2));
        assert!(!queue.push_all(b"c", 2));
        assert_eq!(queue.room(), 2);
        assert!(queue.push_all(b"cd", 0) && !queue.push_all(b"e", 0));
        assert_eq!(queue.front::<3>(), b"abc");
        queue.consume(3);
        assert_eq!(queue.front::<3>(), b"d");
    }
}
