//! Both sides, each against one that is played here and loses the link where it hurts.

use std::sync::atomic::{AtomicBool, Ordering};

use nestling_control::{
    config::{GuestKind, HugePages, MmuKind, Origin, RunConfig},
    window::{self, Copied, FromCommand, FromHypervisor, PAGE_BYTES, Receiver, Sender, Way, runs},
};

use super::*;
use crate::{
    copy::{stream::Total, window::Window},
    session::Queue,
};

const LIMITS: MigrateLimits = MigrateLimits { downtime_ms: 100, rounds: 3 };
const NUMBER: u64 = 77;

fn header() -> Header {
    let config = RunConfig {
        kind: GuestKind::Linux,
        vcpus: 1,
        memory_bytes: 64 << 20,
        huge_pages: HugePages::M2,
        mmu: MmuKind::Nested,
        silence_timeout_ms: None,
        command_line: String::new(),
        ready_marker: String::new(),
        origin: Origin::Boot,
        storm: None,
        series: None,
        meter_pages: 0,
    };
    Header { config, check: true, number: NUMBER }
}

fn page(number: u8) -> Vec<u8> {
    let mut page = vec![number; PAGE_BYTES];
    page[usize::from(number)] = !number;
    page
}

/// What became of a guest that was to be given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    GoesOn,
    Given,
}

/// A machine whose hypervisor is played here: it sends three pages and a state.
struct Machine {
    source: Source,
    hypervisor: thread::JoinHandle<Guest>,
    _queue: Queue,
}

fn source() -> Machine {
    let queue = Queue::default();
    let window = Arc::new(Window::new().expect("memory"));
    let source = Source { window: Arc::clone(&window), remote: queue.remote(), alive: Arc::new(AtomicBool::new(true)) };
    let hypervisor = thread::spawn(move || {
        while window::check(&*window).is_err() {
            thread::yield_now();
        }
        let mut sender = Sender::new(Way::ToCommand);
        let answers = Receiver::<FromCommand>::new(Way::ToHypervisor);
        let mut send = |message: &FromHypervisor, data: &[u8]| {
            sender.send(&*window, message, data.len(), &mut |slot| slot.copy_from_slice(data)).expect("room");
        };
        send(&FromHypervisor::Pages(runs(&[5, 6, 9])), &[page(1), page(2), page(1)].concat());
        send(&FromHypervisor::Round(Round { number: 1, ..Round::default() }), &[]);
        send(&FromHypervisor::State(3), b"abc");
        send(&FromHypervisor::Sent(Copied::default()), &[]);
        loop {
            if window::aborted(&*window) {
                send(&FromHypervisor::Kept("not wanted".into()), &[]);
                return Guest::GoesOn;
            }
            if let Some((message, _)) = answers.peek(&*window).expect("a message") {
                assert_eq!(message, FromCommand::GiveAway);
                send(&FromHypervisor::Given, &[]);
                return Guest::Given;
            }
            thread::yield_now();
        }
    });
    Machine { source, hypervisor, _queue: queue }
}

/// What a machine that waits has taken in.
#[derive(Debug, Default, PartialEq, Eq)]
struct TakenIn {
    messages: Vec<FromCommand>,
    runs: bool,
}

/// A machine that waits, whose hypervisor is played here.
fn sink() -> (Sink, thread::JoinHandle<TakenIn>) {
    let window = Arc::new(Window::new().expect("memory"));
    let sink = Sink::new(Arc::clone(&window), Arc::new(AtomicBool::new(true)));
    let hypervisor = thread::spawn(move || {
        let mut answers = Sender::new(Way::ToCommand);
        let mut messages = Receiver::<FromCommand>::new(Way::ToHypervisor);
        let mut taken = TakenIn::default();
        while !window::aborted(&*window) {
            let Some((message, _)) = messages.peek(&*window).expect("a message") else {
                thread::yield_now();
                continue;
            };
            messages.done(&*window);
            let answer = match message {
                FromCommand::End => FromHypervisor::Ready,
                FromCommand::Run => FromHypervisor::Running,
                message => {
                    taken.messages.push(message);
                    continue;
                }
            };
            answers.send(&*window, &answer, 0, &mut |_| ()).expect("room");
            if answer == FromHypervisor::Running {
                taken.runs = true;
                break;
            }
        }
        taken
    });
    (sink, hypervisor)
}

