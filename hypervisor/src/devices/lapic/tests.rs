use super::*;
use crate::devices::testing::Random;

const KHZ: u64 = 2_000_000;

fn at(ns: u64) -> Now {
    Now { ns, tsc: ns * KHZ / 1_000_000 }
}

fn lapic(apic_id: u32) -> Lapic {
    let mut lapic = Lapic::new(LapicConfig { apic_id, bootstrap: apic_id == 0, tsc_khz: KHZ });
    lapic.wrmsr(at(0), SVR, 0x1ff).expect("SVR is writable");
    lapic
}

fn write(lapic: &mut Lapic, ns: u64, msr: u32, value: u64) -> LapicEffect {
    lapic.wrmsr(at(ns), msr, value).unwrap_or_else(|_| panic!("MSR {msr:#x} refused {value:#x}"))
}

fn read(lapic: &mut Lapic, ns: u64, msr: u32) -> u64 {
    lapic.rdmsr(at(ns), msr).unwrap_or_else(|_| panic!("MSR {msr:#x} refused to be read"))
}

#[test]
fn firmware_state() {
    let mut bsp = Lapic::new(LapicConfig { apic_id: 0, bootstrap: true, tsc_khz: KHZ });
    assert_eq!(bsp.apic_base(), 0xfee0_0d00);
    assert!(bsp.accepts_extint());
    assert_eq!(read(&mut bsp, 0, VERSION), 0x0005_0014);
    let mut ap = Lapic::new(LapicConfig { apic_id: 17, bootstrap: false, tsc_khz: KHZ });
    assert_eq!(ap.apic_base(), 0xfee0_0c00);
    assert!(!ap.accepts_extint());
    assert_eq!((read(&mut ap, 0, ID), read(&mut ap, 0, LDR)), (17, 0x0001_0002));
    assert_eq!(read(&mut ap, 0, SVR), 0xff);
    assert_eq!(read(&mut ap, 0, LVT_TIMER), u64::from(LVT_MASKED));
}

#[test]
fn priority_service_and_eoi() {
    let mut lapic = lapic(0);
    for vector in [0x31, 0x45, 0x47, 0xf0] {
        write(&mut lapic, 0, SELF_IPI, vector);
    }
    assert_eq!(lapic.acknowledge(), Some(0xf0));
    assert_eq!(read(&mut lapic, 0, PPR), 0xf0);
    assert_eq!(lapic.deliverable(), None);
    write(&mut lapic, 0, EOI, 0);
    assert_eq!(lapic.acknowledge(), Some(0x47));
    assert_eq!(lapic.deliverable(), None, "0x45 is of the same class");
    write(&mut lapic, 0, SELF_IPI, 0x52);
    assert_eq!(lapic.acknowledge(), Some(0x52), "a higher class nests");
    write(&mut lapic, 0, EOI, 0);
    assert_eq!(lapic.deliverable(), None);
    write(&mut lapic, 0, EOI, 0);
    write(&mut lapic, 0, TPR, 0x40);
    assert_eq!(lapic.deliverable(), None);
    lapic.set_cr8(3);
    assert_eq!(lapic.acknowledge(), Some(0x45));
    write(&mut lapic, 0, EOI, 0);
    assert_eq!(lapic.deliverable(), None, "TPR 0x30 holds back 0x31");
    lapic.set_cr8(2);
    assert_eq!(lapic.acknowledge(), Some(0x31));
    assert_eq!(read(&mut lapic, 0, ISR + 1), 1 << 0x11);
    write(&mut lapic, 0, EOI, 0);
    write(&mut lapic, 0, EOI, 0);
    assert_eq!(read(&mut lapic, 0, IRR + 1), 0);
}

