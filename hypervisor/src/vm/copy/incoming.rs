//! Taking in what another machine, or this one earlier, has sent. On CPU 0, before there are vCPUs.
//!
//! What comes is checked where it is used: frames must be this guest's RAM, the state is bounded, and goes through
//! [`crate::vm::saved`]. A later page replaces an earlier one: a guest that was copied while it ran comes in rounds.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::hint::spin_loop;

use nestling::{Gfn, Gpa};
use nestling_control::message::ToHypervisor;
use nestling_control::window::{self, DATA_BYTES, FromCommand, FromHypervisor, PAGE_BYTES, Receiver, Sender, Way};

use crate::control;
use crate::control::window::Window;
use crate::memory::guest::GuestRam;
use crate::vm::saved::{MAX_BYTES, SavedMachine};

/// A VM on its way in.
#[derive(Debug)]
pub(in crate::vm) struct Incoming {
    window: Window,
    messages: Receiver<FromCommand>,
    answers: Sender<FromHypervisor>,
}

impl Incoming {
    /// Opens this side of the window.
    ///
    /// # Errors
    /// There is none, as text for the operator.
    pub(in crate::vm) fn open() -> Result<Self, String> {
        let window = Window::find().ok_or("this machine has no window through which a guest could come in")?;
        window::check(&window).map_err(|error| error.to_string())?;
        let (messages, answers) = (Receiver::new(Way::ToHypervisor), Sender::new(Way::ToCommand));
        Ok(Self { window, messages, answers })
    }

    /// Takes memory and state in.
    ///
    /// # Errors
    /// What is wrong with them, as text for the operator.
    pub(in crate::vm) fn take(&mut self, ram: &GuestRam) -> Result<SavedMachine, String> {
        let mut state = Vec::new();
        loop {
            let (message, data) = self.next()?;
            match message {
                FromCommand::Pages(runs) => {
                    let frames = window::frames(&runs).map_err(|error| error.to_string())?;
                    let bytes = self.window.data(data, frames.len() * PAGE_BYTES);
                    for (frame, page) in frames.iter().zip(bytes.chunks_exact(PAGE_BYTES)) {
                        write(ram, *frame, page)?;
                    }
                }
                FromCommand::Zeros(runs) => {
                    for frame in window::listed(&runs).map_err(|error| error.to_string())? {
                        if ram.next_with_memory(Gfn(frame)) == Some(Gfn(frame)) {
                            write(ram, frame, &[0; PAGE_BYTES])?;
                        }
                    }
                }
                FromCommand::Same(pairs) => {
                    let mut page = vec![0; PAGE_BYTES];
                    for (frame, other) in pairs {
                        if !ram.contains(Gfn(other)) {
                            return Err(format!("frame {other:#x} is no memory of this guest"));
                        }
                        ram.read(Gpa(other << 12), &mut page).map_err(|error| error.to_string())?;
                        write(ram, frame, &page)?;
                    }
                }
                FromCommand::State(length) => {
                    let length = length as usize;
                    if length > DATA_BYTES || state.len() + length > MAX_BYTES {
                        return Err("more machine state than there can be".to_string());
                    }
                    state.extend_from_slice(self.window.data(data, length));
                }
                FromCommand::End => {
                    self.messages.done(&self.window);
                    return SavedMachine::from_bytes(&state).map_err(|error| error.to_string());
                }
                FromCommand::Run | FromCommand::GiveAway => {
                    return Err("a message that does not belong here".to_string());
                }
            }
            self.messages.done(&self.window);
        }
    }

    /// Says that everything is ready, and waits for the word to run it.
    ///
    /// # Errors
    /// It did not come.
    pub(in crate::vm) fn wait_to_run(&mut self) -> Result<(), String> {
        self.answer(&FromHypervisor::Ready)?;
        match self.next()? {
            (FromCommand::Run, _) => Ok(()),
            _ => Err("a message that does not belong here".to_string()),
        }
    }

    /// Says something.
    ///
    /// # Errors
    /// There is no room for it.
    pub(in crate::vm) fn answer(&mut self, message: &FromHypervisor) -> Result<(), String> {
        if !self.answers.has_room(&self.window).map_err(|error| error.to_string())? {
            return Err("the command takes nothing any more".to_string());
        }
        self.answers.send(&self.window, message, 0, &mut |_| ()).map_err(|error| error.to_string())
    }

    /// Waits for the next message, as long as the command wants to go on.
    fn next(&self) -> Result<(FromCommand, usize), String> {
        loop {
            match self.messages.peek(&self.window) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => return Err(error.to_string()),
            }
            if window::aborted(&self.window) || control::next_command() == Some(ToHypervisor::Stop) {
                return Err("the guest did not come in as a whole".to_string());
            }
            control::pump();
            spin_loop();
        }
    }
}

fn write(ram: &GuestRam, frame: u64, page: &[u8]) -> Result<(), String> {
    if !ram.contains(Gfn(frame)) {
        return Err(format!("frame {frame:#x} is no memory of this guest"));
    }
    ram.write(Gfn(frame).gpa(), page).map_err(|error| error.to_string())
}
