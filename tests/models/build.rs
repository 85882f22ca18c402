//! Swaps the crate's atomics for the model checker's.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=multiprocess_loom");
}
