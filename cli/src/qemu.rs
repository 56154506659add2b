//! QEMU: its command line, its process, and the two serial lines that connect it with this command.
//!
//! Each serial line is a UNIX socket in a private temporary directory. This side listens before QEMU is started and
//! accepts one connection on each; QEMU ends them when it ends, whatever the reason, and that is how the rest of the
//! command learns of it. The process is killed when [`Machine`] is dropped, and by the kernel when this process is gone.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nestling_control::window::WINDOW_BYTES;
use tempfile::TempDir;

use crate::{accel::Acceleration, bench::NOTHING, copy::window::Window, error::Error, setup::find_program};

/// QEMU connects within its first milliseconds; this is for a machine that is swapping.
const CONNECT_WITHIN: Duration = Duration::from_secs(60);
/// The emulated CPU of random guests. QEMU 7.2 calls a null pointer for some encodings of these.
const RANDOM_CPU: &str = "max,-avx,-avx2,-f16c,-fma,-3dnow,-3dnowext";
const KEPT_OUTPUT_BYTES: usize = 16 << 10;

/// What is to be started.
#[derive(Debug)]
pub struct Start<'a> {
    /// QEMU's program.
    pub qemu: &'a Path,
    /// The hypervisor's ELF file.
    pub hypervisor: &'a Path,
    /// The bundle's bytes.
    pub bundle: &'a [u8],
    /// The machine's CPUs.
    pub cpus: u32,
    /// Whether the guest runs anything: the emulated CPU then lacks what its emulator can't translate without failing.
    pub random: bool,
    /// The machine's memory in bytes.
    pub memory_bytes: u64,
    /// Memory to share with the hypervisor, if its guest may be copied.
    pub window: Option<&'a Window>,
    /// How to run.
    pub acceleration: Acceleration,
    /// What to tell of the instructions that are executed.
    pub trace: Option<&'a Trace>,
}

/// A log of executed instructions, a line each, which whoever listens at a socket switches on and off as the machine's debugger.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Where it goes.
    pub log: PathBuf,
    /// Addresses, as `-dfilter` wants them; the others are left out.
    pub filter: String,
    /// The debugger's socket. The machine starts stopped.
    pub stub: PathBuf,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    stderr: Option<JoinHandle<String>>,
    /// The guest's console.
    pub console: UnixStream,
    /// The control channel.
    pub control: UnixStream,
    _files: TempDir,
}

impl Machine {
    /// Starts QEMU and waits for its serial lines. `show` is told the command line.
    ///
    /// # Errors
    /// If files cannot be written or QEMU ends before it has connected.
    pub fn start(start: &Start<'_>, show: impl FnOnce(&Command)) -> Result<Self, Error> {
        let files = tempfile::Builder::new().prefix("nestling-").tempdir().map_err(Error::io("make a directory"))?;
        let bundle = files.path().join("bundle");
        fs::write(&bundle, start.bundle).map_err(Error::io(format!("write {}", bundle.display())))?;
        let console_path = files.path().join("console");
        let control_path = files.path().join("control");
        let console = UnixListener::bind(&console_path).map_err(Error::io("make the console's socket"))?;
        let control = UnixListener::bind(&control_path).map_err(Error::io("make the control channel's socket"))?;

        let mut command = command(start, &bundle, &console_path, &control_path);
        show(&command);
        let mut child = command.spawn().map_err(|cause| Error::Qemu(cause.to_string()))?;
        let stderr = child.stderr.take().map(|pipe| thread::spawn(move || tail_of(pipe)));
        let connected = accept(&console, &mut child).and_then(|console| Ok((console, accept(&control, &mut child)?)));
        match connected {
            Ok((console, control)) => Ok(Self { child, stderr, console, control, _files: files }),
            Err(cause) => {
                // It may be gone already, which is what is wanted.
                let _ = child.kill();
                let _ = child.wait();
                let said = stderr.and_then(|reader| reader.join().ok()).unwrap_or_default();
                Err(Error::Qemu(if said.trim().is_empty() { cause.to_string() } else { said.trim().to_owned() }))
            }
        }
    }

    /// Waits until QEMU has ended by itself, or kills it, and returns its status and the end of what it said.
    pub fn finish(mut self, within: Duration) -> (Option<ExitStatus>, String) {
        let status = wait(&mut self.child, within);
        (status, self.stderr.take().and_then(|reader| reader.join().ok()).unwrap_or_default())
    }

