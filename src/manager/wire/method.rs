//! Functions that make an object or work on one, and how they are entered where the object is.

use super::messages::{Lend, MAKER, Op, Reader, Span, Writer, malformed};
use super::waiting::{self, Settle, Ticket, Try, Waits};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::image::{self, Enter};
use crate::process::entry::{catch_panic, fingerprint, survive};
use crate::process::function::{captures_nothing, up_to_eleven};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::any::{Any, type_name};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::marker::PhantomData;
use std::task::Poll;

/// A function that creates an object, for [`Manager::create`](crate::Manager::create).
///
/// It is implemented for all functions of up to 11 arguments, and for closures that capture nothing. `Args` is the tuple of the
/// arguments. It cannot be implemented by hand.
///
/// ```
/// fn makes<F: multiprocess::Maker<Args>, Args>(_: F) {}
///
/// fn open(path: String, mode: u32) -> (String, u32) { (path, mode) }
/// makes(open);
/// makes(|n: usize| vec![0u8; n]);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot make an object of a manager from the arguments `{Args}`",
    note = "it must be a `fn` or a closure that captures nothing, called with one tuple of all arguments"
)]
pub trait Maker<Args>: Copy + Send + 'static {
    /// The type of the object. The object stays in the manager's process, so it need not be a serde value.
    type Object: Send + 'static;

    #[doc(hidden)]
    fn make(self, args: Args) -> Self::Object;
}

/// A function that can be called on an object of type `T`, by [`Proxy::call`](crate::Proxy::call).
///
/// It is implemented for all functions of `&mut T` and up to 11 more arguments, and for closures that capture nothing. `Args` is the
/// tuple of the other arguments. It cannot be implemented by hand.
///
/// ```
/// fn works_on<T, F: multiprocess::Method<T, Args>, Args>(_: F) {}
///
/// struct Tally(u64);
/// impl Tally {
///     fn add(&mut self, n: u64) -> u64 { self.0 += n; self.0 }
/// }
/// works_on::<Tally, _, _>(Tally::add);
/// works_on::<Tally, _, _>(|tally: &mut Tally| tally.0);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be called on a `{T}` with the arguments `{Args}`",
    note = "it must be a `fn(&mut {T}, ..)` or a closure that captures nothing, called with one tuple of the other arguments",
    note = "its arguments and its result must be `Serialize + DeserializeOwned + Send + 'static`"
)]
pub trait Method<T, Args>: Copy + Send + 'static {
    /// The type of the result.
    type Output: Serialize + DeserializeOwned + Send + 'static;

    #[doc(hidden)]
    fn call(self, object: &mut T, args: Args) -> Self::Output;
}

/// The result of a method, which can be sent back.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "the result `{Self}` of a method cannot be sent back from the manager [not-serde]",
    label = "returns `{Self}`",
    note = "a result must be `Serialize + DeserializeOwned + Send + 'static`, the error of a `Result` too: for one that is not, such as `anyhow::Error`, return `multiprocess::Result<T>` and use `.map_err(multiprocess::Error::other)`"
)]
pub trait Answer: Serialize + DeserializeOwned + Send + 'static {}

#[diagnostic::do_not_recommend]
impl<R: Serialize + DeserializeOwned + Send + 'static> Answer for R {}

macro_rules! methods {
    ($($arg:ident)*) => {
        impl<F, R, $($arg),*> Maker<($($arg,)*)> for F
        where
            F: Fn($($arg),*) -> R + Copy + Send + 'static,
            R: Send + 'static,
        {
            type Object = R;

            #[allow(non_snake_case)]
            fn make(self, ($($arg,)*): ($($arg,)*)) -> R {
                self($($arg),*)
            }
        }

        impl<F, T, R, $($arg),*> Method<T, ($($arg,)*)> for F
        where
            F: Fn(&mut T, $($arg),*) -> R + Copy + Send + 'static,
            R: Answer,
        {
            type Output = R;

            #[allow(non_snake_case)]
            fn call(self, object: &mut T, ($($arg,)*): ($($arg,)*)) -> R {
                self(object, $($arg),*)
            }
        }
    };
}

up_to_eleven!(methods);

/// A function that a call enters: `T` is its object, `A` its arguments, and `M` marks its form.
pub(crate) trait Invoke<T, A, M>: Copy + 'static {
    /// It may have to wait.
    const WAITS: bool = false;

    /// Takes the arguments and appends the result.
    fn invoke(self, frame: &mut Frame) -> Result<()>;
}

