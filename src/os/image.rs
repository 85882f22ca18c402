//! The running program as data: a table of functions that other processes of the same image may enter.
//!
//! Unsafe because an address becomes a call. What makes it sound: every row of the table was written by [`offset_of`]
//! at link time and names a `fn(&mut dyn Any)`; an address that is not in the table is never called.

use crate::error::{Error, ErrorKind, Topic};
use std::any::Any;
use std::hash::Hasher;
use std::marker::PhantomData;
use std::sync::OnceLock;

// The assembler's name for a word as wide as an address, on any architecture.
#[cfg(target_pointer_width = "64")]
macro_rules! word {
    () => {
        ".quad"
    };
}
#[cfg(target_pointer_width = "64")]
macro_rules! word_size {
    () => {
        "8"
    };
}
#[cfg(target_pointer_width = "32")]
macro_rules! word {
    () => {
        ".long"
    };
}
#[cfg(target_pointer_width = "32")]
macro_rules! word_size {
    () => {
        "4"
    };
}

/// A function that can be entered by its address.
pub(crate) trait Enter {
    /// A function item, or a closure that captures nothing.
    type Function: Copy + 'static;

    /// Takes its input from `frame`, and leaves its output there. A frame of another type is left alone.
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
    #[link_name = "__start_mp_copies"]
    static COPIES_START: [u8; 0];
    #[link_name = "__stop_mp_copies"]
    static COPIES_END: [u8; 0];
}

// Each copy of this crate that is linked into a program puts its version here. `a`: loaded, `R`: the linker keeps it.
std::arch::global_asm!(
    ".pushsection mp_copies,\"aR\"",
    concat!(".ascii \"", env!("CARGO_PKG_VERSION"), " \""),
    ".popsection",
);

/// The versions of this crate that are linked into the program; usually one.
pub(crate) fn copies() -> Vec<&'static str> {
    // SAFETY: the linker places the two symbols around the texts, which are never written.
    let texts = unsafe {
        let (start, end) = (COPIES_START.as_ptr(), COPIES_END.as_ptr());
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    };
    std::str::from_utf8(texts).unwrap_or_default().split_ascii_whitespace().collect()
}

/// Returns `true` if this program has more than one.
pub(crate) fn has_copies() -> bool {
    copies().len() > 1
}

/// A hint for errors, if two copies of this crate in one program may be the cause; otherwise empty.
pub(crate) fn copies_as_cause() -> String {
    let copies = copies();
    match copies.len() {
        0 | 1 => String::new(),
        n => format!(
            " (this program has {n} copies of the crate `multiprocess`, of the versions {}, that know nothing of each other: \
             see `cargo tree -d`, and have all use one)",
            copies.join(" and ")
        ),
    }
}

/// The topic of an error of which several copies may be the cause; `otherwise` where there is one.
pub(crate) fn copies_or(otherwise: Topic) -> Topic {
    if has_copies() { Topic::TwoCopies } else { otherwise }
}

/// In place of the offset of a function that is in another loaded object than this crate. No entry is there.
const ELSEWHERE: u64 = u64::MAX;

/// The error of an offset that is that of no function here.
pub(crate) fn unknown(offset: u64) -> Error {
    let (topic, why) = match offset {
        ELSEWHERE => {
            let why = "a function lives in another dynamic library or program than the crate `multiprocess`, where other \
                       processes cannot find it: link both into the program itself (as `rlib`, not as `dylib`, and without \
                       `-C prefer-dynamic`)";
            (Topic::Dylib, why.to_string())
        }
        _ if has_copies() => {
            let copies = copies_as_cause();
            (
                Topic::TwoCopies,
                format!("a call names a function of another version of the crate `multiprocess`{copies}"),
            )
        }
        _ => {
            let why = "a call names a function that this program does not have; both sides must be the same build";
            (Topic::NotTheSameBuild, why.to_string())
        }
    };
    Error::new(ErrorKind::Decode, why).explained_by(topic)
}

/// Returns `true` if `address` is in the program or library that this crate is linked into.
fn is_in_this_object(address: usize) -> bool {
    static OBJECT: OnceLock<(usize, usize)> = OnceLock::new();
    let (start, end) = *OBJECT.get_or_init(|| this_object().unwrap_or((0, usize::MAX)));
    (start..end).contains(&address)
}

fn this_object() -> Option<(usize, usize)> {
    unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, found: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `dl_iterate_phdr` hands a valid `info` with `dlpi_phnum` headers, and the pointer we gave it.
        unsafe {
            let (info, found) = (&*info, &mut *found.cast::<Option<(usize, usize)>>());
            let headers = std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
            let loaded = headers.iter().filter(|header| header.p_type == libc::PT_LOAD).map(|header| {
                let start = (info.dlpi_addr as usize).wrapping_add(header.p_vaddr as usize);
                (start, start.wrapping_add(header.p_memsz as usize))
            });
            let range = loaded.reduce(|(a, b), (c, d)| (a.min(c), b.max(d)));
            *found = range.filter(|(start, end)| (*start..*end).contains(&anchor()));
            found.is_some().into()
        }
    }
    let mut found = None;
    // SAFETY: `visit` has the signature asked for, and `found` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut found).cast()) };
    found
}

/// The function whose address a row of the table holds.
fn enter_with<E: Enter>(frame: &mut dyn Any) {
    // SAFETY: a value without size is read from no bytes, at an aligned address that is not null. That the type is
    // inhabited: the address is known from `offset_of` only, which was given a value of it, and the value is
    // `Copy`. (A token that a closure captures is made in another process this way: see "Soundness" at `Function`.)
    let function = unsafe { std::ptr::NonNull::<E::Function>::dangling().read() };
    E::enter(function, frame);
}

/// Lists `E` in the table at link time, and returns the place of its entry.
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
            concat!(".balign ", word_size!()),
            concat!(word!(), " {}"),
            ".popsection",
            sym enter_with::<E>,
            options(nomem, nostack, preserves_flags),
        );
    }
    let entry: Entry = enter_with::<E>;
    match is_in_this_object(entry as usize) {
        true => (entry as usize).wrapping_sub(anchor()) as u64,
        false => ELSEWHERE,
    }
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
        // SAFETY: every row is the address of an `enter_with`, which is an `Entry`.
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
    fn functions_of_another_object_and_copies_of_the_crate_are_recognised() {
        assert_ne!(list(|| 3), ELSEWHERE);
        assert!(is_in_this_object(anchor()) && !is_in_this_object(libc::getpid as *const () as usize));
        assert!(entry_at(ELSEWHERE).is_none() && unknown(ELSEWHERE).help() == Some("dylib"));
        assert_eq!((copies(), copies_as_cause()), (vec![env!("CARGO_PKG_VERSION")], String::new()));
    }

    #[test]
    fn the_fingerprint_is_stable_within_a_process() {
        assert_eq!(fingerprint(), fingerprint());
    }
}
