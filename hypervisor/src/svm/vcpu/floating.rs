//! The guest's x87, MMX and SSE state, as FXSAVE has it (APM vol. 2, 11.4.4), in the emulator's terms and back.
//!
//! The image holds the x87 registers as a stack: its slot *j* is register (TOP + *j*) mod 8. MMX registers go by the
//! registers' own numbers.

use crate::emulate::{Floating, MmxUse, Wide};
use crate::svm::entry::Switch;

/// An FXSAVE image.
type Image = [u8; 512];

const CONTROL: usize = 0;
const STATUS: usize = 2;
const TAGS: usize = 4;
const REGISTERS: usize = 32;
const SLOT: usize = 16;
/// Where XMM0 is.
const XMM: usize = 160;
const TOP_SHIFT: u16 = 11;
const TOP: u16 = 7 << TOP_SHIFT;
const MANTISSA: usize = 8;
/// Sign and exponent of a register that an MMX instruction has written.
const WRITTEN: [u8; 2] = [0xff; 2];

fn word(image: &Image, at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

fn set_word(image: &mut Image, at: usize, value: u16) {
    image[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Where register `number` is.
fn slot(image: &Image, number: usize) -> usize {
    let top = usize::from((word(image, STATUS) & TOP) >> TOP_SHIFT);
    REGISTERS + SLOT * ((number + 8 - top) & 7)
}

impl Wide for Switch {
    fn vector(&self, number: usize) -> [u64; 2] {
        let (halves, _) = self.fx[XMM..].as_chunks::<8>();
        [0, 1].map(|half| halves.get(2 * number + half).map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    fn set_vector(&mut self, number: usize, value: [u64; 2]) {
        let (halves, _) = self.fx[XMM..].as_chunks_mut::<8>();
        for (to, half) in halves.iter_mut().skip(2 * number).zip(value) {
            *to = half.to_le_bytes();
        }
    }

    fn floating(&self) -> Floating {
        floating(&self.fx)
    }

    fn set_floating(&mut self, floating: &Floating) {
        set_floating(&mut self.fx, floating);
    }
}

/// The x87 unit.
fn floating(image: &Image) -> Floating {
    let mmx = core::array::from_fn(|number| {
        let at = slot(image, number);
        image[at..at + MANTISSA].try_into().map_or(0, u64::from_le_bytes)
    });
    Floating { control: word(image, CONTROL), status: word(image, STATUS), mmx, used: MmxUse::None }
}

/// Takes over what an instruction has made of it.
fn set_floating(image: &mut Image, floating: &Floating) {
    if floating.used != MmxUse::None {
        let registers: [[u8; SLOT]; 8] = core::array::from_fn(|number| {
            let at = slot(image, number);
            image[at..at + SLOT].try_into().unwrap_or_default()
        });
        for (to, register) in image[REGISTERS..XMM].chunks_exact_mut(SLOT).zip(registers) {
            to.copy_from_slice(&register);
        }
        // All of them hold something, and the stack begins at the first.
        image[TAGS] = 0xff;
        set_word(image, STATUS, floating.status & !TOP);
        if let MmxUse::Written(number) = floating.used {
            let at = REGISTERS + SLOT * number;
            image[at..at + MANTISSA].copy_from_slice(&floating.mmx[number].to_le_bytes());
            image[at + MANTISSA..at + MANTISSA + 2].copy_from_slice(&WRITTEN);
        }
        return;
    }
    set_word(image, CONTROL, floating.control);
    set_word(image, STATUS, floating.status);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Register *n* holds *n* everywhere, and the stack begins at 5.
    fn image() -> Image {
        let mut image = [0; 512];
        set_word(&mut image, CONTROL, 0x37f);
        set_word(&mut image, STATUS, 5 << TOP_SHIFT | 1);
        for number in 0..8 {
            let at = slot(&image, number);
            image[at..at + 10].fill(number as u8);
        }
        image
    }

    #[test]
    fn registers_go_by_number_and_the_image_by_stack() {
        let mut image = image();
        assert_eq!(image[REGISTERS], 5);
        let before = floating(&image);
        assert_eq!(before.mmx, core::array::from_fn(|number| number as u64 * 0x0101_0101_0101_0101));
        let unchanged = image;
        set_floating(&mut image, &before);
        assert_eq!(image, unchanged);
        let mut mmx = before.mmx;
        mmx[3] = 0x1122_3344_5566_7788;
        set_floating(&mut image, &Floating { mmx, used: MmxUse::Written(3), ..before });
        let after = floating(&image);
        assert_eq!((after.mmx, after.status, image[TAGS]), (mmx, 1, 0xff));
        let at = REGISTERS + SLOT * 3;
        assert_eq!((&image[at + 8..at + 10], &image[at + 16..at + 26]), ([0xff; 2].as_slice(), [4; 10].as_slice()));
    }

    #[test]
    fn words_are_set_alone() {
        let mut image = image();
        let changed = Floating { control: 0x40, status: 0x8081 | 5 << TOP_SHIFT, ..floating(&image) };
        set_floating(&mut image, &changed);
        assert_eq!((floating(&image), image[REGISTERS]), (changed, 5));
    }
}
