//! Shifts, rotations, multiplication, division and bit counts with their flags (AMD APM vol. 3, 3.1), for operands of 1, 2, 4
//! and 8 bytes. Flags that the manual leaves undefined keep their value, but for OF of a shift by more than one, which is
//! what a shift by one would make of it.

use super::alu::{ARITHMETIC, CF, OF, ZF, of_result};
use super::operand::mask;

/// A shift or rotation by a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Left,
    Right,
    /// The sign fills.
    Arithmetic,
    RotateLeft,
    RotateRight,
    /// Through CF.
    RotateCarryLeft,
    RotateCarryRight,
}

const fn bit(value: u64, number: u32) -> bool {
    number < 64 && value >> number & 1 != 0
}

const fn flag(set: bool, flag: u64) -> u64 {
    if set { flag } else { 0 }
}

/// The result and RFLAGS after it. The count is cut to 5 bits, or 6 for operands of 8 bytes; with a count of 0 nothing changes.
pub(super) fn shift(kind: Shift, value: u64, count: u64, bytes: usize, rflags: u64) -> (u64, u64) {
    let bits = 8 * bytes as u32;
    let count = (count & if bytes == 8 { 63 } else { 31 }) as u32;
    let value = value & mask(bytes);
    if count == 0 {
        return (value, rflags);
    }
    let wide = u128::from(value);
    let signed = i128::from((value << (64 - bits)) as i64 >> (64 - bits));
    let carry = rflags & CF != 0;
    let (result, out) = match kind {
        Shift::Left => ((wide << count) as u64, wide << count >> bits & 1 != 0),
        Shift::Right => ((wide >> count) as u64, wide >> (count - 1) & 1 != 0),
        Shift::Arithmetic => ((signed >> count) as u64, signed >> (count - 1) & 1 != 0),
        Shift::RotateLeft => {
            let by = count % bits;
            let result = (wide << by | wide >> (bits - by)) as u64;
            (result, bit(result, 0))
        }
        Shift::RotateRight => {
            let by = count % bits;
            let result = (wide >> by | wide << (bits - by)) as u64;
            (result, bit(result, bits - 1))
        }
        Shift::RotateCarryLeft | Shift::RotateCarryRight => {
            let ring = bits + 1;
            let by = count % ring;
            let left = if kind == Shift::RotateCarryLeft { by } else { (ring - by) % ring };
            // At most 65 bits, shifted by at most 64 of them.
            let whole = wide | u128::from(carry) << bits;
            let turned = if left == 0 { whole } else { rotate_ring(whole, left, ring) };
            (turned as u64, turned >> bits & 1 != 0)
        }
    };
    let result = result & mask(bytes);
    let (top, next) = (bit(result, bits - 1), bit(result, bits.wrapping_sub(2)));
    let overflow = match kind {
        Shift::Left | Shift::RotateLeft | Shift::RotateCarryLeft => top != out,
        Shift::Right => bit(value, bits - 1),
        Shift::Arithmetic => false,
        Shift::RotateRight | Shift::RotateCarryRight => top != next,
    };
    let (changed, more) = match kind {
        Shift::Left | Shift::Right | Shift::Arithmetic => (ARITHMETIC, of_result(result, bytes)),
        _ => (CF | OF, 0),
    };
    (result, rflags & !changed | more | flag(out, CF) | flag(overflow, OF))
}

fn rotate_ring(value: u128, left: u32, ring: u32) -> u128 {
    let all = (1u128 << ring) - 1;
    (value << left | value >> (ring - left)) & all
}

/// SHLD and SHRD: `value` is shifted, and bits of `other` come in. With a count beyond the operand (16 bits only) the manual
/// defines nothing; then nothing changes.
pub(super) fn double(left: bool, value: u64, other: u64, count: u64, bytes: usize, rflags: u64) -> (u64, u64) {
    let bits = 8 * bytes as u32;
    let count = (count & if bytes == 8 { 63 } else { 31 }) as u32;
    let (value, other) = (value & mask(bytes), other & mask(bytes));
    if count == 0 || count > bits {
        return (value, rflags);
    }
    let (result, out) = if left {
        let both = u128::from(value) << bits | u128::from(other);
        ((both << count >> bits) as u64, bit(value, bits - count))
    } else {
        let both = u128::from(other) << bits | u128::from(value);
        ((both >> count) as u64, bit(value, count - 1))
    };
    let result = result & mask(bytes);
    let overflow = bit(result ^ value, bits - 1);
    (result, rflags & !ARITHMETIC | of_result(result, bytes) | flag(out, CF) | flag(overflow, OF))
}

