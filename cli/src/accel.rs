//! Whether this machine can run an SVM hypervisor on hardware.

use std::fs::{self, File};

/// How QEMU runs the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// Hardware virtualisation with nested SVM.
    Kvm,
    /// Emulation, one host thread a CPU.
    Tcg,
    /// Emulation on one host thread, in which the time stamp counters count instructions.
    Counted,
}

/// Says why hardware virtualisation cannot be used, or that it can: an AMD processor whose KVM nests, and the right to use it.
///
/// # Errors
/// The reason, for people.
pub fn nested_svm() -> Result<(), String> {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !processor.contains("AuthenticAMD") && !processor.contains("HygonGenuine") {
        return Err("the processor is not AMD's: it has no SVM to nest".into());
    }
    const NESTED: &str = "/sys/module/kvm_amd/parameters/nested";
    match fs::read_to_string(NESTED) {
        Ok(value) if matches!(value.trim(), "1" | "Y") => {}
        Ok(_) => return Err(format!("KVM does not nest: {NESTED} is off")),
        Err(_) => return Err("the module kvm_amd is not loaded".into()),
    }
    File::options().read(true).write(true).open("/dev/kvm").map(drop).map_err(|cause| format!("/dev/kvm: {cause}"))
}
