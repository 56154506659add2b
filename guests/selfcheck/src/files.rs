//! Files: each CPU writes one, and has busybox hash the one that another CPU wrote.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Barrier,
    thread,
};

use sha2::{Digest, Sha256};

use crate::{failure::Failure, sys};

const FILE_BYTES: usize = 512 << 10;

/// Writes and hashes one file a CPU.
pub(crate) fn check(cpus: &[usize]) -> Result<(), Failure> {
    let barrier = Barrier::new(cpus.len());
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus.len())
            .map(|index| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let written = sys::pin_to(cpus[index]).and_then(|()| write(index));
                    // Reached by everyone, whatever went wrong before it.
                    barrier.wait();
                    written.and_then(|()| verify((index + 1) % cpus.len()))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a panic aborts")).collect()
    });
    for index in 0..cpus.len() {
        // A file that was never written fails above, by its cause.
        let _ = fs::remove_file(path(index));
    }
    results.into_iter().collect::<Result<(), _>>()?;
    println!("nestling-selfcheck: files: {} of {} KiB hashed: good", cpus.len(), FILE_BYTES >> 10);
    Ok(())
}

fn path(index: usize) -> PathBuf {
    PathBuf::from(format!("/tmp/nestling-selfcheck-{index}"))
}

/// Bytes without a period that a page or a block could share (xorshift, another seed for each file).
fn content(index: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d ^ ((index as u64 + 1) << 32);
    (0..FILE_BYTES / size_of::<u64>())
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

fn write(index: usize) -> Result<(), Failure> {
    fs::write(path(index), content(index)).map_err(Failure::system("write a file"))
}

fn verify(index: usize) -> Result<(), Failure> {
    let path = path(index);
    let output = Command::new("/bin/busybox")
        .arg("sha256sum")
        .arg(&path)
        .stderr(Stdio::inherit())
        .output()
        .map_err(Failure::system("run sha256sum"))?;
    let found = String::from_utf8_lossy(&output.stdout).split_ascii_whitespace().next().unwrap_or("nothing").to_owned();
    let expected = hex(&Sha256::digest(content(index)));
    if found == expected { Ok(()) } else { Err(Failure::Hash { path, expected, found }) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_differ_and_are_whole() {
        assert_eq!(content(0).len(), FILE_BYTES);
        assert_ne!(content(0), content(1));
        assert_eq!(content(3), content(3));
    }

    #[test]
    fn hashes_are_written_as_sha256sum_writes_them() {
        assert_eq!(hex(&Sha256::digest(b"abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