/// Marks a function that makes an object.
pub(crate) enum Making {}

/// Marks a method that returns a value.
pub(crate) enum Owned {}

/// Marks a method of ours that encodes what it lends.
pub(crate) enum Lent {}

/// Marks a method of ours that may have to wait. Then it leaves of the arguments what it needs again.
pub(crate) enum Waiting {}

impl<F: Maker<A>, A: DeserializeOwned + 'static> Invoke<F::Object, A, Making> for F {
    fn invoke(self, frame: &mut Frame) -> Result<()> {
        // Its new object would replace the one that the request names, for all holders.
        if frame.object.is_some() {
            return Err(Error::new(ErrorKind::Decode, "a function that makes objects is called on one"));
        }
        let args = frame.arguments::<F, A, F::Object>()?;
        frame.object = Some(Box::new(self.make(args)));
        Ok(())
    }
}

impl<F: Method<T, A>, T: 'static, A: DeserializeOwned + 'static> Invoke<T, A, Owned> for F {
    fn invoke(self, frame: &mut Frame) -> Result<()> {
        let args = frame.arguments::<F, A, T>()?;
        let value = self.call(as_a::<T>(&mut frame.object)?, args);
        frame.out.append_part(&value)
    }
}

impl<F, T: 'static, A: DeserializeOwned + 'static> Invoke<T, Lend<A>, Lent> for F
where
    F: Fn(&mut T, A, &mut Writer) -> Result<()> + Copy + 'static,
{
    fn invoke(self, frame: &mut Frame) -> Result<()> {
        let Lend(args) = frame.arguments::<F, Lend<A>, T>()?;
        self(as_a(&mut frame.object)?, args, &mut frame.out)
    }
}

impl<F, T: Waits, A: DeserializeOwned + Send + 'static> Invoke<T, A, Waiting> for F
where
    F: Fn(&mut T, &mut Option<A>, Try, &mut Writer) -> Poll<Result<()>> + Copy + 'static,
{
    const WAITS: bool = true;

    fn invoke(self, frame: &mut Frame) -> Result<()> {
        let mut args = match frame.wait.as_mut().and_then(|wait| wait.kept.take()) {
            None => Some(frame.arguments::<F, A, T>()?),
            Some(kept) => *kept.downcast::<Option<A>>().map_err(|_| malformed())?,
        };
        let Frame { object, out, wait: Some(wait), .. } = frame else { return Err(malformed()) };
        let object = as_a(object)?;
        // Only now is it known that the object has such an operation.
        wait.settle = Some(waiting::settle::<T>);
        // The rest of the arguments is the user's; its drop may panic.
        let invoked = catch_panic(|| Ok(self(object, &mut args, wait.now, out)));
        let Poll::Ready(done) = invoked.unwrap_or_else(|panic| Poll::Ready(Err(panic))) else {
            wait.kept = Some(Box::new(args));
            return Ok(());
        };
        survive(|| drop(args));
        done
    }
}

/// The object as a `T`.
fn as_a<T: 'static>(object: &mut Option<Box<dyn Any + Send>>) -> Result<&mut T> {
    let other = || Error::new(ErrorKind::Decode, format!("the object of this proxy is no {}", type_name::<T>()));
    object.as_mut().and_then(|object| object.downcast_mut()).ok_or_else(other)
}

/// An operation that may have to wait.
pub(crate) struct Attempt {
    pub(crate) now: Try,
    /// How what it brings is settled; known once it was tried.
    pub(crate) settle: Option<Settle>,
    /// The rest of its arguments, while it has to wait.
    pub(crate) kept: Option<Box<dyn Any + Send>>,
}

impl Attempt {
    pub(crate) fn new(ticket: Ticket) -> Self {
        Self { now: Try { ticket, is_late: false }, settle: None, kept: None }
    }
}

/// The operation that makes an object by `f`.
pub(crate) fn make_op<F: Maker<A>, A: DeserializeOwned + 'static>(f: F) -> Op {
    call_op::<F, F::Object, A, Making>(MAKER, f)
}

/// The operation that calls `f` on `object`, which is a `T`.
pub(crate) fn call_op<F: Invoke<T, A, M>, T: 'static, A: 'static, M: 'static>(object: u64, f: F) -> Op {
    let entry = image::offset_of::<EntryPoint<F, T, A, M>>(f);
    Op { object, entry, fingerprint: fingerprint::<F, A, T>() }
}