/// An address that nobody else has.
fn address() -> (tempfile::TempDir, Address) {
    let directory = tempfile::tempdir().expect("a directory");
    let address = Address::Unix(directory.path().join("socket"));
    (directory, address)
}

#[test]
fn a_guest_ends_here_and_runs_there() {
    let (_directory, address) = address();
    let listener = address.listen().expect("listens");
    let target = thread::spawn(move || {
        let arrival = wait(listener).expect("somebody comes");
        assert_eq!(arrival.header, header());
        let (mut sink, hypervisor) = sink();
        arrival.take(&mut sink).expect("taken");
        hypervisor.join().expect("played")
    });
    let machine = source();
    let mut rounds = 0;
    let moved = give(&machine.source, &header(), &address, LIMITS, &mut |news| {
        rounds += u32::from(matches!(news, News::Round(_)));
        true
    });
    let moved = moved.expect("given");
    assert_eq!((moved.taken.tally.pages, moved.taken.tally.same, rounds), (3, 1, 1));
    assert_eq!(machine.hypervisor.join().expect("played"), Guest::Given);
    let taken = target.join().expect("taken");
    let messages = [FromCommand::Pages(runs(&[5, 6])), FromCommand::Same(vec![(9, 5)]), FromCommand::State(3)];
    assert_eq!(taken, TakenIn { messages: messages.into(), runs: true });
}

/// A target that is played here, up to where it has been told to run the guest; then the link is lost.
fn told_and_lost(listener: &Listener) {
    let link = listener.accept().expect("somebody comes");
    let mut reader = Reader::new(link.share().expect("shared")).expect("a stream");
    let mut writer = Writer::new(link).expect("written");
    assert!(matches!(reader.read(), Ok(Record::Header(_))));
    tell(&mut writer, Answer::Accepted).expect("told");
    while !matches!(reader.read().expect("a record"), Record::End(_)) {}
    tell(&mut writer, Answer::Ready).expect("told");
    assert_eq!(reader.read().expect("a record"), Record::Commit);
}

/// Gives a guest to a target that is lost behind Commit, and answers so when it is asked; `None`: it is gone.
fn in_doubt(answer: Option<Answer>) -> (Result<Moved, MigrateError>, Guest, u32) {
    let (_directory, address) = address();
    let listener = address.listen().expect("listens");
    let target = thread::spawn(move || {
        told_and_lost(&listener);
        let Some(answer) = answer else { return };
        // Once it does not answer at all: that decides nothing.
        drop(listener.accept().expect("it is asked"));
        hear(listener.accept().expect("it is asked"), |number| {
            assert_eq!(number, NUMBER);
            answer
        })
        .expect("answered");
    });
    let machine = source();
    let mut doubts = 0;
    let result = give(&machine.source, &header(), &address, LIMITS, &mut |news| {
        let doubt = matches!(news, News::InDoubt);
        doubts += u32::from(doubt);
        // That nobody wants it any more changes nothing behind Commit.
        !doubt
    });
    target.join().expect("played");
    (result, machine.hypervisor.join().expect("played"), doubts)
}

#[test]
fn a_target_that_was_told_and_lost_is_asked_until_it_is_known() {
    let (result, guest, doubts) = in_doubt(Some(Answer::Running));
    assert!(result.is_ok(), "{result:?}");
    assert_eq!((guest, doubts), (Guest::Given, 1));
    let (result, guest, _) = in_doubt(Some(Answer::Never));
    assert!(matches!(result, Err(MigrateError::Lost)), "{result:?}");
    assert_eq!(guest, Guest::GoesOn);
    let (result, guest, _) = in_doubt(None);
    assert!(matches!(result, Err(MigrateError::Lost)), "{result:?}");
    assert_eq!(guest, Guest::GoesOn);
}

