//! The control channel to the command: frames, both ways, on the second serial port.

use alloc::vec::Vec;

use nestling_control::frame::{self, Decoder};
use nestling_control::message::{ToCommand, ToHypervisor};
use spin::Mutex;

use super::queue::Queue;
use super::serial::Port;
use super::{CONSOLE, EndStatus, Hears, Urgency};

const PORT: u16 = 0x2f8;
const BYTES: usize = 256 << 10;
/// Log lines leave this much room for what must not be lost.
const RESERVED_BYTES: usize = 2 * frame::MAX_FRAME_BYTES;
/// Longest frame that the command may send.
const COMMAND_FRAME_BYTES: usize = 256;

/// The channel and what waits for it.
#[derive(Debug)]
pub(super) struct Channel {
    queue: Mutex<Queue>,
    uart: Mutex<Port>,
    requests: Mutex<Decoder<ToHypervisor>>,
}

/// The one there is.
pub(super) static CHANNEL: Channel = Channel {
    queue: Mutex::new(Queue::new(BYTES)),
    uart: Mutex::new(Port::new(PORT)),
    requests: Mutex::new(Decoder::with_limit(COMMAND_FRAME_BYTES)),
};

impl Hears for Channel {
    fn init(&self) {
        let mut uart = self.uart.lock();
        uart.init();
        uart.be_patient();
    }

    fn reserve(&self) {
        self.queue.lock().reserve();
        self.requests.lock().reserve();
    }

    fn tell(&self, message: &ToCommand, urgency: Urgency) -> bool {
        let reserve = match urgency {
            Urgency::Log => RESERVED_BYTES,
            Urgency::Must => 0,
        };
        let mut bytes = Vec::new();
        // A message of ours is below the frame limit by construction; if not, it is lost like one that found no room.
        frame::encode(message, &mut bytes).is_ok() && self.queue.lock().push_all(&bytes, reserve)
    }

    fn tell_now(&self, message: &ToCommand) {
        let mut bytes = Vec::new();
        if frame::encode(message, &mut bytes).is_ok() {
            Port::new(PORT).write_blocking(&bytes);
        }
    }

    fn console(&self, bytes: &[u8]) {
        CONSOLE.lock().push_all(bytes, 0);
    }

    fn request(&self) -> Option<ToHypervisor> {
        let mut uart = self.uart.lock();
        while let Some(byte) = uart.read() {
            if let Some(Ok(request)) = self.requests.lock().push(byte) {
                return Some(request);
            }
        }
        None
    }

    fn stays(&self) -> bool {
        true
    }

    fn pump(&self) -> bool {
        super::drain(&self.queue, &self.uart)
    }

    fn end(&self, status: EndStatus) -> ! {
        super::debug_exit(status as u8)
    }
}
