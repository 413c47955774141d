//! Each row of the message table and the tests that show its effect ([protocol], Shows): a row
//! that is added without a test, or a test that goes, is found here.
//!
//! The tests drive `examples/everything.rs` (`everything`) or the echo device of `common` with our
//! own front-end; GPU_MAP and EXTERNAL_MAP stand in crosvm's layout as it was recorded, crosvm
//! itself was not run.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use outboard::protocol::table::{Side, table};

/// A message, and the tests that show its effect, each `file::test`.
type Row = (&'static str, &'static [&'static str]);

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
const FRONT_END: &[Row] = &[
    ("GET_FEATURES", &[OFFERED]),
    ("SET_FEATURES", &[OFFERED]),
    ("SET_OWNER", &[OFFERED]),
    ("RESET_OWNER", &[STOPPED]),
    (
        "SET_MEM_TABLE",
        &["memory::a38_the_table_is_replaced_500_times_under_load_and_no_request_is_lost"],
    ),
    ("SET_LOG_BASE", &["log::a_running_ring_notes_its_writes_between_two_acknowledgements"]),
    (
        "SET_LOG_FD",
        &["log::the_log_descriptor_is_signalled_after_writes_were_noted_and_not_before"],
    ),
    ("SET_VRING_NUM", &[STOPPED]),
    ("SET_VRING_ADDR", &[STOPPED, "everything::ring_addresses_may_be_guest_physical"]),
    ("SET_VRING_BASE", &[STOPPED]),
    ("GET_VRING_BASE", &[STOPPED]),
    ("SET_VRING_KICK", &[SWAPPED]),
    ("SET_VRING_CALL", &[SWAPPED]),
    ("SET_VRING_ERR", &[STOPPED]),
    ("GET_PROTOCOL_FEATURES", &[OFFERED]),
    ("SET_PROTOCOL_FEATURES", &[OFFERED]),
    ("GET_QUEUE_NUM", &[OFFERED]),
    ("SET_VRING_ENABLE", &[STOPPED, "rings::a_kick_before_enable_is_not_lost"]),
    ("SEND_RARP", &[RARP_MTU]),
    ("NET_SET_MTU", &[RARP_MTU]),
    ("SET_BACKEND_REQ_FD", &["everything::d31_a_config_change_goes_to_the_channel_of_that_moment"]),
    (
        "IOTLB_MSG",
        &[
            "iotlb::an_invalidation_waits_for_the_request_that_the_device_holds_back",
            "iotlb_everything::a_vmm_keeps_its_guest_behind_an_iommu",
        ],
    ),
    ("SET_VRING_ENDIAN", &[OFFERED]),
    ("GET_CONFIG", &[CONFIG]),
    ("SET_CONFIG", &["everything::the_configuration_is_written_where_the_device_lets_it_be"]),
    ("CREATE_CRYPTO_SESSION", &[CRYPTO]),
    ("CLOSE_CRYPTO_SESSION", &[CRYPTO]),
    ("POSTCOPY_ADVISE", &[POSTCOPY]),
    ("POSTCOPY_LISTEN", &[POSTCOPY]),
    ("POSTCOPY_END", &[POSTCOPY]),
    ("GET_INFLIGHT_FD", &["inflight::a_region_is_made_of_zeros_and_its_length_cannot_be_changed"]),
    (
        "SET_INFLIGHT_FD",
        &["inflight::c7_what_was_in_flight_is_served_first_in_its_order_and_each_once"],
    ),
    ("GPU_SET_SOCKET", &["everything::the_display_socket_reaches_the_device"]),
    ("RESET_DEVICE", &["everything::a_reset_forgets_mappings_and_serves_again"]),
    ("VRING_KICK", &["everything::rings_are_kicked_and_call_by_messages"]),
    ("GET_MAX_MEM_SLOTS", &[OFFERED]),
    ("ADD_MEM_REG", &[SLOTS]),
    ("REM_MEM_REG", &[SLOTS]),
    ("SET_STATUS", &[STATUS]),
    ("GET_STATUS", &[STATUS]),
    ("GET_SHARED_OBJECT", &[OBJECTS]),
    ("SET_DEVICE_STATE_FD", &[STATE]),
    ("CHECK_DEVICE_STATE", &[STATE]),
    ("GET_SHMEM_CONFIG", &[MAPPED]),
    (
        "GET_VRING_BASE_SKIP_DRAIN",
        &[
            "abandon::skip_drain_leaves_requests_under_way_for_the_next_process_and_never_answers_them",
        ],
    ),
];

/// Requests of the back-end.
const BACK_END: &[Row] = &[
    (
        "IOTLB_MSG",
        &[
            "iotlb::a_ring_asks_for_its_parts_and_for_each_buffer_and_serves",
            "iotlb::a_read_only_page_is_not_written_and_the_failure_is_reported",
        ],
    ),
    ("CONFIG_CHANGE_MSG", &[CONFIG]),
    ("VRING_HOST_NOTIFIER_MSG", &["everything::a_host_notifier_reaches_the_front_end"]),
    ("VRING_CALL", &["everything::rings_are_kicked_and_call_by_messages"]),
    ("VRING_ERR", &["everything::a_broken_ring_is_told_by_message_where_no_descriptor_is"]),
    ("SHARED_OBJECT_ADD", &[OBJECTS]),
    ("SHARED_OBJECT_REMOVE", &["everything::a_shared_object_is_taken_back"]),
    ("SHARED_OBJECT_LOOKUP", &[OBJECTS]),
    ("SHMEM_MAP", &[MAPPED]),
    ("SHMEM_UNMAP", &[MAPPED]),
    ("GPU_MAP", &["everything::a_gpu_allocation_is_mapped_and_told_as_crosvm_lays_it_out"]),
    (
        "EXTERNAL_MAP",
        &["everything::memory_of_the_same_process_is_mapped_and_of_another_one_never"],
    ),
];

const SOURCES: &[(&str, &str)] = &[
    ("abandon", include_str!("abandon.rs")),
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
        assert!(!shown.is_empty() && shown.iter().all(|test| is_there(test)), "{name}");
    }
    assert!(listed.next().is_none(), "a row that the table has not");
}
