//! The file of `outboard serve`: TOML in, command lines of devices out.
//!
//! A `[[device]]` has a `type`, perhaps a `name`, and for the rest the long options of the command
//! `outboard TYPE` without their dashes, so that there is one place where options are declared,
//! checked and explained. An operand goes by its name in small letters (`image = "disk.img"`).
//! Invariant: what is wrong is told with the line of the file that it stands on.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, CommandFactory, Parser};
use outboard::SharedThread;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::lan::{self, Lan, SwitchEntry};
use super::worker::{self, WorkerEntry};
use crate::lock::LockArgs;
use crate::{Cli, Command, one_line};

/// What a file asks for.
#[derive(Default)]
pub(crate) struct Plan {
    /// Where orders are taken.
    pub(crate) control: Option<PathBuf>,
    /// How the process is locked in.
    pub(crate) lock: LockArgs,
    pub(crate) workers: Vec<WorkerEntry>,
    pub(crate) switches: Vec<SwitchEntry>,
    pub(crate) devices: Vec<Entry>,
}

/// One `[[device]]`.
pub(crate) struct Entry {
    pub(crate) name: String,
    /// The command that it is.
    pub(crate) kind: String,
    /// The shared threads that serve it; none: its own.
    pub(crate) workers: Vec<String>,
    /// The switch that its card is on.
    pub(crate) switch: Option<String>,
    pub(crate) command: Command,
    /// Where it begins, for what is found out later.
    pub(crate) line: usize,
}

/// What is wrong, and with which bytes of the text.
pub(super) struct Wrong(pub(super) Range<usize>, pub(super) String);

/// What there is already beside a file.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    /// Whether there is a worker of a name.
    pub(crate) worker: &'a dyn Fn(&str) -> bool,
    /// Whether there is a switch of a name.
    pub(crate) switch: &'a dyn Fn(&str) -> bool,
}

impl Known<'_> {
    /// Nothing at all.
    pub(crate) const NOTHING: Known<'static> = Known { worker: &|_| false, switch: &|_| false };
}

pub(super) type Field<'t> = (&'t str, &'t Spanned<DeValue<'t>>, Range<usize>);

impl Plan {
    /// Reads a file's text; there may be workers and switches beside those of the file.
    ///
    /// # Errors
    /// `LINE: what is wrong there`.
    pub(crate) fn parse(text: &str, known: Known<'_>) -> Result<Self, String> {
        Self::read(text, known).map_err(|Wrong(at, why)| {
            format!("{}: {}", line_of(text, at.start), why.lines().collect::<Vec<_>>().join(" "))
        })
    }

    fn read(text: &str, known: Known<'_>) -> Result<Self, Wrong> {
        let parsed = DeTable::parse(text)
            .map_err(|error| Wrong(error.span().unwrap_or(0..0), error.message().to_owned()))?;
        let mut plan = Self::default();
        let mut devices = None;
        for (key, value, at) in fields(parsed.get_ref()) {
            match key {
                "control" => plan.control = Some(string(key, value)?.into()),
                "seccomp" => {
                    let wrong = |why| Wrong(value.span(), why);
                    plan.lock = LockArgs::parse(&string(key, value)?).map_err(wrong)?;
                }
                "worker" => {
                    for table in tables("worker", value)? {
                        let worker = WorkerEntry::read(text, table)?;
                        if (known.worker)(&worker.name) || plan.has_worker(&worker.name) {
                            let why = format!("there is another worker '{}'", worker.name);
                            return Err(Wrong(table.span(), why));
                        }
                        plan.workers.push(worker);
                    }
                }
                "switch" => {
                    for table in tables("switch", value)? {
                        let switch = SwitchEntry::read(text, table)?;
                        if (known.switch)(&switch.name) || plan.has_switch(&switch.name) {
                            let why = format!("there is another switch '{}'", switch.name);
                            return Err(Wrong(table.span(), why));
                        }
                        plan.switches.push(switch);
                    }
                }
                "device" => devices = Some(value),
                other => {
                    let why = format!(
                        "'{other}' is neither control nor seccomp nor [[worker]] nor [[switch]] nor [[device]]"
                    );
                    return Err(Wrong(at, why));
                }
            }
        }
        // Their workers and switches may be written behind them.
        for table in devices.map(|value| tables("device", value)).transpose()?.unwrap_or_default() {
            let entry = plan.entry(text, table, known)?;
            plan.devices.push(entry);
        }
        Ok(plan)
    }

    fn has_worker(&self, name: &str) -> bool {
        self.workers.iter().any(|worker| worker.name == name)
    }

    fn has_switch(&self, name: &str) -> bool {
        self.switches.iter().any(|switch| switch.name == name)
    }