#[test]
fn posted_vectors_and_events_arrive_once() {
    let shared = LapicShared::new(0);
    let mut lapic = lapic(0);
    assert!(shared.post(IpiKind::Fixed(0x40)));
    assert!(!shared.post(IpiKind::Fixed(0xff)), "the first post's kick covers the second");
    assert!(shared.post(IpiKind::Nmi));
    assert!(!shared.post(IpiKind::Nmi));
    assert!(!shared.post(IpiKind::Nmi));
    assert!(shared.has_pending());
    assert_eq!(lapic.sync(&shared), Pending { nmis: 2, ..Pending::default() });
    assert!(!shared.has_pending());
    assert_eq!(lapic.sync(&shared), Pending::default());
    assert_eq!(lapic.acknowledge(), Some(0xff));
    write(&mut lapic, 0, EOI, 0);
    assert_eq!(lapic.acknowledge(), Some(0x40));
}

#[test]
fn init_forgets_an_earlier_startup_and_keeps_a_later_one() {
    let shared = LapicShared::new(1);
    let mut lapic = lapic(1);
    shared.post(IpiKind::Startup(0x11));
    shared.post(IpiKind::Init);
    assert_eq!(lapic.sync(&shared), Pending { init: true, ..Pending::default() });
    shared.post(IpiKind::Nmi);
    shared.post(IpiKind::Init);
    assert!(shared.post(IpiKind::Startup(0x9a)));
    assert!(!shared.post(IpiKind::Startup(0x9b)));
    assert_eq!(lapic.sync(&shared), Pending { nmis: 1, init: true, startup: Some(0x9a), ..Pending::default() });
}

#[test]
fn a_power_loss_forgets_what_was_posted_and_a_wake_does_not() {
    let (mut lapic, shared) = (lapic(0), LapicShared::new(0));
    shared.post(IpiKind::Startup(0x9a));
    shared.post(IpiKind::Nmi);
    shared.post_vector(0x40);
    assert!(shared.post_power_loss() && !shared.post_power_loss());
    shared.post(IpiKind::Init);
    assert!(shared.post_resume());
    let pending = Pending { init: true, power_loss: true, resume: true, ..Pending::default() };
    assert_eq!(lapic.sync(&shared), pending);
    assert_eq!(lapic.sync(&shared), Pending::default());
    assert!(!shared.has_pending());
}

#[test]
fn concurrent_posts_lose_nothing() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let shared = LapicShared::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let senders: std::vec::Vec<_> = (0..2u8)
            .map(|sender| {
                let shared = &shared;
                scope.spawn(move || {
                    for vector in (16..=255u8).filter(|vector| vector % 2 == sender) {
                        shared.post_vector(vector);
                    }
                })
            })
            .collect();
        let receiver = scope.spawn(|| {
            let mut seen = [0u32; 256];
            loop {
                let last = done.load(Ordering::SeqCst);
                let _ = shared.drain(|vector, _| seen[usize::from(vector)] += 1);
                if last && !shared.has_pending() {
                    return seen;
                }
            }
        });
        for sender in senders {
            sender.join().expect("sender");
        }
        done.store(true, Ordering::SeqCst);
        let seen = receiver.join().expect("receiver");
        assert!(seen[16..].iter().all(|count| *count == 1), "each vector exactly once");
    });
}

#[test]
fn disabled_by_software_takes_no_vectors_and_masks_the_table() {
    let shared = LapicShared::new(0);
    let mut lapic = lapic(0);
    assert!(lapic.accepts_extint());
    write(&mut lapic, 0, SVR, 0xff);
    assert!(!lapic.accepts_extint());
    shared.post_vector(0x50);
    assert_eq!(lapic.sync(&shared), Pending::default());
    assert_eq!(lapic.deliverable(), None);
    write(&mut lapic, 0, LVT_TIMER, 0x40);
    assert_eq!(read(&mut lapic, 0, LVT_TIMER), 0x40 | u64::from(LVT_MASKED));
    write(&mut lapic, 0, SVR, 0x1ff);
    assert_eq!(lapic.deliverable(), None, "what came meanwhile is lost");
    assert!(lapic.accepts_extint(), "virtual wire mode comes back");
    write(&mut lapic, 0, SVR, 0xff);
    write(&mut lapic, 0, LVT_LINT0, u64::from(LVT_MODE_EXTINT | LVT_MASKED | LVT_READ_ONLY));
    write(&mut lapic, 0, SVR, 0x1ff);
    assert!(!lapic.accepts_extint(), "unless the guest has decided otherwise");
}

