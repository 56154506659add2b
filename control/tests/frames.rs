//! Frames over streams that are cut, damaged, prefixed with garbage and fed in any pieces.

use nestling_control::{
    frame::{Decoder, FrameError, encode},
    message::{DeathReason, DeathReport, ExitRecord, GuestExit, LogLevel, Registers, ToCommand, VcpuState, WalkStep},
};
use proptest::prelude::*;

fn frames(messages: &[ToCommand]) -> Vec<u8> {
    let mut stream = Vec::new();
    for message in messages {
        encode(message, &mut stream).expect("small messages fit");
    }
    stream
}

fn decode_all(stream: &[u8]) -> Vec<Result<ToCommand, FrameError>> {
    let mut decoder = Decoder::default();
    stream.iter().filter_map(|&byte| decoder.push(byte)).collect()
}

fn log(text: &str) -> ToCommand {
    ToCommand::Log { level: LogLevel::Info, text: text.into() }
}

fn message() -> impl Strategy<Value = ToCommand> {
    prop_oneof![
        ".{0,300}".prop_map(|text| ToCommand::Log { level: LogLevel::Warn, text }),
        any::<u64>().prop_map(|guest_ns| ToCommand::GuestReady { guest_ns }),
        any::<u32>().prop_map(|value| ToCommand::Done(GuestExit::DebugExit { value })),
        (any::<u64>(), prop::collection::vec(any::<(u64, u64, u64, u32)>(), 0..40)).prop_map(|(gpa, exits)| {
            ToCommand::Death(DeathReport {
                reason: DeathReason::MmioWithoutDevice { gpa, write: gpa & 1 == 0 },
                vcpu: Some(0),
                guest_ns: gpa,
                vcpus: vec![VcpuState {
                    vcpu: 0,
                    registers: Registers { rip: gpa, ..Registers::default() },
                    instruction: vec![0x90; (gpa % 16) as usize],
                    guest_walk: vec![WalkStep { level: 4, address: gpa, entry: 0 }],
                    nested_walk: vec![],
                    last_exits: exits
                        .into_iter()
                        .map(|(code, rip, info1, count)| ExitRecord { code, rip, info1, count })
                        .collect(),
                }],
            })
        }),
    ]
}

#[test]
fn a_frame_after_garbage_is_not_lost() {
    let mut stream = b"SeaBIOS (version 1.16)\r\n".to_vec();
    stream.extend(frames(&[log("up")]));
    let decoded = decode_all(&stream);
    assert_eq!(decoded.len(), 2, "one error for the garbage, one message: {decoded:?}");
    assert!(decoded[0].is_err());
    assert_eq!(decoded[1], Ok(log("up")));
}

#[test]
fn a_frame_over_the_limit_is_one_error_and_the_next_is_read() {
    let mut decoder = Decoder::with_limit(64);
    let mut stream = frames(&[log(&"x".repeat(5000))]);
    stream.extend(frames(&[log("y")]));
    let decoded: Vec<_> = stream.iter().filter_map(|&byte| decoder.push(byte)).collect();
    assert_eq!(decoded, [Err(FrameError::TooLong { limit: 64 }), Ok(log("y"))]);
}

#[test]
fn a_message_over_the_limit_is_refused_and_leaves_the_stream_alone() {
    let mut stream = frames(&[log("before")]);
    let before = stream.clone();
    let refused = encode(&log(&"x".repeat(100 << 10)), &mut stream);
    assert!(matches!(refused, Err(FrameError::TooLong { .. })));
    assert_eq!(stream, before);
}

#[test]
fn a_valid_checksum_does_not_excuse_another_payload() {
    #[derive(serde::Serialize)]
    struct Longer(ToCommand, u32);
    let mut stream = Vec::new();
    encode(&Longer(log("a"), 7), &mut stream).expect("fits");
    assert_eq!(decode_all(&stream), [Err(FrameError::Trailing { bytes: 1 })]);

    let mut stream = Vec::new();
    encode(&0xffu8, &mut stream).expect("fits");
    assert!(matches!(decode_all(&stream)[..], [Err(FrameError::Payload(_))]));
}

#[test]
fn a_frame_without_room_for_a_checksum_is_refused() {
    let mut stream = vec![0];
    stream.extend(cobs::encode_vec(&[1, 2, 3]));
    stream.push(0);
    assert_eq!(decode_all(&stream), [Err(FrameError::TooShort { length: 3 })]);
}

proptest! {
    #[test]
    fn messages_come_back_whole_and_in_order(messages in prop::collection::vec(message(), 0..8)) {
        let decoded: Result<Vec<_>, _> = decode_all(&frames(&messages)).into_iter().collect();
        prop_assert_eq!(decoded.expect("nothing was damaged"), messages);
    }

    /// One damaged byte may cost the frame it hits and, where it makes or removes a boundary, that frame's neighbour;
    /// it never yields a message that was not sent, and frames further on are read.
    #[test]
    fn damage_is_found_and_contained(messages in prop::collection::vec(message(), 4..8), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut stream = frames(&messages);
        let at = at.index(stream.len());
        stream[at] ^= flip;
        let good: Vec<_> = decode_all(&stream).into_iter().filter_map(Result::ok).collect();
        prop_assert!(good.len() + 2 >= messages.len(), "{} of {} left", good.len(), messages.len());
        let mut sent = messages.iter();
        for message in &good {
            prop_assert!(sent.any(|candidate| candidate == message), "never sent, or out of order: {:?}", message);
        }
    }

    #[test]
    fn any_bytes_are_survived_and_the_next_frame_is_read(garbage in prop::collection::vec(any::<u8>(), 0..4000)) {
        let mut stream = garbage;
        stream.extend(frames(&[log("still here")]));
        prop_assert_eq!(decode_all(&stream).pop(), Some(Ok(log("still here"))));
    }
}
