//! Where choices come from.

/// A stream of choices.
pub trait Source {
    /// A number of up to 64 bits.
    fn next(&mut self) -> u64;

    /// Whether there is nothing left; [`Source::next`] gives zeros then.
    fn is_empty(&self) -> bool;

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// One of some.
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number of which small ones, single bits and all ones are as likely as any.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(16),
            1 => 1 << self.below(64),
            2 => self.below(1 << 16),
            3 => u64::MAX >> self.below(64),
            _ => self.next(),
        }
    }
}

/// From a seed, without end (SplitMix64).
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// The stream of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }
}

impl Source for Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn is_empty(&self) -> bool {
        false
    }
}

/// From a fuzzer's bytes: as few for a choice as it needs, so that a byte changed is a choice changed.
#[derive(Clone, Debug)]
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    /// The stream of these bytes.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, count: usize) -> u64 {
        let (now, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        let mut raw = [0; 8];
        raw[..now.len()].copy_from_slice(now);
        u64::from_le_bytes(raw)
    }

    /// All that is left.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }
}

impl Source for Bytes<'_> {
    fn next(&mut self) -> u64 {
        self.take(8)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn below(&mut self, limit: u64) -> u64 {
        let bytes = (64 - (limit - 1).leading_zeros()).div_ceil(8).max(1);
        self.take(bytes as usize) % limit
    }
}
