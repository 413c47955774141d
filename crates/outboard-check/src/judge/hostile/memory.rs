//! Memory tables that cannot be, and memory that goes away (hostile cases A22 to A49).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::payload::{MemRegion, VringAddr};

use super::not_silent;
use crate::judge::case::Case;
use crate::judge::conformance::memory::{files, region, slots};
use crate::judge::conformance::optional::file;
use crate::judge::disk::{BASE, Disk, MEMORY, memory};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::Ring;

pub(crate) fn no_regions(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.wire.send(&message::mem_table(&[]))?;
    not_silent(&mut session.wire, "a table without regions")
}

/// A table whose count lies.
fn counted(case: &mut Case<'_>, count: u32) -> Outcome {
    let memory = files(1)?;
    let Some((_, fd)) = memory.regions().next() else { return Ok(()) };
    let mut session = case.session()?;
    let mut msg = message::mem_table(&[(region(0, 8), fd)]);
    msg.payload.splice(..4, count.to_ne_bytes());
    if session.acks() {
        session.refused(&msg, &format!("a table that announces {count:#x} regions"))?;
    } else {
        session.wire.send(&msg)?;
        not_silent(&mut session.wire, "a table that lies about its regions")?;
    }
    case.rests("after a table that lies about its regions")
}

pub(crate) fn count_of_4_gi(case: &mut Case<'_>) -> Outcome {
    counted(case, u32::MAX)
}

pub(crate) fn count_of_2(case: &mut Case<'_>) -> Outcome {
    counted(case, 2)
}

pub(crate) fn count_of_1000(case: &mut Case<'_>) -> Outcome {
    counted(case, 1000)
}

/// As many regions as this, all well formed; too many for some.
fn many(case: &mut Case<'_>, count: u64) -> Outcome {
    let memory = files(1)?;
    let Some((_, fd)) = memory.regions().next() else { return Ok(()) };
    let all: Vec<_> = (0..count).map(|at| (region(at * 1024, 8), fd)).collect();
    let mut session = case.session()?;
    session.wire.send(&message::mem_table(&all).need_reply())?;
    not_silent(&mut session.wire, &format!("a table of {count} regions"))
}

pub(crate) fn nine_regions(case: &mut Case<'_>) -> Outcome {
    many(case, 9)
}

pub(crate) fn forty_regions(case: &mut Case<'_>) -> Outcome {
    many(case, 40)
}

pub(crate) fn most_regions(case: &mut Case<'_>) -> Outcome {
    many(case, 253)
}

