//! `nestling run`: from the options to the outcome.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    time::Instant,
};

use nestling_control::{bundle::Bundle, config::GuestKind, message::GuestExit};

use crate::{
    args::RunArgs,
    artifacts, death,
    error::Error,
    guest::{initramfs, kernel::KernelImage, packages},
    outcome::Outcome,
    plan::{Plan, Seat},
    progress::Progress,
    qemu::{self, Machine},
    report::JsonReport,
    session::{self, Ending, Queue, Remote},
    setup,
};

/// Console lines that are shown after an end that needs explaining.
const EXPLAINING_LINES: usize = 25;

/// Everything a machine needs, on this disk and in memory.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    report: Option<PathBuf>,
    qemu: PathBuf,
    hypervisor: PathBuf,
    bundle: Vec<u8>,
    progress: Progress,
}

/// Checks the options, then installs, fetches and builds what is needed and not there.
///
/// # Errors
/// The first thing that cannot be done, with its reason.
pub fn prepare(args: &RunArgs, seat: Seat, progress: Progress) -> Result<Prepared, Error> {
    let mut plan = Plan::new(args, seat)?;
    if let Some(path) = &args.report {
        // Better now than after the run; a report of an earlier run must not be taken for this one's.
        File::create(path).map_err(|cause| Error::File { option: "--report", path: path.clone(), cause })?;
    }
    let qemu = setup::qemu(progress)?;
    if plan.config.kind == GuestKind::Multiboot {
        return prepare_multiboot(plan, args, qemu, progress);
    }
    let (kernel, kernel_path) = match plan.kernel.take() {
        Some(kernel) => (kernel, args.kernel.clone().unwrap_or_default()),
        None => {
            let path = packages::kernel(progress)?;
            (fs::read(&path).map_err(Error::io(format!("read {}", path.display())))?, path)
        }
    };
    let image = KernelImage::parse(&kernel).map_err(|cause| Error::Kernel { path: kernel_path, cause })?;
    let initrd = match plan.initrd.take() {
        Some(initrd) => initrd,
        None => default_initrd(progress)?,
    };
    let needed = image.least_memory_bytes(initrd.len() as u64);
    if plan.config.memory_bytes < needed {
        return Err(Error::MemoryForKernel { given: plan.config.memory_bytes, needed });
    }
    if plan.config.command_line.len() > image.command_line_bytes {
        let length = plan.config.command_line.len();
        return Err(Error::CommandLineForKernel { length, most: image.command_line_bytes });
    }
    let hypervisor = match plan.hypervisor.take() {
        Some(path) => path,
        None => artifacts::hypervisor(progress)?,
    };
    let bundle = Bundle { config: plan.config.clone(), kernel: &kernel, initrd: Some(&initrd) }.to_bytes()?;
    Ok(Prepared { plan, report: args.report.clone(), qemu, hypervisor, bundle, progress })
}

/// A Multiboot image needs nothing but itself, its module, and the hypervisor.
fn prepare_multiboot(mut plan: Plan, args: &RunArgs, qemu: PathBuf, progress: Progress) -> Result<Prepared, Error> {
    let image = plan.kernel.take().unwrap_or_default();
    let module = plan.initrd.take();
    let hypervisor = match plan.hypervisor.take() {
        Some(path) => path,
        None => artifacts::hypervisor(progress)?,
    };
    let bundle = Bundle { config: plan.config.clone(), kernel: &image, initrd: module.as_deref() }.to_bytes()?;
    Ok(Prepared { plan, report: args.report.clone(), qemu, hypervisor, bundle, progress })
}

fn default_initrd(progress: Progress) -> Result<Vec<u8>, Error> {
    let busybox = packages::busybox(progress)?;
    let init = artifacts::guest_init(progress)?;
    let read = |path: &PathBuf| fs::read(path).map_err(Error::io(format!("read {}", path.display())));
    initramfs::build(&read(&init)?, &read(&busybox)?).map_err(Error::io("put the initial RAM disk together"))
}

impl Prepared {
    /// Starts the machine and watches it to its end, writes the report, and says on standard error how it went.
    ///
    /// `console` makes the writer that gets the guest's console; the [`Remote`] it is given types, leaves and signals.
    ///
    /// # Errors
    /// If the machine cannot be started or the console or the report not be written.
    pub fn run(self, console: impl FnOnce(Remote) -> Result<Box<dyn Write>, Error>) -> Result<Outcome, Error> {
        let memory_bytes = self.plan.host_memory_bytes(self.bundle.len() as u64);
        let queue = Queue::default();
        let start = Instant::now();
        let machine = Machine::start(
            &qemu::Start {
                qemu: &self.qemu,
                hypervisor: &self.hypervisor,
                bundle: &self.bundle,
                vcpus: self.plan.config.vcpus,
                storm: self.plan.config.storm.is_some(),
                memory_bytes,
                acceleration: self.plan.acceleration,
            },
            |command| {
                if self.plan.verbose {
                    self.progress.note(&qemu::shown(command));
                }
            },
        )?;
        let mut output = console(queue.remote())?;
        let record = session::watch(machine, start, &self.plan, queue, &mut *output)?;
        // A terminal is put back before anything is said on it.
        drop(output);

        let outcome = Outcome { mode: self.plan.mode, acceleration: self.plan.acceleration, record };
        self.explain(&outcome);
        if let Some(path) = &self.report {
            JsonReport::new(&self.plan, &outcome).write(path)?;
        }
        Ok(outcome)
    }

    fn explain(&self, outcome: &Outcome) {
        let record = &outcome.record;
        if let Some(death) = &record.death {
            eprintln!("{}", death::Shown(death));
        }
        let lines = record.console.last_lines(EXPLAINING_LINES);
        let by_itself = matches!(record.ending, Ending::Signal(_) | Ending::Guest(GuestExit::DebugExit { .. }));
        if !outcome.passed() && !by_itself && !lines.is_empty() {
            eprintln!("nestling: the last lines of the console:");
            for line in lines {
                eprintln!("  | {line}");
            }
        }
        if !record.qemu_output.trim().is_empty() {
            eprintln!("nestling: QEMU said: {}", record.qemu_output.trim());
        }
        if let Some(cost) = outcome.cost() {
            self.progress.note(&cost);
        }
        self.progress.note(&outcome.sentence());
    }
}
