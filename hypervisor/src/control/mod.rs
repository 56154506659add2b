//! The way out: the guest's console on the first serial port, and whatever the hypervisor itself has to say.
//!
//! **Who listens** is decided once, first of all, and is the one place where it matters who started us ([`Listener`]). To the
//! `nestling` command ([`channel`](self)) messages go as frames, on the second serial port, and it sends requests that way.
//! A person who booted a machine of their own has nothing there: they are told in words, on the console, between the guest's
//! lines; the guest is judged here, and the machine ends as the hypervisor's command line says ([`person`](self)). The rest
//! of the hypervisor makes messages and does not know.
//!
//! Any CPU may put something into the queues; only CPU 0 moves bytes to the ports ([`pump`]), so a slow reader never
//! holds up a vCPU longer than it takes to fill a queue. Queues are bounded: log lines that find no room are dropped and
//! counted, console output waits. The command takes all that is said as long as it lives, and the machine ends with it: it
//! is waited for, however busy it is or its terminal. A person need not be there at all: while nobody takes their bytes for a
//! second, what is queued for them is thrown away, and nothing hangs.

mod channel;
pub mod log;
mod person;
mod queue;
mod serial;
pub mod window;
mod words;

use core::sync::atomic::{AtomicU64, Ordering};

use nestling_control::message::{GuestExit, ToCommand, ToHypervisor};
use spin::{Mutex, Once};

use crate::cpu::{clock, instructions, panic};
use queue::Queue;
use serial::Port;

const CONSOLE_PORT: u16 = 0x3f8;
/// QEMU's `isa-debug-exit`. Where it does not exist, a write there has no effect.
const EXIT_PORT: u16 = 0xf4;

const CONSOLE_BYTES: usize = 64 << 10;
/// The longest wait at the end for a person who may not be there: more than a full console takes at 115200 baud.
const FLUSH_LIMIT_US: u64 = 10_000_000;

/// How the machine ends, as the command reads it from QEMU; the status of its process is `(value << 1) | 1`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum EndStatus {
    /// A [`ToCommand::Done`] says how the run ended. Status 0x21.
    Done = 0x10,
    /// The hypervisor itself failed. Status 0x23.
    HypervisorFailed = 0x11,
}

/// Who hears what the hypervisor has to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Listener {
    /// The command, at the other end of the second serial port.
    Command,
    /// A person, at the console.
    Person,
}

/// How much a message matters when there is hardly any room left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Urgency {
    /// It may be lost, and is counted then.
    Log,
    /// It must arrive.
    Must,
}

/// What a listener is to the rest of this module.
trait Hears: Sync {
    /// Sets up what it needs. Called once.
    fn init(&self);
    /// Takes all the memory that its queues can ever need.
    fn reserve(&self);
    /// Queues a message; says whether it had room.
    fn tell(&self, message: &ToCommand, urgency: Urgency) -> bool;
    /// Tells a message past all queues and locks. For the end after a defect only: see [`mod@panic`].
    fn tell_now(&self, message: &ToCommand);
    /// Queues what the guest's console prints.
    fn console(&self, bytes: &[u8]);
    /// The next request. CPU 0 only.
    fn request(&self) -> Option<ToHypervisor>;
    /// Whether it takes all that it is told sooner or later, or the machine ends.
    fn stays(&self) -> bool;
    /// Moves what is queued to a port of its own. CPU 0 only. Returns whether all is gone.
    fn pump(&self) -> bool;
    /// Ends the machine.
    fn end(&self, status: EndStatus) -> !;
}

static LISTENER: Once<&'static dyn Hears> = Once::new();
static CONSOLE: Mutex<Queue> = Mutex::new(Queue::new(CONSOLE_BYTES));
static CONSOLE_UART: Mutex<Port> = Mutex::new(Port::new(CONSOLE_PORT));
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Sets up what the listener hears. Called once, first of all.
pub fn init(listener: Listener) {
    let hears = *LISTENER.call_once(|| match listener {
        Listener::Command => &channel::CHANNEL,
        Listener::Person => &person::PERSON,
    });
    let mut console = CONSOLE_UART.lock();
    console.init();
    if hears.stays() {
        console.be_patient();
    }
    drop(console);
    hears.init();
}

