//! The 8254 interval timer, its gate and speaker port 0x61.
//!
//! Counters are not stepped: each remembers when it was started and computes its value and output from the time given.
//! Channel 0 drives IRQ 0, channel 2 the speaker with its gate under the control of port 0x61; channel 1 (once the
//! memory refresh) counts and drives nothing.
//!
//! Interrupts are counted as rising edges of channel 0's output. [`Pit::take_edge`] says whether there was one since it
//! was last asked; several that were missed become one, as on hardware whose CPU kept interrupts off. Two liberties, both
//! invisible to software that follows the data sheet: a new count in modes 2 and 3 takes effect at once and not at the end
//! of the running period, and the output pulses are not shown to the interrupt controller as levels (a pulse of one tick
//! is nothing that a virtual machine could be expected to sample).

use serde::{Deserialize, Serialize};

use super::saved::{BadState, LATEST_NS, require};
use super::{ns_to_ticks, ticks_to_ns_ceil};

/// Input clock of the three counters.
pub const PIT_HZ: u64 = 1_193_182;

/// Half the period of the memory refresh signal on bit 4 of port 0x61, in nanoseconds.
const REFRESH_NS: u64 = 15_085;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    /// 0: output rises at the terminal count.
    TerminalCount,
    /// 1: a gate pulse starts a low pulse of the output.
    OneShot,
    /// 2: low for one tick in each period.
    RateGenerator,
    /// 3: high for half of each period.
    SquareWave,
    /// 4: low for one tick at the terminal count.
    SoftwareStrobe,
    /// 5: as 4, started by the gate.
    HardwareStrobe,
}

impl Mode {
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::RateGenerator,
            3 | 7 => Self::SquareWave,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::TerminalCount => 0,
            Self::OneShot => 1,
            Self::RateGenerator => 2,
            Self::SquareWave => 3,
            Self::SoftwareStrobe => 4,
            Self::HardwareStrobe => 5,
        }
    }
}

/// Which bytes of the count a channel's port moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Bytes {
    Low,
    High,
    LowThenHigh,
}

