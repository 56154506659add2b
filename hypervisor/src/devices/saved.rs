//! Devices as they are kept while their guest does not run: in a snapshot, or on their way to another machine.
//!
//! A device's saved state is the device itself, serialised: there is no second description that could fall behind. Times
//! are VM nanoseconds, which go on where they stopped, so none of them needs to be changed. What comes back comes from a
//! file or a network and may be anything: each device has a `check`, which refuses what its own methods never leave
//! behind and would not survive. Whoever restores a device calls it before anything else.

use core::fmt;

/// A state that no device was ever in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadState {
    /// Which device.
    pub device: &'static str,
    /// What of it.
    pub what: &'static str,
}

impl fmt::Display for BadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: impossible {}", self.device, self.what)
    }
}

impl core::error::Error for BadState {}

/// Makes the check of one device.
pub(crate) const fn require(device: &'static str, what: &'static str, holds: bool) -> Result<(), BadState> {
    if holds { Ok(()) } else { Err(BadState { device, what }) }
}

/// The latest time in a saved state, in VM nanoseconds: some 146 years. Arithmetic on times below it does not overflow.
pub const LATEST_NS: u64 = 1 << 62;

/// Bytes as one piece: serde's own implementations know short arrays only, and take all bytes one by one. For
/// `#[serde(with = "…")]`, on arrays and vectors.
pub(crate) mod bytes {
    use alloc::vec::Vec;
    use core::fmt;
    use serde::{Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(bytes: &impl AsRef<[u8]>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes.as_ref())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<Vec<u8>>>(from: D) -> Result<T, D::Error> {
        struct Bytes;
        impl de::Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }
        let bytes = from.deserialize_bytes(Bytes)?;
        let length = bytes.len();
        T::try_from(bytes).map_err(|_| de::Error::invalid_length(length, &"another number of bytes"))
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::super::board::BoardConfig;
    use super::super::lapic::{Lapic, LapicConfig, LapicEffect, LapicShared};
    use super::super::platform::{Platform, PlatformConfig};
    use super::super::testing::Random;
    use super::super::{Now, Width};
    use super::*;

    const CONFIG: PlatformConfig = PlatformConfig {
        wall_clock_s: 1_709_251_198,
        console_output: 256,
        console_input: 64,
        board: Some(BoardConfig { ram_bytes: 64 << 20, vcpus: 2 }),
    };

    /// Ports at which something answers, and some at which nothing does.
    const PORTS: [u16; 26] = [
        0x20, 0x21, 0x40, 0x42, 0x43, 0x61, 0x64, 0x70, 0x71, 0x92, 0xa0, 0xa1, 0xe0, 0x2000, 0x2002, 0x3f8, 0x3f9,
        0x3fa, 0x3fc, 0x3fd, 0x4d0, 0x510, 0x511, 0x600, 0x608, 0x1234,
    ];

    /// Does random things with a platform and writes down everything that can be seen of it.
    fn live(platform: &mut Platform, random: &mut Random, now: &mut u64, steps: usize) -> Vec<u64> {
        let mut seen = Vec::new();
        for _ in 0..steps {
            *now += random.of_any_length(32);
            let port = PORTS[random.below(PORTS.len() as u64) as usize];
            let width = [Width::Byte, Width::Byte, Width::Word, Width::Dword][random.below(4) as usize];
            match random.below(8) {
                0..3 => seen.push(u64::from(platform.io_read(*now, port, width))),
                3..6 => platform.io_write(*now, port, width, random.next() as u32),
                6 => {
                    let at = 0xfec0_0000 + (random.below(2) << 4);
                    seen.push(u64::from(platform.memory_write(*now, at, 4, random.of_any_length(32))));
                    seen.extend(platform.memory_read(*now, 0xff00_0000 + random.below(1 << 16), 1));
                    platform.memory_write(*now, 0xff00_0000 + random.below(1 << 16), 1, random.next());
                }
                _ => seen.push(platform.console_push(*now, &[random.byte(), random.byte()]) as u64),
            }
            if random.below(16) == 0 {
                let mut output = Vec::new();
                platform.console_take(*now, &mut output);
                seen.extend(output.into_iter().map(u64::from));
                seen.push(u64::from(platform.interrupt_acknowledge()));
            }
            while let Some(message) = platform.take_message() {
                seen.push(u64::from(message.vector));
            }
            let effects = platform.take_effects();
            seen.extend([u64::from(effects.interrupt_changed), platform.next_deadline_ns().unwrap_or(0)]);
        }
        seen
    }

    #[test]
    fn a_platform_that_was_saved_goes_on_as_the_one_that_was_not() {
        for seed in 0..60 {
            let (mut random, mut now) = (Random::new(seed), 0);
            let mut first = Platform::new(CONFIG);
            live(&mut first, &mut random, &mut now, 400);
            let bytes = postcard::to_allocvec(&first).unwrap();
            let mut second: Platform = postcard::from_bytes(&bytes).unwrap();
            second.check(CONFIG, now, 0).unwrap();
            // Both from here on, and at the same time: an access to the serial port alone does not bring the others up to
            // it. What the first would still tell of the past is no state.
            for platform in [&mut first, &mut second] {
                platform.poll(now);
                let _ = platform.take_effects();
            }
            assert_eq!(postcard::to_allocvec(&first).unwrap(), postcard::to_allocvec(&second).unwrap());
            let (mut now_too, mut random_too) = (now, Random::new(seed + 1000));
            let mut random = Random::new(seed + 1000);
            let goes_on = live(&mut first, &mut random, &mut now, 400);
            assert_eq!(goes_on, live(&mut second, &mut random_too, &mut now_too, 400), "seed {seed}");
        }
    }

    fn again(first: &Platform, now: u64) -> Platform {
        let mut second: Platform = postcard::from_bytes(&postcard::to_allocvec(first).unwrap()).unwrap();
        second.check(CONFIG, now, 0).unwrap();
        second
    }

    #[test]
    fn a_pit_in_the_middle_of_a_count_and_of_its_reading_goes_on_from_there() {
        for mode in [0, 2, 3] {
            let mut first = Platform::new(CONFIG);
            let bytes = [
                (0x20, 0x11), // Initialised: its interrupts are vectors from 0x20 on, and only the first is let through.
                (0x21, 0x20),
                (0x21, 4),
                (0x21, 1),
                (0x21, 0xfe),
                (0x43, 0x30 | mode << 1), // Channel 0, a count of 0x4000: 13.7 ms.
                (0x40, 0),
                (0x40, 0x40),
            ];
            bytes.into_iter().for_each(|(port, byte)| first.io_write(0, port, Width::Byte, byte));
            let now = 5_000_000;
            first.poll(now);
            // Latched, and half of it read.
            first.io_write(now, 0x43, Width::Byte, 0);
            let low = first.io_read(now, 0x40, Width::Byte);
            let due = first.next_deadline_ns().unwrap();
            assert!(due > now && !first.interrupt_asserted(), "mode {mode}");
            let second = again(&first, now);
            for mut platform in [first, second] {
                let count = platform.io_read(now, 0x40, Width::Byte) << 8 | low;
                assert!((0x1000..0x3800).contains(&count), "mode {mode}: {count:#x} in the middle");
                assert_eq!(platform.next_deadline_ns(), Some(due), "mode {mode}");
                platform.poll(due - 1);
                assert!(!platform.interrupt_asserted(), "mode {mode}: not before its time");
                platform.poll(due);
                assert!(platform.interrupt_asserted(), "mode {mode}");
                assert_eq!(platform.interrupt_acknowledge(), 0x20, "mode {mode}");
            }
        }
    }

    #[test]
    fn interrupts_on_their_way_and_typed_bytes_stay_where_they_are() {
        let mut first = Platform::new(CONFIG);
        let bytes = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xe8), (0x3f9, 1), (0x3fc, 8)];
        bytes.into_iter().for_each(|(port, byte)| first.io_write(0, port, Width::Byte, byte));
        // Line 4 is being served, by what was typed; line 1 asks; a line of the IOAPIC waits behind its mask.
        assert_eq!(first.console_push(0, b"ab"), 2);
        assert_eq!(first.interrupt_acknowledge(), 0x24);
        first.io_write(0, 0x2001, Width::Byte, 1);
        let ioapic = |platform: &mut Platform, register: u64, value: u64| {
            platform.memory_write(0, 0xfec0_0000, 4, register);
            platform.memory_write(0, 0xfec0_0010, 4, value)
        };
        assert!(ioapic(&mut first, 0x10 + 2 * 9, 0x1_8051));
        first.io_write(0, 0x2009, Width::Byte, 1);
        while first.take_message().is_some() {}
        let second = again(&first, 0);
        for mut platform in [first, second] {
            assert!(platform.interrupt_asserted(), "line 1 goes before line 4");
            assert_eq!(platform.interrupt_acknowledge(), 0x21);
            platform.io_write(0, 0x20, Width::Byte, 0x20);
            platform.io_write(0, 0x20, Width::Byte, 0x0b);
            assert_eq!(platform.io_read(0, 0x20, Width::Byte), 1 << 4, "still being served");
            assert_eq!([0; 2].map(|_: u8| platform.io_read(0, 0x3f8, Width::Byte)), [b'a', b'b'].map(u32::from));
            assert!(platform.take_message().is_none());
            ioapic(&mut platform, 0x10 + 2 * 9, 0x8051);
            assert_eq!(platform.take_message().map(|message| message.vector), Some(0x51), "unmasked, it is delivered");
        }
    }

    #[test]
    fn a_hostile_platform_is_refused_or_survived() {
        let (mut refused, mut survived) = (0, 0);
        let mut random = Random::new(7);
        let mut now = 0;
        let mut platform = Platform::new(CONFIG);
        live(&mut platform, &mut random, &mut now, 200);
        let good = postcard::to_allocvec(&platform).unwrap();
        for _ in 0..5_000 {
            let mut bytes = good.clone();
            for _ in 0..1 + random.below(3) {
                // The test device's memory, which may hold anything, is most of it, and in the middle.
                let at = random.below(800) as usize;
                let at = if random.below(2) == 0 { at } else { bytes.len() - 1 - at };
                bytes[at] = random.byte();
            }
            let Ok(mut platform) = postcard::from_bytes::<Platform>(&bytes) else { continue };
            if platform.check(CONFIG, LATEST_NS, random.next()).is_err() {
                refused += 1;
                continue;
            }
            survived += 1;
            let mut now = now;
            live(&mut platform, &mut random, &mut now, 20);
        }
        assert!(refused > 50 && survived > 200, "{refused} refused, {survived} survived");
    }

    #[test]
    fn another_machines_platform_is_refused() {
        let refused = |config: PlatformConfig| {
            let mut platform = Platform::new(CONFIG);
            platform.check(config, 0, 0).expect_err("refused")
        };
        assert_eq!(refused(PlatformConfig { board: None, ..CONFIG }).what, "board");
        let board = Some(BoardConfig { ram_bytes: 64 << 20, vcpus: 3 });
        assert_eq!(refused(PlatformConfig { board, ..CONFIG }).device, "fw_cfg");
        assert_eq!(refused(PlatformConfig { console_output: 16, ..CONFIG }).device, "serial port");
        let mut ahead = Platform::new(CONFIG);
        ahead.poll(1000);
        assert_eq!(ahead.check(CONFIG, 999, 0).expect_err("refused").what, "time");
    }

    #[test]
    fn the_date_goes_on_with_the_world() {
        let mut platform = Platform::new(CONFIG);
        platform.check(CONFIG, 0, 3600).unwrap();
        platform.io_write(0, 0x70, Width::Byte, 4);
        assert_eq!(platform.io_read(0, 0x71, Width::Byte), 0x00, "23:59:58, an hour later");
    }

    fn lapic(random: &mut Random, lapic: &mut Lapic, shared: &LapicShared, now: &mut Now, steps: usize) -> Vec<u64> {
        let mut seen = Vec::new();
        for _ in 0..steps {
            let passed = random.of_any_length(30);
            *now = Now { ns: now.ns + passed, tsc: now.tsc + 3 * passed };
            let msr = 0x800 + random.below(0x40) as u32;
            match random.below(6) {
                0 | 1 => seen.push(lapic.rdmsr(*now, msr).unwrap_or(1 << 63)),
                2 => seen.push(u64::from(lapic.wrmsr(*now, msr, random.of_any_length(20)).is_ok())),
                3 => {
                    // The timer, in all its modes.
                    let _ = lapic.wrmsr(*now, 0x832, 0xec | random.below(3) << 17);
                    let _ = lapic.wrmsr(*now, 0x838, random.of_any_length(31));
                    let armed = lapic.set_tsc_deadline(*now, now.tsc + random.of_any_length(30));
                    seen.push(u64::from(armed == LapicEffect::Timer));
                }
                4 => {
                    let _ = shared.post_vector(random.byte());
                    let _ = lapic.sync(shared);
                }
                _ => seen.push(u64::from(lapic.acknowledge().unwrap_or(0))),
            }
            lapic.poll(*now);
            seen.push(lapic.next_deadline_ns(*now).unwrap_or(0));
            seen.push(u64::from(lapic.take_ended().unwrap_or(0)));
        }
        seen
    }

    #[test]
    fn an_apic_that_was_saved_goes_on_as_the_one_that_was_not() {
        let config = LapicConfig { apic_id: 0, bootstrap: true, tsc_khz: 3_000_000 };
        for seed in 0..100 {
            let (mut random, shared) = (Random::new(seed), LapicShared::new(0));
            let (mut first, mut now) = (Lapic::new(config), Now::default());
            lapic(&mut random, &mut first, &shared, &mut now, 300);
            let bytes = postcard::to_allocvec(&first).unwrap();
            let mut second: Lapic = postcard::from_bytes(&bytes).unwrap();
            second.check(config).unwrap();
            for other in [LapicConfig { apic_id: 1, ..config }, LapicConfig { tsc_khz: 1, ..config }] {
                assert!(second.clone().check(other).is_err());
            }
            let (mut now_too, mut random_too, shared_too) = (now, Random::new(seed + 1000), LapicShared::new(0));
            let goes_on = lapic(&mut Random::new(seed + 1000), &mut first, &shared, &mut now, 300);
            let goes_on_too = lapic(&mut random_too, &mut second, &shared_too, &mut now_too, 300);
            assert_eq!(goes_on, goes_on_too, "seed {seed}");
        }
    }

    #[test]
    fn an_apics_timer_in_the_middle_of_its_count_goes_on_from_there() {
        let config = LapicConfig { apic_id: 0, bootstrap: true, tsc_khz: 3_000_000 };
        let at = |ns: u64| Now { ns, tsc: 3 * ns };
        let modes = [("one shot", 0), ("periodic", 1 << 17), ("deadline", 2 << 17)];
        for (xapic, (name, mode)) in [false, true].into_iter().flat_map(|xapic| modes.map(|mode| (xapic, mode))) {
            let mut first = if xapic { Lapic::new(config).in_xapic_mode() } else { Lapic::new(config) };
            let write = |lapic: &mut Lapic, register: u32, value: u64| match xapic {
                true => drop(lapic.window_write(at(1000), u64::from(register) << 4, 4, value)),
                false => drop(lapic.wrmsr(at(1000), 0x800 + register, value).unwrap()),
            };
            // Enabled; divided by one; the timer's vector and mode.
            for (register, value) in [(0xf, 0x1ff), (0x3e, 0xb), (0x32, 0xec | mode)] {
                write(&mut first, register, value);
            }
            if name == "deadline" {
                assert_eq!(first.set_tsc_deadline(at(1000), 3_003_000), LapicEffect::Timer);
            } else {
                write(&mut first, 0x38, 50_000_000);
            }
            let due = first.next_deadline_ns(at(1000)).unwrap();
            let middle = at(1000 + (due - 1000) / 2);
            first.poll(middle);
            let mut second: Lapic = postcard::from_bytes(&postcard::to_allocvec(&first).unwrap()).unwrap();
            second.check(config).unwrap();
            for mut lapic in [first, second] {
                let count = match xapic {
                    true => lapic.window_read(middle, 0x390, 4),
                    false => lapic.rdmsr(middle, 0x839).unwrap(),
                };
                let halfway = if name == "deadline" { 0..1 } else { 24_000_000..26_000_000 };
                assert!(halfway.contains(&count), "{name}: {count}");
                assert_eq!(lapic.next_deadline_ns(middle), Some(due), "{name}");
                lapic.poll(at(due - 1));
                assert_eq!(lapic.deliverable(), None, "{name}: not before its time");
                lapic.poll(at(due));
                assert_eq!(lapic.acknowledge(), Some(0xec), "{name}");
                let next = lapic.next_deadline_ns(at(due));
                assert_eq!(next.map(|next| next - due), (name == "periodic").then_some(due - 1000), "{name}");
            }
        }
    }

    #[test]
    fn a_hostile_apic_is_refused_or_survived() {
        let config = LapicConfig { apic_id: 0, bootstrap: true, tsc_khz: 3_000_000 };
        let (mut random, shared) = (Random::new(3), LapicShared::new(0));
        let (mut good, mut now) = (Lapic::new(config), Now::default());
        lapic(&mut random, &mut good, &shared, &mut now, 300);
        let good = postcard::to_allocvec(&good).unwrap();
        let mut survived = 0;
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.byte();
            let Ok(mut hostile) = postcard::from_bytes::<Lapic>(&bytes) else { continue };
            if hostile.check(config).is_ok() {
                survived += 1;
                lapic(&mut random, &mut hostile, &shared, &mut now, 20);
                assert!(hostile.deliverable().is_none_or(|vector| vector >= 16), "an exception's vector");
            }
        }
        assert!(survived > 1000, "{survived}");
    }
}