/// The double-sized product, low half first, and RFLAGS: CF and OF say that the upper half matters.
pub(super) fn multiply(signed: bool, a: u64, b: u64, bytes: usize, rflags: u64) -> (u64, u64, u64) {
    let bits = 8 * bytes as u32;
    let extend = |value: u64| i128::from((value << (64 - bits)) as i64 >> (64 - bits));
    let (low, high, matters) = if signed {
        let product = extend(a) * extend(b);
        let low = product as u64 & mask(bytes);
        (low, (product >> bits) as u64 & mask(bytes), product != extend(low))
    } else {
        let product = u128::from(a & mask(bytes)) * u128::from(b & mask(bytes));
        (product as u64 & mask(bytes), (product >> bits) as u64, product >> bits != 0)
    };
    (low, high, rflags & !(CF | OF) | flag(matters, CF | OF))
}

/// Quotient and remainder of the double-sized number `high:low`; `None`: #DE.
pub(super) fn divide(signed: bool, high: u64, low: u64, by: u64, bytes: usize) -> Option<(u64, u64)> {
    let bits = 8 * bytes as u32;
    let (high, low, by) = (high & mask(bytes), low & mask(bytes), by & mask(bytes));
    let number = u128::from(high) << bits | u128::from(low);
    if signed {
        let number = (number << (128 - 2 * bits)) as i128 >> (128 - 2 * bits);
        let by = i128::from((by << (64 - bits)) as i64 >> (64 - bits));
        let quotient = number.checked_div(by)?;
        let least = -1i128 << (bits - 1);
        (least..-least).contains(&quotient).then_some((quotient as u64, (number % by) as u64))
    } else {
        let quotient = number.checked_div(u128::from(by))?;
        (quotient <= u128::from(mask(bytes))).then(|| (quotient as u64, (number % u128::from(by)) as u64))
    }
}

/// A count of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Count {
    /// BSF and BSR: the position of the lowest or highest; of 0 there is none.
    ScanForward,
    ScanReverse,
    Trailing,
    Leading,
    Ones,
}

