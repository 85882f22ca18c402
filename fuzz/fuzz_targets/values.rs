#![no_main]

libfuzzer_sys::fuzz_target!(
    // Before the fuzzer reads its corpus, so that it begins with whole messages of this version of the format.
    init: multiprocess_fuzz::write_seeds(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/values")),
    |bytes: &[u8]| multiprocess_fuzz::check(bytes)
);
