//! Each row of the message table and the tests that show its effect ([protocol], Shows): a row
//! that is added without a test, or a test that goes, is found here.
//!
//! The tests drive `examples/everything.rs` (`everything`) or the echo device of `common` with our
//! own front-end; GPU_MAP and EXTERNAL_MAP stand in crosvm's layout as it was recorded, crosvm
//! itself was not run. A row that is open must not be offered.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[expect(dead_code, reason = "the example's main")]
#[path = "../examples/everything.rs"]
mod example;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use outboard::protocol::table::{Side, table};
use outboard_frontend::Connection;

/// What shows a row's effect.
enum Shown {
    /// `file::test`, each.
    By(&'static [&'static str]),
    /// Nothing yet: what it comes with.
    Open(&'static str),
}

use Shown::{By, Open};

const OFFERED: &str = "everything::what_is_offered_is_there_and_what_is_not_is_refused";
const OBJECTS: &str = "everything::shared_objects_are_exported_asked_for_and_looked_up";
const STATUS: &str = "everything::the_status_byte_is_kept_and_a_broken_ring_needs_a_reset";
const STOPPED: &str = "everything::a_ring_is_disabled_by_reset_owner_and_stopped_with_its_base";
const SLOTS: &str = "everything::a_memory_slot_is_added_used_and_removed";
const CONFIG: &str = "everything::a_changed_configuration_is_announced_and_read_again";
const MAPPED: &str = "everything::mapped_bytes_are_read_back_in_each_of_several_regions";
const CRYPTO: &str = "everything::crypto_sessions_are_opened_and_closed";
const POSTCOPY: &str =
    "postcopy::c18_a_request_waits_for_the_page_it_touches_and_finds_its_contents";
const SWAPPED: &str = "rings::a57_call_and_kick_are_replaced_while_the_ring_runs";
const STATE: &str =
    "state::d19_a_state_goes_from_one_device_to_another_and_says_what_was_negotiated";
const RARP_MTU: &str = "everything::the_rarp_address_and_the_mtu_reach_the_device";

/// Requests of the front-end, in the order of the table.
const FRONT_END: &[(&str, Shown)] = &[
    ("GET_FEATURES", By(&[OFFERED])),
    ("SET_FEATURES", By(&[OFFERED])),
    ("SET_OWNER", By(&[OFFERED])),
    ("RESET_OWNER", By(&[STOPPED])),
    (
        "SET_MEM_TABLE",
        By(&["memory::a38_the_table_is_replaced_500_times_under_load_and_no_request_is_lost"]),
    ),
    ("SET_LOG_BASE", By(&["log::a_running_ring_notes_its_writes_between_two_acknowledgements"])),
    (
        "SET_LOG_FD",
        By(&["log::the_log_descriptor_is_signalled_after_writes_were_noted_and_not_before"]),
    ),
    ("SET_VRING_NUM", By(&[STOPPED])),
    ("SET_VRING_ADDR", By(&[STOPPED, "everything::ring_addresses_may_be_guest_physical"])),
    ("SET_VRING_BASE", By(&[STOPPED])),
    ("GET_VRING_BASE", By(&[STOPPED])),
    ("SET_VRING_KICK", By(&[SWAPPED])),
    ("SET_VRING_CALL", By(&[SWAPPED])),
    ("SET_VRING_ERR", By(&[STOPPED])),
    ("GET_PROTOCOL_FEATURES", By(&[OFFERED])),
    ("SET_PROTOCOL_FEATURES", By(&[OFFERED])),
    ("GET_QUEUE_NUM", By(&[OFFERED])),
    ("SET_VRING_ENABLE", By(&[STOPPED, "rings::a_kick_before_enable_is_not_lost"])),
    ("SEND_RARP", By(&[RARP_MTU])),
    ("NET_SET_MTU", By(&[RARP_MTU])),
    (
        "SET_BACKEND_REQ_FD",
        By(&["everything::d31_a_config_change_goes_to_the_channel_of_that_moment"]),
    ),
    (
        "IOTLB_MSG",
        By(&[
            "iotlb::an_invalidation_waits_for_the_request_that_the_device_holds_back",
            "iotlb_everything::a_vmm_keeps_its_guest_behind_an_iommu",
        ]),
    ),
    ("SET_VRING_ENDIAN", By(&[OFFERED])),
    ("GET_CONFIG", By(&[CONFIG])),
    ("SET_CONFIG", By(&["everything::the_configuration_is_written_where_the_device_lets_it_be"])),
    ("CREATE_CRYPTO_SESSION", By(&[CRYPTO])),
    ("CLOSE_CRYPTO_SESSION", By(&[CRYPTO])),
    ("POSTCOPY_ADVISE", By(&[POSTCOPY])),
    ("POSTCOPY_LISTEN", By(&[POSTCOPY])),
    ("POSTCOPY_END", By(&[POSTCOPY])),
    (
        "GET_INFLIGHT_FD",
        By(&["inflight::a_region_is_made_of_zeros_and_its_length_cannot_be_changed"]),
    ),
    (
        "SET_INFLIGHT_FD",
        By(&["inflight::c7_what_was_in_flight_is_served_first_in_its_order_and_each_once"]),
    ),
    ("GPU_SET_SOCKET", By(&["everything::the_display_socket_reaches_the_device"])),
    ("RESET_DEVICE", By(&["everything::a_reset_forgets_mappings_and_serves_again"])),
    ("VRING_KICK", By(&["everything::rings_are_kicked_and_call_by_messages"])),
    ("GET_MAX_MEM_SLOTS", By(&[OFFERED])),
    ("ADD_MEM_REG", By(&[SLOTS])),
    ("REM_MEM_REG", By(&[SLOTS])),
    ("SET_STATUS", By(&[STATUS])),
    ("GET_STATUS", By(&[STATUS])),
    ("GET_SHARED_OBJECT", By(&[OBJECTS])),
    ("SET_DEVICE_STATE_FD", By(&[STATE])),
    ("CHECK_DEVICE_STATE", By(&[STATE])),
    ("GET_SHMEM_CONFIG", By(&[MAPPED])),
    ("GET_VRING_BASE_SKIP_DRAIN", Open("the in-flight region")),
];

