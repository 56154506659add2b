//! The pair of 8259A interrupt controllers of a PC, and their edge/level registers (ELCR).
//!
//! Inputs are levels set with [`PicPair::set_irq`]; the slave's output is wired to the master's input 2. The output to the
//! CPU is a level too, [`PicPair::output`], computed from the state. The CPU answers it with
//! [`PicPair::acknowledge`], the two INTA pulses in one. Between the two the request may vanish; then the answer is the
//! spurious vector 7 of the chip that was asked, and no in-service bit is set, as in the data sheet.
//!
//! An edge-triggered input latches in IRR on its rising edge and leaves it when acknowledged, or when the line falls
//! before that. A level-triggered one follows the line.

use serde::{Deserialize, Serialize};

use super::saved::{BadState, require};

/// ISR bit and input of the master that the slave is wired to.
const CASCADE: u8 = 2;
/// The input of the timer.
const TIMER: u8 = 0;

/// Vector of the master's input 0, as firmware sets the chips up.
pub const MASTER_VECTORS: u8 = 0x08;
/// Vector of the slave's input 0, as firmware sets the chips up.
pub const SLAVE_VECTORS: u8 = 0x70;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Init {
    Ready,
    ExpectIcw2,
    ExpectIcw3,
    ExpectIcw4,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pic {
    /// Levels of the input lines.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// 1 = level-triggered, from the ELCR.
    level: u8,
    /// Vector of input 0; the low three bits are zero.
    base: u8,
    /// The input that has the lowest priority now; the next one has the highest.
    lowest: u8,
    init: Init,
    wants_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    /// OCW3: special mask mode.
    special_mask: bool,
    /// ICW4: special fully nested mode.
    fully_nested: bool,
    /// OCW3: port 0 reads ISR instead of IRR.
    read_isr: bool,
    /// OCW3: the next read of port 0 is an acknowledge.
    poll: bool,
    master: bool,
}

impl Pic {
    fn new(master: bool) -> Self {
        Self {
            lines: 0,
            irr: 0,
            isr: 0,
            imr: 0xff,
            level: 0,
            base: 0,
            lowest: 7,
            init: Init::Ready,
            wants_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            fully_nested: false,
            read_isr: false,
            poll: false,
            master,
        }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << (input & 7);
        let rising = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.level & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rising {
            self.irr |= bit;
        } else if !high {
            self.irr &= !bit;
        }
    }

    /// The inputs from highest to lowest priority.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let first = self.lowest.wrapping_add(1);
        (0..8).map(move |n| first.wrapping_add(n) & 7)
    }

    /// The input to be served now, if any: requested, not masked, and above everything in service.
    fn request(&self) -> Option<u8> {
        // Most of the time nothing is asked for.
        if self.init != Init::Ready || self.irr & !self.imr == 0 {
            return None;
        }
        for input in self.by_priority() {
            let bit = 1 << input;
            if self.irr & bit & !self.imr != 0 {
                // In special fully nested mode the master lets the slave interrupt itself: a higher request may have come
                // in on another of the slave's inputs. In special mask mode only masked in-service bits stop blocking.
                let nested_again = self.fully_nested && self.master && input == CASCADE;
                let in_service = self.isr & bit != 0;
                if !in_service || nested_again {
                    return Some(input);
                }
            }
            let blocks = self.isr & bit != 0 && !(self.special_mask && self.imr & bit != 0);
            if blocks {
                return None;
            }
        }
        None
    }

    /// Takes `input` into service.
    fn accept(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    /// The input in service with the highest priority, for a non-specific EOI.
    fn in_service(&self) -> Option<u8> {
        self.by_priority().find(|input| {
            let bit = 1 << input;
            self.isr & bit != 0 && !(self.special_mask && self.imr & bit != 0)
        })
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1: edge detection restarts, so a line that is high now counts again only after it fell; masks and
            // in-service bits are cleared, input 7 becomes the lowest.
            let (lines, level) = (self.lines, self.level);
            *self = Self::new(self.master);
            self.lines = lines;
            self.level = level;
            self.irr = lines & level;
            self.imr = 0;
            self.wants_icw4 = value & 0x01 != 0;
            self.single = value & 0x02 != 0;
            self.init = Init::ExpectIcw2;
        } else if value & 0x08 != 0 {
            // OCW3.
            self.poll = value & 0x04 != 0;
            if value & 0x02 != 0 {
                self.read_isr = value & 0x01 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            // Rotation on automatic EOI, off and on.
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            // Non-specific EOI, without and with rotation.
            command @ (0b001 | 0b101) => {
                if let Some(input) = self.in_service() {
                    self.isr &= !(1 << input);
                    if command == 0b101 {
                        self.lowest = input;
                    }
                }
            }
            // Specific EOI, without and with rotation.
            0b011 => self.isr &= !(1 << named),
            0b111 => {
                self.isr &= !(1 << named);
                self.lowest = named;
            }
            // Set priority.
            0b110 => self.lowest = named,
            // 0b010: no operation.
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Ready => self.imr = value,
            Init::ExpectIcw2 => {
                self.base = value & 0xf8;
                self.init = match (self.single, self.wants_icw4) {
                    (false, _) => Init::ExpectIcw3,
                    (true, true) => Init::ExpectIcw4,
                    (true, false) => Init::Ready,
                };
            }
            // The wiring of the cascade is fixed, so what ICW3 says about it changes nothing.
            Init::ExpectIcw3 => self.init = if self.wants_icw4 { Init::ExpectIcw4 } else { Init::Ready },
            Init::ExpectIcw4 => {
                self.fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init = Init::Ready;
            }
        }
    }

    /// Reads a port; `poll` mode is handled by the pair, which knows both chips.
    fn read(&self, data: bool) -> u8 {
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn set_level_mask(&mut self, level: u8) {
        self.level = level;
        self.irr = self.irr & !level | self.lines & level;
    }
}

/// Which of the two chips a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// Ports 0x20, 0x21 and 0x4d0; inputs 0 to 7.
    Master,
    /// Ports 0xa0, 0xa1 and 0x4d1; inputs 8 to 15.
    Slave,
}

/// Which of a chip's registers a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// The even port: ICW1, OCW2 and OCW3; IRR or ISR when read.
    Command,
    /// The odd port: ICW2 to ICW4, then the mask.
    Data,
    /// The edge/level control register.
    EdgeLevel,
}

