//! Mistakes do not compile, and the compiler says what to do instead.

#[test]
fn mistakes_are_compile_errors_with_advice() {
    let tests = trybuild::TestCases::new();
    tests.pass("pass.rs");
    for mistake in [
        "anyhow",
        "arguments",
        "borrowed",
        "captures",
        "captures_string",
        "channels",
        "method",
        "pointer",
        "result",
        "starmap",
        "stays",
        "thirteen",
        "untyped",
    ] {
        tests.compile_fail(format!("{mistake}.rs"));
    }
}