/// The count, if there is one, and RFLAGS.
pub(super) fn count(kind: Count, value: u64, bytes: usize, rflags: u64) -> (Option<u64>, u64) {
    let bits = 8 * bytes as u32;
    let value = value & mask(bytes);
    let zero = flag(value == 0, ZF);
    match kind {
        Count::ScanForward => ((value != 0).then(|| u64::from(value.trailing_zeros())), rflags & !ZF | zero),
        Count::ScanReverse => ((value != 0).then(|| u64::from(63 - value.leading_zeros())), rflags & !ZF | zero),
        Count::Ones => (Some(u64::from(value.count_ones())), rflags & !ARITHMETIC | zero),
        Count::Trailing | Count::Leading => {
            let count = match kind {
                Count::Trailing => value.trailing_zeros().min(bits),
                _ => value.leading_zeros() - (64 - bits),
            };
            let flags = flag(value == 0, CF) | flag(count == 0, ZF);
            (Some(u64::from(count)), rflags & !(CF | ZF) | flags)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::alu::{AF, native};
    use super::*;
    use crate::devices::testing::Random;

    /// Flags that an instruction defines, by its count.
    fn check(name: &str, ours: (u64, u64), native: (u64, u64), defined: u64, what: (u64, u64, usize)) {
        assert_eq!((ours.0, ours.1 & defined), (native.0, native.1 & defined), "{name} {what:x?}");
    }

    macro_rules! by_count {
        ($name:literal, $function:expr, $counted:expr) => {{
            let mut random = Random::new(47);
            for round in 0..20_000 {
                let bytes = [1, 2, 4, 8][round % 4];
                let (a, count) = (random.of_any_length(64), random.below(256));
                let flags = 0x202 | random.next() & ARITHMETIC;
                let theirs = match bytes {
                    1 => native!($name, " {a}, cl /* {b} */", reg_byte, u8, a, count, flags),
                    2 => native!($name, " {a:x}, cl /* {b:x} */", reg, u16, a, count, flags),
                    4 => native!($name, " {a:e}, cl /* {b:e} */", reg, u32, a, count, flags),
                    _ => native!($name, " {a:r}, cl /* {b:r} */", reg, u64, a, count, flags),
                };
                let masked = count & if bytes == 8 { 63 } else { 31 };
                let beyond = $counted && masked >= 8 * bytes as u64;
                let defined = match masked {
                    0 => ARITHMETIC,
                    1 => ARITHMETIC & !AF,
                    // The bit that went out last is gone.
                    _ if beyond => ARITHMETIC & !(AF | OF | CF),
                    _ => ARITHMETIC & !(AF | OF),
                };
                check($name, shift($function, a, count, bytes, flags), theirs, defined, (a, count, bytes));
            }
        }};
    }

    #[test]
    fn shifts_are_those_of_a_cpu() {
        by_count!("shl", Shift::Left, true);
        by_count!("shr", Shift::Right, true);
        by_count!("sar", Shift::Arithmetic, false);
        by_count!("rol", Shift::RotateLeft, false);
        by_count!("ror", Shift::RotateRight, false);
        by_count!("rcl", Shift::RotateCarryLeft, false);
        by_count!("rcr", Shift::RotateCarryRight, false);
    }

    #[test]
    fn products_are_those_of_a_cpu() {
        let mut random = Random::new(48);
        for _ in 0..20_000 {
            let (a, b) = (random.of_any_length(64), random.of_any_length(64));
            let flags = 0x202 | random.next() & ARITHMETIC;
            for (bytes, theirs) in [
                (2, native!("imul", " {a:x}, {b:x}", reg, u16, a, b, flags)),
                (4, native!("imul", " {a:e}, {b:e}", reg, u32, a, b, flags)),
                (8, native!("imul", " {a:r}, {b:r}", reg, u64, a, b, flags)),
            ] {
                let (low, _, after) = multiply(true, a, b, bytes, flags);
                check("imul", (low, after), theirs, CF | OF, (a, b, bytes));
            }
            let (low, high, after) = multiply(false, a, b, 8, flags);
            assert_eq!(u128::from(high) << 64 | u128::from(low), u128::from(a) * u128::from(b));
            assert_eq!(after & CF != 0, high != 0);
            let (low, high, _) = multiply(true, a, b, 8, flags);
            let product = i128::from(a as i64) * i128::from(b as i64);
            assert_eq!((u128::from(high) << 64 | u128::from(low)) as i128, product);
        }
    }

    #[test]
    fn quotients_undo_products() {
        let mut random = Random::new(49);
        for round in 0..40_000 {
            let bytes = [1, 2, 4, 8][round % 4];
            let (a, by) = (random.of_any_length(64) & mask(bytes), random.of_any_length(64) & mask(bytes));
            let (low, high, _) = multiply(round % 8 < 4, a, by, bytes, 0);
            let back = divide(round % 8 < 4, high, low, by, bytes);
            match by {
                0 => assert_eq!(back, None),
                _ => assert_eq!(back.map(|(q, r)| (q & mask(bytes), r & mask(bytes))), Some((a, 0)), "{a:#x} {by:#x}"),
            }
        }
        assert_eq!(divide(false, 1, 0, 1, 4), None, "too large");
        assert_eq!(divide(true, 0xff, 0x80, 0xff, 1), None, "-128 / -1");
        assert_eq!(divide(true, u64::MAX, 1 << 63, u64::MAX, 8), None, "the same in 64 bits");
        assert_eq!(divide(true, 1 << 63, 0, u64::MAX, 8), None, "the least number of 128 bits by -1");
        assert_eq!(divide(true, 0xff, 0xf9, 2, 1).map(|(q, r)| (q as i8, r as i8)), Some((-3, -1)));
    }

    #[test]
    fn counts_and_double_shifts_are_those_of_a_cpu() {
        let mut random = Random::new(50);
        for _ in 0..20_000 {
            let (a, b) = (random.of_any_length(64), random.of_any_length(64));
            let flags = 0x202 | random.next() & ARITHMETIC;
            if b & 0xffff != 0 {
                let theirs = native!("bsf", " {a:x}, {b:x}", reg, u16, a, b, flags);
                let (value, after) = count(Count::ScanForward, b, 2, flags);
                check("bsf", (value.unwrap(), after), theirs, ZF, (a, b, 2));
                let theirs = native!("bsr", " {a:r}, {b:r}", reg, u64, a, b, flags);
                let (value, after) = count(Count::ScanReverse, b, 8, flags);
                check("bsr", (value.unwrap(), after), theirs, ZF, (a, b, 8));
            }
            let theirs = native!("popcnt", " {a:e}, {b:e}", reg, u32, a, b, flags);
            let (value, after) = count(Count::Ones, b, 4, flags);
            check("popcnt", (value.unwrap(), after), theirs, ARITHMETIC, (a, b, 4));
            let theirs = native!("shld", " {a:e}, {b:e}, 7", reg, u32, a, b, flags);
            check("shld", double(true, a, b, 7, 4, flags), theirs, ARITHMETIC & !(AF | OF), (a, b, 4));
            let theirs = native!("shrd", " {a:r}, {b:r}, 33", reg, u64, a, b, flags);
            check("shrd", double(false, a, b, 33, 8, flags), theirs, ARITHMETIC & !(AF | OF), (a, b, 8));
            let theirs = native!("shld", " {a:x}, {b:x}, 1", reg, u16, a, b, flags);
            check("shld", double(true, a, b, 1, 2, flags), theirs, ARITHMETIC & !AF, (a, b, 2));
        }
        assert_eq!(count(Count::Trailing, 0, 2, ZF), (Some(16), CF));
        assert_eq!(count(Count::Leading, 0x80, 1, CF), (Some(0), ZF));
        assert_eq!(count(Count::ScanForward, 0, 8, 0), (None, ZF));
    }
}
