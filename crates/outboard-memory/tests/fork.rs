//! A forked child looks whether it got the mappings. Alone in its process: a fork in a program of many threads is safe
//! only for a child that does nothing but system calls.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(unsafe_code, reason = "fork")]

use outboard_memory::{MapOptions, Region, RegionSpec};

fn region(dont_fork: bool) -> Region {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1000).unwrap();
    let spec = RegionSpec { guest_addr: 0, user_addr: 0, size: 0x1000, offset: 0 };
    Region::map(spec, file.into(), MapOptions { dont_fork, ..MapOptions::default() }).unwrap()
}

/// Whether a page is mapped in this process: `mincore` says `ENOMEM` when it is not. Only a system call.
fn is_mapped(address: *mut u8) -> bool {
    let mut resident = 0_u8;
    // SAFETY: asks about one page, answered in one byte.
    unsafe { libc::mincore(address.cast(), 1, &raw mut resident) == 0 }
}

#[test]
fn a_child_has_the_regions_it_may_have_and_no_others() {
    let (shared, kept) = (region(false), region(true));
    let (at_shared, at_kept) = (shared.host(), kept.host());
    // SAFETY: the child only makes system calls and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let found = i32::from(is_mapped(at_shared)) | i32::from(is_mapped(at_kept)) << 1;
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(found) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child);
    assert!(libc::WIFEXITED(status));
    assert_eq!(
        libc::WEXITSTATUS(status),
        1,
        "bit 0: the shared one, bit 1: the one that is not for children"
    );
    assert!(is_mapped(at_shared) && is_mapped(at_kept), "the parent keeps both");
}
