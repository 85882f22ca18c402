//! The functions that can run in another process, and the compiler errors for others.
//!
//! One impl of [`Function`] covers everything. It stands on traits that each ask one question, so that a mistake is
//! reported as the answer to that question, at the caller's line: can it be called with these arguments
//! ([`Callable`]), can what it returns come back ([`Returned`]), does it capture nothing ([`CapturesNothing`]), is it
//! no function pointer ([`NotAFunctionPointer`]), does it borrow nothing ([`Owned`]).
//!
//! The language has no negative bound. Where one is wanted, two impls overlap for the types that are refused: a
//! marker that they differ in can then not be inferred, and the compiler lists the impls, whose marker names the reason.
#![forbid(unsafe_code)]

use super::executor::Executor;
use crate::error::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;

/// A function that can run in another process: `fn`, `async fn`, or a closure (`async` or not) that captures nothing,
/// with up to 12 arguments.
///
/// `Args` is the tuple of the arguments; `Marker` is inferred. The trait is implemented for all of these functions and
/// cannot be implemented by hand.
///
/// ```
/// fn runs_elsewhere<F, Args, Marker>(_: F) where F: multiprocess::Function<Args, Marker> {}
///
/// async fn greet(name: String) -> String { format!("hello {name}") }
/// runs_elsewhere(greet);
/// runs_elsewhere(|x: i32, y: i32| x + y);
/// runs_elsewhere(async |x: f64| x.sqrt());
/// runs_elsewhere(std::process::id);
/// ```
///
/// # What is refused
/// - A closure that captures. The values it needs go into the tuple of arguments. `cargo check` reports captures that
///   are not `Copy`; captures that are `Copy`, such as a number, are reported by `cargo build`, because the size of a
///   closure is known only when code is generated.
/// - A function pointer, and so the elements of an array of functions: a pointer does not identify its function.
///   Call `spawn` once for each function, or pass a value that a single function branches on.
/// - Arguments and results that borrow (`&str`, `&[T]`): take and return `String` and `Vec<T>`.
/// - Values without a serde form. A `File`, a socket or another descriptor travels as [`Fd`](crate::Fd), a channel is
///   a [`Queue`](crate::Queue), a mutex is a [`Lock`](crate::Lock); a `Pool`, a `Process` and a guard stay in their
///   process.
///
/// # Values are copies
/// An argument arrives as a copy. That holds for shared pointers too: with serde's feature `rc`, an
/// `Arc<Mutex<T>>` is accepted, and a child that changes it changes its own copy. For state that several processes
/// change, use [`Value`](crate::Value), [`Array`](crate::Array) or an object of a [`Manager`](crate::Manager).
///
/// # Soundness
/// One kind of capture cannot be distinguished from none: a `Copy` value without a size. A closure that captures only such values
/// is accepted, and the other process makes them out of nothing. That is safe for marker types that mean nothing. It is
/// not for a token whose existence proves something about the process it is in, if `unsafe` code relies on the proof:
/// in the other process nothing has been proven. The same holds for [`Maker`](crate::Maker) and
/// [`Method`](crate::Method). Write such a token without `Copy`, or give it a size.
///
/// ```
/// use multiprocess::{self as mp, Process};
///
/// mod device {
///     /// Proof that `open` was called in this process.
///     #[derive(Clone, Copy)] // Without `Copy` the closure below does not compile.
///     pub struct Opened(());
///
///     pub fn open() -> Opened {
///         Opened(())
///     }
///
///     pub fn read(_proof: Opened) -> u32 {
///         7 // `unsafe` code that takes for granted that `open` has run would be unsound here.
///     }
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let opened = device::open();
///         // Accepted, though nobody has called `open` in the process that runs it.
///         assert_eq!(Process::spawn(move || device::read(opened), ())?.await?, 7);
///         Ok(())
///     })
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot run in another process with the arguments `{Args}` [captures]",
    label = "not a function that can run in another process with `{Args}`",
    note = "it must be a `fn`, an `async fn` or a closure that captures nothing: pass what a closure would capture in the tuple of arguments",
    note = "it takes at most 12 arguments, passed as one tuple: `(a, b)`, `(a,)` or `()`"
)]
pub trait Function<Args, Marker>: Copy + Send + 'static {
    /// Its return type; for an `async fn`, the output of its future.
    type Output: Serialize + DeserializeOwned + Send + 'static;

    #[doc(hidden)]
    fn call(self, args: Args, executor: &mut Executor) -> Result<Self::Output>;
}

impl<F, A, Kind, P, B> Function<A, (Kind, P, B)> for F
where
    F: CapturesNothing + NotAFunctionPointer<P> + Callable<A, B>,
    F::Returned: Returned<Kind>,
{
    type Output = <F::Returned as Returned<Kind>>::Output;

    #[inline]
    fn call(self, args: A, executor: &mut Executor) -> Result<Self::Output> {
        <F::Returned as Returned<Kind>>::of(|| self.call_with(args), executor)
    }
}

/// A function that takes the tuple `Args`. `Borrow` is inferred, unless an argument borrows.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be called with `{Args}`",
    label = "cannot be called with `{Args}`",
    note = "a function that runs in another process takes at most 12 arguments, passed as one tuple: `(a, b)`, `(a,)` or `()`"
)]
pub trait Callable<Args, Borrow> {
    type Returned;

    fn call_with(self, args: Args) -> Self::Returned;
}

// Here nothing would constrain the marker.
#[diagnostic::do_not_recommend]
impl<F: Fn() -> R, R> Callable<(), ()> for F {
    type Returned = R;

    #[inline]
    fn call_with(self, (): ()) -> R {
        self()
    }
}