#[test]
fn one_shot_timer() {
    let mut lapic = lapic(0);
    write(&mut lapic, 0, LVT_TIMER, 0x40);
    write(&mut lapic, 0, TIMER_DIVIDE, 0x3);
    assert_eq!(write(&mut lapic, 1000, TIMER_INITIAL, 100), LapicEffect::Timer);
    assert_eq!(lapic.next_deadline_ns(at(1000)), Some(1000 + 1600));
    assert_eq!(read(&mut lapic, 1000 + 800, TIMER_CURRENT), 50);
    lapic.poll(at(2599));
    assert_eq!(lapic.deliverable(), None);
    lapic.poll(at(2600));
    assert_eq!(lapic.acknowledge(), Some(0x40));
    assert_eq!(read(&mut lapic, 3000, TIMER_CURRENT), 0);
    assert_eq!(lapic.next_deadline_ns(at(3000)), None);
}

#[test]
fn periodic_timer_keeps_its_phase_and_merges_missed_periods() {
    let mut lapic = lapic(0);
    write(&mut lapic, 0, TIMER_DIVIDE, 0xb);
    write(&mut lapic, 0, LVT_TIMER, 0x2_0040);
    write(&mut lapic, 0, TIMER_INITIAL, 1_000_000);
    lapic.poll(at(5_500_000));
    assert_eq!(lapic.acknowledge(), Some(0x40));
    write(&mut lapic, 5_500_000, EOI, 0);
    assert_eq!(lapic.deliverable(), None);
    assert_eq!(lapic.next_deadline_ns(at(5_500_000)), Some(6_000_000));
    assert_eq!(read(&mut lapic, 5_500_000, TIMER_CURRENT), 500_000);
}

#[test]
fn absurd_periods_are_bounded() {
    let mut lapic = lapic(0);
    write(&mut lapic, 0, TIMER_DIVIDE, 0xb);
    write(&mut lapic, 0, LVT_TIMER, 0x2_0040);
    write(&mut lapic, 0, TIMER_INITIAL, 1);
    assert!(lapic.next_deadline_ns(at(0)) >= Some(10_000));
}

#[test]
fn divider_values() {
    for (register, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xa, 128), (0xb, 1)] {
        let mut lapic = lapic(0);
        write(&mut lapic, 0, LVT_TIMER, 0x40);
        write(&mut lapic, 0, TIMER_DIVIDE, register);
        write(&mut lapic, 0, TIMER_INITIAL, 1000);
        assert_eq!(lapic.next_deadline_ns(at(0)), Some(1000 * divisor));
    }
}

#[test]
fn changing_the_divider_keeps_the_count() {
    let mut lapic = lapic(0);
    write(&mut lapic, 0, LVT_TIMER, 0x40);
    write(&mut lapic, 0, TIMER_DIVIDE, 0xb);
    write(&mut lapic, 0, TIMER_INITIAL, 1000);
    write(&mut lapic, 400, TIMER_DIVIDE, 0x1);
    assert_eq!(read(&mut lapic, 400, TIMER_CURRENT), 600);
    assert_eq!(lapic.next_deadline_ns(at(400)), Some(400 + 600 * 4));
}

#[test]
fn tsc_deadline_timer() {
    let mut lapic = lapic(0);
    assert_eq!(lapic.set_tsc_deadline(at(0), 5000), LapicEffect::None, "the mode is off");
    assert_eq!(lapic.tsc_deadline(at(0)), 0);
    write(&mut lapic, 0, LVT_TIMER, 0x4_0041);
    assert_eq!(lapic.set_tsc_deadline(at(0), 5000), LapicEffect::Timer);
    assert_eq!(lapic.tsc_deadline(at(0)), 5000);
    assert_eq!(lapic.next_deadline_ns(at(0)), Some(2500));
    lapic.poll(at(2500));
    assert_eq!(lapic.tsc_deadline(at(2500)), 0, "reads 0 once it has fired");
    assert_eq!(lapic.acknowledge(), Some(0x41));
    write(&mut lapic, 2500, EOI, 0);
    lapic.set_tsc_deadline(at(3000), 1);
    assert_eq!(lapic.deliverable(), Some(0x41), "a deadline in the past fires at once");
    lapic.set_tsc_deadline(at(3000), 1_000_000);
    write(&mut lapic, 3000, TIMER_INITIAL, 77);
    assert_eq!(read(&mut lapic, 3000, TIMER_INITIAL), 0, "ignored in this mode");
    write(&mut lapic, 3000, LVT_TIMER, 0x41);
    assert_eq!(lapic.next_deadline_ns(at(3000)), None, "leaving the mode disarms");
}

