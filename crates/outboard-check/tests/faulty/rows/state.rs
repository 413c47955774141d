//! Faults of what outlives a process or moves to another one, and of addresses that are translated; and the
//! checks that they break.

use crate::table::Row;

pub(crate) const STATE: &[Row] = &[
    ("inflight-by-head", &["inflight-order"]),
    ("inflight-clears-late", &["inflight-killed"]),
    ("inflight-counts-nothing", &["inflight-counted"]),
    ("inflight-ignores-last-batch", &["inflight-last-batch"]),
    ("inflight-leaves-marks", &["inflight-cleared"]),
    ("inflight-lists-nothing", &["inflight-listed"]),
    ("inflight-loses-the-oldest", &["inflight-resubmitted"]),
    ("inflight-without-version", &["inflight-described"]),
    ("iotlb-answers-too-early", &["iotlb-invalidation-waits"]),
    ("iotlb-asks-nobody", &["iotlb-misses"]),
    ("iotlb-fails-silently", &["iotlb-access-failure"]),
    ("iotlb-keeps-entries", &["iotlb-translated"]),
    ("iotlb-keeps-invalidated", &["iotlb-invalidated"]),
    ("iotlb-ring-stays", &["iotlb-ring-follows"]),
    ("iotlb-writes-and-tells", &["iotlb-permission"]),
    ("keeps-old-log", &["log-swapped"]),
    ("marks-after-off", &["log-switched-off"]),
    ("marks-first-pages", &["log-every-page"]),
    ("marks-no-tables", &["log-indirect"]),
    ("marks-used-ring-in-place", &["log-used-ring"]),
    ("postcopy-forgets-memory", &["postcopy-order"]),
    ("postcopy-registers-nothing", &["postcopy-fault"]),
    ("saves-once", &["state-twice"]),
    ("skip-drain-loses", &["skip-drain-kept"]),
    ("skip-drain-off-by-one", &["skip-drain-stops"]),
    ("state-loads-into-running", &["state-into-running"]),
    ("state-of-this-process", &["state-restored"]),
];
