//! The running program as data: a table of functions that other processes of the same image may enter.
//!
//! Unsafe because an address becomes a call. What makes it sound: every row of the table was written by [`offset_of`]
//! at link time and names a `fn(&mut dyn Any)`; an address that is not in the table is never called.

use std::any::Any;
use std::hash::Hasher;
use std::marker::PhantomData;

/// A function that can be entered by its address.
pub(crate) trait Enter {
    /// A function item, or a closure that captures nothing.
    type Function: Copy + 'static;

    /// Takes what it needs from `frame`, and leaves its answer there. A frame of another type is left alone.
    fn enter(function: Self::Function, frame: &mut dyn Any);
}

/// The type behind every row of the table.
pub(crate) type Entry = fn(&mut dyn Any);

/// An address that is the same place in every process of this image. An ordinary `fn` would not do: the
/// compiler makes copies of it.
static ANCHOR: u8 = 0;

#[inline(never)]
fn anchor() -> usize {
    &raw const ANCHOR as usize
}

unsafe extern "C" {
    #[link_name = "__start_mp_entries"]
    static TABLE_START: [usize; 0];
    #[link_name = "__stop_mp_entries"]
    static TABLE_END: [usize; 0];
}

/// What a row of the table names.
fn door<E: Enter>(frame: &mut dyn Any) {
    // SAFETY: a value without size is read from no bytes, at an aligned address that is not null. That the type is
    // inhabited: whoever knows this address got it from `offset_of`, which was given a value of it, and the value is
    // `Copy`. (A token type that a closure captures could be multiplied this way; it is a value of its own crate's
    // making that its author let be copied.)
    let function = unsafe { std::ptr::NonNull::<E::Function>::dangling().read() };
    E::enter(function, frame);
}

/// Lists `E` in the table at link time, and tells where its door is.
#[inline(never)]
pub(crate) fn offset_of<E: Enter>(_proof: E::Function) -> u64 {
    const {
        assert!(
            size_of::<E::Function>() == 0,
            "a function that runs in another process must be a plain `fn`, an `async fn` or a closure that captures \
             nothing, and not a function pointer: pass the values it needs in the argument tuple instead"
        );
    }
    // SAFETY: the block holds no instruction; it adds one row to a section of the object file. `a`: loaded,
    // `w`: the loader relocates it, `R`: the linker keeps it though nothing refers to it.
    unsafe {
        std::arch::asm!(
            ".pushsection mp_entries,\"awR\"",
            ".balign 8",
            ".quad {}",
            ".popsection",
            sym door::<E>,
            options(nomem, nostack, preserves_flags),
        );
    }
    let entry: Entry = door::<E>;
    (entry as usize).wrapping_sub(anchor()) as u64
}

struct Nothing<F>(PhantomData<F>);

impl<F: Fn() + Copy + 'static> Enter for Nothing<F> {
    type Function = F;
    fn enter(_: F, _: &mut dyn Any) {}
}

/// Makes sure that the table, and so its two symbols, exist.
fn list_nothing<F: Fn() + Copy + 'static>(function: F) {
    offset_of::<Nothing<F>>(function);
}

fn table() -> &'static [usize] {
    list_nothing(|| ());
    // SAFETY: the linker places the two symbols around the rows, which are words, relocated before any code ran
    // and never written again.
    unsafe {
        let (start, end) = (TABLE_START.as_ptr(), TABLE_END.as_ptr());
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// The function at `offset`, if the table lists it.
pub(crate) fn entry_at(offset: u64) -> Option<Entry> {
    let address = anchor().wrapping_add(offset as usize);
    table().contains(&address).then(|| {
        // SAFETY: every row is the address of a `door`, which is an `Entry`.
        unsafe { std::mem::transmute::<usize, Entry>(address) }
    })
}

/// A number that two processes share exactly if they run the same build of the same program.
pub(crate) fn fingerprint() -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    table().iter().for_each(|row| hasher.write_usize(row.wrapping_sub(anchor())));
    hasher.write(env!("CARGO_PKG_VERSION").as_bytes());
    hash_notes(&mut hasher);
    hasher.finish()
}

/// The ELF notes of the main program; one of them is the linker's build id, where there is one.
fn hash_notes(hasher: &mut std::hash::DefaultHasher) {
    unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, hasher: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `dl_iterate_phdr` hands a valid `info` with `dlpi_phnum` headers, and the pointer we gave it;
        // a PT_NOTE segment is mapped, readable and `p_memsz` long.
        unsafe {
            let hasher = &mut *hasher.cast::<std::hash::DefaultHasher>();
            let info = &*info;
            for header in std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) {
                if header.p_type == libc::PT_NOTE {
                    let start = (info.dlpi_addr as usize).wrapping_add(header.p_vaddr as usize) as *const u8;
                    hasher.write(std::slice::from_raw_parts(start, header.p_memsz as usize));
                }
            }
        }
        1 // The first object is the program itself; the libraries are not asked.
    }
    // SAFETY: `visit` has the signature asked for, and the hasher outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut *hasher).cast()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Mark<F>(PhantomData<F>);

    impl<F: Fn() -> u32 + Copy + 'static> Enter for Mark<F> {
        type Function = F;
        fn enter(function: F, frame: &mut dyn Any) {
            if let Some(mark) = frame.downcast_mut::<u32>() {
                *mark = function();
            }
        }
    }

    fn list<F: Fn() -> u32 + Copy + 'static>(function: F) -> u64 {
        offset_of::<Mark<F>>(function)
    }

    #[test]
    fn a_listed_entry_is_found_and_no_other_address_is() {
        let (one, two) = (list(|| 1), list(|| 2));
        let mut mark = 0u32;
        entry_at(one).unwrap()(&mut mark);
        assert_eq!(mark, 1);
        entry_at(two).unwrap()(&mut mark);
        assert_eq!(mark, 2);
        assert!(entry_at(one.wrapping_add(1)).is_none());
        assert!(entry_at(0).is_none());
    }

    #[test]
    fn the_fingerprint_is_stable_within_a_process() {
        assert_eq!(fingerprint(), fingerprint());
    }
}