#[test]
fn masked_timer_wakes_nobody() {
    let mut lapic = lapic(0);
    write(&mut lapic, 0, LVT_TIMER, 0x1_0040);
    write(&mut lapic, 0, TIMER_INITIAL, 10);
    assert_eq!(lapic.next_deadline_ns(at(0)), None);
    write(&mut lapic, 1000, LVT_TIMER, 0x40);
    assert_eq!(lapic.deliverable(), None, "an expiry while masked is lost");
}

#[test]
fn reserved_registers_and_bits_fault() {
    let mut lapic = lapic(0);
    let written = [ID, VERSION, PPR, LDR, ISR, TMR, IRR, TIMER_CURRENT, 0x80e, 0x82f, 0x831, 0x83a, 0x840, 0x8ff];
    for msr in written {
        assert_eq!(lapic.wrmsr(at(0), msr, 0), Err(Gp), "{msr:#x}");
    }
    for msr in [0x800, 0x801, 0x804, EOI, 0x80e, 0x82f, 0x831, SELF_IPI, 0x83a, 0x8ff] {
        assert_eq!(lapic.rdmsr(at(0), msr), Err(Gp), "{msr:#x}");
    }
    let values = [
        (TPR, 0x100),
        (EOI, 1),
        (ESR, 1),
        (SVR, 1 << 12),
        (SELF_IPI, 0x100),
        (TIMER_DIVIDE, 4),
        (LVT_TIMER, 1 << 8),
        (LVT_TIMER, 3 << 17),
        (LVT_LINT0, 1 << 17),
        (LVT_ERROR, 1 << 15),
        (TIMER_INITIAL, 1 << 32),
        (ICR, 1 << 12),
        (ICR, 1 << 20),
    ];
    for (msr, value) in values {
        let before = lapic.rdmsr(at(0), msr);
        assert_eq!(lapic.wrmsr(at(0), msr, value), Err(Gp), "{msr:#x} {value:#x}");
        assert_eq!(lapic.rdmsr(at(0), msr), before, "a fault changes nothing");
    }
}

#[test]
fn illegal_vectors_are_errors() {
    let mut lapic = lapic(0);
    write(&mut lapic, 0, LVT_ERROR, 0xfe);
    assert_eq!(write(&mut lapic, 0, ICR, 0x0c_000f), LapicEffect::Interrupts);
    assert_eq!(lapic.acknowledge(), Some(0xfe));
    assert_eq!(read(&mut lapic, 0, ESR), 0, "not latched yet");
    write(&mut lapic, 0, ESR, 0);
    assert_eq!(read(&mut lapic, 0, ESR), u64::from(ESR_SEND_ILLEGAL));
    write(&mut lapic, 0, ESR, 0);
    assert_eq!(read(&mut lapic, 0, ESR), 0);
    write(&mut lapic, 0, LVT_ERROR, 0x05);
    write(&mut lapic, 0, SELF_IPI, 3);
    write(&mut lapic, 0, ESR, 0);
    assert_eq!(read(&mut lapic, 0, ESR), u64::from(ESR_RECEIVE_ILLEGAL));
}