    /// Ends the threads that read and write the serial lines, whoever else may hold the far ends.
    fn hang_up(&self) {
        // They fail only where the far end is gone, which is what is wanted.
        let _ = self.console.shutdown(Shutdown::Both);
        let _ = self.control.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
impl Machine {
    /// A machine without QEMU, and the far ends of its console and its control channel.
    pub(crate) fn fake() -> (Self, UnixStream, UnixStream) {
        let (console, far_console) = UnixStream::pair().expect("a pair of sockets");
        let (control, far_control) = UnixStream::pair().expect("a pair of sockets");
        let child = Command::new("true").spawn().expect("a process");
        let files = tempfile::tempdir().expect("a directory");
        (Self { child, stderr: None, console, control, _files: files }, far_console, far_control)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        kill(&mut self.child);
        self.hang_up();
    }
}

/// Waits until the process has ended by itself; or kills it, and then there is no status.
pub fn wait(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + within;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            _ => {
                kill(child);
                return None;
            }
        }
    }
}

fn kill(child: &mut Child) {
    // Both fail only for a process that has ended and been waited for.
    let _ = child.kill();
    let _ = child.wait();
}

fn command(start: &Start<'_>, bundle: &Path, console: &Path, control: &Path) -> Command {
    // The machine has one CPU more than the guest at least (`RunConfig::cpus`). QEMU's multi-threaded emulation clears a
    // flag of the *first* CPU whenever any CPU loads floating-point state, with a plain read-modify-write; if that races
    // with a #VMEXIT on the first CPU, its "nested paging on" bit comes back and the host runs on the guest's page tables.
    // So the boot CPU must never run a guest: it does the housekeeping, and vCPUs run on the others. The hypervisor does
    // the same on real hardware, so that there is one layout to test.
    let cpu = if start.random { RANDOM_CPU } else { "max" };
    let memory_mib = start.memory_bytes.div_ceil(1 << 20);
    let mut command = machine(start.qemu, start.acceleration, cpu, start.cpus, memory_mib);
    if let Some(Trace { log, filter, stub }) = start.trace {
        command.args(["-d", NOTHING, "-dfilter", filter, "-D"]).arg(log);
        command.arg("-chardev").arg(socket("stub", stub)).args(["-gdb", "chardev:stub", "-S"]);
    }
    for (name, path) in [("console", console), ("control", control)] {
        // The first -serial is COM1, the second COM2.
        command.arg("-chardev").arg(socket(name, path)).args(["-serial", &format!("chardev:{name}")]);
    }
    if let Some(shared) = start.window {
        command.arg("-object").arg(window(shared)).args(["-device", "ivshmem-plain,memdev=window"]);
    }
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]);
    command.arg("-kernel").arg(start.hypervisor).arg("-initrd").arg(bundle);
    command.stdout(Stdio::null());
    command
}

/// A machine that boots nothing yet and has no serial line. `cpu`: the model that is emulated.
#[must_use]
pub fn machine(qemu: &Path, acceleration: Acceleration, cpu: &str, cpus: u32, memory_mib: u64) -> Command {
    let mut command = on_behalf_of_this_process(qemu);
    // Not microvm: with several CPUs it hangs now and then.
    command.args(["-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    match acceleration {
        Acceleration::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        Acceleration::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", cpu]),
        // One instruction is one nanosecond of the machine's time.
        Acceleration::Counted => command.args(["-accel", "tcg,thread=single", "-icount", "shift=0", "-cpu", cpu]),
    };
    command.args(["-smp", &cpus.to_string(), "-m", &format!("{memory_mib}M")]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A command that ends with this process, however that ends: a machine that nobody watches would run for ever. Where
/// util-linux is not there, only an orderly end takes the machine with it.
fn on_behalf_of_this_process(program: &Path) -> Command {
    match find_program("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// A chardev's options; in a value QEMU wants a comma twice.
fn socket(name: &str, path: &Path) -> OsString {
    let path = path.to_string_lossy().replace(',', ",,");
    format!("socket,id={name},path={path},server=off").into()
}

/// The shared memory, by the file that this process has open.
fn window(window: &Window) -> OsString {
    let path = window.path();
    format!("memory-backend-file,id=window,share=on,size={WINDOW_BYTES},mem-path={}", path.display()).into()
}

fn accept(listener: &UnixListener, child: &mut Child) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + CONNECT_WITHIN;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
            Err(cause) => return Err(cause),
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!("it ended at once: {status}")));
        }
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Reads to the end and keeps the last bytes.
fn tail_of(mut pipe: impl Read) -> String {
    let mut kept = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(length @ 1..) = pipe.read(&mut chunk) {
        kept.extend_from_slice(&chunk[..length]);
        let excess = kept.len().saturating_sub(KEPT_OUTPUT_BYTES);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// What `--version` says first, for people.
#[must_use]
pub fn version(qemu: &Path) -> Option<String> {
    let output = Command::new(qemu).arg("--version").stdin(Stdio::null()).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

/// A QEMU command line as one could type it.
#[must_use]
pub fn shown(command: &Command) -> String {
    let words: Vec<PathBuf> =
        [command.get_program()].into_iter().chain(command.get_args()).map(PathBuf::from).collect();
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
