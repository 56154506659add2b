//! KVM's side: a Linux host in QEMU that runs a measuring guest.
//!
//! Its initial RAM disk is the client of KVM (`nestling-kvmpeer`), the guest, and KVM's modules; its kernel is the same as
//! the default guest's. The machine is the one that this hypervisor gets, with one CPU: it has no housekeeper.

use std::{
    fs,
    io::{Cursor, Read},
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};

use super::{Figures, Pages, Paging, figures};
use crate::{
    accel::Acceleration,
    args::BenchArgs,
    artifacts,
    error::Error,
    guest::{
        initramfs,
        packages::{self, KVM_MODULES},
    },
    progress::Progress,
    qemu, setup,
};

/// Memory of the host, in MiB.
const MEMORY_MIB: u64 = 1024;
/// It takes some ten seconds on an idle machine, and less than a minute with a Linux guest.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs the measuring guest under KVM.
pub(super) fn measure(args: &BenchArgs, paging: Paging, pages: Pages, progress: Progress) -> Result<Figures, Error> {
    let image = read(&artifacts::test_kernel(progress)?)?;
    let large = u8::from(pages == Pages::Large);
    let words = format!("nestling.large={large} nestling.meter={}", args.pages);
    let what = format!("measuring KVM with {} on {} pages", paging.words(), pages.word());
    run(args, paging, ("image", &image), &words, &what, progress)
}

/// Runs a Linux guest under KVM: the one in this bundle.
pub(super) fn linux(args: &BenchArgs, paging: Paging, bundle: &[u8], progress: Progress) -> Result<Figures, Error> {
    let what = format!("running Linux under KVM with {}", paging.words());
    run(args, paging, ("bundle", bundle), "", &what, progress)
}

/// Boots a host for a guest, which is one file to it, and keeps the figures that it prints. `words` are for its command line.
fn run(
    args: &BenchArgs,
    paging: Paging,
    guest: (&str, &[u8]),
    words: &str,
    what: &str,
    progress: Progress,
) -> Result<Figures, Error> {
    let qemu = setup::qemu(progress)?;
    let host = packages::kvm_host(progress)?;
    let init = read(&artifacts::kvm_init(progress)?)?;
    let modules = host.modules.iter().map(|path| module(path)).collect::<Result<Vec<_>, _>>()?;
    let names = KVM_MODULES.map(|name| format!("modules/{name}.ko"));
    let mut files = vec![("init", &init[..]), guest];
    files.extend(names.iter().map(String::as_str).zip(modules.iter().map(Vec::as_slice)));
    let archive = initramfs::of(&files).map_err(Error::io("put KVM's initial RAM disk together"))?;
    let work = tempfile::tempdir().map_err(Error::io("make a directory"))?;
    let initrd = work.path().join("initrd");
    fs::write(&initrd, archive).map_err(Error::io(format!("write {}", initrd.display())))?;

    let mut command = qemu::machine(&qemu, Acceleration::Counted, "max", 1, MEMORY_MIB);
    command.args(["-serial", "stdio"]).arg("-kernel").arg(&host.kernel).arg("-initrd").arg(&initrd);
    let npt = u8::from(paging == Paging::Npt);
    command.args(["-append", &format!("console=ttyS0 quiet panic=-1 nestling.npt={npt} {words}")]);
    command.stdout(Stdio::piped());
    if args.verbose {
        progress.note(&qemu::shown(&command));
    }
    let step = progress.step(what);
    let mut child = command.spawn().map_err(|cause| Error::Qemu(cause.to_string()))?;
    let output = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut said = Vec::new();
        // What could not be read is missed from the figures.
        let _ = output.map(|mut pipe| pipe.read_to_end(&mut said));
        said
    });
    let ended = qemu::wait(&mut child, LIMIT);
    let said = reader.join().unwrap_or_default();
    if ended.is_none() {
        return Err(Error::Measuring { said: String::from_utf8_lossy(&said).into_owned() });
    }
    step.done();
    figures(&said)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(Error::io(format!("read {}", path.display())))
}

/// A module, unpacked.
fn module(path: &Path) -> Result<Vec<u8>, Error> {
    let file = read(path)?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => Ok(file),
        Some("xz") => {
            let mut module = Vec::new();
            let broken = |cause| Error::Fetch { what: path.display().to_string(), cause: format!("{cause:?}") };
            lzma_rs::xz_decompress(&mut Cursor::new(file), &mut module).map_err(broken)?;
            Ok(module)
        }
        _ => Err(Error::Fetch { what: path.display().to_string(), cause: "a compression that is not known".into() }),
    }
}