#[test]
fn apic_base_transitions() {
    let mut lapic = lapic(0);
    let base = APIC_DEFAULT_BASE | APIC_BASE_BSP;
    let (off, xapic, x2apic) = (base, base | APIC_BASE_ENABLE, base | APIC_BASE_ENABLE | APIC_BASE_X2APIC);
    assert_eq!(lapic.set_apic_base(xapic), Err(Gp), "x2APIC to xAPIC");
    assert_eq!(lapic.set_apic_base(base | APIC_BASE_X2APIC), Err(Gp), "EXTD without EN");
    assert_eq!(lapic.set_apic_base(x2apic | 1 << 40), Err(Gp), "beyond the physical address");
    assert_eq!(lapic.set_apic_base(x2apic | 1), Err(Gp), "reserved bit");
    assert!(lapic.set_apic_base(off).is_ok());
    assert_eq!(lapic.rdmsr(at(0), ID), Err(Gp));
    assert!(lapic.accepts_extint(), "the pin goes straight to the CPU");
    assert_eq!(lapic.set_apic_base(x2apic), Err(Gp), "off to x2APIC");
    assert!(lapic.set_apic_base(xapic).is_ok());
    assert_eq!(lapic.rdmsr(at(0), ID), Err(Gp));
    assert!(lapic.set_apic_base(x2apic).is_ok());
    assert_eq!(read(&mut lapic, 0, SVR), 0xff);
}

/// The vCPUs of a machine with IDs 0..40 that a write to ICR reaches, sent by vCPU 3.
fn reach(icr: u64) -> std::vec::Vec<usize> {
    let mut lapic = lapic(3);
    let all: std::vec::Vec<_> = (0..40).map(LapicShared::new).collect();
    match write(&mut lapic, 0, ICR, icr) {
        LapicEffect::Ipi(command) => route(&command, 3, all.iter()).iter().collect(),
        _ => std::vec::Vec::new(),
    }
}

#[test]
fn destinations() {
    assert_eq!(reach(5 << 32 | 0x40), [5]);
    assert_eq!(reach(99 << 32 | 0x40), []);
    assert_eq!(reach(0xffff_ffff << 32 | 0x40).len(), 40);
    assert_eq!(reach(0x000c_0040).len(), 39, "all but self");
    assert!(!reach(0x000c_0040).contains(&3));
    assert_eq!(reach(0x0008_0040).len(), 40, "all");
    assert_eq!(reach(0x0001_8001 << 32 | 0x840), [16, 31], "cluster 1, bits 0 and 15");
    assert_eq!(reach(0x0002_ffff << 32 | 0x840), (32..40).collect::<std::vec::Vec<_>>());
    assert_eq!(reach(0xffff_ffff << 32 | 0x840).len(), 40);
    assert_eq!(reach(0x0000_00f0 << 32 | 0x940), [4], "lowest priority picks one");
    assert_eq!(reach(7 << 32 | 0xc500), [7], "INIT");
    assert_eq!(reach(7 << 32 | 0x8500), [], "INIT de-assert");
    assert_eq!(reach(7 << 32 | 0x0699), [7], "start-up");
    assert_eq!(reach(0x0008_4500).len(), 39, "INIT to all leaves out the sender");
    assert_eq!(reach(0x0004_4500), [], "INIT to self");
    assert_eq!(reach(7 << 32 | 0x0200), [], "SMI");
    assert_eq!(reach(7 << 32 | 0x0740), [], "reserved mode");
}

#[test]
fn self_shorthand_stays_at_home() {
    let mut lapic = lapic(3);
    assert_eq!(write(&mut lapic, 0, ICR, 0x0004_0055), LapicEffect::Interrupts);
    assert_eq!(lapic.acknowledge(), Some(0x55));
    assert_eq!(read(&mut lapic, 0, ICR), 0x0004_0055);
}

#[test]
fn vcpu_set_is_bounded() {
    let mut set = VcpuSet::default();
    assert!(set.is_empty());
    for index in [0, 63, 64, 255, 256, usize::MAX] {
        set.insert(index);
    }
    assert_eq!(set.iter().collect::<std::vec::Vec<_>>(), [0, 63, 64, 255]);
    assert!(set.contains(255) && !set.contains(256));
}

