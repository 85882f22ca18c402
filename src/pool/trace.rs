//! Carries the `tracing` spans and events of a task to the subscriber of its caller.
//!
//! A call that is made under a subscriber takes the caller's span with it, and its orders state the level that is of interest. While the worker
//! runs them, its main thread has a subscriber that writes each span and event among the results. In this process they are replayed under
//! the caller's span, each with a field `worker.pid`. Without a subscriber all of this costs one load per call.

use crate::channel::lane::EventWriter;
use crate::os::sync::{lock, unpoisoned};
use crate::wire;
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use tracing::callsite::{Callsite, Identifier};
use tracing::dispatcher::{self, DefaultGuard};
use tracing::field::{Field, FieldSet, Value, ValueSet, Visit};
use tracing::level_filters::LevelFilter;
use tracing::metadata::Kind;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, NoSubscriber};
use tracing::{Dispatch, Event, Level, Metadata, Span, Subscriber};

const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];

fn number_of(level: Level) -> u8 {
    LEVELS.iter().position(|other| *other == level).map_or(0, |at| at as u8 + 1)
}

/// A span or an event as it travels.
#[derive(Serialize, Deserialize)]
enum Message {
    Span { id: u64, parent: Option<u64>, site: Place, values: Values },
    Record { id: u64, values: Values },
    Event { parent: Option<u64>, site: Place, values: Values },
    Close { id: u64 },
}

/// Where in the program it is.
#[derive(Serialize, Deserialize, PartialEq, Eq, Hash)]
struct Place {
    is_span: bool,
    name: String,
    target: String,
    level: u8,
    file: Option<String>,
    line: Option<u32>,
    module: Option<String>,
    fields: Vec<String>,
}

impl Place {
    fn of(metadata: &Metadata<'_>) -> Self {
        let text = |text: Option<&str>| text.map(str::to_owned);
        Self {
            is_span: metadata.is_span(),
            name: metadata.name().into(),
            target: metadata.target().into(),
            level: number_of(*metadata.level()),
            file: text(metadata.file()),
            line: metadata.line(),
            module: text(metadata.module_path()),
            fields: metadata.fields().iter().map(|field| field.name().into()).collect(),
        }
    }
}

#[derive(Serialize, Deserialize)]
enum Content {
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    /// As its `Debug` has it.
    Shown(String),
}

/// By the fields' numbers.
#[derive(Default, Serialize, Deserialize)]
struct Values(Vec<(u8, Content)>);

/// A longer text is cut.
const LONGEST: usize = 2048;

fn cut(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

impl Values {
    fn add(&mut self, field: &Field, content: Content) {
        if let Ok(index) = field.index().try_into() {
            self.0.push((index, content));
        }
    }
}

impl Visit for Values {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, Content::Shown(cut(format!("{value:?}"))));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, Content::Bool(value));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, Content::Signed(value));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, Content::Unsigned(value));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, Content::Float(value));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, Content::Text(cut(value.to_owned())));
    }
}

// In the worker.

