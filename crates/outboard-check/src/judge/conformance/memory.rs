//! Guest memory: tables and slots (vhost-user, "Memory region description", "Memory regions",
//! CONFIGURE_MEM_SLOTS).

use std::os::fd::AsFd as _;

use outboard_frontend::SharedMemory;
use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::payload::MemRegion;

use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::session::Session;

const PAGE: u64 = 4096;
const GUEST: u64 = 0x4000_0000;
const USER: u64 = 0x7f00_0000_0000;

/// A region of `pages` at page `at`.
pub(crate) const fn region(at: u64, pages: u64) -> MemRegion {
    MemRegion {
        guest_addr: GUEST + at * PAGE,
        size: pages * PAGE,
        user_addr: USER + at * PAGE,
        offset: 0,
    }
}

/// Files to share: one region of 64 pages each.
pub(crate) fn files(count: u64) -> Outcome<SharedMemory> {
    let regions: Vec<_> = (0..count).map(|at| (GUEST + (at << 24), 64 * PAGE)).collect();
    SharedMemory::with_regions(&regions).map_err(|error| Finding::own("make memory", error))
}

/// Sends a table of these regions, all backed by the same file.
pub(crate) fn table(session: &mut Session, regions: &[MemRegion]) -> Outcome<Option<u64>> {
    let memory = files(1)?;
    let Some((_, file)) = memory.regions().next() else { return Ok(None) };
    let all: Vec<_> = regions.iter().map(|region| (*region, file)).collect();
    session.acknowledged(&message::mem_table(&all))
}

fn accepted(case: &mut Case<'_>, regions: &[MemRegion], what: &str) -> Outcome {
    let code = table(&mut case.session()?, regions)?.unwrap_or(0);
    ensure!(code == 0, "it refused {what}");
    Ok(())
}

/// A table that must be refused, in either way.
fn refused(case: &mut Case<'_>, regions: &[MemRegion], what: &str) -> Outcome {
    let mut session = case.acking()?;
    let memory = files(1)?;
    let Some((_, file)) = memory.regions().next() else { return Ok(()) };
    let all: Vec<_> = regions.iter().map(|region| (*region, file)).collect();
    session.refused(&message::mem_table(&all), what)?;
    Ok(())
}

pub(crate) fn one_region(case: &mut Case<'_>) -> Outcome {
    accepted(case, &[region(0, 64)], "a table of one region")
}

pub(crate) fn same_file(case: &mut Case<'_>) -> Outcome {
    let second = MemRegion { offset: 8 * PAGE, ..region(1024, 8) };
    accepted(case, &[region(0, 8), second], "two regions of one file")
}

pub(crate) fn eight_regions(case: &mut Case<'_>) -> Outcome {
    let regions: Vec<_> = (0..8).map(|at| region(at * 1024, 8)).collect();
    accepted(case, &regions, "a table of eight regions")
}

pub(crate) fn adjacent_regions(case: &mut Case<'_>) -> Outcome {
    let second = MemRegion { offset: 8 * PAGE, ..region(8, 8) };
    accepted(case, &[region(0, 8), second], "two regions that touch")
}

pub(crate) fn unsorted_regions(case: &mut Case<'_>) -> Outcome {
    accepted(case, &[region(1024, 8), region(0, 8)], "regions in falling order")
}

pub(crate) fn table_replaced(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    for at in [0, 1024, 0] {
        let code = table(&mut session, &[region(at, 8)])?.unwrap_or(0);
        ensure!(code == 0, "it refused a second table with {code}");
    }
    session.alive()
}

pub(crate) fn longer_body(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    let memory = files(1)?;
    let Some((spec, file)) = memory.regions().next() else { return Ok(()) };
    let mut msg = message::mem_table(&[(message::region(&spec), file)]);
    msg.payload.resize(72, 0);
    session.done(&msg)
}

pub(crate) fn guest_overlap(case: &mut Case<'_>) -> Outcome {
    let other = MemRegion { user_addr: USER + (1 << 32), ..region(4, 8) };
    refused(case, &[region(0, 8), other], "regions that overlap in guest addresses")
}

pub(crate) fn user_overlap(case: &mut Case<'_>) -> Outcome {
    let other = MemRegion { guest_addr: GUEST + (1 << 32), ..region(4, 8) };
    refused(case, &[region(0, 8), other], "regions that overlap in user addresses")
}

