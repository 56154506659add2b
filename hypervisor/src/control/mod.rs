//! The way out: the guest's console on the first serial port, the control channel to the `nestling` command on the
//! second.
//!
//! Any CPU may put something into the queues; only CPU 0 moves bytes to the ports ([`pump`]), so a slow reader never
//! holds up a vCPU longer than it takes to fill a queue. Queues are bounded: log lines that find no room are dropped and
//! counted, console output waits. A port behind which nobody takes bytes for a second is given up, and what is queued
//! for it is thrown away: nothing hangs because nobody listens.

pub mod log;
mod queue;
mod serial;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use nestling_control::frame::{self, Decoder};
use nestling_control::message::{GuestExit, ToCommand, ToHypervisor};
use spin::Mutex;

use crate::cpu::{clock, instructions, panic};
use queue::Queue;
use serial::Port;

const CONSOLE_PORT: u16 = 0x3f8;
const CHANNEL_PORT: u16 = 0x2f8;
/// QEMU's `isa-debug-exit`. Where it does not exist, a write there has no effect.
const EXIT_PORT: u16 = 0xf4;

const CONSOLE_BYTES: usize = 64 << 10;
const CHANNEL_BYTES: usize = 256 << 10;
/// Log lines leave this much room for what must not be lost.
const RESERVED_BYTES: usize = 2 * frame::MAX_FRAME_BYTES;
/// The longest wait for queued bytes at the end.
const FLUSH_LIMIT_US: u64 = 5_000_000;
/// Longest frame that the command may send.
const COMMAND_FRAME_BYTES: usize = 256;

/// What the machine's end tells QEMU; the status of its process is `(value << 1) | 1`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum EndStatus {
    /// A [`ToCommand::Done`] says how the run ended. Status 0x21.
    Done = 0x10,
    /// The hypervisor itself failed. Status 0x23.
    HypervisorFailed = 0x11,
}

static CONSOLE: Mutex<Queue> = Mutex::new(Queue::new(CONSOLE_BYTES));
static CHANNEL: Mutex<Queue> = Mutex::new(Queue::new(CHANNEL_BYTES));
static CONSOLE_UART: Mutex<Port> = Mutex::new(Port::new(CONSOLE_PORT));
static CHANNEL_UART: Mutex<Port> = Mutex::new(Port::new(CHANNEL_PORT));
static COMMANDS: Mutex<Decoder<ToHypervisor>> = Mutex::new(Decoder::with_limit(COMMAND_FRAME_BYTES));
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Sets both ports up. Called once, first of all.
pub fn init() {
    CONSOLE_UART.lock().init();
    CHANNEL_UART.lock().init();
}

/// Takes all the memory that the queues can ever need, so that what they have does not change from here on.
pub fn reserve() {
    CONSOLE.lock().reserve();
    CHANNEL.lock().reserve();
}

/// Queues a message that must arrive.
pub fn send(message: &ToCommand) {
    queue_message(message, 0);
}

fn queue_message(message: &ToCommand, reserve: usize) {
    let mut bytes = Vec::new();
    // A message of ours is below the frame limit by construction; if not, it is lost like one that found no room.
    let fits = frame::encode(message, &mut bytes).is_ok() && CHANNEL.lock().push_all(&bytes, reserve);
    if !fits {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Sends a message past all queues and locks. For the end after a defect only: see [`mod@panic`].
pub fn send_now(message: &ToCommand) {
    let mut bytes = Vec::new();
    if frame::encode(message, &mut bytes).is_ok() {
        Port::new(CHANNEL_PORT).write_blocking(&bytes);
    }
}

/// How many bytes of console output have room now. It only grows while nobody else prints.
#[must_use]
pub fn console_room() -> usize {
    CONSOLE.lock().room()
}

/// Queues console output; what has no room is lost, so ask [`console_room`] before.
pub fn console_write(bytes: &[u8]) {
    CONSOLE.lock().push_all(bytes, 0);
}

/// The next byte that someone typed. CPU 0 only.
pub fn console_read() -> Option<u8> {
    CONSOLE_UART.lock().read()
}

/// The next request of the command. CPU 0 only. What cannot be understood is skipped.
pub fn next_command() -> Option<ToHypervisor> {
    let mut uart = CHANNEL_UART.lock();
    while let Some(byte) = uart.read() {
        if let Some(Ok(command)) = COMMANDS.lock().push(byte) {
            return Some(command);
        }
    }
    None
}

/// Moves queued bytes to the ports as far as they take them. CPU 0 only. Returns whether all are gone.
pub fn pump() -> bool {
    let dropped = DROPPED.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        log::warning!("{dropped} messages found no room in the control channel's queue");
    }
    let mut empty = true;
    for (queue, uart) in [(&CONSOLE, &CONSOLE_UART), (&CHANNEL, &CHANNEL_UART)] {
        let mut uart = uart.lock();
        // The queue's lock is not held while the port is written: a vCPU that prints waits for memory, not for a port.
        loop {
            if panic::in_progress() {
                // Another CPU writes the machine's last words to the port, and waits a moment for this one to stop.
                instructions::halt_forever();
            }
            let chunk = queue.lock().front::<{ serial::FIFO_BYTES }>();
            if chunk.is_empty() {
                break;
            }
            if !uart.write(&chunk) {
                empty = false;
                break;
            }
            queue.lock().consume(chunk.len());
        }
    }
    empty
}

/// Moves everything out, for a few seconds at most.
pub fn flush() {
    let began = instructions::rdtsc();
    while !pump() && clock::us_from_tsc(instructions::rdtsc() - began) < FLUSH_LIMIT_US {
        core::hint::spin_loop();
    }
}

/// Says how the run ended, and ends the machine.
pub fn finish(exit: GuestExit) -> ! {
    send(&ToCommand::Done(exit));
    flush();
    end_machine(EndStatus::Done)
}

/// Ends the machine: QEMU's process where there is one, else this CPU for ever.
pub fn end_machine(status: EndStatus) -> ! {
    // SAFETY: ending the machine is what is wanted.
    unsafe { instructions::outb(EXIT_PORT, status as u8) };
    instructions::halt_forever()
}
