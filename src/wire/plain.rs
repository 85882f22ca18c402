//! Messages that are nothing but bytes or numbers skip serde: they travel as they lie in memory, for both sides are
//! the same program on the same machine.
//!
//! serde walks a `Vec<u8>` or `[f64; 8]` element by element. The form of a message is determined by its type alone, and the
//! comparisons of types below are settled when the program is compiled.

use super::list::List;
use bytes::Bytes;
use std::any::{Any, TypeId};

/// A type that travels as it lies in memory.
trait Plain: Sized {
    /// Whether the value takes the buffer over, so that it should not be a shared one.
    const TAKES_BUFFER: bool;
    fn bytes(&self) -> &[u8];
    /// The value, and the buffer if it was not taken over; `None` if these bytes are none.
    fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)>;
    /// The value that these bytes are a copy of.
    fn from_slice(bytes: &[u8]) -> Option<Self>;
}

macro_rules! numbers {
    ($($number:ty)*) => {$(
        impl Plain for $number {
            const TAKES_BUFFER: bool = false;
            fn bytes(&self) -> &[u8] {
                bytemuck::bytes_of(self)
            }
            fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)> {
                Some((bytemuck::try_pod_read_unaligned(&buffer).ok()?, Some(buffer)))
            }
            #[inline]
            fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytemuck::try_pod_read_unaligned(bytes).ok()
            }
        }

        impl<const N: usize> Plain for [$number; N] {
            const TAKES_BUFFER: bool = false;
            fn bytes(&self) -> &[u8] {
                bytemuck::bytes_of(self)
            }
            fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)> {
                Some((bytemuck::try_pod_read_unaligned(&buffer).ok()?, Some(buffer)))
            }
            #[inline]
            fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytemuck::try_pod_read_unaligned(bytes).ok()
            }
        }
    )*};
}

macro_rules! lists {
    ($($number:ty)*) => {$(
        impl Plain for Vec<$number> {
            const TAKES_BUFFER: bool = false;
            fn bytes(&self) -> &[u8] {
                bytemuck::cast_slice(self)
            }
            fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)> {
                let is_whole = buffer.len().is_multiple_of(size_of::<$number>());
                is_whole.then(|| (bytemuck::pod_collect_to_vec(&buffer), Some(buffer)))
            }
            fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.len().is_multiple_of(size_of::<$number>()).then(|| bytemuck::pod_collect_to_vec(bytes))
            }
        }
    )*};
}

numbers!(u8 i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64);
lists!(i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64);

macro_rules! buffers {
    ($($buffer:ty)*) => {$(
        impl Plain for $buffer {
            const TAKES_BUFFER: bool = true;
            fn bytes(&self) -> &[u8] {
                self
            }
            fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)> {
                Some((buffer.into(), None))
            }
            fn from_slice(bytes: &[u8]) -> Option<Self> {
                Some(bytes.to_vec().into())
            }
        }
    )*};
}

buffers!(Vec<u8> Bytes Box<[u8]>);

/// Nothing: what a function of no arguments is given, and what many return.
impl Plain for () {
    const TAKES_BUFFER: bool = false;
    fn bytes(&self) -> &[u8] {
        &[]
    }
    fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)> {
        buffer.is_empty().then_some(((), Some(buffer)))
    }
    #[inline]
    fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.is_empty().then_some(())
    }
}

/// The arguments of a function of one.
impl<P: Plain> Plain for (P,) {
    const TAKES_BUFFER: bool = P::TAKES_BUFFER;
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
    fn from_buffer(buffer: Vec<u8>) -> Option<(Self, Option<Vec<u8>>)> {
        P::from_buffer(buffer).map(|(value, buffer)| ((value,), buffer))
    }
    #[inline]
    fn from_slice(bytes: &[u8]) -> Option<Self> {
        P::from_slice(bytes).map(|value| (value,))
    }
}

/// Does `$case!(type)` for every type that is recognised.
macro_rules! each_plain {
    ($case:ident) => {
        $case!(());
        $case!(Vec<u8>);
        $case!(Bytes);
        $case!(Box<[u8]>);
        each_plain!($case: u8 i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64);
        each_plain!($case in i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64);
    };
    ($case:ident: $($number:ty)*) => {$(
        $case!($number);
        $case!([$number; 2]);
        $case!([$number; 3]);
        $case!([$number; 4]);
        $case!([$number; 8]);
        $case!([$number; 16]);
        $case!([$number; 32]);
    )*};
    ($case:ident in $($number:ty)*) => {$(
        $case!(Vec<$number>);
    )*};
}

/// Returns `true` if `T` has the layout of `P`, and so of `(P,)`. Where it has not, the compiler leaves out the code for `P`,
/// without optimisation too: a program in which hundreds of types travel would take minutes to build.
const fn may_be<T, P>() -> bool {
    size_of::<T>() == size_of::<P>()
        && align_of::<T>() == align_of::<P>()
        && std::mem::needs_drop::<T>() == std::mem::needs_drop::<P>()
}

