//! Repeats the spans and events of another process to a subscriber of this one.
#![forbid(unsafe_code)]

use super::PID;
use super::record::{Content, LEVELS, Message, Place, Values, number_of};
use crate::error::Topic;
use crate::os::sync::lock;
use crate::wire;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock};
use tracing::callsite::{Callsite, Identifier};
use tracing::dispatcher;
use tracing::field::{Field, FieldSet, Value, ValueSet};
use tracing::level_filters::LevelFilter;
use tracing::metadata::Kind;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, NoSubscriber};
use tracing::{Dispatch, Event, Level, Metadata, Span};

/// The subscriber and the span under which records of another process are repeated.
pub(crate) struct Caller {
    dispatch: Dispatch,
    span: Span,
}

impl Caller {
    /// The current ones, if there is a subscriber that wants anything.
    #[inline]
    pub(crate) fn here() -> Option<Arc<Self>> {
        if LevelFilter::current() == LevelFilter::OFF {
            return None;
        }
        let dispatch = dispatcher::get_default(Dispatch::clone);
        if dispatch.is::<NoSubscriber>() {
            return None;
        }
        Some(Arc::new(Self { dispatch, span: Span::current() }))
    }

    /// How much is of interest; 0 is nothing.
    pub(crate) fn level() -> u8 {
        LevelFilter::current().into_level().map_or(0, number_of)
    }

    /// Closes a span of its subscriber. A registry gives up the parent of a span by way of the thread's default subscriber, which may be another one.
    fn close(&self, id: Id) {
        // A panic of a subscriber is printed already, and must not end the task that drops this.
        let close = || dispatcher::with_default(&self.dispatch, || self.dispatch.try_close(id));
        let _ = catch_unwind(AssertUnwindSafe(close));
    }

    /// Warns that the child `pid` had to drop records.
    pub(super) fn warn_of_dropped(&self, pid: u32, dropped: u64) {
        let warn = || {
            let span = self.span.id();
            dispatcher::with_default(&self.dispatch, || {
                let help = Topic::TracesDropped.name();
                tracing::warn!(parent: span, process.pid = pid, dropped, help, "a child recorded more than was read; records were dropped");
            });
        };
        // A panic of a subscriber is printed already.
        let _ = catch_unwind(AssertUnwindSafe(warn));
    }

    #[cfg(all(test, not(multiprocess_loom)))]
    pub(crate) fn of(dispatch: Dispatch) -> Arc<Self> {
        Arc::new(Self { dispatch, span: Span::none() })
    }
}

impl Drop for Caller {
    /// Gives up its span as [`close`](Self::close) does: it may be the last holder, on any thread.
    fn drop(&mut self) {
        let span = std::mem::replace(&mut self.span, Span::none());
        if !span.is_none() {
            let give_up = || dispatcher::with_default(&self.dispatch, || drop(span));
            let _ = catch_unwind(AssertUnwindSafe(give_up));
        }
    }
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caller").finish_non_exhaustive()
    }
}

/// Repeats the records of one process, in order.
pub(crate) struct Replay {
    pid: u32,
    /// The name of the field that has it.
    pid_field: &'static str,
    /// The open spans of that process: of which caller, and the spans that stand for them here.
    spans: HashMap<u64, (Arc<Caller>, Id, &'static Site)>,
}

impl Replay {
    pub(crate) fn of(pid: u32, pid_field: &'static str) -> Self {
        Self { pid, pid_field, spans: HashMap::new() }
    }

    /// Of a child.
    pub(super) fn of_child(pid: u32) -> Self {
        Self::of(pid, PID)
    }

    /// Repeats one message as it was encoded. Subscribers are the user's code: no lock of this crate is held but that of this value.
    pub(crate) fn tell(&mut self, caller: &Arc<Caller>, bytes: &[u8]) {
        if let Ok(message) = wire::decode_bytes(bytes, Vec::new()) {
            // A panic of a subscriber is printed already, and must not keep callers from being woken.
            let _ = catch_unwind(AssertUnwindSafe(|| self.tell_message(caller, message)));
        }
    }

    /// The span that is the parent of a record, and whose caller gets it: a record within a span belongs with that.
    fn parent_of(&self, parent: Option<u64>, caller: &Arc<Caller>) -> (Arc<Caller>, Option<Id>) {
        match parent.and_then(|id| self.spans.get(&id)) {
            Some((caller, id, _)) => (caller.clone(), Some(id.clone())),
            None => (caller.clone(), caller.span.id()),
        }
    }

    /// The place of a record, if the caller wants records from there.
    fn wanted(&self, caller: &Caller, place: Place) -> Option<&'static Site> {
        Site::of(place, self.pid_field).filter(|site| caller.dispatch.enabled(site.metadata()))
    }

    fn tell_message(&mut self, caller: &Arc<Caller>, message: Message) {
        let pid = self.pid;
        match message {
            Message::Span { id, parent, site, values } => {
                let (caller, parent) = self.parent_of(parent, caller);
                let Some(site) = self.wanted(&caller, site) else { return };
                let (dispatch, metadata) = (&caller.dispatch, site.metadata());
                let here = values.on(site, pid, |values| match parent {
                    Some(parent) => dispatch.new_span(&Attributes::child_of(parent, metadata, values)),
                    None => dispatch.new_span(&Attributes::new_root(metadata, values)),
                });
                self.spans.insert(id, (caller, here, site));
            }
            Message::Record { id, values } => {
                if let Some((caller, here, site)) = self.spans.get(&id) {
                    values.on(site, pid, |values| caller.dispatch.record(here, &Record::new(values)));
                }
            }
            Message::Event { parent, site, values } => {
                let (caller, parent) = self.parent_of(parent, caller);
                let Some(site) = self.wanted(&caller, site) else { return };
                values.on(site, pid, |values| {
                    caller.dispatch.event(&Event::new_child_of(parent, site.metadata(), values));
                });
            }
            Message::Close { id } => {
                if let Some((caller, here, _)) = self.spans.remove(&id) {
                    caller.close(here);
                }
            }
        }
    }

