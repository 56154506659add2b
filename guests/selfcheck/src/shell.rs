//! The shell: busybox with a controlling terminal, so that Ctrl-C and job control work.

use std::{
    fs::OpenOptions,
    io,
    process::{Command, Stdio},
};

use rustix::{process::Pid, termios::Winsize};

use crate::{parameters::Parameters, sys};

const TERMINAL: &str = "/dev/ttyS0";

/// Runs the shell until it ends, reaping every orphan meanwhile.
pub(crate) fn run(parameters: &Parameters) {
    // Without its other names busybox still has the shell: not worth ending the machine for.
    let names = Command::new("/bin/busybox").args(["--install", "-s", "/bin"]).status();
    if !names.is_ok_and(|status| status.success()) {
        println!("nestling-init: busybox could not install its commands");
    }
    println!("nestling-init: `selfcheck` checks this guest; leaving the shell switches it off");
    match start(parameters) {
        Ok(shell) => while sys::wait_any().is_some_and(|ended| ended != shell) {},
        Err(cause) => println!("nestling-init: no shell: {cause}"),
    }
}

fn start(parameters: &Parameters) -> io::Result<Pid> {
    let terminal = OpenOptions::new().read(true).write(true).open(TERMINAL)?;
    if let Some((ws_row, ws_col)) = parameters.terminal {
        // A terminal that refuses its size is still a terminal.
        let _ = rustix::termios::tcsetwinsize(&terminal, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 });
    }
    let mut shell = Command::new("/bin/busybox");
    shell
        .args(["sh", "-i"])
        .env_clear()
        .envs([("PATH", "/bin"), ("HOME", "/"), ("TERM", "xterm"), ("PS1", "guest:\\w# ")])
        .current_dir("/")
        .stdin(Stdio::from(terminal.try_clone()?))
        .stdout(Stdio::from(terminal.try_clone()?))
        .stderr(Stdio::from(terminal));
    sys::in_new_session(&mut shell);
    let child = shell.spawn()?;
    Pid::from_raw(child.id().cast_signed()).ok_or_else(|| io::ErrorKind::NotFound.into())
}
