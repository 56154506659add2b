//! The port devices together, and the wires between them.

use super::*;
use crate::devices::pit::PIT_HZ;
use crate::devices::testing::Random;
use crate::devices::ticks_to_ns_ceil;
use alloc::vec;

fn platform() -> Platform {
    let mut platform = Platform::new(PlatformConfig::default());
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0x21, 0x00),
        (0xa1, 0x00),
    ] {
        platform.io_write(0, port, Width::Byte, value);
    }
    platform
}

fn eoi(platform: &mut Platform, now: u64) {
    platform.io_write(now, 0xa0, Width::Byte, 0x20);
    platform.io_write(now, 0x20, Width::Byte, 0x20);
}

#[test]
fn console_output_and_input_with_interrupts() {
    let mut platform = platform();
    platform.io_write(0, 0x3fc, Width::Byte, 0x0b);
    platform.io_write(0, 0x3f9, Width::Byte, 0x01);
    platform.io_write(0, 0x3f8, Width::Byte, u32::from(b'!'));
    assert!(platform.take_effects().console_output);
    let mut out = Vec::new();
    platform.console_take(0, &mut out);
    assert_eq!(out, b"!");
    assert!(!platform.take_effects().console_output);
    assert_eq!(platform.console_push(0, b"ls\n"), 3);
    assert!(platform.take_effects().interrupt_changed);
    assert_eq!(platform.interrupt_acknowledge(), 0x34);
    let typed: Vec<u32> = (0..3).map(|_| platform.io_read(0, 0x3f8, Width::Byte)).collect();
    assert_eq!(typed, vec![u32::from(b'l'), u32::from(b's'), 10]);
    eoi(&mut platform, 0);
    assert!(!platform.interrupt_asserted());
}

#[test]
fn timer_interrupts_at_its_deadline() {
    let mut platform = platform();
    platform.io_write(0, 0x43, Width::Byte, 0x34);
    platform.io_write(0, 0x40, Width::Byte, 0xa9);
    platform.io_write(0, 0x40, Width::Byte, 0x04);
    let period = ticks_to_ns_ceil(0x4a9, PIT_HZ);
    assert_eq!(platform.next_deadline_ns(), Some(period));
    platform.poll(period - 1);
    assert!(!platform.interrupt_asserted());
    platform.poll(period);
    assert!(platform.interrupt_asserted());
    assert_eq!(platform.interrupt_acknowledge(), 0x30);
    eoi(&mut platform, period);
    assert!(!platform.interrupt_asserted());
    platform.poll(2 * period + 1);
    assert!(platform.interrupt_asserted());
}

#[test]
fn on_a_machine_for_test_kernels_firmware_has_the_timer_tick() {
    let mut platform = with_board();
    let period = ticks_to_ns_ceil(0x1_0000, PIT_HZ);
    assert_eq!(platform.next_deadline_ns(), Some(period));
    for tick in 1..4 {
        platform.poll(tick * period);
        assert!(platform.interrupt_asserted());
        assert_eq!(platform.interrupt_acknowledge(), 0x08);
        platform.io_write(tick * period, 0x20, Width::Byte, 0x20);
        assert!(!platform.interrupt_asserted());
    }
    assert_eq!(Platform::new(PlatformConfig::default()).next_deadline_ns(), None);
    // All other inputs are masked: nothing comes of the serial port's, or of the slave's.
    assert_eq!((platform.io_read(0, 0x21, Width::Byte), platform.io_read(0, 0xa1, Width::Byte)), (0xfa, 0xff));
}

#[test]
fn masked_timer_wakes_nobody_but_is_not_forgotten() {
    let mut platform = platform();
    platform.io_write(0, 0x21, Width::Byte, 0x01);
    platform.io_write(0, 0x43, Width::Byte, 0x34);
    platform.io_write(0, 0x40, Width::Byte, 0);
    platform.io_write(0, 0x40, Width::Byte, 0x10);
    assert_eq!(platform.next_deadline_ns(), None);
    platform.io_write(1_000_000_000, 0x21, Width::Byte, 0x00);
    assert!(platform.interrupt_asserted());
    assert!(platform.next_deadline_ns().is_some());
}

