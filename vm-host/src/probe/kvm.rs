//! Whether KVM really runs guests.
//!
//! A device node that opens proves little: inside some virtual machines it does, and ordinary
//! kernels still don't boot. So two things are asked for: that the processor's flags show
//! virtualisation extensions, and that a guest of a few instructions does its sums.

use std::sync::OnceLock;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// The guest ends in microseconds, or never.
const LIMIT: Duration = Duration::from_secs(5);

/// Where the guest's only page is.
const CODE_AT: u64 = 0x1000;
/// The port it answers on.
const PORT: u16 = 0x3f8;
/// Real mode: adds two registers, writes the sum to the port, halts.
const CODE: [u8; 7] = [
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x00, 0xd8, // add al, bl
    0xee, // out dx, al
    0xf4, // hlt
];

/// Whether KVM works, and why not if it doesn't. The first call takes some milliseconds.
pub fn kvm() -> Result<(), &'static str> {
    static VERDICT: OnceLock<Result<(), String>> = OnceLock::new();
    VERDICT
        .get_or_init(probe)
        .as_ref()
        .map(|&()| ())
        .map_err(String::as_str)
}

fn probe() -> Result<(), String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_extensions(&cpuinfo) {
        return Err("the processor shows no virtualisation extensions (vmx or svm)".into());
    }
    // A broken KVM may never come back from the guest: the thread that waits for it is left
    // behind then.
    let (sender, receiver) = mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name("kvm probe".into())
        .spawn(move || {
            let _ = sender.send(run_tiny_guest());
        });
    spawned.map_err(|error| error.to_string())?;
    receiver
        .recv_timeout(LIMIT)
        .unwrap_or_else(|_| Err("a guest of four instructions hangs".into()))
}

fn has_extensions(cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    flags
        .split_ascii_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm")
}

fn run_tiny_guest() -> Result<(), String> {
    let failed = |doing: &'static str| move |error| format!("KVM cannot {doing}: {error}");
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    let vm = kvm.create_vm().map_err(failed("make a VM"))?;
    let mut memory = memmap2::MmapMut::map_anon(4096).map_err(|error| error.to_string())?;
    if let Some(start) = memory.get_mut(..CODE.len()) {
        start.copy_from_slice(&CODE);
    }
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_AT,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_mut_ptr() as u64,
    };
    // SAFETY: the region is a mapping of that very size, which nobody else uses and which is
    // unmapped after the VM that has it is gone: it was declared later than `vm`, but is kept
    // until the end of this function by the `drop` below.
    #[allow(unsafe_code)]
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("give a VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("make a CPU"))?;
    let mut segments = vcpu.get_sregs().map_err(failed("read segments"))?;
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments).map_err(failed("set segments"))?;
    let mut registers = vcpu.get_regs().map_err(failed("read registers"))?;
    (registers.rip, registers.rflags) = (CODE_AT, 2);
    (registers.rax, registers.rbx) = (17, 25);
    vcpu.set_regs(&registers).map_err(failed("set registers"))?;
    match vcpu.run().map_err(failed("enter a guest"))? {
        VcpuExit::IoOut(PORT, [42]) => {}
        other => {
            return Err(format!(
                "a tiny guest did something else than told: {other:?}"
            ));
        }
    }
    match vcpu.run().map_err(failed("enter a guest"))? {
        VcpuExit::Hlt => {}
        other => return Err(format!("a tiny guest did not halt: {other:?}")),
    }
    drop((vcpu, vm));
    drop(memory);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_words() {
        assert!(has_extensions("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_extensions("flags : svm"));
        assert!(!has_extensions(
            "flags : fpu vmx_something\nvmx flags : vnmi\n"
        ));
        assert!(!has_extensions(""));
    }

    #[test]
    fn the_verdict_does_not_change() {
        assert_eq!(kvm(), kvm());
    }
}
