//! A guest, put together: what is needed and not there is fetched and built, and all of it goes into one bundle.

use std::{fs, path::PathBuf};

use nestling_control::{
    bundle::Bundle,
    config::{GuestKind, Origin},
};

use crate::{
    args::System,
    artifacts,
    error::Error,
    guest::{
        initramfs,
        kernel::KernelImage,
        packages,
        plan::{GivenFile, GuestPlan},
    },
    progress::Progress,
};

/// The init of 32-bit guests: a script, for there is no 32-bit target to build a program for.
const INIT_32: &[u8] = include_bytes!("../../../guests/i386/init.sh");

/// Everything a machine needs to run the guest.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The hypervisor's file.
    pub hypervisor: PathBuf,
    /// The guest, for the hypervisor.
    pub bundle: Vec<u8>,
}

impl GuestPlan {
    /// Fetches and builds what is needed and not there, and checks what could not be checked before.
    ///
    /// # Errors
    /// The first thing that cannot be done, with its reason.
    pub fn load(&self, progress: Progress) -> Result<Loaded, Error> {
        if self.config.origin == Origin::Window {
            return self.bundle(&[], None, progress);
        }
        match self.config.kind {
            GuestKind::Linux => self.load_linux(progress),
            // An image needs nothing but itself, its module, and the hypervisor.
            GuestKind::Multiboot => {
                let image = self.kernel.as_ref().map(|file| file.content.as_slice()).unwrap_or_default();
                self.bundle(image, self.initrd.as_deref(), progress)
            }
        }
    }

    fn load_linux(&self, progress: Progress) -> Result<Loaded, Error> {
        let fetched;
        let GivenFile { path, content: kernel } = match &self.kernel {
            Some(given) => given,
            None => {
                let path = packages::kernel(self.system, progress)?;
                fetched = GivenFile { content: read(&path)?, path };
                &fetched
            }
        };
        let image = KernelImage::parse(kernel).map_err(|cause| Error::Kernel { path: path.clone(), cause })?;
        let built;
        let initrd = match &self.initrd {
            Some(given) => given,
            None => {
                built = default_initrd(self.system, progress)?;
                &built
            }
        };
        let needed = image.least_memory_bytes(initrd.len() as u64);
        if self.config.memory_bytes < needed {
            return Err(Error::MemoryForKernel { given: self.config.memory_bytes, needed });
        }
        let length = self.config.command_line.len();
        if length > image.command_line_bytes {
            return Err(Error::CommandLineForKernel { length, most: image.command_line_bytes });
        }
        self.bundle(kernel, Some(initrd), progress)
    }

    fn bundle(&self, kernel: &[u8], initrd: Option<&[u8]>, progress: Progress) -> Result<Loaded, Error> {
        let hypervisor = match &self.hypervisor {
            Some(path) => path.clone(),
            None if self.ghost => artifacts::watched_hypervisor(progress)?,
            None => artifacts::hypervisor(progress)?,
        };
        let bundle = Bundle { config: self.config.clone(), kernel, initrd }.to_bytes()?;
        Ok(Loaded { hypervisor, bundle })
    }
}

fn default_initrd(system: System, progress: Progress) -> Result<Vec<u8>, Error> {
    let busybox = read(&packages::busybox(system, progress)?)?;
    let init = match system {
        System::Amd64 => read(&artifacts::guest_init(progress)?)?,
        System::I386 | System::I386Pae => INIT_32.to_owned(),
    };
    initramfs::build(&init, &busybox).map_err(Error::io("put the initial RAM disk together"))
}

fn read(path: &PathBuf) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(Error::io(format!("read {}", path.display())))
}
