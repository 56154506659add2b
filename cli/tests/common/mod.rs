//! What the tests share: running the command as its users do, and small kernels of our own.

use std::{
    ffi::OsStr,
    process::{Command, ExitStatus, Stdio},
};

/// A finished command.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Fails with all that was printed, unless the exit status is `expected`.
    #[track_caller]
    pub(crate) fn expect_status(&self, expected: i32) -> &Self {
        assert_eq!(self.status.code(), Some(expected), "exit status\n{self}");
        self
    }

    /// Fails with all that was printed, unless standard error holds `text`.
    #[track_caller]
    pub(crate) fn expect_stderr(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "standard error holds no {text:?}\n{self}");
        self
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n--- stdout\n{}\n--- stderr\n{}\n---", self.status, self.stdout, self.stderr)
    }
}

/// The command.
pub(crate) fn nestling() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestling"));
    command.stdin(Stdio::null());
    command
}

/// `nestling run` with these arguments, to its end. The command itself keeps a time limit.
pub(crate) fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Finished {
    subcommand("run", arguments)
}

/// A subcommand with these arguments, to its end.
pub(crate) fn subcommand<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Finished {
    let output = nestling().arg(name).args(arguments).output().expect("the command can be started");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Finished { status: output.status, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A bzImage whose 64-bit entry point is `code`, loaded at 16 MiB.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    const SETUP_BYTES: usize = 2 * 512;
    // The 64-bit entry point is 0x200 bytes into the part that is loaded.
    const ENTRY: usize = SETUP_BYTES + 0x200;
    let mut file = vec![0; (ENTRY + code.len()).next_multiple_of(16)];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(ENTRY, code);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    // The header's length is in the jump over it.
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x100_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    let paragraphs = ((file.len() - SETUP_BYTES) / 16) as u32;
    file[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    file
}