thread_local! {
    /// Where the thread that runs items tells; none while it is at something of the pool's own.
    static EVENT_WRITER: RefCell<Option<EventWriter>> = const { RefCell::new(None) };
    static IS_OPEN: Cell<bool> = const { Cell::new(false) };
    static ENTERED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// The subscriber of a worker.
struct Forward {
    /// The highest level that any caller has wanted.
    level: AtomicU8,
    next_id: AtomicU64,
    /// How many hold each span.
    held: Mutex<HashMap<u64, usize>>,
    /// Messages of other threads, and of the time between two items.
    late: Mutex<Vec<Message>>,
}

/// More than this is not kept for the next item.
const LATE: usize = 1024;

static FORWARD: OnceLock<(Arc<Forward>, Dispatch)> = OnceLock::new();

/// Has what the items of an order say told by `writer`, until the guard is dropped. A program that has given its
/// workers a subscriber of their own keeps it.
pub(super) fn listen(level: u8, writer: EventWriter) -> Option<DefaultGuard> {
    if !dispatcher::get_default(|default| default.is::<NoSubscriber>()) {
        return None;
    }
    let (forward, dispatch) = FORWARD.get_or_init(|| {
        let (held, late) = (Mutex::default(), Mutex::default());
        let forward = Arc::new(Forward { level: AtomicU8::new(level), next_id: AtomicU64::new(1), held, late });
        let dispatch = Dispatch::new(forward.clone());
        (forward, dispatch)
    });
    if forward.level.fetch_max(level, Relaxed) < level {
        tracing::callsite::rebuild_interest_cache();
    }
    EVENT_WRITER.set(Some(writer));
    Some(dispatcher::set_default(dispatch))
}

/// From here on the function's own code runs.
pub(super) fn open() {
    IS_OPEN.set(true);
}

/// From here on it does not. What is left to say is said.
pub(super) fn close() {
    if let Some((forward, _)) = FORWARD.get() {
        forward.tell_late();
    }
    IS_OPEN.set(false);
}

impl Forward {
    fn tell(&self, message: Message) {
        if !IS_OPEN.get() {
            let mut late = lock(&self.late);
            // A span that is over must be received of.
            if late.len() < LATE || matches!(message, Message::Close { .. }) {
                late.push(message);
            }
            return;
        }
        self.tell_late();
        send(&message);
    }

    fn tell_late(&self) {
        if IS_OPEN.get() {
            std::mem::take(&mut *lock(&self.late)).iter().for_each(send);
        }
    }

    fn entered() -> Option<u64> {
        ENTERED.with_borrow(|entered| entered.last().copied())
    }
}

fn send(message: &Message) {
    let mut bytes = Vec::new();
    if wire::append(message, &mut bytes).is_ok() {
        // Spans and events of the writer itself are not sent.
        IS_OPEN.set(false);
        EVENT_WRITER.with_borrow_mut(|writer| writer.iter_mut().for_each(|writer| writer.write(&bytes)));
        IS_OPEN.set(true);
    }
}

impl Subscriber for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        number_of(*metadata.level()) <= self.level.load(Relaxed)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let level = LEVELS.get(usize::from(self.level.load(Relaxed)).wrapping_sub(1));
        Some(level.map_or(LevelFilter::OFF, |level| LevelFilter::from_level(*level)))
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let id = self.next_id.fetch_add(1, Relaxed);
        let mut values = Values::default();
        attributes.record(&mut values);
        let explicit = attributes.parent().map(Id::into_u64);
        let parent = if attributes.is_contextual() { Self::entered() } else { explicit };
        lock(&self.held).insert(id, 1);
        self.tell(Message::Span { id, parent, site: Place::of(attributes.metadata()), values });
        // Numbers begin with 1.
        Id::from_u64(id)
    }

    fn record(&self, span: &Id, record: &Record<'_>) {
        let mut values = Values::default();
        record.record(&mut values);
        self.tell(Message::Record { id: span.into_u64(), values });
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut values = Values::default();
        event.record(&mut values);
        let parent = if event.is_contextual() { Self::entered() } else { event.parent().map(Id::into_u64) };
        self.tell(Message::Event { parent, site: Place::of(event.metadata()), values });
    }

    fn enter(&self, id: &Id) {
        ENTERED.with_borrow_mut(|entered| entered.push(id.into_u64()));
    }

    fn exit(&self, id: &Id) {
        ENTERED.with_borrow_mut(|entered| {
            if let Some(at) = entered.iter().rposition(|entered| *entered == id.into_u64()) {
                entered.remove(at);
            }
        });
    }

    fn clone_span(&self, id: &Id) -> Id {
        lock(&self.held).entry(id.into_u64()).and_modify(|held| *held += 1);
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        let id = id.into_u64();
        let is_over = {
            let mut held = lock(&self.held);
            let left = held.get_mut(&id).map(|held| {
                *held = held.saturating_sub(1);
                *held
            });
            left == Some(0) && held.remove(&id).is_some()
        };
        if is_over {
            self.tell(Message::Close { id });
        }
        is_over
    }
}

// In the process of the pool.

/// The span and subscriber that get the messages of a call's items.
pub(super) struct Caller {
    dispatch: Dispatch,
    span: Span,
}