    /// Makes its switches, which are not connected to the host yet.
    ///
    /// # Errors
    /// The line of one that cannot be made, and why.
    pub(crate) fn make_switches(&mut self) -> Result<Vec<Arc<Lan>>, (usize, String)> {
        let switches = self.switches.drain(..);
        switches.map(|switch| switch.make().map(Arc::new)).collect()
    }

    /// Starts its workers; by their names.
    ///
    /// # Errors
    /// The line of one that cannot be started, and why.
    pub(crate) fn start_workers(&self) -> Result<BTreeMap<String, SharedThread>, (usize, String)> {
        let start = |worker: &WorkerEntry| {
            let thread = SharedThread::start(&worker.name, &worker.options);
            let thread = thread.map_err(|error| (worker.line, error.to_string()))?;
            Ok((worker.name.clone(), thread))
        };
        self.workers.iter().map(start).collect()
    }

    /// One device; its name is none of those before it.
    fn entry(
        &self,
        text: &str,
        table: &Spanned<DeValue<'_>>,
        known: Known<'_>,
    ) -> Result<Entry, Wrong> {
        let at = table.span();
        let Some(all) = table.get_ref().as_table() else {
            return Err(Wrong(at, "a device is a table: [[device]]".to_owned()));
        };
        let (mut kind, mut name, mut options) = (None, None, Vec::new());
        let (mut workers, mut switch) = (Vec::new(), None);
        for field in fields(all) {
            match field.0 {
                "type" => kind = Some((string("type", field.1)?, field.2)),
                "name" => name = Some((string("name", field.1)?, field.2)),
                "worker" => {
                    let known = |name: &str| self.has_worker(name) || (known.worker)(name);
                    workers = worker::names(field.1, &known)?;
                }
                "switch" => switch = Some(field),
                _ => options.push(field),
            }
        }
        worker::no_threads_of_its_own(&workers, &options)?;
        let missing = || Wrong(at.clone(), "a device needs a type, as in type = \"block\"".into());
        let (kind, place) = kind.ok_or_else(missing)?;
        let known = |name: &str| self.has_switch(name) || (known.switch)(name);
        let switch = switch.map(|field| lan::of_card(&kind, &field, &options, &known));
        let switch = switch.transpose()?;
        let (name, named) = name.unwrap_or_else(|| (self.free_name(&kind), at.clone()));
        if let Err(why) = check_name(&name) {
            return Err(Wrong(named, why));
        }
        if self.devices.iter().any(|other| other.name == name) {
            return Err(Wrong(named, format!("there is another device of the name '{name}'")));
        }
        let command = command(&kind, place, &options, &at)?;
        let line = line_of(text, at.start);
        Ok(Entry { name, kind, workers, switch, command, line })
    }

    /// `block`, `block2`, `block3` …
    fn free_name(&self, kind: &str) -> String {
        let taken = |name: &str| self.devices.iter().any(|entry| entry.name == name);
        let mut name = kind.to_owned();
        let mut number = 1;
        while taken(&name) {
            number += 1;
            name = format!("{kind}{number}");
        }
        name
    }
}

/// Names go into file names and into the service manager's: letters, digits, `-`, `_` and `.`.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let fits = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    if (1..=64).contains(&name.len()) && name.chars().all(fits) {
        return Ok(());
    }
    Err(format!("the name '{name}' is not of 1 to 64 letters, digits, dots, dashes"))
}

/// The tables of an array.
fn tables<'t>(
    key: &str,
    value: &'t Spanned<DeValue<'t>>,
) -> Result<Vec<&'t Spanned<DeValue<'t>>>, Wrong> {
    let wanted = || Wrong(value.span(), format!("each {key} is written as [[{key}]]"));
    Ok(value.get_ref().as_array().ok_or_else(wanted)?.iter().collect())
}

pub(super) fn fields<'t>(table: &'t DeTable<'t>) -> Vec<Field<'t>> {
    let mut all: Vec<_> =
        table.iter().map(|(key, value)| (key.get_ref().as_ref(), value, key.span())).collect();
    // In the order of the file, so that the first mistake is the one that is told.
    all.sort_by_key(|(_, _, at)| at.start);
    all
}

pub(super) fn string(key: &str, value: &Spanned<DeValue<'_>>) -> Result<String, Wrong> {
    let text = value.get_ref().as_str();
    text.map(str::to_owned).ok_or_else(|| Wrong(value.span(), format!("{key} wants a string")))
}

