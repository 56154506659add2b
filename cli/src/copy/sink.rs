//! Brings a copy into a machine that waits for it: records become messages through its window.
//!
//! Records are checked as they are read and before anything of them is passed on; the copy counts only when its end was
//! read and is what it should be. Before that the machine waits, and a copy that breaks off ends it.

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nestling_control::window::{
    self, DATA_BYTES, FromCommand, FromHypervisor, Receiver, Sender, Way, WindowError, runs,
};
use thiserror::Error;

use super::{
    pages::{Unpacked, unpack},
    stream::{Reader, Record, StreamError},
    window::Window,
};

const LOOK: Duration = Duration::from_micros(200);

/// Why a copy does not run.
#[derive(Debug, Error)]
pub enum SinkError {
    /// It cannot be read.
    #[error("{0}")]
    Stream(#[from] StreamError),
    /// The hypervisor refuses it.
    #[error("the hypervisor cannot run it: {0}")]
    Refused(String),
    /// The machine has ended.
    #[error("the machine that was to run it has ended")]
    Ended,
    /// What the hypervisor says is not understood.
    #[error("{0}")]
    Window(#[from] WindowError),
    /// The hypervisor says what does not belong there.
    #[error("the hypervisor said something out of place")]
    OutOfPlace,
}

/// A machine that waits for a guest.
#[derive(Debug)]
pub struct Sink {
    window: Arc<Window>,
    alive: Arc<AtomicBool>,
    messages: Sender<FromCommand>,
    answers: Receiver<FromHypervisor>,
}

impl Sink {
    /// Sets the window up; before the machine starts.
    #[must_use]
    pub fn new(window: Arc<Window>, alive: Arc<AtomicBool>) -> Self {
        window::open(&*window);
        let (messages, answers) = (Sender::new(Way::ToHypervisor), Receiver::new(Way::ToCommand));
        Self { window, alive, messages, answers }
    }

    /// Passes a copy on, to its end, and waits until the machine is ready to run it.
    ///
    /// # Errors
    /// Why it does not. The machine is told that nothing more comes.
    pub fn fill(&mut self, from: &mut Reader<impl Read>) -> Result<(), SinkError> {
        let filled = self.pass_on(from).and_then(|()| match self.answer()? {
            FromHypervisor::Ready => Ok(()),
            _ => Err(SinkError::OutOfPlace),
        });
        if filled.is_err() {
            window::abort(&*self.window);
        }
        filled
    }

    fn pass_on(&mut self, from: &mut Reader<impl Read>) -> Result<(), SinkError> {
        let mut state = 0;
        loop {
            let number = from.number();
            match from.read()? {
                Record::Pages(entries, bytes) => {
                    let Unpacked { frames, data, zeros, same } =
                        unpack(&entries, &bytes).ok_or(StreamError::Garbage(number))?;
                    if !frames.is_empty() {
                        self.send(&FromCommand::Pages(runs(&frames)), &data)?;
                    }
                    if !zeros.is_empty() {
                        self.send(&FromCommand::Zeros(runs(&zeros)), &[])?;
                    }
                    if !same.is_empty() {
                        self.send(&FromCommand::Same(same), &[])?;
                    }
                }
                Record::State(bytes) => {
                    state += bytes.len() as u64;
                    for piece in bytes.chunks(DATA_BYTES) {
                        self.send(&FromCommand::State(piece.len() as u32), piece)?;
                    }
                }
                Record::End(total) if total.state == state => return self.send(&FromCommand::End, &[]),
                _ => return Err(StreamError::OutOfPlace(number).into()),
            }
        }
    }

    /// Tells a machine that is ready to run the guest, and waits until it does.
    ///
    /// # Errors
    /// If it does not.
    pub fn run(&mut self) -> Result<(), SinkError> {
        self.send(&FromCommand::Run, &[])?;
        match self.answer()? {
            FromHypervisor::Running => Ok(()),
            _ => Err(SinkError::OutOfPlace),
        }
    }

    /// Tells the machine that nothing more comes.
    pub fn give_up(&self) {
        window::abort(&*self.window);
    }

    fn send(&mut self, message: &FromCommand, data: &[u8]) -> Result<(), SinkError> {
        while !self.messages.has_room(&*self.window)? {
            self.look()?;
        }
        self.messages.send(&*self.window, message, data.len(), &mut |slot| slot.copy_from_slice(data))?;
        Ok(())
    }

    fn answer(&mut self) -> Result<FromHypervisor, SinkError> {
        loop {
            if let Some((answer, _)) = self.answers.peek(&*self.window)? {
                self.answers.done(&*self.window);
                return match answer {
                    FromHypervisor::Refused(why) => Err(SinkError::Refused(why)),
                    answer => Ok(answer),
                };
            }
            self.look()?;
        }
    }

    /// Waits a moment, unless there is nothing to be waited for.
    fn look(&mut self) -> Result<(), SinkError> {
        if !self.alive.load(Ordering::SeqCst) {
            return Err(SinkError::Ended);
        }
        if let Some((FromHypervisor::Refused(why), _)) = self.answers.peek(&*self.window)? {
            self.answers.done(&*self.window);
            return Err(SinkError::Refused(why));
        }
        thread::sleep(LOOK);
        Ok(())
    }
}
