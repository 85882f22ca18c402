//! Writes the counters of instrumented programs (`-C instrument-coverage`, `-C profile-generate`, gcc's `--coverage`).
//! An exit handler usually does that, but a process that ends by `_exit` runs no handlers.
//!
//! The symbols are weak: zero in a program without instrumentation.

use std::ffi::{CStr, CString, c_char, c_int};

/// The address of a function that the program may have; null if it has not.
#[cfg(target_arch = "x86_64")]
macro_rules! weak {
    ($name:literal) => {{
        let address: *const ();
        // SAFETY: one load from the table of global offsets, which the linker fills; no effect on anything else.
        unsafe {
            std::arch::asm!(
                concat!(".weak ", $name),
                concat!("mov {}, qword ptr [rip + ", $name, "@GOTPCREL]"),
                out(reg) address,
                options(nostack, preserves_flags, readonly),
            );
        }
        address
    }};
}

#[cfg(target_arch = "aarch64")]
macro_rules! weak {
    ($name:literal) => {{
        let address: *const ();
        // SAFETY: one load from the table of global offsets, which the linker fills; no effect on anything else.
        unsafe {
            std::arch::asm!(
                concat!(".weak ", $name),
                concat!("adrp {0}, :got:", $name),
                concat!("ldr {0}, [{0}, :got_lo12:", $name, "]"),
                out(reg) address,
                options(nostack, preserves_flags, readonly),
            );
        }
        address
    }};
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! weak {
    ($name:literal) => {
        std::ptr::null::<()>()
    };
}

fn call(address: *const ()) -> bool {
    if address.is_null() {
        return false;
    }
    // SAFETY: each symbol that is asked for here is a C function without arguments; what it returns, if anything, is in
    // a register that nobody reads.
    let function = unsafe { std::mem::transmute::<*const (), extern "C" fn()>(address) };
    function();
    true
}

/// Writes the counters of this process. Costs nothing in a program without instrumentation.
pub(crate) fn write() {
    call(weak!("__llvm_profile_write_file"));
    // The second is in each instrumented program, the first only if something refers to it.
    let _ = call(weak!("__gcov_dump")) || call(weak!("__gcov_exit"));
}

/// The pattern of the file's name: from the environment, or from the compiler (`default_%m_%p.profraw`).
fn pattern() -> Option<String> {
    let said = std::env::var_os("LLVM_PROFILE_FILE").filter(|pattern| !pattern.is_empty());
    if let Some(said) = said {
        return said.into_string().ok();
    }
    let left = weak!("__llvm_profile_filename");
    // SAFETY: where the symbol is there it is that of a constant C string.
    let left = (!left.is_null()).then(|| unsafe { CStr::from_ptr(left.cast()) })?;
    left.to_str().ok().map(str::to_owned)
}

/// In a forked process: resets the counters, which the other process writes, and takes a file of its own, if that is named
/// by pid.
pub(crate) fn begin() {
    call(weak!("__llvm_profile_reset_counters"));
    call(weak!("__gcov_reset"));
    let set = weak!("__llvm_profile_set_filename");
    if !set.is_null()
        && let Some(pattern) = pattern().filter(|pattern| pattern.contains("%p"))
        && let Ok(name) = CString::new(pattern.replace("%p", &std::process::id().to_string()))
    {
        // SAFETY: the symbol is that of the C function `void f(const char *)`, which copies the string.
        unsafe { std::mem::transmute::<*const (), extern "C" fn(*const c_char)>(set)(name.as_ptr()) };
    }
}

/// Writes the counters and ends the process without running exit handlers.
pub(crate) fn exit(code: c_int) -> ! {
    write();
    super::spawn::exit_now(code)
}
