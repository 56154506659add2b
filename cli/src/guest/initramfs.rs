//! Initial RAM disks: a program as `/init`, other files, and the console's device node. Not compressed: an emulated CPU
//! unpacks slower than it copies.

use std::io::{self, Write};

use cpio::NewcBuilder;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The default guest's: `init` and busybox.
///
/// # Errors
/// As [`of`].
pub fn build(init: &[u8], busybox: &[u8]) -> io::Result<Vec<u8>> {
    of(&[("init", init), ("bin/busybox", busybox)])
}

/// Puts an archive together from the files, by their paths; there are the directories `bin`, `dev`, `modules`, `proc`,
/// `sys` and `tmp`.
///
/// # Errors
/// If a file is larger than the format's 32 bits can say.
pub fn of(files: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let bytes = files.iter().map(|(_, content)| content.len() + 256).sum::<usize>();
    let mut archive = Archive { bytes: Vec::with_capacity(bytes + 4096), inode: 0 };
    for directory in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        archive.add(NewcBuilder::new(directory).mode(DIRECTORY).nlink(2), &[])?;
    }
    // Without this node process 1 starts with no standard output, and mounts /dev too late to be heard.
    archive.add(NewcBuilder::new("dev/console").mode(CHARACTER_DEVICE).rdev_major(5).rdev_minor(1), &[])?;
    for (path, content) in files {
        archive.add(NewcBuilder::new(path).mode(FILE), content)?;
    }
    cpio::newc::trailer(archive.bytes)
}

struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, entry: NewcBuilder, content: &[u8]) -> io::Result<()> {
        // Entries with one inode number would be taken for hard links of each other.
        self.inode += 1;
        let length = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut writer = entry.ino(self.inode).write(&mut self.bytes, length);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_what_a_boot_needs() {
        let archive = build(b"init program", b"busybox program").expect("builds");
        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(rest).expect("a valid entry");
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            let (name, mode, inode) = (entry.name().to_owned(), entry.mode(), entry.ino());
            let mut content = Vec::new();
            io::copy(&mut reader, &mut content).expect("reads");
            found.push((name, mode, inode, content));
            rest = reader.finish().expect("ends");
        }
        let get = |name: &str| found.iter().find(|entry| entry.0 == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!((get("init").1, &get("init").3[..]), (FILE, &b"init program"[..]));
        assert_eq!(get("bin/busybox").3, b"busybox program");
        assert_eq!(get("dev/console").1, CHARACTER_DEVICE);
        let mut inodes: Vec<_> = found.iter().map(|entry| entry.2).collect();
        inodes.dedup();
        assert_eq!(inodes.len(), found.len(), "inode numbers are unique");
    }
}