macro_rules! callable {
    () => {};
    ($($arg:ident)+) => {
        #[diagnostic::do_not_recommend]
        impl<F, R, Borrow, $($arg),+> Callable<($($arg,)+), Borrow> for F
        where
            F: Fn($($arg),+) -> R,
            $($arg: Owned<Borrow>,)+
        {
            type Returned = R;

            #[inline]
            #[allow(non_snake_case)]
            fn call_with(self, ($($arg,)+): ($($arg,)+)) -> R {
                self($($arg),+)
            }
        }
    };
}

/// Calls a macro with the names of types for every number of arguments up to eleven.
macro_rules! up_to_eleven {
    ($each:ident) => {
        $each!();
        $each!(A);
        $each!(A B);
        $each!(A B C);
        $each!(A B C D);
        $each!(A B C D E);
        $each!(A B C D E G);
        $each!(A B C D E G H);
        $each!(A B C D E G H I);
        $each!(A B C D E G H I J);
        $each!(A B C D E G H I J K);
        $each!(A B C D E G H I J K L);
    };
}
pub(crate) use up_to_eleven;

up_to_eleven!(callable);
callable!(A B C D E G H I J K L M);

/// A value that a function returned, or a future of one, that can be sent back. `Kind` is inferred.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "the result `{Self}` cannot be sent back from another process [not-serde]",
    label = "returns `{Self}`",
    note = "a result must be `Serialize + DeserializeOwned + Send + 'static`, the error of a `Result` too: for one that is not, such as `anyhow::Error`, return `multiprocess::Result<T>` and use `.map_err(multiprocess::Error::other)`",
    note = "an open file or socket is returned as `multiprocess::Fd`; a function that never returns (`!`) needs another return type, such as `()`"
)]
pub trait Returned<Kind>: Sized {
    type Output: Serialize + DeserializeOwned + Send + 'static;

    /// Makes the value: calls `make`, and awaits what it returns if that is a future.
    fn of(make: impl FnOnce() -> Self, executor: &mut Executor) -> Result<Self::Output>;
}

/// Marks a result that is a value.
#[doc(hidden)]
pub struct Plain<Borrow>(Borrow);

/// Marks a result that is a future of a value.
#[doc(hidden)]
pub struct Async<Borrow>(Borrow);

#[diagnostic::do_not_recommend]
impl<R, Borrow> Returned<Plain<Borrow>> for R
where
    R: Serialize + DeserializeOwned + Send + Owned<Borrow> + 'static,
{
    type Output = R;

    #[inline]
    fn of(make: impl FnOnce() -> R, _: &mut Executor) -> Result<R> {
        Ok(make())
    }
}

#[diagnostic::do_not_recommend]
impl<Fut, Borrow> Returned<Async<Borrow>> for Fut
where
    Fut: Future,
    Fut::Output: Serialize + DeserializeOwned + Send + Owned<Borrow> + 'static,
{
    type Output = Fut::Output;

    fn of(make: impl FnOnce() -> Fut, executor: &mut Executor) -> Result<Fut::Output> {
        executor.run(async move { make().await })
    }
}

/// Arguments that can be sent: the tuple of them, or an item of `map`.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "the arguments `{Self}` cannot be sent to another process [not-serde]",
    label = "these cannot be sent",
    note = "arguments are owned and must be `Serialize + DeserializeOwned + Send + 'static`: take `String` for `&str`, `Vec<T>` for `&[T]`, and derive serde's traits for your own types",
    note = "a `File`, a socket or another descriptor travels as `multiprocess::Fd`; instead of a channel of std or tokio use `multiprocess::Queue`, instead of a mutex or its guard `multiprocess::Lock` or `multiprocess::Value`",
    note = "a `Pool`, a `Process` and a guard stay in their process: make the pool or process where it is used, or send the task to its owner through a `multiprocess::Queue`"
)]
pub trait Arguments: Serialize + DeserializeOwned + Send + 'static {}

#[diagnostic::do_not_recommend]
impl<A: Serialize + DeserializeOwned + Send + 'static> Arguments for A {}

/// A function that is `Copy`: a closure whose captures are not is refused here.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "`{Self}` captures values, so it cannot run in another process [captures]",
    label = "captures values",
    note = "pass what it captures in the tuple of arguments"
)]
pub trait CapturesNothing: Copy + Send + 'static {}

#[diagnostic::do_not_recommend]
impl<F: Copy + Send + 'static> CapturesNothing for F {}

/// A function that is identified by its type.
#[doc(hidden)]
pub trait NotAFunctionPointer<Marker> {}

/// The marker of what is refused.
#[doc(hidden)]
pub enum AFunctionPointerDoesNotSayWhichFunctionItIs {}

impl<F> NotAFunctionPointer<()> for F {}
impl<F: fmt::Pointer> NotAFunctionPointer<AFunctionPointerDoesNotSayWhichFunctionItIs> for F {}

/// A value that is no reference.
#[doc(hidden)]
pub trait Owned<Marker> {}

/// The marker of what is refused.
#[doc(hidden)]
pub enum BorrowedDataCannotTravelUseStringForStrAndVecForSlices {}

impl<T> Owned<()> for T {}
impl<T: ?Sized> Owned<BorrowedDataCannotTravelUseStringForStrAndVecForSlices> for &T {}

/// Refuses a closure that captures, when code is generated: evaluated in a `const` block of each public function that
/// takes `F`, so that the compiler points at the caller of that function.
pub(crate) const fn captures_nothing<F>() {
    assert!(
        size_of::<F>() == 0,
        "a closure that captures, or a function pointer, cannot run in another process: pass the values that it needs in \
         the tuple of arguments [captures]"
    );
}
