//! What the library tells of its nodes and open files, taken apart and put together again.
//!
//! The library keeps both to itself; its device state has them as postcard writes them (`serialized::PassthroughFs`
//! of the crate `virtiofsd`, version 2). Invariant: what was taken apart and not changed is put together to the
//! same bytes.

use std::io;

use serde::{Deserialize, Serialize};

/// All of it, by version.
#[derive(Debug, Deserialize, Serialize)]
enum Versions {
    /// Without mounts; nothing that this program uses writes it any more.
    First,
    /// See [`Image`].
    Second(Image),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Image {
    pub(super) nodes: Vec<Node>,
    pub(super) next_node: u64,
    pub(super) opens: Vec<Open>,
    pub(super) next_open: u64,
    pub(super) negotiated: Negotiated,
    /// Mounts by the numbers that handles name, with their paths in the share.
    pub(super) mounts: Vec<(u64, String)>,
}

/// What INIT came to, as far as the library keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Negotiated {
    pub(super) writeback: bool,
    pub(super) submounts: bool,
    pub(super) acls: bool,
    pub(super) groups: bool,
}

/// A node that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Node {
    pub(super) id: u64,
    /// How often it was looked up, and how many nodes here lie below it by [`Place::Path`].
    pub(super) count: u64,
    pub(super) place: Place,
    /// To be compared with the file that is found.
    pub(super) verify: Option<Handle>,
}

/// Where a node is found.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) enum Place {
    Root,
    Path { parent: u64, name: String },
    Lost,
    FromRoot { path: String },
    Handle { handle: Handle },
}

/// A file handle of the kernel (name_to_handle_at(2)).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Handle {
    pub(super) mount: u64,
    pub(super) kind: i32,
    pub(super) bytes: Vec<u8>,
}

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Open {
    pub(super) id: u64,
    pub(super) node: u64,
    pub(super) source: Source,
}

/// How an open file is opened again.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) enum Source {
    Flags { flags: i32 },
}

impl Image {
    /// Takes a state of the library apart.
    pub(super) fn read(bytes: &[u8]) -> io::Result<Self> {
        match postcard::from_bytes(bytes).map_err(io::Error::other)? {
            Versions::Second(image) => Ok(image),
            Versions::First => Err(io::Error::other("a state of the library's first version")),
        }
    }

    /// Puts it together.
    pub(super) fn write(self) -> io::Result<Vec<u8>> {
        postcard::to_allocvec(&Versions::Second(self)).map_err(io::Error::other)
    }
}