/// Whoever listens. Before [`init`] nobody has anything to say.
fn listener() -> &'static dyn Hears {
    LISTENER.get().copied().unwrap_or(&person::PERSON)
}

/// Takes the words of the hypervisor's own command line, which are a person's. At most once.
pub fn obey(words: &str) {
    person::PERSON.obey(words);
}

/// Takes all the memory that the queues can ever need, so that what they have does not change from here on.
pub fn reserve() {
    CONSOLE.lock().reserve();
    listener().reserve();
}

/// Queues a message that must arrive.
pub fn send(message: &ToCommand) {
    queue_message(message, Urgency::Must);
}

fn queue_message(message: &ToCommand, urgency: Urgency) {
    if !listener().tell(message, urgency) {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Tells a message past all queues and locks. For the end after a defect only: see [`mod@panic`].
pub fn send_now(message: &ToCommand) {
    listener().tell_now(message);
}

/// How many bytes of console output have room now. Of a piece of the guest's output nobody else takes the room.
#[must_use]
pub fn console_room() -> usize {
    CONSOLE.lock().room()
}

/// Queues console output; what has no room is lost, so ask [`console_room`] before.
pub fn console_write(bytes: &[u8]) {
    listener().console(bytes);
}

/// The next byte that someone typed. CPU 0 only.
pub fn console_read() -> Option<u8> {
    CONSOLE_UART.lock().read()
}

/// The next request of the command. CPU 0 only. What cannot be understood is skipped.
pub fn next_command() -> Option<ToHypervisor> {
    listener().request()
}

/// Moves queued bytes to the ports as far as they take them. CPU 0 only. Returns whether all are gone.
pub fn pump() -> bool {
    let dropped = DROPPED.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        log::warning!("{dropped} messages found no room in the control channel's queue");
    }
    // Both, whatever the first says.
    let console = drain(&CONSOLE, &CONSOLE_UART);
    listener().pump() && console
}

/// Moves queued bytes to a port as far as it takes them; says whether all are gone.
fn drain(queue: &Mutex<Queue>, uart: &Mutex<Port>) -> bool {
    let mut uart = uart.lock();
    // The queue's lock is not held while the port is written: a vCPU that prints waits for memory, not for a port.
    loop {
        if panic::in_progress() {
            // Another CPU writes the machine's last words to the port, and waits a moment for this one to stop.
            instructions::halt_forever();
        }
        let chunk = queue.lock().front::<{ serial::FIFO_BYTES }>();
        if chunk.is_empty() {
            return uart.all_sent();
        }
        if !uart.write(&chunk) {
            return false;
        }
        queue.lock().consume(chunk.len());
    }
}

/// Moves everything out; to a person for a few seconds at most.
pub fn flush() {
    let began = instructions::rdtsc();
    let waits = || listener().stays() || clock::us_from_tsc(instructions::rdtsc() - began) < FLUSH_LIMIT_US;
    while !pump() && waits() {
        core::hint::spin_loop();
    }
}

/// Says how the run ended, and ends the machine.
pub fn finish(exit: GuestExit) -> ! {
    send(&ToCommand::Done(exit));
    flush();
    end_machine(EndStatus::Done)
}

/// Ends the machine.
pub fn end_machine(status: EndStatus) -> ! {
    listener().end(status)
}

/// Writes to QEMU's debug-exit port, which ends its process with `(value << 1) | 1`, and halts where there is none.
fn debug_exit(value: u8) -> ! {
    // SAFETY: ending the machine is what is wanted.
    unsafe { instructions::outb(EXIT_PORT, value) };
    instructions::halt_forever()
}