/// The two controllers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PicPair {
    master: Pic,
    slave: Pic,
}

impl Default for PicPair {
    fn default() -> Self {
        Self::new()
    }
}

impl PicPair {
    /// Both chips after power-on: everything masked until the guest initialises them.
    pub fn new() -> Self {
        Self { master: Pic::new(true), slave: Pic::new(false) }
    }

    /// Both chips as a PC's firmware hands them over: initialised for real mode's vectors, open for the timer alone. Firmware
    /// opens the inputs of the devices that it drives, and these drive themselves.
    pub fn handed_over() -> Self {
        let mut pics = Self::new();
        for (chip, base, wiring, mask) in [
            (Chip::Master, MASTER_VECTORS, 1 << CASCADE, !(1 << TIMER | 1 << CASCADE)),
            (Chip::Slave, SLAVE_VECTORS, CASCADE, !0),
        ] {
            // ICW1: edges, a cascade, ICW4 follows. ICW4: normal EOI.
            pics.write(chip, Register::Command, 0x11);
            for value in [base, wiring, 0x01, mask] {
                pics.write(chip, Register::Data, value);
            }
        }
        pics
    }

    /// Refuses what no pair of controllers was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        for (pic, master) in [(&self.master, true), (&self.slave, false)] {
            require("8259", "role", pic.master == master)?;
            require("8259", "vector base", pic.base & 7 == 0)?;
            require("8259", "priority", pic.lowest < 8)?;
        }
        Ok(())
    }

    /// Sets the level of input `irq` (0..=15; input 2 is the cascade and has no line of its own).
    pub fn set_irq(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE | 16.. => return,
            0..8 => self.master.set_line(irq, high),
            8..16 => self.slave.set_line(irq - 8, high),
        }
        self.update_cascade();
    }

    /// Whether input `irq` (0..=15) can't reach the CPU: it is masked, or its chip has not been initialised.
    pub fn is_masked(&self, irq: u8) -> bool {
        let (pic, input) = if irq < 8 { (&self.master, irq) } else { (&self.slave, irq & 7) };
        pic.init != Init::Ready || pic.imr & (1 << input) != 0
    }

    /// The level of the INTR pin of the CPU.
    pub fn output(&self) -> bool {
        self.master.request().is_some()
    }

    /// The CPU acknowledges the interrupt: returns its vector and takes it into service.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.request() {
            None => self.master.base | 7,
            Some(CASCADE) => {
                self.master.accept(CASCADE);
                match self.slave.request() {
                    None => self.slave.base | 7,
                    Some(input) => {
                        self.slave.accept(input);
                        self.slave.base | input
                    }
                }
            }
            Some(input) => {
                self.master.accept(input);
                self.master.base | input
            }
        };
        self.update_cascade();
        vector
    }

    /// Reads a register.
    pub fn read(&mut self, chip: Chip, register: Register) -> u8 {
        let pic = self.chip(chip);
        match register {
            Register::EdgeLevel => pic.level,
            _ if core::mem::take(&mut pic.poll) => {
                // The read is the acknowledge, and says which input it was for (bit 7: there was one).
                let answer = match pic.request() {
                    None => 7,
                    Some(input) => {
                        pic.accept(input);
                        0x80 | input
                    }
                };
                self.update_cascade();
                answer
            }
            Register::Command => pic.read(false),
            Register::Data => pic.read(true),
        }
    }

    /// Writes a register.
    pub fn write(&mut self, chip: Chip, register: Register, value: u8) {
        match register {
            Register::Command => self.chip(chip).write_command(value),
            Register::Data => self.chip(chip).write_data(value),
            Register::EdgeLevel => {
                // Timer, keyboard, cascade, clock and coprocessor are edge-triggered for good.
                let writable = if chip == Chip::Master { 0xf8 } else { 0xde };
                self.chip(chip).set_level_mask(value & writable);
            }
        }
        self.update_cascade();
    }

    fn chip(&mut self, chip: Chip) -> &mut Pic {
        match chip {
            Chip::Master => &mut self.master,
            Chip::Slave => &mut self.slave,
        }
    }

    /// Carries the slave's output to the master. When the slave has a further request as soon as one is acknowledged, its
    /// output drops for a moment, which is what makes a new edge for the master; so the line is pulsed.
    fn update_cascade(&mut self) {
        let requested = self.slave.request().is_some();
        if requested && self.master.irr & (1 << CASCADE) == 0 {
            self.master.set_line(CASCADE, false);
        }
        self.master.set_line(CASCADE, requested);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;
    use Chip::{Master, Slave};
    use Register::{Command, Data, EdgeLevel};

    /// As Linux sets it up: vectors 0x30 and 0x38, normal EOI, everything unmasked.
    fn ready() -> PicPair {
        let mut pic = PicPair::new();
        for (chip, base, cascade) in [(Master, 0x30, 4), (Slave, 0x38, 2)] {
            pic.write(chip, Command, 0x11);
            pic.write(chip, Data, base);
            pic.write(chip, Data, cascade);
            pic.write(chip, Data, 0x01);
            pic.write(chip, Data, 0x00);
        }
        pic
    }

    #[test]
    fn nothing_before_initialisation() {
        let mut pic = PicPair::new();
        for irq in 0..=255 {
            pic.set_irq(irq, true);
        }
        assert!(!pic.output());
        assert_eq!(pic.read(Master, Data), 0xff);
    }

    #[test]
    fn edge_is_served_once_until_it_falls() {
        let mut pic = ready();
        pic.set_irq(4, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x34);
        assert!(!pic.output());
        pic.write(Master, Command, 0x20);
        assert!(!pic.output(), "the line is still high: no new edge");
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn priority_nesting_and_specific_eoi() {
        let mut pic = ready();
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.set_irq(5, true);
        assert!(!pic.output(), "5 is below 4, which is in service");
        pic.set_irq(0, true);
        assert_eq!(pic.acknowledge(), 0x30);
        pic.write(Master, Command, 0x60);
        assert!(!pic.output());
        pic.write(Master, Command, 0x64);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn slave_goes_through_the_cascade() {
        let mut pic = ready();
        pic.set_irq(8, true);
        pic.set_irq(14, true);
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.output(), "14 is below 8 on the slave");
        pic.write(Slave, Command, 0x20);
        assert!(!pic.output(), "the master still has the cascade in service");
        pic.write(Master, Command, 0x20);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x3e);
        pic.write(Slave, Command, 0x20);
        pic.write(Master, Command, 0x20);
        assert!(!pic.output());
    }

    #[test]
    fn second_slave_request_after_the_first_is_not_lost() {
        let mut pic = ready();
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), 0x3c);
        pic.write(Master, Command, 0x20);
        pic.set_irq(9, true);
        assert!(pic.output(), "a higher one interrupts on the slave");
        assert_eq!(pic.acknowledge(), 0x39);
    }

    #[test]
    fn vanished_requests_are_spurious() {
        let mut pic = ready();
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(pic.read(Master, Command), 0);
        pic.set_irq(3, true);
        pic.set_irq(3, false);
        assert!(!pic.output());
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(Master, Command, 0x0b);
        assert_eq!(pic.read(Master, Command), 0, "a spurious interrupt is not in service");
    }

    #[test]
    fn mask_holds_back_but_remembers() {
        let mut pic = ready();
        pic.write(Master, Data, 0x10);
        pic.set_irq(4, true);
        assert!(!pic.output());
        assert_eq!(pic.read(Master, Command), 0x10);
        pic.write(Master, Data, 0);
        assert!(pic.output());
    }

    #[test]
    fn level_follows_the_line() {
        let mut pic = ready();
        pic.write(Slave, EdgeLevel, 0xff);
        assert_eq!(pic.read(Slave, EdgeLevel), 0xde);
        pic.write(Master, EdgeLevel, 0xff);
        assert_eq!(pic.read(Master, EdgeLevel), 0xf8);
        pic.set_irq(9, true);
        assert_eq!(pic.acknowledge(), 0x39);
        pic.write(Slave, Command, 0x20);
        pic.write(Master, Command, 0x20);
        assert!(pic.output(), "still high, so it asks again");
        pic.set_irq(9, false);
        assert!(!pic.output());
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut pic = PicPair::new();
        pic.write(Master, Command, 0x11);
        for icw in [0x40, 4, 0x03, 0x00] {
            pic.write(Master, Data, icw);
        }
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x41);
        pic.write(Master, Command, 0x0b);
        assert_eq!(pic.read(Master, Command), 0);
        pic.set_irq(7, true);
        assert_eq!(pic.acknowledge(), 0x47);
    }

    #[test]
    fn rotation_makes_the_served_input_the_lowest() {
        let mut pic = ready();
        pic.set_irq(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(Master, Command, 0xa0);
        pic.set_irq(3, false);
        pic.set_irq(3, true);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn poll_command_acknowledges() {
        let mut pic = ready();
        pic.write(Master, Command, 0x0c);
        assert_eq!(pic.read(Master, Command), 0x07);
        pic.set_irq(5, true);
        pic.write(Master, Command, 0x0c);
        assert_eq!(pic.read(Master, Command), 0x85);
        assert!(!pic.output());
    }

    #[test]
    fn random_access_never_panics_and_answers_stay_in_range() {
        let mut random = Random::new(2);
        let mut pic = ready();
        for _ in 0..300_000 {
            let chip = if random.below(2) == 0 { Master } else { Slave };
            let register = [Command, Data, EdgeLevel][random.below(3) as usize];
            match random.below(4) {
                0 => pic.write(chip, register, random.byte()),
                1 => _ = pic.read(chip, register),
                2 => pic.set_irq(random.byte() & 0x1f, random.below(2) == 0),
                _ => {
                    let asked = pic.output();
                    let vector = pic.acknowledge();
                    let (master, slave) = (pic.master.base, pic.slave.base);
                    assert!(vector & 0xf8 == master || vector & 0xf8 == slave);
                    assert!(asked || vector == master | 7);
                }
            }
        }
    }
}