impl Caller {
    /// The current caller, if it has a subscriber.
    #[inline]
    pub(super) fn here() -> Option<Arc<Self>> {
        if LevelFilter::current() == LevelFilter::OFF {
            return None;
        }
        Some(Arc::new(Self { dispatch: dispatcher::get_default(Dispatch::clone), span: Span::current() }))
    }

    /// How much is of interest; 0 is nothing.
    pub(super) fn level() -> u8 {
        LevelFilter::current().into_level().map_or(0, number_of)
    }
}

/// The open spans of a worker: of which call, and the spans that stand for them here.
type Spans = HashMap<u64, (Arc<Caller>, Id, &'static Site)>;

/// Replays the messages of one worker, in order.
pub(super) struct TraceSink {
    pid: u32,
    received: Mutex<VecDeque<(Arc<Caller>, Vec<u8>)>>,
    spans: Mutex<Spans>,
}

impl TraceSink {
    pub(super) fn new(pid: u32) -> Arc<Self> {
        Arc::new(Self { pid, received: Mutex::default(), spans: Mutex::default() })
    }

    /// Takes a message; under the pool's lock, so that messages stay in order.
    pub(super) fn receive(&self, caller: &Arc<Caller>, bytes: &[u8]) {
        lock(&self.received).push_back((caller.clone(), bytes.to_vec()));
    }

    /// Replays the messages, without that lock: subscribers are the user's code. One thread at a time replays for all.
    pub(super) fn pass_on(&self) {
        // Messages that other threads leave to us come before we let go, or are seen here.
        while !lock(&self.received).is_empty() {
            let mut spans = match self.spans.try_lock() {
                Ok(spans) => spans,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            loop {
                let next = lock(&self.received).pop_front();
                let Some((caller, bytes)) = next else { break };
                if let Ok(message) = wire::decode_bytes(&bytes, Vec::new()) {
                    // A panic of a subscriber is printed already, and must not keep callers from being woken.
                    let _ = catch_unwind(AssertUnwindSafe(|| self.tell(&mut spans, &caller, message)));
                }
            }
        }
    }

    fn tell(&self, spans: &mut Spans, caller: &Arc<Caller>, message: Message) {
        let parent_of = |spans: &Spans, parent: Option<u64>| match parent {
            Some(id) => spans.get(&id).map(|(_, id, _)| id.clone()).or_else(|| caller.span.id()),
            None => caller.span.id(),
        };
        let dispatch = &caller.dispatch;
        match message {
            Message::Span { id, parent, site, values } => {
                let Some(site) = Site::of(site).filter(|site| dispatch.enabled(site.metadata())) else {
                    return;
                };
                let parent = parent_of(spans, parent);
                let metadata = site.metadata();
                let here = values.on(site, self.pid, |values| match parent {
                    Some(parent) => dispatch.new_span(&Attributes::child_of(parent, metadata, values)),
                    None => dispatch.new_span(&Attributes::new_root(metadata, values)),
                });
                spans.insert(id, (caller.clone(), here, site));
            }
            Message::Record { id, values } => {
                if let Some((caller, here, site)) = spans.get(&id) {
                    values.on(site, self.pid, |values| caller.dispatch.record(here, &Record::new(values)));
                }
            }
            Message::Event { parent, site, values } => {
                let Some(site) = Site::of(site).filter(|site| dispatch.enabled(site.metadata())) else {
                    return;
                };
                let parent = parent_of(spans, parent);
                values.on(site, self.pid, |values| {
                    dispatch.event(&Event::new_child_of(parent, site.metadata(), values));
                });
            }
            Message::Close { id } => {
                if let Some((caller, here, _)) = spans.remove(&id) {
                    caller.dispatch.try_close(here);
                }
            }
        }
    }
}

impl Drop for TraceSink {
    /// The spans that a dead worker has left open are closed.
    fn drop(&mut self) {
        let spans = unpoisoned(self.spans.get_mut());
        for (_, (caller, id, _)) in spans.drain() {
            // A subscriber that panics must not end the driver.
            let _ = catch_unwind(AssertUnwindSafe(|| caller.dispatch.try_close(id)));
        }
    }
}

/// What a worker's place in the program is here. There are as many as the program has, and they are kept.
struct Site(OnceLock<&'static Metadata<'static>>);

/// More places than a program has: from here on somebody makes them up.
const MOST_SITES: usize = 1 << 16;

/// For a site that has not got its metadata, which nobody gets to see.
static NOWHERE: Site = Site(OnceLock::new());
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

impl Site {
    fn of(place: Place) -> Option<&'static Self> {
        static ALL: Mutex<Option<HashMap<Place, &'static Site>>> = Mutex::new(None);
        let site = {
            let mut all = lock(&ALL);
            let all = all.get_or_insert_with(HashMap::new);
            if let Some(site) = all.get(&place) {
                return Some(site);
            }
            if all.len() >= MOST_SITES {
                return None;
            }
            let site = Self::new(&place)?;
            all.insert(place, site);
            site
        };
        tracing::callsite::register(site);
        Some(site)
    }

    fn new(place: &Place) -> Option<&'static Self> {
        let level = *LEVELS.get(usize::from(place.level).wrapping_sub(1))?;
        let keep = |text: &str| -> &'static str { Box::leak(text.into()) };
        let names = place.fields.iter().take(MOST_FIELDS - 1).map(|name| keep(name));
        let names: Vec<_> = names.chain(["worker.pid"]).collect();
        let site: &'static Self = Box::leak(Box::new(Self(OnceLock::new())));
        let fields = FieldSet::new(names.leak(), Identifier(site));
        let (file, module) = (place.file.as_deref().map(keep), place.module.as_deref().map(keep));
        let (name, target) = (keep(&place.name), keep(&place.target));
        let kind = if place.is_span { Kind::SPAN } else { Kind::EVENT };
        let metadata = Metadata::new(name, target, level, file, place.line, module, fields, kind);
        site.0.set(Box::leak(Box::new(metadata))).ok()?;
        Some(site)
    }

    fn metadata(&self) -> &'static Metadata<'static> {
        self.0.get().copied().unwrap_or(&NOTHING)
    }
}