#[test]
fn what_fails_before_the_commit_leaves_the_guest_where_it_is() {
    for lost_after in 0..3 {
        let (_directory, address) = address();
        let listener = address.listen().expect("listens");
        let target = thread::spawn(move || {
            let link = listener.accept().expect("somebody comes");
            let mut reader = Reader::new(link.share().expect("shared")).expect("a stream");
            let mut writer = Writer::new(link).expect("written");
            let _ = reader.read();
            match lost_after {
                0 => {}
                1 => tell(&mut writer, Answer::Refused("too small".into())).expect("told"),
                _ => {
                    tell(&mut writer, Answer::Accepted).expect("told");
                    let _ = reader.read();
                }
            }
        });
        let machine = source();
        let error = give(&machine.source, &header(), &address, LIMITS, &mut |_| true).expect_err("not given");
        target.join().expect("played");
        if lost_after < 2 {
            // Nothing was asked of the hypervisor.
            assert_eq!(lost_after == 1, matches!(&error, MigrateError::Refused(why) if why == "too small"), "{error}");
            assert!(window::check(&*machine.source.window).is_err());
        } else {
            assert!(matches!(error, MigrateError::Link(_) | MigrateError::Write(_)), "{error}");
            assert_eq!(machine.hypervisor.join().expect("played"), Guest::GoesOn);
        }
    }
}

#[test]
fn who_no_longer_wants_it_before_the_commit_keeps_the_guest() {
    let (_directory, address) = address();
    let listener = address.listen().expect("listens");
    let target = thread::spawn(move || {
        let (mut sink, hypervisor) = sink();
        let taken = wait(listener).expect("somebody comes").take(&mut sink);
        assert!(matches!(taken, Err(SinkError::Stream(_))), "{taken:?}");
        assert!(!hypervisor.join().expect("played").runs);
    });
    let machine = source();
    let mut sent = false;
    let result = give(&machine.source, &header(), &address, LIMITS, &mut |news| {
        // The last look comes when the target is ready.
        let wanted = !(sent && matches!(news, News::Sending(_)));
        sent |= matches!(news, News::Round(_));
        wanted
    });
    assert!(matches!(result, Err(MigrateError::Source(SourceError::GivenUp))), "{result:?}");
    assert_eq!(machine.hypervisor.join().expect("played"), Guest::GoesOn);
    target.join().expect("played");
}

#[test]
fn a_commit_that_comes_after_the_question_is_too_late() {
    let (_directory, address) = address();
    let listener = address.listen().expect("listens");
    let runs = Arc::new(AtomicBool::new(false));
    let ran = Arc::clone(&runs);
    let target = thread::spawn(move || {
        let (mut sink, hypervisor) = sink();
        let taken = wait(listener).expect("somebody comes").take(&mut sink);
        ran.store(taken.is_ok(), Ordering::SeqCst);
        hypervisor.join().expect("played").runs
    });
    let link = address.connect().expect("it listens");
    let mut writer = Writer::new(link.share().expect("shared")).expect("written");
    writer.write(&Record::Header(header())).expect("written");
    let mut reader = Reader::new(link).expect("a stream");
    assert_eq!(reader.read().expect("an answer"), Record::Answer(Answer::Accepted));
    writer.write(&Record::State(b"abc".to_vec())).expect("written");
    writer.write(&Record::End(Total { state: 3 })).expect("written");
    assert_eq!(reader.read().expect("an answer"), Record::Answer(Answer::Ready));
    assert_eq!(query(&address, NUMBER + 1).expect("an answer"), Answer::Never, "another guest's");
    assert_eq!(query(&address, NUMBER).expect("an answer"), Answer::Never);
    writer.write(&Record::Commit).expect("written");
    assert!(matches!(reader.read(), Ok(Record::Answer(Answer::Refused(_))) | Err(_)));
    assert!(!target.join().expect("played") && !runs.load(Ordering::SeqCst));
}
