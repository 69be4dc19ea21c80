//! The device state while it arrives: the one image whose length a peer says.

use crate::error::{Error, Result};
use crate::protocol::{ImageHead, ImageKind};

/// The head of a device state, whose length is the source's to say.
pub(super) fn device_head(bytes: u64) -> Result<ImageHead> {
    if bytes > vm_host::DEVICE_STATE_MAX {
        return Err(Error::Refused(format!(
            "a device state of {bytes} bytes is larger than any QEMU writes"
        )));
    }
    Ok(ImageHead {
        kind: ImageKind::Device,
        bytes,
    })
}

/// A device state at another length. What is added is zero and takes no memory until pages for
/// it arrive: the allocator takes so much from the kernel, untouched.
pub(super) fn resized(device: &[u8], len: usize) -> Vec<u8> {
    let mut resized = vec![0; len];
    let common = device.len().min(len);
    resized[..common].copy_from_slice(&device[..common]);
    resized
}

#[cfg(test)]
mod tests {
    use reconciler::SlicePages;

    use super::*;
    use crate::state::tree_of;

    #[test]
    fn a_device_state_that_no_qemu_writes_is_refused() {
        let most = vm_host::DEVICE_STATE_MAX;
        assert_eq!(device_head(most).unwrap().bytes, most);
        for beyond in [most + 1, u64::MAX] {
            assert!(matches!(device_head(beyond), Err(Error::Refused(_))));
        }
    }

    #[test]
    fn a_device_state_keeps_what_it_has_at_another_length() {
        assert_eq!(resized(&[1, 2, 3], 2), [1, 2]);
        assert_eq!(resized(&[1, 2, 3], 5), [1, 2, 3, 0, 0]);
    }

    #[test]
    fn a_device_state_that_is_only_said_to_be_long_takes_no_memory() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
            pages * 4096
        };
        let (before, most) = (resident(), vm_host::DEVICE_STATE_MAX);
        let device = resized(&[1], most as usize);
        let tree = tree_of(&SlicePages(&device), "the device state").unwrap();
        assert_eq!(tree.pages(), reconciler::pages_for(most));
        // Other tests run beside this one; none of them takes so much.
        assert!(resident().saturating_sub(before) < most / 4);
    }
}
