//! Names of feature bits, as an operator writes them.
//!
//! Invariant: a name is known with and without the specification's prefix, in any case, with `-` for `_`.

/// The bit of `table` that `name` stands for.
pub(crate) fn by_name(prefix: &str, table: &[(&str, u64)], name: &str) -> Option<u64> {
    let name = name.to_ascii_uppercase().replace('-', "_");
    let short = name.strip_prefix(prefix).unwrap_or(&name);
    table.iter().find(|(known, _)| *known == short).map(|(_, bit)| *bit)
}
