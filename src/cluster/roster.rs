//! The hosts that a submitter has received messages of.

use super::messages::Beat;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A host that has items sends a beat this often.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// A host without items sends a beat this often: a little before the client would send a ping, which the beat then replaces.
pub(super) const IDLE_BEAT: Duration = Duration::from_millis(3750);
/// A host that has been silent for this long counts as gone, after a beat with items and after one without: one may be lost.
const SILENT: Duration = Duration::from_millis(4500);
const SILENT_IDLE: Duration = Duration::from_secs(9);
/// The most hosts that are listed. Anybody on the network may send names, so the number is bounded.
const MOST: usize = 10_000;
const LONGEST_NAME: usize = 256;

/// A host that serves a cluster pool; made by [`Pool::hosts`](crate::Pool::hosts).
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::builder().cluster("nats://127.0.0.1:4222/thumbs").build()?;
/// for host in pool.hosts() {
///     println!("{}: {} of {} slots busy, {} items so far", host.name, host.busy, host.slots, host.tasks);
/// }
/// # Ok(()) }) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HostInfo {
    /// Its host name and process id, as errors name it.
    pub name: String,
    /// The process that serves.
    pub pid: u32,
    /// The machine's name.
    pub hostname: String,
    /// The number of messages that it runs at the same time. A message is one or more items.
    pub slots: usize,
    /// The number of messages that it holds: those that run and those that wait.
    pub busy: usize,
    /// The number of items that it has answered.
    pub tasks: u64,
    /// The time since it began to serve.
    pub age: Duration,
    /// The time since its last message arrived.
    pub last_heard: Duration,
    /// `true` if it is of the same build as this program. Hosts of other builds take no item of this submitter.
    pub build_matches: bool,
}

/// The hosts that are there.
pub(super) struct Roster {
    build: u64,
    hosts: HashMap<u64, (Beat, Instant)>,
    /// Names of hosts that are gone, for errors.
    names: HashMap<u64, String>,
}

/// How long a host may be silent after this beat.
fn patience(beat: &Beat) -> Duration {
    if beat.busy > 0 { SILENT } else { SILENT_IDLE }
}

impl Roster {
    pub(super) fn new(build: u64) -> Self {
        Self { build, hosts: HashMap::new(), names: HashMap::new() }
    }

    pub(super) fn heard(&mut self, beat: Beat, now: Instant) {
        let too_long = beat.name.len().max(beat.hostname.len()) > LONGEST_NAME;
        if too_long || !self.hosts.contains_key(&beat.host) && self.hosts.len() >= MOST {
            return;
        }
        if self.names.len() >= MOST {
            self.names.clear();
        }
        self.names.insert(beat.host, beat.name.clone());
        if beat.is_leaving {
            self.hosts.remove(&beat.host);
        } else {
            self.hosts.insert(beat.host, (beat, now));
        }
    }

    /// Removes the hosts that have been silent for too long.
    pub(super) fn strike_out(&mut self, now: Instant) {
        self.hosts.retain(|_, (beat, heard)| now.saturating_duration_since(*heard) < patience(beat));
    }

    /// Restarts the time of silence of all hosts: no message could arrive while there was no connection.
    pub(super) fn excuse(&mut self, now: Instant) {
        self.hosts.values_mut().for_each(|(_, heard)| *heard = now);
    }

    /// Returns when the next host may have to be removed.
    pub(super) fn until(&self) -> Option<Instant> {
        self.hosts.values().map(|(beat, heard)| *heard + patience(beat)).min()
    }

    /// Returns the slots of all hosts of this build.
    pub(super) fn slots(&self) -> usize {
        self.own().map(|(beat, _)| beat.slots as usize).fold(0, usize::saturating_add)
    }

    fn own(&self) -> impl Iterator<Item = &(Beat, Instant)> {
        self.hosts.values().filter(|(beat, _)| beat.build == self.build)
    }

    /// Returns `true` if a host of this build reports a free slot.
    pub(super) fn has_free(&self) -> bool {
        self.own().any(|(beat, _)| beat.busy < beat.slots)
    }

    pub(super) fn has(&self, host: u64) -> bool {
        self.hosts.contains_key(&host)
    }

    /// Returns the number of hosts if all are of other builds than this one, else 0.
    pub(super) fn strangers(&self) -> usize {
        if self.own().next().is_some() { 0 } else { self.hosts.len() }
    }

    pub(super) fn name(&self, host: u64) -> String {
        self.names.get(&host).cloned().unwrap_or_else(|| "a host that has not told its name".into())
    }

    pub(super) fn list(&self) -> Vec<HostInfo> {
        let info = |(beat, heard): &(Beat, Instant)| HostInfo {
            name: beat.name.clone(),
            pid: beat.pid,
            hostname: beat.hostname.clone(),
            slots: beat.slots as usize,
            busy: beat.busy as usize,
            tasks: beat.tasks,
            age: beat.age + heard.elapsed(),
            last_heard: heard.elapsed(),
            build_matches: beat.build == self.build,
        };
        let mut list: Vec<_> = self.hosts.values().map(info).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(host: u64, build: u64, slots: u32, busy: u32) -> Beat {
        let (hostname, name) = ("box".into(), format!("box ({host})"));
        Beat { host, build, pid: 1, hostname, name, slots, busy, tasks: 0, age: BEAT, is_leaving: false }
    }

    #[test]
    fn hosts_come_and_go_and_those_of_other_builds_have_no_slots() {
        let (mut roster, now) = (Roster::new(7), Instant::now());
        roster.heard(beat(1, 8, 4, 0), now);
        assert_eq!((roster.slots(), roster.strangers(), roster.has_free()), (0, 1, false));
        roster.heard(beat(2, 7, 4, 4), now);
        assert_eq!((roster.slots(), roster.strangers(), roster.has_free()), (4, 0, false));
        roster.heard(beat(2, 7, 2, 1), now + BEAT);
        assert_eq!((roster.slots(), roster.has_free(), roster.list().len()), (2, true, 2));
        roster.heard(beat(3, 7, 1, 0), now);
        roster.strike_out(now + SILENT);
        assert_eq!((roster.slots(), roster.list().len()), (3, 3), "one is idle, one of another build, too");
        roster.strike_out(now + SILENT_IDLE);
        assert_eq!((roster.slots(), roster.list().len()), (0, 0));
        roster.heard(beat(2, 7, 2, 1), now);
        roster.heard(Beat { is_leaving: true, ..beat(2, 7, 2, 1) }, now);
        assert_eq!((roster.slots(), roster.until(), &*roster.name(2)), (0, None, "box (2)"));
    }

    #[test]
    fn more_names_than_hosts_can_be_are_not_kept() {
        let (mut roster, now) = (Roster::new(7), Instant::now());
        (0..3 * MOST as u64).for_each(|host| roster.heard(beat(host, 7, u32::MAX, 0), now));
        roster.heard(Beat { name: "x".repeat(LONGEST_NAME + 1), ..beat(u64::MAX, 7, 1, 0) }, now);
        assert!(roster.hosts.len() <= MOST && roster.names.len() <= MOST);
        assert!(roster.slots() > 0);
    }
}