/// Regions that must be refused.
fn impossible(case: &mut Case<'_>, regions: &[(&str, MemRegion)]) -> Outcome {
    let memory = files(1)?;
    let Some((_, fd)) = memory.regions().next() else { return Ok(()) };
    for (what, region) in regions {
        let mut session = case.acking()?;
        session.refused(&message::mem_table(&[(*region, fd)]), what)?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

pub(crate) fn region_of_nothing(case: &mut Case<'_>) -> Outcome {
    impossible(case, &[("a region of 0 bytes", region(0, 0))])
}

pub(crate) fn region_too_large(case: &mut Case<'_>) -> Outcome {
    let sized = |size| MemRegion { size, ..region(0, 1) };
    impossible(
        case,
        &[
            ("a region of 2^62 bytes", sized(1 << 62)),
            ("a region of 2^63 bytes", sized(1 << 63)),
            ("a region of 2^64-1 bytes", sized(u64::MAX)),
            ("a region of 2^64-4096 bytes", sized(u64::MAX - 4095)),
        ],
    )
}

pub(crate) fn region_wraps(case: &mut Case<'_>) -> Outcome {
    let good = region(0, 8);
    impossible(
        case,
        &[
            ("guest addresses that wrap", MemRegion { guest_addr: u64::MAX - 4095, ..good }),
            ("user addresses that wrap", MemRegion { user_addr: u64::MAX - 4095, ..good }),
            ("a file offset that wraps", MemRegion { offset: u64::MAX - 4095, ..good }),
        ],
    )
}

pub(crate) fn region_past_the_file(case: &mut Case<'_>) -> Outcome {
    let good = region(0, 8);
    impossible(
        case,
        &[
            ("a region behind the end of its file", MemRegion { offset: 1 << 30, ..good }),
            ("a region longer than its file", region(0, 1 << 18)),
        ],
    )
}

pub(crate) fn odd_offset(case: &mut Case<'_>) -> Outcome {
    let memory = files(1)?;
    let Some((_, fd)) = memory.regions().next() else { return Ok(()) };
    for offset in [1, 512, 4095] {
        let mut session = case.session()?;
        let odd = MemRegion { offset, ..region(0, 8) };
        session.wire.send(&message::mem_table(&[(odd, fd)]).need_reply())?;
        not_silent(&mut session.wire, &format!("a file offset of {offset}"))?;
    }
    Ok(())
}

/// Descriptors that are no memory.
pub(crate) fn no_memory(case: &mut Case<'_>) -> Outcome {
    let open = |path: &str| std::fs::File::open(path).map(OwnedFd::from);
    let own = |error| Finding::own("open a file", error);
    let (pipe, _writer) = rustix::pipe::pipe().map_err(|e| Finding::own("make a pipe", e))?;
    let (socket, _other) = std::os::unix::net::UnixStream::pair().map_err(own)?;
    let all = [
        ("a pipe", pipe),
        ("a socket", socket.into()),
        ("a directory", open("/").map_err(own)?),
        ("/dev/null", open("/dev/null").map_err(own)?),
        ("an eventfd", crate::judge::ring::eventfd()?),
    ];
    for (what, fd) in &all {
        let mut session = case.acking()?;
        let what = format!("{what} as guest memory");
        session.refused(&message::mem_table(&[(region(0, 8), fd.as_fd())]), &what)?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

/// A ring in memory that this file stands for: whatever the back-end says to that, the ring is started, so
/// that a believer touches what is not there.
fn believed(case: &mut Case<'_>, fd: &OwnedFd, region: MemRegion, what: &str) -> Outcome {
    let mut session = case.session()?;
    session.wire.send(&message::mem_table(&[(region, fd.as_fd())]).need_reply())?;
    let memory = memory()?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    for msg in [
        message::vring_num(0, 16),
        message::vring_base(0, 0),
        message::vring_addr(&ring.addr()),
        message::notifier(Code::SetVringCall, 0, &ring.call),
        message::notifier(Code::SetVringKick, 0, &ring.kick),
        message::enable(0, 1),
    ] {
        session.wire.send(&msg)?;
    }
    ring.kick()?;
    not_silent(&mut session.wire, what)?;
    std::thread::sleep(case.quiet / 2);
    case.lives()
}

/// The region that holds the judge's rings.
const fn whole(offset: u64) -> MemRegion {
    let user_addr = BASE + outboard_frontend::USER_OFFSET;
    MemRegion { guest_addr: BASE, user_addr, size: MEMORY, offset }
}

/// A ring in a file that is shorter than its region.
pub(crate) fn short_file(case: &mut Case<'_>) -> Outcome {
    believed(case, &file(4096)?, whole(0), "a memory file that is too short")
}

/// Pages of 2 MiB, an offset of 4 KiB, and most likely no such page to be had (A29).
pub(crate) fn huge_pages(case: &mut Case<'_>) -> Outcome {
    use rustix::fs::MemfdFlags as Flags;
    let flags = Flags::CLOEXEC | Flags::HUGETLB | Flags::HUGE_2MB;
    let fd = rustix::fs::memfd_create("outboard-check", flags)
        .map_err(|_| Finding::not_offered("this kernel has no huge pages"))?;
    rustix::fs::ftruncate(&fd, 4 << 20).map_err(|errno| Finding::own("size a file", errno))?;
    for offset in [4096, 0] {
        believed(case, &fd, whole(offset), "a file of huge pages as guest memory")?;
    }
    Ok(())
}

/// A disk in memory of a file that can be cut short.
fn cuttable(case: &mut Case<'_>) -> Outcome<(Disk, OwnedFd)> {
    let mut disk = case.still_disk()?;
    let fd = file(MEMORY)?;
    disk.session.done(&message::mem_table(&[(whole(0), fd.as_fd())]))?;
    disk.ring.run(&mut disk.session)?;
    Ok((disk, fd))
}

pub(crate) fn cut_short(case: &mut Case<'_>) -> Outcome {
    let (mut disk, fd) = cuttable(case)?;
    disk.ring.kick()?;
    std::thread::sleep(case.quiet / 4);
    rustix::fs::ftruncate(&fd, 0).map_err(|errno| Finding::own("cut a file", errno))?;
    for _ in 0..5 {
        disk.ring.kick()?;
        std::thread::sleep(case.quiet / 20);
    }
    not_silent(&mut disk.session.wire, "its memory was cut short")?;
    case.lives()?;
    case.rests("after its memory was cut short")
}

pub(crate) fn hole(case: &mut Case<'_>) -> Outcome {
    let (mut disk, fd) = cuttable(case)?;
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&fd, flags, 0, MEMORY)
        .map_err(|errno| Finding::own("punch a hole", errno))?;
    disk.ring.kick()?;
    std::thread::sleep(case.quiet / 4);
    not_silent(&mut disk.session.wire, "a hole in its memory")
}

pub(crate) fn many_slots(case: &mut Case<'_>) -> Outcome {
    let mut session = slots(case)?;
    let most = session.ask(&Msg::bare(Code::GetMaxMemSlots))?.number()?;
    if most > 4096 {
        return Err(Finding::not_offered(format!("it has {most} memory slots")));
    }
    let memory = files(1)?;
    let Some((_, fd)) = memory.regions().next() else { return Ok(()) };
    let mut added = 0;
    for at in 0..most + 20 {
        let msg = message::slot(Code::AddMemReg, &region(at * 1024, 1)).fd(&fd).need_reply();
        session.wire.send(&msg)?;
        match session.wire.answer(msg.id) {
            Ok(reply) if reply.number()? == 0 => added += 1,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    ensure!(added <= most, "it took {added} regions and says it has {most} slots");
    ensure!(added == most, "it says it has {most} slots and took {added} regions");
    Ok(())
}

/// Ring addresses that are in no memory: the ring must not start on them.
fn misplaced(case: &mut Case<'_>, change: impl Fn(VringAddr) -> VringAddr) -> Outcome {
    let mut session = case.session()?;
    let memory = memory()?;
    session.share(memory.regions())?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    let addr = message::vring_addr(&change(ring.addr()));
    for msg in [
        message::vring_num(0, 16),
        message::vring_base(0, 0),
        addr,
        message::notifier(Code::SetVringCall, 0, &ring.call),
        message::notifier(Code::SetVringKick, 0, &ring.kick),
        message::enable(0, 1),
    ] {
        session.wire.send(&msg)?;
    }
    ring.kick()?;
    not_silent(&mut session.wire, "ring addresses outside of memory")?;
    std::thread::sleep(case.quiet / 4);
    case.lives()
}

pub(crate) fn ring_outside(case: &mut Case<'_>) -> Outcome {
    let far = outboard_frontend::USER_OFFSET;
    misplaced(case, |addr| VringAddr { desc: far, ..addr })?;
    misplaced(case, |addr| VringAddr { avail: far, ..addr })?;
    misplaced(case, |addr| VringAddr { used: far, ..addr })?;
    misplaced(case, |addr| VringAddr { desc: 0, avail: 0, used: 0, ..addr })
}

pub(crate) fn ring_wraps(case: &mut Case<'_>) -> Outcome {
    let end = u64::MAX - 15;
    misplaced(case, |addr| VringAddr { desc: end, ..addr })?;
    misplaced(case, |addr| VringAddr { avail: end, ..addr })?;
    misplaced(case, |addr| VringAddr { used: end, ..addr })
}

pub(crate) fn ring_over_the_end(case: &mut Case<'_>) -> Outcome {
    let end = BASE + MEMORY + outboard_frontend::USER_OFFSET;
    misplaced(case, |addr| VringAddr { desc: end - 16, ..addr })?;
    misplaced(case, |addr| VringAddr { avail: end - 16, ..addr })?;
    misplaced(case, |addr| VringAddr { used: end - 16, ..addr })
}

/// A read-only file as guest memory: refused, or the ring does not run.
pub(crate) fn read_only(case: &mut Case<'_>) -> Outcome {
    let fd = file(MEMORY)?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let readable = std::fs::File::open(path).map_err(|error| Finding::own("open a file", error))?;
    let mut session = case.session()?;
    let borrowed: BorrowedFd<'_> = readable.as_fd();
    session.wire.send(&message::mem_table(&[(region(0, 8), borrowed)]).need_reply())?;
    not_silent(&mut session.wire, "a read-only file as guest memory")?;
    case.lives()
}
