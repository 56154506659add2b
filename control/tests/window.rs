//! The rings of the shared window: order, bounds, and a hostile other side.

use std::cell::RefCell;

use nestling_control::window::{
    self, DATA_BYTES, FromCommand, FromHypervisor, LISTED_FRAMES, Receiver, Run, SLOT_PAGES, Sender, Shared,
    WINDOW_BYTES, Way, WindowError,
};

struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn new() -> Self {
        Self(RefCell::new(vec![0; WINDOW_BYTES]))
    }
}

impl Shared for Memory {
    fn load(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn store(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.0.borrow()[offset..offset + into.len()]);
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        self.0.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[test]
fn what_is_sent_arrives_in_order_and_no_more_than_there_is_room_for() {
    let memory = Memory::new();
    assert_eq!(window::check(&memory), Err(WindowError::NoWindow));
    window::open(&memory);
    assert_eq!(window::check(&memory), Ok(()));
    let mut sender = Sender::<FromHypervisor>::new(Way::ToCommand);
    let mut receiver = Receiver::<FromHypervisor>::new(Way::ToCommand);
    // The other direction does not get in the way.
    let mut answers = Sender::<FromCommand>::new(Way::ToHypervisor);
    answers.send(&memory, &FromCommand::End, 0, &mut |_| ()).expect("room");
    let (mut sent, mut got) = (0u32, 0u32);
    for step in 0..1000u32 {
        while sender.has_room(&memory).expect("counters are right") && !(step % 7 == 0 && sent % 5 == 4) {
            sender
                .send(&memory, &FromHypervisor::State(sent), DATA_BYTES, &mut |data| data.fill(sent as u8))
                .expect("fits");
            sent += 1;
        }
        for _ in 0..step % 40 {
            let Some((message, data)) = receiver.peek(&memory).expect("a message") else { break };
            assert_eq!(message, FromHypervisor::State(got));
            let mut last = [0];
            memory.read(data + DATA_BYTES - 1, &mut last);
            assert_eq!(last[0], got as u8, "data that were overwritten before they were taken");
            receiver.done(&memory);
            got += 1;
        }
        assert!(sent - got <= 31);
    }
    assert!(got > 5000, "{got}");
    let receiver = Receiver::<FromCommand>::new(Way::ToHypervisor);
    assert_eq!(receiver.peek(&memory).expect("a message").map(|(message, _)| message), Some(FromCommand::End));
}

#[test]
fn a_hostile_other_side_is_an_error() {
    let memory = Memory::new();
    window::open(&memory);
    let receiver = Receiver::<FromCommand>::new(Way::ToHypervisor);
    let sender = Sender::<FromHypervisor>::new(Way::ToCommand);
    for produced in [32, 1000, u32::MAX] {
        memory.store(192, produced);
        assert!(matches!(receiver.peek(&memory), Err(WindowError::Counters { .. })));
    }
    for consumed in [1, 1000, u32::MAX - 50] {
        memory.store(128, consumed);
        assert!(matches!(sender.has_room(&memory), Err(WindowError::Counters { .. })));
    }
    memory.store(192, 1);
    let mut seed = 1u64;
    for _ in 0..20_000 {
        let mut page = [0; 64];
        for byte in &mut page {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 56) as u8;
        }
        page[1..4].fill(0);
        // The first slot to the hypervisor lies behind those to the command.
        memory.write(4096 + 31 * (4096 + DATA_BYTES), &page);
        if let Ok(Some((FromCommand::Pages(runs), _))) = receiver.peek(&memory) {
            let pages: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
            assert_eq!(
                window::frames(&runs).is_ok_and(|frames| frames.len() as u64 == pages),
                window::frames(&runs).is_ok()
            );
        }
    }
}

#[test]
fn runs_and_frames_are_one_another() {
    let frames = [3, 4, 5, 9, 7, 8, 1 << 40];
    let runs = window::runs(&frames);
    assert_eq!(runs.len(), 4);
    assert_eq!(window::frames(&runs).expect("few"), frames);
    let many = |count| [Run { start: 0, count }];
    assert!(window::frames(&many(SLOT_PAGES as u32 + 1)).is_err() && window::frames(&many(SLOT_PAGES as u32)).is_ok());
    assert!(window::listed(&many(LISTED_FRAMES as u32 + 1)).is_err());
    assert!(window::frames(&[Run { start: u64::MAX, count: 2 }]).is_err());
    assert!(window::frames(&[Run { start: 0, count: u32::MAX }; 3]).is_err());
}
