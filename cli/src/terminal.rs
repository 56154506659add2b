//! The user's terminal in raw mode, so that the guest's shell gets every key.
//!
//! However the command ends, the terminal is put back as it was: on drop, and, as this program does not unwind, in the
//! panic hook as well. Signals arrive as events of the session, which then ends normally.

use std::{
    io::{self, IsTerminal, Read, Write},
    sync::{Mutex, Once, PoisonError},
    thread,
};

use rustix::{
    stdio,
    termios::{self, OptionalActions, Termios},
};

use crate::{
    console::{Escape, Typed},
    guest::plan::Seat,
    session::Remote,
};

/// How the terminal was, while it is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether somebody sits at a terminal, and how large it is.
#[must_use]
pub fn seat() -> Seat {
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        return Seat::Pipe;
    }
    match termios::tcgetwinsize(stdio::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Seat::Terminal(size.ws_row, size.ws_col),
        _ => Seat::Terminal(24, 80),
    }
}

/// The guest's console on this terminal, raw until it is dropped.
#[derive(Debug)]
pub struct Terminal(());

impl Terminal {
    /// Makes the terminal raw and sends what is typed to `remote`.
    ///
    /// # Errors
    /// If the terminal refuses.
    pub fn enter(remote: Remote) -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        let as_it_was = termios::tcgetattr(stdio::stdin())?;
        let mut raw = as_it_was.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(as_it_was);
        let terminal = Self(());
        termios::tcsetattr(stdio::stdin(), OptionalActions::Flush, &raw)?;
        thread::spawn(move || read_keys(&remote));
        Ok(terminal)
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(as_it_was) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that has gone away needs nothing.
        let _ = termios::tcsetattr(stdio::stdin(), OptionalActions::Drain, &as_it_was);
    }
}

/// Ends with the process: a read of standard input cannot be interrupted.
fn read_keys(remote: &Remote) {
    let mut escape = Escape::default();
    let mut bytes = [0; 256];
    loop {
        match io::stdin().lock().read(&mut bytes) {
            // A terminal that was closed cannot be left by its keys any more.
            Ok(0) => return remote.leave(),
            Ok(length) => {
                for typed in escape.typed(&bytes[..length]) {
                    match typed {
                        Typed::Keys(keys) => remote.send_keys(keys),
                        Typed::Leave => return remote.leave(),
                    }
                }
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return remote.leave(),
        }
    }
}