/// Where a counter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Run {
    /// No count has been written, or the gate pulse that mode 1 or 5 waits for has not come.
    Idle,
    /// Counting since `since_ns`, `before` ticks having passed earlier.
    Counting { since_ns: u64, before: u64 },
    /// Held by the gate after so many ticks.
    Held { ticks: u64 },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Channel {
    mode: Mode,
    bytes: Bytes,
    bcd: bool,
    gate: bool,
    /// Ticks in a period, 1..=65536.
    reload: u64,
    run: Run,
    /// A count was written but has not been loaded yet (null count, bit 6 of the status).
    null_count: bool,
    /// First byte of a two-byte count.
    write_low: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// Rising edges of the output since the count was loaded that have been reported.
    edges_taken: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: Mode::TerminalCount,
            bytes: Bytes::LowThenHigh,
            bcd: false,
            gate,
            reload: 0x1_0000,
            run: Run::Idle,
            null_count: true,
            write_low: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
            edges_taken: 0,
        }
    }

    /// Ticks counted since the count was loaded.
    fn ticks(&self, now_ns: u64) -> Option<u64> {
        match self.run {
            Run::Idle => None,
            Run::Held { ticks } => Some(ticks),
            Run::Counting { since_ns, before } => {
                Some(before.saturating_add(ns_to_ticks(now_ns.saturating_sub(since_ns), PIT_HZ)))
            }
        }
    }

    fn count(&self, now_ns: u64) -> u16 {
        let modulus: u64 = if self.bcd { 10_000 } else { 0x1_0000 };
        let left = match self.ticks(now_ns) {
            None => self.reload % modulus,
            Some(ticks) => match self.mode {
                // After the terminal count these go on counting down around zero.
                Mode::TerminalCount | Mode::OneShot | Mode::SoftwareStrobe | Mode::HardwareStrobe => {
                    (self.reload % modulus + modulus - ticks % modulus) % modulus
                }
                Mode::RateGenerator => self.reload - ticks % self.reload,
                // Counts down by two, once for each half of the period.
                Mode::SquareWave => self.reload - (ticks % self.reload * 2) % self.reload,
            },
        };
        let left = (left % modulus) as u16;
        if self.bcd { to_bcd(left) } else { left }
    }

    fn output(&self, now_ns: u64) -> bool {
        let Some(ticks) = self.ticks(now_ns) else {
            return self.mode != Mode::TerminalCount;
        };
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => ticks >= self.reload,
            Mode::RateGenerator => !self.gate || ticks % self.reload != self.reload - 1,
            Mode::SquareWave => !self.gate || ticks % self.reload < self.reload.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => ticks != self.reload,
        }
    }

    /// How often the output has risen after `ticks`.
    fn edges(&self, ticks: u64) -> u64 {
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => u64::from(ticks >= self.reload),
            Mode::RateGenerator | Mode::SquareWave => ticks / self.reload,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => u64::from(ticks > self.reload),
        }
    }

    fn take_edge(&mut self, now_ns: u64) -> bool {
        let Some(ticks) = self.ticks(now_ns) else { return false };
        let edges = self.edges(ticks);
        let rose = edges > self.edges_taken;
        self.edges_taken = self.edges_taken.max(edges);
        rose
    }

    /// When the output rises next, in VM nanoseconds.
    fn next_edge_ns(&self) -> Option<u64> {
        let Run::Counting { since_ns, before } = self.run else { return None };
        let at_ticks = match self.mode {
            Mode::RateGenerator | Mode::SquareWave => (self.edges_taken + 1).saturating_mul(self.reload),
            _ if self.edges_taken > 0 => return None,
            Mode::TerminalCount | Mode::OneShot => self.reload,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => self.reload + 1,
        };
        Some(since_ns.saturating_add(ticks_to_ns_ceil(at_ticks.saturating_sub(before), PIT_HZ)))
    }

    fn start(&mut self, now_ns: u64) {
        self.edges_taken = 0;
        self.null_count = false;
        self.run = if self.gate { Run::Counting { since_ns: now_ns, before: 0 } } else { Run::Held { ticks: 0 } };
    }

    fn load(&mut self, now_ns: u64, written: u16) {
        let value = if self.bcd { from_bcd(written) } else { u64::from(written) };
        self.reload = match (value, self.bcd) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            // A period of one tick is illegal in modes 2 and 3; two is the shortest that has an edge.
            (1, _) if matches!(self.mode, Mode::RateGenerator | Mode::SquareWave) => 2,
            (value, _) => value,
        };
        match self.mode {
            Mode::OneShot | Mode::HardwareStrobe => self.null_count = true,
            _ => self.start(now_ns),
        }
    }

    fn write_count(&mut self, now_ns: u64, value: u8) {
        match (self.bytes, self.write_low.take()) {
            (Bytes::Low, _) => self.load(now_ns, u16::from(value)),
            (Bytes::High, _) => self.load(now_ns, u16::from(value) << 8),
            (Bytes::LowThenHigh, None) => {
                self.write_low = Some(value);
                // The first byte stops the counter in mode 0.
                if self.mode == Mode::TerminalCount {
                    self.run = Run::Idle;
                    self.null_count = true;
                }
            }
            (Bytes::LowThenHigh, Some(low)) => self.load(now_ns, u16::from_le_bytes([low, value])),
        }
    }

    fn read_count(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched_count.unwrap_or_else(|| self.count(now_ns));
        let [low, high] = count.to_le_bytes();
        match self.bytes {
            Bytes::Low => {
                self.latched_count = None;
                low
            }
            Bytes::High => {
                self.latched_count = None;
                high
            }
            Bytes::LowThenHigh if self.read_high_next => {
                self.read_high_next = false;
                self.latched_count = None;
                high
            }
            Bytes::LowThenHigh => {
                self.read_high_next = true;
                low
            }
        }
    }

    fn latch_count(&mut self, now_ns: u64) {
        // A second latch before the first was read is ignored.
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now_ns));
        }
    }

    fn latch_status(&mut self, now_ns: u64) {
        if self.latched_status.is_none() {
            let bytes = match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::LowThenHigh => 3,
            };
            self.latched_status = Some(
                u8::from(self.output(now_ns)) << 7
                    | u8::from(self.null_count) << 6
                    | bytes << 4
                    | self.mode.bits() << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn set_gate(&mut self, now_ns: u64, gate: bool) {
        if gate == self.gate {
            return;
        }
        let ticks = self.ticks(now_ns);
        self.gate = gate;
        match (self.mode, gate) {
            // The gate starts a pulse; once started it runs on.
            (Mode::OneShot | Mode::HardwareStrobe, true) => self.start(now_ns),
            (Mode::OneShot | Mode::HardwareStrobe, false) => {}
            (Mode::RateGenerator | Mode::SquareWave, true) if ticks.is_some() => self.start(now_ns),
            (_, true) => {
                if let Some(before) = ticks {
                    self.run = Run::Counting { since_ns: now_ns, before };
                }
            }
            (_, false) => {
                if let Some(ticks) = ticks {
                    self.run = Run::Held { ticks };
                }
            }
        }
    }
}

/// The timer chip.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pit {
    channels: [Channel; 3],
    speaker: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// The chip after reset: nothing counts until it is programmed.
    pub fn new() -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], speaker: false }
    }

    /// The timer as a PC's firmware hands it over: channel 0 ticks at its slowest, 18.2 times a second (mode 2, 65536).
    pub fn handed_over() -> Self {
        let mut pit = Self::new();
        pit.write_control(0, 0x34);
        for byte in [0, 0] {
            pit.write_channel(0, 0, byte);
        }
        pit
    }

    /// Refuses what no timer was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        for channel in &self.channels {
            require("8254", "period", (1..=0x1_0000).contains(&channel.reload))?;
            require("8254", "edges", channel.edges_taken <= LATEST_NS)?;
            let ticks = match channel.run {
                Run::Idle => 0,
                Run::Counting { since_ns, before } => before.max(since_ns),
                Run::Held { ticks } => ticks,
            };
            require("8254", "time", ticks <= LATEST_NS)?;
        }
        Ok(())
    }

    /// Reads port 0x40 + `channel` (0..=2).
    pub fn read_channel(&mut self, now_ns: u64, channel: usize) -> u8 {
        self.channels.get_mut(channel).map_or(0xff, |channel| channel.read_count(now_ns))
    }

    /// Writes port 0x40 + `channel` (0..=2).
    pub fn write_channel(&mut self, now_ns: u64, channel: usize, value: u8) {
        if let Some(channel) = self.channels.get_mut(channel) {
            channel.write_count(now_ns, value);
        }
    }

    /// Writes the control word, port 0x43.
    pub fn write_control(&mut self, now_ns: u64, value: u8) {
        let select = usize::from(value >> 6);
        if select == 3 {
            // Read-back: bits 5 and 4 low ask for the count and the status of the channels in bits 3:1.
            for (n, channel) in self.channels.iter_mut().enumerate() {
                if value & (2 << n) != 0 {
                    if value & 0x20 == 0 {
                        channel.latch_count(now_ns);
                    }
                    if value & 0x10 == 0 {
                        channel.latch_status(now_ns);
                    }
                }
            }
            return;
        }
        let channel = &mut self.channels[select];
        let bytes = match value >> 4 & 3 {
            0 => return channel.latch_count(now_ns),
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::LowThenHigh,
        };
        *channel =
            Channel { mode: Mode::from_bits(value >> 1), bytes, bcd: value & 1 != 0, ..Channel::new(channel.gate) };
    }

    /// Reads port 0x61: gate and speaker as written, the refresh toggle, the output of channel 2.
    pub fn read_speaker(&self, now_ns: u64) -> u8 {
        u8::from(self.channels[2].gate)
            | u8::from(self.speaker) << 1
            | u8::from(now_ns / REFRESH_NS % 2 == 1) << 4
            | u8::from(self.channels[2].output(now_ns)) << 5
    }

    /// Writes port 0x61: bit 0 is the gate of channel 2, bit 1 connects the speaker.
    pub fn write_speaker(&mut self, now_ns: u64, value: u8) {
        self.channels[2].set_gate(now_ns, value & 1 != 0);
        self.speaker = value & 2 != 0;
    }

    /// Whether channel 0's output has risen since this was last asked.
    pub fn take_edge(&mut self, now_ns: u64) -> bool {
        self.channels[0].take_edge(now_ns)
    }

    /// The output of channel 0 when nothing has been counted down yet: low in mode 0 only, where the end of the count
    /// raises it.
    pub fn output(&self, now_ns: u64) -> bool {
        self.channels[0].output(now_ns)
    }

    /// When channel 0 raises its output next, in VM nanoseconds.
    pub fn next_edge_ns(&self) -> Option<u64> {
        self.channels[0].next_edge_ns()
    }
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold((0, value), |(bcd, left), digit| (bcd | (left % 10) << (4 * digit), left / 10)).0
}

