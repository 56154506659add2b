//! What firmware leaves behind for real mode on a machine for test kernels: interrupt vectors, and handlers behind them.
//!
//! A kernel that goes back to real mode finds there what a PC's firmware has left: 256 vectors at address 0, each of which
//! can be taken. Behind most of them is an IRET. Hardware's, as the 8259s are handed over
//! ([`crate::devices::pic::PicPair::handed_over`]), end their interrupt; the timer's counts its ticks in firmware's data area
//! besides, 18.2 a second. There are no services: a software interrupt returns with everything as it was.

use core::ops::Range;

use super::{GuestMemory, GuestMemoryError};
use crate::devices::pic::{MASTER_VECTORS, SLAVE_VECTORS};

const VECTORS: u64 = 0;
const VECTOR_COUNT: usize = 256;
/// The handlers' segment: firmware's own.
const SEGMENT: u16 = 0xf000;
/// Where the handlers are, in guest-physical memory.
pub(super) const HANDLERS: Range<u64> = (SEGMENT as u64) << 4..((SEGMENT as u64) << 4) + BYTES as u64;
/// Ticks of the timer since midnight, a double word.
const TICKS: u16 = 0x46c;

/// INC of the double word at [`TICKS`], every register kept: PUSH DS, PUSH AX, XOR AX,AX, MOV DS,AX, INC, POP AX, POP DS.
/// What follows ends the interrupt.
const COUNT: [u8; 13] = {
    let [low, high] = TICKS.to_le_bytes();
    [0x1e, 0x50, 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, low, high, 0x58, 0x1f]
};
/// PUSH AX; a non-specific EOI to the master; POP AX, IRET.
const END_MASTER: [u8; 7] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
/// The same for the slave, then for the master.
const END_SLAVE: [u8; 9] = [0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];
const IRET: u8 = 0xcf;

const AT_TICK: u16 = 0;
const AT_MASTER: u16 = AT_TICK + COUNT.len() as u16;
const AT_SLAVE: u16 = AT_MASTER + END_MASTER.len() as u16;
const AT_REST: u16 = AT_SLAVE + END_SLAVE.len() as u16;
const BYTES: usize = AT_REST as usize + 1;

/// Writes vectors and handlers.
pub(super) fn write(memory: &impl GuestMemory) -> Result<(), GuestMemoryError> {
    let mut handlers = [IRET; BYTES];
    for (at, code) in [(AT_TICK, &COUNT[..]), (AT_MASTER, &END_MASTER), (AT_SLAVE, &END_SLAVE)] {
        handlers[usize::from(at)..][..code.len()].copy_from_slice(code);
    }
    memory.write(HANDLERS.start, &handlers)?;
    let mut vectors = [[0; 4]; VECTOR_COUNT];
    for (vector, entry) in vectors.iter_mut().enumerate() {
        let at = match vector.checked_sub(MASTER_VECTORS.into()) {
            Some(0) => AT_TICK,
            Some(1..8) => AT_MASTER,
            _ if vector.checked_sub(SLAVE_VECTORS.into()).is_some_and(|input| input < 8) => AT_SLAVE,
            _ => AT_REST,
        };
        *entry = (u32::from(SEGMENT) << 16 | u32::from(at)).to_le_bytes();
    }
    memory.write(VECTORS, vectors.as_flattened())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::TestMemory;
    use alloc::vec::Vec;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    /// The instructions from a vector's handler to its IRET.
    fn handler(memory: &TestMemory, vector: u64) -> Vec<Mnemonic> {
        let target = memory.u32(4 * vector);
        let at = u64::from(target >> 16 << 4) + u64::from(target & 0xffff);
        let code = memory.bytes(at, 32);
        let mut decoder = Decoder::new(16, &code, DecoderOptions::NONE);
        let mut met = Vec::new();
        while met.last() != Some(&Mnemonic::Iret) {
            met.push(decoder.decode().mnemonic());
        }
        met
    }

    #[test]
    fn every_vector_leads_to_a_handler_that_returns() {
        use Mnemonic::{Inc, Iret, Mov, Out, Pop, Push, Xor};
        let memory = TestMemory::whole(64 << 20);
        write(&memory).expect("memory enough");
        let end_master = [Push, Mov, Out, Pop, Iret];
        let tick = [[Push, Push, Xor, Mov, Inc, Pop, Pop].as_slice(), &end_master].concat();
        for vector in 0..256 {
            let expected = match vector {
                0x08 => &tick[..],
                0x09..0x10 => &end_master,
                0x70..0x78 => &[Push, Mov, Out, Out, Pop, Iret],
                _ => &[Iret],
            };
            assert_eq!(handler(&memory, vector), expected, "vector {vector:#x}");
        }
    }
}