/// Requests of the back-end.
const BACK_END: &[(&str, Shown)] = &[
    (
        "IOTLB_MSG",
        By(&[
            "iotlb::a_ring_asks_for_its_parts_and_for_each_buffer_and_serves",
            "iotlb::a_read_only_page_is_not_written_and_the_failure_is_reported",
        ]),
    ),
    ("CONFIG_CHANGE_MSG", By(&[CONFIG])),
    ("VRING_HOST_NOTIFIER_MSG", By(&["everything::a_host_notifier_reaches_the_front_end"])),
    ("VRING_CALL", By(&["everything::rings_are_kicked_and_call_by_messages"])),
    ("VRING_ERR", By(&["everything::a_broken_ring_is_told_by_message_where_no_descriptor_is"])),
    ("SHARED_OBJECT_ADD", By(&[OBJECTS])),
    ("SHARED_OBJECT_REMOVE", By(&["everything::a_shared_object_is_taken_back"])),
    ("SHARED_OBJECT_LOOKUP", By(&[OBJECTS])),
    ("SHMEM_MAP", By(&[MAPPED])),
    ("SHMEM_UNMAP", By(&[MAPPED])),
    ("GPU_MAP", By(&["everything::a_gpu_allocation_is_mapped_and_told_as_crosvm_lays_it_out"])),
    (
        "EXTERNAL_MAP",
        By(&["everything::memory_of_the_same_process_is_mapped_and_of_another_one_never"]),
    ),
];

const SOURCES: &[(&str, &str)] = &[
    ("everything", include_str!("everything.rs")),
    ("inflight", include_str!("inflight.rs")),
    ("log", include_str!("log.rs")),
    ("memory", include_str!("memory.rs")),
    ("postcopy", include_str!("postcopy.rs")),
    ("iotlb", include_str!("iotlb/main.rs")),
    ("iotlb_everything", include_str!("iotlb/everything.rs")),
    ("rings", include_str!("rings.rs")),
    ("state", include_str!("state.rs")),
];

/// Whether there is a test of this name.
fn is_there(test: &str) -> bool {
    let (file, name) = test.split_once("::").unwrap();
    let (_, text) = SOURCES.iter().find(|(other, _)| *other == file).unwrap();
    let head = format!("#[test]\nfn {name}() {{");
    text.contains(&head)
}

#[test]
fn every_row_of_the_message_table_has_a_test_of_its_effect() {
    let ours = FRONT_END.iter().map(|row| (Side::FrontEnd, row));
    let theirs = BACK_END.iter().map(|row| (Side::BackEnd, row));
    let mut listed = ours.chain(theirs);
    for row in table() {
        let (side, (name, shown)) = listed.next().expect("a row that is not listed");
        assert_eq!((side, *name), (row.side, row.name), "rows stand in the table's order");
        if let By(tests) = shown {
            assert!(!tests.is_empty() && tests.iter().all(|test| is_there(test)), "{name}");
        }
    }
    assert!(listed.next().is_none(), "a row that the table has not");
}

#[test]
fn what_is_open_is_not_offered() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = outboard::Server::from_socket(theirs.into()).unwrap();
    std::thread::spawn(|| server.serve(example::device().unwrap()));
    let mut front = Connection::from_fd(ours.into(), Duration::from_secs(10)).unwrap();
    let features = front.get_features().unwrap();
    let protocol = front.get_protocol_features().unwrap();
    let rows = FRONT_END.iter().chain(BACK_END);
    for ((name, shown), row) in rows.zip(table()) {
        let Open(with) = shown else { continue };
        let needs = row.needs;
        let bits = needs.offered | needs.acked;
        let offered = protocol.contains(needs.protocol) && features & bits == bits;
        assert!(!offered, "{name} is offered: say which test shows it ({with})");
    }
}
