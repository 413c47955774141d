//! The devices that run: each has a thread for its front-end, and workers of its own or that it shares.
//!
//! Invariant: a device is in the list from before its thread starts until after it has ended; names
//! are unique.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use outboard::{Fact, Gate, Inspect, SharedThread, StopHandle};
use serde_json::{Map, Value};
use tracing::{error, info};

use super::bell::Bell;
use super::lan::Lan;
use super::order::Listed;
use crate::device::{Prepared, Resize};
use crate::{losses, service};

/// One device.
struct Running {
    kind: String,
    described: String,
    inspect: Inspect,
    resize: Option<Resize>,
    stop: StopHandle,
    gate: Gate,
    /// None while somebody waits for its end.
    thread: Option<JoinHandle<()>>,
}

/// See the module.
pub(crate) struct Fleet {
    devices: Mutex<BTreeMap<String, Running>>,
    /// Threads that devices share.
    workers: Mutex<BTreeMap<String, SharedThread>>,
    /// What cards are connected to.
    switches: Mutex<Vec<Arc<Lan>>>,
    /// Rung when the last device has left by itself.
    empty: Bell,
    failed: AtomicBool,
}

impl Fleet {
    /// Nothing runs yet; `empty` is rung when nothing is left.
    pub(crate) fn new(empty: Bell) -> Arc<Self> {
        let (devices, workers, switches) = Default::default();
        Arc::new(Self { devices, workers, switches, empty, failed: AtomicBool::new(false) })
    }

    /// Whether a device has ended with an error.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Has a thread for devices that name it.
    pub(crate) fn employ(&self, name: String, worker: SharedThread) {
        self.workers().insert(name, worker);
    }

    /// The thread of this name.
    pub(crate) fn worker(&self, name: &str) -> Option<SharedThread> {
        self.workers().get(name).cloned()
    }

    /// Has a switch for cards that name it.
    pub(crate) fn lay(&self, switch: Arc<Lan>) {
        self.switches.lock().unwrap_or_else(PoisonError::into_inner).push(switch);
    }

    /// The switch of this name.
    pub(crate) fn switch(&self, name: &str) -> Option<Arc<Lan>> {
        self.switches().into_iter().find(|switch| switch.name == name)
    }

