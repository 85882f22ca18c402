//! [The initialisers of a program](https://refspecs.linuxfoundation.org/elf/gabi4+/ch5.dynamic.html#init_fini): what
//! runs before `main`.

use std::ffi::{c_char, c_int};

/// The arguments of an initialiser: those of the program, and its environment.
pub type Arguments = (c_int, *const *const c_char, *const *const c_char);

/// A function that runs before `main`.
pub type Initializer = extern "C" fn(c_int, *const *const c_char, *const *const c_char);

unsafe extern "C" {
    /// Where the linker has put the list of initialisers, in the order in which they are called.
    #[link_name = "__init_array_start"]
    static FIRST: [usize; 0];
    #[link_name = "__init_array_end"]
    static END: [usize; 0];
}

/// In a process that was started to take a role: calls the initialisers that come after `own`, which then calls `init` and so does
/// not return. Registries that other crates fill before `main`, and the setup of C++ code there, would be missing
/// otherwise. In any other process nothing.
///
/// # Safety
/// The C library calls `own`, as one of the initialisers of this program, with `arguments`, and `own` calls this, once, and then
/// `init`.
pub unsafe fn run_initializers_after(own: Initializer, (count, arguments, variables): Arguments) {
    if super::exec::start_tag().is_none() {
        return;
    }
    // SAFETY: the linker places the two symbols around the list, which nothing writes any more.
    let list = unsafe {
        let (first, end) = (FIRST.as_ptr(), END.as_ptr());
        std::slice::from_raw_parts(first, end.offset_from_unsigned(first))
    };
    let after = list.iter().skip_while(|address| **address != own as usize).skip(1);
    // Old tool chains leave such rows.
    for address in after.copied().filter(|address| ![0, usize::MAX].contains(address)) {
        // SAFETY: each row is the address of an initialiser, and the C library has not come to this one: it waits for
        // `own`, which does not return, as the caller promises. `own` was called with these arguments.
        unsafe { std::mem::transmute::<usize, Initializer>(address)(count, arguments, variables) }
    }
}
