//! A function <-> its address, and how it is run where it arrives.
//!
//! A function travels as the place of its entry in the image plus a fingerprint of its types. The receiver enters
//! only what the image's own table lists, and the entry runs only what was encoded for exactly these types.
#![forbid(unsafe_code)]

use super::function::Function;
use crate::error::{Error, ErrorKind, PanicInfo, Result};
use crate::os::image::{self, Enter};
use crate::os::sync::unpoisoned;
use crate::os::{fork, memory, spawn};
use crate::wire::{self, Attachment, Message, Parcel};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::RwLock;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use tokio_util::sync::CancellationToken;

/// The runtime that async functions run on: made at the first one, so that plain functions never pay for it, and
/// kept for the next.
#[doc(hidden)]
#[derive(Default)]
pub struct Executor {
    own: Option<tokio::runtime::Runtime>,
    /// A runtime that is there already, and what ends a wait in it.
    outer: Option<(tokio::runtime::Handle, CancellationToken)>,
}

impl Executor {
    /// One that drives async functions from a blocking thread of `runtime`, until they are cancelled.
    pub(super) fn inside(runtime: tokio::runtime::Handle, cancelled: CancellationToken) -> Self {
        Self { own: None, outer: Some((runtime, cancelled)) }
    }

    pub(super) fn run<R>(&mut self, future: impl Future<Output = R>) -> Result<R> {
        if let Some((runtime, cancelled)) = &self.outer {
            let value = runtime.block_on(cancelled.run_until_cancelled(future));
            return value.ok_or_else(|| Error::new(ErrorKind::Cancelled, "nobody waits for the task any more"));
        }
        Ok(self.runtime()?.block_on(future))
    }

    pub(super) fn has_runtime(&self) -> bool {
        self.own.is_some()
    }

    /// The current-thread runtime itself.
    pub(crate) fn runtime(&mut self) -> Result<&tokio::runtime::Runtime> {
        match &mut self.own {
            Some(runtime) => Ok(runtime),
            none => {
                let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
                Ok(none.insert(built.map_err(|error| Error::io("cannot build a tokio runtime in the child", error))?))
            }
        }
    }
}

/// Runs `work` where no runtime is entered, as a process's function is to find it. Where one is, because `init` was called
/// inside `#[tokio::main]`, that is a thread of its own; an error means that it could not be had.
pub(super) fn outside_runtime<R: Send>(work: impl FnOnce() -> R + Send) -> std::io::Result<R> {
    if !is_inside_runtime() {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        // Called as the thread is that it stands for, and with as much stack.
        let builder = std::thread::Builder::new().name("main".into()).stack_size(spawn::main_stack());
        let thread = builder.spawn_scoped(scope, work)?;
        Ok(thread.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload)))
    })
}

pub(super) fn is_inside_runtime() -> bool {
    tokio::runtime::Handle::try_current().is_ok()
}

/// A function as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Call {
    offset: u64,
    fingerprint: u64,
}

impl Call {
    pub(crate) fn of<F, A, M>(function: F) -> Self
    where
        F: Function<A, M>,
        A: DeserializeOwned + 'static,
    {
        let offset = image::offset_of::<EntryPoint<F, A, M>>(function);
        Self { offset, fingerprint: fingerprint::<F, A, F::Output>() }
    }

    /// Decodes the arguments, runs the function and encodes what came of it, a panic included.
    pub(crate) fn run(self, arguments: Parcel, executor: &mut Executor) -> Outcome {
        let Some(enter) = image::entry_at(self.offset) else {
            return Outcome::error(Error::new(ErrorKind::Decode, image::why_unknown(self.offset)));
        };
        let executor_here = std::mem::take(executor);
        let fingerprint = self.fingerprint;
        let work = Work::One(arguments);
        let mut frame = Frame { fingerprint, work, executor: executor_here, outcome: None };
        enter(&mut frame);
        *executor = frame.executor;
        frame.outcome.unwrap_or_else(|| {
            let why = "a call names something that is not a function for other processes";
            Outcome::error(Error::new(ErrorKind::Decode, why))
        })
    }