#[test]
fn random_access_never_panics_and_keeps_its_rules() {
    let mut random = Random::new(7);
    let mut lapic = lapic(0);
    let shared = LapicShared::new(0);
    let mut now = 0u64;
    for step in 0..500_000u64 {
        let jump = if step == 499_000 { u64::MAX } else { random.of_any_length(30) };
        now = now.saturating_add(jump);
        let now = Now { ns: now, tsc: random.next() >> random.below(64) };
        let msr = if random.below(8) == 0 { random.next() as u32 } else { 0x800 + random.below(0x40) as u32 };
        let value = random.next() >> random.below(64);
        match random.below(8) {
            0 => _ = lapic.rdmsr(now, msr),
            1 => _ = lapic.set_tsc_deadline(now, value),
            2 => _ = shared.post_vector(value as u8),
            3 => {
                let _ = lapic.sync(&shared);
            }
            4 => {
                if let Some(vector) = lapic.deliverable() {
                    assert!(vector >= FIRST_VECTOR && vector >> 4 > lapic.ppr() >> 4);
                    assert_eq!(lapic.acknowledge(), Some(vector));
                    assert!(lapic.ppr() >= vector & 0xf0);
                }
            }
            5 => {
                let base = APIC_DEFAULT_BASE | (value & 0xd00);
                _ = lapic.set_apic_base(if random.below(4) == 0 { value } else { base });
            }
            _ => _ = lapic.wrmsr(now, msr, value),
        }
        lapic.poll(now);
        assert!(lapic.next_deadline_ns(now).is_none_or(|deadline| deadline > now.ns || now.ns == u64::MAX));
    }
}

/// An APIC in xAPIC mode with ID `id`, enabled by software.
fn xapic(id: u32) -> Lapic {
    let mut lapic = Lapic::new(LapicConfig { apic_id: id, bootstrap: id == 0, tsc_khz: KHZ }).in_xapic_mode();
    poke(&mut lapic, 0xf0, 0x1ff);
    lapic
}

fn poke(lapic: &mut Lapic, offset: u64, value: u32) -> LapicEffect {
    lapic.window_write(at(0), offset, 4, u64::from(value))
}

fn peek(lapic: &mut Lapic, offset: u64) -> u32 {
    lapic.window_read(at(0), offset, 4) as u32
}

#[test]
fn the_window_is_there_in_xapic_mode_only_and_moves() {
    let mut lapic = xapic(3);
    assert_eq!(lapic.apic_base(), 0xfee0_0800);
    assert_eq!((lapic.window_offset(0xfee0_0030), lapic.window_offset(0xfee0_1000)), (Some(0x30), None));
    assert_eq!(lapic.rdmsr(at(0), ID), Err(Gp));
    assert!(lapic.set_apic_base(0xfed4_0800).is_ok());
    assert_eq!((lapic.window_offset(0xfed4_0020), lapic.window_offset(0xfee0_0020)), (Some(0x20), None));
    assert!(lapic.set_apic_base(0xfee0_0c00).is_ok());
    assert_eq!(lapic.window_offset(0xfee0_0030), None);
    assert_eq!(read(&mut lapic, 0, ID), 3);
}

#[test]
fn window_registers() {
    let mut lapic = xapic(5);
    assert_eq!((peek(&mut lapic, 0x20), peek(&mut lapic, 0x30)), (5 << 24, 0x0005_0014));
    poke(&mut lapic, 0x80, 0xffff_ff45);
    assert_eq!((peek(&mut lapic, 0x80), lapic.cr8()), (0x45, 4), "what does not exist is ignored");
    poke(&mut lapic, 0xd0, u32::MAX);
    poke(&mut lapic, 0xe0, 0);
    assert_eq!((peek(&mut lapic, 0xd0), peek(&mut lapic, 0xe0)), (0xff00_0000, 0x0fff_ffff));
    poke(&mut lapic, 0x310, 0x1200_0000);
    assert_eq!(peek(&mut lapic, 0x310), 0x1200_0000);
    assert_eq!(lapic.window_read(at(0), 0x31, 1), 0, "second byte of the version");
    assert_eq!(lapic.window_read(at(0), 0x32, 2), 5);
    assert_eq!(lapic.window_read(at(0), 0x34, 4), 0);
    assert_eq!(lapic.window_write(at(0), 0x80, 1, 0), LapicEffect::None);
    assert_eq!(peek(&mut lapic, 0x80), 0x45, "part of a register is not written");
    peek(&mut lapic, 0x40);
    poke(&mut lapic, 0x280, 7);
    assert_eq!(peek(&mut lapic, 0x280), 1 << 7, "there is no such register");
}

