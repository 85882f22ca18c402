//! Which type a generic parameter is, and its value as that type.
//!
//! `Any` does the same for types that are `'static`. What a serializer is given may borrow, so here lifetimes are
//! erased before types are compared. That is sound because the types that are looked for contain no lifetime: see
//! [`Element`]. All comparisons are settled when the program is compiled.

use std::any::TypeId;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;

/// A number, or an array of numbers.
///
/// # Safety
/// No lifetime may occur in the type: then two types that differ in lifetimes only, and one of which it is, are the same.
pub(crate) unsafe trait Element: bytemuck::Pod {}

macro_rules! elements {
    ($($number:ty)*) => {$(
        // SAFETY: there is no lifetime in a number.
        unsafe impl Element for $number {}
    )*};
}

elements!(u8 u16 u32 u64 usize i8 i16 i32 i64 isize f32 f64);

// SAFETY: there is no lifetime in an array but those of its elements, which have none.
unsafe impl<P: Element, const N: usize> Element for [P; N] where [P; N]: bytemuck::Pod {}

/// The identity of `T`, with all its lifetimes taken for `'static`.
#[inline(always)]
pub(crate) fn id_of<T: ?Sized>() -> TypeId {
    trait Identified {
        fn id(&self) -> TypeId
        where
            Self: 'static;
    }
    impl<T: ?Sized> Identified for PhantomData<T> {
        #[inline(always)]
        fn id(&self) -> TypeId
        where
            Self: 'static,
        {
            TypeId::of::<T>()
        }
    }
    let marker = PhantomData::<T>;
    let marker: &dyn Identified = &marker;
    // SAFETY: only the lifetime bound of the trait object changes. `id` reads nothing and keeps nothing: it compares
    // types, which the compiler does without lifetimes.
    Identified::id(unsafe { std::mem::transmute::<&dyn Identified, &(dyn Identified + 'static)>(marker) })
}

/// The elements that `iter` goes through, if it is a `&Vec<P>` or a `&[P]`.
#[inline(always)]
pub(crate) fn elements<I, P: Element>(iter: &I) -> Option<&[P]> {
    let (id, at) = (id_of::<I>(), std::ptr::from_ref(iter));
    if id == id_of::<&'static Vec<P>>() {
        // SAFETY: `I` is `&'a Vec<P>` for some `'a`, as just compared, for `P` has no lifetimes. `'a` outlives the
        // borrow of `iter`, to which the result is tied.
        return Some(unsafe { *at.cast::<&Vec<P>>() });
    }
    if id == id_of::<&'static [P]>() {
        // SAFETY: as above, with `&'a [P]`.
        return Some(unsafe { *at.cast::<&[P]>() });
    }
    None
}

/// The number that `value` is or refers to, if it is a `P`.
#[inline(always)]
pub(crate) fn number<T: ?Sized, P: Element>(value: &T) -> Option<P> {
    let (id, at) = (id_of::<T>(), std::ptr::from_ref(value));
    if id == id_of::<P>() {
        // SAFETY: `T` is `P`, as just compared; `P` is `Copy`.
        return Some(unsafe { *at.cast::<P>() });
    }
    if id == id_of::<&'static P>() {
        // SAFETY: `T` is `&'a P` for some `'a`, as just compared, and is alive.
        return Some(unsafe { **at.cast::<&P>() });
    }
    None
}

/// The same list under the name `A`, if that is a `Vec<P>`.
#[inline(always)]
pub(crate) fn list<A, P: Element>(list: Vec<P>) -> Option<A> {
    if id_of::<A>() != id_of::<Vec<P>>() {
        return None;
    }
    let list = ManuallyDrop::new(list);
    // SAFETY: `A` is `Vec<P>`, as just compared, for `P` has no lifetimes. The original is not dropped.
    Some(unsafe { std::mem::transmute_copy::<ManuallyDrop<Vec<P>>, A>(&list) })
}

/// A second `seed`, if it is a marker and no more, as it is for every type that implements `Deserialize` itself.
#[inline(always)]
pub(crate) fn again<'de, S: serde::de::DeserializeSeed<'de>>(seed: &S) -> Option<S> {
    if id_of::<S>() != id_of::<PhantomData<S::Value>>() {
        return None;
    }
    // SAFETY: `S` is `PhantomData`, as just compared, up to lifetimes, which make no difference to its value: it has no
    // bytes, is `Copy`, and drops nothing.
    Some(unsafe { std::mem::transmute_copy::<S, S>(seed) })
}

/// A list of what lies in `bytes`; less than an element at their end is left out.
#[inline]
pub(crate) fn list_of<P: Element>(bytes: &[u8]) -> Vec<P> {
    let count = bytes.len().checked_div(size_of::<P>()).unwrap_or(0);
    let mut list = Vec::<P>::with_capacity(count);
    // SAFETY: there is room for `count` elements, and as many are in `bytes`; any bytes are a `P`. The list is new, so
    // the two do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), list.as_mut_ptr().cast::<u8>(), count * size_of::<P>());
        list.set_len(count);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_differ_in_lifetimes_are_equal() {
        fn of_borrowed<'a>(_: &'a str) -> TypeId {
            id_of::<&'a str>()
        }
        assert_eq!(of_borrowed(&String::from("short")), TypeId::of::<&'static str>());
        assert_ne!(id_of::<&str>(), id_of::<&[u8]>());
    }

    #[test]
    fn lists_and_numbers_are_found_by_their_type() {
        let list_of = vec![[1.5f32, 2.5], [3.5, 4.5]];
        assert_eq!(elements::<_, [f32; 2]>(&&list_of), Some(&list_of[..]));
        assert_eq!(elements::<_, [f32; 2]>(&&list_of[1..]), Some(&list_of[1..]));
        assert_eq!(elements::<_, [u32; 2]>(&&list_of), None);
        assert_eq!(
            (number::<_, u16>(&7u16), number::<_, u16>(&&7u16), number::<_, u16>(&7i16)),
            (Some(7), Some(7), None)
        );
        assert_eq!(list::<Vec<[f32; 2]>, _>(list_of.clone()), Some(list_of.clone()));
        assert_eq!(list::<Vec<[u32; 2]>, _>(list_of), None);
        assert_eq!(super::list_of::<[u16; 2]>(&[1, 0, 2, 0, 3, 0]), [[1u16.to_le(), 2u16.to_le()]]);
    }
}