    /// Runs the function for each item that `batch` has, which comes back. An error: the function could not be
    /// entered, and the items are still there.
    pub(crate) fn run_batch(self, batch: Box<dyn Batch>, executor: &mut Executor) -> (Box<dyn Batch>, Result<()>) {
        let Some(enter) = image::entry_at(self.offset) else {
            return (batch, Err(Error::new(ErrorKind::Decode, image::why_unknown(self.offset))));
        };
        let (fingerprint, executor_here) = (self.fingerprint, std::mem::take(executor));
        let mut frame = Frame { fingerprint, work: Work::Many(batch), executor: executor_here, outcome: None };
        enter(&mut frame);
        *executor = frame.executor;
        let entered = match frame.outcome {
            None => Ok(()),
            Some(outcome) => Outcome::read(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }),
        };
        match frame.work {
            Work::Many(batch) => (batch, entered),
            // An entry takes one piece of work only.
            Work::One(_) | Work::Taken => (Box::new(NoItems), entered),
        }
    }

    /// The function's name, as the compiler spells it. Enters the function's entry, and runs nothing of the user's.
    ///
    /// # Errors
    /// `Decode` if this program has no such function, or one for other types.
    pub(crate) fn label(self) -> Result<&'static str> {
        let (batch, entered) = self.run_batch(Box::new(Nameplate(None)), &mut Executor::default());
        entered?;
        let nameplate = (batch as Box<dyn Any>).downcast::<Nameplate>().ok();
        let unnamed =
            || Error::new(ErrorKind::Decode, "a call names something that is not a function for other processes");
        nameplate.and_then(|nameplate| nameplate.0).ok_or_else(unnamed)
    }

    /// As two words, for a head that is not encoded.
    pub(crate) fn to_words(self) -> [u64; 2] {
        [self.offset, self.fingerprint]
    }

    pub(crate) fn from_words([offset, fingerprint]: [u64; 2]) -> Self {
        Self { offset, fingerprint }
    }
}

/// Equal on both sides exactly if function, arguments and result are of the same types.
fn fingerprint<F: 'static, A: 'static, R: 'static>() -> u64 {
    /// A [`TypeId`] is a hash already, and hands over as much of it as fits: so this is a constant.
    #[derive(Default)]
    struct Words(u64);

    impl Hasher for Words {
        fn write(&mut self, bytes: &[u8]) {
            // FNV-1a, should it ever come in bytes.
            self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        }
        fn write_u64(&mut self, word: u64) {
            self.0 = self.0.rotate_left(32) ^ word;
        }
        fn finish(&self) -> u64 {
            self.0
        }
    }

    let mut words = Words::default();
    TypeId::of::<(F, A, R)>().hash(&mut words);
    words.finish()
}

/// The input and output of an entry.
struct Frame {
    fingerprint: u64,
    work: Work,
    executor: Executor,
    outcome: Option<Outcome>,
}

enum Work {
    One(Parcel),
    Many(Box<dyn Batch>),
    Taken,
}

/// Items that one function is to be run for, and where their outcomes go.
pub(crate) trait Batch: Any {
    /// What the function is called, before anything else.
    fn begin(&mut self, label: &'static str);
    /// Starts the next item: its arguments.
    fn next(&mut self) -> Option<Result<Arguments<'_>>>;
    /// Tells what came of the item that was started last; false if nobody wants to know any more.
    fn report(&mut self, tag: u8, payload: &[u8], attachments: &[Attachment]) -> bool;
}

/// The arguments of one item.
pub(crate) struct Arguments<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) fds: Vec<std::os::fd::OwnedFd>,
}

struct NoItems;

impl Batch for NoItems {
    fn begin(&mut self, _: &'static str) {}
    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        None
    }
    fn report(&mut self, _: u8, _: &[u8], _: &[Attachment]) -> bool {
        false
    }
}

/// A batch without items that notes what the function is called.
struct Nameplate(Option<&'static str>);

impl Batch for Nameplate {
    fn begin(&mut self, label: &'static str) {
        self.0 = Some(label);
    }
    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        None
    }
    fn report(&mut self, _: u8, _: &[u8], _: &[Attachment]) -> bool {
        false
    }
}

/// Reports an error as what came of an item.
pub(crate) fn report_error(batch: &mut dyn Batch, error: Error) -> bool {
    let (tag, payload) = encode_error(&error);
    batch.report(tag, &payload, &[])
}

/// An error as the tag and the payload of an outcome.
pub(crate) fn encode_error(error: &Error) -> (u8, Vec<u8>) {
    match wire::encode(error) {
        Ok(message) => (ERROR[0], message.payload(error).to_vec()),
        // An error is made of texts and numbers; if even that fails, its text still travels.
        Err(_) => (TEXT, error.to_string().into_bytes()),
    }
}

