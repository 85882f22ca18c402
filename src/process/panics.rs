//! Panics of user code: noted where they happen, turned into errors, reported where they end the process.
#![forbid(unsafe_code)]

use super::info::current_process;
use crate::error::{Error, ErrorKind, PanicInfo, Result, Topic};
use crate::os::sync::unpoisoned;
use crate::os::{memory, spawn};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::RwLock;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

thread_local! {
    /// The last panic of this thread, noted by the hook.
    static LAST_PANIC: RefCell<Option<PanicInfo>> = const { RefCell::new(None) };
}

/// Sets a panic hook that notes panics of this process and prints them as before.
pub(crate) fn note_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let _spare = memory::use_spare();
        let message = text_of(panic.payload());
        // The standard library hangs where there is no room for the stack that it is to show.
        let has_room = !wants_backtraces() || memory::has_spare();
        match has_room {
            true => print(panic),
            false => print_without_stack(panic, &message),
        }
        let is_fatal = cfg!(panic = "abort") || CANNOT_UNWIND.contains(&&*message);
        let backtrace = match has_room && wants_backtraces() {
            true => std::backtrace::Backtrace::force_capture().to_string(),
            false => String::new(),
        };
        let noted = PanicInfo::new(message, panic.location().map(ToString::to_string), backtrace);
        let report = ON_FATAL_PANIC.try_read().ok().and_then(|report| *report);
        if is_fatal && let Some(report) = report {
            // The first panic is more useful than the one that reports it in a place that it must not leave.
            let first = LAST_PANIC.try_with(|last| last.try_borrow_mut().ok().and_then(|mut last| last.take()));
            return report(&first.ok().flatten().unwrap_or(noted));
        }
        // A panic while the thread ends, or inside this hook, is printed and not noted.
        let _ = LAST_PANIC.try_with(|last| last.try_borrow_mut().map(|mut last| *last = Some(noted)));
    }));
}

fn print_without_stack(panic: &PanicHookInfo<'_>, message: &str) {
    let (current, place) = (std::thread::current(), panic.location().map(|place| format!(" at {place}")));
    spawn::print_line(&format!(
        "thread '{}' (pid {}) panicked{}: {message} (at the limit of the address space there is no room to find out its stack) {}",
        current.name().unwrap_or("<unnamed>"),
        std::process::id(),
        place.unwrap_or_default(),
        Topic::MemoryLimit
    ));
}

/// Messages of the second panic where a panic reaches a place that it must not leave, and the process aborts.
const CANNOT_UNWIND: [&str; 2] = ["panic in a function that cannot unwind", "panic in a destructor during cleanup"];

static ON_FATAL_PANIC: RwLock<Option<fn(&PanicInfo)>> = RwLock::new(None);

/// Has `report` called with a panic that ends this process, before it does.
pub(crate) fn on_fatal_panic(report: fn(&PanicInfo)) {
    *unpoisoned(ON_FATAL_PANIC.write()) = Some(report);
}

/// Whether the builder of this process asked for the stacks of panics: 0 for the default, 1 for no, 2 for yes.
static BACKTRACES: AtomicU8 = AtomicU8::new(0);

pub(crate) fn keep_backtraces(yes: Option<bool>) {
    BACKTRACES.store(yes.map_or(0, |yes| 1 + u8::from(yes)), Relaxed);
}

/// Decides as std does for a `Backtrace`. Not cached: the fork server has another environment than its children.
fn wants_backtraces() -> bool {
    let variables = ["RUST_LIB_BACKTRACE", "RUST_BACKTRACE"];
    match BACKTRACES.load(Relaxed) {
        0 => variables.into_iter().find_map(std::env::var_os).is_some_and(|value| value != "0"),
        said => said == 2,
    }
}

/// The text of a panic's payload.
pub(crate) fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a panic without a text".into())
}

/// Forgets the last panic, before a batch of calls of which each may panic.
pub(super) fn forget_last() {
    LAST_PANIC.set(None);
}

/// Runs `work`; a panic becomes an error with its place and message.
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    LAST_PANIC.with_borrow_mut(|last| drop(last.take_if(|_| true)));
    catch_next_panic(work)
}

/// Runs user code, such as a drop, and ignores its panic, which the hook has printed.
pub(crate) fn survive(work: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
        discard(payload);
        memory::return_spare();
    }
}

/// Drops a payload, which is the user's: its drop may panic.
#[cold]
fn discard(payload: Box<dyn Any + Send>) {
    if let Err(worse) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(worse);
    }
}

/// Like [`catch_panic`], where no panic was noted since the last one became an error.
#[inline]
pub(super) fn catch_next_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    memory::return_spare(); // After a panic that was caught elsewhere: in a task, or by the function itself.
    // State that a panic leaves half changed belongs to the function, or ends with the process.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let noted = LAST_PANIC.take().unwrap_or_else(|| {
            // The function has set a hook of its own.
            PanicInfo::new(text_of(&*payload), None, String::new())
        });
        discard(payload);
        let who = current_process();
        let place = noted.location().map(|place| format!(" at {place}")).unwrap_or_default();
        let (name, pid) = (who.name(), who.pid());
        // A panic of this crate has a topic of its own.
        let (why, topic) = Topic::cut(noted.message());
        let message = format!("{name} (pid {pid}) panicked{place}: {why}");
        let error = Error::new(ErrorKind::Panicked, message).explained_by(topic.unwrap_or(Topic::Panicked));
        let error = error.with_panic(noted);
        memory::return_spare();
        Err(error)
    })
}
