//! What needs the kernel or the machine directly; all of this program's `unsafe` is here.

use std::{
    convert::Infallible,
    ffi::CString,
    fs, io,
    ops::Range,
    os::unix::{fs::symlink, process::CommandExt},
    path::Path,
    process::Command,
    sync::atomic::AtomicU64,
};

use rustix::{
    mm::{MapFlags, ProtFlags},
    mount::MountFlags,
    process::{Pid, WaitOptions},
    system::RebootCommand,
    thread::CpuSet,
};

use crate::failure::Failure;

/// The port whose first write ends the machine with that value (QEMU's isa-debug-exit, and the hypervisor).
const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Mounts the usual file systems and gives busybox the names the shell expects. For process 1 only.
pub(crate) fn prepare() -> Result<(), Failure> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        fs::create_dir_all(target).map_err(Failure::system("create a mount point"))?;
        rustix::mount::mount(kind, target, kind, MountFlags::empty(), None).map_err(Failure::system("mount"))?;
    }
    // The image has the name already if this program was installed twice; then there is nothing to do.
    if !Path::new("/bin/selfcheck").exists() {
        symlink("/init", "/bin/selfcheck").map_err(Failure::system("link the selfcheck command"))?;
    }
    Ok(())
}

/// One line about this guest. Unknown parts are left out: it is for people.
pub(crate) fn describe() -> String {
    let name = rustix::system::uname();
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime = uptime.split_ascii_whitespace().next().unwrap_or("?");
    let cpus = online_cpus().map_or(0, |cpus| cpus.len());
    let memory = meminfo("MemTotal:").unwrap_or(0) >> 20;
    format!(
        "{} {} is up after {uptime} s, {cpus} CPUs, {memory} MiB",
        name.sysname().to_string_lossy(),
        name.release().to_string_lossy()
    )
}

/// The numbers of the CPUs that run.
pub(crate) fn online_cpus() -> Result<Vec<usize>, Failure> {
    const PATH: &str = "/sys/devices/system/cpu/online";
    let text = fs::read_to_string(PATH).map_err(Failure::system("list the CPUs"))?;
    parse_cpu_list(text.trim()).filter(|cpus| !cpus.is_empty()).ok_or(Failure::Unreadable { path: PATH })
}

/// The kernel's list format: `0-3,5`.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cpus)
}

/// Memory that the kernel could still give to a process, in bytes.
pub(crate) fn available_bytes() -> Result<u64, Failure> {
    meminfo("MemAvailable:").ok_or(Failure::Unreadable { path: "/proc/meminfo" })
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kibibytes: u64 =
        text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Binds the calling thread to one CPU.
pub(crate) fn pin_to(cpu: usize) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(Failure::system("bind a thread to a CPU"))
}

/// Anonymous memory, mapped but not yet touched.
#[derive(Debug)]
pub(crate) struct Region {
    start: *mut AtomicU64,
    words: usize,
}

impl Region {
    /// Maps `bytes`, rounded down to whole words.
    pub(crate) fn map(bytes: usize) -> Result<Self, Failure> {
        // SAFETY: no address is asked for, so the new mapping replaces nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(Failure::system("map memory"))?;
        Ok(Self { start: start.cast(), words: bytes / size_of::<u64>() })
    }

    /// The words. They are atomics so that threads may share them; between two barriers one thread alone uses each.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, readable and writable, zero-filled, holds this many words, lives as long
        // as `self`, and is reached through this slice only.
        unsafe { std::slice::from_raw_parts(self.start, self.words) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping that `map` made, and the borrow of `words` has ended.
        // An error could only mean that it is gone already; there is nothing to do about it.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.words * size_of::<u64>()) };
    }
}

/// Runs `child` in a forked process, whose exit status is what it returns, and gives the parent its number.
///
/// The caller must be the only thread of its process: of a threaded one the child might inherit a locked allocator.
pub(crate) fn fork(child: impl FnOnce() -> u8) -> Result<Pid, Failure> {
    // SAFETY: the child runs `child` and leaves by `_exit`, so it never returns into the caller's frames; with one
    // thread no lock can be held by somebody who does not exist in the child.
    match unsafe { libc::fork() } {
        0 => {
            let status = child();
            // SAFETY: ends this process at once; nothing of the parent's is flushed twice.
            unsafe { libc::_exit(i32::from(status)) }
        }
        number => Pid::from_raw(number)
            .filter(|_| number > 0)
            .ok_or_else(|| Failure::System { doing: "fork", cause: io::Error::last_os_error() }),
    }
}