struct EntryPoint<F, A, M>(PhantomData<(F, A, M)>);

impl<F, A, M> Enter for EntryPoint<F, A, M>
where
    F: Function<A, M>,
    A: DeserializeOwned + 'static,
{
    type Function = F;

    fn enter(function: F, frame: &mut dyn Any) {
        let Some(frame) = frame.downcast_mut::<Frame>() else { return };
        if frame.fingerprint != fingerprint::<F, A, F::Output>() {
            let what = std::any::type_name::<F>();
            let why = format!("the arguments were encoded for another function than {what}: not the same build");
            frame.outcome = Some(Outcome::error(Error::new(ErrorKind::Decode, why)));
            return;
        }
        let Frame { work, executor, .. } = frame;
        match work {
            Work::Many(batch) => {
                batch.begin(std::any::type_name::<F>());
                LAST_PANIC.set(None);
                while each::<F, A, M>(function, &mut **batch, executor) {}
            }
            Work::One(_) => {
                let Work::One(arguments) = std::mem::replace(work, Work::Taken) else { return };
                let here = Here::now();
                let outcome = catch_panic(|| {
                    let value = function.call(wire::decode(arguments)?, executor);
                    here.end_others(0);
                    Outcome::value(value?)
                });
                here.end_others(PANICKED);
                frame.outcome = Some(outcome.unwrap_or_else(Outcome::error));
            }
            Work::Taken => {}
        }
    }
}

/// Runs the next item of a batch; false if it was the last.
#[inline]
fn each<F, A, M>(function: F, batch: &mut dyn Batch, executor: &mut Executor) -> bool
where
    F: Function<A, M>,
    A: DeserializeOwned + 'static,
{
    // One piece of code at a time runs in a batch, and what a panic leaves half done is the function's own.
    let mut goes_on = None;
    let here = Here::now();
    let done = catch_next_panic(|| {
        let Some(arguments) = batch.next() else {
            goes_on = Some(false);
            return Ok(());
        };
        let Arguments { bytes, fds } = arguments?;
        let value = function.call(wire::decode_bytes(bytes, fds)?, executor);
        here.end_others(0);
        let value = value?;
        let message = wire::encode(&value)?;
        let value = message.needed(value);
        goes_on = Some(batch.report(VALUE[0], message.payload_of(value.as_ref()), &message.attachments));
        Ok(())
    });
    here.end_others(PANICKED);
    match (goes_on, done) {
        (Some(goes_on), _) => goes_on,
        (None, Err(error)) => report_error(batch, error),
        (None, Ok(())) => false,
    }
}

/// The process in which a function was called. One that the function forks, and that comes out of it too, is none of ours:
/// it would report a second result, and take the next order as well.
#[derive(Clone, Copy)]
struct Here {
    was_forked: bool,
}

/// The exit code of a Rust program that has panicked.
const PANICKED: i32 = 101;

impl Here {
    fn now() -> Self {
        Self { was_forked: fork::is_forked() }
    }

    /// Ends any other process, as a forked process is to end: without what the one that it was forked from does at its end.
    #[inline]
    fn end_others(self, code: i32) {
        if fork::is_forked() && !self.was_forked {
            spawn::exit_now(code);
        }
    }
}

/// What came of a call, encoded, on its way back.
pub(crate) struct Outcome(Box<dyn Encoded>);

/// The last byte of an outcome's payload: so what is large is not moved to take it off.
const VALUE: &[u8] = &[0];
const ERROR: &[u8] = &[1];
const TEXT: u8 = 2;
/// The tag of an outcome that is a value.
pub(crate) const IS_VALUE: u8 = VALUE[0];
/// The largest tag that an outcome has.
pub(crate) const LAST_TAG: u8 = TEXT;