#[test]
fn reprogramming_the_timer_takes_back_its_request() {
    let mut platform = platform();
    platform.io_write(0, 0x43, Width::Byte, 0x30);
    platform.io_write(0, 0x40, Width::Byte, 0x10);
    platform.io_write(0, 0x40, Width::Byte, 0x00);
    platform.poll(1_000_000);
    assert!(platform.interrupt_asserted());
    platform.io_write(1_000_000, 0x43, Width::Byte, 0x30);
    assert!(!platform.interrupt_asserted());
}

#[test]
fn every_way_out() {
    let ends = [
        (0x604, Width::Word, 0x3400, GuestEnd::PowerOff),
        (0xcf9, Width::Byte, 0x06, GuestEnd::Reset),
        (0x64, Width::Byte, 0xfe, GuestEnd::Reset),
        (0x92, Width::Byte, 0x01, GuestEnd::Reset),
        (0xf4, Width::Dword, 0x10, GuestEnd::Exit { status: 0x21 }),
        (0xf4, Width::Byte, 0xffff_ff00, GuestEnd::Exit { status: 1 }),
    ];
    for (port, width, value, end) in ends {
        let mut platform = platform();
        platform.io_write(0, port, width, value);
        assert_eq!(platform.take_effects().end, Some(end), "{port:#x}");
        assert_eq!(platform.take_effects().end, None, "reported once");
    }
}

#[test]
fn the_first_end_counts() {
    let mut platform = platform();
    platform.io_write(0, 0xf4, Width::Byte, 3);
    platform.io_write(0, 0x64, Width::Byte, 0xfe);
    assert_eq!(platform.take_effects().end, Some(GuestEnd::Exit { status: 7 }));
}

#[test]
fn pci_probe_neither_resets_nor_answers() {
    let mut platform = platform();
    platform.io_write(0, 0xcf8, Width::Dword, 0x8000_0600);
    platform.io_write(0, 0xcf9, Width::Word, 0x0606);
    assert_eq!(platform.io_read(0, 0xcf8, Width::Dword), 0xffff_ffff);
    assert_eq!(platform.io_read(0, 0xcfc, Width::Word), 0xffff);
    assert_eq!(platform.take_effects().end, None);
}

#[test]
fn unclaimed_ports_read_ones_and_are_reported_once() {
    let mut platform = platform();
    assert_eq!(platform.io_read(0, 0x378, Width::Byte), 0xff);
    let seen = platform.take_effects().unclaimed;
    assert_eq!(seen, Some(UnclaimedPort { port: 0x378, direction: Direction::Read }));
    assert_eq!(platform.io_read(0, 0x378, Width::Dword), 0xffff_ffff);
    assert_eq!(platform.take_effects().unclaimed, None);
    assert_eq!(platform.unclaimed().accesses(), 2);
}

#[test]
fn wide_accesses_split_into_bytes() {
    let mut platform = platform();
    platform.io_write(0, 0x70, Width::Word, 0x5a_0e);
    assert_eq!(platform.io_read(0, 0x71, Width::Byte), 0x5a);
    assert_eq!(platform.io_read(0, 0x3ff, Width::Word) >> 8, 0xff, "beyond the last register is nobody's");
    assert_eq!(platform.io_read(0, 0xffff, Width::Dword), 0xffff_ffff, "ports wrap without a fault");
}

#[test]
fn clock_interrupts_once_a_second() {
    let mut platform = platform();
    platform.io_write(0, 0x70, Width::Word, 0x12_0b);
    assert_eq!(platform.next_deadline_ns(), Some(1_000_000_000));
    platform.poll(1_000_000_000);
    assert_eq!(platform.interrupt_acknowledge(), 0x38);
    platform.io_write(1_000_000_000, 0x70, Width::Byte, 0x0c);
    assert_eq!(platform.io_read(1_000_000_000, 0x71, Width::Byte) & 0x90, 0x90);
    eoi(&mut platform, 1_000_000_000);
    assert!(!platform.interrupt_asserted());
    assert_eq!(platform.next_deadline_ns(), Some(2_000_000_000));
}

#[test]
fn power_button_reaches_the_cpu_as_the_sci() {
    let mut platform = platform();
    platform.io_write(0, 0x602, Width::Word, 1 << 8);
    platform.press_power_button(0);
    assert_eq!(platform.interrupt_acknowledge(), 0x39);
}

