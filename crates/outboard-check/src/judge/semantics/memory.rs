//! Memory that changes under rings that run (vhost-user, SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG,
//! SET_LOG_BASE; hostile cases A38, A39, A44).

use std::os::fd::AsFd as _;

use outboard_frontend::SharedMemory;
use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{Log, VringAddr};
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::conformance::optional::file;
use crate::judge::disk::{BASE, DATA, Disk, HEADER, IN, MEMORY, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::{Ring, WRITE};
use crate::judge::semantics::enabling::{expect_read, queue_read};
use crate::judge::session::{PLAIN, Session, USUAL};

/// Memory with a second region far from the first.
fn two_regions(second: u64) -> Outcome<SharedMemory> {
    SharedMemory::with_regions(&[(BASE, MEMORY), (second, 0x10000)])
        .map_err(|error| Finding::own("make shared memory", error))
}

const FAR: u64 = BASE + (16 << 30);

/// A disk whose ring lies in the first of these regions, which alone is shared.
fn disk_in(mut session: Session, memory: SharedMemory, capacity: u64) -> Outcome<Disk> {
    session.share(memory.regions().take(1))?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    ring.run(&mut session)?;
    let limit = session.wire.limit;
    Ok(Disk { session, memory, ring, limit, capacity })
}

/// A read into `data`.
fn read_into(disk: &mut Disk, data: u64, when: &str) -> Outcome {
    disk.header(IN, 0)?;
    let parts = [(HEADER, 16, 0), (data, 512, WRITE), (STATUS, 1, WRITE)];
    let done = disk.perform(&parts)?;
    let done = done.ok_or_else(|| Finding::hangs(format!("a read {when} never comes back")))?;
    ensure!(done.status == 0, "a read {when} fails with {}", done.status);
    Ok(())
}

pub(crate) fn table_again(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    let rounds = if case.quick { 20 } else { 500 };
    for _ in 0..rounds {
        queue_read(&mut disk)?;
        disk.ring.kick()?;
        let memory = disk.memory.clone();
        disk.session.share(memory.regions())?;
        expect_read(&mut disk, "while the same memory table came again")?;
    }
    Ok(())
}

pub(crate) fn table_grows(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let mut disk = disk_in(case.session()?, two_regions(FAR)?, capacity)?;
    disk.serves("in one region")?;
    let memory = disk.memory.clone();
    disk.session.share(memory.regions())?;
    read_into(&mut disk, FAR, "into a region that was added while the ring runs")?;
    disk.session.share(memory.regions().take(1))?;
    disk.serves("after another region was taken away")
}

pub(crate) fn table_moves(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    // Other pages at the same addresses, in which the ring stands where it stood.
    let memory = crate::judge::disk::memory()?;
    let mut ring = Ring::new(&memory, 0, 16, BASE)?;
    ring.begin_at(disk.ring.next_avail, disk.ring.last_used)?;
    std::mem::swap(&mut ring.kick, &mut disk.ring.kick);
    disk.session.share(memory.regions())?;
    let old = std::mem::replace(&mut disk.ring, ring);
    disk.serves("whose memory was replaced by other pages")?;
    ensure!(old.used_index()? == disk.ring.last_used - 1, "it still writes to the old pages");
    Ok(())
}

pub(crate) fn table_without_ring(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let mut disk = disk_in(case.session()?, two_regions(FAR)?, capacity)?;
    disk.serves("on a ring that runs")?;
    let memory = disk.memory.clone();
    disk.session.share(memory.regions().skip(1))?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    disk.idle(case.quiet / 2, "on a ring whose memory is gone")?;
    disk.session.alive()?;
    disk.session.share(memory.regions())?;
    disk.ring.kick()?;
    expect_read(&mut disk, "while its memory was gone")
}

/// A disk whose memory is shared slot by slot.
fn slots(case: &mut Case<'_>) -> Outcome<Disk> {
    let capacity = case.capacity()?;
    let mut session = case.session_for(P::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
    session.ask(&Msg::bare(Code::GetMaxMemSlots))?;
    let memory = two_regions(FAR)?;
    add(&mut session, &memory, 0)?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    ring.run(&mut session)?;
    let limit = session.wire.limit;
    Ok(Disk { session, memory, ring, limit, capacity })
}

fn add(session: &mut Session, memory: &SharedMemory, at: usize) -> Outcome {
    let Some((spec, fd)) = memory.regions().nth(at) else { return Ok(()) };
    session.done(&message::slot(Code::AddMemReg, &message::region(&spec)).fd(&fd.as_fd()))
}

fn remove(session: &mut Session, memory: &SharedMemory, at: usize) -> Outcome {
    let Some((spec, _)) = memory.regions().nth(at) else { return Ok(()) };
    session.done(&message::slot(Code::RemMemReg, &message::region(&spec)))
}

pub(crate) fn slots_serve(case: &mut Case<'_>) -> Outcome {
    slots(case)?.serves("in memory that came by ADD_MEM_REG")
}

pub(crate) fn slots_under_load(case: &mut Case<'_>) -> Outcome {
    let mut disk = slots(case)?;
    let memory = disk.memory.clone();
    let rounds = if case.quick { 20 } else { 500 };
    for _ in 0..rounds {
        queue_read(&mut disk)?;
        disk.ring.kick()?;
        add(&mut disk.session, &memory, 1)?;
        expect_read(&mut disk, "while a region was added")?;
        read_into(&mut disk, FAR, "into a region that was added")?;
        queue_read(&mut disk)?;
        disk.ring.kick()?;
        remove(&mut disk.session, &memory, 1)?;
        expect_read(&mut disk, "while a region was removed")?;
    }
    Ok(())
}

pub(crate) fn slot_of_the_ring(case: &mut Case<'_>) -> Outcome {
    let mut disk = slots(case)?;
    disk.serves("on a ring that runs")?;
    let memory = disk.memory.clone();
    remove(&mut disk.session, &memory, 0)?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    disk.idle(case.quiet / 2, "on a ring whose memory was removed")?;
    add(&mut disk.session, &memory, 0)?;
    disk.ring.kick()?;
    expect_read(&mut disk, "while its memory was removed")
}

pub(crate) fn across_regions(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let border = BASE + MEMORY;
    let memory = two_regions(border)?;
    let mut session = case.session()?;
    session.share(memory.regions())?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    ring.run(&mut session)?;
    let limit = session.wire.limit;
    let mut disk = Disk { session, memory, ring, limit, capacity };
    read_into(&mut disk, border - 100, "into a buffer that crosses two adjacent regions")?;
    let mut across = [0; 512];
    disk.ring.read(border - 100, &mut across)?;
    disk.serves("in one region")?;
    ensure!(disk.data(512)? == across, "a buffer that crosses two regions was filled wrong");
    Ok(())
}

/// A log file as large as the shared memory needs, and the bit of a page in it.
fn dirty(log: &std::os::fd::OwnedFd, guest: u64) -> Outcome<bool> {
    let page = guest / 4096;
    let mut byte = [0];
    rustix::io::pread(log, &mut byte, page / 8)
        .map_err(|errno| Finding::own("read the dirty log", errno))?;
    Ok(byte[0] >> (page % 8) & 1 == 1)
}

pub(crate) fn log_marks(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session_with(PLAIN, USUAL | P::LOG_SHMFD)?;
    session.needs(P::LOG_SHMFD, "LOG_SHMFD")?;
    session.needs_bit(virtio::LOG_ALL, "LOG_ALL")?;
    let mut disk = Disk::start(session, capacity)?;
    let size = (BASE + MEMORY) / 4096 / 8;
    let log = file(size)?;
    let body = Log { mmap_size: size, mmap_offset: 0 };
    disk.session.ask(&Msg::new(Code::SetLogBase.id(), body.as_bytes().to_vec()).fd(&log))?;
    disk.serves("before the log was switched on")?;
    ensure!(!dirty(&log, DATA)?, "it logs before LOG_ALL was acknowledged");
    disk.session.done(&message::set_features(disk.session.features | virtio::LOG_ALL))?;
    let addr = VringAddr { flags: 1, log_guest_addr: disk.ring.used, ..disk.ring.addr() };
    disk.session.done(&message::vring_addr(&addr))?;
    disk.serves("while the log is on")?;
    for (what, page) in [("data", DATA), ("status", STATUS), ("used ring", disk.ring.used)] {
        ensure!(dirty(&log, page)?, "a write to the {what} is not in the dirty log");
    }
    ensure!(!dirty(&log, BASE + 0xf0000)?, "a page that was not written is in the dirty log");
    disk.session.done(&message::set_features(disk.session.features))?;
    disk.serves("after the log was switched off")
}
