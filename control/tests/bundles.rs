//! Bundles that are whole, cut, damaged, or made by someone who knows the checksums.

use nestling_control::{
    bundle::{BLOB_ALIGNMENT, Blob, Bundle, BundleError, MAGIC},
    config::{ConfigError, HugePages, MAX_VCPUS, MIN_MEMORY_BYTES, MmuKind, Origin, RunConfig},
};
use proptest::prelude::*;

fn config() -> RunConfig {
    RunConfig {
        kind: nestling_control::config::GuestKind::Linux,
        origin: Origin::Boot,
        storm: None,
        series: None,
        meter_pages: 0,
        vcpus: 4,
        memory_bytes: 1 << 30,
        huge_pages: HugePages::M2,
        mmu: MmuKind::Shadow,
        silence_timeout_ms: Some(60_000),
        command_line: "console=ttyS0 panic=-1".into(),
        ready_marker: "ready".into(),
    }
}

fn file(kernel: &[u8], initrd: Option<&[u8]>) -> Vec<u8> {
    Bundle { config: config(), kernel, initrd }.to_bytes().expect("a good bundle")
}

/// A file whose header, checksum included, is `header`, followed by `data` at its place.
fn forged(header: &impl serde::Serialize, data: &[u8]) -> Vec<u8> {
    let header = postcard::to_allocvec(header).expect("serialises");
    let mut file = MAGIC.to_vec();
    for word in [nestling_control::PROTOCOL_VERSION, header.len() as u32, crc32fast::hash(&header), 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(&header);
    file.resize(file.len().next_multiple_of(BLOB_ALIGNMENT), 0);
    file.extend(data);
    file
}

#[derive(serde::Serialize)]
struct Place {
    offset: u64,
    length: u64,
    checksum: u32,
}

fn kernel_at(offset: u64, length: u64) -> Vec<u8> {
    let data = [7u8; 2 * BLOB_ALIGNMENT];
    forged(&(config(), Some(Place { offset, length, checksum: crc32fast::hash(&data[..4096]) }), None::<Place>), &data)
}

#[test]
fn a_blob_outside_the_file_is_refused_whatever_its_numbers() {
    assert!(Bundle::parse(&kernel_at(0, 4096)).is_ok(), "the forgery itself is right");
    for (offset, length) in [(0, 8193), (8192, 1), (!4095, 1), (!4095, u64::MAX), (4096, u64::MAX), (0, u64::MAX)] {
        let file = kernel_at(offset, length);
        let found = Bundle::parse(&file);
        assert!(
            matches!(found, Err(BundleError::BlobOutOfBounds { blob: Blob::Kernel, .. })),
            "offset {offset:#x} length {length:#x}: {found:?}"
        );
    }
    assert!(matches!(Bundle::parse(&kernel_at(1, 4096)), Err(BundleError::BlobMisaligned { .. })));
    assert_eq!(Bundle::parse(&kernel_at(0, 0)), Err(BundleError::BlobEmpty(Blob::Kernel)));
}

#[test]
fn an_initrd_over_the_kernel_is_refused() {
    let data = [7u8; 2 * BLOB_ALIGNMENT];
    let place = || Place { offset: 0, length: 4096, checksum: crc32fast::hash(&data[..4096]) };
    let file = forged(&(config(), Some(place()), Some(place())), &data);
    let found = Bundle::parse(&file);
    assert!(matches!(found, Err(BundleError::BlobOutOfBounds { blob: Blob::Initrd, .. })), "{found:?}");
}

#[test]
fn a_configuration_out_of_bounds_is_refused_on_both_sides() {
    type Change = fn(&mut RunConfig);
    let changes: [(Change, ConfigError); 7] = [
        (|c| c.vcpus = 0, ConfigError::Vcpus { asked: 0 }),
        (|c| c.vcpus = MAX_VCPUS + 1, ConfigError::Vcpus { asked: MAX_VCPUS + 1 }),
        (|c| c.memory_bytes = MIN_MEMORY_BYTES - 1, ConfigError::MemoryTooSmall { asked: MIN_MEMORY_BYTES - 1 }),
        (|c| c.memory_bytes = u64::MAX, ConfigError::MemoryTooLarge { asked: u64::MAX }),
        (|c| c.memory_bytes += 4096, ConfigError::MemoryUneven { asked: (1 << 30) + 4096 }),
        (|c| c.command_line = "x".repeat(2048), ConfigError::CommandLineTooLong { length: 2048 }),
        (|c| c.command_line = "a\0b".into(), ConfigError::CommandLineControl { at: 1 }),
    ];
    for (change, cause) in changes {
        let mut config = config();
        change(&mut config);
        let data = [1u8; 4096];
        let place = Place { offset: 0, length: 4096, checksum: crc32fast::hash(&data) };
        let forged = forged(&(&config, Some(place), None::<Place>), &data);
        assert_eq!(Bundle::parse(&forged), Err(BundleError::Config(cause.clone())));
        let written = Bundle { config, kernel: &data, initrd: None }.to_bytes();
        assert_eq!(written, Err(BundleError::Config(cause)));
    }
}

#[test]
fn a_guest_that_comes_in_needs_no_kernel_and_one_that_boots_does() {
    let incoming = RunConfig { origin: Origin::Window, ..config() };
    let file = Bundle { config: incoming.clone(), kernel: &[], initrd: None }.to_bytes().expect("a good bundle");
    assert_eq!(Bundle::parse(&file), Ok(Bundle { config: incoming, kernel: &[], initrd: None }));
    let without = forged(&(config(), None::<Place>, None::<Place>), &[]);
    assert_eq!(Bundle::parse(&without), Err(BundleError::BlobEmpty(Blob::Kernel)));
}

#[test]
fn empty_blobs_are_not_written() {
    let empty = |kernel, initrd| Bundle { config: config(), kernel, initrd }.to_bytes();
    assert_eq!(empty(b"", None), Err(BundleError::BlobEmpty(Blob::Kernel)));
    assert_eq!(empty(b"k", Some(b"")), Err(BundleError::BlobEmpty(Blob::Initrd)));
}

#[test]
fn another_version_and_another_file_are_named() {
    let mut other = file(b"kernel", None);
    other[8] ^= 0x40;
    assert!(matches!(Bundle::parse(&other), Err(BundleError::Version { .. })));
    assert_eq!(
        Bundle::parse(b"\x7fELF\x02\x01\x01\0..."),
        Err(BundleError::Magic { found: *b"\x7fELF\x02\x01\x01\0" })
    );
    assert!(matches!(Bundle::parse(b""), Err(BundleError::TooShort { .. })));
}

#[test]
fn a_loader_may_round_the_file_up() {
    let mut padded = file(b"kernel", Some(b"initrd"));
    padded.resize(padded.len().next_multiple_of(4096) + 4096, 0xaa);
    assert_eq!(Bundle::parse(&padded).map(|bundle| bundle.initrd), Ok(Some(&b"initrd"[..])));
}

proptest! {
    #[test]
    fn what_was_written_is_read(kernel in prop::collection::vec(any::<u8>(), 1..9000), initrd in prop::option::of(prop::collection::vec(any::<u8>(), 1..9000))) {
        let written = Bundle { config: config(), kernel: &kernel, initrd: initrd.as_deref() };
        let file = written.to_bytes().expect("a good bundle");
        prop_assert_eq!(Bundle::parse(&file), Ok(written));
    }

    #[test]
    fn a_cut_bundle_is_refused(keep in any::<prop::sample::Index>()) {
        let whole = file(&[1; 5000], Some(&[2; 100]));
        prop_assert!(Bundle::parse(&whole[..keep.index(whole.len())]).is_err());
    }

    /// Any damage is either found, or hit the padding that means nothing.
    #[test]
    fn damage_is_found_or_means_nothing(at in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4)) {
        let whole = file(&[1; 5000], Some(&[2; 100]));
        let mut damaged = whole.clone();
        for (at, flip) in at {
            damaged[at.index(whole.len())] ^= flip;
        }
        if let Ok(bundle) = Bundle::parse(&damaged) {
            prop_assert_eq!(Ok(bundle), Bundle::parse(&whole));
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300), start in any::<bool>()) {
        let mut file = if start { MAGIC.to_vec() } else { Vec::new() };
        file.extend(bytes);
        prop_assert!(Bundle::parse(&file).is_err());
    }

    /// A forged header with a right checksum reaches the parser of the header itself.
    #[test]
    fn any_header_is_survived(header in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut file = MAGIC.to_vec();
        for word in [nestling_control::PROTOCOL_VERSION, header.len() as u32, crc32fast::hash(&header), 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(&header);
        prop_assert!(Bundle::parse(&file).is_err());
    }
}