#[test]
fn time_does_not_go_back() {
    let mut platform = platform();
    platform.poll(5_000_000_000);
    assert_eq!(platform.io_read(1, 0x608, Width::Dword), platform.io_read(5_000_000_000, 0x608, Width::Dword));
}

fn with_board() -> Platform {
    let board = Some(BoardConfig { ram_bytes: 64 << 20, vcpus: 2 });
    Platform::new(PlatformConfig { board, ..PlatformConfig::default() })
}

/// Sets the lower half of an I/O APIC entry.
fn redirect(platform: &mut Platform, input: u8, entry: u64) {
    assert!(platform.memory_write(0, 0xfec0_0000, 4, u64::from(0x10 + 2 * input)));
    assert!(platform.memory_write(0, 0xfec0_0010, 4, entry));
}

#[test]
fn lines_reach_both_kinds_of_controller() {
    let mut platform = with_board();
    redirect(&mut platform, 14, 0x71);
    platform.io_write(0, 0x200e, Width::Byte, 1);
    assert!(platform.take_effects().messages);
    assert_eq!(platform.take_message().map(|message| message.vector), Some(0x71));
    redirect(&mut platform, 2, 0x72);
    platform.io_write(0, 0x43, Width::Byte, 0x34);
    platform.io_write(0, 0x40, Width::Byte, 0xff);
    platform.io_write(0, 0x40, Width::Byte, 0);
    let due = platform.next_deadline_ns().expect("the timer's input is open");
    platform.poll(due);
    assert_eq!(platform.take_message().map(|message| message.vector), Some(0x72), "the timer is at input 2");
    assert!(platform.memory_write(due, 0xfec0_0000, 4, 0x14) && platform.memory_write(due, 0xfec0_0010, 4, 0x1_0000));
    assert!(platform.next_deadline_ns().is_some(), "the 8259's is open still");
    platform.io_write(due, 0x21, Width::Byte, 0xff);
    assert_eq!(platform.next_deadline_ns(), None);
}

#[test]
fn levels_stay_until_the_device_is_served() {
    let mut platform = with_board();
    redirect(&mut platform, 4, 0x8000 | 0x44);
    platform.io_write(0, 0x3fc, Width::Byte, 8);
    platform.io_write(0, 0x3f9, Width::Byte, 2);
    assert!(platform.take_message().is_some(), "the transmitter is empty");
    platform.end_of_interrupt(0x44);
    assert!(platform.take_message().is_some(), "and still is");
    platform.io_write(0, 0x3f9, Width::Byte, 0);
    platform.end_of_interrupt(0x44);
    assert_eq!(platform.take_message(), None);
}

#[test]
fn the_boards_effects_are_passed_on() {
    let mut platform = with_board();
    platform.io_write(0, 0xe4, Width::Dword, 0x40_0000);
    assert_eq!(platform.take_effects().flush, Some(0x40_0000));
    for letter in b"Shutdown" {
        platform.io_write(0, 0x8900, Width::Byte, u32::from(*letter));
    }
    assert_eq!(platform.take_effects().end, Some(GuestEnd::PowerOff));
    platform.io_write(0, 0x510, Width::Word, 5);
    assert_eq!(platform.io_read(0, 0x511, Width::Byte), 2);
}

#[test]
fn a_machine_without_a_board_has_no_memory() {
    let mut platform = platform();
    assert_eq!(platform.memory_read(0, 0xfec0_0000, 4), None);
    assert!(!platform.memory_write(0, 0xff00_0000, 4, 0));
    platform.io_write(0, 0xe4, Width::Dword, 0x40_0000);
    assert_eq!(platform.take_effects().flush, None);
}

