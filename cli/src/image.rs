//! `nestling image`: the hypervisor, a guest and GRUB on one bootable image.
//!
//! The image holds the hypervisor's ELF file, which GRUB loads by Multiboot2, and the bundle that a run would have handed to
//! QEMU, as its module. Nobody listens at the other end there, so the hypervisor is told on its command line what it has to
//! know beside: how the lines of the guest's check start, and what follows the end.
//!
//! GRUB's `grub-mkrescue` puts the image together: for a BIOS, and for EFI firmware as well where GRUB's modules for it are
//! installed; as a CD and as a disk (a USB stick) at once. It is written under another name beside the one that was asked
//! for, and renamed when it is whole: whatever goes wrong leaves nothing behind, and nothing that was there is lost.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use crate::{
    args::{AtEnd, ImageArgs, Mode},
    error::{Error, Mebibytes},
    guest::{
        CHECK_PREFIX,
        load::Loaded,
        plan::{GuestPlan, Seat},
    },
    progress::Progress,
    setup::{self, run_quietly},
};

/// Where the two files are on the image.
const HYPERVISOR: &str = "boot/nestling-hypervisor";
const BUNDLE: &str = "boot/nestling-guest";
/// What an ISO 9660 file system has behind its first 16 sectors (ECMA-119, 8.1).
const VOLUME_DESCRIPTOR: u64 = 16 * BLOCK;
const BLOCK: u64 = 2048;

/// Makes the image.
///
/// # Errors
/// The first thing that cannot be done, with its reason. Then there is no image, or the one that was there before.
pub fn make(args: &ImageArgs, progress: Progress) -> Result<(), Error> {
    let refused = |cause| Error::File { option: "image", path: args.file.clone(), cause };
    // Nobody's terminal is the guest's: without a word on what it does, it checks itself.
    let plan = GuestPlan::new(&args.guest, Seat::Pipe)?;
    if args.file.is_dir() || args.file.file_name().is_none() {
        return Err(refused(io::ErrorKind::IsADirectory.into()));
    }
    // In the same directory, so that the rename is one, and so that a directory that cannot be written is told now.
    let directory = match args.file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let unfinished = tempfile::Builder::new()
        .prefix(".nestling-")
        .suffix(".iso")
        // As any new file's: the umask is taken off.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(refused)?;
    let tool = setup::image_maker(progress)?;
    let Loaded { hypervisor, bundle } = plan.load(progress)?;

    let tree = tempfile::Builder::new().prefix("nestling-").tempdir().map_err(Error::io("make a directory"))?;
    let write = |name: &str, content: &[u8]| {
        let path = tree.path().join(name);
        fs::write(&path, content).map_err(Error::io(format!("write {}", path.display())))
    };
    fs::create_dir_all(tree.path().join("boot/grub")).map_err(Error::io("make a directory"))?;
    let from = tree.path().join(HYPERVISOR);
    fs::copy(&hypervisor, &from).map_err(Error::io(format!("copy {}", hypervisor.display())))?;
    write(BUNDLE, &bundle)?;
    write("boot/grub/grub.cfg", menu(&words(&plan, args)).as_bytes())?;

    let step = progress.step("making the image (grub-mkrescue)");
    let failed = |cause| Error::Image { path: args.file.clone(), cause };
    run_quietly(Command::new(tool).arg("--output").arg(unfinished.path()).arg(tree.path())).map_err(failed)?;
    // Its exit status is good whatever the tool it calls has met.
    if !is_whole(unfinished.path()).map_err(Error::io("read the image"))? {
        return Err(failed("grub-mkrescue has written no image: is there room for it?".into()));
    }
    step.done();
    let bytes = fs::metadata(unfinished.path()).map_err(Error::io("read the image"))?.len();
    unfinished.persist(&args.file).map_err(|error| refused(error.error))?;
    progress.note(&format!(
        "{}: {}; the machine needs {} of memory and {} CPUs with AMD SVM, and tells its first serial port how it goes",
        args.file.display(),
        Mebibytes(bytes),
        Mebibytes(plan.machine_memory_bytes(bundle.len() as u64)),
        plan.config.cpus(),
    ));
    Ok(())
}

/// The hypervisor's own command line.
fn words(plan: &GuestPlan, args: &ImageArgs) -> String {
    let mut words = vec![
        match args.at_end {
            AtEnd::PowerOff => "end=power-off",
            AtEnd::Reset => "end=reset",
            AtEnd::Halt => "end=halt",
            AtEnd::DebugExit => "end=debug-exit",
        }
        .to_owned(),
    ];
    if plan.mode == Mode::Check {
        words.push(format!("verdict={CHECK_PREFIX}"));
    }
    if args.verbose {
        words.push("verbose".into());
    }
    words.join(" ")
}

/// GRUB's own menu: one entry, which starts by itself, told on the screen and on the first serial port.
fn menu(words: &str) -> String {
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_input console serial\n\
         terminal_output console serial\n\
         set timeout=0\n\
         menuentry \"Nestling\" {{\n\
         \x20   multiboot2 /{HYPERVISOR} {words}\n\
         \x20   module2 /{BUNDLE}\n\
         }}\n"
    )
}

/// Whether the file is an ISO 9660 image as long as it says.
fn is_whole(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    if length < VOLUME_DESCRIPTOR + BLOCK {
        return Ok(false);
    }
    let mut descriptor = [0; 84];
    file.seek(SeekFrom::Start(VOLUME_DESCRIPTOR))?;
    file.read_exact(&mut descriptor)?;
    let [.., a, b, c, d] = descriptor;
    Ok(&descriptor[1..6] == b"CD001" && u64::from(u32::from_le_bytes([a, b, c, d])) * BLOCK <= length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_was_cut_off_is_not_whole() {
        let path = tempfile::NamedTempFile::new().expect("a file");
        let mut image = vec![0; 20 * 2048];
        image[16 * 2048 + 1..][..5].copy_from_slice(b"CD001");
        image[16 * 2048 + 80] = 20;
        let whole = |image: &[u8]| {
            fs::write(path.path(), image).expect("written");
            is_whole(path.path()).expect("read")
        };
        assert!(whole(&image));
        assert!(!whole(&image[..image.len() - 1]) && !whole(&image[..17 * 2048 - 1]) && !whole(&[]));
        image[16 * 2048 + 5] = b'2';
        assert!(!whole(&image));
    }
}