/// Digits above 9 are not legal; they count for what they would weigh.
fn from_bcd(bcd: u16) -> u64 {
    (0..4).rev().fold(0, |value, digit| value * 10 + u64::from(bcd >> (4 * digit) & 0xf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;

    fn ns(ticks: u64) -> u64 {
        ticks_to_ns_ceil(ticks, PIT_HZ)
    }

    fn program(pit: &mut Pit, now: u64, channel: usize, mode: u8, count: u16) {
        pit.write_control(now, (channel as u8) << 6 | 0x30 | mode << 1);
        for byte in count.to_le_bytes() {
            pit.write_channel(now, channel, byte);
        }
    }

    fn count(pit: &mut Pit, now: u64, channel: usize) -> u16 {
        pit.write_control(now, (channel as u8) << 6);
        u16::from_le_bytes([pit.read_channel(now, channel), pit.read_channel(now, channel)])
    }

    #[test]
    fn rate_generator_ticks_and_reports_its_deadline() {
        let mut pit = Pit::new();
        assert_eq!(pit.next_edge_ns(), None);
        program(&mut pit, 1000, 0, 2, 1193);
        let period = ns(1193);
        assert_eq!(pit.next_edge_ns(), Some(1000 + period));
        assert!(!pit.take_edge(1000 + period - 1));
        assert!(pit.take_edge(1000 + period));
        assert!(!pit.take_edge(1000 + period));
        assert!(pit.take_edge(1000 + 10 * period), "missed ticks become one");
        assert!(pit.next_edge_ns() > Some(1000 + 10 * period));
    }

    #[test]
    fn counts_down_from_the_count() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 2, 1000);
        assert_eq!(count(&mut pit, 0, 0), 1000);
        assert_eq!(count(&mut pit, ns(1), 0), 999);
        assert_eq!(count(&mut pit, ns(999), 0), 1);
        assert_eq!(count(&mut pit, ns(1000), 0), 1000);
    }

    #[test]
    fn zero_means_the_longest_count() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 2, 0);
        assert_eq!(count(&mut pit, ns(1), 0), 0xffff);
        assert_eq!(pit.next_edge_ns(), Some(ns(0x1_0000)));
    }

    #[test]
    fn terminal_count_fires_once_and_wraps() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 0, 100);
        assert!(!pit.output(ns(99)));
        assert!(pit.output(ns(100)));
        assert!(pit.take_edge(ns(100)));
        assert_eq!(pit.next_edge_ns(), None);
        assert!(!pit.take_edge(ns(1_000_000)));
        assert_eq!(count(&mut pit, ns(101), 0), 0xffff);
    }

    #[test]
    fn strobe_is_one_shot() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 4, 50);
        assert_eq!(pit.next_edge_ns(), Some(ns(51)));
        assert!(pit.output(ns(49)) && !pit.output(ns(50)) && pit.output(ns(51)));
        assert!(pit.take_edge(ns(60)));
        assert_eq!(pit.next_edge_ns(), None);
    }

    #[test]
    fn square_wave_is_high_half_the_time() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 3, 100);
        pit.write_speaker(0, 1);
        let out = |pit: &Pit, at| pit.read_speaker(at) & 0x20 != 0;
        assert!(out(&pit, ns(49)) && !out(&pit, ns(50)) && !out(&pit, ns(99)) && out(&pit, ns(100)));
        assert_eq!(count(&mut pit, ns(10), 2), 80);
        assert_eq!(count(&mut pit, ns(60), 2), 80);
    }

    /// Linux calibrates the TSC like this: gate off, mode 0 with a latch, gate on, wait for OUT2.
    #[test]
    fn calibration_on_channel_2() {
        let mut pit = Pit::new();
        pit.write_speaker(0, 0);
        program(&mut pit, 0, 2, 0, 11_932);
        assert_eq!(pit.read_speaker(ns(50_000)) & 0x21, 0, "the gate holds it");
        let start = ns(50_000);
        pit.write_speaker(start, 1);
        assert_eq!(pit.read_speaker(start + ns(11_930)) & 0x20, 0);
        assert_eq!(pit.read_speaker(start + ns(11_933)) & 0x20, 0x20);
    }

    #[test]
    fn gate_holds_and_resumes_mode_0_and_restarts_mode_2() {
        let mut pit = Pit::new();
        pit.write_speaker(0, 1);
        program(&mut pit, 0, 2, 0, 1000);
        pit.write_speaker(ns(400), 0);
        assert_eq!(count(&mut pit, ns(900), 2), 600);
        pit.write_speaker(ns(1000), 1);
        assert_eq!(count(&mut pit, ns(1000) + ns(100), 2), 500);
        program(&mut pit, 0, 2, 2, 1000);
        pit.write_speaker(ns(300), 0);
        assert_eq!(pit.read_speaker(ns(350)) & 0x20, 0x20);
        pit.write_speaker(ns(400), 1);
        assert_eq!(count(&mut pit, ns(400), 2), 1000);
    }

    #[test]
    fn hardware_triggered_modes_wait_for_the_gate() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 1, 10);
        assert_eq!(pit.read_speaker(ns(100)) & 0x20, 0x20);
        pit.write_speaker(ns(100), 1);
        assert_eq!(pit.read_speaker(ns(105)) & 0x20, 0);
        pit.write_speaker(ns(106), 0);
        assert_eq!(pit.read_speaker(ns(112)) & 0x20, 0x20, "the pulse runs on without the gate");
    }

    #[test]
    fn latch_holds_until_read_and_readback_gives_the_status() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 2, 1000);
        pit.write_control(ns(10), 0);
        pit.write_control(ns(20), 0);
        assert_eq!(pit.read_channel(ns(30), 0), 990u16.to_le_bytes()[0]);
        assert_eq!(pit.read_channel(ns(40), 0), 990u16.to_le_bytes()[1]);
        pit.write_control(ns(50), 0xc2);
        assert_eq!(pit.read_channel(ns(50), 0), 0x80 | 0x30 | 2 << 1);
        assert_eq!(pit.read_channel(ns(60), 0), 950u16.to_le_bytes()[0]);
        pit.write_control(ns(70), 0x34);
        pit.write_control(ns(70), 0xe2);
        assert_eq!(pit.read_channel(ns(70), 0) & 0x40, 0x40, "no count loaded yet");
    }

    #[test]
    fn bcd_counts() {
        let mut pit = Pit::new();
        pit.write_control(0, 0x35);
        pit.write_channel(0, 0, 0x00);
        pit.write_channel(0, 0, 0x10);
        assert_eq!(pit.next_edge_ns(), Some(ns(1000)));
        assert_eq!(count(&mut pit, ns(1), 0), 0x0999);
    }

    #[test]
    fn random_access_never_panics_and_deadlines_lie_ahead() {
        let mut random = Random::new(3);
        let mut pit = Pit::new();
        let mut now = 0u64;
        for step in 0..300_000u64 {
            // Now and then a jump far ahead, once to the end of time.
            now = now.saturating_add(if step == 299_000 { u64::MAX } else { random.of_any_length(40) });
            let channel = random.below(4) as usize;
            match random.below(6) {
                0 => pit.write_control(now, random.byte()),
                1 => pit.write_channel(now, channel, random.byte()),
                2 => _ = pit.read_channel(now, channel),
                3 => pit.write_speaker(now, random.byte()),
                4 => _ = pit.read_speaker(now),
                _ => {
                    pit.take_edge(now);
                    assert!(now == u64::MAX || pit.next_edge_ns().is_none_or(|edge| edge > now));
                }
            }
        }
    }
}
