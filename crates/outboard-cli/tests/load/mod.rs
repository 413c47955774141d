//! Checked load on a disk for as long as something else is done to the program that serves it.

use std::path::Path;
use std::time::Duration;

use outboard_check::bench::{BenchError, Driving, Live, Load, Setup, Target, Workload};

/// Does `body` under load on the disk at `socket`, of which every byte is checked.
pub(crate) fn under_load<T>(socket: &Path, body: impl FnOnce(&Live) -> T) -> T {
    let timeout = Duration::from_secs(60);
    let setup =
        Setup { queues: 1, depth: 8, block_size: 4096, indirect: false, packed: false, timeout };
    let mut target = Target::open(socket, setup).expect("a disk");
    let load = Load {
        workload: Workload { random: true, read_percent: 50 },
        depth: setup.depth,
        driving: Driving::Sleep,
        verify: true,
        ..Load::default()
    };
    let done = target.during(&load, &[], |_, live| Ok::<_, BenchError>(body(live)));
    done.expect("the load found no error").1
}
