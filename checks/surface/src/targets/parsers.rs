//! What comes to hypervisor and command as bytes: bundles, frames of the control channel in both directions, firmware's
//! tables; and the firmware configuration device, which a guest reads byte by byte.

use nestling_control::bundle::Bundle;
use nestling_control::config::{GuestKind, HugePages, MmuKind, RunConfig};
use nestling_control::frame::{self, Decoder, MAX_FRAME_BYTES};
use nestling_control::message::{GuestExit, LogLevel, Report, ToCommand, ToHypervisor};
use nestling_hypervisor::boot::acpi;
use nestling_hypervisor::devices::Width;
use nestling_hypervisor::devices::board::BoardConfig;
use nestling_hypervisor::devices::platform::{Platform, PlatformConfig};

use super::noise;

/// The input as a bundle. One that is accepted is written again, and is the same.
pub fn bundle(bytes: &[u8]) {
    if let Ok(bundle) = Bundle::parse(bytes) {
        let again = bundle.to_bytes().expect("what was accepted can be written");
        assert_eq!(Bundle::parse(&again).as_ref(), Ok(&bundle));
    }
}

/// The input as both sides of the control channel read it. A message that is understood is sent again, and is the same.
pub fn frames(bytes: &[u8]) {
    let (mut command, mut hypervisor) = (Decoder::<ToCommand>::default(), Decoder::<ToHypervisor>::with_limit(64));
    for &byte in bytes {
        if let Some(Ok(message)) = command.push(byte) {
            let mut sent = Vec::new();
            frame::encode(&message, &mut sent).expect("what was received can be sent");
            let mut other = Decoder::<ToCommand>::default();
            let received: Vec<_> = sent.iter().filter_map(|&byte| other.push(byte)).collect();
            assert_eq!(received, [Ok(message)]);
        }
        let _ = hypervisor.push(byte);
    }
}

/// Firmware's tables, the input being the first 64 KiB of memory.
pub fn firmware_tables(bytes: &[u8]) {
    struct Memory<'a>(&'a [u8]);
    impl acpi::Memory for Memory<'_> {
        fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
            let start = usize::try_from(address).ok()?;
            self.0.get(start..start.checked_add(length)?)
        }
    }
    let _ = acpi::read(&Memory(bytes), 0);
}

/// Reads and selections of the firmware configuration device: each byte of the input is one.
pub fn fw_cfg(bytes: &[u8]) {
    let board = Some(BoardConfig { ram_bytes: 64 << 20, vcpus: 2 });
    let mut platform = Platform::new(PlatformConfig { board, ..PlatformConfig::default() });
    for (time, pair) in (0..).zip(bytes.chunks_exact(2)) {
        let width = [Width::Byte, Width::Word, Width::Dword][usize::from(pair[0] >> 2) % 3];
        let port = 0x510 + u16::from(pair[0] >> 5);
        if pair[0] & 3 == 0 {
            platform.io_write(time, 0x510, Width::Word, u32::from(pair[1]));
        } else if pair[0] & 3 == 1 {
            platform.io_write(time, port, width, u32::from(pair[1]) * 0x0101_0101);
        } else {
            let value = platform.io_read(time, port, width);
            assert_eq!(value & !width.mask(), 0);
        }
    }
}

pub(super) fn bundle_seeds() -> Vec<Vec<u8>> {
    let config = RunConfig {
        kind: GuestKind::Multiboot,
        vcpus: 2,
        memory_bytes: 64 << 20,
        huge_pages: HugePages::M2,
        mmu: MmuKind::Nested,
        silence_timeout_ms: Some(1000),
        command_line: "words".into(),
        ready_marker: "up".into(),
        storm: None,
        series: None,
        origin: nestling_control::config::Origin::Boot,
        meter_pages: 0,
    };
    let (kernel, initrd) = (noise(1, 100), noise(2, 50));
    let bundle = |initrd| Bundle { config: config.clone(), kernel: &kernel, initrd }.to_bytes();
    [bundle(None), bundle(Some(&initrd[..]))].into_iter().flatten().collect()
}

pub(super) fn frame_seeds() -> Vec<Vec<u8>> {
    let messages = [
        ToCommand::Log { level: LogLevel::Warn, text: "text".into() },
        ToCommand::GuestBegins { seed: 7 },
        ToCommand::Report(Box::new(Report { exits: [("hlt".into(), 3)].into(), ..Report::default() })),
        ToCommand::Done(GuestExit::Error { text: "why".into() }),
    ];
    let mut all: Vec<Vec<u8>> = Vec::new();
    for message in &messages {
        let mut bytes = Vec::new();
        if frame::encode(message, &mut bytes).is_ok() {
            all.push(bytes);
        }
    }
    let mut stop = Vec::new();
    if frame::encode(&ToHypervisor::Stop, &mut stop).is_ok() {
        all.push(stop);
    }
    all.push(all.concat());
    all.push(vec![1; MAX_FRAME_BYTES + 2]);
    all
}

/// A root pointer, a root table, a MADT with two processors, and a FADT.
pub(super) fn table_seeds() -> Vec<Vec<u8>> {
    let mut memory = vec![0; 0x400];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"RSD PTR ");
    put(16, &0x40_u32.to_le_bytes());
    for (at, name, length) in [(0x40, b"RSDT", 44_u32), (0x100, b"APIC", 60), (0x200, b"FACP", 116)] {
        put(at, name);
        put(at + 4, &length.to_le_bytes());
    }
    put(0x40 + 36, &0x100_u32.to_le_bytes());
    put(0x40 + 40, &0x200_u32.to_le_bytes());
    put(0x100 + 44, &[0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0]);
    put(0x200 + 76, &0x608_u32.to_le_bytes());
    for (start, end, sum) in [(0, 20, 8), (0x40, 0x40 + 44, 0x49), (0x100, 0x13c, 0x109), (0x200, 0x274, 0x209)] {
        let total = memory[start..end].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        memory[sum] = memory[sum].wrapping_sub(total);
    }
    vec![memory]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_understood() {
        assert_eq!(bundle_seeds().len(), 2);
        assert!(bundle_seeds().iter().all(|bytes| Bundle::parse(bytes).is_ok()));
        let mut decoder = Decoder::<ToCommand>::default();
        let understood = frame_seeds()[0].iter().filter_map(|&byte| decoder.push(byte)).filter(Result::is_ok).count();
        assert_eq!(understood, 1);
    }
}
