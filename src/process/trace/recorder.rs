//! The subscriber of a process whose spans and events are for another one.
#![forbid(unsafe_code)]

use super::record::{LEVELS, Message, Place, Values, number_of};
use crate::os::sync::lock;
use crate::os::{background, fork};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};
use tracing::dispatcher;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, NoSubscriber};
use tracing::{Dispatch, Event, Metadata, Subscriber};
use tracing_core::span::Current;

/// Where a recorder's messages go.
pub(crate) trait Sink: Send + Sync + 'static {
    /// Takes a message; `false` if it is dropped.
    fn take(&self, message: Message) -> bool;
}

thread_local! {
    /// The spans that this thread is in, the innermost last.
    static ENTERED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// `None` at the end of a thread, when it is gone: a value that is dropped then may still record.
fn with_entered<T>(then: impl FnOnce(&mut Vec<u64>) -> T) -> Option<T> {
    ENTERED.try_with(|entered| then(&mut entered.borrow_mut())).ok()
}

/// The number of the first span. The spans of a subscriber of the program have others: a counter does not come so far, and a registry has not so
/// many spans at a time.
const FIRST_ID: u64 = 0x30_0000_0001;

/// Writes each span and event to a sink.
pub(crate) struct Recorder<S> {
    pub(crate) sink: S,
    /// The highest level that anybody has wanted.
    level: AtomicU8,
    next_id: AtomicU64,
    open: Mutex<HashMap<u64, OpenSpan>>,
    /// The program's own subscriber, where it may still set one.
    own: Option<OwnSubscriber>,
}

struct OpenSpan {
    holders: usize,
    metadata: &'static Metadata<'static>,
    /// The sink has taken it, and so must take its end.
    is_sent: bool,
}

impl<S: Sink> Recorder<S> {
    pub(crate) fn new(level: u8, sink: S) -> Self {
        let (level, next_id) = (AtomicU8::new(level), AtomicU64::new(FIRST_ID));
        Self { sink, level, next_id, open: Mutex::default(), own: None }
    }

    /// Passes all on to a global subscriber as soon as the program sets one.
    pub(super) fn giving_way(self) -> Self {
        Self { own: Some(OwnSubscriber::default()), ..self }
    }

    /// Forgets the subscribers that were made until now.
    pub(super) fn begin(&self) {
        self.own.iter().for_each(|own| own.looks_left.store(0, Relaxed));
    }

    /// Has it record whatever is of `level` or above.
    pub(crate) fn raise(&self, level: u8) {
        if self.level.fetch_max(level, Relaxed) < level {
            tracing::callsite::rebuild_interest_cache();
        }
    }

    /// The subscriber that the program has set for itself.
    fn own(&self) -> Option<&Dispatch> {
        self.own.as_ref()?.get()
    }

    fn is_of_interest(&self, metadata: &Metadata<'_>) -> bool {
        number_of(*metadata.level()) <= self.level.load(Relaxed)
    }

    /// Whether a span is one of this recorder, and not one of the program's own subscriber.
    fn has(&self, id: &Id) -> bool {
        (FIRST_ID..self.next_id.load(Relaxed)).contains(&id.into_u64())
    }

    /// The program's own subscriber, if `id` is a span of it.
    fn owner_of(&self, id: &Id) -> Option<&Dispatch> {
        self.own().filter(|_| !self.has(id))
    }

    fn entered() -> Option<u64> {
        with_entered(|entered| entered.last().copied()).flatten()
    }
}

impl<S: Sink> Subscriber for Recorder<S> {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // An own subscriber that wants more is asked by `tracing` itself here, and by `enabled` each time.
        if self.is_of_interest(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.own().map_or_else(|| self.is_of_interest(metadata), |own| own.enabled(metadata))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // `tracing` asks for it whenever a subscriber is made.
        self.own.iter().for_each(|own| own.looks_left.store(LOOKS, Relaxed));
        let level = LEVELS.get(usize::from(self.level.load(Relaxed)).wrapping_sub(1));
        Some(level.map_or(LevelFilter::OFF, |level| LevelFilter::from_level(*level)))
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let explicit = attributes.parent();
        if let Some(own) = self.own() {
            return match explicit {
                Some(parent) if self.has(parent) => {
                    own.new_span(&Attributes::new_root(attributes.metadata(), attributes.values()))
                }
                _ => own.new_span(attributes),
            };
        }
        let id = self.next_id.fetch_add(1, Relaxed);
        // Another thread may have had the lock at the fork.
        if fork::is_forked() {
            return Id::from_u64(id);
        }
        let mut values = Values::default();
        attributes.record(&mut values);
        let parent = if attributes.is_contextual() { Self::entered() } else { explicit.map(Id::into_u64) };
        let metadata = attributes.metadata();
        let is_sent = self.sink.take(Message::Span { id, parent, site: Place::of(metadata), values });
        lock(&self.open).insert(id, OpenSpan { holders: 1, metadata, is_sent });
        // Numbers are not 0.
        Id::from_u64(id)
    }

    fn record(&self, span: &Id, record: &Record<'_>) {
        if let Some(own) = self.owner_of(span) {
            return own.record(span, record);
        }
        if !fork::is_forked() && lock(&self.open).get(&span.into_u64()).is_some_and(|open| open.is_sent) {
            let mut values = Values::default();
            record.record(&mut values);
            self.sink.take(Message::Record { id: span.into_u64(), values });
        }
    }

    fn record_follows_from(&self, span: &Id, follows: &Id) {
        if let Some(own) = self.owner_of(span).filter(|_| !self.has(follows)) {
            own.record_follows_from(span, follows);
        }
    }

    fn event(&self, event: &Event<'_>) {
        if let Some(own) = self.own() {
            return own.event(event);
        }
        let mut values = Values::default();
        event.record(&mut values);
        let parent = if event.is_contextual() { Self::entered() } else { event.parent().map(Id::into_u64) };
        self.sink.take(Message::Event { parent, site: Place::of(event.metadata()), values });
    }

    fn enter(&self, id: &Id) {
        match self.owner_of(id) {
            Some(own) => own.enter(id),
            None => _ = with_entered(|entered| entered.push(id.into_u64())),
        }
    }

    fn exit(&self, id: &Id) {
        if let Some(own) = self.owner_of(id) {
            return own.exit(id);
        }
        with_entered(|entered| {
            if let Some(at) = entered.iter().rposition(|entered| *entered == id.into_u64()) {
                entered.remove(at);
            }
        });
    }

    fn clone_span(&self, id: &Id) -> Id {
        if let Some(own) = self.owner_of(id) {
            return own.clone_span(id);
        }
        if fork::is_forked() {
            return id.clone();
        }
        lock(&self.open).entry(id.into_u64()).and_modify(|open| open.holders += 1);
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        if let Some(own) = self.owner_of(&id) {
            return own.try_close(id);
        }
        if fork::is_forked() {
            return false;
        }
        let id = id.into_u64();
        let ended = {
            let mut open = lock(&self.open);
            let left = open.get_mut(&id).map(|open| {
                open.holders = open.holders.saturating_sub(1);
                open.holders
            });
            if left == Some(0) { open.remove(&id) } else { None }
        };
        if ended.as_ref().is_some_and(|ended| ended.is_sent) {
            self.sink.take(Message::Close { id });
        }
        ended.is_some()
    }

    fn current_span(&self) -> Current {
        if let Some(own) = self.own() {
            return own.current_span();
        }
        if fork::is_forked() {
            return Current::none();
        }
        let entered = Self::entered().and_then(|id| Some((id, lock(&self.open).get(&id)?.metadata)));
        entered.map_or_else(Current::none, |(id, metadata)| Current::new(Id::from_u64(id), metadata))
    }
}

/// The global subscriber of a program, which may be set at any time.
///
/// A recorder is the subscriber of some threads only, so that the program can set one for all. But a thread's subscriber hides the one for all, also from
/// itself. So once a subscriber was made, another thread looks whether there is one for all by now.
#[derive(Default)]
struct OwnSubscriber {
    found: OnceLock<Dispatch>,
    looks_left: AtomicU8,
}

/// How often that is looked for after a subscriber was made: it may become the one for all a moment later.
const LOOKS: u8 = 3;

impl OwnSubscriber {
    #[inline]
    fn get(&self) -> Option<&Dispatch> {
        if self.looks_left.load(Relaxed) > 0 {
            self.look();
        }
        self.found.get()
    }

    #[cold]
    fn look(&self) {
        if self.found.get().is_none() {
            let look = || dispatcher::get_default(Dispatch::clone);
            let looks = background::spawn(std::thread::Builder::new(), look);
            let looked = looks.ok().and_then(|looks| looks.join().ok());
            if let Some(found) = looked.filter(|found| !found.is::<NoSubscriber>()) {
                // The first to find it sets it.
                let _ = self.found.set(found);
                return self.looks_left.store(0, Relaxed);
            }
        }
        let less = |left: u8| left.checked_sub(1);
        let _ = self.looks_left.fetch_update(Relaxed, Relaxed, less);
    }
}