impl Outcome {
    fn value<R: Serialize + 'static>(value: R) -> Result<Self> {
        let message = wire::encode(&value)?;
        Ok(Self(Box::new(EncodedResult { tag: VALUE, value: message.needed(value), message })))
    }

    pub(crate) fn error(error: Error) -> Self {
        match wire::encode(&error) {
            Ok(message) => Self(Box::new(EncodedResult { tag: ERROR, value: Some(error), message })),
            // An error is made of texts and numbers; if even that fails, its text still travels.
            Err(_) => Self(Box::new(error.to_string().into_bytes())),
        }
    }

    /// The payload, in two parts to be sent one after the other.
    pub(crate) fn parts(&self) -> [&[u8]; 2] {
        self.0.parts()
    }

    pub(crate) fn attachments(&self) -> &[Attachment] {
        self.0.attachments()
    }

    /// The result that `parts` and `attachments` brought here.
    pub(crate) fn read<R: DeserializeOwned + 'static>(mut parcel: Parcel) -> Result<R> {
        match parcel.bytes.pop() {
            Some(0) => wire::decode(parcel),
            Some(1) => Err(wire::decode(parcel)?),
            Some(_) => Err(Error::other(String::from_utf8_lossy(&parcel.bytes).into_owned())),
            None => Err(Error::new(ErrorKind::Decode, "an outcome without content")),
        }
    }
}

impl Outcome {
    /// The result that a [`Batch`] was told.
    #[inline]
    pub(crate) fn read_reported<R>(tag: u8, bytes: &[u8], fds: Vec<std::os::fd::OwnedFd>) -> Result<R>
    where
        R: DeserializeOwned + 'static,
    {
        match tag {
            IS_VALUE => wire::decode_bytes(bytes, fds),
            1 => Err(wire::decode_bytes(bytes, fds)?),
            _ => Err(Error::other(String::from_utf8_lossy(bytes).into_owned())),
        }
    }
}

trait Encoded {
    fn parts(&self) -> [&[u8]; 2];
    fn attachments(&self) -> &[Attachment];
}

struct EncodedResult<R> {
    tag: &'static [u8],
    value: Option<R>,
    message: Message,
}

impl<R: 'static> Encoded for EncodedResult<R> {
    fn parts(&self) -> [&[u8]; 2] {
        [self.message.payload_of(self.value.as_ref()), self.tag]
    }

    fn attachments(&self) -> &[Attachment] {
        &self.message.attachments
    }
}

impl Encoded for Vec<u8> {
    fn parts(&self) -> [&[u8]; 2] {
        [self, &[TEXT]]
    }

    fn attachments(&self) -> &[Attachment] {
        &[]
    }
}

thread_local! {
    /// The last panic of this thread, as the hook saw it.
    static LAST_PANIC: RefCell<Option<PanicInfo>> = const { RefCell::new(None) };
}

/// From now on panics of this process are noted where they happen, and printed as before.
pub(crate) fn note_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        memory::use_spare();
        print(panic);
        let message = text_of(panic.payload());
        let is_fatal = cfg!(panic = "abort") || CANNOT_UNWIND.contains(&&*message);
        let backtrace = match wants_backtraces() {
            true => std::backtrace::Backtrace::force_capture().to_string(),
            false => String::new(),
        };
        let noted = PanicInfo::new(message, panic.location().map(ToString::to_string), backtrace);
        let report = ON_FATAL_PANIC.try_read().ok().and_then(|report| *report);
        if is_fatal && let Some(report) = report {
            // The panic that must not leave a function says more than the one which says that it must not.
            let first = LAST_PANIC.try_with(|last| last.try_borrow_mut().ok().and_then(|mut last| last.take()));
            return report(&first.ok().flatten().unwrap_or(noted));
        }
        // A panic while the thread ends, or inside this very hook, is printed and not noted.
        let _ = LAST_PANIC.try_with(|last| last.try_borrow_mut().map(|mut last| *last = Some(noted)));
    }));
}

/// What the language panics with where a panic comes to a place that it must not leave, and the process aborts.
const CANNOT_UNWIND: [&str; 2] = ["panic in a function that cannot unwind", "panic in a destructor during cleanup"];

static ON_FATAL_PANIC: RwLock<Option<fn(&PanicInfo)>> = RwLock::new(None);

/// Has `tell` hand over a panic that ends this process, before it does: after it nothing of ours runs any more.
pub(crate) fn on_fatal_panic(report: fn(&PanicInfo)) {
    *unpoisoned(ON_FATAL_PANIC.write()) = Some(report);
}

/// Whether the builder of this process has asked for the stacks of panics: 0 if it has said nothing, 1 for no, 2 for yes.
static BACKTRACES: AtomicU8 = AtomicU8::new(0);