impl Callsite for Site {
    // Whoever tells something asks each time, as callers differ in what they want.
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
            self.0.iter().map(|(index, content)| (*index, content.as_value())).collect();
        let Some(last) = fields.last() else { return then(&set.value_set(&[] as &[(&Field, Option<&dyn Value>); 0])) };
        let mut entries: [(&Field, Option<&dyn Value>); MOST_FIELDS] = [(last, None); MOST_FIELDS];
        entries[0].1 = Some(&pid);
        let own = contents.iter().filter(|(index, _)| usize::from(*index) + 1 < fields.len());
        for (entry, (index, value)) in entries[1..].iter_mut().zip(own) {
            *entry = (&fields[usize::from(*index)], Some(&**value));
        }
        then(&set.value_set(&entries))
    }
}

impl Content {
    fn as_value(&self) -> Box<dyn Value + '_> {
        match self {
            Content::Bool(value) => Box::new(*value),
            Content::Signed(value) => Box::new(*value),
            Content::Unsigned(value) => Box::new(*value),
            Content::Float(value) => Box::new(*value),
            Content::Text(text) => Box::new(text.as_str()),
            Content::Shown(text) => Box::new(tracing::field::display(text)),
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

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
    fn a_subscriber_that_panics_keeps_nothing_from_others() {
        let caller = Arc::new(Caller { dispatch: Dispatch::new(Panics), span: Span::none() });
        let trace_sink = TraceSink::new(1);
        for _ in 0..2 {
            let (text, level) = (String::new(), number_of(Level::INFO));
            let (name, target, fields) = (text.clone(), text, Vec::new());
            let site = Place { is_span: false, name, target, level, file: None, line: None, module: None, fields };
            let mut bytes = Vec::new();
            wire::append(&Message::Event { parent: None, site, values: Values::default() }, &mut bytes).unwrap();
            trace_sink.receive(&caller, &bytes);
        }
        trace_sink.pass_on();
        assert!(lock(&trace_sink.received).is_empty());
    }
}
