//! Numbers on their way in: copied once, from where they are shared to where they stay.

use crate::os::memory;
use bytemuck::Pod;

/// A message in memory that another process can write to: its bytes can be copied, and never be seen where they are.
pub(crate) trait Source {
    fn len(&self) -> usize;
    /// Appends `len` bytes, from the `skip`th on.
    fn append(&self, skip: usize, len: usize, to: &mut Vec<u8>);
    /// The same of bytes that are numbers.
    fn append_numbers<N: Pod>(&self, skip: usize, len: usize, to: &mut Vec<N>);
}

/// A list of numbers, or of arrays of numbers, of which only the size of a number is known.
#[derive(Debug)]
pub(crate) enum List {
    Ones(Vec<u8>),
    Twos(Vec<u16>),
    Fours(Vec<u32>),
    Eights(Vec<u64>),
}

impl List {
    /// An empty list with room for `len` bytes, which are numbers of `size` bytes each. `None` if they cannot be.
    pub(super) fn with_room(size: usize, len: usize) -> Option<Self> {
        match size {
            1 => Some(Self::Ones(memory::with_room(Vec::new(), len))),
            2 if len.is_multiple_of(2) => Some(Self::Twos(memory::with_room(Vec::new(), len / 2))),
            4 if len.is_multiple_of(4) => Some(Self::Fours(memory::with_room(Vec::new(), len / 4))),
            8 if len.is_multiple_of(8) => Some(Self::Eights(memory::with_room(Vec::new(), len / 8))),
            _ => None,
        }
    }

    /// Appends `len` bytes of a message, from the `skip`th on.
    pub(super) fn append(&mut self, from: &impl Source, skip: usize, len: usize) {
        match self {
            Self::Ones(list) => from.append(skip, len, list),
            Self::Twos(list) => from.append_numbers(skip, len, list),
            Self::Fours(list) => from.append_numbers(skip, len, list),
            Self::Eights(list) => from.append_numbers(skip, len, list),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Ones(list) => list,
            Self::Twos(list) => bytemuck::cast_slice(list),
            Self::Fours(list) => bytemuck::cast_slice(list),
            Self::Eights(list) => bytemuck::cast_slice(list),
        }
    }

    /// Takes the whole as a list of `P`, if the memory of one can be that of the other.
    pub(super) fn take<P: Pod>(&mut self) -> Option<Vec<P>> {
        fn cast<N: Pod, P: Pod>(list: &mut Vec<N>) -> Option<Vec<P>> {
            bytemuck::try_cast_vec(std::mem::take(list)).map_err(|(_, same)| *list = same).ok()
        }
        match self {
            Self::Ones(list) => cast(list),
            Self::Twos(list) => cast(list),
            Self::Fours(list) => cast(list),
            Self::Eights(list) => cast(list),
        }
    }
}

#[cfg(any(test, fuzzing))]
mod slice {
    use super::*;

    impl Source for &[u8] {
        fn len(&self) -> usize {
            <[u8]>::len(self)
        }
        fn append(&self, skip: usize, len: usize, to: &mut Vec<u8>) {
            to.extend_from_slice(&self[skip..skip + len]);
        }
        fn append_numbers<N: Pod>(&self, skip: usize, len: usize, to: &mut Vec<N>) {
            to.extend(self[skip..skip + len].chunks_exact(size_of::<N>()).map(bytemuck::pod_read_unaligned::<N>));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_becomes_what_has_numbers_of_its_size_and_nothing_else() {
        let numbers = [[1.5f32, 2.5, 3.5], [4.5, 5.5, 6.5]];
        let bytes: &[u8] = bytemuck::cast_slice(&numbers);
        let mut list = List::with_room(4, 24).unwrap();
        list.append(&bytes, 0, 24);
        assert_eq!((list.take::<u64>(), list.take::<[f32; 4]>()), (None, None));
        assert_eq!(list.bytes(), bytes);
        assert_eq!(list.take::<[f32; 3]>(), Some(numbers.to_vec()));
        assert!(list.bytes().is_empty());
        assert!(List::with_room(8, 12).is_none() && List::with_room(3, 12).is_none());
    }
}