#[test]
fn levels_are_told_when_they_end() {
    let shared = LapicShared::new(0);
    let mut lapic = xapic(0);
    poke(&mut lapic, 0x80, 0);
    shared.post_level(0x71);
    shared.post_vector(0x81);
    let _ = lapic.sync(&shared);
    assert_eq!((peek(&mut lapic, 0x1b0), peek(&mut lapic, 0x1c0)), (1 << 0x11, 0), "TMR");
    assert_eq!(lapic.acknowledge(), Some(0x81));
    poke(&mut lapic, 0xb0, 0);
    assert_eq!(lapic.take_ended(), None, "an edge is nobody's business");
    assert_eq!(lapic.acknowledge(), Some(0x71));
    poke(&mut lapic, 0xb0, 0);
    assert_eq!((lapic.take_ended(), lapic.take_ended()), (Some(0x71), None));
    shared.post_vector(0x71);
    let _ = lapic.sync(&shared);
    assert_eq!(peek(&mut lapic, 0x1b0), 0, "the same vector by an edge");
}

#[test]
fn xapic_destinations() {
    let all: std::vec::Vec<_> = (0..6).map(LapicShared::new).collect();
    for (id, shared) in (0u32..).zip(&all) {
        let mut lapic = xapic(id);
        // 0 to 3 flat, 4 in a cluster, 5 in x2APIC mode.
        match id {
            0..4 => _ = poke(&mut lapic, 0xd0, 1 << (24 + id)),
            4 => {
                poke(&mut lapic, 0xe0, 0);
                poke(&mut lapic, 0xd0, 0x2100_0000);
            }
            _ => assert!(lapic.set_apic_base(APIC_DEFAULT_BASE | 0xc00).is_ok()),
        }
        let _ = lapic.sync(shared);
    }
    let mut sender = xapic(1);
    let mut reach = |high: u32, low: u32| {
        poke(&mut sender, 0x310, high);
        match poke(&mut sender, 0x300, low) {
            LapicEffect::Ipi(command) => route(&command, 1, all.iter()).iter().collect(),
            _ => std::vec::Vec::new(),
        }
    };
    assert_eq!(reach(4 << 24, 0x40), [4]);
    assert_eq!(reach(0xff << 24, 0x40), [0, 1, 2, 3, 4, 5]);
    assert_eq!(reach(0, 0xc_0040), [0, 2, 3, 4, 5]);
    assert_eq!(reach(0x0c << 24, 0x840), [2, 3]);
    assert_eq!(reach(0x21 << 24, 0x840), [0, 4, 5], "each as it is addressed");
    assert_eq!(reach(5 << 24, 0x4500), [5]);
    assert_eq!(reach(5 << 24, 0xffff_f040), [0, 2, 3, 4, 5], "reserved bits are ignored: all but self");
}

#[test]
fn random_windows_never_panic() {
    let mut random = Random::new(8);
    let mut lapic = xapic(0);
    let shared = LapicShared::new(0);
    for _ in 0..300_000 {
        let now = Now { ns: random.of_any_length(40), tsc: random.next() };
        let offset = random.below(APIC_WINDOW_BYTES);
        let offset = if random.below(4) == 0 { offset } else { offset & 0x3f0 };
        let bytes = 1 << random.below(4);
        match random.below(4) {
            0 => {
                let value = lapic.window_read(now, offset, bytes);
                assert!(bytes == 8 || value >> (8 * bytes) == 0);
            }
            1 => {
                shared.post_level(random.byte());
                let _ = lapic.sync(&shared);
                _ = lapic.acknowledge();
            }
            _ => _ = lapic.window_write(now, offset, bytes, random.next()),
        }
        _ = lapic.take_ended();
    }
}