#[test]
fn the_serial_port_alone_leaves_other_wires_for_later_but_not_for_too_late() {
    let mut platform = platform();
    platform.io_write(0, 0x43, Width::Byte, 0x34);
    platform.io_write(0, 0x40, Width::Byte, 0xff);
    platform.io_write(0, 0x40, Width::Byte, 0);
    let due = platform.next_deadline_ns().expect("the timer runs");
    let _ = (platform.take_news(), platform.take_effects());
    platform.io_write(due - 1, 0x3ff, Width::Byte, 0x5a);
    assert_eq!(platform.io_read(due - 1, 0x3ff, Width::Byte), 0x5a);
    assert!(!platform.take_news() && !platform.interrupt_asserted());
    platform.io_write(due, 0x3ff, Width::Byte, 0xa5);
    assert!(platform.take_news() && platform.take_effects().interrupt_changed, "the timer's edge was due");
    platform.interrupt_acknowledge();
    let _ = (platform.take_news(), platform.take_effects());
    platform.io_write(due, 0x3f9, Width::Byte, 2);
    platform.io_write(due, 0x3fc, Width::Byte, 8);
    eoi(&mut platform, due);
    assert!(platform.interrupt_asserted(), "the transmitter is empty, and says so");
}

#[test]
fn random_guests_never_panic_and_memory_stays_bounded() {
    let mut random = Random::new(6);
    let mut platform = platform();
    let (mut now, mut out) = (0u64, Vec::new());
    for _ in 0..150_000 {
        now = now.saturating_add(random.next() >> (30 + random.below(34)));
        let port = match random.below(4) {
            0 => random.next() as u16,
            1 => 0x3f8 + random.below(8) as u16,
            2 => [0x20, 0x21, 0xa0, 0xa1, 0x40, 0x43, 0x61, 0x70, 0x71, 0x4d0][random.below(10) as usize],
            _ => 0x600 + random.below(12) as u16,
        };
        let width = [Width::Byte, Width::Word, Width::Dword][random.below(3) as usize];
        match random.below(8) {
            0 => {
                platform.console_push(now, &[0; 64]);
            }
            1 => {
                out.clear();
                platform.console_take(now, &mut out);
                assert!(out.len() <= PlatformConfig::default().console_output);
            }
            2 => {
                platform.poll(now);
                if platform.interrupt_asserted() {
                    platform.interrupt_acknowledge();
                }
            }
            3 | 4 => assert_eq!(platform.io_read(now, port, width) & !width.mask(), 0),
            _ => platform.io_write(now, port, width, random.next() as u32),
        }
        assert!(platform.next_deadline_ns().is_none_or(|deadline| deadline > now || now == u64::MAX));
        let _ = platform.take_effects();
    }
}

#[test]
fn suspended_until_the_alarm() {
    const NS_PER_S: u64 = 1_000_000_000;
    let suspend = |platform: &mut Platform| platform.io_write(0, 0x604, Width::Word, 0x2400);
    let mut without = platform();
    suspend(&mut without);
    assert!(!without.take_effects().suspended, "the tables do not offer it");

    let board = Some(BoardConfig { ram_bytes: 64 << 20, vcpus: 2 });
    let mut platform = Platform::new(PlatformConfig { board, ..PlatformConfig::default() });
    // An alarm at any second, and a line of the 8259s that is not masked.
    let written =
        [(0x70, 1), (0x71, 0xff), (0x70, 3), (0x71, 0xff), (0x70, 5), (0x71, 0xff), (0x70, 0xb), (0x71, 0x22)];
    for (port, value) in written.into_iter().chain([(0x21, 0), (0x3ff, 0x5a), (0x3f8, u32::from(b'?'))]) {
        platform.io_write(0, port, Width::Byte, value);
    }
    platform.io_write(0, 0x602, Width::Word, 1 << 10);
    suspend(&mut platform);
    let effects = platform.take_effects();
    assert!(effects.suspended && !effects.resumed && effects.console_output, "{effects:?}");
    let mut sent = Vec::new();
    platform.console_take(0, &mut sent);
    assert_eq!((sent.as_slice(), platform.io_read(0, 0x3ff, Width::Byte)), (b"?".as_slice(), 0), "power was lost");
    suspend(&mut platform);
    assert!(!platform.take_effects().suspended, "it sleeps already");
    assert_eq!(platform.next_deadline_ns(), Some(NS_PER_S));
    platform.poll(NS_PER_S - 1);
    assert!(!platform.take_effects().resumed);
    platform.poll(NS_PER_S);
    assert!(platform.take_effects().resumed);
    assert_eq!(platform.io_read(NS_PER_S, 0x600, Width::Word), 1 << 15 | 1 << 10);
    platform.poll(2 * NS_PER_S);
    assert!(!platform.take_effects().resumed, "once");
}
