//! The work that is compared, and the least ratio that is wanted of each.

/// A kind of image, who serves it beside us, and the work on it.
pub(super) struct Scene {
    pub(super) name: &'static str,
    /// No image: nothing is moved.
    pub(super) null: bool,
    /// Where the image lies.
    pub(super) in_memory: bool,
    /// Our options.
    pub(super) ours: &'static [&'static str],
    /// cache.direct of qemu-storage-daemon.
    pub(super) peer_direct: &'static str,
    pub(super) peers: &'static [&'static str],
    pub(super) rows: &'static [Row],
}

const fn packed(depth: u16, how: &'static [&'static str]) -> Row {
    let floors: &[_] = &[("split", 0.0)];
    Row { load: "randread", block: "4k", depth, queues: 1, sleeps: false, how, floors }
}

/// One load.
pub(super) struct Row {
    pub(super) load: &'static str,
    pub(super) block: &'static str,
    pub(super) depth: u16,
    pub(super) queues: u16,
    pub(super) sleeps: bool,
    /// Further options of `outboard bench`.
    pub(super) how: &'static [&'static str],
    /// The floor beside each peer; 0 is none, it is shown only.
    floors: &'static [(&'static str, f64)],
}

impl Row {
    /// The least ratio beside this peer; None: it is not compared with it.
    pub(super) fn floor(&self, peer: &str) -> Option<f64> {
        self.floors.iter().find(|(name, _)| *name == peer).map(|(_, floor)| *floor)
    }

    /// In words.
    pub(super) fn title(&self) -> String {
        let driver = if self.sleeps { ", driver sleeps" } else { "" };
        let queues = if self.queues == 1 { "" } else { ", two queues" };
        let how = match self.how {
            ["--packed=a", "--indirect"] => ", indirect",
            _ => "",
        };
        format!("{} {}, depth {}{queues}{how}{driver}", self.load, self.block, self.depth)
    }
}

const fn row(
    load: &'static str,
    depth: u16,
    sleeps: bool,
    floors: &'static [(&'static str, f64)],
) -> Row {
    Row { load, block: "4k", depth, queues: 1, sleeps, how: &[], floors }
}

pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "no work at all (null)",
        null: true,
        in_memory: true,
        ours: &[],
        peer_direct: "off",
        peers: &["storage-daemon", "framework", "framework-spin"],
        rows: &[
            row("randread", 1, false, &[("storage-daemon", 4.0), ("framework-spin", 0.0)]),
            row(
                "randread",
                32,
                false,
                &[("storage-daemon", 4.0), ("framework", 1.5), ("framework-spin", 0.0)],
            ),
        ],
    },
    Scene {
        name: "file in /dev/shm",
        null: false,
        in_memory: true,
        ours: &[],
        peer_direct: "on",
        peers: &["storage-daemon", "framework-spin"],
        rows: &[
            row("randread", 1, false, &[("storage-daemon", 5.0), ("framework-spin", 0.0)]),
            row("randread", 32, false, &[("storage-daemon", 4.0), ("framework-spin", 0.0)]),
            row("randread", 128, false, &[("storage-daemon", 5.0), ("framework-spin", 0.0)]),
            row("randwrite", 32, false, &[("storage-daemon", 5.0), ("framework-spin", 0.0)]),
            Row {
                load: "read",
                block: "128k",
                depth: 8,
                queues: 1,
                sleeps: false,
                how: &[],
                floors: &[("storage-daemon", 3.0), ("framework-spin", 0.0)],
            },
            row("randread", 1, true, &[("storage-daemon", 2.5), ("framework-spin", 0.0)]),
            row("randread", 32, true, &[("storage-daemon", 3.0), ("framework-spin", 0.0)]),
        ],
    },
    Scene {
        name: "file on a disk, O_DIRECT",
        null: false,
        in_memory: false,
        ours: &["--direct"],
        peer_direct: "on",
        peers: &["storage-daemon"],
        rows: &[
            row("randread", 1, false, &[("storage-daemon", 0.97)]),
            row("randread", 32, false, &[("storage-daemon", 0.97)]),
            row("randread", 128, false, &[("storage-daemon", 0.97)]),
            row("randwrite", 32, false, &[("storage-daemon", 0.0)]),
        ],
    },
    Scene {
        name: "file on a disk, warm page cache",
        null: false,
        in_memory: false,
        ours: &[],
        peer_direct: "off",
        peers: &["storage-daemon"],
        rows: &[
            row("randread", 1, false, &[("storage-daemon", 1.5)]),
            row("randread", 32, false, &[("storage-daemon", 2.0)]),
            row("randwrite", 32, false, &[("storage-daemon", 0.0)]),
        ],
    },
    Scene {
        name: "two workers beside one (null)",
        null: true,
        in_memory: true,
        ours: &["--num-queues", "2", "--workers", "2"],
        peer_direct: "off",
        peers: &["one-worker"],
        rows: &[Row {
            load: "randread",
            block: "4k",
            depth: 32,
            queues: 2,
            sleeps: false,
            how: &[],
            floors: &[("one-worker", 0.0)],
        }],
    },
    Scene {
        name: "our packed rings beside our split ones (null)",
        null: true,
        in_memory: true,
        ours: &[],
        peer_direct: "off",
        peers: &["split"],
        rows: &[
            packed(1, &["--packed=a"]),
            packed(32, &["--packed=a"]),
            packed(32, &["--packed=a", "--indirect"]),
        ],
    },
];
