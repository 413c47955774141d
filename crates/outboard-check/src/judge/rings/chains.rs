//! Descriptor tables and ring indices that break the rules (hostile cases B1 to B15 and B25 to B38).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{broken, recover, start, survived};
use crate::judge::case::Case;
use crate::judge::disk::{BASE, DATA, Disk, HEADER, MEMORY, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::ring::{Desc, NEXT, WRITE, signalled};
use crate::judge::semantics::stopping::second;

pub(crate) fn own_next(case: &mut Case<'_>) -> Outcome {
    broken(case, |disk| {
        disk.ring.set(0, Desc::new(HEADER, 16, NEXT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn whole_loop(case: &mut Case<'_>) -> Outcome {
    broken(case, |disk| {
        for at in 0..16 {
            disk.ring.set(at, Desc::new(HEADER, 16, NEXT, (at + 1) % 16))?;
        }
        disk.ring.offer(0)
    })
}

pub(crate) fn writable_loop(case: &mut Case<'_>) -> Outcome {
    broken(case, |disk| {
        disk.ring.set(0, Desc::new(HEADER, 16, NEXT, 1))?;
        disk.ring.set(1, Desc::new(DATA, 512, NEXT | WRITE, 1))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn next_outside(case: &mut Case<'_>) -> Outcome {
    for next in [16, 17, 0xffff] {
        broken(case, |disk| {
            disk.ring.set(0, Desc::new(HEADER, 16, NEXT, next))?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn head_outside(case: &mut Case<'_>) -> Outcome {
    for head in [16, 17, 0x8000, 0xffff] {
        broken(case, |disk| disk.ring.offer(head))?;
    }
    Ok(())
}

pub(crate) fn index_ahead(case: &mut Case<'_>) -> Outcome {
    for ahead in [17, 100, 0x7fff] {
        survived(case, 0, |disk| {
            disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.next_avail = disk.ring.next_avail.wrapping_add(ahead);
            disk.ring.publish()?;
            disk.ring.kick()
        })?;
    }
    Ok(())
}

pub(crate) fn index_back(case: &mut Case<'_>) -> Outcome {
    survived(case, 0, |disk| {
        disk.ring.next_avail = disk.ring.next_avail.wrapping_sub(1);
        disk.ring.publish()?;
        disk.ring.kick()
    })
}

pub(crate) fn head_twice(case: &mut Case<'_>) -> Outcome {
    survived(case, 0, |disk| {
        disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
        for _ in 0..8 {
            disk.ring.list(0)?;
        }
        disk.ring.publish()?;
        disk.ring.kick()
    })
}

pub(crate) fn head_in_the_middle(case: &mut Case<'_>) -> Outcome {
    survived(case, 0, |disk| {
        disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
        disk.ring.list(0)?;
        disk.ring.list(1)?;
        disk.ring.publish()?;
        disk.ring.kick()
    })
}

/// Addresses that are in no region, or not wholly.
const OUTSIDE: [(u64, u32); 5] = [
    (0, 512),
    (BASE - 256, 512),
    (BASE + MEMORY - 256, 512),
    (u64::MAX - 255, 512),
    (0x7fff_ffff_f000, 512),
];

pub(crate) fn header_outside(case: &mut Case<'_>) -> Outcome {
    for at in [0, BASE - 8, BASE + MEMORY - 8, u64::MAX - 7, u64::MAX] {
        broken(case, |disk| {
            disk.ring.chain(0, &[(at, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn data_outside(case: &mut Case<'_>) -> Outcome {
    for (at, len) in OUTSIDE {
        broken(case, |disk| {
            disk.ring.chain(0, &[(HEADER, 16, 0), (at, len, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn status_outside(case: &mut Case<'_>) -> Outcome {
    for at in [0, BASE - 1, BASE + MEMORY, u64::MAX] {
        broken(case, |disk| {
            disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (at, 1, WRITE)])?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn endless_data(case: &mut Case<'_>) -> Outcome {
    for len in [u32::MAX, 0x8000_0000, 0x7fff_fe00] {
        broken(case, |disk| {
            disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn data_is_the_ring(case: &mut Case<'_>) -> Outcome {
    for part in [BASE, BASE + 0x1000, BASE + 0x2000] {
        survived(case, 0, |disk| {
            disk.ring.chain(0, &[(HEADER, 16, 0), (part, 512, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn aliased(case: &mut Case<'_>) -> Outcome {
    survived(case, 0, |disk| {
        let mut parts = vec![(HEADER, 16, 0)];
        parts.extend([(DATA, 0x10000, WRITE); 14]);
        parts.push((STATUS, 1, WRITE));
        disk.ring.chain(0, &parts)?;
        disk.ring.offer(0)
    })
}

pub(crate) fn empty_parts(case: &mut Case<'_>) -> Outcome {
    let good = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    for at in 0..4 {
        survived(case, 0, |disk| {
            let mut parts = good.to_vec();
            let flags = if at == 0 { 0 } else { WRITE };
            parts.insert(at, (DATA, 0, flags));
            disk.ring.chain(0, &parts)?;
            disk.ring.offer(0)
        })?;
    }
    survived(case, 0, |disk| {
        disk.ring.chain(0, &[(HEADER, 0, 0), (DATA, 0, WRITE), (STATUS, 0, WRITE)])?;
        disk.ring.offer(0)
    })
}

pub(crate) fn writable_first(case: &mut Case<'_>) -> Outcome {
    survived(case, 0, |disk| {
        disk.ring.chain(0, &[(STATUS, 1, WRITE), (DATA, 512, WRITE), (HEADER, 16, 0)])?;
        disk.ring.offer(0)
    })
}

pub(crate) fn flipped(case: &mut Case<'_>) -> Outcome {
    let (rounds, quiet) = (if case.quick { 20 } else { 1000 }, case.quiet);
    let mut disk = start(case, 0)?;
    let over = AtomicBool::new(false);
    let memory = disk.memory.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let view = memory.view();
            let good = Desc::new(DATA, 512, NEXT | WRITE, 2).bytes();
            let bad = Desc::new(u64::MAX - 3, u32::MAX, WRITE | NEXT, 0xffff).bytes();
            while !over.load(Ordering::Relaxed) {
                // The page is there for as long as the judge holds the memory.
                let _ = view.write(BASE + 16, &bad);
                let _ = view.write(BASE + 16, &good);
            }
        });
        // It may end the connection over such a ring; what counts is how it is afterwards.
        let _ = (0..rounds).try_for_each(|_| flipped_once(&mut disk, quiet));
        over.store(true, Ordering::Relaxed);
    });
    recover(case, disk)
}

/// One request whose data descriptor changes all the time: served, failed, or the end of the ring.
fn flipped_once(disk: &mut Disk, quiet: Duration) -> Outcome {
    disk.header(crate::judge::disk::IN, 0)?;
    disk.ring.set(0, Desc::new(HEADER, 16, NEXT, 1))?;
    disk.ring.set(2, Desc::new(STATUS, 1, WRITE, 0))?;
    disk.ring.offer(0)?;
    let until = Instant::now() + quiet;
    while disk.ring.next_used(Duration::from_millis(1))?.is_none() {
        if signalled(&disk.ring.err, Duration::ZERO) || Instant::now() > until {
            disk.stop()?;
            disk.ring.clear()?;
            return disk.ring.run(&mut disk.session);
        }
    }
    Ok(())
}

pub(crate) fn used_rewritten(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    disk.ring.store(disk.ring.used + 2, 1000)?;
    disk.header(crate::judge::disk::IN, 0)?;
    disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
    disk.ring.offer(0)?;
    let until = Instant::now() + disk.limit;
    while disk.ring.used_index()? == 1000 {
        if Instant::now() > until {
            return Err(Finding::hangs("a guest that writes to the used ring stops the device"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let used = disk.ring.used_index()?;
    ensure!(used == 2, "it reads its own used index back from the guest: {used} instead of 2");
    Ok(())
}

pub(crate) fn odd_avail_flags(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    disk.ring.store(disk.ring.avail, 0xfffe)?;
    for _ in 0..3 {
        disk.serves("with reserved flags in the available ring")?;
    }
    Ok(())
}

pub(crate) fn huge_kick(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    rustix::io::write(&disk.ring.kick, &(u64::MAX - 1).to_ne_bytes())
        .map_err(|errno| Finding::own("kick", errno))?;
    disk.serves("after a kick of 2^64-2")?;
    case.rests("after a kick of 2^64-2")
}

pub(crate) fn kick_storm(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    for _ in 0..20_000 {
        disk.ring.kick()?;
    }
    disk.serves("after 20000 kicks")?;
    case.rests("after 20000 kicks")
}

pub(crate) fn revives(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    disk.ring.offer(0xffff)?;
    std::thread::sleep(case.quiet / 4);
    disk.session.alive()?;
    disk.revive()
}

pub(crate) fn others_live(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    let mut other = second(case, &mut disk)?;
    other.offer(0xffff)?;
    std::thread::sleep(case.quiet / 4);
    for _ in 0..10 {
        disk.serves("while another ring is broken")?;
    }
    Ok(())
}
