//! The serial port against another implementation, `vm-superio`, on random programs.
//!
//! Compared is what both model alike: registers, divisor, modem lines, received data and its status bit, and what leaves
//! the port. Interrupts are not: the other one reports edges and clears all causes on a read of IIR.

use alloc::vec::Vec;
use std::convert::Infallible;

use vm_superio::{Serial, Trigger};

use super::testing::Random;
use super::uart::Uart;

/// Interrupts go nowhere.
struct Ignored;

impl Trigger for Ignored {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Received bytes that neither side may exceed: the depth of the real part's FIFO.
const DEPTH: usize = 16;
const LOOPBACK: u8 = 1 << 4;

#[test]
fn random_programs_see_the_same_port() {
    for seed in 0..50 {
        let mut random = Random::new(seed);
        let mut ours = Uart::new(1 << 16, 64);
        let mut theirs = Serial::new(Ignored, Vec::new());
        let (mut mcr, mut dlab, mut waiting) = (0, false, 0usize);
        for (offset, value) in [(3, 0), (4, 0), (2, 1)] {
            ours.write(offset, value);
            theirs.write(offset, value).expect("no trigger fails");
        }
        for step in 0..4000 {
            let value = random.byte();
            match random.below(3) {
                0 if waiting < DEPTH && mcr & LOOPBACK == 0 => {
                    assert_eq!(ours.push_input(&[value]), 1);
                    assert_eq!(theirs.enqueue_raw_bytes(&[value]).expect("room"), 1);
                    waiting += 1;
                }
                1 => {
                    let (offset, value) = match random.below(6) {
                        0 if mcr & LOOPBACK != 0 && !dlab && waiting == DEPTH => continue,
                        0 => (0, value),
                        1 => (1, value),
                        2 => (3, if random.below(2) == 0 { value } else { value & 0x7f }),
                        3 => (4, value & 0x1f),
                        _ => (7, value),
                    };
                    ours.write(offset, value);
                    theirs.write(offset, value).expect("no trigger fails");
                    match offset {
                        0 if !dlab && mcr & LOOPBACK != 0 => waiting += 1,
                        3 => dlab = value & 0x80 != 0,
                        4 => mcr = value,
                        _ => {}
                    }
                }
                _ => {
                    let offset = [0, 1, 3, 4, 5, 6, 7][random.below(7) as usize];
                    // The low half of the modem status says what has changed, which the other one doesn't track.
                    let mask = if offset == 6 { 0xf0 } else { 0xff };
                    let (a, b) = (ours.read(offset), theirs.read(offset));
                    assert_eq!(a & mask, b & mask, "seed {seed} step {step} register {offset}");
                    if offset == 0 && !dlab {
                        waiting = waiting.saturating_sub(1);
                    }
                }
            }
        }
        let mut sent = Vec::new();
        ours.take_output(&mut sent);
        assert!(!sent.is_empty());
        assert_eq!(&sent, theirs.writer(), "seed {seed}");
    }
}