    /// All switches.
    pub(crate) fn switches(&self) -> Vec<Arc<Lan>> {
        self.switches.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn workers(&self) -> MutexGuard<'_, BTreeMap<String, SharedThread>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a device has this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }

    /// Serves a device from now on.
    ///
    /// # Errors
    /// The name is taken, or there is no thread for it.
    pub(crate) fn add(
        self: &Arc<Self>,
        name: &str,
        kind: &str,
        mut device: Prepared,
    ) -> Result<(), String> {
        let (server, gate) = device.server.with_gate().map_err(|error| error.to_string())?;
        device.server = server;
        let mut devices = self.lock();
        if devices.contains_key(name) {
            return Err(format!("there is a device of the name '{name}'"));
        }
        service::keep(&device.server, &service::name_among(name));
        info!("serving {name}: {}", device.described);
        let mut running = Running {
            kind: kind.to_owned(),
            described: device.described.clone(),
            inspect: device.inspect.clone(),
            resize: device.resize.take(),
            stop: device.server.stop_handle(),
            gate,
            thread: None,
        };
        let (fleet, own) = (Arc::clone(self), name.to_owned());
        let thread = Builder::new().name(name.chars().take(15).collect()).spawn(move || {
            let inspect = device.inspect.clone();
            if let Err(error) = device.serve() {
                error!("{own}: {error}");
                fleet.failed.store(true, Ordering::Relaxed);
            }
            losses::tell(&own, &inspect);
            fleet.ended(&own);
        });
        running.thread = Some(thread.map_err(|error| format!("no thread: {error}"))?);
        devices.insert(name.to_owned(), running);
        Ok(())
    }

    /// A device's thread is about to end.
    fn ended(&self, name: &str) {
        let mut devices = self.lock();
        // Who waits for the thread takes it out.
        if devices.get(name).is_some_and(|device| device.thread.is_some()) {
            devices.remove(name);
            info!("{name} is gone");
            if devices.is_empty() {
                self.empty.ring();
            }
        }
    }

    /// Finishes what a device has under way and ends it.
    ///
    /// # Errors
    /// There is no such device.
    pub(crate) fn remove(&self, name: &str) -> Result<(), String> {
        let thread = {
            let mut devices = self.lock();
            let device = devices.get_mut(name).ok_or_else(|| no_such(name))?;
            device.stop.stop();
            device.thread.take().ok_or_else(|| format!("{name} is being removed already"))?
        };
        // A panic of its thread was reported where it happened.
        let _ = thread.join();
        self.lock().remove(name);
        info!("{name} was removed");
        Ok(())
    }

    /// Ends all devices, all at once, and takes the switches off the host.
    pub(crate) fn stop(&self) {
        let threads: Vec<_> = {
            let mut devices = self.lock();
            devices.values().for_each(|device| device.stop.stop());
            devices.values_mut().filter_map(|device| device.thread.take()).collect()
        };
        threads.into_iter().for_each(|thread| drop(thread.join()));
        self.lock().clear();
        // While this process is still seen to run: a new one makes them when it has ended.
        for switch in self.switches() {
            switch.disconnect();
            losses::tell(&format!("switch {}", switch.name), switch.switch.inspect());
        }
    }

    /// Has a device's guest see what it has grown by.
    ///
    /// # Errors
    /// There is no such device, it has no size, or has not grown.
    pub(crate) fn resize(&self, name: &str) -> Result<String, String> {
        let resize = match self.lock().get(name) {
            Some(device) => device.resize.clone(),
            None => return Err(no_such(name)),
        };
        let resize = resize.ok_or_else(|| format!("{name} has no size"))?;
        resize().map(|size| format!("{name}: {size}"))
    }

    /// A way for another process to take a device over.
    ///
    /// # Errors
    /// There is no such device, or no descriptor is left.
    pub(crate) fn gate(&self, name: &str) -> Result<OwnedFd, String> {
        let gate = self.lock().get(name).map(|device| device.gate.clone());
        let gate = gate.ok_or_else(|| no_such(name))?;
        gate.open().map_err(|error| format!("{name}: {error}"))
    }

    /// All devices, by name.
    pub(crate) fn list(&self) -> Vec<Listed> {
        let shown = |(name, device): (&String, &Running)| {
            let facts = device.inspect.facts();
            let connected = facts
                .iter()
                .any(|(name, fact)| name == "front-end/connected" && *fact == Fact::Flag(true));
            let finished = facts.iter().filter(|(name, _)| name.ends_with("/finished"));
            let finished = finished.map(|(_, fact)| match fact {
                Fact::Number(number) => *number,
                _ => 0,
            });
            Listed {
                name: name.clone(),
                kind: device.kind.clone(),
                what: device.described.clone(),
                connected,
                finished: finished.sum(),
            }
        };
        self.lock().iter().map(shown).collect()
    }

    /// What one device, `worker/NAME` or `switch/NAME` shows of itself, or all of them, as trees.
    ///
    /// # Errors
    /// There is none of that name.
    pub(crate) fn stats(&self, name: Option<&str>) -> Result<BTreeMap<String, Value>, String> {
        let mut shown: BTreeMap<_, _> =
            self.lock().iter().map(|(own, device)| (own.clone(), device.inspect.clone())).collect();
        // No device has such a name.
        let workers = self.workers();
        let workers = workers.iter().map(|(own, worker)| (format!("worker/{own}"), worker));
        shown.extend(workers.map(|(own, worker)| (own, worker.inspect().clone())));
        let switches = self.switches();
        let switches = switches.iter().map(|lan| (format!("switch/{}", lan.name), lan));
        shown.extend(switches.map(|(own, lan)| (own, lan.switch.inspect().clone())));
        if let Some(name) = name {
            shown.retain(|own, _| own == name);
            if shown.is_empty() {
                return Err(no_such(name));
            }
        }
        Ok(shown.into_iter().map(|(own, inspect)| (own, tree(inspect.facts()))).collect())
    }
}

fn no_such(name: &str) -> String {
    format!("there is no device '{name}'")
}

/// `rings/0/size` becomes `{"rings": {"0": {"size": …}}}`.
fn tree(facts: Vec<(String, Fact)>) -> Value {
    let mut root = Map::new();
    for (name, fact) in facts {
        let mut parts: Vec<&str> = name.split('/').collect();
        let Some(leaf) = parts.pop() else { continue };
        put(&mut root, &parts, leaf, value(fact));
    }
    Value::Object(root)
}

fn put(branch: &mut Map<String, Value>, parts: &[&str], leaf: &str, value: Value) {
    let Some((first, rest)) = parts.split_first() else {
        branch.insert(leaf.to_owned(), value);
        return;
    };
    let next = branch.entry(*first).or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(inner) = next {
        put(inner, rest, leaf, value);
    }
}

fn value(fact: Fact) -> Value {
    match fact {
        Fact::Text(text) => text.into(),
        Fact::Number(number) => number.into(),
        Fact::Flag(flag) => flag.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_slashes_become_a_tree() {
        let facts = [
            ("front-end", Fact::Flag(true)),
            ("rings/0/name", Fact::from("requests")),
            ("rings/0/size", Fact::Number(256)),
        ];
        let tree = tree(facts.map(|(name, fact)| (name.to_owned(), fact)).to_vec());
        let expected = r#"{"front-end":true,"rings":{"0":{"name":"requests","size":256}}}"#;
        assert_eq!(tree.to_string(), expected);
    }
}
