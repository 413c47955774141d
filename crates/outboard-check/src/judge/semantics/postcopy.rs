//! Guest memory that comes while its guest runs already (vhost-user, "Migration: postcopy",
//! POSTCOPY_ADVISE, POSTCOPY_LISTEN, POSTCOPY_END).
//!
//! ```text
//!  ADVISE ─▶ userfaultfd   LISTEN   SET_MEM_TABLE ─▶ where it is mapped   0 ─▶ yes   rings   END
//!               └── page faults ─▶ the judge fills the page and wakes who waits
//! ```
//! Invariant: a page that was written by the judge is there and faults no more; all others are holes.

use std::os::fd::AsFd as _;
use std::time::Instant;

use outboard_frontend::SharedMemory;
use outboard_memory::FaultServer;
use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures as P;
use outboard_protocol::payload::{MemRegion, decode_mem_table};
use rustix::event::PollFlags;

use crate::judge::case::Case;
use crate::judge::disk::{BASE, DATA, Disk, HEADER, IN, MEMORY, STATUS, memory};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::{Ring, WRITE};
use crate::judge::session::{PLAIN, Session, USUAL};
use crate::judge::wire::wait;

const PAGE: u64 = 4096;

/// Where faults come from.
struct Faults {
    server: FaultServer,
    /// With the back-end's own addresses.
    regions: Vec<MemRegion>,
}

/// ADVISE, LISTEN, the table and the word that faults can be served: a session whose memory comes page by page.
fn incoming(case: &mut Case<'_>, memory: &SharedMemory) -> Outcome<(Session, Faults)> {
    let mut session = case.session_with(PLAIN, USUAL | P::PAGEFAULT)?;
    session.needs(P::PAGEFAULT, "PAGEFAULT")?;
    let mut reply = session.ask(&Msg::bare(Code::PostcopyAdvise))?;
    let none = || Finding::breaks("POSTCOPY_ADVISE brings no userfaultfd");
    let server = FaultServer::new(reply.fds.pop().ok_or_else(none)?);
    session.done(&Msg::bare(Code::PostcopyListen))?;
    let table: Vec<_> = memory.regions().map(|(spec, fd)| (message::region(&spec), fd)).collect();
    // As QEMU does: both halves ask for an acknowledgement, and one comes, after the second.
    let reply = session.ask(&message::mem_table(&table).need_reply())?;
    let regions = decode_mem_table(&reply.payload).unwrap_or_default();
    let same = |(back, (sent, _)): (&MemRegion, &(MemRegion, _))| {
        (back.guest_addr, back.size) == (sent.guest_addr, sent.size) && back.user_addr != 0
    };
    ensure!(
        regions.len() == table.len() && regions.iter().zip(&table).all(same),
        "SET_MEM_TABLE in postcopy is not answered with the regions and where they are mapped"
    );
    session.done(&Msg::u64(Code::SetMemTable, 0))?;
    Ok((session, Faults { server, regions }))
}

impl Faults {
    /// The page of the next fault, for the back-end and for the guest; none within the wait.
    fn next(&self, time: std::time::Duration) -> Outcome<Option<(u64, u64)>> {
        if !wait(self.server.as_fd(), PollFlags::IN, time) {
            return Ok(None);
        }
        let fault = self.server.next_fault();
        let Some(there) = fault.map_err(|error| Finding::own("read a page fault", error))? else {
            return Ok(None);
        };
        let inside = |one: &&MemRegion| there.wrapping_sub(one.user_addr) < one.size;
        let Some(region) = self.regions.iter().find(inside) else {
            return Err(Finding::breaks(format!(
                "a page fault at {there:#x}, where no region of its answer to SET_MEM_TABLE lies"
            )));
        };
        Ok(Some((
            there & !(PAGE - 1),
            (there - region.user_addr + region.guest_addr) & !(PAGE - 1),
        )))
    }
}

/// The usual read, laid out without a touch of its data page.
fn lay_out(disk: &mut Disk) -> Outcome {
    disk.header(IN, 0)?;
    disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
    disk.ring.list(0)?;
    disk.ring.publish()
}

/// The messages in their order, with memory that is all there.
pub(crate) fn order(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let memory = memory()?;
    let zeros = vec![0; usize::try_from(MEMORY).unwrap_or(0)];
    memory.view().write(BASE, &zeros).map_err(|error| Finding::own("fill memory", error))?;
    let (session, faults) = incoming(case, &memory)?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    let limit = session.wire.limit;
    let mut disk = Disk { session, memory, ring, limit, capacity };
    disk.ring.run(&mut disk.session)?;
    disk.serves("in postcopy")?;
    disk.session.done(&Msg::bare(Code::PostcopyEnd))?;
    drop(faults);
    disk.serves("after postcopy")
}

/// A page that has not come is waited for.
pub(crate) fn fault(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let memory = memory()?;
    let (mut session, faults) = incoming(case, &memory)?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    ring.run(&mut session)?;
    let limit = session.wire.limit;
    let mut disk = Disk { session, memory, ring, limit, capacity };
    lay_out(&mut disk)?;
    disk.ring.kick()?;
    let (mut came, until) = (false, Instant::now() + limit);
    loop {
        if let Some((there, guest)) = faults.next(case.quiet / 10)? {
            let early = disk.ring.used_index()? != 0;
            ensure!(!early, "a request is finished before a page of it has come");
            came |= guest == DATA;
            disk.ring.write(guest, &[0; 4096])?;
            faults
                .server
                .wake(there, PAGE)
                .map_err(|error| Finding::own("wake who waits for a page", error))?;
        }
        if disk.ring.used_index()? != 0 || Instant::now() > until {
            break;
        }
    }
    let done = disk.finish(0)?;
    let done =
        done.ok_or_else(|| Finding::hangs("a request whose pages have come is never finished"))?;
    ensure!(done.status == 0, "a read in postcopy fails with {}", done.status);
    ensure!(came, "it wrote to a page that had not come, without a page fault");
    Ok(())
}
