//! A file cut short under us: the access goes on, the region is known to be poisoned, the process lives (A34, A35); and
//! faults that are not ours go where they went before. Each case that replaces handlers has a process of its own.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(unsafe_code, reason = "handlers and faults of the tests' own making")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use outboard_memory::{Buffers, Descriptor, GuestMemory, Region, View, install_sigbus_guard};

fn rig(size: u64) -> (View, OwnedFd) {
    let (region, file) = Region::memfd(0, size).unwrap();
    (View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap())), file)
}

fn cut(file: &OwnedFd, len: u64) {
    rustix::fs::ftruncate(file.as_fd(), len).unwrap();
}

#[test]
fn a_read_from_the_hole_gives_zeros_and_is_known() {
    let (view, file) = rig(0x4000);
    view.write(0x2000, &[7; 16]).unwrap();
    cut(&file, 0x1000);
    assert!(!view.poisoned(), "nobody touched the hole yet");
    let mut bytes = [1; 16];
    view.read(0x2000, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 16]);
    assert!(view.poisoned() && view.memory().poisoned());
}

#[test]
fn a_write_across_several_pages_of_the_hole_goes_nowhere_and_is_known() {
    let (view, file) = rig(0x1_0000);
    cut(&file, 0x1800);
    view.write(0x1000, &[9; 0xf000]).unwrap();
    assert!(view.poisoned());
    let mut bytes = [0; 1];
    view.read(0x1000, &mut bytes).unwrap();
    assert_eq!(bytes, [9], "the part that is left is still the file");
}

/// R4: nothing dies of a hole.
#[test]
fn every_kind_of_access_survives_the_hole() {
    let kinds: [fn(&View); 6] = [
        |view| {
            assert_eq!(
                view.cells(0x2000, 2).unwrap().u16_at(0).unwrap().load(Ordering::Acquire),
                0
            );
        },
        |view| view.cells(0x2000, 2).unwrap().u16_at(0).unwrap().store(1, Ordering::Release),
        |view| assert_eq!(view.cells(0x2000, 8).unwrap().pairs(0, 1).unwrap().load(0), (0, 0)),
        |view| {
            assert_eq!(
                view.cells(0x2000, 16).unwrap().descriptors(0, 1).unwrap().get(0),
                Some(Descriptor::default())
            );
        },
        |view| view.write(0x2001, &[1; 3000]).unwrap(),
        |view| {
            let ring = view.cells(0, 16).unwrap().descriptors(0, 1).unwrap();
            ring.set(0, Descriptor { addr: 0x2000, len: 64, flags: Descriptor::WRITE, next: 0 })
                .unwrap();
            let mut buffers = Buffers::new(view);
            let mut gather = view.gather(&ring, &mut buffers);
            gather.turn();
            gather.push(0x2000, 64).unwrap();
            gather.finish(true);
            buffers.writable().fill_zero(64).unwrap();
        },
    ];
    for (at, access) in kinds.into_iter().enumerate() {
        let (view, file) = rig(0x4000);
        cut(&file, 0x1000);
        access(&view);
        assert!(view.poisoned(), "kind {at}");
    }
}

#[test]
fn one_poisoned_region_says_nothing_of_another_and_goes_with_its_mapping() {
    let (bad, file) = rig(0x2000);
    let (good, _file) = rig(0x2000);
    cut(&file, 0);
    bad.read(0, &mut [0]).unwrap();
    assert!(bad.poisoned() && !good.poisoned());
    drop(bad);
    assert!(!good.poisoned());
    let (next, _file) = rig(0x2000);
    next.read(0, &mut [0]).unwrap();
    assert!(!next.poisoned(), "a place in the registry that is used again starts clean");
}