pub(crate) fn keep_backtraces(yes: Option<bool>) {
    BACKTRACES.store(yes.map_or(0, |yes| 1 + u8::from(yes)), Relaxed);
}

/// As std decides it for a `Backtrace`. Not remembered: the fork server has another environment than its children.
fn wants_backtraces() -> bool {
    let variables = ["RUST_LIB_BACKTRACE", "RUST_BACKTRACE"];
    match BACKTRACES.load(Relaxed) {
        0 => variables.into_iter().find_map(std::env::var_os).is_some_and(|value| value != "0"),
        said => said == 2,
    }
}

/// What a panic's payload says.
pub(crate) fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a panic without a text".into())
}

/// Runs `work`; a panic becomes an error that tells where and why.
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    LAST_PANIC.with_borrow_mut(|last| drop(last.take_if(|_| true)));
    catch_next_panic(work)
}

/// Runs user code, such as a drop, whose panic has been reported by the hook and concerns nobody else.
pub(crate) fn survive(work: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
        discard(payload);
    }
}

/// A payload is the user's, and its drop may panic like any other.
#[cold]
fn discard(payload: Box<dyn Any + Send>) {
    if let Err(worse) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(worse);
    }
}

/// The same where no panic was noted since the last one became an error.
#[inline]
fn catch_next_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    // The state that a panic may have left half done is the function's own, or goes with the process.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let noted = LAST_PANIC.take().unwrap_or_else(|| {
            // The function has set a hook of its own.
            PanicInfo::new(text_of(&*payload), None, String::new())
        });
        discard(payload);
        let who = super::info::current_process();
        let place = noted.location().map(|place| format!(" at {place}")).unwrap_or_default();
        let (name, pid) = (who.name(), who.pid());
        let message = format!("{name} (pid {pid}) panicked{place}: {}", noted.message());
        Err(Error::new(ErrorKind::Panicked, message).with_panic(noted))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel<T: Serialize + 'static>(value: T) -> Parcel {
        let bytes = wire::encode(&value).unwrap().payload(&value).to_vec();
        Parcel { bytes, fds: Vec::new() }
    }

    fn run<F, A, M>(function: F, args: A) -> Result<F::Output>
    where
        F: Function<A, M>,
        A: Serialize + DeserializeOwned + Send + 'static,
    {
        let outcome = Call::of(function).run(parcel(args), &mut Executor::default());
        Outcome::read(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() })
    }

    fn twice(x: i64) -> i64 {
        2 * x
    }
    async fn later(x: i64, y: String) -> String {
        tokio::task::yield_now().await;
        format!("{x}{y}")
    }
    fn zero<T: Default>() -> T {
        T::default()
    }

    #[test]
    fn every_kind_of_function_is_entered_by_its_address() {
        assert_eq!(run(twice, (4,)).unwrap(), 8);
        assert_eq!(run(later, (4, "x".into())).unwrap(), "4x");
        assert_eq!(run(|a: i32, b: i32| a - b, (5, 3)).unwrap(), 2);
        assert_eq!(run(async |a: i32| a + 1, (5,)).unwrap(), 6);
        assert_eq!(run(zero::<f64>, ()).unwrap(), 0.0);
        assert_eq!(run(zero::<u8>, ()).unwrap(), 0);
        assert_eq!(run(std::process::id, ()).unwrap(), std::process::id());
    }

    #[test]
    fn an_address_that_is_not_listed_is_refused() {
        let call = Call { offset: Call::of(twice).offset + 1, fingerprint: 0 };
        let outcome = call.run(parcel((4i64,)), &mut Executor::default());
        let error = Outcome::read::<i64>(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
    }

    #[test]
    fn a_wrong_fingerprint_is_refused() {
        let call = Call { fingerprint: Call::of(zero::<u8>).fingerprint, ..Call::of(twice) };
        let outcome = call.run(parcel((4i64,)), &mut Executor::default());
        let error = Outcome::read::<i64>(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
    }

    #[test]
    fn a_panic_is_an_error_and_the_next_call_is_unharmed() {
        let fails = |x: i32| -> i32 { std::panic::panic_any(format!("no {x}")) };
        let error = run(fails, (7,)).unwrap_err();
        assert_eq!((error.kind(), error.panic().unwrap().message()), (ErrorKind::Panicked, "no 7"));
        assert_eq!(run(twice, (1,)).unwrap(), 2);
    }
}