pub(crate) fn fewer_fds(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    let memory = files(1)?;
    let Some((_, file)) = memory.regions().next() else { return Ok(()) };
    let mut msg = message::mem_table(&[(region(0, 8), file), (region(1024, 8), file)]);
    msg.fds.pop();
    session.refused(&msg, "a table of two regions with one descriptor")?;
    Ok(())
}

pub(crate) fn more_fds(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    let memory = files(1)?;
    let Some((_, file)) = memory.regions().next() else { return Ok(()) };
    let mut msg = message::mem_table(&[(region(0, 8), file)]);
    msg.fds.push(file);
    session.refused(&msg, "a table of one region with two descriptors")?;
    Ok(())
}

/// A session with memory slots.
pub(crate) fn slots(case: &mut Case<'_>) -> Outcome<Session> {
    let session = case.session_for(ProtocolFeatures::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
    session.needs_acks()?;
    Ok(session)
}

/// ADD_MEM_REG of a region backed by `memory`'s first file.
pub(crate) fn add(session: &mut Session, memory: &SharedMemory, region: &MemRegion) -> Outcome {
    let Some((_, file)) = memory.regions().next() else { return Ok(()) };
    let file = file.as_fd();
    session.done(&message::slot(Code::AddMemReg, region).fd(&file))
}

pub(crate) fn slots_counted(case: &mut Case<'_>) -> Outcome {
    let mut session = slots(case)?;
    let count = session.ask(&Msg::bare(Code::GetMaxMemSlots))?.number()?;
    ensure!(count > 0, "it says it has 0 memory slots");
    Ok(())
}

pub(crate) fn slot_added_and_removed(case: &mut Case<'_>) -> Outcome {
    let (mut session, memory) = (slots(case)?, files(1)?);
    for _ in 0..3 {
        add(&mut session, &memory, &region(0, 8))?;
        add(&mut session, &memory, &region(1024, 8))?;
        session.done(&message::slot(Code::RemMemReg, &region(0, 8)))?;
        session.done(&message::slot(Code::RemMemReg, &region(1024, 8)))?;
    }
    session.alive()
}

pub(crate) fn slot_twice(case: &mut Case<'_>) -> Outcome {
    for (what, other) in [
        ("ADD_MEM_REG of a region that is there already", region(0, 8)),
        ("ADD_MEM_REG of a region that overlaps another", region(4, 8)),
    ] {
        let (mut session, memory) = (slots(case)?, files(1)?);
        add(&mut session, &memory, &region(0, 8))?;
        let Some((_, file)) = memory.regions().next() else { return Ok(()) };
        session.turned_down(&message::slot(Code::AddMemReg, &other).fd(&file), what)?;
    }
    Ok(())
}

pub(crate) fn slot_unknown(case: &mut Case<'_>) -> Outcome {
    let wrong = [
        ("of a region that was never added", region(1024, 8)),
        ("with another size", region(0, 7)),
        ("with another user address", MemRegion { user_addr: USER + (1 << 32), ..region(0, 8) }),
    ];
    for (what, other) in wrong {
        let (mut session, memory) = (slots(case)?, files(1)?);
        add(&mut session, &memory, &region(0, 8))?;
        let msg = message::slot(Code::RemMemReg, &other);
        if session.turned_down(&msg, &format!("REM_MEM_REG {what}"))? {
            session.done(&message::slot(Code::RemMemReg, &region(0, 8)))?;
        }
    }
    Ok(())
}

pub(crate) fn slot_removed_with_fd(case: &mut Case<'_>) -> Outcome {
    let (mut session, memory) = (slots(case)?, files(1)?);
    add(&mut session, &memory, &region(0, 8))?;
    let Some((_, file)) = memory.regions().next() else { return Ok(()) };
    session.done(&message::slot(Code::RemMemReg, &region(0, 8)).fd(&file))
}

pub(crate) fn slot_offset_ignored(case: &mut Case<'_>) -> Outcome {
    let (mut session, memory) = (slots(case)?, files(1)?);
    add(&mut session, &memory, &region(0, 8))?;
    let moved = MemRegion { offset: PAGE, ..region(0, 8) };
    session.done(&message::slot(Code::RemMemReg, &moved))
}

pub(crate) fn slot_without_fd(case: &mut Case<'_>) -> Outcome {
    let mut session = slots(case)?;
    session
        .refused(&message::slot(Code::AddMemReg, &region(0, 8)), "ADD_MEM_REG without a file")?;
    Ok(())
}
