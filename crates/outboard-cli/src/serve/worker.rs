//! A `[[worker]]` of a file: a thread that devices share, and how they name it.
//!
//! Its options are those that `outboard TYPE` has for its threads, so that they are declared once. Invariant: as for
//! devices, what is wrong is told with its line.

use std::ffi::OsString;

use clap::{Arg, Parser};
use outboard::SharedOptions;
use toml::Spanned;
use toml::de::DeValue;

use super::plan::{Field, Wrong, check_name, fields, line_of, string, values, wrong};
use crate::device::ThreadArgs;

/// One `[[worker]]`.
pub(crate) struct WorkerEntry {
    pub(crate) name: String,
    pub(crate) options: SharedOptions,
    /// Where it begins.
    pub(crate) line: usize,
}

/// Its options.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    threads: ThreadArgs,
}

impl WorkerEntry {
    /// Reads a table.
    pub(super) fn read(text: &str, table: &Spanned<DeValue<'_>>) -> Result<Self, Wrong> {
        let (name, parsed): (_, Line) = named("worker", table)?;
        let options = SharedOptions::from(&parsed.threads);
        Ok(Self { name, options, line: line_of(text, table.span().start) })
    }
}

/// A table of this kind with a name, whose other keys are options.
pub(super) fn named<L: Parser>(
    kind: &'static str,
    table: &Spanned<DeValue<'_>>,
) -> Result<(String, L), Wrong> {
    let at = table.span();
    let Some(all) = table.get_ref().as_table() else {
        return Err(Wrong(at, format!("a {kind} is a table: [[{kind}]]")));
    };
    let (given, options): (Vec<_>, Vec<_>) =
        fields(all).into_iter().partition(|field| field.0 == "name");
    let missing = || Wrong(at.clone(), format!("a {kind} needs a name"));
    let (_, value, place) = given.first().ok_or_else(missing)?;
    let name = string("name", value)?;
    check_name(&name).map_err(|why| Wrong(place.clone(), why))?;
    let known = L::command();
    let mut words: Vec<OsString> = vec![kind.into()];
    for (key, value, key_at) in &options {
        let Some(option) = known.get_arguments().find(|one| one.get_long() == Some(key)) else {
            let known: Vec<_> = known.get_arguments().filter_map(Arg::get_long).collect();
            let why =
                format!("a {kind} has no option '{key}': there are name, {}", known.join(", "));
            return Err(Wrong(key_at.clone(), why));
        };
        let given = values(option, key, value)?.into_iter().flatten();
        words.extend(given.map(|value| OsString::from(format!("--{key}={value}"))));
    }
    let parsed = L::try_parse_from(words).map_err(|error| wrong(&error, &options, &at))?;
    Ok((name, parsed))
}

/// What a device with a shared worker cannot say for itself.
const OPTIONS: &str = "pin, poll-us, event-loop";

/// The workers that a device names: one or several, all of them known.
pub(super) fn names(
    value: &Spanned<DeValue<'_>>,
    known: &dyn Fn(&str) -> bool,
) -> Result<Vec<String>, Wrong> {
    let one = |value: &Spanned<DeValue<'_>>| {
        let name = string("worker", value)?;
        match known(&name) {
            true => Ok(name),
            false => Err(Wrong(value.span(), format!("there is no worker '{name}'"))),
        }
    };
    match value.get_ref() {
        DeValue::Array(all) if all.is_empty() => {
            Err(Wrong(value.span(), "worker wants the name of a [[worker]]".to_owned()))
        }
        DeValue::Array(all) => all.iter().map(one).collect(),
        _ => Ok(vec![one(value)?]),
    }
}

/// A device on shared threads says nothing about threads of its own.
pub(super) fn no_threads_of_its_own(
    workers: &[String],
    options: &[Field<'_>],
) -> Result<(), Wrong> {
    let theirs = options.iter().find(|(key, ..)| OPTIONS.split(", ").any(|own| own == *key));
    match theirs.filter(|_| !workers.is_empty()) {
        Some((key, _, at)) => Err(Wrong(at.clone(), format!("{key} belongs into the [[worker]]"))),
        None => Ok(()),
    }
}