    /// Closes the spans that the process has left open.
    pub(crate) fn end(&mut self) {
        self.spans.drain().for_each(|(_, (caller, id, _))| caller.close(id));
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.end();
    }
}

/// A place in the program of another process, as it is here. There are as many as the program has, and they are kept.
struct Site {
    metadata: OnceLock<&'static Metadata<'static>>,
    /// Its last field is the process that it comes from. A record that came by way of another process has that field already.
    adds_pid: bool,
}

/// More places than a program has: from here on somebody makes them up.
const MOST_SITES: usize = 1 << 16;

/// For a site that has not got its metadata, which nobody gets to see.
static NOWHERE: Site = Site { metadata: OnceLock::new(), adds_pid: false };
static NOTHING: Metadata<'static> = Metadata::new(
    "nothing",
    "nowhere",
    Level::TRACE,
    None,
    None,
    None,
    FieldSet::new(&[], Identifier(&NOWHERE)),
    Kind::EVENT,
);

type Sites = HashMap<(&'static str, Place), &'static Site>;

impl Site {
    fn of(place: Place, pid_field: &'static str) -> Option<&'static Self> {
        static ALL: Mutex<Option<Sites>> = Mutex::new(None);
        let key = (pid_field, place);
        let site = {
            let mut all = lock(&ALL);
            let all = all.get_or_insert_with(HashMap::new);
            if let Some(site) = all.get(&key) {
                return Some(site);
            }
            if all.len() >= MOST_SITES {
                return None;
            }
            let site = Self::new(&key.1, pid_field)?;
            all.insert(key, site);
            site
        };
        tracing::callsite::register(site);
        Some(site)
    }

    fn new(place: &Place, pid_field: &'static str) -> Option<&'static Self> {
        let level = *LEVELS.get(usize::from(place.level).wrapping_sub(1))?;
        let keep = |text: &str| -> &'static str { Box::leak(text.into()) };
        let adds_pid = !place.fields.iter().any(|name| name == pid_field);
        let own = MOST_FIELDS - usize::from(adds_pid);
        let names = place.fields.iter().take(own).map(|name| keep(name));
        let names: Vec<_> = names.chain(adds_pid.then_some(pid_field)).collect();
        let site: &'static Self = Box::leak(Box::new(Self { metadata: OnceLock::new(), adds_pid }));
        let fields = FieldSet::new(names.leak(), Identifier(site));
        let (file, module) = (place.file.as_deref().map(keep), place.module.as_deref().map(keep));
        let (name, target) = (keep(&place.name), keep(&place.target));
        let kind = if place.is_span { Kind::SPAN } else { Kind::EVENT };
        let metadata = Metadata::new(name, target, level, file, place.line, module, fields, kind);
        site.metadata.set(Box::leak(Box::new(metadata))).ok()?;
        Some(site)
    }

    fn metadata(&self) -> &'static Metadata<'static> {
        self.metadata.get().copied().unwrap_or(&NOTHING)
    }
}

impl Callsite for Site {
    // The level is checked each time, as callers differ in the levels that they want.
    fn set_interest(&self, _: Interest) {}

    fn metadata(&self) -> &Metadata<'_> {
        self.metadata()
    }
}

/// As many values as `tracing` takes at a time.
const MOST_FIELDS: usize = 32;

impl Values {
    /// Has them as those of `site`, and `pid` with them.
    fn on<T>(&self, site: &'static Site, pid: u32, then: impl FnOnce(&ValueSet<'_>) -> T) -> T {
        let set = site.metadata().fields();
        let fields: Vec<Field> = set.iter().collect();
        let contents: Vec<(u8, Box<dyn Value + '_>)> =
            self.0.iter().map(|(index, content)| (*index, Content::as_value(content))).collect();
        let Some(last) = fields.last() else { return then(&set.value_set(&[] as &[(&Field, Option<&dyn Value>); 0])) };
        let mut entries: [(&Field, Option<&dyn Value>); MOST_FIELDS] = [(last, None); MOST_FIELDS];
        let used = usize::from(site.adds_pid);
        if site.adds_pid {
            entries[0].1 = Some(&pid);
        }
        let own = contents.iter().filter(|(index, _)| usize::from(*index) + used < fields.len());
        for (entry, (index, value)) in entries[used..].iter_mut().zip(own) {
            *entry = (&fields[usize::from(*index)], Some(&**value));
        }
        then(&set.value_set(&entries))
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use tracing::Subscriber;

    struct Panics;

    impl Subscriber for Panics {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            panic!("no");
        }
        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, _: &Event<'_>) {}
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    #[test]
    fn subscriber_that_panics_keeps_the_replay_going() {
        let caller = Caller::of(Dispatch::new(Panics));
        let mut replay = Replay::of_child(1);
        for _ in 0..2 {
            let (text, level) = (String::new(), number_of(Level::INFO));
            let (name, target, fields) = (text.clone(), text, Vec::new());
            let site = Place { is_span: false, name, target, level, file: None, line: None, module: None, fields };
            let mut bytes = Vec::new();
            wire::append(&Message::Event { parent: None, site, values: Values::default() }, &mut bytes).unwrap();
            replay.tell(&caller, &bytes);
        }
        assert!(replay.spans.is_empty());
    }
}
