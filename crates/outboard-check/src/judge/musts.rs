//! What the vhost-user specification demands of a back-end with the word *must*, and the checks that look at it.
//!
//! Sentences about front-ends and about managers are left out. Invariant: a demand has at least one check, or
//! says why the judge cannot see it from outside; a test holds that, and that every check named here exists.

use serde::Serialize;

/// One demand.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Must {
    /// The section of the specification.
    pub section: &'static str,
    /// What the back-end must do.
    pub demand: &'static str,
    /// The checks that look at it.
    pub checks: &'static [&'static str],
    /// Why there is none.
    pub unseen: &'static str,
}

/// Turns rows `section demand [checks];` and `section demand unseen why;` into the list.
macro_rules! musts {
    (@checks [$($check:literal)*]) => { &[$($check),*] };
    ($($section:literal $demand:literal $([$($check:literal)*])? $(unseen $why:literal)?;)*) => {
        const MUSTS: &[Must] = &[$(Must {
            section: $section,
            demand: $demand,
            checks: &[$($($check),*)?],
            unseen: concat!($($why)?),
        },)*];
    };
}

musts! {
    "Header" "every reply has the flags of a reply and version 1" ["reply-flags"];
    "Communication" "requests are carried out in order" ["in-order" "barrier" "in-pieces"];
    "Memory regions" "memory of bit 8 (Xen) is mapped only when needed"
        unseen "Xen mappings need a Xen host";
    "Ring states" "a stopped ring is not processed at all, enabled or not"
        ["silent-when-stopped" "silent-before-start" "stopped-at-disconnect" "drains"];
    "Ring states" "a ring that is started and disabled has no side effects"
        ["enable-gates" "disable-gates" "bit-30-keeps-disabled"];
    "Ring states" "a disabled network device discards what is sent and delivers nothing"
        unseen "the judge knows requests of block devices only";
    "Ring states" "a ring that is started and enabled is processed"
        ["served" "start-looks" "enable-looks" "kick-before-enable" "enable-before-kick" "batch"];
    "Ring states" "a ring starts at SET_VRING_KICK, with a descriptor or without"
        ["restarted-by-kick" "kick-polled" "early-kick" "late-memory" "any-order"];
    "Ring states" "a ring stops at GET_VRING_BASE, and its base is answered"
        ["base-returned" "base-counts" "base-round-trip" "base-wraps" "stop-twice" "ring-reset"];
    "Ring states" "without bit 30 in SET_FEATURES all rings are enabled at once"
        ["without-bit-30" "order-old-qemu"];
    "Ring states" "with bit 30 the rings stay as they were" ["bit-30-keeps-enabled" "bit-30-keeps-disabled"];
    "Ring states" "call descriptors may change while a ring runs" ["call-swapped" "call-taken-away" "call-late"];
    "Ring states" "kick descriptors may change while a ring runs" ["kick-swapped"];
    "Ring states" "memory may change while a ring runs"
        ["table-again" "table-grows" "table-moves" "table-without-ring" "slots-under-load"];
    "Ring states" "LOG_ALL may be switched while a ring runs" ["log-toggle" "log-marks" "log-switched-off" "log-swapped"];
    "Suspended device state" "no guest memory is written" ["drains" "silent-when-stopped"];
    "Suspended device state" "no notification is sent to the guest" ["silent-when-stopped"];
    "Suspended device state" "no message is sent to the front-end" ["suspended-channel"];
    "Suspended device state" "messages of the front-end are answered" ["stop-twice" "any-order"];
    "Multiple queue support" "the number of queues is answered, and every queue works"
        ["queue-count" "many-rings" "rings-independent"];
    "Migration" "writes are marked in the log, the used ring's at its own address" ["log-marks" "log-every-page" "log-indirect" "log-used-ring"];
    "Migration" "the log is large enough for what is marked in it"
        ["log-short" "log-ring-outside" "log-impossible"];
    "Migration" "pages that have not come yet are not touched in postcopy" ["postcopy-fault"];
    "Migrating back-end state" "the writing end writes all of the state and closes its end" ["state-saved"];
    "Migrating back-end state" "the reading end reads to the end" ["state-loaded" "state-noise" "state-foreign"];
    "Migrating back-end state" "the state is taken up so that the driver goes on" ["state-loaded" "state-restored" "state-twice"];
    "GET_PROTOCOL_FEATURES" "supported before SET_FEATURES"
        ["protocol-features-answered" "features-before-owner"];
    "SET_PROTOCOL_FEATURES" "supported before SET_FEATURES" ["owner-late" "order-qemu"];
    "Protocol features: INBAND_NOTIFICATIONS" "refused without BACKEND_REQ and REPLY_ACK" ["inband-alone"];
    "SET_FEATURES" "features that were not offered are not taken" ["features-unoffered" "features-absurd"];
    "SET_VRING_ADDR" "addresses lie in the memory of SET_MEM_TABLE"
        ["ring-outside" "ring-wraps" "ring-over-end"];
    "NET_SET_MTU" "answered with 0 when it is valid, with something else when not" ["mtu"];
    "REPLY_ACK" "a message that asks for it is answered with 0 or an error"
        ["ack-when-asked" "ack-only-when-asked" "ack-not-before-agreed" "own-reply-once" "unknown-refused"];
    "IOTLB_MSG" "answered with 0 for success" ["iotlb-answered" "iotlb-impossible"];
    "IOTLB_MSG" "misses and access failures are sent over the back-end channel"
        ["iotlb-misses" "iotlb-invalidated" "iotlb-access-failure"];
    "IOTLB_MSG" "memory is reached as the entries of the moment permit"
        ["iotlb-translated" "iotlb-permission" "iotlb-invalidation-waits" "iotlb-ring-follows"];
    "GET_CONFIG" "the answer is as long as the request" ["config-answered" "config-head" "config-past-end"];
    "SET_CONFIG" "read-only fields are not written without the migration flag" ["config-read-only"];
    "CREATE_CRYPTO_SESSION" "answered with an id, negative for a failure" ["crypto-session"];
    "POSTCOPY_ADVISE" "a userfaultfd is opened and sent" ["postcopy"];
    "POSTCOPY_LISTEN" "memory that comes afterwards is registered"
        ["postcopy-unadvised" "postcopy-order" "postcopy-fault"];
    "POSTCOPY_END" "the userfaultfd is closed" ["postcopy-often"];
    "ADD_MEM_REG" "the region is mapped" ["slot-added-removed" "slots-serve" "slots-all"];
    "REM_MEM_REG" "the region is unmapped" ["slot-unknown" "slot-of-the-ring" "leak-slots"];
    "REM_MEM_REG" "a descriptor that comes along is closed" ["slot-removed-with-fd"];
    "SET_DEVICE_STATE_FD" "bit 8 says whether a descriptor comes back" ["state-saved"];
    "SET_DEVICE_STATE_FD" "not an error and a descriptor at once" ["state-impossible"];
    "CHECK_DEVICE_STATE" "0 for success, anything else for a failure"
        ["state-saved" "state-without-transfer" "state-noise"];
    "GET_INFLIGHT_FD" "a region that is as large as it says" ["inflight-given" "inflight-impossible"];
    "Inflight I/O tracking" "the region is kept while requests come and go"
        ["inflight-described" "inflight-cleared" "inflight-counted" "inflight-listed"];
    "Inflight I/O tracking" "what was in flight is served again, in the order of the counters"
        ["inflight-resubmitted" "inflight-order" "inflight-last-batch" "inflight-killed"];
    "GET_SHMEM_CONFIG" "the regions are counted" ["shmem-config"];
    "Back-end program conventions" "the program does not daemonize itself"
        unseen "a command that ends before it listens cannot be judged: exit code 2";
    "Back-end program conventions" "the program ends at SIGTERM" ["sigterm"];
}

/// Every demand, in the order of the specification.
#[must_use]
pub const fn musts() -> &'static [Must] {
    MUSTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::checks;

    #[test]
    fn every_demand_has_a_check_or_a_reason_and_every_check_exists() {
        for must in musts() {
            assert_eq!(must.checks.is_empty(), !must.unseen.is_empty(), "{}", must.demand);
            for id in must.checks {
                assert!(checks().any(|check| check.id == *id), "there is no check {id}");
            }
        }
    }
}