/// The command line that an entry stands for, taken by the program's own parser.
fn command(
    kind: &str,
    place: Range<usize>,
    options: &[Field<'_>],
    at: &Range<usize>,
) -> Result<Command, Wrong> {
    let program = Cli::command();
    let Some(device) = program.find_subcommand(kind).filter(|device| is_device(device)) else {
        let known: Vec<_> = program
            .get_subcommands()
            .filter(|one| is_device(one))
            .map(|one| one.get_name())
            .collect();
        return Err(Wrong(place, format!("no device '{kind}'; there are {}", known.join(", "))));
    };
    let mut words: Vec<OsString> = vec!["outboard".into(), kind.into()];
    let mut operands = Vec::new();
    for (key, value, key_at) in options {
        let Some(option) = device.get_arguments().find(|option| goes_by(option, key)) else {
            let why = format!("{kind} has no option '{key}': outboard {kind} --help lists them");
            return Err(Wrong(key_at.clone(), why));
        };
        for value in values(option, key, value)? {
            match (option.is_positional(), value) {
                (true, Some(value)) => operands.push(value.into()),
                (true, None) => {}
                (false, Some(value)) => words.push(format!("--{key}={value}").into()),
                (false, None) => words.push(format!("--{key}").into()),
            }
        }
    }
    words.push("--".into());
    words.extend(operands);
    let cli = Cli::try_parse_from(words);
    cli.map(|cli| cli.command).map_err(|error| wrong(&error, options, at))
}

/// Commands that serve a socket are devices.
fn is_device(command: &clap::Command) -> bool {
    command.get_arguments().any(|option| option.get_long() == Some("take-over"))
        && command.get_arguments().any(|option| option.get_long() == Some("drain-deadline"))
}

/// What belongs to the program as a whole, not to one of its devices.
const WHOLE: [&str; 6] =
    ["help", "version", "print-capabilities", "control", "take-over", "seccomp"];

fn goes_by(option: &Arg, key: &str) -> bool {
    if option.is_positional() {
        let names = option.get_value_names().unwrap_or_default();
        return names.first().is_some_and(|name| name.to_lowercase() == key);
    }
    let aliases = option.get_all_aliases().unwrap_or_default();
    let known = option.get_long() == Some(key) || aliases.contains(&key);
    known && !option.get_long().is_some_and(|long| WHOLE.contains(&long))
}

/// What an option is given, once for each value; None: the option alone.
pub(super) fn values(
    option: &Arg,
    key: &str,
    value: &Spanned<DeValue<'_>>,
) -> Result<Vec<Option<String>>, Wrong> {
    let flag = matches!(option.get_action(), ArgAction::SetTrue);
    Ok(match value.get_ref() {
        DeValue::Boolean(true) if flag => vec![None],
        DeValue::Boolean(false) if flag => Vec::new(),
        _ if flag => return Err(Wrong(value.span(), format!("{key} is true or false"))),
        DeValue::Array(all) => {
            let all = all.iter().map(|one| scalar(key, one).map(Some));
            all.collect::<Result<_, _>>()?
        }
        _ => vec![Some(scalar(key, value)?)],
    })
}

fn scalar(key: &str, value: &Spanned<DeValue<'_>>) -> Result<String, Wrong> {
    let text = match value.get_ref() {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n.to_string())
        }
        _ => None,
    };
    text.ok_or_else(|| Wrong(value.span(), format!("{key} wants a string or a number")))
}