thread_local! {
    /// The dispatch table: entries that were found, by their place.
    static FOUND: RefCell<BTreeMap<u64, image::Entry>> = const { RefCell::new(BTreeMap::new()) };
}

/// The input and output of an entry.
pub(crate) struct Frame {
    fingerprint: u64,
    /// The object that is called, or was made.
    pub(crate) object: Option<Box<dyn Any + Send>>,
    /// The arguments are part of it.
    pub(crate) reader: Reader,
    pub(crate) arguments: Option<Span>,
    /// The answer, to which the result is appended.
    pub(crate) out: Writer,
    /// If the call may have to wait.
    pub(crate) wait: Option<Attempt>,
    /// `None` until an entry of ours was called.
    result: Option<Result<()>>,
}

struct EntryPoint<F, T, A, M>(PhantomData<(F, T, A, M)>);

impl<F: Invoke<T, A, M>, T: 'static, A: 'static, M: 'static> Enter for EntryPoint<F, T, A, M> {
    type Function = F;

    fn enter(f: F, frame: &mut dyn Any) {
        let Some(frame) = frame.downcast_mut::<Frame>() else { return };
        if frame.wait.is_some() == F::WAITS {
            frame.result = Some(f.invoke(frame));
        }
    }
}

impl Frame {
    pub(crate) fn new(reader: Reader, out: Writer) -> Self {
        Self { fingerprint: 0, object: None, reader, arguments: None, out, wait: None, result: None }
    }

    /// Calls a method on the object, or makes one where there is none. After an error, the answer is as before.
    pub(crate) fn enter(&mut self, op: &Op) -> Result<()> {
        let entry = entry_at(op.entry)?;
        (self.fingerprint, self.result) = (op.fingerprint, None);
        // All that is the user's may panic, also what decodes and drops arguments. The object stays, and its caller gets an error.
        let start = self.out.len();
        let entered = catch_panic(|| {
            entry(self);
            let why = "a call names something that is not a function for objects of a manager";
            self.result.take().unwrap_or_else(|| Err(Error::new(ErrorKind::Decode, why)))
        });
        entered.inspect_err(|_| self.out.truncate(start))
    }

    /// The arguments, if they were encoded for exactly these types.
    fn arguments<F: 'static, A: DeserializeOwned + 'static, T: 'static>(&mut self) -> Result<A> {
        if self.fingerprint != fingerprint::<F, A, T>() {
            let what = type_name::<F>();
            let why = format!("the arguments were encoded for another function than {what}: not the same build");
            return Err(Error::new(ErrorKind::Decode, why).explained_by(Topic::NotTheSameBuild));
        }
        let arguments = self.arguments.take().ok_or_else(malformed)?;
        self.reader.decode(arguments)
    }
}

/// The entry at this place. Most are called again and again.
fn entry_at(place: u64) -> Result<image::Entry> {
    FOUND.with_borrow_mut(|found| match found.entry(place) {
        Entry::Occupied(entry) => Ok(*entry.get()),
        Entry::Vacant(free) => {
            image::entry_at(place).map(|entry| *free.insert(entry)).ok_or_else(|| image::unknown(place))
        }
    })
}

/// Functions that clients may call, for [`ManagerBuilder::expose`](crate::ManagerBuilder::expose).
///
/// ```
/// use multiprocess::{self as mp, ErrorKind, Exposed, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let exposed = [Exposed::maker(|| 0u32), Exposed::method(|n: &mut u32| *n)];
///         let manager = Manager::builder().expose(exposed).start().await?;
///         let error = manager.list::<u32>().await.unwrap_err();
///         assert!(error.to_string().contains("not exposed"));
///         manager.shutdown().await
///     })
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Exposed(pub(crate) Vec<u64>);

impl Exposed {
    /// Exposes a function that creates objects.
    pub fn maker<F, A>(f: F) -> Self
    where
        F: Maker<A>,
        A: DeserializeOwned + 'static,
    {
        const { captures_nothing::<F>() };
        Self(vec![make_op(f).entry])
    }

    /// Exposes a function that is called on objects.
    pub fn method<F, T, A>(f: F) -> Self
    where
        F: Method<T, A>,
        T: Send + 'static,
        A: DeserializeOwned + Send + 'static,
    {
        const { captures_nothing::<F>() };
        Self(vec![call_op::<F, T, A, Owned>(0, f).entry])
    }
}