/// Replaces the process. Comes back with an error only.
pub(crate) fn exec(program: &str, arguments: &[&str]) -> io::Error {
    let (Ok(program), Ok(arguments)) =
        (CString::new(program), arguments.iter().map(|&word| CString::new(word)).collect::<Result<Vec<_>, _>>())
    else {
        return io::ErrorKind::InvalidInput.into();
    };
    let mut pointers: Vec<_> = arguments.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the path and each argument are C strings that outlive the call, and the array ends with a null pointer.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Waits for a child and returns its wait status, 0 for a clean exit.
pub(crate) fn wait(child: Pid) -> Result<i32, Failure> {
    let (_, status) = rustix::process::waitpid(Some(child), WaitOptions::empty())
        .map_err(Failure::system("wait for a process"))?
        .ok_or(Failure::System { doing: "wait for a process", cause: io::ErrorKind::NotFound.into() })?;
    Ok(status.as_raw())
}

/// Waits for any child, as process 1 must: orphans are its children too.
pub(crate) fn wait_any() -> Option<Pid> {
    match rustix::process::wait(WaitOptions::empty()) {
        Ok(Some((child, _))) => Some(child),
        _ => None,
    }
}

/// Makes a command the leader of a session whose terminal is its standard input.
pub(crate) fn in_new_session(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes two system calls and neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
}

/// Writes `value` to the debug-exit port. Where there is none (plain hardware, plain QEMU) it returns.
pub(crate) fn debug_exit(value: u32) {
    drain_console();
    // Without the right there is no such device to be reached either.
    if let Ok(ports) = Ports::new(DEBUG_EXIT_PORT..DEBUG_EXIT_PORT + 4) {
        // The device either ends the machine or is not there, in which case the write goes nowhere.
        ports.write(DEBUG_EXIT_PORT, value);
    }
}

/// The right to some I/O ports, which this process has from here on.
#[derive(Debug)]
pub(crate) struct Ports(Range<u16>);

impl Ports {
    /// Asks for it.
    pub(crate) fn new(ports: Range<u16>) -> Result<Self, Failure> {
        // SAFETY: asks for rights on these ports and nothing else.
        match unsafe { libc::ioperm(ports.start.into(), ports.len() as u64, 1) } {
            0 => Ok(Self(ports)),
            _ => Err(Failure::System { doing: "use I/O ports", cause: io::Error::last_os_error() }),
        }
    }

    /// Writes 32 bits.
    pub(crate) fn write(&self, port: u16, value: u32) {
        assert!(self.0.contains(&port), "no right to port {port:#x}");
        // SAFETY: this process has the right to the port; what is there, if anything is, is no memory of its own.
        unsafe {
            std::arch::asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
        }
    }

    /// Reads 32 bits.
    pub(crate) fn read(&self, port: u16) -> u32 {
        assert!(self.0.contains(&port), "no right to port {port:#x}");
        let value: u32;
        // SAFETY: as for writing.
        unsafe {
            std::arch::asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags));
        }
        value
    }
}

/// The time stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: it only reads.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Waits until what was printed has left the serial port: the end of the machine does not.
fn drain_console() {
    // A standard output that is not a terminal has nothing to drain.
    let _ = rustix::termios::tcdrain(rustix::stdio::stdout());
}

/// Switches the machine off. The file systems live in memory: there is nothing to sync.
pub(crate) fn power_off() -> ! {
    drain_console();
    let refused: Result<Infallible, _> = match rustix::system::reboot(RebootCommand::PowerOff) {
        Ok(()) => Err(io::ErrorKind::Unsupported.into()),
        Err(cause) => Err(io::Error::from(cause)),
    };
    // Process 1 must not return: the kernel would panic with a message that hides this one.
    println!("nestling-init: cannot power off: {refused:?}");
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_of_all_forms() {
        assert_eq!(parse_cpu_list("0"), Some(vec![0]));
        assert_eq!(parse_cpu_list("0-3,5,7-8"), Some(vec![0, 1, 2, 3, 5, 7, 8]));
        assert_eq!(parse_cpu_list(""), None);
        assert_eq!(parse_cpu_list("0-"), None);
    }

    #[test]
    fn a_forked_child_reports_its_status() {
        // The test harness has threads: this child does nothing but return.
        let child = fork(|| 7).expect("forks");
        assert_eq!(wait(child).expect("waits"), 7 << 8);
    }
}
