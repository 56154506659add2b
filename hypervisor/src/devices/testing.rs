//! What the device tests share: a small generator whose sequences are the same on every run.

/// SplitMix64: enough to throw bytes at a register file, and a failing seed can be written down.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A number of up to `bits` bits, each length as likely as another.
    pub(crate) fn of_any_length(&mut self, bits: u64) -> u64 {
        let length = self.below(bits);
        self.below(1 << length)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next() as u8
    }
}