/// R4: what the kernel transfers fails instead.
#[test]
fn a_transfer_by_the_kernel_reports_the_hole_as_an_error() {
    let (view, file) = rig(0x4000);
    cut(&file, 0x1000);
    let ring = view.cells(0, 16).unwrap().descriptors(0, 1).unwrap();
    let mut buffers = Buffers::new(&view);
    let mut gather = view.gather(&ring, &mut buffers);
    gather.push(0x2000, 0x1000).unwrap();
    gather.finish(false);
    let target = tempfile::tempfile().unwrap();
    let refused = buffers.readable().write_to_file_at(&target, 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(buffers.readable().len(), 0x1000, "nothing was dropped");
}

#[test]
fn many_threads_that_meet_holes_at_once_all_live() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let (view, file) = rig(0x3000);
                    cut(&file, 0x1000);
                    view.write(0xfff, &[1; 0x1002]).unwrap();
                    assert!(view.poisoned());
                }
            });
        }
    });
}

#[test]
fn more_regions_than_one_chunk_of_the_registry_are_all_guarded() {
    let rigs: Vec<_> = (0..600).map(|_| rig(0x1000)).collect();
    let (view, file) = rigs.last().unwrap();
    cut(file, 0);
    view.write(0, &[1]).unwrap();
    assert!(view.poisoned());
    assert_eq!(rigs.iter().filter(|(view, _)| view.poisoned()).count(), 1);
}

/// Set in a process that plays the part of the child of a test.
const CHILD: &str = "OUTBOARD_SIGBUS_CHILD";

/// Runs the test `name` again, in a process of its own, as the child.
fn alone(name: &str) -> ExitStatus {
    let program = std::env::current_exe().unwrap();
    Command::new(program).args(["--exact", name]).env(CHILD, "1").output().unwrap().status
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// A mapping that is not guest memory, in a hole: touching it is a SIGBUS of nobody's.
fn touch_a_hole_of_nobodys() {
    let file = tempfile::tempfile().unwrap();
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: a fresh mapping of an empty file.
    let place =
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, descriptor, 0) };
    assert_ne!(place, libc::MAP_FAILED);
    // SAFETY: faults, which is what is wanted.
    unsafe { place.cast::<u8>().read_volatile() };
}

static HEARD: AtomicUsize = AtomicUsize::new(0);

/// An earlier handler: maps a page where the fault was, as ours does.
extern "C" fn earlier(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    HEARD.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the kernel passes a valid siginfo of a fault.
    let info = unsafe { &*info };
    // SAFETY: likewise.
    let place = unsafe { info.si_addr() };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page is the test's own mapping.
    unsafe { libc::mmap(place, 4096, libc::PROT_READ, flags, -1, 0) };
}

#[test]
fn a_fault_that_is_not_ours_goes_to_the_handler_that_was_there_before() {
    if !is_child() {
        assert!(
            alone("a_fault_that_is_not_ours_goes_to_the_handler_that_was_there_before").success()
        );
        return;
    }
    // SAFETY: all zeros is a valid action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = earlier as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: installs a handler that only makes system calls.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    install_sigbus_guard().unwrap();
    touch_a_hole_of_nobodys();
    assert_eq!(HEARD.load(Ordering::SeqCst), 1);
    let (view, file) = rig(0x1000);
    cut(&file, 0);
    view.read(0, &mut [0]).unwrap();
    assert!(view.poisoned());
    assert_eq!(HEARD.load(Ordering::SeqCst), 1, "our own faults are not passed on");
}

#[test]
fn a_fault_of_nobodys_still_ends_the_process() {
    if !is_child() {
        assert_eq!(alone("a_fault_of_nobodys_still_ends_the_process").signal(), Some(libc::SIGBUS));
        return;
    }
    let (_view, _file) = rig(0x1000);
    touch_a_hole_of_nobodys();
}

#[test]
fn a_signal_that_is_sent_ends_a_process_that_did_not_handle_it() {
    if !is_child() {
        let status = alone("a_signal_that_is_sent_ends_a_process_that_did_not_handle_it");
        assert_eq!(status.signal(), Some(libc::SIGBUS));
        return;
    }
    // SAFETY: puts the default back in place of what Rust's runtime installed.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    let (_view, _file) = rig(0x1000);
    // SAFETY: sends a signal to ourselves.
    unsafe { libc::raise(libc::SIGBUS) };
}

#[test]
fn the_guard_can_be_asked_for_again_and_again() {
    for _ in 0..3 {
        install_sigbus_guard().unwrap();
    }
}
