//! This side of the window: a file in memory that QEMU maps for the hypervisor.
//!
//! It is read and written by system calls and never mapped here. That costs a copy, which is nothing beside the emulator
//! on the other side, and keeps memory that another program changes at will out of this one. Page cache and mapping are the
//! same memory; a system call is a full barrier, so the order of the words' accesses is that of the program.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
};

use nestling_control::window::{Shared, WINDOW_BYTES};
use rustix::fs::{MemfdFlags, memfd_create};

/// The file.
#[derive(Debug)]
pub struct Window(File);

impl Window {
    /// Makes one, all zeros.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub fn new() -> io::Result<Self> {
        let file = File::from(memfd_create("nestling-window", MemfdFlags::CLOEXEC)?);
        file.set_len(WINDOW_BYTES as u64)?;
        Ok(Self(file))
    }

    /// Where another process of this user finds it as long as this one has it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

/// A file in memory has its bytes; if reading one failed all the same, there would be zeros, which no message is.
impl Shared for Window {
    fn load(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn store(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        if self.0.read_exact_at(into, offset as u64).is_err() {
            into.fill(0);
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        // It fails only beyond the file's end, where nothing is written.
        let _ = self.0.write_all_at(bytes, offset as u64);
    }
}
