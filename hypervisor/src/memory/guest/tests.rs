//! Guest RAM, on the host: the process's own memory plays the machine's.

use super::*;
use crate::memory::frames::testing;
use std::thread;
use std::vec;

const MIB: u64 = 1 << 20;

fn ram(size: ChunkSize) -> GuestRam {
    testing::machine();
    let range = |start: u64, end: u64| GfnRange { start: Gpa(start).gfn(), end: Gpa(end).gfn() };
    GuestRam::new(&[range(0, 5 * MIB), range(64 * MIB, 68 * MIB)], size).unwrap()
}

#[test]
fn memory_comes_zeroed_when_it_is_touched_and_stays_where_it_is() {
    for (size, pages) in [(ChunkSize::M2, 512), (ChunkSize::K4, 1), (ChunkSize::G1, 512)] {
        let ram = ram(size);
        let gfn = Gpa(3 * MIB + 0x5000).gfn();
        assert!(!ram.peek(gfn.gpa(), &mut [0]), "nothing is there before the first touch");
        assert_eq!(ram.frame_at_hand(0, gfn), None);
        let extent = ram.resolve(0, gfn, Access::Read).unwrap();
        assert_eq!((extent.gfns.pages(), extent.gfns.contains(gfn)), (pages, true));
        assert_eq!(extent.hfn.0 % pages, extent.gfns.start.0 % pages, "aligned alike on both sides");
        assert_eq!(ram.resolve(0, gfn, Access::Write), Ok(extent));
        assert_eq!(ram.frame_at_hand(0, gfn), extent.page(gfn).map(|page| page.hfn));
        let mut page = vec![0xff; 4096];
        ram.read(gfn.gpa(), &mut page).unwrap();
        assert!(page.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn copies_cross_chunks_and_end_with_the_memory() {
    let ram = ram(ChunkSize::M2);
    let text: vec::Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
    ram.write(Gpa(MIB + 7), &text).unwrap();
    let mut back = vec![0; text.len()];
    assert!(ram.peek(Gpa(MIB + 7), &mut back));
    assert!(back == text);
    assert_eq!(ram.write(Gpa(5 * MIB - 2), b"abc"), Err(BackingError::NotBacked));
    assert!(!ram.peek(Gpa(5 * MIB - 2), &mut [0; 3]));
    assert_eq!(ram.resolve(1, Gpa(0).gfn(), Access::Read), Err(BackingError::NotBacked));
    assert_eq!(ram.resolve(2, Gpa(64 * MIB).gfn(), Access::Read), Err(BackingError::NotBacked));
    assert_eq!(
        GuestMemory::read(&ram, u64::MAX - 1, &mut [0; 4]),
        Err(GuestMemoryError::NotRam { gpa: u64::MAX - 1, bytes: 4 })
    );
}

#[test]
fn exchanges_change_just_their_bytes() {
    let ram = ram(ChunkSize::M2);
    for bytes in [1usize, 2, 4, 8] {
        ram.write(Gpa(0x1000), &[0xaa; 24]).unwrap();
        let mask = u64::MAX >> (64 - 8 * bytes);
        let (old, new) = (0xaaaa_aaaa_aaaa_aaaa & mask, 0x1122_3344_5566_7788 & mask);
        assert_eq!(ram.compare_exchange(Gpa(0x1007), bytes, old ^ 1, new), Ok(false));
        assert_eq!(ram.compare_exchange(Gpa(0x1007), bytes, old, new), Ok(true));
        let mut expected = [0xaa; 24];
        expected[7..7 + bytes].copy_from_slice(&new.to_le_bytes()[..bytes]);
        let mut found = [0; 24];
        ram.read(Gpa(0x1000), &mut found).unwrap();
        assert_eq!(found, expected);
    }
    assert_eq!(ram.compare_exchange(Gpa(5 * MIB - 2), 4, 0, 1), Err(BackingError::NotBacked));
}

#[test]
fn racing_touches_agree() {
    for size in [ChunkSize::M2, ChunkSize::K4] {
        let ram = ram(size);
        let all =
            |_| (0..1024).map(|gfn| ram.resolve(0, Gfn(gfn), Access::Write).unwrap().hfn).collect::<vec::Vec<_>>();
        thread::scope(|scope| {
            let threads: vec::Vec<_> = (0..4).map(|n| scope.spawn(move || all(n))).collect();
            let seen: vec::Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
        });
    }
}
