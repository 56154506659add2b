//! Arithmetic with its flags (AMD APM vol. 3, 3.1.4), for operands of 1, 2, 4 and 8 bytes.

use iced_x86::ConditionCode;

use super::operand::mask;

pub(super) const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
pub(super) const OF: u64 = 1 << 11;
/// All six.
pub(super) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// A binary operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Adc,
    Sub,
    Sbb,
    And,
    Or,
    Xor,
}

const fn top(bytes: usize) -> u64 {
    1 << (8 * bytes - 1)
}

/// SF, ZF and PF of a result.
pub(super) const fn of_result(result: u64, bytes: usize) -> u64 {
    let result = result & mask(bytes);
    let sign = if result & top(bytes) != 0 { SF } else { 0 };
    let zero = if result == 0 { ZF } else { 0 };
    let parity = if (result as u8).count_ones().is_multiple_of(2) { PF } else { 0 };
    sign | zero | parity
}

/// The result and RFLAGS after it.
pub(super) const fn binary(operation: Binary, a: u64, b: u64, bytes: usize, rflags: u64) -> (u64, u64) {
    let (a, b) = (a & mask(bytes), b & mask(bytes));
    let carry = match operation {
        Binary::Adc | Binary::Sbb => rflags & CF,
        _ => 0,
    };
    let (result, special) = match operation {
        Binary::Add | Binary::Adc => {
            let wide = a as u128 + b as u128 + carry as u128;
            let result = wide as u64 & mask(bytes);
            let out = if wide > mask(bytes) as u128 { CF } else { 0 };
            let overflow = if (a ^ result) & (b ^ result) & top(bytes) != 0 { OF } else { 0 };
            (result, out | overflow | (a ^ b ^ result) & AF)
        }
        Binary::Sub | Binary::Sbb => {
            let result = a.wrapping_sub(b).wrapping_sub(carry) & mask(bytes);
            let borrow = if (a as u128) < b as u128 + carry as u128 { CF } else { 0 };
            let overflow = if (a ^ b) & (a ^ result) & top(bytes) != 0 { OF } else { 0 };
            (result, borrow | overflow | (a ^ b ^ result) & AF)
        }
        Binary::And => (a & b, 0),
        Binary::Or => (a | b, 0),
        Binary::Xor => (a ^ b, 0),
    };
    (result, rflags & !ARITHMETIC | special | of_result(result, bytes))
}

/// Whether a condition holds.
pub(super) fn holds(condition: ConditionCode, rflags: u64) -> bool {
    let set = |flag: u64| rflags & flag != 0;
    let less = set(SF) != set(OF);
    match condition {
        ConditionCode::None => true,
        ConditionCode::o => set(OF),
        ConditionCode::no => !set(OF),
        ConditionCode::b => set(CF),
        ConditionCode::ae => !set(CF),
        ConditionCode::e => set(ZF),
        ConditionCode::ne => !set(ZF),
        ConditionCode::be => set(CF) || set(ZF),
        ConditionCode::a => !set(CF) && !set(ZF),
        ConditionCode::s => set(SF),
        ConditionCode::ns => !set(SF),
        ConditionCode::p => set(PF),
        ConditionCode::np => !set(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(ZF),
        ConditionCode::g => !less && !set(ZF),
    }
}

/// INC or DEC: as adding or subtracting 1, but CF stays.
pub(super) const fn step(operation: Binary, a: u64, bytes: usize, rflags: u64) -> (u64, u64) {
    let (result, after) = binary(operation, a, 1, bytes, rflags);
    (result, after & !CF | rflags & CF)
}

#[cfg(test)]
/// Executes an instruction on this CPU: two operands and the flags before, the result and the flags after.
macro_rules! native {
    ($name:literal, $operands:literal, $class:ident, $size:ident, $a:expr, $b:expr, $flags:expr) => {{
        let (mut a, mut flags): ($size, u64) = ($a as $size, $flags);
        // SAFETY: registers and flags only; the stack is used as a push and its pop, past the red zone.
        unsafe {
            core::arch::asm!(
                "lea rsp, [rsp - 128]",
                "push {f}",
                "popfq",
                concat!($name, $operands),
                "pushfq",
                "pop {f}",
                "lea rsp, [rsp + 128]",
                f = inout(reg) flags,
                a = inout($class) a,
                b = in($class) $b as $size,
                in("rcx") $b as u64,
            );
        }
        (u64::from(a), flags)
    }};
}
#[cfg(test)]
pub(super) use native;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;
    use core::arch::asm;

    macro_rules! by_size {
        ($name:literal, $operation:expr, $logic:expr) => {{
            let mut random = Random::new(31);
            for round in 0..20_000 {
                let bytes = [1, 2, 4, 8][round % 4];
                let (a, b) = (random.of_any_length(64), random.of_any_length(64));
                let flags = 0x202 | random.next() & ARITHMETIC;
                let (result, after) = match bytes {
                    1 => native!($name, " {a}, {b}", reg_byte, u8, a, b, flags),
                    2 => native!($name, " {a:x}, {b:x}", reg, u16, a, b, flags),
                    4 => native!($name, " {a:e}, {b:e}", reg, u32, a, b, flags),
                    _ => native!($name, " {a:r}, {b:r}", reg, u64, a, b, flags),
                };
                let ours = binary($operation, a, b, bytes, flags);
                // AF is undefined after logical operations.
                let compared = if $logic { ARITHMETIC & !AF } else { ARITHMETIC };
                assert_eq!(
                    (ours.0, ours.1 & compared),
                    (result, after & compared),
                    "{} {a:#x}, {b:#x}, {bytes} bytes",
                    $name
                );
            }
        }};
    }

    #[test]
    fn results_and_flags_are_those_of_a_cpu() {
        by_size!("add", Binary::Add, false);
        by_size!("adc", Binary::Adc, false);
        by_size!("sub", Binary::Sub, false);
        by_size!("sbb", Binary::Sbb, false);
        by_size!("and", Binary::And, true);
        by_size!("or", Binary::Or, true);
        by_size!("xor", Binary::Xor, true);
    }

    #[test]
    fn conditions_are_those_of_a_cpu() {
        macro_rules! native_condition {
            ($name:literal, $flags:expr) => {{
                let yes: u8;
                // SAFETY: as in `native`.
                unsafe {
                    asm!(
                        "lea rsp, [rsp - 128]",
                        "push {f}",
                        "popfq",
                        "lea rsp, [rsp + 128]",
                        concat!("set", $name, " {y}"),
                        f = in(reg) $flags,
                        y = out(reg_byte) yes,
                    );
                }
                yes != 0
            }};
        }
        for bits in 0..64u64 {
            let bit = |n: u64, flag: u64| if bits & 1 << n != 0 { flag } else { 0 };
            let flags = 0x202 | bit(0, CF) | bit(1, PF) | bit(2, AF) | bit(3, ZF) | bit(4, SF) | bit(5, OF);
            macro_rules! same {
                ($($code:ident $name:literal)*) => {
                    $(assert_eq!(holds(ConditionCode::$code, flags), native_condition!($name, flags), $name);)*
                };
            }
            same!(o "o" no "no" b "b" ae "ae" e "e" ne "ne" be "be" a "a" s "s" ns "ns" p "p" np "np" l "l" ge "ge" le "le" g "g");
        }
    }

    #[test]
    fn steps_keep_the_carry() {
        assert_eq!(step(Binary::Add, 0xff, 1, CF), (0, CF | ZF | PF | AF));
        assert_eq!(step(Binary::Sub, 0x80, 1, 0), (0x7f, OF | AF));
    }
}