/// The bytes of `value`, if its type is plain.
#[inline]
pub(crate) fn bytes<T: 'static>(value: &T) -> Option<&[u8]> {
    let value: &dyn Any = value;
    macro_rules! case {
        ($plain:ty) => {
            if const { may_be::<T, $plain>() } {
                if TypeId::of::<T>() == TypeId::of::<$plain>() {
                    return value.downcast_ref::<$plain>().map(Plain::bytes);
                }
                if TypeId::of::<T>() == TypeId::of::<($plain,)>() {
                    return value.downcast_ref::<($plain,)>().map(Plain::bytes);
                }
            }
        };
    }
    each_plain!(case);
    None
}

/// Returns `true` if values of `T` take over the buffer they arrive in.
#[inline]
pub(super) fn takes_buffer<T: 'static>() -> bool {
    takes_buffer_if_plain::<T>().unwrap_or(false)
}

/// Whether `T` is plain.
#[inline]
pub(super) fn is_plain<T: 'static>() -> bool {
    takes_buffer_if_plain::<T>().is_some()
}

#[inline]
fn takes_buffer_if_plain<T: 'static>() -> Option<bool> {
    macro_rules! case {
        ($plain:ty) => {
            if const { may_be::<T, $plain>() } {
                if TypeId::of::<T>() == TypeId::of::<$plain>() || TypeId::of::<T>() == TypeId::of::<($plain,)>() {
                    return Some(<$plain as Plain>::TAKES_BUFFER);
                }
            }
        };
    }
    each_plain!(case);
    None
}

/// Room for a `T` of `len` bytes, if it is a list of numbers.
pub(crate) fn numbers<T: 'static>(len: usize) -> Option<List> {
    macro_rules! cases {
        ($($number:ty)*) => {$(
            if const { may_be::<T, Vec<$number>>() } && TypeId::of::<T>() == TypeId::of::<Vec<$number>>() {
                return List::with_room(size_of::<$number>(), len);
            }
        )*};
    }
    cases!(i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64);
    None
}

/// The `T` that these [`numbers`] are.
pub(crate) fn of_numbers<T: 'static>(numbers: &mut List) -> Option<T> {
    macro_rules! cases {
        ($($number:ty)*) => {$(
            if const { may_be::<T, Vec<$number>>() } && TypeId::of::<T>() == TypeId::of::<Vec<$number>>() {
                let mut list = numbers.take::<$number>();
                return (&mut list as &mut dyn Any).downcast_mut::<Option<T>>().and_then(Option::take);
            }
        )*};
    }
    cases!(i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64);
    None
}

/// Returns `true` if [`numbers`] are for `T`.
#[inline]
pub(crate) fn are_numbers<T: 'static>() -> bool {
    macro_rules! cases {
        ($($number:ty)*) => {
            false $(|| const { may_be::<T, Vec<$number>>() } && TypeId::of::<T>() == TypeId::of::<Vec<$number>>())*
        };
    }
    cases!(i8 u16 i16 u32 i32 u64 i64 usize isize f32 f64)
}

/// A buffer after a read.
pub(super) enum Read<T> {
    /// The value, and the buffer if it is free again.
    Value(T, Option<Vec<u8>>),
    /// The type is plain, but these bytes are none of its values.
    Invalid,
    /// The type is not plain.
    NotPlain(Vec<u8>),
}

/// The reverse of [`bytes`].
#[inline]
pub(super) fn read<T: 'static>(buffer: Vec<u8>) -> Read<T> {
    fn make<T: 'static, P: Plain + 'static>(buffer: Vec<u8>) -> Read<T> {
        let Some((value, buffer)) = P::from_buffer(buffer) else { return Read::Invalid };
        let mut value = Some(value);
        // `T` is `P`, as the caller has found.
        match (&mut value as &mut dyn Any).downcast_mut::<Option<T>>().and_then(Option::take) {
            Some(value) => Read::Value(value, buffer),
            None => Read::Invalid,
        }
    }
    macro_rules! case {
        ($plain:ty) => {
            if const { may_be::<T, $plain>() } {
                if TypeId::of::<T>() == TypeId::of::<$plain>() {
                    return make::<T, $plain>(buffer);
                }
                if TypeId::of::<T>() == TypeId::of::<($plain,)>() {
                    return make::<T, ($plain,)>(buffer);
                }
            }
        };
    }
    each_plain!(case);
    Read::NotPlain(buffer)
}

/// The meaning of bytes that stay where they are.
pub(super) enum Seen<T> {
    Value(T),
    /// The type is plain, but these bytes are none of its values.
    Invalid,
    NotPlain,
}

/// [`read`] of bytes that belong to somebody else.
#[inline]
pub(super) fn see<T: 'static>(bytes: &[u8]) -> Seen<T> {
    #[inline]
    fn make<T: 'static, P: Plain + 'static>(bytes: &[u8]) -> Seen<T> {
        let mut value = P::from_slice(bytes);
        // `T` is `P`, as the caller has found.
        match (&mut value as &mut dyn Any).downcast_mut::<Option<T>>().and_then(Option::take) {
            Some(value) => Seen::Value(value),
            None => Seen::Invalid,
        }
    }
    macro_rules! case {
        ($plain:ty) => {
            if const { may_be::<T, $plain>() } {
                if TypeId::of::<T>() == TypeId::of::<$plain>() {
                    return make::<T, $plain>(bytes);
                }
                if TypeId::of::<T>() == TypeId::of::<($plain,)>() {
                    return make::<T, ($plain,)>(bytes);
                }
            }
        };
    }
    each_plain!(case);
    Seen::NotPlain
}
