//! The rows of the leak checks.

use super::{Check, rows};
use crate::judge::leaks as l;

rows! { Leaks
    "idle-alone" "Rule R20" "a back-end without a front-end costs nothing" l::idle_alone;
    "idle-connected" "Rule R20" "a front-end that says nothing costs nothing" l::idle_connected;
    "idle-running" "Rule R20" "a ring that runs and is empty costs nothing" l::idle_running;
    "idle-stopped" "Rule R20" "a ring that was stopped costs nothing, kicked or not" l::idle_stopped;
    "leak-tables" "SET_MEM_TABLE (A38)" "memory tables that are replaced leave nothing" l::tables;
    "leak-slots" "REM_MEM_REG (A41)" "memory slots that are removed leave nothing" l::slots;
    "leak-notifiers" "SET_VRING_CALL (A57)" "call, kick and err descriptors that are replaced leave nothing" l::calls;
    "leak-restarts" "GET_VRING_BASE" "stops and starts of a ring leave nothing" l::restarts;
    "leak-mappings" "Communication" "a front-end that left leaves no mapping of its memory" l::mappings_at_disconnect;
    "leak-sessions" "Communication (A94)" "front-ends that come and leave leave nothing" l::sessions;
}
