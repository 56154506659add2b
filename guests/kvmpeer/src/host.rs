//! The host: file systems, KVM's modules, and the power switch.

use std::{
    error::Error,
    ffi::{CStr, CString},
    fs, process,
};

use rustix::{
    mount::{MountFlags, mount as mount_at},
    system::{RebootCommand, finit_module, reboot},
};

/// What a Linux process expects to find.
pub(crate) fn mount() -> Result<(), Box<dyn Error>> {
    let places = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("debugfs", "/sys/kernel/debug")];
    for (kind, place) in places {
        mount_at(kind, place, kind, MountFlags::empty(), None::<&CStr>).map_err(|cause| format!("{place}: {cause}"))?;
    }
    Ok(())
}

/// KVM for AMD, with nested paging or with its shadow paging.
pub(crate) fn load_modules(npt: bool) -> Result<(), Box<dyn Error>> {
    let npt = format!("npt={}", u8::from(npt));
    for (module, parameters) in [("irqbypass", ""), ("kvm", ""), ("kvm-amd", &npt)] {
        let path = format!("/modules/{module}.ko");
        let file = fs::File::open(&path).map_err(|cause| format!("{path}: {cause}"))?;
        finit_module(&file, &CString::new(parameters)?, 0).map_err(|cause| format!("{path}: {cause}"))?;
    }
    Ok(())
}

/// Ends the machine.
pub(crate) fn power_off() -> ! {
    // It fails only for a process without the right to it, which the first process has.
    let _ = reboot(RebootCommand::PowerOff);
    process::exit(1)
}