/// What the parser of command lines complains about, where it stands; `at`: the whole.
pub(super) fn wrong(error: &clap::Error, options: &[Field<'_>], at: &Range<usize>) -> Wrong {
    let place = blamed(error, options).unwrap_or_else(|| at.clone());
    let line = one_line(&error.to_string());
    Wrong(place, line.strip_suffix("; see --help").unwrap_or(&line).to_owned())
}

/// Where the option stands that the parser complains about.
fn blamed(error: &clap::Error, options: &[Field<'_>]) -> Option<Range<usize>> {
    let name = match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(name) => name.clone(),
        ContextValue::Strings(names) => names.first()?.clone(),
        _ => return None,
    };
    let name = name.split([' ', '=']).next().unwrap_or_default();
    let name = name.trim_matches(|c: char| "-<>[].".contains(c)).to_lowercase();
    options.iter().find(|(key, ..)| *key == name).map(|(.., at)| at.clone())
}

/// The line that byte `at` stands on, from 1.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> String {
        let known = Known { worker: &|name| name == "old", switch: &|name| name == "attic" };
        Plan::parse(text, known).err().unwrap_or_else(|| panic!("sound:\n{text}"))
    }

    #[test]
    fn a_device_is_the_command_line_that_it_reads_like() {
        let plan = Plan::parse(
            "control = '/run/c'\n\
             [[device]]\ntype = 'block'\nsocket-path = 's'\nimage = 'disk.img'\n\
             read-only = true\ndirect = false\nnum-queues = 0x10\nwithout = ['discard', 'mq']\n\
             [[device]]\ntype = 'rng'\nname = 'dice'\nsocket-path = 't'\n\
             [[device]]\ntype = 'block'\nsocket-path = 'u'\nblk-file = 'b'\n",
            Known::NOTHING,
        );
        let plan = plan.expect("sound");
        assert_eq!(plan.control.as_deref(), Some(std::path::Path::new("/run/c")));
        let names: Vec<_> = plan.devices.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["block", "dice", "block2"]);
        assert_eq!(plan.devices.iter().map(|entry| entry.line).collect::<Vec<_>>(), [2, 10, 14]);
        assert!(matches!(plan.devices[1].command, Command::Rng(_)));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, told) in [
            ("control = 3", "1: control wants a string"),
            ("\ncontrl = 'x'", "2: 'contrl' is neither control nor seccomp nor [[worker]]"),
            ("seccomp = 'most'", "1: seccomp is errno, kill, log or none"),
            ("[device]\ntype = 'block'", "1: each device is written as [[device]]"),
            ("[[device]]\nname = 'x'", "1: a device needs a type"),
            ("[[device]]\n\ntype = 'blok'", "3: no device 'blok'; there are block,"),
            ("[[device]]\ntype = 'demo'", "2: no device 'demo'"),
            ("[[device]]\ntype = 'rng'\nnum-queus = 1", "3: rng has no option 'num-queus'"),
            ("[[device]]\ntype = 'rng'\ntake-over = 'x'", "3: rng has no option 'take-over'"),
            ("[[device]]\ntype = 'rng'\nseccomp = 'kill'", "3: rng has no option 'seccomp'"),
            ("[[device]]\ntype = 'block'\nread-only = 1", "3: read-only is true or false"),
            (
                "[[device]]\ntype = 'block'\nimage = 'i'\nnum-queues = 0\n",
                "4: invalid value '0' for '--num-queues <COUNT>'",
            ),
            (
                "[[device]]\ntype = 'block'\nfd = 3\nsocket-path = 's'\n",
                "3: the argument '--fd <NUMBER>' cannot be used with",
            ),
            ("[[device]]\ntype='rng'\nname = 'a b'", "3: the name 'a b'"),
            ("[[device]]\ntype='rng'\n[[device]]\ntype='rng'\nname='rng'", "5: there is another"),
            ("[[device]\n", "1: "),
            ("worker = 'a'", "1: each worker is written as [[worker]]"),
            ("[[worker]]\npin = 1", "1: a worker needs a name"),
            ("[[worker]]\nname='a'\n[[worker]]\nname='a'", "3: there is another worker 'a'"),
            ("[[worker]]\nname='old'", "1: there is another worker 'old'"),
            ("[[worker]]\nname='a'\npin = 'x'", "3: invalid value 'x' for '--pin"),
            ("[[worker]]\nname='a'\npoll-us = -1", "3: invalid value '-1' for '--poll-us"),
            ("[[worker]]\nname='a'\ncpus = 1", "3: a worker has no option 'cpus'"),
            ("[[device]]\ntype='rng'\nworker='b'", "3: there is no worker 'b'"),
            ("[[device]]\ntype='rng'\nworker=[]", "3: worker wants the name of a [[worker]]"),
            ("[[device]]\ntype='rng'\nworker='old'\npin=1", "4: pin belongs into the [[worker]]"),
            ("switch = 'a'", "1: each switch is written as [[switch]]"),
            ("[[switch]]\nmtu = 1", "1: a switch needs a name"),
            ("[[switch]]\nname='a'\n[[switch]]\nname='a'", "3: there is another switch 'a'"),
            ("[[switch]]\nname='attic'", "1: there is another switch 'attic'"),
            ("[[switch]]\nname='a'\nmtu = 9", "3: invalid value '9' for '--mtu"),
            (
                "[[switch]]\nname='a'\nports = 1",
                "3: a switch has no option 'ports': there are name, tap,",
            ),
            ("[[device]]\ntype='net'\nswitch='b'", "3: there is no switch 'b'"),
            ("[[device]]\ntype='net'\nswitch=['attic']", "3: switch wants a string"),
            ("[[device]]\ntype='rng'\nswitch='attic'", "3: rng has no switch"),
            (
                "[[device]]\ntype='net'\nswitch='attic'\ntap='t'",
                "4: tap: the card is on the switch 'attic'",
            ),
            ("[[device]]\ntype='rng'\nperiod = {a=1}", "3: period wants a string or a number"),
        ] {
            let why = wrong(text);
            assert!(why.starts_with(told), "{text:?}: {why}");
            assert_eq!(why.lines().count(), 1, "{why}");
        }
    }
}
